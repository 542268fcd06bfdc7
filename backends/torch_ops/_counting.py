"""The count law on whole sums, in floats where they are proved to give it."""

from __future__ import annotations

from typing import Any, Self

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from spir.backends.torch_ops._exactness import EXACT_FLOAT32, EXACT_FLOAT64
from spir.backends.torch_ops._lowering import along_channels
from spir.ops._linear import channelwise
from spir.ops._threshold import Triple, divisors
from spir.types import Integers, Interval, Reals, Shape

EXACT = {torch.float32: EXACT_FLOAT32, torch.float64: EXACT_FLOAT64}
POINTS = 2**22
"""Thresholds that are looked at, channels and neighbours counted; laws of more run on integers."""
WIDEST = 2**61
"""Products and thresholds below it, so that 64 bits hold them and their differences."""


@attrs.frozen(eq=False)
class Sums:
    """The integers that a law may be asked for, channel by channel.

    Attributes:
        range: their bounds.
        reach: a bound on every partial sum, ``[1]`` or ``[C]``.
        pitch: they are ``pitch i + offset`` for some whole i and one of the offsets; ``[1]`` or ``[C]``.
        offsets: ``[n, 1]`` or ``[n, C]``.
    """

    range: Interval
    reach: NDArray[np.object_]
    pitch: Integers
    offsets: Integers

    def over(self, shape: Shape, *, whole: bool) -> Sums:
        """The same with an entry a channel, or an entry an element."""
        lo, hi, reach, pitch = (
            spread(v, shape, whole=whole) for v in (self.range.lo, self.range.hi, self.reach, self.pitch)
        )
        offsets = np.stack([spread(row, shape, whole=whole) for row in self.offsets])
        return Sums(Interval(lo, hi), reach, pitch, offsets)

    def below(self, bounds: Integers) -> Integers:
        """The last of them up to each bound ``[K, C]``."""
        if len(self.offsets) * bounds.size > POINTS:
            return bounds
        rows = self.offsets[:, None]
        found: Integers = (rows + (bounds - rows) // self.pitch * self.pitch).max(axis=0)
        return found

    def above(self, bounds: Integers) -> Integers:
        """The first of them from each bound on."""
        if len(self.offsets) * bounds.size > POINTS:
            return bounds
        rows = self.offsets[:, None]
        found: Integers = (rows - (rows - bounds) // self.pitch * self.pitch).min(axis=0)
        return found


@attrs.frozen(eq=False)
class Law:
    """``clamp(trunc((z + offset) / step), 0, top) + lo``, which is the law on every sum z that may come.

    Theorem. On the sums R of a channel let ``z + offset`` be exact. If the expression gives the law at both ends of R
    and, for each level k between, at the last sum below ``theta_k``, the least z with law(z) >= k, and at the first
    from there on, then it gives the law on R. Proof: correctly rounded division, truncation and clamp never decrease
    in z; between two neighbours among these points the law is constant, and so is the expression.

    `of` looks at all these points with the kernels that run. It finds them right because the steps stand in the middle
    of the room that whole z leave around them.
    """

    offset: torch.Tensor
    step: torch.Tensor
    top: int
    lo: int
    bias: torch.Tensor | None = None
    """The offset ``[C]``, where every position of a channel has the same."""

    @classmethod
    def of(cls, triple: Triple, sums: Sums, shape: Shape, dtype: torch.dtype, device: torch.device) -> Self | None:
        """The law of values ``[N, *shape]`` in a float type, or None where that is not proved to give it."""
        mul, add, div, lo, hi = triple
        whole = max(mul.values.ndim, add.values.ndim) > 1
        m, a, d = (spread(v, shape, whole=whole) for v in (mul.values, add.values, divisors(div)))
        z = sums.over(shape, whole=whole)
        if (
            lo == hi
            or m.min() < 1
            or (hi - lo) * m.size > POINTS
            or not _narrow(m, a, d, max(-lo, hi), z.range.magnitude)
        ):
            return None
        low, high = z.range.lo.astype(np.int64), z.range.hi.astype(np.int64)
        levels = np.arange(lo + 1, hi + 1)[:, None]
        thresholds = np.clip(-((a - levels * d) // m), low, high + 1)
        before, after = z.below(thresholds - 1), z.above(thresholds)
        steps = (levels * d - a) / m
        least = np.where(thresholds <= high, steps - after, -np.inf).max(axis=0, initial=-np.inf)
        most = np.where(thresholds > low, steps - before, np.inf).min(axis=0, initial=np.inf)
        offset = (a - lo * d) / m + _between(least, most)
        offset = np.clip(offset, -high.astype(float), (hi - lo + 1) * (d / m) - low)
        offset, width = _settled(
            offset, d / m, np.clip((m * np.stack([low, high]) + a) // d, lo, hi) - lo, low, high, hi - lo
        )
        unit = 2.0 ** np.ceil(np.log2(z.reach.astype(float) + np.abs(offset) + 1)) / EXACT[dtype]
        if (unit > 1).any():
            return None
        points = np.clip(np.concatenate([before, after, low[None], high[None]]), low, high)
        expected = np.clip((m * points + a) // d, lo, hi)
        start, step = (torch.tensor(v, dtype=dtype, device=device) for v in (np.round(offset / unit) * unit, width))
        found = cls(start, step, hi - lo, lo)(torch.tensor(points, dtype=dtype, device=device) + start)
        if not torch.equal(found.to("cpu", torch.int64), torch.from_numpy(expected)):
            return None
        if whole:
            return cls(start.view(shape), step.view(shape), hi - lo, lo)
        return cls(rows(start, shape), rows(step, shape), hi - lo, lo, start)

    def __call__(self, charge: torch.Tensor) -> torch.Tensor:
        """The law of sums to which the offset has been added, in their place."""
        if self.top == 1:
            charge.ge_(self.step)
        else:
            charge.div_(self.step, rounding_mode="trunc").clamp_(0, self.top)
        return charge.add_(self.lo) if self.lo else charge


def rows(constant: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A constant that broadcasts over ``[N, *shape]``; of maps a whole row, channels last, so that loops are long."""
    if constant.ndim > 1 or len(shape) != 3 or constant.dtype != torch.float32:
        return along_channels(constant, len(shape))
    row = constant.view(1, -1, 1, 1).expand(1, shape[0], 1, shape[2])
    return row.contiguous(memory_format=torch.channels_last)


def spread(values: NDArray[Any], shape: Shape, *, whole: bool = False) -> NDArray[Any]:
    """Constants ``[1]``, ``[C]`` or of the full shape with one entry a channel, or one an element."""
    over = shape if whole else shape[:1]
    return np.broadcast_to(channelwise(values, len(over)), over).reshape(-1)


def _settled(
    offset: Reals, step: Reals, ends: Integers, low: Integers, high: Integers, top: int
) -> tuple[Reals, Reals]:
    """Offsets and steps, small ones where a channel has one level at both ``ends`` ``[2, C]`` of its sums."""
    level, fixed, span = ends[0], ends[0] == ends[1], high - low + 1
    outer = np.where(level == 0, -high, top - low)
    inside = (level > 0) & (level < top)
    offsets = np.where(inside, level * span - low, outer)
    return np.where(fixed, offsets, offset), np.where(fixed, np.where(inside, span, 1), step)


def _narrow(mul: Integers, add: Integers, div: Integers, levels: int, reach: int) -> bool:
    """Whether 64 bits hold all that thresholds are computed from."""
    return int(mul.max()) * (reach + 1) + int(np.abs(add).max()) + (levels + 1) * int(div.max()) < WIDEST


def _between(least: Reals, most: Reals) -> Reals:
    """The middle of two bounds; of one bound alone something beyond it."""
    middle: Reals = (np.where(np.isfinite(least), least, most - 2) + np.where(np.isfinite(most), most, least + 2)) / 2
    return middle
