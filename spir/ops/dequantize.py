"""dequantize: any carrier to the reals it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs

from spir.errors import error
from spir.ir import Op
from spir.types import Int, Real, Scale, Stored, Tensor


@attrs.frozen
class Dequantize(Op):
    """Decodes integers as an op; with `quantize` before it, the fake quantisation of a quantised-aware network."""

    name: ClassVar[str] = "dequantize"

    def infer(self, *types: Tensor) -> Tensor:
        """Integers to reals; decoding trains is what `integrate` is for."""
        (x,) = types
        if not isinstance(x.encoding, Int):
            raise error("type", f"works on integers, not {x.encoding}", fix="integrate a train first")
        return Tensor(x.shape, Real())

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """The decoding of the type."""
        return types[0].decode(stored[0])

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """One scale, one per channel."""
        for scale in (Scale.of(0.1), Scale.of([0.5, 0.25, 3.0])):
            yield cls(), (Tensor((3, 2, 2), Int(-8, 7, scale)),)
