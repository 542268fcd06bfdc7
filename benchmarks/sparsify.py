"""Fewer spikes against accuracy: RoT and DRLO everywhere, and settings searched layer by layer, on test images.

    SPIR_DATA=path/to/data python -m benchmarks.sparsify [--images N] [--networks resnet20,squeezenet] [--json out.json]

Networks become STEM neurons of 8 bits, with ranges from training images as in `benchmarks.stem_exact`. Every setting
is judged on all test images: accuracy, its difference to the network whose spikes all stay, with its standard error,
how often both choose the same class, and the synaptic operations a sample, those of the input's spikes apart. The
search sees training images only (2 000 of CIFAR-10, 100 of ImageNet) with their labels; what it finds is written as
pipeline text. DRLO is a reconstruction.

Every line of the result is written to ``--json`` as soon as it is known. With ``--resume`` lines that are there already
are kept and not measured again: for a run that was cut off, not for another version of the code.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

import spir
from benchmarks.data import Images, Labels, Samples, cifar10
from benchmarks.networks import STORED
from benchmarks.stem_exact import STEM, log, networks, read, write
from spir import driver, pipeline
from spir.costs import synapses
from spir.ir import Module
from spir.ops.encode import Encode
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.packing import Packed

SEARCHED = 2000
"""Training images that a search sees, where a network has so many."""
MAX_DROP = 0.5
WHOLE = ""
ROUNDED = ("rot=1", "rot=2", "rot=3")
COUNTED = ("drlo=4", "drlo=3", "drlo=2")
WINDOWED = ("drlo=5, mode=window", "drlo=4, mode=window", "drlo=3, mode=window")
BOTH = ("rot=1, drlo=4", "rot=1, drlo=3", "rot=2, drlo=4", "rot=2, drlo=3")
BATCH = 25
LOG_SECONDS = 30

Classes = npt.NDArray[np.int64]


@attrs.frozen
class Outcome:
    """One setting of one network; operations are those of a sample, ``saved`` a share of the whole network's."""

    network: str
    setting: str
    passes: str
    """What makes the network of the one whose spikes all stay, without searching."""
    images: int
    accuracy: float
    difference: float
    standard_error: float
    agreement: float
    operations: float
    input_operations: float
    saved: float
    seconds: float

    @property
    def key(self) -> tuple[str, str, int]:
        """What was measured: network, setting, images."""
        return (self.network, self.setting, self.images)


@attrs.frozen
class Judged:
    """What a network chose for each image, and its synaptic operations a sample, with those of the input apart."""

    classes: Classes
    operations: float
    input_operations: float


def clause(setting: str) -> str:
    """Pipeline text of a setting: options of one sparsify, or pipeline text already."""
    return setting if not setting or "{" in setting else f"sparsify{{{setting}}}"


def judge(module: Module, x: Images) -> Judged:
    """Runs a network on all images and counts its spikes."""
    snn, paths = spir.compile(module, "", backend="parallel", check="off"), synapses(module)
    trains = [n.result for n in module.nodes if isinstance(n.op, (Encode, NeuronStem))]
    first = {name for name in trains if enters(module, name)}
    classes: list[Classes] = []
    totals = dict.fromkeys(trains, 0)
    for start in range(0, len(x), BATCH):
        traces = snn.trace(x[start : start + BATCH], "|".join(trains))
        classes.append(traces[module.output].decoded.argmax(axis=1))
        for name in trains:
            totals[name] += int((spikes(traces[name].words) * paths[name]).sum())
    operations = sum(count for name, count in totals.items() if name not in first)
    return Judged(np.concatenate(classes), operations / len(x), sum(totals[name] for name in first) / len(x))


def enters(module: Module, name: str) -> bool:
    """Whether a train is the input's."""
    source = module.definitions.get(module.definitions[name].operands[0])
    return source is None or isinstance(source.op, Quantize)


def spikes(words: Packed) -> npt.NDArray[np.int64]:
    """Spikes of each element, of either sign."""
    negative = 0 if words.negative is None else Packed(words.steps, words.negative).counts
    return Packed(words.steps, words.positive).counts + negative


