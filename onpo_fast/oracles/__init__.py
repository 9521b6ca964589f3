"""Who prefers what.

An oracle maps a prompt (a list of messages) and K responses to the K×K matrix of P(response i ≻ response j). It need
not come from a score: preferences may be cyclic. ``judge`` asks it for many groups and checks what it says.

To add an oracle: write a callable, or a ``BatchOracle``, in a file here and name it in ``_one``. docs/oracles.md says
what each one asks.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

from ..config import Config
from ..errors import UserError
from .interface import ASYNC, BatchOracle, Oracle, checked, cyclic_triples, holds_model, judge, take_counters
from .panel import Panel, terms
from .population import Population

__all__ = [
    "BatchOracle", "Oracle", "Panel", "Population",
    "checked", "cyclic_triples", "holds_model", "judge", "load", "take_counters",
]  # fmt: skip

NAMES = ("population", "pair-model", "reward-model", "judge")


def load(name: str, config: Config | None = None, directory: Path | None = None) -> Oracle:
    """The oracle of this name, or a panel: "0.7*population+0.3*module:function".

    Args:
        config: the options of oracles that have any; default: all at their defaults.
        directory: the run's, where the judge's answers are kept unless --judge_cache says otherwise.

    Raises:
        UserError: if it cannot be had; the message names it.
    """
    config = config or Config()
    members = terms(name)
    if len(members) == 1 and members[0][0] is None:
        return _one(members[0][1], config, directory)
    return Panel([(weight or 1.0, member, _one(member, config, directory)) for weight, member in members])


def _one(name: str, config: Config, directory: Path | None) -> Oracle:
    """An oracle by its name alone, or as kind=model: members of a panel may be different models of a kind."""
    kind, equals, model = name.partition("=")
    if kind not in NAMES:
        return _function(name)
    if equals and (kind == "population" or not model):
        raise UserError(f"--oracle {name}: expected {kind}{'' if kind == 'population' else '=MODEL'}")
    # imported when asked for: transformers and the judge's client take seconds
    if kind == "pair-model":
        from .pair_model import PairModel

        return PairModel(model or config.oracle_model, config)
    if kind == "reward-model":
        from .reward_model import RewardModel

        return RewardModel(model or config.oracle_model, config)
    if kind == "judge":
        from .chat_judge import ChatJudge

        return ChatJudge(model or config.judge_model, config, directory)
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
