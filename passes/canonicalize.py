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
        if not isinstance(node.op, Conv2d) or source is None or not isinstance(source.op, Pad):
            return None
        before, after, *space = source.op.pads
        if before or after or len(space) != 4:
            return None
        padding = tuple(p + q for p, q in zip(node.op.padding, space, strict=True))
        op = attrs.evolve(node.op, padding=(padding[0], padding[1], padding[2], padding[3]))
        return rewriter.emit(op, *source.operands, name=node.result, origin=node.origin)

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
