"""quantize in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.quantize import Quantize


@attrs.frozen(eq=False, kw_only=True)
class QuantizeLowering(Lowering[Quantize]):
    """``clamp(floor(x / scale + 1/2), lo, hi)`` to int64."""

    scale: torch.Tensor
    """A tensor on the device, because torch replaces division by a number with multiplication on some devices."""
    lo: int
    hi: int

    @classmethod
    def of(cls, use: Use[Quantize]) -> Self:
        return cls(
            dtype=use.dtype,
            scale=torch.tensor([use.op.scale], dtype=use.dtype, device=use.device),
            lo=use.op.lo,
            hi=use.op.hi,
        )

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return torch.floor(x[0] / self.scale + 0.5).clamp(self.lo, self.hi).to(torch.int64)
