"""Time per op of fold-bn, print, parse and verify on modules of 100 to 1 000 ops: the claim is that it stays flat.

    python -m benchmarks.scaling [--sizes 100,200,500,1000] [--rounds 9]

A module is a chain of residual blocks: convolution, batch norm, relu, add. Sizes take turns within a round; a sample
repeats a step until 0.5 s have passed. The last line is the largest ratio of the median time per op at the largest size
to that at the smallest.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median, quantiles

import numpy as np
from rich.console import Console
from rich.table import Table

from spir.driver import opt
from spir.ir import Array, Module, Node, Op, Origin, Value
from spir.ops.add import Add
from spir.ops.batch_norm import BatchNorm
from spir.ops.conv2d import Conv2d
from spir.ops.relu import Relu
from spir.text import parse, show
from spir.types import Real, Tensor
from spir.verify import verify

SAMPLE_SECONDS = 0.5
LIMIT = 2.0
"""The ratio above which the time per op is not called flat."""


def residual(ops: int) -> Module:
    """A module of reals of so many ops, [8, 8, 8] a sample."""
    rng = np.random.default_rng(0)
    type_ = Tensor((8, 8, 8), Real())
    nodes: list[Node] = []

    def emit(op: Op, *operands: str) -> str:
        name = f"v{len(nodes)}"
        nodes.append(Node(name, op, operands, type_, Origin(f"layer.{len(nodes)}")))
        return name

    value = "x"
    while len(nodes) + 4 <= ops:
        conv = Conv2d(Array.of(rng.normal(size=(8, 8, 3, 3))), padding=(1, 1, 1, 1))
        norm = BatchNorm(Array.of(rng.normal(size=8)), Array.of(rng.uniform(1, 2, 8)), 1e-5)
        value = emit(Add(), emit(Relu(), emit(norm, emit(conv, value))), value)
    return verify(Module(Value("x", type_), tuple(nodes), value))


def steps(module: Module) -> dict[str, Callable[[], object]]:
    """What is timed on one module."""
    text, arrays = show(module), module.arrays()
    return {
        "fold-bn": lambda: opt(module, "fold-bn", check="off"),
        "print": lambda: show(module),
        "parse": lambda: parse(text, arrays),
        "verify": lambda: verify(module),
    }


def sample(step: Callable[[], object]) -> float:
    """Seconds of one call, over calls that take 0.5 s together."""
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < SAMPLE_SECONDS:
        step()
        calls += 1
    return (time.perf_counter() - start) / calls


def main() -> int:
    """Prints the table; exit code 1 when a step is not flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="100,200,500,1000")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    modules = {int(size): residual(int(size)) for size in arguments.sizes.split(",")}
    timed = {size: steps(module) for size, module in modules.items()}
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for name in ("fold-bn", "print", "parse", "verify"):
            for size, module in modules.items():
                found.setdefault((name, size), []).append(sample(timed[size][name]) / len(module.nodes) * 1e6)
    table = Table(title=f"microseconds per op: median (quartiles); load {os.getloadavg()[0]:.1f}")
    for head in ("step", *(f"{size} ops" for size in modules)):
        table.add_column(head, justify="left" if head == "step" else "right")
    worst = 0.0
    for name in ("fold-bn", "print", "parse", "verify"):
        cells = []
        for size in modules:
            low, middle, high = quantiles(found[name, size], n=4)
            cells.append(f"{middle:.1f} ({low:.1f}..{high:.1f})")
        table.add_row(name, *cells)
        first, last = (median(found[name, size]) for size in (min(modules), max(modules)))
        worst = max(worst, last / first)
    Console(width=120).print(table)
    print(f"largest ratio, {max(modules)} ops to {min(modules)}: {worst:.2f}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
