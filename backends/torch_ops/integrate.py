"""integrate in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ir import Array
from spir.ops._accumulation import scaled, shifts
from spir.ops.integrate import Integrate
from spir.types import weights


@attrs.frozen(eq=False, kw_only=True)
class IntegrateLowering(Lowering[Integrate]):
    """A wide accumulator: frame after frame, each times its weight and scaled, and the bias at the end."""

    weights: tuple[int, ...]
    bias: torch.Tensor | None
    shift: torch.Tensor | None

    @classmethod
    def of(cls, use: Use[Integrate]) -> Self:
        (x,) = use.types
        found = weights(x.train.code, x.train.steps) if x.train else (1,)
        bias = None if use.op.bias is None else use.constant(use.op.bias, torch.int64)
        shift = use.constant(Array.of(shifts(use.op.shift)), torch.int64) if scaled(use.op.shift) else None
        return cls(dtype=torch.int64, weights=found, bias=bias, shift=shift)

    def steps(self, *operands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        (frames,) = operands
        total = self._term(next(frames), self.weights[0])
        for frame, weight in zip(frames, self.weights[1:], strict=True):
            total += self._term(frame, weight)
        yield total if self.bias is None else total + self.bias

    def _term(self, frame: torch.Tensor, weight: int) -> torch.Tensor:
        if self.shift is None:
            return frame.to(torch.int64) * weight
        lost = self.shift - (weight.bit_length() - 1)
        raised = frame.to(torch.int64) << (-lost).clamp(min=0)
        return (raised + (1 << lost.clamp(min=0) >> 1)) >> lost.clamp(min=0)
