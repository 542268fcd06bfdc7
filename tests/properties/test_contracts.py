"""What each pass promises, measured on random networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from spir import interpreter, pipeline
from spir.conformance.strategies import Network, bounded, networks
from spir.driver import Context
from spir.errors import SpirError
from spir.ir import Module, Node
from spir.ops._linear import LinearMap
from spir.ops._threshold import divisors
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.linear import Linear
from spir.ops.pad import Pad
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.types import Reals, scale_of

pytestmark = pytest.mark.filterwarnings("ignore:.*the calibration data may not be what the model was trained on")

REFUSALS = ("E-RESID-SCALE", "E-MULT-RANGE", "E-VRANGE", "E-SCALE")
BITS = st.integers(2, 8) | st.sampled_from([12, 16])
JOINS = st.sampled_from(["wide", "rescale"])
SOME = 60  # elements of a value that are checked as fractions


@pytest.fixture(autouse=True, scope="module")
def _reproducers_go_aside(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("reproducers")))
        yield


def run(module: Module, passes: str, network: Network) -> Module:
    """The module after passes, whose contracts are left to the test."""
    return pipeline.run(module, pipeline.parse(passes), Context(network.data, 0), checked=False).module


def run_or_none(module: Module, passes: str, network: Network) -> Module | None:
    """The same, or None for a network that no integers of 64 bits hold."""
    try:
        return run(module, passes, network)
    except SpirError as refusal:
        if refusal.code not in REFUSALS:
            raise
        event(f"refused: {refusal.code}")
        return None


def decoded(module: Module, x: Reals) -> dict[str, Reals]:
    return interpreter.decoded(module, interpreter.run(module, x, "*"))


def kept(before: Module, after: Module) -> list[str]:
    """Names on both sides; they are most of what is left."""
    return [name for name in before.types if name in after.types]


def assert_exact(before: Module, after: Module, x: Reals) -> None:
    wanted, found = decoded(before, x), decoded(after, x)
    for name in kept(before, after):
        assert np.array_equal(wanted[name], found[name]), name
    assert np.array_equal(wanted[before.output], found[after.output])


def assert_close(before: Module, after: Module, x: Reals) -> None:
    """Float rounding only."""
    wanted, found = decoded(before, x), decoded(after, x)
    for name in kept(before, after):
        assert np.abs(wanted[name] - found[name]).max() <= 1e-10 * np.abs(wanted[name]).max(), name


@bounded(60)
@given(networks())
def test_canonicalize_changes_no_bit_and_needs_one_run(network):
    after = run(network.module, "canonicalize", network)
    event("shorter" if len(after.nodes) < len(network.module.nodes) else "as long")
    assert_exact(network.module, after, network.inputs())
    assert run(after, "canonicalize", network) == after
    for node in after.nodes:
        source = after.definitions.get(node.operands[0])
        assert not (source and isinstance(node.op, Relu) and isinstance(source.op, Relu))
        assert not (
            source and isinstance(node.op, Conv2d) and isinstance(source.op, Pad) and not any(source.op.pads[:2])
        )


@bounded(15)
@given(networks(), JOINS)
def test_canonicalize_changes_no_bit_of_integers_and_spikes(network, join):
    integer = f"fold-bn, calibrate-range, quantize{{bits=5}}, propagate-scales{{join={join}}}"
    module = run_or_none(network.module, integer, network)
    for passes in ("", "derive-thresholds", "derive-thresholds, fuse-neuron") if module else ():
        before = run(module, passes, network)
        assert_exact(before, run(before, "canonicalize", network), network.inputs())


@bounded(60)
@given(networks())
def test_fold_bn_rounds_and_needs_one_run(network):
    module = run(network.module, "canonicalize", network)
    after = run(module, "fold-bn", network)
    event(f"{sum(isinstance(n.op, BatchNorm) for n in module.nodes)} batch norms")
    x = network.inputs()
    assert_close(module, after, x)
    assert after.output == module.output
    assert not [n for n in after.nodes if isinstance(n.op, BatchNorm)]
    assert run(after, "fold-bn", network) == after


@bounded(40)
@given(networks())
def test_ranges_of_max_change_nothing_on_the_calibration_data(network):
    module = run(network.module, "canonicalize, fold-bn", network)
    after = run(module, "calibrate-range", network)
    assert_close(module, after, network.data)  # ranges are measured by another backend, in another order of sums
    clips = [n for n in after.nodes if isinstance(n.op, Clip)]
    relus = {n.result for n in module.nodes if isinstance(n.op, Relu)}
    assert relus <= {n.result for n in clips}
    assert all(n.result == f"{n.operands[0]}.clip" for n in clips if n.result not in relus)
    assert all(n.op.lo.values <= 0 <= n.op.hi.values for n in clips)


@bounded(40)
@given(networks(), st.sampled_from([75.0, 90.0, 99.0, 99.9]))
def test_ranges_of_a_percentile_leave_no_more_than_its_share_outside(network, percentile):
    module = run(network.module, "canonicalize, fold-bn", network)
    after = run(module, f"calibrate-range{{method=percentile, percentile={percentile}}}", network)
    before = decoded(module, network.data)
    share = (100 - Fraction(str(percentile))) / 100
    for node in after.nodes:
        if isinstance(node.op, Clip):
            values = before[node.result if node.result in before else node.operands[0]]
            slack = 1e-10 * np.abs(values).max()
            above = (values > node.op.hi.values + slack).sum()
            below = (values < node.op.lo.values - slack).sum()
            assert max(above, below) <= share * values.size


@bounded(60)
@given(networks(), BITS, st.none() | st.integers(2, 8))
def test_quantize_moves_a_weight_by_half_a_step_at_most(network, bits, weights):
    before = run(network.module, "canonicalize, fold-bn, calibrate-range", network)
    option = "" if weights is None else f", weights={weights}"
    after = run(before, f"quantize{{bits={bits}{option}}}", network)
    top = 2 ** ((weights or bits) - 1) - 1
    for node in after.nodes:
        if not isinstance(node.op, (Conv2d, Linear)):
            continue
        wanted, codes = before.definitions[node.result].op.weight.values, node.op.weight.values
        scale = node.op.weight_scale.values.reshape((-1,) + (1,) * (codes.ndim - 1))
        assert np.abs(codes).max() <= top
        assert (np.float32(scale) == scale).all()
        assert (np.abs(wanted - codes * scale) <= scale * (0.5 + top * 2.0**-24)).all()
        live = np.abs(wanted).max() > 0
        assert (np.abs(codes).max() == top) == live
        event("one scale a channel" if scale.size > 1 else "one scale")


@bounded(40)
@given(networks(), BITS)
def test_quantize_moves_an_activation_by_half_a_step_inside_its_range(network, bits):
    before = run(network.module, "canonicalize, fold-bn, calibrate-range", network)
    after = run(before, f"quantize{{bits={bits}}}", network)
    found = decoded(after, network.inputs(after))
    for node in after.nodes:
        if not isinstance(node.op, Quantize):
            continue
        (reader,) = after.readers[node.result]
        clip = before.definitions[reader.result].op
        assert (node.op.lo, node.op.hi) == (
            (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            if clip.lo.values < 0 or node.operands[0] == "x"
            else (0, 2**bits - 1)
        )
        x, y, step = found[node.operands[0]], found[reader.result], node.op.scale
        inside = (x >= clip.lo.values) & (x <= clip.hi.values)
        assert (np.abs(x - y)[inside] <= step * (0.5 + 2.0 ** (bits - 23))).all()
        assert (y >= node.op.lo * step).all()
        assert (y <= node.op.hi * step).all()


@bounded(40)
@given(networks(), BITS, JOINS)
def test_derive_thresholds_and_fuse_neuron_change_no_bit(network, bits, join):
    integer = f"canonicalize, fold-bn, calibrate-range, quantize{{bits={bits}}}, propagate-scales{{join={join}}}"
    iann = run_or_none(network.module, integer, network)
    if iann is None:
        return
    unfused = run(iann, "derive-thresholds", network)
    fused = run(unfused, "fuse-neuron", network)
    x = network.inputs(iann)
    assert_exact(iann, unfused, x)
    assert_exact(unfused, fused, x)
    assert set(kept(iann, unfused)) == set(iann.types)
    assert set(kept(iann, fused)) == set(iann.types)
    assert not [n for n in fused.nodes if isinstance(n.op, Requant)]


def biases(module: Module) -> dict[str, Reals]:
    """What every value of a network of reals is when all its activations are 0: the bias that its integers lack."""
    stored: dict[str, Any] = {}
    for node in module.nodes:
        if isinstance(node.op, Dequantize):
            stored[node.result] = np.zeros((1, *node.type.shape))
        elif isinstance(node.op, LinearMap):
            stored[node.result] = node.op.reference(module.operand_types(node), *(stored[o] for o in node.operands))
    return {name: values[0] for name, values in stored.items()}


def requants(quantised: Module, integer: Module) -> Iterator[tuple[Node, Node]]:
    """Each requant of the integer network, and the quantiser that it came from."""
    for node in quantised.nodes:
        if isinstance(node.op, Dequantize):
            source = quantised.definitions[node.operands[0]]
            found = integer.definitions[node.result]
            if isinstance(found.op, Requant):
                yield found, source


def channel_of(values: Any, where: tuple[int, ...]) -> Any:
    """A constant ``[1]``, ``[C]`` or of full shape at one element."""
    return values[where] if np.ndim(values) > 1 else values[where[0] if len(values) > 1 else 0]


@bounded(40)
@given(networks(), BITS, st.sampled_from([12, 24, 31]), st.integers(0, 2**32 - 1))
def test_propagate_scales_is_the_exact_law_but_for_rounded_integers(network, bits, width, seed):
    """Before flooring, y is off by at most |z| 2^-(s+1) for the multiplier and 2^-(s+1) for bias and half together."""
    quantised = run(network.module, f"canonicalize, fold-bn, calibrate-range, quantize{{bits={bits}}}", network)
    integer = run_or_none(quantised, f"propagate-scales{{bits={width}}}", network)
    if integer is None:
        return
    lacked = biases(quantised)
    stored = interpreter.run(integer, network.inputs(quantised), "*")
    rng = np.random.default_rng(seed)
    for node, source in requants(quantised, integer):
        op, (operand,) = node.op, node.operands
        grids = divisors(op.div).tolist()
        assert all(grid.bit_count() == 1 for grid in grids)
        assert (op.lo, op.hi, op.scale) == (source.op.lo, source.op.hi, source.op.scale)
        ratios = [s / Fraction(op.scale) for s in scale_of(integer.types[operand]).known]
        each = grids * (len(ratios) // len(grids))
        for mul, ratio, grid in zip(op.mul.values.tolist(), ratios, each, strict=True):
            assert abs(Fraction(mul, grid) - ratio) <= Fraction(1, 2 * grid)
        bias = lacked[source.operands[0]]
        for _ in range(SOME):
            where = tuple(int(rng.integers(d)) for d in stored[operand].shape)
            z, code = int(stored[operand][where]), int(stored[node.result][where])
            b = Fraction(float(bias[where[1:]])) / Fraction(op.scale)
            y = channel_of(ratios, where[1:]) * z + b + Fraction(1, 2)
            exact = min(max(math.floor(y), op.lo), op.hi)
            slack = (
                Fraction(abs(z) + 1, 2 * channel_of(each, where[1:])) + abs(b) / 2**50
            )  # and the float64 that b came in
            assert op.lo <= code <= op.hi
            assert abs(code - exact) <= 1 + math.floor(slack)
            if code != exact:
                event("a tie within the bound")
                assert min(y - math.floor(y), math.ceil(y) - y) <= slack


@bounded(30)
@given(networks(), BITS, JOINS)
def test_codes_of_the_first_layer_are_those_of_the_quantised_network_or_next_to_them(network, bits, join):
    quantised = run(network.module, f"canonicalize, fold-bn, calibrate-range, quantize{{bits={bits}}}", network)
    integer = run_or_none(quantised, f"propagate-scales{{join={join}}}", network)
    if integer is None:
        return
    wanted, found = decoded(quantised, network.data), decoded(integer, network.data)
    first = [(node, source) for node, source in requants(quantised, integer) if reads_the_input(quantised, source)]
    for node, source in first:
        reach = integer.types[node.operands[0]].range.magnitude
        codes = 1.001 + (reach + 1) / (
            2 * int(divisors(node.op.div).min())
        )  # products near 64 bits leave the multiplier few bits
        event("multiplier: " + ("fine" if codes < 2 else "coarse"))
        assert (np.abs(wanted[node.result] - found[node.result]) <= source.op.scale * codes).all(), node.result
    event(f"{min(len(first), 2)} or more such layers")


def reads_the_input(module: Module, source: Node) -> bool:
    """Whether only linear ops without joins stand between a quantiser and the codes of the input."""
    node = module.definitions[source.operands[0]]
    while isinstance(node.op, LinearMap) and len(node.operands) == 1:
        node = module.definitions[node.operands[0]]
    if not isinstance(node.op, Dequantize):
        return False
    return module.definitions[node.operands[0]].operands == (module.input.name,)
