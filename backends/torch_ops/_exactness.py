"""Where integers may ride on floating-point kernels, and what takes over where they may not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Self

import attrs
import torch
import torch.nn.functional as F

from spir.ops._linear import LinearMap
from spir.types import Interval, Shape

EXACT_FLOAT32 = 2**24
EXACT_FLOAT64 = 2**53
WORD = 64


def exact_dtype(magnitude: int, device: torch.device) -> torch.dtype:
    """The fastest type that holds every integer up to a proved magnitude, partial sums included.

    Off the CPU float32 is left out, because products there may run in TF32.
    """
    if magnitude < EXACT_FLOAT32 and device.type == "cpu":
        return torch.float32
    return torch.float64 if magnitude < EXACT_FLOAT64 else torch.int64


def sum_dtype(
    op: LinearMap, shapes: tuple[Shape, ...], operands: Sequence[Interval], device: torch.device
) -> torch.dtype:
    """The fastest type that holds every partial sum of operands in proved ranges, and the operands."""
    spans = [operand.with_zero() for operand in operands]  # so no partial sum leaves the bounds
    return exact_dtype(max(op.bounds(shapes, *spans).magnitude, *(span.magnitude for span in spans)), device)


@attrs.frozen(eq=False)
class WideWeight:
    """Integer weights for sums beyond 2^53: both factors are cut into limbs whose products are exact in float64.

    ``w = sum_i limbs[i] 2^(weight_bits i)``, operands alike. Shifted products are added modulo 2^64, which is exact
    because the result is proved to fit.
    """

    limbs: tuple[torch.Tensor, ...]
    weight_bits: int
    operand_bits: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """From int64 weights ``[O, ...]``, each row of which makes one sum."""
        terms = math.prod(weight.shape[1:])
        room = EXACT_FLOAT64.bit_length() - 1 - terms.bit_length()
        wanted = int(weight.abs().max()).bit_length() + 1
        bits = min(wanted, room // 2)
        return cls(tuple(_cut(weight, bits, math.ceil(wanted / bits))), bits, room - bits)

    def product(self, x: torch.Tensor, multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``multiply(x, weight)`` in int64, where ``multiply`` is linear in both and exact below 2^53."""
        parts = _cut(x, self.operand_bits, math.ceil(WORD / self.operand_bits))
        shifted = (
            multiply(part, limb).to(torch.int64) << (i * self.operand_bits + j * self.weight_bits)
            for i, part in enumerate(parts)
            for j, limb in enumerate(self.limbs)
            if i * self.operand_bits + j * self.weight_bits < WORD
        )
        total = next(shifted)
        for term in shifted:
            total = total + term
        return total


def _cut(x: torch.Tensor, bits: int, count: int) -> list[torch.Tensor]:
    """Limbs of two's complement, lowest first, as float64: all but the last lie in 0..2^bits-1."""
    lower = [(x >> (bits * i)) & (2**bits - 1) for i in range(count - 1)]
    return [limb.to(torch.float64) for limb in (*lower, x >> (bits * (count - 1)))]


def windows_product(
    x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], dilation: tuple[int, int], groups: int
) -> torch.Tensor:
    """A convolution as one matrix product a group, for devices whose convolution algorithms transform their inputs."""
    outputs, inputs, kh, kw = weight.shape
    height = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    width = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    windows = F.unfold(x, (kh, kw), dilation=dilation, stride=stride)
    seen = windows.view(len(x), groups, inputs * kh * kw, height * width)
    product = weight.reshape(groups, outputs // groups, -1) @ seen
    return product.view(len(x), outputs, height, width)
