"""qcfs: the quantising activation of parallel spiking neurons, on reals, with the two shifts of its calibration.

Source: Hao et al., arXiv 2412.13610, equations 5 (QCFS) and 9 (DA-QCFS).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Array, Op
from spir.ops._linear import channelwise
from spir.types import Real, Reals, Stored, Tensor

MOST_LEVELS = 65_536


@attrs.frozen
class Qcfs(Op):
    """``((theta + phi) / L) clip(floor(((x + psi) L + theta / 2) / theta), lo, L)``, lo = 0, or -L where ``signed``.

    ``threshold`` is theta; ``psi`` shifts what comes in and ``phi`` changes the height of a step, left out they are 0.
    Each is ``[1]`` or ``[C]``. A tie goes up.
    """

    name: ClassVar[str] = "qcfs"
    levels: int
    threshold: Array
    psi: Array | None = None
    phi: Array | None = None
    signed: bool = False

    @property
    def rise(self) -> Reals:
        """What calibration makes of the height of a step: ``(theta + phi) / theta``, ``[1]`` or ``[C]``."""
        return np.ones(1) if self.phi is None else 1 + self.phi.values / self.threshold.values

    def infer(self, *types: Tensor) -> Tensor:
        """Reals stay reals."""
        (x,) = types
        if not isinstance(x.encoding, Real):
            raise error(
                "type",
                f"works on reals, not {x.encoding}",
                fix="it makes steps of its own: leave out the quantize before it",
            )
        if not 1 <= self.levels <= MOST_LEVELS:
            raise error("type", f"levels = {self.levels}", fix=f"give 1 to {MOST_LEVELS} levels")
        for field, array in self.arrays().items():
            if array.values.shape not in ((1,), (x.shape[0],)):
                given = list(array.values.shape)
                raise error("type", f"{field} has shape {given}, not [1] or [{x.shape[0]}]", fix="one number a channel")
        lowest = self.threshold.values.min()
        if not lowest > 0:
            raise error("type", f"a threshold of {lowest:g}", fix="thresholds are positive: train again, or clamp them")
        height = self.threshold.values if self.phi is None else self.threshold.values + self.phi.values
        if not height.min() >= 0:
            fix = "calibrate phi on more data, or leave it out"
            raise error("type", f"threshold + phi = {height.min():g}, which turns the activation over", fix=fix)
        return x

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Elementwise."""
        (x,) = stored
        rank = x.ndim - 1
        threshold = channelwise(self.threshold.values, rank)
        x = x if self.psi is None else x + channelwise(self.psi.values, rank)
        height = threshold if self.phi is None else threshold + channelwise(self.phi.values, rank)
        steps = np.clip(
            np.floor((x * self.levels + threshold / 2) / threshold), -self.levels * self.signed, self.levels
        )
        return np.asarray(steps * (height / self.levels), dtype=np.float64)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """One threshold and one a channel, one level, signed, both shifts, steps of no height; features."""
        x = Tensor((3, 2, 2), Real())
        one, each = Array.of([1.5]), Array.of([0.5, 1.0, 3.0])
        yield cls(levels=4, threshold=one), (x,)
        yield cls(levels=1, threshold=each), (x,)
        yield cls(levels=8, threshold=each, signed=True), (x,)
        yield cls(levels=4, threshold=each, psi=Array.of([0.25, -0.5, 0.0]), phi=Array.of([-0.25, 0.0, 1.0])), (x,)
        yield cls(levels=2, threshold=each, psi=Array.of([0.125]), phi=Array.of([-0.5])), (x,)
        yield cls(levels=4, threshold=one), (Tensor((3,), Real()),)
