"""flatten: all dimensions into one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
from numpy.typing import NDArray

from spir.ops._linear import Counts, LinearMap
from spir.types import Current, Int, Interval, Real, Scale, Shape, Spikes, Tensor, scale_of


@attrs.frozen
class Flatten(LinearMap):
    """``[C, H, W]`` to ``[C*H*W]``, row-major; a scale per channel is repeated for its positions."""

    name: ClassVar[str] = "flatten"
    relabels: ClassVar[bool] = True

    def shape(self, *shapes: Shape) -> Shape:
        """The number of elements."""
        return (math.prod(shapes[0]),)

    def scale(self, *types: Tensor) -> Scale:
        """Each channel's scale, once a position."""
        (x,) = types
        return scale_of(x).map(lambda values: (v for v in values for _ in range(x.size // x.shape[0])))

    def bounds(self, *intervals: Interval) -> Interval:
        """The hull of all channels, because the op does not know how many positions a channel has."""
        return Interval.of(*intervals[0].hull)

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """Row-major order."""
        return x[0].reshape(len(x[0]), -1)

    def synapses(self, paths: Counts, *shapes: Shape) -> tuple[Counts, ...]:
        """One path each."""
        return (paths.reshape(shapes[0]),)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Spikes stay spikes; per-channel scales are repeated; one dimension is left alone."""
        for encoding in (
            Spikes(8, "bits", 0, 255, Scale.of(0.5)),
            Current(4, "bits", -90, 80, -6, 6, Scale.of([0.5, 0.25])),
            Int(-4, 4, Scale.of([0.5, 0.25])),
            Real(),
        ):
            yield cls(), (Tensor((2, 3, 2), encoding),)
            yield cls(), (Tensor((2,), encoding),)
