"""Run directories as a run leaves them, written by hand, for tests of reports."""

from __future__ import annotations

import json
from pathlib import Path

ATTACK = "</script></div><script>alert('x')</script><img src=x onerror=alert(1)>"
POLICIES = ["π_1", "π_2", "π_3"]


def fit_row(iteration: int, fit: str, step: int, steps: int = 40) -> dict:
    progress = step / steps
    return {
        "stage": "fit",
        "time": 1.7e9 + 100 * iteration + step,
        "iteration": iteration,
        "fit": fit,
        "step": step,
        "steps": steps,
        "loss": 0.1 * (1 - progress),
        "loss_normalised": 0.25 * (1 - 0.6 * progress),
        "margin": 0.5 * progress,
        "target": 0.7,
        "pair_accuracy": 0.5 + 0.4 * progress,
        "logp_winner": -80.0,
        "logp_loser": -82.0,
        "log_ratio_winner": 0.2 * progress,
        "log_ratio_loser": -0.3 * progress,
        "gradient_norm": 3.0 - 2 * progress,
        "learning_rate": 1e-5,
        "tokens_per_second": 21000.0,
        "pairs_per_second": 30.0,
        "peak_memory_bytes": 9 << 30,
        "seconds": 0.5,
        "skipped": 0,
    }


def metrics(iterations: int = 2) -> list[dict]:
    rows = [{"time": 1.7e9, "stage": "prompts", "iteration": 0, "train": 1200, "held_out": 80, "skipped": 0}]
    for t in range(1, iterations + 1):
        at = {"time": 1.7e9 + 100 * t, "iteration": t}
        stages = {"sample": 12.0, "judge": 3.0, "pair": 0.1, "score": 4.0, "fit auxiliary": 20.0, "fit policy": 20.0}
        rows += [
            {**at, "stage": "sample", "seconds": 12.0, "responses": 600, "tokens": 48000, "tokens_per_second": 4000.0}
            | {"response_tokens_mean": 80.0 + t, "stopped_by_length": 0.05, "peak_memory_bytes": 5 << 30},
            {**at, "stage": "judge", "seconds": 3.0, "comparisons": 900, "triples": 300, "cyclic_triples": 0.1},
            {**at, "stage": "pair", "pairs": 300, "identical_pairs": 2, "prompts_without_pairs": 0}
            | {"empty_responses": 1, "untrained_loss": 0.2 + t / 100},
            {**at, "stage": "score", "model": "auxiliary", "seconds": 4.0, "tokens_per_second": 60000.0},
            *(fit_row(t, fit, step) for fit in ("auxiliary", "policy") for step in range(1, 41)),
            {**at, "stage": "iteration", "seconds": 60.0, "stage_seconds": stages, "kl_to_initial": 1.5 * (t - 1)}
            | {"kl_to_anchor": 0.4 if t > 1 else None, "response_tokens_mean": 80.0 + t, "cyclic_triples": 0.1},
        ]
    return [*rows, {"time": 1.7e9 + 500, "stage": "evaluate", "iteration": 0, "seconds": 30.0}]


def evaluation(rate: float, low: float, high: float) -> dict:
    return {
        "policies": POLICIES,
        "prompts": 80,
        "samples_per_prompt": 2,
        "oracle": "openings",
        "confidence": 0.95,
        "win_rate": [[0.5, 0.4, 1 - rate], [0.6, 0.5, 0.45], [rate, 0.55, 0.5]],
        "interval": [
            [[0.5, 0.5], [0.3, 0.5], [1 - high, 1 - low]],
            [[0.5, 0.7], [0.5, 0.5], [0.35, 0.55]],
            [[low, high], [0.45, 0.65], [0.5, 0.5]],
        ],
        "duality_gap": [0.3, 0.1, 0.0],
        "kl_to_initial": None,
        "response_tokens_mean": [80.0, 82.0, 83.0],
    }


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows), encoding="utf-8")


def write_unfinished(directory: Path) -> None:
    """Writes a run that was killed in the second iteration, in the middle of a line."""
    directory.mkdir()
    (directory / "config.yaml").write_text("objective: onpo\neta: 1.4\niterations: 2\nmodel: <tiny & model>\n")
    write_lines(directory / "metrics.jsonl", [*metrics(1)[:-1], fit_row(2, "auxiliary", 1)])
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "fit", "iteration": 2, "fit": "auxil')


def write_finished(directory: Path) -> None:
    """Writes a run of two iterations with its evaluation, into the directory of an unfinished one."""
    responses = {"π_1": ["No.", "?"], "π_2": ["So\nso."], "π_3": [ATTACK, "Yes."]}
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {i} {ATTACK}"}], "responses": responses, "preference": 0.731}
        for i in range(50)
    ]
    rows[0]["responses"] = responses | {"π_3": ["half a surrogate pair: \ud83d"]}
    write_lines(directory / "metrics.jsonl", metrics())
    write_lines(directory / "evaluation_responses.jsonl", rows)
    classes = {"classes": ["rock", ATTACK], "shares": [[0.912, 0.088], [0.5, 0.5], [0.345, 0.655]]}
    classes["best_response"] = [0.774, 0.65, 0.604]
    evaluated = evaluation(0.68, 0.61, 0.75) | {"class_shares": classes}
    (directory / "evaluation.json").write_text(json.dumps(evaluated))
    (directory / "environment.json").write_text(json.dumps({"torch": "2.9.0", "device": {"name": "H100", "count": 1}}))
