"""What a reader meets first: the README's outline, links and pictures of the documentation, the citation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchor(heading: str) -> str:
    """The fragment that GitHub gives a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 700  # code and tables included


def test_install_comes_early() -> None:
    first = next(i for i, line in enumerate(README.splitlines(), 1) if "pip install" in line)
    assert first < 20


def test_the_readme_has_pictures() -> None:
    pictures = [ROOT / name for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)]
    assert all(picture.is_file() and picture.is_relative_to(ROOT / "docs" / "images") for picture in pictures)
    assert len([picture for picture in pictures if not picture.name.startswith("badge-")]) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if link.startswith(("https://", "http://")):
            continue
        name, _, fragment = link.partition("#")
        target = page if not name else page.parent / name
        assert target.exists(), link
        if fragment:
            headings = re.findall(r"^#+ (.*)$", FENCED.sub("", target.read_text(encoding="utf-8")), re.MULTILINE)
            assert fragment in [anchor(heading) for heading in headings], link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        if page.name != "README.md":
            assert f"({page.name})" in index
    assert "docs/README.md" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_text_exist(page: Path) -> None:
    """Paths from the root of the repository, as `bench/zoo.py`."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for name in re.findall(r"`((?:bench|configs|docs|examples|kernels|onpo_fast|tests)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_the_map_names_files_that_exist() -> None:
    tree = FENCED.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))[0]
    folders = ("onpo_fast", "kernels", "experiments", "docs/images")
    there = {path.name for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\w+\.py\b", tree)) <= there


def test_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["title"] == "onpo_fast"
    assert "2502.16852" in citation["preferred-citation"]["url"]
