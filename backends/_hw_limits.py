"""Limits of a chip, held against a module before anything runs: one refusal for each, with the first layer over it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from spir.backends._hw_registers import (
    STATE,
    Registers,
    beyond,
    ends,
    law_of,
    offset,
    states,
    sums,
    unsimulated,
)
from spir.errors import SpirError, error
from spir.ir import Module, Node
from spir.ops._accumulation import scaled
from spir.ops._linear import LinearMap, WeightedMap
from spir.ops._neuron import Neuron
from spir.ops._threshold import divisors, products
from spir.ops.integrate import Integrate
from spir.ops.neuron_stem import NeuronStem
from spir.ops.scale import Scaling
from spir.profile import Profile
from spir.ranges import analyse, decided
from spir.text import show_node
from spir.types import Interval, Real, Spikes

NO_PASS = "no pass makes all steps powers of two of each other: take a chip with a multiplier or a divisor"


class Over(NamedTuple):
    """What is over a limit, the sentence that says by how much, and the way out."""

    node: Node
    message: str
    fix: str
    code: str = "backend"


def broken(module: Module, chip: Profile, registers: Registers, *, proved: bool) -> Iterator[SpirError]:
    """Every limit of a chip that a module is over, each with the first layer that is and how many more are.

    Args:
        module: without ops that `hw` does not run.
        chip: its profile.
        registers: what ranges prove of them; their overflow says nothing where ``proved``.
        proved: whether registers must be proved wide enough.
    """
    checks: list[Iterable[Over]] = [
        _weights(module, chip),
        _signs(module, chip),
        _steps(module, chip),
        _fan_in(module, chip),
    ]
    if proved:
        checks += [_sums(module, chip, registers), _states(module, chip, registers)]
    else:
        checks += [_simulable(module, registers), _wrapping(module, chip, registers)]
    checks += _requants(module, chip, registers, proved=proved)
    for check in checks:
        yield from _first(list(check))


def _first(found: list[Over]) -> Iterator[SpirError]:
    if found:
        node, message, fix, code = found[0]
        names = dict.fromkeys(f"%{other.node.result}" for other in found[1:] if other.node is not node)
        more = ", ".join(list(names)[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)
        yield error(code, message, op=show_node(node), from_=str(node.origin), also=more, fix=fix)


def _carriers(module: Module) -> Iterator[Node]:
    return (node for node in module.nodes if not isinstance(node.type.encoding, Real))


def _weights(module: Module, chip: Profile) -> Iterator[Over]:
    low, high = ends(chip.weight_bits)
    for node in _carriers(module):
        if isinstance(node.op, WeightedMap):
            values, what = node.op.weight.values, "a weight"
            fix = f"quantize{{weights={chip.weight_bits}}}" if 2 <= chip.weight_bits <= 16 else "another chip"
        elif isinstance(node.op, Scaling):
            values, what, fix = node.op.multiplier, "the factor", "propagate-scales{join=rescale}"
        else:
            continue
        least, most = int(values.min()), int(values.max())
        if least < low or most > high:
            worst = most if most - high >= low - least else least
            bits = max(Interval.of(least, most).bits)
            yield Over(
                node,
                f"{what} of %{node.result} is {worst}, which takes {bits} bits, and {chip.name} has {chip.weight_bits}",
                fix,
            )


def _signs(module: Module, chip: Profile) -> Iterator[Over]:
    """Spikes of -1, but for those of bits: a sign that stands in the first frame goes over negated weights."""
    if chip.signed_spikes:
        return
    fix = (
        "quantize{input=unsigned} for raw pixels, relu behind every layer; or neuron=stem, whose bits carry signs; "
        "where signs travel as twin axons of negated weights, signed_spikes = true in a profile of your own"
    )
    source = module.input.type.encoding
    reads = module.readers[module.input.name]
    if isinstance(source, Spikes) and source.code != "bits" and source.frame[0] < 0 and reads:
        least = source.frame[0]
        message = f"the input has spikes of {least}, and {chip.name} sends no negative spikes"
        yield Over(reads[0], message, fix, code="E-SIGNED-SPIKE")
    for node in module.nodes:
        train = node.type.encoding
        signed = isinstance(train, Spikes) and train.code != "bits" and train.frame[0] < 0
        if isinstance(train, Spikes) and signed and not isinstance(node.op, LinearMap):
            least = train.frame[0]
            message = f"%{node.result} sends spikes of {least}, and {chip.name} sends no negative spikes"
            yield Over(node, message, fix, code="E-SIGNED-SPIKE")


def _steps(module: Module, chip: Profile) -> Iterator[Over]:
    for node in module.nodes:
        train = node.type.train
        if chip.steps is None or train is None or train.steps <= chip.steps:
            continue
        fix = {
            "bits": f"quantize{{bits={chip.steps}}}" if 2 <= chip.steps <= 16 else "another chip",
            "rate": f"shorten-window{{steps={chip.steps}}}, which is not lossless",
        }.get(train.code, f"calibrate-qcfs{{steps={chip.steps}}}")
        yield Over(node, f"%{node.result} takes {train.steps} time steps, and {chip.name} allows {chip.steps}", fix)


def _fan_in(module: Module, chip: Profile) -> Iterator[Over]:
    """Synapses whose weight is not 0, over all linear ops on the way to a neuron."""
    if chip.fan_in is None:
        return
    paths = {name: np.ones((1, *t.shape)) for name, t in module.types.items() if t.train is not None}
    for node in module.nodes:
        if not isinstance(node.op, LinearMap) or node.type.train is None:
            continue
        alive = node.op.weighing(lambda w: (w != 0).astype(np.int64))
        paths[node.result] = np.asarray(alive.apply(*(paths[o] for o in node.operands), real=False))
        most = int(paths[node.result].max())
        if most > chip.fan_in:
            channel = int(np.argmax(paths[node.result][0].reshape(len(paths[node.result][0]), -1).max(axis=1)))
            yield Over(
                node,
                f"a neuron of channel {channel} behind %{node.result} has {most} synapses, and {chip.name} allows "
                f"{chip.fan_in}",
                "fewer input channels, smaller kernels or weights of 0; no pass splits a neuron",
            )


def _excess(x: Interval, bits: int) -> tuple[int, int, int, int]:
    """The channel that is furthest beyond a register, the number there, by how much, and the bits that hold it."""
    low, high = ends(bits)
    over = [max(int(h) - high, low - int(b)) for b, h in zip(x.lo, x.hi, strict=True)]
    channel = int(np.argmax(over))
    number = int(x.hi[channel]) if int(x.hi[channel]) - high == over[channel] else int(x.lo[channel])
    return channel, number, over[channel], x.bits[channel]


def _sums(module: Module, chip: Profile, registers: Registers) -> Iterator[Over]:
    for node in _carriers(module):
        if not sums(node) or node.type.train is None:
            continue
        x = registers.ranges[node.result].frame
        if beyond(x, chip.sum_bits).any():
            channel, number, excess, bits = _excess(x, chip.sum_bits)
            yield Over(
                node,
                f"the weight sum of %{node.result} needs {bits} bits in channel {channel}, and registers have "
                f"{chip.sum_bits}: it may be {number}, {excess} beyond",
                "fewer weight bits, split fan-in, or propagate-scales{join=rescale}; "
                f"{_wider(module, registers)}; overflow=saturate counts what is lost",
                code="E-ISUM",
            )


def _states(module: Module, chip: Profile, registers: Registers) -> Iterator[Over]:
    for node in _carriers(module):
        x = states(node, module, registers.ranges)
        if x is None or not beyond(x, chip.state_bits).any():
            continue
        channel, number, excess, bits = _excess(x, chip.state_bits)
        train = module.types[node.operands[0]].train
        coded = isinstance(node.op, (NeuronStem, Integrate)) and train is not None and train.code == "bits"
        way = _scaled(chip, node.op) if coded else ""
        scale = f", {way} keeps states narrow" if way else ""
        yield Over(
            node,
            f"{'the weight sum' if sums(node) else 'the accumulator'} of %{node.result} needs {bits} bits in channel "
            f"{channel}, and registers have {chip.state_bits}: it may be {number}, {excess} beyond",
            f"{_wider(module, registers)}{scale}; overflow=saturate counts what is lost",
            code="E-VRANGE",
        )


def _wider(module: Module, registers: Registers) -> str:
    """The width that would do for all sums and states."""
    needs = [0]
    for node in _carriers(module):
        x = states(node, module, registers.ranges)
        needs += [] if x is None else x.bits
        needs += registers.ranges[node.result].frame.bits if sums(node) else []
    if max(needs) <= 64:
        return f"accumulator={max(needs)} holds every sum and state"
    return "fewer bits for activations or weights, or propagate-scales{join=rescale}"


def _simulable(module: Module, registers: Registers) -> Iterator[Over]:
    for node in _carriers(module):
        what = unsimulated(node, module, registers)
        if what is not None:
            message = f"{what} of %{node.result} may leave the 64 bits that registers are simulated in"
            yield Over(node, message, "fewer bits for activations or weights, or narrower registers", code="E-VRANGE")


def _wrapping(module: Module, chip: Profile, registers: Registers) -> Iterator[Over]:
    """States that were scaled to fit a register, do not always, and turn their signs then."""
    found = analyse(module) if registers.overflow == "wrap" else {}
    for node in _carriers(module):
        op = node.op
        if not found or not isinstance(op, (NeuronStem, Integrate)) or not scaled(op.shift):
            continue
        x = states(node, module, found)
        if x is not None and beyond(x, chip.state_bits).any():
            yield Over(
                node,
                f"the state of %{node.result} is scaled, and may leave its {chip.state_bits} bits all the same: a "
                "register that wraps turns its sign",
                ", or ".join(("overflow=saturate", *filter(None, (_scaled(chip, op),)))),
                code="E-CALIB-OVF",
            )


def _requants(module: Module, chip: Profile, registers: Registers, *, proved: bool) -> list[Iterable[Over]]:
    """What each way of turning states into codes cannot do."""
    if chip.requant == "any":
        return []
    laws = [_Law(node, module, registers) for node in _carriers(module) if law_of(node) is not None]
    found: list[Iterable[Over]] = [_by_time(module, chip)]
    if chip.requant == "multiplier":
        ways = [_Law.wide_factor, _Law.wide_product, _Law.no_shift]
    elif chip.requant == "divisor":
        ways = [_Law.factor, _Law.wide_divisor, _Law.wide_threshold]
    else:
        ways = [_Law.factor, _Law.no_shift]
    if proved and chip.requant != "multiplier":
        ways += [_Law.wide_offset]
    return found + [[over for law in laws for over in way(law, chip)] for way in ways]


def _by_time(module: Module, chip: Profile) -> Iterator[Over]:
    for node in module.nodes:
        if isinstance(node.op, Neuron) and law_of(node) is None:
            yield Over(
                node,
                f"%{node.result} compares by a matrix over time, and {chip.name} has one law: {chip.requant}",
                "derive-thresholds{neuron=parallel}",
            )


class _Law:
    """One law, against each of the ways."""

    def __init__(self, node: Node, module: Module, registers: Registers) -> None:
        law = law_of(node)
        assert law is not None  # the caller asked
        self.node, self.module, self.name = node, module, node.result
        self.mul, self.add, self.div = law[0], law[1], divisors(law[2])
        if (node.result, STATE) in registers.loose:
            self.z = Interval.of(*ends(registers.widths[STATE]))
        else:
            self.z = decided(node, module, registers.ranges)

    @property
    def largest(self) -> int:
        """The multiplier of the largest magnitude."""
        return int(max(self.mul.values.reshape(-1).tolist(), key=abs))

    def wide_factor(self, chip: Profile) -> Iterator[Over]:
        """A multiplier of more bits than there are; a sign is no bit."""
        bits = chip.multiplier_bits or 0
        if abs(self.largest) >= 2**bits:
            yield Over(
                self.node,
                f"the multiplier {self.largest} of %{self.name} takes {abs(self.largest).bit_length()} bits, and "
                f"{chip.name} has {bits}",
                f"propagate-scales{{bits={bits}}}" if 2 <= bits <= 31 else "another chip",
                code="E-MULT-RANGE",
            )

    def wide_product(self, chip: Profile) -> Iterator[Over]:
        """``mul z + add`` beyond its register."""
        found, bits = products(self.mul, self.add, self.z), chip.product_bits or 0
        if beyond(found, bits).any():
            _, number, excess, needed = _excess(found, bits)
            yield Over(
                self.node,
                f"mul * z + add of %{self.name} needs {needed} bits, and the product has {bits}: it may be {number}, "
                f"{excess} beyond",
                f"fewer bits of multipliers: propagate-scales{{bits=...}}, here {abs(self.largest).bit_length()}",
                code="E-VRANGE",
            )

    def no_shift(self, chip: Profile) -> Iterator[Over]:
        """A divisor that is no power of two."""
        odd = self.div[(self.div & (self.div - 1)) != 0]
        if odd.size:
            message = f"%{self.name} divides by {odd[0]}, and {chip.name} shifts by powers of two"
            fix = "propagate-scales{grid=shift}"
            if chip.requant == "shift":
                fix = NO_PASS
            elif (self.mul.values == 1).all():
                fix = f"scale-integration and @sdann without divisor, or {fix}"
            yield Over(self.node, message, fix, code="E-MULT-RANGE")

    def factor(self, chip: Profile) -> Iterator[Over]:
        """A multiplier where there is none."""
        others = self.mul.values[self.mul.values != 1]
        if others.size:
            message = f"%{self.name} multiplies by {others[0]}, and {chip.name} has no multiplier"
            if chip.requant == "shift":
                yield Over(self.node, message, NO_PASS, code="E-MULT-RANGE")
            else:
                yield Over(self.node, message, _divided(chip), code="E-DIVISOR")

    def wide_divisor(self, chip: Profile) -> Iterator[Over]:
        """A divisor beyond the largest."""
        most, largest = int(self.div.max()), chip.largest_divisor or 0
        if most > largest:
            message = f"%{self.name} divides by {most}, and {chip.name} by {largest} at most"
            yield Over(self.node, message, _divided(chip), code="E-DIVISOR")

    def wide_threshold(self, chip: Profile) -> Iterator[Over]:
        """The first threshold of a STEM neuron, the divisor times the weight of its first bit, beyond the state."""
        _, high = ends(chip.state_bits)
        if not isinstance(self.node.op, NeuronStem):
            return
        most, bits = int(self.div.max()), self.node.op.bits
        if most * 2 ** (bits - 1) > high:
            yield Over(
                self.node,
                f"the first threshold of %{self.name} is {most} * 2^{bits - 1} = {most * 2 ** (bits - 1)}, and a state "
                f"of {chip.state_bits} bits holds up to {high}",
                f"{_divided(chip)}, or fewer bits of codes: quantize{{bits=...}}",
                code="E-DIVISOR",
            )

    def wide_offset(self, chip: Profile) -> Iterator[Over]:
        """The sum and the offset of the law beyond the state, in which they are added."""
        found = offset(self.node, self.module, self.z)
        if found is not None and bool((self.mul.values == 1).all()) and beyond(found, chip.state_bits).any():
            _, number, excess, needed = _excess(found, chip.state_bits)
            message = (
                f"sum and offset of %{self.name} need {needed} bits, and a state has {chip.state_bits}: they may be "
                f"{number}, {excess} beyond"
            )
            fix = f"{_divided(chip)}; overflow=saturate counts what is lost"
            if chip.requant == "shift":
                yield Over(self.node, message, fix, code="E-VRANGE")
            else:
                yield Over(self.node, message, fix, code="E-DIVISOR")


def _divided(chip: Profile) -> str:
    """The pass that divides in place of multiplying, for a state as wide as this."""
    return _by_pass_or_recipe(chip, "")


def _scaled(chip: Profile, op: Any) -> str:
    """The pass that keeps states within their registers for every input, where there is one."""
    if not 4 <= chip.state_bits <= 63:
        return ""
    return _by_pass_or_recipe(chip, ", r=guaranteed" * scaled(op.shift))


def _by_pass_or_recipe(chip: Profile, more: str) -> str:
    bits = min(chip.state_bits, 63)
    more += f", divisor={chip.largest_divisor}" if chip.requant == "divisor" else ""
    return f"scale-integration{{bits={bits}{more}}}, or @sdann{{accumulator={bits}{more}}}"
