"""Neurons on torch: the steps that the neuron's own file defines, on 64-bit integer state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import attrs
import torch

from spir.backends.torch_ops._lowering import Lowering, Use, along_channels
from spir.ir import Array
from spir.ops._neuron import ArrayNamespace, Neuron


@attrs.frozen(eq=False, kw_only=True)
class TorchNamespace(ArrayNamespace):
    """torch as neurons see it; constants of the neuron stand ready on the device."""

    constants: dict[Array, torch.Tensor]

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """Elementwise choice; between two numbers a product is faster than a choice."""
        if not isinstance(x, int) or not isinstance(y, int):
            return torch.where(condition, x, y)
        chosen = condition.to(torch.int64)
        scaled = chosen if x - y == 1 else chosen * (x - y)
        return scaled if y == 0 else scaled + y

    def zeros_like(self, x: Any) -> Any:
        """Zeros of the same shape and type."""
        return torch.zeros_like(x)

    def hold(self, state: Any) -> Any:
        """As it is: 64 bits hold every state that ranges allow."""
        return state

    def constant(self, array: Array, like: Any) -> Any:
        """The ready constant, or a new one for an array that is no field of the neuron."""
        ready = self.constants.get(array)
        if ready is not None:
            return ready
        return along_channels(torch.tensor(array.values, device=like.device), like.ndim - 1)


@attrs.frozen(eq=False, kw_only=True)
class Firing(Lowering[Neuron]):
    """A neuron, any neuron, stepped."""

    op: Neuron
    namespace: TorchNamespace

    @classmethod
    def of(cls, use: Use[Neuron]) -> Self:
        constants = {array: use.constant(array, torch.int64) for array in use.op.arrays().values()}
        return cls(dtype=torch.int64, op=use.op, namespace=TorchNamespace(constants=constants))

    def steps(self, *operands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        (currents,) = operands
        return self.op.fire(self.namespace, (current.to(torch.int64) for current in currents))
