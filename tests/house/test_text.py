"""What is written: no trace of one machine, plain text, and examples that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
HOME = re.compile(r"(?<![\w.~*-])/(?:work|root|home|farm|Users)/")
BINARY = {".npz", ".safetensors", ".png", ".jpg", ".gif", ".pdf"}
TABBED = {"Makefile"}


@pytest.fixture(scope="module")
def texts(repository, tracked) -> dict[Path, str]:
    paths = [p for p in tracked if p.suffix not in BINARY and not (repository / p).is_symlink()]
    return {path: (repository / path).read_bytes().decode("utf-8") for path in paths}


def lines_where(texts, wrong) -> list[str]:
    return [f"{p}:{n}" for p, text in texts.items() for n, line in enumerate(text.split("\n"), 1) if wrong(line)]


def test_no_file_names_a_folder_of_one_machine(texts):
    assert not lines_where(texts, HOME.search)


def test_text_is_plain(texts):
    assert not [str(path) for path, text in texts.items() if text and not text.endswith("\n")], "no newline at the end"
    assert not lines_where(texts, lambda line: "\r" in line or line != line.rstrip(" \t\r")), "blanks at an end"
    spaced = {path: text for path, text in texts.items() if path.name not in TABBED}
    assert not lines_where(spaced, lambda line: "\t" in line), "a tab"


def test_the_readme_has_an_example():
    assert BLOCK.search((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], page.name, "exec"), names)  # a failure shows the page's own line
