"""Preference games small enough to write down: P[i, j] = P(action i ≻ action j), with P + Pᵀ = 1.

A function of ``GAMES`` makes ``count`` games of ``actions`` actions as one array (count, actions, actions), float64.
Every algorithm plays such a batch in one call. To add a game: write it here and name it in ``GAMES``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .arguments import whole_number

MakeGames = Callable[[int, int, np.random.Generator], np.ndarray]

SUM_TOLERANCE = 1e-8  # largest error of P + Pᵀ = 1 and of a policy's sum: rounding in files and in float64 arithmetic
MOST_NUMBERS = 10**8  # largest size of a batch of games: 800 MB
DELTA = 0.01  # of ``hard_for_optimism``, unless another is given


def random(actions: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw every pair's probability uniformly from [0, 1], independently: preferences without any order."""
    upper = np.triu(rng.random((count, actions, actions)), 1)
    return _complete(upper)


def bradley_terry(actions: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return P = σ(s_i − s_j) with standard normal scores s. Transitive, so the Nash policy is the best action."""
    return _bradley_terry(rng.standard_normal((count, actions)))


def rock_paper_scissors(actions: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return games in which 0 always beats 1, 1 beats 2 and 2 beats 0. The Nash policy is (⅓, ⅓, ⅓)."""
    _check_size("rock_paper_scissors", actions)
    return np.repeat(three_cycle(1, 1, 1)[None], count, axis=0)


def weighted_rock_paper_scissors(actions: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return games with P01 = 0.9, P12 = 0.6, P20 = 0.7. The Nash policy is (1/7, 2/7, 4/7)."""
    _check_size("weighted_rock_paper_scissors", actions)
    return np.repeat(three_cycle(0.9, 0.6, 0.7)[None], count, axis=0)


def one_beats_all(actions: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return games in which action 0 always beats the others, which tie. The Nash policy is action 0."""
    upper = np.full((count, actions, actions), 0.5)
    upper[:, 0] = 1
    return _complete(np.triu(upper, 1))


def annotator_groups(actions: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the mean of three groups of annotators with different, decided preferences; it may have cycles.

    A group is Bradley-Terry with normal scores of standard deviation 4. P is the mean over groups, weighted by random
    shares near a third.
    """
    shares = rng.dirichlet(np.full(3, 20.0), count)
    tastes = _bradley_terry(4 * rng.standard_normal((count, 3, actions)))
    return np.einsum("bg,bgij->bij", shares, tastes)


def cyclic(actions: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return games of n actions on a circle: each beats the ⌊(n−1)/2⌋ after it, and loses to as many before it.

    The winning probability of a pair is uniform in [0.6, 1], so that the Nash policy is not uniform. If n is
    even, opposite actions tie.
    """
    after = np.arange(actions)[None, :] - np.arange(actions)[:, None]
    after = after % actions
    half = (actions - 1) // 2
    sure = rng.uniform(0.6, 1, (count, actions, actions))
    wins = np.where((after >= 1) & (after <= half), sure, 0.5)
    wins = np.where(after > actions - 1 - half, 1 - wins.swapaxes(1, 2), wins)
    return _complete(np.triu(wins, 1))


def hard_for_optimism(actions: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the games ``hard_game(DELTA)``, where the last policy of optimistic methods is slow to settle."""
    _check_size("hard_for_optimism", actions)
    return np.repeat(hard_game(DELTA)[None], count, axis=0)


GAMES: dict[str, MakeGames] = {
    "random": random,
    "bradley_terry": bradley_terry,
    "rock_paper_scissors": rock_paper_scissors,
    "weighted_rock_paper_scissors": weighted_rock_paper_scissors,
    "one_beats_all": one_beats_all,
    "annotator_groups": annotator_groups,
    "cyclic": cyclic,
    "hard_for_optimism": hard_for_optimism,
}
SIZES = {"rock_paper_scissors": 3, "weighted_rock_paper_scissors": 3, "hard_for_optimism": 4}  # actions; others: any


def make(source: str, actions: int | None = None, count: int = 1, seed: int = 0) -> np.ndarray:
    """Return games by name, or those in a file, (B, n, n).

    Args:
        source: a name in ``GAMES``, ``hard_for_optimism=DELTA``, or a path.
        actions, count, seed: of a named game; the default number of actions is that in ``SIZES``, or 10.

    Raises:
        ValueError: if there is no such game or file, or the file does not hold preference matrices.
    """
    name, _, delta = source.partition("=")
    if name == "hard_for_optimism" and delta:
        _check_size(name, SIZES[name] if actions is None else actions)
        return np.repeat(hard_game(_number(source, delta))[None], whole_number("count", count), axis=0)
    if source not in GAMES and not Path(source).suffix:
        raise ValueError(f"there is no game {source}; there are {', '.join(GAMES)}, and files of {', '.join(READERS)}")
    if source not in GAMES:
        P = read(source)
        return P[None] if P.ndim == 2 else P
    if actions is None:
        actions = SIZES.get(source, 10)
    if actions < 2 or count < 1 or seed < 0:
        raise ValueError(f"{source} needs at least two actions and one game, and a seed of 0 or more")
    if count * actions**2 > MOST_NUMBERS:
        raise ValueError(f"{count} games of {actions} actions are more than {MOST_NUMBERS:,} numbers: ask for less")
    return GAMES[source](actions, count, np.random.default_rng(seed))


def three_cycle(p01: float, p12: float, p20: float) -> np.ndarray:
    """Return the game in which action 0 beats 1, 1 beats 2 and 2 beats 0 with these probabilities, (3, 3).

    If all are above ½, its Nash policy is (p12 − ½, p20 − ½, p01 − ½), normalised.
    """
    return np.array([[0.5, p01, 1 - p20], [1 - p01, 0.5, p12], [p20, 1 - p12, 0.5]])


def hard_game(delta: float) -> np.ndarray:
    """Return A_δ = [[½ + δ, ½], [0, 1]], symmetrised, (4, 4): optimistic methods are slow here (arXiv 2406.10631).

    The row player has the Nash strategy (1, δ)/(1 + δ), the column player (½, ½ + δ)/(1 + δ). The gap of the last
    policy falls to about δ and comes back, to more than 0.4, at a round of the order of 1/δ. The paper proves that the
    gap is above a constant at such a round for optimistic methods that weigh all past rewards alike, which exact ONPO
    is one of: no rate of their last policies holds for all games.

    Raises:
        ValueError: if δ is not in (0, ½].
    """
    if not 0 < delta <= 0.5:
        raise ValueError(f"delta must be above 0 and at most 0.5, not {delta!r}")
    return symmetrised(np.array([[0.5 + delta, 0.5], [0, 1]]))


def symmetrised(A: np.ndarray) -> np.ndarray:
    """Return the preference game in which each side plays both roles of a zero-sum game at once, (m·n, m·n).

    Action i·n + j is the pair of row i, played against the other side's column, and column j, played against the
    other side's row. A row loses A and a column wins it, so P((i, j) ≻ (k, l)) = ½ + (A[k, j] − A[i, l])/2.

    For a policy with the marginals x over rows and y over columns, P((i, j) ≻ π) = ½ + ((xᵀA)_j − (Ay)_i)/2: a sum of a
    term of the row and one of the column. Hence a policy's duality gap is that of (x, y) in A, max (xᵀA) − min (Ay),
    and from a product policy, as the uniform one is, every step of mirror descent, optimistic or not, leads to another
    product: each marginal takes the two players' own step in A with η/2. A policy is a Nash policy exactly if its
    marginals are Nash strategies of A. There are several if those are mixed; one of them is a product if A has one
    solution.

    Args:
        A: what the row player pays the column player, (m, n), in [0, 1].

    Raises:
        ValueError: if an entry is outside [0, 1].
    """
    m, n = A.shape
    P = 0.5 + (A.T[None, :, :, None] - A[:, None, None, :]) / 2  # (i, j, k, l)
    return check(np.broadcast_to(P, (m, n, m, n)).reshape(m * n, m * n))


def read(path: str | Path) -> np.ndarray:
    """Read the game, or games, in a file: .npy (an array), .json (nested lists) or .csv (one game).

    Raises:
        ValueError: if the file has another format or is not a preference matrix; the message names it.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a file with a game must end in {', '.join(READERS)}")
    try:
        return check(READERS[path.suffix](path))
    except OSError as error:
        raise ValueError(f"{path}: cannot read it ({error.strerror or error})") from None
    except (ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path}: {error}") from None


def check(preferences: np.ndarray) -> np.ndarray:
    """Check a preference matrix (n, n), or a batch of them (B, n, n), and return it as float64.

    Raises:
        ValueError: if it is not square, an entry is outside [0, 1], or P + Pᵀ is not 1; names the worst entry.
    """
    P = np.asarray(preferences)
    if P.dtype.kind not in "fiub":
        raise ValueError(f"P must be an array of numbers, not of {P.dtype}")
    tolerance, rounded = tolerance_of(P), P.dtype.itemsize < 8 and P.dtype.kind == "f"
    P = P.astype(np.float64)
    if P.ndim not in (2, 3) or P.shape[-1] != P.shape[-2] or not P.size:
        raise ValueError(f"P must be square, of shape (n, n) or (B, n, n), not {P.shape}")
    from_half = np.abs(P - 0.5)
    if not (from_half <= 0.5).all():
        at = _worst(np.where(np.isnan(from_half), np.inf, from_half))
        raise ValueError(f"P[{_index(at)}] = {P[at]:.10g} is not a probability in [0, 1]")
    off = np.abs(P + P.swapaxes(-1, -2) - 1)
    if not (off <= tolerance).all():
        at = _worst(off)
        i, j = at[-2:]
        mirror = (*at[:-2], j, i)
        raise ValueError(
            f"P + Pᵀ must be 1; P[{_index(at)}] = {P[at]:.10g} and P[{_index(mirror)}] = {P[mirror]:.10g} are the "
            f"farthest from it{' (an action against itself is ½)' if i == j else ''}; (P + 1 − Pᵀ)/2 would be valid"
        )
    return (P + 1 - P.swapaxes(-1, -2)) / 2 if rounded else P


def tolerance_of(values: np.ndarray) -> float:
    """Return the error that rounding to the array's type may leave in a sum that should be 1."""
    return max(SUM_TOLERANCE, 4 * float(np.finfo(values.dtype).eps)) if values.dtype.kind == "f" else SUM_TOLERANCE


def _worst(distance: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(distance.argmax(), distance.shape))


def _index(at: tuple[int, ...]) -> str:
    return ", ".join(map(str, at))


def _complete(upper: np.ndarray) -> np.ndarray:
    """Return the full matrix of an upper triangle: 1 minus its transpose below, ½ on the diagonal."""
    lower = np.tril(np.ones(upper.shape[-2:]), -1)
    return upper + lower * (1 - upper.swapaxes(-1, -2)) + 0.5 * np.eye(upper.shape[-1])


def _bradley_terry(scores: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh((scores[..., :, None] - scores[..., None, :]) / 2))


def _check_size(name: str, actions: int) -> None:
    if actions != SIZES[name]:
        raise ValueError(f"{name} has {SIZES[name]} actions, not {actions}; the game cyclic takes any number")


def _number(source: str, text: str) -> float:
    """Return the number in a game's name, such as hard_for_optimism=0.03."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{source}: {text} is not a number") from None


def _read_npy(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def _read_json(path: Path) -> np.ndarray:
    return np.array(json.loads(path.read_text(encoding="utf-8")))


def _read_csv(path: Path) -> np.ndarray:
    return np.loadtxt(path, delimiter=",", ndmin=2)


READERS = {".npy": _read_npy, ".json": _read_json, ".csv": _read_csv}
