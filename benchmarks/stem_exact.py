"""STEM spikes against the integer network, every layer, on test images: the claim is 0 mismatches.

    SPIR_DATA=path/to/data python -m benchmarks.stem_exact [--images N] [--networks resnet20,lenet5] [--json out.json]

Networks are calibrated on training images (200 of them) and judged on all test images: accuracy of the float network,
of the integer network and of the spikes, with the standard error of the difference between float and integer network.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

import spir
from benchmarks.data import Split, cifar10, data_file, mnist
from benchmarks.networks import resnet20, resnet32
from spir.demo.lenet import lenet5
from spir.driver import backend_of
from spir.equality import Agreement, compare

CALIBRATION = 200
BACKENDS = ("serial", "hw{collapse=off}", "hw")


def networks() -> dict[str, Callable[[], tuple[torch.nn.Module, Split]]]:
    """Each network with its data, loaded when asked for."""
    return {
        "lenet5": lambda: (lenet5(), mnist()),
        "resnet20": lambda: (resnet20(data_file("cifar10_resnet20.safetensors")), cifar10("cifar10_resnet20")),
        "resnet32": lambda: (resnet32(data_file("cifar10_resnet32.safetensors")), cifar10("cifar10_resnet32")),
    }


@attrs.frozen
class Outcome:
    """One backend on one network."""

    network: str
    backend: str
    images: int
    float_accuracy: float
    integer_accuracy: float
    spiking_accuracy: float
    standard_error: float
    layers: int
    elements: int
    active: int
    mismatches: int
    compile_seconds: float
    seconds: float


def judge(name: str, passes: str, images: int, backends: list[str], progress: Progress) -> list[Outcome]:
    """Compiles one network and holds every backend against its integer network."""
    model, split = networks()[name]()
    model.eval()
    x, y = split.x_test[:images], split.y_test[:images]
    start = time.perf_counter()
    snn = spir.compile(model, passes, data=split.x_train[:CALIBRATION])
    compile_seconds = time.perf_counter() - start
    with torch.inference_mode():
        floats = np.concatenate(
            [model(torch.tensor(part)).numpy() for part in np.array_split(x, max(1, len(x) // 100))]
        )
    iann = {stage.name: stage.module for stage in snn.stages}["propagate-scales"]
    integers = spir.compile(iann, "")(x)
    right_float, right_integer = floats.argmax(axis=1) == y, integers.argmax(axis=1) == y
    difference = right_integer.astype(float) - right_float
    found = []
    for text in backends:
        task = progress.add_task(f"{name} on {text}", total=len(x))
        backend = backend_of(text)
        runner = attrs.evolve(snn, backend=backend, executable=backend.prepare(snn.module))
        start = time.perf_counter()
        layers: tuple[Agreement, ...] = compare(
            iann,
            snn.module,
            runner.executable,
            x,
            progress=partial(_advance, progress, task),
        )
        seconds = time.perf_counter() - start
        found.append(
            Outcome(
                network=name,
                backend=text,
                images=len(x),
                float_accuracy=float(right_float.mean()),
                integer_accuracy=float(right_integer.mean()),
                spiking_accuracy=float((runner(x).argmax(axis=1) == y).mean()),
                standard_error=float(difference.std() / math.sqrt(len(x))),
                layers=len(layers),
                elements=sum(a.elements for a in layers),
                active=sum(a.active for a in layers),
                mismatches=sum(a.mismatches for a in layers),
                compile_seconds=compile_seconds,
                seconds=seconds,
            )
        )
        progress.remove_task(task)
    return found


def _advance(progress: Progress, task: TaskID, done: int) -> None:
    progress.update(task, completed=done)


def show(found: list[Outcome]) -> Table:
    """The outcomes as a table."""
    table = Table(title=f"decoded integers against the integer network, every layer; load {os.getloadavg()[0]:.1f}")
    heads = (
        "network",
        "backend",
        "images",
        "float",
        "integer",
        "spikes",
        "s.e.",
        "layers",
        "compared",
        "not 0",
        "differ",
    )
    for head in (*heads, "seconds"):
        table.add_column(head, justify="left" if head in heads[:2] else "right")
    for o in found:
        rates = (f"{100 * v:.2f}" for v in (o.float_accuracy, o.integer_accuracy, o.spiking_accuracy, o.standard_error))
        share = f"{100 * o.active / o.elements:.0f} %"
        cells = (o.network, o.backend, str(o.images), *rates, str(o.layers), str(o.elements), share, str(o.mismatches))
        table.add_row(*cells, f"{o.seconds:.1f}")
    return table


def main() -> int:
    """Prints the table; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="at most so many test images a network")
    parser.add_argument("--networks", default=",".join(networks()), help="names, separated by commas")
    parser.add_argument("--backends", default=";".join(BACKENDS), help="backends, separated by semicolons")
    parser.add_argument("--passes", default="@stem{bits=8}")
    parser.add_argument("--json", type=Path, help="write the outcomes here, too")
    arguments = parser.parse_args()
    console = Console(width=180)
    found: list[Outcome] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name in arguments.networks.split(","):
            found += judge(name, arguments.passes, arguments.images, arguments.backends.split(";"), progress)
            if arguments.json:
                rows: list[dict[str, Any]] = [attrs.asdict(o) for o in found]
                arguments.json.write_text(json.dumps({"passes": arguments.passes, "rows": rows}, indent=1))
    console.print(show(found))
    return int(any(o.mismatches for o in found))


if __name__ == "__main__":
    raise SystemExit(main())
