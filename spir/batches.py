"""Batches that fit in memory: how much the values of a sample take, and how inputs are cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from numpy.typing import NDArray

from spir.ir import Module
from spir.types import Tensor

WORD = 8
"""Bytes of a stored number, int64 or float64."""


def bytes_of(types: Iterable[Tensor]) -> int:
    """What stored values of these types take for one sample, every frame counted."""
    return sum(WORD * t.size * t.steps for t in types)


def bytes_per_sample(*modules: Module) -> int:
    """What all stored values of one sample take: no run holds more."""
    return sum(bytes_of(module.types.values()) for module in modules)


def at_once(budget: int, *modules: Module) -> int:
    """How many samples all modules may run on within ``budget`` bytes; one at least."""
    return max(1, budget // bytes_per_sample(*modules))


def count(module: Module, x: NDArray[Any]) -> int:
    """Samples of an input ``[N, *shape]``, or ``[T, N, *shape]`` where the module reads trains."""
    return int(x.shape[_axis(module)])


def cut(module: Module, x: NDArray[Any], size: int) -> Iterator[NDArray[Any]]:
    """An input in batches of ``size`` samples; the last may hold fewer."""
    for start in range(0, count(module, x), size):
        chosen = slice(start, start + size)
        yield x[:, chosen] if _axis(module) else x[chosen]


def _axis(module: Module) -> int:
    return 0 if module.input.type.train is None else 1
