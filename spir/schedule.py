"""When values are there: windows of neurons, delays of skip paths, latency and interval. Never part of a type.

Source: SDANN, pipelining. The published text lost its numbers: all of it is a reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

import attrs

from spir.errors import unknown
from spir.ir import Module, Node
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops.encode import Encode

STATES = ("one", "two")
"""State variables of a neuron: one for its sum and its code, or one for each."""
Span = tuple[int, int]
"""Steps from the first frame of the sample on: the first, and the one behind the last."""


@attrs.frozen
class Delay:
    """A branch that waits: ``operand`` of ``result`` is there ``windows`` windows before the others."""

    result: str
    operand: str
    windows: int
    steps: int


@attrs.frozen
class Phase:
    """What a neuron, an encoder, a readout or the input does with one sample, in steps from its first input frame on.

    Attributes:
        value: its name.
        accumulate: the steps in which it adds frames up; none of them for an input that comes whole, None where
            nothing is added.
        generate: the steps in which it emits frames; None for sums and for an input that comes whole.
        taken: the step before which the sum is read for the last time, where sum and code have variables of their own.
        end: the step before which its train is out; of a sum, the trains that are made of it.
    """

    value: str
    accumulate: Span | None
    generate: Span | None
    taken: int
    end: int

    def busy(self, states: str) -> tuple[Span, ...]:
        """For every state variable, the steps in which it holds the sample."""
        if self.accumulate is None:
            return () if self.generate is None else (self.generate,)
        first = self.accumulate[0]
        if states == "one":
            return ((first, self.end),)
        return ((first, self.taken), *(() if self.generate is None else (self.generate,)))


@attrs.frozen
class Schedule:
    """For every train the window in which its first frame appears, counted from that of the input.

    ``windows`` is how many the output needs, its own among them, and ``latency`` how many steps that takes; of bits the
    latency of L layers of neurons is (L + 1) b steps. ``phases`` are what state variables do, ``begin`` is the step of
    the first frame of every train, and for all other values the step before which they are there. Source: SDANN,
    pipelining (reconstruction).
    """

    start: Mapping[str, int]
    delays: tuple[Delay, ...]
    windows: int
    latency: int
    begin: Mapping[str, int]
    phases: tuple[Phase, ...]

    def interval(self, states: str = "two") -> int:
        """The least number of steps between samples at which no state variable is asked to hold two of them.

        A variable holds a sample from the first frame it adds, or emits, until its number is read for the last time, or
        its last frame is out: one span. Spans of consecutive samples are apart exactly if they are no longer than the
        interval, so that the longest one counts. With ``states = one`` a neuron's only variable is held while it
        accumulates and while it generates: 2b steps where all trains have b. With ``two`` the sum moves to a second
        variable as a code, and either is held for b.

        Raises:
            SpirError[option]: neither one nor two.
        """
        if states not in STATES:
            raise unknown("number of state variables called", states, STATES, code="option")
        return max((end - first for phase in self.phases for first, end in phase.busy(states)), default=0)

    def steps(self, samples: int, states: str = "two") -> int:
        """Steps from the first frame of the first sample to the last one of the last output."""
        return self.latency + (samples - 1) * self.interval(states) if samples else 0


def schedule(module: Module) -> Schedule:
    """The schedule of a verified module; a two-phase neuron, or an encoder of integrals, starts one window later.

    A window lasts as many steps as the longest train in it has frames; a neuron that has read a shorter train, or emits
    one, waits for the end of the window.
    """
    start: dict[str, int] = {module.input.name: 0}
    summed: dict[str, bool] = {module.input.name: False}  # whether frames are among what it is made of
    late: list[tuple[str, str, int, int]] = []
    for node in module.nodes:
        ready = {o: start[o] for o in node.operands}
        latest = max(ready.values())
        if isinstance(node.op, LinearMap) and node.type.train is not None:
            late += [(node.result, o, at, latest) for o, at in ready.items() if at < latest]
        summed[node.result] = any(summed[o] or module.types[o].train is not None for o in node.operands)
        start[node.result] = latest + int(_waits(node, summed[node.result]))
    lengths = _lengths(start, module)
    delays = (Delay(result, o, latest - at, sum(lengths[at:latest])) for result, o, at, latest in late)
    windows = min(len(lengths), start[module.output] + 1)
    offsets = (*accumulate(lengths, initial=0),)
    begin = {name: offsets[at + (summed[name] and module.types[name].train is None)] for name, at in start.items()}
    return Schedule(start, tuple(delays), windows, sum(lengths[:windows]), begin, tuple(_phases(module, begin)))


def _lengths(start: Mapping[str, int], module: Module) -> list[int]:
    """The steps of each window: the frames of the longest train in it."""
    longest: dict[int, int] = {}
    for name, at in start.items():
        if module.types[name].train is not None:
            longest[at] = max(longest.get(at, 0), module.types[name].steps)
    return [longest.get(at, 0) for at in range(max(longest, default=-1) + 1)]


def _waits(node: Node, summed: bool) -> bool:
    """Whether an op emits its first frame only after the last frame of what it reads."""
    return node.op.two_phase if isinstance(node.op, Neuron) else isinstance(node.op, Encode) and summed


def _phases(module: Module, begin: Mapping[str, int]) -> Iterator[Phase]:
    """The phases of everything that holds a state, in order."""
    taken, end = _held(module, begin)
    for name, type_ in module.types.items():
        node, emitted = module.definitions.get(name), (begin[name], begin[name] + type_.steps)
        read = None if node is None or module.types[node.operands[0]].train is None else node.operands[0]
        if node is None:
            carried = type_.train is not None
            yield (
                Phase(name, None, emitted, 0, emitted[1])
                if carried
                else Phase(name, (0, 0), None, taken[name], end[name])
            )
        elif isinstance(node.op, Neuron):
            first = begin[node.operands[0]]
            last = first if read is None else first + module.types[read].steps
            yield Phase(name, (first, last), emitted, max(emitted[0], last), max(emitted[1], last))
        elif isinstance(node.op, Encode):
            yield Phase(name, None, emitted, *emitted)
        elif read is not None and type_.train is None:
            first = begin[read]
            yield Phase(name, (first, first + module.types[read].steps), None, taken[name], end[name])


def _held(module: Module, begin: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """For values that are no trains, the step before which they are last read, and before which trains of them are out.

    Values that wait for others do so in the variable that they were summed in.
    """
    taken: dict[str, int] = {}
    end: dict[str, int] = {}
    for name in reversed([name for name, type_ in module.types.items() if type_.train is None]):
        taken[name] = end[name] = begin[name]
        for node in module.readers[name]:
            reads, ends = taken.get(node.result), end.get(node.result)
            if reads is None or ends is None:  # a train
                ends = begin[node.result] + node.type.steps
                reads = begin[node.result] if isinstance(node.op, (Encode, Neuron)) else ends
            taken[name], end[name] = max(taken[name], reads), max(end[name], ends)
    return taken, end
