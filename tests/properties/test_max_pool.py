"""A tournament of neurons is the maximum: over windows, padding, codes, branches, fused and unfused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spir import driver, interpreter, pipeline
from spir.conformance.strategies import bounded
from spir.driver import Context
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops.add import Add
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.max_pool import MaxPool
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.types import Int, Real, Scale, Spikes, Tensor
from spir.verify import verify

BACKENDS = ("serial", "parallel", "hw{collapse=off}", "hw{collapse=auto}")
ONE, ZERO = Array.of([1]), Array.of([0])


@pytest.fixture(autouse=True, scope="module")
def _reproducers_go_aside(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("reproducers")))
        yield


def built(source: Tensor, *lines: tuple[str, Op, str]) -> Module:
    """A module of lines ``(result, op, "operand operand")`` on the input ``x``."""
    types, nodes = {"x": source}, []
    for result, op, operands in lines:
        read = tuple(operands.split())
        types[result] = infer(op, tuple(types[name] for name in read))
        nodes.append(Node(result, op, read, types[result], Origin(f"net.{result}")))
    return verify(Module(Value("x", source), tuple(nodes), lines[-1][0]))


def run(module: Module, passes: str) -> Module:
    """The module after passes, whose contracts are the claims below."""
    return pipeline.run(module, pipeline.parse(passes), Context(None, 0), checked=False).module


def maximum(x: NDArray[Any], op: MaxPool) -> NDArray[Any]:
    """The definition, window by window, over the elements that lie inside the image; ``[N, C, H, W]``."""
    (top, bottom, left, right), (rows, columns) = op.padding, x.shape[2:]
    height = (rows + top + bottom - op.dilation[0] * (op.kernel[0] - 1) - 1) // op.stride[0] + 1
    width = (columns + left + right - op.dilation[1] * (op.kernel[1] - 1) - 1) // op.stride[1] + 1
    found = np.empty((*x.shape[:2], height, width), dtype=x.dtype)
    for i, j in np.ndindex(height, width):
        inside = [
            x[:, :, r, c]
            for u, v in np.ndindex(*op.kernel)
            if 0 <= (r := i * op.stride[0] - top + u * op.dilation[0]) < rows
            and 0 <= (c := j * op.stride[1] - left + v * op.dilation[1]) < columns
        ]
        found[:, :, i, j] = np.max(inside, axis=0)
    return found


@st.composite
def pools(draw: st.DrawFn, *, dilated: bool = False) -> MaxPool:
    """Windows that overlap, leave gaps, leave a remainder, and lie over uneven padding on four sides."""
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    ends = [draw(st.integers(0, k - 1)) for k in (kernel[0], kernel[0], kernel[1], kernel[1])]
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2))) if dilated else (1, 1)
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return MaxPool(kernel, stride, (ends[0], ends[1], ends[2], ends[3]), dilation)


@st.composite
def images(draw: st.DrawFn) -> tuple[int, int, int]:
    """The shape of an image, rarely a multiple of a window."""
    return draw(st.integers(1, 2)), draw(st.integers(3, 6)), draw(st.integers(3, 6))


def limits(bits: int, *, signed: bool) -> tuple[int, int]:
    return Spikes.limits(bits, "bits", signed=signed)


def codes(shape: tuple[int, ...], lo: int, hi: int, seed: int) -> NDArray[np.int64]:
    """All at an end, ends and neighbours of ends mixed, 0, and random codes."""
    rng = np.random.default_rng(seed)
    corners = rng.choice([lo, min(lo + 1, hi), 0, max(hi - 1, lo), hi], (3, *shape))
    flat = np.stack([np.full(shape, lo), np.full(shape, hi), np.zeros(shape, dtype=np.int64)])
    return np.concatenate([flat, corners, rng.integers(lo, hi, (4, *shape), endpoint=True)])


def assert_same_everywhere(module: Module, x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """All backends and the interpreter, every value; returns the interpreter's."""
    wanted = interpreter.run(module, x, "*")
    for name in BACKENDS:
        found = driver.backend_of(name).prepare(module).run(x, "*")
        for value, stored in wanted.items():
            assert np.array_equal(found[value], stored), f"{name}: %{value}"
    return wanted


