"""shift: addition of constants, on reals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Array, Op
from spir.ops._linear import channelwise
from spir.types import Real, Stored, Tensor


@attrs.frozen
class Shift(Op):
    """``y = x + offset``; ``offset`` is ``[1]``, ``[C]`` or of the full shape.

    Reals only: a train would add the constant in every frame. propagate-scales carries it through linear maps, zero
    padding included, into the requant or readout that follows.
    """

    name: ClassVar[str] = "shift"
    offset: Array

    def infer(self, *types: Tensor) -> Tensor:
        """Reals stay reals."""
        (x,) = types
        if not isinstance(x.encoding, Real):
            raise error(
                "type", f"a constant cannot ride on {x.encoding}", fix="propagate-scales puts it into the requant"
            )
        if self.offset.values.shape not in ((1,), (x.shape[0],), x.shape):
            given = list(self.offset.values.shape)
            raise error("type", f"an offset of shape {given} is not [1], [{x.shape[0]}] or {list(x.shape)}")
        return x

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Elementwise."""
        return np.asarray(stored[0] + channelwise(self.offset.values, stored[0].ndim - 1), dtype=np.float64)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """One for all, per channel, per element; features without space."""
        x = Tensor((3, 2, 2), Real())
        for offset in ([0.5], [-1.0, 0.0, 2.5], np.arange(12.0).reshape(3, 2, 2)):
            yield cls(offset=Array.of(offset)), (x,)
        yield cls(offset=Array.of([1.0, -2.0])), (Tensor((2,), Real()),)
