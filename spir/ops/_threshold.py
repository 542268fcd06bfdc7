"""The integer triple and its law: ``clamp(floor((mul z + add) / div), lo, hi)``, shared by requant and the neurons.

The rounding constant and the bias stand inside ``add``. Four neurons are this one law with their own numbers: STEM
(Mi, (q_b << s) + 2^(s-1), 2^s), Ca-LIF (2^f, B' + V/2, V), parallel (1, psi + b, theta), IF (mul, b + v0, theta).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Array
from spir.ops._linear import channelwise
from spir.types import Integers, Interval, Shape, Tensor, check_register

Divisor = int | Array
"""One for all channels, or one a channel."""
Triple = tuple[Array, Array, Divisor, int, int]
"""``mul, add, div, lo, hi`` of the law."""


def divisors(div: Divisor) -> Integers:
    """``[1]`` or ``[C]``."""
    return np.array([div], dtype=np.int64) if isinstance(div, int) else np.asarray(div.values, dtype=np.int64)


def check_triple(mul: Array, add: Array, div: Divisor, shape: Shape, x: Tensor) -> None:
    """Integer constants of fitting shapes, a positive divisor, and no product beyond 64 bits.

    Raises:
        SpirError[type], SpirError[E-VRANGE]
    """
    for label, array in (("mul", mul), ("add", add)):
        if not array.integral or array.values.shape not in ((1,), (shape[0],), shape):
            raise error(
                "type",
                f"{label} {list(array.values.shape)} of {array.values.dtype} is not integers of shape [1], [{shape[0]}]"
                f" or {list(shape)}",
            )
    if isinstance(div, int):
        check_register(Interval.of(min(div, 0), max(div, 0)), "div")
    elif not div.integral or div.values.shape not in ((1,), (shape[0],)):
        raise error("type", f"div {list(div.values.shape)} is not integers of shape [1] or [{shape[0]}]")
    if divisors(div).min() < 1:
        raise error("type", f"div = {divisors(div).min()} is not positive")
    check_register(products(mul, add, x.range), "mul * z + add")


def products(mul: Array, add: Array, x: Interval) -> Interval:
    """Bounds of ``mul z + add``, over all elements where a constant has the full shape."""
    factors, offsets = mul.values.astype(object).reshape(-1), add.values.astype(object).reshape(-1)
    if mul.values.ndim > 1 or add.values.ndim > 1:
        lo, hi = x.hull
        ends = [factor * end for factor in (min(factors), max(factors)) for end in (lo, hi)]
        return Interval.of(min(ends) + min(offsets), max(ends) + max(offsets))
    scaled = x.times(factors)
    return Interval(scaled.lo + offsets, scaled.hi + offsets)


def law_bounds(mul: Array, add: Array, div: Divisor, lo: int, hi: int, x: Interval) -> Interval:
    """Bounds of the law from bounds of z."""
    found = products(mul, add, x)
    by = divisors(div).astype(object)
    if len(found.lo) == 1 and len(by) > 1 and (mul.values.ndim > 1 or add.values.ndim > 1):
        ends = [end // d for end in found.hull for d in (min(by), max(by))]
        found, by = Interval.of(min(ends), max(ends)), np.array([1], dtype=object)
    return found.map(lambda ends: np.clip(ends // by, lo, hi))


def nearest(triple: Triple, x: Interval) -> NDArray[Any]:
    """``add`` with which every z within ``x`` gives the code that it gave, and biases are as near to 0 as can be.

    The bias is what stands in ``add`` beside the half of round-half-up. Constants change where all z give one end of
    the clip; others stay. Python integers, ``[1]``, ``[C]`` or of the full shape.
    """
    mul, add, div, lo, hi = triple
    rank = max(mul.values.ndim, add.values.ndim)
    m, a, d, low, high = (
        channelwise(v.astype(object), rank) for v in (mul.values, add.values, divisors(div), x.lo, x.hi)
    )
    least, most = np.minimum(m * low, m * high), np.maximum(m * low, m * high)
    off, full = (most + a) // d <= lo, (least + a) // d >= hi
    found = np.where(off, np.minimum(lo * d + d - 1 - most, d // 2), a)
    return np.asarray(np.where(full & ~off, np.maximum(hi * d - least, d // 2), found))


def law(z: Integers, mul: Array, add: Array, div: Divisor, lo: int, hi: int) -> Integers:
    """The law on ``[N, C, ...]`` integers."""
    rank = z.ndim - 1
    exact: NDArray[Any] = channelwise(mul.values, rank) * z + channelwise(add.values, rank)
    return np.asarray(np.clip(np.floor_divide(exact, channelwise(divisors(div), rank)), lo, hi), dtype=np.int64)
