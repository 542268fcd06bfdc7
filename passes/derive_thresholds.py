"""derive-thresholds: the integer network to spiking neurons."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.contracts import Contract, Exact
from spir.errors import SpirError, error, located, raise_all
from spir.ir import Module, Node
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.options import option
from spir.passes._neurons import neuron_class
from spir.rewriting import Context, Pass, Rewriter


@attrs.frozen
class DeriveThresholds(Pass):
    """requant -> integrate; requant; encode{code of the neuron}.  quantize -> quantize; encode.

    Copies integers; what is special to a neuron stands in the neuron's file.
    """

    name: ClassVar[str] = "derive-thresholds"
    neuron: str = option("stem", "the neuron model")

    def contract(self) -> Contract:
        """Every train decodes to the integer it replaces (for STEM: theorems STEM-1 to STEM-3)."""
        return Exact()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses a network without integers, and all clip ranges that the neuron does not realise; then rewrites."""
        neuron = neuron_class(self.neuron)
        refusals: list[SpirError] = []
        found = [(n, n.op) for n in module.nodes if isinstance(n.op, (Requant, Quantize)) and self.selects(n)]
        if not found:
            raise error(
                "type",
                f"{self.name} finds no integers to convert, and would leave the network without spikes",
                fix="run calibrate-range, quantize and propagate-scales before, over the same layers",
            )
        for node, op in found:
            try:
                with located(op=f"%{node.result} = {op.name}", from_=str(node.origin)):
                    neuron.derive(op)
            except SpirError as refusal:
                refusals.append(refusal)
        raise_all(refusals)
        return Pass.run(self, module, context)

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """The unfused form of the neuron."""
        neuron = neuron_class(self.neuron)
        operand = rewriter.now(node.operands[0])
        match node.op:
            case Requant():
                total = rewriter.fresh(f"{node.result}.integral")
                rewriter.emit(Integrate(), operand, name=total, origin=node.origin)
                code = rewriter.emit(node.op, total, name=rewriter.fresh(f"{node.result}.code"), origin=node.origin)
                return rewriter.emit(neuron.derive(node.op), code, name=node.result, origin=node.origin)
            case Quantize():
                code = rewriter.keep(node)
                name = rewriter.fresh(f"{node.result}.train")
                return rewriter.emit(neuron.derive(node.op), code, name=name, origin=node.origin)
        return None
