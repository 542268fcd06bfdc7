"""requant in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.requant import Requant


@attrs.frozen(eq=False, kw_only=True)
class RequantLowering(Lowering[Requant]):
    """``clamp(floor((mul z + add) / div), lo, hi)`` in int64; a divisor that is a power of two is a shift."""

    mul: torch.Tensor
    add: torch.Tensor
    div: int
    lo: int
    hi: int

    @classmethod
    def of(cls, use: Use[Requant]) -> Self:
        mul, add = use.constant(use.op.mul, torch.int64), use.constant(use.op.add, torch.int64)
        return cls(dtype=torch.int64, mul=mul, add=add, div=use.op.div, lo=use.op.lo, hi=use.op.hi)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        product = x[0] * self.mul + self.add
        power = self.div & (self.div - 1) == 0
        steps = product >> (self.div.bit_length() - 1) if power else torch.floor_divide(product, self.div)
        return steps.clamp(self.lo, self.hi)
