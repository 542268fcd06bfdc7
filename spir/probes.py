"""Inputs on which contracts are checked: corners, ties, range ends, random and calibration samples."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.ir import Module
from spir.ops.encode import sort
from spir.ops.quantize import Quantize
from spir.types import SORTED, Real, Stored, Tensor, Train, weights

CALIBRATION = 4
RANDOM = 2


@attrs.frozen(eq=False)
class Probes:
    """A batch of inputs as `Tensor.read` takes them, ``[P, *shape]``, and how many are of which kind."""

    x: Stored
    kinds: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return sum(count for _, count in self.kinds)

    def __str__(self) -> str:
        return f"{len(self)} probes ({', '.join(f'{count} {kind}' for kind, count in self.kinds)})"


def input_scales(module: Module) -> tuple[float, ...]:
    """The steps of the quantisers that read the input directly: ties lie halfway between them."""
    return tuple(n.op.scale for n in module.readers[module.input.name] if isinstance(n.op, Quantize))


def make(module: Module, data: NDArray[Any] | None, scales: tuple[float, ...], seed: int) -> Probes:
    """Probes for a module's input.

    Args:
        module: only its input shape counts.
        data: calibration samples ``[N, *shape]``; their range is the range of real probes (else -1..1).
        scales: steps of input quantisers, for ties.
        seed: of the random probes.
    """
    if not isinstance(module.input.type.encoding, Real):
        return _discrete(module.input.type, data, np.random.default_rng(seed))
    shape = module.input.type.shape
    rng = np.random.default_rng(seed)
    lo, hi = (-1.0, 1.0) if data is None else (float(data.min()), float(data.max()))
    step = np.indices(shape).sum(axis=0) % 2
    found: dict[str, list[NDArray[Any]]] = {
        "corners": [np.zeros(shape), np.where(step == 0, lo, hi)],
        "range ends": [np.full(shape, lo), np.full(shape, hi)],
        "random": [rng.uniform(lo, hi, shape) for _ in range(RANDOM)],
        "out of range": [rng.normal(0, 2 * max(abs(lo), abs(hi)), shape)],
        "ties": [(np.floor(rng.uniform(lo, hi, shape) / s) + 0.5) * s for s in scales],
        "calibration": [] if data is None else list(data[:CALIBRATION]),
    }
    x = np.stack([np.asarray(p, dtype=np.float64) for probes in found.values() for p in probes])
    return Probes(x, tuple((kind, len(probes)) for kind, probes in found.items() if probes))


def _discrete(type_: Tensor, data: NDArray[Any] | None, rng: np.random.Generator) -> Probes:
    """Integers from end to end of the input's range, as numbers or in frames."""
    assert not isinstance(type_.encoding, Real)  # make draws those
    lo, hi = type_.encoding.lo, type_.encoding.hi
    alternate = np.indices(type_.shape).sum(axis=0) % 2
    least = np.full(type_.shape, max(lo, min(hi, 0)))
    found = {
        "corners": [least, np.where(alternate == 0, lo, hi)],
        "range ends": [np.full(type_.shape, lo), np.full(type_.shape, hi)],
        "random": [rng.integers(lo, hi, type_.shape, endpoint=True) for _ in range(RANDOM)],
        "calibration": [] if data is None or type_.train is not None else list(data[:CALIBRATION]),
    }
    values = np.stack([np.asarray(probe) for probes in found.values() for probe in probes])
    kinds = tuple((kind, len(probes)) for kind, probes in found.items() if probes)
    return Probes(values if type_.train is None else framed(type_.train, values), kinds)


def framed(train: Train, values: NDArray[Any]) -> NDArray[np.int64]:
    """Frames ``[T, *]`` that decode to ``values`` where the frame range permits; those of a direct code are equal."""
    if train.code in SORTED:
        return sort(values.astype(np.int64), train.steps, train.code)
    if train.code == "direct":
        return np.stack([np.sign(values) * (np.abs(values) // train.steps)] * train.steps)
    factors = weights(train.code, train.steps)
    left, frames = values.astype(np.int64), []
    for t, (factor, (low, high)) in enumerate(zip(factors, train.frames, strict=True)):
        below = sum(w * a for w, (a, _) in zip(factors[t + 1 :], train.frames[t + 1 :], strict=True))
        above = sum(w * b for w, (_, b) in zip(factors[t + 1 :], train.frames[t + 1 :], strict=True))
        nearest = np.clip(0, -((above - left) // factor), (left - below) // factor)  # later frames make up for the rest
        frames.append(frame := np.clip(nearest, low, high))
        left = left - factor * frame
    return np.stack(frames)
