"""slice in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.slice import Slice


@attrs.frozen(eq=False, kw_only=True)
class SliceLowering(Lowering[Slice]):
    """A strided window."""

    window: tuple[slice, ...]

    @classmethod
    def of(cls, use: Use[Slice]) -> Self:
        return cls(dtype=use.dtype, window=tuple(map(slice, use.op.start, use.op.stop, use.op.step)))

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Of every sample."""
        return x[0][(slice(None), *self.window)]
