"""Every op: its reference against an independent formula, its frames against its values, its synapses, its refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spir.discovery import find, names
from spir.errors import SpirError
from spir.ir import Array, Op, infer
from spir.ops._linear import LinearMap
from spir.ops._threshold import divisors
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_stem import NeuronStem
from spir.ops.pad import Pad
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.types import Current, Encoding, Int, Real, Scale, Spikes, Tensor

OPS: dict[str, type[Op]] = {name: find("ops", name) for name in names("ops")}
Case = tuple[Op, tuple[Tensor, ...]]
CASES: list[Any] = [
    pytest.param(op, types, id=f"{name}-{index}")
    for name, owner in OPS.items()
    for index, (op, types) in enumerate(owner.corners())
]
LINEAR = [case for case in CASES if isinstance(case.values[0], LinearMap)]
ON_INTEGERS = [case for case in LINEAR if not isinstance(case.values[1][0].encoding, Real)]
SAMPLES = 3
HALF = Scale.of(0.5)


# stored numbers of a type: both ends, then random ones


def codes(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Integers ``[N, *shape]`` inside the range of a type: all at one end, all at the other, then random."""
    lo, hi = tensor.range.hull
    found = rng.integers(lo, hi, (SAMPLES, *tensor.shape), endpoint=True)
    found[0], found[1] = lo, hi
    return found


def bits_of(value: int, steps: int, *, signed: bool) -> list[int]:
    """Two's complement by Python's own formatting; the sign bit counts negative."""
    digits = [int(digit) for digit in f"{value % 2**steps:0{steps}b}"]
    return [-digits[0], *digits[1:]] if signed else digits


