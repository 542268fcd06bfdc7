"""reshape: the same elements in row-major order under another shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
from numpy.typing import NDArray

from spir.errors import error
from spir.ops._linear import Relabelling
from spir.types import Current, Int, Real, Scale, Shape, Spikes, Tensor


@attrs.frozen
class Reshape(Relabelling):
    """Row-major order under the shape ``to``, per sample; channels that mix must share one scale."""

    name: ClassVar[str] = "reshape"
    to: tuple[int, ...]

    def shape(self, *shapes: Shape) -> Shape:
        """The shape asked for."""
        (shape,) = shapes
        if not self.to or min(self.to) < 1 or math.prod(self.to) != math.prod(shape):
            raise error("type", f"{list(shape)} has {math.prod(shape)} elements, and {list(self.to)} asks for others")
        return self.to

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """Row-major order."""
        return x[0].reshape(len(x[0]), *self.to)

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """Back to the operand's shape."""
        return (y.reshape(len(y), *shapes[0]),)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """More and fewer dimensions; channels split, kept and mixed."""
        split = Scale.of([0.5, 0.25])
        for to, scale in (((4, 3), split), ((2, 6), split), ((2, 1, 3, 2), split), ((3, 4), Scale.of(0.5))):
            for encoding in (
                Spikes(8, "bits", 0, 255, scale),
                Current(4, "bits", -90, 80, -6, 6, scale),
                Int(-4, 4, scale),
                Real(),
            ):
                yield cls(to=to), (Tensor((2, 3, 2), encoding),)
