"""What a compiled network does on given inputs: spikes, operations, energy, memory, coverage, and how it was made."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.backend import Overflows
from spir.costs import (
    KIB,
    PAPER,
    Energy,
    Map,
    Memory,
    Prices,
    Registers,
    additions,
    maps,
    memory,
    passes_on,
    synapses,
)
from spir.errors import error
from spir.ir import Module, Node
from spir.ops._linear import LinearMap, WeightedMap
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
from spir.ranges import accumulated, analyse
from spir.schedule import STATES, Delay, schedule
from spir.types import Real, Spikes, Stored, Tensor

SCHEMA = "spir-report/2"
LONGEST = 64
"""Frames that are counted one by one; longer trains are not."""
SHOWN = 16
"""Frames whose rates the text shows; `Layer.by_bit` and the plot have them all."""
WIDE = 8
"""The paper's prices are those of operands of so many bits."""


@attrs.frozen
class Layer:
    """One train: neurons, spikes and synaptic operations a sample, the share of frames that spike, and registers.

    ``input`` says that the train carries the network's input: no neuron of the network makes it. ``by_bit`` are the
    spikes a sample of each frame (of code bits the most significant first), None beyond 64 frames. ``synapses`` leave
    all its neurons together. ``sum_bits`` hold every weight sum of one frame and ``state_bits`` every state of the
    accumulator, by proved ranges; None where a train is made of integers. ``sum_room`` and ``state_room`` are the bits
    that registers have beyond that, negative where they are too narrow, None where no register is stated. ``twins`` is
    how many neurons may spike -1, too: where a target has no signed spikes, each of them becomes two, of which one
    reads and sends the negative.
    """

    value: str
    op: str
    origin: str
    input: bool
    code: str
    neurons: int
    steps: int
    spikes: float
    by_bit: tuple[float, ...] | None
    negative: float
    rate: float
    synapses: int
    synaptic_operations: float
    sum_bits: int | None
    state_bits: int | None
    sum_room: int | None
    state_room: int | None
    twins: int

    @property
    def rate_by_bit(self) -> tuple[float, ...] | None:
        """The share of neurons that spike in each frame (where a frame holds several net spikes: spikes a neuron)."""
        return None if self.by_bit is None else tuple(spikes / self.neurons for spikes in self.by_bit)

    @property
    def updates(self) -> int | None:
        """Neuron updates a sample, one a neuron and step of its train; None where no neuron makes the train."""
        return None if self.input or self.op == MaxPool.name else self.neurons * self.steps


@attrs.frozen
class Readout:
    """An accumulator that no train is made from: the output's, or one whose integers are read; widths as in `Layer`."""

    value: str
    elements: int
    sum_bits: int
    state_bits: int
    sum_room: int | None
    state_room: int | None


@attrs.frozen
class Overflow:
    """A register that was given what it does not hold: of which value, in how many channels, how often a sample."""

    value: str
    register: str
    channels: int
    times: float


