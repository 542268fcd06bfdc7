"""clip in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.clip import Clip


@attrs.frozen(eq=False, kw_only=True)
class ClipLowering(Lowering[Clip]):
    """``clamp(x, lo, hi)``, bounds per tensor or per channel."""

    lo: torch.Tensor
    hi: torch.Tensor

    @classmethod
    def of(cls, use: Use[Clip]) -> Self:
        return cls(dtype=use.dtype, lo=use.constant(use.op.lo), hi=use.constant(use.op.hi))

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return torch.clamp(x[0], self.lo, self.hi)
