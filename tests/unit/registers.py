"""What registers keep and lose, recounted element by element in Python integers, every frame stepped."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from spir.ir import Module
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops.clip import Clip
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.requant import Requant
from spir.types import Real, Spikes, weights


class Recount:
    """A run of a module on registers; ``counts`` holds overflows by value, register and channel."""

    def __init__(self, module: Module, sum_bits: int, state_bits: int, overflow: str) -> None:
        self.module, self.overflow = module, overflow
        self.bits = {"sum": sum_bits, "state": state_bits}
        self.counts: Counter[tuple[str, str, int]] = Counter()

    def register(self, name: str, which: str, raw: np.ndarray) -> np.ndarray:
        half, kept = 2 ** (self.bits[which] - 1), np.empty_like(raw)
        for at, number in np.ndenumerate(raw):
            value = int(number)
            if not -half <= value < half:
                self.counts[name, which, at[1]] += 1
                wrapped = (value + half) % (2 * half) - half
                value = wrapped if self.overflow == "wrap" else -half if value < 0 else half - 1
            kept[at] = value
        return kept

    def run(self, x: np.ndarray) -> dict[str, np.ndarray]:
        module = self.module
        held = {module.input.name: module.input.type.read(x)}
        for node in module.nodes:
            held[node.result] = self.step(node, [held[o] for o in node.operands])
        return held

    def step(self, node: Any, operands: list[np.ndarray]) -> np.ndarray:
        types, name, op = self.module.operand_types(node), node.result, node.op
        train = types[0].train
        if isinstance(op, LinearMap):
            found = op.reference(types, *operands)
            if isinstance(node.type.encoding, (Real, Spikes)) or op.relabels:
                return found
            if node.type.train is None:
                return self.register(name, "state", found)
            return np.stack([self.register(name, "sum", frame) for frame in found])
        if isinstance(op, Integrate):
            state = operands[0]
            if train is not None:
                state = self.total(name, op, operands[0], weights(train.code, train.steps))
            if op.bias is None:
                return state if train is not None else self.register(name, "state", state)
            bias = op.bias.values.reshape(-1, *(1,) * (state.ndim - 2)) if op.bias.values.ndim == 1 else op.bias.values
            return self.register(name, "state", state + bias)
        if isinstance(op, Neuron) and train is not None:
            return np.stack(list(op.fire(Space(self, name), iter(operands[0]))))
        if isinstance(op, Encode):
            lo, hi = (
                types[0].range.hull
                if op.code == "isi"
                else Spikes.limits(op.steps, op.code, signed=types[0].range.hull[0] < 0)
            )
            operands = [np.clip(operands[0], lo, hi)]
        if isinstance(op, (Neuron, Requant)) or (isinstance(op, Clip) and not isinstance(node.type.encoding, Real)):
            operands = [self.register(name, "state", operands[0])]
        return op.reference(types, *operands)

    def total(self, name: str, op: Any, frames: np.ndarray, factors: tuple[int, ...]) -> np.ndarray:
        shift = np.asarray(op.shift if isinstance(op.shift, int) else op.shift.values).reshape(-1)
        state = np.zeros_like(frames[0])
        for frame, factor in zip(frames, factors, strict=True):
            by = shift.reshape(-1, *(1,) * (frame.ndim - 2))
            state = self.register(name, "state", state + ((frame * factor + (2**by >> 1)) >> by))
        return state


class Space:
    """NumPy as neurons see it, on the registers of a recount."""

    where, zeros_like = staticmethod(np.where), staticmethod(np.zeros_like)

    def __init__(self, recount: Recount, name: str) -> None:
        self.recount, self.name = recount, name

    def hold(self, state: np.ndarray) -> np.ndarray:
        return self.recount.register(self.name, "state", state)

    @staticmethod
    def constant(array: Any, like: np.ndarray) -> np.ndarray:
        values = array.values
        return values if values.ndim > 1 else values.reshape(-1, *(1,) * (like.ndim - 2))


def flat(overflows: Any) -> dict[tuple[str, str, int], int]:
    """Counts of a backend by value, register and channel; zeros left out."""
    return {
        (name, which, channel): int(count)
        for (name, which), counts in overflows.items()
        for channel, count in enumerate(counts)
        if count
    }
