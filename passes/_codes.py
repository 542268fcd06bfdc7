"""Which values are codes of activations."""

from __future__ import annotations

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
