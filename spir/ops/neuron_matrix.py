"""neuron_matrix: charge all steps by one matrix over time, then compare (parallel neurons as published)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Array
from spir.ops._linear import channelwise
from spir.ops._neuron import ArrayNamespace, Neuron
from spir.ops._threshold import Triple, check_triple, divisors, law_bounds, products
from spir.ops.mix import Mix
from spir.ops.neuron_parallel import NeuronParallel
from spir.types import Current, Interval, Scale, Shape, Spikes, Stored, Tensor, Train, check_register


@attrs.frozen
class NeuronMatrix(Neuron):
    """``s = H(Lambda I + b - theta)`` in integers: step x spikes iff ``mul (A I)_x + shift_x add >= rows_x div``.

    ``A`` is ``matrix``, ``[T, T']`` integers that act on T' frames; ``rows`` ``[T]`` are its denominators, so
    ``Lambda[x, j] = A[x, j] / rows_x``; ``shift`` ``[T]`` are the multiples of the shift. A lower-triangular Lambda is
    causal (``lambda^(x - j)`` is a leaky neuron without its reset), a full one waits for all frames. Trains are sorted
    where each step compares the whole sum with its level (`law_on`), else of code rate.

    Source: Hao et al. 2412.13610, eqs 2 and 6 to 8 (eq 2 with the entries of a leaky neuron is a reconstruction).
    """

    name: ClassVar[str] = "neuron_matrix"
    derived: ClassVar[bool] = False
    matrix: Array
    rows: Array
    shift: Array
    mul: Array
    add: Array
    div: int | Array
    scale: float = attrs.field(converter=float)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.rows.values)

    @classmethod
    def published(cls, neuron: NeuronParallel) -> tuple[Mix, Self]:
        """The two matrices of a parallel neuron of unsigned counts: Lambda_PRE, and a neuron of Lambda_PC.

        Lambda_PC has T / (x level_x) up to step x; numbers behind Lambda_PRE are T times as large, which takes the T.

        Raises:
            SpirError[type]: signed counts, of which the paper does not speak.
        """
        if neuron.signed:
            raise error("type", "the published matrices are those of unsigned counts", fix="neuron_parallel")
        x, ones = np.arange(1, neuron.steps + 1), np.ones((neuron.steps, neuron.steps), dtype=np.int64)
        charge, rows, shift = Array.of(np.tril(ones)), Array.of(x * cls.levels(neuron)), Array.of(x)
        pre = Mix(Array.of(ones), neuron.steps)
        return pre, cls(charge, rows, shift, neuron.mul, neuron.add, neuron.div, neuron.scale)

    @classmethod
    def of(cls, neuron: NeuronParallel, frames: int) -> Self:
        """The one matrix Lambda_PC Lambda_PRE of a parallel neuron that reads ``frames`` frames: rows of 1 / level."""
        ones = np.ones((neuron.steps, frames), dtype=np.int64)
        rows, shift = Array.of(cls.levels(neuron)), Array.of(ones[:, 0])
        return cls(Array.of(ones), rows, shift, neuron.mul, neuron.add, neuron.div, neuron.scale)

    @staticmethod
    def levels(neuron: NeuronParallel) -> NDArray[np.int64]:
        """The level that each step of a parallel neuron stands for."""
        up = np.arange(1, neuron.steps + 1)
        return up if neuron.order == "prefix" else up[::-1]

    def after(self, mix: Mix) -> NeuronMatrix:
        """The neuron that reads what ``mix`` reads: the product of both matrices."""
        return attrs.evolve(self, matrix=Array.of(self.matrix.values @ mix.matrix.values))

    @property
    def count_law(self) -> NeuronParallel | None:
        """The parallel neuron that this is, where theorem PC-1 holds: every step compares the whole sum with a level.

        None where a row treats frames unequally, or thresholds are not the multiples 1..T of one threshold, in order.
        """
        matrix, rows, shift = (a.values.astype(object) for a in (self.matrix, self.rows, self.shift))
        gains = matrix[:, 0]
        if (matrix != gains[:, None]).any() or (gains < 1).any():
            return None
        levels = [Fraction(r, g) for r, g in zip(rows.tolist(), gains.tolist(), strict=True)]
        shifts = {Fraction(s, g) for s, g in zip(shift.tolist(), gains.tolist(), strict=True)}
        unit = min(levels)
        multiples, up = [level / unit for level in levels], list(range(1, self.steps + 1))
        order = "suffix" if multiples == up[::-1] else "prefix"
        if len(shifts) > 1 or (order == "prefix" and multiples != up):
            return None
        (psi,) = shifts
        common = math.lcm(psi.denominator, unit.denominator)
        given = ((self.mul.values, Fraction(1)), (self.add.values, psi), (divisors(self.div), unit))
        exact = [values.astype(object) * int(factor * common) for values, factor in given]
        if any(abs(v) >= 2**62 for values in exact for v in values.reshape(-1)):
            return None
        mul, add, div = (Array.of(values.astype(np.int64)) for values in exact)
        one = int(div.values[0]) if len(div.values) == 1 else div
        return NeuronParallel(self.steps, mul, add, one, self.scale, order)

    def law_on(self, operand: Tensor) -> NeuronParallel | None:
        """The count law on an operand: where all frames are equal, only the sum of a row counts."""
        if operand.train is None or operand.train.code != "direct":
            return self.count_law
        frames, total = operand.steps, self.matrix.values.sum(axis=1, keepdims=True)
        alike = (total.repeat(frames, axis=1), self.rows.values * frames, self.shift.values * frames)
        matrix, rows, shift = map(Array.of, alike)
        return attrs.evolve(self, matrix=matrix, rows=rows, shift=shift).count_law

    @property
    def triple(self) -> Triple | None:
        """The count law, where there is one."""
        law = self.count_law
        return None if law is None else law.triple

    def infer(self, *types: Tensor) -> Tensor:
        """A train or current of T' frames that weigh the same to T frames."""
        (x,) = types
        if x.train is None or x.train.code == "bits":
            raise error("type", f"charges by frames that weigh the same, not {x.encoding}", fix="use neuron_parallel")
        for label, array, shape in (
            ("matrix", self.matrix, (self.steps, x.steps)),
            ("rows", self.rows, (self.steps,)),
            ("shift", self.shift, (self.steps,)),
        ):
            if not array.integral or array.values.shape != shape:
                raise error(
                    "type",
                    f"{label} {list(array.values.shape)} of {array.values.dtype} is not integers {list(shape)}",
                )
        if self.rows.values.min() < 1:
            raise error("type", f"rows = {self.rows.values.min()} is not positive")
        check_triple(self.mul, self.add, self.div, x.shape, x)
        most = self.state(x.train).magnitude
        charge = products(self.mul, Array.of(self.add.values * 0), Interval.of(-most, most))
        add = max(abs(int(a)) for a in self.add.values.reshape(-1)) * max(abs(int(s)) for s in self.shift.values)
        level = int(divisors(self.div).max()) * int(self.rows.values.max())
        check_register(charge | Interval.of(-charge.magnitude - add, charge.magnitude + add), "the charge of a step")
        check_register(Interval.of(0, level), "the threshold of a step")
        law = self.law_on(x)
        if law is not None:
            check_triple(law.mul, law.add, law.div, x.shape, x)
        emitted = "rate" if law is None else law.order
        return Tensor(x.shape, Spikes(self.steps, emitted, 0, self.steps, Scale.of(self.scale)))

    def state(self, train: Train) -> Interval:
        """All that the frames can bring to one row, in one direction."""
        most = int(np.abs(self.matrix.values.astype(object)).sum(axis=1).max()) * max(map(abs, train.frame))
        return Interval.of(-most, most)

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The count law at both ends, else no spike to one a step."""
        law = self.triple
        return Interval.of(0, self.steps) if law is None else law_bounds(*law, intervals[0])

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """The matrix product over time, then one comparison a step."""
        frames = np.asarray(stored[0], dtype=np.int64)
        charge, rank = np.tensordot(self.matrix.values, frames, axes=1), frames.ndim - 2
        mul, add, div = (channelwise(a, rank) for a in (self.mul.values, self.add.values, divisors(self.div)))
        along = (-1,) + (1,) * (rank + 1)
        shift, rows = self.shift.values.reshape(along), self.rows.values.reshape(along)
        return np.asarray(mul * charge + shift * add >= rows * div, dtype=np.int64)

    def fire(self, xp: ArrayNamespace, currents: Iterator[Any]) -> Iterator[Any]:
        """All frames are held; each step weighs them by its row."""
        held = list(currents)
        mul, add = xp.constant(self.mul, held[0]), xp.constant(self.add, held[0])
        div = self.div if isinstance(self.div, int) else xp.constant(self.div, held[0])
        for row, level, shift in zip(self.matrix.values, self.rows.values, self.shift.values, strict=True):
            charge = xp.zeros_like(held[0])
            for weight, current in zip(row, held, strict=True):
                charge = xp.hold(charge + current * int(weight))
            yield xp.where(charge * mul + add * int(shift) >= div * int(level), 1, 0)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Both matrices of the paper, one alone and fused, a leaky one, one step; ties; signed trains, currents."""
        scale = Scale.of(0.5)
        plain = NeuronParallel(3, Array.of([3, -2, 1]), Array.of([8, 8, 7]), 16, 0.25)
        _, charged = cls.published(plain)
        leaky = attrs.evolve(
            charged,
            matrix=Array.of([[4, 0, 0], [2, 4, 0], [1, 2, 4]]),
            rows=Array.of([4, 4, 4]),
            shift=Array.of([0, 0, 0]),
            div=Array.of([16, 7, 1]),
        )
        for op in (cls.of(plain, 3), cls.of(attrs.evolve(plain, order="prefix"), 3), charged, leaky):
            for encoding in (
                Spikes(3, "rate", -3, 3, scale),
                Spikes(3, "suffix", 0, 3, scale),
                Current(3, "rate", -90, 80, -30, 27, scale),
                Current(3, "direct", -90, 81, -30, 27, scale),
            ):
                yield op, (Tensor((3, 2, 2), encoding),)
