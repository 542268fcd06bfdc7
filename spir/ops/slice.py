"""slice: a strided window of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ops._linear import Relabelling
from spir.types import Current, Int, Real, Scale, Shape, Spikes, Tensor


@attrs.frozen
class Slice(Relabelling):
    """``x[start:stop:step]`` along every dimension; no index is negative."""

    name: ClassVar[str] = "slice"
    start: tuple[int, ...]
    stop: tuple[int, ...]
    step: tuple[int, ...]

    @property
    def window(self) -> tuple[slice, ...]:
        """The slice of each dimension."""
        return tuple(slice(*ends) for ends in zip(self.start, self.stop, self.step, strict=True))

    def shape(self, *shapes: Shape) -> Shape:
        """The elements left along each dimension."""
        (shape,) = shapes
        if not len(shape) == len(self.start) == len(self.stop) == len(self.step):
            raise error("type", f"{list(shape)} takes {len(shape)} starts, stops and steps")
        if (
            min(self.start + self.stop) < 0
            or min(self.step) < 1
            or any(e > d for e, d in zip(self.stop, shape, strict=True))
        ):
            raise error("type", f"{list(self.start)}:{list(self.stop)}:{list(self.step)} leaves {list(shape)}")
        if max(self.step) > 2**31:
            raise error("type", f"steps {list(self.step)} are beyond 2^31")
        result = tuple(len(range(d)[w]) for d, w in zip(shape, self.window, strict=True))
        if min(result) < 1:
            raise error("type", f"{list(self.start)}:{list(self.stop)} of {list(shape)} is empty")
        return result

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """Plain slicing."""
        return x[0][(slice(None), *self.window)]

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """Zeros but for what stays."""
        back = np.zeros((len(y), *shapes[0]), dtype=y.dtype)
        back[(slice(None), *self.window)] = y
        return (back,)

    def sources(self, shape: Shape) -> tuple[frozenset[int], ...]:
        """The channels that stay."""
        return tuple(frozenset((c,)) for c in range(shape[0])[self.window[0]])

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Strides in space, a window of channels, a single element."""
        for op in (
            cls(start=(0, 0, 0), stop=(4, 5, 6), step=(1, 2, 2)),
            cls(start=(1, 0, 2), stop=(3, 5, 5), step=(1, 1, 3)),
            cls(start=(3, 4, 5), stop=(4, 5, 6), step=(1, 1, 1)),
        ):
            for encoding in (
                Spikes(8, "bits", 0, 255, Scale.of(0.5)),
                Current(4, "bits", -90, 80, -6, 6, Scale.of([0.5, 0.25, 0.1, 0.2])),
                Int(4, 9, Scale.of([0.5, 0.25, 0.1, 0.2])),
                Real(),
            ):
                yield op, (Tensor((4, 5, 6), encoding),)
