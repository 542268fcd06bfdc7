"""Hypothesis strategies: typed modules with inputs, float networks with calibration data, pipelines, ops and options.

What they give prints as the text of a module with its inputs. The list of moves is drawn by hypothesis, so it shrinks;
numbers and geometry come from seeds, because drawing each by itself is slow. A move that does not fit leaves the module
as it is.
"""

from __future__ import annotations

import random
import typing
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
from hypothesis import reject, settings
from hypothesis import strategies as st

from spir import driver, interpreter, options, probes
from spir.conformance.examples import Example, probing_input, stored_input
from spir.conformance.growth import Dice, grown, moves, starts
from spir.discovery import find, names
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.linear import Linear
from spir.ops.pad import Pad
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.types import Real, Reals, Tensor
from spir.verify import verify

SAMPLES = 6
LARGEST = 1e6
DATA = (
    "normal",
    "normal",
    "normal",
    "normal",
    "uniform",
    "uniform",
    "image",
    "tiny",
    "one sample",
    "constant",
    "zeros",
)


def bounded(examples: int) -> settings:
    """So many examples by default, ten times as many when the profile searches."""
    usual = settings.default
    assert usual is not None  # hypothesis says so before it is set up
    return settings(max_examples=examples * usual.max_examples // 100)


@attrs.frozen(eq=False, repr=False)
class Network:
    """A float network and calibration inputs for it."""

    module: Module
    data: Reals

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        spread = f"{self.data.min():g}..{self.data.max():g}"
        return f"{self.module}with data {list(self.data.shape)} in {spread}"

    @property
    def joins(self) -> int:
        """Residual joins."""
        return sum(isinstance(node.op, Add) for node in self.module.nodes)

    @property
    def dead(self) -> bool:
        """Whether a channel has no weight that is not 0, or an activation never leaves 0 on the data."""
        return self.dead_weights or self.dead_activations

    @property
    def dead_weights(self) -> bool:
        """Whether some output of a weighted op has zero weights only, or is multiplied by a gamma of 0."""
        for node in self.module.nodes:
            weight = getattr(node.op, "weight", None)
            if weight is not None and not weight.values.reshape(len(weight.values), -1).any(axis=1).all():
                return True
        return False

    @property
    def dead_activations(self) -> bool:
        """Whether a channel of a relu is 0 on all calibration data that are not all 0 themselves."""
        relus = [node.result for node in self.module.nodes if isinstance(node.op, Relu)]
        seen = interpreter.run(self.module, self.data, "|".join(relus)) if relus and self.data.any() else {}
        return any(
            not np.moveaxis(seen[name], 1, 0).reshape(seen[name].shape[1], -1).any(axis=1).all()
            for name in seen
            if name in relus
        )

    def inputs(self, *quantised: Module) -> Reals:
        """Corners, ties and range ends of the input's quantiser, samples in and far out of range, calibration data."""
        scales = tuple(dict.fromkeys(s for module in quantised for s in probes.input_scales(module)))
        usual = probes.make(self.module, self.data, scales, 1).x
        rng, shape = np.random.default_rng(2), self.module.input.type.shape
        ends = [code * s for s in scales for code in (-32769, -256.5, -129, -128.5, -128, 127, 127.5, 128, 255.5)]
        more = [np.full(shape, end) for end in ends] + [100 * np.abs(self.data).max(initial=1) * rng.normal(size=shape)]
        more += [s * rng.integers(-9, 9, shape) / 2 for s in scales]
        return np.concatenate([usual, np.stack(more), self.data])


class Builder:
    """Grows a network op by op."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.rng = np.random.default_rng(seed)
        shape = (self.dice.randint(1, 4), self.dice.randint(4, 9), self.dice.randint(4, 9))
        self.input = Value("x", Tensor(shape, Real()))
        self.types = {"x": self.input.type}
        self.nodes: list[Node] = []
        self.last = "x"
        self.wild = self.dice.random() < 0.25  # weights whose scale varies widely from channel to channel

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the last value."""
        return self.types[self.last].shape

    def add(self, op: Op, *operands: str) -> str:
        """One more op, on the last value unless others are named."""
        read = operands or (self.last,)
        type_ = infer(op, tuple(self.types[name] for name in read))
        name = f"{op.name}{len(self.nodes)}"
        self.nodes.append(Node(name, op, read, type_, Origin(f"net.{name}")))
        self.types[name], self.last = type_, name
        return name

    def module(self) -> Module:
        """What was built."""
        return verify(Module(self.input, tuple(self.nodes), self.last))

    def chance(self, share: float) -> bool:
        """True for a share of the throws."""
        return self.dice.random() < share

    def weight(self, *shape: int) -> Array:
        """Weights of a fitting size; some channels far from the others, some dead, some layers all dead."""
        fan_in = int(np.prod(shape[1:]))
        reach = 3.0 if self.wild else 0.3
        channels = 10.0 ** self.rng.uniform(-reach, reach, shape[0])
        if self.chance(0.08):
            channels[self.rng.integers(0, shape[0], max(1, shape[0] // 2))] = 0
        if self.chance(0.03):
            channels[:] = 0
        values = self.rng.standard_normal(shape) * np.sqrt(2 / fan_in)
        return Array.of(values * channels.reshape((-1,) + (1,) * (len(shape) - 1)))

    def bias(self, size: int, share: float = 0.7) -> Array | None:
        """A bias, none, or one that keeps some relu shut for good."""
        if not self.chance(share):
            return None
        values = 0.3 * self.rng.standard_normal(size)
        if self.chance(0.06):
            values[self.rng.integers(0, size)] = -1e4
        if self.chance(0.03):
            values = -np.abs(values) - 1e3
        return Array.of(values)

    def conv(self, outputs: int | None = None, *, same: bool = False, stride: int | None = None) -> None:
        """A convolution; ``same`` keeps height and width, divided by ``stride``, rounded up."""
        if len(self.shape) != 3:
            return
        inputs, *space = self.shape
        step = stride or (1 if same else self.dice.choice([1, 1, 1, 2]))
        kernel = self.dice.choice([(3, 3), (3, 3), (1, 1)] if same else [(3, 3), (3, 3), (3, 1), (1, 1), (2, 3)])
        dilation = self.dice.choice([(1, 1)] * 3 + [(1, 2), (2, 1)])
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if same:
            before = [r // 2 for r in reach]
            padding = (before[0], reach[0] - before[0], before[1], reach[1] - before[1])
        else:
            lack = [max(0, r + 1 - d) for r, d in zip(reach, space, strict=True)]
            slack = [self.dice.choice([0, 0, 1, 1, 2]) for _ in range(4)]
            padding = (max(slack[0], lack[0]), slack[1], max(slack[2], lack[1]), slack[3])
        groups = self.dice.choice([1, 1, 1, inputs])
        outputs = self.dice.randint(1, 4) if outputs is None else outputs
        if outputs % groups:
            groups, outputs = (1, outputs) if same else (groups, groups * self.dice.randint(1, 2))
        weight = self.weight(outputs, inputs // groups, *kernel)
        bias = self.bias(outputs)
        self.add(Conv2d(weight, None, bias, (step, step), padding, dilation, groups))

    def batch_norm(self) -> None:
        """Statistics of a trained layer, or of one that hardly varies, with a gamma that may be 0 or negative."""
        if not self.nodes or not isinstance(self.nodes[-1].op, (Conv2d, Linear)):
            return
        channels = self.shape[0]
        var = 10.0 ** self.rng.uniform(-1, 1, channels)
        gamma = self.rng.uniform(0.5, 1.5, channels) * self.rng.choice([1, 1, 1, -1], channels)
        if self.chance(0.2):
            var[self.rng.integers(0, channels)] = self.dice.choice([0.0, 1e-12, 1e-6])
        if self.chance(0.15):
            gamma[self.rng.integers(0, channels)] = 0
        mean, beta = self.rng.normal(size=(2, channels)) * 0.3
        affine = self.chance(0.9)
        self.add(
            BatchNorm(
                Array.of(mean),
                Array.of(var),
                self.dice.choice([1e-5, 1e-3, 1e-2]),
                Array.of(gamma) if affine else None,
                Array.of(beta) if affine else None,
            )
        )

    def relu(self) -> None:
        """An activation."""
        self.add(Relu())

    def layer(self) -> None:
        """Convolution or matrix, batch norm, relu."""
        if len(self.shape) == 3:
            self.conv()
        else:
            self.linear()
        self.batch_norm()
        self.relu()

    def residual(self) -> None:
        """Two convolutions beside a shortcut; where the stride is 2, slices and zero channels, or a projection."""
        if len(self.shape) != 3:
            return
        start, (channels, height, width) = self.last, self.shape
        stride = 2 if min(height, width) >= 4 and self.chance(0.4) else 1
        wider = channels + self.dice.choice([0, 1, 2]) if stride == 2 else channels
        self.conv(wider, same=True, stride=stride)
        for part in (self.batch_norm, self.relu, lambda: self.conv(wider, same=True), self.batch_norm):
            if self.chance(0.75):
                part()
        body, self.last = self.last, start
        if stride == 2 and self.chance(0.3):
            self.add(Conv2d(self.weight(wider, channels, 1, 1), None, self.bias(wider), (2, 2)))
        elif stride == 2:
            self.add(Slice((0, 0, 0), (channels, height, width), (1, 2, 2)))
            if wider > channels:
                before = (wider - channels) // 2
                self.add(Pad((before, wider - channels - before, 0, 0, 0, 0)))
        self.add(Add(), *self.dice.sample([body, self.last], 2))
        if self.chance(0.7):
            self.relu()

    def meet(self) -> None:
        """The last value with one of its shape from before, perhaps itself, perhaps two."""
        partners = [name for name, type_ in self.types.items() if type_.shape == self.shape]
        more = self.dice.choices(partners, k=self.dice.choice([1, 1, 1, 2]))
        self.add(Add(), self.last, *more)

    def double(self) -> None:
        """The last value twice."""
        self.add(Add(), self.last, self.last)

    def scale(self) -> None:
        """A constant, often negative; one a channel only where an activation follows."""
        if self.chance(0.7):
            self.add(Scaling(Array.of([self.dice.choice([-1.0, -0.3, 0.7, 2.0, 13.0])])))
            return
        factors = self.rng.choice([-1.5, -0.1, 0.0, 0.4, 1.0, 3.0], self.shape[0])
        self.add(Scaling(Array.of(factors)))
        self.relu()

    def pool(self) -> None:
        """2x2 windows, 3x3 windows that overlap, or all of space."""
        if len(self.shape) != 3:
            return
        kind = self.dice.choice(["2x2", "2x2", "3x3", "3x3 padded", "global"])
        positions = self.shape[1] * self.shape[2]
        if kind == "global":
            self.add(GlobalAvgPool(positions, self.chance(0.3)))
        elif kind == "2x2" and min(self.shape[1:]) >= 2:
            self.add(AvgPool((2, 2), (2, 2)))
        elif min(self.shape[1:]) >= 3:
            self.add(AvgPool((3, 3), (2, 1), (1, 0, 1, 1) if kind == "3x3 padded" else (0, 0, 0, 0)))

    def linear(self) -> None:
        """A matrix, on the flattened value."""
        if len(self.shape) != 1:
            self.add(Flatten())
        outputs = self.dice.randint(1, 5)
        self.add(Linear(self.weight(outputs, self.shape[0]), None, self.bias(outputs)))

    def idle(self) -> None:
        """What canonicalize removes."""
        nothing: list[Callable[[], Op]] = [
            lambda: Scaling(Array.of([1.0])),
            lambda: Pad((0,) * (2 * len(self.shape))),
            lambda: Slice((0,) * len(self.shape), self.shape, (1,) * len(self.shape)),
        ]
        self.add(self.dice.choice(nothing)())
        if self.chance(0.3):
            self.relu()
            self.relu()

    def padded(self) -> None:
        """Zeros around, once or twice, and a convolution."""
        if len(self.shape) != 3:
            return
        for _ in range(self.dice.choice([1, 1, 2])):
            self.add(Pad((0, 0, *(self.dice.randint(0, 1) for _ in range(4)))))
        self.conv()

    def calibration(self) -> Reals:
        """Random inputs of some kind."""
        kind, shape = self.dice.choice(DATA), self.input.type.shape
        normal = self.rng.standard_normal((1 if kind == "one sample" else SAMPLES, *shape))
        match kind:
            case "uniform":
                return self.rng.uniform(0, 1, normal.shape)
            case "image":
                return self.rng.integers(0, 256, normal.shape).astype(np.float64)
            case "tiny":
                return normal * 1e-6
            case "constant":
                return np.full(normal.shape, self.dice.choice([-0.7, 0.3, 5.0]))
            case "zeros":
                return np.zeros(normal.shape)
        return normal


MOVES: tuple[Callable[[Builder], Any], ...] = (
    *[Builder.layer] * 5,
    *[Builder.residual] * 3,
    Builder.conv,
    Builder.relu,
    Builder.meet,
    Builder.double,
    Builder.scale,
    *[Builder.pool] * 2,
    Builder.linear,
    Builder.idle,
    Builder.padded,
)
LABELS = {move: move.__name__ for move in MOVES}


@st.composite
def networks(draw: st.DrawFn, most: int = 6) -> Network:
    """A network of 2 to ``most`` moves, most of them with a linear head."""
    builder = Builder(draw(st.integers(0, 2**32 - 1)))
    for move in draw(st.lists(st.sampled_from(MOVES), min_size=2, max_size=most)):
        move(builder)
    if draw(st.booleans()):
        builder.linear()
    return Network(builder.module(), builder.calibration())


# typed modules


@st.composite
def modules(draw: st.DrawFn, most: int = 12) -> Module:
    """A typed module of reals, integers, trains and currents; every installed op takes part.

    In one of eight there is nothing but what the output needs, so that what fails shrinks to that.
    """
    bare = draw(st.integers(0, 7)) == 0
    start = draw(st.sampled_from(starts()))
    steps = st.tuples(st.sampled_from(moves()), st.integers(0, 2**10))
    found = grown(start, draw(st.lists(steps, min_size=1, max_size=most)))
    return _needed(found) if bare else found


def _needed(module: Module) -> Module:
    """The module without values that the output is not made of."""
    live, nodes = {module.output}, []
    for node in reversed(module.nodes):
        if node.result in live:
            live.update(node.operands)
            nodes.append(node)
    return attrs.evolve(module, nodes=tuple(reversed(nodes)))


@st.composite
def examples(draw: st.DrawFn, most: int = 12) -> Example:
    """A typed module with inputs on its range ends, ties, thresholds and zero."""
    module = finite(draw(modules(most)))
    return Example(module, probing_input(module, draw(st.integers(0, 3))))


def finite(module: Module) -> Module:
    """The module up to the first real value that grows beyond use, such as a square of a square."""
    x = stored_input(module.input.type, np.random.default_rng(0))
    with np.errstate(all="ignore"):
        for count, (name, values) in enumerate(interpreter.walk(module, x)):
            if not np.abs(values).max(initial=0) < LARGEST and isinstance(module.types[name].encoding, Real):
                last = [module.input.name, *(n.result for n in module.nodes)][count - 1]
                return attrs.evolve(module, nodes=module.nodes[: count - 1], output=last)
    return module


@st.composite
def ops(draw: st.DrawFn, operand: Tensor) -> Op:
    """An op with options that fit a first operand."""
    name = draw(st.sampled_from(names("ops")))
    found = list(Dice(random.Random(draw(st.integers(0, 2**16)))).ops(name, operand))
    return draw(st.sampled_from(found))


@st.composite
def converted(draw: st.DrawFn, recipe: str) -> Example:
    """What a recipe makes of a float network, with inputs in and out of the calibrated range."""
    network = draw(networks())
    try:
        outcome = driver.opt(network.module, f"@{recipe}", data=network.data)
    except SpirError as refusal:
        if not refusal.code.startswith("E-"):
            raise
        reject()  # a network that the method does not convert, such as one that no integers of 64 bits hold
    return Example(outcome.module, network.inputs(*(stage.module for stage in outcome.stages)))


# options and pipelines


@st.composite
def settings_of(draw: st.DrawFn, owner: type) -> dict[str, options.Scalar]:
    """Options of a pass, backend or recipe that it accepts; those at their default are mostly left out."""
    given: dict[str, options.Scalar] = {}
    for name, field in options.fields(owner).items():
        if draw(st.booleans()) and (values := _values(owner, name, field)) is not None:
            given[name] = draw(values)
    try:
        options.build(owner, given)
    except SpirError:  # options that exclude each other
        return {}
    return given


def _values(owner: type, name: str, field: attrs.Attribute[Any]) -> st.SearchStrategy[options.Scalar] | None:
    meta, hint = field.metadata, typing.get_type_hints(owner)[name]
    kinds = typing.get_args(hint) or (hint,)
    low, high = meta["ge"], meta["le"]
    if meta["one_of"]:
        return st.sampled_from(meta["one_of"])
    if name == "layers":
        return st.sampled_from(["*", "layer3.*", "relu|fc", "net.conv2d*"])
    if bool in kinds:
        return st.booleans()
    if int in kinds:
        return st.integers(None if low is None else int(low), None if high is None else int(high))
    if float in kinds:
        return st.floats(low, high, allow_nan=False, allow_infinity=False)
    return None  # words that the option alone understands


@st.composite
def pipelines(draw: st.DrawFn, most: int = 5) -> str:
    """Pipeline text that parses: passes and recipes with options, in any order."""
    known = [(name, find("passes", name)) for name in names("passes")]
    known += [(f"@{name}", find("recipes", name)) for name in names("recipes")]
    parts = []
    for name, owner in draw(st.lists(st.sampled_from(known), max_size=most)):
        given = draw(settings_of(owner))
        shown = ", ".join(f"{label}={options.spell(value)}" for label, value in given.items())
        parts.append(f"{name}{{{shown}}}" if shown else name)
    return draw(st.sampled_from([", ", ",\n  "])).join(parts)


@st.composite
def backends(draw: st.DrawFn, name: str) -> str:
    """A backend with options, as text."""
    given = draw(settings_of(find("backends", name)))
    shown = ", ".join(f"{label}={options.spell(value)}" for label, value in given.items())
    return f"{name}{{{shown}}}" if shown else name
