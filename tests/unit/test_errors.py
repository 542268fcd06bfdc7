"""Diagnostics: one layout, collected, located."""

from __future__ import annotations

import pickle
import re

import pytest

from spir.errors import CODES, Diagnostic, Note, SpirError, SpirWarning, error, located, raise_all, unknown

LAYOUT = """\
error[type]: max_pool: spikes[8, bits] trains are not nested, so the maximum of trains is not the train of the maximum
         op: %p = max_pool %r {kernel = 2} : ...
       from: features.3   (MaxPool2d, lenet.py line 41)
        fix: add lower-max-pool before derive-thresholds, or use neuron=parallel"""


def test_an_error_has_the_one_layout_whatever_the_order_of_its_notes():
    refusal = error(
        "type",
        "max_pool: spikes[8, bits] trains are not nested, so the maximum of trains is not the train of the maximum",
        fix="add lower-max-pool before derive-thresholds, or use neuron=parallel",
        from_="features.3   (MaxPool2d, lenet.py line 41)",
        op="%p = max_pool %r {kernel = 2} : ...",
    )
    assert str(refusal) == LAYOUT
    assert str(refusal.note("pass", "x")).splitlines()[3:] == ["       pass: x", LAYOUT.splitlines()[-1]]


def test_a_note_of_several_lines_hangs_below_its_first():
    text = str(error("syntax", "wrong", at="line 3\n  %y = rely %x\n       ^"))
    assert text.splitlines()[1:] == ["         at: line 3", "               %y = rely %x", "                    ^"]


def test_a_long_label_moves_the_column():
    lines = str(error("contract", "broken", reproducer="a.spir", fix="b")).splitlines()
    assert lines == ["error[contract]: broken", "    reproducer: a.spir", "           fix: b"]


def test_a_warning_has_the_same_layout():
    warning = SpirWarning(Diagnostic("data", "few samples", (Note("fix", "give more"),)))
    assert str(warning) == "warning[data]: few samples\n        fix: give more"


def test_empty_notes_are_left_out():
    assert error("type", "m", fix="", op="").diagnostics == (Diagnostic("type", "m"),)
    assert Diagnostic("type", "m").note("from", "") == Diagnostic("type", "m")


def test_a_note_does_not_replace_one_of_the_same_label():
    refusal = error("type", "m", op="inner").note("op", "outer")
    assert refusal.diagnostics[0].notes == (Note("op", "inner"),)


def test_located_adds_its_notes_to_every_diagnostic_that_passes_through():
    cause = KeyError("k")
    with pytest.raises(SpirError) as caught, located(op="%y = relu %x", from_="act"):
        raise SpirError(Diagnostic("type", "a"), Diagnostic("module", "b", (Note("from", "own"),))) from cause
    first, second = caught.value.diagnostics
    assert first.notes == (Note("op", "%y = relu %x"), Note("from", "act"))
    assert second.notes == (Note("from", "own"), Note("op", "%y = relu %x"))
    assert caught.value.__cause__ is cause


def test_located_lets_other_exceptions_alone():
    with pytest.raises(ZeroDivisionError), located(op="x"):
        raise ZeroDivisionError


def test_refusals_are_collected_in_one_error():
    with pytest.raises(SpirError) as caught:
        raise_all([error("backend", "one"), error("type", "two", fix="f")])
    assert str(caught.value) == "error[backend]: one\nerror[type]: two\n        fix: f"
    assert caught.value.code == "backend"


def test_no_refusal_is_no_error():
    raise_all([])


@pytest.mark.parametrize(
    ("name", "known", "fix"),
    [
        ("quantise", ["quantize", "relu"], "did you mean 'quantize'?"),
        ("zzz", ["quantize", "relu", "add"], "one of: add, quantize, relu"),
        ("zzz", [], None),
    ],
)
def test_an_unknown_name_brings_the_nearest_or_the_list(name, known, fix):
    (found,) = unknown("pass", name, known).diagnostics
    assert (found.code, found.message) == ("name", f"there is no pass {name!r}")
    assert found.notes == (() if fix is None else (Note("fix", fix),))


def test_a_code_that_nobody_listed_is_refused():
    with pytest.raises(ValueError, match="E-NOTHING"):
        error("E-NOTHING", "m")
    assert all(meaning for meaning in CODES.values())


RAISED = re.compile(r'(?:error|Diagnostic)\(\s*"([\w-]+)"|code(?:: str)? ?= ?"([\w-]+)"')


def test_every_code_that_is_listed_is_raised_somewhere_and_no_other(repository):
    folders = (repository / name for name in ("spir", "passes", "backends", "frontends"))
    texts = (path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    found = {one or other for text in texts for one, other in RAISED.findall(text)}
    assert found - {"bits", "isi"} == set(CODES)  # those are codes of trains


def test_an_error_is_what_pickling_and_chaining_keep():
    refusal = error("E-VRANGE", "the sum needs 65 bits", fix="fewer bits", from_="conv1 (Conv2d)")
    again = pickle.loads(pickle.dumps(refusal))
    assert (str(again), again.code, again.diagnostics) == (str(refusal), "E-VRANGE", refusal.diagnostics)
