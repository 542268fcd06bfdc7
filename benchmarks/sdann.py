"""SDANN on narrow registers: what overflow does, what scaled integration costs, and what spikes and MACs cost.

    SPIR_DATA=path/to/data python -m benchmarks.sdann [--tables overflow,scaled,chip,energy] [--networks resnet20,...]
        [--images N] [--codes 8,7,6] [--json out.json] [--layers out.md]

Networks are calibrated as in `benchmarks.stem_exact`, which also measures that without scaled integration spikes equal
the integer network (``python -m benchmarks.stem_exact --passes '@sdann' --backends 'serial;hw'``).

* ``overflow``: 16-bit sums and states without scaling, saturating and wrapping: accuracy, and overflows by layer
  against a plain recount on 64-bit integers of what every layer read.
* ``scaled``: `scale-integration` to 16 bits, r guaranteed and from the data, a layer and a channel: accuracy, top-1
  agreement with the wide network, the error of every layer in steps of its codes, and the overflows that the simulated
  registers counted. ``--codes`` are bits of codes, beside weights of 8: errors are those against the wide network of as
  many bits, agreement and difference those against the wide network of 8.
* ``chip``: the options of `@sdann` that fit a chip, on `hw` with its profile: accuracy, and top-1 agreement with the
  wide network. Nothing can overflow there, for any input.
* ``energy``: spikes, synaptic operations and MACs of the wide network, and the energy of both.

Lines are written to ``--json`` as soon as they are known; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

import spir
from benchmarks.stem_exact import BATCH_BYTES, Subject, log, logged
from spir.backend import Counting
from spir.batches import bytes_of
from spir.driver import backend_of
from spir.ir import Module, Node
from spir.ops._accumulation import shifts, terms
from spir.ops._linear import LinearMap, channelwise
from spir.ops.integrate import Integrate
from spir.ops.neuron_stem import NeuronStem
from spir.ranges import accumulated, analyse, witness
from spir.types import Current, Spikes, weights

Integers = npt.NDArray[np.int64]
Line = dict[str, Any]
NETWORKS = ("lenet5", "resnet20", "resnet32", "convnetjs", "mobilenet_025", "mobilenet_05", "squeezenet")
WAYS = ("r=guaranteed", "r=guaranteed, per=channel", "r=data", "r=data, per=channel")
CHIPS = {
    "darwin3": "@sdann{accumulator=16, divisor=255}",
    "speck": "@sdann{accumulator=16, divisor=32767}",
    "loihi": "@sdann{accumulator=21, divisor=131071}",
}
"""What fits each chip: the narrower of its registers, and its largest divisor."""
BITS = 16
CODES = 8
BATCH = 20


def wide(subject: Subject, codes: int = CODES) -> spir.driver.Compiled:
    """The network on registers of 64 bits, with codes of so many."""
    passes = f"@sdann{{bits={codes}, weights={CODES}}}"
    return spir.compile(subject.model, passes, data=subject.calibration, backend="hw", check="off")


def counted(module: Module, x: npt.NDArray[Any], overflow: str, keep: str, batch: int) -> Iterator[tuple[Line, Any]]:
    """What the registers of 16 bits make of the images, batch by batch, and what they did not hold."""
    ready = backend_of(f"hw{{accumulator={BITS}, overflow={overflow}}}").prepare(module)
    assert isinstance(ready, Counting)  # hw is
    for start in range(0, len(x), batch):
        yield ready.run_counting(x[start : start + batch], keep)


def narrow(values: npt.NDArray[Any], overflow: str) -> Integers:
    """What a register of 16 bits keeps."""
    low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
    return np.asarray(np.clip(values, low, high) if overflow == "saturate" else (values - low) % 2**BITS + low)


def recount(node: Node, module: Module, stored: Line, overflow: str) -> tuple[int, int]:
    """Overflows of an op's sum and of its state, recounted from what it read."""
    types = module.operand_types(node)
    if isinstance(node.op, LinearMap) and isinstance(node.type.encoding, Current) and not node.op.relabels:
        sums = np.asarray(node.op.reference(types, *(stored[o] for o in node.operands)))
        kept_ = narrow(sums, overflow)
        assert np.array_equal(kept_, stored[node.result])
        return int((kept_ != sums).sum()), 0
    if isinstance(node.op, (NeuronStem, Integrate)) and types[0].train is not None:
        state, missed = np.zeros(stored[node.operands[0]].shape[1:], dtype=np.int64), 0
        for frame, factor in zip(stored[node.operands[0]], weights("bits", types[0].steps), strict=True):
            whole = state + frame * factor
            state = narrow(whole, overflow)
            missed += int((state != whole).sum())
        bias = node.op.bias if isinstance(node.op, Integrate) else None
        if bias is not None:
            whole = state + bias.values.reshape(-1, *[1] * (state.ndim - 2))
            missed += int((narrow(whole, overflow) != whole).sum())
        return 0, missed
    return 0, 0


