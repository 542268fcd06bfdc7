"""linear: a matrix times a vector of features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Array
from spir.ops._linear import WeightedMap, split_by_sign, weighted
from spir.types import Int, Interval, Real, Scale, Shape, Spikes, Tensor


@attrs.frozen
class Linear(WeightedMap):
    """``y[o] = sum_i w[o, i] x[i] (+ bias[o])`` on ``[I]``.

    ``weight`` is ``[O, I]``: float, or integers with ``weight_scale`` ``[1]`` or ``[O]``. Only reals take a bias.
    """

    name: ClassVar[str] = "linear"

    def shape(self, *shapes: Shape) -> Shape:
        """``[I]`` to ``[O]``."""
        (shape,) = shapes
        weight = self.weight.values
        if len(shape) != 1 or weight.ndim != 2 or weight.shape[1] != shape[0]:
            raise error(
                "type",
                f"weights {list(weight.shape)} do not act on {list(shape)}",
                fix="flatten the operand first, so that it has as many features as the weights have columns",
            )
        return (weight.shape[0],)

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """Sign-split sums."""
        return weighted(split_by_sign(self.weight.values, *self.weight.values.shape), intervals[0])

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """One matrix product."""
        (x0,) = x
        result: NDArray[Any] = x0 @ self.weights(x0, real=real).T
        return result if self.bias is None else np.asarray(result + self.bias.values)

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """The transposed product."""
        return (y @ self.weight.values.astype(y.dtype),)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Signed and unsigned carriers, a dead row, one output."""
        rng = np.random.default_rng(1)
        for outputs in (1, 5):
            weight = rng.integers(-127, 128, (outputs, 7))
            weight[outputs // 2 :] = 0
            op = cls(weight=Array.of(weight), weight_scale=Array.of(2.0 ** -np.arange(2.0, 2.0 + outputs)))
            for encoding in (
                Spikes(8, "bits", 0, 255, Scale.of(0.5)),
                Spikes(3, "bits", -4, 3, Scale.of(0.1)),
                Int(-3, 9, Scale.of(0.5)),
            ):
                yield op, (Tensor((7,), encoding),)
        real = Array.of(rng.standard_normal((3, 7)))
        yield cls(weight=real, bias=Array.of(rng.standard_normal(3))), (Tensor((7,), Real()),)
