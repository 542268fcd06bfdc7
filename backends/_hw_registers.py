"""Registers of `hw`: which of them no range proves wide enough, what they then keep, and how often they overflow.

Two's complement of n bits holds ``-2^(n-1) .. 2^(n-1) - 1``. A register that is given another number keeps the nearest
end (saturate) or the number modulo 2^n (wrap), and counts one overflow for the element, the step and the sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs
import numpy as np

from spir.backends._hw_kernels import Numbers, triple_of
from spir.errors import SpirError, error
from spir.ir import Module, Node
from spir.ops._accumulation import frame_bounds
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops._threshold import Triple, products
from spir.ops.clip import Clip
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.neuron_stem import NeuronStem
from spir.ops.requant import Requant
from spir.ranges import Ranges, accumulated, analyse, decided, result, source
from spir.text import show_node
from spir.types import Interval, Real, Spikes, weights

SUM, STATE = "sum", "state"
Register = tuple[str, str]
"""A value, and which of its registers: the one that forms a weight sum of a step, or the one that keeps a state."""
Counts = dict[Register, Numbers]
"""Overflows a channel."""
WORD = 2**63
"""What `hw` computes in holds numbers below this."""


def ends(bits: int) -> tuple[int, int]:
    """What a register holds."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def beyond(x: Interval, bits: int) -> Numbers:
    """The entries of bounds that a register does not hold."""
    low, high = ends(bits)
    return np.asarray((x.lo < low) | (x.hi > high), dtype=bool)


def sums(node: Node) -> bool:
    """Whether an op forms weight sums: a linear op does, unless it only moves elements."""
    return isinstance(node.op, LinearMap) and not (isinstance(node.type.encoding, Spikes) or node.op.relabels)


def law_of(node: Node) -> Triple | None:
    """The integers by which an op turns its sum into a code."""
    return node.op.law if isinstance(node.op, NeuronStem) else triple_of(node.op)


def whole(node: Node, module: Module) -> bool:
    """Whether a law adds its offset to the sum of all frames at once, not in shares of a step."""
    train = module.types[node.operands[0]].train
    shared = isinstance(node.op, Neuron) and train is not None and node.op.state(train) is not None
    return law_of(node) is not None and not shared


def states(node: Node, module: Module, found: Mapping[str, Ranges]) -> Interval | None:
    """All that the state register of an op is asked to keep, but for the offset of its law; None without one."""
    if isinstance(node.op, (Neuron, Integrate)):
        return accumulated(node, module, found)
    if isinstance(node.op, (Requant, Clip)):
        return found[node.operands[0]].value
    return found[node.result].value if sums(node) and node.type.train is None else None


def encodable(node: Node, module: Module) -> tuple[int, int] | None:
    """What an encoder can turn into spikes; thresholds clip the rest, which only registers that overflow bring."""
    train = node.type.train
    if not isinstance(node.op, Encode) or train is None:
        return None
    if node.op.code == "isi":
        return module.types[node.operands[0]].range.hull
    return Spikes.limits(node.op.steps, node.op.code, signed=train.lo < 0)


def offset(node: Node, module: Module, z: Interval) -> Interval | None:
    """Bounds of a sum within ``z`` plus the offset of the law, for a law without a multiplier; None without a law."""
    law = law_of(node)
    if law is None or not whole(node, module):
        return None
    return products(*law[:2], z)


@attrs.frozen(eq=False)
class Registers:
    """How wide registers are, what they do with numbers that they do not hold, and which of them may meet any.

    Attributes:
        widths: bits of ``sum`` and ``state``.
        overflow: saturate, wrap or error; empty where nothing can overflow.
        offsets: whether the offset of a law is added in the state register, on chips without a multiplier.
        ranges: bounds of every value, of what registers keep where they may overflow.
        loose: the registers that no range proves wide enough; all others are wide enough for every input.
    """

    widths: Mapping[str, int]
    overflow: str
    offsets: bool
    ranges: Mapping[str, Ranges]
    loose: frozenset[Register] = frozenset()

    @classmethod
    def proved(cls, module: Module) -> Registers:
        """Of a module all of whose registers are wide enough."""
        return cls({}, "", offsets=False, ranges=analyse(module))

    @classmethod
    def simulated(cls, module: Module, widths: Mapping[str, int], overflow: str, *, offsets: bool) -> Registers:
        """Follows ranges through the registers; behind one that may overflow they are what it may keep."""
        walk = _Walk(module, widths, offsets=offsets)
        for node in module.nodes:
            if not isinstance(node.type.encoding, Real):
                walk.follow(node)
        return cls(widths, overflow, offsets, walk.found, frozenset(walk.loose))

    def kept(self, raw: Numbers, which: str) -> Numbers:
        """What a register makes of numbers below 2^63."""
        low, high = ends(self.widths[which])
        if self.overflow == "wrap":
            return np.asarray(((raw.astype(np.int64) - low) & (2 ** self.widths[which] - 1)) + low)
        return np.asarray(np.clip(raw, low, high))