def overflowing(subject: Subject, modes: tuple[str, ...]) -> Iterator[Line]:
    """Registers of 16 bits, and no scaling."""
    snn = wide(subject)
    module = snn.module
    for overflow in modes:
        begin, classes = time.perf_counter(), []
        layers: dict[str, tuple[int, ...]] = {}
        progress = logged(f"{subject.name} {overflow}", len(subject.x))
        for stored, missed in counted(module, subject.x, overflow, "*", BATCH):
            classes.append(stored[module.output].reshape(len(stored[module.output]), -1).argmax(axis=1))
            for node in module.nodes:
                found = tuple(int(np.sum(missed.get((node.result, kind), 0))) for kind in ("sum", "state"))
                plain = recount(node, module, stored, overflow)
                old = layers.get(node.result, (0, 0, 0, 0))
                layers[node.result] = tuple(a + b for a, b in zip(old, (*found, *plain), strict=True))
            progress(sum(map(len, classes)))
        chosen = np.concatenate(classes)
        yield {
            "network": subject.name,
            "way": overflow,
            "images": len(subject.x),
            "accuracy": 100 * float((chosen == subject.y).mean()),
            "overflows": sum(sum(v[:2]) for v in layers.values()),
            "recounted": sum(sum(v[2:]) for v in layers.values()),
            "differ": sum(v[:2] != v[2:] for v in layers.values()),
            "layers": {name: v for name, v in layers.items() if any(v)},
            "seconds": time.perf_counter() - begin,
        }


def witnessed(module: Module) -> tuple[int, int, int]:
    """Inputs that drive the worst channel of every layer to its proved bounds: how many there are, attain and overflow.

    Each frame holds the worst input of its own, which bits allow. Only layers that read spikes by one op are driven.
    """
    found, driven, attained, beyond = analyse(module), 0, 0, 0
    low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
    for node in module.nodes:
        source = module.definitions.get(node.operands[0])
        bounds = accumulated(node, module, found) if isinstance(node.op, NeuronStem) else None
        if bounds is None or source is None or not isinstance(source.op, LinearMap):
            continue
        assert isinstance(node.op, NeuronStem)  # others have no bounds here
        types = module.operand_types(source)
        if not all(isinstance(t.encoding, Spikes) for t in types):
            continue
        shapes, by = [t.shape for t in types], shifts(node.op.shift)
        for top in (False, True):
            ends = bounds.hi if top else -bounds.lo
            channel = int(np.argmax(ends))
            parts = [
                [witness(source.op, shapes, [getattr(found[o], part) for o in source.operands], channel, top=top)]
                for part in ("first", "rest")
            ]
            frames = [parts[0][0], *parts[1] * (types[0].steps - 1)]
            given = [np.stack([frame[i][None] for frame in frames]).astype(np.int64) for i in range(len(types))]
            sums = np.asarray(source.op.reference(types, *given))
            each = channelwise(by, sums.ndim - 2)
            reached = np.cumsum(list(terms(list(sums), weights("bits", len(sums)), each)), axis=0)[:, 0, channel]
            driven += 1
            attained += int((reached.max() if top else reached.min()) == (bounds.hi if top else bounds.lo)[channel])
            beyond += int(reached.min() < low or reached.max() > high)
    return driven, attained, beyond


def bounded(name: str, notes: list[str]) -> dict[str, str]:
    """The r of a layer, and by how much its scaled sum may move a code before it is rounded, as the pass notes it."""
    (found,) = (m for note in notes if (m := re.search(rf"%{re.escape(name)}: r = (\S+), \w+: ([^;]*)", note)))
    bound = found[2].removeprefix("bounded, ").removesuffix(" codes before they are rounded")
    moved = next(note for note in notes if note.startswith("biases in steps of codes"))
    return {
        "r": found[1],
        "bound": bound + ", and half a code of a bias" * bool(re.search(rf"%{re.escape(name)}(,|;| \()", moved)),
    }


BY_LAYER = """# Errors of scaled integration, layer by layer

Sums and states of 16 bits, `@sdann{accumulator=16}`: r; by how much a code may move before it is rounded, which is
proved; and what codes did on the test images against the wide network, what came before included. All in steps of the
codes. Written by `python -m benchmarks.sdann --json all.json --layers docs/sdann_layers.md`; see [SDANN](sdann.md)."""


