"""quantize: reals to integers of a range and scale, round half up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Op
from spir.types import Int, Real, Scale, Stored, Tensor


@attrs.frozen
class Quantize(Op):
    """``clamp(floor(x / scale + 1/2), lo, hi)`` in float64; zero is code 0."""

    name: ClassVar[str] = "quantize"
    scale: float = attrs.field(converter=float)
    lo: int
    hi: int

    def infer(self, *types: Tensor) -> Tensor:
        """Reals to integers."""
        (x,) = types
        if not isinstance(x.encoding, Real):
            raise error("type", f"works on reals, not {x.encoding}", fix="requant changes the scale of integers")
        if max(-self.lo, self.hi) > 2**53:
            raise error("type", f"codes {self.lo}..{self.hi} are beyond 2^53, and float64 cannot count them")
        return Tensor(x.shape, Int(self.lo, self.hi, Scale.of(self.scale)))

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Elementwise."""
        return np.clip(np.floor(stored[0] / self.scale + 0.5), self.lo, self.hi).astype(np.int64)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Signed, unsigned, one code."""
        for lo, hi in ((-128, 127), (0, 255), (0, 0)):
            yield cls(scale=0.25, lo=lo, hi=hi), (Tensor((3, 2, 2), Real()),)
