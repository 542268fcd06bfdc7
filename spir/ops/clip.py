"""clip: clamp to a calibrated range, on reals."""

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
class Clip(Op):
    """``clamp(x, lo, hi)``, bounds ``[1]`` or ``[C]``: the range that `quantize` will divide into steps.

    ``reach``, ``[1]`` or ``[C]``, remembers how far values went before calibration took ``hi``; it clips nothing.
    """

    name: ClassVar[str] = "clip"
    lo: Array
    hi: Array
    reach: Array | None = None

    def infer(self, *types: Tensor) -> Tensor:
        """Reals stay reals."""
        (x,) = types
        if not isinstance(x.encoding, Real):
            raise error("type", f"works on reals, not {x.encoding}", fix="calibrate-range before quantize")
        for array in (self.lo, self.hi, self.reach):
            if array is not None and array.values.shape not in ((1,), (x.shape[0],)):
                raise error("type", f"bounds of shape {list(array.values.shape)} are not [1] or [{x.shape[0]}]")
        if (self.lo.values > self.hi.values).any():
            raise error("type", "a lower bound lies above its upper bound")
        return x

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Elementwise."""
        (x,) = stored
        rank = x.ndim - 1
        lo, hi = channelwise(self.lo.values, rank), channelwise(self.hi.values, rank)
        return np.asarray(np.clip(x, lo, hi), dtype=np.float64)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Per tensor, per channel, an empty span."""
        x = Tensor((3, 2, 2), Real())
        yield cls(lo=Array.of([0.0]), hi=Array.of([1.5])), (x,)
        yield cls(lo=Array.of([-1.0, 0.0, 0.5]), hi=Array.of([1.0, 0.0, 2.0])), (x,)
