"""pad in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch
import torch.nn.functional as F

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.pad import Pad


@attrs.frozen(eq=False, kw_only=True)
class PadLowering(Lowering[Pad]):
    """Zeros, or the values at the edge, around."""

    last_first: tuple[int, ...]
    """(before, after) of each dimension, the last dimension first, as torch counts."""
    nearest: tuple[torch.Tensor | None, ...] = ()
    """At the edge: the elements that stand along each axis of a frame; None where the axis is not padded."""

    @classmethod
    def of(cls, use: Use[Pad]) -> Self:
        dimensions = range(len(use.op.pads) - 2, -1, -2)
        last_first = tuple(use.op.pads[d + side] for d in dimensions for side in (0, 1))
        if not use.op.edge:
            return cls(dtype=use.dtype, last_first=last_first)
        sides = zip(use.types[0].shape, use.op.pairs, strict=True)
        nearest = tuple(
            torch.arange(-before, size + after, device=use.device).clamp(0, size - 1) if before or after else None
            for size, (before, after) in sides
        )
        return cls(dtype=use.dtype, last_first=last_first, nearest=(None, *nearest))

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Along every dimension of a sample."""
        if not self.nearest:
            return F.pad(x[0], self.last_first)
        padded = x[0]
        for axis, elements in enumerate(self.nearest):
            padded = padded if elements is None else padded.index_select(axis, elements)
        return padded
