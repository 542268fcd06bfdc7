"""fuse-parallel: matrices over time to the count law, and T synaptic products to one."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import attrs

from spir.contracts import Contract, Exact
from spir.errors import SpirError, error, raise_all
from spir.ir import Module, Node, Origin
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops.integrate import Integrate
from spir.ops.mix import Mix
from spir.ops.neuron_matrix import NeuronMatrix
from spir.ops.neuron_parallel import NeuronParallel
from spir.rewriting import Context, Pass, Rewriter
from spir.text import show_node
from spir.types import Current


@attrs.frozen
class FuseParallel(Pass):
    """mix; neuron_matrix -> neuron_parallel.  Linear ops on trains -> integrate; linear ops on integers.

    Lambda_PC Lambda_PRE is one matrix, and where theorem PC-1 holds that matrix is one comparison of the sum with each
    level. Such neurons see nothing but the sum of all frames, so each train is summed once and every synaptic product
    is made once, not T times. Trains stay for whoever reads them, and a max_pool stays on sorted trains.
    """

    name: ClassVar[str] = "fuse-parallel"

    def contract(self) -> Contract:
        """The same trains (theorem PC-1), and sums that commute with linear maps."""
        return Exact()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses, all at once, neurons that see more than a sum; then walks the module once."""
        if self.layers != "*":
            what = f"{self.name} fuses the whole network, because layers read each other's trains"
            raise error("option", what, fix="leave layers out")
        if not any(isinstance(n.op, Neuron) for n in module.nodes):
            raise error(
                "type",
                f"{self.name} finds no neurons to fuse",
                fix="run derive-thresholds{neuron=parallel} and fuse-neuron before",
            )
        raise_all(refusal for n in module.nodes if (refusal := _refusal(n, module)) is not None)
        return self.walk(Rewriter(module, self.name), partial(_fused, {}))


def _mixed(node: Node, module: Module) -> tuple[NeuronMatrix, str]:
    """A matrix neuron and what it reads, with a mix in front taken into the matrix."""
    assert isinstance(node.op, NeuronMatrix)  # the callers asked
    (operand,) = node.operands
    source = module.definitions.get(operand)
    if source is None or not isinstance(source.op, Mix):
        return node.op, operand
    return node.op.after(source.op), source.operands[0]


def _refusal(node: Node, module: Module) -> SpirError | None:
    """Why a neuron, or a mix, does not fuse."""
    match node.op:
        case NeuronMatrix() if _mixed(node, module)[0].count_law is None:
            why = "its matrix does not compare the sum of all frames with the levels 1..T of one threshold"
        case Neuron() if not isinstance(node.op, (NeuronMatrix, NeuronParallel)):
            why = f"{node.op.name} is no neuron of parallel conversion"
        case Mix() if node.result == module.output or not all(
            isinstance(n.op, NeuronMatrix) for n in module.readers[node.result]
        ):
            why = "not only matrices read it"
        case _:
            return None
    return error(
        "type",
        f"%{node.result} does not fuse: {why}",
        op=show_node(node),
        from_=str(node.origin),
        fix="derive-thresholds{neuron=parallel}, or leave fuse-parallel out",
    )


def _fused(sums: dict[str, str], node: Node, rewriter: Rewriter) -> str | None:
    """The node on the sums of the trains that it reads; ``sums`` are those that are there."""
    match node.op:
        case NeuronMatrix():
            op, operand = _mixed(node, rewriter.module)
            law = op.count_law
            assert law is not None  # run refused
            return rewriter.emit(law, _summed(operand, sums, rewriter), name=node.result, origin=node.origin)
        case Integrate(bias=None, shift=0):
            return _summed(node.operands[0], sums, rewriter, node.result)
        case Mix():
            return _summed(node.operands[0], sums, rewriter)
        case Neuron() | Integrate():
            pass
        case LinearMap() if isinstance(node.type.encoding, Current):
            pass
        case _:
            return None
    operands = (_summed(operand, sums, rewriter) for operand in node.operands)
    return rewriter.emit(node.op, *operands, name=node.result, origin=node.origin)


def _summed(old: str, sums: dict[str, str], rewriter: Rewriter, name: str | None = None) -> str:
    """The integers of an old value: itself, or its train summed once for all readers, under a name where it has one."""
    value = rewriter.now(old)
    if rewriter.type(value).train is None:
        return value
    if value not in sums:
        source = rewriter.definition(value)
        origin = Origin("input") if source is None else source.origin
        sums[value] = rewriter.emit(Integrate(), value, name=name or rewriter.fresh(f"{value}.count"), origin=origin)
    return sums[value]
