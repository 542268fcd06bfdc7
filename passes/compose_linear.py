"""compose-linear: linear maps in a row to one map."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from spir.contracts import Contract, Exact
from spir.ir import Array, Node
from spir.ops._linear import LinearMap, WeightedMap, channelwise
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.linear import Linear
from spir.ops.permute import Permute
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.options import option
from spir.rewriting import Pass, Rewriter
from spir.types import Integers, Real, Scale, Shape, scale_of


@attrs.frozen
class ComposeLinear(Pass):
    """linear(map(x)) -> linear(flatten(x)), conv2d(scale(x)) -> conv2d(x), add(add(x, y), z) -> add(x, y, z), and more.

    conv2d of a pool is a wider conv2d, a scale behind weights multiplies them, moves of moves are one move: so only
    spikes meet weights. On integers, and where the scale of the two is an exact float64; elsewhere both stay. What
    others read too stays for them.
    """

    name: ClassVar[str] = "compose-linear"
    largest: int = option(2**24, "so many weights at most in one composed map", ge=1)

    def contract(self) -> Contract:
        """Integer weights are multiplied out."""
        return Exact()

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """The node on what its operand was made of."""
        if not isinstance(node.op, LinearMap) or isinstance(node.type.encoding, Real):
            return None
        if isinstance(node.op, Add):
            return _added(node, rewriter)
        operand = rewriter.now(node.operands[0])
        found = self._composed(node.op, operand, scale_of(node.type), rewriter)
        if len(node.operands) > 1 or found is None:
            return None
        op, source = found
        if isinstance(op, Linear) and len(rewriter.type(source).shape) > 1:
            name = rewriter.fresh(f"{node.result}.flat")
            source = rewriter.emit(Flatten(), source, name=name, origin=node.origin)
        return rewriter.emit(op, source, name=node.result, origin=node.origin)

    def _composed(self, op: LinearMap, operand: str, out: Scale, rewriter: Rewriter) -> tuple[LinearMap, str] | None:
        """One op for as many maps in a row as compose, and the value it reads; None where not even two do."""
        best: tuple[LinearMap, str] | None = None
        linear = op if isinstance(op, Linear) else None
        rows = None if linear is None else linear.weight.values
        while (source := rewriter.definition(operand)) is not None and isinstance(source.op, LinearMap):
            if len(source.operands) > 1:
                break
            before = rewriter.type(source.operands[0])
            made: LinearMap | None
            if linear is not None and rows is not None:
                shaped = rows.reshape(len(rows), *rewriter.type(operand).shape)
                (rows,) = source.op.adjoint(shaped, before.shape)
                if rows.size > self.largest:
                    break
                made = _weighing(linear, rows.reshape(len(rows), -1), out, scale_of(before))
                moved = isinstance(source.op, Flatten) and best is None
            else:
                made, moved = _pair(op, source.op, before.shape, out, scale_of(before)), False
                if isinstance(made, WeightedMap) and made.weight.values.size > self.largest:
                    break
            operand = source.operands[0]
            if made is not None and not moved:
                best = made, operand
            if linear is None:
                if made is None:
                    break
                op = made
        return best


def _weighing(op: WeightedMap, weight: Integers, out: Scale, before: Scale) -> LinearMap | None:
    """A weighted map with other weights and the same scale of its result; None where no float64 is that scale."""
    if before.size > 1:
        return None
    steps = [value / before.known[0] for value in out.known]
    if any(step != float(step) for step in steps):
        return None
    return attrs.evolve(op, weight=Array.of(weight), weight_scale=Array.of([float(step) for step in steps]))


def _pair(second: LinearMap, first: LinearMap, shape: Shape, out: Scale, before: Scale) -> LinearMap | None:
    """``second`` after ``first``, which reads ``shape``, as one map."""
    match second, first:
        case ((Reshape() | Flatten()), (Reshape() | Flatten())):
            to = second.shape(first.shape(shape))
            return Flatten() if len(to) == 1 else Reshape(to)
        case Permute(order=later), Permute(order=sooner):
            return Permute(tuple(sooner[d] for d in later))
        case Slice(), Slice():
            return _sliced(second, first)
        case Scaling(), WeightedMap():
            if second.multiplier.ndim > 1:
                return None
            factor = np.broadcast_to(second.multiplier, (len(first.weight.values),))
            return _weighing(first, first.weight.values * channelwise(factor, first.weight.values.ndim), out, before)
        case Conv2d(), Scaling():
            return _rescaled(second, first, shape, out, before)
        case Conv2d(), (AvgPool() | GlobalAvgPool()):
            return _pooled(second, first, shape, out, before)
    return None


def _sliced(second: Slice, first: Slice) -> Slice:
    """A window of a window."""
    start = tuple(a + s * b for a, s, b in zip(first.start, first.step, second.start, strict=True))
    step = tuple(s * t for s, t in zip(first.step, second.step, strict=True))
    stop = tuple(a + s * (e - 1) + 1 for a, s, e in zip(first.start, first.step, second.stop, strict=True))
    return Slice(start, stop, step)


def _rescaled(conv: Conv2d, scaling: Scaling, shape: Shape, out: Scale, before: Scale) -> LinearMap | None:
    """Integer factors multiply the weights that read them."""
    if scaling.multiplier.ndim > 1:
        return None
    outputs, inputs = conv.weight.values.shape[:2]
    factor = np.broadcast_to(scaling.multiplier, shape[:1]).reshape(conv.groups, 1, inputs, 1, 1)
    grouped = conv.weight.values.reshape(conv.groups, outputs // conv.groups, inputs, *conv.weight.values.shape[2:])
    return _weighing(conv, (grouped * factor).reshape(conv.weight.values.shape), out, before)


def _pooled(conv: Conv2d, pool: AvgPool | GlobalAvgPool, shape: Shape, out: Scale, before: Scale) -> LinearMap | None:
    """A convolution of window sums is one of wider windows, where no window reaches over an edge of the image."""
    size = pool.shape(shape)
    if isinstance(pool, GlobalAvgPool):
        pool = AvgPool((shape[1], shape[2]), (shape[1], shape[2]))
    kernel, stride = pool.kernel, pool.stride
    if any(pool.padding) or len(size) != 3:
        return None
    tiled = kernel == stride and all(n * k == d for n, k, d in zip(size[1:], kernel, shape[1:], strict=True))
    if any(conv.padding) and not tiled:
        return None
    outputs, inputs, kh, kw = conv.weight.values.shape
    spread = np.zeros((outputs, inputs, conv.dilation[0] * (kh - 1) + 1, conv.dilation[1] * (kw - 1) + 1), np.int64)
    spread[:, :, :: conv.dilation[0], :: conv.dilation[1]] = conv.weight.values
    reach = tuple((n - 1) * s + k for n, s, k in zip(spread.shape[2:], stride, kernel, strict=True))
    (weight,) = pool.adjoint(spread, (inputs, *reach))
    top, bottom, left, right = conv.padding
    wide = attrs.evolve(
        conv,
        stride=(conv.stride[0] * stride[0], conv.stride[1] * stride[1]),
        padding=(top * stride[0], bottom * stride[0], left * stride[1], right * stride[1]),
        dilation=(1, 1),
    )
    return _weighing(wide, weight, out, before)


def _added(node: Node, rewriter: Rewriter) -> str | None:
    """One sum for sums of sums that nobody else reads."""
    operands: list[str] = []
    for old in node.operands:
        value = rewriter.now(old)
        source = rewriter.definition(value)
        alone = len(rewriter.module.readers[old]) == 1 and list(node.operands).count(old) == 1
        within = source is not None and isinstance(source.op, Add) and alone
        operands += source.operands if within and source is not None else (value,)
    if len(operands) == len(node.operands):
        return None
    return rewriter.emit(Add(), *operands, name=node.result, origin=node.origin)
