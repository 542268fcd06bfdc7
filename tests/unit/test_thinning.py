"""Rounding and dropping spikes: every code of 8 bits, every reading, by value, by step and by interval."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from spir.ops._thinning import READINGS, Thinning, generate
from spir.ops.encode import Encode, bits
from spir.types import Int, Interval, Scale, Spikes, Tensor
from tests.unit.test_ops import thinned

SETTINGS = [Thinning(rot, drlo, mode) for rot in range(5) for drlo in (0, 1, 2, 3, 4, 7) for mode in READINGS]
SIGNS = pytest.mark.parametrize("signed", [False, True])


def codes(length: int, *, signed: bool) -> np.ndarray:
    low, high = Spikes.limits(length, "bits", signed=signed)
    return np.arange(low, high + 1)


def spikes(values: np.ndarray, length: int) -> np.ndarray:
    return np.array([f"{value % 2**length:b}".count("1") for value in values.tolist()])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_rot_is_the_nearest_multiple_halves_up_and_saturates(k):
    found = Thinning(rot=k).codes(codes(8, signed=False), 8, signed=False)
    expected = [min((x + 2 ** (k - 1)) // 2**k * 2**k, 256 - 2**k) for x in range(256)]
    assert found.tolist() == expected


def test_the_published_example_83_84_80():
    rounded = Thinning(rot=2).codes(np.array([83]), 8, signed=False)
    assert (rounded[0], *spikes(np.array([83, rounded[0]]), 8)) == (84, 4, 3)
    for drlo, mode in ((2, "count"), (3, "window"), (4, "window"), (3, "position"), (4, "position")):
        both = Thinning(2, drlo, mode).codes(np.array([83]), 8, signed=False)
        assert (both[0], spikes(both, 8)[0]) == (80, 2)


@SIGNS
@pytest.mark.parametrize("thinning", SETTINGS, ids=str)
def test_every_code_of_8_bits_is_what_its_digits_say(thinning, signed):
    values = codes(8, signed=signed)
    op = SimpleNamespace(rot=thinning.rot, drlo=thinning.drlo, drlo_mode=thinning.mode)
    expected = [thinned(op, value, 8, signed=signed) for value in values.tolist()]
    assert thinning.codes(values, 8, signed=signed).tolist() == expected
    assert thinning.codes(values.astype(object), 8, signed=signed).tolist() == expected
    assert thinning.table(8, signed=signed).tolist() == expected


@SIGNS
@pytest.mark.parametrize("mode", READINGS)
def test_no_train_has_more_spikes_than_a_reading_leaves(mode, signed):
    values = codes(8, signed=signed)
    for k in range(1, 8):
        left = Thinning(0, k, mode).codes(values, 8, signed=signed)
        assert (left <= values).all()
        assert ((left < 0) == (values < 0)).all()
        most = 8 - signed - k if mode == "position" else k
        assert (spikes(left, 8) - (left < 0)).max() == min(most, 8 - signed)


@SIGNS
@pytest.mark.parametrize("length", range(2, 9))
def test_steps_give_the_bits_of_the_code_also_beyond_the_range(length, signed):
    low, high = Spikes.limits(length, "bits", signed=signed)
    potentials = np.arange(low - 2**length, high + 2**length + 1)
    inside = np.clip(potentials, low, high)
    readings = itertools.product(range(length), range(length), READINGS)
    for thinning in (Thinning.of(*setting) for setting in readings):
        steps = np.array(list(generate(np, potentials, length, signed=signed, thinning=thinning)))
        left = inside if thinning is None else thinning.codes(inside, length, signed=signed)
        np.testing.assert_array_equal(steps, bits(left, length, signed=signed))


@SIGNS
@pytest.mark.parametrize("thinning", SETTINGS, ids=str)
def test_bounds_are_the_ends_of_what_an_interval_becomes(thinning, signed):
    """All intervals of 8 bits: order is kept, so the least and the largest are those of the ends."""
    values = codes(8, signed=signed)
    left = thinning.codes(values, 8, signed=signed)
    least = np.minimum.accumulate(left[::-1])[::-1]  # from each code on
    largest = np.maximum.accumulate(left)  # up to each code
    np.testing.assert_array_equal(least, left)
    np.testing.assert_array_equal(largest, left)
    found = thinning.bounds(Interval.of(values, values), 8, signed=signed)
    assert (found.lo == left).all()
    assert (found.hi == left).all()


@pytest.mark.parametrize("thinning", SETTINGS[::7], ids=str)
@pytest.mark.parametrize(("lo", "hi"), [(0, 255), (-128, 127), (-5, 90), (3, 127)])
def test_the_range_of_an_encoder_holds_what_it_makes_of_any_part_of_its_operand(thinning, lo, hi):
    op = Encode(8, rot=thinning.rot, drlo=thinning.drlo, drlo_mode=thinning.mode)
    made = op.infer(Tensor((1,), Int(lo, hi, Scale.of(1.0))))
    values = np.arange(lo, hi + 1)
    left = thinning.codes(values, 8, signed=lo < 0)
    assert made.range.hull[0] <= left.min()
    assert left.max() <= made.range.hull[1]
    for first, last in itertools.combinations(range(0, len(values), 23), 2):
        found = op.bounds(((1,),), Interval.of(int(values[first]), int(values[last])))
        part = left[first : last + 1]
        assert found.hull[0] <= part.min()
        assert part.max() <= found.hull[1]


def test_codes_too_many_for_a_table_are_stepped_through():
    values = np.random.default_rng(0).integers(0, 2**40, 200)
    thinning = Thinning(5, 3)
    assert thinning.table(40, signed=False) is None
    found = thinning.decoded(np, values, 40, signed=False)
    np.testing.assert_array_equal(found, thinning.codes(values, 40, signed=False))
