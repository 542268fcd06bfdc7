"""integrate: a train or current to the integer it decodes to; with a bias, also the readout."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Array, Op
from spir.ops._accumulation import MOST, check_shift, integrated, scaled, shifts, value_bounds
from spir.ops._linear import channelwise
from spir.types import Current, Int, Interval, Scale, Shape, Spikes, Stored, Tensor, check_register, scale_of


@attrs.frozen
class Integrate(Op):
    """``sum_t weight(t) frame(t) (+ bias)``; ``bias`` holds integers in steps of the operand's scale.

    On integers it only adds the bias: so the readout of the integer network and that of the spiking one are one op.
    With ``shift`` r, one or one a channel, every weighted frame is shifted right by r and rounded half up, and a step
    is worth 2^r of the operand's, which is also what ``bias`` counts.
    Source: SDANN eq 14 with V kept wide, and eq 18.
    """

    name: ClassVar[str] = "integrate"
    bias: Array | None = None
    shift: int | Array = 0

    def infer(self, *types: Tensor) -> Tensor:
        """Any integer carrier to integers."""
        (x,) = types
        if self.bias is not None and (
            not self.bias.integral or self.bias.values.shape not in ((1,), (x.shape[0],), x.shape)
        ):
            raise error(
                "type", f"bias {list(self.bias.values.shape)} is not integers of [1], [{x.shape[0]}] or {list(x.shape)}"
            )
        scale = scale_of(x)
        check_shift(self.shift, x)
        value = self.biased(value_bounds(x.range, self.shift, x.steps))
        check_register(value, "the accumulator")
        if scaled(self.shift):
            scale = scale * Scale.of(Fraction(2 ** int(r)) for r in shifts(self.shift))
        return Tensor(x.shape, Int(*value.hull, scale))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The value, plus the bias."""
        return self.biased(value_bounds(intervals[0], self.shift, MOST))

    def biased(self, x: Interval) -> Interval:
        """Bounds of a sum with the bias, one row a channel."""
        if self.bias is None:
            return x
        offsets = self.bias.values.astype(object)
        if offsets.ndim > 1:
            rows = offsets.reshape(len(offsets), -1)
            return Interval(x.lo + rows.min(axis=1), x.hi + rows.max(axis=1))
        return Interval(x.lo + offsets, x.hi + offsets)

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """The decoding of the type, plus the bias."""
        total = integrated(types[0], np.asarray(stored[0], dtype=np.int64), self.shift)
        return total if self.bias is None else total + channelwise(self.bias.values, total.ndim - 1)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Signed bits, currents, integers; without bias, per channel, per element."""
        scale = Scale.of([0.5, 0.25, 1.0])
        biases = (None, Array.of([5]), Array.of([-9, 0, 7]), Array.of(np.arange(12).reshape(3, 2, 2)))
        for bias in biases:
            for encoding in (
                Spikes(8, "bits", -128, 127, scale),
                Current(4, "bits", -900, 900, -60, 60, scale),
                Int(-7, 8, scale),
            ):
                yield cls(bias=bias), (Tensor((3, 2, 2), encoding),)
            for shift in (3, Array.of([0, 1, 6])):
                yield cls(bias, shift), (Tensor((3, 2, 2), Current(4, "bits", -900, 900, -60, 60, scale)),)