def by_layer(lines: list[Line]) -> str:
    """The errors of every layer with r guaranteed, one r a layer, as Markdown."""
    parts = [BY_LAYER]
    for line in lines:
        if line["table"] == "scaled" and (line["way"], line.get("codes")) == (WAYS[0], CODES):
            parts.append(f"## {line['network']}, {line['images']} images")
            head = ["| layer | r | bound | mean | share changed | most |", "|---|---|---|---|---|---|"]
            rows = [
                f"| {name} | {v['r']} | {v['bound']} | {v['mean']:.3f} | {100 * v['changed']:.1f} % | {v['most']:.0f} |"
                for name, v in line["layers"].items()
            ]
            parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts) + "\n"


def scaled(subject: Subject, ways: tuple[str, ...], codes: int) -> Iterator[Line]:
    """Registers of 16 bits, and sums that are scaled to fit."""
    snn = wide(subject, codes)
    whole = None if codes == CODES else wide(subject)(subject.x).argmax(axis=1)
    neurons = [n.result for n in snn.module.nodes if isinstance(n.op, NeuronStem)]
    for way in ways:
        begin = time.perf_counter()
        passes = f"scale-integration{{bits={BITS}, {way}}}, calibrate-bias{{register={BITS}}}"
        made = spir.compile(snn.module, passes, data=subject.calibration, check="off")
        module, notes = made.module, [note for entry in made.journal for note in entry.notes]
        driven, attained, beyond = witnessed(module)
        log(f"{subject.name} {way}: scaled; {attained} of {driven} bounds attained, {beyond} overflow")
        pattern = "|".join([*neurons, module.output])
        exact = backend_of("hw").prepare(snn.module)
        held = 2 * bytes_of(m.types[name] for m in (snn.module, module) for name in neurons)
        batch = max(1, min(BATCH, BATCH_BYTES // (held + 2 * exact.bytes_per_sample)))
        ready = counted(module, subject.x, "saturate", pattern, batch)
        classes: list[tuple[Integers, Integers]] = []
        missed, misses = 0, {name: np.zeros(4) for name in neurons}
        progress = logged(f"{subject.name} {way}", len(subject.x))
        for start, (stored, lost) in zip(range(0, len(subject.x), batch), ready, strict=True):
            wanted = exact.run(subject.x[start : start + batch], pattern)
            pair = [
                m.types[m.output].decode(s[m.output]).reshape(len(s[m.output]), -1).argmax(axis=1)
                for m, s in ((snn.module, wanted), (module, stored))
            ]
            classes.append((pair[0], pair[1]))
            missed += int(sum(np.sum(v) for v in lost.values()))
            for name in neurons:
                type_ = module.types[name]
                change = np.abs(type_.integers(np.asarray(stored[name])) - type_.integers(np.asarray(wanted[name])))
                misses[name] += change.size, change.sum(), (change > 0).sum(), 0
                misses[name][3] = max(misses[name][3], change.max())
            progress(sum(len(a) for a, _ in classes))
        own, new = (np.concatenate(side) for side in zip(*classes, strict=True))
        old = own if whole is None else whole
        worst = max(neurons, key=lambda name: misses[name][1] / misses[name][0])
        yield {
            "network": subject.name,
            "way": way,
            "codes": codes,
            "images": len(subject.x),
            "accuracy": 100 * float((own == subject.y).mean()),
            **compared(old, new, subject),
            "overflows": missed,
            "witnesses": driven,
            "attained": attained,
            "witness_overflows": beyond,
            "largest_r": int(max(shifts(n.op.shift).max() for n in module.nodes if isinstance(n.op, NeuronStem))),
            "worst_layer": worst,
            "worst_error": misses[worst][1] / misses[worst][0],
            "layers": {
                name: {**bounded(name, notes), "mean": v[1] / v[0], "changed": v[2] / v[0], "most": v[3]}
                for name, v in misses.items()
            },
            "biases": next(note for note in notes if note.startswith("biases in steps of codes")),
            "seconds": time.perf_counter() - begin,
        }


def on_chips(subject: Subject, names: list[str]) -> Iterator[Line]:
    """The whole network within the limits of each chip, or what it refuses."""
    old = wide(subject)(subject.x).argmax(axis=1)
    for name in names:
        begin = time.perf_counter()
        line = {"network": subject.name, "way": name, "images": len(subject.x), "passes": CHIPS[name]}
        try:
            snn = spir.compile(
                *(subject.model, CHIPS[name]), data=subject.calibration, backend=f"hw{{profile={name}}}", check="off"
            )
        except spir.SpirError as refusal:
            log(f"{subject.name} on {name}: {refusal}")
            yield {**line, "refused": [str(d) for d in refusal.diagnostics], "seconds": time.perf_counter() - begin}
            continue
        new = snn(subject.x).argmax(axis=1)
        log(f"{subject.name} on {name}: {100 * float((new == subject.y).mean()):.2f} %")
        yield {**line, **compared(old, new, subject), "seconds": time.perf_counter() - begin}


def compared(old: Integers, new: Integers, subject: Subject) -> Line:
    """Accuracy of other classes than those of the wide network, and how far apart the two are, in percent."""
    difference = (new == subject.y).astype(float) - (old == subject.y)
    return {
        "scaled": 100 * float((new == subject.y).mean()),
        "difference": 100 * float(difference.mean()),
        "standard_error": 100 * float(difference.std() / math.sqrt(len(difference))),
        "agreement": 100 * float((old == new).mean()),
    }


def energies(subject: Subject) -> Iterator[Line]:
    """What the wide network does on up to 100 images, and what it costs."""
    begin = time.perf_counter()
    report = wide(subject).report(subject.x[:100], profile="darwin3").json()
    yield {
        "network": subject.name,
        "way": "energy",
        "images": min(100, len(subject.x)),
        "spikes": report["spikes"],
        "synaptic_operations": report["synaptic_operations"],
        "macs": report["macs"],
        "energies": report["energies"],
        "seconds": time.perf_counter() - begin,
    }


def measured(subject: Subject, table: str, asked: argparse.Namespace, known: set[Any]) -> Iterator[Line]:
    """The lines of a table that are asked for and not known."""
    match table:
        case "overflow":
            if modes := tuple(mode for mode in ("saturate", "wrap") if (table, mode, None) not in known):
                yield from overflowing(subject, modes)
        case "scaled":
            for codes in map(int, asked.codes.split(",")):
                if ways := tuple(way for way in asked.ways.split(";") if (table, way, codes) not in known):
                    yield from scaled(subject, ways, codes)
        case "chip":
            if chips := [name for name in CHIPS if (table, name, None) not in known]:
                yield from on_chips(subject, chips)
        case "energy" if (table, table, None) not in known:
            yield from energies(subject)


def show(lines: list[Line], columns: dict[str, str], title: str) -> Table:
    """Lines as a table; columns by their format."""
    table = Table(title=f"{title}; load {os.getloadavg()[0]:.1f}")
    for head, form in columns.items():
        table.add_column(head.replace("_", " "), justify="right" if form else "left")
    for line in lines:
        table.add_row(*(format(line[head], form) for head, form in columns.items()))
    return table


_JUDGED = ("network:", "way:", "images:d", "accuracy:.2f")
TABLES: dict[str, dict[str, str]] = {
    table: dict(column.split(":", 1) for column in columns)
    for table, columns in {
        "overflow": (*_JUDGED, "overflows:d", "recounted:d", "differ:d"),
        "scaled": (
            *_JUDGED,
            *(
                "codes:d",
                "scaled:.2f",
                "difference:+.2f",
                "standard_error:.2f",
                "agreement:.2f",
                "overflows:d",
                "witness_overflows:d",
            ),
            *("largest_r:d", "worst_layer:", "worst_error:.3f"),
        ),
        "chip": (
            "network:",
            "way:",
            "images:d",
            "scaled:.2f",
            "difference:+.2f",
            "standard_error:.2f",
            "agreement:.2f",
        ),
        "energy": ("network:", "images:d", "spikes:.0f", "synaptic_operations:.3e", "macs:.3e"),
    }.items()
}
"""Columns by their format."""


def main() -> int:
    """Measures what is asked for and not known yet.

    The exit status is 1 where a count of overflows is wrong, and where a guaranteed r lets any input overflow.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="overflow,scaled,chip,energy")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--ways", default=";".join(WAYS))
    parser.add_argument("--codes", default=str(CODES), help="bits of the codes of `scaled`, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=Path, help="a Markdown file for the errors of every layer")
    asked = parser.parse_args()
    lines: list[Line] = []
    if asked.json is not None and asked.json.exists():
        lines = [line for line in json.loads(asked.json.read_text()) if "refused" not in line]
    for name in asked.networks.split(","):
        subject = Subject.of(name, asked.images)
        known = {(o["table"], o["way"], o.get("codes")) for o in lines if o["network"] == name}
        for table in asked.tables.split(","):
            for line in measured(subject, table, asked, known):
                lines.append({"table": table, **line})
                if asked.json is not None:
                    asked.json.write_text(json.dumps(lines, indent=1) + "\n")
    for table, columns in TABLES.items():
        if found := [line for line in lines if line["table"] == table and "refused" not in line]:
            Console(width=200).print(show(found, columns, table))
    if asked.layers is not None:
        asked.layers.write_text(by_layer(lines))
    proved = (line for line in lines if "guaranteed" in line["way"])
    broken = any(line["overflows"] + line["witness_overflows"] for line in proved)
    return int(broken or any(line.get("differ", 0) for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
