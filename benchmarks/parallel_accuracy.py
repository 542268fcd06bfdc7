"""Parallel conversion on test images: of QCFS networks nothing changes, of ReLU networks accuracy is measured.

    SPIR_DATA=path/to/data python -m benchmarks.parallel_accuracy [--images N] [--networks resnet20] [--json out]

Lossless: QCFS networks of L levels with `@parallel{steps=L}`. The decoded values of every layer are held against the
integer network (the module after propagate-scales), and trains and their counts against those that `serial` makes by
stepping every frame of the network before fuse-parallel: the claim is 0 mismatches in every column. The ways to run
are `parallel` on the fused network, `parallel` and `serial` on the one before fuse-parallel, and the reference
interpreter on the first images.

Training-free: ReLU networks with `@parallel-free{steps=T}`: accuracy of the float network and of the spikes, the
difference with its standard error, and how often both choose the same class. Logits are held against the integer
network here, too.

Ranges come from training images (400 of CIFAR-10 or MNIST, 100 of ImageNet); all test images judge. Every line of the
result is written to ``--json`` as soon as it is known. With ``--resume`` lines that are there already are kept and not
measured again: for a run that was cut off, not for another version of the code.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

import spir
from benchmarks.data import Images, Judged, Labels, cifar10, data_file, imagenet, mnist
from benchmarks.networks import NETWORKS, STORED, TUNED, WEIGHTS
from benchmarks.stem_exact import Classes, batch_of, chosen, log, logged
from spir import interpreter
from spir.backend import Executable, Packing
from spir.batches import bytes_of
from spir.demo.lenet import lenet5
from spir.driver import Compiled, backend_of
from spir.equality import Agreement, compare
from spir.errors import SpirError
from spir.frontends.modules.qcfs import QCFS
from spir.ir import Module
from spir.packing import Packed
from spir.types import Stored

CALIBRATION = 400
INTERPRETED = 20
"""Images that the interpreter runs, frame by frame."""
BASES = {"qcfs_lenet5": "lenet5", "qcfs_resnet20_l4": "resnet20", "qcfs_resnet20_l8": "resnet20"}
"""QCFS network -> the ReLU network that it was trained from."""
FREE = {"resnet20": (4, 8, 16, 32), "squeezenet": (16, 32), "mobilenet_05": (16, 32)}
"""ReLU network -> T."""
FUSED, UNFUSED, SERIAL, INTERPRETER = "parallel", "parallel, unfused", "serial", "interpreter"
WAYS = (FUSED, UNFUSED, SERIAL, INTERPRETER)


def base(name: str) -> torch.nn.Module:
    """A trained ReLU network."""
    return lenet5() if name == "lenet5" else NETWORKS[name](data_file(f"{STORED[name]}.safetensors"))


def samples(name: str) -> Judged:
    """The images of a ReLU network."""
    if name == "lenet5":
        return mnist().judged(CALIBRATION)
    stored = STORED[name]
    return cifar10(stored).judged(CALIBRATION) if stored.startswith("cifar10") else imagenet(stored)


def levels(model: torch.nn.Module) -> int:
    """The levels of a QCFS network, one number for all its layers."""
    (found,) = {module.levels for module in model.modules() if isinstance(module, QCFS)}
    return found


@attrs.frozen
class Lossless:
    """One way to run one QCFS network as spikes; what differs is counted against the integer network and `serial`."""

    network: str
    passes: str
    way: str
    images: int
    relu_accuracy: float
    """Of the ReLU network that the QCFS network was trained from."""
    float_accuracy: float
    """Of the QCFS network."""
    integer_accuracy: float
    spiking_accuracy: float
    agreement: float
    """Share of the images for which the QCFS network and the integer network choose the same class."""
    values: int
    """Values that both networks name, with ``elements`` elements over all images, of which ``active`` are not 0."""
    elements: int
    active: int
    mismatches: int
    logits: int
    logit_mismatches: int
    trains: int
    """Trains and currents that were held against those of `serial`, frame by frame; none for `serial` itself."""
    frames: int
    """Elements of all their frames."""
    frame_mismatches: int
    counts: int
    """Net counts of their elements; where a backend makes words, those of the words."""
    count_mismatches: int
    compile_seconds: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What was measured."""
        return (self.network, self.passes, self.way, self.images)

    @property
    def differ(self) -> int:
        """All mismatches."""
        return self.mismatches + self.frame_mismatches + self.count_mismatches