@attrs.frozen(eq=False)
class Subject:
    """One network whose spikes all stay, the images that a search sees, and those that judge."""

    name: str
    module: Module
    seen: Samples
    x: Images
    y: Labels

    @classmethod
    def of(cls, name: str, images: int, searched: int) -> Subject:
        """The network ``name``, with at most so many test images, and training images for the search."""
        model, judged = networks()[name]()
        log(f"{name}: {STEM}")
        module = spir.compile(model.eval(), STEM, data=judged.calibration.x, check="off").module
        seen = judged.calibration
        if STORED.get(name, "").startswith("cifar10"):
            split = cifar10(STORED[name])
            seen = Samples(split.x_train[:searched], split.y_train[:searched])
        return cls(name, module, seen, judged.test.x[:images], judged.test.y[:images])

    def outcomes(self, settings: list[str]) -> Iterator[Outcome]:
        """An outcome a setting."""
        if not settings:
            return
        whole = judge(self.module, self.x)
        for setting in settings:
            start = time.perf_counter()
            made = driver.opt(
                *(self.module, clause(setting)),
                data=[(self.seen.x, self.seen.y)],
                check="off",
                progress=told(f"{self.name} {setting}"),
            )
            for note in (note for entry in made.journal for note in entry.notes):
                log(f"{self.name} {setting}: {note}")
            found = whole if setting == WHOLE else judge(made.module, self.x)
            difference = (found.classes == self.y).astype(float) - (whole.classes == self.y)
            yield Outcome(
                network=self.name,
                setting=setting,
                passes=pipeline.spell(made.passes),
                images=len(self.x),
                accuracy=float((found.classes == self.y).mean()),
                difference=float(difference.mean()),
                standard_error=float(difference.std() / math.sqrt(len(self.x))),
                agreement=float((found.classes == whole.classes).mean()),
                operations=found.operations,
                input_operations=found.input_operations,
                saved=1 - found.operations / whole.operations,
                seconds=time.perf_counter() - start,
            )


class told:  # noqa: N801 - a function with a memory
    """A function that says how far a pass has come, every half minute at most."""

    def __init__(self, what: str) -> None:
        self._what, self._last = what, time.perf_counter()

    def __call__(self, text: str) -> None:
        """Logs the text where it is time."""
        now = time.perf_counter()
        if now - self._last >= LOG_SECONDS:
            self._last = now
            log(f"{self._what}: {text}")


def show(found: list[Outcome]) -> Table:
    """The outcomes as a table."""
    table = Table(title=f"synaptic operations a sample, the input's apart; load {os.getloadavg()[0]:.1f}")
    words = ("network", "setting")
    rates = ("accuracy", "difference", "s.e.", "same class")
    for head in (*words, "images", *rates, "operations", "saved", "of the input", "seconds"):
        table.add_column(head, justify="left" if head in words else "right")
    for o in found:
        rated = (f"{100 * o.accuracy:.2f}", f"{100 * o.difference:+.2f}", f"{100 * o.standard_error:.2f}")
        counts = (f"{o.operations:.4g}", f"{100 * o.saved:.1f} %", f"{o.input_operations:.4g}", f"{o.seconds:.0f}")
        table.add_row(o.network, o.setting or "all spikes", str(o.images), *rated, f"{100 * o.agreement:.2f}", *counts)
    return table


def main() -> int:
    """Prints the table, and what a search found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="at most so many test images a network")
    parser.add_argument("--networks", default="resnet20", help="names, separated by commas")
    parser.add_argument("--searched", type=int, default=SEARCHED, help="training images that a search sees")
    parser.add_argument("--max-drop", type=float, default=MAX_DROP, help="the budget of the search, in points")
    parser.add_argument("--settings", help="options of sparsify or pipeline texts, separated by semicolons")
    parser.add_argument("--json", type=Path, help="write the outcomes here, too, each as soon as it is known")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds and measure what it lacks")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.json:
        parser.error("--resume needs --json")
    every = (WHOLE, *ROUNDED, *COUNTED, *WINDOWED, *BOTH, f"max_drop={arguments.max_drop:g}")
    settings = every if arguments.settings is None else arguments.settings.split(";")
    found = read(arguments.json, Outcome) if arguments.resume else []
    known = {o.key for o in found}
    for name in arguments.networks.split(","):
        subject = Subject.of(name, arguments.images, arguments.searched)
        missing = [setting for setting in settings if (name, setting, len(subject.x)) not in known]
        log(f"{name}: {len(missing)} of {len(settings)} settings to measure, {len(subject.x)} images")
        for outcome in subject.outcomes(missing):
            found.append(outcome)
            log(f"{name} {outcome.setting}: {100 * outcome.accuracy:.2f} %, {100 * outcome.saved:.1f} % saved")
            if arguments.json:
                write(arguments.json, found)
    console = Console(width=180)
    console.print(show(found))
    for outcome in found:
        if "max_drop" in outcome.setting:
            console.print(f"{outcome.network} {outcome.setting}: {outcome.passes}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
