"""Range analysis: no input leaves the proved ranges of value, frame and prefix, and a layer's bound is attained."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from spir import interpreter
from spir.conformance.examples import module_of
from spir.conformance.strategies import bounded, modules
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Value, infer
from spir.ops._thinning import READINGS
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.ops.upsample import Upsample
from spir.ranges import Ranges, analyse, witness
from spir.types import Current, Encoding, Int, Interval, Real, Scale, Shape, Spikes, Tensor
from tests.unit.test_ops import thinned

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
    factor = op.factor.values.astype(object)
    return x * (factor if factor.ndim > 1 else factor.reshape(-1, *[1] * (x.ndim - 2)))


def largest(op: MaxPool, x: np.ndarray) -> np.ndarray:
    """Of one window at a time, over the elements inside the image."""
    (top, bottom, left, right), (rows, columns) = op.padding, x.shape[2:]
    height = (rows + top + bottom - op.kernel[0]) // op.stride[0] + 1
    width = (columns + left + right - op.kernel[1]) // op.stride[1] + 1
    out = np.empty((*x.shape[:2], height, width), dtype=object)
    for p, q in np.ndindex(height, width):
        r, c = p * op.stride[0] - top, q * op.stride[1] - left
        seen = x[:, :, max(r, 0) : r + op.kernel[0], max(c, 0) : c + op.kernel[1]]
        out[:, :, p, q] = seen.max(axis=(2, 3))
    return out


LINEAR: dict[type[Op], Callable[..., np.ndarray]] = {
    Conv2d: convolved,
    AvgPool: pooled,
    Scaling: scaled,
    Linear: lambda op, x: np.array(
        [[sum(row * v) for row in op.weight.values.astype(object)] for v in x], dtype=object
    ),
    Add: lambda _, *x: sum(x),
    Pad: lambda op, x: np.pad(
        x, ((0, 0), *zip(op.pads[::2], op.pads[1::2], strict=True)), mode="edge" if op.edge else "constant"
    ),
    Concat: lambda op, *x: np.concatenate(x, axis=op.axis + 1),
    Reshape: lambda op, x: x.reshape(len(x), *op.to),
    Permute: lambda op, x: np.moveaxis(x, [d + 1 for d in op.order], range(1, x.ndim)),
    Upsample: lambda op, x: np.kron(x, np.ones((1, 1, *op.factor), dtype=object)),
    MaxPool: largest,
    Slice: lambda op, x: x[(slice(None), *(slice(*ends) for ends in zip(op.start, op.stop, op.step, strict=True)))],
    Flatten: lambda _, x: x.reshape(len(x), -1),
    GlobalAvgPool: lambda op, x: x.sum(axis=(2, 3), keepdims=op.keepdim),
}


def thin(op: Any, codes: np.ndarray, bits: int, *, signed: bool) -> np.ndarray:
    """Codes after RoT and DRLO, one by one."""
    found = [thinned(op, int(code), bits, signed=signed) for code in codes.ravel()]
    return np.array(found, dtype=object).reshape(codes.shape)


def meaning(op: Any, types: tuple[Tensor, ...], *frames: Frames) -> Frames:
    if type(op) in LINEAR:
        return np.stack([LINEAR[type(op)](op, *x) for x in zip(*frames, strict=True)])
    z = total(types[0], frames[0])
    if isinstance(op, Relu):
        return np.maximum(z, 0)[None]
    if isinstance(op, Requant):
        return rounded_clip(op, z, op.lo, op.hi)[None]
    if isinstance(op, Encode):
        signed = types[0].range.hull[0] < 0
        return encoded(thin(op, z, op.steps, signed=signed), op.steps, signed=signed)
    if isinstance(op, NeuronStem):
        low = -(2 ** (op.bits - 1)) if op.signed else 0
        codes = rounded_clip(op, z, low, low + 2**op.bits - 1)
        return encoded(thin(op, codes, op.bits, signed=op.signed), op.bits, signed=op.signed)
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

    def max_pool(self, x: Tensor) -> Op:
        kernel = self.whole(1, 2, 2)
        return MaxPool(kernel, self.whole(1, 2, 2), tuple(self.rng.randrange(k) for k in kernel for _ in range(2)))  # type: ignore[arg-type]

    def avg_pool(self, x: Tensor) -> Op:
        return AvgPool(self.whole(1, 2, 2), self.whole(1, 2, 2), self.whole(0, 1, 4))

    def global_avg_pool(self, x: Tensor) -> Op:
        return GlobalAvgPool(x.shape[1] * x.shape[2], self.rng.random() < 0.5)

    def pad(self, x: Tensor) -> Op:
        return Pad(self.whole(0, 1, 2 * len(x.shape)), self.rng.random() < 0.4)

    def permute(self, x: Tensor) -> Op:
        return Permute(tuple(self.rng.sample(range(len(x.shape)), len(x.shape))))

    def reshape(self, x: Tensor) -> Op:
        first = self.rng.choice([d for d in range(1, x.size + 1) if x.size % d == 0])
        return Reshape(self.rng.choice([(first, x.size // first), (first, 1, x.size // first)]))

    def upsample(self, x: Tensor) -> Op:
        return Upsample(self.whole(1, 2, 2))

    def concat(self, x: Tensor) -> Op:
        return Concat(self.rng.randrange(len(x.shape)))

    def slice(self, x: Tensor) -> Op:
        start = tuple(self.rng.randrange(d) for d in x.shape)
        return Slice(start, x.shape, self.whole(1, 2, len(x.shape)))

    def scale(self, x: Tensor) -> Op:
        return Scaling(self.weights(*self.rng.choice([(1,), x.shape[:1], x.shape])))

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
        return self.thinner(Encode(max(-lo - 1, hi, 1).bit_length() + (lo < 0) + self.rng.randint(0, 1)))

    def neuron_stem(self, x: Tensor) -> Op:
        signed = self.rng.random() < 0.5
        return self.thinner(NeuronStem(self.rng.randint(1, 5), *self.triple(x), 1.0, signed))

    def thinner(self, op: Any) -> Op:
        """With fewer spikes now and then."""
        bits = op.bits if isinstance(op, NeuronStem) else op.steps
        if self.rng.random() < 0.7:
            return op
        rot, drlo = self.rng.randrange(min(bits, 4)), self.rng.randrange(bits)
        return attrs.evolve(op, rot=rot, drlo=drlo, drlo_mode=self.rng.choice(READINGS))


ALWAYS = ("pad", "slice", "scale", "flatten", "permute", "reshape", "concat", "add", "add", "integrate")
ON_IMAGES = ("conv2d", "conv2d", "conv2d", "avg_pool", "global_avg_pool", "max_pool", "upsample")
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
    Spikes(4, "suffix", 0, 4, ONE),
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
        if isinstance(op, (Add, Concat)):
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


# a bound is attained, and is the exact maximum: maps as plain lists of weights, summed in Python's integers

Place = tuple[int, tuple[int, ...]]  # which operand, which element
Sums = dict[tuple[int, ...], dict[Place, int]]


def every(shape: Shape) -> Iterator[tuple[int, ...]]:
    return product(*map(range, shape))


def windows(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Callable[..., Any]:
    """For a position the taps (tap, row and column before padding is taken off)."""
    taps = [*product(range(kernel[0]), range(kernel[1]))]
    return lambda p, q: [((u, v), p * stride[0] + u * dilation[0], q * stride[1] + v * dilation[1]) for u, v in taps]


def sums(op: Any, shapes: tuple[Shape, ...]) -> Sums:  # noqa: C901 - one case a map
    """The weight of every operand element in every result element."""
    found: Sums = {at: {} for at in every(op.shape(*shapes))}
    (shape, *_), in_order = shapes, {}
    if isinstance(op, (Flatten, Reshape)):
        in_order = dict(zip(found, every(shape), strict=True))
    for at, row in found.items():
        match op:
            case Conv2d():
                outputs, inputs, *kernel = op.weight.values.shape
                first = at[0] // (outputs // op.groups) * inputs
                for tap, r, c in windows(kernel, op.stride, op.dilation)(*at[1:]):
                    y, x = r - op.padding[0], c - op.padding[2]
                    for i in range(inputs) if 0 <= y < shape[1] and 0 <= x < shape[2] else ():
                        row[0, (first + i, y, x)] = int(op.weight.values[(at[0], i, *tap)])
            case AvgPool():
                for _, r, c in windows(op.kernel, op.stride, (1, 1))(*at[1:]):
                    y, x = r - op.padding[0], c - op.padding[2]
                    if 0 <= y < shape[1] and 0 <= x < shape[2]:
                        row[0, (at[0], y, x)] = 1
            case GlobalAvgPool():
                row.update({(0, (at[0], y, x)): 1 for y, x in every(shape[1:])})
            case Linear():
                row.update({(0, (i,)): int(op.weight.values[at[0], i]) for i in range(shape[0])})
            case Add():
                row.update({(k, at): 1 for k in range(len(shapes))})
            case Concat():
                place, k = at[op.axis], 0
                while place >= shapes[k][op.axis]:
                    place, k = place - shapes[k][op.axis], k + 1
                row[k, (*at[: op.axis], place, *at[op.axis + 1 :])] = 1
            case Scaling():
                factor = op.multiplier
                row[0, at] = int(factor[at] if factor.ndim > 1 else factor[at[0] % len(factor)])
            case Pad():
                source = tuple(i - before for i, before in zip(at, op.pads[::2], strict=True))
                nearest = tuple(min(max(i, 0), size - 1) for i, size in zip(source, shape, strict=True))
                if op.edge or nearest == source:
                    row[0, nearest] = 1
            case Slice():
                row[0, tuple(a + i * s for i, a, s in zip(at, op.start, op.step, strict=True))] = 1
            case Permute():
                row[0, tuple(at[op.order.index(d)] for d in range(len(shape)))] = 1
            case Upsample():
                row[0, (at[0], at[1] // op.factor[0], at[2] // op.factor[1])] = 1
            case _:
                row[0, in_order[at]] = 1
    return found


def at_channel(interval: Interval, channel: int) -> tuple[int, int]:
    one = len(interval.lo) == 1
    return interval.lo[0 if one else channel], interval.hi[0 if one else channel]


def most(row: dict[Place, int], operands: Sequence[Interval], *, top: bool) -> int:
    """The largest or smallest sum of one result element: every term at its better end."""
    terms = ([w * end for end in at_channel(operands[k], at[0])] for (k, at), w in row.items())
    return sum(map(max if top else min, terms))


def exact_bounds(op: Any, shapes: tuple[Shape, ...], operands: Sequence[Interval]) -> list[tuple[int, int]]:
    """(lowest, highest) of each channel of the result."""
    found: dict[int, list[int]] = {}
    for at, row in sums(op, shapes).items():
        found.setdefault(at[0], []).extend(most(row, operands, top=top) for top in (False, True))
    return [(min(ends), max(ends)) for _, ends in sorted(found.items())]


@attrs.frozen
class Wide(Dice):
    """Maps of every kind, such as kernels larger than the image and windows that see zeros only."""

    def weights(self, *shape: int) -> Array:
        reach = self.rng.choice([1, 9, 9, 2**20, 2**40])
        found = np.random.default_rng(self.rng.randrange(2**32)).integers(-reach, reach, shape, endpoint=True)
        if self.rng.random() < 0.2:
            found[self.rng.randrange(shape[0])] = 0
        return Array.of(found)

    def conv2d(self, x: Tensor) -> Op:
        groups = self.rng.choice([1, x.shape[0]])
        weight = self.weights(groups * self.rng.randint(1, 2), x.shape[0] // groups, *self.whole(1, 4, 2))
        padding = self.whole(0, 3, 4) if self.rng.random() < 0.7 else (0,) * 4
        return Conv2d(weight, Array.of([1.0]), None, self.whole(1, 3, 2), padding, self.whole(1, 2, 2), groups)

    def avg_pool(self, x: Tensor) -> Op:
        padding = self.whole(0, 3, 4) if self.rng.random() < 0.7 else (0,) * 4
        return AvgPool(self.whole(1, 4, 2), self.whole(1, 3, 2), padding)

    def interval(self, channels: int) -> Interval:
        """With 0 or without, one number, far beyond float64, one for all channels or one a channel."""
        ends = []
        for _ in range(self.rng.choice([1, channels, channels])):
            reach = self.rng.choice([3, 9, 9, 2**31, 2**58])
            a, b = self.rng.randint(-reach, reach), self.rng.randint(-reach, reach)
            ends.append(self.rng.choice([(min(a, b), max(a, b)), (a, a), (abs(a), abs(a) + abs(b)), (-abs(a), 0)]))
        return Interval.of((lo for lo, _ in ends), (hi for _, hi in ends))


LINEAR_OPS = (
    *("conv2d",) * 5,
    *("avg_pool",) * 3,
    *("linear",) * 2,
    *("pad", "pad", "scale", "scale", "add", "concat", "concat"),
    *("global_avg_pool", "slice", "flatten", "reshape", "permute", "upsample"),
)


def drawn(name: str, seed: int, *, size: int = 40) -> tuple[Any, tuple[Shape, ...], tuple[Interval, ...]] | None:
    """A map, the shapes of its operands and their ranges; None where the map does not fit."""
    dice = Wide(random.Random(seed))
    shapes: list[Shape] = [(1, 2, 2), (2, 3, 2), (2, 1, 4), (3, 2, 3), (1, 4, 4)]
    if name == "linear" or (name not in ("conv2d", "avg_pool", "global_avg_pool", "upsample") and seed % 3 == 0):
        shapes = [(1,), (2,), (5,)]
    shape = dice.rng.choice([s for s in shapes if math.prod(s) <= size])
    op = getattr(dice, name)(Tensor(shape, Int(0, 1, ONE)))
    both = tuple(shape for _ in range(1 if op.operands == 1 else dice.rng.randint(2, 3)))
    if isinstance(op, Concat):
        both = tuple((*s[: op.axis], dice.rng.randint(1, 2), *s[op.axis + 1 :]) for s in both)
    try:
        op.shape(*both)
    except SpirError:
        return None
    return op, both, tuple(dice.interval(s[0]) for s in both)


@bounded(400)
@given(st.sampled_from(LINEAR_OPS), st.integers(0, 2**32))
def test_the_bounds_of_every_linear_map_are_the_exact_ends_of_each_channel(name, seed):
    if (found := drawn(name, seed)) is None:
        return
    op, shapes, operands = found
    bounds, exact = op.bounds(shapes, *operands), exact_bounds(op, shapes, operands)
    event(f"{name}, {'beyond' if bounds.magnitude >= 2**53 else 'inside'} float64")
    assert len(bounds.lo) in (1, len(exact))
    assert [at_channel(bounds, c) for c in range(len(exact))] == exact


@bounded(300)
@given(st.sampled_from(LINEAR_OPS), st.integers(0, 2**32))
def test_a_witness_within_the_ranges_takes_each_channel_to_each_bound(name, seed):
    if (found := drawn(name, seed)) is None:
        return
    op, shapes, operands = found
    rows, bounds = sums(op, shapes), op.bounds(shapes, *operands)
    for channel, top in product(range(op.shape(*shapes)[0]), (False, True)):
        given_ = witness(op, shapes, operands, channel, top=top)
        assert [x.shape for x in given_] == [*shapes]
        for x, interval in zip(given_, operands, strict=True):
            assert all(int(x[at]) in at_channel(interval, at[0]) for at in every(x.shape))
        reached = [
            sum(w * int(given_[k][source]) for (k, source), w in row.items())
            for at, row in rows.items()
            if at[0] == channel
        ]
        assert (max if top else min)(reached) == at_channel(bounds, channel)[top]


@bounded(120)
@given(st.sampled_from(LINEAR_OPS), st.integers(0, 2**32))
def test_no_corner_of_the_inputs_is_beyond_the_bounds_and_one_is_at_each(name, seed):
    """Every input with each element at one of its ends."""
    if (found := drawn(name, seed, size=6)) is None:
        return
    op, shapes, operands = found
    places = [(k, at) for k, shape in enumerate(shapes) for at in every(shape)]
    rows, bounds = sums(op, shapes), op.bounds(shapes, *operands)
    if len(places) > 6 or len(rows) > 60:
        return
    ends: dict[int, list[int]] = {}
    for corner in product(*(at_channel(operands[k], at[0]) for k, at in places)):
        x = dict(zip(places, corner, strict=True))
        for at, row in rows.items():
            ends.setdefault(at[0], []).append(sum(w * x[place] for place, w in row.items()))
    assert all(at_channel(bounds, c) == (min(values), max(values)) for c, values in ends.items())


TRAINS: tuple[Encoding, ...] = (
    *(e for e in ENCODINGS if isinstance(e, Spikes)),
    Current(4, "bits", -90, 80, -6, 6, ONE),
    Current(4, "direct", 8, 24, 2, 6, ONE),
)


@bounded(150)
@given(st.sampled_from(LINEAR_OPS), st.sampled_from(TRAINS), st.integers(0, 2**32))
def test_the_ranges_of_values_and_frames_behind_a_train_are_exact_and_attained(name, encoding, seed):
    if (found := drawn(name, seed)) is None or len(set(found[1])) > 1:
        return
    op, shapes, _ = found
    source = Tensor(shapes[0], encoding)
    try:
        module = module_of(source, ("y", op, " ".join("x" for _ in shapes)))
    except SpirError:  # sums beyond registers
        return
    before, after = (analyse(module)[v] for v in "xy")
    assert after.frame.hull == (after.first | after.rest).hull
    for kind in ("value", "first", "rest", "prefix"):
        operands = [getattr(before, kind)] * len(shapes)
        bounds, exact = getattr(after, kind), exact_bounds(op, shapes, operands)
        assert [at_channel(bounds, c) for c in range(len(exact))] == exact
        if kind == "prefix":
            continue
        for channel, top in product(range(len(exact)), (False, True)):
            x = witness(op, shapes, operands, channel, top=top)
            reached = op.apply(*(np.asarray(v, dtype=object)[None] for v in x), real=False)[0, [channel]]
            assert (reached.max() if top else reached.min()) == exact[channel][top]


@bounded(60)
@given(modules())
def test_ranges_lie_inside_the_types(module):
    for name, ranges in analyse(module).items():
        type_ = module.types[name]
        assert hulls(ranges.value, *type_.range.hull), name
        assert len(ranges.value.lo) in (1, type_.shape[0])
        if type_.train is not None:
            assert hulls(ranges.frame, *type_.train.frame), name
        assert ranges.value.hull[0] >= ranges.prefix.hull[0]
        assert ranges.value.hull[1] <= ranges.prefix.hull[1]


# b + relu(a - b) lies between a and b


class Tournament:
    """Maxima and minima of slices of the input, as lines of a module."""

    def __init__(self, dice: random.Random, form: str, players: Sequence[tuple[int, int]], *, relu: int = 255) -> None:
        self.dice, self.form, self.relu = dice, form, relu
        self.lines: list[tuple[str, Op, str]] = []
        self.left = [self.player(i, lo, hi) for i, (lo, hi) in enumerate(players)]
        self.source = Tensor((len(players),), Int(-128, 127, ONE))

    def line(self, op: Op, *operands: str) -> str:
        name = f"v{len(self.lines)}"
        self.lines.append((name, op, " ".join(operands)))
        return name

    def law(self, lo: int, hi: int) -> Requant:
        return Requant(Array.of([1]), Array.of([0]), 1, lo, hi, 1.0)

    def player(self, index: int, lo: int, hi: int) -> str:
        own = self.line(self.law(lo, hi), self.line(Slice((index,), (index + 1,), (1,)), "x"))
        return own if self.form == "requant" else self.line(Encode(8), own)

    def sum(self, *operands: str) -> str:
        return self.line(Add(), *self.dice.sample(operands, len(operands)))

    def negated(self, value: str) -> str:
        return self.line(Scaling(Array.of([self.dice.choice([-1, -1.0])])), value)

    def law_of(self, value: str, lo: int, hi: int) -> str:
        """clamp(value, lo, hi) in the form of the network."""
        if self.form == "neuron_stem":
            return self.line(NeuronStem(8, Array.of([1]), Array.of([0]), 1, 1.0, lo < 0), value)
        if self.form == "requant":
            return self.line(self.law(lo, hi), value)
        return self.line(Encode(8), self.line(self.law(lo, hi), self.line(Integrate(), value)))

    def match(self, a: str, b: str, *, least: bool = False) -> str:
        """The larger or the smaller of two."""
        over = self.law_of(self.sum(a, self.negated(b)), 0, self.relu)
        return self.sum(a, self.negated(over)) if least else self.sum(b, over)

    def played(self, *, least: bool, materialised: float, signed: bool) -> Module:
        """Pairs in any order, to the end."""
        while len(self.left) > 1:
            a, b = (self.left.pop(self.dice.randrange(len(self.left))) for _ in range(2))
            won = self.match(a, b, least=least and self.dice.random() < 0.5)
            if self.dice.random() < materialised:
                won = self.law_of(won, *((-128, 127) if signed else (0, 255)))
            self.left.append(won)
        return module_of(self.source, *self.lines, ("y", Integrate(), self.left[0]))


FORMS = st.sampled_from(["requant", "neuron_stem", "integrate; requant; encode"])


@bounded(120)
@given(FORMS, st.integers(2, 9), st.booleans(), st.booleans(), st.sampled_from([0, 0, 0.3, 1]), st.integers(0, 2**32))
@example("requant", 9, False, False, 0, 0)
def test_a_tournament_has_the_range_of_its_players(form, players, least, signed, materialised, seed):
    lo, hi = (-128, 127) if signed else (0, 127)
    game = Tournament(random.Random(seed), form, [(lo, hi)] * players)
    module = game.played(least=least, materialised=materialised, signed=signed)
    found = analyse(module)
    assert found["y"].value.hull == found[game.left[0]].value.hull == (lo, hi)
    x = np.random.default_rng(seed).integers(-128, 127, (40, players), endpoint=True)
    y = interpreter.run(module, x)["y"]
    assert lo <= y.min() <= y.max() <= hi
    if not least:
        assert (y[:, 0] == np.clip(x, lo, hi).max(axis=1)).all()


@bounded(60)
@given(
    FORMS, st.lists(st.tuples(st.integers(-128, 127), st.integers(-128, 127)), min_size=2, max_size=6), st.booleans()
)
def test_players_of_unequal_ranges_end_between_them(form, ends, least):
    ranges = [(min(pair), max(pair)) for pair in ends]
    game = Tournament(random.Random(len(ends)), form, ranges)
    module = game.played(least=least, materialised=0, signed=True)
    value = analyse(module)["y"].value
    assert hulls(value, min(lo for lo, _ in ranges), max(hi for _, hi in ranges))
    x = np.random.default_rng(0).choice([-128, 127, 0, *sum(ends, ())], (200, len(ends)))
    y = interpreter.run(module, x)["y"]
    assert value.hull[0] <= y.min() <= y.max() <= value.hull[1]


def test_frames_and_prefixes_of_a_maximum_are_those_of_the_sum():
    game = Tournament(random.Random(0), "neuron_stem", [(-8, 7)] * 2)
    game.match(*game.left)
    ranges = analyse(module_of(game.source, *game.lines))[game.lines[-1][0]]
    assert (ranges.value.hull, ranges.frame.hull) == ((-8, 7), (-1, 2))
    assert ranges.prefix.hull[1] == 7 + 255


# what only looks like it


def all_inputs(players: int, lo: int, hi: int) -> np.ndarray:
    return np.array([*product(range(lo, hi + 1), repeat=players)], dtype=np.int64)


def assert_sound(module: Module, x: np.ndarray) -> None:
    found = analyse(module)
    for name, stored in interpreter.run(module, x, "*").items():
        values = module.types[name].integers(stored)
        assert inside(found[name].value, values), name


ALIKE: dict[str, Requant] = {
    "relu": Requant(Array.of([1]), Array.of([0]), 1, 0, 99, 1.0),
    "saturating": Requant(Array.of([1]), Array.of([0]), 1, 0, 3, 1.0),
    "shut": Requant(Array.of([1]), Array.of([0]), 1, 0, 0, 1.0),
    "leaky below": Requant(Array.of([1]), Array.of([0]), 1, -1, 99, 1.0),
    "above 0": Requant(Array.of([1]), Array.of([0]), 1, 1, 99, 1.0),
    "doubled": Requant(Array.of([2]), Array.of([0]), 1, 0, 99, 1.0),
    "turned": Requant(Array.of([-1]), Array.of([0]), 1, 0, 99, 1.0),
    "shifted up": Requant(Array.of([1]), Array.of([1]), 1, 0, 99, 1.0),
    "shifted down": Requant(Array.of([1]), Array.of([-1]), 1, 0, 99, 1.0),
    "halved": Requant(Array.of([1]), Array.of([0]), 2, 0, 99, 1.0),
    "divided by one": Requant(Array.of([1]), Array.of([0]), Array.of([1]), 0, 99, 1.0),
}


@pytest.mark.parametrize("law", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("added", ["b", "c", "a", "b b", "b -b", "r"])
def test_what_only_looks_like_a_maximum_is_not_narrowed_below_what_it_reaches(law, added):
    lines: list[tuple[str, Op, str]] = [(name, Slice((i,), (i + 1,), (1,)), "x") for i, name in enumerate("abc")]
    lines += [("-b", Scaling(Array.of([-1])), "b"), ("d", Add(), "a -b"), ("r", law, "d"), ("y", Add(), f"{added} r")]
    lines = [(r.replace("-b", "nb"), op, o.replace("-b", "nb")) for r, op, o in lines]
    module = module_of(Tensor((3,), Int(-2, 2, ONE)), *lines)
    assert_sound(module, all_inputs(3, -2, 2))
    y = analyse(module)["y"].value.hull
    if law in (ALIKE["relu"], ALIKE["saturating"]) and added == "b":
        assert y == (-2, 2)
    if law == ALIKE["doubled"] and added == "b":
        assert y[1] >= 6


def test_a_relu_of_another_scale_is_no_maximum_of_values_but_stays_sound():
    one, zero = Array.of([1]), Array.of([0])
    module = module_of(
        Tensor((2,), Int(-2, 2, ONE)),
        ("a", Slice((0,), (1,), (1,)), "x"),
        ("b", Slice((1,), (2,), (1,)), "x"),
        ("n", Scaling(Array.of([-1])), "b"),
        ("d", Add(), "a n"),
        ("r", Requant(one, zero, 1, 0, 99, 0.5), "d"),
        ("s", Scaling(Array.of([3]), Array.of([1.0])), "r"),
        ("y", Add(), "b s"),
    )
    assert_sound(module, all_inputs(2, -2, 2))
    assert analyse(module)["y"].value.hull[1] >= -2 + 3 * 4


@bounded(250)
@given(st.integers(0, 2**32))
def test_sums_of_clipped_sums_stay_within_their_ranges_whatever_they_are(seed):
    """Random sums of three small values, laws that are almost relus of them, sums of these: on every input."""
    rng = random.Random(seed)
    lines: list[tuple[str, Op, str]] = [(name, Slice((i,), (i + 1,), (1,)), "x") for i, name in enumerate("abc")]
    for index in range(rng.randint(4, 14)):
        names = [name for name, _, _ in lines]
        latest = names[-1] if rng.random() < 0.7 else rng.choice(names)
        kind = rng.choice(["sum", "sum", "times", "law", "law"])
        op: Op = Add()
        operands = [latest, *rng.choices(names, k=rng.randint(1, 2))]
        if kind == "times":
            op, operands = Scaling(Array.of([rng.choice([-1, -1, -1, 2, -2, -1.0])])), [rng.choice(names)]
        elif kind == "law":
            mul, offset, div = rng.choice([(1, 0, 1)] * 6 + [(2, 0, 1), (1, 1, 1), (-1, 0, 1), (1, 0, 2)])
            lo, hi = rng.choice([(0, 99), (0, 99), (0, 3), (0, 1), (-1, 99), (-3, 3)])
            op, operands = Requant(Array.of([mul]), Array.of([offset]), div, lo, hi, 1.0), [latest]
        lines.append((f"v{index}", op, " ".join(operands)))
    assert_sound(module_of(Tensor((3,), Int(-2, 2, ONE)), *lines), all_inputs(3, -2, 2))


def test_the_work_for_sums_of_relus_of_sums_does_not_double_with_each(monkeypatch):
    """Sums with one or two relus each, in a row of 40 that each reads the two before it."""
    calls = 0

    def times(self: Interval, factor: Any) -> Interval:
        nonlocal calls
        calls += 1
        assert calls < 10**5
        return plain(self, factor)

    plain = Interval.times
    monkeypatch.setattr(Interval, "times", times)
    law = Requant(Array.of([1]), Array.of([0]), 1, 0, 3, 1.0)
    lines: list[tuple[str, Op, str]] = [("r0", law, "x"), ("r1", law, "x")]
    for i in range(2, 40):
        lines += [(f"s{i}", Add(), f"r{i - 1} r{i - 2} x"), (f"r{i}", law, f"s{i}")]
    assert_sound(module_of(Tensor((1,), Int(-3, 3, ONE)), *lines), all_inputs(1, -3, 3))


WIDE = 2**40


@pytest.mark.parametrize(
    ("op", "shape", "values"),
    [
        (Linear(Array.of([[WIDE, 1], [0, 1]]), Array.of([1.0])), (2,), (0, 2**22)),
        (Conv2d(Array.of([[[[WIDE], [WIDE]]]]), Array.of([1.0]), padding=(1, 0, 0, 0)), (1, 1, 1), (0, 2**22)),
        (Conv2d(Array.of([[[[-WIDE], [WIDE]]]]), Array.of([1.0]), padding=(1, 0, 0, 1)), (1, 2, 1), (-1, 2**22)),
        (AvgPool((2, 2), (1, 1), (1, 1, 0, 0)), (1, 2, 2), (-(2**60), 2**60)),
        (Pad((1, 0, 0, 1)), (1, 1), (-(2**62), 2**62)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_witness_of_sums_near_the_width_of_registers_is_exact(op, shape, values):
    operand = Interval.of(*values)
    bounds, rows = op.bounds((shape,), operand), sums(op, (shape,))
    assert 2**60 <= bounds.magnitude < 2**63
    for channel, top in product(range(op.shape(shape)[0]), (False, True)):
        (x,) = witness(op, (shape,), (operand,), channel, top=top)
        reached = [sum(w * int(x[at]) for (_, at), w in row.items()) for to, row in rows.items() if to[0] == channel]
        assert (max if top else min)(reached) == at_channel(bounds, channel)[top]


# bounds by hand


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
