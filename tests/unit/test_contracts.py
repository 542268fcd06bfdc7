"""Contracts: what counts as a change, and which changes a promise allows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spir.contracts import Bounded, Calibrated, Change, Exact, change, changes, check, worst
from spir.errors import SpirError


def one(before, after) -> Change:
    (found,) = changes({"v": np.array(before, dtype=float)}, {"v": np.array(after, dtype=float)})
    return found


def test_a_change_is_the_largest_and_the_mean_difference_and_the_largest_magnitude_before():
    found = one([1.0, -4.0, 2.0, 0.0], [1.0, -3.0, 2.5, 0.0])
    assert found == Change("v", 1.0, 0.375, 4.0, elements=4)
    assert found.relative == 0.25


def test_only_values_that_both_sides_name_are_compared():
    before, after = {"a": np.ones(2), "b": np.ones(2)}, {"b": np.zeros(2), "c": np.zeros(2)}
    assert [c.value for c in changes(before, after)] == ["b"]


@pytest.mark.parametrize(
    ("before", "after", "relative"),
    [
        ([0.0], [0.0], 0.0),
        ([0.0], [1e-300], math.inf),
        ([1.0], [math.nan], math.inf),
        ([math.inf], [math.inf], math.inf),
        ([1.0, 2.0], [1.0], math.inf),
        ([[1.0, 2.0]], [1.0, 2.0], math.inf),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_change_that_no_number_measures_is_infinite(before, after, relative):
    found = one(before, after)
    assert found.relative == relative
    if relative:
        with pytest.raises(SpirError, match="promises exact, and %v changed by"):
            check(Exact(), "step", [found], "1 probes")


@pytest.mark.parametrize("contract", [Bounded(), Calibrated()])
@pytest.mark.parametrize("largest", [math.inf, math.nan])
def test_no_contract_lets_a_value_lose_its_shape_or_its_numbers(contract, largest):
    found = [Change("a", largest, largest, 0.5), Change("b", 1.0, 1.0, 0.0)]
    with pytest.raises(SpirError, match=r"%a changed by (inf|nan) of 0\.5"):
        check(contract, "step", found, "1 probes")


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_changes_of_two_batches_add_up_to_the_change_of_both(cut):
    before, after = np.array([1.0, -4.0, 2.0, 0.0]), np.array([1.5, -4.0, 2.25, 1.0])
    parts = [change("v", before[s], after[s]) for s in (slice(cut), slice(cut, None))]
    assert parts[0] + parts[1] == change("v", before, after) == Change("v", 1.0, 0.4375, 4.0, elements=4)


@pytest.mark.parametrize("lost", [math.inf, math.nan])
def test_a_sum_keeps_a_change_that_no_number_measures(lost):
    for total in (Change("v", lost, lost, 1.0) + change_of(0.5), change_of(0.5) + Change("v", lost, lost, 1.0)):
        assert total.relative == math.inf
        assert not math.isfinite(total.mean)


def change_of(relative: float) -> Change:
    return change("v", np.array([2.0]), np.array([2.0 + 2 * relative]))


@pytest.mark.parametrize(
    ("contract", "relative", "kept"),
    [
        (Exact(), 0.0, True),
        (Exact(), 2.0**-52, False),
        (Bounded(0.25), 0.25, True),
        (Bounded(0.25), -0.25, True),
        (Bounded(0.25), 0.25 + 2.0**-50, False),
        (Bounded(0.0), 2.0**-52, False),
        (Bounded(), 1e9, True),
        (Calibrated(), 1e9, True),
    ],
)
def test_a_promise_ends_exactly_where_it_says(contract, relative, kept):
    found = change_of(relative)
    if kept:
        assert check(contract, "step", [found], "5 probes") == found
        return
    with pytest.raises(SpirError) as caught:
        check(contract, "step", [found], "5 probes")
    assert caught.value.code == "contract"


def test_the_worst_change_is_reported_whatever_its_place():
    found = [change_of(r) for r in (0.1, 0.4, 0.2)]
    assert check(Calibrated(), "step", found, "3 probes") == found[1]
    assert check(Exact(), "step", [], "3 probes") is None
    assert worst(found) == found[1]


def test_a_broken_promise_shows_value_size_and_probes():
    with pytest.raises(SpirError) as caught:
        check(Bounded(0.01), "fold", [Change("fc", 0.5, 0.1, 4.0)], "11 probes (2 corners, 9 ties)")
    assert str(caught.value) == (
        "error[contract]: fold promises bounded(0.01 relative), and %fc changed by 0.5 of 4\n"
        "    checked: 11 probes (2 corners, 9 ties)\n"
        "        fix: this is a bug of the pass: the reproducer shows it"
    )


def test_contracts_print_what_they_promise():
    found = [str(c) for c in (Exact(), Bounded(), Bounded(1e-10), Calibrated())]
    assert found == ["exact", "bounded, measured", "bounded(1e-10 relative)", "calibrated"]
