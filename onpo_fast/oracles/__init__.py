"""Oracles, which say which response is preferred.

An oracle maps a prompt (a list of messages) and K responses to a K×K matrix of P(response i ≻ response j). Preferences
need not come from a score and may be cyclic. ``load`` makes the oracle that --oracle names; ``judge`` asks it about
many groups and checks its answers. docs/oracles.md describes each one.

To add an oracle, write a callable or a ``BatchOracle`` in a file here and name it in ``make_oracle``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from ..config import JudgeConfig, ModelConfig, OracleConfig
from ..config.oracle_names import FORMULAS, NAMES, terms
from ..conversations import tools_of
from ..data import Messages
from ..errors import UserError
from ..user_functions import import_function
from .classes import OPENINGS, ClassPreference, class_shares, cyclic_preference, transitive_preference
from .interface import (
    ASYNC,
    BatchOracle,
    IndexPairs,
    Oracle,
    checked,
    compares_pairs,
    cyclic_triples,
    holds_model,
    judge,
    judge_texts,
    keeps_files,
    take_counters,
)
from .panel import Panel
from .population import Population

__all__ = [
    "OPENINGS",
    "BatchOracle",
    "ClassPreference",
    "IndexPairs",
    "Oracle",
    "Panel",
    "Population",
    "checked",
    "class_shares",
    "compares_pairs",
    "computes_elsewhere",
    "cyclic_preference",
    "cyclic_triples",
    "fingerprint",
    "holds_model",
    "is_shared",
    "judge",
    "keeps_files",
    "length",
    "load",
    "probe",
    "shortest_by_kind",
    "take_counters",
    "title",
    "transitive_preference",
]

PROBE_TEXTS = ("Yes, I think so.", "No.")  # two responses that differ, also in length
MAX_KINDS = 8  # kinds of conversations that an oracle is tried on


def load(
    name: str,
    config: OracleConfig | None = None,
    judge: JudgeConfig | None = None,
    policy: ModelConfig | None = None,
    directory: Path | None = None,
) -> Oracle:
    """Makes the oracle of a name, or a panel such as "0.7*population+0.3*module:function".

    Args:
        name: the value of --oracle.
        config: the options of oracles that are models.
        judge: the options of the judge.
        policy: the options of the policy; an oracle that is a model uses its device and dtype.
        directory: the run directory, where the judge's answers are saved unless --judge_cache names a file.

    Raises:
        UserError: if there is no such oracle or it cannot be used; the message names it.
    """
    sections = (config or OracleConfig(), judge or JudgeConfig(), policy or ModelConfig())
    members = terms(name)
    if len(members) == 1 and members[0][0] is None:
        return make_oracle(members[0][1], *sections, directory)
    return Panel([(weight or 1.0, member, make_oracle(member, *sections, directory)) for weight, member in members])


def title(config: OracleConfig) -> str:
    """Names a run's oracle and its model in messages."""
    return f"--oracle {config.oracle}" + (f" (--oracle_model {config.oracle_model})" if config.oracle_model else "")


def probe(
    oracle: Oracle,
    name: str,
    prompts: Sequence[Messages],
    in_directory: bool,
    texts: Sequence[str] = PROBE_TEXTS,
) -> None:
    """Asks an oracle one short question per prompt, to find one that does not work before anything is sampled.

    A model is loaded for this and released. The cost is not counted. Answers that a judge has in its cache are not
    asked for again.

    Args:
        oracle: the oracle.
        name: the value of --oracle.
        prompts: prompts of the run, one of each kind of conversation.
        in_directory: whether to ask only oracles that write into the run directory, or only the others. The members of
            a panel are chosen one by one.
        texts: two responses that differ.

    Raises:
        UserError: as ``judge``.
    """
    members = _members(oracle, name)
    for member, asked in members:
        if keeps_files(asked) == in_directory:
            which = "" if len(members) == 1 else f", member {member}"
            here = f"--oracle {name}{which}, tried before anything is sampled"
            judge_texts(asked, [(prompt, list(texts)) for prompt in prompts], here)
            take_counters(asked)


