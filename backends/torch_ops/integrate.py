"""integrate in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.integrate import Integrate
from spir.types import weights


@attrs.frozen(eq=False, kw_only=True)
class IntegrateLowering(Lowering[Integrate]):
    """A wide accumulator: frame after frame, each times its weight, and the bias at the end."""

    weights: tuple[int, ...]
    bias: torch.Tensor | None

    @classmethod
    def of(cls, use: Use[Integrate]) -> Self:
        (x,) = use.types
        found = weights(x.train.code, x.train.steps) if x.train else (1,)
        bias = None if use.op.bias is None else use.constant(use.op.bias, torch.int64)
        return cls(dtype=torch.int64, weights=found, bias=bias)

    def steps(self, *operands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        (frames,) = operands
        total = next(frames).to(torch.int64) * self.weights[0]
        for frame, weight in zip(frames, self.weights[1:], strict=True):
            total.add_(frame.to(torch.int64), alpha=weight)
        yield total if self.bias is None else total + self.bias
