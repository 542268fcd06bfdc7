"""Every op: its reference against an independent formula, its frames against its values, its adjoint, its refusals."""

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
from spir.ops._accumulation import scaled
from spir.ops._linear import LinearMap
from spir.ops._threshold import divisors
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.conv_transpose2d import ConvTranspose2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.mix import Mix
from spir.ops.neuron_ca_lif import NeuronCaLif
from spir.ops.neuron_matrix import NeuronMatrix
from spir.ops.neuron_parallel import NeuronParallel
from spir.ops.neuron_stem import NeuronStem
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.product import Product
from spir.ops.qcfs import Qcfs
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.ops.sigmoid import Sigmoid
from spir.ops.slice import Slice
from spir.ops.softmax import Softmax
from spir.ops.tanh import Tanh
from spir.ops.upsample import Upsample
from spir.types import SORTED, Current, Encoding, Int, Real, Scale, Spikes, Tensor

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
    elif isinstance(train, Spikes) and train.net is None:
        values = codes(tensor, rng)
        trains = [[int(np.sign(v))] * abs(v) + [0] * (train.steps - abs(v)) for v in values.ravel().tolist()]
        for one in trains if train.code == "rate" else ():
            rng.shuffle(one)
        trains = [one[::-1] for one in trains] if train.code == "suffix" else trains
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
    if op.edge:
        found = tensor_of(x)
        for dim, (before, after) in enumerate(zip(op.pads[::2], op.pads[1::2], strict=True), start=1):
            nearest = [min(max(i, 0), x.shape[dim] - 1) for i in range(-before, x.shape[dim] + after)]
            found = found.index_select(dim, torch.tensor(nearest))
        return found
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


