"""scale: multiplication by constants, per tensor or per channel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Array
from spir.ops._linear import LinearMap, channelwise
from spir.types import Int, Interval, Real, Scale, Shape, Spikes, Tensor, scale_of


@attrs.frozen
class Scaling(LinearMap):
    """``y = factor * x``; ``factor`` is ``[1]`` or ``[C]``, integers may also have the full shape.

    A float factor on integer carriers moves into the scale (its sign stays with the integers). With ``to``, a float64
    array like ``factor``, the integers are multiplied by the integer ``factor`` and stand for steps of ``to`` from
    there on: so branches of unequal scales are made to meet, with a relative error of at most 1 / (2 factor).
    """

    name: ClassVar[str] = "scale"
    factor: Array
    to: Array | None = None

    def shape(self, *shapes: Shape) -> Shape:
        """The shape stays."""
        (shape,) = shapes
        for array in (self.factor, self.to):
            whole = array is self.factor and array.integral and array.values.shape == shape
            if array is not None and not whole and array.values.shape not in ((1,), (shape[0],)):
                raise error("type", f"constants of shape {list(array.values.shape)} are not [1] or [{shape[0]}]")
        return shape

    def check_real(self, *types: Tensor) -> None:
        """Reals have no scale to set."""
        if self.to is not None:
            raise error("type", "a real value has no scale to set", fix="drop `to`")

    def check_integer(self, *types: Tensor) -> None:
        """A relabelling multiplies by integers."""
        if self.to is not None and not self.factor.integral:
            raise error("type", "`to` goes with an integer factor")

    def scale(self, *types: Tensor) -> Scale:
        """Scale x |factor|, or the scale asked for; a factor of 0 leaves it alone."""
        if self.to is not None:
            return Scale.of(self.to.values.tolist())
        if self.factor.integral:
            return scale_of(types[0])
        return scale_of(types[0]) * Scale.of([abs(f) or 1.0 for f in self.factor.values.tolist()])

    @property
    def multiplier(self) -> NDArray[np.int64]:
        """What the stored integers are multiplied by: the integer factor, or the sign of a float one."""
        values = self.factor.values if self.factor.integral else np.sign(self.factor.values)
        return np.asarray(values, dtype=np.int64)

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The bounds times the multiplier, at its smallest and largest where it has the full shape."""
        factors = self.multiplier.astype(object)
        if factors.ndim == 1:
            return intervals[0].times(factors)
        rows = factors.reshape(len(factors), -1)
        return intervals[0].times(rows.min(axis=1)) | intervals[0].times(rows.max(axis=1))

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """Elementwise product."""
        (x0,) = x
        factor = self.factor.values if real else self.multiplier
        return np.asarray(x0 * channelwise(factor.astype(x0.dtype), x0.ndim - 1))

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """The same product."""
        return (self.apply(y, real=False),)

    def weighing(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> LinearMap:
        """Other integer factors."""
        return Scaling(Array.of(change(self.multiplier)))

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Negative and zero factors, wide multipliers, reals."""
        bits = Tensor((3, 2, 2), Spikes(8, "bits", 0, 255, Scale.of(0.5)))
        yield cls(factor=Array.of([-0.3, 0.0, 2.5])), (bits,)
        yield cls(factor=Array.of([305, 734, 11_000_000]), to=Array.of([1e-3, 5e-4, 3e-8])), (bits,)
        yield cls(factor=Array.of([7]), to=Array.of([0.07])), (Tensor((3,), Int(-9, 4, Scale.of([0.5, 0.25, 1.0]))),)
        yield cls(factor=Array.of([-1.5])), (Tensor((3, 2, 2), Real()),)
        whole = Array.of(np.arange(-4, 8).reshape(3, 2, 2))
        for encoding in (Int(-9, 4, Scale.of([0.5, 0.25, 1.0])), Spikes(4, "bits", 0, 15, Scale.of(0.5)), Real()):
            yield cls(factor=whole), (Tensor((3, 2, 2), encoding),)
