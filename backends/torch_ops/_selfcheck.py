"""Whether this machine's kernels, as they are set up now, keep integers exact."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from spir.backends.torch_ops._exactness import EXACT_FLOAT32, EXACT_FLOAT64, exact_dtype
from spir.backends.torch_ops._lowering import Lowering, Use
from spir.backends.torch_ops.conv2d import Conv2dLowering
from spir.backends.torch_ops.linear import LinearLowering
from spir.ir import Array
from spir.ops.conv2d import Conv2d
from spir.ops.linear import Linear
from spir.types import Int, Scale, Tensor

CHANNELS, SIDE, KERNEL = 16, 12, 3


@attrs.frozen
class Loss:
    """A kernel that does not return the integers it should."""

    kernel: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"a {self.kernel} in {str(self.dtype).removeprefix('torch.')}"


def losses(device: torch.device) -> list[Loss]:
    """The kernels that lose integers here: operands of 12 or 24 bits, sums close below 2^24 or 2^53.

    Reduced precision (TF32, bfloat16) and convolutions that transform their inputs both show.
    """
    found = []
    generator = torch.Generator().manual_seed(0)
    for bits, limit in ((12, EXACT_FLOAT32), (24, EXACT_FLOAT64)):
        largest = limit // 2**bits // (CHANNELS * KERNEL * KERNEL)
        x = torch.randint(0, 2**bits, (2, CHANNELS, SIDE, SIDE), generator=generator, device="cpu")
        w = torch.randint(
            -largest, largest + 1, (CHANNELS, CHANNELS, KERNEL, KERNEL), generator=generator, device="cpu"
        )
        windows = x.unfold(2, KERNEL, 1).unfold(3, KERNEL, 1)
        expected = torch.stack([(windows * row[:, None, None]).sum(dim=(1, 4, 5)) for row in w], dim=1)
        unit = Array.of([1.0])
        convolution = Conv2d(weight=Array.of(w.numpy()), weight_scale=unit)
        dtype = exact_dtype(limit - 1, device)
        use = Use(convolution, (_operand(x, bits),), dtype, device)
        if not _agrees(Conv2dLowering.of(use), x.to(device), expected):
            found.append(Loss("convolution", dtype))
        rows, columns = x.reshape(-1, w[0].numel()), w.flatten(1)
        expected = (rows[:, None] * columns).sum(dim=2)
        product = Linear(weight=Array.of(columns.numpy()), weight_scale=unit)
        if not _agrees(
            LinearLowering.of(Use(product, (_operand(rows, bits),), dtype, device)), rows.to(device), expected
        ):
            found.append(Loss("matrix product", dtype))
    return found


def _operand(x: torch.Tensor, bits: int) -> Tensor:
    return Tensor(tuple(x.shape[1:]), Int(0, 2**bits - 1, Scale.of(1.0)))


def _agrees(lowering: Lowering[Any], x: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(lowering(x).to("cpu", torch.int64), expected)
