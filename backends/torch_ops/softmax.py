"""softmax in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.softmax import Softmax


@attrs.frozen(eq=False, kw_only=True)
class SoftmaxLowering(Lowering[Softmax]):
    """Normalised exponentials along one dimension, or their logarithm."""

    axis: int
    """Of the frame, batch axis included."""
    log: bool

    @classmethod
    def of(cls, use: Use[Softmax]) -> Self:
        return cls(dtype=use.dtype, axis=use.op.axis + 1, log=use.op.log)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Along the axis."""
        return torch.log_softmax(x[0], self.axis) if self.log else torch.softmax(x[0], self.axis)
