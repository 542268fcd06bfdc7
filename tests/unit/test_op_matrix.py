"""Every construct that converts, in every form that torch has for it, computes what torch computes, in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from spir.errors import SpirError
from spir.frontends.torch_fx import TorchFx
from spir.interpreter import run
from tests.unit.lambdas import Lambda

BOUND = 1e-12  # of the largest output
IMAGE, LINE, FEATURES = (4, 8, 8), (4, 12), (6,)


def parameter(*shape):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))))


def difference(model, module, shape):
    """The largest difference from the model, relative to the model's largest output, on other samples than it read."""
    x = 3 * torch.randn(4, *shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(model).double().eval()(x.clone()).numpy()
    found = run(module, x.numpy())[module.output]
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300)


def read(model, shape=IMAGE):
    module = TorchFx().read(model, torch.randn(2, *shape, generator=torch.Generator().manual_seed(3)))
    assert difference(model, module, shape) <= BOUND
    return module


def ops(module):
    return " ".join(node.op.name for node in module.nodes)


def refusal(model, shape=IMAGE):
    with pytest.raises(SpirError) as caught:
        TorchFx().read(model, torch.randn(2, *shape))
    return caught.value


def in_place(y, x):
    y += x
    return y


def subtracted(y, x):
    y -= x
    return y


def scaled(y, factor):
    y *= factor
    return y


def divided(y, factor):
    y /= factor
    return y


def swapped_halves(x):
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat([b, a], -1)


def swish(x):
    return x * x.sigmoid()


