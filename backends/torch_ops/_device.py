"""Where torch runs: devices that are there, the state of torch during a run, and kernels that keep integers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spir.backends.torch_ops._selfcheck import losses
from spir.errors import SpirError, error
from spir.ir import Module
from spir.ops._linear import WeightedMap
from spir.types import Real


def absent(device: str) -> SpirError | None:
    """The refusal of a device that is not here."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        return error("backend", f"there is no device {device!r}", fix='device=cpu, device=cuda or device="cuda:1"')
    index = int(device.partition(":")[2] or 0)
    if device == "cpu" or index < torch.cuda.device_count():
        return None
    return error("backend", f"torch sees {torch.cuda.device_count()} CUDA devices, not {device}", fix="device=cpu")


def lossy(module: Module, device: str) -> Iterator[SpirError]:
    """A refusal for each kernel that loses integers here, where the module has weighted sums of integers."""
    if not any(isinstance(n.op, WeightedMap) and not isinstance(n.type.encoding, Real) for n in module.nodes):
        return
    with quiet(torch.device(device)) as there:
        lost = losses(there)
    for loss in lost:
        yield error(
            "backend",
            f"{loss} is not exact on integers on {device}",
            fix='torch.set_float32_matmul_precision("highest"), or another device',
        )


@contextmanager
def quiet(device: torch.device) -> Iterator[torch.device]:
    """No gradients, no autocast of a caller and none of the kernels that transform their inputs: they would round."""
    with (
        torch.inference_mode(),
        torch.autocast(device.type, enabled=False),
        _onednn(),
        torch.backends.nnpack.flags(enabled=False),
    ):
        yield device


@contextmanager
def _onednn() -> Iterator[None]:
    """Switched on, where there is one: its direct kernels keep integers, those that replace it may not."""
    if bool(torch.backends.mkldnn.enabled) or not torch.backends.mkldnn.is_available():
        yield
        return
    with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=True):
        yield
