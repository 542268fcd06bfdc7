"""What a value is: a shape, an encoding with range and scale, and how stored numbers decode to real ones.

Shapes are per sample; the batch axis is never written. Stored arrays are ``[N, *shape]`` for reals and integers and
``[T, N, *shape]`` for trains and currents. The channel axis is the first of the shape.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error, unknown

Shape = tuple[int, ...]
Integers = NDArray[np.int64]
Reals = NDArray[np.float64]
Stored = NDArray[np.int64] | NDArray[np.float64]

SORTED = ("suffix", "prefix")
"""Codes of sorted trains: the first fills the last steps, the second the first."""
CODES = ("rate", "bits", *SORTED, "direct")
REGISTER_BITS = 63
LONGEST = 2**16
LARGEST = 2**40
TINY, HUGE = Fraction(sys.float_info.min), Fraction(sys.float_info.max)


def exact(value: Fraction) -> str:
    """A fraction as text that reads back exactly: the shortest float64, else ``p/q``."""
    try:
        nearest = float(value)
    except OverflowError:
        nearest = math.inf
    return repr(nearest) if math.isfinite(nearest) and Fraction(nearest) == value else str(value)


@attrs.frozen
class Scale:
    """The real value of one integer step: one positive fraction, or one per channel (equal by digest).

    ``values`` is None for a per-channel scale read from text without its weights.
    """

    size: int
    digest: str
    values: tuple[Fraction, ...] | None = attrs.field(default=None, eq=False, repr=False)

    @classmethod
    def of(cls, values: Fraction | float | Iterable[Fraction | float]) -> Scale:
        """From one number or one per channel; equal channels collapse to one.

        Raises:
            SpirError[type]: a scale that is not a positive finite number.
        """
        given = tuple(values) if isinstance(values, Iterable) else (values,)
        for value in given:
            if (isinstance(value, float) and not math.isfinite(value)) or value <= 0:
                raise error("type", f"a scale is a positive finite number, not {value}")
        fractions = tuple(Fraction(v) for v in given)
        if not all(TINY <= v <= HUGE for v in fractions):
            raise error("type", f"a scale of {min(fractions)} .. {max(fractions)} is beyond float64")
        if len(set(fractions)) == 1:
            return cls(1, exact(fractions[0]), fractions[:1])
        text = " ".join(exact(v) for v in fractions)
        return cls(len(fractions), hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), fractions)

    @property
    def known(self) -> tuple[Fraction, ...]:
        """The values.

        Raises:
            SpirError[weights]: the module was read without its weights.
        """
        if self.values is None:
            raise error("weights", f"the scale #{self.digest} is not known without the weights", fix="pass weights=")
        return self.values

    def __mul__(self, other: Scale) -> Scale:
        a, b = self.known, other.known
        size = max(len(a), len(b))
        return Scale.of(x * y for x, y in zip(a * (size // len(a)), b * (size // len(b)), strict=True))

    def map(self, rearrange: Callable[[tuple[Fraction, ...]], Iterable[Fraction]]) -> Scale:
        """A per-channel scale with its channels rearranged; one per tensor stays as it is."""
        return self if self.size == 1 else Scale.of(rearrange(self.known))

    def floats(self) -> Reals:
        """Nearest float64 values, ``[1]`` or ``[C]``."""
        return np.array([float(v) for v in self.known])

    def __str__(self) -> str:
        return self.digest if self.size == 1 else f"[{self.size} #{self.digest}]"


@attrs.frozen(eq=False)
class Interval:
    """Integer bounds, per tensor (``[1]``) or per channel (``[C]``), as arrays of Python ints: they never wrap."""

    lo: NDArray[np.object_]
    hi: NDArray[np.object_]

    @classmethod
    def of(cls, lo: int | Iterable[int], hi: int | Iterable[int]) -> Interval:
        """From numbers or sequences of numbers."""
        return cls(_objects(lo), _objects(hi))

    @property
    def hull(self) -> tuple[int, int]:
        """The bounds over all channels."""
        return int(min(self.lo)), int(max(self.hi))

    @property
    def magnitude(self) -> int:
        """The largest absolute value inside."""
        lo, hi = self.hull
        return max(-lo, hi)

    @property
    def bits(self) -> list[int]:
        """For each entry, the bits of a two's complement register that holds it."""
        return [max(int(hi), ~int(lo)).bit_length() + 1 for lo, hi in zip(self.lo, self.hi, strict=True)]

    def with_zero(self) -> Interval:
        """The smallest interval that also holds 0: what a partial or padded sum starts from."""
        return Interval(np.minimum(self.lo, 0), np.maximum(self.hi, 0))

    def broadcast(self, channels: int) -> Interval:
        """The same bounds with one entry a channel."""
        return Interval(np.broadcast_to(self.lo, (channels,)), np.broadcast_to(self.hi, (channels,)))

    def map(self, f: Callable[[NDArray[np.object_]], NDArray[np.object_]]) -> Interval:
        """Both ends through a function that keeps order."""
        return Interval(f(self.lo), f(self.hi))

    def times(self, factor: NDArray[np.object_]) -> Interval:
        """The interval of ``x * factor``, per channel."""
        a, b = self.lo * factor, self.hi * factor
        return Interval(np.minimum(a, b), np.maximum(a, b))

    def __add__(self, other: Interval) -> Interval:
        return Interval(self.lo + other.lo, self.hi + other.hi)

    def __or__(self, other: Interval) -> Interval:
        return Interval(np.minimum(self.lo, other.lo), np.maximum(self.hi, other.hi))