def statistics(layer):
    """A batch norm as training leaves it."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.running_mean.normal_(generator=generator)
        layer.running_var.uniform_(0.5, 2.0, generator=generator)
        layer.weight.normal_(generator=generator)
        layer.bias.normal_(generator=generator)
    return layer


def layer(module):
    """One module as a row of the table."""
    return lambda s, x: s.a(x), {"a": module}


ONE_D = "reshape conv2d reshape"

# shape: {name: (function, parts, names of the ops, or None where they do not matter)}
MATRIX = {
    IMAGE: {
        "nn.Conv2d": (*layer(nn.Conv2d(4, 6, 3, 2, 1)), "conv2d"),
        "nn.Conv2d dilated grouped": (*layer(nn.Conv2d(4, 6, (3, 2), (1, 2), (2, 0), (2, 1), 2)), "conv2d"),
        "nn.Conv2d depthwise": (*layer(nn.Conv2d(4, 8, 3, padding=1, groups=4)), "conv2d"),
        "nn.Conv2d 3x1": (*layer(nn.Conv2d(4, 5, (3, 1))), "conv2d"),
        "nn.Conv2d same": (*layer(nn.Conv2d(4, 5, (4, 3), padding="same", dilation=(1, 2))), "conv2d"),
        "ZeroPad2d, nn.Conv2d": (*layer(nn.Sequential(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(4, 5, 3))), "pad conv2d"),
        "F.pad, F.conv2d": (
            lambda s, x: F.conv2d(F.pad(x, (1, 0, 0, 2)), s.w, stride=2),
            {"w": parameter(5, 4, 3, 3)},
            "pad conv2d",
        ),
        "torch.conv2d": (lambda s, x: torch.conv2d(x, s.w, padding=1), {"w": parameter(5, 4, 3, 3)}, "conv2d"),
        "nn.Linear of [C, H, W]": (*layer(nn.Linear(8, 3)), "permute conv2d permute"),
        "F.linear of [C, H, W]": (lambda s, x: F.linear(x, s.w), {"w": parameter(3, 8)}, "permute conv2d permute"),
        "x @ w": (lambda s, x: x @ s.w, {"w": parameter(8, 3)}, "permute conv2d permute"),
        "nn.Linear of rank 4": (
            lambda s, x: s.a(x.view(x.size(0), 2, 2, 8, 8)),
            {"a": nn.Linear(8, 3)},
            "reshape permute reshape conv2d reshape permute",
        ),
        "nn.BatchNorm2d": (*layer(statistics(nn.BatchNorm2d(4))), "batch_norm"),
        "nn.BatchNorm2d on the input and behind a sum": (
            lambda s, x: s.a(s.a(x) + x.relu()),
            {"a": statistics(nn.BatchNorm2d(4))},
            "batch_norm relu add batch_norm",
        ),
        "F.relu6": (F.relu6, {}, "clip"),
        "F.relu6 in place": (lambda x: F.relu6(x + 1, inplace=True), {}, "shift clip"),
        "nn.ReLU6": (*layer(nn.ReLU6()), "clip"),
        "nn.ReLU6 in place": (*layer(nn.ReLU6(inplace=True)), "clip"),
        "nn.Hardtanh": (*layer(nn.Hardtanh(-0.5, 2.0)), "clip"),
        "F.hardtanh": (F.hardtanh, {}, "clip"),
        "F.hardtanh_": (lambda x: F.hardtanh_(x.clone(), -2.0, 0.5), {}, "clip"),
        "clamp(0, 6)": (lambda x: x.clamp(0, 6), {}, "clip"),
        "clamp by name": (lambda x: torch.clamp(x, min=-1, max=0.5), {}, "clip"),
        "clip": (lambda x: torch.clip(x, -1, 1), {}, "clip"),
        "clamp_": (lambda x: x.clone().clamp_(-1, 1), {}, "clip"),
        "clamp(min=0)": (lambda x: x.clamp(min=0), {}, "relu"),
        "clamp_min(0)": (lambda x: x.clamp_min(0.0), {}, "relu"),
        "torch.clamp_min": (lambda x: torch.clamp_min(x, 0.5), {}, "shift relu shift"),
        "clamp(min=0, max=inf)": (lambda x: x.clamp(0, math.inf), {}, "relu"),
        "clamp(min=c)": (lambda x: x.clip(min=-0.5), {}, "shift relu shift"),
        "clamp(max=c)": (lambda x: x.clamp(max=0.5), {}, "scale shift relu scale shift"),
        "clamp(max=0)": (lambda x: x.clamp_max(0), {}, "scale relu scale"),
        "clamp to tensors": (lambda x: x.clamp(torch.tensor(-1.0), torch.tensor(1.0)), {}, "clip"),
        "nn.Threshold": (*layer(nn.Threshold(0.0, 0.0)), "relu"),
        "F.threshold": (lambda x: F.threshold(x, 0.5, 0.5), {}, "shift relu shift"),
        "nn.MaxPool2d": (*layer(nn.MaxPool2d(2)), "max_pool"),
        "nn.MaxPool2d of a stem": (*layer(nn.MaxPool2d(3, 2, 1)), "max_pool"),
        "nn.MaxPool2d dilated": (*layer(nn.MaxPool2d((3, 2), (1, 3), (1, 0), (2, 1))), "max_pool"),
        "nn.MaxPool2d ceil": (*layer(nn.MaxPool2d(3, 2, ceil_mode=True)), "max_pool"),
        "F.max_pool2d": (lambda x: F.max_pool2d(x, 2, stride=1), {}, "max_pool"),
        "F.max_pool2d ceil": (lambda x: F.max_pool2d(x, 3, ceil_mode=True), {}, "max_pool"),
        "torch.max_pool2d": (lambda x: torch.max_pool2d(x, (2, 3)), {}, "max_pool"),
        "nn.AdaptiveMaxPool2d": (*layer(nn.AdaptiveMaxPool2d((4, 2))), "max_pool"),
        "F.adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 1), {}, "max_pool"),
        "x.amax": (lambda x: x.amax((2, 3)), {}, "max_pool flatten"),
        "x.amax, kept": (lambda x: x.amax((-1, -2), keepdim=True), {}, "max_pool"),
        "torch.amax": (lambda x: torch.amax(x, (2, 3)), {}, "max_pool flatten"),
        "amax over one": (lambda x: x.amax(-1), {}, "max_pool reshape"),
        "nn.AvgPool2d": (*layer(nn.AvgPool2d(3, 2, 1)), "avg_pool"),
        "nn.AvgPool2d without padding counted": (
            *layer(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
            "avg_pool scale scale",
        ),
        "nn.AvgPool2d ceil": (*layer(nn.AvgPool2d(3, 2, ceil_mode=True)), "avg_pool scale scale"),
        "nn.AvgPool2d divisor": (*layer(nn.AvgPool2d(2, divisor_override=3)), "avg_pool scale"),
        "F.avg_pool2d": (lambda x: F.avg_pool2d(x, 3), {}, "avg_pool"),
        "nn.AdaptiveAvgPool2d": (*layer(nn.AdaptiveAvgPool2d((2, 4))), "avg_pool"),
        "nn.AdaptiveAvgPool2d, larger": (*layer(nn.AdaptiveAvgPool2d((16, 8))), "upsample"),
        "F.adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), {}, "global_avg_pool"),
        "x.mean((2, 3))": (lambda x: x.mean((2, 3)), {}, "global_avg_pool"),
        "x.mean((-1, -2))": (lambda x: x.mean((-1, -2), keepdim=True), {}, "global_avg_pool"),
        "x.mean(axis)": (lambda x: x.mean(axis=(2, 3), keepdims=True), {}, "global_avg_pool"),
        "mean of means": (lambda x: x.mean(-1).mean(-1), {}, "avg_pool reshape reshape global_avg_pool"),
        "mean of rows": (lambda x: x.mean(2, keepdim=True), {}, "avg_pool"),
        "x.sum((2, 3))": (lambda x: x.sum((2, 3)), {}, "global_avg_pool scale"),
        "torch.sum": (lambda x: torch.sum(x, 3), {}, "avg_pool scale reshape"),
        "x + y": (lambda x: x + x.relu(), {}, "relu add"),
        "y + y": (lambda x: x + x, {}, "add"),
        "+=": (lambda x: in_place(x.relu(), x), {}, "relu add"),
        "-=": (lambda x: subtracted(x.relu(), x), {}, "relu scale add"),
        "torch.add": (lambda x: torch.add(x, x.relu(), alpha=2), {}, "relu scale add"),
        "torch.sub": (lambda x: torch.subtract(x, x.relu(), alpha=0.5), {}, "relu scale add"),
        "torch.rsub": (lambda x: torch.rsub(x, x.relu()), {}, "relu scale add"),
        "x.add_": (lambda x: x.relu().add_(x), {}, "relu add"),
        "x.sub_": (lambda x: x.relu().sub_(x), {}, "relu scale add"),
        "sum of a list": (lambda x: sum([x, x.relu(), -x]), {}, "relu scale add add"),
        "-x": (lambda x: -x, {}, "scale"),
        "torch.neg": (torch.neg, {}, "scale"),
        "x.neg_": (lambda x: x.relu().neg_(), {}, "relu scale"),
        "2 * x": (lambda x: 2 * x, {}, "scale"),
        "x.mul_": (lambda x: x.relu().mul_(0.3), {}, "relu scale"),
        "*=": (lambda x: scaled(x.relu(), 0.3), {}, "relu scale"),
        "/=": (lambda x: divided(x.relu(), 0.3), {}, "relu scale"),
        "torch.mul": (lambda x: torch.mul(x, 0.7), {}, "scale"),
        "x * channels": (lambda s, x: x * s.g, {"g": parameter(4, 1, 1)}, "scale"),
        "x / channels": (lambda s, x: x / s.g, {"g": parameter(1, 4, 1, 1)}, "scale"),
        "x * mask": (lambda s, x: x * s.g, {"g": nn.Buffer(torch.arange(64.0).view(8, 8) % 2)}, "scale"),
        "torch.div": (lambda x: torch.div(x, 7), {}, "scale"),
        "x + c": (lambda x: x + 0.5, {}, "shift"),
        "c + x": (lambda x: 1 + x, {}, "shift"),
        "x - c": (lambda x: x - 0.5, {}, "shift"),
        "c - x": (lambda x: 1 - x, {}, "scale shift"),
        "torch.rsub c": (lambda x: torch.rsub(x, 2.5), {}, "scale shift"),
        "x += c": (lambda x: in_place(x.relu(), 0.5), {}, "relu shift"),
        "x.add_(c)": (lambda x: x.relu().add_(0.5), {}, "relu shift"),
        "torch.add c": (lambda x: torch.add(x, 2, alpha=0.25), {}, "shift"),
        "x + channels": (lambda s, x: x + s.b, {"b": parameter(4, 1, 1)}, "shift"),
        "channels - x": (lambda s, x: s.b - x, {"b": parameter(1, 4, 1, 1)}, "scale shift"),
        "x + row": (lambda s, x: x + s.b, {"b": parameter(8)}, "shift"),
        "x - parameter": (lambda s, x: x - s.b, {"b": parameter(4, 8, 8)}, "shift"),
        "x + buffer": (lambda s, x: x + s.b, {"b": nn.Buffer(torch.randn(1, 4, 8, 8))}, "shift"),
        "x + 0": (lambda x: x.relu() + 0, {}, "relu"),
        "torch.maximum": (lambda x: torch.maximum(x, 0.5 - x), {}, "scale shift scale add relu add"),
        "torch.max": (lambda x: torch.max(x, -x), {}, "scale scale add relu add"),
        "x.minimum": (lambda x: x.minimum(0.5 - x), {}, None),
        "torch.min": (lambda x: torch.min(x, -x), {}, None),
        "maximum with a constant": (lambda s, x: torch.maximum(x, s.b), {"b": parameter(4, 1, 1)}, "shift relu shift"),
        "maximum with zero": (lambda x: torch.maximum(torch.tensor(0.0), x), {}, "relu"),
        "minimum with a constant": (lambda s, x: x.min(s.b), {"b": parameter(4, 8, 8)}, "scale shift relu scale shift"),
        "torch.cat": (lambda x: torch.cat([x, x.relu()], 1), {}, "relu concat"),
        "torch.cat of space": (lambda x: torch.cat((x, x.relu(), x), dim=-1), {}, "relu concat"),
        "torch.concat": (lambda x: torch.concat([x, x[:, :1]], -3), {}, "slice concat"),
        "torch.concatenate": (lambda x: torch.concatenate([x, x], axis=2), {}, "concat"),
        "torch.cat of one": (lambda x: torch.cat([x.relu()], 1), {}, "relu"),
        "torch.cat of shares": (lambda x: torch.cat(x.chunk(2, 1), 2), {}, "slice slice concat"),
        "torch.stack": (lambda x: torch.stack([x, x.relu()], 2), {}, "relu reshape reshape concat"),
        "torch.stack at the end": (lambda x: torch.stack([x, x.relu()], -1), {}, "relu reshape reshape concat"),
        "zeros_like": (lambda x: torch.cat([x, torch.zeros_like(x)], 1), {}, "scale concat"),
        "nn.Flatten": (*layer(nn.Flatten()), "flatten"),
        "nn.Flatten of space": (*layer(nn.Flatten(2)), "reshape"),
        "x.flatten(2)": (lambda x: x.flatten(2), {}, "reshape"),
        "x.view": (lambda x: x.view(-1, 2, 2, 64), {}, "reshape"),
        "x.reshape": (lambda x: x.reshape(x.shape[0], 16, 16), {}, "reshape"),
        "x.unflatten": (lambda x: x.unflatten(1, (2, 2)), {}, "reshape"),
        "nn.Unflatten": (*layer(nn.Unflatten(1, (2, 2))), "reshape"),
        "torch.unflatten": (lambda x: torch.unflatten(x, 1, (4, 1)), {}, "reshape"),
        "unsqueeze, squeeze": (lambda x: x.unsqueeze(1).squeeze(1), {}, "reshape reshape"),
        "torch.unsqueeze": (lambda x: torch.unsqueeze(x, 2), {}, "reshape"),
        "x[:, None]": (lambda x: x[:, None, ..., 1:], {}, "slice reshape"),
        "x.permute": (lambda x: x.permute(0, 2, 3, 1), {}, "permute"),
        "x.permute of a tuple": (lambda x: x.permute((0, 3, 1, 2)), {}, "permute"),
        "torch.permute": (lambda x: torch.permute(x, dims=(0, 1, 3, 2)), {}, "permute"),
        "x.transpose": (lambda x: x.transpose(1, -1), {}, "permute"),
        "torch.swapaxes": (lambda x: torch.swapaxes(x, 2, 3), {}, "permute"),
        "x.movedim": (lambda x: x.movedim(1, -1), {}, "permute"),
        "torch.movedim": (lambda x: torch.movedim(x, (2, 3), (1, 2)), {}, "permute"),
        "x.mT": (lambda x: x.mT, {}, "permute"),
        "transposed twice": (lambda x: x.transpose(1, 2).relu().transpose(1, 2), {}, "permute relu permute"),
        "channel shuffle": (
            lambda x: x.view(x.size(0), 2, 2, 8, 8).transpose(1, 2).contiguous().view(x.size(0), -1, 8, 8),
            {},
            "reshape permute reshape",
        ),
        "nn.ChannelShuffle": (*layer(nn.ChannelShuffle(2)), "reshape permute reshape"),
        "F.channel_shuffle": (lambda x: F.channel_shuffle(x, 4), {}, "reshape permute reshape"),
        "nn.PixelShuffle": (*layer(nn.PixelShuffle(2)), "reshape permute reshape"),
        "F.pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), {}, "reshape permute reshape"),
        "nn.PixelUnshuffle": (*layer(nn.PixelUnshuffle(4)), "reshape permute reshape"),
        "chunk": (lambda x: x.chunk(2, 1)[1], {}, "slice"),
        "chunk, unpacked": (swapped_halves, {}, "slice slice concat"),
        "split": (lambda x: x.split([1, 3], 1)[-1], {}, "slice"),
        "torch.split": (lambda x: torch.split(x, 3, dim=2)[2], {}, "slice"),
        "tensor_split": (lambda x: x.tensor_split(3, dim=3)[1], {}, "slice"),
        "negative slice": (lambda x: x[:, -3:, ::2, -5:-1:3], {}, "slice"),
        "narrow": (lambda x: x.narrow(1, 1, 2), {}, "slice"),
        "torch.narrow": (lambda x: torch.narrow(x, -1, -3, 2), {}, "slice"),
        "select": (lambda x: x.select(2, -1), {}, "slice reshape"),
        "x[:, 0]": (lambda x: x[:, 0], {}, "slice reshape"),
        "F.pad edge": (lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate"), {}, "pad"),
        "nn.ReplicationPad2d": (*layer(nn.ReplicationPad2d(1)), "pad"),
        "nn.ZeroPad2d": (*layer(nn.ZeroPad2d((1, 0, 2, 1))), "pad"),
        "nn.ConstantPad2d": (*layer(nn.ConstantPad2d(1, 0.0)), "pad"),
        "F.pad of nothing": (lambda x: F.pad(x.relu(), (0, 0)), {}, "relu"),
        "F.interpolate": (lambda x: F.interpolate(x, scale_factor=2), {}, "upsample"),
        "F.interpolate to a size": (lambda x: F.interpolate(x, size=(8, 24)), {}, "upsample"),
        "F.interpolate by sizes": (lambda x: F.interpolate(x, (x.size(2) * 2, x.size(3))), {}, "upsample"),
        "F.interpolate exact": (lambda x: F.interpolate(x, scale_factor=3.0, mode="nearest-exact"), {}, "upsample"),
        "nn.Upsample": (*layer(nn.Upsample(scale_factor=(1, 2))), "upsample"),
        "nn.Upsample to a size": (*layer(nn.Upsample((16, 16))), "upsample"),
        "nn.UpsamplingNearest2d": (*layer(nn.UpsamplingNearest2d(scale_factor=2)), "upsample"),
        "dropout": (lambda s, x: F.dropout(s.a(x), 0.5, s.training), {"a": nn.Dropout2d()}, ""),
        "nn.Softmax2d": (*layer(nn.Softmax2d()), "softmax"),
        "softmax of channels": (lambda x: x.softmax(1), {}, "softmax"),
        "nn.ConvTranspose2d": (*layer(nn.ConvTranspose2d(4, 3, 3, 2, 1, output_padding=1)), "conv_transpose2d"),
        "F.conv_transpose2d": (
            lambda s, x: F.conv_transpose2d(x, s.w, s.b, stride=(1, 2), groups=2, dilation=(2, 1)),
            {"w": parameter(4, 3, 2, 3), "b": parameter(6)},
            "conv_transpose2d",
        ),
        "gates on the input": (
            lambda s, x: s.a(x * x.sigmoid()),
            {"a": nn.Conv2d(4, 3, 1)},
            "sigmoid product conv2d",
        ),
    },
    LINE: {
        "nn.Conv1d": (*layer(nn.Conv1d(4, 6, 3, 2, 1)), ONE_D),
        "nn.Conv1d same": (*layer(nn.Conv1d(4, 6, 4, padding="same", dilation=2)), ONE_D),
        "nn.Conv1d depthwise": (*layer(nn.Conv1d(4, 8, 3, groups=4, bias=False)), ONE_D),
        "nn.Conv1d to one": (*layer(nn.Conv1d(4, 1, 12)), "reshape conv2d reshape"),
        "F.conv1d": (
            lambda s, x: F.conv1d(x, s.w, s.b, padding=2),
            {"w": parameter(5, 4, 3), "b": parameter(5)},
            ONE_D,
        ),
        "nn.MaxPool1d": (*layer(nn.MaxPool1d(3, 2, 1)), "reshape max_pool reshape"),
        "F.max_pool1d": (lambda x: F.max_pool1d(x, 5, ceil_mode=True), {}, "reshape max_pool reshape"),
        "nn.AvgPool1d": (*layer(nn.AvgPool1d(4)), "reshape avg_pool reshape"),
        "F.avg_pool1d": (
            lambda x: F.avg_pool1d(x, 5, ceil_mode=True),
            {},
            "reshape avg_pool scale scale reshape",
        ),
        "nn.AdaptiveAvgPool1d": (*layer(nn.AdaptiveAvgPool1d(3)), "reshape avg_pool reshape"),
        "nn.AdaptiveAvgPool1d(1)": (*layer(nn.AdaptiveAvgPool1d(1)), "reshape global_avg_pool reshape"),
        "F.adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 4), {}, "reshape max_pool reshape"),
        "nn.BatchNorm1d": (*layer(statistics(nn.BatchNorm1d(4))), "batch_norm"),
        "nn.Linear": (*layer(nn.Linear(12, 5)), "permute reshape conv2d reshape permute"),
        "torch.matmul": (lambda s, x: torch.matmul(x, s.w), {"w": parameter(12, 2)}, None),
        "mean of the line": (lambda x: x.mean(-1), {}, "reshape global_avg_pool"),
        "amax of the line": (lambda x: x.amax(2, keepdim=True), {}, "reshape max_pool reshape"),
        "F.interpolate": (lambda x: F.interpolate(x, scale_factor=2), {}, "reshape upsample reshape"),
        "nn.ZeroPad1d": (*layer(nn.ZeroPad1d(2)), "pad"),
        "nn.ReplicationPad1d": (*layer(nn.ReplicationPad1d((1, 3))), "pad"),
        "transpose": (lambda x: x.transpose(1, 2), {}, "permute"),
        "log_softmax": (lambda x: torch.log_softmax(x, -1), {}, "softmax"),
    },
    FEATURES: {
        "nn.Linear": (*layer(nn.Linear(6, 3)), "linear"),
        "F.linear": (lambda s, x: F.linear(x, s.w, s.b), {"w": parameter(3, 6), "b": parameter(3)}, "linear"),
        "x @ w": (lambda s, x: x @ s.w, {"w": parameter(6, 2)}, "linear"),
        "nn.BatchNorm1d": (*layer(statistics(nn.BatchNorm1d(6))), "batch_norm"),
        "x + features": (lambda s, x: x + s.b, {"b": parameter(6)}, "shift"),
        "x * features": (lambda s, x: x * s.b, {"b": parameter(6)}, "scale"),
        "torch.cat": (lambda x: torch.cat([x, x.relu()], -1), {}, "relu concat"),
        "unsqueeze": (lambda x: x[..., None, None], {}, "reshape"),
        "nn.Sigmoid": (lambda s, x: s.a(s.fc(x)), {"fc": nn.Linear(6, 3), "a": nn.Sigmoid()}, "linear sigmoid"),
        "torch.sigmoid": (torch.sigmoid, {}, "sigmoid"),
        "F.sigmoid": (F.sigmoid, {}, "sigmoid"),
        "x.sigmoid_": (lambda x: x.clone().sigmoid_(), {}, "sigmoid"),
        "nn.Tanh": (*layer(nn.Tanh()), "tanh"),
        "F.tanh": (F.tanh, {}, "tanh"),
        "torch.tanh": (torch.tanh, {}, "tanh"),
        "nn.Softmax": (lambda s, x: s.a(s.fc(x)), {"fc": nn.Linear(6, 3), "a": nn.Softmax(1)}, "linear softmax"),
        "nn.Softmax of no dim": (*layer(nn.Softmax()), "softmax"),
        "F.softmax": (lambda x: F.softmax(x, dim=-1), {}, "softmax"),
        "nn.LogSoftmax": (*layer(nn.LogSoftmax(-1)), "softmax"),
        "F.log_softmax": (lambda x: F.log_softmax(x, 1), {}, "softmax"),
        "x.log_softmax": (lambda x: x.log_softmax(1), {}, "softmax"),
        "a gate at the end": (
            lambda s, x: swish(s.fc(x)).softmax(1),
            {"fc": nn.Linear(6, 3)},
            "linear sigmoid product softmax",
        ),
    },
}


ROWS = [(shape, name, *row) for shape, rows in MATRIX.items() for name, row in rows.items()]


@pytest.mark.parametrize(
    ("shape", "function", "parts", "expected"),
    [(shape, *row) for shape, _, *row in ROWS],
    ids=[f"{name}, {len(shape)}-d" for shape, name, *_ in ROWS],
)
def test_constructs(shape, function, parts, expected):
    module = read(Lambda(function, **parts), shape)
    assert expected is None or ops(module) == expected


# --- pools, for every size, kernel, stride and padding ------------------------------------------------------------


@st.composite
def images_and_windows(draw, spread=1):
    """An image, and what a pool on it takes; torch refuses padding beyond half of the kernel."""
    size, kernel, stride = (draw(st.tuples(number, number)) for number in (st.integers(1, 9), *[st.integers(1, 4)] * 2))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    dilation = draw(st.tuples(st.integers(1, spread), st.integers(1, spread)))
    ceil_mode = draw(st.booleans())
    windows = [s + 2 * p - d * (k - 1) for s, p, d, k in zip(size, padding, dilation, kernel, strict=True)]
    assume(min(windows) > 0)
    return size, {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil_mode}, dilation


@given(images_and_windows(spread=3))
def test_max_pools_are_those_of_torch(drawn):
    size, fields, dilation = drawn
    pool = nn.MaxPool2d(**fields, dilation=dilation)
    shape = (2, *size)
    if torch.isinf(pool(torch.zeros(1, *shape))).any():  # a window that skips every pixel
        assert "leaves a window without a value" in str(refusal(pool, shape))
    else:
        assert ops(read(pool, shape)) == "max_pool"


@given(images_and_windows(), st.booleans(), st.sampled_from([None, None, 1, 7]))
def test_average_pools_are_those_of_torch(drawn, count_include_pad, divisor_override):
    size, fields, _ = drawn
    pool = nn.AvgPool2d(**fields, count_include_pad=count_include_pad, divisor_override=divisor_override)
    names = ops(read(pool, (2, *size)))
    assert names in ("avg_pool", "avg_pool scale", "avg_pool scale scale")


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d]))
def test_adaptive_pools_are_those_of_torch_or_refused(size, wanted, pool):
    model, shape = pool((wanted, 1)), (2, size, 3)
    if size % wanted and wanted % size:
        assert "windows of unequal size" in str(refusal(model, shape))
    elif wanted > size and size > 1:
        assert ops(read(nn.Sequential(nn.ReLU(), pool((wanted, 3))), shape)) == "relu upsample"
    else:
        read(pool((wanted, 3)), shape)


def test_a_divisor_that_varies_by_position_is_whole_numbers_and_one_float():
    module = read(nn.AvgPool2d(3, 2, 1, count_include_pad=False))
    _, whole, one = module.nodes
    assert whole.op.factor.integral
    assert whole.op.factor.values[0, :2, :2].tolist() == [[9, 6], [6, 4]]  # 36 by the 4, 6 and 9 pixels inside
    assert one.op.factor.values.tolist() == [9 / 36]


# --- what other tools lose, as named tests ------------------------------------------------------------------------


def test_functional_relus_are_all_found():
    model = Lambda(
        lambda s, x: F.relu(s.d(torch.relu(s.c(F.relu(s.b(s.a(x).relu()), inplace=True)))).clamp(min=0)),
        **{name: nn.Conv2d(4, 4, 3, padding=1) for name in "abcd"},
    )
    assert ops(read(model)) == "conv2d relu conv2d relu conv2d relu conv2d relu relu"


def test_a_functional_stem_relu_stands_where_the_model_has_it():
    stem = Lambda(lambda s, x: s.block(F.relu(s.bn(s.conv(x)))), **stem_parts())
    assert ops(read(stem)).startswith("conv2d batch_norm relu conv2d")


def stem_parts():
    bn = statistics(nn.BatchNorm2d(4))
    return {"conv": nn.Conv2d(4, 4, 3), "bn": bn, "block": nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())}


class MyReLUBlock(nn.Module):
    """Has ReLU in its name and none in its forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x) - 1


