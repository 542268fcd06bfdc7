"""softmax: normalised exponentials along one dimension, computed by the host."""

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
class Softmax(Op):
    """``exp(x) / sum(exp(x))`` along ``axis`` of a sample, or its log; legal before an encoder or after a readout."""

    name: ClassVar[str] = "softmax"
    host: ClassVar[bool] = True
    axis: int = 0
    log: bool = False

    def infer(self, *types: Tensor) -> Tensor:
        """Reals stay reals."""
        x = real_operand(*types)
        if not 0 <= self.axis < len(x.shape):
            raise error("type", f"{list(x.shape)} has no axis {self.axis}")
        return x

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """The largest value goes first, so that no exponential overflows."""
        x = stored[0] - stored[0].max(axis=self.axis + 1, keepdims=True)
        total = np.exp(x).sum(axis=self.axis + 1, keepdims=True)
        return np.asarray(x - np.log(total) if self.log else np.exp(x) / total, dtype=np.float64)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Features, channels of images, the logarithm."""
        yield cls(), (Tensor((3,), Real()),)
        yield cls(log=True), (Tensor((3,), Real()),)
        yield cls(axis=2), (Tensor((3, 2, 4), Real()),)
