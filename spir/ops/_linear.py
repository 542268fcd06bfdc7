"""What all linear ops share: they act frame by frame, so one map serves reals, integers, trains and currents."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Array, Op
from spir.types import (
    SORTED,
    Current,
    Int,
    Interval,
    Real,
    Scale,
    Shape,
    Spikes,
    Stored,
    Tensor,
    Train,
    check_register,
    join,
    same_scale,
    scale_of,
)

EXACT_IN_FLOAT64 = 2**53
Counts = NDArray[np.int64]


@attrs.frozen
class LinearMap(Op):
    """A linear map of tensors that neither knows nor asks what its operands carry.

    A subclass gives ``shape``, ``scale`` (default: one scale for all), ``bounds``, ``apply`` (the map on ``[N, ...]``
    arrays) and ``adjoint`` (its transpose); one with weights also gives ``weighing``.
    """

    relabels: ClassVar[bool] = False
    """Whether every result element is one operand element or 0, so that spikes stay spikes."""

    def shape(self, *shapes: Shape) -> Shape:
        """The result shape."""
        raise NotImplementedError(f"{type(self).__name__}.shape")  # abstract: each linear op defines it

    def scale(self, *types: Tensor) -> Scale:
        """The scale of the result, for integer carriers."""
        return same_scale(types)

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """The map on ``[N, *shape]`` arrays of one dtype; ``real`` says whether they are reals or carry integers."""
        raise NotImplementedError(f"{type(self).__name__}.apply")  # abstract: each linear op defines it

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """The transpose on integers: for each operand ``[N, *shape]`` the coefficients of ``sum(y * result)``.

        Args:
            y: ``[N, *result shape]``, one weight a result element.
            shapes: of the operands.
        """
        raise NotImplementedError(f"{type(self).__name__}.adjoint")  # abstract: each linear op defines it

    def weighing(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> LinearMap:
        """The same map of integers with other weights: ``change`` of its own; a map without weights is as it is."""
        return self

    def synapses(self, paths: Counts, *shapes: Shape) -> tuple[Counts, ...]:
        """For each operand, how many synaptic paths leave every element, given those that leave the result."""
        return tuple(found[0] for found in self.weighing(np.ones_like).adjoint(paths[None], *shapes))

    def check_real(self, *types: Tensor) -> None:
        """Refuses what reals cannot do; a subclass with integer-only fields overrides it."""

    def check_integer(self, *types: Tensor) -> None:
        """Refuses what integer carriers cannot do; a subclass with a bias overrides it."""

    def infer(self, *types: Tensor) -> Tensor:
        """Reals to reals, integers to integers, trains to currents; mixtures are refused."""
        shape = self.shape(*(t.shape for t in types))
        kinds = {"real" if isinstance(t.encoding, Real) else "int" if t.train is None else "train" for t in types}
        if len(kinds) > 1:
            raise error(
                "type",
                f"operands are {' and '.join(str(t.encoding) for t in types)}",
                fix="bring both branches to one stage: real, integer or spikes",
            )
        if kinds == {"real"}:
            self.check_real(*types)
            return Tensor(shape, Real())
        self.check_integer(*types)
        shapes = tuple(t.shape for t in types)
        scale, value = self.scale(*types), self.bounds(shapes, *(t.range for t in types))
        check_register(value, "the sum")
        lo, hi = value.hull
        trains = [t.train for t in types if t.train is not None]
        if not trains:
            return Tensor(shape, Int(lo, hi, scale))
        steps, code = join(trains)
        each = (Interval.of(*t.frame) for t in trains)
        silent = [e if t.steps == steps else e.with_zero() for e, t in zip(each, trains, strict=True)]
        frame_lo, frame_hi = self.bounds(shapes, *silent).hull
        frame = frame_lo, frame_hi
        if self.relabels and (spikes := _relabelled(trains, steps, code, lo, hi, scale, frame)) is not None:
            return Tensor(shape, spikes)
        carried = "rate" if code in SORTED else code
        return Tensor(shape, Current(steps, carried, lo, hi, frame_lo, frame_hi, scale))

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """`apply` with time folded into the batch; integer sums run in float64 where that is proved exact."""
        if isinstance(types[0].encoding, Real):
            return self.apply(*stored, real=True)
        folded = [x.reshape(-1, *t.shape) for t, x in zip(types, lasting(stored, types), strict=True)]
        if self.partial_sums(*types) < EXACT_IN_FLOAT64:
            result = self.apply(*(x.astype(np.float64) for x in folded), real=False).astype(np.int64)
        else:
            result = self.apply(*folded, real=False)
        lead = max((x.shape[: x.ndim - len(t.shape)] for t, x in zip(types, stored, strict=True)), key=lambda s: s[0])
        return result.reshape(*lead, *result.shape[1:])

    def partial_sums(self, *types: Tensor) -> int:
        """A bound on every partial sum, of frames and of values.

        With 0 inside each operand's range, no subset of the terms leaves the bounds.
        """
        spans = ((t.range | Interval.of(*t.train.frame) if t.train else t.range).with_zero() for t in types)
        return self.bounds(tuple(t.shape for t in types), *spans).magnitude


@attrs.frozen
class WeightedMap(LinearMap):
    """A linear map with weights: float, or integers with ``weight_scale`` ``[1]`` or ``[O]``; only reals take a bias.

    A subclass gives ``name``, ``shape``, ``bounds``, ``apply`` and ``adjoint``; outputs are the first axis of weights.
    """

    weight: Array
    weight_scale: Array | None = None
    bias: Array | None = None

    def check_real(self, *types: Tensor) -> None:
        """Integer weights carry a scale, float weights none; a bias has one value an output."""
        outputs = self.weight.values.shape[0]
        if self.weight_scale is None and self.weight.integral:
            raise error("type", "integer weights need a weight_scale", fix="give weight_scale, or float weights")
        if self.weight_scale is not None and not self.weight.integral:
            raise error("type", "float weights take no weight_scale", fix="drop it, or give integer weights")
        if self.weight_scale is not None and self.weight_scale.values.shape not in ((1,), (outputs,)):
            given = list(self.weight_scale.values.shape)
            raise error("type", f"weight_scale has shape {given}, not [1] or [{outputs}]")
        if self.bias is not None and self.bias.values.shape != (outputs,):
            raise error("type", f"bias has shape {list(self.bias.values.shape)}, not [{outputs}]")

    def check_integer(self, *types: Tensor) -> None:
        """Integer weights with a scale, and no bias."""
        carrier = types[0].encoding
        if not self.weight.integral or self.weight_scale is None:
            raise error("type", f"float weights cannot act on {carrier}", fix="quantize the weights")
        if self.bias is not None:
            raise error(
                "type",
                f"a bias cannot ride on {carrier}: every frame would add it again",
                fix="put the bias into the requant, neuron or readout that follows (propagate-scales does)",
            )
        self.check_real(*types)

    def scale(self, *types: Tensor) -> Scale:
        """Input scale x weight scale; a sum over channels of unequal scales is refused."""
        incoming = same_scale(types)
        if incoming.size > 1:
            raise error(
                "E-SCALE",
                f"a sum over channels of unequal scales {incoming}",
                fix="use one constant for all channels; constants per channel fold into weights behind pools, concat "
                "and moves that keep channels apart",
            )
        return incoming * self.weight_steps

    def weighing(self, change: Callable[[NDArray[Any]], NDArray[Any]]) -> LinearMap:
        """Other integers for weights."""
        return attrs.evolve(self, weight=Array.of(change(self.weight.values)), bias=None)

    @property
    def weight_steps(self) -> Scale:
        """The scale of integer weights."""
        assert self.weight_scale is not None  # check_integer came first
        return Scale.of(self.weight_scale.values.tolist())

    def weights(self, like: NDArray[Any], *, real: bool) -> NDArray[Any]:
        """The weights to compute with: on reals what they stand for, on carriers the integers, typed like ``like``."""
        if not real:
            return self.weight.values.astype(like.dtype)
        if self.weight_scale is None:
            return np.asarray(self.weight.values, dtype=np.float64)
        return np.asarray(self.weight.values * channelwise(self.weight_scale.values, self.weight.values.ndim))


def weighted(weight: NDArray[np.int64], x: Interval) -> Interval:
    """Bounds of ``sum_i w[o, i] x[i]`` when each ``w[o, i]`` is split by sign: ``weight`` is ``[2, O, I]``, >= 0 parts.

    Source: sign-split sums; the bound is attained by the input that sits at ``hi`` where w > 0 and at ``lo`` elsewhere.
    """
    positive, negative = weight
    span = x.broadcast(weight.shape[2])
    total = (positive.astype(np.float64) + negative.astype(np.float64)).sum(axis=1).max(initial=1.0)
    if x.magnitude * math.ceil(total) < 2**62:
        lo, hi = span.lo.astype(np.int64), span.hi.astype(np.int64)
        low, high = positive @ lo - negative @ hi, positive @ hi - negative @ lo
        return Interval.of(low.tolist(), high.tolist())
    p, n = positive.astype(object), negative.astype(object)
    return Interval(p @ span.lo - n @ span.hi, p @ span.hi - n @ span.lo)


def split_by_sign(weight: NDArray[Any], outputs: int, inputs: int) -> NDArray[np.int64]:
    """``[O, I, ...]`` integer weights to the ``[2, O, I]`` sums of their positive and negated negative parts."""
    flat = weight.reshape(outputs, inputs, -1)
    if np.abs(flat.astype(np.float64)).sum() >= 2**62:
        flat = flat.astype(object)  # sums of such weights would wrap
    return np.stack([np.maximum(flat, 0).sum(axis=2), np.maximum(-flat, 0).sum(axis=2)])


def channelwise(values: NDArray[Any], rank: int) -> NDArray[Any]:
    """Constants ``[1]``, ``[C]`` or of the full shape, shaped to broadcast over ``[N, C, ...]`` of that rank."""
    return values if values.ndim > 1 else values.reshape((-1,) + (1,) * (rank - 1))


def per_channel(values: NDArray[Any]) -> NDArray[Any]:
    """``[*shape]`` as ``[C]`` where every position of a channel agrees."""
    flat = values.reshape(len(values), -1)
    return flat[:, 0] if (flat == flat[:, :1]).all() else values


@attrs.frozen
class Relabelling(LinearMap):
    """A map of one operand whose result elements are each one operand element, or 0: spikes stay spikes.

    A subclass gives ``shape``, ``apply`` and ``adjoint``.
    """

    relabels: ClassVar[bool] = True

    def scale(self, *types: Tensor) -> Scale:
        """Each channel's own; channels that hold zeros only take a neighbour's."""
        (x,) = types
        scale = scale_of(x)
        if scale.size == 1:
            return scale
        known, found = scale.known, []
        for channel, sources in enumerate(self.sources(x.shape)):
            scales = {known[c] for c in sources if c >= 0}
            if len(scales) > 1:
                raise error(
                    "E-SCALE",
                    f"channel {channel} of the result mixes channels of unequal scales {scale}",
                    fix="use one constant for all channels that mix, or move elements before they are multiplied",
                )
            found.append(scales.pop() if scales else known[0])
        return Scale.of(found)

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The hull of the channels that meet in a channel, and 0 where zeros join them."""
        (x,) = intervals
        found = self.sources(shapes[0])
        if len(x.lo) == 1 and not any(-1 in sources for sources in found):
            return x
        x = x.broadcast(shapes[0][0])
        ends = [[(int(x.lo[c]), int(x.hi[c])) if c >= 0 else (0, 0) for c in sources] for sources in found]
        return Interval.of((min(lo for lo, _ in e) for e in ends), (max(hi for _, hi in e) for e in ends))

    def sources(self, shape: Shape) -> tuple[frozenset[int], ...]:
        """For each channel of the result, the operand channels that its elements come from; -1 stands for zeros."""
        return _sources(self, shape)