@attrs.frozen
class Report:
    """Measured on ``samples`` inputs; one JSON schema, see `json`. Figures are those of one sample.

    A synaptic operation is one spike arriving over one synapse (see `spir.costs.synapses`); what the input's spikes
    cost is listed apart. ``maps`` are the linear maps with weights, and what the integer network multiplies there;
    ``additions`` those of its pools and sums. Requantisation, scale factors and biases are counted in neither network.
    ``energies`` are products of counts and prices, one entry a source of prices, and no measurement. ``spiking`` are
    the activations that emit trains, ``unconverted`` those that do not, and ``analogue`` the inputs that layers read as
    integers, without spikes. ``integers`` counts the ops that compute integers between spikes: what they do is in no
    other figure. The latency, in windows and steps, the skip paths that must wait, and the intervals between samples in
    a pipeline, by state variables a neuron, are those of `spir.schedule`.
    """

    backend: str
    samples: int
    layers: tuple[Layer, ...]
    readouts: tuple[Readout, ...]
    maps: tuple[Map, ...]
    additions: int
    memory: Memory
    registers: Registers | None
    overflows: tuple[Overflow, ...] | None
    energies: tuple[Energy, ...]
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
    intervals: Mapping[str, int]
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
    def spikes_behind_input(self) -> float:
        """Spikes a sample, without those that carry the input."""
        return sum(layer.spikes for layer in self.layers if not layer.input)

    @property
    def operations_behind_input(self) -> float:
        """Synaptic operations a sample, without those of the input's spikes."""
        return sum(layer.synaptic_operations for layer in self.layers if not layer.input)

    @property
    def updates(self) -> int:
        """Neuron updates a sample."""
        return sum(layer.updates or 0 for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the integer network, a sample."""
        return sum(m.macs for m in self.maps if m.carrier != "reals")

    @property
    def macs_left(self) -> int:
        """Those that the spiking network does on integers, too: where the input is read without spikes."""
        return sum(m.macs for m in self.maps if m.carrier == "integers")

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
        """Plain data of schema ``spir-report/2``, whose fields docs/reports.md lists; what does not exist is null."""
        more = [{"rate_by_bit": layer.rate_by_bit, "updates": layer.updates} for layer in self.layers]
        plain = attrs.asdict(self)
        return {
            "schema": SCHEMA,
            **plain,
            "layers": [given | rest for given, rest in zip(plain["layers"], more, strict=True)],
            "memory": plain["memory"] | {"kib": self.memory.kib},
            "spikes": self.spikes,
            "spikes_behind_input": self.spikes_behind_input,
            "synaptic_operations": self.synaptic_operations,
            "operations_behind_input": self.operations_behind_input,
            "updates": self.updates,
            "macs": self.macs,
            "macs_left": self.macs_left,
            "twins": self.twins,
        }

    def plot(self, path: str | Path) -> None:
        """Draws each layer's firing rate by bit position or frame, and its spikes, one row a layer; needs matplotlib.

        Args:
            path: of a picture, in the format of its suffix, such as ``.png`` or ``.pdf``.

        Raises:
            SpirError[usage]: matplotlib is not there, the suffix is none it writes, or nothing spikes.
            SpirError[io]: the file cannot be written.
        """
        if not self.layers:
            raise error("usage", "the network has no spikes to draw", fix="report on a network of spikes")
        try:
            from matplotlib.figure import Figure  # an extra brings it
        except ImportError:
            raise error("usage", "a plot needs matplotlib", fix="pip install 'spir[plot]'") from None
        figure = Figure(figsize=(10, 1.6 + 0.24 * len(self.layers)), layout="constrained")
        _draw(figure, self.layers)
        known = figure.canvas.get_supported_filetypes()
        if (suffix := Path(path).suffix.lstrip(".").lower()) not in known:
            raise error("usage", f"no picture is called {Path(path).name}", fix=f"a suffix of: {', '.join(known)}")
        try:
            figure.savefig(path, format=suffix, dpi=150)
        except OSError as cause:
            raise error("io", f"{path}: {cause.strerror}", fix="check the path") from None

    def __str__(self) -> str:
        return "\n".join(
            [
                f"backend {self.backend}, {self.samples} samples; figures a sample",
                *self._trains(),
                *self._rates(),
                *self._multiplied(),
                *self._held(),
                *self._priced(),
                "coverage: " + ", ".join(f"{count} {kind}" for kind, count in self.coverage.items()),
                self._converted(),
                f"real values: {', '.join(self.reals) or 'none'}; for the host: {', '.join(self.host) or 'none'}",
                f"silent on these samples: {', '.join(self.silent) or 'none'}",
                *self._signed(),
                *self._outside(),
                f"latency (a reconstruction): {self.windows} windows, {self.latency} steps{_waiting(self.delays)}",
                *self._in_a_row(),
                "passes:",
                *(line for e in self.journal for line in (f"  {e.step}", f"      {measured(e)}", *_indented(e.notes))),
                "made from: " + "; ".join(f"{k} {v}" for k, v in self.source.items() if k != "passes"),
            ]
        )

    def _in_a_row(self) -> list[str]:
        """How soon samples follow each other in a pipeline."""
        if not self.windows:
            return []
        one, two = (self.intervals[states] for states in STATES)
        return [f"a sample every {one} steps with one state variable a neuron, {two} with two (a reconstruction)"]

    def _trains(self) -> list[str]:
        """The table of trains, with totals, and of accumulators that make none."""
        room = bool(self.registers)
        head = (
            f"{'value':<28}{'op':<14}{'neurons':>9}{'frames':>7}{'spikes':>12}{'rate':>8}{'syn. ops':>14}"
            f"{'sum bits':>10}{'state bits':>12}" + f"{'sum room':>10}{'state room':>12}" * room
        )
        rows = [
            f"{layer.value:<28}{layer.op:<14}{layer.neurons:>9}{layer.steps:>7}{layer.spikes:>12.1f}{layer.rate:>8.3f}"
            f"{layer.synaptic_operations:>14.0f}{_widths(layer, room)}"
            for layer in self.layers
        ]
        dashes = f"{'-':>7}{'-':>12}{'-':>8}{'-':>14}"
        rows += [
            f"{end.value:<28}{'(accumulates)':<14}{end.elements:>9}{dashes}{_widths(end, room)}"
            for end in self.readouts
        ]
        totals = [("total", self.spikes, self.synaptic_operations)]
        if any(layer.input for layer in self.layers):
            totals.append(("without input", self.spikes_behind_input, self.operations_behind_input))
        return [head, *rows, *(f"{name:<49}{'':>9}{spikes:>12.1f}{'':>8}{ops:>14.0f}" for name, spikes, ops in totals)]

    def _rates(self) -> list[str]:
        """The share of neurons that spike in each frame."""
        counted = [layer for layer in self.layers if layer.by_bit is not None]
        if not counted:
            return []
        rows = []
        for layer in counted:
            rates = layer.rate_by_bit or ()
            more = f"  and {len(rates) - SHOWN} more" * (len(rates) > SHOWN)
            rows.append(f"  {layer.value:<26}{''.join(f'{rate:>7.3f}' for rate in rates[:SHOWN])}{more}")
        return ["firing rate by frame, of bits the most significant first:", *rows]

    def _multiplied(self) -> list[str]:
        """The table of linear maps."""
        if not self.maps:
            return []
        rows = [
            f"{m.value:<28}{m.op:<14}{m.macs:>16}{m.weights:>12}{m.weight_bits or '-':>8}  {m.carrier}"
            for m in self.maps
        ]
        return [
            f"{'linear map':<28}{'op':<14}{'MACs':>16}{'weights':>12}{'bits':>8}  reads",
            *rows,
            f"MACs of the integer network, taps on padding left out: {self.macs}; {self.macs_left} stay, on integers",
            f"additions in pools and sums: {self.additions}; neuron updates: {self.updates}",
        ]

    def _held(self) -> list[str]:
        """Memory, and whose registers the table's room is of."""
        m = self.memory
        parts = (("weights", m.weights), ("biases", m.biases), ("constants", m.constants), ("neuron states", m.states))
        lines = [f"memory: {', '.join(f'{name} {bits / KIB:.2f}' for name, bits in parts)}; {m.kib:.2f} KiB in all"]
        if self.registers is not None:
            r = self.registers
            guessed = f" (assumed: {', '.join(r.assumed)})" * bool(r.assumed)
            held = f"sums in {r.sum_bits} bits and states in {r.state_bits}{guessed}"
            lines.append(f"room: {r.owner} holds {held}, less the proved need")
        if self.overflows is not None:
            found = (f"{o.value} {o.register} {o.times:.4g} in {o.channels} channels" for o in self.overflows)
            lines.append(f"overflows on {self.backend}: {'; '.join(found) or 'none on these samples'}")
        return lines

    def _priced(self) -> list[str]:
        """Energy, one row a source of prices, and what the prices leave out."""
        if not self.energies:
            return []
        rows = [
            "  "
            + "".join(
                f"{_micro(pj):>16}"
                for pj in (e.synaptic_operations, e.input, e.neuron_updates, e.macs_left, e.ann_macs)
            )
            + f"  {e.prices.source}"
            for e in self.energies
        ]
        wide = [m.value for m in self.maps if (m.weight_bits or 0) > WIDE]
        notes = [f"  weights of more than {WIDE} bits, for which {PAPER.source} states no price: {', '.join(wide)}"]
        alone = "; prices of one source alone: a profile adds those of a chip" * (len(self.energies) == 1)
        names = ("behind input", "of the input", "neuron updates", "MACs that stay", "integer network")
        return [
            f"energy in uJ, counts times published prices, not measured{alone}:",
            "  " + "".join(f"{name:>16}" for name in names) + "  prices",
            *rows,
            *(notes if wide else []),
        ]


def _micro(picojoules: float | None) -> str:
    return "-" if picojoules is None else f"{picojoules / 1e6:.4g}"


def _widths(row: Layer | Readout, room: bool) -> str:
    """The last columns of the table of trains; what is not known is a dash."""
    shown = [row.sum_bits, row.state_bits, *([row.sum_room, row.state_room] if room else [])]
    return "".join(f"{'-' if b is None else b:>{w}}" for b, w in zip(shown, (10, 12, 10, 12), strict=False))


def _draw(figure: Any, layers: tuple[Layer, ...]) -> None:
    """Rates by frame on the left, spikes on the right, rows from the input down; blank: no such frame."""
    counted = [layer.rate_by_bit or () for layer in layers]
    rates = np.full((len(layers), max(1, *map(len, counted))), np.nan)
    for row, found in zip(rates, counted, strict=True):
        row[: len(found)] = found
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    shown = left.imshow(rates, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    left.set_yticks(range(len(layers)), [layer.value for layer in layers], fontsize=8)
    left.set_xlabel("frame; of bits 0 is the most significant")
    left.xaxis.get_major_locator().set_params(integer=True)
    size = {"fraction": 0.04, "pad": 0.02, "aspect": max(12, len(layers))}
    figure.colorbar(shown, ax=left, label="firing rate: spikes a neuron, by frame", **size)
    right.barh(range(len(layers)), [layer.spikes for layer in layers], color="tab:gray")
    right.set_xlabel("spikes a sample")


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
        made = (n.result for n in module.nodes if not isinstance(n.op, LinearMap))
        types = {name: module.types[name] for name in (module.input.name, *made)}
        self._trains = {name: t for name, t in types.items() if isinstance(t.encoding, Spikes)}
        self._paths = synapses(module)
        self._ranges = analyse(module)
        self._spikes = {name: np.zeros(t.shape, dtype=np.int64) for name, t in self._trains.items()}
        self._frames = {name: np.zeros(t.steps, dtype=np.int64) for name, t in self._trains.items()}
        self._negative = dict.fromkeys(self._spikes, 0)
        self._overflows: dict[tuple[str, str], NDArray[np.int64]] | None = None

    @property
    def keep(self) -> str:
        """The pattern of the values to look at."""
        return "|".join(self._trains)

    def add(self, stored: Mapping[str, Stored], overflows: Overflows | None = None) -> None:
        """One batch of stored trains, and what registers did not hold, where those are simulated."""
        if overflows is not None:
            self._overflows = self._overflows or {}
            for register, counts in overflows.items():
                self._overflows[register] = self._overflows.get(register, 0) + counts
        for name, total in self._spikes.items():
            spikes = np.abs(stored[name]).sum(axis=1, dtype=np.int64)
            total += spikes.sum(axis=0)
            self._frames[name] += spikes.reshape(len(spikes), -1).sum(axis=1)
            self._negative[name] -= int(np.minimum(stored[name], 0).sum())

    def finish(
        self,
        samples: int,
        journal: tuple[Entry, ...],
        source: Mapping[str, str],
        backend: str,
        registers: Registers | None = None,
        prices: tuple[Prices, ...] = (),
    ) -> Report:
        """The report of everything added.

        Args:
            samples: how many inputs were added.
            journal: what each pass did.
            source: what the network was made from.
            backend: the name of what ran it.
            registers: to compare the proved widths with; None: no room is reported.
            prices: of operations, beside the paper's.
        """
        layers = tuple(self._layer(name, samples, registers) for name in self._trains)
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
        ends = self._readouts()
        found = Report(
            backend,
            samples,
            layers,
            tuple(self._readout(node, registers) for node in ends),
            maps(self._module),
            additions(self._module),
            memory(self._module, sum(map(self._held, [*self._neurons(), *ends]))),
            registers,
            self._overflown(samples),
            (),
            dict(sorted(kinds.items())),
            *_activations(self._module),
            reals=reals,
            host=host,
            integers=dict(sorted(integers.items())),
            windows=times.windows,
            latency=times.latency,
            delays=times.delays,
            intervals={states: times.interval(states) for states in STATES},
            journal=journal,
            source=source,
        )
        return attrs.evolve(found, energies=_energies(found, prices)) if layers else found

    def _overflown(self, samples: int) -> tuple[Overflow, ...] | None:
        """By value and register, in order of the module."""
        if self._overflows is None:
            return None
        order = {name: place for place, name in enumerate(self._module.types)}
        return tuple(
            Overflow(*register, int((counts > 0).sum()), int(counts.sum()) / samples)
            for register, counts in sorted(self._overflows.items(), key=lambda item: (order[item[0][0]], item[0][1]))
        )

    def _accumulator(self, name: str) -> Node | None:
        """The op that adds up the current behind a train; None where the train was made of integers without one."""
        node = self._module.definitions.get(name)
        while node is not None and self._module.types[node.operands[0]].train is None:
            node = self._module.definitions.get(node.operands[0])
            if node is not None and isinstance(node.op, LinearMap):
                return None
        return None if node is None or isinstance(node.op, MaxPool) else node

    def _enters(self, name: str) -> bool:
        """Whether a train carries the input: neither weights nor other trains lead to it."""
        waiting = [name]
        for value in waiting:
            node = self._module.definitions.get(value)
            if node is None:
                continue
            if isinstance(node.op, WeightedMap) or any(t.train for t in self._module.operand_types(node)):
                return False
            waiting += [o for o in node.operands if o not in waiting]
        return True

    def _neurons(self) -> list[Node]:
        """What keeps a state for each train that neurons make."""
        nodes = {name: self._accumulator(name) or self._module.definitions.get(name) for name in self._trains}
        kept = (n for name, n in nodes.items() if n is not None and not self._enters(name))
        return list({n.result: n for n in kept if not isinstance(n.op, MaxPool)}.values())

    def _readouts(self) -> list[Node]:
        """The accumulators of trains that no train is made from."""
        behind = {node.result for name in self._trains if (node := self._accumulator(name)) is not None}
        nodes = (n for n in self._module.nodes if isinstance(n.op, Integrate) and n.result not in behind)
        return [n for n in nodes if self._module.types[n.operands[0]].train and not passes_on(n, self._module)]

    def _state_bits(self, node: Node) -> int:
        """A register for every state of an op: those of its accumulator, else its operand as it is."""
        states = accumulated(node, self._module, self._ranges)
        return max((states or self._ranges[node.operands[0]].value).bits)

    def _held(self, node: Node) -> int:
        """Bits of the states of all elements of an op."""
        return node.type.size * self._state_bits(node)

    def _readout(self, node: Node, registers: Registers | None) -> Readout:
        sums, state = max(self._ranges[node.operands[0]].frame.bits), self._state_bits(node)
        sum_room, state_room = _rooms(sums, state, registers)
        return Readout(node.result, node.type.size, sums, state, sum_room, state_room)

    def _layer(self, name: str, samples: int, registers: Registers | None) -> Layer:
        type_, node = self._trains[name], self._module.definitions.get(name)
        spikes, paths, adds = self._spikes[name], self._paths[name], self._accumulator(name)
        sums = None if adds is None else max(self._ranges[adds.operands[0]].frame.bits)
        state = None if adds is None else self._state_bits(adds)
        sum_room, state_room = _rooms(sums, state, registers)
        total = int(spikes.sum())
        return Layer(
            value=name,
            op="input" if node is None else str(node.op.name),
            origin="" if node is None else str(node.origin),
            input=self._enters(name),
            code=_code(type_),
            neurons=type_.size,
            steps=type_.steps,
            spikes=total / samples,
            by_bit=tuple(int(f) / samples for f in self._frames[name]) if type_.steps <= LONGEST else None,
            negative=self._negative[name] / samples,
            rate=total / (samples * type_.size * type_.steps),
            synapses=int(paths.sum()),
            synaptic_operations=int((spikes * paths).sum()) / samples,
            sum_bits=sums,
            state_bits=state,
            sum_room=sum_room,
            state_room=state_room,
            twins=type_.size if type_.train is not None and type_.train.frame[0] < 0 else 0,
        )


def _code(type_: Tensor) -> str:
    assert type_.train is not None  # trains have one
    return type_.train.code


def _rooms(sums: int | None, state: int | None, registers: Registers | None) -> tuple[int | None, int | None]:
    """What registers have beyond the bits that are needed."""
    if registers is None:
        return None, None
    return (
        None if sums is None else registers.sum_bits - sums,
        None if state is None else registers.state_bits - state,
    )


def _energies(report: Report, prices: tuple[Prices, ...]) -> tuple[Energy, ...]:
    """The paper's prices first, then the others."""
    fed = any(layer.input for layer in report.layers)
    behind = report.operations_behind_input
    of_input = report.synaptic_operations - behind if fed else None
    return tuple(
        Energy.of(each, behind, of_input, report.updates, report.macs_left, report.macs) for each in (PAPER, *prices)
    )
