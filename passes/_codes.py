"""Which values are codes of activations, or become some."""

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


def only_quantised(node: Node, module: Module) -> bool:
    """Whether quantisers are all that reads an activation: they say what its range is."""
    readers = module.readers[node.result]
    return bool(readers) and all(isinstance(n.op, Quantize) for n in readers)
