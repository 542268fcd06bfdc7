"""expand-parallel: parallel neurons as published, with their matrices over time."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.contracts import Contract, Exact
from spir.errors import error
from spir.ir import Module, Node
from spir.ops.neuron_matrix import NeuronMatrix
from spir.ops.neuron_parallel import NeuronParallel
from spir.options import option
from spir.rewriting import Context, Pass, Rewriter


@attrs.frozen
class ExpandParallel(Pass):
    """neuron_parallel -> mix{Lambda_PRE}; neuron_matrix{Lambda_PC}, or with ``matrices=1`` one neuron_matrix.

    The published form (Hao et al. 2412.13610, eqs 6 to 8), to compare with: its cost grows with T squared.
    fuse-parallel undoes it. Neurons of integers, or of signed counts, have no such form and stay.
    """

    name: ClassVar[str] = "expand-parallel"
    matrices: int = option(2, "2: Lambda_PRE and Lambda_PC one after the other; 1: their product", ge=1, le=2)

    def contract(self) -> Contract:
        """The same trains (theorem PC-1)."""
        return Exact()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses a network without such neurons; then rewrites."""
        chosen = [n for n in module.nodes if isinstance(n.op, NeuronParallel) and self.selects(n)]
        if not chosen:
            raise error(
                "type",
                f"{self.name} finds no parallel neurons",
                fix="run derive-thresholds{neuron=parallel} and fuse-neuron before, over the same layers",
            )
        if all(module.types[n.operands[0]].train is None for n in chosen):
            context.note("no neuron reads a train, so all stay: leave fuse-parallel out, or fused=off in the recipe")
        return self.walk(Rewriter(module, self.name), self.rewrite)

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """The matrices in the neuron's place."""
        if not isinstance(node.op, NeuronParallel) or node.op.signed:
            return None
        (operand,) = (rewriter.now(o) for o in node.operands)
        frames = rewriter.type(operand).steps
        if rewriter.type(operand).train is None or (self.matrices == 2 and frames != node.op.steps):
            return None
        if self.matrices == 1:
            return rewriter.emit(NeuronMatrix.of(node.op, frames), operand, name=node.result, origin=node.origin)
        pre, charged = NeuronMatrix.published(node.op)
        mixed = rewriter.emit(pre, operand, name=rewriter.fresh(f"{node.result}.mixed"), origin=node.origin)
        return rewriter.emit(charged, mixed, name=node.result, origin=node.origin)
