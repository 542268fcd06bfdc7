"""What a pass promises about values that keep their names, and how far the promise was checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

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
    """How one value differs before and after a pass: largest and mean absolute difference, largest magnitude before.

    ``elements`` says how many numbers were compared.
    """

    value: str
    largest: float
    mean: float
    magnitude: float
    elements: int = 1

    @property
    def relative(self) -> float:
        """Largest difference over largest magnitude; 0 where nothing changed, infinite where that is no number."""
        if self.largest == 0:
            return 0.0
        ratio = self.largest / self.magnitude if self.magnitude else math.inf
        return math.inf if math.isnan(ratio) else ratio

    def __add__(self, other: Change) -> Change:
        """The change over the numbers of both."""
        elements = self.elements + other.elements
        return Change(
            self.value,
            float(np.maximum(self.largest, other.largest)),  # unlike max, it hands NaN on
            self.mean + (other.mean - self.mean) * (other.elements / elements)
            if math.isfinite(self.mean + other.mean)
            else math.inf,
            float(np.maximum(self.magnitude, other.magnitude)),
            elements,
        )


def changes(before: Mapping[str, Reals], after: Mapping[str, Reals]) -> Iterator[Change]:
    """The change of every value that both sides name."""
    for name in before.keys() & after.keys():
        yield change(name, before[name], after[name])


def change(name: str, before: Reals, after: Reals) -> Change:
    """The change of one value; another shape is an infinite one."""
    magnitude = float(np.abs(before).max())
    if before.shape != after.shape:
        return Change(name, math.inf, math.inf, magnitude, before.size)
    difference = np.abs(before - after)
    return Change(name, float(difference.max()), float(difference.mean()), magnitude, before.size)


def worst(found: Iterable[Change]) -> Change | None:
    """The largest relative change."""
    return max(found, key=lambda change: (change.relative, change.value), default=None)


def check(contract: Contract, step: str, found: Iterable[Change], checked: str) -> Change | None:
    """The worst change, after holding it against the promise; ``checked`` says on what.

    Raises:
        SpirError[contract]: the pass changed more than it promised, or lost a value's shape or numbers.
    """
    measured = list(found)
    lost = (change for change in measured if not math.isfinite(change.largest))
    limit = 0.0 if isinstance(contract, Exact) else contract.relative if isinstance(contract, Bounded) else None
    most = next(lost, worst(measured))
    if most is not None and (not math.isfinite(most.largest) or (limit is not None and most.relative > limit)):
        raise error(
            "contract",
            f"{step} promises {contract}, and %{most.value} changed by {most.largest:g} of {most.magnitude:g}",
            checked=checked,
            fix="this is a bug of the pass: the reproducer shows it",
        )
    return most
