"""requant in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ir import Array
from spir.ops._threshold import divisors
from spir.ops.requant import Requant


@attrs.frozen(eq=False, kw_only=True)
class RequantLowering(Lowering[Requant]):
    """``clamp(floor((mul z + add) / div), lo, hi)`` in int64; divisors that are powers of two are shifts."""

    mul: torch.Tensor
    add: torch.Tensor
    div: torch.Tensor
    shift: torch.Tensor | None
    lo: int
    hi: int

    @classmethod
    def of(cls, use: Use[Requant]) -> Self:
        mul, add = use.constant(use.op.mul, torch.int64), use.constant(use.op.add, torch.int64)
        by = divisors(use.op.div)
        div = use.constant(Array.of(by), torch.int64)
        powers = not (by & (by - 1)).any()
        shift = use.constant(Array.of([int(d).bit_length() - 1 for d in by]), torch.int64) if powers else None
        return cls(dtype=torch.int64, mul=mul, add=add, div=div, shift=shift, lo=use.op.lo, hi=use.op.hi)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        product = x[0] * self.mul + self.add
        steps = torch.floor_divide(product, self.div) if self.shift is None else product >> self.shift
        return steps.clamp(self.lo, self.hi)
