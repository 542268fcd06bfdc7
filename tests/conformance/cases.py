"""One-node modules and stored inputs at range ends and ties, for every backend's suite."""

from __future__ import annotations

import numpy as np

from spir.ir import Module, Node, Op, Origin, Value, infer
from spir.types import Int, Real, Spikes, Tensor, weights
from spir.verify import verify


def module_of(source: Tensor, *lines: tuple[str, Op, str]) -> Module:
    """A module from lines ``(result, op, "operand operand")`` on the input ``x``."""
    types, nodes = {"x": source}, []
    for result, op, operands in lines:
        read = tuple(operands.split())
        types[result] = infer(op, tuple(types[name] for name in read))
        nodes.append(Node(result, op, read, types[result], Origin("net." + result)))
    return verify(Module(Value("x", source), tuple(nodes), lines[-1][0]))


def stored_input(type_: Tensor, rng: np.random.Generator, n: int = 7) -> np.ndarray:
    """Random stored values of a type: both range ends first, then anything between."""
    encoding, shape = type_.encoding, (n, *type_.shape)
    if isinstance(encoding, Real):
        x = rng.integers(-4000, 4001, shape) / 8  # halves of quantize's steps, so ties are among them
        x[n // 2 :] += rng.standard_normal((n - n // 2, *type_.shape))
        return x
    value = rng.integers(encoding.lo, encoding.hi, shape, endpoint=True)
    value[0], value[1] = encoding.lo, encoding.hi
    if isinstance(encoding, Int):
        return value
    steps = encoding.steps
    if encoding.code == "bits" and isinstance(encoding, Spikes):
        frames = np.stack([(value >> (steps - 1 - t)) & 1 for t in range(steps)])
        frames[0] *= -1 if encoding.lo < 0 else 1
        return frames
    if encoding.code == "sorted":
        return np.stack([np.sign(value) * (np.abs(value) > t) for t in range(steps)])
    lo, hi = encoding.frame
    frames = rng.integers(lo, hi, (steps, *shape), endpoint=True)
    frames[:, 0], frames[:, 1] = lo, hi
    if encoding.code == "direct":
        frames[:] = frames[0]
    total = np.tensordot(np.array(weights(encoding.code, steps)), frames, axes=1)
    return frames * ((total >= encoding.lo) & (total <= encoding.hi))
