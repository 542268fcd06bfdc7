"""upsample in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.upsample import Upsample


@attrs.frozen(eq=False, kw_only=True)
class UpsampleLowering(Lowering[Upsample]):
    """Every pixel as a block."""

    factor: tuple[int, int]

    @classmethod
    def of(cls, use: Use[Upsample]) -> Self:
        return cls(dtype=use.dtype, factor=use.op.factor)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Rows and columns repeated in one copy."""
        n, channels, height, width = x[0].shape
        down, right = self.factor
        blocks = x[0][:, :, :, None, :, None].expand(n, channels, height, down, width, right)
        return blocks.reshape(n, channels, height * down, width * right)
