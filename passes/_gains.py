"""Constants between activations and weights: how they sink through other ops until weights can take them in."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from spir.ir import Array, Module, Node, Origin
from spir.ops._linear import LinearMap, Relabelling, WeightedMap, channelwise, per_channel
from spir.ops.add import Add
from spir.ops.concat import Concat
from spir.ops.max_pool import MaxPool
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.rewriting import Rewriter
from spir.types import Reals, Shape


@attrs.frozen(eq=False)
class Affine:
    """``gain value + offset``: one gain a channel ``[C]``, one offset an element ``[*shape]``, or None."""

    value: str
    gain: Reals
    offset: Reals | None = None

    @classmethod
    def of(cls, value: str, rewriter: Rewriter) -> Affine:
        """A value of reals as constants of what was there before them."""
        shape = rewriter.type(value).shape
        gain, offset = np.ones(shape[0]), np.zeros(shape)
        while (source := rewriter.definition(value)) is not None:
            match source.op:
                case Scaling(to=None) if not source.op.factor.integral:
                    gain = gain * source.op.factor.values
                case Shift():
                    offset = offset + channelwise(gain, len(shape)) * channelwise(source.op.offset.values, len(shape))
                case _:
                    break
            (value,) = source.operands
        return cls(value, gain, offset if offset.any() else None)

    @property
    def even(self) -> bool:
        """Whether all channels have one gain."""
        return bool((self.gain == self.gain[0]).all())


def sunk(node: Node, rewriter: Rewriter) -> str | None:
    """The op in front of the gains and offsets of its operands, where they pass it."""
    given = [Affine.of(rewriter.now(o), rewriter) for o in node.operands]
    if all((a.gain == 1).all() for a in given):
        return None
    shapes = [rewriter.type(a.value).shape for a in given]
    if isinstance(node.op, MaxPool) and (given[0].gain < 0).any():
        given = [_turned(given[0], node, rewriter)]
    if (made := _passed(node, given, shapes)) is None:
        return None
    gain, offset = made
    value = rewriter.fresh(f"{node.result}.unit")
    rewriter.emit(node.op, *(a.value for a in given), name=value, origin=node.origin)
    scaled = node.result if offset is None else rewriter.fresh(f"{node.result}.gained")
    same = (gain == gain[0]).all()
    rewriter.emit(Scaling(Array.of(gain[:1] if same else gain)), value, name=scaled, origin=node.origin)
    return scaled if offset is None else shifted(scaled, offset, node.result, node.origin, rewriter)


def _turned(given: Affine, node: Node, rewriter: Rewriter) -> Affine:
    """The signs of gains on the value itself: integers multiply by them, and a maximum lets the rest pass."""
    signs = Scaling(Array.of(np.where(given.gain < 0, -1, 1)))
    name = rewriter.fresh(f"{node.result}.turned")
    value = rewriter.emit(signs, given.value, name=name, origin=node.origin)
    return Affine(value, np.abs(given.gain), given.offset)


def _passed(node: Node, given: list[Affine], shapes: list[Shape]) -> tuple[Reals, Reals | None] | None:
    """Gains and offsets behind an op, or None where they do not pass it."""
    first, *others = given
    match node.op:
        case MaxPool():
            constant = first.offset is None or (first.offset == first.offset[:, :1, :1]).all()
            if not constant:
                return None
            shape = node.type.shape
            return first.gain, None if first.offset is None else np.broadcast_to(first.offset[:, :1, :1], shape)
        case Concat(axis=0):
            gain = np.concatenate([a.gain for a in given])
        case Relabelling():
            found = [
                {float(first.gain[c]) for c in sources if c >= 0} or {1.0} for sources in node.op.sources(shapes[0])
            ]
            if any(len(gains) > 1 for gains in found):
                return None
            gain = np.array([gains.pop() for gains in found])
        case _:
            if any((a.gain != first.gain).any() for a in others):
                return None
            gain = first.gain
    assert isinstance(node.op, LinearMap)  # max_pool is the one that is not
    offset = offset_behind(node.op, [a.offset for a in given], shapes)
    return gain, None if offset is None or not offset.any() else offset


def offset_behind(op: LinearMap, offsets: Sequence[Reals | None], shapes: Sequence[Shape]) -> Reals | None:
    """What a linear map, less its own bias, makes of its operands' offsets ``[*shape]``; None where none has one."""
    if all(offset is None for offset in offsets):
        return None
    plain = attrs.evolve(op, bias=None) if isinstance(op, WeightedMap) else op
    filled = (np.zeros(s) if o is None else o for o, s in zip(offsets, shapes, strict=True))
    found: Reals = plain.apply(*(o[None] for o in filled), real=True)[0]
    return found


def folded(op: WeightedMap, operand: str, rewriter: Rewriter) -> tuple[WeightedMap, str, Reals | None]:
    """Float weights with the gains of their operand in them, what that was before, and what its offset adds."""
    found = Affine.of(operand, rewriter)
    if found.even:
        return op, operand, None
    weight, channels = op.weight.values, len(found.gain)
    inputs = weight.shape[1]
    each = np.repeat(found.gain.reshape(channels // inputs, inputs), len(weight) * inputs // channels, axis=0)
    scaled = attrs.evolve(op, weight=Array.of(weight * each.reshape(len(weight), inputs, *(1,) * (weight.ndim - 2))))
    added = offset_behind(op, [found.offset], [rewriter.type(found.value).shape])
    return scaled, found.value, None if added is None or not added.any() else added


def shifted(value: str, offset: Reals, name: str, origin: Origin, rewriter: Rewriter) -> str:
    """A constant on a value, one a channel where that says it all."""
    return rewriter.emit(Shift(Array.of(per_channel(offset))), value, name=name, origin=origin)


def keeps_channels(name: str, module: Module) -> bool:
    """Whether gains per channel can sink from a value to all weights that read it."""
    found = [name]
    for value in found:
        for reader in module.readers[value]:
            match reader.op:
                case WeightedMap() | Add():
                    continue
                case Relabelling() if any(len(s - {-1}) > 1 for s in reader.op.sources(module.types[value].shape)):
                    return False
                case Shift(offset=offset) if offset.values.ndim > 1:
                    return False
                case LinearMap() | MaxPool() | Shift() if reader.result not in found:
                    found.append(reader.result)
    return True
