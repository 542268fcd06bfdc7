"""hw with frames merged against the float network in torch: ResNet-20, batch 64, taking turns in one run.

    SPIR_DATA=path/to/data python -m benchmarks.hw_speed [--rounds 15] [--batch 64]

The float network is the model with batch norm folded into its convolutions, in inference mode, in the faster of the
two memory formats. A sample repeats a forward pass for at least half a second. Before timing, the outputs of hw are
checked against the integer network, so that nothing wrong is timed.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.utils.fusion import fuse_conv_bn_eval

import spir
from benchmarks.data import cifar10, data_file
from benchmarks.networks import resnet20
from spir.interpreter import decoded
from spir.interpreter import run as interpret

SAMPLE_SECONDS = 0.5
CALIBRATION = 200


def folded(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a ResNet whose batch norms are folded into the convolutions before them."""
    result = copy.deepcopy(model).eval()
    for module in result.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.BatchNorm2d):
                before = name.replace("bn", "conv")
                setattr(module, before, fuse_conv_bn_eval(getattr(module, before), child))
                setattr(module, name, torch.nn.Identity())
    return result


def seconds(run: Callable[[], object]) -> float:
    """Seconds a call, over calls that last half a second together."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SAMPLE_SECONDS:
        run()
        calls += 1
    return passed / calls


def main() -> int:
    """Prints medians, spreads and the ratio to the faster float network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="samples of each candidate")
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    split = cifar10("cifar10_resnet20")
    model = resnet20(data_file("cifar10_resnet20.safetensors")).eval()
    x = split.x_test[: arguments.batch]
    snn = spir.compile(model, "@stem{bits=8}", data=split.x_train[:CALIBRATION], backend="hw")
    iann = {stage.name: stage.module for stage in snn.stages}["propagate-scales"]
    wanted = decoded(iann, interpret(iann, x))[iann.output].astype(np.float32)
    if not np.array_equal(snn(x), wanted):
        raise SystemExit("hw differs from the integer network: nothing is timed")
    plain, channels_last = folded(model), folded(model)
    channels_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs leave it out
    given = torch.tensor(x)
    given_last = given.to(memory_format=torch.channels_last)
    candidates: dict[str, Callable[[], object]] = {
        "torch float": lambda: plain(given),
        "torch float, channels last": lambda: channels_last(given_last),
        "hw": lambda: snn(x),
    }
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with torch.inference_mode():
        for run in candidates.values():
            seconds(run)
        for _ in range(arguments.rounds):
            for name, run in candidates.items():
                samples[name].append(seconds(run))
    medians = {name: statistics.median(found) for name, found in samples.items()}
    fastest = min(median for name, median in medians.items() if name != "hw")
    table = Table(title=f"ResNet-20, batch {arguments.batch}, {arguments.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for head in ("candidate", "median ms", "quartiles ms", "ratio to the faster float"):
        table.add_column(head, justify="left" if head == "candidate" else "right")
    for name, found in samples.items():
        low, _, high = statistics.quantiles(found, n=4)
        cells = (f"{1e3 * medians[name]:.1f}", f"{1e3 * low:.1f} .. {1e3 * high:.1f}", f"{medians[name] / fastest:.2f}")
        table.add_row(name, *cells)
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
