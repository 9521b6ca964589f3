"""Who prefers what.

An oracle maps a prompt (a list of messages) and K responses to the K×K matrix of P(response i ≻ response j). It need
not come from a score: preferences may be cyclic. ``judge`` asks it for many groups and checks what it says.

To add an oracle: write a callable, or a ``BatchOracle``, in a file here and name it in ``make_oracle``.
docs/oracles.md says what each one asks.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from ..config import JudgeConfig, ModelConfig, OracleConfig
from ..conversations import tools_of
from ..data import Messages
from ..errors import UserError
from .interface import (
    ASYNC,
    BatchOracle,
    Oracle,
    checked,
    cyclic_triples,
    holds_model,
    judge,
    judge_texts,
    keeps_files,
    take_counters,
)
from .panel import Panel, terms
from .population import Population

__all__ = [
    "BatchOracle",
    "Oracle",
    "Panel",
    "Population",
    "checked",
    "cyclic_triples",
    "fingerprint",
    "holds_model",
    "judge",
    "keeps_files",
    "length",
    "load",
    "probe",
    "shortest_by_kind",
    "take_counters",
    "title",
]

NAMES = ("population", "pair-model", "reward-model", "judge")
PROBE_TEXTS = ("Yes, I think so.", "No.")  # responses that differ, also in length
MOST_KINDS = 8  # of conversations that an oracle is tried on


def load(
    name: str,
    config: OracleConfig | None = None,
    judge: JudgeConfig | None = None,
    policy: ModelConfig | None = None,
    directory: Path | None = None,
) -> Oracle:
    """The oracle of this name, or a panel: "0.7*population+0.3*module:function".

    Args:
        name: what --oracle says.
        config: the options of oracles that are models.
        judge: the options of the judge.
        policy: the options of the policy; an oracle that is a model is computed on its device, in its dtype.
        directory: the run's, where the judge's answers are kept unless --judge_cache says otherwise.

    Raises:
        UserError: if it cannot be had; the message names it.
    """
    sections = (config or OracleConfig(), judge or JudgeConfig(), policy or ModelConfig())
    members = terms(name)
    if len(members) == 1 and members[0][0] is None:
        return make_oracle(members[0][1], *sections, directory)
    return Panel([(weight or 1.0, member, make_oracle(member, *sections, directory)) for weight, member in members])


def title(config: OracleConfig) -> str:
    """How messages name the oracle of a run, with the model behind it."""
    return f"--oracle {config.oracle}" + (f" (--oracle_model {config.oracle_model})" if config.oracle_model else "")


def probe(oracle: Oracle, name: str, prompts: Sequence[Messages], in_directory: bool) -> None:
    """Asks an oracle one short question a prompt, so that one that is of no use shows before anything is sampled.

    A model is loaded for it and released. What it costs is not counted. A judge that has answered before, and kept its
    answers, is not asked again.

    Args:
        prompts: of the run, one of each kind of conversation.
        in_directory: whether to ask the oracles that write into the run directory, or the others; of a panel, the
            members that do.

    Raises:
        UserError: what ``judge`` says of it.
    """
    members = _members(oracle, name)
    for member, asked in members:
        if keeps_files(asked) == in_directory:
            which = "" if len(members) == 1 else f", member {member}"
            here = f"--oracle {name}{which}, tried before anything is sampled"
            judge_texts(asked, [(prompt, list(PROBE_TEXTS)) for prompt in prompts], here)
            take_counters(asked)


def shortest_by_kind(prompts: Iterable[Messages]) -> dict[frozenset[str], Messages]:
    """The shortest prompt of each kind of conversation (``kind_of``), the shortest first; at most ``MOST_KINDS``.

    A chat template may refuse a role, or one role after another. What is short is not refused for its length. A kind
    that has nothing which the chosen ones lack is left out.
    """
    shortest: dict[frozenset[str], tuple[int, Messages]] = {}
    for prompt in prompts:
        kind, size = kind_of(prompt), length(prompt)
        if kind not in shortest or size < shortest[kind][0]:
            shortest[kind] = size, prompt
    chosen: dict[frozenset[str], Messages] = {}
    covered: set[str] = set()
    for kind, (_, prompt) in sorted(shortest.items(), key=lambda item: item[1][0]):
        if not kind <= covered and len(chosen) < MOST_KINDS:
            chosen[kind] = prompt
            covered |= kind
    return chosen


def kind_of(prompt: Messages) -> frozenset[str]:
    """What a chat template may refuse of a conversation: which role follows which, tool calls, a list of tools.

    >>> sorted(kind_of([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]))
    ['start system', 'system user', 'user end']
    """
    roles = ["start", *(message["role"] for message in prompt), "end"]
    kind = {f"{role} {following}" for role, following in pairwise(roles)}
    if any(message.get("tool_calls") for message in prompt):
        kind.add("tool calls")
    if tools_of(prompt):
        kind.add("tools")
    return frozenset(kind)


def length(prompt: Messages) -> int:
    """Characters of a conversation as JSON, in which every turn counts, as its tokens do in a template."""
    return len(json.dumps(prompt))


def fingerprint(oracle: Oracle, name: str, checksum: Callable[[Path], str]) -> dict[str, str]:
    """What an oracle judges by: the checksum of each file of its models, and of its modules' source, by name.

    The formula and the judge have none: the judge's URL, model and prompt are options of the run.

    Args:
        checksum: of a file, given its resolved path.
    """
    from ..run.fingerprint import function_fingerprint  # with transformers, which takes seconds

    members = _members(oracle, name)
    files: dict[str, str] = {}
    for number, (member, judging) in enumerate(members, 1):
        kind = member.partition("=")[0]
        suffix = f" of {kind}" if len(members) == 1 else f" of member {number}, {kind}"
        if kind not in NAMES:
            found = function_fingerprint(kind, judging, checksum)
        else:
            found = judging.fingerprint(checksum) if hasattr(judging, "fingerprint") else {}
        files |= {f"{file}{suffix}": value for file, value in found.items()}
    return files


def _members(oracle: Oracle, name: str) -> list[tuple[str, Oracle]]:
    """The oracles of a panel with their names, or the one that there is."""
    if isinstance(oracle, Panel):
        return [(member, one) for _, member, one in oracle.members]
    return [(terms(name)[0][1], oracle)]


def make_oracle(
    name: str, config: OracleConfig, judge: JudgeConfig, policy: ModelConfig, directory: Path | None
) -> Oracle:
    """An oracle by its name alone, or as kind=model: members of a panel may be different models of a kind."""
    kind, equals, model = name.partition("=")
    if kind not in NAMES:
        return _function(name)
    if equals and (kind == "population" or not model):
        raise UserError(f"--oracle {name}: expected {kind}{'' if kind == 'population' else '=MODEL'}")
    # imported when asked for: transformers and the judge's client take seconds
    if kind == "pair-model":
        from .pair_model import PairModel

        return PairModel(model or config.oracle_model, config, policy)
    if kind == "reward-model":
        from .reward_model import RewardModel

        return RewardModel(model or config.oracle_model, config, policy)
    if kind == "judge":
        from .chat_judge import ChatJudge

        return ChatJudge(model or judge.judge_model, judge, directory)
    return Population()


def _function(name: str) -> Oracle:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(f'--oracle {name}: expected {", ".join(NAMES)} or "module:function"')
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules beside where the user stands
    try:
        oracle = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # the module is the user's: anything may go wrong while it is imported
        raise UserError(f"--oracle {name}: cannot import it ({type(error).__name__}: {error})") from error
    if not callable(oracle):
        raise UserError(f"--oracle {name}: {function_name} is not a function")
    if inspect.iscoroutinefunction(oracle):
        raise UserError(f"--oracle {name}: {ASYNC}")
    return oracle
