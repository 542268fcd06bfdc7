"""Fine-tunes the QCFS networks of the benchmarks and writes their weights and figures into benchmarks/weights.

Each starts from a trained ReLU network with every ReLU exchanged for a QCFS, and learns from labels and from the
logits of that ReLU network. Settings are chosen on training images that are held out; the test images judge the
finished network once. The CIFAR-10 networks learn from degraded images and from the few that are stored without loss,
so the statistics of batch norm are taken from the latter at the end.

    SPIR_DATA=path/to/data python -m benchmarks.train_qcfs qcfs_resnet20_l4
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shlex
import time
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save
from torch import nn

from benchmarks.data import cifar10, cifar10_jpeg_train, data_file, mnist
from benchmarks.networks import STORED, TUNED, WEIGHTS, resnet20
from spir.demo.lenet import lenet5
from spir.frontends.modules.qcfs import QCFS, swap_relu

COMMAND = ["python", "-m", "benchmarks.train_qcfs"]
CALIBRATION = 256
VALIDATION = {"mnist": 5_000, "cifar10": 1_000}
"""How many of the last training images are held out; of CIFAR-10, of those without loss."""
SAME_IMAGE = 3.0
"""The nearest degraded image is the same one if means of 4x4 pixels differ by less, in the sum of squares."""


@attrs.frozen
class Settings:
    """Everything that decides the result, apart from the data."""

    levels: int
    epochs: int
    learning_rate: float = 0.02
    seed: int = 0
    batch: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """Of weights and batch norm; thresholds have none."""
    threshold_rate: float = 0.1
    """The learning rate of thresholds, as a part of that of the rest."""
    warmup: float = 0.05
    """Share of all steps in which the learning rate rises from zero; after it a cosine takes it back to zero."""
    distillation: float = 0.5
    """Weight of the ReLU network's logits in the loss; the labels have the rest."""
    temperature: float = 4.0
    """By which logits are divided before they are compared."""
    shift: int = 4
    """Pixels of zeros around an image, of which crops are taken; with flips. None on MNIST."""
    repeats: int = 3
    """How often an epoch shows an image that is stored without loss."""
    degraded: int = 31_000
    """How many of the degraded images an epoch shows."""


NETWORKS = {
    "qcfs_lenet5": Settings(levels=4, epochs=3, learning_rate=0.01, shift=0, repeats=1, degraded=0),
    "qcfs_resnet20_l4": Settings(levels=4, epochs=5),
    "qcfs_resnet20_l8": Settings(levels=8, epochs=3),
}


@attrs.frozen(eq=False)
class Images:
    """Images [N, C, H, W] and labels [N]: without loss and degraded ones to learn from, held-out ones and test ones."""

    clean: tuple[torch.Tensor, torch.Tensor]
    degraded: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def mnist(cls) -> Images:
        """MNIST, of which no image is degraded."""
        data = mnist()
        x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
        held = VALIDATION["mnist"]
        test = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)
        return cls((x[:-held], y[:-held]), (x[:0], y[:0]), (x[-held:], y[-held:]), test)

    @classmethod
    def cifar10(cls) -> Images:
        """CIFAR-10; an image that is stored without loss, held out or not, is left out of the degraded ones."""
        data = cifar10()
        x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
        x_jpeg, y_jpeg = (torch.from_numpy(a) for a in cifar10_jpeg_train())
        kept = torch.ones(len(x_jpeg), dtype=torch.bool)
        kept[_same(x, x_jpeg)] = False
        held = VALIDATION["cifar10"]
        test = torch.from_numpy(data.x_test), torch.from_numpy(data.y_test)
        return cls((x[:-held], y[:-held]), (x_jpeg[kept], y_jpeg[kept]), (x[-held:], y[-held:]), test)


