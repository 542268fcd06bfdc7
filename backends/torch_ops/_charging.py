"""What a law reads: a sum of values times integers, made in few passes over memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Self

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from spir.backends.torch_ops._counting import Law, Sums, rows, spread
from spir.backends.torch_ops._exactness import exact_dtype
from spir.backends.torch_ops._lowering import Use
from spir.backends.torch_ops.conv2d import Conv2dLowering
from spir.backends.torch_ops.linear import LinearLowering
from spir.backends.torch_ops.requant import RequantLowering
from spir.ir import Module, Node, Op
from spir.ops._linear import LinearMap
from spir.ops._threshold import Triple
from spir.ops.add import Add
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.ranges import Ranges
from spir.types import Integers, Interval, Shape

NEIGHBOURS = 256
"""Offsets of reachable sums that are told apart."""


@attrs.frozen(eq=False)
class Charge:
    """The values that a law reads, each times an integer a channel.

    Attributes:
        terms: the factors ``[1]`` or ``[C]`` by name.
        inner: names of the sums on the way, which nothing else reads.
        range: of the whole.
        parts: of each term, with 0 and partial sums.
    """

    terms: Mapping[str, Integers]
    inner: frozenset[str]
    range: Interval
    parts: Mapping[str, Interval]

    @classmethod
    def of(cls, node: Node, module: Module, ranges: Mapping[str, Ranges]) -> Self:
        """What the law of a node reads, as far back as sums, factors and trains go that have no other reader."""
        (source,) = node.operands
        terms: dict[str, Integers] = {}
        inner: set[str] = set()

        def walk(name: str, factor: Integers) -> None:
            made = module.definitions.get(name)
            own = _factors(made.op) if made is not None and alone(module, name) else None
            if made is None or own is None:
                terms[name] = terms.get(name, np.zeros(1, dtype=np.int64)) + factor
                return
            inner.add(name)
            for operand in made.operands:
                walk(operand, factor * own)

        walk(source, np.ones(1, dtype=np.int64))
        parts = {name: _part(name, module, ranges) for name in terms}
        return cls(terms, frozenset(inner), ranges[source].value, parts)

    @property
    def reach(self) -> NDArray[np.object_]:
        """The largest partial sum, ``[1]`` or ``[C]``."""
        ends = (self.parts[name].times(factor.astype(object)) for name, factor in self.terms.items())
        return sum((np.maximum(-x.lo, x.hi) for x in ends), start=np.zeros(1, dtype=object))

    def sums(self, base: str) -> Sums:
        """The values that the whole may take: those of all terms but ``base`` are counted one by one."""
        offsets = np.zeros((1, 1), dtype=np.int64)
        for name, factor in self.terms.items():
            if name == base:
                continue
            lo, hi = self.parts[name].hull
            if len(offsets) * (hi - lo + 1) > NEIGHBOURS:
                return Sums(self.range, self.reach, np.ones(1, dtype=np.int64), np.zeros((1, 1), dtype=np.int64))
            steps = np.arange(lo, hi + 1)[:, None, None] * factor
            offsets = (offsets + steps).reshape(-1, max(offsets.shape[1], len(factor)))
        return Sums(self.range, self.reach, np.maximum(np.abs(self.terms[base]), 1), offsets)


@attrs.frozen(eq=False)
class Weighted:
    """A weighted sum in floats, and the name of what it weighs."""

    operand: str
    lowering: Conv2dLowering | LinearLowering

    def scaled(self, factor: Integers, bias: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The sum times integers ``[1]`` or ``[C]``, plus a bias ``[C]``: the library's kernel where that is all."""
        weight = self.lowering.weight
        if (factor != 1).any():
            weight = weight * torch.tensor(factor, dtype=weight.dtype).view(-1, *(1,) * (weight.ndim - 1))
        if isinstance(self.lowering, LinearLowering):
            return functools.partial(F.linear, weight=weight, bias=bias)
        top, bottom, left, right = self.lowering.padding
        if (top, left) != (bottom, right):
            return attrs.evolve(self.lowering, weight=weight, bias=bias).map
        fields = {name: getattr(self.lowering, name) for name in ("stride", "dilation", "groups")}
        return functools.partial(F.conv2d, weight=weight, bias=bias, padding=(top, left), **fields)


