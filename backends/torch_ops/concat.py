"""concat in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.concat import Concat


@attrs.frozen(eq=False, kw_only=True)
class ConcatLowering(Lowering[Concat]):
    """One after the other, in a type that holds the numbers of all."""

    axis: int
    """Of the frame, batch axis included."""

    @classmethod
    def of(cls, use: Use[Concat]) -> Self:
        return cls(dtype=use.dtype, axis=use.op.axis + 1)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """int64 goes before floats: torch would join int64 and float32 in float32, and lose wide integers."""
        widest = max((frame.dtype for frame in x), key=lambda dtype: (dtype.itemsize, not dtype.is_floating_point))
        return torch.cat([frame.to(widest) for frame in x], self.axis)
