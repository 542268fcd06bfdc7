"""Readers of what looks at windows of space: pools, means, maxima, upsampling and padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from spir.frontends._arithmetic import times
from spir.frontends._layers import Sizes, pair, single
from spir.frontends._reading import Call
from spir.ir import Array, Value
from spir.ops.avg_pool import AvgPool
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.max_pool import MaxPool
from spir.ops.pad import Pad
from spir.ops.scale import Scaling
from spir.ops.upsample import Upsample

# --- pools of a given window --------------------------------------------------------------------------------------


def max_pool2d(
    call: Call,
    x: Value,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    del ceil_mode  # torch has worked out the size
    _no_indices(call, return_indices)
    call.image(x)
    return _max(call, x, pair(kernel_size), pair(stride or kernel_size), pair(padding), pair(dilation))


def max_pool1d(
    call: Call,
    x: Value,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    del ceil_mode  # torch has worked out the size
    _no_indices(call, return_indices)
    kernel, step = (1, single(kernel_size)), (1, single(stride or kernel_size))
    found = _max(call, call.line(x), kernel, step, (0, single(padding)), (1, single(dilation)))
    return call.reshaped(found, call.shape)


def avg_pool2d(
    call: Call,
    x: Value,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    del ceil_mode  # torch has worked out the size
    call.image(x)
    kernel, step = pair(kernel_size), pair(stride or kernel_size)
    return _average(call, x, kernel, step, pair(padding), count_include_pad, divisor_override)


def avg_pool1d(
    call: Call,
    x: Value,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Value:
    del ceil_mode  # torch has worked out the size
    kernel, step = (1, single(kernel_size)), (1, single(stride or kernel_size))
    found = _average(call, call.line(x), kernel, step, (0, single(padding)), count_include_pad, None)
    return call.reshaped(found, call.shape)


Pair = tuple[int, int]


def _no_indices(call: Call, return_indices: bool) -> None:
    if return_indices:
        raise call.refuse("with return_indices=True", "leave the indices out: what reads them does not convert")


def _windows(call: Call) -> Pair:
    """How many windows torch has found along height and width."""
    return (1, call.shape[-1]) if len(call.shape) == 2 else (call.shape[-2], call.shape[-1])


def _ends(call: Call, x: Value, kernel: Pair, step: Pair, padding: Pair, dilation: Pair) -> tuple[int, int, int, int]:
    """Top, bottom, left and right padding for as many windows as torch has; ceil_mode pads the last one."""
    ends: list[int] = []
    for axis, size in enumerate(call.image(x)[1:]):
        covered = (_windows(call)[axis] - 1) * step[axis] + dilation[axis] * (kernel[axis] - 1) + 1
        ends += [padding[axis], max(padding[axis], covered - size - padding[axis])]
    return ends[0], ends[1], ends[2], ends[3]


def _max(call: Call, x: Value, kernel: Pair, step: Pair, padding: Pair, dilation: Pair) -> Value:
    ends = _ends(call, x, kernel, step, padding, dilation)
    return call.emit(MaxPool(kernel=kernel, stride=step, padding=ends, dilation=dilation), x)


def _average(
    call: Call, x: Value, kernel: Pair, step: Pair, padding: Pair, count_include_pad: bool, divisor: int | None
) -> Value:
    """The window's sum by its size, and where torch divides by another number, that put right.

    A divisor that varies by position is multiplied out: ``sum / n = (sum / k) * (lcm / n) * (k / lcm)``, whole numbers
    at every position and one float.
    """
    found = call.emit(AvgPool(kernel=kernel, stride=step, padding=_ends(call, x, kernel, step, padding, (1, 1))), x)
    area = math.prod(kernel)
    counts = divisor or _counts(call, x, kernel, step, padding, count_include_pad)
    if isinstance(counts, int) or counts.min() == counts.max():
        return times(call, found, area / int(np.max(counts)))
    multiple = int(np.lcm.reduce(counts[counts > 0]))
    factors = np.where(counts > 0, multiple // np.maximum(counts, 1), 0)  # a window that holds nothing sums to 0
    whole = Array.of(np.broadcast_to(factors, found.type.shape))
    return times(call, call.beside(Scaling(factor=whole), found), area / multiple)


def _counts(
    call: Call, x: Value, kernel: Pair, step: Pair, padding: Pair, count_include_pad: bool
) -> NDArray[np.int64]:
    """How many elements torch divides the sum of each window by, ``[rows, columns]``."""
    sides = []
    for axis, size in enumerate(call.image(x)[1:]):
        start = np.arange(_windows(call)[axis]) * step[axis] - padding[axis]
        stop = np.minimum(start + kernel[axis], size + padding[axis])
        if not count_include_pad:
            start, stop = np.maximum(start, 0), np.minimum(stop, size)
        sides.append(np.maximum(stop - start, 0))
    return np.asarray(np.outer(*sides), dtype=np.int64)


# --- pools to a given size ----------------------------------------------------------------------------------------


def adaptive_avg_pool2d(call: Call, x: Value, output_size: object) -> Value:
    del output_size  # torch has worked it out
    call.image(x)
    return _adapted(call, x, largest=False)


def adaptive_avg_pool1d(call: Call, x: Value, output_size: object) -> Value:
    del output_size  # torch has worked it out
    return call.reshaped(_adapted(call, call.line(x), largest=False), call.shape)


def adaptive_max_pool2d(call: Call, x: Value, output_size: object, return_indices: bool = False) -> Value:
    del output_size  # torch has worked it out
    _no_indices(call, return_indices)
    call.image(x)
    return _adapted(call, x, largest=True)


def adaptive_max_pool1d(call: Call, x: Value, output_size: object, return_indices: bool = False) -> Value:
    del output_size  # torch has worked it out
    _no_indices(call, return_indices)
    return call.reshaped(_adapted(call, call.line(x), largest=True), call.shape)


def _adapted(call: Call, x: Value, *, largest: bool) -> Value:
    (_, height, width), (rows, columns) = call.image(x), _windows(call)
    if (rows, columns) == (height, width):
        return x
    if not rows % height and not columns % width:  # windows of one pixel, each several times
        return call.emit(Upsample(factor=(rows // height, columns // width)), x)
    if height % rows or width % columns:
        raise call.refuse(
            f"from {height}x{width} to {rows}x{columns}, with windows of unequal size,",
            "choose an output size that divides the image",
        )
    return _pooled(call, x, (height // rows, width // columns), largest=largest)


def _pooled(call: Call, x: Value, kernel: Pair, *, largest: bool) -> Value:
    """The mean or the maximum of windows side by side."""
    _, height, width = call.image(x)
    if largest:
        return call.emit(MaxPool(kernel=kernel, stride=kernel), x)
    if kernel == (height, width):
        return call.emit(GlobalAvgPool(positions=height * width, keepdim=call.shape[1:] in ((1, 1), (1,))), x)
    return call.emit(AvgPool(kernel=kernel, stride=kernel), x)


# --- over whole dimensions ----------------------------------------------------------------------------------------


def mean(call: Call, x: Value, dim: int | Sequence[int] | None = (), keepdim: bool = False) -> Value:
    del keepdim  # torch has worked out the shape
    return call.reshaped(_pooled(call, *_over_space(call, x, dim), largest=False), call.shape)


def sum_over(call: Call, x: Value, dim: int | Sequence[int] | None = (), keepdim: bool = False) -> Value:
    del keepdim  # torch has worked out the shape
    image, kernel = _over_space(call, x, dim)
    return call.reshaped(times(call, _pooled(call, image, kernel, largest=False), math.prod(kernel)), call.shape)


def amax(call: Call, x: Value, dim: int | Sequence[int] = (), keepdim: bool = False) -> Value:
    del keepdim  # torch has worked out the shape
    return call.reshaped(_pooled(call, *_over_space(call, x, dim), largest=True), call.shape)


def _over_space(call: Call, x: Value, dim: int | Sequence[int] | None) -> tuple[Value, Pair]:
    """The operand as an image, and the window that covers the dimensions."""
    given = () if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    rank = len(x.type.shape) + 1
    axes = {d % rank for d in given}
    if rank not in (3, 4) or not axes or min(axes) < 2:
        raise call.refuse(f"over {list(given)}", "keep the channels: take it over height and width, (2, 3)")
    image = call.line(x) if rank == 3 else x
    _, height, width = call.image(image)
    return image, (height if rank == 4 and 2 in axes else 1, width if rank - 1 in axes else 1)


# --- larger images ------------------------------------------------------------------------------------------------


def interpolate(
    call: Call,
    x: Value,
    size: object = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Value:
    del size, align_corners, antialias  # torch has worked out the size, and the others are of other modes
    if mode not in ("nearest", "nearest-exact"):
        raise call.refuse(f"with mode={mode!r}", "use mode='nearest' and a whole factor")
    image = call.line(x) if len(x.type.shape) == 2 else x
    (_, height, width), (rows, columns) = call.image(image), _windows(call)
    factor = (rows // height, columns // width)
    asked = factor if scale_factor is None or recompute_scale_factor else scale_factor
    exact = {asked} if isinstance(asked, int | float) else set(asked)
    if rows % height or columns % width or not exact <= set(factor):
        raise call.refuse(f"from {height}x{width} to {rows}x{columns}", "use whole factors")
    return call.reshaped(call.emit(Upsample(factor=factor), image), call.shape)


# --- padding ------------------------------------------------------------------------------------------------------


def pad(call: Call, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    if mode not in ("constant", "replicate"):
        raise call.refuse(f"with mode={mode!r}", "pad with zeros, or with mode='replicate'")
    if mode == "constant" and value:
        raise call.refuse(f"with value={value}", "pad with zeros")
    if min(pad) < 0:
        raise call.refuse(f"by {list(pad)}", "cut by a slice: x[:, :, 1:-1]")
    rank = len(x.type.shape)
    ends = [(int(a), int(b)) for a, b in zip(pad[::2], pad[1::2], strict=True)][:rank]
    if not any(chain.from_iterable(ends)):
        return x
    ends += [(0, 0)] * (rank - len(ends))
    return call.emit(Pad(pads=tuple(chain.from_iterable(reversed(ends))), edge=mode == "replicate"), x)


def constant_pad(call: Call, x: Value, padding: Sequence[int], value: float) -> Value:
    return pad(call, x, padding, value=value)


def replication_pad(call: Call, x: Value, padding: Sequence[int]) -> Value:
    return pad(call, x, padding, "replicate")