def _objects(values: int | Iterable[int]) -> NDArray[np.object_]:
    given = list(values) if isinstance(values, Iterable) else [values]
    array = np.empty(len(given), dtype=object)
    array[:] = [int(v) for v in given]
    return array


@attrs.frozen
class Real:
    """Real numbers; the interpreter holds them as float64."""

    def __str__(self) -> str:
        return "real"


def _ordered(instance: Int | Spikes | Current, _attribute: attrs.Attribute[int], value: int) -> None:
    if instance.lo > value:
        raise error("type", f"an empty range {instance.lo}..{value}")
    if max(-instance.lo, value) >= 2**REGISTER_BITS:
        needed = max(-instance.lo, value).bit_length() + 1
        raise error("E-VRANGE", f"a range of {needed} bits, and registers have {REGISTER_BITS + 1}")


def _coded(*codes: str) -> Callable[[Any, attrs.Attribute[str], str], None]:
    def check(_instance: Any, _attribute: attrs.Attribute[str], value: str) -> None:
        if value not in codes:
            raise unknown("code of frames called", value, codes, code="type")

    return check


def _framed(instance: Spikes | Current, _attribute: attrs.Attribute[int], value: int) -> None:
    check_steps(value, instance.code)


def check_steps(steps: int, code: str) -> None:
    """Refuses no frames at all, and more bits than registers hold.

    Raises:
        SpirError[type]
    """
    if steps < 1:
        raise error("type", f"a train has one or more frames, not {steps}")
    if code == "bits" and steps > REGISTER_BITS:
        raise error("type", f"a train of {steps} bits, and registers hold {REGISTER_BITS} and a sign", fix="fewer bits")
    if steps > LONGEST:
        raise error("type", f"{steps} frames are more than {LONGEST}")


@attrs.frozen
class Int:
    """Integers in ``lo..hi`` that stand for integer x scale."""

    lo: int
    hi: int = attrs.field(validator=_ordered)
    scale: Scale

    def __str__(self) -> str:
        return f"int[{self.lo}, {self.hi}] * {self.scale}"


def weights(code: str, steps: int) -> tuple[int, ...]:
    """weight(t) of each frame: 2^(b-1-t) for bits, 1 for all other codes."""
    return tuple(2 ** (steps - 1 - t) for t in range(steps)) if code == "bits" else (1,) * steps


