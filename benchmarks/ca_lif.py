"""Calcium-gated spikes against the integers of networks that were trained with quantisation: the claim is 0 mismatches.

    SPIR_DATA=path/to/data python -m benchmarks.ca_lif [--images N] [--networks qat_lenet5] [--ways ...] [--json out]
    SPIR_DATA=path/to/data python -m benchmarks.ca_lif --sweep [--plot docs/ca_lif_steps.png]

The networks are the converted graphs of a quantisation toolkit (see `benchmarks.train_qat`). Their integer network, the
module behind propagate-scales, runs on the interpreter; what neurons count and the output are compared with it on all
test images, every frame stepped:

* ``serial``, ``hw``: in order; their frames are compared with each other, too. ``parallel``: counts without frames.
* ``permuted``: the frames of every input train in an order of their own.
* ``pairs``: the same, and +1 and -1 put into frames at random places.
* ``single``: one spike a frame, with the frames that drain neurons.
* ``events``: one input spike a frame, in any order over the whole image.

Accuracy of the toolkit's own graph, of the integers and of the spikes stands beside. ``--sweep`` measures accuracy for
windows of 8 to 512 steps; ``--plot`` draws it. Lines are written to ``--json`` as soon as they are known, one for every
``--slice`` images; what is there already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import attrs
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

import spir
from benchmarks.data import Images, Labels, cifar10, mnist
from benchmarks.quantised import qat
from benchmarks.stem_exact import log, logged
from spir import interpreter
from spir.batches import cut
from spir.driver import backend_of
from spir.ir import Module, Node, Value, infer
from spir.ops.encode import Encode
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.types import Int, Spikes, Tensor

Integers = npt.NDArray[np.int64]
NETWORKS = ("qat_lenet5", "qat_resnet20", "qat_lenet5_7bit", "qat_resnet20_7bit")
WINDOWS = (8, 16, 32, 64, 96, 127, 128, 192, 255, 256, 512)
TO_INTEGERS = "canonicalize, fold-bn, calibrate-range, quantize, propagate-scales{grid=threshold}"
FRAMES = {
    "serial": "serial",
    "hw": "hw",
    "permuted": "serial",
    "pairs": "serial",
    "single": "serial",
    "events": "serial",
}
"""Way -> the backend that steps it."""
WAYS = ("serial", "hw", "parallel", "permuted", "pairs", "single", "events")
BYTES = 2 * 2**30


def data(name: str) -> tuple[Images, Labels]:
    """Test images and labels."""
    found = cifar10() if "resnet" in name else mnist()
    return found.x_test, found.y_test


@attrs.frozen
class Outcome:
    """One way to run one network."""

    network: str
    way: str
    images: int
    steps: int
    frames: int
    """Of the last train."""
    toolkit_accuracy: float
    integer_accuracy: float
    spiking_accuracy: float
    elements: int
    active: int
    mismatches: int
    frame_mismatches: int
    """Against `serial`; only `hw` in order is compared."""
    negative_spikes: int
    rounding_spikes: int
    saturated: int
    """Counts at the upper end of their range."""
    seconds: float

    def __add__(self, other: Outcome) -> Outcome:
        """The same of more images."""
        whole = self.images + other.images
        mine, more = attrs.asdict(self), attrs.asdict(other)
        shares = {k: (v * self.images + more[k] * other.images) / whole for k, v in mine.items() if "accuracy" in k}
        sums = {k: v + more[k] for k, v in mine.items() if k not in ("network", "way", "steps", "frames", *shares)}
        return attrs.evolve(self, **shares, **sums)


def spiking(integers: Module, way: str) -> Module:
    """The network of calcium-gated neurons."""
    mode = "single" if way == "single" else "multi"
    passes = f"derive-thresholds{{neuron=ca-lif}}, fuse-neuron{{mode={mode}}}"
    return spir.compile(integers, passes, check="off").module


def fed_with_trains(module: Module, frames: int, net: tuple[int, int]) -> tuple[Module, Tensor]:
    """The network behind its first encoder, which now reads a train of so many frames; and what the encoder made."""
    (encoder,) = (n for n in module.nodes if isinstance(n.op, Encode))
    train = encoder.type.encoding
    assert isinstance(train, Spikes)
    wide = Spikes.rate(frames, train.lo, train.hi, train.scale, net)
    source = Value(encoder.result, Tensor(encoder.type.shape, wide))
    types = {source.name: source.type}
    nodes = []
    for node in module.nodes:
        if isinstance(node.op, (Quantize, Encode)):
            continue
        type_ = types[node.result] = infer(node.op, tuple(types[o] for o in node.operands))
        nodes.append(Node(node.result, node.op, node.operands, type_, node.origin))
    return Module(source, tuple(nodes), module.output), encoder.type


def shuffled(frames: Integers, rng: np.random.Generator, *, pairs: bool) -> Integers:
    """Every train in an order of its own, and pairs of opposite spikes in its frames."""
    mixed = rng.permuted(frames, axis=0)
    if pairs:
        extra = rng.random(mixed.shape) < 0.1
        mixed = mixed + extra - rng.permuted(extra, axis=0)
    return mixed


def one_by_one(codes: Integers, frames: int, rng: np.random.Generator) -> Integers:
    """``[T, 1, *shape]``: every spike of one image in a frame of its own, in any order."""
    flat = codes.reshape(-1)
    events = rng.permutation(np.repeat(np.arange(flat.size), np.abs(flat)))
    stored = np.zeros((frames, flat.size), dtype=np.int64)
    stored[rng.permutation(frames)[: len(events)], events] = np.sign(flat[events])
    return stored.reshape(frames, 1, *codes.shape[1:])


@attrs.frozen(eq=False)
class Subject:
    """A quantised network, its integers and its test images."""

    name: str
    graph: torch.fx.GraphModule
    integers: Module
    x: Images
    y: Labels

    @classmethod
    def of(cls, name: str, images: int) -> Subject:
        """Imported without calibration data: the graph has all scales."""
        graph, (x, y) = qat(name), data(name)
        integers = spir.compile(graph, TO_INTEGERS, example=x[:4], check="off").module
        return cls(name, graph, integers, x[:images], y[:images])

    def part(self, first: int, count: int) -> Subject:
        """Some of the images."""
        return attrs.evolve(self, x=self.x[first : first + count], y=self.y[first : first + count])

    def accuracy(self, logits: npt.NDArray[Any]) -> float:
        """In per cent."""
        return 100 * float((logits.reshape(len(logits), -1).argmax(axis=1) == self.y[: len(logits)]).mean())

    def toolkit(self) -> float:
        """The accuracy of the toolkit's own graph."""
        with torch.inference_mode():
            parts = [self.graph(torch.from_numpy(self.x[i : i + 100])).numpy() for i in range(0, len(self.x), 100)]
        return self.accuracy(np.concatenate(parts))

    def measure(self, way: str, seed: int) -> Outcome:
        """Every image one way; see the module."""
        toolkit = self.toolkit()
        module = whole = spiking(self.integers, way)
        rng = np.random.default_rng(seed)
        (encoder,) = (n for n in whole.nodes if isinstance(n.op, Encode))
        window = encoder.type.steps
        code = self.integers.types[encoder.operands[0]]
        if way in ("permuted", "pairs"):
            module, _ = fed_with_trains(whole, window, (-2, 2))
        elif way == "events":
            most = int(
                np.abs(interpreter.run(self.integers, self.x, encoder.operands[0])[encoder.operands[0]])
                .reshape(len(self.x), -1)
                .sum(axis=1)
                .max()
            )
            module, _ = fed_with_trains(whole, max(window, most), (-1, 1))
        names = [
            n for n, t in module.types.items() if n in self.integers.types and isinstance(t.encoding, (Spikes, Int))
        ]
        if way == "parallel":
            names = [module.output]
        neurons = [n for n in names if module.types[n].train is not None and n in module.definitions]
        ready = backend_of(FRAMES.get(way, way)).prepare(module)
        beside = backend_of("serial").prepare(module) if way == "hw" else None
        stored = sum(8 * module.types[n].size * module.types[n].steps for n in names) + ready.bytes_per_sample
        size = 1 if way == "events" else max(1, min(50, BYTES // stored))
        totals = dict.fromkeys(("elements", "active", "mismatches", "frame_mismatches"), 0)
        seen = dict.fromkeys(("negative_spikes", "rounding_spikes", "saturated"), 0)
        logits, integer_logits = [], []
        progress, done, begin = logged(f"{self.name} {way}", len(self.x)), 0, time.perf_counter()
        for part in cut(self.integers, self.x, size):
            wanted = interpreter.run(self.integers, part, "|".join([*names, encoder.operands[0], self.integers.output]))
            fed: npt.NDArray[Any] = part
            if module is not whole:
                codes = np.asarray(wanted[encoder.operands[0]], dtype=np.int64)
                types = (Tensor(code.shape, code.encoding),)
                fed = (
                    one_by_one(codes, module.input.type.steps, rng)
                    if way == "events"
                    else shuffled(np.asarray(encoder.op.reference(types, codes)), rng, pairs=way == "pairs")
                )
            found = ready.run(fed, "|".join(names))
            other = beside.run(fed, "|".join(neurons)) if beside is not None else {}
            for name in names:
                counts = module.types[name].integers(np.asarray(found[name], dtype=np.int64))
                expected = self.integers.types[name].integers(np.asarray(wanted[name], dtype=np.int64))
                totals["elements"] += counts.size
                totals["active"] += int((expected != 0).sum())
                totals["mismatches"] += int((counts != expected).sum())
                if name in other:
                    totals["frame_mismatches"] += int((other[name] != found[name]).sum())
            for name in neurons if way != "parallel" else ():
                frames, encoding = found[name], module.types[name].encoding
                assert isinstance(encoding, Spikes)
                seen["negative_spikes"] -= int(np.minimum(frames, 0).sum())
                seen["rounding_spikes"] += int((frames[-1] != 0).sum())
                seen["saturated"] += int((frames.sum(axis=0) == encoding.hi).sum())
            logits.append(module.types[module.output].decode(found[module.output]))
            integer_logits.append(self.integers.types[self.integers.output].decode(wanted[self.integers.output]))
            progress(done := done + len(part))
        return Outcome(
            self.name, way, len(self.x), window, max(module.types[n].steps for n in names), toolkit,
            self.accuracy(np.concatenate(integer_logits)), self.accuracy(np.concatenate(logits)),
            **totals, **seen, seconds=time.perf_counter() - begin,
        )  # fmt: skip

    def swept(self, steps: int) -> float:
        """The accuracy of spikes in a window of so many steps."""
        passes = f"shorten-window{{steps={steps}}}, derive-thresholds{{neuron=ca-lif, steps={steps}}}, fuse-neuron"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            coded = [n.op for n in self.integers.nodes if isinstance(n.op, (Quantize, Requant))]
            largest = max(max(op.hi, -op.lo) for op in coded)
            window = f"derive-thresholds{{neuron=ca-lif, steps={max(steps, largest)}}}, fuse-neuron"
            snn = spir.compile(self.integers, passes if steps < largest else window, backend="parallel", check="off")
        parts = [np.asarray(snn(self.x[i : i + 100])) for i in range(0, len(self.x), 100)]
        return self.accuracy(np.concatenate(parts))


def show(found: list[Outcome]) -> Table:
    """The lines as a table."""
    table = Table(title=f"calcium-gated spikes against their integer networks; load {os.getloadavg()[0]:.1f}")
    columns: dict[str, Callable[[Outcome], str]] = {
        "network": lambda o: o.network,
        "way": lambda o: o.way,
        "images": lambda o: str(o.images),
        "T, frames": lambda o: f"{o.steps}, {o.frames}",
        "toolkit": lambda o: f"{o.toolkit_accuracy:.2f}",
        "integers": lambda o: f"{o.integer_accuracy:.2f}",
        "spikes": lambda o: f"{o.spiking_accuracy:.2f}",
        "counts": lambda o: str(o.elements),
        "not 0": lambda o: f"{100 * o.active / o.elements:.0f} %",
        "differ": lambda o: str(o.mismatches + o.frame_mismatches),
        "negative": lambda o: str(o.negative_spikes),
        "rounding": lambda o: str(o.rounding_spikes),
        "saturated": lambda o: str(o.saturated),
        "s": lambda o: f"{o.seconds:.0f}",
    }
    for head in columns:
        table.add_column(head)
    for outcome in found:
        table.add_row(*(cell(outcome) for cell in columns.values()))
    return table


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Accuracy over steps, one curve a network; a line at the steps that its largest code needs."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, accuracy in curves.items():
        (curve,) = axes.plot(WINDOWS, accuracy, marker="o", markersize=3, label=name)
        axes.axvline(127 if name.endswith("7bit") else 255, color=curve.get_color(), linewidth=0.5, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([8, 16, 32, 64, 128, 256, 512], labels=["8", "16", "32", "64", "128", "256", "512"])
    axes.set_xlabel("steps T (dotted: as many as the largest code)")
    axes.set_ylabel("accuracy of the spikes, %")
    axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> int:
    """Measures what is asked for; exit status 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--networks", default=",".join(NETWORKS[:2]))
    parser.add_argument("--ways", default=",".join(WAYS[:6]))
    parser.add_argument("--slice", type=int, default=100)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts: list[Outcome] = []
    if asked.json is not None and asked.json.exists():
        parts = [Outcome(**line) for line in json.loads(asked.json.read_text())]
    lines: list[Outcome] = []
    curves: dict[str, list[float]] = {}
    for name in asked.networks.split(","):
        subject = Subject.of(name, asked.images)
        if asked.sweep:
            curves[name] = []
            for steps in WINDOWS:
                curves[name].append(subject.swept(steps))
                log(f"{name} T = {steps}: {curves[name][-1]:.2f} %")
            continue
        for way in asked.ways.split(","):
            known = [p for p in parts if (p.network, p.way) == (name, way)]
            for first in range(sum(p.images for p in known), len(subject.x), asked.slice):
                known.append(subject.part(first, asked.slice).measure(way, first))
                parts.append(known[-1])
                if asked.json is not None:
                    asked.json.write_text(json.dumps([attrs.asdict(part) for part in parts], indent=1) + "\n")
            lines.append(reduce(add, known))
    if asked.plot is not None and curves:
        draw(curves, asked.plot)
    if lines:
        Console(width=200).print(show(lines))
    return int(any(line.mismatches + line.frame_mismatches for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
