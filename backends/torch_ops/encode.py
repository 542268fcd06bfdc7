"""encode in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.encode import Encode


@attrs.frozen(eq=False, kw_only=True)
class EncodeLowering(Lowering[Encode]):
    """Bit after bit, MSB first: what has reached the weight of a frame spikes and loses that weight.

    Below 0 the first frame takes -2^(b-1) out of negative values, so that the rest is not negative.
    """

    length: int
    signed: bool

    @classmethod
    def of(cls, use: Use[Encode]) -> Self:
        return cls(dtype=torch.int64, length=use.op.steps, signed=use.types[0].range.hull[0] < 0)

    def steps(self, *operands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        (codes,) = operands
        rest = next(codes).to(torch.int64, copy=True)
        for t in range(self.length):
            threshold = 2 ** (self.length - 1 - t)
            spike = -(rest < 0).to(torch.int64) if self.signed and t == 0 else (rest >= threshold).to(torch.int64)
            rest.sub_(spike, alpha=threshold)
            yield spike
