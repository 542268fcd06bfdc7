"""What a pass promises about values that keep their names, and how far the promise was checked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import attrs
import numpy as np

from spir.errors import error
from spir.types import Reals


@attrs.frozen
class Exact:
    """Every kept value decodes to the same numbers, bit for bit."""

    def __str__(self) -> str:
        return "exact"


@attrs.frozen
class Bounded:
    """Every kept value changes by at most ``relative`` x its largest magnitude; None: measured and printed only."""

    relative: float | None = None

    def __str__(self) -> str:
        return "bounded, measured" if self.relative is None else f"bounded({self.relative:g} relative)"


@attrs.frozen
class Calibrated:
    """Values change as the calibration data decided; the change is measured, not limited."""

    def __str__(self) -> str:
        return "calibrated"


Contract = Exact | Bounded | Calibrated


@attrs.frozen
class Change:
    """How one value differs before and after a pass: largest and mean absolute difference, largest magnitude before."""

    value: str
    largest: float
    mean: float
    magnitude: float

    @property
    def relative(self) -> float:
        """Largest difference over largest magnitude; 0 where nothing changed, infinite where that is no number."""
        if self.largest == 0:
            return 0.0
        ratio = self.largest / self.magnitude if self.magnitude else math.inf
        return math.inf if math.isnan(ratio) else ratio


def changes(before: Mapping[str, Reals], after: Mapping[str, Reals]) -> Iterator[Change]:
    """The change of every value that both sides name."""
    for name in before.keys() & after.keys():
        yield change(name, before[name], after[name])


def change(name: str, before: Reals, after: Reals) -> Change:
    """The change of one value; another shape is an infinite one."""
    magnitude = float(np.abs(before).max())
    if before.shape != after.shape:
        return Change(name, math.inf, math.inf, magnitude)
    difference = np.abs(before - after)
    return Change(name, float(difference.max()), float(difference.mean()), magnitude)


def check(contract: Contract, step: str, found: list[Change], probes: int) -> Change | None:
    """The worst change, after holding it against the promise.

    Raises:
        SpirError[contract]: the pass changed more than it promised.
    """
    worst = max(found, key=lambda change: (change.relative, change.value), default=None)
    limit = 0.0 if isinstance(contract, Exact) else contract.relative if isinstance(contract, Bounded) else None
    if worst is not None and limit is not None and worst.relative > limit:
        raise error(
            "contract",
            f"{step} promises {contract}, and %{worst.value} changed by {worst.largest:g} of {worst.magnitude:g}",
            checked=f"{probes} probes",
            fix="this is a bug of the pass: the reproducer shows it",
        )
    return worst
