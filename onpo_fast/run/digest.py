"""One hash of all that a run computed, to tell whether two runs are the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from onpo_fast.files import checksum

ASKED = ("requests", "answered", "cached", "prompt_tokens", "completion_tokens")
TIMED = ("time", "seconds", "stage_seconds", "tokens_per_second", "pairs_per_second", "peak_memory_bytes")


def run_digest(directory: Path) -> str:
    """Returns the SHA-256 of a run's policies, data, evaluation and metrics.

    Times, memory and the number of a judge's questions are left out: a question that was under way when a run was
    killed is asked again.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.glob("iteration_*/*")):
        digest.update(f"{path.relative_to(directory)} {checksum(path)}\n".encode())
    for name in ("evaluation.json", "evaluation_responses.jsonl", "heldout.jsonl"):
        digest.update(checksum(directory / name).encode())
    records = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    kept = (
        {key: value for key, value in record.items() if key not in TIMED + ASKED}
        for record in records
        if record["stage"] != "memory"
    )
    for line in sorted(json.dumps(record, sort_keys=True) for record in kept):
        digest.update(line.encode())
    return digest.hexdigest()
