"""Range analysis: no input leaves the proved ranges of value, frame and prefix, and a layer's bound is attained."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Value, infer
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
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
from spir.ranges import Ranges, analyse
from spir.types import Encoding, Int, Interval, Real, Scale, Spikes, Tensor

ONE = Scale.of(1)
SAMPLES = 5
Frames = np.ndarray  # [T, N, *shape] of Python integers; T = 1 without frames


# an oracle in Python integers


def rounded_clip(op: Any, z: np.ndarray, lo: int, hi: int) -> np.ndarray:
    out = np.empty(z.shape, dtype=object)
    for at in np.ndindex(*z.shape):
        mul, add = (c.values[(at[1:] if c.values.ndim > 1 else at[1] % len(c.values))].item() for c in (op.mul, op.add))
        out[at] = min(max(math.floor(Fraction(mul * z[at] + add, op.div)), lo), hi)
    return out


def encoded(values: np.ndarray, steps: int, *, signed: bool) -> Frames:
    out = np.empty((steps, *values.shape), dtype=object)
    for at in np.ndindex(*values.shape):
        digits = [int(digit) for digit in f"{values[at] % 2**steps:0{steps}b}"]
        out[(slice(None), *at)] = [-digits[0] if signed else digits[0], *digits[1:]]
    return out


def factors(tensor: Tensor) -> list[int]:
    train = tensor.train
    return [2 ** (train.steps - 1 - t) if train.code == "bits" else 1 for t in range(train.steps)] if train else [1]


def total(tensor: Tensor, frames: Frames) -> np.ndarray:
    return sum(w * f for w, f in zip(factors(tensor), frames, strict=True))


def convolved(op: Conv2d, x: np.ndarray) -> np.ndarray:
    weight, (top, bottom, left, right) = op.weight.values, op.padding
    outputs, inputs, kh, kw = weight.shape
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    height = (x.shape[2] - op.dilation[0] * (kh - 1) - 1) // op.stride[0] + 1
    width = (x.shape[3] - op.dilation[1] * (kw - 1) - 1) // op.stride[1] + 1
    out = np.zeros((len(x), outputs, height, width), dtype=object)
    for o, p, q in product(range(outputs), range(height), range(width)):
        first = o // (outputs // op.groups) * inputs
        for i, u, v in product(range(inputs), range(kh), range(kw)):
            row, column = p * op.stride[0] + u * op.dilation[0], q * op.stride[1] + v * op.dilation[1]
            out[:, o, p, q] += weight[o, i, u, v].item() * x[:, first + i, row, column]
    return out


def pooled(op: AvgPool, x: np.ndarray) -> np.ndarray:
    ones = Array.of(np.ones((x.shape[1], 1, *op.kernel), dtype=int))
    return convolved(Conv2d(ones, stride=op.stride, padding=op.padding, groups=x.shape[1]), x)


def scaled(op: Scaling, x: np.ndarray) -> np.ndarray:
    return x * op.factor.values.astype(object).reshape(-1, *[1] * (x.ndim - 2))


LINEAR: dict[type[Op], Callable[..., np.ndarray]] = {
    Conv2d: convolved,
    AvgPool: pooled,
    Scaling: scaled,
    Linear: lambda op, x: np.array(
        [[sum(row * v) for row in op.weight.values.astype(object)] for v in x], dtype=object
    ),
    Add: lambda _, *x: sum(x),
    Pad: lambda op, x: np.pad(x, ((0, 0), *zip(op.pads[::2], op.pads[1::2], strict=True))),
    Slice: lambda op, x: x[(slice(None), *(slice(*ends) for ends in zip(op.start, op.stop, op.step, strict=True)))],
    Flatten: lambda _, x: x.reshape(len(x), -1),
    GlobalAvgPool: lambda op, x: x.sum(axis=(2, 3), keepdims=op.keepdim),
}


def meaning(op: Any, types: tuple[Tensor, ...], *frames: Frames) -> Frames:
    if type(op) in LINEAR:
        return np.stack([LINEAR[type(op)](op, *x) for x in zip(*frames, strict=True)])
    z = total(types[0], frames[0])
    if isinstance(op, Relu):
        return np.maximum(z, 0)[None]
    if isinstance(op, Requant):
        return rounded_clip(op, z, op.lo, op.hi)[None]
    if isinstance(op, Encode):
        return encoded(z, op.steps, signed=types[0].range.hull[0] < 0)
    if isinstance(op, NeuronStem):
        low = -(2 ** (op.bits - 1)) if op.signed else 0
        return encoded(rounded_clip(op, z, low, low + 2**op.bits - 1), op.bits, signed=op.signed)
    assert isinstance(op, Integrate)
    bias = op.bias.values.astype(object) if op.bias else np.zeros(1, dtype=object)
    return (z + (bias if bias.ndim > 1 else bias.reshape(-1, *[1] * (z.ndim - 2))))[None]


def inputs(tensor: Tensor, rng: random.Random) -> Frames:
    """All at the lowest value, all at the highest, both in turn, random."""
    lo, hi = tensor.range.hull
    draws = [lambda _: lo, lambda _: hi, lambda i: (lo, hi)[i % 2]]
    draws += [lambda _: rng.randint(lo, hi)] * (SAMPLES - len(draws))
    values = np.array([[draw(i) for i in range(tensor.size)] for draw in draws], dtype=object)
    values = values.reshape(SAMPLES, *tensor.shape)
    train = tensor.train
    if train is None:
        return values[None]
    if train.code == "bits":
        return encoded(values, train.steps, signed=lo < 0)
    out = np.empty((train.steps, *values.shape), dtype=object)
    for at in np.ndindex(*values.shape):
        spikes = [int(math.copysign(1, values[at]))] * abs(values[at])
        pairs = (train.steps - len(spikes)) // 2 if lo < 0 and train.code == "rate" else 0
        spikes += [1, -1] * rng.randint(0, pairs)
        spikes += [0] * (train.steps - len(spikes))
        rng.shuffle(spikes)
        out[(slice(None), *at)] = spikes
    return out


# random networks of integers and trains


@attrs.frozen
class Dice:
    rng: random.Random

    def weights(self, *shape: int) -> Array:
        weight = np.random.default_rng(self.rng.randrange(2**32)).integers(-9, 10, shape)
        if self.rng.random() < 0.2:
            weight[self.rng.randrange(shape[0])] = 0  # a dead channel
        return Array.of(weight)

    def whole(self, lo: int, hi: int, size: int) -> Any:
        return tuple(self.rng.randint(lo, hi) for _ in range(size))

    def conv2d(self, x: Tensor) -> Op:
        groups = self.rng.choice([1, x.shape[0]])
        kernel = [min(k, d) for k, d in zip(self.whole(1, 3, 2), x.shape[1:], strict=True)]
        weight = self.weights(groups * self.rng.randint(1, 2), x.shape[0] // groups, *kernel)
        padding = self.whole(0, 1, 4) if self.rng.random() < 0.6 else (0,) * 4
        return Conv2d(weight, Array.of([1.0]), None, self.whole(1, 2, 2), padding, (1, self.rng.randint(1, 2)), groups)

    def linear(self, x: Tensor) -> Op:
        return Linear(self.weights(self.rng.randint(1, 3), x.shape[0]), Array.of([1.0]))

    def avg_pool(self, x: Tensor) -> Op:
        return AvgPool(self.whole(1, 2, 2), self.whole(1, 2, 2), self.whole(0, 1, 4))

    def global_avg_pool(self, x: Tensor) -> Op:
        return GlobalAvgPool(x.shape[1] * x.shape[2], self.rng.random() < 0.5)

    def pad(self, x: Tensor) -> Op:
        return Pad(self.whole(0, 1, 2 * len(x.shape)))

    def slice(self, x: Tensor) -> Op:
        start = tuple(self.rng.randrange(d) for d in x.shape)
        return Slice(start, x.shape, self.whole(1, 2, len(x.shape)))

    def scale(self, x: Tensor) -> Op:
        return Scaling(self.weights(self.rng.choice([1, x.shape[0]])))

    def add(self, x: Tensor) -> Op:
        return Add()

    def flatten(self, x: Tensor) -> Op:
        return Flatten()

    def relu(self, x: Tensor) -> Op:
        return Relu()

    def integrate(self, x: Tensor) -> Op:
        return Integrate(
            self.weights(*self.rng.choice([(1,), x.shape[:1], x.shape])) if self.rng.random() < 0.7 else None
        )

    def triple(self, x: Tensor) -> tuple[Array, Array, int]:
        mul, add = (self.weights(*self.rng.choice([(1,), x.shape[:1], x.shape])) for _ in range(2))
        return mul, add, self.rng.randint(1, 40)

    def requant(self, x: Tensor) -> Op:
        return Requant(*self.triple(x), *self.rng.choice([(0, 15), (-8, 7), (-5, -2), (3, 90)]), 1.0)

    def encode(self, x: Tensor) -> Op:
        lo, hi = x.range.hull
        return Encode(max(-lo - 1, hi, 1).bit_length() + (lo < 0) + self.rng.randint(0, 1))

    def neuron_stem(self, x: Tensor) -> Op:
        return NeuronStem(self.rng.randint(1, 5), *self.triple(x), 1.0, self.rng.random() < 0.5)


ALWAYS = ("pad", "slice", "scale", "flatten", "add", "add", "integrate")
ON_IMAGES = ("conv2d", "conv2d", "avg_pool", "global_avg_pool")
ENCODINGS: tuple[Encoding, ...] = (
    Int(-128, 127, ONE),
    Int(3, 9, ONE),
    Int(-9, -4, ONE),
    Spikes(8, "bits", 0, 255, ONE),
    Spikes(4, "bits", -8, 7, ONE),
    Spikes(5, "bits", -3, 2, ONE),
    Spikes(5, "bits", 2, 9, ONE),
    Spikes(4, "rate", -4, 4, ONE),
    Spikes(6, "rate", -2, 3, ONE),
    Spikes(4, "sorted", 0, 4, ONE),
)


def network(dice: Dice, length: int) -> Module:
    shape = dice.rng.choice([(2, 4, 3), (3, 3, 3), (1, 4, 4), (4,)])
    module = Module(Value("v0", Tensor(shape, dice.rng.choice(ENCODINGS))), (), "v0")
    for index in range(1, 3 * length):
        x = module.types[module.output]
        if len(module.nodes) == length or x.size > 100:
            break
        more = ON_IMAGES if len(x.shape) == 3 else ("linear",) * 3 if len(x.shape) == 1 else ()
        own = ("relu", "requant", "encode", "encode") if x.train is None else ("neuron_stem",) * 2
        op = getattr(dice, dice.rng.choice((*ALWAYS, *more, *own)))(x)
        operands = [module.output]
        if isinstance(op, Add):
            operands.append(dice.rng.choice([name for name, t in module.types.items() if t.shape == x.shape]))
        try:
            result = infer(op, tuple(module.types[o] for o in operands))
        except SpirError:
            continue  # such as a neuron on counts, or scales that do not meet
        module = Module(module.input, (*module.nodes, Node(f"v{index}", op, tuple(operands), result)), f"v{index}")
    return module


def inside(interval: Interval, found: np.ndarray) -> bool:
    """Whether integers ``[N, C, ...]`` lie in the bounds of their channels."""
    bounds = interval.broadcast(found.shape[1])
    axes = (0, *range(2, found.ndim))
    return bool((bounds.lo <= found.min(axis=axes)).all() and (found.max(axis=axes) <= bounds.hi).all())


def hulls(interval: Interval, lo: int, hi: int) -> bool:
    return lo <= interval.hull[0] <= interval.hull[1] <= hi


@settings(max_examples=300)
@given(st.sampled_from(range(1, 7)), st.integers(0, 2**40))
def test_no_input_leaves_the_ranges_of_value_frame_and_prefix(length, seed):
    dice = Dice(random.Random(seed))
    module = network(dice, length)
    event(f"{len(module.nodes)} ops")
    proved = analyse(module)
    assert proved.keys() == module.types.keys()
    stored = {module.input.name: inputs(module.input.type, dice.rng)}
    for node in module.nodes:
        types = module.operand_types(node)
        stored[node.result] = meaning(node.op, types, *(stored[o] for o in node.operands))
        reference = node.op.reference(
            types,
            *(
                (stored[o] if t.train else stored[o][0]).astype(np.int64)
                for o, t in zip(node.operands, types, strict=True)
            ),
        )
        assert (reference == (stored[node.result] if node.type.train else stored[node.result][0])).all()
        event(str(node.op.name))
    for name, frames in stored.items():
        tensor, ranges = module.types[name], proved[name]
        weighted = [w * f for w, f in zip(factors(tensor), frames, strict=True)]
        assert inside(ranges.value, total(tensor, frames))
        assert hulls(ranges.value, *tensor.range.hull)
        for t, frame in enumerate(frames):
            assert inside(ranges.frame if tensor.train else ranges.value, frame)
            assert inside(ranges.prefix, sum(weighted[: t + 1]))


# a bound is attained


def extremes(weight: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> tuple[int, int]:
    """The sums at the two witnesses: hi where the weight is positive and lo elsewhere, and the other way round."""
    w = weight.astype(object)
    return int((w * np.where(w > 0, lo, hi)).sum()), int((w * np.where(w > 0, hi, lo)).sum())


@given(st.integers(0, 2**40), st.integers(1, 6), st.integers(1, 4), st.sampled_from([9, 2**20, 2**58]))
def test_the_bound_of_a_linear_layer_is_attained_by_its_witness(seed, fan_in, outputs, reach):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-reach, reach, (outputs, fan_in), endpoint=True)
    ends = np.sort(rng.integers(-9, 10, (2, fan_in)), axis=0).astype(object)
    bounds = Linear(Array.of(weight), Array.of([1.0])).bounds(((fan_in,),), Interval.of(ends[0], ends[1]))
    for o in range(outputs):
        assert (bounds.lo[o], bounds.hi[o]) == extremes(weight[o], ends[0], ends[1])


@given(st.integers(0, 2**40), st.sampled_from([1, 2]), st.sampled_from([9, 2**58]))
def test_the_bound_of_a_convolution_is_attained_by_its_witness(seed, groups, reach):
    rng = np.random.default_rng(seed)
    weight = rng.integers(-reach, reach, (4, 4 // groups, 2, 3), endpoint=True)
    ends = np.sort(rng.integers(-9, 10, (2, 4)), axis=0).astype(object)
    op = Conv2d(Array.of(weight), Array.of([1.0]), groups=groups)
    bounds = op.bounds(((4, 2, 3),), Interval.of(ends[0], ends[1]))
    for o in range(4):
        own = slice(o // (4 // groups) * (4 // groups), None)
        lo, hi = (end[own][: 4 // groups].reshape(-1, 1, 1) for end in ends)
        assert (bounds.lo[o], bounds.hi[o]) == extremes(weight[o], lo, hi)


def test_a_window_over_padding_has_fewer_taps():
    op = Conv2d(Array.of([[[[2, -1]]]]), Array.of([1.0]), padding=(0, 0, 0, 1))
    found = [o.bounds(((1, 1, 2),), Interval.of(4, 9)).hull for o in (op, attrs.evolve(op, padding=(0,) * 4))]
    assert found == [(-1, 18), (-1, 14)]


@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if isinstance(e, Spikes)], ids=str)
def test_the_prefix_of_a_train_may_lie_outside_its_values(encoding):
    ranges: Ranges = analyse(Module(Value("x", Tensor((1,), encoding)), (), "x"))["x"]
    assert ranges.value.hull == (encoding.lo, encoding.hi)
    assert ranges.frame.hull == (-1 if encoding.lo < 0 else 0, 1)
    if encoding.code == "bits":
        assert ranges.prefix.hull == (-(2 ** (encoding.steps - 1)) if encoding.lo < 0 else 0, encoding.hi)


def test_reals_have_no_ranges():
    x, q = Tensor((1,), Real()), Tensor((1,), Int(0, 3, Scale.of(0.5)))
    nodes = (
        Node("r", Relu(), ("x",), x),
        Node("q", Quantize(0.5, 0, 3), ("r",), q),
        Node("d", Dequantize(), ("q",), x),
    )
    found = analyse(Module(Value("x", x), nodes, "d"))
    assert {name: ranges.value.hull for name, ranges in found.items()} == {"q": (0, 3)}
