"""python -m bench summary FILE: prints a results file of `make gpu-check` as Markdown tables, in at most 60 lines.

Only the standard library is imported, so that the check can print a summary even if packages are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST_LINES = 60
MOST_NAMES = 6  # number of failed tests or faults that are listed
SWEEPS = ("sweep", "other sweeps")
LARGE = ("headline", "states", *SWEEPS)  # sections with many rows, the least important last
NEVER_CUT = ("title", "absent", "targets", "steps", "end")
OURS = ("onpo_fast fast", "onpo_fast lean")
GB = 1e9

Row = dict[str, Any]


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, help="Results file of `make gpu-check`: gpu-check-PART.json.")


def main(options: argparse.Namespace) -> None:
    print("\n".join(lines(json.loads(options.results.read_text(encoding="utf-8")), str(options.results))))


def lines(data: dict[str, Any], path: str, most: int = MOST_LINES) -> list[str]:
    """Summary of a part in at most ``most`` lines.

    Targets, unmeasured methods and failed steps are never cut. The tables of sweeps are cut first, the longer one each
    time; then all large tables, each to no fewer than five rows (except other sweeps); then the other sections.
    """
    results = data["results"]
    headline, states = results.get("headline"), results.get("states")
    sweeps = (results.get("sweep") or {}).get("shapes", [])
    tests = [(name, found) for name, found in results.items() if name.endswith("tests")]
    sections = {
        "title": [f"GPU check, part {data['part']}, commit {(data.get('commit') or 'unknown')[:9]}"],
        "install": results.get("install") or [],
        "survey": survey_lines(results.get("survey")),
        "tests": [line for name, found in tests for line in test_lines(name, found)],
        "checks": check_lines(results.get("checks")),
        "headline": headline_table(headline),
        "states": headline_table(states),
        "absent": [*absent_lines(headline), *absent_lines(states)],
        "targets": target_lines((headline or {}).get("verdicts", [])),
        "sweep": [line for record in sweeps[:1] for line in sweep_table(record)],
        "other sweeps": [line for record in sweeps[1:] for line in sweep_table(record)],
        "fit": fit_table((results.get("fit") or {}).get("fits", [])),
        **{
            name: trainer_table(found.get("trainers", []))
            for name, found in results.items()
            if name.endswith("against TRL")
        },
        "trainer": run_table((results.get("trainer") or {}).get("runs", [])),
        "steps": step_lines(data["steps"]),
        "end": [f"results: {path}"],
    }
    hidden = dict.fromkeys(sections, 0)
    others = [name for name in sections if name not in (*LARGE, *NEVER_CUT)]

    def shown() -> int:
        return sum(len(section) + (hidden[name] > 0) for name, section in sections.items())

    def cut_next() -> str | None:
        """Section to shorten by a line: the longest of the first kind with more than its minimum of lines."""
        for names, least in ((SWEEPS, 12), (SWEEPS[1:], 4), (LARGE, 8), (others, 3), (LARGE, 4)):
            if longer := [name for name in names if len(sections[name]) > least]:
                return max(longer, key=lambda name: len(sections[name]))
        return None

    while shown() > most and (name := cut_next()):
        del sections[name][-1]
        hidden[name] += 1
    return [
        line
        for name, section in sections.items()
        for line in (*section, *([f"… {hidden[name]} more lines in {path}"] if hidden[name] else []))
    ]


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table whose columns are also aligned as plain text."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]


def number(value: float | None, form: str = ".3g", scale: float = 1.0) -> str:
    """Formats a number; a dash stands for None."""
    return "-" if value is None else f"{value * scale:{form}}"


def survey_lines(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return ["survey: nothing"]
    versions = ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items() if version)
    if "device" not in found:
        return [f"survey: no GPU; {versions}"]
    products = found.get("products", {})
    wrong = [f"; {name}: {verdict}" for name, verdict in products.items() if verdict != "right"]
    copy, product = number(found.get("copy_gb_per_second"), ".0f"), number(found.get("product_tflops"))
    lost = found.get("lost_share")
    return [
        f"{found['device']}, BLAS {found.get('blas', '-')}, copy {copy} GB/s, product {product} TFLOP/s; {versions}",
        f"products with float32 results: {len(products) - len(wrong)} of {len(products)} right" + "".join(wrong),
        *([lost_share_line(lost)] if lost else []),
    ]


def lost_share_line(shares: dict[str, float]) -> str:
    """Formats the shares by which sums are too small, by number of terms; also relative to 2^-24 per step."""
    steps = {terms: 2**-24 * int(terms) / 16 for terms in shares}
    said = (f"{share:.1e} at K = {terms} ({share / steps[terms]:.2f})" for terms, share in shares.items())
    return f"lost of a long product (in brackets: over 2^-24 per step of 16 terms): {', '.join(said)}"


def test_lines(name: str, found: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{found.get(kind, 0)} {kind}" for kind in ("passed", "failed", "skipped"))
    named = [f"  failed: {test}" for test in found.get("failures", [])]
    named += [f"  did not end: {test}" for test in found.get("unfinished", [])]
    return [f"{name}: {counts}", *first_of(named)]


def first_of(texts: list[str]) -> list[str]:
    more = [f"  … {len(texts) - MOST_NAMES} more"] if len(texts) > MOST_NAMES else []
    return [*texts[:MOST_NAMES], *more]


def check_lines(found: dict[str, Any] | None) -> list[str]:
    if not found:
        return []
    faults, unchecked = found.get("faults", []), found.get("not_checked", [])
    said = f"{found.get('ok', 0)} ok, {len(faults)} with faults, {len(unchecked)} not checked"
    return [f"poisoned memory and repeated runs: {said}", *first_of([f"  {line}" for line in (*faults, *unchecked)])]


def headline_table(found: dict[str, Any] | None) -> list[str]:
    """Table of the first shape of ``bench kernels``: OURS at every task, peers at their first task."""
    if not found or not found.get("shapes"):
        return []
    record = found["shapes"][0]
    floor = record.get("floor_seconds")
    bare = "" if not floor else "; bare products, ms: " + ", ".join(f"{n} {s * 1e3:.4g}" for n, s in floor.items())
    title = f"{record['shape']}, {record['dtype']}, H {record['features']}, V {record['vocabulary']}{bare}"
    if record.get("unavailable"):
        return [title, f"not measured: {record['unavailable']}"]
    rows: list[list[str]] = []
    seen: set[str] = set()
    for row in record["rows"]:
        if row["status"] == "measured" and (row["method"] in OURS or row["method"] not in seen):
            seen.add(row["method"])
            error = row.get("error", {})
            rows.append(
                [
                    row["method"],
                    row["task"],
                    number(row["seconds"]["both"]["median"], ".4g", 1e3),
                    number(row.get("over_floor"), ".3f"),
                    number(row["peak_extra_bytes"], ".0f", 1e-6),
                    *(
                        number(error.get(key), ".1e")
                        for key in ("logps_nats_max", "hidden_gradient", "weight_gradient")
                    ),
                ]
            )
    columns = ("method", "task", "ms", "× products", "extra MB", "nats", "dX", "dW")
    return [title, *(table(columns, rows) if rows else [])]


def absent_lines(found: dict[str, Any] | None) -> list[str]:
    """One line with the methods that were not measured at the first shape of ``bench kernels``."""
    if not found or not found.get("shapes"):
        return []
    said = [
        f"{row['method']} ({row['status']}{': ' + row['reason'][:60] if row.get('reason') else ''})"
        for row in found["shapes"][0]["rows"]
        if row["status"] != "measured"
    ]
    return [f"not measured: {'; '.join(dict.fromkeys(said))}"] if said else []


def target_lines(verdicts: list[Row]) -> list[str]:
    judged = [row for row in verdicts if row["verdict"] != "not measured"]
    if not judged:
        return []
    missed = [row for row in judged if row["verdict"] == "missed"]
    met = f"targets: {len(judged) - len(missed)} met, {len(missed)} missed, {len(verdicts) - len(judged)} not measured"
    return [met, *(f"  missed: {row['claim']}: {row['measured']:.3g} (target {row['limit']})" for row in missed)]


def sweep_table(record: dict[str, Any]) -> list[str]:
    """Table of the variants of ``bench sweep`` at a shape: predicted and measured times over the bare products.

    The three fastest come first, then those with a prediction, then the others by time.
    """
    if not record["rows"]:
        return []
    by_time = sorted(record["rows"], key=lambda row: row.get("over_products") or float("inf"))
    ordered = [*by_time[:3], *sorted(by_time[3:], key=lambda row: row["predicted"] is None)]
    rows = [
        [
            row["line"],
            number(row["predicted"], ".2f"),
            number(row.get("over_products"), ".3f"),
            number(row["predicted_scoring"], ".2f"),
            number(row.get("scoring_over_product"), ".3f"),
            number(row.get("nats"), ".1e"),
            "" if row["status"] == "measured" else f"{row['status']}: {row.get('reason', '')}"[:70],
        ]
        for row in ordered
    ]
    columns = ("variant", "predicted", "× 4 products", "predicted", "scoring × 1", "nats", "")
    return [f"variants of the kernels at {record['shape']}", *table(columns, rows)]


def trainer_table(rows: list[Row]) -> list[str]:
    """Table of ``bench training --part trl``; ratios are to TRL's fastest measurement with as many responses."""
    if not rows:
        return []
    lines = []
    for row in rows:
        measured = row["status"] == "measured"
        peers = [
            other["pairs_per_second"]
            for other in rows
            if other["trainer"] == "trl" and other["responses"] == row["responses"] and other["status"] == "measured"
        ]
        ratio = f"{row['pairs_per_second'] / max(peers):.2f}" if peers and measured else "-"
        ours = f"onpo_fast, {row.get('microbatch') or 1024} tokens at once"
        name = ours if row["trainer"] != "trl" else f"TRL DPOTrainer, {row['at_once']} pairs at once"
        lines.append(
            [
                str(row["responses"]),
                name,
                number(row.get("pairs_per_second")) if measured else row["status"],
                ratio,
                number(row.get("response_tokens_per_second"), ".0f"),
                number(row.get("seconds", {}).get("median")),
                number(row.get("peak_bytes"), ".2f", 1 / GB),
                number(row.get("utilisation"), ".0%"),
            ]
        )
    title = (
        f"fits of {rows[0]['model']} on {rows[0]['device']}, prompts and responses of about {rows[0]['tokens']} tokens"
    )
    columns = ("K", "trainer", "pairs/s", "over TRL's best", "response tokens/s", "s a step", "peak, GB", "utilisation")
    return [title, *table(columns, lines)]


