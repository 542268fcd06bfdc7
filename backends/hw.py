"""hw: integers of stated width on NumPy; the frames of a train one by one, or in one product where that is proved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

import attrs

from spir.backend import Backend, Executable
from spir.backends._hw_host import HOST
from spir.backends._hw_kernels import KERNELS, triple_of
from spir.backends._hw_limits import broken
from spir.backends._hw_program import Program
from spir.backends._hw_registers import STATE, SUM, Registers
from spir.backends._hw_stream import Stream, unstreamed
from spir.errors import SpirError, error
from spir.ir import Module, Node
from spir.ops._accumulation import scaled
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops.clip import Clip
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_matrix import NeuronMatrix
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.options import option
from spir.profile import Profile
from spir.schedule import STATES
from spir.text import show_node
from spir.types import Real, Spikes

OVERFLOWS = ("refuse", "saturate", "wrap", "error")


@attrs.frozen
class Hw(Backend):
    """What integer hardware computes: weight sums and states in registers of stated width, every train in b frames.

    ``profile`` names a chip (`spir.profile`): the widths of its registers, and limits that are checked before anything
    runs, all at once. ``accumulator`` gives sums and states another width. With ``overflow = refuse`` a network runs
    only where ranges prove that no register overflows, for any input. Otherwise it runs, and registers are simulated:

    * a linear op over trains forms the whole sum of one step, which is then stored in the sum register once (a chip's
      order within a step is not modelled; a map that only moves elements stores nothing);
    * a state starts at 0, and passes through its register after every update: a frame that was weighted, and scaled
      where the op says so; with ca_lif the charge and the share of the leak; with matrices every frame of every row;
      the bias of a readout as the last one. On chips without a multiplier so does the offset of a law, behind the last
      frame;
    * sums of integers, which no train carries, pass through the state register; an encoder behind one clips what its
      code does not hold.

    ``saturate`` keeps the nearest end, ``wrap`` counts modulo 2^n; both count each overflow by value, register and
    channel (`Compiled.overflows`). ``error`` stops at the first, in order of samples, layers, steps and elements. What
    lies between state and code is as wide as it needs to be: limits of products and divisors are checked, not
    simulated.

    With ``collapse = auto`` the frames of trains are merged into one product on what they decode to. That is
    done only where value and every prefix fit the accumulator, no register on the way may overflow and the neuron is a
    function of the decoded value, so nothing can be lost; everywhere else, and with ``collapse = off``, all frames are
    stepped through.

    With ``pipeline = one`` or ``two``, the state variables of a neuron, the samples of a call follow each other through
    all layers at once (see `Stream` and `spir.schedule`; a reconstruction). All frames are stepped, and ``overflow =
    error`` stops at the first overflow in time. Networks of bit-coded neurons only. With ``delays = off`` no branch
    waits, and a network whose branches are of unequal depth is refused.
    """

    name: ClassVar[str] = "hw"
    collapse: str = option("auto", "merge the frames of a train where that is proved the same", one_of=("auto", "off"))
    profile: str = option("ideal", "the chip: a name, or the path of a .toml file")
    accumulator: int | None = option(None, "bits of sum and state registers, in place of the chip's", ge=8, le=64)
    overflow: str = option("refuse", "what an overflow is: refused before a run, or simulated", one_of=OVERFLOWS)
    pipeline: str = option("off", "samples in a row, with so many state variables a neuron", one_of=("off", *STATES))
    delays: bool = option(True, "in a pipeline, early branches wait for later ones")

    def __attrs_post_init__(self) -> None:
        _ = self.chip
        if self.pipeline == "off" and not self.delays:
            raise error("option", "delays are those of a pipeline, and it is off", fix="pipeline=two, or no delays")

    @property
    def chip(self) -> Profile:
        """The profile, with the registers asked for.

        Raises:
            SpirError[option], SpirError[profile], SpirError[io]: no such profile, or none that can be read.
        """
        found = Profile.load(self.profile)
        wide = self.accumulator
        return found if wide is None else attrs.evolve(found, sum_bits=wide, state_bits=wide)

    def refusals(self, module: Module) -> Iterator[SpirError]:
        """Reals that the host does not compute, ops without integer kernels, registers that are too narrow."""
        refused = [node for node in module.nodes if not _runs(node)]
        real: list[Node] = []
        other: list[Node] = []
        for node in refused:
            types = (*module.operand_types(node), node.type)
            (real if any(isinstance(t.encoding, Real) for t in types) else other).append(node)
        if real:
            yield _on_reals(real)
        for node in other:
            yield error(
                "backend",
                f"hw has no {node.op.name}",
                op=show_node(node),
                from_=str(node.origin),
                fix="rewrite the op with a pass, or use another backend",
            )
        if self.pipeline != "off":
            yield from unstreamed(module, delays=self.delays)
        if not refused:
            yield from broken(module, self.chip, self._registers(module), proved=self.overflow == "refuse")

    def _registers(self, module: Module) -> Registers:
        """What ranges prove of the registers, and of values behind those that may overflow."""
        chip = self.chip
        if self.overflow == "refuse":
            return Registers.proved(module)
        widths = {SUM: chip.sum_bits, STATE: chip.state_bits}
        offsets = chip.requant in ("divisor", "shift")
        return Registers.simulated(module, widths, self.overflow, offsets=offsets)

    def build(self, module: Module) -> Executable:
        """Decides which trains are merged and in which type each value is held."""
        registers = self._registers(module)
        if self.pipeline != "off":
            stream = Stream(Program(module, registers, frozenset()), self.pipeline)
            stream.settle()
            return stream
        merged = _merged(module, registers, self.chip.state_bits) if self.collapse == "auto" else frozenset()
        program = Program(module, registers, merged)
        program.settle()
        return program


def _runs(node: Node) -> bool:
    op, real = node.op, isinstance(node.type.encoding, Real)
    if isinstance(op, LinearMap):
        return type(op) in KERNELS and (op.relabels or not real)
    if isinstance(op, (Relu, MaxPool)):
        return not real
    return isinstance(op, (Encode, Neuron, Requant, Integrate, Quantize, Clip, Dequantize, *HOST))


def _on_reals(nodes: list[Node]) -> SpirError:
    """One refusal for all: the first op by name and place, the others by kind."""
    first, *others = nodes
    kinds = Counter(node.op.name for node in others)
    return error(
        "backend",
        f"hw computes on integers, and {first.op.name} works on reals",
        op=show_node(first),
        from_=str(first.origin),
        also=", ".join(f"{count} {name}" for name, count in kinds.items()),
        fix="quantize the network first",
    )


def _merged(module: Module, registers: Registers, accumulator: int) -> frozenset[str]:
    """The trains whose frames are merged: linear ops and maxima tie operands to results, and all merge or none."""
    trains = [name for name, type_ in module.types.items() if type_.train is not None]
    group = {name: {name} for name in trains}
    for node in module.nodes:
        if isinstance(node.op, (LinearMap, MaxPool)) and node.type.train is not None:
            tied = set().union(*(group[name] for name in (node.result, *node.operands)))
            group.update(dict.fromkeys(tied, tied))
    alone = {name for name in trains if _mergeable(name, module, registers, accumulator)}
    return frozenset(name for name in trains if group[name] <= alone)


def _mergeable(name: str, module: Module, registers: Registers, accumulator: int) -> bool:
    """Whether nothing but the decoded value of a train can show in what reads it."""
    encoding, ranges = module.types[name].encoding, registers.ranges[name]
    # the maximum of sorted trains is the train of the maximum
    commutes = (LinearMap, MaxPool) if isinstance(encoding, Spikes) else LinearMap
    readers = [node for node in module.readers[name] if not isinstance(node.op, commutes)]
    function = all(_function(n) for n in readers)
    fits = max((ranges.value | ranges.prefix).bits) <= accumulator
    tight = not any((n.result, STATE) in registers.loose for n in readers)
    return not module.types[name].timed and function and fits and tight and _regular(name, module, registers)


def _regular(name: str, module: Module, registers: Registers) -> bool:
    """Whether no overflow shows in the frames of a train but in what they decode to."""
    if (name, SUM) in registers.loose:
        return False
    source = module.definitions.get(name)
    compared = source is not None and isinstance(source.op, NeuronMatrix)  # each step by a state of its own
    return not (compared and (name, STATE) in registers.loose)


def _function(node: Node) -> bool:
    """Whether what an op makes of a train follows from what the train decodes to."""
    if isinstance(node.op, Integrate):
        return not scaled(node.op.shift)
    return triple_of(node.op) is not None and not node.type.timed
