"""Fewer spikes against accuracy: what the benchmark counts, on the shipped network."""

from __future__ import annotations

import functools

import pytest

import spir
from benchmarks import sparsify
from benchmarks.data import Samples
from benchmarks.sparsify import Outcome, Subject, clause, judge
from spir import driver
from spir.demo.lenet import calibration, images, lenet5


@functools.cache
def subject() -> Subject:
    x, y = images()
    module = spir.compile(lenet5(), "@stem", data=calibration(), check="off").module
    return Subject("lenet5", module, Samples(x[:20], y[:20]), x[:20], y[:20])


@functools.cache
def outcomes() -> list[Outcome]:
    return list(
        subject().outcomes(["", "rot=2", "drlo=3, mode=window", "sparsify{rot=1}, sparsify{rot=2, layers=relu1}"])
    )


def test_operations_are_those_of_the_report():
    module = driver.opt(subject().module, clause("rot=1, drlo=3"), check="off").module
    found, told = judge(module, subject().x), spir.compile(module, "", check="off").report(subject().x)
    assert found.operations == pytest.approx(sum(o.synaptic_operations for o in told.layers if not o.input))
    assert found.input_operations == pytest.approx(sum(o.synaptic_operations for o in told.layers if o.input))
    assert found.input_operations > 0


def test_settings_are_held_against_the_network_whose_spikes_all_stay():
    whole, *thin = outcomes()
    assert (whole.saved, whole.difference, whole.agreement) == (0, 0, 1)
    for outcome in thin:
        assert 0 < outcome.saved < 1
        assert outcome.operations == pytest.approx((1 - outcome.saved) * whole.operations)
        assert outcome.input_operations == whole.input_operations
        assert outcome.difference == pytest.approx(outcome.accuracy - whole.accuracy)


def test_what_was_measured_is_written_read_and_shown(tmp_path):
    path = tmp_path / "out.json"
    assert sparsify.read(path, Outcome) == []
    sparsify.write(path, outcomes())
    assert sparsify.read(path, Outcome) == outcomes()
    assert sparsify.show(outcomes()).row_count == 4
    assert outcomes()[1].key == ("lenet5", "rot=2", 20)
