"""linear in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch
import torch.nn.functional as F

from spir.backends.torch_ops._exactness import WideWeight
from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.linear import Linear


@attrs.frozen(eq=False, kw_only=True)
class LinearLowering(Lowering[Linear]):
    """One matrix product; limbs where integer sums are wide."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    wide: WideWeight | None

    @classmethod
    def of(cls, use: Use[Linear]) -> Self:
        weight = use.weight(use.op.weight, use.op.weight_scale)
        bias = None if use.op.bias is None else use.tensor(use.op.bias)
        wide = WideWeight.of(weight) if use.dtype == torch.int64 else None
        return cls(dtype=use.dtype, weight=weight, bias=bias, wide=wide)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """The product, plus the bias on reals."""
        return F.linear(x[0], self.weight, self.bias) if self.wide is None else self.wide.product(x[0], F.linear)
