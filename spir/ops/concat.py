"""concat: tensors one after the other, along channels or another dimension."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import accumulate
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ops._linear import LinearMap
from spir.types import Current, Encoding, Int, Interval, Real, Scale, Shape, Spikes, Tensor, same_scale, scale_of


@attrs.frozen
class Concat(LinearMap):
    """The operands along ``axis`` of a sample, 0 is the channels; there each keeps its scale, elsewhere they share one.

    Trains of one code and sign stay spikes; signed with unsigned bits become a current. Sorted trains of both orders
    are refused: no max_pool could read them.
    """

    name: ClassVar[str] = "concat"
    operands: ClassVar[int | None] = None
    relabels: ClassVar[bool] = True
    axis: int = 0

    def shape(self, *shapes: Shape) -> Shape:
        """Sizes along the axis add up; the others agree."""
        first = shapes[0]
        if not 0 <= self.axis < len(first):
            raise error("type", f"{list(first)} has no axis {self.axis}")
        others = {(s[: self.axis], s[self.axis + 1 :]) for s in shapes}
        if len(others) > 1:
            found = " and ".join(str(list(s)) for s in shapes)
            raise error("type", f"operands of shapes {found} differ beyond axis {self.axis}")
        return (*first[: self.axis], sum(s[self.axis] for s in shapes), *first[self.axis + 1 :])

    def scale(self, *types: Tensor) -> Scale:
        """Each channel's own; across another axis the operands' one scale."""
        if self.axis or (len({scale_of(t) for t in types}) == 1 and scale_of(types[0]).size == 1):
            return same_scale(types)
        rows = (scale_of(t).known * (t.shape[0] // scale_of(t).size) for t in types)
        return Scale.of(value for row in rows for value in row)

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """Each channel's own; across another axis the hull."""
        if self.axis:
            return reduce(Interval.__or__, intervals)
        each = [x.broadcast(shape[0]) for x, shape in zip(intervals, shapes, strict=True)]
        return Interval(np.concatenate([x.lo for x in each]), np.concatenate([x.hi for x in each]))

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """One after the other."""
        return np.concatenate(x, axis=self.axis + 1)

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """Cut where they meet."""
        cuts = list(accumulate(s[self.axis] for s in shapes))[:-1]
        return tuple(np.split(y, cuts, axis=self.axis + 1))

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Unequal sizes and scales, three operands, another axis, signed with unsigned bits, currents with spikes."""
        half, quarter = Scale.of(0.5), Scale.of(0.25)
        a, b, c = (2, 3, 2), (1, 3, 2), (3, 3, 2)
        unsigned, signed = Spikes(8, "bits", 0, 255, half), Spikes(8, "bits", -128, 127, quarter)
        cases: tuple[tuple[Encoding, ...], ...] = (
            (unsigned, attrs.evolve(unsigned, scale=quarter), unsigned),
            (unsigned, signed, unsigned),
            (signed, Current(8, "bits", -900, 900, -6, 7, Scale.of(3.0)), signed),
            (Int(-4, 9, half), Int(0, 255, quarter), Int(5, 7, Scale.of([1.0, 2.0, 3.0]))),
            (Real(), Real(), Real()),
        )
        for encodings in cases:
            yield cls(), tuple(Tensor(s, e) for s, e in zip((a, b, c), encodings, strict=True))
        for encoding in (unsigned, Int(-4, 9, Scale.of([0.5, 0.25])), Real()):
            yield cls(axis=2), (Tensor(a, encoding), Tensor((2, 3, 5), encoding))
