"""avg_pool: the mean of a sliding window; on integers the window sum, with the divisor in the scale."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ops._linear import LinearMap, reached, surrounded, windows
from spir.types import Int, Interval, Real, Scale, Shape, Spikes, Tensor, same_scale


@attrs.frozen
class AvgPool(LinearMap):
    """Mean over ``kernel`` windows on ``[C, H, W]``; padding (top, bottom, left, right) counts as zeros."""

    name: ClassVar[str] = "avg_pool"
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def divisor(self) -> int:
        """Elements in a window."""
        return self.kernel[0] * self.kernel[1]

    def shape(self, *shapes: Shape) -> Shape:
        """``[C, H, W]`` to ``[C, H', W']``; rows and columns that fill no whole window are left out, as in torch."""
        (shape,) = shapes
        if len(shape) != 3:
            raise error("type", f"needs [C, H, W], not {list(shape)}")
        if min(*self.kernel, *self.stride) < 1 or min(self.padding) < 0:
            raise error("type", "kernel and stride are positive, padding is not negative")
        top, bottom, left, right = self.padding
        height = windows(shape[1], self.kernel[0], self.stride[0], 1, top, bottom)
        width = windows(shape[2], self.kernel[1], self.stride[1], 1, left, right)
        if height < 1 or width < 1:
            raise error("type", f"a window of {self.kernel[0]}x{self.kernel[1]} does not fit {shape[1]}x{shape[2]}")
        return shape[0], height, width

    def scale(self, *types: Tensor) -> Scale:
        """The divisor goes into the scale."""
        return same_scale(types) * Scale.of(Fraction(1, self.divisor))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """As many such values as lie in a window, at the border fewer."""
        (x,), ((_, height, width),) = intervals, shapes
        top, bottom, left, right = self.padding
        rows = reached(height, self.kernel[0], self.stride[0], 1, top, bottom).sum(axis=1)
        columns = reached(width, self.kernel[1], self.stride[1], 1, left, right).sum(axis=1)
        most, fewest = int(rows.max() * columns.max()), int(rows.min() * columns.min())
        return x.map(lambda ends: ends * most) | x.map(lambda ends: ends * fewest)

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """The window sum; on reals divided by the window."""
        (x0,) = x
        _, height, width = self.shape(x0.shape[1:])
        top, bottom, left, right = self.padding
        padded = surrounded(x0, ((top, bottom), (left, right)))
        total = np.zeros((*x0.shape[:2], height, width), dtype=x0.dtype)
        for u in range(self.kernel[0]):
            for v in range(self.kernel[1]):
                total += padded[:, :, u :: self.stride[0], v :: self.stride[1]][:, :, :height, :width]
        return total / self.divisor if real else total

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """Every window that an element is in."""
        (shape,) = shapes
        height, width = y.shape[2:]
        top, bottom, left, right = self.padding
        back = np.zeros((len(y), shape[0], shape[1] + top + bottom, shape[2] + left + right), dtype=y.dtype)
        for u in range(self.kernel[0]):
            for v in range(self.kernel[1]):
                back[..., u :: self.stride[0], v :: self.stride[1]][..., :height, :width] += y
        return (back[..., top : top + shape[1], left : left + shape[2]],)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Overlapping windows, a remainder, padding, a window that is no power of two."""
        image = (2, 5, 7)
        for op in (
            cls(kernel=(2, 2), stride=(2, 2)),
            cls(kernel=(3, 3), stride=(2, 1), padding=(1, 1, 1, 0)),
            cls(kernel=(5, 7), stride=(1, 1)),
        ):
            for encoding in (
                Spikes(8, "bits", 0, 255, Scale.of(0.3)),
                Spikes(5, "bits", -16, 15, Scale.of([0.3, 0.7])),
                Int(3, 9, Scale.of(1.0)),
                Real(),
            ):
                yield op, (Tensor(image, encoding),)
