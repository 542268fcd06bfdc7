"""Options: typed, ranged, printed and read back; wrong ones refused all at once."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import pytest

from spir.errors import SpirError
from spir.options import build, fields, option, spell, spelled


@attrs.frozen
class Cut:
    name: ClassVar[str] = "cut"
    bits: int = option(8, "bits of a weight", ge=2, le=16)
    share: float = option(0.5, "share that stays", ge=0.0, le=1.0)
    floor: float = option(0.0, "the least value", ge=0)
    fold: bool = option(True, "whether to fold")
    join: str = option("wide", "how branches meet", one_of=("wide", "rescale"))
    limit: int | None = option(None, "no more than so many", ge=1)
    layers: str = option("*", "which layers")


def refused(**values) -> str:
    with pytest.raises(SpirError) as caught:
        build(Cut, values)
    return str(caught.value)


def test_options_left_out_have_their_default():
    assert build(Cut, {}) == Cut()
    assert spelled(Cut()) == ""


def test_every_option_is_known_by_name_and_sentence():
    assert {name: a.metadata["doc"] for name, a in fields(Cut).items()}["join"] == "how branches meet"
    assert list(fields(Cut)) == ["bits", "share", "floor", "fold", "join", "limit", "layers"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"bits": 4}, "{bits=4}"),
        ({"fold": False, "share": 0.25}, "{share=0.25, fold=off}"),
        ({"join": "rescale", "limit": 3}, "{join=rescale, limit=3}"),
        ({"layers": "layer3.*"}, '{layers="layer3.*"}'),
        ({"layers": "conv1"}, "{layers=conv1}"),
        ({"share": 1}, "{share=1}"),
    ],
)
def test_only_what_differs_from_the_default_is_spelled(values, text):
    assert spelled(build(Cut, values)) == text


def test_every_option_can_be_spelled():
    every = '{bits=8, share=0.5, floor=0.0, fold=on, join=wide, limit=none, layers="*"}'
    assert spelled(Cut(), every=True) == every


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "on"),
        (False, "off"),
        (None, "none"),
        (7, "7"),
        (-0.5, "-0.5"),
        (1e-07, "1e-07"),
        ("plain-word.1", "plain-word.1"),
        ("two words", '"two words"'),
        ('a"b\\c\n', '"a\\"b\\\\c\\n"'),
        ("", '""'),
        ("3", '"3"'),
        *((word, f'"{word}"') for word in ("on", "off", "true", "false", "none")),
    ],
)
def test_a_value_is_spelled_so_that_it_reads_back_as_itself(value, text):
    assert spell(value) == text


def test_a_value_out_of_range_is_refused():
    assert refused(bits=17) == (
        "error[option]: cut{bits} = 17 is outside 2..16\n        fix: bits of a weight; take one of 2..16"
    )
    assert "cut{limit} = 0 is outside 1.." in refused(limit=0)
    assert "cut{share} = nan is outside 0.0..1.0" in refused(share=math.nan)
    assert "cut{floor} = nan is outside 0.." in refused(floor=math.nan)


@pytest.mark.parametrize("edge", [2, 16])
def test_the_ends_of_a_range_are_inside(edge):
    assert build(Cut, {"bits": edge}).bits == edge


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4.0}, "cut{bits} takes int, not 4.0"),
        ({"bits": True}, "cut{bits} takes int, not on"),
        ({"bits": None}, "cut{bits} takes int, not none"),
        ({"fold": 1}, "cut{fold} takes on/off, not 1"),
        ({"share": "half"}, "cut{share} takes float, not half"),
        ({"share": False}, "cut{share} takes float, not off"),
        ({"layers": 3}, "cut{layers} takes str, not 3"),
        ({"limit": 2.5}, "cut{limit} takes int, not 2.5"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(values, message):
    assert refused(**values).splitlines()[0] == f"error[option]: {message}"


def test_a_near_miss_is_named():
    assert refused(bit=8) == "error[option]: there is no option of cut called 'bit'\n        fix: did you mean 'bits'?"
    text = "error[option]: there is no value of cut{join} called 'rescal'\n        fix: did you mean 'rescale'?"
    assert refused(join="rescal") == text


def test_all_mistakes_are_reported_at_once():
    text = refused(bits=1, colour="red", fold=3)
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("error")] == ["error[option]"] * 3


def test_the_class_itself_refuses_what_the_text_refuses():
    with pytest.raises(SpirError, match=r"cut\{bits\} = 99 is outside"):
        Cut(bits=99)
    with pytest.raises(SpirError, match=r"cut\{bits\} = 99 is outside"):
        attrs.evolve(Cut(), bits=99)