def frames(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Trains ``[T, N, *shape]`` of a type whose values lie in its range."""
    train = tensor.train
    assert train is not None
    if isinstance(train, Spikes) and train.code == "bits":
        values = codes(tensor, rng)
        trains = [bits_of(int(v), train.steps, signed=train.lo < 0) for v in values.ravel()]
    elif isinstance(train, Spikes):
        values = codes(tensor, rng)
        trains = [[int(np.sign(v))] * abs(v) + [0] * (train.steps - abs(v)) for v in values.ravel().tolist()]
        for one in trains if train.code == "rate" else ():
            rng.shuffle(one)
    else:
        low, high = train.frame
        weight = [2 ** (train.steps - 1 - t) if train.code == "bits" else 1 for t in range(train.steps)]
        trains = []
        for _ in range(SAMPLES * tensor.size):
            drawn = [0] * train.steps
            for t in rng.permutation(train.steps).tolist():
                drawn[t] = int(rng.integers(low, high, endpoint=True))
                if not train.lo <= sum(w * f for w, f in zip(weight, drawn, strict=True)) <= train.hi:
                    drawn[t] = 0
            if train.code == "direct":
                drawn = [drawn[0] // train.steps] * train.steps
            trains.append(drawn)
    return (
        np.array(trains, dtype=np.int64)
        .reshape(SAMPLES, *tensor.shape, train.steps)
        .transpose(-1, *range(len(tensor.shape) + 1))
    )


def stored_of(tensor: Tensor, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if isinstance(tensor.encoding, Real):
        return 3 * rng.standard_normal((SAMPLES, *tensor.shape))
    return codes(tensor, rng) if tensor.train is None else frames(tensor, rng)


def results(op: Op, types: tuple[Tensor, ...]) -> tuple[Tensor, list[np.ndarray], np.ndarray]:
    """The result type, what the operands decode to (reals or integers), and what the reference makes of them."""
    stored = [stored_of(t, seed) for seed, t in enumerate(types)]
    given = [x if isinstance(t.encoding, Real) else t.integers(x) for t, x in zip(types, stored, strict=True)]
    return infer(op, types), given, op.reference(types, *stored)


# independent formulas, on reals or on decoded integers


def tensor_of(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x, dtype=np.float64))


def channel(constant: np.ndarray, where: tuple[int, ...]) -> Any:
    """The entry of a constant ``[1]``, ``[C]`` or of full shape that holds at one element of a sample."""
    if constant.ndim > 1:
        return constant[where].item()
    return constant[0 if len(constant) == 1 else where[0]].item()


def elementwise(rule: Callable[[int, tuple[int, ...]], Any], x: np.ndarray) -> np.ndarray:
    out = np.empty(x.shape, dtype=object)
    for where in np.ndindex(*x.shape):
        out[where] = rule(x[where].item(), where[1:])
    return out


def real_weights(op: Any) -> torch.Tensor:
    weight = tensor_of(op.weight.values)
    if op.weight_scale is None:
        return weight
    return weight * tensor_of(op.weight_scale.values).reshape(-1, *[1] * (weight.ndim - 1))


def conv2d(op: Any, x: np.ndarray, *, real: bool) -> Any:
    top, bottom, left, right = op.padding
    if real:
        bias = None if op.bias is None else tensor_of(op.bias.values)
        padded = F.pad(tensor_of(x), (left, right, top, bottom))
        return F.conv2d(padded, real_weights(op), bias, op.stride, 0, op.dilation, op.groups)
    weight = op.weight.values.tolist()
    outputs, inputs, kh, kw = op.weight.values.shape
    samples, _, height, width = x.shape
    rows = range(-top, height + bottom - op.dilation[0] * (kh - 1), op.stride[0])
    columns = range(-left, width + right - op.dilation[1] * (kw - 1), op.stride[1])
    out = np.zeros((samples, outputs, len(rows), len(columns)), dtype=object)
    for n, o, (p, row), (q, column) in itertools.product(
        range(samples), range(outputs), enumerate(rows), enumerate(columns)
    ):
        first = o // (outputs // op.groups) * inputs
        for i, u, v in itertools.product(range(inputs), range(kh), range(kw)):
            r, c = row + u * op.dilation[0], column + v * op.dilation[1]
            if 0 <= r < height and 0 <= c < width:
                out[n, o, p, q] += weight[o][i][u][v] * x[n, first + i, r, c].item()
    return out


def linear(op: Any, x: np.ndarray, *, real: bool) -> Any:
    if real:
        return F.linear(tensor_of(x), real_weights(op), None if op.bias is None else tensor_of(op.bias.values))
    weight = op.weight.values.tolist()
    return [[sum(w * v for w, v in zip(row, sample, strict=True)) for row in weight] for sample in x.tolist()]


def avg_pool(op: Any, x: np.ndarray, *, real: bool) -> Any:
    top, bottom, left, right = op.padding
    padded = F.pad(tensor_of(x), (left, right, top, bottom))
    return F.avg_pool2d(padded, op.kernel, op.stride, divisor_override=None if real else 1)


def global_avg_pool(op: Any, x: np.ndarray, *, real: bool) -> Any:
    if real:
        return F.adaptive_avg_pool2d(tensor_of(x), 1).reshape(*x.shape[:2], *([1, 1] if op.keepdim else []))
    sums = [[sum(itertools.chain(*plane)) for plane in sample] for sample in x.tolist()]
    return np.array(sums, dtype=object).reshape(*x.shape[:2], *([1, 1] if op.keepdim else []))


def add(op: Any, *x: np.ndarray, real: bool) -> Any:
    return sum(map(tensor_of, x)) if real else sum(v.astype(object) for v in x)


def pad(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return F.pad(
        tensor_of(x), [p for pair in reversed(list(zip(op.pads[::2], op.pads[1::2], strict=True))) for p in pair]
    )


def slice_(op: Any, x: np.ndarray, *, real: bool) -> Any:
    found = tensor_of(x)
    for dim, ends in enumerate(zip(op.start, op.stop, op.step, strict=True), start=1):
        found = found.index_select(dim, torch.tensor(list(range(*ends))))
    return found


def flatten(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return torch.flatten(tensor_of(x), 1)


def scale(op: Any, x: np.ndarray, *, real: bool) -> Any:
    factor = op.factor.values
    if real:
        return elementwise(lambda v, at: v * channel(factor, at), x).astype(float)
    if op.factor.integral:
        return elementwise(lambda v, at: v * channel(factor, at), x)
    return elementwise(lambda v, at: v * int(np.sign(channel(factor, at))), x)


def triple(op: Any, lo: int, hi: int) -> Callable[[int, tuple[int, ...]], int]:
    def rule(z: int, at: tuple[int, ...]) -> int:
        exact = Fraction(channel(op.mul.values, at) * z + channel(op.add.values, at), channel(divisors(op.div), at))
        return min(max(math.floor(exact), lo), hi)

    return rule


def requant(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return elementwise(triple(op, op.lo, op.hi), x)


def neuron_stem(op: Any, x: np.ndarray, *, real: bool) -> Any:
    low = -(2 ** (op.bits - 1)) if op.signed else 0
    return elementwise(triple(op, low, low + 2**op.bits - 1), x)


def integrate(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return x if op.bias is None else elementwise(lambda v, at: v + channel(op.bias.values, at), x)


def encode(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return x


def relu(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return F.relu(tensor_of(x))


def batch_norm(op: Any, x: np.ndarray, *, real: bool) -> Any:
    mean, var = tensor_of(op.mean.values), tensor_of(op.var.values)
    weight, bias = (None if a is None else tensor_of(a.values) for a in (op.weight, op.bias))
    return F.batch_norm(tensor_of(x), mean, var, weight, bias, False, 0.0, op.eps)


def clip(op: Any, x: np.ndarray, *, real: bool) -> Any:
    ends = [tensor_of(a.values).reshape(-1, *[1] * (x.ndim - 2)) for a in (op.lo, op.hi)]
    return torch.minimum(torch.maximum(tensor_of(x), ends[0]), ends[1])


def quantize(op: Any, x: np.ndarray, *, real: bool) -> Any:
    step = Fraction(op.scale)
    return elementwise(lambda v, _: min(max(math.floor(Fraction(v) / step + Fraction(1, 2)), op.lo), op.hi), x)


def dequantize(op: Any, x: np.ndarray, *, real: bool) -> Any:
    raise AssertionError("the scale stands in the operand's type")


FORMULAS = {name: globals()["slice_" if name == "slice" else name] for name in OPS}


def test_every_op_has_corners_and_a_formula():
    assert not [name for name, owner in OPS.items() if not list(owner.corners())]


@pytest.mark.parametrize(("op", "types"), CASES)
def test_the_reference_equals_an_independent_formula(op, types):
    result, given, found = results(op, types)
    real = isinstance(types[0].encoding, Real)
    if op.name == "dequantize":
        shaped = types[0].encoding.scale.floats().reshape(-1, 1, 1)
        assert (found == given[0] * shaped).all()
        return
    expected = np.asarray(FORMULAS[op.name](op, *given, real=real))
    if isinstance(result.encoding, Real):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    else:
        assert found.dtype == np.int64
        assert (result.integers(found).astype(object) == expected).all()


@pytest.mark.parametrize(("op", "types"), CASES)
def test_the_result_is_of_the_inferred_type(op, types):
    result, _, found = results(op, types)
    lead = () if result.train is None else (result.steps,)
    assert found.shape == (*lead, SAMPLES, *result.shape)
    if isinstance(result.encoding, Real):
        return
    lo, hi = result.range.hull
    assert lo <= result.integers(found).min() <= result.integers(found).max() <= hi
    if result.train is not None:
        low, high = result.train.frame
        assert low <= found.min() <= found.max() <= high
    if isinstance(result.encoding, Spikes) and result.encoding.code == "bits":
        assert set(np.unique(found[1:])) <= {0, 1}
        assert set(np.unique(found[0])) <= ({-1, 0} if lo < 0 else {0, 1})


@pytest.mark.parametrize(("op", "types"), CASES)
def test_a_batch_is_its_samples_one_by_one(op, types):
    _, _, found = results(op, types)
    stored = [stored_of(t, seed) for seed, t in enumerate(types)]
    for n in range(SAMPLES):
        alone = op.reference(types, *(x[:, [n]] if t.train else x[[n]] for t, x in zip(types, stored, strict=True)))
        expected = found[:, [n]] if infer(op, types).train else found[[n]]
        if found.dtype == np.int64:
            assert (alone == expected).all()
        else:
            np.testing.assert_allclose(alone, expected, rtol=1e-13)


# linear ops do not know what they carry


def carriers(op: Op, types: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """The same shapes as trains of every code."""
    for encoding in (
        Spikes(6, "bits", 0, 63, HALF),
        Spikes(6, "bits", -32, 31, HALF),
        Spikes(1, "bits", -1, 0, HALF),
        Spikes(5, "rate", -5, 5, HALF),
        Spikes(5, "sorted", 0, 5, HALF),
        Current(4, "bits", -90, 80, -6, 6, HALF),
        Current(4, "rate", -20, 24, -5, 6, HALF),
        Current(4, "direct", -20, 24, -5, 6, HALF),
    ):
        yield tuple(Tensor(t.shape, encoding) for t in types)


@pytest.mark.parametrize(("op", "types"), ON_INTEGERS)
def test_a_linear_op_acts_on_frames_as_on_what_they_decode_to(op, types):
    for trains in (types, *carriers(op, types)):
        if trains[0].train is None:
            continue
        whole = tuple(Tensor(t.shape, Int(*t.range.hull, t.encoding.scale)) for t in trains)  # type: ignore[union-attr]
        stored = [frames(t, np.random.default_rng(seed)) for seed, t in enumerate(trains)]
        values = [t.integers(x) for t, x in zip(trains, stored, strict=True)]
        result, expected = infer(op, trains), infer(op, whole)
        assert (result.integers(op.reference(trains, *stored)) == op.reference(whole, *values)).all()
        assert result.encoding.scale == expected.encoding.scale  # type: ignore[union-attr]
        assert result.range.hull == expected.range.hull


# without `to`, which sets a scale that the factor meets only nearly
@pytest.mark.parametrize(("op", "types"), [c for c in ON_INTEGERS if getattr(c.values[0], "to", None) is None])
def test_decoding_after_a_linear_op_is_the_op_on_the_decoded_reals(op, types):
    stored = [stored_of(t, seed) for seed, t in enumerate(types)]
    reals = tuple(Tensor(t.shape, Real()) for t in types)
    expected = op.reference(reals, *(t.decode(x) for t, x in zip(types, stored, strict=True)))
    np.testing.assert_allclose(infer(op, types).decode(op.reference(types, *stored)), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(("first", "second"), [*itertools.product(["rate", "sorted", "direct"], repeat=2)])
def test_trains_of_codes_that_join_add_up_to_the_sum_of_their_values(first, second):
    made = {
        "rate": Spikes(4, "rate", -4, 4, HALF),
        "sorted": Spikes(4, "sorted", 0, 4, HALF),
        "direct": Current(4, "direct", -20, 24, -5, 6, HALF),
    }
    types = tuple(Tensor((3, 2), made[code]) for code in (first, second))
    result, given, found = results(Add(), types)
    assert (result.integers(found) == given[0] + given[1]).all()


def test_an_integer_sum_beyond_float64_is_exact():
    wide = Tensor((2,), Int(-(2**40), 2**40, HALF))
    op = Linear(Array.of([[2**20 + 1, 1], [2**21, -1]]), Array.of([1.0]))
    x = np.array([[2**40, 1], [2**40 - 1, -(2**40)]])
    assert op.partial_sums(wide) > 2**53
    assert (op.reference((wide,), x).astype(object) == np.array(linear(op, x, real=False), dtype=object)).all()


# synapses against a dense Jacobian


def ones(op: Any) -> Any:
    """The op with every weight 1, so that its matrix counts paths."""
    if isinstance(op, (Conv2d, Linear)):
        return attrs.evolve(op, weight=Array.of(np.ones(op.weight.values.shape, dtype=int)), bias=None)
    return attrs.evolve(op, factor=Array.of([1])) if isinstance(op, Scaling) else op


@pytest.mark.parametrize(("op", "types"), LINEAR)
def test_synapses_count_the_paths_of_the_dense_matrix(op, types):
    result = infer(op, types)
    paths = np.random.default_rng(0).integers(0, 50, result.shape)
    shapes = tuple(t.shape for t in types)
    found = op.synapses(paths, *shapes)
    assert len(found) == len(types)
    for index, shape in enumerate(shapes):
        size = math.prod(shape)
        basis = [np.zeros((size, *s), dtype=np.int64) for s in shapes]
        basis[index] = np.eye(size, dtype=np.int64).reshape(size, *shape)
        matrix = ones(op).apply(*basis, real=False).reshape(size, -1)
        assert found[index].shape == shape
        assert (found[index].ravel() == matrix @ paths.ravel()).all()


# requant and the neuron: every value, every tie, both clips


@pytest.mark.parametrize(
    ("mul", "offset", "div"), [(1, 0, 1), (1, 2, 4), (3, -5, 7), (-2, 7, 5), (5, 16, 32), (0, -1, 3)]
)
@pytest.mark.parametrize(("lo", "hi"), [(0, 7), (-8, 7), (3, 3), (-5, -2)])
def test_requant_is_the_clamped_floor_of_the_fraction(mul, offset, div, lo, hi):
    x = np.arange(-60, 61)[:, None]
    op = Requant(Array.of([mul]), Array.of([offset]), div, lo, hi, 1.0)
    types = (Tensor((1,), Int(-60, 60, HALF)),)
    infer(op, types)
    expected = [[min(max(math.floor(Fraction(mul * z + offset, div)), lo), hi)] for z in range(-60, 61)]
    assert op.reference(types, x).tolist() == expected


def test_half_rounds_up_on_both_sides_of_zero():
    op = Requant(Array.of([1]), Array.of([1]), 2, -9, 9, 1.0)
    x = np.array([[-3], [-1], [1], [3]])  # -1.5, -0.5, 0.5, 1.5
    assert op.reference((Tensor((1,), Int(-3, 3, HALF)),), x).tolist() == [[-1], [0], [1], [2]]


def test_quantize_rounds_half_up_and_clamps():
    op = Quantize(0.5, -2, 3)
    x = np.array([[-9.0], [-1.25], [-1.0], [-0.75], [-0.25], [0.0], [0.24], [0.25], [0.75], [1.74], [9.0]])
    found = op.reference((Tensor((1,), Real()),), x).ravel().tolist()
    assert found == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 3, 3]


def test_scaling_to_another_scale_multiplies_the_integers():
    op = Scaling(Array.of([3, 5]), Array.of([0.1, 0.25]))
    types = (Tensor((2,), Int(-4, 4, HALF)),)
    assert op.reference(types, np.array([[2, -4]])).tolist() == [[6, -20]]
    assert infer(op, types) == Tensor((2,), Int(-20, 20, Scale.of([0.1, 0.25])))


def test_the_divisor_of_a_pool_stands_in_the_scale():
    x = Tensor((1, 3, 3), Int(0, 255, Scale.of(0.1)))
    pooled = infer(AvgPool((3, 3), (3, 3)), (x,))
    assert pooled == Tensor((1, 1, 1), Int(0, 9 * 255, Scale.of(Fraction(0.1) / 9)))
    whole = infer(GlobalAvgPool(9), (x,))
    assert whole == Tensor((1,), Int(0, 9 * 255, Scale.of(Fraction(0.1) / 9)))


def test_a_depthwise_convolution_reads_a_scale_per_channel():
    x = Tensor((2, 1, 1), Int(0, 1, Scale.of([0.5, 0.25])))
    op = Conv2d(Array.of(np.ones((4, 1, 1, 1), dtype=int)), Array.of([1.0, 2.0, 4.0, 8.0]), groups=2)
    assert infer(op, (x,)).encoding.scale == Scale.of([0.5, 1.0, 1.0, 2.0])  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("lo", "hi", "steps"), [(0, 255, 8), (-128, 127, 8), (0, 1, 1), (-1, 0, 1), (-2, 1, 2), (0, 2**63 - 1, 63)]
)
def test_the_stem_neuron_takes_the_clip_ranges_of_its_bits(lo, hi, steps):
    source = Requant(Array.of([1]), Array.of([0]), 1, lo, hi, 0.5)
    assert NeuronStem.derive(source) == Encode(steps)
    fused = NeuronStem.fuse(Integrate(), source, Encode(steps))
    assert fused == NeuronStem(steps, source.mul, source.add, 1, 0.5, lo < 0)
    assert fused is not None
    assert fused.clip == (lo, hi)
    assert NeuronStem.fuse(Integrate(Array.of([1])), source, Encode(steps)) is None
    assert NeuronStem.fuse(Integrate(), source, Encode(steps % 63 + 1)) is None


@pytest.mark.parametrize(
    ("lo", "hi", "fix"),
    [
        (0, 200, "quantize to 0..255"),
        (1, 255, "quantize to 0..255"),
        (-127, 127, "quantize to -128..127"),
        (-8, 0, "quantize to -8..7"),
        (0, 0, "quantize to 0..1"),
    ],
)
def test_the_stem_neuron_refuses_a_clip_range_between_its_bits(lo, hi, fix):
    with pytest.raises(SpirError) as refusal:
        NeuronStem.derive(Requant(Array.of([1]), Array.of([0]), 1, lo, hi, 0.5))
    assert str(refusal.value) == (
        "error[type]: neuron stem realises clip ranges 0..2^b-1 and -2^(b-1)..2^(b-1)-1, "
        f"not {lo}..{hi}\n        fix: {fix}"
    )


# refusals


def tensor(*shape: int, of: Encoding | None = None) -> Tensor:
    return Tensor(shape, of or Real())


INT, BITS, RATE = Int(-9, 9, HALF), Spikes(8, "bits", 0, 255, HALF), Spikes(8, "rate", 0, 8, HALF)
UNEQUAL = Int(0, 9, Scale.of([0.5, 0.25]))
WEIGHT, FLOATS, STEP = Array.of([[1, 2], [3, 4]]), Array.of([[1.0, 2.0], [3.0, 4.0]]), Array.of([0.5])
KERNEL, REALS = Array.of(np.ones((4, 2, 3, 3), dtype=int)), Array.of(np.ones((4, 2, 3, 3)))
M, A = Array.of([1]), Array.of([0])
VECTOR, IMAGE = tensor(2), tensor(2, 5, 5)
HUGE = Int(-(2**40), 2**40, HALF)
C = Array.of([0.0, 0.0])

REFUSALS: dict[str, tuple[Op, tuple[Tensor, ...], str]] = {
    "linear-bias-on-a-train": (
        Linear(WEIGHT, STEP, Array.of([1.0, 2.0])),
        (tensor(2, of=BITS),),
        (
            "type: linear: a bias cannot ride on spikes[8, bits, 0..255] * 0.5: every frame would add it again "
            "| put the bias into the requant, neuron or readout that follows (propagate-scales does)"
        ),
    ),
    "conv-bias-on-integers": (
        Conv2d(KERNEL, STEP, Array.of(np.ones(4))),
        (tensor(2, 5, 5, of=INT),),
        (
            "type: conv2d: a bias cannot ride on int[-9, 9] * 0.5: every frame would add it again "
            "| put the bias into the requant, neuron or readout that follows (propagate-scales does)"
        ),
    ),
    "float-weights-on-integers": (
        Linear(FLOATS),
        (tensor(2, of=INT),),
        "type: linear: float weights cannot act on int[-9, 9] * 0.5 | quantize the weights",
    ),
    "float-weights-on-a-train": (
        Conv2d(REALS),
        (tensor(2, 5, 5, of=BITS),),
        "type: conv2d: float weights cannot act on spikes[8, bits, 0..255] * 0.5 | quantize the weights",
    ),
    "integer-weights-without-scale": (
        Linear(WEIGHT),
        (VECTOR,),
        "type: linear: integer weights need a weight_scale | give weight_scale, or float weights",
    ),
    "float-weights-with-scale": (
        Linear(FLOATS, STEP),
        (VECTOR,),
        "type: linear: float weights take no weight_scale | drop it, or give integer weights",
    ),
    "weight-scale-of-another-size": (
        Linear(WEIGHT, Array.of([1.0, 2.0, 3.0])),
        (VECTOR,),
        "type: linear: weight_scale has shape [3], not [1] or [2]",
    ),
    "bias-of-another-size": (
        Conv2d(REALS, bias=Array.of([1.0])),
        (IMAGE,),
        "type: conv2d: bias has shape [1], not [4]",
    ),
    "features-that-do-not-fit": (
        Linear(FLOATS),
        (tensor(3),),
        (
            "type: linear: weights [2, 2] do not act on [3] "
            "| flatten the operand first, so that it has as many features as the weights have columns"
        ),
    ),
    "linear-on-an-image": (
        Linear(FLOATS),
        (IMAGE,),
        (
            "type: linear: weights [2, 2] do not act on [2, 5, 5] "
            "| flatten the operand first, so that it has as many features as the weights have columns"
        ),
    ),
    "channels-that-do-not-fit": (
        Conv2d(REALS),
        (tensor(3, 5, 5),),
        "type: conv2d: weights [4, 2, 3, 3] in 1 groups read 2 channels, and the operand has 3",
    ),
    "groups-that-do-not-divide": (
        Conv2d(REALS, groups=0),
        (IMAGE,),
        "type: conv2d: weights [4, 2, 3, 3] in 0 groups read 0 channels, and the operand has 2",
    ),
    "a-kernel-that-does-not-fit": (
        Conv2d(REALS, dilation=(3, 1)),
        (IMAGE,),
        "type: conv2d: a 3x3 kernel does not fit into 5x5 with this padding",
    ),
    "a-stride-of-zero": (
        Conv2d(REALS, stride=(0, 1)),
        (IMAGE,),
        "type: conv2d: stride and dilation are positive, padding is not negative",
    ),
    "a-convolution-of-features": (
        Conv2d(REALS),
        (VECTOR,),
        "type: conv2d: needs [C, H, W] and weights [O, I, kh, kw], not [2] and 4-d",
    ),
    "unequal-scales-at-add": (
        Add(),
        (tensor(2, of=INT), tensor(2, of=Int(0, 1, Scale.of(0.25)))),
        (
            "E-RESID-SCALE: add: operands of scales 0.5 and 0.25 cannot meet "
            "| propagate-scales{join=wide} or {join=rescale} makes them meet"
        ),
    ),
    "bits-of-unequal-length": (
        Add(),
        (tensor(2, of=BITS), tensor(2, of=Spikes(4, "bits", 0, 15, HALF))),
        "type: add: trains of 4 and 8 frames cannot be added | give both branches the same number of bits or steps",
    ),
    "bits-with-rate": (
        Add(),
        (tensor(2, of=BITS), tensor(2, of=RATE)),
        (
            "type: add: trains of codes bits and rate cannot be added: their frames weigh differently "
            "| convert both branches to the same neuron"
        ),
    ),
    "integers-with-trains": (
        Add(),
        (tensor(2, of=INT), tensor(2, of=BITS)),
        (
            "type: add: operands are int[-9, 9] * 0.5 and spikes[8, bits, 0..255] * 0.5 "
            "| bring both branches to one stage: real, integer or spikes"
        ),
    ),
    "shapes-at-add": (Add(), (tensor(2), tensor(3)), "type: add: operands have shapes [2] and [3]"),
    "one-operand-at-add": (Add(), (VECTOR,), "type: add takes two or more operands, not 1"),
    "two-operands-at-relu": (Relu(), (VECTOR, VECTOR), "type: relu takes 1 operands, not 2"),
    "a-contraction-over-unequal-scales": (
        Linear(WEIGHT, STEP),
        (tensor(2, of=UNEQUAL),),
        (
            f"E-SCALE: linear: a sum over channels of unequal scales {UNEQUAL.scale} "
            "| fold the channel scales into the float weights before quantize"
        ),
    ),
    "a-convolution-over-unequal-scales": (
        Conv2d(KERNEL, STEP),
        (tensor(2, 5, 5, of=UNEQUAL),),
        (
            f"E-SCALE: conv2d: a sum over channels of unequal scales {UNEQUAL.scale} "
            "| fold the channel scales into the float weights before quantize"
        ),
    ),
    "relu-on-a-train": (
        Relu(),
        (tensor(2, of=BITS),),
        (
            "type: relu: spikes[8, bits, 0..255] * 0.5 has no relu frame by frame "
            "| quantize, then derive-thresholds: the neuron is the relu"
        ),
    ),
    "requant-on-a-train": (
        Requant(M, A, 1, 0, 1, 0.5),
        (tensor(2, of=BITS),),
        "type: requant: works on integers, not spikes[8, bits, 0..255] * 0.5 | integrate a train first",
    ),
    "requant-of-floats": (
        Requant(Array.of([1.5]), A, 1, 0, 1, 0.5),
        (tensor(2, of=INT),),
        "type: requant: mul [1] of float64 is not integers of shape [1], [2] or [2]",
    ),
    "a-divisor-of-zero": (Requant(M, A, 0, 0, 1, 0.5), (tensor(2, of=INT),), "type: requant: div = 0 is not positive"),
    "a-divisor-beyond-64-bits": (
        Requant(M, A, 2**64, 0, 1, 0.5),
        (tensor(2, of=INT),),
        (
            "E-VRANGE: requant: div needs 66 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "a-product-beyond-64-bits": (
        Requant(Array.of([1, 2**24]), A, 2, 0, 1, 0.5),
        (tensor(2, of=HUGE),),
        (
            "E-VRANGE: requant: mul * z + add needs 66 bits in channel 1, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "a-neuron-product-beyond-64-bits": (
        NeuronStem(8, Array.of([2**56]), A, 2, 0.5),
        (tensor(2, of=BITS),),
        (
            "E-VRANGE: neuron_stem: mul * z + add needs 65 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "a-sum-beyond-64-bits": (
        Linear(Array.of([[2**62] * 2, [1, 1]]), STEP),
        (tensor(2, of=INT),),
        (
            "E-VRANGE: linear: the sum needs 68 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "a-sum-of-weights-that-wraps": (
        Linear(Array.of([[2**62] * 4]), STEP),
        (tensor(4, of=Int(0, 1, HALF)),),
        (
            "E-VRANGE: linear: the sum needs 66 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "a-kernel-of-weights-that-wraps": (
        Conv2d(Array.of(np.full((1, 1, 2, 2), -(2**63))), STEP),
        (tensor(1, 2, 2, of=Int(0, 1, HALF)),),
        (
            "E-VRANGE: conv2d: the sum needs 67 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "an-accumulator-beyond-64-bits": (
        Integrate(Array.of([2**63 - 1])),
        (tensor(2, of=INT),),
        (
            "E-VRANGE: integrate: the accumulator needs 65 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "a-readout-bias-of-another-shape": (
        Integrate(Array.of([1, 2, 3])),
        (tensor(2, 1, of=INT),),
        "type: integrate: bias [3] is not integers of [1], [2] or [2, 1]",
    ),
    "a-readout-of-reals": (Integrate(), (VECTOR,), "type: integrate: a real value has no scale | quantize it"),
    "encode-of-reals": (
        Encode(8),
        (VECTOR,),
        "type: encode: works on integers, not real | quantize reals; integrate a train",
    ),
    "encode-in-too-few-bits": (
        Encode(4),
        (tensor(2, of=INT),),
        "type: encode: 4 frames of code bits hold -8..7, not -9..9 | more steps, or a narrower clip range",
    ),
    "encode-in-no-frames": (Encode(0), (tensor(2, of=INT),), "type: encode: a train has one or more frames, not 0"),
    "encode-in-another-code": (
        Encode(8, "rate"),
        (tensor(2, of=INT),),
        "type: encode: there is no encoder for code 'rate' | code = bits",
    ),
    "a-stem-neuron-on-rates": (
        NeuronStem(8, M, A, 1, 0.5),
        (tensor(2, of=RATE),),
        (
            "type: neuron_stem: accumulates bit-coded frames, not spikes[8, rate, 0..8] * 0.5 "
            "| encode the input with code = bits, or use the unfused integrate; requant; encode"
        ),
    ),
    "a-stem-neuron-of-no-bits": (
        NeuronStem(0, M, A, 1, 0.5),
        (tensor(2, of=BITS),),
        "type: neuron_stem: a train has one or more frames, not 0",
    ),
    "a-stem-neuron-of-too-many-bits": (
        NeuronStem(10**9, M, A, 1, 0.5),
        (tensor(2, of=BITS),),
        "type: neuron_stem: 1000000000 frames of code bits, and registers have 64 bits | fewer bits",
    ),
    "batch-norm-on-integers": (
        BatchNorm(C, C, 1e-5),
        (tensor(2, of=INT),),
        "type: batch_norm: works on reals, not int[-9, 9] * 0.5 | fold-bn before quantize",
    ),
    "batch-norm-of-other-channels": (
        BatchNorm(C, C, 1e-5),
        (tensor(3),),
        "type: batch_norm: mean has shape [2], not [3]",
    ),
    "a-negative-variance": (
        BatchNorm(C, Array.of([1.0, -1.0]), 1e-5),
        (VECTOR,),
        "type: batch_norm: var + eps must be positive | repair the checkpoint: a variance is negative",
    ),
    "clip-on-integers": (
        Clip(C, C),
        (tensor(2, of=INT),),
        "type: clip: works on reals, not int[-9, 9] * 0.5 | calibrate-range before quantize",
    ),
    "an-upside-down-clip": (
        Clip(Array.of([1.0]), C),
        (VECTOR,),
        "type: clip: a lower bound lies above its upper bound",
    ),
    "a-clip-of-other-channels": (Clip(C, C), (tensor(3),), "type: clip: bounds of shape [2] are not [1] or [3]"),
    "quantize-of-integers": (
        Quantize(0.5, 0, 1),
        (tensor(2, of=INT),),
        "type: quantize: works on reals, not int[-9, 9] * 0.5 | requant changes the scale of integers",
    ),
    "quantize-to-nothing": (Quantize(0.5, 1, 0), (VECTOR,), "type: quantize: an empty range 1..0"),
    "quantize-by-zero": (
        Quantize(0.0, 0, 1),
        (VECTOR,),
        "type: quantize: a scale is a positive finite number, not 0.0",
    ),
    "dequantize-of-a-train": (
        Dequantize(),
        (tensor(2, of=BITS),),
        "type: dequantize: works on integers, not spikes[8, bits, 0..255] * 0.5 | integrate a train first",
    ),
    "a-pool-of-features": (AvgPool((2, 2), (2, 2)), (VECTOR,), "type: avg_pool: needs [C, H, W], not [2]"),
    "a-window-that-does-not-fit": (
        AvgPool((6, 2), (2, 2)),
        (IMAGE,),
        "type: avg_pool: a window of 6x2 does not fit 5x5",
    ),
    "a-pool-of-stride-zero": (
        AvgPool((2, 2), (0, 2)),
        (IMAGE,),
        "type: avg_pool: kernel and stride are positive, padding is not negative",
    ),
    "a-mean-of-other-positions": (
        GlobalAvgPool(24),
        (IMAGE,),
        "type: global_avg_pool: needs [C, H, W] with H x W = 24, not [2, 5, 5]",
    ),
    "pads-of-another-rank": (Pad((1, 1)), (IMAGE,), "type: pad: [2, 5, 5] takes 6 pads >= 0, not [1, 1]"),
    "negative-pads": (Pad((0, -1)), (VECTOR,), "type: pad: [2] takes 2 pads >= 0, not [0, -1]"),
    "a-slice-of-another-rank": (
        Slice((0,), (1,), (1,)),
        (IMAGE,),
        "type: slice: [2, 5, 5] takes 3 starts, stops and steps",
    ),
    "a-slice-beyond-the-end": (Slice((0,), (3,), (1,)), (VECTOR,), "type: slice: [0]:[3]:[1] leaves [2]"),
    "a-slice-from-the-end": (Slice((0,), (-1,), (1,)), (VECTOR,), "type: slice: [0]:[-1]:[1] leaves [2]"),
    "an-empty-slice": (Slice((1,), (1,), (1,)), (VECTOR,), "type: slice: [1]:[1] of [2] is empty"),
    "a-scale-for-reals": (Scaling(M, STEP), (VECTOR,), "type: scale: a real value has no scale to set | drop `to`"),
    "a-float-factor-with-to": (
        Scaling(STEP, STEP),
        (tensor(2, of=INT),),
        "type: scale: `to` goes with an integer factor",
    ),
    "a-factor-of-other-channels": (
        Scaling(Array.of([1, 2, 3])),
        (VECTOR,),
        "type: scale: constants of shape [3] are not [1] or [2]",
    ),
    "a-negative-target-scale": (
        Scaling(M, Array.of([-1.0])),
        (tensor(2, of=INT),),
        "type: scale: a scale is a positive finite number, not -1.0",
    ),
}


@pytest.mark.parametrize(("op", "types", "text"), REFUSALS.values(), ids=REFUSALS)
def test_an_op_refuses_what_it_cannot_take_and_says_what_can(op, types, text):
    with pytest.raises(SpirError) as refusal:
        infer(op, types)
    (found,) = refusal.value.diagnostics
    fixes = [note.text for note in found.notes]
    assert " | ".join([f"{found.code}: {found.message}", *fixes]) == text


def test_every_op_refuses_something():
    assert {op.name for op, _, _ in REFUSALS.values()} == OPS.keys() - {"flatten"}  # flatten takes everything


@pytest.mark.parametrize("values", [[math.nan], [1.0, math.inf]])
def test_weights_that_are_not_finite_are_refused(values):
    with pytest.raises(SpirError) as refusal:
        Array.of([values])
    assert str(refusal.value) == (
        f"error[weights]: 1 of {len(values)} values are NaN or infinite, the first at [0, {len(values) - 1}]\n"
        "        fix: repair the checkpoint: a diverged training run leaves such values"
    )


def test_arrays_are_equal_by_type_shape_and_content():
    base = Array.of([[1, 2], [3, 4]])
    assert base == Array.of(np.array([[1, 2], [3, 4]], dtype=np.int8))
    assert base not in (Array.of([1, 2, 3, 4]), Array.of([[1.0, 2.0], [3.0, 4.0]]), Array.of([[1, 2], [3, 5]]))
    with pytest.raises(ValueError, match="read-only"):
        base.values[0, 0] = 7
