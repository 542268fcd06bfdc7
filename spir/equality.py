"""Counts where two networks differ: decoded integers, value by value, element by element."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from spir import batches, interpreter
from spir.backend import Executable
from spir.errors import error
from spir.ir import Module
from spir.types import Stored, Tensor, scale_of


@attrs.frozen
class Agreement:
    """One value that both networks name: elements compared, elements that differ, elements that are not 0."""

    value: str
    elements: int
    mismatches: int
    active: int


def shared(reference: Module, candidate: Module) -> tuple[str, ...]:
    """The integer carriers that both modules name, in the reference's order.

    Raises:
        SpirError[type]: a shared name with another shape or scale; SpirError[usage]: nothing is shared.
    """
    names = []
    for name, type_ in reference.types.items():
        other = candidate.types.get(name)
        if other is None or "real" in (str(type_.encoding), str(other.encoding)):
            continue
        if other.shape != type_.shape or scale_of(other) != scale_of(type_):
            raise error("type", f"%{name} is {type_} in one network and {other} in the other")
        names.append(name)
    if not names:
        raise error("usage", "the two networks share no integer value", fix="compare stages of one compilation")
    return tuple(names)


def compare(
    reference: Module,
    candidate: Module,
    executable: Executable,
    x: NDArray[Any],
    *,
    batch: int = 50,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[Agreement, ...]:
    """Runs the reference interpreter on one module and an executable on the other, on every sample of ``x``.

    Args:
        reference: the integer network, run by the interpreter.
        candidate: the module behind ``executable``.
        executable: what is being checked.
        x: ``[N, *shape]``.
        batch: samples at a time.
        progress: called with the number of samples done.

    Raises:
        SpirError: as `shared`.
    """
    names = shared(reference, candidate)
    keep = "|".join(names)
    totals = {name: [0, 0, 0] for name in names}
    done = 0
    for part in batches.cut(reference, x, batch):
        wanted = interpreter.run(reference, part, keep)
        found = executable.run(part, keep)
        for name in names:
            a = _integers(reference.types, wanted, name)
            b = _integers(candidate.types, found, name)
            for index, count in enumerate((a.size, int((a != b).sum()), int((a != 0).sum()))):
                totals[name][index] += count
        del wanted, found  # before the next batch makes its own
        progress(done := done + batches.count(reference, part))
    return tuple(Agreement(name, *counts) for name, counts in totals.items())


def _integers(types: Mapping[str, Tensor], stored: Mapping[str, Stored], name: str) -> NDArray[np.int64]:
    return types[name].integers(np.asarray(stored[name], dtype=np.int64))
