"""The demo: LeNet-5 on real MNIST images, from floats to spikes, with every stage shown and checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np

import spir
from spir.demo.lenet import calibration, images, lenet5
from spir.driver import backend_of
from spir.equality import compare
from spir.errors import error
from spir.interpreter import decoded
from spir.interpreter import run as interpret

RECIPE = "@stem{bits=8}"
BACKENDS = ("serial", "hw{collapse=off}", "hw")
EXPLANATION = """{count} MNIST test images. Agreement is with the float network's class. Mismatches are decoded integers
that differ from the integer network's, over all layers, elements and images. Spikes and synaptic operations are per
image, input included."""
STAGES = (("frontend", "as traced"), ("propagate-scales", "the integer network"), ("fuse-neuron", "spikes"))


@attrs.frozen
class Row:
    """One line of the demo's table."""

    network: str
    accuracy: float
    agreement: float
    mismatches: int | None
    compared: int | None
    spikes: float | None
    synaptic_operations: float | None
    seconds: float


def run(count: int, progress: Callable[[str], None]) -> tuple[str, dict[str, Any], bool]:
    """Text, data of schema ``spir-demo/1``, and whether a spiking network differs from its integer network.

    Args:
        count: how many of the shipped test images are judged; ranges come from 200 shipped training images.
        progress: called with what happens next.

    Raises:
        SpirError[usage]: a count outside 1..1000.
    """
    x, y = images()
    if not 1 <= count <= len(x):
        raise error("usage", f"--images {count} is outside 1..{len(x)}")
    ranges, x, y = calibration(), x[:count], y[:count]
    progress("compile LeNet-5")
    start = time.perf_counter()
    snn = spir.compile(lenet5(), RECIPE, data=ranges, backend="serial", progress=progress)
    compiled = time.perf_counter() - start
    stages = {stage.name: stage.module for stage in snn.stages}
    ann, iann = stages["frontend"], stages["propagate-scales"]
    rows = []
    reference = None
    for label, module in (("float network", ann), ("integer network", iann)):
        progress(f"run the {label}")
        start = time.perf_counter()
        classes = decoded(module, interpret(module, x))[module.output].argmax(axis=1)
        seconds = time.perf_counter() - start
        reference = classes if reference is None else reference
        rows.append(_row(label, classes, reference, y, seconds))
    assert reference is not None  # the loop ran twice
    for text in BACKENDS:
        progress(f"run {text} and compare every layer")
        runner = attrs.evolve(snn, backend=backend_of(text), executable=backend_of(text).prepare(snn.module))
        start = time.perf_counter()
        classes = runner(x).argmax(axis=1)
        seconds = time.perf_counter() - start
        found = compare(iann, snn.module, runner.executable, x)
        report = runner.report(x)
        row = _row(text, classes, reference, y, seconds)
        rows.append(
            attrs.evolve(
                row,
                mismatches=sum(a.mismatches for a in found),
                compared=sum(a.elements for a in found),
                spikes=report.spikes,
                synaptic_operations=report.synaptic_operations,
            )
        )
    failed = any(row.mismatches for row in rows)
    text = "\n".join(
        [
            *(f"// {label}\n{stages[name]}" for name, label in STAGES),
            f"{RECIPE} on LeNet-5, ranges from {len(ranges)} training images; compiled in {compiled:.1f} s",
            *_table(rows),
            EXPLANATION.format(count=count),
        ]
    )
    data = {
        "schema": "spir-demo/1",
        "images": count,
        "rows": [attrs.asdict(r) for r in rows],
        "stages": {name: str(stages[name]) for name, _ in STAGES},
    }
    return text, data, failed


def _row(label: str, classes: np.ndarray, reference: np.ndarray, y: np.ndarray, seconds: float) -> Row:
    accuracy, agreement = float((classes == y).mean()), float((classes == reference).mean())
    return Row(label, accuracy, agreement, None, None, None, None, seconds)


def _table(rows: list[Row]) -> list[str]:
    names = ("accuracy", "agreement", "mismatches", "spikes", "syn. ops", "seconds")
    widths = (10, 11, 22, 10, 12, 9)
    lines = ["backend".ljust(20) + "".join(name.rjust(width) for name, width in zip(names, widths, strict=True))]
    for row in rows:
        compared = "-" if row.mismatches is None else f"{row.mismatches} of {row.compared}"
        spikes = "-" if row.spikes is None else f"{row.spikes:.0f}"
        operations = "-" if row.synaptic_operations is None else f"{row.synaptic_operations:.0f}"
        lines.append(
            f"{row.network:<20}{100 * row.accuracy:>8.2f} %{100 * row.agreement:>9.2f} %{compared:>22}{spikes:>10}"
            f"{operations:>12}{row.seconds:>9.2f}"
        )
    return lines
