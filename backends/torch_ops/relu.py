"""relu in torch."""

from __future__ import annotations

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering
from spir.ops.relu import Relu


@attrs.frozen(eq=False, kw_only=True)
class ReluLowering(Lowering[Relu]):
    """``max(x, 0)``."""

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise; the derivative at 0 is 0."""
        return torch.relu(x[0])
