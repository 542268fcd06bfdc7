"""encode: integers to the train of a code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Op
from spir.types import Int, Integers, Interval, Scale, Shape, Spikes, Stored, Tensor


@attrs.frozen
class Encode(Op):
    """Bits, MSB first, b = ``steps`` frames; below 0 two's complement, whose sign bit is a -1 in the first frame.

    Source: SDANN eq 11 (Theorem STEM-1: decode(encode(x)) = x).
    """

    name: ClassVar[str] = "encode"
    steps: int
    code: str = "bits"

    def infer(self, *types: Tensor) -> Tensor:
        """Integers that the code holds to spikes of the same range."""
        (x,) = types
        if not isinstance(x.encoding, Int):
            raise error("type", f"works on integers, not {x.encoding}", fix="quantize reals; integrate a train")
        if self.code != "bits":
            raise error("type", f"there is no encoder for code {self.code!r}", fix="code = bits")
        return Tensor(x.shape, Spikes(self.steps, self.code, x.encoding.lo, x.encoding.hi, x.encoding.scale))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The value stays."""
        return intervals[0]

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Each bit by shift and mask; the sign bit counts negative."""
        return bits(np.asarray(stored[0], dtype=np.int64), self.steps, signed=types[0].range.hull[0] < 0)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Full unsigned and signed ranges, one bit, sixteen bits."""
        for steps, lo, hi in ((8, 0, 255), (8, -128, 127), (1, 0, 1), (2, -2, 1), (16, 0, 65535), (5, -3, 2)):
            yield cls(steps=steps), (Tensor((3, 2, 2), Int(lo, hi, Scale.of(0.5))),)


def bits(codes: Integers, steps: int, *, signed: bool) -> Integers:
    """``[steps, *codes.shape]`` bits of b-bit codes, MSB first; with ``signed`` the first frame is negated."""
    shifts = np.arange(steps - 1, -1, -1).reshape((-1,) + (1,) * codes.ndim)
    frames = (codes[None] >> shifts) & 1
    if signed:
        frames[0] *= -1
    return frames
