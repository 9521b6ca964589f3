"""The experiments of the lab. Each function returns the numbers that its JSON file holds and the page shows.

A curve over several games or seeds is its median and quartiles, {"median", "low", "high"}.
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
from .arguments import non_negative, positive, whole_number
from .matrix import GameTrace, run
from .matrix_games import SampledGame
from .neural import NeuralGame, NeuralTrace, play
from .preferences import hard_game, make, three_cycle
from .solution import nash

Done = Callable[[int], None]

RATES_FROM = 50  # smallest T of a slope: earlier gaps depend on the start more than on the rate
SMALLEST_SLOPE_GAP = 1e-13  # smaller ones are rounding errors, and left out of slopes
ROCK_PAPER_SCISSORS = three_cycle(1, 1, 1)
WEIGHTED = three_cycle(0.9, 0.6, 0.7)
TILTED = np.exp([1.0, 0, -1]) / np.exp([1.0, 0, -1]).sum()  # logits (1, 0, −1)
# in the exact game the variants of onpo are onpo, and omd_two_fits is omd at twice the step
COMPARED = ("onpo", "omd", "inpo", "online_ipo", "nash_md", "egpo", "sppo", "iterative_dpo")
CYCLING = (("onpo", 1 / 8), ("onpo", 1 / 2), ("onpo", 1.0), ("omd", 1 / 8), ("omd", 1 / 2), ("omd", 1.0))
HARD_DELTAS = (0.1, 0.03, 0.01)
HARD_ETA = 1 / 8  # the largest step of Theorem 3
HARD_ROUNDS = 100  # rounds that are played, in units of 1/δ
HARD_POINTS = 400  # of a curve
LARGE_GAP = 0.1  # a gap above it counts as far from the Nash policy
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
    """Play all algorithms on the same games, and a few games of three actions.

    ``done`` is called with 1 after each of ``matrix_parts`` parts.
    """
    for check, name, value in ((positive, "eta", eta), (non_negative, "tau", tau), (whole_number, "steps", steps)):
        check(name, value)  # once, instead of as an error of every algorithm
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
        except ValueError as error:  # of one algorithm in this game: DPO without a minimum, or too strong a pull
            result["algorithms"][algorithm] = {"refused": str(error)}
        else:
            result["algorithms"][algorithm] = _curves(trace, at) | {"slope": slope(at, trace.average_gap[:, at - 1])}
        done(1)
    tuned_at = grid(min(RATES_FROM, steps), steps, 9)
    gaps = [run(P, "omd", bounds.tuned_eta(D, int(T)), int(T)).average_gap[:, -1] for T in tuned_at]
    tuned = np.transpose(gaps)
    result["omd_tuned"] = {
        "T": tuned_at,
        "average": quartiles(tuned),
        "slope": slope(tuned_at, tuned),
        "theorem_1": bounds.theorem_1(D, tuned_at),
    }
    done(1)
    result["cycling"] = _cycling()
    result["simplex"] = _simplex(P[0] if P.shape[-1] == 3 else WEIGHTED)
    done(1)
    result["hard"] = _hard()
    done(1)
    result["pairings"] = {}
    for pairing in ("iid", "all_pairs", "best_worst", "knockout"):
        result["pairings"][pairing] = pairing_bias(pairing)
        done(1)
    return result


def matrix_parts(algorithms: Sequence[str]) -> int:
    """Return the number of parts of ``matrix``, for a progress bar."""
    return len(algorithms) + 7


def grid(first: int, last: int, points: int) -> np.ndarray:
    """Return whole numbers from ``first`` to ``last``, spaced evenly on a logarithmic axis."""
    return np.unique(np.geomspace(first, last, points).round().astype(int))


def quartiles(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the median and the quartiles over the first axis: games, or seeds."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
    return {"median": median, "low": low, "high": high}


def slope(T: np.ndarray, gaps: np.ndarray) -> float | None:
    """Return d log gap / d log T from T = 50 on, for the geometric mean over games; None with fewer than 3 points.

    Games that reach their Nash policy, to rounding, are left out.

    Args:
        T: (N,).
        gaps: (B, N).
    """
    use = RATES_FROM <= T
    gaps = gaps[:, use]
    gaps = gaps[(gaps > SMALLEST_SLOPE_GAP).all(-1)]
    if use.sum() < 3 or not len(gaps):
        return None
    return float(np.polyfit(np.log(T[use]), np.log(gaps).mean(0), 1)[0])


def _curves(trace: GameTrace, at: np.ndarray) -> dict:
    names = ("average_gap", "last_gap", "average_regularised_gap", "last_regularised_gap")
    return {name: quartiles(getattr(trace, name)[:, at - 1]) for name in names}


def _cycling() -> list[dict]:
    """Play rock-paper-scissors, where the last policy of ONPO converges and that of OMD moves away."""
    at = np.arange(1, 1001, 5)
    traces = [(algorithm, eta, run(ROCK_PAPER_SCISSORS, algorithm, eta, 1000, TILTED)) for algorithm, eta in CYCLING]
    return [
        {"algorithm": algorithm, "eta": eta, "t": at, "gap": trace.last_gap[at - 1], "at_1000": trace.last_gap[-1]}
        for algorithm, eta, trace in traces
    ]


def _simplex(P: np.ndarray) -> dict:
    """Play a game of three actions and keep all policies, at a step at which the shape of their path is visible."""
    steps, eta, tau = 800, 1.0, 0.1
    runs = {name: run(P, name, eta, steps, TILTED, tau=tau, keep_policies=True) for name in ("onpo", "omd", "inpo")}
    policies = {name: trace.policies for name, trace in runs.items()}
    return {"nash": nash(P), "steps": steps, "eta": eta, "tau": tau, "policies": policies}


def _hard() -> dict:
    """Play ``hard_game``, where the gap of ONPO's last policy falls, and comes back at a round of the order of 1/δ.

    Returns:
        For every δ the gaps at ``HARD_POINTS`` rounds, and of the first return of the last policy's gap above
        ``LARGE_GAP``: its first and last round, the largest gap in it, the least gap before it, and in the same rounds
        the largest gaps of OMD's last policy and of ONPO's averaged one, with the bound of Theorem 2 on the latter.
    """
    P, T = np.stack([hard_game(delta) for delta in HARD_DELTAS]), round(HARD_ROUNDS / min(HARD_DELTAS))
    onpo, omd = (run(P, algorithm, HARD_ETA, T) for algorithm in ("onpo", "omd"))
    games = []
    for delta, gap, average, other in zip(HARD_DELTAS, onpo.last_gap, onpo.average_gap, omd.last_gap):
        first, last = first_return(gap)
        again = slice(first - 1, last)
        at = np.unique(np.linspace(1, HARD_ROUNDS / delta, HARD_POINTS).round().astype(int))
        games.append(
            {
                "delta": delta,
                "t": at,
                "last_gap": gap[at - 1],
                "average_gap": average[at - 1],
                "omd_last_gap": other[at - 1],
                "least_before": gap[: first - 1].min(),
                "from": first,
                "to": last,
                "largest": gap[again].max(),
                "average_largest": average[again].max(),
                "omd_largest": other[again].max(),
                "theorem_2": bounds.theorem_2(np.log(P.shape[-1]), first, HARD_ETA),
            }
        )
    return {"eta": HARD_ETA, "large_gap": LARGE_GAP, "games": games}


def first_return(gap: np.ndarray) -> tuple[int, int]:
    """Return the first and the last round in which the gap is above ``LARGE_GAP`` again, after it had fallen below.

    Args:
        gap: of the last policies, (T,); entry t − 1 is that of π_t. It must come back and fall again.
    """
    large = gap > LARGE_GAP
    fallen = np.argmin(large)  # indices: of the first policy below, and so on
    returned = fallen + np.argmax(large[fallen:])
    fallen_again = returned + np.argmin(large[returned:])
    return int(returned) + 1, int(fallen_again)


def pairing_bias(pairing: str) -> dict:
    """Fit once at the Nash policy of a three-action cycle, where the step of mirror descent is 0, with eight responses.

    Returns:
        The log-ratio of the fitted policy to π, in units of η, with E_π = 0: its mean over ``BIAS_SEEDS`` runs of
        ``BIAS_GROUPS`` groups, and the standard error of this mean.
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
    """Return log π_new/π after one fit to pairs sampled from π with η = 1, (n,); its arbitrary constant makes E_π 0."""
    game = SampledGame(P[None], Omd(1.0), 1.0, 0.0, groups, responses, pairing, labels, seed)
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
    """Play the neural game by every algorithm from the same initial policies.

    A seed's gap is the mean over its contexts, its distance from the exact minimiser the largest of them.

    Args:
        options: of all runs, but for the algorithm, the seed and ``eta``.
        objectives: names of algorithms.
        eta: step of mirror descent of all of them (INPO's η is its inverse); None: the natural step of each game.
        done: called with 1 after each run.
        preferences: see ``neural.play``.
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
            "gap": quartiles(np.mean([trace.gap for trace in traces], axis=-1)),
            "average_gap": quartiles(np.mean([trace.average_gap for trace in traces], axis=-1)),
            "ideal_gap": quartiles(np.mean(ideal, axis=-1)) if ideal else None,
            "last_gap": [float(trace.gap[-1].mean()) for trace in traces],
            "distance": quartiles(np.max(distance, axis=-1)) if distance else None,
            "worst_distance": float(np.max(distance)) if distance else None,
            "seconds": [trace.seconds for trace in traces],
        }
    of_each = ("objective", "eta", "tau", "seed")
    return result | {"game": {name: value for name, value in asdict(played[0].game).items() if name not in of_each}}


def _played(runs: Sequence[NeuralGame], preferences: np.ndarray | None, done: Done) -> list[NeuralTrace]:
    """Play all runs. Each takes one thread, so on a CPU there are as many at a time as cores."""
    processes = min(len(runs), os.cpu_count() or 1) if runs[0].device == "cpu" else 1
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(play, run, preferences) for run in runs]
        for future in as_completed(futures):
            future.result()  # raises the error of a run
            done(1)
        return [future.result() for future in futures]


# ---------------------------------------------------------------------------------------------------------------------
# Several turns
# ---------------------------------------------------------------------------------------------------------------------


def several_turns(
    game: str, turns: int, actions: int, count: int, steps: int, eta: float, seed: int, done: Done
) -> dict:
    """Play with exact updates and with the biased target, and measure the error of the sampled one.

    ``done`` is called with 1 after each of ``TURNS_PARTS`` parts.
    """
    P = make(game, whole_number("actions", actions) ** whole_number("turns", turns), count, seed)
    at = grid(1, whole_number("steps", steps), 60)
    curves, final = {}, {}
    for name, algorithm, target in (
        ("onpo", "onpo", "exact"),
        ("omd", "omd", "exact"),
        ("branches", "onpo", "branches"),
    ):
        trace = multiturn.run(P, turns, algorithm, eta, steps, target=target)
        curves[name] = {
            "average_gap": quartiles(trace.average_gap[:, at - 1]),
            "last_gap": quartiles(trace.last_gap[:, at - 1]),
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
