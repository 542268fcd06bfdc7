"""mix in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.mix import Mix


@attrs.frozen(eq=False, kw_only=True)
class MixLowering(Lowering[Mix]):
    """One frame after the other, each the sum of all that came in, weighed by a row."""

    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, use: Use[Mix]) -> Self:
        return cls(dtype=torch.int64, rows=tuple(tuple(row) for row in use.op.matrix.values.tolist()))

    def steps(self, *operands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        (frames,) = operands
        held = [frame.to(torch.int64) for frame in frames]
        for row in self.rows:
            total = torch.zeros_like(held[0])
            for weight, frame in zip(row, held, strict=True):
                total.add_(frame, alpha=weight)
            yield total