@functools.lru_cache(maxsize=1024)
def _sources(op: Relabelling, shape: Shape) -> tuple[frozenset[int], ...]:
    numbers = np.broadcast_to(channelwise(np.arange(1, shape[0] + 1), len(shape)), shape)
    found = op.apply(numbers[None], real=False)[0]
    rows = found.reshape(len(found), -1) - 1
    low, high = rows.min(axis=1), rows.max(axis=1)
    return tuple(
        frozenset((int(a),)) if a == b else frozenset(int(c) for c in np.unique(row))
        for a, b, row in zip(low, high, rows, strict=True)
    )


def _relabelled(
    trains: Sequence[Train], steps: int, code: str, lo: int, hi: int, scale: Scale, frame: tuple[int, int]
) -> Spikes | None:
    """The spikes that moved spikes are; None where no one train type holds them, signed and unsigned bits say.

    Raises:
        SpirError[E-ORDER-MIX]: sorted trains of both orders.
    """
    codes = {t.code for t in trains}
    if code == "rate" and codes == set(SORTED):
        raise error(
            "E-ORDER-MIX",
            "suffix and prefix trains meet: a maximum of such trains is not the train of the maximum",
            fix="one order for all layers: derive-thresholds{neuron=parallel, order=suffix}",
        )
    if (len(codes) > 1 and code not in SORTED) or not all(isinstance(t, Spikes) for t in trains):
        return None
    if any(isinstance(t, Spikes) and t.net is not None for t in trains):
        return Spikes.rate(steps, lo, hi, scale, (min(frame[0], 0), max(frame[1], 0)))
    low, high = Spikes.limits(steps, code, signed=lo < 0)
    return Spikes(steps, code, lo, hi, scale) if low <= lo and hi <= high else None