def assert_tournament(module: Module, x: NDArray[Any], wanted: NDArray[Any], option: str, output: str = "p") -> None:
    """The lowered network, unfused and fused, has the wanted integers and no max_pool."""
    lowered = run(module, f"lower-max-pool{option}")
    assert not [n for n in lowered.nodes if isinstance(n.op, MaxPool)]
    assert np.array_equal(interpreter.run(lowered, x, output)[output], wanted)
    unfused = run(lowered, "derive-thresholds")
    fused = run(unfused, "fuse-neuron")
    assert np.array_equal(unfused.types[output].integers(interpreter.run(unfused, x, output)[output]), wanted)
    assert np.array_equal(fused.types[output].integers(assert_same_everywhere(fused, x)[output]), wanted)


OPTIONS = st.sampled_from(["{materialise=on}", "{materialise=off}"])
SEEDS = st.integers(0, 2**32 - 1)
# a window in the corner that sees one element, with another 3 away
CORNER = MaxPool((4, 4), (3, 3), (3, 0, 3, 0))


@bounded(20)
@given(pools(), images(), st.integers(2, 8), st.booleans(), OPTIONS, SEEDS)
@example(CORNER, (1, 4, 4), 8, True, "{materialise=off}", 0)
@example(MaxPool((1, 1), (1, 1)), (1, 4, 4), 2, True, "{materialise=off}", 0)
@example(MaxPool((1, 1), (2, 3)), (1, 4, 4), 2, False, "{materialise=off}", 0)
@example(MaxPool((3, 3), (2, 2), (1, 1, 1, 1)), (2, 7, 7), 8, False, "{materialise=on}", 0)
def test_a_tournament_is_the_maximum_bit_for_bit_on_every_backend(pool, shape, bits, signed, option, seed):
    lo, hi = limits(bits, signed=signed)
    source = Tensor(shape, Int(lo, hi, Scale.of(0.5)))
    module = built(source, ("q", Requant(ONE, ZERO, 1, lo, hi, 0.25), "x"), ("p", pool, "q"))
    x = codes(shape, lo, hi, seed)
    event("padded" if any(pool.padding) else "not padded")
    event("overlapping" if any(k > s for k, s in zip(pool.kernel, pool.stride, strict=True)) else "apart")
    assert_tournament(module, x, maximum(x, pool), option)


@bounded(8)
@given(pools(dilated=True), images(), st.booleans(), OPTIONS, SEEDS)
def test_dilated_windows_are_the_maximum_or_refused_where_a_pad_would_need_a_negative_code(
    pool, shape, signed, option, seed
):
    lo, hi = limits(4, signed=signed)
    source = Tensor(shape, Int(lo, hi, Scale.of(0.5)))
    try:
        module = built(source, ("q", Requant(ONE, ZERO, 1, lo, hi, 0.25), "x"), ("p", pool, "q"))
    except SpirError as refused:  # no such window fits, or one sees no element
        event(f"refused: {refused.code}")
        return
    x = codes(shape, lo, hi, seed)
    if signed and any(pool.padding) and pool.dilation != (1, 1):
        with pytest.raises(SpirError, match="pads signed codes between dilated taps"):
            run(module, f"lower-max-pool{option}")
        return
    assert_tournament(module, x, maximum(x, pool), option)


