"""fold-bn: batch normalisation into the weights before it, else into a gain and an offset."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.contracts import Bounded, Contract
from spir.errors import Diagnostic, SpirWarning
from spir.ir import Array, Module, Node
from spir.ops._linear import WeightedMap, channelwise
from spir.ops.batch_norm import BatchNorm
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.rewriting import Context, Pass, Rewriter

COMPARED = 64
"""Calibration samples, from first to last, that are held against the statistics of the first batch norm."""
FEWEST = 16
"""Values of a channel that say something of its spread."""


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

    def run(self, module: Module, context: Context) -> Module:
        """Warns where the calibration data may not be what the first batch norm was trained on; then rewrites."""
        first = next((n for n in module.nodes if isinstance(n.op, BatchNorm) and self.selects(n)), None)
        if first is not None and context.data is not None:
            spread = np.linspace(0, len(context.data) - 1, COMPARED).astype(int)
            _compare(first, module, context.data[np.unique(spread)], context)
        return self.walk(Rewriter(module, self.name), self.rewrite)

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


def _compare(node: Node, module: Module, x: NDArray[Any], context: Context) -> None:
    """Warns of data whose mean or spread, channel by channel, is far from what the model remembers of its training."""
    (operand,), op = node.operands, node.op
    assert isinstance(op, BatchNorm)  # the caller asked
    before = Module(module.input, module.nodes[: module.nodes.index(node)], operand)
    parts = [batch[operand] for batch in context.evaluate(before, x, operand)]
    values = np.concatenate(parts).swapaxes(0, 1).reshape(module.types[operand].shape[0], -1)
    if values.shape[1] < FEWEST:
        return
    spread = np.sqrt(op.var.values + op.eps)
    moved = float(np.median(np.abs(values.mean(axis=1) - op.mean.values) / spread))
    ratio = float(np.median(values.std(axis=1) / spread))
    if moved <= 1 and 1 / 3 <= ratio <= 3:
        return
    finding = Diagnostic(
        "data",
        f"the calibration data may not be what the model was trained on: in front of %{node.result} their deviation is "
        f"{ratio:.3g} times the one of its batch norm, and their mean is {moved:.3g} deviations off (medians)",
    )
    told = finding.note("from", str(node.origin)).note("fix", "normalise the data as in training")
    warnings.warn(SpirWarning(told), stacklevel=2)