@attrs.frozen(eq=False)
class Counting:
    """The law of a charge on decoded values, ready to run.

    Attributes:
        reads: names of its operands, in order.
        inner: names of the values that it makes on the way.
        start: makes the first term, and the offset of the law, of the first operand, in memory of its own.
        factors: of the other terms; None for 1.
        law: counts of sums, perhaps in their place.
        dtype: what it computes in.
        held: the type of what comes out.
    """

    reads: tuple[str, ...]
    inner: frozenset[str]
    start: Callable[[torch.Tensor], torch.Tensor]
    factors: tuple[torch.Tensor | None, ...]
    law: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype
    held: torch.dtype

    @classmethod
    def of(cls, node: Node, charge: Charge, triple: Triple, made: Mapping[str, Weighted], device: torch.device) -> Self:
        """In float32, else in float64, else in integers: the first that is proved exact.

        Args:
            made: the weighted sums that only this charge reads.
        """
        *_, lo, hi = triple
        shape, held = node.type.shape, exact_dtype(max(-lo, hi), device)
        first = max(charge.terms, key=lambda name: (name in made, charge.parts[name].magnitude))
        names = (first, *(name for name in charge.terms if name != first))
        for dtype in (torch.float32, torch.float64) if device.type == "cpu" else (torch.float64,):
            law = Law.of(triple, charge.sums(first), shape, dtype, device)
            if law is None:
                continue
            factor, *factors = (_factor(charge.terms[name], shape, dtype, device) for name in names)
            if first in made and made[first].lowering.dtype == dtype and law.bias is not None:
                base, inner = made[first].scaled(charge.terms[first], law.bias), charge.inner | {first}
                return cls((made[first].operand, *names[1:]), inner, base, tuple(factors), law, dtype, held)
            return cls(names, charge.inner, _start(factor, law.offset), tuple(factors), law, dtype, held)
        factor, *factors = (_factor(charge.terms[name], shape, torch.int64, device) for name in names)
        use = Use(Requant(*triple, scale=1.0), (node.type,), torch.int64, device)
        start, requant = _start(factor, torch.zeros(1, dtype=torch.int64, device=device)), RequantLowering.of(use)
        return cls(names, charge.inner, start, tuple(factors), requant.map, torch.int64, held)

    def __call__(self, *x: torch.Tensor) -> torch.Tensor:
        """Counts ``[N, *shape]`` of decoded operands."""
        first, *rest = [v if v.dtype == self.dtype else v.to(self.dtype) for v in x]
        total = self.start(first)
        for term, factor in zip(rest, self.factors, strict=True):
            total = total.add_(term) if factor is None else total.addcmul_(term, factor)
        counts = self.law(total)
        return counts if self.held == self.dtype else counts.to(self.held)


def _start(factor: torch.Tensor | None, offset: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x + offset if factor is None else torch.addcmul(offset, x, factor)


def alone(module: Module, name: str) -> bool:
    """Whether one node reads a value, and nobody else."""
    return len(module.readers[name]) == 1 and name != module.output


def _factors(op: Op) -> Integers | None:
    """By what an op multiplies each operand before it adds them; None where that is not all it does."""
    match op:
        case Add() | Encode(lossless=True) | Integrate(bias=None, shift=0):
            return np.ones(1, dtype=np.int64)
        case Scaling() if op.multiplier.ndim == 1:
            return op.multiplier
    return None


def _part(name: str, module: Module, ranges: Mapping[str, Ranges]) -> Interval:
    """Bounds of a value and, where a sum makes it, of every partial sum."""
    made = module.definitions.get(name)
    if made is None or not isinstance(made.op, LinearMap):
        return ranges[name].value.with_zero()
    shapes = tuple(t.shape for t in module.operand_types(made))
    return made.op.bounds(shapes, *(ranges[o].value.with_zero() for o in made.operands)).with_zero()


def _factor(factor: Integers, shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """A factor that broadcasts over values ``[N, *shape]``; None for 1."""
    if (factor == 1).all():
        return None
    return rows(torch.tensor(spread(factor, shape), dtype=dtype, device=device), shape)
