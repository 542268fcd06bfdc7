"""flatten: all dimensions into one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
from numpy.typing import NDArray

from spir.ops._linear import Relabelling
from spir.types import Current, Int, Real, Scale, Shape, Spikes, Tensor


@attrs.frozen
class Flatten(Relabelling):
    """``[C, H, W]`` to ``[C*H*W]``, row-major; a scale per channel is repeated for its positions."""

    name: ClassVar[str] = "flatten"

    def shape(self, *shapes: Shape) -> Shape:
        """The number of elements."""
        return (math.prod(shapes[0]),)

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """Row-major order."""
        return x[0].reshape(len(x[0]), -1)

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """Back to the operand's shape."""
        return (y.reshape(len(y), *shapes[0]),)

    def sources(self, shape: Shape) -> tuple[frozenset[int], ...]:
        """Every position is a channel of its own."""
        return tuple(frozenset((c,)) for c in range(shape[0]) for _ in range(math.prod(shape[1:])))

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