class QReLU(nn.ReLU):
    """A subclass of ReLU with a meaning of its own."""

    def forward(self, x):
        return 2 * F.relu(x)


class Conv2dBatchNormReLU(nn.Sequential):
    """Named after what it holds."""


def test_the_name_of_a_class_says_nothing():
    named = Conv2dBatchNormReLU(nn.AvgPool2d(2), MyReLUBlock(), QReLU())
    assert ops(read(named)) == "avg_pool conv2d shift relu scale"


def test_a_class_that_shares_the_name_of_one_of_torch_is_read_by_its_forward():
    relu = type("ReLU", (nn.Module,), {"forward": lambda _, x: 3 * x})
    assert ops(read(relu())) == "scale"


@pytest.mark.parametrize("constant", [0.5, 2, "parameter", "buffer"])
def test_a_constant_in_a_sum_is_kept(constant):
    given = {"parameter": parameter(4, 8, 8), "buffer": nn.Buffer(torch.ones(4, 1, 1))}.get(constant, constant)
    (node,) = read(Lambda(lambda s, x: x + s.c, c=given)).nodes
    assert (node.op.offset.values != 0).all()


def test_both_operands_of_y_plus_y_are_kept():
    (node,) = read(Lambda(lambda x: x + x)).nodes
    assert node.operands == ("x", "x")


