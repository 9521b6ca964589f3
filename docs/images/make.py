"""Draw the pictures of README.md and docs/ that are made from measured data, and the badges.

    PYTHONPATH=. python docs/images/make.py

overview.svg is Algorithm 1, and time and memory of the loss beside its peers (bench/results/h200). evidence.svg is
the experiment on a language model (experiments/results/cyclic_lm), selection.svg that on selected pairs
(experiments/results/selection). report.png is not drawn here. It is a picture of a run's report:

    make train ARGS="--out runs/demo"
    onpo-fast report runs/demo --picture docs/images/report.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from experiments.cyclic_lm import comparison, dynamics, recipe, results
from experiments.selection import command_line as selection
from onpo_fast.selection import SELECTIONS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "bench" / "results" / "h200"
OURS, PEER, INK, SOFT = "#2f6fb0", "#a9b4c0", "#1c2530", "#eaf1f8"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8894a0",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "svg.hashsalt": "onpo_fast",
}
PEERS = {  # name in the results → label
    "onpo_fast fast": "onpo_fast, fast",
    "torch.compile of it": "torch.compile, materialised",
    "Liger FusedLinearDPO": "Liger FusedLinearDPO",
    "onpo_fast lean": "onpo_fast, lean",
    "Liger Hopper CE": "Liger Hopper CE",
    "PyTorch, materialised": "PyTorch, materialised",
    "TRL": "TRL ChunkedLogProb",
}


def main() -> None:
    with plt.rc_context(STYLE):
        draw_overview()
        draw_evidence()
        draw_selection()
    draw_badges()


# The overview ---------------------------------------------------------------------------------------------------------


def headline() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The headline shape of the GPU check, and its row of every peer: policy and reference, forward and backward.

    A peer that the check could not import is taken from the run after it, kernels-peers.json.
    """
    check = json.loads((RESULTS / "gpu-check-2.json").read_text(encoding="utf-8"))
    later = json.loads((RESULTS / "kernels-peers.json").read_text(encoding="utf-8"))
    shape, later_shape = check["results"]["headline"]["shapes"][0], later["shapes"][0]
    rows: dict[str, dict[str, Any]] = {}
    for source in (later_shape, shape):
        for row in source["rows"]:
            if row["task"] == "policy + reference" and row["status"] == "measured":
                rows[row["method"]] = row
    return shape, rows


def draw_overview() -> None:
    shape, rows = headline()
    figure = plt.figure(figsize=(11, 4.1))
    grid = figure.add_gridspec(
        1, 3, width_ratios=(1.35, 1, 0.8), left=0.01, right=0.985, top=0.82, bottom=0.14, wspace=0.06
    )
    draw_loop(figure.add_subplot(grid[0]))
    names = sorted(PEERS, key=lambda name: -rows[name]["seconds"]["both"]["median"])
    colours = [OURS if name.startswith("onpo_fast") else PEER for name in names]
    time, memory = figure.add_subplot(grid[1]), figure.add_subplot(grid[2])
    place = time.get_position()
    time.set_position([place.x0 + 0.155, place.y0, place.width - 0.155 + 0.01, place.height])
    bars(time, [1e3 * rows[name]["seconds"]["both"]["median"] for name in names], colours, "{:.1f}")
    bars(memory, [rows[name]["peak_extra_bytes"] / 1e9 for name in names], colours, "{:.2f}")
    time.set_yticks(range(len(names)), [PEERS[name] for name in names])
    memory.set_yticks([])
    time.set(title="time, ms", xlim=(0, 100))
    memory.set(title="extra memory, GB", xlim=(0, 16.5))
    floor = shape["floor_seconds"]
    bare = 1e3 * (2 * floor["logits"] + floor["hidden"] + floor["weight"])
    time.axvline(bare, color=INK, linestyle=":", linewidth=1)
    time.text(bare, -0.95, f"four bare products: {bare:.1f}", fontsize=7.5, ha="center", va="top")
    figure.text(0.70, 0.955, "The loss, forward and backward, on one H200", ha="center", fontsize=10.5, weight="bold")
    tokens, features, vocabulary = (shape[name] for name in ("response_tokens", "features", "vocabulary"))
    about = f"bf16, {shape['groups']} pairs of 2×{tokens} tokens, H {features}, V {vocabulary}"
    figure.text(0.70, 0.905, f'{about}; make gpu-check ARGS="--part 2", commit 62adab3', ha="center", fontsize=7.5)
    figure.text(0.19, 0.955, "Algorithm 1, one iteration", ha="center", fontsize=10.5, weight="bold")
    note = "Not drawn: CCE, 204 ms and 2 MB. Liger Hopper CE: from the run after it."
    figure.text(0.70, 0.015, note, ha="center", fontsize=7.5)
    save(figure, "overview.svg")


def bars(axes: Axes, values: Sequence[float], colours: Sequence[str], form: str) -> None:
    axes.barh(range(len(values)), values, color=colours, height=0.68)
    for at, value in enumerate(values):
        axes.text(value, at, " " + form.format(value), va="center", fontsize=8)
    axes.tick_params(length=0, labelbottom=False, labelsize=8.5)
    axes.spines["bottom"].set_visible(False)
    axes.set_ylim(-0.6, len(values) - 0.4)


