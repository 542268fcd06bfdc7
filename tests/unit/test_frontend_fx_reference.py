"""fx_reference reads the reference models of torch.ao.quantization, integer by integer, and refuses the rest."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import spir
from spir import interpreter
from spir.errors import SpirError
from spir.frontends.fx_reference import FxReference
from spir.frontends.torch_fx import TorchFx
from tests.unit.quantised_networks import Sequence, Words, drawn, quiet, refused, saturating, seen

with quiet():
    from torch.ao import quantization as ao
    from torch.ao.nn.quantized import reference as quantized_reference
    from torch.ao.quantization import quantize_fx


def prepared(network, example, *, train=False, config=None):
    with quiet():
        if train:
            mapping = config or ao.get_default_qat_qconfig_mapping("x86")
            return quantize_fx.prepare_qat_fx(network.train(), mapping, (example,))
        mapping = config or ao.get_default_qconfig_mapping("x86")
        return quantize_fx.prepare_fx(network.eval(), mapping, (example,))


def reference(network, example, *, train=False, config=None):
    with quiet():
        observed = prepared(network, example, train=train, config=config)
        seen(observed, example, train=train)
        return quantize_fx.convert_to_reference_fx(observed.eval())


@pytest.fixture(scope="module")
def models():
    """Reference models, each made once."""
    made = {}

    def model(name, train=False):
        if (name, train) not in made:
            network, example = drawn(name)
            made[name, train] = reference(network, example, train=train), example
        return made[name, train]

    return model


NAMES = ("lenet", "lenet_mean", "resnet", "mobilenet")
CASES = [(name, train) for name in NAMES for train in (False, True)]


@pytest.mark.parametrize(("name", "train"), CASES)
def test_every_integer_is_the_toolkits_but_for_ties(models, name, train):
    model, example = models(name, train)
    found = FxReference().agreement(model, example)
    calls = [n for n in model.graph.nodes if n.target is torch.quantize_per_tensor]
    assert len(found) == len(calls) > 6
    allowed = {"lenet_mean": 0.02, "resnet": 1e-3}  # a mean of 4 or of 16 codes in their own step is often a tie
    assert sum(a.ties for a in found) <= allowed.get(name, 1e-4) * sum(a.codes for a in found)


@pytest.mark.parametrize(("name", "train"), CASES)
def test_the_module_computes_what_the_model_computes(models, name, train):
    model, example = models(name, train)
    module = FxReference().read(model, example)
    expected = model(example).detach().numpy()
    apart = np.abs(interpreter.run(module, example.numpy())[module.output] - expected).max(axis=1)
    assert apart.max() < 0.08 * np.abs(expected).max()
    if name in ("lenet", "mobilenet"):
        assert np.median(apart) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("name", "train"), CASES)
def test_the_form_is_that_of_quantize(models, name, train):
    module = FxReference().read(*models(name, train))
    assert not {"relu", "clip", "batch_norm", "scale", "shift"} & {n.op.name for n in module.nodes}
    for node in module.nodes:
        if node.op.name in ("conv2d", "linear"):
            assert node.op.weight.integral
            assert node.op.weight_scale.values.shape == (len(node.op.weight.values),)
            assert not node.op.bias.integral


@pytest.mark.parametrize("passes", ["propagate-scales", "propagate-scales{grid=threshold}"])
@pytest.mark.parametrize("name", ["lenet_mean", "resnet"])
def test_integers_follow(models, name, passes):
    model, example = models(name)
    found = spir.compile(model, passes, example=example)(example.numpy())
    expected = model(example).detach().numpy()
    assert np.abs(found - expected).max() < 0.08 * np.abs(expected).max()


def test_a_pool_and_a_flatten_in_one_step_do_not_round_again(models):
    module = FxReference().read(*models("lenet"))
    quantised = [n.operands[0] for n in module.nodes if n.op.name == "quantize"]
    assert quantised == ["x", "c1", "c2", "f1", "f2", "f3"]


def test_origins_name_modules_and_lines(models):
    module = FxReference().read(*models("resnet"))
    assert str(module.definitions["l2.c1"].origin).startswith("l2.c1 (l2.c1, quantised_networks.py line ")


def test_the_model_stays_as_it_was(models):
    model, example = models("resnet", True)
    before, code, training = copy.deepcopy(model.state_dict()), model.code, model.training
    FxReference().read(model, example)
    assert (model.code, model.training) == (code, training)
    for name, value in before.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, model.state_dict()[name])


def test_the_driver_finds_the_frontend(models):
    model, example = models("lenet")
    assert FxReference().accepts(model)
    assert not TorchFx().accepts(model)
    module = spir.compile(model, "", example=example).module
    assert "quantize" in {n.op.name for n in module.nodes}


def test_torch_fx_keeps_networks_of_floats():
    network, example = drawn("lenet")
    assert TorchFx().accepts(network)
    assert not FxReference().accepts(network)
    assert "relu" in {n.op.name for n in spir.compile(network, "", example=example).module.nodes}


class Coded(nn.Module):
    """A layer with integer weights between two quantisers."""

    def __init__(self, zero=0, dtype=torch.quint8, scale=0.02):
        super().__init__()
        self.zero, self.dtype, self.scale = zero, dtype, scale
        given = {
            "qscheme": torch.per_tensor_affine,
            "dtype": torch.qint8,
            "scale": 0.004,
            "zero_point": 0,
            "axis": 0,
        }
        self.f = quantized_reference.Linear(26, 8, weight_qparams=given)
        nn.init.uniform_(self.f.weight, -0.5, 0.5, generator=torch.Generator().manual_seed(5))

    def forward(self, x):
        x = self.f(torch.quantize_per_tensor(x, self.scale, self.zero, self.dtype).dequantize())
        return torch.quantize_per_tensor(x, 0.05, 100, torch.quint8).dequantize()


@pytest.mark.parametrize(
    ("zero", "dtype", "expected"),
    [
        (114, torch.quint8, (-114, 141)),
        (0, torch.quint8, (0, 255)),
        (-128, torch.qint8, (0, 255)),
        (0, torch.qint8, (-128, 127)),
    ],
)
def test_every_zero_point_becomes_a_range(zero, dtype, expected):
    model = fx.symbolic_trace(Coded(zero, dtype))
    module = FxReference().read(model, torch.randn(8, 26))
    assert [(n.op.lo, n.op.hi) for n in module.nodes if n.op.name == "quantize"] == [expected, (-100, 155)]


class Plain(nn.Module):
    """Calls that other networks make: a relu that is not fused, cat, sizes, in place, functional pools."""

    def __init__(self):
        super().__init__()
        self.c, self.f = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(28, 5)

    def forward(self, x):
        y = torch.relu(self.c(x))
        y = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(y, 2)], 1)
        y = F.adaptive_avg_pool2d(F.hardtanh(y, 0.0, 1.5), (2, 2))
        return self.f(y.view(y.size(0), -1))


def test_other_calls_are_read():
    torch.manual_seed(0)
    model = reference(Plain(), torch.randn(6, 3, 8, 8))
    found = FxReference().agreement(model, torch.randn(6, 3, 8, 8))
    assert sum(a.ties for a in found) <= 0.02 * sum(a.codes for a in found)


class Functional(nn.Module):
    """Layers as functions of parameters, a line of sound, and a dropout at rest."""

    def __init__(self):
        super().__init__()
        self.weight, self.rows = nn.Parameter(torch.randn(4, 3, 3)), nn.Parameter(torch.randn(6, 5))
        self.c = nn.Sequential(nn.Conv1d(4, 4, 3, padding="same"), nn.BatchNorm1d(4), nn.ReLU())

    def forward(self, x):
        x = self.c(F.relu(F.conv1d(x, self.weight)))
        x = F.dropout(F.max_pool1d(x, 2, ceil_mode=True), 0.5, training=self.training)
        return F.linear(x[:, :, :5], self.rows)


def test_layers_that_are_functions_are_read():
    torch.manual_seed(0)
    model = reference(Functional(), torch.randn(6, 3, 12))
    module = FxReference().read(model, torch.randn(6, 3, 12))
    assert all(n.op.weight.integral for n in module.nodes if n.op.name == "conv2d")
    found = FxReference().agreement(model, torch.randn(6, 3, 12))
    assert sum(a.ties for a in found) <= 1e-2 * sum(a.codes for a in found)


class Overwritten(nn.Module):
    """Reads what a module has changed in place."""

    def __init__(self):
        super().__init__()
        self.r = nn.ReLU(inplace=True)

    def forward(self, x):
        x = torch.quantize_per_tensor(x, 0.05, 100, torch.quint8).dequantize()
        self.r(x)
        return x


# --- the proof on import ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saturates", [False, True])
def test_sums_that_saturate_in_int16_are_noticed(monkeypatch, saturates):
    model, run = fx.symbolic_trace(Coded()), fx.Interpreter.call_module

    def kernel(self, target, args, kwargs):
        if not saturates:
            return run(self, target, args, kwargs)
        codes = np.rint(args[0].numpy() / 0.02).astype(int)
        weight = self.fetch_attr(target).get_quantized_weight().int_repr().numpy().astype(int)
        bias = self.fetch_attr(target).bias.numpy()
        return torch.tensor(saturating(codes, weight) * 0.02 * 0.004 + bias, dtype=torch.float32)

    monkeypatch.setattr(fx.Interpreter, "call_module", kernel)
    x = 5 * torch.rand(8, 26, generator=torch.Generator().manual_seed(2))
    if not saturates:
        assert FxReference().agreement(model, x)[1].ties <= 1
        return
    with pytest.raises(SpirError, match=r"%f\S*\.code is not what the toolkit computes") as caught:
        FxReference().read(model, x)
    assert caught.value.code == "trace"
    assert "kernels that do not saturate" in str(caught.value)


# --- refusals -----------------------------------------------------------------------------------------------------


def refusal(model, example, *words):
    assert not TorchFx().accepts(model)
    return refused(FxReference(), model, example, *words)


@pytest.mark.parametrize("train", [False, True])
def test_a_prepared_model_is_refused(train):
    network, example = drawn("lenet")
    model = prepared(network, example, train=train)
    refusal(model, example, "prepared and not converted", "activation_post_process_0", "convert_to_reference_fx")


def test_observers_that_never_ran_are_refused():
    network, example = drawn("lenet")
    with quiet():
        model = quantize_fx.convert_to_reference_fx(prepared(network, example))
    refusal(model, example, "9 of 9 activations", "observers never ran")


def test_lowered_kernels_are_refused(monkeypatch):
    network, example = drawn("lenet")
    with quiet():
        monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
        observed = prepared(network, example, config=ao.get_default_qconfig_mapping("qnnpack"))
        observed(example)
        model = quantize_fx.convert_fx(observed)
    refusal(model, example, "c1 (ConvReLU2d)", "lowered to int8 kernels", "convert_to_reference_fx")


def test_dynamic_quantisation_is_refused():
    network, example = drawn("lenet")
    with quiet():
        model = ao.quantize_dynamic(network, {nn.Linear})
    refusal(model, example, "f1 (Linear)", "as it runs", "quantise statically")


def test_the_eager_mode_is_refused():
    class Stubbed(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.c, self.dequant = ao.QuantStub(), nn.Conv2d(1, 2, 3), ao.DeQuantStub()

        def forward(self, x):
            return self.dequant(self.c(self.quant(x)))

    refusal(Stubbed(), torch.randn(2, 1, 4, 4), "Stubbed of the eager mode", "prepare_fx")


class Bent(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return F.gelu(self.c(x))


@pytest.mark.parametrize(
    ("network", "example", "words"),
    [
        (Words(), torch.zeros(2, 3, dtype=torch.int64), ("Embedding", "table", "no sequence")),
        (Sequence(), torch.randn(2, 3, 4), ("LSTM", "rnn", "no sequence")),
        (Bent(), torch.randn(2, 1, 5, 5), ("gelu has no conversion", torch.__version__)),
    ],
)
def test_what_does_not_convert_is_refused(network, example, words):
    with quiet():
        observed = prepared(network, example)
        observed(example)
        model = quantize_fx.convert_to_reference_fx(observed)
    refusal(model, example, *words)


class Joined(nn.Module):
    def forward(self, x):
        codes = torch.quantize_per_tensor(x, 0.1, 3, torch.quint8).dequantize()
        return codes + torch.quantize_per_tensor(x, 0.1, 0, torch.qint32).dequantize()


class Channels(nn.Module):
    def forward(self, x):
        return torch.quantize_per_channel(x, torch.ones(3), torch.zeros(3), 1, torch.quint8).dequantize()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Joined(), ("qint32", "8 bits")),
        (Channels(), ("one scale a channel", "per tensor")),
        (Overwritten(), ("r writes to a tensor that others read", "inplace=False")),
    ],
)
def test_other_codes_are_refused(network, words):
    refusal(fx.symbolic_trace(network), torch.randn(2, 3, 4, 4), *words)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(SpirError, match=r"no model of torch\.ao\.quantization"):
        FxReference().read(nn.Linear(2, 2), torch.randn(2, 2))
    assert not FxReference().accepts(None)
