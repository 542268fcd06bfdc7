"""Exact integer products and laws on floats: what `hw` computes with, and the proof that each float type suffices.

Arrays are channels-last inside: ``[N, H, W, C]`` for images, ``[N, *shape]`` for all else. Then the columns of a
convolution are copied in runs of ``kw * C`` numbers, and its product comes out channels-last again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import attrs
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from spir.ops._linear import LinearMap, channelwise
from spir.ops._neuron import Neuron
from spir.ops._threshold import Triple, divisors
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.requant import Requant
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.ops.upsample import Upsample
from spir.types import Interval, Shape

Numbers = NDArray[Any]
Number = np.dtype[Any]

FLOAT32, FLOAT64, INT64 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64)
EXACT = ((FLOAT32, 2**24), (FLOAT64, 2**53))
BLOCK = 2**20
"""Bytes of convolution columns that are made and multiplied at a time, so that they stay in the cache."""


def carrier(magnitude: int) -> Number:
    """The fastest type that holds every integer up to a magnitude."""
    return next((dtype for dtype, limit in EXACT if magnitude < limit), INT64)


def inner_shape(shape: Shape) -> Shape:
    """``[C, H, W]`` to ``[H, W, C]``; other ranks stay."""
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape


def inner(x: Numbers, shape: Shape) -> Numbers:
    """``[..., *shape]`` seen channels-last."""
    return np.moveaxis(x, -3, -1) if len(shape) == 3 else x


def outer(x: Numbers, shape: Shape) -> Numbers:
    """A channels-last array seen as ``[..., *shape]``."""
    return np.moveaxis(x, -1, -3) if len(shape) == 3 else x


def aligned(values: Numbers, shape: Shape) -> Numbers:
    """Constants ``[1]``, ``[C]`` or of the full shape, to broadcast over channels-last arrays."""
    if values.ndim > 1:
        return inner(values, shape)
    return values if len(shape) in (1, 3) else channelwise(values, len(shape))


class Scratch:
    """Working memory by label, kept from chunk to chunk of one run."""

    def __init__(self) -> None:
        self._held: dict[str, NDArray[np.uint8]] = {}

    def take(self, label: str, shape: Shape, dtype: Number) -> Numbers:
        """Memory of undefined content, the same for the same label."""
        wanted = int(np.prod(shape)) * dtype.itemsize
        if label not in self._held or self._held[label].size < wanted:
            self._held[label] = np.empty(wanted, dtype=np.uint8)
        return self._held[label][:wanted].view(dtype).reshape(shape)


@attrs.frozen(slots=False)
class Kernel:
    """A linear op made ready for operands of given shapes; partial sums are exact in ``dtype``.

    ``padded`` says that the operand comes with its zero padding around it.
    """

    op: Any
    shapes: tuple[Shape, ...]
    dtype: Number
    padded: bool = False

    def act(self, scratch: Scratch, out: Numbers, *x: Numbers) -> None:
        """Writes the result for channels-last operands ``[N, ...]``."""
        raise NotImplementedError(f"{type(self).__name__}.act")  # abstract: each kernel defines it


def kernel(op: LinearMap, shapes: Sequence[Shape], ranges: Sequence[Interval], *, padded: bool = False) -> Kernel:
    """The kernel of an op of `KERNELS` for operands within ``ranges``.

    With 0 inside each operand's range no subset of the terms of a sum leaves the bounds, so every order of summation,
    with and without fused multiply-add, is exact.
    """
    dtype = carrier(op.bounds(tuple(shapes), *(r.with_zero() for r in ranges)).magnitude)
    return KERNELS[type(op)](op, tuple(shapes), dtype, padded)


def moving(op: LinearMap, shapes: Sequence[Shape]) -> Kernel:
    """The kernel of an op that moves elements, for reals."""
    return KERNELS[type(op)](op, tuple(shapes), FLOAT64)


def _in(x: Numbers, dtype: Number) -> Numbers:
    return x if x.dtype == dtype else x.astype(dtype)


class _Window(Kernel):
    """What convolutions and pools share: a border of zeros, and the view of every window."""

    op: Conv2d | AvgPool

    @cached_property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        _, height, width = self.op.shape(self.shapes[0])
        return height, width

    def windows(self, scratch: Scratch, x: Numbers, kernel: tuple[int, int], dilation: tuple[int, int]) -> Numbers:
        """Every window of channels-last images, ``[N, H', W', kh, kw, C]``; a copy only where zeros are missing."""
        if any(self.op.padding) and not self.padded:
            x = _bordered(scratch, x, self.op.padding)
        s, (down, right) = x.strides, self.op.stride
        strides = (s[0], s[1] * down, s[2] * right, s[1] * dilation[0], s[2] * dilation[1], s[3])
        return as_strided(x, (len(x), *self.size, *kernel, x.shape[3]), strides, writeable=False)


def _bordered(scratch: Scratch, x: Numbers, padding: tuple[int, int, int, int]) -> Numbers:
    top, bottom, left, right = padding
    n, height, width, channels = x.shape
    framed = scratch.take("bordered", (n, height + top + bottom, width + left + right, channels), x.dtype)
    framed.fill(0)
    framed[:, top : top + height, left : left + width] = x
    return framed


class _Conv2d(_Window):
    """Columns of a block of images or rows, then one product a group; a depthwise map by multiply-add."""

    op: Conv2d

    @cached_property
    def matrices(self) -> Numbers:
        """The weights of each group, ``[groups, kh * kw * I, O]``."""
        weight, groups = self.op.weight.values.astype(self.dtype), self.op.groups
        outputs, inputs, kh, kw = weight.shape
        split = weight.reshape(groups, outputs // groups, inputs, kh, kw).transpose(0, 3, 4, 2, 1)
        return np.ascontiguousarray(split).reshape(groups, kh * kw * inputs, outputs // groups)

    @cached_property
    def block(self) -> tuple[int, int]:
        """Images and rows whose columns are made at a time."""
        height, width = self.size
        row = width * self.matrices.shape[1] * self.dtype.itemsize
        rows = min(height, max(1, BLOCK // row))
        return (max(1, BLOCK // (row * height)), rows) if rows == height else (1, rows)

    def act(self, scratch: Scratch, out: Numbers, *x: Numbers) -> None:
        kh, kw = self.op.weight.values.shape[2:]
        groups, terms, each = self.matrices.shape
        unit = (kh, kw) == self.op.stride == (1, 1) and groups == 1 and not any(self.op.padding)
        if unit and x[0].flags.c_contiguous and x[0].dtype == self.dtype:
            np.matmul(x[0].reshape(-1, terms), self.matrices[0], out=out.reshape(-1, each))
            return
        windows = self.windows(scratch, x[0], (kh, kw), self.op.dilation)
        if terms == kh * kw and each == 1:
            self._by_taps(scratch, out, windows)
        else:
            self._by_columns(scratch, out, windows)

    def _by_columns(self, scratch: Scratch, out: Numbers, windows: Numbers) -> None:
        images, rows = self.block
        groups, terms, each = self.matrices.shape
        inputs = windows.shape[5] // groups
        for i in range(0, len(out), images):
            for r in range(0, out.shape[1], rows):
                seen = windows[i : i + images, r : r + rows]
                place = out[i : i + images, r : r + rows].reshape(-1, groups * each)
                for g, matrix in enumerate(self.matrices):
                    part = seen[..., g * inputs : (g + 1) * inputs]
                    columns = scratch.take("columns", part.shape, self.dtype)
                    np.copyto(columns, part, casting="unsafe")
                    np.matmul(columns.reshape(-1, terms), matrix, out=place[:, g * each : (g + 1) * each])

    def _by_taps(self, scratch: Scratch, out: Numbers, windows: Numbers) -> None:
        taps = self.matrices[:, :, 0].T.reshape(*windows.shape[3:])
        term = scratch.take("term", out.shape[1:], self.dtype)
        for seen, into in zip(windows, out, strict=True):
            into.fill(0)
            for u, v in np.ndindex(*taps.shape[:2]):
                np.multiply(_in(seen[:, :, u, v], self.dtype), taps[u, v], out=term)
                np.add(into, term, out=into)


class _AvgPool(_Window):
    """The window sum."""

    op: AvgPool

    def act(self, scratch: Scratch, out: Numbers, *x: Numbers) -> None:
        windows = self.windows(scratch, x[0], self.op.kernel, (1, 1))
        out.fill(0)
        for u, v in np.ndindex(*self.op.kernel):
            np.add(out, _in(windows[:, :, :, u, v], self.dtype), out=out)


class _GlobalAvgPool(Kernel):
    """The sum over space."""

    def act(self, scratch: Scratch, out: Numbers, *x: Numbers) -> None:
        np.sum(_in(x[0], self.dtype), axis=(1, 2), out=out.reshape(len(out), -1))


class _Linear(Kernel):
    """One product."""

    @cached_property
    def matrix(self) -> Numbers:
        """The weights, ``[I, O]``."""
        return np.ascontiguousarray(self.op.weight.values.T.astype(self.dtype))

    def act(self, scratch: Scratch, out: Numbers, *x: Numbers) -> None:
        np.matmul(_in(x[0], self.dtype), self.matrix, out=out)


class _Add(Kernel):
    """The sum, left to right."""

    def act(self, scratch: Scratch, out: Numbers, *x: Numbers) -> None:
        np.add(_in(x[0], self.dtype), _in(x[1], self.dtype), out=out)
        for more in x[2:]:
            np.add(out, _in(more, self.dtype), out=out)


class _Scaling(Kernel):
    """One product an element."""

    @cached_property
    def factor(self) -> Numbers:
        """The multiplier, in the order of the values."""
        return aligned(self.op.multiplier.astype(self.dtype), self.shapes[0])

    def act(self, scratch: Scratch, out: Numbers, *x: Numbers) -> None:
        np.multiply(_in(x[0], self.dtype), self.factor, out=out)


class _Reshape(Kernel):
    """The elements in the order of the language under another shape."""

    op: Flatten | Reshape

    def act(self, scratch: Scratch, out: Numbers, *x: Numbers) -> None:
        shape, to = self.shapes[0], self.op.shape(self.shapes[0])
        seen, place = outer(x[0], shape), outer(out, to)
        if len(to) != 3:
            place = place.reshape(len(out), *shape)
        else:
            seen = seen.reshape(len(out), *to)
        np.copyto(place, seen, casting="unsafe")


class _Moving(Kernel):
    """One copy between views in the order of the language; a subclass says which."""

    def act(self, scratch: Scratch, out: Numbers, *x: Numbers) -> None:
        result = self.op.shape(*self.shapes)
        self.move(outer(out, result), *(outer(each, shape) for each, shape in zip(x, self.shapes, strict=True)))

    def move(self, out: Numbers, *x: Numbers) -> None:
        """Writes the result for operands ``[N, *shape]``."""
        raise NotImplementedError(f"{type(self).__name__}.move")  # abstract: each kernel defines it


class _Slice(_Moving):
    """A strided window."""

    op: Slice

    def move(self, out: Numbers, *x: Numbers) -> None:
        np.copyto(out, x[0][(slice(None), *self.op.window)], casting="unsafe")


class _Permute(_Moving):
    """The dimensions in another order."""

    op: Permute

    def move(self, out: Numbers, *x: Numbers) -> None:
        np.copyto(out, x[0].transpose(0, *(d + 1 for d in self.op.order)), casting="unsafe")


class _Concat(_Moving):
    """Each operand into its place."""

    op: Concat

    def move(self, out: Numbers, *x: Numbers) -> None:
        along, start = np.moveaxis(out, self.op.axis + 1, 0), 0
        for operand in x:
            given = np.moveaxis(operand, self.op.axis + 1, 0)
            np.copyto(along[start : start + len(given)], given, casting="unsafe")
            start += len(given)


class _Upsample(_Moving):
    """Every pixel to all places of its block, one place of all blocks at a time."""

    op: Upsample

    def move(self, out: Numbers, *x: Numbers) -> None:
        down, right = self.op.factor
        for u, v in np.ndindex(down, right):
            np.copyto(out[:, :, u::down, v::right], x[0], casting="unsafe")


class _Pad(_Moving):
    """The operand inside, then zeros all around, or each dimension's edges carried outwards."""

    op: Pad

    def move(self, out: Numbers, *x: Numbers) -> None:
        sizes = zip(self.shapes[0], self.op.pairs, strict=True)
        inside = (slice(None), *(slice(before, before + size) for size, (before, _) in sizes))
        if not self.op.edge:
            out.fill(0)
        np.copyto(out[inside], x[0], casting="unsafe")
        for axis, window in enumerate(inside[1:] if self.op.edge else (), start=1):
            # Dimensions before this one are whole by now, those behind it are written inside only.
            written = (*(slice(None),) * (axis + 1), *inside[axis + 1 :])
            along = np.moveaxis(out[written], axis, 0)
            along[: window.start], along[window.stop :] = along[window.start], along[window.stop - 1]


