"""What a network costs: synapses, multiply-accumulates, memory, registers, and what prices make of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.ir import Array, Module, Node
from spir.ops._accumulation import scaled
from spir.ops._linear import EXACT_IN_FLOAT64, LinearMap, WeightedMap
from spir.ops.integrate import Integrate
from spir.profile import Profile
from spir.types import Interval, Real

KIB = 8 * 1024
"""Bits of a KiB."""
WEIGHTS = ("weight", "factor")
"""Fields of linear maps that hold synapses."""
BIASES = ("add", "bias")
"""Fields that hold what a neuron adds once a window: bias, shift and rounding."""


@attrs.frozen
class Map:
    """A linear map with weights, and what the integer network multiplies there for one sample.

    A multiply-accumulate (``macs``) is one weight times one element inside the image: taps on the padding are none, a
    weight of 0 is one. ``carrier`` says what the map reads: ``spikes``, which cost synaptic operations instead;
    ``integers``, which are multiplied in the spiking network, too; ``reals``, which no price here is made for.
    ``weight_bits`` hold every weight in two's complement; None for float weights.
    """

    value: str
    op: str
    origin: str
    carrier: str
    macs: int
    weights: int
    weight_bits: int | None


@attrs.frozen
class Memory:
    """Bits that the network holds: each array at the width its largest entry needs, shared kernels once.

    ``weights`` are those of linear maps and the integer factors of joins, ``biases`` what neurons and readouts add,
    ``constants`` their multipliers, divisors and matrices, ``states`` one accumulator a neuron at its proved width.
    Arrays of floats (scales, layers of the host) are not held by a chip and are left out.
    """

    weights: int
    biases: int
    constants: int
    states: int

    @property
    def kib(self) -> float:
        """All of it."""
        return (self.weights + self.biases + self.constants + self.states) / KIB


@attrs.frozen
class Registers:
    """Whose registers, and their bits: of the weight sum of one frame, and of what a neuron keeps.

    ``assumed`` are those of the two widths that the profile calls a guess.
    """

    owner: str
    sum_bits: int
    state_bits: int
    assumed: tuple[str, ...] = ()

    @classmethod
    def of(cls, profile: Profile, owner: str) -> Registers:
        """A profile's."""
        widths = {"sum_bits": profile.sum_bits, "state_bits": profile.state_bits}
        return cls(owner, **widths, assumed=tuple(name for name in widths if name in profile.assumed))


@attrs.frozen
class Prices:
    """What one operation costs, in picojoules, by one source; None where that source states no price."""

    source: str
    synaptic_operation: float | None
    mac: float | None
    neuron_update: float | None

    @classmethod
    def of(cls, profile: Profile) -> Prices | None:
        """A profile's, with its own words on where they come from; None where it states none."""
        names = [name for name in ("synaptic_operation_pj", "neuron_update_pj") if getattr(profile, name) is not None]
        if not names:
            return None
        source = "; ".join(profile.source.get(name, f"{name}, no source given") for name in names)
        operation, update = profile.synaptic_operation_pj, profile.neuron_update_pj
        return cls(f"{profile.name}: {source}", operation, None, update)


PAPER = Prices("SDANN, arXiv 2505.12221: int8 MAC, accumulate", 0.03, 0.23, None)


@attrs.frozen
class Energy:
    """Picojoules a sample by one set of prices; None where there is no price, so no sum is made of unequal parts.

    ``synaptic_operations`` and ``neuron_updates`` are those of the spiking network, ``input`` what the synaptic
    operations of the input layer add, ``macs_left`` its maps that read integers, and ``ann_macs`` all maps of the
    integer network.
    """

    prices: Prices
    synaptic_operations: float | None
    input: float | None
    neuron_updates: float | None
    macs_left: float | None
    ann_macs: float | None

    @classmethod
    def of(
        cls, prices: Prices, operations: float, of_input: float | None, updates: float, left: float, macs: float
    ) -> Energy:
        """From counts a sample, in the order of the fields; ``operations`` are without those of the input."""
        pairs = (
            (prices.synaptic_operation, operations),
            (prices.synaptic_operation, of_input),
            (prices.neuron_update, updates),
            (prices.mac, left),
            (prices.mac, macs),
        )
        return cls(prices, *(None if price is None or count is None else price * count for price, count in pairs))


def synapses(module: Module) -> dict[str, NDArray[np.int64]]:
    """For every value, the synapses that leave each element towards neurons or the readout, ``[*shape]``.

    A synapse counts whether its weight is 0 or not: what is not pruned away is there. Where linear maps follow each
    other, every path through them is one (an overlapping pool before a convolution has more paths than the one map
    that both compose to). A current that several neurons read has its synapses for each of them.
    """
    paths = _paths(module, np.float64)
    if max(float(found.max()) for found in paths.values()) >= EXACT_IN_FLOAT64:  # below, sums of counts are exact
        paths = _paths(module, np.int64)
    return {name: found.astype(np.int64) for name, found in paths.items()}


