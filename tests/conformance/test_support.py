"""The page docs/support.md says what is so. To write it anew: ``UPDATE_GOLDEN=1 pytest tests/conformance``."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import pytest

from spir.conformance.support import Case, cell, table

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "support.md"
COMMAND = "UPDATE_GOLDEN=1 python -m pytest tests/conformance/test_support.py"


def test_the_support_table_is_up_to_date():
    found = table()
    if os.environ.get("UPDATE_GOLDEN"):
        PAGE.write_text(found, encoding="utf-8")
    lines = [text.splitlines() for text in (PAGE.read_text(encoding="utf-8"), found)]
    difference = "\n".join(difflib.unified_diff(*lines, "docs/support.md", "found", lineterm="", n=0))
    assert not difference, f"{difference}\nif that is meant: {COMMAND}"
    assert COMMAND in found


@pytest.mark.parametrize(
    ("cases", "shown"),
    [
        ([Case("reals", "yes"), Case("bits", "yes")], "yes"),
        ([Case("reals", "refused", "why")] * 2, "refused: why"),
        ([Case("reals", "refused", "why"), Case("bits", "yes")], "yes; refused on reals: why"),
        ([Case("bits", "refused", "why"), Case("bits", "yes")], "yes; refused on some bits: why"),
        ([Case("bits", "reference"), Case("rate", "reference")], "reference"),
    ],
)
def test_a_cell_says_what_holds_where(cases, shown):
    assert cell(cases) == shown