def shortest_by_kind(prompts: Iterable[Messages]) -> dict[frozenset[str], Messages]:
    """Returns the shortest prompt of each kind of conversation (``kind_of``), shortest first; at most ``MAX_KINDS``.

    A chat template may refuse a role, or one role after another; a short prompt is not refused for its length. A kind
    whose features are all in prompts chosen before it is left out.
    """
    shortest: dict[frozenset[str], tuple[int, Messages]] = {}
    for prompt in prompts:
        kind, size = kind_of(prompt), length(prompt)
        if kind not in shortest or size < shortest[kind][0]:
            shortest[kind] = size, prompt
    chosen: dict[frozenset[str], Messages] = {}
    covered: set[str] = set()
    for kind, (_, prompt) in sorted(shortest.items(), key=lambda item: item[1][0]):
        if not kind <= covered and len(chosen) < MAX_KINDS:
            chosen[kind] = prompt
            covered |= kind
    return chosen


def kind_of(prompt: Messages) -> frozenset[str]:
    """Returns what a chat template may refuse in a conversation: which role follows which, tool calls, tools.

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
    """Returns the length of a conversation as JSON, in characters: a proxy for the number of its tokens."""
    return len(json.dumps(prompt))


def fingerprint(oracle: Oracle, name: str, checksum: Callable[[Path], str]) -> dict[str, str]:
    """Checksums of the files that an oracle's answers depend on: its models' files and its modules' source.

    Formulas and the judge have none: the judge's URL, model and prompt are options of the run.

    Args:
        oracle: the oracle.
        name: the value of --oracle.
        checksum: maps the resolved path of a file to its checksum.

    Returns:
        Checksums by the name of the file and, in a panel, the member.
    """
    from ..run.fingerprint import function_fingerprint  # here, because it imports transformers, which takes seconds

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


def is_shared(oracle: Oracle) -> bool:
    """Returns whether each rank of a run may ask the oracle about its share: only if it is a model, or all members are.

    A server has limits on what it is asked at a time, and a user's function may keep files.
    """
    members = [member for _, _, member in oracle.members] if isinstance(oracle, Panel) else [oracle]
    return all(map(holds_model, members))


def computes_elsewhere(oracle: Oracle) -> bool:
    """Returns whether the oracle may judge in a thread while the policy samples.

    True for a judge behind a server and a model on another device than the policy's, also in a panel with
    formulas. Not for a user's function, which may not be made for threads.
    """
    members = [member for _, _, member in oracle.members] if isinstance(oracle, Panel) else [oracle]
    elsewhere = [getattr(member, "computes_elsewhere", False) for member in members]
    formulas = [member is OPENINGS or isinstance(member, Population) for member in members]
    return any(elsewhere) and all(one or formula for one, formula in zip(elsewhere, formulas))


def _members(oracle: Oracle, name: str) -> list[tuple[str, Oracle]]:
    """Returns the members of a panel with their names, or the oracle itself."""
    if isinstance(oracle, Panel):
        return [(member, one) for _, member, one in oracle.members]
    return [(terms(name)[0][1], oracle)]


def make_oracle(
    name: str, config: OracleConfig, judge: JudgeConfig, policy: ModelConfig, directory: Path | None
) -> Oracle:
    """Makes one oracle from its name, or from kind=model, by which a panel can have several models of a kind.

    Raises:
        UserError: as ``load``.
    """
    kind, equals, model = name.partition("=")
    if kind not in NAMES:
        return _users_function(name)
    if equals and (kind in FORMULAS or not model):
        raise UserError(f"--oracle {name}: expected {kind}{'' if kind in FORMULAS else '=MODEL'}")
    # Imported when needed: transformers and the judge's client take seconds.
    if kind == "pair-model":
        from .pair_model import PairModel

        return PairModel(model or config.oracle_model, config, policy)
    if kind == "reward-model":
        from .reward_model import RewardModel

        return RewardModel(model or config.oracle_model, config, policy)
    if kind == "judge":
        from .chat_judge import ChatJudge

        return ChatJudge(model or judge.judge_model, judge, directory)
    return OPENINGS if kind == "openings" else Population()


def _users_function(name: str) -> Oracle:
    """Imports the function of --oracle module:function."""
    oracle = import_function("oracle", name, NAMES)
    if inspect.iscoroutinefunction(oracle):
        raise UserError(f"--oracle {name}: {ASYNC}")
    return oracle
