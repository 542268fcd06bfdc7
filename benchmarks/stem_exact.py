"""STEM spikes against the integer network, every layer, on test images: the claim is 0 mismatches.

    SPIR_DATA=path/to/data python -m benchmarks.stem_exact [--images N] [--networks resnet20,lenet5] [--json out.json]

Networks are calibrated on training images (200 of CIFAR-10 or MNIST, 100 of ImageNet) and judged on all test images:
accuracy of the float network, of the integer network and of the spikes, the difference between float and integer
network with its standard error, and how often these two choose the same class. Networks with max-pools are judged
twice: with the pools on integrated values, and with the pools lowered to neurons.

Every line of the result is written to ``--json`` as soon as it is known. With ``--resume`` lines that are there already
are kept and not measured again: for a run that was cut off, not for another version of the code.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import attrs
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table

import spir
from benchmarks.data import Images, Judged, Labels, cifar10, data_file, imagenet, mnist
from benchmarks.networks import NETWORKS, STORED
from spir.backend import Executable
from spir.batches import bytes_of
from spir.demo.lenet import lenet5
from spir.driver import backend_of
from spir.equality import compare, shared
from spir.errors import SpirError
from spir.ir import Module
from spir.types import Stored

CALIBRATION = 200
BACKENDS = ("serial", "hw{collapse=off}", "hw")
STEM = "@stem{bits=8}"
LOWERED = "@stem{bits=8, max_pool=lower}"
PIPELINES = {"squeezenet": (STEM, LOWERED), "convnetjs": (STEM, LOWERED)}
"""The pipelines of the networks with max-pools; all others take the first alone."""
BATCH_BYTES = 2 * 2**30
LARGEST_BATCH = 50
LOG_SECONDS = 30

Classes = npt.NDArray[np.int64]
Line = TypeVar("Line")


def networks() -> dict[str, Callable[[], tuple[torch.nn.Module, Judged]]]:
    """Each network with its calibration and test samples, loaded when asked for."""
    return {
        "lenet5": lambda: (lenet5(), mnist().judged(CALIBRATION)),
        "resnet20": lambda: (_trained("resnet20"), cifar10(STORED["resnet20"]).judged(CALIBRATION)),
        "resnet32": lambda: (_trained("resnet32"), cifar10(STORED["resnet32"]).judged(CALIBRATION)),
        "convnetjs": lambda: (_trained("convnetjs"), cifar10(STORED["convnetjs"]).judged(CALIBRATION)),
        "sinabs_mnist": lambda: (_trained("sinabs_mnist"), mnist(raw=True).judged(CALIBRATION)),
        "mobilenet_025": lambda: (_trained("mobilenet_025"), imagenet(STORED["mobilenet_025"])),
        "mobilenet_05": lambda: (_trained("mobilenet_05"), imagenet(STORED["mobilenet_05"])),
        "squeezenet": lambda: (_trained("squeezenet"), imagenet(STORED["squeezenet"])),
    }


def _trained(name: str) -> torch.nn.Module:
    return NETWORKS[name](data_file(f"{STORED[name]}.safetensors"))


@attrs.frozen
class Outcome:
    """One backend on one pipeline of one network."""

    network: str
    passes: str
    backend: str
    images: int
    float_accuracy: float
    integer_accuracy: float
    spiking_accuracy: float
    difference: float
    """Accuracy of the integer network less that of the float network."""
    standard_error: float
    """Of the difference, over the images."""
    agreement: float
    """Share of the images for which float and integer network choose the same class."""
    layers: int
    elements: int
    active: int
    mismatches: int
    compile_seconds: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What was measured: network, pipeline, backend, images."""
        return (self.network, self.passes, self.backend, self.images)


@attrs.frozen(eq=False)
class Watched:
    """An executable that notes the class which it gives to each sample."""

    module: Module
    executable: Executable
    classes: list[Classes] = attrs.field(factory=list)

    def run(self, x: npt.NDArray[Any], keep: str = "") -> dict[str, Stored]:
        """As the executable does."""
        stored = self.executable.run(x, keep)
        output = self.module.output
        self.classes.append(self.module.types[output].decode(stored[output]).argmax(axis=1))
        return stored

    @property
    def bytes_per_sample(self) -> int:
        """As the executable says."""
        return self.executable.bytes_per_sample


def log(text: str) -> None:
    """A line with the time, to stderr."""
    print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}", file=sys.stderr, flush=True)


