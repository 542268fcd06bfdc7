"""ResNet-20 converted by SpikingJelly: a worker that reads commands, a line of JSON each, and answers in lines of JSON.

    .venv/bin/python spikingjelly_resnet20.py

It runs in the environment of make_env.sh and needs nothing of SPIR. A command is {"do": NAME, ...}; its answer holds
what was found, or {"error": text}. Arrays travel as .npy files. Commands, in the order in which they make sense:

    threads   count                              torch on so many threads
    convert   weights, calibration, mode         versions; the network, batch norm folded, ranges from the images
    floats    x, out                             logits of the float network, into the file `out`
    logits    x, steps, step_mode, batch, out    mean logits over the steps, into the file `out`
    time      x, steps, step_mode, seconds       seconds a call, over calls that last so long together; calls
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from spikingjelly.activation_based import ann2snn, functional  # type: ignore[import-not-found]  # of its environment
from torch import nn

CALIBRATION_BATCH = 100
STEP_MODES = ("s", "m")
COMMANDS = ("threads", "convert", "floats", "logits", "time")


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm and an option A shortcut, in ops that the converter takes.

    It takes no padding: the zeros of the new channels are made of channels that are there.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.extra = (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
            zeros = x[:, : self.extra] * 0.0
            x = torch.cat([zeros, x, zeros], 1)
        summed: torch.Tensor = self.relu2(out + x)
        return summed


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 with the layer names of the stored weights: images [N, 3, 32, 32] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


class Worker:
    """The float network, the converted one, and the step mode that this is in."""

    def __init__(self) -> None:
        self.ann: nn.Module | None = None
        self.network: nn.Module | None = None
        self.step_mode = ""

    def threads(self, count: int) -> dict[str, Any]:
        """Torch on so many threads."""
        torch.set_num_threads(count)
        return {"threads": torch.get_num_threads()}

    def convert(self, weights: str, calibration: str, mode: str) -> dict[str, Any]:
        """Loads the weights, converts with ranges from the calibration images, and says what converted it."""
        ann = self.ann = ResNet20().eval()
        missing, unexpected = ann.load_state_dict(load_file(weights), strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise ValueError(f"{weights} does not fit ResNet-20: {missing=}, {unexpected=}")
        images = torch.from_numpy(np.load(calibration)).split(CALIBRATION_BATCH)
        recipe = ann2snn.RateCodingRecipe(dataloader=images, mode=mode)
        self.network = ann2snn.Converter(recipe).convert(copy.deepcopy(ann)).eval()
        self.step_mode = ""
        return {name: version(name) for name in ("spikingjelly", "torch")}

    @torch.inference_mode()
    def floats(self, x: str, out: str) -> dict[str, Any]:
        """The logits of the float network, which show that the weights sit where they should."""
        if self.ann is None:
            raise ValueError("convert comes first")
        found = self.ann(torch.from_numpy(np.load(x))).numpy()
        np.save(out, found)
        return {"images": len(found)}

    def logits(self, x: str, steps: int, step_mode: str, batch: int, out: str) -> dict[str, Any]:
        """The mean logits of all images, ``batch`` of them at a time."""
        self._set(step_mode)
        parts = [self._mean(part, steps).numpy() for part in torch.from_numpy(np.load(x)).split(batch)]
        np.save(out, np.concatenate(parts))
        return {"images": sum(map(len, parts))}

    def time(self, x: str, steps: int, step_mode: str, seconds: float) -> dict[str, Any]:
        """Seconds a call on all images at once."""
        self._set(step_mode)
        images = torch.from_numpy(np.load(x))
        calls, start = 0, time.perf_counter()
        while not calls or time.perf_counter() - start < seconds:
            self._mean(images, steps)
            calls += 1
        return {"seconds": (time.perf_counter() - start) / calls, "calls": calls}

    def _set(self, step_mode: str) -> None:
        if self.network is None:
            raise ValueError("convert comes first")
        if step_mode not in STEP_MODES:
            raise ValueError(f"step_mode is one of {STEP_MODES}")
        if step_mode != self.step_mode:
            functional.set_step_mode(self.network, step_mode)
            self.step_mode = step_mode

    @torch.inference_mode()
    def _mean(self, x: torch.Tensor, steps: int) -> torch.Tensor:
        """Mean logits over the steps, of a network without memory of earlier images; the input stands still."""
        assert self.network is not None  # set is called before
        functional.reset_net(self.network)
        if self.step_mode == "m":
            every: torch.Tensor = self.network(x.unsqueeze(0).expand(steps, *x.shape))
            return every.mean(0)
        total: torch.Tensor = self.network(x)
        for _ in range(steps - 1):
            total = total + self.network(x)
        return total / steps


def main() -> int:
    """Answers commands until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker()
    for line in sys.stdin:
        try:
            command = json.loads(line)
            name = command.pop("do")
            if name not in COMMANDS:
                raise ValueError(f"no command {name!r}")
            answer = getattr(worker, name)(**command)
        except Exception as failure:  # noqa: BLE001 - the one who asks is told, and may ask again
            answer = {"error": f"{type(failure).__name__}: {failure}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
