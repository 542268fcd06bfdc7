"""add in torch."""

from __future__ import annotations

from functools import reduce

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering
from spir.ops.add import Add


@attrs.frozen(eq=False, kw_only=True)
class AddLowering(Lowering[Add]):
    """The sum, left to right."""

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return reduce(torch.add, x)
