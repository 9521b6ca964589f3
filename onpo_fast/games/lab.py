"""The experiments of the lab, in numbers: each function returns what its JSON file holds, and the page shows.

Of several games or seeds a curve has the median and the quartiles, {"median", "low", "high"}.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context

import numpy as np

from ..objectives import Omd
from . import bounds, multiturn
from .arguments import at_least_zero, positive
from .arguments import count as whole
from .fits import Sampled
from .matrix import GameTrace, run
from .neural import NeuralGame, NeuralTrace, play
from .preferences import make, three_cycle
from .solution import nash

Done = Callable[[int], None]

RATES_FROM = 50  # T: before, a slope says more of the start than of the rate
LEAST = 1e-13  # a gap below this is rounding, and has no logarithm worth fitting
SURE = three_cycle(1, 1, 1)
WEIGHTED = three_cycle(0.9, 0.6, 0.7)
TILTED = np.exp([1.0, 0, -1]) / np.exp([1.0, 0, -1]).sum()  # logits (1, 0, −1)
CYCLING = (("onpo", 1 / 8), ("onpo", 1 / 2), ("onpo", 1.0), ("omd", 1 / 8), ("omd", 1 / 2), ("omd", 1.0))
BIAS_GROUPS, BIAS_SEEDS = 1500, 4
TURNS_PARTS = 4
SAMPLES = (100, 1000, 10_000, 100_000)


# ---------------------------------------------------------------------------------------------------------------------
# Matrix games
# ---------------------------------------------------------------------------------------------------------------------


def matrix(
    game: str,
    algorithms: Sequence[str],
    actions: int | None,
    count: int,
    steps: int,
    eta: float,
    tau: float,
    seed: int,
    done: Done,
) -> dict:
    """All methods on the same games; then what three actions show. ``done`` is told the parts, ``matrix_parts``."""
    for check, name, value in ((positive, "eta", eta), (at_least_zero, "tau", tau), (whole, "steps", steps)):
        check(name, value)  # here, where it is said of all methods
    P = make(game, actions, count, seed)
    if P.shape[-1] < 2:
        raise ValueError("a game of one action has nothing to learn: give it two or more")
    D = float(np.log(P.shape[-1]))
    at = grid(1, steps, 60)
    result = {
        "games": len(P),
        "actions": P.shape[-1],
        "nash_support": (nash(P) > 1e-9).sum(-1).mean(),
        "T": at,
        "theorem_2": bounds.theorem_2(D, at, eta) if eta <= 0.5 else None,
        "algorithms": {},
    }
    for algorithm in algorithms:
        try:
            trace = run(P, algorithm, eta, steps, tau=tau)
        except ValueError as error:  # of the method on this game: DPO without a minimum, a pull that is too strong
            result["algorithms"][algorithm] = {"refused": str(error)}
        else:
            result["algorithms"][algorithm] = _curves(trace, at) | {"slope": slope(at, trace.average_gap[:, at - 1])}
        done(1)
    tuned_at = grid(min(RATES_FROM, steps), steps, 9)
    gaps = [run(P, "omd", bounds.tuned_eta(D, int(T)), int(T)).average_gap[:, -1] for T in tuned_at]
    tuned = np.transpose(gaps)
    result["omd_tuned"] = {
        "T": tuned_at,
        "average": spread(tuned),
        "slope": slope(tuned_at, tuned),
        "theorem_1": bounds.theorem_1(D, tuned_at),
    }
    done(1)
    result["cycling"] = _cycling()
    result["simplex"] = _simplex(P[0] if P.shape[-1] == 3 else WEIGHTED)
    done(1)
    result["pairings"] = {}
    for pairing in ("iid", "all_pairs", "best_worst", "knockout"):
        result["pairings"][pairing] = pairing_bias(pairing)
        done(1)
    return result


def matrix_parts(algorithms: Sequence[str]) -> int:
    return len(algorithms) + 6


def grid(first: int, last: int, points: int) -> np.ndarray:
    """Whole numbers from ``first`` to ``last``, evenly on a logarithmic axis."""
    return np.unique(np.geomspace(first, last, points).round().astype(int))


def spread(values: np.ndarray) -> dict[str, np.ndarray]:
    """Over the first axis: games, or seeds."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    return {"median": median, "low": low, "high": high}


def slope(T: np.ndarray, gaps: np.ndarray) -> float | None:
    """d log gap / d log T from T = 50 on, of the geometric mean over games (B, len(T)); None with fewer than 3 points.

    Games whose gap is 0 somewhere, to rounding, are left out: their Nash policy has been reached.
    """
    use = RATES_FROM <= T
    gaps = gaps[:, use]
    gaps = gaps[(gaps > LEAST).all(-1)]
    if use.sum() < 3 or not len(gaps):
        return None
    return float(np.polyfit(np.log(T[use]), np.log(gaps).mean(0), 1)[0])


def _curves(trace: GameTrace, at: np.ndarray) -> dict:
    names = ("average_gap", "last_gap", "average_regularised_gap", "last_regularised_gap")
    return {name: spread(getattr(trace, name)[:, at - 1]) for name in names}


def _cycling() -> list[dict]:
    """The last iterate on rock-paper-scissors: ONPO comes in, OMD goes out."""
    at = np.arange(1, 1001, 5)
    traces = [(algorithm, eta, run(SURE, algorithm, eta, 1000, TILTED)) for algorithm, eta in CYCLING]
    return [
        {"algorithm": algorithm, "eta": eta, "t": at, "gap": trace.last_gap[at - 1], "at_1000": trace.last_gap[-1]}
        for algorithm, eta, trace in traces
    ]


