"""encode: integers to the train of a code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Op
from spir.types import SORTED, Int, Integers, Interval, Scale, Shape, Spikes, Stored, Tensor


@attrs.frozen
class Encode(Op):
    """``steps`` frames of a code, which decode to the integer.

    bits: MSB first; below 0 two's complement, whose sign bit is a -1 in the first frame (SDANN eq 11, theorem STEM-1).
    suffix, prefix: as many spikes as the integer counts, in the last or first steps; below 0 they are -1 (the sorted
    trains of Hao et al. 2412.13610; their sign is ours).
    """

    name: ClassVar[str] = "encode"
    steps: int
    code: str = "bits"

    def infer(self, *types: Tensor) -> Tensor:
        """Integers that the code holds to spikes of the same range."""
        (x,) = types
        if not isinstance(x.encoding, Int):
            raise error("type", f"works on integers, not {x.encoding}", fix="quantize reals; integrate a train")
        if self.code not in ("bits", *SORTED):
            known = " or ".join(("bits", *SORTED))
            raise error("type", f"there is no encoder for code {self.code!r}", fix=f"code = {known}")
        return Tensor(x.shape, Spikes(self.steps, self.code, x.encoding.lo, x.encoding.hi, x.encoding.scale))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The value stays."""
        return intervals[0]

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Each bit by shift and mask, where the sign bit counts negative; or each step by its level."""
        values = np.asarray(stored[0], dtype=np.int64)
        if self.code != "bits":
            return sort(values, self.steps, self.code)
        return bits(values, self.steps, signed=types[0].range.hull[0] < 0)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Full unsigned and signed ranges, one bit, sixteen bits; sorted trains at both ends, of one step, of 64."""
        for steps, lo, hi in ((8, 0, 255), (8, -128, 127), (1, 0, 1), (2, -2, 1), (16, 0, 65535), (5, -3, 2)):
            yield cls(steps=steps), (Tensor((3, 2, 2), Int(lo, hi, Scale.of(0.5))),)
        for steps, code, lo, hi in (
            (4, "suffix", 0, 4),
            (1, "prefix", 0, 1),
            (5, "prefix", -5, 5),
            (64, "suffix", -3, 64),
        ):
            yield cls(steps=steps, code=code), (Tensor((3, 2, 2), Int(lo, hi, Scale.of(0.5))),)


def bits(codes: Integers, steps: int, *, signed: bool) -> Integers:
    """``[steps, *codes.shape]`` bits of b-bit codes, MSB first; with ``signed`` the first frame is negated."""
    shifts = np.arange(steps - 1, -1, -1).reshape((-1,) + (1,) * codes.ndim)
    frames = (codes[None] >> shifts) & 1
    if signed:
        frames[0] *= -1
    return frames


def sort(counts: Integers, steps: int, code: str) -> Integers:
    """``[steps, *counts.shape]`` sorted frames of net counts: the sign of n in the last or first ``|n|`` steps."""
    levels = np.arange(1, steps + 1) if code == "prefix" else np.arange(steps, 0, -1)
    return np.sign(counts) * (np.abs(counts) >= levels.reshape((-1,) + (1,) * counts.ndim))