@attrs.frozen
class Spikes:
    """A train of ``steps`` frames that decodes to ``lo..hi``.

    bits: {0, 1} frames, MSB first; when lo < 0 the first frame holds {-1, 0}. suffix and prefix: sorted, so nested, all
    spikes in the last or first steps, of one sign. rate: net spikes of a step, 0 or 1, with -1 when lo < 0, or in the
    range ``net``, which then differs from that.
    """

    steps: int = attrs.field(validator=_framed)
    code: str = attrs.field(validator=_coded("rate", "bits", *SORTED))
    lo: int
    hi: int = attrs.field(validator=_ordered)
    scale: Scale
    net: tuple[int, int] | None = None

    def __attrs_post_init__(self) -> None:
        if self.net is not None and (self.code != "rate" or not self.net[0] <= 0 <= self.net[1]):
            raise error(
                "type", f"frames of {self.net[0]}..{self.net[1]} net spikes: only rate trains have them, from 0 on"
            )
        if self.net == ((-1 if self.lo < 0 else 0), 1):
            raise error(
                "type", f"frames of {self.net[0]}..{self.net[1]} are what such a train has", fix="leave them out"
            )
        low, high = self.limits(self.steps, self.code, signed=self.lo < 0)
        if self.net is not None:
            low, high = (self.steps * end for end in self.net)
        if self.lo < low or self.hi > high:
            raise error(
                "type",
                f"{self.steps} frames of code {self.code} hold {low}..{high}, not {self.lo}..{self.hi}",
                fix="more steps, or a narrower clip range",
            )

    @classmethod
    def rate(cls, steps: int, lo: int, hi: int, scale: Scale, frame: tuple[int, int]) -> Spikes:
        """A rate train whose frames hold ``frame`` net spikes."""
        return cls(steps, "rate", lo, hi, scale, None if frame == ((-1 if lo < 0 else 0), 1) else frame)

    @staticmethod
    def limits(steps: int, code: str, *, signed: bool) -> tuple[int, int]:
        """The values that a train of a code can stand for."""
        check_steps(steps, code)
        if code == "bits":
            return (-(2 ** (steps - 1)), 2 ** (steps - 1) - 1) if signed else (0, 2**steps - 1)
        return (-steps if signed else 0), steps

    @property
    def frame(self) -> tuple[int, int]:
        """The range of one frame."""
        return self.net or ((-1 if self.lo < 0 else 0), 1)

    @property
    def frames(self) -> tuple[tuple[int, int], ...]:
        """The range of each frame: the sign of signed bits stands in the first."""
        if self.code == "bits" and self.lo < 0:
            return (-1, 0), *((0, 1),) * (self.steps - 1)
        return (self.frame,) * self.steps

    @property
    def prefix(self) -> tuple[int, int]:
        """The range of what the first t frames decode to, over all t."""
        if self.net is not None:
            return self.net[0] * self.steps, self.net[1] * self.steps
        low, high = self.limits(self.steps, self.code, signed=True)
        return (low if self.lo < 0 else 0), (max(self.hi, 0) if self.code == "bits" else high)

    def __str__(self) -> str:
        frames = "" if self.net is None else f", frame {self.net[0]}..{self.net[1]}"
        return f"spikes[{self.steps}, {self.code}, {self.lo}..{self.hi}{frames}] * {self.scale}"


@attrs.frozen
class Current:
    """What a linear op makes of trains: ``steps`` frames in ``frame_lo..frame_hi`` that decode to ``lo..hi``."""

    steps: int = attrs.field(validator=_framed)
    code: str = attrs.field(validator=_coded("rate", "bits", "direct"))
    lo: int
    hi: int = attrs.field(validator=_ordered)
    frame_lo: int
    frame_hi: int
    scale: Scale

    def __attrs_post_init__(self) -> None:
        if self.frame_lo > self.frame_hi:
            raise error("type", f"an empty range of frames {self.frame_lo}..{self.frame_hi}")

    @property
    def frame(self) -> tuple[int, int]:
        """The range of one frame."""
        return self.frame_lo, self.frame_hi

    @property
    def frames(self) -> tuple[tuple[int, int], ...]:
        """The range of each frame."""
        return (self.frame,) * self.steps

    def __str__(self) -> str:
        head = f"current[{self.steps}, {self.code}, {self.lo}..{self.hi}, frame {self.frame_lo}..{self.frame_hi}]"
        return f"{head} * {self.scale}"


