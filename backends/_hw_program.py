"""How `hw` runs a module: the form in which each value is held, and a few samples at a time through all ops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.backends._hw_host import HOST, compute
from spir.backends._hw_kernels import (
    FLOAT64,
    INT64,
    Kernel,
    Law,
    Number,
    Numbers,
    Scratch,
    aligned,
    carrier,
    inner,
    inner_shape,
    kernel,
    law,
    max_pool,
    moving,
    outer,
    triple_of,
)
from spir.backends._hw_registers import STATE, SUM, Counts, Registers, Tally, added, encodable, ends, law_of, whole
from spir.backends._hw_threads import share, workers
from spir.errors import SpirError
from spir.ir import Array, Module, Node, kept
from spir.ops._accumulation import accumulate
from spir.ops._linear import LinearMap, channelwise
from spir.ops._neuron import Neuron
from spir.ops._thinning import Thinning
from spir.ops._threshold import law as by_law
from spir.ops.avg_pool import AvgPool
from spir.ops.clip import Clip
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ranges import Ranges
from spir.types import SORTED, Current, Interval, Real, Shape, Spikes, Stored, Tensor, Train, weights

CHUNK = 2**21
"""Bytes that the widest op reads and writes for the samples that pass through the network together."""

LINE = 64
"""Bytes of a cache line, on which values begin."""

ONE, ZERO = Array.of([1]), Array.of([0])

Padding = tuple[int, int, int, int]
BARE: Padding = (0, 0, 0, 0)


@attrs.frozen
class Slot:
    """How one value is held: its element type, its frames where they are stepped, and a border of zeros around it."""

    type: Tensor
    dtype: Number
    steps: int | None
    border: Padding = BARE

    @property
    def shape(self) -> Shape:
        """Channels-last, with its border."""
        shape = inner_shape(self.type.shape)
        if self.border == BARE:
            return shape
        top, bottom, left, right = self.border
        return shape[0] + top + bottom, shape[1] + left + right, shape[2]

    @property
    def frames(self) -> tuple[int, ...]:
        """The leading axis of a stepped value."""
        return () if self.steps is None else (self.steps,)

    @property
    def nbytes(self) -> int:
        """Bytes that a sample takes, in whole lines of the cache."""
        return -(-self.dtype.itemsize * math.prod((*self.frames, *self.shape)) // LINE) * LINE

    def within(self, memory: NDArray[np.uint8], n: int) -> Numbers:
        """A value of ``n`` samples in memory: its border is zero, its inside undefined."""
        shape = (*self.frames, n, *self.shape)
        held: Numbers = memory[: math.prod(shape) * self.dtype.itemsize].view(self.dtype).reshape(shape)
        if self.border != BARE:
            top, bottom, left, right = self.border
            height, width = self.shape[:2]
            held[..., :top, :, :] = held[..., height - bottom :, :, :] = 0
            held[..., :left, :] = held[..., width - right :, :] = 0
        return held

    def inside(self, held: Numbers) -> Numbers:
        """The value without its border."""
        if self.border == BARE:
            return held
        height, width = self.type.shape[1:]
        top, _, left, _ = self.border
        return held[..., top : top + height, left : left + width, :]


class Firing:
    """The array namespace of `Neuron.fire`."""

    where = staticmethod(np.where)
    zeros_like = staticmethod(np.zeros_like)

    @staticmethod
    def hold(state: Numbers) -> Numbers:
        """The state register, wide enough."""
        return state

    @staticmethod
    def constant(array: Array, like: Numbers) -> Numbers:
        """A constant that broadcasts over ``[N, C, ...]``."""
        return channelwise(array.values, like.ndim - 1)


class Held(Firing):
    """A namespace whose register may overflow: it keeps what its width allows, and the tally counts the rest."""

    def __init__(self, tally: Tally, node: Node, frames: int) -> None:
        self._tally, self._node, self._frames, self._updates = tally, node, frames, 0

    def hold(self, state: Numbers) -> Numbers:  # type: ignore[override]  # this register counts its updates
        """The state register after one more update; there is one a frame, or one a frame for every step."""
        step = self._updates % self._frames
        self._updates += 1
        return self._tally.hold(self._node, STATE, state, step)


def expand(value: Numbers, frames: Numbers, train: Train) -> None:
    """Writes the spikes of values by one threshold a frame.

    Of bits, MSB first, the first frame holds -1 or 0 where the train is signed; sorted trains spike with the sign of
    the value.
    """
    steps = train.steps
    if train.code in SORTED:
        size, sign = np.abs(value), np.sign(value)
        for t in range(steps):
            np.multiply(sign, size >= (t + 1 if train.code == "prefix" else steps - t), out=frames[t], casting="unsafe")
        return
    rest, signed = value.copy(), train.lo < 0
    for t in range(steps):
        threshold = 2 ** (steps - 1 - t)
        if signed and t == 0:
            spike = np.negative(rest < 0, dtype=rest.dtype)
        else:
            spike = (rest >= threshold).astype(rest.dtype)
        frames[t] = spike
        rest -= spike * rest.dtype.type(threshold)


def spread(value: Numbers, frames: Numbers, op: Encode) -> None:
    """Writes the spikes of code isi: a clock whose ticks make up the interval gains as many as |x| is worth a step.

    A spike follows the step after which the clock has gone past an interval, unless the train has all of its spikes.
    """
    size, sign = np.abs(value.astype(np.int64)) * op.interval.denominator, np.sign(value)
    interval = op.interval.numerator
    left, clock = size * op.steps // interval, size.copy()
    for frame in frames:
        clock += size
        spiking = (clock > interval) & (left > 0)
        clock -= spiking * interval
        left -= spiking
        np.multiply(sign, spiking, out=frame, casting="unsafe")


def gather(frames: Numbers | Iterator[Numbers], factors: tuple[int, ...]) -> Numbers:
    """What frames decode to, as int64."""
    total: Numbers = np.int64(0)  # type: ignore[assignment]
    for factor, frame in zip(factors, frames, strict=True):
        total = total + frame.astype(np.int64) * factor
    return total


@attrs.frozen(eq=False, slots=False)
class Program:
    """A module whose trains are either merged into what they decode to, or stepped through frame by frame.

    Whatever `Registers` says may overflow is stepped, and cut to its width after every update.
    """

    module: Module
    registers: Registers
    merged: frozenset[str]

    @property
    def ranges(self) -> Mapping[str, Ranges]:
        """Proved bounds of every value."""
        return self.registers.ranges

    @property
    def bytes_per_sample(self) -> int:
        """Input, output and what lives at once, or what the widest op reads and writes as stored, if that is more."""
        stored = {name: 8 * type_.size * type_.steps for name, type_ in self.module.types.items()}
        ends = stored[self.module.input.name] + stored[self.module.output]
        return max([ends + self.room, *(sum(stored[v] for v in _around(n)) for n in self.module.nodes)])

    def run(self, x: Numbers, keep: str = "") -> dict[str, Stored]:
        """See `spir.backend.Executable.run`."""
        return self.run_counting(x, keep)[0]

    @property
    def simulates(self) -> bool:
        """See `spir.backend.Counting`."""
        return bool(self.registers.overflow)

    def run_counting(self, x: Numbers, keep: str = "") -> tuple[dict[str, Stored], Counts]:
        """See `spir.backend.Counting`."""
        x = self.module.input.type.read(x)
        types, train = self.module.types, self.module.input.type.train is not None
        samples = x.shape[1 if train else 0]
        wanted = [name for name in types if kept(name, keep) or name == self.module.output]
        results = {name: room_for(types[name], samples) for name in wanted}
        framewise = self._framewise([name for name in wanted if name in self.merged])

        size = max(1, min(self.chunk, -(-samples // workers())))

        tallies: list[Counts] = []
        failed: list[int] = []

        def work(parts: Sequence[slice]) -> None:
            scratch, memory, tally = Scratch(), np.empty(size * self.room, np.uint8), Tally(self.module, self.registers)
            for part in parts:
                given = x[:, part] if train else x[part]
                try:
                    for name, value in Pass(self, framewise, scratch, memory, given, tally).values():
                        if name in results:
                            place = results[name][:, part] if types[name].train is not None else results[name][part]
                            np.copyto(place, outer(value, types[name].shape), casting="unsafe")
                except SpirError:  # an overflow that is an error
                    failed.append(part.start)
                    break
            tallies.append(tally.counts)

        share(work, [slice(start, start + size) for start in range(0, samples, size)])
        if failed:
            self._fail(x, range(min(failed), min(min(failed) + size, samples)))
        return results, added(tallies)

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """The kernel of every linear op, in the form in which its operands are held."""
        return {n.result: self._kernel(n) for n in self.module.nodes if isinstance(n.op, LinearMap)}

    @cached_property
    def laws(self) -> dict[str, Law]:
        """The law of every op that has one and reads decoded values."""
        return {
            n.result: law(n.op, n.type.shape, self._summed(n))
            for n in self.module.nodes
            if triple_of(n.op) is not None and not self.stepped(n.operands[0])
        }

    @cached_property
    def clipped(self) -> dict[str, tuple[int, int]]:
        """What encoders take, where registers that overflow may bring them more."""
        found: dict[str, tuple[int, int]] = {}
        for node in self.module.nodes:
            limits = encodable(node, self.module)
            if limits is not None and self.registers.loose:
                low, high = self.ranges[node.operands[0]].value.hull
                found |= {node.result: limits} if low < limits[0] or high > limits[1] else {}
        return found

    @cached_property
    def tables(self) -> dict[str, Numbers | None]:
        """What each code of a thinned train becomes; None for codes that are too many."""
        found: dict[str, Numbers | None] = {}
        for node in self.module.nodes:
            thinning, train = node.op.thinning if isinstance(node.op, (Encode, Neuron)) else None, node.type.train
            if thinning is not None and isinstance(train, Spikes):
                signed = train.lo < 0
                table = thinning.table(train.steps, signed=signed)
                found[node.result] = table if table is None or not signed else np.roll(table, len(table) // 2)
        return found

    @cached_property
    def slots(self) -> dict[str, Slot]:
        """How every value is held."""
        return {
            name: Slot(type_, self._dtype(name, type_), type_.steps if self.stepped(name) else None, self._border(name))
            for name, type_ in self.module.types.items()
        }

    @cached_property
    def chunk(self) -> int:
        """Samples that pass through together: few enough that what an op touches stays in the cache."""
        widest = max((sum(self.slots[v].nbytes for v in _around(n)) for n in self.module.nodes), default=CHUNK)
        return max(1, min(64, CHUNK // widest))

    @cached_property
    def last(self) -> dict[str, str]:
        """The last reader of every value."""
        return {name: nodes[-1].result if nodes else name for name, nodes in self.module.readers.items()}

    @cached_property
    def places(self) -> dict[str, int]:
        """The first byte of every value, a sample: values that live at once lie apart, the largest are placed first."""
        order = {name: index for index, name in enumerate(self.module.types)}
        lives = {name: (order[name], order[self.last[name]]) for name in order}
        placed: dict[str, int] = {}
        for name in sorted(order, key=lambda name: -self.slots[name].nbytes):
            born, dead = lives[name]
            beside = (other for other in placed if lives[other][0] <= dead and born <= lives[other][1])
            start = 0
            for first, end in sorted((placed[other], placed[other] + self.slots[other].nbytes) for other in beside):
                if start + self.slots[name].nbytes <= first:
                    break
                start = max(start, end)
            placed[name] = start
        return placed

    @cached_property
    def room(self) -> int:
        """Bytes that all values of a sample share."""
        return max(start + self.slots[name].nbytes for name, start in self.places.items())

    def loose(self, node: Node, which: str) -> bool:
        """Whether a register of an op may overflow."""
        return (node.result, which) in self.registers.loose

    def divides(self, node: Node) -> bool:
        """Whether the offset of a law is added in a state register that may overflow."""
        return self.registers.offsets and self.loose(node, STATE) and whole(node, self.module)

    def _summed(self, node: Node) -> Interval:
        """Bounds of what a law reads."""
        if self.loose(node, STATE):
            return Interval.of(*ends(self.registers.widths[STATE]))
        return self.ranges[node.operands[0]].value

    def _fail(self, x: Numbers, samples: range) -> None:
        """Runs samples alone until the first that fails does so, whatever batch it came in.

        Raises:
            SpirError: its own.
        """
        train = self.module.input.type.train is not None
        tally, memory = Tally(self.module, self.registers), np.empty(self.room, np.uint8)
        for i in samples:
            given = x[:, i : i + 1] if train else x[i : i + 1]
            for _ in Pass(self, {}, Scratch(), memory, given, tally).values():
                pass

    def settle(self) -> None:
        """Makes every proof and constant now, so that a run is nothing but a run."""
        _ = self.slots, self.laws, self.tables, self.clipped, self.chunk, self.last, self.room

    def stepped(self, name: str) -> bool:
        """Whether a value is held as frames."""
        return self.module.types[name].train is not None and name not in self.merged

    def _dtype(self, name: str, type_: Tensor) -> Number:
        if isinstance(type_.encoding, Real):
            return FLOAT64
        if name in self.kernels:
            return self.kernels[name].dtype
        return carrier(self._range(name, framed=self.stepped(name)).magnitude)

    def _range(self, name: str, *, framed: bool) -> Interval:
        return self.ranges[name].frame if framed else self.ranges[name].value

    def _border(self, name: str) -> Padding:
        """The zero padding that the first padding reader of a value wants; most linear maps are written without one."""
        source = self.module.definitions.get(name)
        if source is not None and isinstance(source.op, LinearMap) and not isinstance(source.op, Concat):
            return BARE
        paddings = (n.op.padding for n in self.module.readers[name] if isinstance(n.op, (Conv2d, AvgPool)))
        return next((p for p in paddings if p != BARE), BARE)

    def padded(self, node: Node) -> bool:
        """Whether a linear op finds around its operand the very padding that it wants."""
        if not isinstance(node.op, (Conv2d, AvgPool)) or node.op.padding == BARE:
            return False
        return self._border(node.operands[0]) == node.op.padding

    def _kernel(self, node: Node) -> Kernel:
        assert isinstance(node.op, LinearMap)  # the callers asked
        shapes = [t.shape for t in self.module.operand_types(node)]
        if isinstance(node.type.encoding, Real):
            return moving(node.op, shapes)
        ranges = [self._range(o, framed=self.stepped(o)) for o in node.operands]
        return kernel(node.op, shapes, ranges, padded=self.padded(node))

    def _framewise(self, names: list[str]) -> dict[str, Kernel | None]:
        """The merged trains whose frames are asked for, and all that these are made of, with kernels for one frame."""
        found: dict[str, Kernel | None] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            node = self.module.definitions.get(name)
            if name in found:
                continue
            found[name] = None
            if node is not None and isinstance(node.op, LinearMap):
                shapes = [t.shape for t in self.module.operand_types(node)]
                found[name] = kernel(node.op, shapes, [self._range(o, framed=True) for o in node.operands])
                waiting += node.operands
        return found


def _around(node: Node) -> tuple[str, ...]:
    return node.result, *node.operands


def room_for(type_: Tensor, samples: int) -> Numbers:
    """Memory for a stored value."""
    frames = () if type_.train is None else (type_.steps,)
    return np.empty((*frames, samples, *type_.shape), np.float64 if isinstance(type_.encoding, Real) else np.int64)


@attrs.frozen(eq=False)
class Pass:
    """A few samples on their way through the network."""

    program: Program
    framewise: Mapping[str, Kernel | None]
    scratch: Scratch
    memory: NDArray[np.uint8]
    x: Numbers
    tally: Tally
    held: dict[str, Numbers] = attrs.field(factory=dict)
    frames: dict[str, Numbers] = attrs.field(factory=dict)

    def values(self) -> Iterator[tuple[str, Numbers]]:
        """Every value in order, channels-last: frames where it is stepped or they were asked for, else the value."""
        module = self.program.module
        self._read(module.input.name, module.input.type)
        yield self._shown(module.input.name)
        for node in module.nodes:
            self._take(node.result)
            self.step(node)
            if node.result in self.framewise:
                self._make_frames(node)
            yield self._shown(node.result)
            for name in dict.fromkeys((*node.operands, node.result)):
                if self.program.last[name] == node.result:
                    del self.held[name]
                    self.frames.pop(name, None)

    @property
    def samples(self) -> int:
        """How many samples."""
        return int(self.x.shape[0 if self.program.module.input.type.train is None else 1])

    def _take(self, name: str) -> None:
        slot, n = self.program.slots[name], self.samples
        self.held[name] = slot.within(self.memory[self.program.places[name] * n :], n)

    def inside(self, name: str) -> Numbers:
        """A value without its border."""
        return self.program.slots[name].inside(self.held[name])

    def _shown(self, name: str) -> tuple[str, Numbers]:
        return name, self.frames[name] if name in self.frames else self.inside(name)

    def _read(self, name: str, type_: Tensor) -> None:
        self._take(name)
        given = inner(self.x, type_.shape)
        if name in self.framewise:
            self.frames[name] = given
        if name in self.program.merged:
            assert type_.train is not None  # only trains are merged
            given = gather(given, weights(type_.train.code, type_.train.steps))
        np.copyto(self.inside(name), given, casting="unsafe")

    def _make_frames(self, node: Node) -> None:
        """The frames of a merged train: products from the frames of the operands, spikes from the decoded value."""
        by_frame, shape = self.framewise[node.result], inner_shape(node.type.shape)
        dtype = INT64 if by_frame is None else by_frame.dtype
        frames = np.empty((node.type.steps, self.samples, *shape), dtype)
        if by_frame is None:
            assert node.type.train is not None  # only trains are merged
            expand(self.inside(node.result), frames, node.type.train)
        else:
            for t, out in enumerate(frames):
                by_frame.act(self.scratch, out, *(self.frames[o][t] for o in node.operands))
        self.frames[node.result] = frames

    def step(self, node: Node) -> None:
        """Computes one op from the values it reads; all are in `held`."""
        out, op = self.inside(node.result), node.op
        x = [self.inside(o) for o in node.operands]
        if isinstance(op, LinearMap):
            self._linear(node, x, out)
        elif isinstance(op, (Encode, Neuron, Requant)):
            self._respond(node, x[0], out)
        elif isinstance(op, Integrate):
            self._integrate(node, op, x[0], out)
        elif isinstance(op, MaxPool):
            self._pool(op, x[0], out)
        elif isinstance(op, HOST):
            seen = (outer(each, t.shape) for each, t in zip(x, self.program.module.operand_types(node), strict=True))
            compute(op, outer(out, node.type.shape), *seen)
        else:
            self._elementwise(node, x[0], out)

    def _linear(self, node: Node, x: list[Numbers], out: Numbers) -> None:
        made = self.program.kernels[node.result]
        if self.program.padded(node):
            x = [self.held[node.operands[0]]]
        if not self.program.stepped(node.result):
            made.act(self.scratch, out, *x)
            if self.program.loose(node, STATE):
                self._hold(node, STATE, out, None)
            return
        cut = self.program.loose(node, SUM)
        silent = [np.zeros_like(operand[0]) if len(operand) < len(out) else operand[0] for operand in x]
        for t, frame in enumerate(out):
            pairs = zip(x, silent, strict=True)
            made.act(self.scratch, frame, *(operand[t] if t < len(operand) else rest for operand, rest in pairs))
            if cut:
                self._hold(node, SUM, frame, t)

    def _hold(self, node: Node, which: str, place: Numbers, step: int | None) -> None:
        """Cuts channels-last values to their register, in place."""
        seen = outer(place, node.type.shape)
        np.copyto(seen, self.tally.hold(node, which, seen, step), casting="unsafe")

    def _loaded(self, node: Node, x: Numbers) -> Numbers:
        """Integers as the state register of an op takes them, and with the offset of a law that has no multiplier."""
        if not self.program.loose(node, STATE):
            return x
        shape = self.program.module.types[node.operands[0]].shape
        return inner(self.tally.hold(node, STATE, outer(x, shape).astype(np.int64), None), shape)

    def _offset(self, node: Node, total: Numbers) -> Numbers:
        """Sums ``[N, *shape]`` plus the offset of the law, which is one more update of the state."""
        raw = total + channelwise(node.op.add.values, total.ndim - 1)  # type: ignore[attr-defined]  # it has a law
        return self.tally.hold(node, STATE, raw, None)

    def _respond(self, node: Node, x: Numbers, out: Numbers) -> None:
        """A neuron, its law alone, or an encoder: from frames or their value to frames or their value."""
        if self.program.stepped(node.operands[0]):
            self._fire(node, x, out)
            return
        if node.result in self.program.clipped:
            x = np.clip(x, *self.program.clipped[node.result])
        if isinstance(node.op, Encode) and node.op.code == "isi":
            spread(x, out, node.op)
            return
        stepped, value = self.program.stepped(node.result), out
        thinning = node.op.thinning if isinstance(node.op, (Encode, Neuron)) else None
        if stepped or thinning is not None:
            value = self.scratch.take("value", out.shape[1:] if stepped else out.shape, INT64)
        if isinstance(node.op, Encode):
            np.copyto(value, x, casting="unsafe")
        elif self.program.divides(node):
            shape, given = node.type.shape, law_of(node)
            assert given is not None  # it divides
            _, _, div, lo, hi = given
            z = self._offset(node, outer(self._loaded(node, x), shape))
            np.copyto(outer(value, shape), by_law(z, ONE, ZERO, div, lo, hi), casting="unsafe")
        else:
            self.program.laws[node.result].act(self.scratch, value, self._loaded(node, x))
        if thinning is not None:
            value = self._thinned(node, thinning, value)
        if stepped:
            assert node.type.train is not None  # only trains are stepped
            expand(value, out, node.type.train)
        elif thinning is not None:
            np.copyto(out, value, casting="unsafe")

    def _thinned(self, node: Node, thinning: Thinning, codes: Numbers) -> Numbers:
        """What the thinned train of codes decodes to: from a table, or by steps where codes are many."""
        train = node.type.train
        assert isinstance(train, Spikes)  # nothing else is thinned
        table = self.program.tables[node.result]
        if table is None:
            return np.asarray(thinning.decoded(Firing(), codes, train.steps, signed=train.lo < 0))
        return table[codes]  # below 0 from the end, where two's complement has them

    def _fire(self, node: Node, x: Numbers, out: Numbers) -> None:
        assert isinstance(node.op, Neuron)  # nothing else reads trains frame by frame
        shape = node.type.shape
        frames = (outer(frame, shape).astype(np.int64) for frame in x)
        xp = self._namespace(node, len(x))
        if self.program.divides(node):
            spikes = self._divide(node, node.op, xp, frames)
        else:
            spikes = node.op.fire(xp, frames)
        if self.program.stepped(node.result):
            for place, frame in zip(out, spikes, strict=True):
                np.copyto(outer(place, shape), frame, casting="unsafe")
        else:
            assert node.type.train is not None  # a neuron emits trains
            total = gather(spikes, weights(node.type.train.code, node.type.steps))
            np.copyto(outer(out, shape), total, casting="unsafe")

    def _namespace(self, node: Node, frames: int) -> Firing:
        return Held(self.tally, node, frames) if self.program.loose(node, STATE) else Firing()

    def _divide(self, node: Node, op: Neuron, xp: Firing, frames: Iterator[Numbers]) -> Iterator[Numbers]:
        """A neuron whose offset is added in the state register: the sum, the offset, and the steps without either."""
        train = self.program.module.types[node.operands[0]].train
        assert train is not None  # it reads frames
        total = accumulate(xp, frames, train.code, op.shift if isinstance(op, NeuronStem) else 0)
        rest = {"add": ZERO, "shift": 0} if isinstance(op, NeuronStem) else {"add": ZERO}
        return attrs.evolve(op, **rest).fire(Firing(), iter([self._offset(node, total)]))

    def _integrate(self, node: Node, op: Integrate, x: Numbers, out: Numbers) -> None:
        source = self.program.module.types[node.operands[0]]
        if self.program.stepped(node.operands[0]):
            assert source.train is not None  # only trains are stepped
            frames = (outer(frame, source.shape).astype(np.int64) for frame in x)
            total = accumulate(self._namespace(node, len(x)), frames, source.train.code, op.shift)
            total = total if op.bias is None else total + channelwise(op.bias.values, len(source.shape))
            if op.bias is not None and self.program.loose(node, STATE):
                total = self.tally.hold(node, STATE, total, None)
            np.copyto(outer(out, source.shape), total, casting="unsafe")
            return
        if op.bias is not None:
            x = x.astype(np.int64) + aligned(op.bias.values, source.shape)
        np.copyto(out, self._loaded(node, x), casting="unsafe")

    def _pool(self, op: MaxPool, x: Numbers, out: Numbers) -> None:
        """The maximum of integers, or of each frame of a train whose frames are nested or all equal."""
        stepped = x.ndim > 4  # T, N, H, W, C
        for frame, into in zip(x, out, strict=True) if stepped else ((x, out),):
            max_pool(op, self.scratch, into, frame)

    def _elementwise(self, node: Node, x: Numbers, out: Numbers) -> None:
        match node.op:
            case Quantize(scale=scale, lo=lo, hi=hi):
                work = np.floor(x / scale + 0.5)
                np.copyto(out, np.clip(work, lo, hi, out=work), casting="unsafe")
            case Clip(lo=low, hi=high):
                x = self._loaded(node, x)
                np.clip(x, aligned(low.values, node.type.shape), aligned(high.values, node.type.shape), out=out)
            case Relu():
                np.copyto(out, np.maximum(x, 0), casting="unsafe")
            case Dequantize():
                encoding = self.program.module.types[node.operands[0]].encoding
                assert not isinstance(encoding, (Real, Current))  # dequantize reads integers
                np.multiply(x, aligned(encoding.scale.floats(), node.type.shape), out=out)
