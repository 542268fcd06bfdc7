"""dequantize in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use, along_channels
from spir.ops.dequantize import Dequantize
from spir.types import scale_of


@attrs.frozen(eq=False, kw_only=True)
class DequantizeLowering(Lowering[Dequantize]):
    """Integers times their scale."""

    scale: torch.Tensor

    @classmethod
    def of(cls, use: Use[Dequantize]) -> Self:
        values = [float(value) for value in scale_of(use.types[0]).known]
        scale = torch.tensor(values, dtype=use.dtype, device=use.device)
        return cls(dtype=use.dtype, scale=along_channels(scale, use.rank))

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return x[0] * self.scale
