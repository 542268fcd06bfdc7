"""relu: max(x, 0), on reals and integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Op
from spir.types import Int, Interval, Real, Scale, Shape, Stored, Tensor


@attrs.frozen
class Relu(Op):
    """``max(x, 0)``."""

    name: ClassVar[str] = "relu"

    def infer(self, *types: Tensor) -> Tensor:
        """Reals and integers; the maximum with 0 does not act frame by frame."""
        (x,) = types
        if x.train is not None:
            raise error(
                "type",
                f"{x.encoding} has no relu frame by frame",
                fix="quantize, then derive-thresholds: the neuron is the relu",
            )
        if isinstance(x.encoding, Int):
            lo, hi = self.bounds((x.shape,), x.range).hull
            return attrs.evolve(x, encoding=Int(lo, hi, x.encoding.scale))
        return x

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """Both ends, cut at 0."""
        return intervals[0].map(lambda ends: np.maximum(ends, 0))

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Elementwise."""
        return np.maximum(stored[0], 0)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Reals, integers on both sides, integers below 0 only."""
        for encoding in (Real(), Int(-5, 7, Scale.of(0.5)), Int(-5, -2, Scale.of(0.5))):
            yield cls(), (Tensor((3, 2, 2), encoding),)
