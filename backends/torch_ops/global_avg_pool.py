"""global_avg_pool in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.global_avg_pool import GlobalAvgPool


@attrs.frozen(eq=False, kw_only=True)
class GlobalAvgPoolLowering(Lowering[GlobalAvgPool]):
    """The mean over space on reals, the sum on integers."""

    keepdim: bool
    mean: bool

    @classmethod
    def of(cls, use: Use[GlobalAvgPool]) -> Self:
        return cls(dtype=use.dtype, keepdim=use.op.keepdim, mean=use.real)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Over H and W."""
        return x[0].mean(dim=(2, 3), keepdim=self.keepdim) if self.mean else x[0].sum(dim=(2, 3), keepdim=self.keepdim)
