"""The frontend and fold-bn against the models in float64, and the text of every stage against itself.

    SPIR_DATA=path/to/data python -m benchmarks.float_exact [--images 32]

Differences are the largest absolute one over the largest absolute value, of the logits (frontend) and of every value
that keeps its name (fold-bn). The claim is at most 1e-10, and that every stage of ``@stem`` parses back to itself.
"""

from __future__ import annotations

import argparse
import copy
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import spir
from benchmarks.stem_exact import CALIBRATION, networks
from spir.contracts import changes
from spir.interpreter import decoded, run
from spir.types import Reals

LIMIT = 1e-10


def relative(found: Reals, wanted: Reals) -> float:
    """Largest difference over largest magnitude."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def main() -> int:
    """Prints the table; exit code 1 when a claim fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32)
    arguments = parser.parse_args()
    heads = ("network", "frontend", "fold-bn", "stages", "texts that parse back", "compile s")
    table = Table(title=f"against the model in float64, {arguments.images} test images")
    for head in heads:
        table.add_column(head, justify="left" if head == "network" else "right")
    failed = False
    for name, load in networks().items():
        model, split = load()
        x = split.x_test[: arguments.images]
        start = time.perf_counter()
        snn = spir.compile(model.eval(), "@stem{bits=8}", data=split.x_train[:CALIBRATION])
        seconds = time.perf_counter() - start
        stages = {stage.name: stage.module for stage in snn.stages}
        with torch.inference_mode():
            wanted = copy.deepcopy(model).double()(torch.tensor(x, dtype=torch.float64)).numpy()
        before, after = stages["canonicalize"], stages["fold-bn"]
        traced = relative(run(stages["frontend"], x)[stages["frontend"].output].astype(np.float64), wanted)
        folds = changes(decoded(before, run(before, x, "*")), decoded(after, run(after, x, "*")))
        folded = max(change.relative for change in folds)
        back = sum(spir.parse(str(m), m.arrays()) == m for m in stages.values())
        failed |= max(traced, folded) > LIMIT or back < len(stages)
        table.add_row(name, f"{traced:.1e}", f"{folded:.1e}", str(len(stages)), str(back), f"{seconds:.1f}")
    Console(width=110).print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
