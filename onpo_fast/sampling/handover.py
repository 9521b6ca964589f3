"""The check of responses that a sampler returned: are they draws from the policy, in the way that was asked for?

A program that samples may hold the weights of an earlier policy, an old LM head, another tokenizer or chat template, or
apply settings of its own. Two tests detect this, on responses chosen at random, whatever they say:

- **Log-probs.** What the sampler says of each response is compared with the policy's own log-prob in float32. In
  bfloat16 the policy itself is off by rounding, which is measured on the same responses.
- **Draws.** Truncated or sharpened sampling leaves log-probs at temperature 1 right. So the responses' likelihood under
  each fault is divided by that under what was asked. If sampling is right, the ratio has a mean of at most 1, and by
  Markov's inequality it exceeds 1/α with a probability of at most α, whatever the lengths of the responses.

docs/sampling.md says what they can see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers.generation import TopPLogitsWarper

from ..config import SamplingConfig
from ..data import Group, Response
from ..errors import UnusableResults
from ..loss import Head
from ..models.checks import computing
from ..models.heads import head_arguments
from ..models.policy import OUTLIERS, Policy, disagreement
from ..out_of_memory import in_halves
from ..packing import TokenGroup, microbatches, pack

CHECKED_TOKENS = 4096  # tokens of responses that are checked, if there are so many
PROBES = 32  # responses that tell rounding from other weights in bfloat16; fewer are allowed to be further off
FALSE_ALARMS = 1e-9  # probability that a test stops a run whose sampler is right
KERNELS = 3.0  # times the policy's own rounding in bfloat16 that a sampler's may be

TEMPERATURES = (0.5, 0.7, 0.9, 1.1, 1.5)  # times the one that was asked for
TOP_K = (20, 50, 1024)
TOP_P = (0.8, 0.9, 0.95, 0.98, 0.99)
MIN_P = (0.05,)
REPETITION_PENALTIES = (1.05, 1.2)
FAULT_SHARE = 0.95  # of a fault in the alternative to what was asked, so that no single token excludes it
NUCLEUS_LEAK = 1e-3  # share of all tokens in a nucleus that was asked for, since rounding may decide at its edge
LIKELIEST = max(TOP_K)  # tokens among which the nucleus of a fault is sought

MICROBATCH_TOKENS = 4096  # packed tokens in one forward pass
ROWS = 64  # tokens whose logits are in memory at a time

CAUSES = {
    "local": "the run would learn from wrong numbers. Another version of transformers, or kernels that the family can "
    "use (mamba-ssm, causal-conv1d), may agree",
    "other": "it may have the weights of an earlier policy (a reload in place keeps the old LM head of a model whose "
    "head is tied to the embedding) or of another model, another tokenizer or chat template, quantised weights or "
    "another dtype, or it may give log-probs that are not at temperature 1",
}


@torch.no_grad()
def check(
    policy: Policy, groups: Sequence[Group], config: SamplingConfig, enough_tokens: float = CHECKED_TOKENS
) -> dict[str, float]:
    """Checks that responses were sampled from a policy as the options ask.

    Weights in half precision are converted to float32 meanwhile.

    Args:
        policy: the policy; the model is whole on its device.
        groups: prompts and responses, with the sampler's log-probs.
        config: the options of sampling.
        enough_tokens: of responses chosen at random, after which no others are checked; ``math.inf``: all are.

    Returns:
        What was found, for metrics.jsonl. "checked_responses", "checked_tokens"; "logp_difference": the sampler's
        log-probs minus the policy's, nats a token; "logp_error": their root mean square over responses, each divided by
        the square root of its number of tokens, nats; "rounding": the same of the policy itself in its own dtype;
        "fault_evidence": logarithm of the largest likelihood ratio of a fault, nats.

    Raises:
        UnusableResults: if they were not sampled from it; says the difference and likely causes.
    """
    chosen = choose(groups, enough_tokens)
    if not chosen:
        raise UnusableResults(f"--sampler {config.sampler} returned no tokens")
    tokens = torch.tensor([len(response.tokens) for _, response in chosen], dtype=torch.float64)
    sampled = torch.tensor([response.logp for _, response in chosen], dtype=torch.float64)
    responses = [(prompt, [response.tokens]) for prompt, response in chosen]
    _check_tokens(policy, responses, config)
    policy.model.eval()
    with computing(f"a model of the family {policy.family}"):
        with policy.in_float32():
            exact, evidence = _log_probs_and_evidence(policy, responses, config)
        rounded = exact
        if policy.compute_dtype != torch.float32:
            rounded = _log_probs(policy, responses)
    error, rounding = _error(sampled - exact, tokens), _error(rounded - exact, tokens)
    fault = max(evidence, key=evidence.__getitem__)
    found = {
        "checked_responses": len(chosen),
        "checked_tokens": int(tokens.sum()),
        "logp_difference": float((sampled - exact).sum() / tokens.sum()),
        "logp_error": error,
        "rounding": rounding,
        "fault_evidence": evidence[fault],
    }
    differ = disagreement(sampled, exact, tokens, policy.compute_dtype)
    if differ is None and policy.compute_dtype != torch.float32 and not error <= _allowed(rounding, len(chosen)):
        differ = f"by {error:.2g} nats for the square root of a token, and rounding explains {rounding:.2g}"
    if differ is not None:
        raise UnusableResults(_describe_difference(policy, config, differ, found["logp_difference"]))
    if evidence[fault] > most_evidence(len(evidence), int(tokens.sum()), config.top_p):
        raise UnusableResults(_describe_fault(config, fault, evidence[fault]))
    return found


def most_evidence(faults: int, tokens: int, top_p: float) -> float:
    """Returns the largest logarithm of a likelihood ratio that chance may explain, nats.

    Args:
        faults: number of faults whose ratios are computed.
        tokens: number of tokens that are checked.
        top_p: the value of --top_p. Below 1, what was asked for is computed with ``NUCLEUS_LEAK``, so that the mean of
            a ratio may grow by 1/(1 − NUCLEUS_LEAK) with each token.
    """
    leak = 0.0 if top_p == 1 else -tokens * math.log1p(-NUCLEUS_LEAK)
    return math.log(faults / FALSE_ALARMS) + leak


def choose(groups: Sequence[Group], enough_tokens: float = CHECKED_TOKENS) -> list[tuple[list[int], Response]]:
    """Returns prompt tokens and responses that are checked: in a random order until there are enough tokens.

    The order does not depend on the responses. If they were the shortest, or those that were there first, they would
    be no draws from the policy, whose shorter responses are likelier than its longer ones.
    """
    every = [(group.prompt_tokens, response) for group in groups for response in group.responses if response.tokens]
    chosen: list[tuple[list[int], Response]] = []
    tokens = 0
    for index in np.random.default_rng(0).permutation(len(every)):
        if tokens >= enough_tokens:
            break
        chosen.append(every[index])
        tokens += len(every[index][1].tokens)
    return chosen


def _log_probs(policy: Policy, responses: Sequence[TokenGroup]) -> Tensor:
    """Returns the summed log-prob of each response, (R,) float64 on the CPU, nats, by logits in the policy's dtype."""
    sums = torch.zeros(len(responses), dtype=torch.float64)
    for index, rows, logits in _logits(policy, responses):
        targets = torch.tensor(responses[index][1][0][rows], device=logits.device)
        sums[index] += _at(logits.double().log_softmax(-1), targets).sum().cpu()
    return sums