def lasting(stored: Sequence[NDArray[Any]], types: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Trains of unequal length as long as the longest: what has ended is silent."""
    steps = max(t.steps for t in types)
    ended = [(steps - t.steps if t.train else 0) for t in types]
    return [
        x if not more else np.concatenate([x, np.zeros((more, *x.shape[1:]), x.dtype)])
        for x, more in zip(stored, ended, strict=True)
    ]


def surrounded(x: NDArray[Any], pairs: Sequence[tuple[int, int]]) -> NDArray[Any]:
    """Zeros (before, after) along the last dimensions, of the very type of the elements, Python ints included."""
    lead = x.ndim - len(pairs)
    padded = np.zeros((*x.shape[:lead], *(d + sum(p) for d, p in zip(x.shape[lead:], pairs, strict=True))), x.dtype)
    inside: list[Any] = [slice(b, b + d) for d, (b, _) in zip(x.shape[lead:], pairs, strict=True)]
    padded[(..., *inside)] = x
    return padded


def windows(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> int:
    """How many windows a padded row of ``size`` holds; below 1: not one."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def reached(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> NDArray[np.bool_]:
    """Which taps of a window lie inside a padded row of ``size``: the distinct cases, ``[cases, kernel]``."""
    count = windows(size, kernel, stride, dilation, before, after)
    at = np.arange(count)[:, None] * stride + np.arange(kernel)[None] * dilation - before
    return np.unique((at >= 0) & (at < size), axis=0)


def widest(cases: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The cases that no other case contains: with 0 inside the operand's range only these can reach a bound."""
    kept = [
        i for i, case in enumerate(cases) if not any((case <= other).all() and (case < other).any() for other in cases)
    ]
    return cases[kept]
