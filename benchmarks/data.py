"""The data sets of the benchmarks, read from the folder that the environment variable SPIR_DATA names."""

from __future__ import annotations

import io
import json
import os
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Split(NamedTuple):
    """Training and test images, float32 [N, C, H, W], with class labels, int64 [N]."""

    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels


def data_file(name: str) -> Path:
    """The file ``name`` in the folder SPIR_DATA; says what is missing when it is not there."""
    folder = os.environ.get("SPIR_DATA")
    if not folder:
        raise RuntimeError(
            f"SPIR_DATA is not set: set it to the folder that holds {name}, for example export SPIR_DATA=path/to/data"
        )
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not in the folder SPIR_DATA={folder}")
    return path


def mnist() -> Split:
    """MNIST with pixels in [0, 1]: 60 000 training and 5 000 test images [N, 1, 28, 28]."""
    with np.load(data_file("mnist.npz")) as stored:
        return Split(
            _unit(stored["x_train"][..., None]),
            stored["y_train"].astype(np.int64),
            _unit(stored["x_test"][..., None]),
            stored["y_test"].astype(np.int64),
        )


def cifar10(network: str = "cifar10_resnet20") -> Split:
    """CIFAR-10, bit-exact: the 4 000 training and 500 test images that are stored without loss, [N, 3, 32, 32].

    Channels are normalised with the mean and deviation that ``network`` was trained with.
    """
    with np.load(data_file("cifar10_lossless.npz")) as stored:
        return Split(
            _normalised(stored["x_train"], network),
            stored["y_train"].astype(np.int64),
            _normalised(stored["x_test"], network),
            stored["y_test"].astype(np.int64),
        )


def cifar10_jpeg_train(n: int | None = None, network: str = "cifar10_resnet20") -> tuple[Images, Labels]:
    """The first ``n`` (or all 50 000) CIFAR-10 training images as JPEG kept them, [n, 3, 32, 32], and their labels [n].

    They differ visibly from the originals: use them for training and calibration, never to quote an accuracy.
    Channels are normalised as in `cifar10`.
    """
    with np.load(data_file("cifar10_train_jpeg.npz")) as stored:
        streams, offsets, labels = stored["jpeg"], stored["offsets"], stored["y"].astype(np.int64)
    count = len(labels) if n is None else n
    if not 0 < count <= len(labels):
        raise ValueError(f"n = {n}: choose 1 to {len(labels)} images")
    pixels = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(streams[begin:end].tobytes())).convert("RGB"))
            for begin, end in pairwise(offsets[: count + 1])
        ]
    )
    return _normalised(pixels, network), labels[:count]


def _unit(pixels: npt.NDArray[np.uint8]) -> Images:
    """Pixels uint8 [N, H, W, C] as float32 [N, C, H, W] in [0, 1]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def _normalised(pixels: npt.NDArray[np.uint8], network: str) -> Images:
    """Pixels uint8 [N, H, W, C] as float32 [N, C, H, W], prepared as the file ``network``.json says."""
    preprocessing = json.loads(data_file(f"{network}.json").read_text(encoding="utf-8"))["preprocessing"]
    mean, std = (np.array(preprocessing[key], np.float32)[:, None, None] for key in ("mean", "std"))
    x: Images = (_unit(pixels) - mean) / std
    return x