def _log_probs_and_evidence(
    policy: Policy, responses: Sequence[TokenGroup], config: SamplingConfig
) -> tuple[Tensor, dict[str, float]]:
    """Returns ``_log_probs``, and for each fault the log of its likelihood ratio to what was asked, nats."""
    sums = torch.zeros(len(responses), dtype=torch.float64)
    evidence: dict[str, float] = {}
    for index, rows, logits in _logits(policy, responses):
        prompt, (response,) = responses[index]
        targets = torch.tensor(response[rows], device=logits.device)
        sums[index] += _at(logits.double().log_softmax(-1), targets).sum().cpu()
        logits = logits / config.temperature
        asked = asked_log_probs(logits, targets, config.top_p)
        seen = _seen(prompt, response, rows, logits.shape[1]).to(logits.device)
        for name, logps in fault_log_probs(logits, targets, seen).items():
            other = logps - asked + math.log(FAULT_SHARE)
            ratio = torch.logaddexp(other, torch.full_like(other, math.log(1 - FAULT_SHARE)))
            evidence[name] = evidence.get(name, 0.0) + float(ratio.double().sum())
    return sums, evidence


def _logits(policy: Policy, responses: Sequence[TokenGroup]) -> Iterator[tuple[int, slice, Tensor]]:
    """Yields the logits of a few tokens of a response at a time.

    Yields:
        The index of the response, which of its tokens they are, and (n, V) float32 logits.
    """

    def hidden_states(some: Sequence[int]) -> list[Tensor]:
        packed = pack([responses[i] for i in some], policy.layout).to(policy.device)
        with policy.autocast():
            hidden = policy.scoring.hidden_states(packed)
        return list(hidden.split([len(responses[i][1][0]) for i in some]))

    head = Head(**head_arguments(policy.model))
    for chosen in microbatches(responses, policy.layout, MICROBATCH_TOKENS, policy.rotary_boundary):
        found = in_halves(hidden_states, chosen, "sampled responses are checked", "--max_new_tokens")
        for index, hidden in zip(chosen, found):
            for start in range(0, len(hidden), ROWS):
                rows = slice(start, start + ROWS)
                with policy.autocast():
                    logits = head.logits(hidden[rows])
                yield index, rows, logits.float()


