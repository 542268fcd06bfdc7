"""qcfs in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.qcfs import Qcfs


@attrs.frozen(eq=False, kw_only=True)
class QcfsLowering(Lowering[Qcfs]):
    """``step clip(floor(((x + psi) L + theta / 2) / theta), lo, L)``, in this order, as ties ask for it."""

    levels: int
    lo: int
    threshold: torch.Tensor
    psi: torch.Tensor | None
    step: torch.Tensor

    @classmethod
    def of(cls, use: Use[Qcfs]) -> Self:
        op = use.op
        threshold = use.constant(op.threshold)
        height = threshold if op.phi is None else threshold + use.constant(op.phi)
        return cls(
            dtype=use.dtype,
            levels=op.levels,
            lo=-op.levels if op.signed else 0,
            threshold=threshold,
            psi=None if op.psi is None else use.constant(op.psi),
            step=height / op.levels,
        )

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        shifted = x[0] if self.psi is None else x[0] + self.psi
        steps = torch.floor((shifted * self.levels + self.threshold / 2) / self.threshold)
        return torch.clamp(steps, self.lo, self.levels) * self.step
