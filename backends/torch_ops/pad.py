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
    """Zeros around."""

    last_first: tuple[int, ...]
    """(before, after) of each dimension, the last dimension first, as torch counts."""

    @classmethod
    def of(cls, use: Use[Pad]) -> Self:
        dimensions = range(len(use.op.pads) - 2, -1, -2)
        return cls(dtype=use.dtype, last_first=tuple(use.op.pads[d + side] for d in dimensions for side in (0, 1)))

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Along every dimension of a sample."""
        return F.pad(x[0], self.last_first)