def _same(x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """For each image the index of its degraded self among ``others``."""
    a, b = (F.avg_pool2d(images, 4).flatten(1) for images in (x, others))
    found = [torch.cdist(part, b).min(1) for part in a.split(500)]
    index = torch.cat([nearest.indices for nearest in found])
    farthest = max(float(nearest.values.max()) for nearest in found)
    if farthest**2 > SAME_IMAGE or len(index.unique()) != len(x):
        raise RuntimeError("an image without loss is not among the degraded ones: which to leave out is not known")
    return index


def augment(x: torch.Tensor, shift: int, generator: torch.Generator) -> torch.Tensor:
    """Images [N, C, H, W], each moved by up to ``shift`` pixels either way and flipped at random."""
    if not shift:
        return x
    n, _, height, width = x.shape
    padded = F.pad(x, (shift,) * 4)
    down, across = torch.randint(2 * shift + 1, (2, n, 1), generator=generator)
    columns = torch.where(
        torch.rand(n, 1, generator=generator) < 0.5, torch.arange(width), torch.arange(width - 1, -1, -1)
    )
    rows = (down + torch.arange(height))[:, None, :, None]
    return padded[
        torch.arange(n)[:, None, None, None],
        torch.arange(x.shape[1])[:, None, None],
        rows,
        (across + columns)[:, None, None, :],
    ]


def accuracy(model: nn.Module, samples: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Percentage of the images whose largest logit is the label."""
    x, y = samples
    with torch.inference_mode():
        hits = sum(int((model(p).argmax(1) == q).sum()) for p, q in zip(x.split(500), y.split(500), strict=True))
    return 100 * hits / len(y)


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """A copy in evaluation mode whose batch norms hold the mean statistics of the batches of ``x``."""
    model = copy.deepcopy(model).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for part in x.split(250) if norms else ():
            model(part)
    return model.eval()


def train(
    name: str, settings: Settings, images: Images, checkpoint: Path, console: Console
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The network after the last epoch, and the figures of each epoch; goes on after the epoch of a checkpoint.

    The validation images are only reported on: no epoch is picked by them.
    """
    torch.manual_seed(settings.seed)
    teacher: nn.Module = lenet5() if name == "qcfs_lenet5" else resnet20(data_file(f"{STORED['resnet20']}.safetensors"))
    model = swap_relu(teacher, settings.levels, images.clean[0][:CALIBRATION])
    teacher, model = (m.to(memory_format=torch.channels_last) for m in (teacher, model))  # type: ignore[call-overload]
    thresholds = {id(m.threshold) for m in model.modules() if isinstance(m, QCFS)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in thresholds], "weight_decay": settings.weight_decay},
        {
            "params": [p for p in model.parameters() if id(p) in thresholds],
            "weight_decay": 0.0,
            "lr": settings.learning_rate * settings.threshold_rate,
        },
    ]
    optimizer = torch.optim.SGD(groups, settings.learning_rate, settings.momentum)
    seen = len(images.clean[0]) * settings.repeats + settings.degraded
    per_epoch = math.ceil(seen / settings.batch)
    steps = settings.epochs * per_epoch

    def rate(step: int) -> float:
        rising = settings.warmup * steps
        if step < rising:
            return (step + 1) / rising
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (steps - rising))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    figures: list[dict[str, float]] = []
    if checkpoint.is_file():
        stored: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        if stored["settings"] != attrs.asdict(settings):
            raise RuntimeError(f"{checkpoint} holds a training of other settings: remove it, or name another folder")
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        schedule.load_state_dict(stored["schedule"])
        figures = stored["figures"]
    else:
        begun = accuracy(settled(model, images.clean[0]), images.validation)
        console.print(f"{name}: {per_epoch} steps an epoch; before training: validation {begun:.2f} %")
    x, y = (torch.cat(pair) for pair in zip(images.clean, images.degraded, strict=True))
    clean, degraded = len(images.clean[0]), len(images.degraded[0])
    for epoch in range(len(figures), settings.epochs):
        generator = torch.Generator().manual_seed(1000 * settings.seed + epoch)
        drawn = clean + torch.randperm(degraded, generator=generator)[: settings.degraded]
        order = torch.cat([torch.arange(clean).repeat(settings.repeats), drawn])
        order = order[torch.randperm(len(order), generator=generator)]
        losses = []
        begin = time.perf_counter()
        model.train()
        for number, chosen in enumerate(order.split(settings.batch)):
            batch = augment(x[chosen], settings.shift, generator).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                taught = teacher(batch) / settings.temperature
            logits = model(batch)
            alike = F.kl_div(
                F.log_softmax(logits / settings.temperature, 1),
                F.log_softmax(taught, 1),
                reduction="batchmean",
                log_target=True,
            )
            labelled = F.cross_entropy(logits, y[chosen])
            loss = settings.distillation * settings.temperature**2 * alike + (1 - settings.distillation) * labelled
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if number % 50 == 49:
                seconds = time.perf_counter() - begin
                console.print(
                    f"  step {number + 1:4} of {per_epoch}  loss {np.mean(losses[-50:]):.4f}  {seconds:.0f} s"
                )
        figures.append(
            {
                "loss": round(float(np.mean(losses)), 4),
                "validation_percent": round(accuracy(settled(model, images.clean[0]), images.validation), 2),
                "seconds": round(time.perf_counter() - begin),
            }
        )
        console.print(f"{name}: epoch {epoch + 1}  {figures[-1]}")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        fresh = checkpoint.with_suffix(".new")
        torch.save(state | {"figures": figures, "settings": attrs.asdict(settings)}, fresh)
        fresh.replace(checkpoint)
    return settled(model, images.clean[0]), figures


