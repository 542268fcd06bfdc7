"""product in torch."""

from __future__ import annotations

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering
from spir.ops.product import Product


@attrs.frozen(eq=False, kw_only=True)
class ProductLowering(Lowering[Product]):
    """The product of two tensors."""

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return x[0] * x[1]
