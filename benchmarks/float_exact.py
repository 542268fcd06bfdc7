"""The frontend and fold-bn against the models in float64, and the text of every stage against itself.

    SPIR_DATA=path/to/data python -m benchmarks.float_exact [--images 32] [--networks resnet20,lenet5]

Differences are the largest absolute one over the largest absolute value, of the logits (frontend) and of every value
that keeps its name (fold-bn). The claim is at most 1e-10, and that every stage of ``@stem`` parses back to itself.
"""

from __future__ import annotations

import argparse
import copy
import math
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import spir
from benchmarks.data import Images
from benchmarks.stem_exact import BATCH_BYTES, STEM, Subject, log, networks
from spir.batches import bytes_per_sample
from spir.contracts import Change, changes
from spir.errors import SpirError
from spir.interpreter import decoded, run
from spir.ir import Module
from spir.types import Reals

LIMIT = 1e-10


def relative(found: Reals, wanted: Reals) -> float:
    """Largest difference over largest magnitude."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def traced(module: Module, model: torch.nn.Module, x: Images) -> float:
    """How far the logits of the frontend's module are from those of the model in float64."""
    exact = copy.deepcopy(model).double()
    wanted, found = [], []
    for part in parts(x, module):
        with torch.inference_mode():
            wanted.append(exact(torch.tensor(part, dtype=torch.float64)).numpy())
        found.append(run(module, part)[module.output].astype(np.float64))
    return relative(np.concatenate(found), np.concatenate(wanted))


def folded(before: Module, after: Module, x: Images) -> float:
    """How far the values of ``after`` are from those of the same name in ``before``, the worst value."""
    worst: dict[str, Change] = {}
    for part in parts(x, before, after):
        for change in changes(decoded(before, run(before, part, "*")), decoded(after, run(after, part, "*"))):
            known = worst.get(change.value)
            worst[change.value] = change if known is None else known + change
    return max(change.relative for change in worst.values())


def parts(x: Images, *modules: Module) -> list[Images]:
    """The images in parts so small that every value of the modules, stored and decoded, is held in about 2 GB."""
    return np.array_split(x, math.ceil(len(x) * 2 * bytes_per_sample(*modules) / BATCH_BYTES))


def main() -> int:
    """Prints the table; exit code 1 when a claim fails or a network is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--networks", default=",".join(networks()), help="names, separated by commas")
    arguments = parser.parse_args()
    heads = ("network", "frontend", "fold-bn", "stages", "texts that parse back", "compile s")
    table = Table(title=f"against the model in float64, {arguments.images} test images")
    for head in heads:
        table.add_column(head, justify="left" if head == "network" else "right")
    failed = False
    for name in arguments.networks.split(","):
        subject = Subject.of(name, arguments.images)
        start = time.perf_counter()
        try:
            snn = spir.compile(subject.model, STEM, data=subject.calibration)
        except SpirError as refusal:
            failed = True
            log(f"{name}: refused\n{refusal}")
            continue
        seconds = time.perf_counter() - start
        stages = {stage.name: stage.module for stage in snn.stages}
        frontend = traced(stages["frontend"], subject.model, subject.x)
        fold = folded(stages["canonicalize"], stages["fold-bn"], subject.x)
        back = sum(spir.parse(str(m), m.arrays()) == m for m in stages.values())
        failed |= not (frontend <= LIMIT and fold <= LIMIT and back == len(stages))
        table.add_row(name, f"{frontend:.1e}", f"{fold:.1e}", str(len(stages)), str(back), f"{seconds:.1f}")
    Console(width=110).print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
