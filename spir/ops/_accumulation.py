"""How frames become one number: weighted, scaled where a register is narrow, and added step by step.

Frame t of b bits weighs 2^(b-1-t), of all other codes 1. With ``shift`` r an accumulator counts in 2^r: every term is
shifted after it was weighted, and rounded half up, so that a term of weight 2^r or more stays exact. Shifting a frame
before it is weighted, or the sum after every doubling, would lose up to 2^b - 1 counts and is not to be had here.
Source: SDANN eqs 14 and 18; the order of shifts and its bounds are derived (the printed equations are lost).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Array
from spir.ops._linear import channelwise
from spir.types import Int, Integers, Interval, Tensor, scale_of, weights

Shift = int | Array
"""r, one for all channels, or one a channel."""
MOST = 62


def shifts(shift: Shift) -> Integers:
    """``[1]`` or ``[C]``."""
    return np.array([shift], dtype=np.int64) if isinstance(shift, int) else np.asarray(shift.values, dtype=np.int64)


def scaled(shift: Shift) -> bool:
    """Whether any channel counts in more than 1: then frames say more than what they decode to."""
    return bool(shifts(shift).any())


def check_shift(shift: Shift, x: Tensor) -> None:
    """Integers of 0..62, one or one a channel, on bit-coded frames.

    Raises:
        SpirError[type], SpirError[E-SCALED]
    """
    if not isinstance(shift, int) and (not shift.integral or shift.values.shape not in ((1,), (x.shape[0],))):
        raise error("type", f"shift {list(shift.values.shape)} is not integers of shape [1] or [{x.shape[0]}]")
    found = shifts(shift)
    if found.min() < 0 or found.max() > MOST:
        raise error("type", f"shift = {found.min() if found.min() < 0 else found.max()} is not in 0..{MOST}")
    if found.any() and (x.train is None or x.train.code != "bits"):
        raise error(
            "E-SCALED",
            f"only bit-coded frames are shifted after they are weighted, not {x.encoding}",
            fix="shift = 0, or neuron=stem",
        )


def terms(frames: Sequence[NDArray[Any]], factors: Sequence[int], shift: NDArray[Any]) -> Iterable[NDArray[Any]]:
    """What every frame adds, of any arrays that ``shift`` broadcasts over."""
    for frame, factor in zip(frames, factors, strict=True):
        yield term(frame, factor, shift)


def term(frame: Any, factor: int, shift: NDArray[Any]) -> Any:
    """``(frame * factor) >> shift``, rounded half up; the factor is a power of 2, and the product is never formed."""
    weight = factor.bit_length() - 1
    up, down = np.maximum(weight - shift, 0), np.maximum(shift - weight, 0)
    return (frame * 2**up + 2**down // 2) // 2**down


def integrated(type_: Tensor, stored: Integers, shift: Shift) -> Integers:
    """What frames ``[T, N, *shape]`` add up to, ``[N, *shape]``; integers as they are."""
    if type_.train is None or not scaled(shift):
        return type_.integers(stored)
    by = channelwise(shifts(shift), len(type_.shape))
    return np.asarray(sum(terms(list(stored), weights(type_.train.code, type_.train.steps), by)), dtype=np.int64)


def accumulate(xp: Any, frames: Iterable[Any], code: str, shift: Shift) -> Any:
    """The same step by step on any array library, every state held in the register of ``xp``."""
    given = list(frames)
    factors = weights(code, len(given))
    state = xp.zeros_like(given[0])
    for frame, factor in zip(given, factors, strict=True):
        state = xp.hold(state + weighted(xp, frame, factor, shift))
    return state


def weighted(xp: Any, frame: Any, factor: int, shift: Shift) -> Any:
    """What a frame adds on any array library: its weight, then the shift."""
    if not scaled(shift):
        return frame * factor
    by = shifts(shift)
    weight = factor.bit_length() - 1
    up, down = 2 ** np.maximum(weight - by, 0), 2 ** np.maximum(by - weight, 0)
    raised, half, low = (xp.constant(Array.of(each), frame) for each in (up, down // 2, down))
    return (frame * raised + half) // low


def errors(shift: int, steps: int) -> tuple[Fraction, Fraction, Fraction]:
    """By how much the scaled sum misses the sum over 2^r, in counts of the register: least, on average, most.

    A term of weight 2^k loses its r - k low bits: at least -(1/2 - 2^-(r-k)), at most 1/2, on average over all residues
    2^-(r-k) / 2.
    """
    lost = range(max(1, shift - steps + 1), shift + 1)
    half = Fraction(1, 2)
    least = -sum((half - Fraction(1, 2**m) for m in lost), Fraction(0))
    return least, sum((Fraction(1, 2 ** (m + 1)) for m in lost), Fraction(0)), half * len(lost)


def value_bounds(value: Interval, shift: Shift, steps: int) -> Interval:
    """Bounds of the scaled sum from bounds of what the frames decode to."""
    if not scaled(shift):
        return value
    by = [int(r) for r in shifts(shift)]
    size = max(len(by), len(value.lo))
    each, ends = by * (size // len(by)), value.broadcast(size)
    found = [errors(r, steps) for r in each]
    rows = zip(ends.lo, ends.hi, each, found, strict=True)
    bounds = [(-((-lo - least * 2**r) // 2**r), (hi + most * 2**r) // 2**r) for lo, hi, r, (least, _, most) in rows]
    return Interval.of([int(lo) for lo, _ in bounds], [int(hi) for _, hi in bounds])


def frame_bounds(first: Interval, rest: Interval, factors: Sequence[int], shift: Shift) -> tuple[Interval, Interval]:
    """Exact bounds of the state from those of frames that are independent: after all frames, and after any number."""
    by = shifts(shift).astype(object)
    total = Interval.of(0, 0)
    ever: Interval | None = None
    for t, factor in enumerate(factors):
        frame = rest if t else first
        total = total + Interval(term(frame.lo, factor, by), term(frame.hi, factor, by))
        ever = total if ever is None else ever | total
    assert ever is not None  # trains have frames
    return total, ever


def check_sum(x: Tensor, shift: Shift) -> Tensor:
    """The type of the sum, but for its scale: what a law after it reads.

    Raises:
        SpirError[type], SpirError[E-SCALED]
    """
    check_shift(shift, x)
    return Tensor(x.shape, Int(*value_bounds(x.range, shift, x.steps).hull, scale_of(x))) if scaled(shift) else x