def sampler_table(rows: list[Row]) -> list[str]:
    """Table of ``bench sampling``; ratios are to transformers' ``generate`` and to the batches of it."""
    if not rows:
        return []
    rates = {row["sampler"]: row["tokens_per_second"]["median"] for row in rows if row["status"] == "measured"}
    lines = []
    for row in rows:
        rate = rates.get(row["sampler"])
        ratios = [
            f"{rate / rates[peer]:.2f}" if rate and peer in rates else "-"
            for peer in ("transformers generate", "batches of generate", "vllm offline")
        ]
        lines.append(
            [
                row["sampler"],
                number(rate, ".0f") if rate else row["status"],
                *ratios,
                number(row.get("seconds", {}).get("median"), ".1f"),
                number(row.get("tokens_mean"), ".1f"),
                number(row.get("cut_off"), ".0%"),
                number(row.get("peak_bytes"), ".2f", 1 / GB),
            ]
        )
    first = rows[0]
    title = (
        f"{first['responses']} responses of at most {first['max_new_tokens']} tokens to {first['count']} prompts, "
        f"{first['model']} on {first['device']}, {first['batch_size']} at a time"
    )
    columns = ("sampler", "tokens/s", "over generate", "over its batches", "over vLLM offline")
    return [title, *table((*columns, "s", "mean tokens", "cut off", "peak, GB"), lines)]


