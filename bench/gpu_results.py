"""Reads the results of the steps of the GPU check, and finds what is missing in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .runner import ROOT


def read_json(output: str, folder: Path) -> Any:
    """Reads the results file in the folder of a step; None if there is none yet."""
    files = sorted(folder.glob("*.json"))
    return json.loads(files[0].read_text(encoding="utf-8")) if files else None


def read_last_lines(output: str, folder: Path) -> list[str]:
    return [line[:300] for line in output.strip().splitlines()[-5:]]


TEST_OUTCOME = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<a>\S+::.*?)|(?P<b>\S+::.*?) (?P<last>[A-Z]+)(?: +\(.*\))?"
    r"(?: +\[ *\d+%\])?) *$",
    re.MULTILINE,
)
TEST_BEGAN = re.compile(r"^(\S+\.py::.*?) *$", re.MULTILINE)
TEST_KINDS = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}


def read_tests(output: str, folder: Path) -> dict[str, Any]:
    """Reads the possibly incomplete output of ``pytest -v``: counts, names of failed tests and of unfinished ones."""
    outcomes: dict[str, str] = {}
    for match in TEST_OUTCOME.finditer(output):
        kind = TEST_KINDS.get(match["first"] or match["last"])
        name = match["a"] or match["b"]
        if kind and outcomes.get(name) != "failed":  # an error in teardown is printed after PASSED
            outcomes[name] = kind
    counts = {kind: sum(found == kind for found in outcomes.values()) for kind in ("passed", "failed", "skipped")}
    began = [match[1] for match in TEST_BEGAN.finditer(TEST_OUTCOME.sub("", output))]
    return {
        **counts,
        "failures": [name for name, found in outcomes.items() if found == "failed"],
        "unfinished": [name for name in dict.fromkeys(began) if name not in outcomes],
    }


def read_checks(output: str, folder: Path) -> dict[str, Any]:
    """Reads the output of ``bench checks``, with lines "SHAPE: METHOD, TASK: ok", or a fault instead of "ok"."""
    found: dict[str, Any] = {"ok": 0, "faults": [], "not_checked": []}
    for line in output.splitlines():
        if ": not checked: " in line:
            found["not_checked"].append(line)
        elif match := re.fullmatch(r"([\w.-]+\dx\d+x\d+: .+, [^:]+): (.+)", line):
            if match[2] == "ok":
                found["ok"] += 1
            else:
                found["faults"].append(line)
    return found


NOTHING = "no results"


def some_lines(found: Any) -> str | None:
    return None if found else NOTHING


def tests_pass(found: Any) -> str | None:
    if found["failed"]:
        return f"{found['failed']} tests failed"
    return None if found["passed"] else NOTHING


def checks_pass(found: Any) -> str | None:
    if found["faults"]:
        return f"{len(found['faults'])} faults"
    if found["not_checked"]:
        return f"not checked: {len(found['not_checked'])}"
    return None if found["ok"] else NOTHING


def products_were_tried(found: Any) -> str | None:
    return None if found and "products" in found else NOTHING


def ours_measured(method: str) -> Callable[[Any], str | None]:
    """Requires a measured row of ``method`` and no failed row of this package; peers may be absent or fail."""

    def fault(found: Any) -> str | None:
        rows = [row for record in (found or {}).get("shapes", []) for row in record["rows"]]
        ours = [row for row in rows if row["method"] in (method, "onpo_fast lean")]
        if failed := [row for row in ours if row["status"] not in ("measured", "absent", "skipped")]:
            return f"{failed[0]['method']}, {failed[0]['task']}: {failed[0]['status']}"
        measured = any(row["method"] == method and row["status"] == "measured" for row in ours)
        return None if measured else f"{method} was not measured"

    return fault


def fit_measured(loss: str) -> Callable[[Any], str | None]:
    """Requires that the fit with this loss was measured; the other fit may run out of memory."""

    def fault(found: Any) -> str | None:
        statuses = [row["status"] for row in (found or {}).get("fits", []) if row["loss"] == loss]
        return None if "measured" in statuses else f"the fit with {loss}: {(statuses or ['not run'])[-1]}"

    return fault


def trainers_measured(found: Any) -> str | None:
    """Requires that every fit by this package's trainer was measured; TRL's may lack memory or its package."""
    rows = [row for row in (found or {}).get("trainers", []) if row["trainer"] == "onpo_fast"]
    wrong = [f"{row['responses']} responses: {row['status']}" for row in rows if row["status"] != "measured"]
    return "; ".join(wrong) or (None if rows else "no fit")


def epilogues_measured(found: Any) -> str | None:
    """Requires that the light epilogue was measured at the first shape, and that none failed with its default tile."""
    records = (found or {}).get("shapes", [])
    for record in records:
        for row in record["rows"]:
            own_tile = all(value is None for name, value in row["variant"].items() if name != "epilogue")
            if own_tile and row["status"] not in ("measured", "skipped"):
                return f"{record['shape']}: {row['line']}: {row['status']}"
    light = [row["status"] for record in records[:1] for row in record["rows"] if row["line"] == "light, 3 GiB"]
    return None if "measured" in light else f"light, 3 GiB: {(light or ['not run'])[0]}"


def run_has_rates(found: Any) -> str | None:
    return None if any(run.get("tokens_per_second") for run in (found or {}).get("runs", [])) else NOTHING


def read_reports(output: str, folder: Path) -> dict[str, Any]:
    """Finds the kernels of this package that compute-sanitizer reports; those of libraries are ignored."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    kernels = re.findall(r"@triton\.jit[^\n]*\n(?:@[^\n]*\n)*def (\w+)", sources)
    reports = [line for line in output.splitlines() if line.startswith("=====")]
    named = sorted({kernel for kernel in kernels if any(re.search(rf"\b{kernel}\b", line) for line in reports)})
    return {"finished": any("SUMMARY" in line for line in reports), "kernels_named": named}


def no_reports(found: Any) -> str | None:
    if found["kernels_named"]:
        return f"reports about {', '.join(found['kernels_named'])}"
    return None if found["finished"] else NOTHING