def reshape(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return np.array([[*sample] for sample in x.reshape(len(x), -1).tolist()]).reshape(len(x), *op.to)


def permute(op: Any, x: np.ndarray, *, real: bool) -> Any:
    out = np.empty((len(x), *(x.shape[1 + d] for d in op.order)), dtype=x.dtype)
    for n, *where in np.ndindex(*out.shape):
        source = [0] * len(where)
        for i, d in enumerate(op.order):
            source[d] = where[i]
        out[(n, *where)] = x[(n, *source)]
    return out


def upsample(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return F.interpolate(tensor_of(x), scale_factor=tuple(map(float, op.factor)), mode="nearest-exact")


def concat(op: Any, *x: np.ndarray, real: bool) -> Any:
    return torch.cat([*map(tensor_of, x)], dim=op.axis + 1)


def max_pool(op: Any, x: np.ndarray, *, real: bool) -> Any:
    """Over the elements that lie inside the image, one window at a time."""
    (top, bottom, left, right), (rows, columns) = op.padding, x.shape[2:]
    height = (rows + top + bottom - op.dilation[0] * (op.kernel[0] - 1) - 1) // op.stride[0] + 1
    width = (columns + left + right - op.dilation[1] * (op.kernel[1] - 1) - 1) // op.stride[1] + 1
    out = np.empty((*x.shape[:2], height, width), dtype=x.dtype)
    for n, c, p, q in np.ndindex(*out.shape):
        at = itertools.product(
            (p * op.stride[0] - top + u * op.dilation[0] for u in range(op.kernel[0])),
            [q * op.stride[1] - left + v * op.dilation[1] for v in range(op.kernel[1])],
        )
        out[n, c, p, q] = max(x[n, c, r, k] for r, k in at if 0 <= r < rows and 0 <= k < columns)
    return out


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


def summed(op: Any, x: np.ndarray) -> np.ndarray:
    """What frames ``[T, N, *]`` add up to in steps of 2^r: each rounded half up, after it was weighted by 2^(T-1-t)."""
    if isinstance(op.shift, int) and not op.shift:
        return x
    steps = x.shape[0]

    def rule(column: tuple[int, ...], where: tuple[int, ...]) -> int:
        r = op.shift if isinstance(op.shift, int) else channel(op.shift.values, where)
        return sum(math.floor(Fraction(v * 2 ** (steps - 1 - t), 2**r) + Fraction(1, 2)) for t, v in enumerate(column))

    found = np.empty(x.shape[1:], dtype=np.int64)
    for where in np.ndindex(*found.shape):
        found[where] = rule(tuple(x[(slice(None), *where)].tolist()), where[1:])
    return found


def neuron_stem(op: Any, x: np.ndarray, *, real: bool) -> Any:
    low = -(2 ** (op.bits - 1)) if op.signed else 0
    law = triple(op, low, low + 2**op.bits - 1)
    return elementwise(lambda z, at: thinned(op, law(z, at), op.bits, signed=op.signed), summed(op, x))


def thinned(op: Any, value: int, bits: int, *, signed: bool) -> int:
    """A code after RoT and DRLO, read from its digits."""
    step, top = 2**op.rot, 2 ** (bits - signed) - 1
    if op.rot:
        value = min(step * math.floor(Fraction(value, step) + Fraction(1, 2)), top - top % step)
    digits = f"{value % 2**bits:0{bits}b}"
    sign, rest = digits[:signed], digits[signed:]
    if op.drlo:
        ones = [i for i, digit in enumerate(rest) if digit == "1"]
        kept = {
            "count": ones[: op.drlo],
            "window": [i for i in ones if i < ones[0] + op.drlo],
            "position": [i for i in ones if len(rest) - 1 - i >= op.drlo],
        }[op.drlo_mode]
        rest = "".join("1" if i in kept else "0" for i in range(len(rest)))
    return int(rest or "0", 2) - (2 ** (bits - 1) if sign == "1" else 0)


def neuron_parallel(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return elementwise(triple(op, -op.steps * op.signed, op.steps), x)


def neuron_matrix(op: Any, x: np.ndarray, *, real: bool) -> Any:
    """How many steps reach their threshold, from frames ``[T', N, *]``."""
    matrix, rows, shift = (a.values.tolist() for a in (op.matrix, op.rows, op.shift))
    found = np.zeros(x.shape[1:], dtype=object)
    for n, *where in np.ndindex(*x.shape[1:]):
        mul, add, div = (channel(a, tuple(where)) for a in (op.mul.values, op.add.values, divisors(op.div)))
        currents = [frame.item() for frame in x[(slice(None), n, *where)]]
        found[(n, *where)] = sum(
            Fraction(mul, row) * sum(a * i for a, i in zip(weights, currents, strict=True)) + Fraction(part * add, row)
            >= div
            for weights, row, part in zip(matrix, rows, shift, strict=True)
        )
    return found


def mix(op: Any, x: np.ndarray, *, real: bool) -> Any:
    """In steps of 1 / divisor, every frame of each row a share of what came in, from frames ``[T', N, *]``."""
    rows = op.matrix.values.tolist()
    return sum(w * frame.astype(object) for row in rows for w, frame in zip(row, x, strict=True))


def integrate(op: Any, x: np.ndarray, *, real: bool) -> Any:
    total = summed(op, x)
    return total if op.bias is None else elementwise(lambda v, at: v + channel(op.bias.values, at), total)


def neuron_ca_lif(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return elementwise(triple(op, op.lo, op.hi), x)


def encode(op: Any, x: np.ndarray, *, real: bool) -> Any:
    """As it is, thinned, or as many spikes as the intervals leave room for."""
    if op.code == "bits":
        signed = bool(x.min() < 0)  # corners hold both ends
        return elementwise(lambda v, _: thinned(op, v, op.steps, signed=signed), x)
    share = Fraction(op.alpha) * op.steps / (op.full or op.steps)
    return elementwise(lambda v, _: int(math.copysign(math.floor(share * abs(v)), v)), x)


def relu(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return F.relu(tensor_of(x))


def batch_norm(op: Any, x: np.ndarray, *, real: bool) -> Any:
    mean, var = tensor_of(op.mean.values), tensor_of(op.var.values)
    weight, bias = (None if a is None else tensor_of(a.values) for a in (op.weight, op.bias))
    return F.batch_norm(tensor_of(x), mean, var, weight, bias, False, 0.0, op.eps)


def shift(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return elementwise(lambda v, at: v + channel(op.offset.values, at), x).astype(float)


def sigmoid(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return torch.sigmoid(tensor_of(x))


def tanh(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return torch.tanh(tensor_of(x))


def softmax(op: Any, x: np.ndarray, *, real: bool) -> Any:
    return (F.log_softmax if op.log else F.softmax)(tensor_of(x), dim=op.axis + 1)


def product(op: Any, *x: np.ndarray, real: bool) -> Any:
    return tensor_of(x[0]) * tensor_of(x[1])


def conv_transpose2d(op: Any, x: np.ndarray, *, real: bool) -> Any:
    whole = F.conv_transpose2d(tensor_of(x), tensor_of(op.weight.values), None, op.stride, 0, 0, op.groups, op.dilation)
    (top, bottom, left, right), (rows, columns) = op.padding, op.extra
    found = F.pad(whole, (-left, columns - right, -top, rows - bottom))
    return found if op.bias is None else found + tensor_of(op.bias.values).reshape(-1, 1, 1)


def clip(op: Any, x: np.ndarray, *, real: bool) -> Any:
    ends = [tensor_of(a.values).reshape(-1, *[1] * (x.ndim - 2)) for a in (op.lo, op.hi)]
    return torch.minimum(torch.maximum(tensor_of(x), ends[0]), ends[1])


def qcfs(op: Any, x: np.ndarray, *, real: bool) -> Any:
    def one(value: float, where: tuple[int, ...]) -> float:
        shifts = (0 if a is None else channel(a.values, where) for a in (op.threshold, op.psi, op.phi))
        theta, psi, phi = (Fraction(shift) for shift in shifts)
        steps = math.floor((Fraction(value) + psi) * op.levels / theta + Fraction(1, 2))
        return float(min(max(steps, -op.levels * op.signed), op.levels) * (theta + phi) / op.levels)

    return elementwise(one, x).astype(np.float64)


def quantize(op: Any, x: np.ndarray, *, real: bool) -> Any:
    step = Fraction(op.scale)
    return elementwise(lambda v, _: min(max(math.floor(Fraction(v) / step + Fraction(1, 2)), op.lo), op.hi), x)


def dequantize(op: Any, x: np.ndarray, *, real: bool) -> Any:
    raise AssertionError("the scale stands in the operand's type")


BY_FRAME = ("mix", "neuron_matrix")
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
    by_frame = op.name in BY_FRAME or (isinstance(op, (NeuronStem, Integrate)) and scaled(op.shift))
    given = [stored_of(types[0], 0)] if by_frame else given
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
    if result.train is not None and result.train.code in SORTED:
        assert (np.diff(np.abs(found), axis=0) * (1 if result.train.code == "suffix" else -1) >= 0).all()
        assert (np.abs(found.sum(axis=0)) == np.abs(found).sum(axis=0)).all()
    if result.train is not None and result.train.code == "direct":
        assert (found == found[0]).all()


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
        Spikes(5, "suffix", 0, 5, HALF),
        Spikes(5, "prefix", -5, 5, HALF),
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


@pytest.mark.parametrize(("first", "second"), [*itertools.product(["rate", "suffix", "prefix", "direct"], repeat=2)])
def test_trains_of_codes_that_join_add_up_to_the_sum_of_their_values(first, second):
    made = {
        "rate": Spikes(4, "rate", -4, 4, HALF),
        "suffix": Spikes(4, "suffix", 0, 4, HALF),
        "prefix": Spikes(4, "prefix", -4, 4, HALF),
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


# adjoints and synapses against a dense Jacobian


def jacobian(op: Any, shapes: tuple[tuple[int, ...], ...], index: int) -> np.ndarray:
    """What the map makes of each unit of one operand, zeros in the others: ``[inputs, outputs]``."""
    size = math.prod(shapes[index])
    basis = [np.zeros((size, *s), dtype=np.int64) for s in shapes]
    basis[index] = np.eye(size, dtype=np.int64).reshape(size, *shapes[index])
    return np.asarray(op.apply(*basis, real=False)).reshape(size, -1)


@pytest.mark.parametrize(("op", "types"), ON_INTEGERS)
def test_the_adjoint_is_the_transpose_of_the_dense_matrix(op, types):
    result, shapes = infer(op, types), tuple(t.shape for t in types)
    y = np.random.default_rng(0).integers(-9, 10, (2, *result.shape))
    y[1] *= 10**6
    given = y.copy()
    found = op.adjoint(y, *shapes)
    whole = op.adjoint(y.astype(object), *shapes)
    assert len(found) == len(types)
    assert (y == given).all()
    for index, shape in enumerate(shapes):
        expected = y.reshape(2, -1) @ jacobian(op, shapes, index).T
        assert found[index].shape == (2, *shape)
        assert (found[index].reshape(2, -1) == expected).all()
        assert (whole[index].reshape(2, -1) == expected).all()


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
        assert found[index].shape == shape
        assert (found[index].ravel() == jacobian(ones(op), shapes, index) @ paths.ravel()).all()


@pytest.mark.parametrize(("op", "types"), ON_INTEGERS)
def test_a_map_with_weights_is_weighed_anew_and_one_without_is_as_it_was(op, types):
    shapes = tuple(t.shape for t in types)
    changed = op.weighing(lambda weight: -2 * weight)
    if not isinstance(op, (Conv2d, Linear, Scaling)):
        assert changed is op
        return
    assert attrs.evolve(op.weighing(np.abs).weighing(np.abs)) == op.weighing(np.abs)
    assert (jacobian(changed, shapes, 0) == -2 * jacobian(op, shapes, 0)).all()
    assert (jacobian(op.weighing(np.abs), shapes, 0) == np.abs(jacobian(op, shapes, 0))).all()


def test_weighing_drops_a_bias_and_a_target_scale_and_keeps_what_a_map_reaches():
    conv = Conv2d(KERNEL, STEP, Array.of(np.ones(4)), (2, 1), (1, 0, 0, 1), (1, 2))
    doubled = conv.weighing(lambda weight: 2 * weight)
    assert doubled == attrs.evolve(conv, weight=Array.of(2 * KERNEL.values), bias=None)
    assert Scaling(Array.of([-0.3, 2.5])).weighing(lambda f: 7 * f) == Scaling(Array.of([-7, 7]))
    assert Scaling(Array.of([3]), STEP).weighing(np.ones_like) == Scaling(Array.of([1]))


# maxima


@pytest.mark.parametrize("lowest", [-np.inf, -3.5, 0.0])
def test_padding_of_a_pool_never_wins_over_negative_reals(lowest):
    x = np.full((1, 1, 3, 3), lowest)
    op = MaxPool((3, 3), (1, 1), (2, 0, 1, 1))
    assert (op.reference((tensor(1, 3, 3),), x) == lowest).all()
    assert (op.reference((Tensor((1, 3, 3), Int(-9, 9, HALF)),), np.full((1, 1, 3, 3), -9)) == -9).all()


def sorted_trains(values: list[int], steps: int, *, last: bool) -> np.ndarray:
    """Nested trains ``[T, 1, 1, 1, N]`` whose spikes fill the first or the last frames."""
    trains = [[int(np.sign(v))] * abs(v) + [0] * (steps - abs(v)) for v in values]
    return np.array([t[::-1] if last else t for t in trains]).T.reshape(steps, 1, 1, 1, len(values))


@pytest.mark.parametrize("last", [False, True])
def test_the_maximum_of_nested_trains_is_the_train_of_the_maximum(last):
    values = range(-4, 5)
    type_ = Tensor((1, 1, 2), Spikes(4, "suffix" if last else "prefix", -4, 4, HALF))
    op = MaxPool((1, 2), (1, 1))
    for a, b in itertools.product(values, repeat=2):
        found = op.reference((type_,), sorted_trains([a, b], 4, last=last))
        assert (found == sorted_trains([max(a, b)], 4, last=last)).all()


def test_the_maximum_of_bit_trains_is_not_the_train_of_the_maximum():
    """Why bits are refused: 52670 of all pairs of bytes would be wrong."""
    a, b = np.ogrid[:256, :256]
    assert int(((a | b) != np.maximum(a, b)).sum()) == 52670


def test_integers_of_full_shape_multiply_each_element_and_its_own_range():
    factor = np.array([[[2, -3]], [[0, 5]]])
    op = Scaling(Array.of(factor))
    x = Tensor((2, 1, 2), Int(-1, 4, HALF))
    assert infer(op, (x,)) == Tensor((2, 1, 2), Int(-12, 20, HALF))
    bounds = op.bounds((x.shape,), x.range.broadcast(2))
    assert [*zip(bounds.lo, bounds.hi, strict=True)] == [(-12, 8), (-5, 20)]
    assert op.reference((x,), np.full((1, 2, 1, 2), 4)).ravel().tolist() == [8, -12, 0, 20]


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


@pytest.mark.parametrize("order", SORTED)
@pytest.mark.parametrize(("lo", "hi"), [(0, 1), (0, 5), (-1, 1), (-7, 7)])
def test_the_parallel_neuron_takes_the_clip_ranges_of_its_steps(lo, hi, order):
    source = Requant(Array.of([1]), Array.of([0]), 1, lo, hi, 0.5)
    assert NeuronParallel.derive(source) == Encode(hi, "suffix")
    encode = NeuronParallel.derive(source, order)
    assert encode == Encode(hi, order)
    wanted = NeuronParallel(hi, source.mul, source.add, 1, 0.5, order, lo < 0)
    assert wanted.clip == (lo, hi)
    assert NeuronParallel.fuse(Integrate(), source, encode) == NeuronParallel.fuse(None, source, encode) == wanted
    assert NeuronParallel.fuse(Integrate(Array.of([1])), source, encode) is None
    assert NeuronParallel.fuse(Integrate(), source, Encode(hi + 1, order)) is None
    assert NeuronParallel.fuse(Integrate(), source, Encode(hi)) is None
    assert NeuronStem.fuse(None, source, Encode(hi)) is None


@pytest.mark.parametrize(("lo", "hi"), [(0, 0), (1, 5), (-4, 5), (-5, 4), (-5, 0)])
def test_the_parallel_neuron_refuses_a_clip_range_that_is_not_of_its_steps(lo, hi):
    with pytest.raises(SpirError) as refusal:
        NeuronParallel.derive(Requant(Array.of([1]), Array.of([0]), 1, lo, hi, 0.5))
    assert str(refusal.value) == (
        f"error[type]: neuron parallel realises clip ranges 0..T and -T..T, not {lo}..{hi}\n"
        "        fix: calibrate-qcfs{steps=T} before quantize, or neuron=stem"
    )


@pytest.mark.parametrize(
    ("owner", "text"),
    [
        (NeuronStem, "neuron stem emits bits, in no order 'last'\n        fix: neuron=parallel, or no order"),
        (NeuronParallel, "there is no order 'last'\n        fix: one of: prefix, suffix"),
    ],
)
def test_neurons_refuse_orders_that_they_do_not_know(owner, text):
    with pytest.raises(SpirError) as refusal:
        owner.derive(Requant(Array.of([1]), Array.of([0]), 1, 0, 3, 0.5), "last")
    assert str(refusal.value) == f"error[option]: {text}"


def test_published_matrices_are_those_of_unsigned_counts():
    with pytest.raises(SpirError) as refusal:
        NeuronMatrix.published(NeuronParallel(4, M, A, 8, 0.5, signed=True))
    assert str(refusal.value) == (
        "error[type]: the published matrices are those of unsigned counts\n        fix: neuron_parallel"
    )


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
SUFFIX, EACH = Spikes(8, "suffix", 0, 8, HALF), Array.of([[1] * 8])
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
        "type: add: trains of 4 and 8 frames cannot meet | give both branches the same number of bits or steps",
    ),
    "bits-with-rate": (
        Add(),
        (tensor(2, of=BITS), tensor(2, of=RATE)),
        (
            "type: add: trains of codes bits and rate cannot meet: their frames weigh differently "
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
            "| use one constant for all channels; constants per channel fold into weights behind pools, concat "
            "and moves that keep channels apart"
        ),
    ),
    "a-convolution-over-unequal-scales": (
        Conv2d(KERNEL, STEP),
        (tensor(2, 5, 5, of=UNEQUAL),),
        (
            f"E-SCALE: conv2d: a sum over channels of unequal scales {UNEQUAL.scale} "
            "| use one constant for all channels; constants per channel fold into weights behind pools, concat "
            "and moves that keep channels apart"
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
    "a-shift-of-frames-that-weigh-the-same": (
        Integrate(shift=2),
        (tensor(2, of=RATE),),
        (
            "E-SCALED: integrate: only bit-coded frames are shifted after they are weighted, not "
            "spikes[8, rate, 0..8] * 0.5 | shift = 0, or neuron=stem"
        ),
    ),
    "a-shift-below-zero": (
        NeuronStem(8, M, A, 1, 0.5, shift=-1),
        (tensor(2, of=BITS),),
        "type: neuron_stem: shift = -1 is not in 0..62",
    ),
    "shifts-of-another-number-of-channels": (
        Integrate(shift=Array.of([1, 2, 3])),
        (tensor(2, of=BITS),),
        "type: integrate: shift [3] is not integers of shape [1] or [2]",
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
    "encode-bits-at-intervals": (
        Encode(8, alpha=0.5),
        (tensor(2, of=INT),),
        "type: encode: code bits takes no full or alpha | code = isi",
    ),
    "encode-counts-with-rounding": (
        Encode(9, "suffix", rot=1),
        (tensor(2, of=INT),),
        "type: encode: code suffix takes no rot or drlo | code = bits",
    ),
    "encode-bits-that-are-all-rounded-away": (
        Encode(8, rot=8),
        (tensor(2, of=INT),),
        "type: encode: rot = 8 of 8 bits | rot = 1..7, or 0 for off",
    ),
    "a-stem-neuron-of-fewer-spikes-than-none": (
        NeuronStem(4, M, A, 1, 0.5, drlo=-1),
        (tensor(2, of=BITS),),
        "type: neuron_stem: drlo = -1, reading count, of 4 bits | drlo = 1..4, or 0 for off",
    ),
    "a-stem-neuron-of-more-spikes-than-bits": (
        NeuronStem(4, M, A, 1, 0.5, drlo=5),
        (tensor(2, of=BITS),),
        "type: neuron_stem: drlo = 5, reading count, of 4 bits | drlo = 1..4, or 0 for off",
    ),
    "a-stem-neuron-without-any-bit": (
        NeuronStem(4, M, A, 1, 0.5, drlo=4, drlo_mode="position"),
        (tensor(2, of=BITS),),
        "type: neuron_stem: drlo = 4, reading position, of 4 bits | drlo = 1..3, or 0 for off",
    ),
    "a-stem-neuron-of-an-unknown-reading": (
        NeuronStem(4, M, A, 1, 0.5, drlo=1, drlo_mode="counts"),
        (tensor(2, of=BITS),),
        "type: neuron_stem: there is no reading of DRLO called 'counts' | did you mean 'count'?",
    ),
    "encode-more-than-a-spike-a-step": (
        Encode(8, "isi", 12, 1.5),
        (tensor(2, of=INT),),
        "type: encode: alpha = 1.5 and full = 12, and codes need 0 < alpha <= 1 <= full",
    ),
    "encode-in-another-code": (
        Encode(8, "rate"),
        (tensor(2, of=INT),),
        "type: encode: there is no encoder for code 'rate' | code = bits or suffix or prefix or isi",
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
        "type: neuron_stem: a train of 1000000000 bits, and registers hold 63 and a sign | fewer bits",
    ),
    "a-calcium-neuron-of-another-mode": (
        NeuronCaLif(4, M, A, 1, 0, 9, 0.5, "multiple"),
        (tensor(2, of=SUFFIX),),
        "type: neuron_ca_lif: there is no mode 'multiple' | did you mean 'multi'?",
    ),
    "a-calcium-neuron-on-bits": (
        NeuronCaLif(4, M, A, 1, 0, 9, 0.5),
        (tensor(2, of=BITS),),
        (
            f"type: neuron_ca_lif: reads frames that weigh the same, not {BITS} | encode the input with code = isi, or "
            "use the unfused integrate; requant; encode"
        ),
    ),
    "a-calcium-neuron-that-drains-nothing": (
        NeuronCaLif(1, M, A, 1, 0, 9, 0.5, drain=2),
        (tensor(2, of=SUFFIX),),
        "type: neuron_ca_lif: mode multi leaves nothing to drain | drain = 0, or mode = single",
    ),
    "a-calcium-neuron-of-a-longer-window": (
        NeuronCaLif(99, M, A, 1, 0, 9, 0.5),
        (tensor(2, of=SUFFIX),),
        f"type: neuron_ca_lif: a window of 99 of {SUFFIX.steps} frames and counts 0..9 from 0 on",
    ),
    "a-concat-of-both-orders": (
        Concat(),
        (tensor(2, of=SUFFIX), tensor(2, of=attrs.evolve(SUFFIX, code="prefix"))),
        (
            "E-ORDER-MIX: concat: suffix and prefix trains meet: a maximum of such trains is not the train of the "
            "maximum | one order for all layers: derive-thresholds{neuron=parallel, order=suffix}"
        ),
    ),
    **{
        f"a-{op.name}-on-bits": (op, (tensor(2, of=BITS),), f"type: {op.name}: {text}")
        for op, text in (
            (
                NeuronParallel(4, M, A, 1, 0.5),
                f"sums frames that weigh the same, not {BITS} | integrate the operand first, or use neuron=stem",
            ),
            (
                NeuronMatrix(EACH, M, M, M, A, 1, 0.5),
                "charges by frames that weigh the same, not spikes[8, bits, 0..255] * 0.5 | use neuron_parallel",
            ),
            (
                Mix(EACH, 1),
                "mixes frames that weigh the same, not spikes[8, bits, 0..255] * 0.5 | encode without bits",
            ),
        )
    },
    "a-mix-of-integers": (
        Mix(EACH, 1),
        (tensor(2, of=INT),),
        "type: mix: mixes frames that weigh the same, not int[-9, 9] * 0.5 | encode without bits",
    ),
    "a-mix-of-other-frames": (
        Mix(Array.of(np.ones((3, 4), dtype=int)), 3),
        (tensor(2, of=RATE),),
        "type: mix: a matrix of int64 [3, 4] for 8 frames | integers [T', 8]",
    ),
    "a-mix-of-floats": (
        Mix(Array.of(np.full((8, 8), 0.125)), 1),
        (tensor(2, of=RATE),),
        "type: mix: a matrix of float64 [8, 8] for 8 frames | integers [T', 8]",
    ),
    "a-mix-that-loses-charge": (
        Mix(Array.of([[1] * 8, [1] * 7 + [2]]), 2),
        (tensor(2, of=RATE),),
        (
            "type: mix: columns sum to [2, 3], not to divisor = 2 "
            "| a matrix that keeps the total charge, or a neuron_matrix that weighs it"
        ),
    ),
    "a-mix-that-divides-by-nothing": (
        Mix(Array.of([[0] * 8]), 0),
        (tensor(2, of=RATE),),
        (
            "type: mix: columns sum to [0], not to divisor = 0 "
            "| a matrix that keeps the total charge, or a neuron_matrix that weighs it"
        ),
    ),
    "a-mix-beyond-64-bits": (
        Mix(Array.of([[2**60] * 8]), 2**60),
        (tensor(2, of=RATE),),
        (
            "E-VRANGE: mix: the charge needs 65 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "an-unknown-order": (
        NeuronParallel(4, M, A, 1, 0.5, "sufix"),
        (tensor(2, of=RATE),),
        "type: neuron_parallel: there is no order 'sufix' | did you mean 'suffix'?",
    ),
    "a-parallel-neuron-of-no-steps": (
        NeuronParallel(0, M, A, 1, 0.5),
        (tensor(2, of=RATE),),
        "type: neuron_parallel: a train has one or more frames, not 0",
    ),
    "a-parallel-neuron-beyond-64-bits": (
        NeuronParallel(4, Array.of([2**60]), A, 2, 0.5),
        (tensor(2, of=RATE),),
        (
            "E-VRANGE: neuron_parallel: mul * z + add needs 65 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "a-parallel-neuron-without-threshold": (
        NeuronParallel(4, M, A, 0, 0.5),
        (tensor(2, of=RATE),),
        "type: neuron_parallel: div = 0 is not positive",
    ),
    "a-matrix-of-other-frames": (
        NeuronMatrix(Array.of([[1, 1]]), M, M, M, A, 1, 0.5),
        (tensor(2, of=RATE),),
        "type: neuron_matrix: matrix [1, 2] of int64 is not integers [1, 8]",
    ),
    "a-matrix-of-floats": (
        NeuronMatrix(Array.of([[0.5] * 8]), M, M, M, A, 1, 0.5),
        (tensor(2, of=RATE),),
        "type: neuron_matrix: matrix [1, 8] of float64 is not integers [1, 8]",
    ),
    "other-shifts-than-rows": (
        NeuronMatrix(EACH, M, Array.of([1, 1]), M, A, 1, 0.5),
        (tensor(2, of=RATE),),
        "type: neuron_matrix: shift [2] of int64 is not integers [1]",
    ),
    "a-row-over-nothing": (
        NeuronMatrix(EACH, A, M, M, A, 1, 0.5),
        (tensor(2, of=RATE),),
        "type: neuron_matrix: rows = 0 is not positive",
    ),
    "a-charge-beyond-64-bits": (
        NeuronMatrix(Array.of([[2**62] * 4 + [-(2**62)] * 4]), M, M, M, A, 1, 0.5),
        (tensor(2, of=RATE),),
        (
            "E-VRANGE: neuron_matrix: the charge of a step needs 67 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "a-threshold-beyond-64-bits": (
        NeuronMatrix(EACH, Array.of([2**40]), M, M, A, 2**40, 0.5),
        (tensor(2, of=RATE),),
        (
            "E-VRANGE: neuron_matrix: the threshold of a step needs 82 bits in channel 0, and registers have 64 "
            "| fewer bits for activations or weights, or propagate-scales{join=rescale}"
        ),
    ),
    "qcfs-of-integers": (
        Qcfs(4, Array.of([1.0])),
        (tensor(2, of=INT),),
        (
            "type: qcfs: works on reals, not int[-9, 9] * 0.5 "
            "| it makes steps of its own: leave out the quantize before it"
        ),
    ),
    "qcfs-of-no-levels": (
        Qcfs(0, Array.of([1.0])),
        (VECTOR,),
        "type: qcfs: levels = 0 | give 1 to 65536 levels",
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
    "floats-of-full-shape": (
        Scaling(Array.of([[1.0], [2.0]])),
        (tensor(2, 1),),
        "type: scale: constants of shape [2, 1] are not [1] or [2]",
    ),
    "integers-of-another-full-shape": (
        Scaling(Array.of([[1, 2], [3, 4]])),
        (tensor(2, 1, of=INT),),
        "type: scale: constants of shape [2, 2] are not [1] or [2]",
    ),
    "a-target-scale-of-full-shape": (
        Scaling(M, Array.of([[1.0], [2.0]])),
        (tensor(2, 1, of=INT),),
        "type: scale: constants of shape [2, 1] are not [1] or [2]",
    ),
    "edges-of-another-rank": (
        Pad((1, 1), edge=True),
        (IMAGE,),
        "type: pad: [2, 5, 5] takes 6 pads >= 0, not [1, 1]",
    ),
    **{
        f"the-maximum-of-{name}": (
            MaxPool((2, 2), (2, 2)),
            (tensor(2, 5, 5, of=encoding),),
            (
                f"E-MAXPOOL: max_pool: {encoding} trains are not nested, so the maximum of trains is not the train of "
                "the maximum | add lower-max-pool before derive-thresholds, or pool the integrated values"
            ),
        )
        for name, encoding in {
            "bits": BITS,
            "rates": RATE,
            "currents-of-bits": Current(4, "bits", -90, 80, -6, 6, HALF),
            "currents-of-rates": Current(4, "rate", -20, 24, -5, 6, HALF),
        }.items()
    },
    "a-maximum-of-features": (
        MaxPool((2, 2), (2, 2)),
        (VECTOR,),
        "type: max_pool: needs [C, H, W], not [2]",
    ),
    "a-maximum-of-stride-zero": (
        MaxPool((2, 2), (2, 0)),
        (IMAGE,),
        "type: max_pool: kernel, stride and dilation are positive, padding is not negative",
    ),
    "a-maximum-over-a-negative-pad": (
        MaxPool((2, 2), (2, 2), (0, 0, -1, 0)),
        (IMAGE,),
        "type: max_pool: kernel, stride and dilation are positive, padding is not negative",
    ),
    "a-maximum-that-does-not-fit": (
        MaxPool((3, 2), (1, 1), dilation=(3, 1)),
        (IMAGE,),
        "type: max_pool: a window of 3x2 does not fit 5x5",
    ),
    "a-maximum-over-padding-only": (
        MaxPool((2, 2), (1, 1), (0, 0, 2, 0)),
        (IMAGE,),
        "type: max_pool: padding [0, 0, 2, 0] leaves a window without a value | pad less",
    ),
    "dilated-taps-that-jump-over-the-image": (
        MaxPool((2, 1), (1, 1), (1, 1, 0, 0), (2, 1)),
        (tensor(1, 1, 3),),
        "type: max_pool: padding [1, 1, 0, 0] leaves a window without a value | pad less",
    ),
    "concat-of-bits-and-rates": (
        Concat(),
        (tensor(2, of=BITS), tensor(2, of=RATE)),
        (
            "type: concat: trains of codes bits and rate cannot meet: their frames weigh differently "
            "| convert both branches to the same neuron"
        ),
    ),
    "concat-of-bits-of-unequal-length": (
        Concat(),
        (tensor(2, of=BITS), tensor(2, of=Spikes(4, "bits", 0, 15, HALF))),
        "type: concat: trains of 4 and 8 frames cannot meet | give both branches the same number of bits or steps",
    ),
    "concat-of-rates-of-unequal-length": (
        Concat(),
        (tensor(2, of=RATE), tensor(2, of=Spikes(4, "suffix", 0, 4, HALF))),
        "type: concat: trains of 4 and 8 frames cannot meet | give both branches the same number of bits or steps",
    ),
    "concat-of-integers-with-trains": (
        Concat(),
        (tensor(2, of=INT), tensor(2, of=BITS)),
        (
            "type: concat: operands are int[-9, 9] * 0.5 and spikes[8, bits, 0..255] * 0.5 "
            "| bring both branches to one stage: real, integer or spikes"
        ),
    ),
    "concat-of-other-sizes": (
        Concat(1),
        (IMAGE, tensor(3, 5, 5)),
        "type: concat: operands of shapes [2, 5, 5] and [3, 5, 5] differ beyond axis 1",
    ),
    "concat-of-other-ranks": (
        Concat(),
        (VECTOR, IMAGE),
        "type: concat: operands of shapes [2] and [2, 5, 5] differ beyond axis 0",
    ),
    "concat-along-no-axis": (Concat(1), (VECTOR, VECTOR), "type: concat: [2] has no axis 1"),
    "concat-along-the-batch": (Concat(-1), (VECTOR, VECTOR), "type: concat: [2] has no axis -1"),
    "concat-of-one": (Concat(), (VECTOR,), "type: concat takes two or more operands, not 1"),
    "concat-in-space-of-unequal-scales": (
        Concat(1),
        (tensor(2, 1, of=INT), tensor(2, 1, of=Int(0, 1, Scale.of(0.25)))),
        (
            "E-RESID-SCALE: concat: operands of scales 0.5 and 0.25 cannot meet "
            "| propagate-scales{join=wide} or {join=rescale} makes them meet"
        ),
    ),
    "a-reshape-to-other-elements": (
        Reshape((3, 4)),
        (tensor(2, 5),),
        "type: reshape: [2, 5] has 10 elements, and [3, 4] asks for others",
    ),
    "a-reshape-to-nothing": (Reshape(()), (tensor(1),), "type: reshape: [1] has 1 elements, and [] asks for others"),
    "a-reshape-with-two-signs": (
        Reshape((-1, -2)),
        (VECTOR,),
        "type: reshape: [2] has 2 elements, and [-1, -2] asks for others",
    ),
    "a-reshape-that-mixes-scales": (
        Reshape((3, 2)),
        (tensor(2, 3, of=UNEQUAL),),
        (
            f"E-SCALE: reshape: channel 1 of the result mixes channels of unequal scales {UNEQUAL.scale} "
            "| use one constant for all channels that mix, or move elements before they are multiplied"
        ),
    ),
    "a-permutation-that-mixes-scales": (
        Permute((1, 0)),
        (tensor(2, 3, of=UNEQUAL),),
        (
            f"E-SCALE: permute: channel 0 of the result mixes channels of unequal scales {UNEQUAL.scale} "
            "| use one constant for all channels that mix, or move elements before they are multiplied"
        ),
    ),
    "no-permutation": (
        Permute((0, 0, 1)),
        (IMAGE,),
        "type: permute: [0, 0, 1] is no order of the dimensions of [2, 5, 5]",
    ),
    "an-order-of-the-batch": (
        Permute((1, 2, 3)),
        (IMAGE,),
        "type: permute: [1, 2, 3] is no order of the dimensions of [2, 5, 5]",
    ),
    "an-upsampling-of-features": (
        Upsample((2, 2)),
        (VECTOR,),
        "type: upsample: needs [C, H, W] and positive factors, not [2] and [2, 2]",
    ),
    "an-upsampling-to-nothing": (
        Upsample((2, 0)),
        (IMAGE,),
        "type: upsample: needs [C, H, W] and positive factors, not [2, 5, 5] and [2, 0]",
    ),
    "a-shift-of-integers": (
        Shift(C),
        (tensor(2, of=INT),),
        "type: shift: a constant cannot ride on int[-9, 9] * 0.5 | propagate-scales puts it into the requant",
    ),
    "a-shift-of-a-train": (
        Shift(C),
        (tensor(2, of=BITS),),
        (
            "type: shift: a constant cannot ride on spikes[8, bits, 0..255] * 0.5 "
            "| propagate-scales puts it into the requant"
        ),
    ),
    "an-offset-of-other-channels": (
        Shift(Array.of([1.0, 2.0, 3.0])),
        (VECTOR,),
        "type: shift: an offset of shape [3] is not [1], [2] or [2]",
    ),
    "an-offset-of-another-full-shape": (
        Shift(Array.of([[1.0, 2.0]])),
        (tensor(2, 1),),
        "type: shift: an offset of shape [1, 2] is not [1], [2] or [2, 1]",
    ),
    **{
        f"{op.name}-of-{name}": (
            op,
            tuple(tensor(2, 1, 1, of=of) for _ in range(op.operands or 1)),
            (
                f"type: {op.name}: is computed by the host, on reals, not on {of} "
                "| leave it before the first encoder, or behind the readout"
            ),
        )
        for op in (Sigmoid(), Tanh(), Softmax(), Product(), ConvTranspose2d(Array.of(np.ones((2, 1, 1, 1)))))
        for name, of in {"integers": INT, "trains": BITS}.items()
    },
    "a-product-of-a-real-and-an-integer": (
        Product(),
        (VECTOR, tensor(2, of=INT)),
        (
            "type: product: is computed by the host, on reals, not on int[-9, 9] * 0.5 "
            "| leave it before the first encoder, or behind the readout"
        ),
    ),
    "a-product-of-other-shapes": (
        Product(),
        (VECTOR, tensor(3)),
        "type: product: operands have shapes [2] and [3]",
    ),
    "a-softmax-along-no-axis": (Softmax(1), (VECTOR,), "type: softmax: [2] has no axis 1"),
    "a-softmax-along-the-batch": (Softmax(-1), (VECTOR,), "type: softmax: [2] has no axis -1"),
    "a-transposed-convolution-of-other-channels": (
        ConvTranspose2d(REALS),
        (IMAGE,),
        "type: conv_transpose2d: weights [4, 2, 3, 3] in 1 groups do not act on [2, 5, 5]",
    ),
    "a-transposed-convolution-of-features": (
        ConvTranspose2d(REALS),
        (tensor(4),),
        "type: conv_transpose2d: weights [4, 2, 3, 3] in 1 groups do not act on [4]",
    ),
    "a-transposed-convolution-in-groups-that-do-not-divide": (
        ConvTranspose2d(REALS, groups=3),
        (tensor(4, 5, 5),),
        "type: conv_transpose2d: weights [4, 2, 3, 3] in 3 groups do not act on [4, 5, 5]",
    ),
    "a-transposed-convolution-in-no-groups": (
        ConvTranspose2d(REALS, groups=0),
        (tensor(4, 5, 5),),
        "type: conv_transpose2d: weights [4, 2, 3, 3] in 0 groups do not act on [4, 5, 5]",
    ),
    "a-transposed-convolution-that-leaves-nothing": (
        ConvTranspose2d(REALS, padding=(2, 1, 0, 0)),
        (tensor(4, 1, 1),),
        "type: conv_transpose2d: leaves 0x3 of 1x1",
    ),
    "a-transposed-bias-of-other-channels": (
        ConvTranspose2d(REALS, Array.of([1.0])),
        (tensor(4, 5, 5),),
        "type: conv_transpose2d: bias has shape [1], not [2]",
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