@bounded(5)
@given(pools(), images(), st.lists(st.sampled_from([0.5, 0.25, 0.3]), min_size=2, max_size=3), OPTIONS, SEEDS)
def test_branches_of_a_concatenation_that_differ_in_scale_are_pooled_each_in_its_own(pool, shape, scales, option, seed):
    source = Tensor(shape, Int(0, 15, Scale.of(0.5)))
    lines: list[tuple[str, Op, str]] = [
        (f"q{i}", Requant(Array.of([1 + i]), ZERO, 1, 0, 15, scale), "x") for i, scale in enumerate(scales)
    ]
    names = " ".join(name for name, _, _ in lines)
    module = built(source, *lines, ("c", Concat(), names), ("p", pool, "c"))
    x = codes(shape, 0, 15, seed)
    wanted = maximum(np.concatenate([np.minimum(x * (1 + i), 15) for i in range(len(scales))], axis=1), pool)
    assert_tournament(module, x, wanted, option)


@bounded(8)
@given(pools(), images(), st.integers(2, 8), st.booleans(), OPTIONS, SEEDS)
def test_a_pool_of_sums_goes_behind_the_law_of_the_activation(pool, shape, bits, signed, option, seed):
    """requant(max_pool(z)) = max_pool(requant(z)) for multipliers of 0 or more, per channel, with every tie."""
    lo, hi = limits(bits, signed=signed)
    rng = np.random.default_rng(seed)
    mul, add = rng.integers(0, 4, shape[0]), rng.integers(-9, 9, shape[0])
    source = Tensor(shape, Int(-60, 60, Scale.of(0.5)))
    law = Requant(Array.of(mul), Array.of(add), 4, lo, hi, 0.25)
    module = built(source, ("k", Scaling(Array.of([2])), "x"), ("m", pool, "k"), ("p", law, "m"))
    x = codes(shape, -60, 60, seed)
    each = np.clip(np.floor_divide(mul.reshape(-1, 1, 1) * 2 * x + add.reshape(-1, 1, 1), 4), lo, hi)
    assert np.array_equal(maximum(each, pool), interpreter.run(module, x, "p")["p"])
    if run(module, f"lower-max-pool{option}") != module:
        assert_tournament(module, x, maximum(each, pool), option)


@bounded(6)
@given(pools().filter(lambda pool: pool.kernel != (1, 1)), st.sampled_from(["keep", "lower"]), st.integers(2, 8), SEEDS)
def test_a_pool_between_a_convolution_and_its_relu_is_that_of_the_integer_network(pool, kept, bits, seed):
    rng = np.random.default_rng(seed)
    weight = lambda *shape: Array.of(rng.standard_normal(shape))  # noqa: E731 - drawn from one generator
    module = built(
        Tensor((2, 6, 5), Real()),
        ("a", Conv2d(weight(3, 2, 3, 3), None, weight(3), padding=(1,) * 4), "x"),
        ("m", pool, "a"),
        ("r", Relu(), "m"),
        ("s", Conv2d(weight(2, 3, 1, 1), None, weight(2)), "r"),
    )
    data = rng.standard_normal((5, 2, 6, 5))
    outcome = driver.opt(module, f"@stem{{bits={bits}, max_pool={kept}}}", data=data)
    stages = {stage.name: stage.module for stage in outcome.stages}
    iann, spiking = stages["propagate-scales"], outcome.module
    reference, stored = interpreter.run(iann, data, "*"), assert_same_everywhere(spiking, data)
    # the pool itself: of the integer network's sums, by the definition
    operand, result = next((n.operands[0], n.result) for n in iann.nodes if isinstance(n.op, MaxPool))
    assert np.array_equal(maximum(reference[operand], pool), reference[result])
    for name in ("r", "s"):
        wanted = iann.types[name].integers(reference[name])
        assert np.array_equal(spiking.types[name].integers(stored[name]), wanted), name
    assert bool([n for n in spiking.nodes if isinstance(n.op, MaxPool)]) == (kept == "keep")


