"""Counter-based random draws of tokens, in numpy: the definition of the random stream.

A token is drawn as argmax(logits / temperature + Gumbel noise), which is an exact draw from the softmax. The noise of a
token is a pure function of the response's key, the position in the response and the token. There is no state: it does
not depend on the batch or on earlier draws, and on the device only through rounding in the last bits.

    words = Philox4x32-10(key, counter = (token // 4, position, 0, 0))
    u     = (words[token % 4] + 1/2) · (1 − 2⁻²⁴) / 2³², in float32
    noise = −log(−log(1 − u))

Philox is the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011): four 32-bit words of a 64-bit key and a 128-bit counter. Ten rounds are its default; seven pass BigCrush.

An argmax is decided by large noise. Large noise comes from u near 0, where float32 distinguishes all words: the largest
noise is 33·log 2 = 22.9, and P(noise > x) is exact to one part in 2²⁴ plus 2⁻³³. The smallest is −2.8, from u near 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10
SCALE = (1 - 2**-24) * 2**-32  # the largest word gives the largest float32 below 1
CACHED_TOKENS = 2**16  # tokens of several rows at a time, so that intermediate results stay in the cache
MASK, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def block(vocabulary: int) -> int:
    """Return how many tokens of a row are computed at a time: a power of 2, at least 4."""
    return min(16384, max(4, 1 << (vocabulary - 1).bit_length()))


def draw(
    logits: Tensor,  # (B, V) any float dtype, computed with in float32
    keys: Tensor,  # (B,) int64
    positions: Tensor | int,  # (B,) int64, or one position for all rows
    temperature: float = 1.0,
    allowed: Tensor | None = None,  # (B, V) bool
) -> tuple[Tensor, Tensor]:
    """Draw a token for every row. Tensors elsewhere are copied to the CPU and back.

    On one thread: two were at most 14% faster with 32 rows of 49,152 tokens, as they wait for the interpreter's lock.

    Args:
        logits: tokens with −inf are never drawn.
        keys: keys of the rows' random streams.
        positions: index of each row's token in its response.
        temperature: the draw is from softmax(logits / temperature).
        allowed: the tokens that may be drawn; default all.

    Returns:
        (B,) int64 tokens, and their (B,) float32 log-probs in nats under softmax(logits), which do not depend on the
        temperature and on ``allowed``.
    """
    rows, vocabulary = logits.shape
    width = block(vocabulary)
    step = max(CACHED_TOKENS // width, 1)
    tokens, logps = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    values = logits.float().cpu()
    streams = keys.cpu().numpy()
    places = np.broadcast_to(positions.cpu().numpy() if isinstance(positions, Tensor) else positions, rows)
    among = None if allowed is None else allowed.cpu().numpy()
    for start in range(0, rows, step):
        r = slice(start, start + step)
        some = None if among is None else among[r]
        drawn = _draw_rows(values[r].numpy(), streams[r], places[r], temperature, some, width)
        tokens[r] = torch.from_numpy(drawn)
        logps[r] = values[r].log_softmax(1).gather(1, tokens[r, None])[:, 0]
    return tokens.to(logits.device), logps.to(logits.device)


@np.errstate(all="ignore")  # a row without a finite logit gives NaN without a warning, as in torch
def _draw_rows(
    logits: np.ndarray,  # (R, V) float32
    keys: np.ndarray,  # (R,) int64
    positions: np.ndarray,  # (R,) int64
    temperature: float,
    allowed: np.ndarray | None,  # (R, V) bool
    width: int,
) -> np.ndarray:
    """Return the (R,) tokens that are drawn."""
    rows, vocabulary = logits.shape
    each = np.arange(rows)
    best, token = np.full(rows, -np.inf, np.float32), np.zeros(rows, np.int64)
    for start in range(0, vocabulary, width):
        x = logits[:, start : start + width]
        score = x * np.float32(1 / temperature)
        score += gumbel(keys, positions, start, x.shape[1])
        if allowed is not None:
            score[~allowed[:, start : start + width]] = -np.inf
        np.putmask(score, score != score, -np.inf)  # NaN is not drawn
        first = score.argmax(1)
        better = score[each, first] > best
        best = np.where(better, score[each, first], best)
        token = np.where(better, start + first, token)
    return token


def gumbel(
    keys: np.ndarray,  # (R,) int64
    positions: np.ndarray | int,  # (R,) int64, or one position for all rows
    start: int,  # a multiple of 4
    count: int,
) -> np.ndarray:
    """Return standard Gumbel noise for the tokens start, start + 1, …: (R, count) float32."""
    groups = -(-count // 4)
    words = np.empty((len(keys), groups, 4), np.float32)
    key = keys.view(np.uint64)[:, None]
    group = start // 4 + np.arange(groups, dtype=np.uint64)[None]
    position = np.asarray(positions, np.uint64).reshape(-1, 1)
    zero = np.zeros((1, 1), np.uint64)
    for i, word in enumerate(philox((key & MASK, key >> HALF), (group, position, zero, zero))):
        words[..., i] = word
    u = words.reshape(len(keys), -1)[:, :count]
    u += 0.5
    u *= SCALE
    complement = 1 - u
    lost = u - (1 - complement)  # rounding error of 1 − u, added to −log(1 − u), which has slope 1 near u = 0
    return -np.log(lost - np.log(complement))


def philox(key: Sequence[np.ndarray], counter: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: return four words for every key (two words) and counter (four words).

    A word is an array of uint64 below 2³², because products need 64 bits. Arrays are broadcast as late as possible, so
    that what depends on the row alone or on the column alone is computed once for it.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(ROUNDS):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> HALF) ^ c1 ^ k0, b & MASK, (a >> HALF) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & MASK, (k1 + np.uint64(0xBB67AE85)) & MASK
    return c0, c1, c2, c3