def _simplex(P: np.ndarray) -> dict:
    """Paths of the last iterate, at a step at which their shape is seen."""
    steps, eta, tau = 800, 1.0, 0.1
    runs = {name: run(P, name, eta, steps, TILTED, tau=tau, keep_policies=True) for name in ("onpo", "omd", "inpo")}
    policies = {name: trace.policies for name, trace in runs.items()}
    return {"nash": nash(P), "steps": steps, "eta": eta, "tau": tau, "policies": policies}


def pairing_bias(pairing: str) -> dict:
    """One fit at the Nash policy of a three-action cycle, where the step of mirror descent is 0, with eight responses.

    Returns the log-ratio of the fitted policy to π, in units of η, with E_π = 0: its mean over ``BIAS_SEEDS`` runs of
    ``BIAS_GROUPS`` groups, and the standard error of that.
    """
    steps = np.array([fitted_step(WEIGHTED, nash(WEIGHTED), pairing, BIAS_GROUPS, seed) for seed in range(BIAS_SEEDS)])
    return {"step": steps.mean(0), "error": steps.std(0, ddof=1) / np.sqrt(BIAS_SEEDS)}


def fitted_step(
    P: np.ndarray,
    policy: np.ndarray,
    pairing: str,
    groups: int,
    seed: int = 0,
    labels: str = "soft",
    responses: int = 8,
) -> np.ndarray:
    """(n,): log π_new/π after one fit of pairs sampled from π, η = 1, without its arbitrary constant: E_π is 0."""
    game = Sampled(P[None], Omd(1.0), 1.0, 0.0, groups, responses, pairing, labels, seed)
    anchor = np.log(policy)[None]
    step = (game.fit(anchor, game.compare(anchor)) - anchor)[0]
    return step - policy @ step


# ---------------------------------------------------------------------------------------------------------------------
# A transformer
# ---------------------------------------------------------------------------------------------------------------------


def transformer(
    options: NeuralGame,
    objectives: Sequence[str],
    seeds: Sequence[int],
    eta: float | None,
    done: Done,
    preferences: np.ndarray | None = None,
) -> dict:
    """The neural game, by every objective from the same starts. ``done`` is told the runs.

    ``eta`` is the step of mirror descent for all of them, where INPO takes its inverse; None: what suits each game.
    Of a seed: the mean gap over its contexts, and the largest distance from the closed form over them.
    """
    result = {"iterations": options.iterations, "seeds": list(seeds), "objectives": {}}
    runs = [
        replace(options, objective=objective, seed=seed, eta=1 / eta if eta and objective == "inpo" else eta)
        for objective in objectives
        for seed in seeds
    ]
    played = _played(runs, preferences, done)
    for objective in objectives:
        traces = [trace for trace in played if trace.game.objective == objective]
        distance = [trace.distance for trace in traces if trace.distance is not None]
        ideal = [trace.ideal_gap for trace in traces if trace.ideal_gap is not None]
        result["objectives"][objective] = {
            "eta": [trace.game.eta for trace in traces],
            "gap": spread(np.mean([trace.gap for trace in traces], axis=-1)),
            "average_gap": spread(np.mean([trace.average_gap for trace in traces], axis=-1)),
            "ideal_gap": spread(np.mean(ideal, axis=-1)) if ideal else None,
            "last_gap": [float(trace.gap[-1].mean()) for trace in traces],
            "distance": spread(np.max(distance, axis=-1)) if distance else None,
            "worst_distance": float(np.max(distance)) if distance else None,
            "seconds": [trace.seconds for trace in traces],
        }
    of_each = ("objective", "eta", "tau", "seed")
    return result | {"game": {name: value for name, value in asdict(played[0].game).items() if name not in of_each}}


def _played(runs: Sequence[NeuralGame], preferences: np.ndarray | None, done: Done) -> list[NeuralTrace]:
    """A run takes one thread, so on a CPU there is one for each core at a time."""
    processes = min(len(runs), os.cpu_count() or 1) if runs[0].device == "cpu" else 1
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(play, run, preferences) for run in runs]
        for future in as_completed(futures):
            future.result()  # an error ends the experiment
            done(1)
        return [future.result() for future in futures]


# ---------------------------------------------------------------------------------------------------------------------
# Several turns
# ---------------------------------------------------------------------------------------------------------------------


def several_turns(
    game: str, turns: int, actions: int, count: int, steps: int, eta: float, seed: int, done: Done
) -> dict:
    """Exact updates, the biased target, and the error of the unbiased one. ``done`` is told the parts."""
    P = make(game, whole("actions", actions) ** whole("turns", turns), count, seed)
    at = grid(1, whole("steps", steps), 60)
    curves, final = {}, {}
    for name, algorithm, target in (
        ("onpo", "onpo", "exact"),
        ("omd", "omd", "exact"),
        ("branches", "onpo", "branches"),
    ):
        trace = multiturn.run(P, turns, algorithm, eta, steps, target=target)
        curves[name] = {
            "average_gap": spread(trace.average_gap[:, at - 1]),
            "last_gap": spread(trace.last_gap[:, at - 1]),
        }
        average, last = trace.average_gap[:, -1], trace.last_gap[:, -1]
        final[name] = {
            "average_gap": average.mean(),
            "worst_average_gap": average.max(),
            "last_gap": last.mean(),
            "median_last_gap": np.median(last),
        }
        done(1)
    errors = multiturn.sampling_error(P, turns, SAMPLES, seed=seed).mean(0)
    done(1)
    return {
        "games": len(P),
        "turns": turns,
        "final_states": P.shape[-1],
        "T": at,
        "curves": curves,
        "final": final,
        "samples": SAMPLES,
        "sampling_error": errors,
        "sampling_slope": float(np.polyfit(np.log(SAMPLES), np.log(errors), 1)[0]) if errors.all() else None,
    }
