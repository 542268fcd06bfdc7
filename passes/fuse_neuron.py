"""fuse-neuron: integrate; requant; encode to one neuron."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.contracts import Contract, Exact
from spir.errors import error, located
from spir.ir import Module, Node
from spir.ops._neuron import Neuron
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.requant import Requant
from spir.options import option
from spir.passes._neurons import neuron_class, neuron_names
from spir.rewriting import Context, Pass, Rewriter


@attrs.frozen
class FuseNeuron(Pass):
    """integrate; requant; encode -> neuron, so that only spikes leave it and only currents enter.

    A neuron that takes the charge of all steps at once needs no integrate in front: what it reads may be integers.
    """

    name: ClassVar[str] = "fuse-neuron"
    neuron: str | None = option(None, "the neuron model, where several fit")
    mode: str | None = option(
        None, "of neuron ca-lif: several spikes a step (multi) or one", one_of=("multi", "single")
    )

    def contract(self) -> Contract:
        """The neuron is the three ops."""
        return Exact()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses a network without spikes; then rewrites."""
        if not any(isinstance(n.op, (Encode, Neuron)) and self.selects(n) for n in module.nodes):
            raise error(
                "type",
                f"{self.name} finds no trains to fuse, and would leave the network without neurons",
                fix="run derive-thresholds before, over the same layers",
            )
        return Pass.run(self, module, context)

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """Looks back from the encoder; what others still read stays."""
        if not isinstance(node.op, Encode):
            return None
        requant = rewriter.definition(rewriter.now(node.operands[0]))
        if requant is None or not isinstance(requant.op, Requant):
            return None
        source = rewriter.definition(requant.operands[0])
        integrate, charge = None, requant.operands[0]
        if source is not None and isinstance(source.op, Integrate) and rewriter.type(source.operands[0]).train:
            integrate, (charge,) = source.op, source.operands
        wanted = neuron_names() if self.neuron is None else [self.neuron]
        fused = [op for o in map(neuron_class, wanted) if (op := o.fuse(integrate, requant.op, node.op)) is not None]
        if len(fused) > 1:
            raise error(
                "type",
                f"%{node.result} can be {' or '.join(op.name for op in fused)}",
                from_=str(node.origin),
                fix=f"name the neuron: {self.name}{{neuron={fused[0].name.removeprefix('neuron_')}}}",
            )
        if not fused:
            return None
        (made,), train = fused, rewriter.type(charge).train
        if self.mode is not None and train is not None:
            with located(op=f"%{node.result} = {made.name}", from_=str(node.origin)):
                made = made.in_mode(self.mode, train)
        return rewriter.emit(made, charge, name=node.result, origin=node.origin)
