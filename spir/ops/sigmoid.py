"""sigmoid: the logistic function, computed by the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.ir import Op
from spir.ops._host import real_operand
from spir.types import Real, Stored, Tensor


@attrs.frozen
class Sigmoid(Op):
    """``1 / (1 + exp(-x))``, elementwise; legal before the first encoder or after a readout."""

    name: ClassVar[str] = "sigmoid"
    host: ClassVar[bool] = True

    def infer(self, *types: Tensor) -> Tensor:
        """Reals stay reals."""
        return real_operand(*types)

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Elementwise, by the hyperbolic tangent, which does not overflow."""
        return np.asarray(0.5 + 0.5 * np.tanh(stored[0] / 2), dtype=np.float64)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Features and images."""
        for shape in ((3,), (3, 2, 2)):
            yield cls(), (Tensor(shape, Real()),)
