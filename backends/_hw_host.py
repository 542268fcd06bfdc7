"""What the host computes for `hw` before the first quantiser and behind a readout: reals, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spir.ir import Op
from spir.ops.conv_transpose2d import ConvTranspose2d
from spir.ops.product import Product
from spir.ops.sigmoid import Sigmoid
from spir.ops.softmax import Softmax
from spir.ops.tanh import Tanh

Reals = NDArray[np.float64]
HOST = (ConvTranspose2d, Product, Sigmoid, Softmax, Tanh)


def compute(op: Op, out: NDArray[Any], *x: Reals) -> None:
    """Writes the result of one of `HOST` for operands ``[N, *shape]``."""
    match op:
        case Sigmoid():
            _logistic(out, x[0])
        case Tanh():
            np.tanh(x[0], out=out)
        case Product():
            np.multiply(x[0], x[1], out=out)
        case Softmax(axis=axis, log=log):
            _softmax(out, x[0], axis + 1, log=log)
        case ConvTranspose2d():
            _spread(op, out, x[0])


def _logistic(out: NDArray[Any], x: Reals) -> None:
    """``exp(min(x, 0)) / (1 + exp(-|x|))``: no exponential exceeds 1."""
    np.divide(np.exp(np.minimum(x, 0)), 1 + np.exp(-np.abs(x)), out=out)


def _softmax(out: NDArray[Any], x: Reals, axis: int, *, log: bool) -> None:
    np.subtract(x, x.max(axis=axis, keepdims=True), out=out)
    powers = np.exp(out)
    total = powers.sum(axis=axis, keepdims=True)
    if log:
        np.subtract(out, np.log(total), out=out)
    else:
        np.divide(powers, total, out=out)


def _spread(op: ConvTranspose2d, out: NDArray[Any], x: Reals) -> None:
    """One product a group and tap; the part that lands inside the result is added there."""
    inputs, each, kh, kw = op.weight.values.shape
    size, (top, _, left, _) = inputs // op.groups, op.padding
    out[...] = 0 if op.bias is None else op.bias.values[:, None, None]
    for group, u, v in np.ndindex(op.groups, kh, kw):
        matrix = op.weight.values[group * size : (group + 1) * size, :, u, v]
        given = np.tensordot(x[:, group * size : (group + 1) * size], matrix, axes=(1, 0))
        rows, from_rows = _landing(x.shape[2], out.shape[2], u * op.dilation[0] - top, op.stride[0])
        columns, from_columns = _landing(x.shape[3], out.shape[3], v * op.dilation[1] - left, op.stride[1])
        place = out[:, group * each : (group + 1) * each, rows, columns]
        np.add(place, np.moveaxis(given, -1, 1)[:, :, from_rows, from_columns], out=place)


def _landing(given: int, size: int, at: int, stride: int) -> tuple[slice, slice]:
    """Where pixels 0, 1, .. that land at ``at``, ``at + stride``, .. fall inside a row, and which pixels these are."""
    first = max(0, -(at // stride))
    stop = max(first, min(given, (size - 1 - at) // stride + 1))
    start = at + first * stride
    return slice(start, start + (stop - first) * stride, stride), slice(first, stop)
