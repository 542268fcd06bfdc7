"""requant: integers of one scale to integers of another, with bias and rounding inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Array, Op
from spir.ops._threshold import Triple, check_triple, law, law_bounds
from spir.types import Int, Interval, Scale, Shape, Stored, Tensor


@attrs.frozen
class Requant(Op):
    """``clamp(floor((mul z + add) / div), lo, hi)`` on integers.

    ``mul`` and ``add`` are ``[1]``, ``[C]`` or of the full shape; ``div`` is one number, or one per channel.
    The result counts steps of ``scale``. Source: the STEM law of SDANN eqs 8-10 and 19, with the 1/2 of round-half-up
    inside ``add`` (reconstruction of the numbered equations, proved as a law).
    """

    name: ClassVar[str] = "requant"
    mul: Array
    add: Array
    div: int | Array
    lo: int
    hi: int
    scale: float = attrs.field(converter=float)

    @property
    def triple(self) -> Triple:
        """The numbers of the law."""
        return self.mul, self.add, self.div, self.lo, self.hi

    def infer(self, *types: Tensor) -> Tensor:
        """Integers to integers."""
        (x,) = types
        if not isinstance(x.encoding, Int):
            raise error("type", f"works on integers, not {x.encoding}", fix="integrate a train first")
        check_triple(self.mul, self.add, self.div, x.shape, x)
        return Tensor(x.shape, Int(self.lo, self.hi, Scale.of(self.scale)))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The law at both ends."""
        return law_bounds(self.mul, self.add, self.div, self.lo, self.hi, intervals[0])

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """The law, elementwise."""
        return law(np.asarray(stored[0], dtype=np.int64), self.mul, self.add, self.div, self.lo, self.hi)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Ties, negative multipliers, a divisor that is no power of two, constants of full shape, wide products."""
        x = Tensor((3, 2, 2), Int(-40, 40, Scale.of(0.5)))
        ties = cls(mul=Array.of([1]), add=Array.of([2]), div=4, lo=0, hi=15, scale=0.25)
        yield ties, (x,)
        yield attrs.evolve(ties, mul=Array.of([3, -2, 0]), add=Array.of([-5, 7, 9]), div=7), (x,)
        yield attrs.evolve(ties, mul=Array.of([3, -2, 5]), div=Array.of([4, 7, 1])), (x,)
        yield attrs.evolve(ties, mul=Array.of([3, -2, 5]), div=Array.of([4, 8, 1])), (x,)
        signed = cls(
            mul=Array.of([1]), add=Array.of([[[k - 6, k] for k in range(2)]] * 3), div=2, lo=-8, hi=7, scale=1.0
        )
        yield signed, (x,)
        wide = Tensor((2,), Int(-(2**35), 2**35, Scale.of(0.5)))
        yield cls(mul=Array.of([2**24 - 1]), add=Array.of([2**40]), div=2**40, lo=0, hi=65535, scale=1.0), (wide,)