def fit_table(fits: list[Row]) -> list[str]:
    """Table of the fits of ``bench training``. Column "loss" is the memory that the loss needs beyond "forward"."""
    if not fits:
        return []
    parts = ("weights", "gradients", "moments", "kept by the forward pass", "loss")
    rows = []
    for fit in fits:
        size, peaks = fit.get("bytes", {}), fit.get("peak_bytes", {})
        measured = fit["status"] == "measured"
        rows.append(
            [
                fit["loss"],
                f"{fit.get('layers', '-')} of {fit.get('of_layers', '-')}",
                number(fit.get("pairs_per_second")) if measured else fit["status"],
                number(fit.get("seconds", {}).get("median")),
                *(number(size.get(part), ".2f", 1 / GB) for part in parts),
                number(max(peaks.values(), default=None), ".2f", 1 / GB),
            ]
        )
    title = f"fit of {fits[0]['shape']} with random bf16 weights, {fits[0]['pairs']} pairs a step; memory in GB"
    columns = ("loss", "layers", "pairs/s", "s a step", "weights", "gradients", "moments", "forward", "loss", "peak")
    return [title, *table(columns, rows)]


def run_table(runs: list[Row]) -> list[str]:
    """Tables of the trainer's runs by stage: tokens/s, total seconds, and peak memory up to the end of the stage."""
    text = []
    for run in runs:
        ended = "" if run["status"] == "measured" else f" ({run['status']}: {run.get('reason', '')[:100]})"
        if "win_rate" in run:
            ended = f": π_T against π_1 {run['win_rate']:.1%}, KL {run['kl_to_initial']:.2f} nats"
        seconds, rates, peaks = (run.get(key, {}) for key in ("stage_seconds", "tokens_per_second", "peak_bytes"))
        stages = list(dict.fromkeys([*seconds, *rates]))
        rows = [
            [
                stage,
                number(rates.get(stage), ".4g"),
                number(seconds.get(stage)),
                number(peaks.get(stage), ".2f", 1 / GB),
            ]
            for stage in stages
        ]
        text += [f"trainer, {run['options']}{ended}"]
        text += table(("stage", "tokens/s", "seconds", "peak GB"), rows) if rows else []
    return text


def step_lines(steps: list[Row]) -> list[str]:
    """Table of the steps that did not end with "ok", and a line about the others."""
    ok = [step for step in steps if step["outcome"] == "ok"]
    rows = [
        [step["name"], f"{step['planned']:.0f}", f"{step['seconds']:.0f}", step["outcome"][:150]]
        for step in steps
        if step["outcome"] != "ok"
    ]
    total = ", ".join(f"{step['name']} {step['seconds']:.0f} s" for step in ok)
    said = [f"{len(ok)} of {len(steps)} steps ok: {total}"] if ok else []
    return [*(table(("step", "planned s", "s", "outcome"), rows) if rows else []), *said]
