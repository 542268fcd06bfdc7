"""conv2d in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch
import torch.nn.functional as F

from spir.backends.torch_ops._exactness import WideWeight, windows_product
from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.conv2d import Conv2d


@attrs.frozen(eq=False, kw_only=True)
class Conv2dLowering(Lowering[Conv2d]):
    """A library convolution; on integers outside the CPU a matrix product of windows, and limbs where sums are wide."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    wide: WideWeight | None
    by_windows: bool
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, use: Use[Conv2d]) -> Self:
        weight = use.weight(use.op.weight, use.op.weight_scale)
        if _channels_last(weight):
            weight = weight.contiguous(memory_format=torch.channels_last)
        return cls(
            dtype=use.dtype,
            weight=weight,
            bias=None if use.op.bias is None else use.tensor(use.op.bias),
            wide=WideWeight.of(weight) if use.dtype == torch.int64 else None,
            by_windows=not use.real and use.device.type != "cpu",
            stride=use.op.stride,
            padding=use.op.padding,
            dilation=use.op.dilation,
            groups=use.op.groups,
        )

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """The convolution, plus the bias on reals."""
        if self.wide is not None:
            return self.wide.product(x[0], self._convolve)
        return self._convolve(x[0], self.weight, self.bias)

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        top, bottom, left, right = self.padding
        even = (top, left) == (bottom, right) and not self.by_windows
        if not even and any(self.padding):
            x = F.pad(x, (left, right, top, bottom))
        if self.by_windows:
            return windows_product(x, weight, self.stride, self.dilation, self.groups)
        x = x.contiguous(memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format)
        return F.conv2d(x, weight, bias, self.stride, (top, left) if even else 0, self.dilation, self.groups)


def _channels_last(x: torch.Tensor) -> bool:
    """Whether channels go last in memory: float32 kernels on the CPU are up to twice as fast, float64 ones slower."""
    return x.dtype == torch.float32 and x.device.type == "cpu"