def main() -> None:
    """Trains, judges and writes a network; with ``--explore`` shows the validation accuracy and writes nothing."""
    parser = argparse.ArgumentParser(description="Fine-tune a QCFS network of the benchmarks.")
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("--checkpoints", type=Path, default=Path("out/qcfs"), help="default %(default)s")
    parser.add_argument(
        "--explore", action="store_true", help="stop at the validation accuracy: no test images, no files"
    )
    for field in attrs.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(getattr(NETWORKS["qcfs_lenet5"], field.name))
        )
    arguments = vars(parser.parse_args())
    name, folder, explore = (arguments.pop(key) for key in ("name", "checkpoints", "explore"))
    given = {key: value for key, value in arguments.items() if value is not None}
    settings = attrs.evolve(NETWORKS[name], **given)

    torch.set_num_threads(1)
    console = Console(highlight=False, soft_wrap=True)
    lenet = name == "qcfs_lenet5"
    images = Images.mnist() if lenet else Images.cifar10()
    model, epochs = train(name, settings, images, folder / f"{name}.pt", console)
    if explore:
        return

    tensors = {key: t.contiguous() for key, t in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    WEIGHTS.mkdir(exist_ok=True)
    path = WEIGHTS / f"{name}.safetensors"
    path.write_bytes(save(tensors))
    test = accuracy(TUNED[name](path), images.test)
    clean, degraded, validation = (len(part[1]) for part in (images.clean, images.degraded, images.validation))
    figures = {
        "model": f"{'LeNet-5' if lenet else 'ResNet-20'} with a QCFS of {settings.levels} levels for every ReLU",
        "command": shlex.join(
            [*COMMAND, name, *(f"--{key.replace('_', '-')}={value}" for key, value in given.items())]
        ),
        "data": {
            "name": "MNIST (mnist.npz)" if lenet else "CIFAR-10 (cifar10_lossless.npz, cifar10_train_jpeg.npz)",
            "start": "spir/demo/lenet5.safetensors" if lenet else f"{STORED['resnet20']}.safetensors",
            "training": clean if lenet else f"{clean} without loss, {degraded} degraded",
            "calibration": f"the first {CALIBRATION} of them, for the thresholds to start from",
            "validation": f"{validation} training images, held out, which the ReLU network was "
            + ("judged on" if lenet else "trained on"),
            "test": f"{len(images.test[1])} images, judged once",
        },
        "settings": attrs.asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy_percent": {"validation": epochs[-1]["validation_percent"], "test": round(test, 2)},
        "epochs": epochs,
        "threads": 1,
        "torch": torch.__version__,
    }
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    console.print(f"{name}: test {test:.2f} % on {len(images.test[1])} images; {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