def logged(what: str, total: int) -> Callable[[int], None]:
    """A function that is told how many images are done and says so, every half minute at most, and at the end."""
    begin = last = time.perf_counter()

    def progress(done: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if done == total or now - last >= LOG_SECONDS:
            last = now
            log(f"{what}: {done} of {total} images in {now - begin:.0f} s")

    return progress


def batch_of(reference: Module, candidate: Module, executable: Executable) -> int:
    """Samples at a time, such that the values of both networks, of this batch and the last, take about 2 GB."""
    names = shared(reference, candidate)
    held = bytes_of(module.types[name] for module in (reference, candidate) for name in names)
    return max(1, min(LARGEST_BATCH, BATCH_BYTES // (2 * held + executable.bytes_per_sample)))


def chosen(model: torch.nn.Module, x: Images) -> Classes:
    """The class that the float network gives to each image."""
    with torch.inference_mode():
        parts = [model(torch.from_numpy(part)).argmax(1).numpy() for part in np.array_split(x, math.ceil(len(x) / 50))]
    return np.concatenate(parts)


@attrs.frozen(eq=False)
class Subject:
    """One network with its calibration images and with the test images that judge it."""

    name: str
    model: torch.nn.Module
    calibration: Images
    x: Images
    y: Labels

    @classmethod
    def of(cls, name: str, images: int) -> Subject:
        """The network ``name``, with at most so many test images."""
        model, judged = networks()[name]()
        return cls(name, model.eval(), judged.calibration.x, judged.test.x[:images], judged.test.y[:images])

    def outcomes(self, missing: list[tuple[str, str]]) -> Iterator[Outcome | SpirError]:
        """An outcome for each pair of pipeline and backend, or the error that stopped a pipeline."""
        if not missing:
            return
        log(f"{self.name}: float network")
        floats = chosen(self.model, self.x)
        for passes in dict.fromkeys(passes for passes, _ in missing):
            try:
                yield from self.judge(passes, [backend for other, backend in missing if other == passes], floats)
            except SpirError as refusal:
                yield refusal

    def judge(self, passes: str, backends: list[str], floats: Classes) -> Iterator[Outcome]:
        """Compiles the network once and holds every backend against its integer network."""
        what = f"{self.name} {passes}"
        start = time.perf_counter()
        snn = spir.compile(self.model, passes, data=self.calibration, progress=lambda step: log(f"{what}: {step}"))
        compile_seconds = time.perf_counter() - start
        iann = {stage.name: stage.module for stage in snn.stages}["propagate-scales"]
        log(f"{what}: integer network")
        integers = spir.compile(iann, "").trace(self.x, "")[iann.output].decoded.argmax(axis=1)
        difference = (integers == self.y).astype(float) - (floats == self.y)
        for text in backends:
            watched = Watched(snn.module, backend_of(text).prepare(snn.module))
            batch = batch_of(iann, snn.module, watched)
            log(f"{what} on {text}: {batch} images at a time")
            start = time.perf_counter()
            progress = logged(f"{what} on {text}", len(self.x))
            layers = compare(iann, snn.module, watched, self.x, batch=batch, progress=progress)
            yield Outcome(
                network=self.name,
                passes=passes,
                backend=text,
                images=len(self.x),
                float_accuracy=float((floats == self.y).mean()),
                integer_accuracy=float((integers == self.y).mean()),
                spiking_accuracy=float((np.concatenate(watched.classes) == self.y).mean()),
                difference=float(difference.mean()),
                standard_error=float(difference.std() / math.sqrt(len(self.x))),
                agreement=float((floats == integers).mean()),
                layers=len(layers),
                elements=sum(a.elements for a in layers),
                active=sum(a.active for a in layers),
                mismatches=sum(a.mismatches for a in layers),
                compile_seconds=compile_seconds,
                seconds=time.perf_counter() - start,
            )


def show(found: list[Outcome]) -> Table:
    """The outcomes as a table."""
    table = Table(title=f"decoded integers against the integer network, every layer; load {os.getloadavg()[0]:.1f}")
    words = ("network", "passes", "backend")
    rates = ("float", "integer", "spikes", "difference", "s.e.", "same class")
    for head in (*words, "images", *rates, "layers", "compared", "not 0", "differ", "seconds"):
        table.add_column(head, justify="left" if head in words else "right")
    for o in found:
        accuracies = (f"{100 * v:.2f}" for v in (o.float_accuracy, o.integer_accuracy, o.spiking_accuracy))
        errors = (f"{100 * o.difference:+.2f}", f"{100 * o.standard_error:.2f}", f"{100 * o.agreement:.2f}")
        share = f"{100 * o.active / o.elements:.0f} %"
        counts = (str(o.layers), str(o.elements), share, str(o.mismatches))
        table.add_row(*o.key[:3], str(o.images), *accuracies, *errors, *counts, f"{o.seconds:.1f}")
    return table


def read(path: Path, kind: Callable[..., Line]) -> list[Line]:
    """The outcomes of a kind that a file holds; none where it does not exist."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return [kind(**row) for row in rows]


def write(path: Path, found: Sequence[Any]) -> None:
    """Writes the outcomes, the whole file or nothing."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps({"rows": [attrs.asdict(o) for o in found]}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main() -> int:
    """Prints the table; exit code 1 when anything differs or a network is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="at most so many test images a network")
    parser.add_argument("--networks", default=",".join(networks()), help="names, separated by commas")
    parser.add_argument("--backends", default=";".join(BACKENDS), help="backends, separated by semicolons")
    parser.add_argument("--passes", help="pipelines, separated by semicolons, in place of each network's own")
    parser.add_argument("--json", type=Path, help="write the outcomes here, too, each as soon as it is known")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds and measure what it lacks")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.json:
        parser.error("--resume needs --json")
    found = read(arguments.json, Outcome) if arguments.resume else []
    known = {o.key for o in found}
    refused = 0
    for name in arguments.networks.split(","):
        subject = Subject.of(name, arguments.images)
        pipelines = arguments.passes.split(";") if arguments.passes else PIPELINES.get(name, (STEM,))
        pairs = [(p, b) for p in pipelines for b in arguments.backends.split(";")]
        missing = [pair for pair in pairs if (name, *pair, len(subject.x)) not in known]
        log(f"{name}: {len(missing)} of {len(pairs)} lines to measure, {len(subject.x)} images")
        for outcome in subject.outcomes(missing):
            if isinstance(outcome, SpirError):
                refused += 1
                log(f"{name}: refused\n{outcome}")
                continue
            found.append(outcome)
            log(f"{name} {outcome.passes} on {outcome.backend}: {outcome.mismatches} of {outcome.elements} differ")
            if arguments.json:
                write(arguments.json, found)
    Console(width=220).print(show(found))
    return int(refused > 0 or any(o.mismatches for o in found))


if __name__ == "__main__":
    raise SystemExit(main())
