"""Readers of sums, differences, products, quotients and maxima, of tensors and of constants."""

from __future__ import annotations

from typing import Any

import torch

from spir.frontends._reading import Call
from spir.ir import Array, Value
from spir.ops.add import Add
from spir.ops.product import Product
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.types import Shape

_LARGEST_FACTOR = 2**31


def add(call: Call, x: Any, other: Any, alpha: float = 1) -> Value:
    if not isinstance(x, Value):
        return shift(call, times(call, other, alpha), x)
    if not isinstance(other, Value):
        return shift(call, x, other, alpha)
    _one_shape(call, x, other)
    return call.emit(Add(), x, times(call, other, alpha))


def sub(call: Call, x: Any, other: Any, alpha: float = 1) -> Value:
    return add(call, x, other, -alpha)


def rsub(call: Call, x: Any, other: Any, alpha: float = 1) -> Value:
    return add(call, other, x, -alpha)


def neg(call: Call, x: Value) -> Value:
    return times(call, x, -1)


def mul(call: Call, x: Any, other: Any) -> Value:
    if not isinstance(x, Value) or not isinstance(other, Value):
        return times(call, x, other) if isinstance(x, Value) else times(call, other, x)
    gate = call.refuse("of two activations", "multiply by constants only: gates do not convert")
    if x.type.shape != other.type.shape:
        raise gate
    return call.host(Product(), x, other, refusal=gate)


def div(call: Call, x: Any, other: Any, rounding_mode: str | None = None) -> Value:
    if isinstance(other, Value):
        raise call.refuse("by an activation", "divide by constants only")
    if rounding_mode is not None:
        raise call.refuse(f"with rounding_mode={rounding_mode!r}", "divide without rounding")
    inverse = 1.0 / _constant(call, other)
    return times(call, x, inverse if isinstance(other, torch.Tensor) else float(inverse), source=other)


def maximum(call: Call, x: Any, other: Any = None, dim: int | None = None, keepdim: bool = False) -> Value:
    del keepdim  # goes with a dimension
    if isinstance(other, int) or dim is not None:
        raise call.refuse("over a dimension", "take the largest value over height and width: x.amax((2, 3))")
    x, other = (other, x) if isinstance(other, Value) else (x, other)
    if not isinstance(other, Value):  # max(x, c) = c + max(x - c, 0)
        return shift(call, call.emit(Relu(), shift(call, x, other, -1)), other)
    _one_shape(call, x, other)
    above = call.emit(Relu(), call.emit(Add(), other, times(call, x, -1)))
    return call.emit(Add(), x, above)


def minimum(call: Call, x: Any, other: Any = None, dim: int | None = None, keepdim: bool = False) -> Value:
    del keepdim  # goes with a dimension
    if isinstance(other, int) or dim is not None:
        raise call.refuse("over a dimension", "take the smallest value of two tensors")
    x, other = (x, other) if isinstance(x, Value) else (other, x)
    if not isinstance(other, Value):  # min(x, c) = c - max(c - x, 0)
        below = call.emit(Relu(), shift(call, times(call, x, -1), other))
        return shift(call, times(call, below, -1), other)
    _one_shape(call, x, other)
    above = call.emit(Relu(), call.emit(Add(), x, times(call, other, -1)))
    return call.emit(Add(), x, times(call, above, -1))


def zeros_like(call: Call, x: Value) -> Value:
    return times(call, x, 0.0)


# --- constants ----------------------------------------------------------------------------------------------------


def shift(call: Call, x: Value, offset: Any, alpha: float = 1) -> Value:
    """``x + alpha * offset``: one number, one per channel, or one per element; 0 changes nothing."""
    constant = alpha * _constant(call, offset)
    if not constant.count_nonzero():
        return x
    return call.emit(Shift(offset=call.array(_aligned(call, x, constant), source=offset)), x)


def times(call: Call, x: Value, factor: Any, source: object = None) -> Value:
    """``factor * x``: one number, one per channel, or a whole number per element; 1 changes nothing."""
    if isinstance(factor, int | float) and factor == 1:
        return x
    constant = _aligned(call, x, _constant(call, factor))
    if constant.ndim == 1:
        return call.emit(Scaling(factor=call.array(constant, source=factor if source is None else source)), x)
    if not (constant == constant.round()).all() or constant.abs().max() > _LARGEST_FACTOR:
        raise call.refuse(
            f"by a constant of shape {list(torch.as_tensor(factor).shape)}",
            "give one factor, or one per channel: [C, 1, 1]",
        )
    return call.emit(Scaling(factor=Array.of(constant.numpy().astype("int64"))), x)


def _constant(call: Call, given: Any) -> torch.Tensor:
    if not isinstance(given, int | float | torch.Tensor):
        raise call.refuse(f"with a {type(given).__name__}", "compute with tensors and numbers")
    return torch.as_tensor(given, dtype=torch.float64).detach().cpu()


def _aligned(call: Call, x: Value, constant: torch.Tensor) -> torch.Tensor:
    """The constant as ``[1]``, ``[C]`` or ``[C, ...]`` of the full shape."""
    shape = x.type.shape
    if constant.numel() == 1:
        return constant.reshape(1)
    whole = constant.reshape((1,) * (len(shape) + 1 - constant.ndim) + tuple(constant.shape))
    if call.shape != shape or whole.ndim != len(shape) + 1 or whole.shape[0] != 1:
        raise _broadcast(call, shape, tuple(constant.shape))
    if whole.numel() == whole.shape[1]:
        return whole.reshape(-1)
    return whole[0].broadcast_to(shape)


def _one_shape(call: Call, x: Value, other: Value) -> None:
    if x.type.shape != other.type.shape:
        raise _broadcast(call, x.type.shape, other.type.shape)


def _broadcast(call: Call, one: Shape, other: Shape) -> Exception:
    shapes = f"{list(one)} and {list(other)}"
    return call.refuse(f"of samples of shapes {shapes}", "bring both operands to one shape: nothing is broadcast")
