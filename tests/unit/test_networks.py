"""The networks of the benchmarks: each definition gives logits, and those with stored weights recognise real images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.data import cifar10, data_file, imagenet, mnist
from benchmarks.networks import NETWORKS, STORED, Fire, load, mobilenet_v1

MARGIN = 15.0  # points that so few images may be off

# input of one sample, logits, parameters without the statistics of batch norm
DEFINITIONS = {
    "resnet20": ((3, 32, 32), 10, 269_722),
    "resnet32": ((3, 32, 32), 10, 464_154),
    "resnet44": ((3, 32, 32), 10, 658_586),
    "resnet56": ((3, 32, 32), 10, 853_018),
    "squeezenet": ((3, 67, 67), 1000, 1_248_424),
    "mobilenet_025": ((3, 32, 32), 1001, 467_593),
    "mobilenet_05": ((3, 64, 64), 1001, 1_326_633),
    "convnetjs": ((3, 32, 32), 10, 22_466),
    "sinabs_mnist": ((1, 28, 28), 10, 122_364),
    "vgg9": ((3, 32, 32), 10, 5_943_370),
    "vgg11": ((3, 32, 32), 10, 9_231_114),
    "vgg16": ((3, 32, 32), 10, 14_728_266),
    "resnet18": ((3, 64, 64), 1000, 11_689_512),
    "resnet34": ((3, 32, 32), 1000, 21_797_672),
    "mobilenet_v2": ((3, 64, 64), 1000, 3_504_872),
}

# names that the weights of others have; every stored file is loaded below
TORCHVISION = {
    "resnet18": "conv1.weight bn1.running_var layer1.0.conv1.weight layer2.0.downsample.0.weight "
    "layer2.0.downsample.1.bias layer4.1.bn2.running_mean fc.bias",
    "resnet34": "layer3.5.conv2.weight layer3.0.downsample.0.weight layer4.2.bn2.weight fc.weight",
    "mobilenet_v2": "features.0.0.weight features.0.1.bias features.1.conv.0.0.weight features.1.conv.1.weight "
    "features.1.conv.2.bias features.2.conv.1.0.weight features.17.conv.3.running_var features.18.0.weight "
    "classifier.1.weight",
}

# test images, and the accuracy of the stored weights on all of them
TRAINED = {
    "resnet20": (64, 91.0),
    "resnet32": (64, 93.2),
    "squeezenet": (24, 61.0),
    "mobilenet_025": (64, 43.0),
    "mobilenet_05": (64, 68.0),
    "convnetjs": (64, 76.6),
    "sinabs_mnist": (64, 97.1),
}


def test_every_network_is_tested():
    assert DEFINITIONS.keys() == NETWORKS.keys()
    assert TRAINED.keys() == STORED.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_definition_has_its_parameters_and_gives_logits(name):
    shape, classes, parameters = DEFINITIONS[name]
    with torch.device("meta"):  # random weights take longer than all the rest
        model = NETWORKS[name](None)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not model.training
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.01)
    with torch.inference_mode():
        assert model(torch.ones(2, *shape)).shape == (2, classes)


@pytest.mark.parametrize("name", TORCHVISION)
def test_layers_have_the_names_of_torchvision(name):
    with torch.device("meta"):
        names = NETWORKS[name](None).state_dict().keys()
    assert set(TORCHVISION[name].split()) <= names


@pytest.mark.parametrize("size", [128, 160, 192, 224])
def test_mobilenet_pads_as_tensorflow_says(size):
    pads, convolutions = [], 0
    for layer in mobilenet_v1(0.25):
        if isinstance(layer, nn.ZeroPad2d):
            pads.append(layer.padding)
        if isinstance(layer, nn.Conv2d):
            kernel, stride = layer.kernel_size[0], layer.stride[0]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            before, after = total // 2, total - total // 2
            assert pads == ([(before, after, before, after)] if total else [])
            size, pads, convolutions = -(-size // stride), [], convolutions + 1
            size = 1 if convolutions == 27 else size  # the mean before the last
    assert convolutions == 28


def test_slashes_in_stored_names_are_paths(tmp_path):
    made = Fire(4, 2, 3)
    save_file({f"fire/{name}": tensor for name, tensor in made.state_dict().items()}, tmp_path / "fire.safetensors")
    loaded = load(nn.ModuleDict({"fire": Fire(4, 2, 3)}), tmp_path / "fire.safetensors")
    assert torch.equal(loaded["fire"].conv3x3_2.weight, made.conv3x3_2.weight)


@pytest.mark.parametrize("change", ["one is missing", "one is too many"])
def test_weights_that_do_not_fit_are_named(change, tmp_path):
    stored = dict(Fire(4, 2, 3).state_dict())
    if change == "one is missing":
        del stored["conv1x1_2.bias"]
    else:
        stored["conv9.weight"] = torch.ones(1)
    save_file(stored, tmp_path / "fire.safetensors")
    with pytest.raises(ValueError, match=r"fire\.safetensors does not fit Fire: .*(conv1x1_2\.bias|conv9\.weight)"):
        load(Fire(4, 2, 3), tmp_path / "fire.safetensors")


@pytest.mark.usefixtures("spir_data")
@pytest.mark.parametrize("name", STORED)
def test_trained_networks_recognise_real_images(name):
    images, accuracy = TRAINED[name]
    stored = STORED[name]
    model = NETWORKS[name](data_file(f"{stored}.safetensors"))
    if name == "sinabs_mnist":
        test = mnist(raw=True).judged(0).test
    elif stored.startswith("cifar10"):
        test = cifar10(stored).judged(0).test
    else:
        test = imagenet(stored, 100 + images).test
    with torch.inference_mode():
        found = model(torch.from_numpy(test.x[:images])).argmax(1).numpy()
    assert 100 * np.mean(found == test.y[:images]) >= accuracy - MARGIN
