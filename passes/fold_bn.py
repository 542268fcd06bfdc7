"""fold-bn: batch normalisation into the weights before it, else into a gain and an offset."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.contracts import Bounded, Contract
from spir.ir import Array, Node
from spir.ops._linear import WeightedMap, channelwise
from spir.ops.batch_norm import BatchNorm
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.rewriting import Pass, Rewriter


@attrs.frozen
class FoldBn(Pass):
    """batch_norm(conv2d or linear(x; w, b)) -> conv2d or linear(x; g w, g b + offset), g = gamma / sqrt(var + eps).

    Elsewhere, before weights above all, batch_norm(x) -> shift(scale(x; g); offset): quantize folds the gain into the
    weights that read it, and propagate-scales carries the offset on, zero padding included. The layer's own eps counts.
    Weights that others read too stay as they are: the fold makes its own.
    """

    name: ClassVar[str] = "fold-bn"

    def contract(self) -> Contract:
        """Float rounding only."""
        return Bounded(1e-10)

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """One linear map for the two, or a scale and a shift for the one."""
        if not isinstance(node.op, BatchNorm):
            return None
        gain, offset = node.op.affine()
        operand = rewriter.now(node.operands[0])
        source = rewriter.definition(operand)
        if source is None or not isinstance(source.op, WeightedMap) or source.op.weight_scale is not None:
            name = rewriter.fresh(f"{node.result}.gain")
            scaled = rewriter.emit(Scaling(Array.of(gain)), operand, name=name, origin=node.origin)
            return rewriter.emit(Shift(Array.of(offset)), scaled, name=node.result, origin=node.origin)
        weight, bias = source.op.weight.values, source.op.bias
        folded = attrs.evolve(
            source.op,
            weight=Array.of(weight * channelwise(gain, weight.ndim)),
            bias=Array.of(offset if bias is None else gain * bias.values + offset),
        )
        return rewriter.emit(folded, *source.operands, name=node.result, origin=source.origin)
