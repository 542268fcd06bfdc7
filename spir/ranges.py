"""Proved integer ranges of every value, per channel: value, frame and prefix, and inputs that attain them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.ir import Module, Node
from spir.ops._accumulation import Shift, frame_bounds, scaled
from spir.ops._linear import LinearMap, channelwise
from spir.ops._neuron import Neuron
from spir.ops.add import Add
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.neuron_stem import NeuronStem
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.types import Current, Interval, Real, Shape, Spikes, Tensor, weights

BRANCHES = 128
"""So often at most a relu of a sum is told apart from its operand, because each doubles the work."""


@attrs.frozen(eq=False)
class Ranges:
    """Bounds of what a value decodes to, of one frame, and of what any number of leading frames decodes to.

    Without frames all three are the value. ``first`` bounds the first frame, which may hold signs, and ``rest`` every
    other one; frames reach their bounds independently of each other.
    """

    value: Interval
    frame: Interval
    prefix: Interval
    first: Interval = attrs.field(default=attrs.Factory(lambda self: self.frame, takes_self=True))
    rest: Interval = attrs.field(default=attrs.Factory(lambda self: self.frame, takes_self=True))


def analyse(module: Module) -> dict[str, Ranges]:
    """The ranges of every integer carrier of a verified module, by name; reals have none.

    Operands are taken as independent, but for one relation: b + relu(a - b) lies between a and b.
    """
    found: dict[str, Ranges] = {}
    sums = _Sums(found)
    if not isinstance(module.input.type.encoding, Real):
        found[module.input.name] = source(module.input.type, module.input.type.range)
    for node in module.nodes:
        if not isinstance(node.type.encoding, Real):
            found[node.result] = sums.narrowed(node, result(node, module, found))
    return found


def result(node: Node, module: Module, found: Mapping[str, Ranges]) -> Ranges:
    """The ranges of what an integer op makes of operands within ``found`` that are independent of each other."""
    shapes = tuple(t.shape for t in module.operand_types(node))
    lengths = [t.steps for t in module.operand_types(node)]
    return _node(node, shapes, lengths, [found[o] for o in node.operands if o in found])


def _node(node: Node, shapes: tuple[Shape, ...], lengths: list[int], operands: list[Ranges]) -> Ranges:
    if isinstance(node.op, LinearMap):
        value = node.op.bounds(shapes, *(r.value for r in operands))
        if node.type.train is None:
            return Ranges(value, value, value)
        ended = [steps < node.type.steps for steps in lengths]
        later = (r.rest.with_zero() if over else r.rest for r, over in zip(operands, ended, strict=True))
        first, rest = node.op.bounds(shapes, *(r.first for r in operands)), node.op.bounds(shapes, *later)
        return Ranges(value, first | rest, node.op.bounds(shapes, *(r.prefix for r in operands)), first, rest)
    value = node.op.bounds(shapes, *(r.value for r in operands)) if operands else node.type.range
    if isinstance(node.op, Integrate) and scaled(node.op.shift):
        value = _narrower(value, node.op.biased(_scaled(node.op.shift, operands[0], lengths[0])[0]))
    return source(node.type, value)


def _scaled(shift: Shift, read: Ranges, steps: int) -> tuple[Interval, Interval]:
    """Exact bounds of a scaled sum of bits: after all frames, and after any number of them."""
    return frame_bounds(read.first, read.rest, weights("bits", steps), shift)


def source(type_: Tensor, value: Interval) -> Ranges:
    """Ranges of a value that no linear op made: frames and prefixes are those of its code."""
    if isinstance(type_.encoding, Spikes):
        train = type_.encoding
        first, *more = (Interval.of(*ends) for ends in train.frames)
        rest = more[0] if more else first
        return Ranges(value, first | rest, Interval.of(*train.prefix), first, rest)
    if isinstance(type_.encoding, Current):
        lo, hi = type_.encoding.frame
        sums = list(accumulate(weights(type_.encoding.code, type_.steps)))
        prefix = Interval.of(min(lo * s for s in sums), max(hi * s for s in sums))
        return Ranges(value, Interval.of(lo, hi), prefix)
    return Ranges(value, value, value)


def accumulated(node: Node, module: Module, found: Mapping[str, Ranges]) -> Interval | None:
    """Every state that the accumulator of an op takes, per channel: after each frame, and with a bias; else None.

    None for ops that accumulate nothing.
    """
    if not isinstance(node.op, (Neuron, Integrate)):
        return None
    (type_, *_), read = module.operand_types(node), found[node.operands[0]]
    if type_.train is None:
        held = read.value
    elif isinstance(node.op, (NeuronStem, Integrate)):
        held = read.value | read.prefix
        if scaled(node.op.shift):
            _, held = _scaled(node.op.shift, read, type_.steps)
    else:
        held = node.op.state(type_.train) or read.value | read.prefix
    return held | found[node.result].value if isinstance(node.op, Integrate) else held


def decided(node: Node, module: Module, found: Mapping[str, Ranges]) -> Interval:
    """Bounds of the sum of all frames, in counts of its register: what a law is applied to."""
    read, train = found[node.operands[0]], module.types[node.operands[0]].train
    if isinstance(node.op, NeuronStem) and train is not None and node.op.triple is None:
        return frame_bounds(read.first, read.rest, weights(train.code, train.steps), node.op.shift)[0]
    return read.value


def witness(
    op: LinearMap, shapes: Sequence[Shape], operands: Sequence[Interval], channel: int, *, top: bool = True
) -> tuple[NDArray[Any], ...]:
    """Operands ``[*shape]`` within their ranges that take one channel of a linear map to its upper or lower bound.

    Each element sits at an end of its range, chosen by the sign of the weight that leads to the position in the channel
    where the bound is reached.

    Args:
        op: on integer carriers; with the ranges of frames it is the witness of one frame.
        shapes: of the operands.
        operands: their ranges.
        channel: of the result.
        top: the upper bound, else the lower.
    """
    widest = max(op.bounds(tuple(shapes), *operands).magnitude, *(x.magnitude for x in operands))
    dtype = np.dtype(np.int64 if widest < 2**61 else object)
    ends = [
        tuple(np.broadcast_to(channelwise(end.astype(dtype), len(s)), s)[None] for end in (x.lo, x.hi))
        for x, s in zip(operands, shapes, strict=True)
    ]
    centre = op.apply(*(hi + lo for lo, hi in ends), real=False)
    spread = op.weighing(np.abs).apply(*(hi - lo for lo, hi in ends), real=False)
    reach = (centre + spread if top else spread - centre).reshape(centre.shape[1], -1)[channel]
    one = np.zeros(centre.shape, dtype=dtype)
    one.reshape(one.shape[1], -1)[channel, int(np.argmax(reach))] = 1
    signs = op.adjoint(one, *shapes)
    return tuple(np.where((sign > 0) == top, hi, lo)[0] for sign, (lo, hi) in zip(signs, ends, strict=True))


Terms = dict[str, int]
"""An elementwise sum of values, each times an integer."""


class _Sums:
    """Which values are elementwise sums of which, so that b + relu(a - b) is recognised however it was built up."""

    def __init__(self, found: Mapping[str, Ranges]) -> None:
        self.found = found
        self.terms: dict[str, Terms] = {}
        self.relus: dict[str, Terms] = {}  # in order of definition
        self.left = 0

    def narrowed(self, node: Node, ranges: Ranges) -> Ranges:
        """The ranges of a node; the value of a sum with a relu in it may be known better."""
        terms = self._read(node)
        if not isinstance(node.op, Add) or self.relus.keys().isdisjoint(terms):
            return ranges
        self.left = BRANCHES
        tight = _narrower(ranges.value, self._bounds(terms))
        if node.type.train is None:
            return Ranges(tight, tight, tight)
        return attrs.evolve(ranges, value=tight)

    def _read(self, node: Node) -> Terms:
        """The node's result as a sum; a value of its own is a sum of itself."""
        own: Terms = {node.result: 1}
        operands = [self.terms.get(name, {name: 1}) for name in node.operands]
        match node.op:
            case Add():
                own = _added(*operands)
            case Scaling() if node.op.multiplier.size == 1 and node.op.to is None:
                own = {name: count * int(node.op.multiplier.item()) for name, count in operands[0].items()}
            case Encode(lossless=True) | Integrate(bias=None, shift=0):
                (own,) = operands
            case Requant() | Neuron() if _is_relu(node.op):
                self.relus[node.result] = operands[0]
        self.terms[node.result] = own
        return own

    def _bounds(self, terms: Terms) -> Interval:
        """The range of a sum: with r = relu(d) in it, between the sum without r and the sum with d for r."""
        parts = (self.found[name].value.times(np.array([count], dtype=object)) for name, count in terms.items())
        independent = sum(parts, Interval.of(0, 0))
        relus = [name for name in self.relus if name in terms]
        if len(terms) < 2 or not relus or not self.left:
            return independent
        self.left -= 1
        last = relus[-1]
        rest = {name: count for name, count in terms.items() if name != last}
        passed = {name: count * terms[last] for name, count in self.relus[last].items()}
        return _narrower(independent, self._bounds(rest) | self._bounds(_added(rest, passed)))


def _narrower(a: Interval, b: Interval) -> Interval:
    """What two sound bounds have in common."""
    return Interval(np.maximum(a.lo, b.lo), np.minimum(a.hi, b.hi))


def _added(*sums: Terms) -> Terms:
    total: dict[str, int] = {}
    for terms in sums:
        for name, count in terms.items():
            total[name] = total.get(name, 0) + count
    return {name: count for name, count in total.items() if count}


def _is_relu(op: Requant | Neuron) -> bool:
    """Whether the law is clamp(z, 0, hi)."""
    if op.triple is None or (isinstance(op, Neuron) and op.thinning is not None):
        return False
    mul, add, div, lo, _ = op.triple
    return div == 1 and lo == 0 and bool((mul.values == 1).all()) and not add.values.any()
