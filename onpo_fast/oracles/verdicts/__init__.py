"""Reads a judge's answer: its text gives a verdict, and the log-probs of the verdict's token a preference.

``reading`` has the public functions, ``read_answer`` and ``preference_of``. It uses ``reasoning`` (where the answer
begins), ``decision`` (what the answer decides), ``choices``, ``marks`` and ``sentences`` (the forms of a verdict, from
a lone letter to prose) and ``logprobs`` (the tokens of an answer).

An answer that contradicts itself has no verdict. A verdict that is missed is asked for once more and then counted as
invalid; an inverted one would go unnoticed.

No regular expression takes more than linear time: every repetition is bounded, or of characters that end it.
"""

from .logprobs import top_logprobs
from .reading import PARSER_VERSION, Reading, preference_of, read_answer, verdict

__all__ = ["PARSER_VERSION", "Reading", "preference_of", "read_answer", "top_logprobs", "verdict"]