def draw_loop(axes: Axes) -> None:
    axes.set(xlim=(0, 10), ylim=(0, 7))
    axes.axis("off")
    boxes = {
        "sample": (0.3, 4.9, "policy $\\pi_t$ answers\neach prompt K times"),
        "judge": (5.3, 4.9, "oracle says how often\n$y_i$ beats $y_j$"),
        "first": (5.3, 2.5, "fit $\\pi'_{t+1}$\nanchor $\\pi'_t$"),
        "second": (0.3, 2.5, "fit $\\pi_{t+1}$\nanchor $\\pi'_{t+1}$"),
    }
    for name, (x, y, text) in boxes.items():
        fit = name in ("first", "second")
        axes.add_patch(
            FancyBboxPatch(
                (x, y), 3.9, 1.35, boxstyle="round,pad=0.06", facecolor=SOFT, edgecolor=OURS if fit else PEER
            )
        )
        axes.text(x + 1.95, y + 0.675, text, ha="center", va="center", fontsize=9)
    arrows = [
        ((4.3, 5.57), (5.2, 5.57)),
        ((7.25, 4.8), (7.25, 3.95)),
        ((5.2, 3.17), (4.3, 3.17)),
        ((2.25, 3.95), (2.25, 4.8)),
    ]
    for start, end in arrows:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=INK, linewidth=1.3))
    axes.text(7.4, 4.36, "pairs", fontsize=8, va="center")
    axes.text(2.4, 4.36, "t + 1", fontsize=8, va="center")
    formula = "each fit:  min E$\\,[\\,D(\\pi) - D(anchor) - \\eta\\,(p - 1/2)\\,]^2$"
    axes.text(4.75, 1.5, formula, ha="center", fontsize=9.5)
    axes.text(
        4.75,
        0.85,
        "$D(\\pi) = \\log\\,\\pi(y_i\\,|\\,x) - \\log\\,\\pi(y_j\\,|\\,x)$,   $p = P(y_i \\succ y_j)$",
        ha="center",
        fontsize=9,
    )


# The evidence ---------------------------------------------------------------------------------------------------------


def draw_evidence() -> None:
    """The gap of every policy of the main arms, at the steps with most seeds: median thickly, every seed thinly."""
    runs = results.read(ROOT / "experiments" / "results" / "cyclic_lm")
    own = comparison.games(runs)[recipe.ORACLE, recipe.ITERATIONS]
    of_steps = comparison.by_arm_and_step(run for run in own if run.arm in recipe.MAIN_ARMS)
    groups = {key: some for key, some in of_steps.items() if len(some) == max(map(len, of_steps.values()))}
    layout = {"figsize": (11, 2.7), "sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, (panels,) = plt.subplots(1, len(groups), **layout)
    start = dynamics.initial_shares(own)
    for axes, ((arm, eta), some) in zip(panels, groups.items()):
        measured = np.array([run.gap for run in some])
        exact = dynamics.exact_gaps(arm, eta, some[0].matrix, start, measured.shape[1])
        times = np.arange(1, measured.shape[1] + 1)
        axes.plot(times, measured.T, color=OURS, linewidth=0.7, alpha=0.5)
        axes.plot(times, np.median(measured, 0), color=OURS, linewidth=2)
        axes.plot(times, exact, color=INK, linewidth=1, linestyle=":")
        axes.axhline(comparison.noise_floor(some[0]), color=PEER, linewidth=1)
        axes.set(title=f"{recipe.ARMS[arm].label} (η = {eta:g})", xlabel="t", ylim=(0, 0.6), xticks=(1, 6, 11))
    panels[0].set_ylabel("gap of π$_t$")
    save(figure, "evidence.svg")


# Selection ------------------------------------------------------------------------------------------------------------


def draw_selection() -> None:
    """The error of a step against the labels that it took: means over seeds, with their standard errors."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.7), layout="constrained")
    games = {"neural": ("total variation", (200, 500, 1000, 2000)), "language": ("error, nats", (50, 100, 200, 400))}
    for axes, (game, (label, ticks)) in zip(panels, games.items()):
        found = selection.read(ROOT / "experiments" / "results" / "selection" / f"{game}.jsonl")
        for name, mark in zip([*SELECTIONS, selection.ALL], "osD^"):
            own = [one for one in found if one.selection == name]
            by_draws = [[one for one in own if one.draws == draws] for draws in sorted({one.draws for one in own})]
            labels = [np.mean([one.labels for one in some]) for some in by_draws]
            means = [np.mean([one.error for one in some]) for some in by_draws]
            spread = [np.std([one.error for one in some], ddof=1) / len(some) ** 0.5 for some in by_draws]
            axes.errorbar(labels, means, spread, label=name, marker=mark, linewidth=1.2, capsize=2, alpha=0.8)
        axes.set(title=f"{game} game, {len({one.seed for one in found})} seeds", xlabel="labels", ylabel=label)
        axes.set(xscale="log", ylim=(0, None))
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
    panels[0].legend()
    save(figure, "selection.svg")


# Badges ---------------------------------------------------------------------------------------------------------------

BADGE = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{name}: {value}">\
<rect width="{width}" height="20" rx="3" fill="#555"/>\
<rect x="{left}" width="{right}" height="20" rx="3" fill="#2f6fb0"/>\
<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">\
<text x="{middle}" y="14">{name}</text><text x="{other}" y="14">{value}</text></g></svg>
"""


def draw_badges() -> None:
    for name, value in (("licence", "Apache-2.0"), ("python", "≥ 3.10"), ("torch", "≥ 2.11")):
        left, right = 7 * len(name) + 12, 7 * len(value) + 12
        text = BADGE.format(
            name=name, value=value, width=left + right, left=left, right=right, middle=left / 2, other=left + right / 2
        )
        (HERE / f"badge-{name}.svg").write_text(text, encoding="utf-8")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(HERE / name, facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
