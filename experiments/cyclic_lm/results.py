"""The files of results, and what is computed from each. All gaps are in [0, 1], float64."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from onpo_fast.errors import UserError
from onpo_fast.games.solution import duality_gap

from .measures import average_gaps, gaps, gaps_by_prompt, reached, shares
from .recipe import ARMS, LAST

KINDS = ("train", "best_response", "best_of_nash")

Game = tuple[str, int]  # what makes runs comparable: the oracle, and the number of iterations


@dataclass(frozen=True)
class BestOfNash:
    """Best of Nash over one draw of responses of π_1 to the held-out prompts.

    Attributes:
        samples: responses that it chooses from, for each prompt.
        prompts: their number.
        gap: against opponents that ignore the prompt, from its class shares over all prompts.
        prompt_gap: against opponents that see the prompt, the mean over prompts. Given the draw both are exact: the
            policy is its weights.
    """

    samples: int
    prompts: int
    gap: float
    prompt_gap: float

    @property
    def comparisons(self) -> int:
        """What it asks of the oracle for one answer."""
        return self.samples * (self.samples - 1) // 2


@dataclass(frozen=True)
class Run:
    """The results of a run, with what is computed from them."""

    raw: dict
    best_response: float | None = None  # how often one that was trained against π_{T+1} wins
    best_of_nash: BestOfNash | None = None  # over responses of this run's π_1

    @property
    def arm(self) -> str:
        return self.raw["arm"]

    @property
    def eta(self) -> float:
        return self.raw["eta"]

    @property
    def seed(self) -> int:
        return self.raw["seed"]

    @property
    def game(self) -> Game:
        return self.raw["oracle"], self.raw["iterations"]

    @cached_property
    def matrix(self) -> np.ndarray:
        """(C+1, C+1) preferences between classes; the last is "none of them"."""
        return np.array(self.raw["matrix"])

    @cached_property
    def shares(self) -> np.ndarray:
        """(T+1, C+1) class shares of π_1 … π_{T+1} on held-out prompts."""
        return np.array([shares(policy, len(self.matrix)) for policy in self.raw["heldout"]])

    @cached_property
    def gap(self) -> np.ndarray:
        """(T+1,) gaps against opponents that ignore the prompt."""
        return gaps(self.matrix, self.raw["heldout"])

    @cached_property
    def prompt_gap(self) -> np.ndarray:
        """(T+1,) lower estimates of the gaps against opponents that see the prompt."""
        return gaps_by_prompt(self.matrix, self.raw["heldout"])

    @cached_property
    def average_gap(self) -> np.ndarray:
        """(T+1,) gaps of the means of π_1 … π_t, against opponents that ignore the prompt."""
        return average_gaps(self.matrix, self.raw["heldout"])

    @cached_property
    def reached(self) -> float | None:
        """Margins at the end of the fits, as a share of those of exact ones."""
        return reached(self.raw["fits"])

    @property
    def optimizer_steps(self) -> int:
        """The optimizer steps of all fits."""
        return sum(fit["steps"] for fit in self.raw["fits"])

    @property
    def responses(self) -> int:
        """Held-out responses of each policy."""
        return sum(map(len, self.raw["heldout"][0]))

    def last(self, values: np.ndarray) -> float:
        """The mean over the last policies, by which arms are judged; π_1 is never one of them."""
        return float(values[1:][-LAST:].mean())


def read(folder: Path) -> list[Run]:
    """Reads all results of a folder, in the order of games, arms, steps and seeds.

    Raises:
        UserError: if a file is not one of results, two are of the same run, or two runs of a game have different
            recipes; names the files and what differs.
    """
    found: dict[tuple, tuple[Path, dict]] = {}
    for path in sorted(folder.glob("*.json")):
        raw = read_file(path)
        other, _ = found.setdefault((raw["kind"], *_key(raw)), (path, raw))
        if other != path:
            raise UserError(f"{path} and {other} are results of the same run: remove one")
    first: dict[Game, tuple[Path, dict]] = {}
    for path, raw in found.values():
        other, known = first.setdefault((raw["oracle"], raw["iterations"]), (path, raw))
        if different := differences(raw, known):
            raise UserError(f"{path} and {other} are not runs of the same game: {different}")
    runs = []
    for (kind, *key), (_, raw) in found.items():
        if kind == "train":
            answer, chosen = (found.get((other, *key), (None, None))[1] for other in KINDS[1:])
            run = replace(
                Run(raw),
                best_response=answer and answer["win_rate"],
                best_of_nash=chosen and _best_of_nash(chosen),
            )
            runs.append(run)
    return sorted(runs, key=lambda run: (run.game, list(ARMS).index(run.arm), run.eta, run.seed))


def read_file(path: Path) -> dict:
    """Reads a file of results and checks all that is shown of it.

    Raises:
        UserError: if it is not one; names the file and, where it is known, the field.
    """
    raw, field = None, None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        for field in FIELDS[raw["kind"]]:
            if not FITS[field](raw[field], raw):
                raise ValueError
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        where = f" ({field} does not fit)" if field else ""
        raise UserError(f"{path} is not a file of results{where}: remove it, and its run is done again") from None
    return raw


def differences(raw: dict, other: dict) -> str:
    """Says in what the games and recipes of two results differ; "" if they do not.

    Options of which only one of them says something are not compared: those of another version of the program.
    """
    found = [name for name in ("classes", "matrix") if raw[name] != other[name]]
    for name in ("oracle", "prompts", "model"):  # checksums
        if len({json.dumps(one["recipe"][name], sort_keys=True) for one in (raw, other) if name in one["recipe"]}) > 1:
            found.append(f"the files of {name}")
    if len({tuple(map(len, one["heldout"][0])) for one in (raw, other) if "heldout" in one}) > 1:
        found.append("the number of held-out responses")
    options, others = raw["recipe"]["options"], other["recipe"]["options"]
    for name in options.keys() & others.keys():
        if options[name] != others[name]:
            found.append(f"{name} is {options[name]} and {others[name]}")
    return ", ".join(sorted(found))


def _key(raw: dict) -> tuple:
    return raw["arm"], raw["eta"], raw["seed"], raw["oracle"], raw["iterations"]


def _best_of_nash(raw: dict) -> BestOfNash:
    matrix, of_prompts = np.array(raw["matrix"]), np.array(raw["heldout_shares"])  # (prompts, C+1)
    pooled, by_prompt = duality_gap(matrix, of_prompts.mean(0)), duality_gap(matrix, of_prompts)
    return BestOfNash(raw["samples"], len(of_prompts), float(pooled), float(by_prompt.mean()))


# Which values fit ----------------------------------------------------------------------------------------------------


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _numbers(value: object, *shape: int) -> bool:
    """Whether it is an array of finite numbers; -1 in the shape: any length from 1 on."""
    found = np.array(value)
    fits = found.ndim == len(shape) and all(n == m or (m == -1 and n > 0) for n, m in zip(found.shape, shape))
    return fits and found.dtype.kind in "if" and bool(np.isfinite(found).all())


def _classes(policies: list, raw: dict, count: int) -> bool:
    """Whether it has the classes of at least two responses of so many policies to each prompt."""
    size = list(map(len, policies[0]))
    return (
        len(policies) == count
        and min(size) >= 2
        and all(list(map(len, policy)) == size for policy in policies)
        and all(_whole(c, 0) and c <= len(raw["classes"]) for policy in policies for prompt in policy for c in prompt)
    )


def _fits(fits: list[dict]) -> bool:
    return len(fits) > 0 and all(
        _whole(one["steps"], 1)
        and _numbers([one["margin"], 0.0 if one["exact"] is None else one["exact"]], 2)
        and isinstance(one["iteration"], int)
        for one in fits
    )


def _shares(value: object, *shape: int) -> bool:
    """Whether it is an array of numbers in [0, 1]."""
    return _numbers(value, *shape) and bool((np.array(value) >= 0).all() and (np.array(value) <= 1).all())


def _preferences(value: object, size: int) -> bool:
    """Whether it is a matrix of probabilities with P + Pᵀ = 1."""
    return _shares(value, size, size) and np.allclose(np.array(value) + np.array(value).T, 1)


def _strings(values: object) -> bool:
    return all(isinstance(one, str) for one in values)


FITS = {
    "arm": lambda value, raw: value in ARMS,
    "eta": lambda value, raw: _numbers([value], 1) and 1e-6 <= value <= 1e6,
    "seed": lambda value, raw: _whole(value, 0),
    "oracle": lambda value, raw: isinstance(value, str),
    "iterations": lambda value, raw: _whole(value, 1),
    "classes": lambda value, raw: isinstance(value, list) and len(set(value)) == len(value) >= 2 and _strings(value),
    "matrix": lambda value, raw: _preferences(value, len(raw["classes"]) + 1),
    "recipe": lambda value, raw: isinstance(value["options"], dict),
    "environment": lambda value, raw: (
        _strings(value[name] for name in ("device", "torch", "transformers")) and "commit" in value
    ),
    "heldout": lambda value, raw: _classes(value, raw, raw["iterations"] + 1 if raw["kind"] == "train" else 2),
    "kl_to_initial": lambda value, raw: _numbers(value, raw["iterations"] + 1),
    "win_rate": lambda value, raw: _shares(value, *([raw["iterations"] + 1] * 2 if raw["kind"] == "train" else [])),
    "cyclic_triples": lambda value, raw: _shares(value, raw["iterations"]),
    "fits": lambda value, raw: _fits(value),
    "samples": lambda value, raw: _whole(value, 2),
    "heldout_shares": lambda value, raw: (
        _shares(value, -1, len(raw["classes"]) + 1) and np.allclose(np.sum(value, axis=1), 1)
    ),
}
SHARED = ("arm", "eta", "seed", "oracle", "iterations", "classes", "matrix", "recipe", "environment")
FIELDS = {
    "train": (*SHARED, "heldout", "kl_to_initial", "win_rate", "cyclic_triples", "fits"),
    "best_response": (*SHARED, "heldout", "win_rate"),
    "best_of_nash": (*SHARED, "samples", "heldout_shares"),
}
