"""Plain torch definitions of the benchmark networks, with the layer names of the stored weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from spir.demo.lenet import LeNet5
from spir.frontends.modules.qcfs import swap_relu

WEIGHTS = Path(__file__).with_name("weights")
Model = TypeVar("Model", bound=nn.Module)
Block = Callable[[int, int, int], nn.Module]  # of inputs, outputs, stride


def load(model: Model, weights: Path | None) -> Model:
    """``model`` in evaluation mode, with the tensors of the safetensors file ``weights`` unless it is None.

    A path that the file spells with slashes, such as fire2/conv1x1_1, is one of modules here: fire2.conv1x1_1.
    """
    if weights is not None:
        tensors = {name.replace("/", "."): tensor for name, tensor in load_file(weights).items()}
        missing, unexpected = model.load_state_dict(tensors, strict=False)
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
        self.layer1 = _stage(BasicBlock, blocks, 16, 16, 1)
        self.layer2 = _stage(BasicBlock, blocks, 16, 32, 2)
        self.layer3 = _stage(BasicBlock, blocks, 32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of normalised images [N, 3, 32, 32]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def _stage(block: Block, blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """``blocks`` blocks, the first of which changes resolution and channels."""
    return nn.Sequential(block(inputs, outputs, stride), *(block(outputs, outputs, 1) for _ in range(blocks - 1)))


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 of Iandola et al.: fire modules, max-pools that round up, a convolution to the classes, a mean.

    Takes images [N, 3, 227, 227] in BGR, 0..255 less the mean colour, and returns logits [N, 1000], none negative.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.fire2 = Fire(96, 16, 64)
        self.fire3 = Fire(128, 16, 64)
        self.fire4 = Fire(128, 32, 128)
        self.fire5 = Fire(256, 32, 128)
        self.fire6 = Fire(256, 48, 192)
        self.fire7 = Fire(384, 48, 192)
        self.fire8 = Fire(384, 64, 256)
        self.fire9 = Fire(512, 64, 256)
        self.conv_final = nn.Conv2d(512, 1000, 1, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 1000] of images [N, 3, 227, 227]."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(self.fire4(self.fire3(self.fire2(x))))
        x = self.pool(self.fire8(self.fire7(self.fire6(self.fire5(x)))))
        x = F.relu(self.conv_final(self.fire9(x)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


class Fire(nn.Module):
    """A 1x1 convolution to few channels, and a 1x1 and a 3x3 convolution of these, one behind the other as channels.

    Takes [N, ``inputs``, H, W] and returns [N, 2 ``outputs``, H, W].
    """

    def __init__(self, inputs: int, squeezed: int, outputs: int) -> None:
        super().__init__()
        self.conv1x1_1 = nn.Conv2d(inputs, squeezed, 1)
        self.conv1x1_2 = nn.Conv2d(squeezed, outputs, 1)
        self.conv3x3_2 = nn.Conv2d(squeezed, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both wide convolutions of relu(conv1x1_1(x)), each behind a ReLU, concatenated."""
        x = F.relu(self.conv1x1_1(x))
        return torch.cat([F.relu(self.conv1x1_2(x)), F.relu(self.conv3x3_2(x))], 1)


class MobileNetV1(nn.Sequential):
    """MobileNet of Howard et al., batch norm folded: 13 depthwise and pointwise convolutions, each with ReLU6.

    Takes images [N, 3, S, S] in [-1, 1], S a multiple of 32, and returns logits [N, 1001]; logit 0 is the background.
    ``width`` is the share of the channels that are kept.
    """

    BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))
    """Channels at width 1, and stride."""

    def __init__(self, width: float) -> None:
        super().__init__()
        channels = int(32 * width)
        self._convolution(nn.Conv2d(3, channels, 3, stride=2))
        for outputs, stride in self.BLOCKS:
            kept = int(outputs * width)
            self._convolution(nn.Conv2d(channels, channels, 3, stride=stride, groups=channels))
            self._convolution(nn.Conv2d(channels, kept, 1))
            channels = kept
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.l27 = nn.Conv2d(channels, 1001, 1)
        self.flatten = nn.Flatten()

    def _convolution(self, layer: nn.Conv2d) -> None:
        """Appends a convolution with the padding that TensorFlow calls SAME, and ReLU6."""
        number = sum(isinstance(child, nn.Conv2d) for child in self)
        if layer.kernel_size == (3, 3):
            before = int(layer.stride == (1, 1))  # of an even size, stride 2 pads the right and the bottom alone
            self.add_module(f"pad{number:02}", nn.ZeroPad2d((before, 1, before, 1)))
        self.add_module(f"l{number:02}", layer)
        self.add_module(f"relu{number:02}", nn.ReLU6())


