"""Readers of layers: convolution, linear, batch norm, activations, dropout, and what the host computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from spir.frontends._arithmetic import shift, times
from spir.frontends._reading import Call
from spir.ir import Array, Value
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.conv2d import Conv2d
from spir.ops.conv_transpose2d import ConvTranspose2d
from spir.ops.linear import Linear
from spir.ops.permute import Permute
from spir.ops.qcfs import Qcfs
from spir.ops.relu import Relu
from spir.ops.sigmoid import Sigmoid
from spir.ops.softmax import Softmax
from spir.ops.tanh import Tanh

Sizes = int | Sequence[int]


def pair(value: Sizes) -> tuple[int, int]:
    """One number for both axes, or one each."""
    both = (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
    return int(both[0]), int(both[1])


def single(value: Sizes) -> int:
    """The number for the one axis there is."""
    return int(value) if isinstance(value, int) else int(value[0])


# --- linear layers ------------------------------------------------------------------------------------------------


def conv2d(
    call: Call,
    x: Value,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: str | Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Value:
    call.image(x)
    _zeros(call, padding_mode)
    op = Conv2d(
        weight=call.array(weight),
        bias=call.optional(bias),
        stride=pair(stride),
        padding=_around(padding, tuple(weight.shape[2:]), pair(dilation)),
        dilation=pair(dilation),
        groups=groups,
    )
    return call.emit(op, x)


def conv1d(
    call: Call,
    x: Value,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: str | Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Value:
    _zeros(call, padding_mode)
    row = call.line(x)
    kernel = call.array(weight)  # refuses what is no tensor
    ends = padding if isinstance(padding, str) else (0, single(padding))
    op = Conv2d(
        weight=Array.of(kernel.values[:, :, None]),
        bias=call.optional(bias),
        stride=(1, single(stride)),
        padding=_around(ends, (1, int(weight.shape[2])), (1, single(dilation))),
        dilation=(1, single(dilation)),
        groups=groups,
    )
    return call.reshaped(call.emit(op, row), call.shape)


def _zeros(call: Call, padding_mode: str) -> None:
    if padding_mode != "zeros":
        raise call.refuse(f"with padding_mode={padding_mode!r}", "train with padding_mode='zeros'")


def _around(padding: str | Sizes, kernel: tuple[int, ...], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, bottom, left and right; ``same`` puts what is odd at the end, as torch does."""
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        top, left = (total // 2 for total in totals)
        return top, totals[0] - top, left, totals[1] - left
    rows, columns = pair(0 if isinstance(padding, str) else padding)
    return rows, rows, columns, columns


def linear(call: Call, x: Value, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Value:
    shape = x.type.shape
    if len(shape) == 1:
        return call.emit(Linear(weight=call.array(weight), bias=call.optional(bias)), x)
    axes = tuple(range(len(shape)))
    front = call.beside(Permute(order=(axes[-1], *axes[:-1])), x)
    image = call.reshaped(front, (shape[-1], shape[0] if len(shape) > 2 else 1, math.prod(shape[1:-1] or shape[:1])))
    kernel = Array.of(call.array(weight).values[:, :, None, None])
    found = call.emit(Conv2d(weight=kernel, bias=call.optional(bias)), image)
    back = call.reshaped(found, (call.shape[-1], *shape[:-1]))
    return call.beside(Permute(order=(*axes[1:], 0)), back)


def matmul(call: Call, x: Any, other: Any) -> Value:
    if not isinstance(x, Value) or not isinstance(other, torch.Tensor) or other.ndim != 2:
        raise call.refuse("of such operands", "multiply samples by a constant matrix on the right: x @ weight")
    call.array(other)  # a refusal names the parameter
    return linear(call, x, other.t())


def batch_norm(
    call: Call,
    x: Value,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    del momentum  # moves the statistics in training only
    if training or running_mean is None or running_var is None:
        fix = "keep running statistics: track_running_stats=True, or training=self.training in the functional form"
        raise call.refuse("by the statistics of the batch", fix)
    op = BatchNorm(
        mean=call.array(running_mean),
        var=call.array(running_var),
        eps=float(eps),
        weight=call.optional(weight),
        bias=call.optional(bias),
    )
    return call.emit(op, x)


def torch_batch_norm(
    call: Call,
    x: Value,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Value:
    del cudnn_enabled  # how, not what
    return batch_norm(call, x, running_mean, running_var, weight, bias, training, momentum, eps)


# --- activations --------------------------------------------------------------------------------------------------


def relu(call: Call, x: Value, inplace: bool = False) -> Value:
    del inplace  # seen when the trace ran
    return call.emit(Relu(), x)


def relu6(call: Call, x: Value, inplace: bool = False) -> Value:
    return hardtanh(call, x, 0.0, 6.0, inplace)


def hardtanh(call: Call, x: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Value:
    del inplace  # seen when the trace ran
    return clamp(call, x, min_val, max_val)


def clamp(
    call: Call,
    x: Value,
    min: float | torch.Tensor | None = None,  # noqa: A002 - the name in torch
    max: float | torch.Tensor | None = None,  # noqa: A002 - the name in torch
) -> Value:
    lo, hi = _end(call, min, -math.inf), _end(call, max, math.inf)
    if not lo < hi:
        raise call.refuse(f"from {lo:g} to {hi:g}", "give a lower end that is below the upper end")
    if math.isinf(hi):
        return x if math.isinf(lo) else at_least(call, x, lo)
    if math.isinf(lo):  # min(x, c) = c - max(c - x, 0)
        return shift(call, times(call, relu(call, shift(call, times(call, x, -1), hi)), -1), hi)
    return call.emit(Clip(lo=Array.of([lo]), hi=Array.of([hi])), x)


def _end(call: Call, given: float | torch.Tensor | None, missing: float) -> float:
    if given is None:
        return missing
    if isinstance(given, Value) or (isinstance(given, torch.Tensor) and given.numel() != 1):
        raise call.refuse("to ends that are tensors", "give one number for each end")
    return float(given)


def clamp_min(call: Call, x: Value, min: float | torch.Tensor) -> Value:  # noqa: A002 - the name in torch
    return clamp(call, x, min)


def clamp_max(call: Call, x: Value, max: float | torch.Tensor) -> Value:  # noqa: A002 - the name in torch
    return clamp(call, x, None, max)


def threshold(call: Call, x: Value, threshold: float, value: float, inplace: bool = False) -> Value:
    del inplace  # seen when the trace ran
    if threshold != value:
        raise call.refuse(f"at {threshold:g} to {value:g}, which jumps,", "use ReLU, or one number for both")
    return at_least(call, x, float(value))


def at_least(call: Call, x: Value, floor: Any) -> Value:
    """``max(x, c) = c + max(x - c, 0)`` for a constant."""
    return shift(call, relu(call, shift(call, x, floor, -1)), floor)


def qcfs(call: Call, x: Value, levels: int, threshold: torch.Tensor) -> Value:
    return call.emit(Qcfs(levels=levels, threshold=call.array(threshold.reshape(1), threshold)), x)


def same(call: Call, x: Value, *how: object, **named: object) -> Value:
    del call, how, named  # what they change is no value
    return x


def identity(call: Call, x: Value) -> Value:
    del call  # nothing is emitted
    return x


def dropout(call: Call, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    del inplace  # nothing is written
    if training and p:
        raise call.refuse("with training=True", "write training=self.training, so that it rests after training")
    return x


def torch_dropout(call: Call, x: Value, p: float, train: bool) -> Value:
    return dropout(call, x, p, train)


# --- what the host computes ---------------------------------------------------------------------------------------


def sigmoid(call: Call, x: Value) -> Value:
    return call.host(Sigmoid(), x)


def tanh(call: Call, x: Value) -> Value:
    return call.host(Tanh(), x)


def softmax(call: Call, x: Value, dim: int | None = None, _stacklevel: int = 3, dtype: object = None) -> Value:
    del _stacklevel, dtype  # a cast was refused before
    return _normalised(call, x, dim, log=False)


def log_softmax(call: Call, x: Value, dim: int | None = None, _stacklevel: int = 3, dtype: object = None) -> Value:
    del _stacklevel, dtype  # a cast was refused before
    return _normalised(call, x, dim, log=True)


def softmax2d(call: Call, x: Value) -> Value:
    return _normalised(call, x, -3, log=False)


def _normalised(call: Call, x: Value, dim: int | None, *, log: bool) -> Value:
    rank = len(x.type.shape) + 1
    axis = (0 if rank == 3 else 1) if dim is None else dim % rank  # torch's choice for None
    if not axis:
        raise call.refuse("over the batch axis", "give the dimension of the classes: dim=1")
    return call.host(Softmax(axis=axis - 1, log=log), x)


def conv_transpose2d(
    call: Call,
    x: Value,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Value:
    call.image(x)
    rows, columns = pair(padding)
    op = ConvTranspose2d(
        weight=call.array(weight),
        bias=call.optional(bias),
        stride=pair(stride),
        padding=(rows, rows, columns, columns),
        extra=pair(output_padding),
        dilation=pair(dilation),
        groups=groups,
    )
    return call.host(op, x)
