"""Trains the LeNet-5 that ships with SPIR and writes its weights, figures and test images into spir/demo.

Settings were chosen on the last 5 000 training images; the test images judge the finished network once.

    SPIR_DATA=path/to/data python -m benchmarks.train_lenet
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import nn

from benchmarks.data import mnist
from spir.demo.lenet import CALIBRATION, FIGURES, IMAGES, WEIGHTS, LeNet5

COMMAND = ["python", "-m", "benchmarks.train_lenet"]
VALIDATION = 5_000
SHIPPED_IMAGES = 1_000
CALIBRATION_IMAGES = 200


@attrs.frozen
class Settings:
    """Everything that decides the result, apart from the data."""

    seed: int = 0
    epochs: int = 25
    batch: int = 128
    learning_rate: float = 3e-3
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises from zero; after it a cosine takes it back to zero."""
    weight_decay: float = 1e-2
    average: float = 0.999
    """Decay per step of the exponential average of the weights, which is what is kept."""
    rotation: float = 10.0
    """Largest rotation either way, in degrees."""
    zoom: float = 0.1
    """Largest relative change of size."""
    shift: float = 2.0
    """Largest shift either way along each axis, in pixels."""


def augment(x: torch.Tensor, settings: Settings, generator: torch.Generator) -> torch.Tensor:
    """Images [N, 1, 28, 28], each rotated, scaled and shifted at random."""
    n, _, height, width = x.shape

    def uniform(limit: float) -> torch.Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * limit

    angle = uniform(math.radians(settings.rotation))
    size = 1 + uniform(settings.zoom)
    across, down = uniform(2 * settings.shift / width), uniform(2 * settings.shift / height)
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    maps = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], 1)
    return F.grid_sample(x, F.affine_grid(maps, list(x.shape), align_corners=False), align_corners=False)


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percentage of images [N, 1, 28, 28] whose largest logit is the label [N]."""
    with torch.inference_mode():
        hits = sum(
            int((model(part).argmax(1) == label).sum())
            for part, label in zip(x.split(1000), y.split(1000), strict=True)
        )
    return 100 * hits / len(y)


def train(
    x: torch.Tensor, y: torch.Tensor, x_val: torch.Tensor, y_val: torch.Tensor, settings: Settings, console: Console
) -> LeNet5:
    """The averaged network after the last epoch; images [N, 1, 28, 28] in [0, 1], labels int64 [N].

    The validation images are only reported on: no epoch is picked by them.
    """
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model, kept = LeNet5(), LeNet5()
    kept.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(x) / settings.batch)
    rising = settings.warmup * steps

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (steps - rising))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    step = 0
    columns = (TextColumn("LeNet-5"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps)
        for epoch in range(settings.epochs):
            losses = []
            for chosen in torch.randperm(len(x), generator=generator).split(settings.batch):
                loss = F.cross_entropy(model(augment(x[chosen], settings, generator)), y[chosen])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                decay = min(settings.average, step / (step + 10))
                with torch.no_grad():
                    torch._foreach_lerp_(list(kept.parameters()), list(model.parameters()), 1 - decay)
                losses.append(loss.item())
                progress.advance(task)
            console.print(
                f"epoch {epoch + 1:2}  loss {np.mean(losses):.4f}  validation {accuracy(kept, x_val, y_val):.2f} %"
            )
    return kept.eval()


def main() -> None:
    """Trains, judges and writes the network; with ``--explore`` shows the validation accuracy and writes nothing."""
    parser = argparse.ArgumentParser(description="Train the LeNet-5 that ships with SPIR.")
    parser.add_argument(
        "--explore", action="store_true", help="stop at the validation accuracy: no test images, no files"
    )
    for field in attrs.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help="default %(default)s",
        )
    arguments = vars(parser.parse_args())
    explore = arguments.pop("explore")
    settings = Settings(**arguments)

    torch.set_num_threads(1)
    console = Console()
    data = mnist()
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    x_val, y_val = x[-VALIDATION:], y[-VALIDATION:]
    begin = time.perf_counter()
    model = train(x[:-VALIDATION], y[:-VALIDATION], x_val, y_val, settings, console)
    seconds = time.perf_counter() - begin
    validation = accuracy(model, x_val, y_val)
    console.print(f"validation {validation:.2f} % on {VALIDATION} images after {seconds:.0f} s")
    if explore:
        return

    x_test, y_test = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)
    test = accuracy(model, x_test, y_test)
    shipped = accuracy(model, x_test[:SHIPPED_IMAGES], y_test[:SHIPPED_IMAGES])
    WEIGHTS.write_bytes(save({name: tensor.contiguous() for name, tensor in model.state_dict().items()}))
    np.savez_compressed(CALIBRATION, x=np.rint(data.x_train[:CALIBRATION_IMAGES, 0] * 255).astype(np.uint8))
    np.savez_compressed(
        IMAGES,
        x=np.rint(data.x_test[:SHIPPED_IMAGES, 0] * 255).astype(np.uint8),
        y=data.y_test[:SHIPPED_IMAGES].astype(np.uint8),
    )
    figures = {
        "model": "LeNet-5 with average pooling and ReLU, 1x28x28 input in [0, 1]",
        "command": shlex.join(COMMAND + sys.argv[1:]),
        "data": {
            "name": "MNIST (mnist.npz)",
            "training": len(x) - VALIDATION,
            "validation": f"the last {VALIDATION} training images, on which the settings were chosen",
            "test": f"{len(y_test)} images, judged once",
            "shipped": f"the first {SHIPPED_IMAGES} test images (MIT licence)",
        },
        "settings": attrs.asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy_percent": {
            "validation": round(validation, 2),
            "test": round(test, 2),
            "shipped": round(shipped, 2),
        },
        "training_seconds": round(seconds),
        "threads": 1,
        "torch": torch.__version__,
    }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console.print(f"test {test:.2f} % on {len(y_test)} images, {shipped:.2f} % on the first {SHIPPED_IMAGES}")
    for path in (WEIGHTS, FIGURES, IMAGES, CALIBRATION):
        console.print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