class ConvNetJs(nn.Module):
    """The CIFAR-10 network of the ConvNetJS demo: three times convolution, ReLU and max-pool, then one linear layer.

    Takes images [N, 3, 32, 32] in [-0.5, 0.5] and returns logits [N, 10].
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 5, padding=2)
        self.conv1 = nn.Conv2d(16, 20, 5, padding=2)
        self.conv2 = nn.Conv2d(20, 20, 5, padding=2)
        self.fc3 = nn.Linear(320, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 3, 32, 32]."""
        for layer in (self.conv0, self.conv1, self.conv2):
            x = F.max_pool2d(layer(x).relu(), 2)
        logits: torch.Tensor = self.fc3(torch.flatten(x, 1))
        return logits


class Vgg(nn.Module):
    """VGG of Simonyan and Zisserman for images of 32x32, with batch norm: 3x3 convolutions with max-pools between them.

    Takes images [N, 3, 32, 32] and returns logits [N, 10].

    Args:
        stages: channels of the convolutions before each max-pool.
        hidden: channels of the linear layers before the last.
    """

    def __init__(self, stages: tuple[tuple[int, ...], ...], hidden: tuple[int, ...] = ()) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = 3, 32
        for stage in stages:
            for outputs in stage:
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
            size //= 2
        head: list[nn.Module] = []
        channels *= size**2
        for outputs in hidden:
            head += [nn.Linear(channels, outputs), nn.ReLU(inplace=True), nn.Dropout()]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(*head, nn.Linear(channels, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of images [N, 3, 32, 32]."""
        x = self.features(x)
        logits: torch.Tensor = self.classifier(x.view(x.size(0), -1))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut, a 1x1 convolution where resolution or channels change.

    Takes [N, ``inputs``, H, W] and returns [N, ``outputs``, H / ``stride``, W / ``stride``].
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        result: torch.Tensor = self.relu(out)
        return result


class ResNet(nn.Module):
    """Residual network of He et al. for ImageNet, with the layer names of torchvision.

    Takes normalised images [N, 3, H, W], of 224x224 as a rule, and returns logits [N, 1000]. ``blocks`` counts the
    blocks of each stage.
    """

    def __init__(self, blocks: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(ResidualBlock, blocks[0], 64, 64, 1)
        self.layer2 = _stage(ResidualBlock, blocks[1], 64, 128, 2)
        self.layer3 = _stage(ResidualBlock, blocks[2], 128, 256, 2)
        self.layer4 = _stage(ResidualBlock, blocks[3], 256, 512, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 1000] of normalised images [N, 3, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: torch.Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class InvertedResidual(nn.Module):
    """A 1x1 convolution to ``expand`` times the channels, a depthwise and a 1x1 convolution, and a sum where it fits.

    Takes [N, ``inputs``, H, W] and returns [N, ``outputs``, H / ``stride``, W / ``stride``].
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.conv = nn.Sequential(
            *([_conv_bn_relu6(inputs, hidden, 1)] if expand != 1 else []),
            _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum x + conv(x), or conv(x) where resolution or channels change."""
        out: torch.Tensor = self.conv(x)
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNetV2 of Sandler et al. with the layer names of torchvision: inverted residuals, ReLU6, linear bottlenecks.

    Takes normalised images [N, 3, H, W], of 224x224 as a rule, and returns logits [N, 1000].
    """

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    """Expansion, channels, blocks, and stride of the first block."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(3, 32, 3, 2)]
        channels = 32
        for expand, outputs, blocks, stride in self.STAGES:
            for index in range(blocks):
                layers.append(InvertedResidual(channels, outputs, stride if index == 0 else 1, expand))
                channels = outputs
        self.features = nn.Sequential(*layers, _conv_bn_relu6(channels, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 1000] of normalised images [N, 3, H, W]."""
        x = F.adaptive_avg_pool2d(self.features(x), (1, 1))
        logits: torch.Tensor = self.classifier(torch.flatten(x, 1))
        return logits


def _conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size but for ``stride``, batch norm and ReLU6."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


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


def squeezenet(weights: Path | None = None) -> SqueezeNet:
    """SqueezeNet 1.0 for ImageNet; the stored weights are squeezenet_v1_0_dc_imagenet.safetensors."""
    return load(SqueezeNet(), weights)


def mobilenet_v1(width: float, weights: Path | None = None) -> MobileNetV1:
    """MobileNetV1 for ImageNet with ``width`` times the channels."""
    return load(MobileNetV1(width), weights)


def mobilenet_025(weights: Path | None = None) -> MobileNetV1:
    """MobileNetV1 0.25 for 128x128; the stored weights are mobilenet_v1_0.25_128_float.safetensors."""
    return mobilenet_v1(0.25, weights)


def mobilenet_05(weights: Path | None = None) -> MobileNetV1:
    """MobileNetV1 0.5 for 160x160; the stored weights are mobilenet_v1_0.5_160_float.safetensors."""
    return mobilenet_v1(0.5, weights)


def convnetjs(weights: Path | None = None) -> ConvNetJs:
    """The ConvNetJS demo for CIFAR-10; the stored weights are cifar10_convnetjs.safetensors."""
    return load(ConvNetJs(), weights)


def sinabs_mnist(weights: Path | None = None) -> nn.Sequential:
    """A network without biases, the MNIST one of Sinabs; the stored weights are mnist_sinabs_cnn.safetensors.

    Takes images [N, 1, 28, 28] with pixels in 0..255 and returns logits [N, 10].
    """
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in ((1, 20, 5), (20, 32, 5), (32, 128, 3)):
        layers += [nn.Conv2d(inputs, outputs, kernel, bias=False), nn.ReLU(), nn.AvgPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(128, 500, bias=False), nn.ReLU(), nn.Linear(500, 10, bias=False)]
    return load(nn.Sequential(OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers))), weights)


def vgg9(weights: Path | None = None) -> Vgg:
    """VGG-9 for 32x32 with a hidden linear layer of 1024; no weights are stored."""
    return load(Vgg(((64, 64), (128, 128), (256, 256, 256)), hidden=(1024,)), weights)


def vgg11(weights: Path | None = None) -> Vgg:
    """VGG-11 for 32x32 with one linear layer; no weights are stored."""
    return load(Vgg(((64,), (128,), (256, 256), (512, 512), (512, 512))), weights)


def vgg16(weights: Path | None = None) -> Vgg:
    """VGG-16 for 32x32 with one linear layer; no weights are stored."""
    return load(Vgg(((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3)), weights)


def resnet18(weights: Path | None = None) -> ResNet:
    """ResNet-18 for ImageNet; no weights are stored."""
    return load(ResNet((2, 2, 2, 2)), weights)


def resnet34(weights: Path | None = None) -> ResNet:
    """ResNet-34 for ImageNet; no weights are stored."""
    return load(ResNet((3, 4, 6, 3)), weights)


def mobilenet_v2(weights: Path | None = None) -> MobileNetV2:
    """MobileNetV2 for ImageNet; no weights are stored."""
    return load(MobileNetV2(), weights)


def qcfs_lenet5(weights: Path | None = None) -> nn.Module:
    """LeNet-5 for MNIST with a QCFS of 4 levels for every ReLU; its weights are trained by benchmarks.train_qcfs."""
    return load(swap_relu(LeNet5(), 4), weights)


def qcfs_resnet20(levels: int, weights: Path | None = None) -> nn.Module:
    """ResNet-20 for CIFAR-10 with a QCFS of ``levels`` levels for every ReLU."""
    return load(swap_relu(CifarResNet(3), levels), weights)


def qcfs_resnet20_l4(weights: Path | None = None) -> nn.Module:
    """ResNet-20 with QCFS of 4 levels; its weights are trained by benchmarks.train_qcfs."""
    return qcfs_resnet20(4, weights)


def qcfs_resnet20_l8(weights: Path | None = None) -> nn.Module:
    """ResNet-20 with QCFS of 8 levels; its weights are trained by benchmarks.train_qcfs."""
    return qcfs_resnet20(8, weights)


NETWORKS: dict[str, Callable[[Path | None], nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "squeezenet": squeezenet,
    "mobilenet_025": mobilenet_025,
    "mobilenet_05": mobilenet_05,
    "convnetjs": convnetjs,
    "sinabs_mnist": sinabs_mnist,
    "vgg9": vgg9,
    "vgg11": vgg11,
    "vgg16": vgg16,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "mobilenet_v2": mobilenet_v2,
}

STORED = {
    "resnet20": "cifar10_resnet20",
    "resnet32": "cifar10_resnet32",
    "squeezenet": "squeezenet_v1_0_dc_imagenet",
    "mobilenet_025": "mobilenet_v1_0.25_128_float",
    "mobilenet_05": "mobilenet_v1_0.5_160_float",
    "convnetjs": "cifar10_convnetjs",
    "sinabs_mnist": "mnist_sinabs_cnn",
}
"""The networks with stored weights, and the name of their .safetensors and .json files."""

TUNED: dict[str, Callable[[Path | None], nn.Module]] = {
    "qcfs_lenet5": qcfs_lenet5,
    "qcfs_resnet20_l4": qcfs_resnet20_l4,
    "qcfs_resnet20_l8": qcfs_resnet20_l8,
}
"""The networks with weights in the folder WEIGHTS, as files of these names."""
