"""Formats the results of model families: a line each for the terminal, and the table of docs/models.md."""

from __future__ import annotations

import html
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

import onpo_fast

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
MAX_LOGP_ERROR = 1e-4  # nats; allowed error of a summed log-prob of at most 12 tokens
MAX_GRADIENT_ERROR = 1e-4  # allowed ‖difference‖ / ‖gradient‖ over all parameters
LENGTHS = ((5, 1, 12), (12, 7, 3), (9, 12, 2))  # tokens of the three responses to each prompt


@dataclass
class FamilyResult:
    """Result of a family; None for values that were not computed."""

    name: str
    about: str
    layout: str | None = None  # "shared" or "separate" prompts
    logps: float | None = None  # largest error of a summed log-prob against plain transformers, in nats
    gradient: float | None = None  # relative error of a fit's first gradient, the larger of two runs
    sampled: float | None = None  # largest difference of the sampler's log-probs to the scorer's, in nats
    saved: float | None = None  # largest difference after saving and loading, in nats
    notes: list[str] = field(default_factory=list)  # deviations from the usual way
    verdict: str = ""  # "exact", "refused: why", "absent" or "WRONG: what"
    seconds: float = 0.0


def describe(row: FamilyResult) -> str:
    """Formats a result as a line for the terminal."""
    numbers = ("logps", "gradient", "sampled", "saved")
    known = [f"{name} {getattr(row, name):.1e}" for name in numbers if getattr(row, name) is not None]
    return f"{', '.join([row.name, *([row.layout] if row.layout else []), *known])}: {row.verdict}"


def summary(rows: Sequence[FamilyResult]) -> str:
    """Counts the families of each verdict."""
    words = [row.verdict.partition(":")[0] for row in rows]
    return f"{len(rows)} families: " + ", ".join(
        f"{words.count(word)} {word}" for word in ("exact", "refused", "WRONG", "absent") if word in words
    )


def make_page(rows: Sequence[FamilyResult]) -> str:
    """Text of docs/models.md."""
    lines = [
        PREFACE.format(
            summary=summary(rows),
            versions=versions(),
            nats=MAX_LOGP_ERROR,
            percent=100 * MAX_GRADIENT_ERROR,
            tokens=max(map(max, LENGTHS)),
        )
    ]
    lines += [
        "",
        "| family | what is special | layout | log-probs | gradient | sampled | saved | result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    told = [row for row in rows if row.verdict != "absent"]

    def said(word: str) -> dict[str, str]:
        return {row.name: row.verdict.removeprefix(word) for row in told if row.verdict.startswith(word)}

    for row in told:
        numbers = (row.logps, row.gradient, row.sampled, row.saved)
        shown = ["" if number is None else f"{number:.0e}" if number else "0" for number in numbers]
        cells = [row.name, row.about, row.layout or "", *shown, row.verdict.partition(":")[0]]
        lines.append(f"| {' | '.join(cells)} |")
    for title, texts in (
        ("Wrong", said("WRONG: ")),
        ("Refused, and what is said", said("refused: ")),
        ("Exact in another way", {row.name: "; ".join(row.notes) for row in told if row.notes}),
    ):
        if texts:
            lines += ["", f"## {title}", ""]
            lines += [f"- **{name}**: {html.escape(text, quote=False)}" for name, text in texts.items()]
    if absent := [row.name for row in rows if row.verdict == "absent"]:
        lines += ["", "## Absent", "", f"This version of transformers does not have: {', '.join(absent)}."]
    return "\n".join(lines) + "\n"


PREFACE = """\
# Model families

Tiny random models of each family, run here and compared with plain transformers: two to four layers of the real model
classes, with weights larger than a fresh model's, and with dropout, router jitter and biases that are not 0, so that
mistakes show. No trained weights and no GPU were used. `python -m bench families` writes this page, `bench/zoo.py` has
the configurations, and `python -m bench families --only llama` tries one.

{summary}.
{versions}

- **layout**: how the responses to a prompt go through the model. `shared`: in one row under a mask, with the prompt
  computed once, and several prompts to a row. `separate`: one row for each response. See below.
- **log-probs**: the summed log-probs of nine responses of 1 to {tokens} tokens to prompts of three lengths, scored in
  one padded batch, against plain transformers with each prompt and response alone in a row. Largest difference,
  in nats.
- **gradient**: of the first step of a fit over nine pairs, by all parameters, against plain autograd on
  those rows in evaluation mode: ‖difference‖ / ‖gradient‖. Computed twice; the larger is shown, and both must have the
  same bits, which dropout or router jitter would change.
- **sampled**: the sampler's log-probs of six responses, in one batch, against the scorer's. Largest difference, in
  nats. If they disagree, a whole run is started, which must refuse the model or sample in a way that agrees.
- **saved**: the log-probs after saving the policy and loading it again, here and in plain transformers. Largest
  difference, in nats. Files and tensors must be those of the checkpoint, and fit the model class that it names.

`exact`: within {nats:g} nats and {percent:g}% of the gradient's norm, in float32. `refused`: with one line, before
anything is trained.

## Layouts

A model that takes a mask of all pairs of tokens shares prompts. Sliding windows are counted in positions, so that a
response sees as much of its prompt as in a row of its own, and each type of layer has its mask. When a model is loaded,
its log-probs in shared rows are compared with those in separate rows, also with its window made shorter than these
rows. Where they differ, or a layer limits what it sees in another way (chunks, recurrence, linear attention), each
response is a row of its own, and one line says why.

On a GPU `--attention auto` tries, in this order, and takes the first that agrees with plain attention, in log-probs
and in a gradient, to a few times the rounding error of plain attention in the same dtype:

1. `flex_attention` (layout `shared_row`): all groups of a micro-batch in one row without padding, prompts shared. Its
   block mask is equal to the dense mask on a CPU.
2. flash-attention 2, if installed (layout `separate_row`): a sequence for each response, end to end without padding;
   prompts are not shared.
3. The layouts of the table, under the attention that transformers prefers.

The first two have not run on a GPU yet: tests compute them on a CPU through transformers' own code, flash-attention's
kernel replaced by PyTorch's attention. `flex_attention` has no backward pass on a CPU, so that there only its forward
pass was tried. Sampling does not use `flex_attention`."""


def versions() -> str:
    """Versions with which the page was made, as a sentence."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{PAGE.relative_to(ROOT)}")
    commit = (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")
    return (
        f"onpo_fast {onpo_fast.__version__} (commit {commit}), transformers {transformers.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}."
    )
