"""canonicalize: one form for one meaning."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from spir.contracts import Contract, Exact
from spir.ir import Node
from spir.ops.avg_pool import AvgPool
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.pad import Pad
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.rewriting import Pass, Rewriter


@attrs.frozen
class Canonicalize(Pass):
    """No-op pad, slice, flatten, pool, scale -> nothing; relu(relu(x)) -> relu(x); conv2d(pad(x)) -> conv2d(x)."""

    name: ClassVar[str] = "canonicalize"

    def contract(self) -> Contract:
        """Nothing changes."""
        return Exact()

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """Drops what does nothing and lets a convolution do its own padding."""
        operand = rewriter.now(node.operands[0])
        source = rewriter.definition(operand)
        if self._does_nothing(node, rewriter) or (
            isinstance(node.op, Relu) and source is not None and isinstance(source.op, Relu)
        ):
            return operand if node.result != rewriter.module.output or source is not None else None
        if not isinstance(node.op, Conv2d):
            return None
        op = node.op
        while source is not None and isinstance(source.op, Pad) and not any(source.op.pads[:2]):
            _, _, top, bottom, left, right = (p + q for p, q in zip((0, 0, *op.padding), source.op.pads, strict=True))
            op = attrs.evolve(op, padding=(top, bottom, left, right))
            operand = source.operands[0]
            source = rewriter.definition(operand)
        return rewriter.emit(op, operand, name=node.result, origin=node.origin) if op != node.op else None

    @staticmethod
    def _does_nothing(node: Node, rewriter: Rewriter) -> bool:
        before = rewriter.type(rewriter.now(node.operands[0])).shape
        match node.op:
            case Pad(pads=pads):
                return not any(pads)
            case Slice() | Flatten():
                return node.type.shape == before
            case AvgPool(kernel=kernel, padding=padding):
                return kernel == (1, 1) and node.type.shape == before and not any(padding)
            case Scaling(factor=factor, to=None):
                return bool(np.all(factor.values == 1))
        return False
