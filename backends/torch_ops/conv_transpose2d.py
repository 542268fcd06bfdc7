"""conv_transpose2d in torch."""

from __future__ import annotations

from typing import Self

import attrs
import torch
import torch.nn.functional as F

from spir.backends.torch_ops._lowering import Lowering, Use
from spir.ops.conv_transpose2d import ConvTranspose2d


@attrs.frozen(eq=False, kw_only=True)
class ConvTranspose2dLowering(Lowering[ConvTranspose2d]):
    """The library's transposed convolution, grown and cut afterwards: its own padding is the same on both sides."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    extra: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, use: Use[ConvTranspose2d]) -> Self:
        op = use.op
        return cls(
            dtype=use.dtype,
            weight=use.tensor(op.weight),
            bias=None if op.bias is None else use.constant(op.bias),
            stride=op.stride,
            padding=op.padding,
            extra=op.extra,
            dilation=op.dilation,
            groups=op.groups,
        )

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """All of what the pixels spread, then the window of it that is asked for."""
        spread = F.conv_transpose2d(x[0], self.weight, None, self.stride, 0, 0, self.groups, self.dilation)
        grown = F.pad(spread, (0, self.extra[1], 0, self.extra[0])) if any(self.extra) else spread
        top, bottom, left, right = self.padding
        cut = grown[:, :, top : grown.shape[2] - bottom, left : grown.shape[3] - right]
        return cut if self.bias is None else cut + self.bias
