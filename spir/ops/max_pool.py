"""max_pool: the largest value of a sliding window; exact frame by frame only on nested trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Op
from spir.ops._linear import reached, windows
from spir.types import SORTED, Current, Int, Interval, Real, Scale, Shape, Spikes, Stored, Tensor


@attrs.frozen
class MaxPool(Op):
    """Maximum over ``kernel`` windows on ``[C, H, W]``; padding (top, bottom, left, right) never wins.

    It stays on reals, on integers, on direct currents (all frames equal) and on sorted trains (nested frames), where
    the maximum of trains is the train of the maximum. Source: Hao et al. 2412.13610 for sorted trains; math of STEM
    for why bit-coded trains are refused.
    """

    name: ClassVar[str] = "max_pool"
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    def shape(self, shape: Shape) -> Shape:
        """``[C, H, W]`` to ``[C, H', W']``; rows and columns that fill no whole window are left out, as in torch."""
        if len(shape) != 3:
            raise error("type", f"needs [C, H, W], not {list(shape)}")
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise error("type", "kernel, stride and dilation are positive, padding is not negative")
        top, bottom, left, right = self.padding
        height = windows(shape[1], self.kernel[0], self.stride[0], self.dilation[0], top, bottom)
        width = windows(shape[2], self.kernel[1], self.stride[1], self.dilation[1], left, right)
        if height < 1 or width < 1:
            raise error("type", f"a window of {self.kernel[0]}x{self.kernel[1]} does not fit {shape[1]}x{shape[2]}")
        for size, axis, ends in ((shape[1], 0, (top, bottom)), (shape[2], 1, (left, right))):
            if not reached(size, self.kernel[axis], self.stride[axis], self.dilation[axis], *ends).any(axis=1).all():
                raise error("type", f"padding {list(self.padding)} leaves a window without a value", fix="pad less")
        return shape[0], height, width

    def infer(self, *types: Tensor) -> Tensor:
        """The operand's encoding, where the maximum acts frame by frame.

        Raises:
            SpirError[E-MAXPOOL]: trains whose frames are not nested.
        """
        (x,) = types
        shape = self.shape(x.shape)
        if x.train is not None and x.train.code not in (*SORTED, "direct"):
            raise error(
                "E-MAXPOOL",
                f"{x.encoding} trains are not nested, so the maximum of trains is not the train of the maximum",
                fix="add lower-max-pool before derive-thresholds, or pool the integrated values",
            )
        return Tensor(shape, x.encoding)

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The values' own."""
        return intervals[0]

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """The maximum over every window, whole trains at a time."""
        (x,), lead = stored, stored[0].ndim - 3
        _, height, width = self.shape(types[0].shape)
        lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(np.int64).min
        top, bottom, left, right = self.padding
        padded = np.pad(x, ((0, 0),) * (lead + 1) + ((top, bottom), (left, right)), constant_values=lowest)
        found: NDArray[Any] = np.full((*x.shape[:-2], height, width), lowest, dtype=x.dtype)
        for u in range(self.kernel[0]):
            for v in range(self.kernel[1]):
                rows = slice(u * self.dilation[0], None, self.stride[0])
                columns = slice(v * self.dilation[1], None, self.stride[1])
                found = np.maximum(found, padded[..., rows, columns][..., :height, :width])
        return found

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Overlap, a remainder, padding around negative values, dilation; nested trains of both signs."""
        image = (2, 5, 7)
        for op in (
            cls(kernel=(2, 2), stride=(2, 2)),
            cls(kernel=(3, 3), stride=(2, 2), padding=(1, 1, 0, 1)),
            cls(kernel=(3, 2), stride=(1, 3), padding=(0, 1, 1, 1), dilation=(2, 1)),
        ):
            for encoding in (
                Int(-9, -3, Scale.of([0.5, 0.25])),
                Int(0, 255, Scale.of(0.5)),
                Real(),
                Spikes(3, "suffix", 0, 3, Scale.of(0.5)),
                Spikes(3, "prefix", -3, 3, Scale.of([0.5, 0.25])),
                Current(3, "direct", -18, 15, -6, 5, Scale.of(0.5)),
            ):
                yield op, (Tensor(image, encoding),)
