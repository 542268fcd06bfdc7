"""What a backend is: options, refusals collected before anything is built, and an executable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import SpirError, raise_all
from spir.ir import Module
from spir.packing import Packed
from spir.types import Stored


class Executable(Protocol):
    """A module made ready to run; it holds no state between calls."""

    def run(self, x: NDArray[Any], keep: str = "") -> dict[str, Stored]:
        """Stored values by name: those that match ``keep`` (see `kept`), and the output.

        Args:
            x: ``[N, *shape]``, as the model receives it; the result does not depend on N.
            keep: a pattern of names.

        Returns:
            Reals as float64 ``[N, *shape]``, integers as int64 ``[N, *shape]``, trains and currents as int64
            ``[T, N, *shape]``.
        """

    @property
    def bytes_per_sample(self) -> int:
        """Roughly the peak memory that one sample takes, so that callers can cut batches."""


@runtime_checkable
class Packing(Executable, Protocol):
    """An executable that makes trains of at most 64 frames as words, without their frames."""

    def run_packed(self, x: NDArray[Any], keep: str = "") -> dict[str, Stored | Packed]:
        """As `run`, with trains of spikes in words."""


Overflows = Mapping[tuple[str, str], NDArray[np.int64]]
"""How often registers were given what they do not hold, over samples, steps and elements: by value and register,
``sum`` (of one step's weights) or ``state``, one count a channel. Registers without an overflow are left out."""


@runtime_checkable
class Counting(Executable, Protocol):
    """An executable that simulates registers of stated width, and counts what they do not hold."""

    def run_counting(self, x: NDArray[Any], keep: str = "") -> tuple[dict[str, Stored], Overflows]:
        """As `run`, with the overflows of the same run; counts of batches add up to those of all samples."""

    @property
    def simulates(self) -> bool:
        """Whether registers may overflow; else ranges prove that none does, for any input."""


@runtime_checkable
class Steered(Executable, Protocol):
    """An executable of reals that stops at values and goes on with what the caller makes of them."""

    def steer(self, x: NDArray[Any], stops: str) -> Iterator[tuple[str, Stored]]:
        """Runs ``x`` and yields name and value of whatever matches ``stops``, in order; callers change it in place.

        Raises:
            SpirError[data]: an input of the wrong shape, type or range.
        """


@attrs.frozen
class Backend:
    """Options of one way to run modules; a subclass is one file of ``backends/``."""

    name: ClassVar[str]

    def refusals(self, module: Module) -> Iterator[SpirError]:
        """Everything in the module that this backend does not run, each with its op, origin and way out."""
        raise NotImplementedError(f"{type(self).__name__}.refusals")  # abstract: each backend defines it

    def build(self, module: Module) -> Executable:
        """The executable of a module without refusals."""
        raise NotImplementedError(f"{type(self).__name__}.build")  # abstract: each backend defines it

    def prepare(self, module: Module) -> Executable:
        """Checks, then builds.

        Raises:
            SpirError[backend]: all refusals at once.
        """
        raise_all(self.refusals(module))
        return self.build(module)
