"""Sparse spikes: rounding (RoT) and dropping low spikes (DRLO) of a bit-coded train, by value and by step.

RoT(k): ``x' = ((x + 2^(k-1)) >> k) << k``, at most the largest multiple of 2^k that the bits hold. By step: add
2^(k-1) to the potential and stop generating after bit k. DRLO(k) drops low spikes, in one of three readings: ``count``
keeps the first k, ``window`` those of the k bits that start at the leading one, ``position`` those of bit k and above.
With both on, RoT comes first: 83 -> 84 -> 80 with RoT(2) and DRLO(2), of 4, 3, 2 spikes.

The sign of a signed train, the -1 of its first step, always stays and counts as no spike; what lies behind it is
unsigned. So a small negative value, whose bits are mostly ones, moves far: DRLO makes -1 a much lower number.

Source: SDANN eq 22 (RoT). The published text leaves DRLO open: all three readings are a reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error, unknown
from spir.types import Integers, Interval, Spikes

READINGS = ("count", "window", "position")
"""Of DRLO; the first is what prose suggests."""
TABLED = 16
"""Bits of codes that a table may list."""


class Chooser(Protocol):
    """What `Thinning.gate` needs of an array library."""

    @property
    def where(self) -> Callable[[Any, Any, Any], Any]:
        """Elementwise choice."""

    @property
    def zeros_like(self) -> Callable[[Any], Any]:
        """Zeros of the same shape and type."""


@attrs.frozen
class Thinning:
    """What becomes of a bit-coded train.

    ``rot`` and ``drlo`` are the k of RoT and DRLO, 0 where they are off; ``mode`` is the reading of DRLO. Methods are
    told the bits of a code, and whether it is signed.
    """

    rot: int = 0
    drlo: int = 0
    mode: str = READINGS[0]

    @classmethod
    def of(cls, rot: int, drlo: int, mode: str) -> Thinning | None:
        """From the fields of an op; None where all spikes stay."""
        return cls(rot, drlo, mode) if rot or drlo else None

    @property
    def half(self) -> int:
        """What RoT adds before bits are generated."""
        return 2 ** (self.rot - 1) if self.rot else 0

    def codes(self, values: NDArray[Any], bits: int, *, signed: bool) -> NDArray[Any]:
        """What codes become, by value; Python ints stay such."""
        low, high = Spikes.limits(bits, "bits", signed=signed)
        if self.rot:
            values = np.clip((values + self.half) >> self.rot << self.rot, low, high >> self.rot << self.rot)
        if not self.drlo:
            return values
        signs = np.where(values < 0, low, 0)
        rest, left, seen = values - signs, signs, 0 * values
        for index in reversed(range(bits - signed)):
            bit = rest >> index & 1
            kept = index >= self.drlo if self.mode == "position" else seen < self.drlo
            left = left + np.where(kept, bit << index, 0)
            seen = seen + np.where(seen > 0, 1, bit) if self.mode == "window" else seen + bit
        return left

    def bounds(self, codes: Interval, bits: int, *, signed: bool) -> Interval:
        """What codes of a range become, exactly: order is kept, so ends become ends.

        Of two codes, take the highest bit in which they differ. If the reading drops it, both lost the same; if it
        keeps it, the larger code keeps at least that bit, and the smaller one less than its weight.
        """
        return codes.map(lambda ends: self.codes(ends, bits, signed=signed))

    def decoded(self, xp: Chooser, codes: Any, bits: int, *, signed: bool) -> Any:
        """What codes become, by steps: for backends, on their own arrays."""
        frames = generate(xp, codes, bits, signed=signed, thinning=self)
        return sum(frame * 2 ** (bits - 1 - step) for step, frame in enumerate(frames))

    def table(self, bits: int, *, signed: bool) -> Integers | None:
        """What each code becomes, from the lowest on, by steps; None where there are too many codes."""
        low, high = Spikes.limits(bits, "bits", signed=signed)
        codes = np.arange(low, high + 1) if bits <= TABLED else None
        return None if codes is None else np.asarray(self.decoded(np, codes, bits, signed=signed))

    def gate(self, xp: Chooser, frames: Iterator[Any], bits: int, *, signed: bool) -> Iterator[Any]:
        """The train of a code plus `half`, step by step, without the spikes that are dropped."""
        floor = max(self.rot, self.drlo if self.mode == "position" else 0)
        seen: Any = 0
        for step, frame in enumerate(frames):
            if signed and step == 0:
                yield frame
            elif bits - 1 - step < floor:
                yield xp.zeros_like(frame)
            elif not self.drlo or self.mode == "position":
                yield frame
            else:
                silent = xp.zeros_like(frame)
                seen = silent + seen
                yield xp.where(seen < self.drlo, frame, silent)
                seen = xp.where(seen > 0, seen + 1, frame) if self.mode == "window" else seen + frame


def generate(
    xp: Chooser, potential: Any, bits: int, *, signed: bool, thinning: Thinning | None = None
) -> Iterator[Any]:
    """The frames of a potential V, which may lie beyond the codes: spike iff V >= 2^(b-1-t), then V -= 2^(b-1-t).

    With ``signed`` the first step spikes -1 iff V < 0, then V += 2^(b-1).
    """
    if thinning is None:
        yield from _spikes(xp, potential, bits, signed=signed)
        return
    yield from thinning.gate(xp, _spikes(xp, potential + thinning.half, bits, signed=signed), bits, signed=signed)


def _spikes(xp: Chooser, potential: Any, bits: int, *, signed: bool) -> Iterator[Any]:
    for t in range(bits):
        threshold = 2 ** (bits - 1 - t)
        if signed and t == 0:
            fires = potential < 0
            potential = xp.where(fires, potential + threshold, potential)
            yield xp.where(fires, -1, 0)
        else:
            fires = potential >= threshold
            potential = xp.where(fires, potential - threshold, potential)
            yield xp.where(fires, 1, 0)


def check_thinning(bits: int, rot: int, drlo: int, mode: str) -> None:
    """Refuses what leaves no spikes, or drops none.

    Raises:
        SpirError[type]: k of RoT beyond 0..bits - 1, k of DRLO beyond 0..bits, an unknown reading.
    """
    if mode not in READINGS:
        raise unknown("reading of DRLO called", mode, READINGS, code="type")
    if rot and not 0 < rot < bits:
        raise error("type", f"rot = {rot} of {bits} bits", fix=f"rot = 1..{bits - 1}, or 0 for off" if bits > 1 else "")
    most = bits - 1 if mode == "position" else bits
    if drlo and not 0 < drlo <= most:
        raise error("type", f"drlo = {drlo}, reading {mode}, of {bits} bits", fix=f"drlo = 1..{most}, or 0 for off")
