"""batch_norm in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.batch_norm import BatchNorm


@attrs.frozen(eq=False, kw_only=True)
class BatchNormLowering(Lowering[BatchNorm]):
    """``(x - mean) gain + bias``: the mean goes first, so that a large one cancels without loss."""

    mean: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, use: Use[BatchNorm]) -> Self:
        mean, var = use.constant(use.op.mean, torch.float64), use.constant(use.op.var, torch.float64)
        weight = torch.ones_like(mean) if use.op.weight is None else use.constant(use.op.weight, torch.float64)
        bias = torch.zeros_like(mean) if use.op.bias is None else use.constant(use.op.bias, torch.float64)
        gain = weight / torch.sqrt(var + use.op.eps)
        return cls(dtype=use.dtype, mean=mean.to(use.dtype), gain=gain.to(use.dtype), bias=bias.to(use.dtype))

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return torch.addcmul(self.bias, x[0] - self.mean, self.gain)
