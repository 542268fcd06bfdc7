"""tanh: the hyperbolic tangent, computed by the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.ir import Op
from spir.ops._host import real_operand
from spir.types import Real, Stored, Tensor


@attrs.frozen
class Tanh(Op):
    """``tanh(x)``, elementwise; legal before the first encoder or after a readout."""

    name: ClassVar[str] = "tanh"
    host: ClassVar[bool] = True

    def infer(self, *types: Tensor) -> Tensor:
        """Reals stay reals."""
        return real_operand(*types)

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Elementwise."""
        return np.asarray(np.tanh(stored[0]), dtype=np.float64)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Features and images."""
        for shape in ((3,), (3, 2, 2)):
            yield cls(), (Tensor(shape, Real()),)
