"""The data sets of the benchmarks, read from the folder that the environment variable SPIR_DATA names."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

IMAGENET_CALIBRATION = 100
IMAGENET_CROP = 224  # where a network names no crop of its own: the MobileNets, which resize it
SCALES = {"x/255 - 0.5": (255, 0.5), "x/128 - 1": (128, 1.0)}  # how a network says it: (divisor, subtracted)


class Samples(NamedTuple):
    """Images, float32 [N, C, H, W], with class labels, int64 [N]."""

    x: Images
    y: Labels


class Judged(NamedTuple):
    """Samples that ranges may be calibrated on, and samples that judge the network; they share none."""

    calibration: Samples
    test: Samples


class Split(NamedTuple):
    """Training and test images, float32 [N, C, H, W], with class labels, int64 [N]."""

    x_train: Images
    y_train: Labels
    x_test: Images
    y_test: Labels

    def judged(self, calibration: int) -> Judged:
        """The first ``calibration`` training images, and all test images."""
        first = slice(calibration)
        return Judged(Samples(self.x_train[first], self.y_train[first]), Samples(self.x_test, self.y_test))


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


def mnist(raw: bool = False) -> Split:
    """MNIST with pixels in [0, 1], or ``raw`` in [0, 255]: 60 000 training and 5 000 test images [N, 1, 28, 28]."""
    with np.load(data_file("mnist.npz")) as stored:
        x_train, x_test = (_floats(stored[part][..., None]) for part in ("x_train", "x_test"))
        divisor = np.float32(1 if raw else 255)
        return Split(
            x_train / divisor,
            stored["y_train"].astype(np.int64),
            x_test / divisor,
            stored["y_test"].astype(np.int64),
        )


def cifar10(network: str = "cifar10_resnet20") -> Split:
    """CIFAR-10, bit-exact: the 4 000 training and 500 test images that are stored without loss, [N, 3, 32, 32].

    They are prepared as ``network`` was trained on them.
    """
    with np.load(data_file("cifar10_lossless.npz")) as stored:
        return Split(
            _prepared(stored["x_train"], network),
            stored["y_train"].astype(np.int64),
            _prepared(stored["x_test"], network),
            stored["y_test"].astype(np.int64),
        )


def cifar10_jpeg_train(n: int | None = None, network: str = "cifar10_resnet20") -> tuple[Images, Labels]:
    """The first ``n`` (or all 50 000) CIFAR-10 training images as JPEG kept them, [n, 3, 32, 32], and their labels [n].

    They differ visibly from the originals: use them for training and calibration, never to quote an accuracy.
    They are prepared as in `cifar10`.
    """
    with np.load(data_file("cifar10_train_jpeg.npz")) as stored:
        streams, offsets, labels = stored["jpeg"], stored["offsets"], stored["y"].astype(np.int64)
    count = len(labels) if n is None else n
    if not 0 < count <= len(labels):
        raise ValueError(f"n = {n}: choose 1 to {len(labels)} images")
    pixels = np.stack([np.asarray(picture) for picture in _decoded(streams, offsets[: count + 1])])
    return _prepared(pixels, network), labels[:count]


def imagenet(network: str, n: int | None = None) -> Judged:
    """The first ``n`` (or all 500) stored ImageNet images, one of every second class, prepared for ``network``.

    The first 100 are for calibration, the rest judge. Images are [N, 3, H, W], H = W the input size of the network; a
    label is the index of its logit, which is the class, or the class + 1 where logit 0 is for the background. The
    images are JPEGs of 256x256: compare networks on them, they give no ImageNet accuracy.
    """
    with np.load(data_file("imagenet_samples_256_jpeg_even.npz")) as stored:
        streams, offsets, classes = stored["jpeg"], stored["offsets"], stored["y"].astype(np.int64)
    described = _described(network)
    count = len(classes) if n is None else n
    if not IMAGENET_CALIBRATION < count <= len(classes):
        raise ValueError(f"n = {n}: choose {IMAGENET_CALIBRATION + 1} to {len(classes)} images")
    pixels = np.stack([_fitted(picture, described) for picture in _decoded(streams, offsets[: count + 1])])
    x = _prepared(pixels, network)
    y = classes[:count] + int("background" in described.get("classes", ""))
    cut = IMAGENET_CALIBRATION
    return Judged(Samples(x[:cut], y[:cut]), Samples(x[cut:], y[cut:]))


def _described(network: str) -> dict[str, Any]:
    """The file ``network``.json: architecture, preprocessing, accuracy."""
    described: dict[str, Any] = json.loads(data_file(f"{network}.json").read_text(encoding="utf-8"))
    return described


def _decoded(streams: Pixels, offsets: npt.NDArray[np.int64]) -> Iterator[Image.Image]:
    """The RGB images of JPEG streams that lie one behind the other, each from one offset to the next."""
    for begin, end in pairwise(offsets):
        yield Image.open(io.BytesIO(streams[begin:end].tobytes())).convert("RGB")


def _fitted(picture: Image.Image, described: dict[str, Any]) -> Pixels:
    """The middle of a picture at the input size of a network, uint8 [H, W, 3]: cropped, or cropped and resized."""
    preprocessing = described["preprocessing"]
    crop = preprocessing.get("crop", IMAGENET_CROP)
    left, top = (picture.width - crop) // 2, (picture.height - crop) // 2
    picture = picture.crop((left, top, left + crop, top + crop))
    if "size" in preprocessing:
        size = preprocessing["size"]
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _prepared(pixels: Pixels, network: str) -> Images:
    """Pixels uint8 [N, H, W, C] in RGB as float32 [N, C, H, W], prepared as the file ``network``.json says."""
    preprocessing = _described(network)["preprocessing"]
    if preprocessing.get("order") == "BGR":
        return _floats(pixels[..., ::-1]) - _per_channel(preprocessing["mean_BGR"])
    if preprocessing.get("scale") in SCALES:
        divisor, subtracted = SCALES[preprocessing["scale"]]
        return _floats(pixels) / np.float32(divisor) - np.float32(subtracted)
    mean, std = (_per_channel(preprocessing[key]) for key in ("mean", "std"))
    x: Images = (_floats(pixels) / np.float32(255) - mean) / std
    return x


def _floats(pixels: Pixels) -> Images:
    """Pixels uint8 [N, H, W, C] as float32 [N, C, H, W] in [0, 255]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)


def _per_channel(values: list[float]) -> Images:
    """One value a channel, float32 [C, 1, 1]."""
    return np.array(values, np.float32)[:, None, None]