@attrs.frozen
class Free:
    """One ReLU network at one T, without training."""

    network: str
    passes: str
    images: int
    float_accuracy: float
    spiking_accuracy: float
    difference: float
    """Accuracy of the spikes less that of the float network."""
    standard_error: float
    """Of the difference, over the images."""
    agreement: float
    """Share of the images for which both choose the same class."""
    logits: int
    logit_mismatches: int
    """Against the integer network."""
    compile_seconds: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, int]:
        """What was measured."""
        return (self.network, self.passes, self.images)

    @property
    def differ(self) -> int:
        """All mismatches."""
        return self.logit_mismatches


@attrs.frozen(eq=False)
class Interpreted:
    """The reference interpreter as an executable."""

    module: Module

    def run(self, x: npt.NDArray[Any], keep: str = "") -> dict[str, Stored]:
        """As the interpreter does."""
        return dict(interpreter.run(self.module, x, keep))

    @property
    def bytes_per_sample(self) -> int:
        """All values, in the interpreter's integers, a few times over."""
        return 4 * bytes_of(self.module.types.values())


@attrs.define
class Tally:
    """Elements compared, and how many of them differ."""

    elements: int = 0
    mismatches: int = 0

    def add(self, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> None:
        """Compares two arrays."""
        self.elements += a.size
        self.mismatches += int((a != b).sum()) if a.shape == b.shape else a.size


@attrs.frozen(eq=False)
class Watched:
    """An executable that notes the class of each sample, and holds trains and counts against another's.

    Attributes:
        other: the module and the executable that make the trains to compare with; None compares nothing.
    """

    module: Module
    executable: Executable
    other: tuple[Module, Executable] | None = None
    classes: list[Classes] = attrs.field(factory=list)
    frames: Tally = attrs.field(factory=Tally)
    counts: Tally = attrs.field(factory=Tally)

    @property
    def trains(self) -> tuple[str, ...]:
        """The trains, of spikes and of currents, that both modules make."""
        if self.other is None:
            return ()
        theirs = self.other[0].types
        return tuple(n for n, t in self.module.types.items() if t.train is not None and theirs.get(n) == t)

    def run(self, x: npt.NDArray[Any], keep: str = "") -> dict[str, Stored]:
        """As the executable does."""
        stored = self.executable.run(x, keep)
        output = self.module.output
        self.classes.append(self.module.types[output].decode(stored[output]).argmax(axis=1))
        if self.other is not None:
            pattern = "|".join(self.trains)
            theirs = self.other[1].run(x, pattern)
            counts = self._counts(x, pattern, stored)
            for name in self.trains:
                self.frames.add(np.asarray(stored[name]), np.asarray(theirs[name]))
                self.counts.add(counts[name], np.asarray(theirs[name]).sum(axis=0))
        return stored

    def _counts(
        self, x: npt.NDArray[Any], pattern: str, stored: Mapping[str, Stored]
    ) -> dict[str, npt.NDArray[np.int64]]:
        """Net counts: of words where the executable makes them, which is another way than that of frames."""
        words: Mapping[str, Any] = {}
        if isinstance(self.executable, Packing):
            words = self.executable.run_packed(x, pattern)
        return {
            name: found.counts if isinstance(found := words.get(name), Packed) else np.asarray(stored[name]).sum(axis=0)
            for name in self.trains
        }

    @property
    def bytes_per_sample(self) -> int:
        """As both executables say, with the trains of the other."""
        if self.other is None:
            return self.executable.bytes_per_sample
        module, executable = self.other
        return (
            self.executable.bytes_per_sample
            + executable.bytes_per_sample
            + 2 * bytes_of(module.types[n] for n in self.trains)
        )


@attrs.frozen(eq=False)
class Compilation:
    """A network fused, the one before fuse-parallel, and the integer network."""

    passes: str
    fused: Compiled
    unfused: Module
    integers: Module
    seconds: float

    @classmethod
    def of(cls, name: str, model: torch.nn.Module, passes: str, data: Images) -> Compilation:
        """Compiles once; with ``fused=off`` a pipeline ends where fuse-parallel begins."""
        start = time.perf_counter()
        fused = spir.compile(
            model, passes, data=data, backend="parallel", progress=lambda step: log(f"{name} {passes}: {step}")
        )
        seconds = time.perf_counter() - start
        stages = {stage.name: stage.module for stage in fused.stages}
        if [stage.name for stage in fused.stages[-2:]] != ["fuse-neuron", "fuse-parallel"]:
            raise RuntimeError(f"{passes} does not end in fuse-neuron, fuse-parallel")
        return cls(passes, fused, stages["fuse-neuron"], stages["propagate-scales"], seconds)

    def watched(self, way: str) -> Watched:
        """One way to run it."""
        serial = backend_of("serial").prepare(self.unfused)
        other = (self.unfused, serial)
        match way:
            case "parallel":
                return Watched(self.fused.module, self.fused.executable, other)
            case "parallel, unfused":
                return Watched(self.unfused, backend_of("parallel").prepare(self.unfused), other)
            case "interpreter":
                return Watched(self.unfused, Interpreted(self.unfused), other)
        return Watched(self.unfused, serial)


def accuracy(classes: Classes, y: Labels) -> float:
    """Share of the classes that are right."""
    return float((classes == y).mean())


def decoded_integers(module: Module, x: Images) -> npt.NDArray[np.float64]:
    """The logits of the integer network."""
    return spir.compile(module, "").trace(x, "")[module.output].decoded


def lossless(name: str, images: int, interpreted: int, known: set[Any]) -> list[Callable[[], Lossless]]:
    """What there is to measure of a QCFS network; everything is loaded and compiled when the first is asked for."""
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        log(f"{name}: skipped, {path.name} is not there; python -m benchmarks.train_qcfs {name} makes it")
        return []
    model = TUNED[name](path).eval()
    judged, passes = samples(BASES[name]), f"@parallel{{steps={levels(model)}}}"
    x, y = judged.test.x[:images], judged.test.y[:images]
    sizes = {way: min(len(x), interpreted) if way == INTERPRETER else len(x) for way in WAYS}
    missing = [way for way in WAYS if (name, passes, way, sizes[way]) not in known]
    log(f"{name}: {len(missing)} of {len(WAYS)} lines to measure, {len(x)} images")
    if not missing:
        return []
    prepared: list[tuple[Compilation, Classes, Classes, Classes]] = []

    def prepare() -> tuple[Compilation, Classes, Classes, Classes]:
        if not prepared:
            compilation = Compilation.of(name, model, passes, judged.calibration.x)
            log(f"{name}: ReLU network, QCFS network, integer network")
            integers = decoded_integers(compilation.integers, x).argmax(axis=1)
            prepared.append((compilation, chosen(base(BASES[name]).eval(), x), chosen(model, x), integers))
        return prepared[0]

    def measure(way: str) -> Lossless:
        compilation, relus, floats, integers = prepare()
        iann, n = compilation.integers, sizes[way]
        watched = compilation.watched(way)
        batch = batch_of(iann, watched.module, watched)
        log(f"{name} {way}: {batch} images at a time")
        start = time.perf_counter()
        progress = logged(f"{name} {way}", n)
        found = compare(iann, watched.module, watched, x[:n], batch=batch, progress=progress)
        logits = next((a for a in found if a.value == iann.output), Agreement(iann.output, 0, 0, 0))
        return Lossless(
            network=name,
            passes=passes,
            way=way,
            images=n,
            relu_accuracy=accuracy(relus[:n], y[:n]),
            float_accuracy=accuracy(floats[:n], y[:n]),
            integer_accuracy=accuracy(integers[:n], y[:n]),
            spiking_accuracy=accuracy(np.concatenate(watched.classes), y[:n]),
            agreement=accuracy(floats[:n], integers[:n]),
            values=len(found),
            elements=sum(a.elements for a in found),
            active=sum(a.active for a in found),
            mismatches=sum(a.mismatches for a in found),
            logits=logits.elements,
            logit_mismatches=logits.mismatches,
            trains=len(watched.trains),
            frames=watched.frames.elements,
            frame_mismatches=watched.frames.mismatches,
            counts=watched.counts.elements,
            count_mismatches=watched.counts.mismatches,
            compile_seconds=compilation.seconds,
            seconds=time.perf_counter() - start,
        )

    return [partial(measure, way) for way in missing]


def free(name: str, images: int, steps: tuple[int, ...], known: set[Any]) -> list[Callable[[], Free]]:
    """What there is to measure of a ReLU network."""
    judged = samples(name)
    x, y = judged.test.x[:images], judged.test.y[:images]
    missing = [p for p in (f"@parallel-free{{steps={t}}}" for t in steps) if (name, p, len(x)) not in known]
    log(f"{name}: {len(missing)} of {len(steps)} lines to measure, {len(x)} images")
    if not missing:
        return []
    model = base(name).eval()
    floats: list[Classes] = []

    def measure(passes: str) -> Free:
        if not floats:
            log(f"{name}: float network")
            floats.append(chosen(model, x))
        compilation = Compilation.of(name, model, passes, judged.calibration.x)
        log(f"{name} {passes}: spikes, integer network")
        start = time.perf_counter()
        logits = compilation.fused.trace(x, "")[compilation.fused.module.output].decoded
        seconds = time.perf_counter() - start
        classes = logits.argmax(axis=1)
        tally = Tally()
        tally.add(logits, decoded_integers(compilation.integers, x))
        difference = (classes == y).astype(float) - (floats[0] == y)
        return Free(
            network=name,
            passes=passes,
            images=len(x),
            float_accuracy=accuracy(floats[0], y),
            spiking_accuracy=accuracy(classes, y),
            difference=float(difference.mean()),
            standard_error=float(difference.std() / math.sqrt(len(x))),
            agreement=accuracy(floats[0], classes),
            logits=tally.elements,
            logit_mismatches=tally.mismatches,
            compile_seconds=compilation.seconds,
            seconds=seconds,
        )

    return [partial(measure, passes) for passes in missing]


def show_lossless(found: list[Lossless]) -> Table:
    """QCFS networks as a table."""
    table = Table(title=f"QCFS networks as parallel spikes: all that differs; load {os.getloadavg()[0]:.1f}")
    words = ("network", "passes", "way")
    rates = ("ReLU", "QCFS", "integer", "spikes", "same class")
    compared = ("values", "elements", "not 0", "differ", "logits", "differ")
    trains = ("trains", "frames", "differ", "counts", "differ")
    for head in (*words, "images", *rates, *compared, *trains, "seconds"):
        table.add_column(head, justify="left" if head in words else "right")
    for o in found:
        accuracies = (o.relu_accuracy, o.float_accuracy, o.integer_accuracy, o.spiking_accuracy, o.agreement)
        values = (o.values, o.elements, f"{100 * o.active / o.elements:.0f} %", o.mismatches, o.logits)
        others = (o.logit_mismatches, o.trains, o.frames, o.frame_mismatches, o.counts, o.count_mismatches)
        table.add_row(
            *(o.network, o.passes, o.way, str(o.images)),
            *(f"{100 * v:.2f}" for v in accuracies),
            *map(str, (*values, *others)),
            f"{o.seconds:.1f}",
        )
    return table


def show_free(found: list[Free]) -> Table:
    """ReLU networks as a table."""
    table = Table(title=f"ReLU networks as parallel spikes, without training; load {os.getloadavg()[0]:.1f}")
    words = ("network", "passes")
    rates = ("float", "spikes", "difference", "s.e.", "same class")
    for head in (*words, "images", *rates, "logits", "differ", "compile s", "seconds"):
        table.add_column(head, justify="left" if head in words else "right")
    for o in found:
        table.add_row(
            *(o.network, o.passes, str(o.images)),
            *(f"{100 * v:.2f}" for v in (o.float_accuracy, o.spiking_accuracy)),
            *(f"{100 * o.difference:+.2f}", f"{100 * o.standard_error:.2f}", f"{100 * o.agreement:.2f}"),
            *(str(o.logits), str(o.logit_mismatches), f"{o.compile_seconds:.0f}", f"{o.seconds:.1f}"),
        )
    return table


def read(path: Path) -> list[Lossless | Free]:
    """The outcomes that a file holds; none where it does not exist."""
    if not path.is_file():
        return []
    stored = json.loads(path.read_text(encoding="utf-8"))
    return [Lossless(**row) for row in stored["lossless"]] + [Free(**row) for row in stored["free"]]


def write(path: Path, found: list[Lossless | Free]) -> None:
    """Writes the outcomes, the whole file or nothing."""
    kinds = {"lossless": Lossless, "free": Free}
    rows = {kind: [attrs.asdict(o) for o in found if isinstance(o, type_)] for kind, type_ in kinds.items()}
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> int:
    """Prints both tables; exit code 1 when anything differs or a network is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="at most so many test images a network")
    parser.add_argument("--interpreted", type=int, default=INTERPRETED, help="images that the interpreter runs")
    parser.add_argument("--networks", default=",".join((*BASES, *FREE)), help="names, separated by commas")
    parser.add_argument("--steps", help="T of the ReLU networks, separated by commas, in place of each network's own")
    parser.add_argument("--json", type=Path, help="write the outcomes here, too, each as soon as it is known")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds and measure what it lacks")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.json:
        parser.error("--resume needs --json")
    names = arguments.networks.split(",")
    if unknown := [name for name in names if name not in (*BASES, *FREE)]:
        parser.error(f"no network {', '.join(unknown)}; there are {', '.join((*BASES, *FREE))}")
    found = read(arguments.json) if arguments.resume else []
    known: set[Any] = {o.key for o in found}
    refused = 0
    for name in names:
        jobs: list[Callable[[], Lossless]] | list[Callable[[], Free]]
        if name in BASES:
            jobs = lossless(name, arguments.images, arguments.interpreted, known)
        else:
            steps = tuple(map(int, arguments.steps.split(","))) if arguments.steps else FREE[name]
            jobs = free(name, arguments.images, steps, known)
        for job in jobs:
            try:
                outcome = job()
            except SpirError as refusal:
                refused += 1
                log(f"{name}: refused\n{refusal}")
                continue
            found.append(outcome)
            log(f"{' '.join(map(str, outcome.key))}: {outcome.differ} differ")
            if arguments.json:
                write(arguments.json, found)
    console = Console(width=260)
    if rows := [o for o in found if isinstance(o, Lossless)]:
        console.print(show_lossless(rows))
    if others := [o for o in found if isinstance(o, Free)]:
        console.print(show_free(others))
    return int(refused > 0 or any(o.differ for o in found))


if __name__ == "__main__":
    raise SystemExit(main())
