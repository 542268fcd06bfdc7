"""What all spiking neurons share: they turn currents into spikes, step by step, on any array library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, Self

import attrs

from spir.errors import error
from spir.ir import Array, Op
from spir.ops._thinning import Thinning
from spir.ops._threshold import Triple
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.types import Interval, Train


class ArrayNamespace(Protocol):
    """What `Neuron.fire` needs of numpy or torch beside operators."""

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        """Elementwise choice."""

    def zeros_like(self, x: Any) -> Any:
        """Zeros of the same shape and type."""

    def hold(self, state: Any) -> Any:
        """The register that keeps a state after each update; as it is where registers are as wide as needed."""
        return state

    def constant(self, array: Array, like: Any) -> Any:
        """A constant that broadcasts over ``[N, C, ...]`` arrays such as ``like``, with their integer type."""


def no_window(name: str, steps: int | None) -> None:
    """Refuses a window for neurons whose codes say how long their trains are.

    Raises:
        SpirError[option]
    """
    if steps is not None:
        raise error("option", f"neuron {name} takes as many steps as its codes need, not {steps}", fix="no steps")


@attrs.frozen
class Neuron(Op):
    """A fused neuron: it equals ``integrate; requant; encode``.

    A subclass gives ``fire`` (the steps a backend takes) and, where pipelines derive it, ``derive`` (which requant
    becomes this neuron) and ``fuse``.
    """

    two_phase: ClassVar[bool] = True
    """Whether its first spike waits for the last frame it reads; an on-line neuron spikes in the same window."""
    derived: ClassVar[bool] = True
    """Whether pipelines derive it from a requant; else it comes from other neurons, or from text."""
    windowed: ClassVar[bool] = False
    """Whether all trains last as long as one window, which the largest code of the network needs."""
    charged: ClassVar[bool] = False
    """Whether it also takes the charge of all steps as one integer, so that the first layer may read what no train
    carries: the analogue input."""

    @property
    def triple(self) -> Triple | None:
        """The law, where the neuron is one function of the decoded value; None where its frames matter.

        Only in front of a neuron with a law may a backend merge frames into one product.
        """
        return None

    @property
    def thinning(self) -> Thinning | None:
        """What becomes of the train that the law stands for; None where all its spikes stay."""
        return None

    def fire(self, xp: ArrayNamespace, currents: Iterator[Any]) -> Iterator[Any]:
        """The output frames, given the input frames one by one; both are integer arrays ``[N, *shape]``."""
        raise NotImplementedError(f"{type(self).__name__}.fire")  # abstract: each neuron defines it

    def state(self, train: Train) -> Interval | None:
        """Bounds of the membrane potential on a train, where it is not just the sum of the frames so far."""
        return None

    def in_mode(self, mode: str, train: Train) -> Self:
        """The neuron in another mode of spiking, on the train that it reads.

        Raises:
            SpirError[option]: it has no such mode.
        """
        raise error("option", f"{self.name} has no modes, so no mode {mode!r}", fix="leave mode out")

    @classmethod
    def derive(cls, source: Requant | Quantize, order: str | None = None, steps: int | None = None) -> Encode:
        """The encoder that follows a requant, or the input's quantiser, in this neuron's unfused form.

        Args:
            source: what makes the integers.
            order: at which end spikes stand, for neurons that sort them; others refuse it.
            steps: the window, for neurons whose trains are longer than their codes need; others refuse it.

        Raises:
            SpirError[type]: a clip range that the neuron does not realise, with the fix.
            SpirError[option]: an order or a window that the neuron does not know.
        """
        raise NotImplementedError(f"{cls.__name__}.derive")  # abstract: each neuron defines it

    @classmethod
    def fuse(cls, integrate: Integrate | None, requant: Requant, encode: Encode) -> Self | None:
        """The neuron that equals the three ops, or None where they are none of its own.

        ``integrate`` is None where the requant reads integers that no train was summed to.
        """
        raise NotImplementedError(f"{cls.__name__}.fuse")  # abstract: each neuron defines it


def for_toolkits(lo: int, hi: int) -> str:
    """What to add to the way out for whole bits with a zero point inside, as quantisation toolkits give."""
    if not lo < 0 < hi or hi in (-lo, -lo - 1) or (hi - lo + 1).bit_count() != 1:
        return ""
    return "; in a toolkit: a symmetric quantiser there, behind a ReLU unsigned codes of zero point 0; or neuron=ca-lif"
