"""product: the elementwise product of two tensors, computed by the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Op
from spir.ops._host import real_operand
from spir.types import Real, Stored, Tensor


@attrs.frozen
class Product(Op):
    """``y = a * b`` of tensors of one shape; legal before the first encoder or after a readout."""

    name: ClassVar[str] = "product"
    operands: ClassVar[int | None] = 2
    host: ClassVar[bool] = True

    def infer(self, *types: Tensor) -> Tensor:
        """Reals stay reals."""
        a, b = types
        if a.shape != b.shape:
            raise error("type", f"operands have shapes {list(a.shape)} and {list(b.shape)}")
        return real_operand(a, b)

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Elementwise."""
        return np.asarray(stored[0] * stored[1], dtype=np.float64)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Features and images."""
        for shape in ((3,), (3, 2, 2)):
            yield cls(), (Tensor(shape, Real()), Tensor(shape, Real()))
