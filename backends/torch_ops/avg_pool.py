"""avg_pool in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch
import torch.nn.functional as F

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.avg_pool import AvgPool


@attrs.frozen(eq=False, kw_only=True)
class AvgPoolLowering(Lowering[AvgPool]):
    """The window's mean on reals, its sum on integers."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    divisor: int

    @classmethod
    def of(cls, use: Use[AvgPool]) -> Self:
        divisor = use.op.kernel[0] * use.op.kernel[1] if use.real else 1
        return cls(dtype=use.dtype, kernel=use.op.kernel, stride=use.op.stride, padding=use.op.padding, divisor=divisor)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Windows of the padded map."""
        top, bottom, left, right = self.padding
        padded = F.pad(x[0], (left, right, top, bottom)) if any(self.padding) else x[0]
        if padded.is_floating_point():
            return F.avg_pool2d(padded, self.kernel, self.stride, divisor_override=self.divisor)
        windows = padded.unfold(2, self.kernel[0], self.stride[0]).unfold(3, self.kernel[1], self.stride[1])
        return windows.sum(dim=(-2, -1))
