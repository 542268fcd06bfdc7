"""Which values are codes of activations, and which nodes make codes of the input."""

from __future__ import annotations

from spir.ir import Module, Node
from spir.ops._linear import LinearMap
from spir.ops.max_pool import MaxPool
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.rewriting import Rewriter


def is_code(value: str, rewriter: Rewriter, *, pools: bool) -> bool:
    """Whether a value is an activation's code, moved or, with ``pools``, pooled perhaps, and not a sum."""
    waiting = [value]
    for name in waiting:
        source = rewriter.definition(name)
        if source is None:
            return False
        moved = source.op.relabels if isinstance(source.op, LinearMap) else pools and isinstance(source.op, MaxPool)
        if moved:
            waiting += [o for o in source.operands if o not in waiting]
        elif not isinstance(source.op, (Requant, Quantize)):
            return False
    return True


def enters(node: Node, module: Module) -> bool:
    """Whether a node reads the network's input, or what the host makes of it."""
    source = module.definitions.get(node.operands[0])
    return source is None or source.op.host
