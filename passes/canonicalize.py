"""canonicalize: one form for one meaning."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np

from spir.contracts import Contract, Exact
from spir.ir import Node, Op
from spir.ops.avg_pool import AvgPool
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.max_pool import MaxPool
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.relu import Relu
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.ops.slice import Slice
from spir.ops.upsample import Upsample
from spir.rewriting import Pass, Rewriter


@attrs.frozen
class Canonicalize(Pass):
    """No-op pad, slice, reshape, pool, scale, shift -> nothing; relu(relu(x)) -> relu(x); conv2d(pad(x)) -> conv2d(x).

    reshape(reshape(x)) -> reshape(x), permute(permute(x)) -> permute(x); each -> nothing where it ends where it began.
    """

    name: ClassVar[str] = "canonicalize"

    def contract(self) -> Contract:
        """Nothing changes."""
        return Exact()

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """Drops what does nothing, joins moves, and lets a convolution do its own padding."""
        operand = rewriter.now(node.operands[0])
        source = rewriter.definition(operand)
        if self._does_nothing(node, rewriter) or (
            isinstance(node.op, Relu) and source is not None and isinstance(source.op, Relu)
        ):
            return operand if node.result != rewriter.module.output or source is not None else None
        match node.op:
            case Reshape() | Flatten() | Permute():
                return self._moved_once(node, operand, rewriter)
            case Conv2d():
                return self._padded(node, node.op, operand, rewriter)
        return None

    @staticmethod
    def _padded(node: Node, op: Conv2d, operand: str, rewriter: Rewriter) -> str | None:
        """A convolution that does its own padding."""
        source = rewriter.definition(operand)
        while source is not None and isinstance(source.op, Pad) and not any(source.op.pads[:2]) and not source.op.edge:
            _, _, top, bottom, left, right = (p + q for p, q in zip((0, 0, *op.padding), source.op.pads, strict=True))
            op = attrs.evolve(op, padding=(top, bottom, left, right))
            operand = source.operands[0]
            source = rewriter.definition(operand)
        return rewriter.emit(op, operand, name=node.result, origin=node.origin) if op != node.op else None

    @staticmethod
    def _moved_once(node: Node, operand: str, rewriter: Rewriter) -> str | None:
        """Two moves of elements as one, or as none."""
        source = rewriter.definition(operand)
        if source is None:
            return None
        before = rewriter.type(source.operands[0]).shape
        enters = node.result == rewriter.module.output and rewriter.definition(source.operands[0]) is None
        match node.op, source.op:
            case ((Reshape() | Flatten()), (Reshape() | Flatten())):
                if node.type.shape == before and not enters:
                    return source.operands[0]
                op: Op = Flatten() if len(node.type.shape) == 1 else Reshape(node.type.shape)
                return rewriter.emit(op, *source.operands, name=node.result, origin=node.origin)
            case Permute(order=second), Permute(order=first):
                order = tuple(first[d] for d in second)
                if order == tuple(range(len(before))) and not enters:
                    return source.operands[0]
                return rewriter.emit(Permute(order), *source.operands, name=node.result, origin=node.origin)
        return None

    @staticmethod
    def _does_nothing(node: Node, rewriter: Rewriter) -> bool:
        before = rewriter.type(rewriter.now(node.operands[0])).shape
        match node.op:
            case Pad(pads=pads):
                return not any(pads)
            case Slice() | Flatten() | Reshape() | Upsample():
                return node.type.shape == before
            case Permute(order=order):
                return order == tuple(range(len(order)))
            case MaxPool(kernel=kernel, padding=padding):
                return kernel == (1, 1) and node.type.shape == before and not any(padding)
            case Shift(offset=offset):
                return not offset.values.any()
            case AvgPool(kernel=kernel, padding=padding):
                return kernel == (1, 1) and node.type.shape == before and not any(padding)
            case Scaling(factor=factor, to=None):
                return bool(np.all(factor.values == 1))
        return False
