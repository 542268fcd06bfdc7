"""What a compiled network does on given inputs: spikes, synaptic operations, coverage, and how it was made."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.ir import Module, Node
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops.clip import Clip
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.max_pool import MaxPool
from spir.ops.qcfs import Qcfs
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.pipeline import Entry
from spir.ranges import analyse
from spir.schedule import Delay, schedule
from spir.types import Real, Spikes, Stored

SCHEMA = "spir-report/1"


@attrs.frozen
class Layer:
    """One train: neurons, spikes and synaptic operations a sample, the share of frames that spike, and registers.

    ``sum_bits`` hold every weight sum of one frame and ``state_bits`` every state of the accumulator, by proved ranges;
    0 where a train is made of integers. ``twins`` is how many neurons may spike -1, too: where a target has no signed
    spikes, each of them becomes two, of which one reads and sends the negative.
    """

    value: str
    op: str
    origin: str
    neurons: int
    steps: int
    spikes: float
    negative: float
    rate: float
    synaptic_operations: float
    sum_bits: int
    state_bits: int
    twins: int


@attrs.frozen
class Report:
    """Measured on ``samples`` inputs; one JSON schema, see `json`.

    A synaptic operation is one spike arriving over one synapse; trains that quantisers emit are the input layer and are
    listed apart. ``spiking`` are the activations that emit trains, ``unconverted`` those that do not, and ``analogue``
    the inputs that layers read as integers, without spikes. ``integers`` counts the ops that compute integers between
    spikes: what they do is in no other figure. The latency, in windows and steps, and the skip paths that must wait are
    those of `spir.schedule`.
    """

    backend: str
    samples: int
    layers: tuple[Layer, ...]
    coverage: Mapping[str, int]
    spiking: tuple[str, ...]
    unconverted: tuple[str, ...]
    analogue: tuple[str, ...]
    reals: tuple[str, ...]
    host: tuple[str, ...]
    integers: Mapping[str, int]
    windows: int
    latency: int
    delays: tuple[Delay, ...]
    journal: tuple[Entry, ...]
    source: Mapping[str, str]

    @property
    def spikes(self) -> float:
        """Spikes a sample, input included."""
        return sum(layer.spikes for layer in self.layers)

    @property
    def synaptic_operations(self) -> float:
        """Synaptic operations a sample, input included."""
        return sum(layer.synaptic_operations for layer in self.layers)

    @property
    def silent(self) -> tuple[str, ...]:
        """Trains without a single spike."""
        return tuple(layer.value for layer in self.layers if not layer.spikes)

    def _outside(self) -> list[str]:
        """A warning where integers are computed between spikes, which no figure above counts."""
        if not self.integers:
            return []
        found = ", ".join(f"{count} {op}" for op, count in self.integers.items())
        return [f"on integers, outside of neurons, not counted as spikes or windows: {found}"]

    @property
    def twins(self) -> int:
        """Neurons that a target without signed spikes needs besides."""
        return sum(layer.twins for layer in self.layers)

    def _signed(self) -> list[str]:
        """What negative spikes cost where there are none."""
        if not self.twins:
            return []
        negative = sum(layer.negative for layer in self.layers)
        return [f"spikes of -1: {negative:.1f}; {self.twins} neurons need a twin on targets without signed spikes"]

    def _converted(self) -> str:
        """How many activations spike, which do not, and what enters without spikes."""
        count = len(self.spiking) + len(self.unconverted)
        left = f"; not spiking: {', '.join(self.unconverted)}" if self.unconverted else ""
        read = f"; read as an analogue current: {', '.join(self.analogue)}" if self.analogue else ""
        return f"activations that spike: {len(self.spiking)} of {count}{left}{read}"

    def json(self) -> dict[str, Any]:
        """Plain data of schema ``spir-report/1``."""
        return {
            "schema": SCHEMA,
            **attrs.asdict(self),
            "spikes": self.spikes,
            "synaptic_operations": self.synaptic_operations,
            "twins": self.twins,
        }

    def __str__(self) -> str:
        head = (
            f"{'value':<28}{'op':<14}{'neurons':>9}{'frames':>7}{'spikes':>12}{'rate':>8}{'syn. ops':>14}"
            f"{'sum bits':>10}{'state bits':>12}"
        )
        rows = [
            f"{layer.value:<28}{layer.op:<14}{layer.neurons:>9}{layer.steps:>7}{layer.spikes:>12.1f}{layer.rate:>8.3f}"
            f"{layer.synaptic_operations:>14.0f}{layer.sum_bits or '-':>10}{layer.state_bits or '-':>12}"
            for layer in self.layers
        ]
        passes = [line for e in self.journal for line in (f"  {e.step}", f"      {measured(e)}", *_indented(e.notes))]
        return "\n".join(
            [
                f"backend {self.backend}, {self.samples} samples; figures a sample",
                head,
                *rows,
                f"{'total':<28}{'':<14}{'':>9}{'':>7}{self.spikes:>12.1f}{'':>8}{self.synaptic_operations:>14.0f}",
                "coverage: " + ", ".join(f"{count} {kind}" for kind, count in self.coverage.items()),
                self._converted(),
                f"real values: {', '.join(self.reals) or 'none'}; for the host: {', '.join(self.host) or 'none'}",
                f"silent on these samples: {', '.join(self.silent) or 'none'}",
                *self._signed(),
                *self._outside(),
                f"latency (a reconstruction): {self.windows} windows, {self.latency} steps{_waiting(self.delays)}",
                "passes:",
                *passes,
                "made from: " + "; ".join(f"{k} {v}" for k, v in self.source.items() if k != "passes"),
            ]
        )


def measured(entry: Entry) -> str:
    """What a pass promised, on what that was checked, and what changed most."""
    if entry.largest is None:
        return f"{entry.contract}; {entry.checked}"
    return f"{entry.contract}; checked on {entry.checked}: {_change(entry)}"


def _waiting(delays: tuple[Delay, ...]) -> str:
    """The skip paths that wait, the longest by name."""
    if not delays:
        return ""
    last = max(delays, key=lambda delay: delay.steps)
    return f"; {len(delays)} skip paths wait, %{last.operand} longest: {last.steps} steps, for %{last.result}"


def _change(entry: Entry) -> str:
    if not entry.largest:
        return "nothing changed"
    share = "where it was 0" if entry.relative is None else f"{entry.relative:.3g} of its range"
    mean = "" if entry.mean is None else f", {entry.mean:.3g} on average"
    return f"%{entry.value} changed most, by {entry.largest:.3g}, {share}{mean}"


def _indented(notes: tuple[str, ...]) -> list[str]:
    return [f"      {line}" for note in notes for line in note.splitlines()]


def synapses(module: Module) -> dict[str, NDArray[np.int64]]:
    """For every value, the synaptic paths that leave each element towards neurons or the readout, ``[*shape]``."""
    paths = {name: np.full(t.shape, int(_ends(module, name)), dtype=np.int64) for name, t in module.types.items()}
    for node in reversed(module.nodes):
        if _passes_on(node, module):
            (operand,) = node.operands
            paths[operand] = paths[operand] + paths[node.result]
        if isinstance(node.op, LinearMap):
            found = node.op.synapses(paths[node.result], *(module.types[o].shape for o in node.operands))
            for operand, more in zip(node.operands, found, strict=True):
                paths[operand] = paths[operand] + more
    return paths


def _ends(module: Module, name: str) -> bool:
    """Whether a value arrives: something else than a linear op reads it, or the user does."""
    readers = (n for n in module.readers[name] if not _passes_on(n, module))
    return name == module.output or any(not isinstance(n.op, LinearMap) for n in readers)


def _passes_on(node: Node, module: Module) -> bool:
    """Whether a train is summed for the synapses of the next layer, in place of one product a frame."""
    sums = isinstance(node.op, Integrate) and node.op.bias is None and module.types[node.operands[0]].train is not None
    return sums and any(isinstance(n.op, LinearMap) for n in module.readers[node.result])


def _activations(module: Module) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The activations that spike, those that do not, and the inputs that layers read without spikes."""
    spiking: list[str] = []
    left: list[str] = []
    analogue: list[str] = []
    for node in module.nodes:
        readers, source = module.readers[node.result], module.definitions.get(node.operands[0])
        match node.op:
            case Neuron():
                spiking.append(node.result)
            case Encode() if source is not None and not (isinstance(source.op, Quantize) and module.enters(source)):
                spiking.append(node.result)
            case Requant() if not any(isinstance(n.op, Encode) for n in readers):
                left.append(node.result)
            case Relu() | Qcfs():
                left.append(node.result)
            case Clip() if not module.enters(node):
                left.append(node.result)
            case Quantize() if module.enters(node):
                analogue += [node.result] if any(isinstance(n.op, LinearMap) for n in readers) else []
            case Quantize() if not any(isinstance(n.op, Encode) for n in readers):
                left.append(node.result)
    return tuple(spiking), tuple(left), tuple(analogue)