def test_every_part_of_a_sum_of_lists_and_branches_is_kept():
    module = read(
        Lambda(
            lambda s, x: sum(b(x) for b in s.list),
            list=nn.ModuleList([nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 3, padding=1)]),
        )
    )
    assert ops(module) == "conv2d conv2d add"


@pytest.mark.parametrize("bias", [True, False])
def test_the_bias_of_every_layer_is_its_own(bias):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=bias), nn.Flatten(), nn.Linear(288, 3, bias=bias))
    module = read(model)
    for name, path in (("_0", "0.bias"), ("_2", "2.bias")):
        kept = module.definitions[name].op.bias
        assert (kept is None) != bias
        assert kept is None or (kept.values == model.state_dict()[path].double().numpy()).all()


@pytest.mark.parametrize("kernel", [(3, 1), (1, 3), (2, 5)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_kernels_that_are_not_square_and_groups_have_the_shapes_of_torch(kernel, groups):
    layer = nn.Conv2d(4, 8, kernel, groups=groups)
    assert read(layer).nodes[0].type.shape == tuple(layer(torch.zeros(1, 4, 8, 8)).shape[1:])


def test_average_pools_keep_their_padding():
    assert read(nn.AvgPool2d(2, padding=1)).nodes[0].op.padding == (1, 1, 1, 1)


def test_a_layer_without_output_is_kept_as_it_is():
    dead = nn.Conv2d(4, 4, 3)
    nn.init.zeros_(dead.weight)
    nn.init.constant_(dead.bias, -1.0)
    assert ops(read(nn.Sequential(dead, nn.ReLU(), nn.Conv2d(4, 2, 1)))) == "conv2d relu conv2d"


def test_a_module_called_twice_is_read_twice():
    shared = nn.ReLU()
    model = Lambda(lambda s, x: s.conv(s.relu(s.conv(s.relu(x)))), conv=nn.Conv2d(4, 4, 1), relu=shared)
    module = read(model)
    assert [n.result for n in module.nodes] == ["relu", "conv", "relu_1", "conv_1"]
    assert module.definitions["conv"].op == module.definitions["conv_1"].op


def test_a_value_read_by_many_is_computed_once():
    module = read(Lambda(lambda s, x: torch.cat([(y := s.a(x)), y.relu(), 2 * y], 1), a=nn.Conv2d(4, 2, 1)))
    assert ops(module) == "conv2d relu scale concat"


def test_an_op_with_steps_beside_it_keeps_the_name_of_its_module():
    model = nn.Sequential()
    model.add_module("conv", nn.Conv1d(4, 5, 3))
    model.add_module("fc", nn.Linear(10, 2))
    assert [(n.result, n.op.name, n.origin.path) for n in read(model, LINE).nodes] == [
        ("conv.reshape", "reshape", "conv"),
        ("conv", "conv2d", "conv"),
        ("conv.reshape_1", "reshape", "conv"),
        ("fc.permute", "permute", "fc"),
        ("fc.reshape", "reshape", "fc"),
        ("fc", "conv2d", "fc"),
        ("fc.reshape_1", "reshape", "fc"),
        ("fc.permute_1", "permute", "fc"),
    ]


ANALOGUE = {
    "nn.LeakyReLU": (lambda s, x: s.b(s.act(s.a(x))), {"act": nn.LeakyReLU()}),
    "F.leaky_relu": (lambda s, x: s.b(F.leaky_relu(s.a(x))), {}),
    "nn.GELU": (lambda s, x: s.b(s.act(s.a(x))), {"act": nn.GELU()}),
    "F.silu": (lambda s, x: s.b(F.silu(s.a(x))), {}),
    "nn.Sigmoid": (lambda s, x: s.b(s.act(s.a(x))), {"act": nn.Sigmoid()}),
    "F.sigmoid": (lambda s, x: s.b(F.sigmoid(s.a(x))), {}),
    "x.tanh": (lambda s, x: s.b(s.a(x).tanh()), {}),
    "nn.LayerNorm": (lambda s, x: s.b(s.act(s.a(x))), {"act": nn.LayerNorm(8)}),
    "a gate": (lambda s, x: s.b((y := s.a(x)) * s.act(y)), {"act": nn.Conv2d(4, 4, 1)}),
    "torch.abs": (lambda s, x: s.b(torch.abs(s.a(x))), {}),
    "x.exp": (lambda s, x: s.b(s.a(x).exp()), {}),
    "a power": (lambda s, x: s.b(s.a(x) ** 2), {}),
    "torch.where": (lambda s, x: s.b(torch.where((y := s.a(x)) > 0, y, 0.1 * y)), {}),
}


@pytest.mark.parametrize(("function", "parts"), ANALOGUE.values(), ids=ANALOGUE)
def test_nothing_analogue_is_kept_in_silence(function, parts):
    caught = refusal(Lambda(function, a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1), **parts))
    assert {d.code for d in caught.diagnostics} == {"unsupported"}
    assert "has no conversion" in str(caught)
