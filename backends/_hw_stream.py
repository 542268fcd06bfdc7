"""Samples one behind the other through a pipeline of bit-coded neurons, step by step: `hw{pipeline=one}` and `two`.

All windows, delays and intervals are those of `spir.schedule`, a reconstruction (SDANN, pipelining).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property

import attrs
import numpy as np

from spir.backends._hw_kernels import Kernel, Numbers, Scratch, carrier, inner, inner_shape, kernel, outer
from spir.backends._hw_program import ZERO, Firing, Held, Pass, Program, room_for
from spir.backends._hw_registers import STATE, SUM, Counts, Tally
from spir.errors import SpirError, error
from spir.ir import Module, Node, kept
from spir.ops._accumulation import weighted
from spir.ops._linear import LinearMap, channelwise
from spir.ops._thinning import generate
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.neuron_stem import NeuronStem
from spir.schedule import Schedule, schedule
from spir.text import show_node
from spir.types import Stored, weights

Event = Callable[[int, int], None]
"""What happens to a sample before a step."""


def unstreamed(module: Module, *, delays: bool) -> Iterator[SpirError]:
    """Why the samples of a network cannot follow each other through a pipeline."""
    for node in module.nodes:
        for name in (*node.operands, node.result):
            if not _streams(name, module):
                yield error(
                    "backend",
                    f"the pipeline is one of bit-coded neurons, and %{name} is {module.types[name].encoding}",
                    op=show_node(node),
                    from_=str(node.origin),
                    fix="convert with @stem, or pipeline=off",
                )
                return
    if not delays:
        yield from _early(module)


def _streams(name: str, module: Module) -> bool:
    """Whether a value is no train, or a train that is made as the pipeline makes them."""
    train, node = module.types[name].train, module.definitions.get(name)
    made = node is None or isinstance(node.op, (Encode, NeuronStem, LinearMap))
    return train is None or (train.code == "bits" and made)


def _early(module: Module) -> Iterator[SpirError]:
    for delay in schedule(module).delays:
        node = module.definitions[delay.result]
        yield error(
            "E-RESID-DELAY",
            f"%{delay.operand} comes {delay.steps} steps ({delay.windows} windows) before the other branch of "
            f"%{delay.result}, and its bits would meet others of another weight",
            op=show_node(node),
            from_=str(node.origin),
            fix=f"delays=on, which keeps {delay.steps} frames of it",
        )


@attrs.frozen(eq=False, slots=False)
class Stream:
    """A network as a pipeline: an input frame enters in every step of a window, and the next sample ``interval`` later.

    In every step of global time each layer does what its own window says, for whatever sample is in it: the encoder
    and the generating neurons emit a frame, linear ops hand it on within the step, frames of early branches stand in
    buffers, accumulating neurons add it with the weight of its place in their window. Between two steps sums become
    codes, and integers between them are computed. State variables hold one sample each.

    Attributes:
        program: the module, all trains of which are stepped.
        states: ``one`` or ``two`` state variables a neuron, see `Schedule.interval`.
        interval: steps from sample to sample; one where there are no trains.
        delays: whether early branches wait; without, they meet what they should not.
    """

    program: Program
    states: str
    interval: int = attrs.field()
    delays: bool = True

    @interval.default
    def _least(self) -> int:
        return max(1, schedule(self.program.module).interval(self.states))

    @cached_property
    def schedule(self) -> Schedule:
        """The windows."""
        return schedule(self.program.module)

    @property
    def latency(self) -> int:
        """Steps from the first input frame of a sample to the last one of its output."""
        return self.schedule.latency

    def steps(self, samples: int) -> int:
        """Steps that so many samples take: the latency, and an interval for each but the first."""
        return self.latency + (samples - 1) * self.interval if samples else 0

    @property
    def bytes_per_sample(self) -> int:
        """What all frames of a sample take: no buffer, register or result holds more."""
        return self.program.bytes_per_sample

    def run(self, x: Numbers, keep: str = "") -> dict[str, Stored]:
        """See `spir.backend.Executable.run`; all samples of ``x`` go through the pipeline in a row."""
        return self.run_counting(x, keep)[0]

    @property
    def simulates(self) -> bool:
        """See `spir.backend.Counting`."""
        return self.program.simulates

    def run_counting(self, x: Numbers, keep: str = "") -> tuple[dict[str, Stored], Counts]:
        """See `spir.backend.Counting`."""
        module = self.program.module
        x = module.input.type.read(x)
        samples = x.shape[0 if module.input.type.train is None else 1]
        wanted = (name for name in module.types if kept(name, keep) or name == module.output)
        results = {name: room_for(module.types[name], samples) for name in wanted}
        pipeline = _Pipeline(self, x, samples, results)
        for step in range((samples - 1) * self.interval + self.drained if samples else 0):
            pipeline.between(step)
            pipeline.step(step)
        if samples:
            pipeline.between((samples - 1) * self.interval + self.drained)
        return results, pipeline.tally.counts

    def settle(self) -> None:
        """Makes every proof and constant now, so that a run is nothing but a run."""
        self.program.settle()
        _ = self.kernels, self.drained

    @cached_property
    def drained(self) -> int:
        """Steps until nothing of a sample is left, not even where nobody reads it."""
        types, begin = self.program.module.types, self.schedule.begin
        return max(begin[name] + (type_.steps if type_.train is not None else 0) for name, type_ in types.items())

    @cached_property
    def kernels(self) -> dict[str, Kernel]:
        """The linear ops on trains, for one frame."""
        module, found = self.program.module, dict[str, Kernel]()
        for node in module.nodes:
            if isinstance(node.op, LinearMap) and node.type.train is not None:
                shapes = [t.shape for t in module.operand_types(node)]
                found[node.result] = kernel(node.op, shapes, [self.program.ranges[o].frame for o in node.operands])
        return found


@attrs.define(eq=False, slots=False)
class _Sum:
    """A state variable that adds up frames ``[1, *shape]``."""

    xp: Firing
    total: Numbers


class _Pipeline:
    """One run: registers, buffers and wires of all layers."""

    def __init__(self, stream: Stream, x: Numbers, samples: int, results: dict[str, Stored]) -> None:
        self._stream, self._x, self._samples, self._results = stream, x, samples, results
        self._module, self._begin = stream.program.module, stream.schedule.begin
        self.tally = Tally(self._module, stream.program.registers)
        self._scratch = Scratch()
        self._integers = Pass(stream.program, {}, self._scratch, np.empty(0, np.uint8), x, self.tally)
        self._owner: dict[tuple[str, int], int] = {}
        self._sums: dict[str, _Sum] = {}
        self._codes: dict[str, Iterator[Numbers]] = {}
        self._wires: dict[str, Numbers] = {}
        early = stream.schedule.delays if stream.delays else ()
        self._buffers = {(d.result, d.operand): deque[Numbers | None]([None] * d.steps) for d in early}
        self._sinks = [node for node in self._module.nodes if self._adds(node)]
        self._events = self._all_events()
        for name, type_ in self._module.types.items():
            if type_.train is None:
                slot = stream.program.slots[name]
                self._integers.held[name] = slot.within(np.empty(slot.nbytes, np.uint8), 1)

    # Between steps

    def between(self, step: int) -> None:
        """What happens before a step, the oldest sample first."""
        interval = self._stream.interval
        oldest = max(0, -((self._stream.drained - step) // interval))
        for sample in range(oldest, min(self._samples - 1, step // interval) + 1):
            for happen in self._events.get(step - sample * interval, ()):
                happen(sample, step)

    def _all_events(self) -> dict[int, list[Event]]:
        """What happens to a sample that many steps after it came: numbers move, then variables are free or taken."""
        moved: dict[int, list[Event]] = {}
        freed: dict[int, list[Event]] = {}
        taken: dict[int, list[Event]] = {}
        source = self._module.input
        if source.type.train is None:
            moved.setdefault(0, []).append(self._enter)
        for node in self._module.nodes:
            if node.type.train is None or not isinstance(node.op, LinearMap):
                moved.setdefault(self._begin[node.result], []).append(self._loading(node))
        for node in self._sinks:
            taken.setdefault(self._begin[node.operands[0]], []).append(self._clearing(node))
        for phase in self._stream.schedule.phases:
            for index, (first, end) in enumerate(phase.busy(self._stream.states)):
                if end > first:
                    freed.setdefault(end, []).append(self._freeing(phase.value, index))
                    taken.setdefault(first, []).append(self._taking(phase.value, index))
        return {at: [e for kind in (moved, freed, taken) for e in kind.get(at, [])] for at in {*moved, *freed, *taken}}

    def _enter(self, sample: int, _step: int) -> None:
        source = self._module.input
        given = inner(self._x[sample : sample + 1], source.type.shape)
        np.copyto(self._integers.inside(source.name), given, casting="unsafe")
        self._show(source.name, sample)

    def _loading(self, node: Node) -> Event:
        def load(sample: int, _step: int) -> None:
            if isinstance(node.op, NeuronStem):
                self._codes[node.result] = self._requantised(node, node.op)
            elif isinstance(node.op, Encode):
                self._codes[node.result] = self._encoded(node, node.op)
            elif framed:
                self._read_out(node)
            else:
                self._integers.step(node)
            if node.type.train is None:
                self._show(node.result, sample)

        framed = self._adds(node)
        return load

    def _clearing(self, node: Node) -> Event:
        type_, frames = self._module.types[node.operands[0]], self._module.types[node.operands[0]].steps
        loose = self._stream.program.loose(node, STATE)

        def clear(_sample: int, _step: int) -> None:
            xp = Held(self.tally, node, frames) if loose else Firing()
            self._sums[node.result] = _Sum(xp, np.zeros((1, *type_.shape), np.int64))

        return clear

    def _taking(self, name: str, index: int) -> Event:
        def take(sample: int, step: int) -> None:
            other = self._owner.setdefault((name, index), sample)
            if other != sample:
                raise error(
                    "backend",
                    f"before step {step} sample {sample} comes to %{name}, which still holds sample {other}",
                    fix=f"an interval of {self._stream.schedule.interval(self._stream.states)} steps",
                )

        return take

    def _freeing(self, name: str, index: int) -> Event:
        def free(_sample: int, _step: int) -> None:
            del self._owner[name, index]

        return free

    def _requantised(self, node: Node, op: NeuronStem) -> Iterator[Numbers]:
        """The frames of a sum: computed one by one, in the steps in which they are asked for."""
        total, rest = self._sums[node.result].total, attrs.evolve(op, shift=0)
        if self._stream.program.divides(node):
            total = self.tally.hold(node, STATE, total + channelwise(op.add.values, total.ndim - 1), None)
            rest = attrs.evolve(rest, add=ZERO)
        return rest.fire(Firing(), iter([total]))

    def _encoded(self, node: Node, op: Encode) -> Iterator[Numbers]:
        train, operand = node.type.train, node.operands[0]
        assert train is not None  # an encoder makes one
        codes = outer(self._integers.inside(operand), node.type.shape).astype(np.int64)
        if node.result in self._stream.program.clipped:
            codes = np.clip(codes, *self._stream.program.clipped[node.result])
        return generate(Firing(), codes, op.steps, signed=train.lo < 0, thinning=op.thinning)

    def _read_out(self, node: Node) -> None:
        assert isinstance(node.op, Integrate)  # nothing else makes integers of frames
        total = self._sums[node.result].total
        if node.op.bias is not None:
            total = total + channelwise(node.op.bias.values, total.ndim - 1)
            if self._stream.program.loose(node, STATE):
                total = self.tally.hold(node, STATE, total, None)
        np.copyto(outer(self._integers.inside(node.result), node.type.shape), total, casting="unsafe")

    def _show(self, name: str, sample: int) -> None:
        if name in self._results:
            self._results[name][sample] = outer(self._integers.inside(name), self._module.types[name].shape)[0]

    # In a step

    def step(self, step: int) -> None:
        """One frame of every layer whose window it is: first emitted and handed on, then added."""
        self._wires.clear()
        for name, type_ in self._module.types.items():
            if type_.train is None:
                continue
            place = self._place(name, step)
            frame = self._frame(name, place)
            if frame is None:
                continue
            self._wires[name] = frame
            if place is not None and name in self._results:
                sample, t = place
                self._results[name][t, sample] = outer(frame, type_.shape)[0]
        for (_, operand), buffer in self._buffers.items():
            buffer.popleft()
            buffer.append(self._wires.get(operand))
        for node in self._sinks:
            self._add(node, step)

    def _place(self, name: str, step: int) -> tuple[int, int] | None:
        """The sample whose frame a value has in a step, and which of its frames; None between windows."""
        past = step - self._begin[name]
        sample = min(past // self._stream.interval, self._samples - 1)
        t = past - sample * self._stream.interval
        return (sample, t) if past >= 0 and t < self._module.types[name].steps else None

    def _frame(self, name: str, place: tuple[int, int] | None) -> Numbers | None:
        node, type_ = self._module.definitions.get(name), self._module.types[name]
        if node is not None and isinstance(node.op, LinearMap):
            return self._handed_on(node, place)
        if place is None:
            return None
        sample, t = place
        frame = self._x[t, sample : sample + 1] if node is None else next(self._codes[name])
        dtype = carrier(self._stream.program.ranges[name].frame.magnitude)
        return np.ascontiguousarray(inner(frame, type_.shape), dtype)

    def _handed_on(self, node: Node, place: tuple[int, int] | None) -> Numbers | None:
        seen = [self._arrived(node.result, operand) for operand in node.operands]
        if all(frame is None for frame in seen):
            return None
        made = self._stream.kernels[node.result]
        shapes = [inner_shape(t.shape) for t in self._module.operand_types(node)]
        given = [np.zeros((1, *s), made.dtype) if f is None else f for f, s in zip(seen, shapes, strict=True)]
        out = np.empty((1, *inner_shape(node.type.shape)), made.dtype)
        made.act(self._scratch, out, *given)
        if self._stream.program.loose(node, SUM):
            held = outer(out, node.type.shape)
            np.copyto(held, self.tally.hold(node, SUM, held, None if place is None else place[1]), casting="unsafe")
        return out

    def _arrived(self, result: str, operand: str) -> Numbers | None:
        """What of an operand reaches a linear op in this step: of an early branch, what its buffer lets out."""
        buffer = self._buffers.get((result, operand))
        return self._wires.get(operand) if buffer is None else buffer[0]

    def _add(self, node: Node, step: int) -> None:
        assert isinstance(node.op, (NeuronStem, Integrate))  # a sink is one
        place, type_ = self._place(node.operands[0], step), self._module.types[node.operands[0]]
        if place is None:
            return
        held, weight = self._sums[node.result], weights("bits", type_.steps)[place[1]]
        frame = outer(self._wires[node.operands[0]], type_.shape).astype(np.int64)
        held.total = held.xp.hold(held.total + weighted(held.xp, frame, weight, node.op.shift))

    def _adds(self, node: Node) -> bool:
        """Whether an op adds frames up."""
        framed = self._module.types[node.operands[0]].train is not None
        return framed and isinstance(node.op, (NeuronStem, Integrate))
