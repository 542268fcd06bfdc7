"""pad: zeros around a tensor, along any dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ops._linear import Counts, LinearMap, per_element
from spir.types import Current, Int, Interval, Real, Scale, Shape, Spikes, Tensor, scale_of


@attrs.frozen
class Pad(LinearMap):
    """Zero padding; ``pads`` holds (before, after) for each dimension, first dimension first, none negative."""

    name: ClassVar[str] = "pad"
    relabels: ClassVar[bool] = True
    pads: tuple[int, ...]

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """(before, after) of each dimension."""
        return tuple(zip(self.pads[::2], self.pads[1::2], strict=True))

    def shape(self, *shapes: Shape) -> Shape:
        """Each dimension grows by its pads."""
        (shape,) = shapes
        if len(self.pads) != 2 * len(shape) or min(self.pads) < 0:
            raise error("type", f"{list(shape)} takes {2 * len(shape)} pads >= 0, not {list(self.pads)}")
        return tuple(d + before + after for d, (before, after) in zip(shape, self.pairs, strict=True))

    def scale(self, *types: Tensor) -> Scale:
        """New channels hold zeros only and take a neighbour's scale."""
        (x,) = types
        return per_element(scale_of(x), x.shape, lambda numbers: self.apply(numbers, real=False))

    def bounds(self, *intervals: Interval) -> Interval:
        """Zero joins the bounds; channels shift when they are padded."""
        (x,) = intervals
        if len(x.lo) == 1:
            return x.with_zero() if any(self.pads) else x
        x = x.with_zero() if any(self.pads[2:]) else x
        zeros = [np.array([0] * n, dtype=object) for n in self.pads[:2]]
        return x.map(lambda ends: np.concatenate([zeros[0], ends, zeros[1]]))

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """Zeros around."""
        return np.pad(x[0], ((0, 0), *self.pairs))

    def synapses(self, paths: Counts, *shapes: Shape) -> tuple[Counts, ...]:
        """One path each, from inside the padding."""
        (shape,) = shapes
        return (paths[tuple(slice(b, b + d) for d, (b, _) in zip(shape, self.pairs, strict=True))],)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Channels, space, nothing at all; a range without 0."""
        for pads in ((2, 1, 0, 0, 0, 0), (0, 0, 1, 0, 0, 2), (0,) * 6):
            for encoding in (
                Spikes(8, "bits", 0, 255, Scale.of(0.5)),
                Current(4, "bits", -90, 80, -6, 6, Scale.of([0.5, 0.25])),
                Int(4, 9, Scale.of([0.5, 0.25])),
                Real(),
            ):
                yield cls(pads=pads), (Tensor((2, 3, 2), encoding),)
