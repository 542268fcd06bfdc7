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
    """Step after step: of bits, MSB first, what has reached the weight of a frame spikes and loses that weight.

    Below 0 the first frame takes -2^(b-1) out of negative values, so that the rest is not negative. Sorted trains
    compare the magnitude with the level of the step, and spike with the sign.
    """

    length: int
    signed: bool
    code: str

    @classmethod
    def of(cls, use: Use[Encode]) -> Self:
        return cls(dtype=torch.int64, length=use.op.steps, signed=use.types[0].range.hull[0] < 0, code=use.op.code)

    def steps(self, *operands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        (codes,) = operands
        if self.code != "bits":
            counts = next(codes).to(torch.int64)
            size, sign = counts.abs(), counts.sign()
            for step in range(1, self.length + 1):
                yield sign * (size >= (step if self.code == "prefix" else self.length + 1 - step))
            return
        rest = next(codes).to(torch.int64, copy=True)
        for t in range(self.length):
            threshold = 2 ** (self.length - 1 - t)
            spike = -(rest < 0).to(torch.int64) if self.signed and t == 0 else (rest >= threshold).to(torch.int64)
            rest.sub_(spike, alpha=threshold)
            yield spike
