"""What torch_fx reads computes what the model computes, under the model's own names, and the model stays as it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.networks import resnet20, resnet32
from spir.demo.lenet import LeNet5
from spir.frontends.torch_fx import TorchFx
from spir.interpreter import run
from spir.text import parse
from tests.unit.lambdas import Lambda

BOUND = 1e-10  # of the largest output, in float64


def parameter(*shape):
    return nn.Parameter(torch.randn(shape))


def stirred(model):
    """The model with statistics and parameters as training leaves them, none at its initial value."""
    torch.manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            if layer.affine:
                nn.init.normal_(layer.weight)
                nn.init.normal_(layer.bias)
    return model


def relative_error(model, module, x):
    with torch.no_grad():
        expected = copy.deepcopy(model).double().eval()(x.double().clone()).numpy()
    found = run(module, x.double().numpy())[module.output]
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300)


def check(model, *shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    module = TorchFx().read(model, x)
    assert relative_error(model, module, x) <= BOUND
    assert parse(str(module), module.arrays()) == module
    return module


def ops(module):
    return [node.op.name for node in module.nodes]


@pytest.mark.parametrize(
    ("model", "shape"), [(LeNet5(), (1, 28, 28)), (resnet20(), (3, 32, 32))], ids=["lenet5", "resnet20"]
)
def test_networks_are_exact_in_float64(model, shape):
    check(stirred(model), *shape)


@pytest.mark.parametrize("network", [resnet20, resnet32])
def test_trained_networks_are_exact_on_real_images(network, spir_data):
    from benchmarks.data import cifar10

    stored = f"cifar10_{network.__name__}"
    model = network(spir_data / f"{stored}.safetensors")
    x = torch.from_numpy(cifar10(stored).x_test[:32])
    assert relative_error(model, TorchFx().read(model, x[:1]), x) <= BOUND


CONVOLUTIONS = {
    "square": nn.Conv2d(4, 6, 3),
    "3x1": nn.Conv2d(4, 6, (3, 1), padding=(1, 0)),
    "1x5": nn.Conv2d(4, 6, (1, 5), stride=(2, 1), padding=(0, 2)),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "same, even kernel": nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 2)),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "dilated": nn.Conv2d(4, 6, 3, dilation=(1, 2)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4, padding=1, bias=False),
}


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions(layer):
    assert ops(check(layer, 4, 9, 8)) == ["conv2d"]


@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_functional_convolutions(layer):
    model = Lambda(
        lambda s, x: F.conv2d(
            x, s.w, bias=s.b, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
        ),
        w=layer.weight,
        b=layer.bias,
    )
    assert ops(check(model, 4, 9, 8)) == ["conv2d"]


# name: (function, parts, ops); samples are [4, 8, 8]
FORMS = {
    "nn.ReLU": (lambda s, x: s.a(x), {"a": nn.ReLU()}, ["relu"]),
    "nn.ReLU in place": (lambda s, x: s.a(x), {"a": nn.ReLU(inplace=True)}, ["relu"]),
    "F.relu": (F.relu, {}, ["relu"]),
    "F.relu by name": (lambda x: F.relu(input=x, inplace=False), {}, ["relu"]),
    "F.relu in place": (lambda x: F.relu(x, inplace=True), {}, ["relu"]),
    "F.relu_": (F.relu_, {}, ["relu"]),
    "torch.relu": (torch.relu, {}, ["relu"]),
    "x.relu": (lambda x: x.relu(), {}, ["relu"]),
    "x.relu_": (lambda x: x.relu_(), {}, ["relu"]),
    "nn.BatchNorm2d": (lambda s, x: s.a(x), {"a": nn.BatchNorm2d(4, eps=1e-3)}, ["batch_norm"]),
    "nn.BatchNorm2d, plain": (lambda s, x: s.a(x), {"a": nn.BatchNorm2d(4, affine=False)}, ["batch_norm"]),
    "nn.BatchNorm1d": (lambda s, x: s.a(x.flatten(1)), {"a": nn.BatchNorm1d(256)}, ["flatten", "batch_norm"]),
    "F.batch_norm": (
        lambda s, x: F.batch_norm(x, s.a.running_mean, s.a.running_var, s.a.weight, s.a.bias, eps=0.01),
        {"a": nn.BatchNorm2d(4)},
        ["batch_norm"],
    ),
    "torch.batch_norm": (
        lambda s, x: torch.batch_norm(x, None, None, s.a.running_mean, s.a.running_var, False, 0.1, 0.01, False),
        {"a": nn.BatchNorm2d(4)},
        ["batch_norm"],
    ),
    "nn.Linear": (lambda s, x: s.a(x.flatten(1)), {"a": nn.Linear(256, 5)}, ["flatten", "linear"]),
    "nn.Linear, no bias": (lambda s, x: s.a(x.flatten(1)), {"a": nn.Linear(256, 5, bias=False)}, ["flatten", "linear"]),
    "F.linear": (lambda s, x: F.linear(x.flatten(1), s.w), {"w": parameter(5, 256)}, ["flatten", "linear"]),
    "F.linear, computed weight": (
        lambda s, x: F.linear(x.flatten(1), 0.5 * s.w.t()),
        {"w": parameter(256, 5)},
        ["flatten", "linear"],
    ),
    "nn.AvgPool2d": (lambda s, x: s.a(x), {"a": nn.AvgPool2d(3, 2, 1)}, ["avg_pool"]),
    "nn.AvgPool2d, divisor": (lambda s, x: s.a(x), {"a": nn.AvgPool2d(2, divisor_override=4)}, ["avg_pool"]),
    "nn.AvgPool2d, ceil without rest": (lambda s, x: s.a(x), {"a": nn.AvgPool2d(2, ceil_mode=True)}, ["avg_pool"]),
    "nn.AvgPool2d, nothing padded": (
        lambda s, x: s.a(x),
        {"a": nn.AvgPool2d(2, count_include_pad=False)},
        ["avg_pool"],
    ),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, (2, 3), stride=(1, 2), padding=(0, 1)), {}, ["avg_pool"]),
    "F.avg_pool2d, floor": (lambda x: F.avg_pool2d(x, 3), {}, ["avg_pool"]),
    "nn.AdaptiveAvgPool2d(1)": (lambda s, x: s.a(x), {"a": nn.AdaptiveAvgPool2d(1)}, ["global_avg_pool"]),
    "nn.AdaptiveAvgPool2d, windows": (lambda s, x: s.a(x), {"a": nn.AdaptiveAvgPool2d((4, 2))}, ["avg_pool"]),
    "nn.AdaptiveAvgPool2d, one side": (lambda s, x: s.a(x), {"a": nn.AdaptiveAvgPool2d((None, 1))}, ["avg_pool"]),
    "F.adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, (1, 1)), {}, ["global_avg_pool"]),
    "nn.Flatten": (lambda s, x: s.a(x), {"a": nn.Flatten()}, ["flatten"]),
    "torch.flatten": (lambda x: torch.flatten(x, 1), {}, ["flatten"]),
    "x.flatten": (lambda x: x.flatten(start_dim=1), {}, ["flatten"]),
    "x.view of size": (lambda x: x.view(x.size(0), -1), {}, ["flatten"]),
    "x.view of shape": (lambda x: x.view(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]), {}, ["flatten"]),
    "x.view of numbers": (lambda x: x.view(-1, 4 * 8 * 8), {}, ["flatten"]),
    "x.reshape": (lambda x: x.reshape((len_of(x), -1)), {}, ["flatten"]),
    "torch.reshape": (lambda x: torch.reshape(x, (-1, 256)), {}, ["flatten"]),
    "x.squeeze": (lambda x: x.mean((2, 3), True).squeeze((2, 3)), {}, ["global_avg_pool", "flatten"]),
    "x.mean": (lambda x: x.mean((2, 3)), {}, ["global_avg_pool"]),
    "x.mean, kept": (lambda x: x.mean([-2, -1], keepdim=True), {}, ["global_avg_pool"]),
    "torch.mean": (lambda x: torch.mean(x, dim=(-1, 2)), {}, ["global_avg_pool"]),
    "nn.ZeroPad2d": (lambda s, x: s.a(x), {"a": nn.ZeroPad2d((1, 2, 3, 0))}, ["pad"]),
    "nn.ConstantPad2d": (lambda s, x: s.a(x), {"a": nn.ConstantPad2d(2, 0.0)}, ["pad"]),
    "F.pad": (lambda x: F.pad(x, (1, 0, 2, 3)), {}, ["pad"]),
    "F.pad of channels": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 1), "constant", 0), {}, ["pad"]),
    "F.pad of all axes": (lambda x: F.pad(x, (0, 1, 0, 0, 2, 1, 0, 0)), {}, ["pad"]),
    "slice": (lambda x: x[:, :, ::2, 1::3], {}, ["slice"]),
    "slice from the end": (lambda x: x[..., -5:-1], {}, ["slice"]),
    "slice of channels": (lambda x: x[:, 1:3], {}, ["slice"]),
    "slice by sizes": (lambda x: x[:, :, x.size(2) // 2 :], {}, ["slice"]),
    "one element": (lambda x: x[:, :, 0, -1], {}, ["slice", "flatten"]),
    "one element of a line": (lambda x: x[:, 0, 0, -3:], {}, ["slice", "flatten"]),
    "slice of nothing": (lambda x: F.relu(x[:]), {}, ["relu"]),
    "y + y": (lambda x: x + x, {}, ["add"]),
    "x + y": (lambda x: x + x.relu(), {}, ["relu", "add"]),
    "x += y": (lambda x: added(x.relu(), x), {}, ["relu", "add"]),
    "sum": (lambda x: sum([x, x.relu(), x]), {}, ["relu", "add", "add"]),
    "torch.add": (lambda x: torch.add(x, x.relu()), {}, ["relu", "add"]),
    "torch.add, alpha": (lambda x: torch.add(x, x.relu(), alpha=3), {}, ["relu", "scale", "add"]),
    "x.add": (lambda x: x.add(x.relu()), {}, ["relu", "add"]),
    "x.add_": (lambda x: x.relu().add_(x), {}, ["relu", "add"]),
    "x - y": (lambda x: x - x.relu(), {}, ["relu", "scale", "add"]),
    "x * c": (lambda x: x * 2.0, {}, ["scale"]),
    "c * x": (lambda x: 2 * x, {}, ["scale"]),
    "x *= c": (lambda x: multiplied(x, 0.3), {}, ["scale"]),
    "x / c": (lambda x: x / 4, {}, ["scale"]),
    "x / 3": (lambda x: x / 3, {}, ["scale"]),
    "-x": (lambda x: -x, {}, ["scale"]),
    "0 - x": (lambda x: 0 - x, {}, ["scale"]),
    "x * parameter": (lambda s, x: x * s.g, {"g": parameter(4, 1, 1)}, ["scale"]),
    "x * one parameter": (lambda s, x: s.g * x, {"g": parameter(1)}, ["scale"]),
    "nn.Dropout": (lambda s, x: s.a(F.relu(x)), {"a": nn.Dropout(0.5)}, ["relu"]),
    "nn.Dropout2d": (lambda s, x: s.a(F.relu(x)), {"a": nn.Dropout2d(0.5)}, ["relu"]),
    "F.dropout": (lambda s, x: F.relu(F.dropout(x, 0.5, training=s.training)), {"a": nn.Identity()}, ["relu"]),
    "nn.Identity": (lambda s, x: s.a(F.relu(x)), {"a": nn.Identity()}, ["relu"]),
    "x.contiguous": (lambda x: F.relu(x).contiguous(), {}, ["relu"]),
    "x.float": (lambda x: F.relu(x.float()), {}, ["relu"]),
    "nothing read": (lambda x: (x * 2, F.relu(x))[1], {}, ["relu"]),
}


def len_of(x):
    n, _, _, _ = x.shape
    return n


def added(y, x):
    y += x
    return y


def multiplied(x, factor):
    x *= factor
    return x


@pytest.mark.parametrize(("function", "parts", "expected"), FORMS.values(), ids=FORMS)
def test_forms(function, parts, expected):
    model = stirred(Lambda(function, **parts))
    module = check_float32_casts(model) if function is FORMS["x.float"][0] else check(model, 4, 8, 8)
    assert ops(module) == expected


def check_float32_casts(model):
    """A cast to float32 is nothing in a float32 network, and would round in its float64 copy."""
    x = torch.randn(3, 4, 8, 8)
    module = TorchFx().read(model, x)
    np.testing.assert_allclose(run(module, x.double().numpy())[module.output], model(x).numpy(), rtol=1e-6)
    return module


def test_the_operands_of_y_plus_y_are_both_kept():
    assert check(Lambda(lambda x: x + x), 2, 3, 3).nodes[0].operands == ("x", "x")


def keep_then_relu(s, x):
    y = s.conv(x)
    kept = y
    s.relu(y)
    return kept + s.other(y)


def keep_then_add(s, x):
    y = s.conv(x)
    kept = y
    y += s.other(x)
    y *= 2
    return s.other(kept)


def copy_then_relu(s, x):
    y = s.conv(x)
    kept = y.clone()
    return y.relu_() + kept


def relu_the_input(_, x):
    return x.relu_() + x


@pytest.mark.parametrize("function", [keep_then_relu, keep_then_add, copy_then_relu, relu_the_input])
def test_what_is_written_in_place_is_seen_under_every_name(function):
    check(
        Lambda(function, conv=nn.Conv2d(4, 4, 1), relu=nn.ReLU(inplace=True), other=nn.Conv2d(4, 4, 3, padding=1)),
        4,
        8,
        8,
    )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x, scale=None):
        if scale is not None:
            x = x * scale
        y = F.relu(self.conv(self.act(x)))
        return F.relu(self.act(y) + x)


def test_values_are_named_after_modules_and_calls():
    model = nn.Sequential(Block(), nn.Sequential(Block(), nn.ReLU()))
    module = check(Lambda(lambda s, x: F.relu(s.layer(x)), layer=model), 4, 6, 6)
    assert [node.result for node in module.nodes] == [
        "layer.0.act",
        "layer.0.conv",
        "layer.0.relu",
        "layer.0.act_1",
        "layer.0.add",
        "layer.0.relu_1",
        "layer.1.0.act",
        "layer.1.0.conv",
        "layer.1.0.relu",
        "layer.1.0.act_1",
        "layer.1.0.add",
        "layer.1.0.relu_1",
        "layer.1.1",
        "relu",
    ]


def test_names_that_the_language_does_not_know_are_bent():
    assert [n.result for n in check(nn.Sequential(nn.ReLU(), nn.ReLU()), 2).nodes] == ["_0", "_1"]
    assert [n.result for n in check(nn.Linear(3, 2), 3).nodes] == ["linear"]
    x = nn.Module.__new__(nn.ReLU)
    nn.ReLU.__init__(x)
    assert [n.result for n in check(Lambda(lambda s, v: s.x(v), x=x), 2).nodes] == ["x_1"]


def test_a_module_called_twice_keeps_its_path_and_its_lines():
    first, _, _, second, *_ = check(Block(), 4, 6, 6).nodes
    assert (first.origin.path, second.origin.path) == ("act", "act")
    start = Block.forward.__code__.co_firstlineno
    assert first.origin.place == f"ReLU, test_torch_fx.py line {start + 3}"
    assert second.origin.place == f"ReLU, test_torch_fx.py line {start + 4}"


def test_functional_calls_have_the_path_of_the_module_that_calls():
    module = check(nn.Sequential(Block()), 4, 6, 6)
    start = Block.forward.__code__.co_firstlineno
    assert str(module.definitions["_0.add"].origin) == f"0.add (add, test_torch_fx.py line {start + 4})"
    assert str(module.definitions["_0.conv"].origin) == f"0.conv (Conv2d, test_torch_fx.py line {start + 3})"


def test_layers_that_no_line_of_the_user_calls_have_no_line():
    assert [str(n.origin) for n in check(nn.Sequential(nn.ReLU()), 2).nodes] == ["0 (ReLU)"]


def test_a_subclass_is_read_by_what_it_does():
    class Renamed(nn.Conv2d):
        pass

    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    assert ops(check(Renamed(2, 3, 1), 2, 4, 4)) == ["conv2d"]
    assert ops(check(Doubled(2, 3, 1), 2, 4, 4)) == ["conv2d", "scale"]


def test_parametrised_weights_are_read_as_they_are():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    assert ops(check(layer, 2, 4, 4)) == ["conv2d"]


def test_a_product_with_a_buffer_that_tracing_computes_is_rounded_at_most():
    model = Lambda(lambda s, x: x * (s.std * 2), std=nn.Buffer(torch.tensor(0.3)))
    x = torch.randn(2, 4, 3, 3)
    assert relative_error(model, TorchFx().read(model, x), x) <= 1e-7


def test_an_example_may_be_an_array_of_one_sample_in_another_float_type():
    module = TorchFx().read(nn.Conv2d(1, 2, 3), np.zeros((1, 1, 5, 5), dtype=np.float64))
    assert module.input.type.shape == (1, 5, 5)


def test_float64_parameters_are_copied_exactly():
    model = nn.Linear(3, 2).double()
    module = TorchFx().read(model, torch.zeros(1, 3, dtype=torch.float64))
    assert (module.arrays()["linear.weight"].values == model.weight.detach().numpy()).all()


def test_accepts_networks_of_torch():
    assert TorchFx().accepts(nn.Linear(1, 1))
    assert not TorchFx().accepts("model.onnx")


class Counting(nn.Module):
    """Writes to itself in every forward."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.calls = 0
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = self.drop(self.act(self.bn(self.conv(x))))
        return self.last


def test_the_model_is_left_as_it_was():
    model = stirred(Counting()).train()
    model.bn.eval()
    model.conv.weight.requires_grad_(False)
    model.conv.bias.grad = torch.ones(4)
    seen = []
    model.act.register_forward_hook(lambda _m, _a, y: seen.append(y))
    model.register_forward_pre_hook(lambda _m, _a: None)
    tensors = {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}
    modes = {name: m.training for name, m in model.named_modules()}
    hooks = {name: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for name, m in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    example = torch.randn(2, 4, 8, 8)
    given = example.clone()

    TorchFx().read(model, example)

    assert torch.equal(example, given)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == tensors.keys()
    for name, (value, content) in tensors.items():
        assert after[name] is value, name
        assert torch.equal(value, content), name
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert {n: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads
    assert torch.equal(model.conv.bias.grad, torch.ones(4))
    assert (model.calls, model.last) == (0, None)
    assert torch.is_grad_enabled()
    assert all(isinstance(y, torch.Tensor) for y in seen), "a hook has seen a traced value"
