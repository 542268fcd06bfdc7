"""hw: integers of stated width on NumPy; the frames of a train one by one, or in one product where that is proved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import ClassVar

import attrs

from spir.backend import Backend, Executable
from spir.backends._hw_host import HOST
from spir.backends._hw_kernels import KERNELS, triple_of
from spir.backends._hw_program import Program
from spir.errors import SpirError, error
from spir.ir import Module, Node
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops.clip import Clip
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.max_pool import MaxPool
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.options import option
from spir.ranges import Ranges, analyse
from spir.text import show_node
from spir.types import Interval, Real, Spikes


@attrs.frozen
class Hw(Backend):
    """What integer hardware computes: weight sums and state in registers of stated width, every train in b frames.

    With ``collapse = auto`` the frames of trains are merged into one product on what they decode to. That is
    done only where value and every prefix fit the accumulator and the neuron is a function of the decoded value, so
    nothing can be lost; everywhere else, and with ``collapse = off``, all frames are stepped through.
    """

    name: ClassVar[str] = "hw"
    collapse: str = option("auto", "merge the frames of a train where that is proved the same", one_of=("auto", "off"))
    accumulator: int = option(64, "bits of sum and state registers", ge=8, le=64)

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
        if not refused:
            yield from self._overflow(module)

    def _overflow(self, module: Module) -> Iterator[SpirError]:
        """The first value that needs more bits than the registers have."""
        found = analyse(module)
        needs = [(node, *_register(node, module, found)) for node in module.nodes]
        wide = [need for need in needs if need[2] > self.accumulator]
        if not wide:
            return
        node, channel, bits, what = wide[0]
        most = max(need[2] for need in wide)
        yield error(
            "E-VRANGE",
            f"{what} of %{node.result} needs {bits} bits in channel {channel}, and registers have {self.accumulator}",
            op=show_node(node),
            from_=str(node.origin),
            fix=f"accumulator={most} holds every sum and state" * (most <= 64)
            or "fewer bits for activations or weights, or propagate-scales{join=rescale}",
        )

    def build(self, module: Module) -> Executable:
        """Decides which trains are merged and in which type each value is held."""
        found = analyse(module)
        merged = _merged(module, found, self.accumulator) if self.collapse == "auto" else frozenset()
        program = Program(module, found, merged)
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


def _widest(interval: Interval) -> tuple[int, int]:
    """The channel that needs the widest register, and its bits."""
    bits = interval.bits
    return bits.index(max(bits)), max(bits)


def _register(node: Node, module: Module, found: Mapping[str, Ranges]) -> tuple[int, int, str]:
    """Channel, bits and name of the widest register of an op; ops without one need no bits."""
    (first, *_), mine = module.operand_types(node), found.get(node.result)
    if mine is None or isinstance(node.op, (Quantize, Encode, Relu, MaxPool)):
        return 0, 0, ""
    if isinstance(node.op, LinearMap):
        moved = isinstance(node.type.encoding, Spikes) or node.op.relabels
        return (0, 0, "") if moved else (*_widest(mine.frame), "the weight sum")
    state = found[node.operands[0]]
    held = state.value | state.prefix if first.train is not None else state.value
    if isinstance(node.op, Integrate):
        held = held | mine.value
    return (*_widest(held), "the accumulator")


def _merged(module: Module, found: Mapping[str, Ranges], accumulator: int) -> frozenset[str]:
    """The trains whose frames are merged: linear ops and maxima tie operands to results, and all merge or none."""
    trains = [name for name, type_ in module.types.items() if type_.train is not None]
    group = {name: {name} for name in trains}
    for node in module.nodes:
        if isinstance(node.op, (LinearMap, MaxPool)) and node.type.train is not None:
            tied = set().union(*(group[name] for name in (node.result, *node.operands)))
            group.update(dict.fromkeys(tied, tied))
    alone = {name for name in trains if _mergeable(name, module, found[name], accumulator)}
    return frozenset(name for name in trains if group[name] <= alone)


def _mergeable(name: str, module: Module, ranges: Ranges, accumulator: int) -> bool:
    """Whether nothing but the decoded value of a train can show in what reads it."""
    encoding = module.types[name].encoding
    # the maximum of sorted trains is the train of the maximum
    commutes = (LinearMap, MaxPool) if isinstance(encoding, Spikes) else LinearMap
    readers = [node for node in module.readers[name] if not isinstance(node.op, commutes)]
    function = all(isinstance(n.op, Integrate) or (triple_of(n.op) is not None and not n.type.timed) for n in readers)
    fits = max((ranges.value | ranges.prefix).bits) <= accumulator
    return not module.types[name].timed and function and fits