def asked_log_probs(logits: Tensor, targets: Tensor, top_p: float) -> Tensor:
    """Returns log-probs of tokens under the distribution that is sampled from.

    Args:
        logits: (n, V), divided by the temperature.
        targets: (n,) int64.
        top_p: the value of --top_p.

    Returns:
        (n,), nats.
    """
    logps = _at(logits.log_softmax(-1), targets)
    if top_p == 1:
        return logps
    inside = _at(TopPLogitsWarper(top_p)(None, logits).log_softmax(-1), targets)
    return torch.logaddexp(inside + math.log1p(-NUCLEUS_LEAK), logps + math.log(NUCLEUS_LEAK))


def fault_log_probs(logits: Tensor, targets: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """Returns log-probs of tokens under each fault.

    Args:
        logits: (n, V), divided by the temperature that was asked for.
        targets: (n,) int64.
        seen: (n, V), whether a token is in the prompt or earlier in the response.

    Returns:
        (n,) each, nats, by what the fault is called; −∞ for a token that it excludes. Tokens as likely as the least
        likely one that a fault allows are allowed too, so that each is a distribution, also with ties.
    """
    target = _at(logits, targets)
    found = {
        f"{factor:g} times the temperature": target / factor - (logits / factor).logsumexp(-1)
        for factor in TEMPERATURES
    }
    for penalty in REPETITION_PENALTIES:
        penalised = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        found[f"repetition_penalty {penalty:g}"] = _at(penalised.log_softmax(-1), targets)

    top = logits.topk(min(LIKELIEST, logits.shape[1])).values  # (n, m), the likeliest first
    shares = (top - logits.logsumexp(-1, keepdim=True)).exp()
    likelier = shares.cumsum(-1) - shares  # total probability of all that are likelier
    ranks = torch.arange(top.shape[1], device=top.device).expand_as(top)
    kept = {
        **{f"top_k {k}": ranks < k for k in TOP_K},
        **{f"top_p {p:g}": likelier < p for p in TOP_P},
        **{f"min_p {p:g}": top >= top[:, :1] + math.log(p) for p in MIN_P},
    }
    for name, keep in kept.items():
        least = top.masked_fill(~keep, math.inf).amin(-1, keepdim=True)
        total = logits.masked_fill(logits < least, -math.inf).logsumexp(-1)
        found[name] = (target - total).masked_fill(target < least[:, 0], -math.inf)
    return found


def _at(values: Tensor, targets: Tensor) -> Tensor:
    """(n, V), (n,) -> (n,): the value of each row at its target."""
    return values.gather(1, targets[:, None])[:, 0]


def _seen(prompt: list[int], response: list[int], rows: slice, vocabulary: int) -> Tensor:
    """Returns (n, V) bool: which tokens are in the prompt or, before each of these rows, in the response."""
    first = torch.full((vocabulary,), len(response) + 1)  # the row from which on a token has been seen
    first.scatter_reduce_(0, torch.tensor(response), torch.arange(1, len(response) + 1), "amin")
    first[[token for token in prompt if token < vocabulary]] = 0
    return first <= torch.arange(len(response))[rows, None]


def _error(differences: Tensor, tokens: Tensor) -> float:
    """Returns the root mean square of the summed differences, each over √tokens, but for the share of outliers."""
    squares = (differences.square() / tokens).sort().values
    return float(squares[: len(squares) - int(OUTLIERS * len(squares))].mean().sqrt())


def _allowed(rounding: float, responses: int) -> float:
    """Returns the largest error of a sampler that rounding may explain.

    Two kernels that round as much have mean squares whose ratio follows an F distribution. ``KERNELS`` allows for one
    that rounds more, and is enough for chance from ``PROBES`` responses on.
    """
    return rounding * max(KERNELS, math.sqrt(stats.f.isf(FALSE_ALARMS, responses, responses)))


def _check_tokens(policy: Policy, responses: Sequence[TokenGroup], config: SamplingConfig) -> None:
    """Raises ``UnusableResults`` if a response has tokens that the policy has not."""
    rows = policy.token_bound
    for _, (response,) in responses:
        if wrong := [token for token in response if not 0 <= token < rows]:
            raise UnusableResults(
                f"--sampler {config.sampler} returned the token {wrong[0]}, and the policy has {rows}: it has another "
                "model or tokenizer"
            )


def _describe_difference(policy: Policy, config: SamplingConfig, differ: str, mean: float) -> str:
    if config.sampler == "local":
        return (
            f"the log-probs that the policy (family {policy.family}) generates with differ from those that it is "
            f"scored by {differ}: {CAUSES['local']}"
        )
    return (
        f"--sampler {config.sampler} did not sample from the policy: its log-probs differ from the policy's {differ}, "
        f"on average by {mean:+.2g} nats a token; {CAUSES['other']}"
    )


def _describe_fault(config: SamplingConfig, fault: str, evidence: float) -> str:
    return (
        f"--sampler {config.sampler} did not draw tokens as --temperature {config.temperature:g} and --top_p "
        f"{config.top_p:g} ask: its responses are e^{evidence:.0f} times as likely with {fault}. It may truncate or "
        "sharpen what it samples from by settings of its own, as from the model's generation_config.json (temperature, "
        "top_k, top_p, min_p, repetition_penalty); vLLM ignores those with --generation-config vllm"
    )
