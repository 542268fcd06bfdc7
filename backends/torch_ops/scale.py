"""scale in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use, along_channels
from spir.ops.scale import Scaling


@attrs.frozen(eq=False, kw_only=True)
class ScaleLowering(Lowering[Scaling]):
    """A product by constants; on integers the magnitude of a float factor went into the scale, so its sign is left."""

    factor: torch.Tensor

    @classmethod
    def of(cls, use: Use[Scaling]) -> Self:
        factor = torch.tensor(use.op.factor.values, device=use.device)
        if factor.is_floating_point() and not use.real:
            factor = torch.sign(factor)
        return cls(dtype=use.dtype, factor=along_channels(factor.to(use.dtype), use.rank))

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return x[0] * self.factor
