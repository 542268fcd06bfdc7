"""Proved integer ranges of every value, per channel: value, frame and prefix."""

from __future__ import annotations

from itertools import accumulate

import attrs

from spir.ir import Module, Node
from spir.ops._linear import LinearMap
from spir.types import Current, Interval, Real, Shape, Spikes, Tensor, weights


@attrs.frozen(eq=False)
class Ranges:
    """Bounds of what a value decodes to, of one frame, and of what any number of leading frames decodes to.

    Without frames all three are the value.
    """

    value: Interval
    frame: Interval
    prefix: Interval


def analyse(module: Module) -> dict[str, Ranges]:
    """The ranges of every integer carrier of a verified module, by name; reals have none."""
    found: dict[str, Ranges] = {}
    if not isinstance(module.input.type.encoding, Real):
        found[module.input.name] = source(module.input.type, module.input.type.range)
    for node in module.nodes:
        if not isinstance(node.type.encoding, Real):
            found[node.result] = _node(
                node,
                tuple(t.shape for t in module.operand_types(node)),
                [found[o] for o in node.operands if o in found],
            )
    return found


def _node(node: Node, shapes: tuple[Shape, ...], operands: list[Ranges]) -> Ranges:
    if isinstance(node.op, LinearMap):
        value = node.op.bounds(shapes, *(r.value for r in operands))
        if node.type.train is None:
            return Ranges(value, value, value)
        frame = node.op.bounds(shapes, *(r.frame for r in operands))
        return Ranges(value, frame, node.op.bounds(shapes, *(r.prefix for r in operands)))
    return source(node.type, node.op.bounds(shapes, *(r.value for r in operands)) if operands else node.type.range)


def source(type_: Tensor, value: Interval) -> Ranges:
    """Ranges of a value that no linear op made: frames and prefixes are those of its code."""
    if isinstance(type_.encoding, Spikes):
        return Ranges(value, Interval.of(*type_.encoding.frame), Interval.of(*type_.encoding.prefix))
    if isinstance(type_.encoding, Current):
        lo, hi = type_.encoding.frame
        sums = list(accumulate(weights(type_.encoding.code, type_.steps)))
        prefix = Interval.of(min(lo * s for s in sums), max(hi * s for s in sums))
        return Ranges(value, Interval.of(lo, hi), prefix)
    return Ranges(value, value, value)
