"""The networks of benchmarks.train_qat, as the toolkit's own quantised graphs: torch.export, then torchao's PT2E.

What is stored is a network prepared for quantisation-aware training: float weights, statistics of batch norm, ranges.
`qat` builds the same graph again, puts the stored tensors in, and has the toolkit convert it.
"""

# mypy: disable-error-code="import-not-found,import-untyped"

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import SharedQuantizationSpec
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    QUANT_ANNOTATION_KEY,
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from benchmarks.networks import WEIGHTS
from spir.demo.lenet import LeNet5


class Block(nn.Module):
    """`benchmarks.networks.BasicBlock` with a module for each ReLU: the toolkit fuses no other behind batch norm."""

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
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        result: torch.Tensor = self.relu2(out + x)
        return result


class ResNet20(nn.Module):
    """`benchmarks.networks.resnet20` in the words that the toolkit quantises: ReLU and the mean are modules.

    Takes normalised images [N, 3, 32, 32] and returns logits [N, 10]; layers are called as in the stored weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, 10] of normalised images [N, 3, 32, 32]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.layer3(self.layer2(self.layer1(x))))
        logits: torch.Tensor = self.linear(torch.flatten(x, 1))
        return logits


class Quantizer(X86InductorQuantizer):  # type: ignore[misc]  # torchao has no annotations
    """X86InductorQuantizer with codes of ``bits`` bits; a padded shortcut keeps the scale of the codes it pads.

    By its own recipe the toolkit observes the padded tensor anew, which would scale its codes a second time.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.set_global(get_default_x86_inductor_quantization_config(is_qat=True, reduce_range=bits == 7))

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """Annotates as the toolkit does, and then ties the padded shortcut of each sum to where it comes from."""
        super().annotate(model)
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.add.Tensor:
                for shortcut in node.all_input_nodes:
                    source = _padded(shortcut)
                    if source is not shortcut:
                        node.meta[QUANT_ANNOTATION_KEY].input_qspec_map[shortcut] = SharedQuantizationSpec(source)
        return model


def _padded(node: torch.fx.Node) -> torch.fx.Node:
    """What ``node`` is sliced from and padded, or ``node`` itself."""
    while node.target in (torch.ops.aten.pad.default, torch.ops.aten.slice.Tensor):
        node = node.all_input_nodes[0]
    return node


@attrs.frozen
class Network:
    """A network to train: its float model, the shape of an image, and the bits of the codes that neurons send."""

    model: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    bits: int


NETWORKS = {
    "qat_lenet5": Network(LeNet5, (1, 28, 28), 8),
    "qat_lenet5_7bit": Network(LeNet5, (1, 28, 28), 7),
    "qat_resnet20": Network(ResNet20, (3, 32, 32), 8),
    "qat_resnet20_7bit": Network(ResNet20, (3, 32, 32), 7),
}


def prepared(network: Network, model: nn.Module) -> torch.fx.GraphModule:
    """The graph of ``model`` for images in batches of any size, with fake quantisation and batch norm to be trained."""
    example = torch.zeros(2, *network.shape)
    exported = torch.export.export(model.train(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    graph: torch.fx.GraphModule = prepare_qat_pt2e(exported.module(), Quantizer(network.bits))
    return graph


def state(graph: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    """Copies of the tensors of a prepared graph; where modules share one, each name has its own."""
    return {name: tensor.clone().contiguous() for name, tensor in graph.state_dict().items()}


def rebuilt(network: Network, tensors: dict[str, torch.Tensor]) -> torch.fx.GraphModule:
    """The quantised graph of ``network`` with the ``tensors`` of its prepared graph."""
    graph = prepared(network, network.model())
    filled = graph.state_dict()
    if tensors.keys() != filled.keys():
        raise ValueError("the tensors are not those of the prepared graph")
    filled.update(tensors)  # its metadata stay: without their versions the observers change their least scale
    graph.load_state_dict(filled)
    quantised: torch.fx.GraphModule = convert_pt2e(move_exported_model_to_eval(graph))
    return quantised


def qat(name: str) -> torch.fx.GraphModule:
    """The quantised graph of the stored network ``name`` in evaluation mode, as `convert_pt2e` returns it.

    It takes images in batches of any size: for qat_lenet5 [N, 1, 28, 28] with pixels in [0, 1], for qat_resnet20
    [N, 3, 32, 32] as `benchmarks.data.cifar10` prepares them.
    """
    return rebuilt(NETWORKS[name], load_file(WEIGHTS / f"{name}.safetensors"))