class Counter:
    """Adds up what trains did, batch by batch."""

    def __init__(self, module: Module) -> None:
        self._module = module
        sources = (n for n in module.nodes if not isinstance(n.op, LinearMap))
        self._nodes = [n for n in sources if isinstance(n.type.encoding, Spikes)]
        self._paths = synapses(module)
        self._ranges = analyse(module)
        self._spikes = {n.result: np.zeros(n.type.shape, dtype=np.int64) for n in self._nodes}
        self._negative = dict.fromkeys(self._spikes, 0)

    @property
    def keep(self) -> str:
        """The pattern of the values to look at."""
        return "|".join(n.result for n in self._nodes)

    def add(self, stored: Mapping[str, Stored]) -> None:
        """One batch of stored trains."""
        for name, total in self._spikes.items():
            total += np.abs(stored[name]).sum(axis=(0, 1), dtype=np.int64)
            self._negative[name] -= int(np.minimum(stored[name], 0).sum())

    def finish(self, samples: int, journal: tuple[Entry, ...], source: Mapping[str, str], backend: str) -> Report:
        """The report of everything added."""
        layers = tuple(self._layer(node, samples) for node in self._nodes)
        kinds: dict[str, int] = {}
        for type_ in self._module.types.values():
            kind = type(type_.encoding).__name__.lower()
            kinds[kind] = kinds.get(kind, 0) + 1
        reals = tuple(n for n, t in self._module.types.items() if isinstance(t.encoding, Real))
        host = tuple(n.result for n in self._module.nodes if n.op.host)
        times = schedule(self._module)
        integers = Counts(
            str(n.op.name)
            for n in self._module.nodes
            if isinstance(n.op, (Requant, MaxPool, Relu)) and not n.type.train
        )
        return Report(
            backend,
            samples,
            layers,
            dict(sorted(kinds.items())),
            *_activations(self._module),
            reals=reals,
            host=host,
            integers=dict(sorted(integers.items())),
            windows=times.windows,
            latency=times.latency,
            delays=times.delays,
            journal=journal,
            source=source,
        )

    def _accumulated(self, node: Node) -> str | None:
        """The current behind a train, or None where the train was made of integers that no current led to."""
        while self._module.types[node.operands[0]].train is None:
            before = self._module.definitions.get(node.operands[0])
            if before is None or isinstance(before.op, LinearMap):
                return None
            node = before
        return node.operands[0]

    def _state_bits(self, node: Node, current: str | None) -> int:
        """Of what a train is made from: the neuron's own state, else the sum of all frames so far."""
        if current is None:
            return 0
        train = self._module.types[current].train
        assert train is not None  # a current
        own = node.op.state(train) if isinstance(node.op, Neuron) else None
        found = self._ranges[current]
        return max((own or (found.value | found.prefix)).bits)

    def _layer(self, node: Node, samples: int) -> Layer:
        spikes = self._spikes[node.result]
        operations = int((spikes * self._paths[node.result]).sum())
        current = self._accumulated(node)
        state = None if current is None else self._ranges[current]
        return Layer(
            value=node.result,
            op=str(node.op.name),
            origin=str(node.origin),
            neurons=node.type.size,
            steps=node.type.steps,
            spikes=int(spikes.sum()) / samples,
            negative=self._negative[node.result] / samples,
            rate=int(spikes.sum()) / (samples * node.type.size * node.type.steps),
            synaptic_operations=operations / samples,
            sum_bits=max(state.frame.bits) if state else 0,
            state_bits=self._state_bits(node, current),
            twins=node.type.size if node.type.train is not None and node.type.train.frame[0] < 0 else 0,
        )
