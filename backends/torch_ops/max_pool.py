"""max_pool in torch."""

from __future__ import annotations

from functools import reduce
from itertools import product
from typing import Self

import attrs
import torch
import torch.nn.functional as F

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.max_pool import MaxPool


@attrs.frozen(eq=False, kw_only=True)
class MaxPoolLowering(Lowering[MaxPool]):
    """The library's window maximum, which rounds nothing; tap by tap where a device has none for integers."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(cls, use: Use[MaxPool]) -> Self:
        op = use.op
        return cls(dtype=use.dtype, kernel=op.kernel, stride=op.stride, padding=op.padding, dilation=op.dilation)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """Windows of the map, around which stands what no window chooses."""
        top, bottom, left, right = self.padding
        even = (top, left) == (bottom, right) and 2 * top <= self.kernel[0] and 2 * left <= self.kernel[1]
        whole = x[0].is_floating_point() or x[0].device.type == "cpu"
        padded = x[0]
        if any(self.padding) and not (even and whole):
            padded = F.pad(padded, (left, right, top, bottom), value=_lowest(padded.dtype))
        if not whole:
            return self._by_taps(padded)
        return F.max_pool2d(padded, self.kernel, self.stride, (top, left) if even else 0, self.dilation)

    def _by_taps(self, x: torch.Tensor) -> torch.Tensor:
        (kh, kw), (down, right), (dh, dw) = self.kernel, self.stride, self.dilation
        rows = (x.shape[2] - dh * (kh - 1) - 1) // down * down + 1
        columns = (x.shape[3] - dw * (kw - 1) - 1) // right * right + 1
        corners = ((u * dh, v * dw) for u, v in product(range(kh), range(kw)))
        return reduce(torch.maximum, (x[:, :, u : u + rows : down, v : v + columns : right] for u, v in corners))


def _lowest(dtype: torch.dtype) -> float:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min
