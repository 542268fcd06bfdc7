"""encode in torch."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Self

import attrs
import torch

from spir.backends.torch_ops._firing import TorchNamespace
from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops._thinning import Thinning, generate
from spir.ops.encode import Encode


@attrs.frozen(eq=False, kw_only=True)
class EncodeLowering(Lowering[Encode]):
    """Step after step: of bits, MSB first, what has reached the weight of a frame spikes and loses that weight.

    Below 0 the first frame takes -2^(b-1) out of negative values, so that the rest is not negative. Sorted trains
    compare the magnitude with the level of the step, and spike with the sign. Intervals spike where the count that the
    steps so far allow goes up.
    """

    length: int
    signed: bool
    code: str
    full: Fraction
    """Of code isi: the interval between the spikes of 1."""
    thinning: Thinning | None = None

    @classmethod
    def of(cls, use: Use[Encode]) -> Self:
        op = use.op
        full = op.interval if op.code == "isi" else Fraction(1)
        signed = use.types[0].range.hull[0] < 0
        return cls(dtype=torch.int64, code=op.code, full=full, length=op.steps, signed=signed, thinning=op.thinning)

    def steps(self, *operands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        (codes,) = operands
        if self.code == "isi":
            yield from self._intervals(next(codes).to(torch.int64))
            return
        if self.code != "bits":
            counts = next(codes).to(torch.int64)
            size, sign = counts.abs(), counts.sign()
            for step in range(1, self.length + 1):
                yield sign * (size >= (step if self.code == "prefix" else self.length + 1 - step))
            return
        rest = next(codes).to(torch.int64, copy=True)
        if self.thinning is not None:
            xp = TorchNamespace(constants={})
            yield from generate(xp, rest, self.length, signed=self.signed, thinning=self.thinning)
            return
        for t in range(self.length):
            threshold = 2 ** (self.length - 1 - t)
            spike = -(rest < 0).to(torch.int64) if self.signed and t == 0 else (rest >= threshold).to(torch.int64)
            rest.sub_(spike, alpha=threshold)
            yield spike

    def _intervals(self, codes: torch.Tensor) -> Iterator[torch.Tensor]:
        """By step t as many spikes have come as whole intervals fit into less than t + 1 steps, or the train has."""
        size, sign = codes.abs(), codes.sign()
        done = torch.zeros_like(codes)
        for t in range(1, self.length + 1):
            below = (t + 1) * self.full.denominator * size + self.full.numerator - 1
            most = self.length * self.full.denominator * size // self.full.numerator
            reached = torch.minimum(below // self.full.numerator - 1, most).clamp_(min=0)
            yield sign * (reached - done)
            done = reached
