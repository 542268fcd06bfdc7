"""tanh in torch."""

from __future__ import annotations

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering
from spir.ops.tanh import Tanh


@attrs.frozen(eq=False, kw_only=True)
class TanhLowering(Lowering[Tanh]):
    """The hyperbolic tangent."""

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return torch.tanh(x[0])
