"""pad: zeros, or the values at the edge, around a tensor, along any dimension."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ops._linear import Relabelling, surrounded
from spir.types import Current, Int, Real, Scale, Shape, Spikes, Tensor


@attrs.frozen
class Pad(Relabelling):
    """``pads`` holds (before, after) for each dimension, first dimension first, none negative.

    What is added is 0; with ``edge`` it repeats the nearest element, which a maximum over windows does not notice.
    """

    name: ClassVar[str] = "pad"
    pads: tuple[int, ...]
    edge: bool = False

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

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """Zeros, or the edge, around."""
        return np.pad(x[0], ((0, 0), *self.pairs), mode="edge") if self.edge else surrounded(x[0], self.pairs)

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """What lies inside the padding; at the edge also what was repeated."""
        (shape,) = shapes
        if self.edge:
            for axis, (size, (before, after)) in enumerate(zip(shape, self.pairs, strict=True), start=1):
                nearest = np.clip(np.arange(-before, size + after), 0, size - 1)
                y = np.add.reduceat(y, np.searchsorted(nearest, np.arange(size)), axis=axis)
            return (y,)
        return (y[(slice(None), *(slice(b, b + d) for d, (b, _) in zip(shape, self.pairs, strict=True)))],)

    def sources(self, shape: Shape) -> tuple[frozenset[int], ...]:
        """The channels in order, with zeros where space is padded, between channels of zeros."""
        before, after = self.pairs[0]
        if self.edge:
            nearest = np.clip(np.arange(-before, shape[0] + after), 0, shape[0] - 1)
            return tuple(frozenset((int(c),)) for c in nearest)
        zeros: frozenset[int] = frozenset((-1,))
        inside = (frozenset((c,)) | zeros if any(self.pads[2:]) else frozenset((c,)) for c in range(shape[0]))
        return (*[zeros] * before, *inside, *[zeros] * after)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Channels, space, nothing at all; a range without 0; zeros and edges."""
        ends = ((2, 1, 0, 0, 0, 0), (0, 0, 1, 0, 0, 2), (0,) * 6)
        for pads, edge in (*((p, False) for p in ends), *((p, True) for p in ends[:2])):
            for encoding in (
                Spikes(8, "bits", 0, 255, Scale.of(0.5)),
                Current(4, "bits", -90, 80, -6, 6, Scale.of([0.5, 0.25])),
                Int(4, 9, Scale.of([0.5, 0.25])),
                Real(),
            ):
                yield cls(pads=pads, edge=edge), (Tensor((2, 3, 2), encoding),)
