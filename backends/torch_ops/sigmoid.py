"""sigmoid in torch."""

from __future__ import annotations

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering
from spir.ops.sigmoid import Sigmoid


@attrs.frozen(eq=False, kw_only=True)
class SigmoidLowering(Lowering[Sigmoid]):
    """The logistic function."""

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return torch.sigmoid(x[0])
