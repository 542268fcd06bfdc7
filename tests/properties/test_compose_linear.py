"""compose-linear: rows of random maps keep every value, bit for bit, on integers, trains and currents."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st

from spir import interpreter, pipeline
from spir.conformance.examples import stored_input
from spir.conformance.strategies import bounded
from spir.driver import Context
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops._linear import WeightedMap
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.linear import Linear
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.requant import Requant
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.ops.upsample import Upsample
from spir.types import Current, Encoding, Int, Scale, Shape, Spikes, Tensor, scale_of

HALF = Scale.of(0.5)
ENCODINGS: tuple[Encoding, ...] = (
    Int(-9, 9, HALF),
    Int(3, 9, Scale.of(0.3)),
    Int(-(2**40), 2**41, HALF),
    Spikes(4, "bits", 0, 15, HALF),
    Spikes(3, "bits", -4, 3, Scale.of(0.1)),
    Spikes(5, "rate", -5, 5, HALF),
    Spikes(4, "suffix", 0, 4, HALF),
    Current(3, "bits", -40, 40, -6, 6, HALF),
    Current(3, "direct", -18, 15, -6, 5, HALF),
)


@attrs.frozen
class Dice:
    """Maps that mostly fit a shape, all numbers from one generator."""

    rng: random.Random

    def weights(self, *shape: int) -> Array:
        drawn = np.random.default_rng(self.rng.randrange(2**32))
        return Array.of(drawn.integers(-9, 10, shape) * self.rng.choice([1, 1, 1, 2**20]))

    def step(self, outputs: int) -> Array:
        return Array.of([self.rng.choice([0.5, 0.25, 0.3]) for _ in range(self.rng.choice([1, outputs]))])

    def whole(self, lo: int, hi: int, size: int) -> Any:
        return tuple(self.rng.randint(lo, hi) for _ in range(size))

    def conv2d(self, shape: Shape) -> Op:
        groups = self.rng.choice([1, shape[0]])
        outputs = groups * self.rng.randint(1, 2)
        padding = self.whole(0, 2, 4) if self.rng.random() < 0.5 else (0,) * 4
        weight = self.weights(outputs, shape[0] // groups, *self.whole(1, 3, 2))
        fields = (self.whole(1, 2, 2), padding, self.whole(1, 2, 2), groups)
        return Conv2d(weight, self.step(outputs), None, *fields)

    def linear(self, shape: Shape) -> Op:
        outputs = self.rng.randint(1, 3)
        return Linear(self.weights(outputs, shape[0]), self.step(outputs))

    def avg_pool(self, shape: Shape) -> Op:
        kernel = self.rng.choice([(2, 2), (1, 2), (2, 1), (4, 2), (3, 3), (2, 2)])
        stride = kernel if self.rng.random() < 0.6 else self.whole(1, 3, 2)
        return AvgPool(kernel, stride, self.whole(0, 1, 4) if self.rng.random() < 0.2 else (0,) * 4)

    def global_avg_pool(self, shape: Shape) -> Op:
        return GlobalAvgPool(shape[1] * shape[2], self.rng.random() < 0.7)

    def scale(self, shape: Shape) -> Op:
        size = self.rng.choice([(1,), shape[:1], shape])
        if self.rng.random() < 0.3 and len(size) == 1:
            return Scaling(Array.of([self.rng.choice([-2.0, 0.5, 0.3, -1.0]) for _ in range(size[0])]))
        to = Array.of([0.125] * self.rng.choice([1, shape[0]])) if self.rng.random() < 0.3 else None
        return Scaling(self.weights(*size), to)

    def flatten(self, shape: Shape) -> Op:
        return Flatten()

    def reshape(self, shape: Shape) -> Op:
        size = int(np.prod(shape))
        first = self.rng.choice([d for d in range(1, size + 1) if size % d == 0])
        rest = size // first
        second = self.rng.choice([d for d in range(1, rest + 1) if rest % d == 0])
        return Reshape(self.rng.choice([(first, rest), (first, second, rest // second), shape]))

    def permute(self, shape: Shape) -> Op:
        return Permute(tuple(self.rng.sample(range(len(shape)), len(shape))))

    def slice(self, shape: Shape) -> Op:
        return Slice(tuple(self.rng.randrange(d) // 2 for d in shape), shape, self.whole(1, 2, len(shape)))

    def pad(self, shape: Shape) -> Op:
        return Pad(self.whole(0, 1, 2 * len(shape)), edge=self.rng.random() < 0.4)

    def upsample(self, shape: Shape) -> Op:
        return Upsample(self.whole(1, 2, 2))

    def add(self, shape: Shape) -> Op:
        return Add()

    def concat(self, shape: Shape) -> Op:
        return Concat(self.rng.randrange(len(shape)))


ALWAYS = ("scale", "scale", "flatten", "reshape", "permute", "slice", "pad", "add", "concat")
ON_IMAGES = ("conv2d",) * 4 + ("avg_pool",) * 4 + ("global_avg_pool", "upsample")
SHAPES = ((2, 4, 4), (1, 6, 4), (3, 2, 4), (2, 5, 3), (6,))


def row(dice: Dice, length: int) -> Module:
    """Maps in a row, now and then one beside them that others read too."""
    source = Tensor(dice.rng.choice(SHAPES), dice.rng.choice(ENCODINGS))
    types, nodes, last = {"x": source}, [], "x"
    for index in range(6 * length):
        x = types[last]
        if len(nodes) == length:
            break
        own = ON_IMAGES if len(x.shape) == 3 else ("linear",) * 5 if len(x.shape) == 1 else ()
        op = getattr(dice, dice.rng.choice(ALWAYS + own))(x.shape)
        operands = [last]
        if isinstance(op, (Add, Concat)):
            operands += dice.rng.choices([n for n, t in types.items() if t.shape == x.shape], k=dice.rng.randint(1, 2))
            dice.rng.shuffle(operands)
        try:
            result = infer(op, tuple(types[o] for o in operands))
        except SpirError:
            continue  # a kernel that does not fit, scales that do not meet, sums beyond registers
        if result.size > 300:
            continue
        name = f"v{index}"
        nodes.append(Node(name, op, tuple(operands), result, Origin(f"net.{name}")))
        types[name] = result
        if dice.rng.random() < 0.9:
            last = name
    return Module(Value("x", source), tuple(nodes), last)


def composed(module: Module, options: str = "") -> Module:
    return pipeline.run(module, pipeline.parse(f"compose-linear{options}"), Context(None, 0), checked=False).module


def assert_same(before: Module, after: Module, x: Any) -> None:
    """Every value that keeps its name keeps its frames and its scale, and stays inside its old range."""
    assert (before.input, before.output) == (after.input, after.output)
    wanted, found = interpreter.run(before, x, "*"), interpreter.run(after, x, "*")
    for name in found.keys() & wanted.keys():
        assert np.array_equal(wanted[name], found[name]), name
        old, new = before.types[name], after.types[name]
        assert (old.shape, old.steps, scale_of(old)) == (new.shape, new.steps, scale_of(new)), name
        assert (old.train and old.train.code) == (new.train and new.train.code)
        assert old.range.hull[0] <= new.range.hull[0] <= new.range.hull[1] <= old.range.hull[1]


SEEDS, LENGTHS = st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4])


@bounded(250)
@given(LENGTHS, SEEDS)
def test_every_value_that_stays_is_the_same_to_the_bit(length, seed):
    module = row(Dice(random.Random(seed)), length)
    after = composed(module)
    event(f"{len(module.nodes) - len(after.nodes)} ops fewer")
    assert_same(module, after, stored_input(module.input.type, np.random.default_rng(seed), 5))


@bounded(60)
@given(LENGTHS, SEEDS)
def test_what_is_composed_is_composed_at_once(length, seed):
    after = composed(row(Dice(random.Random(seed)), length))
    assert composed(after) == after


@bounded(80)
@given(LENGTHS, SEEDS, st.sampled_from([1, 20, 100]))
def test_no_map_grows_beyond_the_largest(length, seed, largest):
    module = row(Dice(random.Random(seed)), length)
    after = composed(module, f"{{largest={largest}}}")
    allowed = max([largest, *sizes(module)])
    assert all(size <= allowed for size in sizes(after))
    assert_same(module, after, stored_input(module.input.type, np.random.default_rng(seed), 3))


def sizes(module: Module) -> Iterator[int]:
    return (n.op.weight.values.size for n in module.nodes if isinstance(n.op, WeightedMap))


@bounded(80)
@given(SEEDS, st.booleans(), st.booleans())
def test_a_convolution_of_windows_is_one_or_both_stay(seed, padded, tiled):
    """More of the pairs that only sometimes compose: windows that leave a remainder, overlap, or see zeros."""
    dice = Dice(random.Random(seed))
    kernel = dice.rng.choice([(2, 2), (1, 2), (4, 1), (2, 4)])
    stride = kernel if tiled else dice.whole(1, 3, 2)
    windows = dice.whole(2, 4, 2)
    cut = [
        n * k if tiled else (n - 1) * s + k + dice.rng.randrange(s)
        for n, k, s in zip(windows, kernel, stride, strict=True)
    ]
    source = Tensor((2, *cut), dice.rng.choice(ENCODINGS))
    padding = dice.whole(0, 2, 4) if padded else (0,) * 4
    groups = dice.rng.choice([1, 2])
    taps = [dice.rng.randint(1, n) for n in windows]
    weight = dice.weights(2, 2 // groups, *taps)
    conv = Conv2d(weight, Array.of([0.5]), None, dice.whole(1, 2, 2), padding, (1, 1), groups)
    lines: tuple[tuple[str, Op], ...] = (("p", AvgPool(kernel, stride)), ("c", conv))
    try:
        module = chained(source, *lines)
    except SpirError:  # sums beyond registers
        return
    after = composed(module)
    tile = stride == kernel and cut == [n * k for n, k in zip(windows, kernel, strict=True)]
    one = tile or not any(padding)
    event("composed" if len(after.nodes) == 1 else "stays")
    assert len(after.nodes) == (1 if one else 2)
    assert_same(module, after, stored_input(source, np.random.default_rng(seed), 4))


def chained(source: Tensor, *lines: tuple[str, Op]) -> Module:
    nodes, last, type_ = [], "x", source
    for name, op in lines:
        type_ = infer(op, (type_,))
        nodes.append(Node(name, op, (last,), type_, Origin(f"net.{name}")))
        last = name
    return Module(Value("x", source), tuple(nodes), last)


@bounded(60)
@given(LENGTHS, SEEDS)
def test_what_others_read_stays_for_them(length, seed):
    """Each map of the row is read by a requantisation as well, and all of these by the output."""
    dice = Dice(random.Random(seed))
    module = row(dice, length)
    if module.input.type.train is not None:
        return  # requantisations work on integers
    law: Callable[[int], Requant] = lambda size: Requant(Array.of([1]), Array.of([0]), size, 0, 7, 1.0)  # noqa: E731 - one line says it
    nodes, flat = list(module.nodes), []
    for node in module.nodes:
        for name, op, read in (
            (f"{node.result}.r", law(1 + node.type.range.magnitude // 7), node.result),
            (f"{node.result}.f", Flatten(), f"{node.result}.r"),
        ):
            types = {n.result: n.type for n in nodes}
            nodes.append(Node(name, op, (read,), infer(op, (types[read],)), Origin(f"net.{name}")))
        flat.append(nodes[-1])
    if len(flat) < 2:
        return
    joined = infer(Concat(), tuple(n.type for n in flat))
    nodes.append(Node("all", Concat(), tuple(n.result for n in flat), joined, Origin("net.all")))
    whole = Module(module.input, tuple(nodes), "all")
    after = composed(whole)
    assert {n.result for n in module.nodes} <= {n.result for n in after.nodes}
    assert_same(whole, after, stored_input(module.input.type, np.random.default_rng(seed), 4))


def test_rows_of_every_kind_are_composed():
    """So that the properties above say something: most rows get shorter, on every carrier."""
    fewer: dict[str, list[bool]] = {}
    for seed in range(300):
        module = row(Dice(random.Random(seed)), 3)
        carrier = type(module.input.type.encoding).__name__
        fewer.setdefault(carrier, []).append(len(composed(module).nodes) < len(module.nodes))
    assert set(fewer) == {"Int", "Spikes", "Current"}
    assert all(sum(found) >= len(found) / 4 for found in fewer.values()), {c: sum(f) / len(f) for c, f in fewer.items()}
