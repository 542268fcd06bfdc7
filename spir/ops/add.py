"""add: the sum of two or more tensors of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ops._linear import LinearMap
from spir.types import Current, Int, Interval, Real, Scale, Shape, Spikes, Tensor


@attrs.frozen
class Add(LinearMap):
    """``y = x0 + x1 + ...``; integer carriers must share one scale, trains one code."""

    name: ClassVar[str] = "add"
    operands: ClassVar[int | None] = None

    def shape(self, *shapes: Shape) -> Shape:
        """One shape for all."""
        if len(set(shapes)) > 1:
            raise error("type", f"operands have shapes {' and '.join(str(list(s)) for s in shapes)}")
        return shapes[0]

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The sum of the bounds."""
        return reduce(Interval.__add__, intervals)

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """The sum, left to right."""
        return reduce(np.add, x)

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """The same for every operand."""
        return (y,) * len(shapes)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Signed with unsigned bits, currents with spikes, three operands, reals."""
        shape, scale = (3, 2, 2), Scale.of(0.125)
        unsigned, signed = Spikes(8, "bits", 0, 255, scale), Spikes(8, "bits", -128, 127, scale)
        current = Current(8, "bits", -40000, 50000, -300, 400, scale)
        for encodings in (
            (unsigned, signed),
            (unsigned, unsigned),
            (current, signed, unsigned),
            (Int(-5, 9, scale), Int(0, 255, scale)),
            (Real(), Real()),
        ):
            yield cls(), tuple(Tensor(shape, e) for e in encodings)
