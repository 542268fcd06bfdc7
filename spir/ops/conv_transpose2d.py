"""conv_transpose2d: a transposed 2-d convolution, computed by the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Array, Op
from spir.ops._host import real_operand
from spir.ops._linear import channelwise
from spir.types import Real, Shape, Stored, Tensor


@attrs.frozen
class ConvTranspose2d(Op):
    """Every pixel spreads ``weight`` ``[I, O/groups, kh, kw]`` around its place; legal where the host computes.

    ``padding`` (top, bottom, left, right) is cut off the result, after ``extra`` rows and columns were added at the
    bottom and right (torch's output_padding).
    """

    name: ClassVar[str] = "conv_transpose2d"
    host: ClassVar[bool] = True
    weight: Array
    bias: Array | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    extra: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def shape(self, shape: Shape) -> Shape:
        """``[I, H, W]`` to ``[O, H', W']``."""
        weight = self.weight.values
        if (
            len(shape) != 3
            or weight.ndim != 4
            or weight.shape[0] != shape[0]
            or self.groups < 1
            or shape[0] % self.groups
        ):
            raise error("type", f"weights {list(weight.shape)} in {self.groups} groups do not act on {list(shape)}")
        spread = [(n - 1) * s for n, s in zip(shape[1:], self.stride, strict=True)]
        kernel = [d * (k - 1) + 1 for d, k in zip(self.dilation, weight.shape[2:], strict=True)]
        height = spread[0] + kernel[0] + self.extra[0] - sum(self.padding[:2])
        width = spread[1] + kernel[1] + self.extra[1] - sum(self.padding[2:])
        if min(height, width, *self.stride, *self.dilation) < 1 or min(*self.padding, *self.extra) < 0:
            raise error("type", f"leaves {height}x{width} of {shape[1]}x{shape[2]}")
        return weight.shape[1] * self.groups, height, width

    def infer(self, *types: Tensor) -> Tensor:
        """Reals stay reals."""
        x = real_operand(*types)
        shape = self.shape(x.shape)
        if self.bias is not None and self.bias.values.shape != (shape[0],):
            raise error("type", f"bias has shape {list(self.bias.values.shape)}, not [{shape[0]}]")
        return Tensor(shape, Real())

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Tap by tap, added where it lands."""
        (x,), (channels, height, width) = stored, self.shape(types[0].shape)
        inputs, each, kh, kw = self.weight.values.shape
        top, bottom, left, right = self.padding
        whole: NDArray[Any] = np.zeros((len(x), channels, height + top + bottom, width + left + right))
        grouped = x.reshape(len(x), self.groups, inputs // self.groups, *x.shape[2:])
        split = self.weight.values.reshape(self.groups, inputs // self.groups, each, kh, kw)
        for u in range(kh):
            for v in range(kw):
                rows = slice(u * self.dilation[0], None, self.stride[0])
                columns = slice(v * self.dilation[1], None, self.stride[1])
                given = np.einsum("gio,ngihw->ngohw", split[..., u, v], grouped)
                given = given.reshape(len(x), channels, *x.shape[2:])
                whole[:, :, rows, columns][:, :, : x.shape[2], : x.shape[3]] += given
        found = whole[:, :, top : top + height, left : left + width]
        return found if self.bias is None else found + channelwise(self.bias.values, 3)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Strides with extra rows, padding, groups, dilation."""
        rng = np.random.default_rng(2)
        x = Tensor((4, 3, 2), Real())
        weight, bias = Array.of(rng.standard_normal((4, 3, 3, 2))), Array.of(rng.standard_normal(3))
        yield cls(weight=weight, bias=bias, stride=(2, 2), padding=(1, 1, 0, 0), extra=(1, 0)), (x,)
        yield cls(weight=Array.of(rng.standard_normal((4, 1, 2, 2))), groups=4, dilation=(2, 1)), (x,)
