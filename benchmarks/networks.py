"""Plain torch definitions of the benchmark networks, with the layer names of the stored weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def load(model: Model, weights: Path | None) -> Model:
    """``model`` in evaluation mode, with the tensors of the safetensors file ``weights`` unless it is None."""
    if weights is not None:
        missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise ValueError(f"{weights.name} does not fit {type(model).__name__}: {missing=}, {unexpected=}")
    return model.eval()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and an option A shortcut: strided pixels, zeros for the new channels.

    Takes [N, ``inputs``, H, W] and returns [N, ``outputs``, H / ``stride``, W / ``stride``].
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """Residual network of He et al. for CIFAR-10: a stem, three stages of ``blocks`` blocks, a mean, a linear head.

    Takes normalised images [N, 3, 32, 32] and returns logits [N, 10].
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, 1)
        self.layer2 = _stage(blocks, 16, 32, 2)
        self.layer3 = _stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of normalised images [N, 3, 32, 32]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """``blocks`` blocks, the first of which changes resolution and channels."""
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def resnet20(weights: Path | None = None) -> CifarResNet:
    """ResNet-20 for CIFAR-10; the stored weights are cifar10_resnet20.safetensors."""
    return load(CifarResNet(3), weights)


def resnet32(weights: Path | None = None) -> CifarResNet:
    """ResNet-32 for CIFAR-10; the stored weights are cifar10_resnet32.safetensors."""
    return load(CifarResNet(5), weights)


def resnet44(weights: Path | None = None) -> CifarResNet:
    """ResNet-44 for CIFAR-10; no weights are stored."""
    return load(CifarResNet(7), weights)


def resnet56(weights: Path | None = None) -> CifarResNet:
    """ResNet-56 for CIFAR-10; no weights are stored."""
    return load(CifarResNet(9), weights)


NETWORKS: dict[str, Callable[[Path | None], nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
}
