"""LeNet-5 with average pooling and ReLU, trained on MNIST; 1000 test images, and 200 training images to calibrate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).with_name("lenet5.safetensors")
FIGURES = Path(__file__).with_name("lenet5.json")
IMAGES = Path(__file__).with_name("mnist_test_1000.npz")
CALIBRATION = Path(__file__).with_name("mnist_train_200.npz")


class LeNet5(nn.Module):
    """LeNet-5: two convolutions with average pooling, three linear layers, ReLU between them.

    Takes images [N, 1, 28, 28] with pixels in [0, 1] and returns logits [N, 10].
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.AvgPool2d(2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.AvgPool2d(2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu4 = nn.ReLU()
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 1, 28, 28] with pixels in [0, 1]."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = torch.flatten(x, 1)
        x = self.relu3(self.fc1(x))
        x = self.relu4(self.fc2(x))
        logits: torch.Tensor = self.fc3(x)
        return logits


def lenet5(pretrained: bool = True) -> LeNet5:
    """`LeNet5` in evaluation mode, with the shipped MNIST weights or, without ``pretrained``, fresh random ones."""
    model = LeNet5()
    if pretrained:
        model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def images() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The first 1000 MNIST test images, float32 [1000, 1, 28, 28] in [0, 1], and their digits, int64 [1000]."""
    with np.load(IMAGES) as stored:
        return _unit(stored["x"]), stored["y"].astype(np.int64)


def calibration() -> npt.NDArray[np.float32]:
    """The first 200 MNIST training images, float32 [200, 1, 28, 28] in [0, 1]."""
    with np.load(CALIBRATION) as stored:
        return _unit(stored["x"])


def _unit(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return pixels[:, None].astype(np.float32) / np.float32(255)
