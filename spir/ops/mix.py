"""mix: a matrix over time that spreads the frames of a train and keeps their total."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Array, Op
from spir.types import Current, Interval, Scale, Shape, Spikes, Stored, Tensor, check_register, scale_of


@attrs.frozen
class Mix(Op):
    """``J(x) = (1 / divisor) sum_j matrix[x, j] I(j)``; every column sums to ``divisor``, so the total charge stays.

    ``matrix`` is ``[T', T]`` integers. Frames are held as integers, 1 / divisor goes into the scale. Source: Lambda_PRE
    of Hao et al. 2412.13610, all entries 1 / T, which projects any timing to the uniform one.
    """

    name: ClassVar[str] = "mix"
    matrix: Array
    divisor: int

    @property
    def uniform(self) -> bool:
        """Whether all its frames are equal."""
        return bool((self.matrix.values == self.matrix.values[:1]).all())

    def infer(self, *types: Tensor) -> Tensor:
        """A train or current whose frames weigh the same to a current; direct where all rows are equal."""
        (x,) = types
        train, matrix = x.train, self.matrix
        if train is None or train.code == "bits":
            raise error("type", f"mixes frames that weigh the same, not {x.encoding}", fix="encode without bits")
        if not matrix.integral or matrix.values.ndim != 2 or matrix.values.shape[1] != train.steps:
            given = f"{matrix.values.dtype} {list(matrix.values.shape)}"
            raise error("type", f"a matrix of {given} for {train.steps} frames", fix=f"integers [T', {train.steps}]")
        if self.divisor < 1 or (matrix.values.sum(axis=0) != self.divisor).any():
            raise error(
                "type",
                f"columns sum to {sorted(set(matrix.values.sum(axis=0).tolist()))}, not to divisor = {self.divisor}",
                fix="a matrix that keeps the total charge, or a neuron_matrix that weighs it",
            )
        value, frame = x.range.map(lambda ends: ends * self.divisor), Interval.of(*train.frame)
        rows = matrix.values.astype(object)
        lo, hi = (np.where(rows > 0, rows * a, rows * b).sum(axis=1) for a, b in (train.frame, train.frame[::-1]))
        frame = Interval.of(min(lo), max(hi))
        check_register(value | frame, "the charge")
        steps, code = len(rows), "direct" if self.uniform else "rate"
        return Tensor(
            x.shape, Current(steps, code, *value.hull, *frame.hull, scale_of(x) * Scale.of(Fraction(1, self.divisor)))
        )

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The total, in finer steps."""
        return intervals[0].map(lambda ends: ends * self.divisor)

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """The matrix product over time."""
        return np.tensordot(self.matrix.values, np.asarray(stored[0], dtype=np.int64), axes=1)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Uniform, a permutation, negative entries, other lengths out than in."""
        scale = Scale.of(0.5)
        for matrix, divisor in (
            (np.ones((3, 3), dtype=np.int64), 3),
            (np.eye(3, dtype=np.int64)[::-1], 1),
            ([[2, -1, 0], [0, 3, 2]], 2),
        ):
            op = cls(Array.of(matrix), divisor)
            for encoding in (
                Spikes(3, "rate", -3, 3, scale),
                Spikes(3, "suffix", 0, 3, scale),
                Current(3, "rate", -9, 12, -4, 6, Scale.of([0.5, 0.25])),
                Current(3, "direct", -9, 12, -3, 4, scale),
            ):
                yield op, (Tensor((2, 2, 2), encoding),)
