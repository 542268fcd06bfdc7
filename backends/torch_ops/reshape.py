"""reshape in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.reshape import Reshape


@attrs.frozen(eq=False, kw_only=True)
class ReshapeLowering(Lowering[Reshape]):
    """The same elements under another shape."""

    to: tuple[int, ...]

    @classmethod
    def of(cls, use: Use[Reshape]) -> Self:
        return cls(dtype=use.dtype, to=use.op.to)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Row-major, whatever the layout in memory."""
        return x[0].reshape(-1, *self.to)