KERNELS: dict[type[LinearMap], type[Kernel]] = {
    Add: _Add,
    AvgPool: _AvgPool,
    Concat: _Concat,
    Conv2d: _Conv2d,
    Flatten: _Reshape,
    GlobalAvgPool: _GlobalAvgPool,
    Linear: _Linear,
    Pad: _Pad,
    Permute: _Permute,
    Reshape: _Reshape,
    Scaling: _Scaling,
    Slice: _Slice,
    Upsample: _Upsample,
}


def max_pool(op: MaxPool, scratch: Scratch, out: Numbers, x: Numbers) -> None:
    """The largest of every window of channels-last images: over rows, then over columns of what is left.

    Taps that fall on the padding are left out, so that it never wins; ``op`` says that every window has others.
    """
    top, _, left, _ = op.padding
    rows = scratch.take("rows", (len(x), out.shape[1], *x.shape[2:]), x.dtype)
    _largest(np.moveaxis(rows, 1, 0), np.moveaxis(x, 1, 0), op.kernel[0], op.stride[0], op.dilation[0], top)
    _largest(np.moveaxis(out, 2, 0), np.moveaxis(rows, 2, 0), op.kernel[1], op.stride[1], op.dilation[1], left)


def _largest(out: Numbers, x: Numbers, kernel: int, stride: int, dilation: int, before: int) -> None:
    """Windows along the first axis."""
    out.fill(-np.inf if out.dtype.kind == "f" else np.iinfo(out.dtype).min)
    for tap in range(kernel):
        at = tap * dilation - before  # where the first window has this tap
        first = max(0, -(at // stride))
        count = min(len(out), (len(x) - 1 - at) // stride + 1) - first
        if count < 1:
            continue
        seen = x[at + first * stride :: stride][:count]
        into = out[first : first + count]
        np.maximum(into, seen, out=into, casting="unsafe")


@attrs.frozen
class Law:
    """``clamp(floor((mul z + add) / div), lo, hi)`` of values, made ready for values within proved bounds.

    In floats ``mul`` and ``add`` are divided beforehand where ``div`` is a power of two, which loses nothing. Elsewhere
    the rounded quotient has the right floor, because n / div stays 1 / div away from the next integer and
    |n| + div < 2^53. ``window`` clamps z before a product that would be too wide, where the result is saturated anyway.
    """

    dtype: Number
    mul: Numbers
    add: Numbers
    div: Numbers | None
    lo: int
    hi: int
    rows: bool
    """Whether the constants span whole rows of images, which runs faster than one vector a pixel."""
    window: tuple[Numbers, Numbers] | None = None

    def act(self, scratch: Scratch, out: Numbers, z: Numbers) -> None:
        """The law on channels-last values."""
        work = scratch.take("law", z.shape, self.dtype)
        if self.window is None:
            np.copyto(work, z, casting="unsafe")
        else:
            np.clip(z, *self.window, out=work, casting="unsafe")
        flat = work.reshape(-1, len(self.mul)) if self.rows else work
        np.multiply(flat, self.mul, out=flat)
        np.add(flat, self.add, out=flat)
        self._floor(flat)
        np.clip(work, self.lo, self.hi, out=work)
        np.copyto(out, work, casting="unsafe")

    def _floor(self, work: Numbers) -> None:
        if self.div is not None and self.dtype == INT64:
            np.floor_divide(work, self.div, out=work)
            return
        if self.div is not None:
            np.divide(work, self.div, out=work)
        np.floor(work, out=work)


def triple_of(op: object) -> Triple | None:
    """The law of an op that is one function of the decoded value; frames may be merged in front of such ops only."""
    return op.triple if isinstance(op, (Neuron, Requant)) else None


def law(op: object, shape: Shape, z: Interval) -> Law:
    """The law of an op with a triple, for values within ``z``, in the fastest exact type."""
    triple = triple_of(op)
    assert triple is not None  # the plan asked before
    mul, add, by, lo, hi = triple
    div = divisors(by)
    full = mul.values.ndim > 1 or add.values.ndim > 1
    dtype, window = carrier(_widest(mul.values, add.values, z) + int(div.max())), None
    if dtype == INT64 and not full:
        ends = _unsaturated(mul.values, add.values, div, lo, hi, z.broadcast(shape[0]))
        narrowed = carrier(_widest(mul.values, add.values, ends) + int(div.max()))
        if narrowed != INT64:
            kind = carrier(z.magnitude)
            window = aligned(ends.lo.astype(kind), shape), aligned(ends.hi.astype(kind), shape)
            dtype = narrowed
    factors, offsets, parts = (aligned(a.astype(dtype), shape) for a in (mul.values, add.values, div))
    rows = len(shape) == 3 and not full
    if rows:
        factors, offsets, parts = (np.tile(np.broadcast_to(c, shape[:1]), shape[2]) for c in (factors, offsets, parts))
    if dtype != INT64 and not (div & (div - 1)).any():
        return Law(dtype, factors / parts, offsets / parts, None, lo, hi, rows, window)
    return Law(dtype, factors, offsets, parts, lo, hi, rows, window)


def _widest(mul: Numbers, add: Numbers, z: Interval) -> int:
    """A bound on ``mul z``, ``add`` and their sum."""
    factors, offsets = abs(mul.astype(object)), abs(add.astype(object))
    if mul.ndim > 1 or add.ndim > 1:
        return int(factors.max() * z.magnitude + offsets.max())
    return int((factors * np.maximum(abs(z.lo), abs(z.hi)) + offsets).max())


def _unsaturated(mul: Numbers, add: Numbers, by: Numbers, lo: int, hi: int, z: Interval) -> Interval:
    """Values cut to where the law moves, and one step beyond on either side: there the clamp gives the right end."""
    lows, highs = [], []
    channels = len(z.lo)
    constants = (np.broadcast_to(a, (channels,)).tolist() for a in (mul, add, by))
    for m, a, div, low, high in zip(*constants, z.lo, z.hi, strict=True):
        if m:
            # With m < 0 the law of -z has the multiplier -m.
            first, last = -((a - lo * div) // abs(m)) - 1, ((hi + 1) * div - 1 - a) // abs(m) + 1
            first, last = (first, last) if m > 0 else (-last, -first)
            low, high = min(max(low, first), high), max(min(high, last), low)
        lows.append(low)
        highs.append(high)
    return Interval.of(lows, highs)
