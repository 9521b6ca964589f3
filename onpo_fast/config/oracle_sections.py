"""Options of the oracle and of the judge."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .values import check_at_least, check_key_name, check_object, check_positive, check_values

OPTIONS_OF_ORACLES = {  # options that say that these oracles are to judge
    "judge_url": ("judge",),
    "judge_model": ("judge",),
    "oracle_model": ("pair-model", "reward-model"),
}


@dataclass
class OracleConfig:
    """The oracle: who decides which response is preferred (docs/oracles.md)."""

    oracle: str = "population"
    """Preference oracle: "population" (three groups of annotators as formulas, needs no model), "openings" (the kind of
    a response's first word; cyclic, needs no model), "pair-model" or "reward-model" (a local model, see
    --oracle_model), "judge" (a chat model behind an API, see --judge_url), or "module:function" with your Python
    function f(prompt, responses) -> K×K matrix of P(response i ≻ response j), where prompt is the list of messages.
    Oracles are mixed with weights as in 0.7*population+0.3*judge; weights are normalised. NAME=MODEL gives one its own
    model."""
    oracle_model: str | None = None
    """Model of the oracles "pair-model" and "reward-model": a Hugging Face id or a directory (the paper's pair model:
    RLHFlow/pair-preference-model-LLaMA3-8B)."""
    oracle_device: str | None = None
    """Device of the models of "pair-model" and "reward-model", such as cuda:1. On another device than --device they
    stay in memory beside the policy, and judge while it samples. Default: --device."""
    oracle_max_tokens: int = 3072
    """Maximum input of "pair-model" and "reward-model" in tokens; a longer one stops the run and is never cut off. The
    default is what the paper's pair model was trained with."""
    oracle_batch_tokens: int = 12288
    """Tokens, padding included, in one forward pass of "pair-model" or "reward-model". Lower it when the oracle runs
    out of memory; preferences change only by rounding."""

    def __post_init__(self) -> None:
        check_values(self, OracleConfig)
        check_at_least(self, 1, "oracle_max_tokens", "oracle_batch_tokens")


@dataclass
class JudgeConfig:
    """The oracle "judge": a chat model behind an OpenAI-compatible API (docs/oracles.md)."""

    judge_url: str | None = None
    """Base URL of the judge's OpenAI-compatible API, such as http://localhost:8000/v1."""
    judge_model: str | None = None
    """Name of the judge's model, as its API calls it."""
    judge_prompt: str | None = None
    """Text file with the judge's instructions, which contains {conversation}, {response_a} and {response_b}. A copy is
    kept in the run directory as judge_prompt.txt, and it must not change during a run. Default: the prompt in
    docs/oracles.md."""
    judge_key_variable: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the API key, if the server needs a key. Keys are never saved. A
    variable other than the default must be set; if a file names it, it must end in _API_KEY or _TOKEN."""
    judge_max_tokens: int = 16
    """Maximum length of a judge's answer in tokens. Raise it to thousands for a model that reasons before it
    answers."""
    judge_request: dict | None = None
    """Fields to add to or change in each request to the judge, as a JSON object; null removes a field:
    '{"max_tokens": null, "max_completion_tokens": 4000}'. Never put a key here: it is saved in config.yaml."""
    judge_concurrency: int = 8
    """Maximum number of requests to the judge at the same time."""
    judge_timeout: float = 60.0
    """Time limit of one request to the judge, in seconds."""
    judge_retries: int = 15
    """Retries of a failed request to the judge before the run stops. The wait before a retry doubles up to a minute, so
    that 15 retries give a server at least five minutes to restart."""
    judge_max_invalid_rate: float = 0.5
    """Stop the run when more than this share of the judge's answers, in [0, 1], contains no verdict. Such an answer
    counts as a tie."""
    judge_cache: str | None = None
    """SQLite file with the judge's answers, which several runs may share. Default: judge.sqlite in the run
    directory."""

    def __post_init__(self) -> None:
        check_key_name(self, "judge_key_variable")
        check_values(self, JudgeConfig)
        check_at_least(self, 1, "judge_max_tokens", "judge_concurrency")
        check_object(self, "judge_request")
        check_at_least(self, 0, "judge_retries")
        check_positive(self, "judge_timeout")
        if not 0 <= self.judge_max_invalid_rate <= 1:
            raise UserError(f"--judge_max_invalid_rate must be in [0, 1], not {self.judge_max_invalid_rate}")
