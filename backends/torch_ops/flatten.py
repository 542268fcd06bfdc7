"""flatten in torch."""

from __future__ import annotations

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering
from spir.ops.flatten import Flatten


@attrs.frozen(eq=False, kw_only=True)
class FlattenLowering(Lowering[Flatten]):
    """All dimensions of a sample into one."""

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Row-major, whatever the layout in memory."""
        return x[0].flatten(1)