@pytest.mark.parametrize("bits", range(1, 7))
@pytest.mark.parametrize("signed", [False, True])
def test_the_identity_b_plus_relu_of_a_minus_b_never_saturates(bits, signed):
    """Every pair of codes: the relu stays below its neuron's last code, the sum between a and b."""
    lo, hi = limits(bits, signed=signed)
    pairs = np.array([*itertools.product(range(lo, hi + 1), repeat=2)], dtype=np.int64).reshape(-1, 1, 1, 2)
    source = Tensor((1, 1, 2), Int(lo, hi, Scale.of(0.5)))
    module = built(source, ("q", Requant(ONE, ZERO, 1, lo, hi, 0.25), "x"), ("p", MaxPool((1, 2), (1, 1)), "q"))
    lowered = run(module, "lower-max-pool{materialise=off}")
    stored = interpreter.run(lowered, pairs, "*")
    a, b = pairs[..., :1], pairs[..., 1:]
    (over,) = [n for n in lowered.nodes if isinstance(n.op, Requant) and n.result != "q"]
    assert isinstance(over.op, Requant)
    assert np.array_equal(stored[over.result], np.maximum(a - b, 0))
    assert over.op.hi == 2**bits - 1 == stored[over.result].max()
    assert np.array_equal(stored["p"], np.maximum(a, b))
    spiking = run(lowered, "derive-thresholds, fuse-neuron")
    found = assert_same_everywhere(spiking, pairs)["p"]
    assert np.array_equal(spiking.types["p"].integers(found), np.maximum(a, b))


def test_the_sum_of_trains_that_a_tournament_leaves_is_read_by_weights():
    rng = np.random.default_rng(0)
    module = built(
        Tensor((2, 5, 5), Real()),
        ("k", Quantize(0.1, -8, 7), "x"),
        ("p", MaxPool((3, 2), (2, 2), (1, 1, 0, 1)), "k"),
        ("z", Conv2d(Array.of(rng.integers(-7, 8, (3, 2, 2, 2))), Array.of([0.5])), "p"),
        ("r", Requant(Array.of([1]), Array.of([4]), 8, 0, 15, 0.5), "z"),
        ("s", Add(), "r r"),
    )
    x = rng.standard_normal((20, 2, 5, 5))
    wanted = interpreter.run(module, x, "*")
    for option in ("{materialise=on}", "{materialise=off}"):
        spiking = run(module, f"lower-max-pool{option}, derive-thresholds, fuse-neuron")
        stored = assert_same_everywhere(spiking, x)
        for name in ("p", "z", "r", "s"):
            assert np.array_equal(spiking.types[name].integers(stored[name]), wanted[name]), (option, name)


def test_the_note_counts_the_neurons_of_the_tournament():
    source = Tensor((2, 4, 4), Int(0, 15, Scale.of(0.5)))
    law = Requant(ONE, ZERO, 1, 0, 15, 0.25)
    module = built(source, ("q", law, "x"), ("p", MaxPool((2, 2), (2, 2)), "q"))
    for option, neurons in (("on", 2 * 8 + 8 + 8), ("off", 2 * 8 + 8)):  # of rows, of columns, the identity
        context = Context(None, 0)
        after = pipeline.run(module, pipeline.parse(f"lower-max-pool{{materialise={option}}}"), context)
        counted = [n for n in after.module.nodes if isinstance(n.op, Requant) and n.result != "q"]
        assert sum(n.type.size for n in counted) == neurons
        assert f"%p: {neurons} neurons ({neurons / 8:.3g} an output)" in str(after.journal[-1])


def test_a_lowered_network_is_lowered_once():
    source = Tensor((2, 4, 4), Int(0, 15, Scale.of(0.5)))
    module = built(source, ("q", Requant(ONE, ZERO, 1, 0, 15, 0.25), "x"), ("p", MaxPool((2, 2), (2, 2)), "q"))
    once = run(module, "lower-max-pool")
    assert run(once, "lower-max-pool") == once


def test_a_float_network_is_refused_and_one_without_pools_stays():
    real = built(Tensor((2, 4, 4), Real()), ("p", MaxPool((2, 2), (2, 2)), "x"))
    with pytest.raises(SpirError, match=r"E-MAXPOOL.*: %p works on reals"):
        run(real, "lower-max-pool")
