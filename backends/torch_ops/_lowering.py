"""What all torch lowerings share: constants become tensors once, and calls keep no state."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Generic, Self, TypeVar

import attrs
import torch

from spir.ir import Array, Op
from spir.types import Real, Tensor

OpT = TypeVar("OpT", bound=Op)


@attrs.frozen(eq=False)
class Use(Generic[OpT]):
    """One use of an op: its operands' types, and the numbers and the device that it computes with."""

    op: OpT
    types: tuple[Tensor, ...]
    dtype: torch.dtype | None
    """None where the op takes numbers as they come."""
    device: torch.device

    @property
    def real(self) -> bool:
        """Whether operands are reals, so that weights are real, sums are divided by their window and biases added."""
        return isinstance(self.types[0].encoding, Real)

    @property
    def rank(self) -> int:
        """Dimensions of the operand, without the batch."""
        return len(self.types[0].shape)

    def tensor(self, array: Array, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A constant as a tensor of its own, of the type that the op computes in unless another is asked for."""
        return torch.tensor(array.values, dtype=dtype or self.dtype, device=self.device)

    def constant(self, array: Array, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A constant that broadcasts over the operand."""
        return along_channels(self.tensor(array, dtype), self.rank)

    def weight(self, weight: Array, scale: Array | None) -> torch.Tensor:
        """Weights ``[O, ...]``: on reals what they stand for, on integers the integers."""
        if scale is None or not self.real:
            return self.tensor(weight)
        steps = self.tensor(scale, torch.float64).view(-1, *(1,) * (weight.values.ndim - 1))
        return (self.tensor(weight, torch.float64) * steps).to(self.dtype)


@attrs.frozen(eq=False, kw_only=True)
class Lowering(Generic[OpT]):
    """One op made ready for torch; it is found by the name of its file, which is the op's.

    A subclass gives ``of`` (constants to tensors) and ``map`` (one frame to one frame), or ``steps`` where frames are
    made or used up. On reals ``map`` is differentiable, and ``attrs.evolve(lowering, weight=...)`` puts a trainable
    parameter in.
    """

    dtype: torch.dtype | None = None
    """What operands are converted to; None leaves them as they come."""

    @classmethod
    def of(cls, use: Use[OpT]) -> Self:
        """The lowering of one use of an op, with its constants on the device."""
        return cls(dtype=use.dtype)

    def map(self, *x: torch.Tensor) -> torch.Tensor:
        """The op on one frame ``[N, *shape]`` of each operand; frames folded into the batch are as good."""
        raise NotImplementedError(f"{type(self).__name__}.map")  # abstract: an op that has frames only gives `steps`

    def __call__(self, *x: torch.Tensor) -> torch.Tensor:
        """`map` of converted operands."""
        return self.map(*(x if self.dtype is None else (frame.to(self.dtype) for frame in x)))

    def steps(self, *operands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The result's frames, one at a time; a value without time is one frame, a train that has ended is silent."""
        silent: dict[int, torch.Tensor] = {}
        for frames in itertools.zip_longest(*operands):
            silent |= {i: torch.zeros_like(f) for i, f in enumerate(frames) if f is not None and i not in silent}
            yield self(*(silent[i] if f is None else f for i, f in enumerate(frames)))


def along_channels(constant: torch.Tensor, rank: int) -> torch.Tensor:
    """A constant ``[1]``, ``[C]`` or of the full shape, made to broadcast over ``[N, C, ...]`` of ``rank`` + 1 axes."""
    return constant if constant.ndim > 1 else constant.view(-1, *(1,) * (rank - 1))
