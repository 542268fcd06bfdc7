"""permute in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.permute import Permute


@attrs.frozen(eq=False, kw_only=True)
class PermuteLowering(Lowering[Permute]):
    """The dimensions in another order."""

    order: tuple[int, ...]
    """Batch axis included."""

    @classmethod
    def of(cls, use: Use[Permute]) -> Self:
        return cls(dtype=use.dtype, order=(0, *(d + 1 for d in use.op.order)))

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """A view."""
        return x[0].permute(self.order)
