"""The report in a real browser: headless Chromium opens the page, a script uses it, and the resulting page is read."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.report_runs import evaluation, metrics, write_lines

from onpo_fast.report import write_report

ATTACK = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome in PATH")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--no-first-run"]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

# Runs in the page; what it returns becomes, as JSON, all that is left of the page.
USE = """
const box = document.getElementById("search"), rows = [...document.querySelectorAll("article")];
const search = words => {
  box.value = words;
  box.dispatchEvent(new Event("input", {bubbles: true}));
  return [rows.filter(row => row.getClientRects().length).length, document.getElementById("found").textContent];
};
const focusable = [...document.querySelectorAll("a[href], summary, input, [tabindex]")];
for (const details of document.querySelectorAll("details")) details.open = true;
const luminance = colour => colour.match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + part / 765, 0);
const style = getComputedStyle(document.body);
return {
  all: search(""), seventh: search("  QUESTION 7  "), words: search("plain question"), none: search("zyx"),
  cleared: search(""),
  title: document.title,
  attack: rows.filter(row => row.querySelector(".pair").textContent.includes(ATTACK)).length,
  images: document.images.length,
  requests: performance.getEntriesByType("resource").map(entry => entry.name),
  width: innerWidth,
  hidden: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  unfocusable: focusable.filter(one => (one.focus(), document.activeElement !== one)).map(one => one.outerHTML),
  outline: (box.focus({focusVisible: true}), getComputedStyle(box).outlineStyle),
  columns: getComputedStyle(document.querySelector(".pair")).gridTemplateColumns.split(" ").filter(parseFloat).length,
  page: luminance(style.backgroundColor), ink: luminance(style.color),
  plot: luminance(getComputedStyle(document.querySelector("svg text")).fill),
};
"""


def use(report: Path, width: int, dark: bool) -> dict[str, Any]:
    """What USE says of the page in a frame of this width, since a window cannot be as narrow as a phone."""
    call = f"const ATTACK = {json.dumps(ATTACK)}; const said = (() => {{{USE}}})();".replace("</", "<\\/")
    tell = "top.document.body.textContent = JSON.stringify(said);"
    script = f"addEventListener('load', () => {{ {call} {tell} }})"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    script = f"<script>{script}</script>"
    used, frame = report.with_name("used.html"), report.with_name("frame.html")
    page = report.read_text(encoding="utf-8")
    assert "script-src " in page
    page = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)  # the page's policy allows its own alone
    used.write_text(page.replace("</body>", f"{script}</body>"), encoding="utf-8")
    frame.write_text(f'<body><iframe src="{used.name}" width="{width}" height="844" style="border: 0">')
    command = [BROWSER, *OPTIONS, f"--user-data-dir={report.with_name('profile')}", "--window-size=1400,900"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, check=False)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return json.loads(html.unescape(body[1]))


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Of a finished run whose last policy has learnt to attack, but for one prompt."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text("objective: onpo\niterations: 2\nout: " + 40 * "long/path/" + "\n")
    write_lines(directory / "metrics.jsonl", metrics())
    evaluated = evaluation(0.68, 0.61, 0.75) | {"oracle": "my_own_judges_of_conversations:prefer_the_helpful"}
    (directory / "evaluation.json").write_text(json.dumps(evaluated))
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {i}: " + "long_word" * (20 * i)}],
            "responses": {"π_1": ["No."], "π_2": ["So."], "π_3": [ATTACK if i else "A plain answer."]},
            "preference": 0.731,
        }
        for i in range(30)
    ]
    write_lines(directory / "evaluation_responses.jsonl", rows)
    return write_report(directory)


@pytest.mark.parametrize(("width", "dark", "columns"), [(1280, False, 2), (390, True, 1)], ids=["light", "phone, dark"])
def test_page(width: int, dark: bool, columns: int, report: Path) -> None:
    said = use(report, width, dark)
    # searched
    assert said["all"] == said["cleared"] == [30, ""]
    assert said["seventh"] == [3, "3 of 30"]  # 7, 17 and 27
    assert said["words"] == [1, "1 of 30"]
    assert said["none"] == [0, "0 of 30"]
    # a model's text is text
    assert said["attack"] == 29
    assert said["title"] == "run: self-play report"
    assert said["images"] == 0
    # by itself, by keyboard, in this window, in these colours
    assert said["requests"] == []
    assert said["unfocusable"] == []
    assert said["outline"] == "solid"
    assert said["width"] == width
    assert said["hidden"] == 0
    assert said["columns"] == columns
    assert (said["page"] < 0.2 and said["ink"] > 0.8) if dark else (said["page"] > 0.8 and said["ink"] < 0.2)
    assert said["plot"] == pytest.approx(said["ink"])