Train = Spikes | Current
Encoding = Real | Int | Spikes | Current


@attrs.frozen
class Tensor:
    """A shape per sample and an encoding."""

    shape: Shape
    encoding: Encoding

    def __attrs_post_init__(self) -> None:
        if not self.shape or any(d < 1 for d in self.shape):
            raise error("type", f"a tensor has one or more positive dimensions, not {list(self.shape)}")
        if math.prod(self.shape) > LARGEST:
            raise error("type", f"{list(self.shape)} has more than 2^40 elements a sample")
        if not isinstance(self.encoding, Real) and self.encoding.scale.size not in (1, self.shape[0]):
            raise error("type", f"scales of {self.encoding.scale.size} channels on {self.shape[0]} channels")

    @property
    def size(self) -> int:
        """Elements per sample."""
        return math.prod(self.shape)

    @property
    def train(self) -> Train | None:
        """The encoding where it has frames."""
        return self.encoding if isinstance(self.encoding, (Spikes, Current)) else None

    @property
    def timed(self) -> bool:
        """Whether it is spikes whose frames say more than what they decode to: when each of them comes."""
        return isinstance(self.encoding, Spikes) and self.encoding.code == "rate"

    @property
    def steps(self) -> int:
        """Frames: T for trains and currents, 1 otherwise."""
        return self.train.steps if self.train else 1

    @property
    def known(self) -> bool:
        """Whether the scale's values are known; they are not in a module read without its weights."""
        return isinstance(self.encoding, Real) or self.encoding.scale.values is not None

    @property
    def range(self) -> Interval:
        """The range of the decoded integer, per tensor.

        Raises:
            SpirError[type]: a real tensor, whose range no type knows.
        """
        if isinstance(self.encoding, Real):
            raise error("type", "the range of a real value is not known", fix="quantize it")
        return Interval.of(self.encoding.lo, self.encoding.hi)

    def read(self, x: NDArray[Any]) -> Stored:
        """A user's batch as stored numbers, copied: reals as float64, all else as int64.

        Raises:
            SpirError[data]: a wrong shape, no numbers, NaN or Inf, fractions for integers, values outside the range,
                frames of a sorted code that are not sorted, frames of a direct one that differ.
        """
        lead = (self.steps,) if self.train is not None else ()
        rank = len(lead) + 1 + len(self.shape)
        if x.ndim != rank or x.shape[: len(lead)] != lead or x.shape[len(lead) + 1 :] != self.shape:
            wanted = ", ".join(map(str, (*lead, "N", *self.shape)))
            raise error(
                "data",
                f"the network takes [{wanted}], and the data is {list(x.shape)}",
                fix="add the batch axis" if x.shape == (*lead, *self.shape) else "give batches of that shape",
            )
        if x.dtype.kind not in "fiub":
            raise error("data", f"the data is of type {x.dtype}, not numbers", fix="give an array of numbers")
        if not np.isfinite(x).all():
            bad = int((~np.isfinite(x)).sum())
            raise error("data", f"{bad} of {x.size} values are NaN or infinite", fix="check the preprocessing")
        if isinstance(self.encoding, Real):
            return np.array(x, dtype=np.float64, order="C")
        stored = np.array(x, dtype=np.int64, order="C")
        if (stored != x).any():
            raise error("data", f"the network takes {self.encoding}, and the data holds fractions", fix="quantize it")
        if self.train is not None:
            for t, (frame, ends) in enumerate(zip(stored, self.train.frames, strict=True)):
                _check_range(frame, *ends, f"frame {t}")
            _check_sorted(stored, self.train)
        _check_range(self.integers(stored), self.encoding.lo, self.encoding.hi, "the value")
        return stored

    def integers(self, stored: Integers) -> Integers:
        """The integers that stored numbers decode to, ``[N, *shape]``; frames are weighted and summed."""
        if self.train is None:
            return stored
        factors = np.array(weights(self.train.code, self.train.steps), dtype=np.int64)
        return np.tensordot(factors, stored, axes=1)

    def decode(self, stored: Stored) -> Reals:
        """The real tensor ``[N, *shape]`` that stored numbers stand for, as float64."""
        if isinstance(self.encoding, Real):
            return np.asarray(stored, dtype=np.float64)
        scale = self.encoding.scale.floats()
        shaped = scale.reshape((-1,) + (1,) * (len(self.shape) - 1))
        return self.integers(np.asarray(stored, dtype=np.int64)) * shaped

    def __str__(self) -> str:
        return f"tensor<{'x'.join(map(str, self.shape))}, {self.encoding}>"


