"""Readers of what moves elements about: reshaping, permuting, slices, shares, and joining them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from spir.frontends._reading import Call, Found
from spir.frontends._trace import holds
from spir.ir import Value
from spir.ops.concat import Concat
from spir.ops.flatten import Flatten
from spir.ops.permute import Permute
from spir.ops.reshape import Reshape
from spir.ops.slice import Slice

# --- other shapes -------------------------------------------------------------------------------------------------


def reshape(call: Call, x: Value, *shape: object, **named: object) -> Value:
    del shape, named  # torch has worked them out
    if call.shape == x.type.shape:
        return x
    return call.emit(Flatten() if len(call.shape) == 1 else Reshape(to=call.shape), x)


def permute(call: Call, x: Value, *dims: Any) -> Value:
    return _turned(call, x, lambda labels: labels.permute(*dims))


def torch_permute(call: Call, x: Value, dims: Sequence[int]) -> Value:
    return permute(call, x, dims)


def transpose(call: Call, x: Value, dim0: int, dim1: int) -> Value:
    return _turned(call, x, lambda labels: labels.transpose(dim0, dim1))


def swapaxes(call: Call, x: Value, axis0: int, axis1: int) -> Value:
    return transpose(call, x, axis0, axis1)


def movedim(call: Call, x: Value, source: Any, destination: Any) -> Value:
    return _turned(call, x, lambda labels: labels.movedim(source, destination))


def matrix_transpose(call: Call, x: Value, name: str) -> Value:
    del name  # the table has looked at it
    return transpose(call, x, -2, -1)


def _turned(call: Call, x: Value, turn: Callable[[torch.Tensor], torch.Tensor]) -> Value:
    """The dimensions in the order that ``turn`` gives them: torch turns a tensor whose sizes number them."""
    batch, *order = turn(torch.empty(tuple(range(len(x.type.shape) + 1)), device="meta")).shape
    if batch:
        raise call.refuse("of the batch axis", "keep the batch axis first")
    if order == sorted(order):
        return x
    return call.emit(Permute(order=tuple(d - 1 for d in order)), x)


def pixel_shuffle(call: Call, x: Value, upscale_factor: int) -> Value:
    (_, height, width), (channels, *_), r = call.image(x), call.shape, upscale_factor
    split = call.beside(Reshape(to=(channels, r, r, height, width)), x)
    return reshape(call, call.beside(Permute(order=(0, 3, 1, 4, 2)), split))


def pixel_unshuffle(call: Call, x: Value, downscale_factor: int) -> Value:
    (channels, *_), (_, height, width), r = call.image(x), call.shape, downscale_factor
    split = call.beside(Reshape(to=(channels, height, r, width, r)), x)
    return reshape(call, call.beside(Permute(order=(0, 2, 4, 1, 3)), split))


def channel_shuffle(call: Call, x: Value, groups: int) -> Value:
    channels, *space = x.type.shape
    split = call.beside(Reshape(to=(groups, channels // groups, *space)), x)
    return reshape(call, call.beside(Permute(order=(1, 0, *range(2, len(split.type.shape)))), split))


# --- parts --------------------------------------------------------------------------------------------------------


def getitem(call: Call, x: Found, index: Any) -> Found:
    if isinstance(x, tuple):
        chosen: Found = x[index]
        return chosen
    fix = "slice with numbers and leave the batch axis alone: x[:, :, ::2, ::2]"
    given = list(index) if isinstance(index, tuple) else [index]
    full = (2, *x.type.shape)
    missing = len(full) - sum(i is not None and i is not Ellipsis for i in given)
    at = next((n for n, i in enumerate(given) if i is Ellipsis), len(given))
    given[at : at + 1] = [slice(None)] * missing
    batch, *others = (i for i in given if i is not None)  # a new axis is left to the reshape
    if holds(index, Value) or any(type(i) not in (int, slice) for i in (batch, *others)):
        raise call.refuse("with such an index", fix)
    if type(batch) is int or batch.indices(2) != (0, 2, 1):
        raise call.refuse("on the batch axis", fix)
    windows = {
        axis: (i % size, i % size + 1, 1) if isinstance(i, int) else i.indices(size)
        for axis, (i, size) in enumerate(zip(others, x.type.shape, strict=True))
    }
    return call.reshaped(_cut(call, x, windows), call.shape)


def values(call: Call, x: Found, name: str) -> Value:
    """Of the pair of values and indices, which was refused itself."""
    del name  # the table has looked at it
    if not isinstance(x, tuple):
        raise call.refuse("of one tensor", "leave it out")
    return x[0]


def narrow(call: Call, x: Value, dim: int, start: int, length: int) -> Value:
    return _window(call, x, dim, start, length)


def select(call: Call, x: Value, dim: int, index: int) -> Value:
    return call.reshaped(_window(call, x, dim, index, 1), call.shape)


def _window(call: Call, x: Value, dim: int, start: int, length: int) -> Value:
    axis = dim % (len(x.type.shape) + 1) - 1
    if axis < 0:
        raise call.refuse("on the batch axis", "leave the batch axis alone")
    first = int(start) % x.type.shape[axis]
    return _cut(call, x, {axis: (first, first + int(length), 1)})


def split(call: Call, x: Value, *sections: object, dim: int = 0, **named: object) -> tuple[Value, ...]:
    """Of parts that lie one behind the other, as chunk and split give them."""
    del sections, dim, named  # torch has worked out the shapes
    axes = [a for a, size in enumerate(x.type.shape) if any(s[a] != size for s in call.shapes)]
    if not axes:
        return (x,)
    (axis,) = axes
    stops = list(accumulate(s[axis] for s in call.shapes))
    return tuple(_cut(call, x, {axis: (b - s[axis], b, 1)}) for s, b in zip(call.shapes, stops, strict=True))


def _cut(call: Call, x: Value, windows: Mapping[int, tuple[int, int, int]]) -> Value:
    """Start, stop and step of some dimensions, the others whole."""
    ends = [windows.get(axis, (0, size, 1)) for axis, size in enumerate(x.type.shape)]
    if ends == [(0, size, 1) for size in x.type.shape]:
        return x
    if not all(range(*window) for window in ends):
        raise call.refuse("that leaves no element", "keep one element or more of each dimension")
    start, stop, step = zip(*ends, strict=True)
    return call.emit(Slice(start=start, stop=stop, step=step), x)


# --- joined -------------------------------------------------------------------------------------------------------


def cat(call: Call, tensors: Sequence[Any], dim: int = 0) -> Value:
    return _joined(call, _all_values(call, tensors), dim % (len(call.shape) + 1) - 1)


def stack(call: Call, tensors: Sequence[Any], dim: int = 0) -> Value:
    axis = dim % (len(call.shape) + 1) - 1
    one = (*call.shape[:axis], 1, *call.shape[axis + 1 :])
    return _joined(call, [call.reshaped(x, one) for x in _all_values(call, tensors)], axis)


def _joined(call: Call, tensors: Sequence[Value], axis: int) -> Value:
    return tensors[0] if len(tensors) == 1 else call.emit(Concat(axis=axis), *tensors)


def _all_values(call: Call, tensors: Sequence[Any]) -> Sequence[Value]:
    if any(not isinstance(t, Value) for t in tensors):
        raise call.refuse("with a constant", "concatenate what the layers compute")
    return tensors