class _Walk:
    """One pass over the nodes: ranges are those of `analyse` until a register may overflow on the way to a value."""

    def __init__(self, module: Module, widths: Mapping[str, int], *, offsets: bool) -> None:
        self.module, self.widths, self.offsets = module, widths, offsets
        self.plain = analyse(module)
        self.found = {name: r for name, r in self.plain.items() if name == module.input.name}
        self.loose: set[Register] = set()
        self.changed: set[str] = set()

    def follow(self, node: Node) -> None:
        """The ranges of a node, and its registers that may overflow."""
        name = node.result
        # Relations between values, which `analyse` knows, end at a register that may overflow.
        if self.changed.isdisjoint(node.operands):
            self.found[name] = self.plain[name]
        else:
            self.found[name] = self._encoded(node) or result(node, self.module, self.found)
            self.changed.add(name)
        if sums(node) and node.type.train is not None:
            self._sum(node)
        else:
            self._state(node)

    def _encoded(self, node: Node) -> Ranges | None:
        limits = encodable(node, self.module)
        if limits is None:
            return None
        shapes = tuple(t.shape for t in self.module.operand_types(node))
        codes = self.found[node.operands[0]].value.map(lambda end: np.clip(end, *limits))
        return source(node.type, node.op.bounds(shapes, codes))

    def _sum(self, node: Node) -> None:
        mine, train, bits = self.found[node.result], node.type.train, self.widths[SUM]
        over = beyond(mine.frame, bits)
        if not over.any():
            return
        assert train is not None  # the caller asked
        first, rest = _cut(mine.first, over, bits), _cut(mine.rest, over, bits)
        total, prefix = frame_bounds(first, rest, weights(train.code, train.steps), 0)
        value, prefix = _where(over, total, mine.value), _where(over, prefix, mine.prefix)
        self._note(node, SUM, Ranges(value, first | rest, prefix, first, rest))

    def _state(self, node: Node) -> None:
        asked, bits = states(node, self.module, self.found), self.widths[STATE]
        if asked is None:
            return
        over = beyond(asked, bits)
        added = self._offset(node, over)
        if not over.any() and not added:
            return
        if law_of(node) is None and not isinstance(node.op, Neuron):
            value = _cut(self.found[node.result].value, over, bits)
            if isinstance(node.op, Clip):
                shapes = tuple(t.shape for t in self.module.operand_types(node))
                value = node.op.bounds(shapes, _cut(asked, over, bits))
            self._note(node, STATE, Ranges(value, value, value))
        else:
            self._note(node, STATE, source(node.type, node.type.range))  # laws and neurons clip

    def _offset(self, node: Node, over: Numbers) -> bool:
        """Whether the sum plus the offset may be beyond the state register."""
        if not self.offsets:
            return False
        low, high = ends(self.widths[STATE])
        z = Interval.of(low, high) if over.any() else decided(node, self.module, self.found) if law_of(node) else None
        asked = None if z is None else offset(node, self.module, z)
        return asked is not None and bool(beyond(asked, self.widths[STATE]).any())

    def _note(self, node: Node, which: str, ranges: Ranges) -> None:
        self.found[node.result] = ranges
        self.loose.add((node.result, which))
        self.changed.add(node.result)


def _cut(x: Interval, over: Numbers, bits: int) -> Interval:
    """Bounds of what a register keeps of numbers that it does not all hold."""
    return _where(over, Interval.of(*ends(bits)), x)


def _where(over: Numbers, a: Interval, b: Interval) -> Interval:
    return Interval(np.where(over, a.lo, b.lo), np.where(over, a.hi, b.hi))


def unsimulated(node: Node, module: Module, registers: Registers) -> str | None:
    """What of an op may leave 64 bits before a register cuts it, so that `hw` cannot simulate it; None: nothing."""
    found, name = registers.ranges, node.result
    if (name, SUM) in registers.loose:
        raw = result(node, module, found).frame.magnitude
        return "the weight sum" if raw >= WORD else None
    if (name, STATE) not in registers.loose:
        return None
    low, high = ends(registers.widths[STATE])
    asked = states(node, module, found)
    assert asked is not None  # it is loose
    if sums(node):
        asked = result(node, module, found).value
    if 2 * asked.magnitude - low >= WORD:
        return "the accumulator"
    law = law_of(node)
    if law is not None and products(*law[:2], Interval.of(low, high)).magnitude >= WORD:
        return "mul * z + add"
    return None


class Tally:
    """Overflows by register and channel; one a thread, added up behind the last sample."""

    def __init__(self, module: Module, registers: Registers) -> None:
        self._module, self._registers = module, registers
        self.counts: Counts = {}

    def hold(self, node: Node, which: str, raw: Numbers, step: int | None) -> Numbers:
        """What a register keeps of numbers ``[N, *shape]``.

        Raises:
            SpirError[E-ISUM], SpirError[E-VRANGE]: where overflow is an error, at the first in order of the elements.
        """
        low, high = ends(self._registers.widths[which])
        over = (raw < low) | (raw > high)
        if not over.any():
            return raw
        if self._registers.overflow == "error":
            at = tuple(np.argwhere(over)[0])
            raise _overflow(node, which, int(raw[at]), int(at[1]), step, self._registers.widths[which])
        found = over.sum(axis=(0, *range(2, over.ndim)), dtype=np.int64)
        self.counts[node.result, which] = self.counts.get((node.result, which), 0) + found
        return self._registers.kept(raw, which)


def added(tallies: Iterable[Counts]) -> Counts:
    """Counts of several threads or batches."""
    total: Counts = {}
    for counts in tallies:
        for register, found in counts.items():
            total[register] = total.get(register, 0) + found
    return total


def _overflow(node: Node, which: str, value: int, channel: int, step: int | None, bits: int) -> SpirError:
    low, high = ends(bits)
    what = "the weight sum" if which == SUM else "the accumulator"
    when = "" if step is None else f" at step {step}"
    return error(
        "E-ISUM" if which == SUM else "E-VRANGE",
        f"{what} of %{node.result} is {value} in channel {channel}{when}, and {bits} bits hold {low}..{high}",
        op=show_node(node),
        from_=str(node.origin),
        fix="overflow=refuse says before a run which registers are too narrow, overflow=saturate goes on and counts",
    )