def _paths(module: Module, dtype: type[np.float64] | type[np.int64]) -> dict[str, NDArray[Any]]:
    paths: dict[str, NDArray[Any]] = {
        name: np.full(t.shape, _ends(module, name), dtype=dtype) for name, t in module.types.items()
    }
    for node in reversed(module.nodes):
        if passes_on(node, module):
            (operand,) = node.operands
            paths[operand] = paths[operand] + paths[node.result]
        if isinstance(node.op, LinearMap):
            found = node.op.synapses(paths[node.result], *(module.types[o].shape for o in node.operands))
            for operand, more in zip(node.operands, found, strict=True):
                paths[operand] = paths[operand] + more
    return paths


def _ends(module: Module, name: str) -> int:
    """How often a value arrives: everything that is no linear op and reads it, and the user."""
    readers = (n for n in module.readers[name] if not passes_on(n, module))
    return int(name == module.output) + sum(not isinstance(n.op, LinearMap) for n in readers)


def passes_on(node: Node, module: Module) -> bool:
    """Whether a train is summed for the synapses of the next layer, in place of one product a frame."""
    if not isinstance(node.op, Integrate) or node.op.bias is not None or scaled(node.op.shift):
        return False
    summed = module.types[node.operands[0]].train is not None
    return summed and any(isinstance(n.op, LinearMap) for n in module.readers[node.result])


def maps(module: Module) -> tuple[Map, ...]:
    """The linear maps with weights, in order."""
    spiking = _spiking(module)
    return tuple(_map(node, module, spiking) for node in module.nodes if isinstance(node.op, WeightedMap))


def _spiking(module: Module) -> frozenset[str]:
    """The values that spikes reach with no neuron in between."""
    found = {name for name, type_ in module.types.items() if type_.train is not None}
    for node in module.nodes:
        if passes_on(node, module) or (isinstance(node.op, LinearMap) and not found.isdisjoint(node.operands)):
            found.add(node.result)
    return frozenset(found)


def _map(node: Node, module: Module, spiking: frozenset[str]) -> Map:
    assert isinstance(node.op, WeightedMap)  # the caller chose
    weight, real = node.op.weight, isinstance(node.type.encoding, Real)
    return Map(
        value=node.result,
        op=str(node.op.name),
        origin=str(node.origin),
        carrier="reals" if real else "integers" if spiking.isdisjoint(node.operands) else "spikes",
        macs=_terms(node, module),
        weights=weight.values.size,
        weight_bits=_width(weight.values) if weight.integral else None,
    )


def _terms(node: Node, module: Module) -> int:
    """How many elements a linear map reads in all, each as often as it is read; float64 counts are exact here."""
    assert isinstance(node.op, LinearMap)  # the caller chose
    once: NDArray[Any] = np.ones(node.type.shape)
    return sum(int(terms.sum()) for terms in node.op.synapses(once, *(t.shape for t in module.operand_types(node))))


def additions(module: Module) -> int:
    """Additions a sample of pools and sums on integer carriers: one less than what each result element adds up."""
    plain = (
        node
        for node in module.nodes
        if isinstance(node.op, LinearMap)
        and not isinstance(node.op, WeightedMap)
        and not node.op.relabels
        and not isinstance(node.type.encoding, Real)
    )
    return sum(max(0, _terms(node, module) - node.type.size) for node in plain)


def memory(module: Module, states: int) -> Memory:
    """What a module's constants take, and ``states`` bits of neurons."""
    held = {"weights": 0, "biases": 0, "constants": 0}
    for node in module.nodes:
        if node.op.host:
            continue
        for field, array in node.op.arrays().items():
            kind = "weights" if field in WEIGHTS else "biases" if field in BIASES else "constants"
            held[kind] += stored_bits(array)
        divisor = getattr(node.op, "div", None)
        held["constants"] += _width([divisor]) if isinstance(divisor, int) else 0
    return Memory(**held, states=states)


def stored_bits(array: Array) -> int:
    """Bits of all integers of an array at one width; floats are not stored."""
    return array.values.size * _width(array.values) if array.integral else 0


def _width(values: NDArray[np.int64] | Iterable[int]) -> int:
    """Bits of a two's complement register that holds every value."""
    found = np.asarray(values)
    return max(Interval.of(int(found.min()), int(found.max())).bits) if found.size else 0
