"""Trains the quantised networks of the benchmarks and writes their tensors and figures into benchmarks/weights.

The toolkit does the quantisation: torch.export, prepare_qat_pt2e, a plain loop of SGD, convert_pt2e. LeNet-5 starts
from random weights, ResNet-20 from the stored float ones with the statistics of its batch norms kept. Settings are
chosen on training images that are held out; the test images judge the converted network once.

    SPIR_DATA=path/to/data python -m benchmarks.train_qat qat_lenet5
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

import argparse
import json
import math
import shlex
import time
from importlib.metadata import version
from typing import NamedTuple

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save
from torchao.quantization.pt2e import disable_observer, move_exported_model_to_eval

from benchmarks.data import cifar10, data_file, mnist
from benchmarks.networks import STORED, WEIGHTS, load
from benchmarks.quantised import NETWORKS, prepared, qat, rebuilt, state
from benchmarks.train_qcfs import accuracy, augment
from spir.demo.lenet import LeNet5

COMMAND = ["python", "-m", "benchmarks.train_qat"]
HELD_OUT = 1_000
"""How many of the last training images are held out."""


@attrs.frozen
class Settings:
    """Everything that decides the result, apart from the data."""

    epochs: int
    learning_rate: float
    seed: int = 0
    batch: int = 100
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises from zero; after it a cosine takes it back to zero."""
    shift: int = 0
    """Pixels of zeros around an image, of which crops are taken; with flips. None on MNIST."""
    settled: int = 1
    """In how many of the last epochs the ranges of the codes stay as they are."""


LENET = Settings(epochs=10, learning_rate=0.05, weight_decay=5e-4)
RESNET = Settings(epochs=3, learning_rate=0.001, shift=4)
SETTINGS = {"qat_lenet5": LENET, "qat_lenet5_7bit": LENET, "qat_resnet20": RESNET, "qat_resnet20_7bit": RESNET}

Samples = tuple[torch.Tensor, torch.Tensor]


class Images(NamedTuple):
    """Images [N, C, H, W] and labels [N]: to learn from, held out, and to judge."""

    training: Samples
    validation: Samples
    test: Samples


def images(lenet: bool) -> Images:
    """MNIST, or the images of CIFAR-10 that are stored without loss."""
    x, y, x_test, y_test = (torch.from_numpy(part) for part in (mnist() if lenet else cifar10()))
    return Images((x[:-HELD_OUT], y[:-HELD_OUT]), (x[-HELD_OUT:], y[-HELD_OUT:]), (x_test, y_test))


def train(
    name: str, settings: Settings, data: Images, console: Console
) -> tuple[torch.fx.GraphModule, list[dict[str, float]]]:
    """The prepared graph after the last epoch, and the figures of each epoch.

    The validation images are only reported on: no epoch is picked by them.
    """
    torch.manual_seed(settings.seed)
    network = NETWORKS[name]
    model = network.model()
    if not isinstance(model, LeNet5):
        load(model, data_file(f"{STORED['resnet20']}.safetensors"))
    graph = move_exported_model_to_eval(prepared(network, model))
    optimizer = torch.optim.SGD(
        graph.parameters(), settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    x, y = data.training
    steps = settings.epochs * math.ceil(len(x) / settings.batch)
    rising = settings.warmup * steps

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (steps - rising))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(settings.seed)
    figures: list[dict[str, float]] = []
    for epoch in range(settings.epochs):
        if epoch == settings.epochs - settings.settled:
            graph.apply(disable_observer)
        losses = []
        begin = time.perf_counter()
        for chosen in torch.randperm(len(x), generator=generator).split(settings.batch):
            loss = F.cross_entropy(graph(augment(x[chosen], settings.shift, generator)), y[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        figures.append(
            {
                "loss": round(float(np.mean(losses)), 4),
                "validation_percent": round(accuracy(rebuilt(network, state(graph)), data.validation), 2),
                "seconds": round(time.perf_counter() - begin),
            }
        )
        console.print(f"{name}: epoch {epoch + 1}  {figures[-1]}")
    return graph, figures


def main() -> None:
    """Trains, judges and writes a network; with ``--explore`` shows the validation accuracy and writes nothing."""
    parser = argparse.ArgumentParser(description="Train a quantised network of the benchmarks.")
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument(
        "--explore", action="store_true", help="stop at the validation accuracy: no test images, no files"
    )
    for field in attrs.fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(getattr(LENET, field.name)))
    arguments = vars(parser.parse_args())
    name, explore = arguments.pop("name"), arguments.pop("explore")
    given = {key: value for key, value in arguments.items() if value is not None}
    settings = attrs.evolve(SETTINGS[name], **given)

    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    lenet = name.startswith("qat_lenet5")
    data = images(lenet)
    graph, epochs = train(name, settings, data, console)
    if explore:
        return

    WEIGHTS.mkdir(exist_ok=True)
    path = WEIGHTS / f"{name}.safetensors"
    path.write_bytes(save(state(graph)))
    test = accuracy(qat(name), data.test)
    bits = NETWORKS[name].bits
    figures = {
        "model": f"{'LeNet-5' if lenet else 'ResNet-20'} with codes of {bits} bits and int8 weights, a scale a channel",
        "toolkit": "torchao.quantization.pt2e: X86InductorQuantizer, prepare_qat_pt2e, convert_pt2e",
        "command": shlex.join(
            [*COMMAND, name, *(f"--{key.replace('_', '-')}={value}" for key, value in given.items())]
        ),
        "data": {
            "name": "MNIST (mnist.npz)" if lenet else "CIFAR-10 (cifar10_lossless.npz)",
            "start": "random" if lenet else f"{STORED['resnet20']}.safetensors",
            "training": len(data.training[1]),
            "validation": f"the last {HELD_OUT} training images"
            + ("" if lenet else ", which the float network was trained on"),
            "test": f"{len(data.test[1])} images, judged once",
        },
        "settings": attrs.asdict(settings),
        "parameters": sum(p.numel() for p in graph.parameters()),
        "accuracy_percent": {"validation": epochs[-1]["validation_percent"], "test": round(test, 2)},
        "epochs": epochs,
        "threads": 1,
        "torch": torch.__version__,
        "torchao": version("torchao"),
    }
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console.print(f"{name}: test {test:.2f} % on {len(data.test[1])} images; {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
