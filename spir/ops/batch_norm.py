"""batch_norm: inference-mode normalisation with fixed statistics, on reals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Array, Op
from spir.ops._linear import channelwise
from spir.types import Real, Reals, Stored, Tensor


@attrs.frozen
class BatchNorm(Op):
    """``(x - mean) / sqrt(var + eps) * weight + bias``, all per channel ``[C]``; ``eps`` is the layer's own."""

    name: ClassVar[str] = "batch_norm"
    mean: Array
    var: Array
    eps: float = attrs.field(converter=float)
    weight: Array | None = None
    bias: Array | None = None

    def infer(self, *types: Tensor) -> Tensor:
        """Reals stay reals."""
        (x,) = types
        if not isinstance(x.encoding, Real):
            raise error("type", f"works on reals, not {x.encoding}", fix="fold-bn before quantize")
        for field, array in self.arrays().items():
            if array.values.shape != (x.shape[0],):
                raise error("type", f"{field} has shape {list(array.values.shape)}, not [{x.shape[0]}]")
        if self.eps < 0 or (self.var.values + self.eps <= 0).any():
            raise error("type", "var + eps must be positive", fix="repair the checkpoint: a variance is negative")
        return x

    def affine(self) -> tuple[Reals, Reals]:
        """``(gain, offset)`` with ``y = gain x + offset``: g = gamma / sqrt(var + eps), beta - g mean."""
        gain = 1.0 / np.sqrt(self.var.values + self.eps)
        gain = gain if self.weight is None else gain * self.weight.values
        offset = -gain * self.mean.values
        return gain, offset if self.bias is None else offset + self.bias.values

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Normalise, then scale and shift."""
        (x,) = stored
        rank = x.ndim - 1
        y = (x - channelwise(self.mean.values, rank)) / np.sqrt(channelwise(self.var.values, rank) + self.eps)
        y = y if self.weight is None else y * channelwise(self.weight.values, rank)
        return y if self.bias is None else np.asarray(y + channelwise(self.bias.values, rank))

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """With and without affine parameters, tiny variance, features without space."""
        mean, var = Array.of([0.5, -1.0, 0.0]), Array.of([1.0, 1e-12, 4.0])
        plain = cls(mean=mean, var=var, eps=1e-5)
        for op in (plain, attrs.evolve(plain, weight=Array.of([1.0, -2.0, 0.0]), bias=Array.of([0.0, 3.0, 1.0]))):
            for shape in ((3,), (3, 2, 2)):
                yield op, (Tensor(shape, Real()),)
