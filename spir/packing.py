"""Trains in machine words: bit t of a word is frame t of one element."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.types import Integers

WORD_BITS = 64
Words = NDArray[np.uint64]

_BYTES = np.arange(256, dtype=np.uint8)
_BITS = np.unpackbits(_BYTES[:, None], axis=1)
_COUNTS = _BITS.sum(axis=1, dtype=np.int64)
_REVERSED = np.packbits(_BITS[:, ::-1], axis=1)[:, 0]


@attrs.frozen(eq=False)
class Packed:
    """A train of at most 64 frames in -1..1: words ``[N, *shape]`` of +1 spikes, and of -1 spikes where it has any."""

    steps: int
    positive: Words
    negative: Words | None = None

    @classmethod
    def of(cls, frames: Integers) -> Self:
        """From frames ``[T, N, *shape]``.

        Raises:
            SpirError[usage]: more than 64 frames, or frames beyond -1..1.
        """
        check_packable(len(frames))
        if frames.size and (frames.min() < -1 or frames.max() > 1):
            raise error("usage", f"words hold frames of -1, 0 and 1, not {frames.min()}..{frames.max()}", fix=".frames")
        weights = np.left_shift(np.uint64(1), np.arange(len(frames), dtype=np.uint64))
        positive, negative = (np.tensordot(weights, (frames == sign).astype(np.uint64), axes=1) for sign in (1, -1))
        return cls(len(frames), positive, negative if negative.any() else None)

    @classmethod
    def bits(cls, values: Integers, steps: int) -> Self:
        """Values ``[N, *shape]`` of ``steps`` bits, MSB first; below 0 two's complement, whose sign is a -1 spike."""
        check_packable(steps)
        words = _reversed(values.astype(np.uint64)) >> np.uint64(WORD_BITS - steps)
        sign = np.where(values < 0, np.uint64(1), np.uint64(0))
        return cls(steps, words - sign, sign if sign.any() else None)

    @classmethod
    def sorted(cls, counts: Integers, steps: int, code: str) -> Self:
        """Counts ``[N, *shape]`` in -steps..steps; their spikes fill the last (``suffix``) or the first steps."""
        check_packable(steps)
        masks = [(1 << n) - 1 << (steps - n if code == "suffix" else 0) for n in range(steps + 1)]
        table = np.array(masks, dtype=np.uint64)
        negative = table[np.maximum(-counts, 0)]
        return cls(steps, table[np.maximum(counts, 0)], negative if negative.any() else None)

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """One batch after the other, all of as many steps."""
        positive = np.concatenate([p.positive for p in parts])
        if all(p.negative is None for p in parts):
            return cls(parts[0].steps, positive)
        empty = (np.zeros_like(p.positive) if p.negative is None else p.negative for p in parts)
        return cls(parts[0].steps, positive, np.concatenate(list(empty)))

    @property
    def shape(self) -> tuple[int, ...]:
        """``[T, N, *shape]`` of the frames."""
        return (self.steps, *self.positive.shape)

    @property
    def frames(self) -> Integers:
        """``[T, N, *shape]`` in -1..1."""
        return np.stack([self._net(functools.partial(_frame, t=t)) for t in range(self.steps)])

    @property
    def counts(self) -> Integers:
        """Net spikes of each element, ``[N, *shape]``."""
        return self._net(_popcount)

    def integers(self, code: str) -> Integers:
        """What the train decodes to, ``[N, *shape]``."""
        return self._net(self._number) if code == "bits" else self.counts

    def _number(self, words: Words) -> Integers:
        return (_reversed(words) >> np.uint64(WORD_BITS - self.steps)).astype(np.int64)

    def _net(self, of: Callable[[Words], Integers]) -> Integers:
        return of(self.positive) if self.negative is None else of(self.positive) - of(self.negative)


def check_packable(steps: int) -> None:
    """Refuses trains that no word holds.

    Raises:
        SpirError[usage]
    """
    if steps > WORD_BITS:
        raise error("usage", f"a word holds {WORD_BITS} frames, not {steps}", fix="the unpacked form, .frames")


def _frame(words: Words, t: int) -> Integers:
    return (words >> np.uint64(t) & np.uint64(1)).astype(np.int64)


def _popcount(words: Words) -> Integers:
    return np.asarray(_COUNTS[_bytes(words)].sum(axis=-1), dtype=np.int64)


def _reversed(words: Words) -> Words:
    """Bit t of every word to bit 63 - t."""
    turned = np.ascontiguousarray(_REVERSED[_bytes(words)][..., ::-1])
    return turned.view("<u8")[..., 0].astype(np.uint64)


def _bytes(words: Words) -> NDArray[np.uint8]:
    """``[*words.shape, 8]``, the lowest first."""
    return np.ascontiguousarray(words).astype("<u8")[..., None].view(np.uint8)
