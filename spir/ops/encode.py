"""encode: integers to the train of a code."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Op
from spir.ops._thinning import READINGS, Thinning, check_thinning
from spir.types import SORTED, Int, Integers, Interval, Scale, Shape, Spikes, Stored, Tensor


@attrs.frozen
class Encode(Op):
    """``steps`` frames of a code, which decode to the integer.

    bits: MSB first; below 0 two's complement, whose sign bit is a -1 in the first frame (SDANN eq 11, theorem STEM-1).
    ``rot`` and ``drlo``, in the reading ``drlo_mode``, thin the train (`spir.ops._thinning`); 0 is off.
    suffix, prefix: as many spikes as the integer counts, in the last or first steps; below 0 they are -1 (the sorted
    trains of Hao et al. 2412.13610; their sign is ours).
    isi: inter-spike intervals, one spike of the sign of x every ``full / (alpha |x|)`` steps, the last at the latest in
    step T: the train of code rate holds ``N = floor(alpha T |x| / full)`` spikes, the n-th in step
    ``floor(n full / (alpha |x|))``, by integers. ``full`` is what a spike in every step stands for, T unless told.
    Then, and wherever ``full = alpha T``, N is |x| itself. Else it is not, and a spike is worth ``full / (alpha T)``
    steps of the operand (Gao et al., Front. Neurosci. 17:1141701, input coding).
    """

    name: ClassVar[str] = "encode"
    steps: int
    code: str = "bits"
    full: int | None = None
    alpha: float = attrs.field(default=1.0, converter=float)
    rot: int = 0
    drlo: int = 0
    drlo_mode: str = READINGS[0]

    def infer(self, *types: Tensor) -> Tensor:
        """Integers that the code holds to spikes of the same range."""
        (x,) = types
        if not isinstance(x.encoding, Int):
            raise error("type", f"works on integers, not {x.encoding}", fix="quantize reals; integrate a train")
        if self.code not in ("bits", *SORTED, "isi"):
            known = " or ".join(("bits", *SORTED, "isi"))
            raise error("type", f"there is no encoder for code {self.code!r}", fix=f"code = {known}")
        if self.code != "bits" and (self.rot, self.drlo, self.drlo_mode) != (0, 0, READINGS[0]):
            raise error("type", f"code {self.code} takes no rot or drlo", fix="code = bits")
        if self.code == "isi":
            return Tensor(x.shape, self._rate(x.encoding))
        if self.full is not None or self.alpha != 1:
            raise error("type", f"code {self.code} takes no full or alpha", fix="code = isi")
        plain = Spikes(self.steps, self.code, x.encoding.lo, x.encoding.hi, x.encoding.scale)
        if self.code == "bits":
            check_thinning(self.steps, self.rot, self.drlo, self.drlo_mode)
        if self.thinning is None:
            return Tensor(x.shape, plain)
        lo, hi = (x.range | self._thinned(x.range, signed=plain.lo < 0)).hull
        return Tensor(x.shape, attrs.evolve(plain, lo=lo, hi=hi))

    @property
    def thinning(self) -> Thinning | None:
        """What becomes of a train of code bits; None where all spikes stay."""
        return Thinning.of(self.rot, self.drlo, self.drlo_mode)

    @property
    def lossless(self) -> bool:
        """Whether the train decodes to the operand, step for step."""
        return self.density == 1 and self.thinning is None

    def _thinned(self, codes: Interval, *, signed: bool) -> Interval:
        return codes if self.thinning is None else self.thinning.bounds(codes, self.steps, signed=signed)

    def _rate(self, x: Int) -> Spikes:
        top, full = max(-x.lo, x.hi), self.steps if self.full is None else self.full
        if not 0 < self.alpha <= 1 or full < 1:
            raise error("type", f"alpha = {self.alpha} and full = {full}, and codes need 0 < alpha <= 1 <= full")
        interval = self.interval
        widest = max(top * interval.denominator, interval.numerator) * (self.steps + 2)
        if widest >= 2**62:
            what = f"intervals of {interval} steps need {widest.bit_length() + 1} bits"
            raise error("E-VRANGE", what, fix="a rounder alpha, or fewer steps")
        if top > full:
            raise error(
                "E-CAP",
                f"codes of {x.lo}..{x.hi}, and a spike in each of {self.steps} steps stands for {full}",
                fix=f"steps = {top}, or full = {top}, which is not lossless",
            )
        lo, hi = (int(end) for end in self._spikes(np.array([x.lo, x.hi], dtype=object)))
        return Spikes(self.steps, "rate", lo, hi, x.scale * Scale.of(1 / self.density))

    @property
    def interval(self) -> Fraction:
        """Steps between the spikes of 1, of code isi; alpha as its digits read."""
        return (self.steps if self.full is None else self.full) / Fraction(str(self.alpha))

    @property
    def density(self) -> Fraction:
        """Spikes a step of the operand, of code isi: 1 is lossless."""
        return self.steps / self.interval

    def _spikes(self, x: NDArray[Any]) -> NDArray[Any]:
        """How many, with the sign of x; Python ints stay such."""
        density = self.density
        return np.asarray(np.sign(x) * (np.abs(x) * density.numerator // density.denominator))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The value stays, unless its train is thinned; of code isi it becomes a count."""
        if self.code == "isi":
            return intervals[0].map(self._spikes)
        codes, (low, high) = intervals[0], intervals[0].hull
        if low < 0 or high >= 2 ** (self.steps - 1):
            return self._thinned(codes, signed=low < 0)
        return self._thinned(codes, signed=True) | self._thinned(codes, signed=False)  # which of them, the type knows

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Each bit by shift and mask, where the sign bit counts negative; or each step by its level."""
        values = np.asarray(stored[0], dtype=np.int64)
        if self.code == "isi":
            return self._intervals(values)
        if self.code != "bits":
            return sort(values, self.steps, self.code)
        signed = types[0].range.hull[0] < 0
        if self.thinning is not None:
            values = self.thinning.codes(values, self.steps, signed=signed)
        return bits(values, self.steps, signed=signed)

    def _intervals(self, values: Integers) -> Integers:
        """The frames of code isi, spike by spike."""
        flat, interval = values.reshape(-1), self.interval
        frames, count = np.zeros((self.steps, flat.size), dtype=np.int64), np.abs(self._spikes(flat))
        for n in range(1, int(count.max(initial=0)) + 1):
            (spiking,) = np.nonzero(count >= n)
            step = n * interval.numerator // (interval.denominator * np.abs(flat[spiking]))
            frames[step - 1, spiking] = np.sign(flat[spiking])
        return frames.reshape(self.steps, *values.shape)

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
        for op, lo, hi in (
            (cls(8, rot=2, drlo=2), 0, 255),
            (cls(8, drlo=3, drlo_mode="window"), -128, 127),
            (cls(5, rot=1, drlo=2, drlo_mode="position"), -5, 5),
        ):
            yield op, (Tensor((3, 2, 2), Int(lo, hi, Scale.of(0.5))),)
        for op, lo, hi in ((cls(9, "isi"), -7, 9), (cls(5, "isi", 12), 0, 12), (cls(6, "isi", 6, 0.5), -6, 3)):
            yield op, (Tensor((3, 2, 2), Int(lo, hi, Scale.of(0.5))),)


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
