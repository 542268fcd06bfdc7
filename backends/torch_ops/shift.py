"""shift in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.shift import Shift


@attrs.frozen(eq=False, kw_only=True)
class ShiftLowering(Lowering[Shift]):
    """A sum with constants."""

    offset: torch.Tensor

    @classmethod
    def of(cls, use: Use[Shift]) -> Self:
        return cls(dtype=use.dtype, offset=use.constant(use.op.offset))

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return x[0] + self.offset
