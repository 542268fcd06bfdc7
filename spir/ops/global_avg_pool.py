"""global_avg_pool: the mean over space; on integers the sum, with the divisor in the scale."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ops._linear import EXACT_IN_FLOAT64, LinearMap
from spir.types import Int, Interval, Real, Scale, Shape, Spikes, Tensor, same_scale


@attrs.frozen
class GlobalAvgPool(LinearMap):
    """Mean over H and W: ``[C, H, W]`` to ``[C]``, or to ``[C, 1, 1]`` with ``keepdim``.

    The number of positions is a field, because bounds and scale depend on it; it must be H x W of the operand.
    """

    name: ClassVar[str] = "global_avg_pool"
    positions: int
    keepdim: bool = False

    def shape(self, *shapes: Shape) -> Shape:
        """Space goes."""
        (shape,) = shapes
        if len(shape) != 3 or shape[1] * shape[2] != self.positions:
            raise error("type", f"needs [C, H, W] with H x W = {self.positions}, not {list(shape)}")
        return (shape[0], 1, 1) if self.keepdim else (shape[0],)

    def scale(self, *types: Tensor) -> Scale:
        """The divisor goes into the scale."""
        return same_scale(types) * Scale.of(Fraction(1, self.positions))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """A sum of ``positions`` such values."""
        return intervals[0].map(lambda ends: ends * self.positions)

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """The sum over space; on reals divided by the positions."""
        total = x[0].sum(axis=(2, 3), keepdims=self.keepdim)
        return np.asarray(total / self.positions if real else total)

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """The same for every position."""
        return (np.broadcast_to(y.reshape(*y.shape[:2], 1, 1), (len(y), *shapes[0])),)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """One position, 35 positions, sums beyond float64."""
        scale, wide = Scale.of(0.3), Int(-EXACT_IN_FLOAT64, EXACT_IN_FLOAT64, Scale.of(1.0))
        for encoding in (Spikes(8, "bits", 0, 255, scale), Spikes(5, "bits", -16, 15, scale), wide, Real()):
            for height, width in ((1, 1), (5, 7)):
                for keepdim in (False, True):
                    yield cls(positions=height * width, keepdim=keepdim), (Tensor((3, height, width), encoding),)
