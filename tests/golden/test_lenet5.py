"""A full recipe on the shipped network, as text. To write it anew: ``UPDATE_GOLDEN=1 pytest tests/golden``."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import numpy as np
import pytest

import spir
from spir.demo.lenet import calibration, images, lenet5

GOLDEN = Path(__file__).with_name("lenet5_stem.spir")
SAFE = ("weight", "weight_scale")


@pytest.fixture(scope="module")
def compiled() -> spir.Compiled:
    return spir.compile(lenet5(), "@stem{bits=8}", data=calibration(), backend="hw", check="off")


def masked(text: str) -> str:
    """Without lines of source, and of what hangs on ranges only five digits: machines add up floats in their own order.

    Integer weights and their scales come from the shipped weights alone.
    """
    text = re.sub(r'(from "[^"]*" "[^"]*?) line \d+', r"\1", text)
    text = re.sub(r"(\w*)#[0-9a-f]{16}", lambda m: m[0] if m[1] in SAFE else f"{m[1]}#", text)
    return re.sub(r"\d+\.\d{6,}(e-?\d+)?", lambda m: f"{float(m[0]):.5g}", text)


def test_the_recipe_gives_the_text_that_is_on_file(compiled):
    found = str(compiled.module)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(found, encoding="utf-8")
    golden = GOLDEN.read_text(encoding="utf-8")
    lines = [masked(text).splitlines() for text in (golden, found)]
    difference = "\n".join(difflib.unified_diff(*lines, "on file", "found", lineterm="", n=0))
    assert not difference, f"{difference}\nif that is meant: UPDATE_GOLDEN=1"


def test_the_text_on_file_is_a_module(compiled):
    read = spir.parse(GOLDEN.read_text(encoding="utf-8"))
    assert str(read) == GOLDEN.read_text(encoding="utf-8")
    assert list(read.types) == list(compiled.module.types)


def test_a_few_images_get_their_digits(compiled):
    x, y = images()
    logits = compiled(x[:50])
    assert np.mean(logits.argmax(axis=1) == y[:50]) >= 0.98
