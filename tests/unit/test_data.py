"""Images of the benchmarks come as each network was trained on them."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from benchmarks.data import cifar10, data_file, imagenet, mnist
from benchmarks.networks import STORED


@pytest.fixture(scope="module")
def pictures(spir_data):
    """The first stored ImageNet images, uint8 [256, 256, 3], and the classes of all."""
    with np.load(spir_data / "imagenet_samples_256_jpeg_even.npz") as stored:
        offsets, classes = stored["offsets"], stored["y"]
        streams = [stored["jpeg"][a:b].tobytes() for a, b in pairwise(offsets[:4])]
    return [np.asarray(Image.open(io.BytesIO(stream))) for stream in streams], classes


def test_a_missing_folder_or_file_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("SPIR_DATA", raising=False)
    with pytest.raises(RuntimeError, match=r"SPIR_DATA is not set.*mnist\.npz"):
        mnist()
    monkeypatch.setenv("SPIR_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz is not in the folder"):
        data_file("mnist.npz")


@pytest.mark.usefixtures("spir_data")
def test_mnist_comes_in_unit_range_or_raw():
    unit, raw = mnist(), mnist(raw=True)
    assert unit.x_test.max() == 1
    assert (raw.x_test == np.rint(unit.x_test * 255)).all()
    assert raw.x_test.dtype == np.float32
    assert len(raw.judged(200).calibration.x) == 200
    assert len(raw.judged(200).test.y) == 5000


@pytest.mark.usefixtures("spir_data")
def test_cifar10_comes_as_each_network_wants_it():
    resnet, convnetjs = cifar10(STORED["resnet20"]).x_test, cifar10(STORED["convnetjs"]).x_test
    mean, std = ([[[v]] for v in values] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert np.abs((convnetjs + 0.5) - (resnet * np.array(std) + np.array(mean))).max() < 1e-6
    assert (convnetjs.min(), convnetjs.max()) == (-0.5, 0.5)


def test_squeezenet_takes_the_middle_in_bgr_less_the_mean(pictures):
    judged = imagenet(STORED["squeezenet"], 101)
    assert judged.calibration.x.shape == (100, 3, 227, 227)
    assert judged.test.x.shape == (1, 3, 227, 227)
    for picture, x in zip(pictures[0], judged.calibration.x, strict=False):
        middle = picture[14:241, 14:241].astype(int)
        assert (x.transpose(1, 2, 0) == middle[..., [2, 1, 0]] - [104, 117, 123]).all()


def test_mobilenets_take_the_middle_made_smaller(pictures):
    judged = imagenet(STORED["mobilenet_025"], 101)
    assert judged.calibration.x.shape == (100, 3, 128, 128)
    for picture, x in zip(pictures[0], judged.calibration.x, strict=False):
        middle = Image.fromarray(picture[16:240, 16:240]).resize((128, 128), Image.Resampling.BILINEAR)
        assert (x.transpose(1, 2, 0) == np.asarray(middle) / 128 - 1).all()


def test_labels_are_the_index_of_the_logit(pictures):
    classes = pictures[1]
    assert (classes == 2 * np.arange(500)).all()
    for name, background in (("squeezenet", 0), ("mobilenet_05", 1)):
        judged = imagenet(STORED[name], 110)
        assert (judged.calibration.y == classes[:100] + background).all()
        assert (judged.test.y == classes[100:110] + background).all()
