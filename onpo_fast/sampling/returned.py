"""Responses that another program has sampled: the seed that it is given, and the checks of what it returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..data import Response
from .draw import stream_keys
from .gathering import make_response

LOWEST_LOGP, HIGHEST_LOGP = -1e6, 0.1  # nats, of a token; rounding may put one above 0


def request_seeds(streams: Sequence[Sequence[int]]) -> list[int]:
    """Returns a seed below 2**63 for each response.

    Args:
        streams: the numbers that tell a response from all others, as for ``stream_keys``.
    """
    return [key & (2**63 - 1) for key in stream_keys(streams, torch.device("cpu")).tolist()]


@dataclass(frozen=True)
class ResponseReader:
    """Makes responses of the tokens and log-probs that another program returns.

    Args:
        tokenizer: the policy's.
        eos_tokens: the tokens that end a response.
        vocabulary: exclusive upper bound of tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_tokens: Sequence[int]
    vocabulary: int

    def __call__(self, tokens: Any, logps: Any, ended: bool, most: int) -> Response:
        """Returns a response after checking it.

        Args:
            tokens: as sampled, the end-of-sequence token included.
            logps: the log-prob of each, nats.
            ended: whether the program says that a token has ended the response, not the maximum length.
            most: the maximum length.

        Raises:
            ValueError: says what is wrong.
        """
        eos = set(self.eos_tokens)
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError("its tokens are no list of integers")
        if not 0 < len(tokens) <= most:
            raise ValueError(f"it has {len(tokens)} tokens, where 1 to {most} were asked for")
        if not all(0 <= token < self.vocabulary for token in tokens):
            raise ValueError(f"it has a token beyond the model's vocabulary of {self.vocabulary}")
        if not isinstance(logps, list) or len(logps) != len(tokens):
            raise ValueError("it does not have a log-prob for each token")
        if not all(type(logp) in (int, float) and LOWEST_LOGP <= logp <= HIGHEST_LOGP for logp in logps):  # nor a NaN
            raise ValueError(f"it has a log-prob that is no number from {LOWEST_LOGP:g} to {HIGHEST_LOGP:g}")
        if eos & set(tokens[:-1]):
            raise ValueError("it goes on after an end-of-sequence token")
        if ended != (tokens[-1] in eos):
            raise ValueError(
                "it ends with no end-of-sequence token" if ended else "it ends with one, and is said not to"
            )
        if not ended and len(tokens) < most:
            raise ValueError(f"it was cut off at {len(tokens)} tokens, before the maximum of {most}")
        return make_response(tokens, math.fsum(logps), self.tokenizer, self.eos_tokens)
