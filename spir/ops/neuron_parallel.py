"""neuron_parallel: sum all frames, count by the integer law, emit a sorted train (parallel conversion)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np

from spir.errors import error, unknown
from spir.ir import Array
from spir.ops._linear import channelwise
from spir.ops._neuron import ArrayNamespace, Neuron, for_toolkits, no_window
from spir.ops._threshold import Triple, check_triple, divisors, law, law_bounds
from spir.ops.encode import Encode, sort
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.types import SORTED, Current, Int, Integers, Interval, Scale, Shape, Spikes, Stored, Tensor


@attrs.frozen
class NeuronParallel(Neuron):
    """The parallel neuron: ``S = sum_t I(t)``; the step that stands for level k spikes iff ``mul S + add >= k div``.

    The comparison is exact: ``mul S + add`` is below ``k div`` iff its floored quotient by ``div`` is below k. Level k
    stands at step ``T - k + 1`` (``order = suffix``, the paper's: spikes fill the last steps) or at step k
    (``prefix``). The pre-threshold is ``div / mul`` in steps of the operand, per channel; the shift psi and the bias
    stand in ``add`` (``psi = theta / 2`` is the half of round-half-up), the post-threshold is ``scale``. With
    ``signed`` the step of level k spikes -1 iff ``mul S + add < (1 - k) div``. Sums may come as integers: the charge of
    all steps at once.

    Source: Hao et al. 2412.13610, eqs 7 and 8 (step rule and matrix confirmed in the authors' code), theorem PC-1.
    """

    name: ClassVar[str] = "neuron_parallel"
    charged: ClassVar[bool] = True
    steps: int
    mul: Array
    add: Array
    div: int | Array
    scale: float = attrs.field(converter=float)
    order: str = "suffix"
    signed: bool = False

    @property
    def clip(self) -> tuple[int, int]:
        """The counts that T steps realise."""
        return Spikes.limits(self.steps, self.order, signed=self.signed)

    @property
    def triple(self) -> Triple:
        """The count law (theorem PC-1)."""
        return self.mul, self.add, self.div, *self.clip

    def infer(self, *types: Tensor) -> Tensor:
        """Integers, or a train or current whose frames all weigh 1, to ``steps`` sorted frames."""
        (x,) = types
        if self.order not in SORTED:
            raise unknown("order", self.order, SORTED, code="type")
        if not isinstance(x.encoding, Int) and (x.train is None or x.train.code == "bits"):
            raise error(
                "type",
                f"sums frames that weigh the same, not {x.encoding}",
                fix="integrate the operand first, or use neuron=stem",
            )
        check_triple(self.mul, self.add, self.div, x.shape, x)
        return Tensor(x.shape, Spikes(self.steps, self.order, *self.clip, Scale.of(self.scale)))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The law at both ends."""
        return law_bounds(self.mul, self.add, self.div, *self.clip, intervals[0])

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Sum, count, sort: the three ops in a row."""
        z = types[0].integers(np.asarray(stored[0], dtype=np.int64))
        return sort(law(z, self.mul, self.add, self.div, *self.clip), self.steps, self.order)

    def fire(self, xp: ArrayNamespace, currents: Iterator[Any]) -> Iterator[Any]:
        """Two phases: the sum of all frames, then one comparison a step, in thresholds, so that no product wraps."""
        first = next(currents)
        charge = xp.hold(first)
        for current in currents:
            charge = xp.hold(charge + current)
        potential = charge * xp.constant(self.mul, first) + xp.constant(self.add, first)
        reached = potential // (self.div if isinstance(self.div, int) else xp.constant(self.div, first))
        for step in range(1, self.steps + 1):
            level = step if self.order == "prefix" else self.steps + 1 - step
            spike = xp.where(reached >= level, 1, 0)
            yield spike - xp.where(reached <= -level, 1, 0) if self.signed else spike

    def search(self, z: Integers) -> Integers:
        """The counts ``[N, C, ...]`` of sums by bisection: ``ceil(log2(T + 1))`` comparisons each, and no division.

        For hardware without a divider. With ``signed`` both halves are searched.
        """
        rank = z.ndim - 1
        potential = channelwise(self.mul.values, rank) * z + channelwise(self.add.values, rank)
        div = channelwise(divisors(self.div).astype(object), rank)
        low, high = (np.full(z.shape, end, dtype=np.int64) for end in self.clip)
        while (low < high).any():
            middle = (low + high + 1) // 2
            reached = potential >= middle * div
            low, high = np.where(reached, middle, low), np.where(reached, high, middle - 1)
        return low

    @classmethod
    def derive(cls, source: Requant | Quantize, order: str | None = None, steps: int | None = None) -> Encode:
        """0..T and -T..T become T sorted frames, by default at the end."""
        no_window("parallel", steps)
        order = order or "suffix"
        if order not in SORTED:
            raise unknown("order", order, SORTED, code="option")
        if source.lo not in (0, -source.hi) or source.hi < 1:
            raise error(
                "type",
                f"neuron parallel realises clip ranges 0..T and -T..T, not {source.lo}..{source.hi}",
                fix="calibrate-qcfs{steps=T} before quantize, or neuron=stem" + for_toolkits(source.lo, source.hi),
            )
        return Encode(steps=source.hi, code=order)

    @classmethod
    def fuse(cls, integrate: Integrate | None, requant: Requant, encode: Encode) -> Self | None:
        """Only where the clip range is the neuron's own; without ``integrate`` the sum is given as integers."""
        signed = requant.lo < 0
        if encode.code not in SORTED or (integrate is not None and integrate.bias is not None):
            return None
        if (requant.lo, requant.hi) != Spikes.limits(encode.steps, encode.code, signed=signed):
            return None
        return cls(encode.steps, requant.mul, requant.add, requant.div, requant.scale, encode.code, signed)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """One step, 64 steps, both orders, signed, ties, both ends; trains, currents and integers."""
        scale = Scale.of(0.5)
        for steps, order, signed in (
            (4, "suffix", False),
            (1, "prefix", False),
            (7, "prefix", True),
            (64, "suffix", True),
        ):
            op = cls(steps, Array.of([3, -2, 1]), Array.of([8, 8, 7]), 16, 0.25, order, signed)
            for encoding in (
                Current(4, "rate", -90, 80, -30, 20, scale),
                Current(3, "direct", -90, 81, -30, 27, scale),
                Spikes(5, "suffix", -5, 5, scale),
                Spikes(6, "prefix", 0, 6, scale),
                Int(-200, 200, scale),
            ):
                yield op, (Tensor((3, 2, 2), encoding),)
        yield attrs.evolve(op, div=Array.of([16, 7, 1])), (Tensor((3, 2, 2), Int(-40, 40, scale)),)
