"""derive-thresholds and fuse-neuron: the integers of a requant are the neuron."""

from __future__ import annotations

import attrs
import pytest

from spir.ir import Array, Module
from spir.ops.add import Add
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.types import Current, Int, Scale
from tests.unit.small_networks import (
    BIAS,
    TO_INTEGERS,
    conv,
    images,
    network,
    op_of,
    refusal,
    run,
    shown,
    text_of,
)


def integers(hi: int = 255, lo: int = 0) -> Module:
    """An integer network of one requant."""
    requant = Requant(Array.of([3]), Array.of([8]), 16, lo, hi, 0.5)
    return network(("a", Integrate(), "x"), ("b", requant, "a"), encoding=Int(-100, 100, Scale.of(0.1)))


def test_the_neuron_copies_the_integers_of_the_requant():
    module = run(network(("a", conv(2, bias=BIAS), "x"), ("b", Relu(), "a")), TO_INTEGERS, images())
    unfused = run(module, "derive-thresholds")
    assert shown(unfused)[-3:] == ["b.integral = integrate a.sum", "b.code = requant b.integral", "b = encode b.code"]
    assert op_of(unfused, "b.code") == op_of(module, "b")
    fused = op_of(run(unfused, "fuse-neuron"), "b")
    requant = op_of(module, "b")
    assert (fused.mul, fused.add, fused.div, fused.scale, fused.clip) == (
        requant.mul,
        requant.add,
        requant.div,
        requant.scale,
        (requant.lo, requant.hi),
    )


def test_clip_ranges_that_are_no_power_of_two_are_refused_with_the_nearest():
    assert text_of(refusal(integers(200), "derive-thresholds")) == (
        "error[type]: neuron stem realises clip ranges 0..2^b-1 and -2^(b-1)..2^(b-1)-1, not 0..200\n"
        "         op: %b = requant\n"
        "       from: net.b (net.py line 7)\n"
        "       pass: derive-thresholds\n"
        "        fix: quantize to 0..255"
    )
    assert "fix: quantize to -128..127" in str(refusal(integers(90, -128), "derive-thresholds"))


def test_an_unknown_neuron_is_named_with_the_near_miss():
    refused = refusal(integers(), "derive-thresholds{neuron=stemm}")
    assert "error[option]: there is no neuron 'stemm'" in str(refused)
    assert "fix: did you mean 'stem'?" in str(refused)


def test_an_integral_that_others_read_stays_beside_the_neuron():
    current = Current(4, "bits", -90, 80, -6, 6, Scale.of(0.5))
    requant = Requant(Array.of([3]), Array.of([8]), 16, 0, 15, 0.25)
    module = network(
        ("a", Integrate(), "x"),
        ("b", requant, "a"),
        ("c", Encode(4), "b"),
        ("d", Scaling(Array.of([3]), Array.of([0.75])), "c"),
        ("e", Integrate(), "d"),
        ("f", attrs.evolve(requant, scale=0.75), "a"),
        ("g", Add(), "e f"),
        encoding=current,
    )
    assert shown(run(module, "fuse-neuron")) == [
        "a = integrate x",
        "c = neuron_stem x",
        "d = scale c",
        "e = integrate d",
        "f = requant a",
        "g = add e f",
    ]


@pytest.mark.parametrize(
    ("bias", "hi"), [(Array.of([1]), 15), (None, 14)], ids=["a bias inside", "a clip range of its own"]
)
def test_three_ops_that_are_no_neuron_stay(bias, hi):
    current = Current(4, "bits", -90, 80, -6, 6, Scale.of(0.5))
    requant = Requant(Array.of([3]), Array.of([8]), 16, 0, hi, 0.25)
    module = network(("a", Integrate(bias), "x"), ("b", requant, "a"), ("c", Encode(4), "b"), encoding=current)
    assert run(module, "fuse-neuron") == module


def test_a_requant_of_integers_is_no_neuron():
    requant = Requant(Array.of([3]), Array.of([8]), 16, 0, 15, 0.25)
    source = Int(-90, 80, Scale.of(0.5))
    module = network(("a", Integrate(), "x"), ("b", requant, "a"), ("c", Encode(4), "b"), encoding=source)
    assert run(module, "fuse-neuron") == module


def test_a_neuron_that_does_not_exist_is_refused_with_the_nearest():
    module = network(("a", conv(2), "x"), ("b", Relu(), "a"))
    for name in ("derive-thresholds{neuron=stam}", "fuse-neuron{neuron=stam}"):
        passes = f"{TO_INTEGERS}, derive-thresholds, {name}" if name.startswith("fuse") else f"{TO_INTEGERS}, {name}"
        assert "did you mean 'stem'?" in str(refusal(module, passes, images()))
