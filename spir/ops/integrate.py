"""integrate: a train or current to the integer it decodes to; with a bias, also the readout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Array, Op
from spir.ops._linear import channelwise
from spir.types import Current, Int, Interval, Scale, Shape, Spikes, Stored, Tensor, check_register, scale_of


@attrs.frozen
class Integrate(Op):
    """``sum_t weight(t) frame(t) (+ bias)``; ``bias`` holds integers in steps of the operand's scale.

    On integers it only adds the bias: so the readout of the integer network and that of the spiking one are one op.
    Source: SDANN eq 14 with V kept wide.
    """

    name: ClassVar[str] = "integrate"
    bias: Array | None = None

    def infer(self, *types: Tensor) -> Tensor:
        """Any integer carrier to integers."""
        (x,) = types
        if self.bias is not None and (
            not self.bias.integral or self.bias.values.shape not in ((1,), (x.shape[0],), x.shape)
        ):
            raise error(
                "type", f"bias {list(self.bias.values.shape)} is not integers of [1], [{x.shape[0]}] or {list(x.shape)}"
            )
        scale, value = scale_of(x), self.bounds((x.shape,), x.range)
        check_register(value, "the accumulator")
        return Tensor(x.shape, Int(*value.hull, scale))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The value, plus the bias."""
        (x,) = intervals
        if self.bias is None:
            return x
        offsets = self.bias.values.astype(object)
        if offsets.ndim > 1:
            rows = offsets.reshape(len(offsets), -1)
            return Interval(x.lo + rows.min(axis=1), x.hi + rows.max(axis=1))
        return Interval(x.lo + offsets, x.hi + offsets)

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """The decoding of the type, plus the bias."""
        total = types[0].integers(np.asarray(stored[0], dtype=np.int64))
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
