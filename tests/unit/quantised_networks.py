"""Small networks for quantisation toolkits, and what the toolkits make of them."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from spir.errors import SpirError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the toolkits' remarks on their own future."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


class LeNet(nn.Module):
    """LeNet-5; its second pool is a mean or a maximum."""

    def __init__(self, pool: type[nn.Module] = nn.MaxPool2d):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.f1, self.f2, self.f3 = nn.Linear(144, 40), nn.Linear(40, 20), nn.Linear(20, 10)
        self.p1, self.p2 = nn.MaxPool2d(2), pool(2)

    def forward(self, x):
        x = self.p2(F.relu(self.c2(self.p1(F.relu(self.c1(x))))))
        return self.f3(F.relu(self.f2(F.relu(self.f1(x.flatten(1))))))


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, norm):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(inputs, outputs, 3, stride, 1), norm(outputs)
        self.c2, self.b2 = nn.Conv2d(outputs, outputs, 3, 1, 1), norm(outputs)
        same = stride == 1 and inputs == outputs
        self.sc = nn.Sequential() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), norm(outputs))

    def forward(self, x):
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.sc(x))


class ResNet(nn.Module):
    """Two residual blocks, with and without a convolution in the skip."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.c, self.b = nn.Conv2d(3, 6, 3, padding=1), norm(6)
        self.l1, self.l2 = Block(6, 6, 1, norm), Block(6, 8, 2, norm)
        self.p, self.f = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.l2(self.l1(F.relu(self.b(self.c(x)))))
        return self.f(self.p(x).flatten(1))


class MobileNet(nn.Module):
    """An inverted residual: pointwise, depthwise, pointwise, with ReLU6."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()

        def layer(inputs, outputs, kernel, stride, groups):
            conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups)
            return nn.Sequential(conv, norm(outputs), nn.ReLU6())

        self.stem, self.expand, self.depth = layer(3, 6, 3, 2, 1), layer(6, 12, 1, 1, 1), layer(12, 12, 3, 1, 12)
        self.project = nn.Sequential(nn.Conv2d(12, 6, 1), norm(6))
        self.head, self.f = layer(6, 8, 1, 1, 1), nn.Linear(8, 10)

    def forward(self, x):
        x = self.stem(x)
        x = self.head(x + self.project(self.depth(self.expand(x))))
        return self.f(x.mean((2, 3)))


def bare(channels: int) -> nn.Module:
    """In place of a batch norm."""
    del channels
    return nn.Identity()


NETWORKS = {
    "lenet": (LeNet, (8, 1, 20, 20)),
    "lenet_mean": (lambda: LeNet(nn.AvgPool2d), (8, 1, 20, 20)),
    "resnet": (ResNet, (8, 3, 8, 8)),
    "resnet_bare": (lambda: ResNet(bare), (8, 3, 8, 8)),
    "mobilenet": (MobileNet, (8, 3, 12, 12)),
    "mobilenet_bare": (lambda: MobileNet(bare), (8, 3, 12, 12)),
}


def drawn(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network with weights of a fixed seed, and a batch."""
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    network = build()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return network, torch.randn(shape)


def seen(prepared: nn.Module, example: torch.Tensor, *, train: bool) -> None:
    """Three batches of noise: to calibrate on, or to train on."""
    optimiser = torch.optim.SGD(prepared.parameters(), 0.02) if train else None
    for _ in range(3):
        answer = prepared(torch.randn_like(example))
        if optimiser is not None:
            F.cross_entropy(answer, torch.randint(10, (len(example),))).backward()
            optimiser.step()
            optimiser.zero_grad()


def exported(network: nn.Module, *example: torch.Tensor) -> fx.GraphModule:
    """The graph of `torch.export`, for any number of samples."""
    dynamic = tuple({0: torch.export.Dim("n", min=2, max=512)} for _ in example)
    with quiet():
        return torch.export.export(network, example, dynamic_shapes=dynamic).module()


class Words(nn.Module):
    """Looks words up in a table."""

    def __init__(self):
        super().__init__()
        self.table, self.f = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.f(self.table(x).mean(1))


class Sequence(nn.Module):
    """Reads a sequence."""

    def __init__(self):
        super().__init__()
        self.rnn, self.f = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.f(self.rnn(x)[0].flatten(1)[:, :4])


def saturating(codes: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``codes @ weight.T`` whose pairs of products are summed in int16, as int8 kernels without VNNI do."""
    products = codes[:, None, :] * weight[None]
    pairs = np.clip(products[..., ::2] + products[..., 1::2], -(2**15), 2**15 - 1)
    return pairs.sum(-1)


def refused(frontend, model: object, example: object, *words: str) -> SpirError:
    """The refusal of a model that belongs to the frontend; it names all words and the way out."""
    assert frontend.accepts(model)
    with pytest.raises(SpirError) as caught:
        frontend.read(model, example)
    text = str(caught.value)
    assert "fix: " in text
    for word in words:
        assert word in text, text
    return caught.value
