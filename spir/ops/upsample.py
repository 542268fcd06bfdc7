"""upsample: every pixel repeated, by whole factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
from numpy.typing import NDArray

from spir.errors import error
from spir.ops._linear import Relabelling
from spir.types import Current, Int, Real, Scale, Shape, Spikes, Tensor


@attrs.frozen
class Upsample(Relabelling):
    """Nearest neighbours on ``[C, H, W]``: each pixel becomes a block of ``factor`` rows and columns."""

    name: ClassVar[str] = "upsample"
    factor: tuple[int, int]

    def shape(self, *shapes: Shape) -> Shape:
        """Space grows by the factors."""
        (shape,) = shapes
        if len(shape) != 3 or min(self.factor) < 1:
            raise error("type", f"needs [C, H, W] and positive factors, not {list(shape)} and {list(self.factor)}")
        return shape[0], shape[1] * self.factor[0], shape[2] * self.factor[1]

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """Rows, then columns."""
        return x[0].repeat(self.factor[0], axis=2).repeat(self.factor[1], axis=3)

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """The sum over each block."""
        channels, height, width = shapes[0]
        blocks = y.reshape(len(y), channels, height, self.factor[0], width, self.factor[1])
        return (blocks.sum(axis=(3, 5)),)

    def sources(self, shape: Shape) -> tuple[frozenset[int], ...]:
        """The channels stay."""
        return tuple(frozenset((c,)) for c in range(shape[0]))

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Square, one direction, nothing at all."""
        for factor in ((2, 2), (1, 3), (1, 1)):
            for encoding in (
                Spikes(8, "bits", 0, 255, Scale.of(0.5)),
                Current(4, "bits", -90, 80, -6, 6, Scale.of([0.5, 0.25])),
                Int(-4, 4, Scale.of([0.5, 0.25])),
                Real(),
            ):
                yield cls(factor=factor), (Tensor((2, 3, 2), encoding),)
