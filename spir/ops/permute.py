"""permute: the dimensions of a sample in another order."""

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
class Permute(Relabelling):
    """Dimension ``order[i]`` of the operand becomes dimension ``i``; channels that mix must share one scale."""

    name: ClassVar[str] = "permute"
    order: tuple[int, ...]

    def shape(self, *shapes: Shape) -> Shape:
        """The sizes in the new order."""
        (shape,) = shapes
        if sorted(self.order) != list(range(len(shape))):
            raise error("type", f"{list(self.order)} is no order of the dimensions of {list(shape)}")
        return tuple(shape[d] for d in self.order)

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """Transposed behind the batch axis."""
        return x[0].transpose(0, *(d + 1 for d in self.order))

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """The inverse order."""
        return (y.transpose(0, *(int(d) + 1 for d in np.argsort(self.order))),)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Space turned, channels moved, features."""
        split, one = Scale.of([0.5, 0.25]), Scale.of(0.5)
        for order, shape, scale in (((0, 2, 1), (2, 3, 4), split), ((2, 0, 1), (2, 3, 4), one), ((1, 0), (2, 3), one)):
            for encoding in (
                Spikes(8, "bits", 0, 255, scale),
                Current(4, "bits", -90, 80, -6, 6, scale),
                Int(-4, 4, scale),
                Real(),
            ):
                yield cls(order=order), (Tensor(shape, encoding),)