def _check_range(integers: Integers, lo: int, hi: int, what: str) -> None:
    if integers.size and (integers.min() < lo or integers.max() > hi):
        raise error(
            "data",
            f"{what} of the data holds {integers.min()}..{integers.max()}, and the network takes {lo}..{hi}",
            fix="clip the data, or declare a wider range",
        )


def _check_sorted(stored: Integers, train: Train) -> None:
    """Refuses frames of a sorted train that are not sorted, or of both signs, and direct frames that differ."""
    if train.code == "direct" and (stored != stored[:1]).any():
        raise error("data", "frames of code direct are all equal, and these differ", fix="give code rate")
    if train.code not in SORTED:
        return
    size = np.abs(stored) if train.code == "suffix" else np.abs(stored[::-1])
    if (np.diff(size, axis=0) < 0).any() or (np.abs(stored.sum(axis=0)) != size.sum(axis=0)).any():
        end = "last" if train.code == "suffix" else "first"
        raise error("data", f"spikes of code {train.code} fill the {end} steps with one sign", fix="give code rate")


def scale_of(tensor: Tensor) -> Scale:
    """The scale of an integer carrier.

    Raises:
        SpirError[type]: a real tensor.
    """
    if isinstance(tensor.encoding, Real):
        raise error("type", "a real value has no scale", fix="quantize it")
    return tensor.encoding.scale


def join(trains: Sequence[Train]) -> tuple[int, str]:
    """Steps and code of a sum of trains: direct < rate, suffix and prefix < rate, bits joins bits of equal length only.

    Rate trains of unequal length meet in the longer one: what has ended is silent. In one step suffix and prefix are
    the same.

    Raises:
        SpirError[type]: lengths or codes that do not meet.
    """
    lengths, codes = {t.steps for t in trains}, {t.code for t in trains}
    if len(lengths) > 1 and codes != {"rate"}:
        raise error(
            "type",
            f"trains of {' and '.join(map(str, sorted(lengths)))} frames cannot meet",
            fix="give both branches the same number of bits or steps",
        )
    if len(codes) > 1 and "bits" in codes:
        raise error(
            "type",
            f"trains of codes {' and '.join(sorted(codes))} cannot meet: their frames weigh differently",
            fix="convert both branches to the same neuron",
        )
    length = max(lengths)
    if length == 1 and codes.issuperset(SORTED):
        codes.remove("prefix")
    return length, codes.pop() if len(codes) == 1 else "rate"


def same_scale(tensors: Sequence[Tensor]) -> Scale:
    """The one scale of several operands.

    Raises:
        SpirError[E-RESID-SCALE]: they differ.
    """
    first, *rest = [scale_of(t) for t in tensors]
    for other in rest:
        if other != first:
            raise error(
                "E-RESID-SCALE",
                f"operands of scales {first} and {other} cannot meet",
                fix="propagate-scales{join=wide} or {join=rescale} makes them meet",
            )
    return first


def check_register(interval: Interval, what: str) -> None:
    """Refuses a range that 64-bit registers cannot hold.

    Raises:
        SpirError[E-VRANGE]: naming the channel and the bits it needs.
    """
    if interval.magnitude < 2**REGISTER_BITS:
        return
    channel = max(range(len(interval.lo)), key=lambda c: max(-interval.lo[c], interval.hi[c]))
    raise error(
        "E-VRANGE",
        f"{what} needs {interval.magnitude.bit_length() + 1} bits in channel {channel}, and registers have 64",
        fix="fewer bits for activations or weights, or propagate-scales{join=rescale}",
    )
