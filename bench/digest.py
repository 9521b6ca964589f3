"""One hash of all that a run computed, to tell whether two runs are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from onpo_fast.files import checksum

ASKED = ("requests", "answered", "cached", "prompt_tokens", "completion_tokens")
TIMED = ("time", "seconds", "hidden_seconds", "stage_seconds", "tokens_per_second", "pairs_per_second")
UNLIKE = (*ASKED, *TIMED, "peak_memory_bytes")  # fields of metrics that differ between equal runs


def run_digest(directory: Path) -> str:
    """Returns the SHA-256 of ``run_contents``."""
    digest = hashlib.sha256()
    for line in run_contents(directory):
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def run_contents(directory: Path) -> list[str]:
    """Returns a line for each file that a run computed, with its SHA-256, and for each record of its metrics.

    Times, memory and the number of a judge's questions are left out: a question that was under way when a run was
    killed is asked again.
    """
    files = sorted(directory.glob("iteration_*/*"))
    files += [directory / name for name in ("evaluation.json", "evaluation_responses.jsonl", "heldout.jsonl")]
    lines = [f"{path.relative_to(directory)} {checksum(path)}" for path in files]
    records = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    kept = (
        {key: value for key, value in record.items() if key not in UNLIKE}
        for record in records
        if record["stage"] != "memory"
    )
    return lines + sorted(json.dumps(record, sort_keys=True) for record in kept)
