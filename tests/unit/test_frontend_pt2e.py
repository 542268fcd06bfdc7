"""pt2e reads what torchao's PT2E quantisation made, integer by integer, and refuses the rest."""

from __future__ import annotations

import copy
import importlib.util
import math

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the ops of the graphs below
from torch import fx, nn

import spir
from spir import interpreter
from spir.errors import SpirError
from spir.frontends import _quantised as quantised
from spir.frontends.pt2e import Pt2e
from spir.frontends.torch_fx import TorchFx
from tests.unit.quantised_networks import Sequence, Words, drawn, exported, quiet, refused, saturating, seen

with quiet():
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

QD = torch.ops.quantized_decomposed
UINT8, INT8 = (0, 255, torch.uint8), (-128, 127, torch.int8)


def x86_quantizer(**options):
    return x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config(**options))


def converted(name, *, train=False, quantizer=None):
    network, example = drawn(name)
    with quiet():
        graph = exported(network.train() if train else network.eval(), example)
        chosen = quantizer or x86_quantizer(is_qat=train)
        prepared = (prepare_qat_pt2e if train else prepare_pt2e)(graph, chosen)
        seen(prepared, example, train=train)
        if train:
            pt2e.move_exported_model_to_eval(prepared)
        return convert_pt2e(prepared), example


def words(module):
    return [n.op.name for n in module.nodes]


def layer(module):
    """The op of the one convolution."""
    (found,) = (n.op for n in module.nodes if n.op.name == "conv2d")
    return found


@pytest.fixture(scope="module")
def graphs():
    """Converted graphs, each made once."""
    made = {}

    def graph(name, train=False):
        if (name, train) not in made:
            made[name, train] = converted(name, train=train)
        return made[name, train]

    return graph


CASES = [
    *((name, False) for name in ("lenet", "lenet_mean", "resnet", "mobilenet")),
    *((name, True) for name in ("lenet", "resnet_bare", "mobilenet_bare")),
    *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("resnet", "mobilenet")),
]


# --- networks that torchao quantised ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "train"), CASES)
def test_every_integer_is_the_toolkits_but_for_ties(graphs, name, train):
    model, example = graphs(name, train)
    found = Pt2e().agreement(model, example)
    calls = [n for n in model.graph.nodes if str(n.target) == "quantized_decomposed.quantize_per_tensor.default"]
    assert len(found) == len(calls) > 4
    assert sum(a.ties for a in found) <= 1e-4 * sum(a.codes for a in found)


@pytest.mark.parametrize(("name", "train"), CASES)
def test_the_module_computes_what_the_graph_computes(graphs, name, train):
    model, example = graphs(name, train)
    module = Pt2e().read(model, example)
    expected = model(example).detach().numpy()
    apart = np.abs(interpreter.run(module, example.numpy())[module.output] - expected).max(axis=1)
    assert np.median(apart) < 1e-4 * np.abs(expected).max()  # a sample with a code at a tie may differ by more
    assert apart.max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "train"), CASES)
def test_the_form_is_that_of_quantize(graphs, name, train):
    module = Pt2e().read(*graphs(name, train))
    assert not {"relu", "clip", "batch_norm", "scale", "shift"} & {n.op.name for n in module.nodes}
    for node in module.nodes:
        if node.op.name in ("conv2d", "linear"):
            assert node.op.weight.integral
            assert node.op.weight_scale.values.shape == (len(node.op.weight.values),)
            assert not node.op.bias.integral
            assert module.definitions[node.operands[0]].op.name in ("dequantize", "flatten")
        if node.op.name == "quantize":
            assert node.op.lo <= 0 < node.op.hi
            assert [r.op.name for r in module.readers[node.result]] == ["dequantize"]


@pytest.mark.parametrize("passes", ["propagate-scales", "propagate-scales{grid=threshold}"])
@pytest.mark.parametrize(("name", "train"), [("lenet_mean", False), ("resnet", False), ("mobilenet", False)])
def test_integers_follow(graphs, name, train, passes):
    model, example = graphs(name, train)
    found = spir.compile(model, passes, example=example)(example.numpy())
    expected = model(example).detach().numpy()
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_spikes_follow(graphs):
    model, example = graphs("lenet", True)
    integers = spir.compile(model, "propagate-scales{grid=threshold}", example=example)
    passes = "propagate-scales{grid=threshold}, derive-thresholds{neuron=parallel}, fuse-neuron"
    spikes = spir.compile(model, passes, example=example)
    assert (spikes(example.numpy()) == integers(example.numpy())).all()
    assert words(spikes.module).count("neuron_parallel") == 4


def test_origins_name_modules_and_lines(graphs):
    module = Pt2e().read(*graphs("lenet"))
    assert str(module.definitions["c1"].origin).startswith("c1 (conv2d, quantised_networks.py line ")


def test_the_model_stays_as_it_was(graphs):
    model, example = graphs("resnet")
    before, code = copy.deepcopy(model.state_dict()), model.code
    Pt2e().read(model, example)
    assert model.code == code
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_the_driver_finds_the_frontend(graphs):
    model, example = graphs("lenet")
    assert Pt2e().accepts(model)
    assert not TorchFx().accepts(model)
    assert "quantize" in words(spir.compile(model, "", example=example).module)


def test_a_graph_for_one_sample_runs_on_more_of_them():
    network, example = drawn("lenet")
    with quiet():
        graph = torch.export.export(network.eval(), (example[:1],)).module()
        prepared = prepare_pt2e(graph, x86_quantizer())
        prepared(example[:1])
        model = convert_pt2e(prepared)
    (first, *_) = Pt2e().agreement(model, example)
    assert first.codes == 8 * 400


def test_int8_codes_behind_relu_start_at_zero():
    with quiet():
        xnnpack = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer")
    options = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    model, example = converted("lenet_mean", quantizer=xnnpack.XNNPACKQuantizer().set_global(options))
    module = Pt2e().read(model, example)
    ranges = [(n.op.lo, n.op.hi) for n in module.nodes if n.op.name == "quantize"]
    assert ranges.count((0, 255)) >= 4
    assert all(hi - lo == 255 for lo, hi in ranges)


# --- graphs written by hand ---------------------------------------------------------------------------------------


def fake(x, scale, zero, ends=UINT8):
    return QD.dequantize_per_tensor(QD.quantize_per_tensor(x, scale, zero, *ends), scale, zero, *ends)


class Hand(nn.Module):
    """A network of one function; its weight is ``[4, 3, 3, 3]`` int8 with one scale a channel."""

    def __init__(self, function):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.function = function
        self.register_buffer("codes", torch.randint(-127, 128, (4, 3, 3, 3), generator=generator, dtype=torch.int8))
        self.register_buffer("scale", torch.rand(4, generator=generator) * 0.01 + 0.001)
        self.register_buffer("zero", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("bias", torch.randn(4, generator=generator))
        self.register_buffer("gamma", torch.tensor([1.0, -0.5, 0.0, 2.0]))

    def weight(self):
        return QD.dequantize_per_channel(self.codes, self.scale, self.zero, 0, *INT8)

    def conv(self, x):
        return torch.conv2d(x, self.weight(), self.bias, padding=1)

    def forward(self, x):
        return self.function(self, x)


def images(count=3):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 2


def hand(function, x=None):
    return exported(Hand(function).eval(), images() if x is None else x)


def read(function):
    return Pt2e().read(hand(function), images())


def ranges(module):
    return [(n.op.lo, n.op.hi) for n in module.nodes if n.op.name == "quantize"]


@pytest.mark.parametrize(
    ("zero", "ends", "expected"),
    [
        (114, UINT8, (-114, 141)),
        (0, UINT8, (0, 255)),
        (255, UINT8, (-255, 0)),
        (-128, INT8, (0, 255)),
        (0, INT8, (-128, 127)),
        (7, INT8, (-135, 120)),
        (0, (0, 127, torch.uint8), (0, 127)),
    ],
)
def test_every_zero_point_becomes_a_range(zero, ends, expected):
    model = hand(lambda net, x: net.conv(fake(x, 0.05, zero, ends)))
    module = Pt2e().read(model, images())
    assert ranges(module) == [expected]
    answer = interpreter.run(module, images().double().numpy())[module.output]
    assert np.abs(answer - model(images()).numpy()).max() < 1e-4  # the padding is 0, and no code of the zero point


def test_a_zero_point_of_weights_is_taken_off():
    def function(net, x):
        weight = QD.dequantize_per_tensor(net.codes, 0.01, 5, *INT8)
        return torch.conv2d(fake(x, 0.05, 3, UINT8), weight, net.bias)

    conv = layer(read(function))
    assert (conv.weight.values == Hand(None).codes.numpy().astype(int) - 5).all()
    assert conv.weight_scale.values == pytest.approx([0.01])


def test_zero_points_a_channel_are_taken_off():
    zeros = torch.tensor([3, 0, -7, 100])

    def function(net, x):
        weight = QD.dequantize_per_channel(net.codes, net.scale, net.zero + zeros, 0, *INT8)
        return torch.conv2d(fake(x, 0.05, 3, UINT8), weight, net.bias)

    expected = Hand(None).codes.numpy().astype(int) - zeros.numpy()[:, None, None, None]
    assert (layer(read(function)).weight.values == expected).all()


def test_pairs_that_change_nothing_are_left_out():
    def function(net, x):
        x = fake(torch.relu(net.conv(fake(x, 0.05, 114))), 0.1, 0)
        x = fake(torch.max_pool2d(x, 2), 0.1, 0)
        return fake(torch.relu(fake(x.flatten(1), 0.1, 0)), 0.1, 0)

    module = read(function)
    assert words(module) == [
        *("quantize", "dequantize", "conv2d", "quantize", "dequantize", "max_pool", "flatten"),
    ]
    assert len(Pt2e().agreement(hand(function), images())) == 5


def test_pairs_that_round_stay():
    def function(net, x):
        x = fake(torch.relu(net.conv(fake(x, 0.05, 114))), 0.1, 0)
        return fake(fake(nn.functional.avg_pool2d(x, 2), 0.1, 0), 0.2, 0)

    assert ranges(read(function)) == [(-114, 141), (0, 255), (0, 255), (0, 255)]


def test_a_pair_that_clips_more_narrows_the_codes():
    def function(net, x):
        x = fake(net.conv(fake(x, 0.05, 114)), 0.1, 100)
        return fake(torch.max_pool2d(x, 2), 0.1, 3, (0, 15, torch.uint8))

    assert ranges(read(function)) == [(-114, 141), (-3, 12)]


def test_a_relu_behind_codes_narrows_them_where_it_is_read():
    def function(net, x):
        x = fake(net.conv(fake(x, 0.05, 114)), 0.1, 100)
        return fake(nn.functional.avg_pool2d(torch.relu(x), 2) + torch.max_pool2d(x, 2), 0.2, 100)

    module = read(function)
    assert sorted(ranges(module)) == [(-114, 141), (-100, 155), (-100, 155), (0, 155)]
    assert "relu" not in words(module)


def test_a_relu6_moves_into_the_quantiser_behind():
    module = read(lambda net, x: fake(torch.nn.functional.hardtanh(net.conv(fake(x, 0.05, 114)), 0.0, 6.0), 0.25, 0))
    assert ranges(module)[1] == (0, 24)


def test_a_mean_of_activations_that_are_not_quantised_takes_fine_steps():
    def function(net, x):
        return fake(torch.relu(net.conv(fake(x, 0.05, 114))).mean((2, 3)), 0.01, 0)

    module = read(function)
    fine = module.nodes[3].op
    assert fine.scale == 0.01 / 1024
    assert fine.hi == 2 ** fine.hi.bit_length() - 1 >= 36 * 255 * 1024
    assert "in 2^-10 of the step that follows" in module.nodes[3].origin.place


def mean(x):
    return nn.functional.avg_pool2d(x, 2)


def after(net, x):
    """A mean behind a ReLU that the toolkit did not quantise."""
    return mean(torch.relu(net.conv(fake(x, 0.05, 114))))


def squeezed(net, x, gain):
    """A batch norm of a mean."""
    norm = torch.batch_norm(
        after(net, x), net.gamma * gain, net.bias, net.bias, net.gamma.abs() + 1, False, 0.1, 1e-3, False
    )
    return fake(norm, 0.1 * gain, 128)


def both(join, *codes):
    """What ``codes`` make of one mean, joined."""
    return lambda net, x: (lambda y: join([code(y) for code in codes], 1))(after(net, x))  # noqa: PLC3002


FINE = {
    "a mean and a negative code": lambda net, x: fake(
        after(net, x) + fake(mean(net.conv(fake(x, 0.05, 114))), 0.05, 255), 0.002, 0
    ),
    "a mean of means": lambda net, x: fake(nn.functional.avg_pool2d(after(net, x), 3), 0.02, 0),
    "two steps": both(torch.cat, lambda y: fake(y, 0.001, 0), lambda y: fake(y, 0.1, 0)),
    "a batch norm that enlarges": lambda net, x: squeezed(net, x, 5000.0),
    "a batch norm that shrinks": lambda net, x: squeezed(net, x, 0.01),
}


@pytest.mark.parametrize("case", FINE)
def test_fine_steps_change_no_code_of_other_images(case):
    model = hand(FINE[case])
    module = Pt2e().read(model, images() / 64)  # too dark to show what is cut off
    x = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(7)) * 4
    expected = model(x).detach().numpy()
    apart = np.abs(interpreter.run(module, x.double().numpy())[module.output] - expected)
    steps = [n.op.scale for n in module.nodes[3:] if n.op.name == "quantize" and ".fine" not in n.result]
    assert apart.max() < 1.01 * max(steps)  # one code of the output
    assert (apart > min(steps) / 2).mean() < 2e-3  # at ties


def test_each_sum_that_follows_makes_the_steps_finer():
    def function(net, x):
        x = fake(x, 0.05, 114)
        a, b, c = (torch.relu(net.conv(v)) for v in (x, x.transpose(2, 3), torch.max_pool2d(x, 3, 1, 1)))
        return fake(a + b + c, 0.05, 0)

    steps = sorted(0.05 / n.op.scale for n in read(function).nodes if n.result.endswith(".fine.code"))
    assert steps == [2**11, 2**12, 2**12]


@pytest.mark.parametrize("codes", [24.5, 25.5])
def test_a_clip_that_ends_at_a_tie_ends_as_the_toolkit_rounds_it(codes):
    def function(net, x):
        return fake(torch.clamp(net.conv(fake(x, 0.05, 114)), 0.0, codes * 0.125), 0.125, 128)

    assert ranges(read(function))[1] == (0, 24 if codes < 25 else 26)


def test_scales_that_are_constants_of_the_graph_are_read():
    def function(net, x):
        codes = QD.quantize_per_tensor.tensor(x, net.scale[0], net.zero[0], *INT8)
        return net.conv(QD.dequantize_per_tensor.tensor(codes, net.scale[0], net.zero[0], *INT8))

    assert ranges(read(function)) == [(-128, 127)]


def rows(net, x):
    return nn.functional.linear(
        x, QD.dequantize_per_channel(net.codes[:, :, 0, :2].flatten(1), net.scale, net.zero, 0, *INT8)
    )


SHARED = {
    "windows over the edge": lambda net, x: torch.max_pool2d(net.conv(x), 3, 2, 1, 1, True),
    "a line of sound": lambda net, x: torch.conv1d(
        x.flatten(2), QD.dequantize_per_channel(net.codes[:, :, 0], net.scale, net.zero, 0, *INT8), net.bias, 2, 1
    ),
    "rows": rows,
    "the same size": lambda net, x: torch.conv2d(x, net.weight(), net.bias, padding="same", dilation=2),
    "parts": lambda net, x: torch.add(*net.conv(x).chunk(2, 1)),
    "one row": lambda net, x: net.conv(x)[:, :, 1],
    "a mean over one dimension": lambda net, x: net.conv(x).mean(3),
    "larger images": lambda net, x: nn.functional.interpolate(net.conv(x), scale_factor=2),
    "a floor": lambda net, x: net.conv(x).clamp_min(0.0),
    "dropped channels": lambda net, x: torch.feature_dropout(net.conv(x), 0.5, False),
}


@pytest.mark.parametrize("case", SHARED)
def test_what_torch_fx_reads_is_read_of_codes(case):
    model = hand(lambda net, x: SHARED[case](net, fake(x, 0.05, 114)))
    module = Pt2e().read(model, images())
    assert all(n.op.weight.integral for n in module.nodes if n.op.name in ("conv2d", "linear"))
    answer = interpreter.run(module, images().double().numpy())[module.output]
    assert np.abs(answer - model(images()).numpy()).max() < 1e-4


@pytest.mark.parametrize("neuron", ["stem", "parallel"])
def test_neurons_without_zero_points_say_what_to_set_in_the_toolkit(neuron):
    passes = f"propagate-scales{{grid=threshold}}, derive-thresholds{{neuron={neuron}}}"
    with pytest.raises(SpirError, match=r"in a toolkit: a symmetric quantiser there, .*zero point 0; or neuron=ca-lif"):
        spir.compile(
            hand(lambda net, x: net.conv(fake(net.conv(fake(x, 0.05, 114))[:, :3], 0.1, 100))), passes, example=images()
        )


def test_a_mean_of_what_is_not_quantised_says_so_to_neurons_that_count():
    model = hand(lambda net, x: fake(mean(torch.relu(net.conv(fake(x, 0.05, 114)))), 0.01, 0))
    with pytest.raises(SpirError) as caught:
        spir.compile(model, "propagate-scales, derive-thresholds{neuron=ca-lif}", example=images())
    assert caught.value.code == "E-CAP"
    for word in ("avg_pool2d", "not quantised by the toolkit", "in a toolkit, quantise what this layer reads"):
        assert word in str(caught.value)


def test_a_batch_norm_that_is_left_folds_into_the_layer():
    def function(net, x):
        x = net.conv(fake(x, 0.05, 114))
        return fake(torch.batch_norm(x, net.gamma, net.bias, net.bias, net.scale, False, 0.1, 1e-3, False), 0.3, 100)

    conv = layer(read(function))
    assert (conv.weight.values[1] == -Hand(None).codes.numpy()[1].astype(int)).all()
    assert not conv.weight.values[2].any()
    assert (conv.weight_scale.values > 0).all()


def test_joins_of_equal_width_stay_joins():
    def function(net, x):
        x = fake(x, 0.05, 114)
        y = fake(torch.relu(net.conv(x)), 0.1, 0)
        return fake(torch.cat([x, y, y[:, 1:3]], 1).permute(0, 1, 3, 2), 0.1, 100)

    assert {"concat", "slice", "permute"} <= set(words(read(function)))


# --- the proof on import ------------------------------------------------------------------------------------------


def test_ties_are_counted_where_they_are():
    step = 0.25
    x = torch.full((2, 3, 6, 6), 0.5 * step)  # half to even gives 0, half up gives 1
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 1.5 * step, 0.499 * step
    model = hand(lambda net, x: net.conv(fake(x, step, 128)))
    (found,) = Pt2e().agreement(model, x)
    assert (found.layer, found.codes, found.ties) == ("x.code", 3 * 108, 214)
    assert "214 of 324 codes on another side of a tie" in str(Pt2e().read(model, x))


@pytest.mark.parametrize("distance", [2.0**-11, 2.0**-9])
def test_a_tie_ends_at_a_thousandth_of_a_code(monkeypatch, distance):
    run = fx.Interpreter.call_function

    def lower(self, target, args, kwargs):
        result = run(self, target, args, kwargs)
        return result - 1 if "quantized_decomposed.quantize" in str(target) else result

    monkeypatch.setattr(fx.Interpreter, "call_function", lower)
    x = torch.full((2, 3, 6, 6), 0.25 * (0.5 + distance))
    x[1] = 0.25 * (1.5 + distance)
    monkeypatch.setattr(quantised, "two_samples", lambda given: given[-1:].repeat(2, 1, 1, 1))
    model = hand(lambda net, x: net.conv(fake(x, 0.25, 128)))
    if distance < 2.0**-10:
        (found,) = Pt2e().agreement(model, x)
        assert found.ties == found.codes
        return
    with pytest.raises(SpirError, match="rounds to 1, and the toolkit has 0"):
        Pt2e().read(model, x)


def deep(net, x):
    return fake(net.conv(fake(x, 0.05, 114)), 0.1, 100)


def test_a_code_that_differs_off_a_tie_is_refused_by_layer_index_and_value(monkeypatch):
    run = fx.Interpreter.call_function

    def bent(self, target, args, kwargs):
        result = run(self, target, args, kwargs)
        if str(target) == "aten.conv2d.default":
            result[1, 2, 3, 4] += 0.1
        return result

    monkeypatch.setattr(fx.Interpreter, "call_function", bent)
    with pytest.raises(
        SpirError, match=r"%conv2d\S*\.code is not .* 1 of 576 codes differ; at \[1, 2, 3, 4\]"
    ) as caught:
        read(deep)
    assert caught.value.code == "trace"
    ours, theirs = (
        int(w) for w in str(caught.value).split("rounds to ")[1].split("\n")[0].split(", and the toolkit has ")
    )
    assert theirs == ours + 1


def test_an_output_that_differs_is_refused(monkeypatch):
    run = fx.Interpreter.call_function
    bent = lambda self, target, args, kwargs: run(self, target, args, kwargs) * (1.01 if "conv2d" in str(target) else 1)  # noqa: E731
    monkeypatch.setattr(fx.Interpreter, "call_function", bent)
    with pytest.raises(SpirError, match="the output is not what the toolkit computes"):
        read(lambda net, x: net.conv(fake(x, 0.05, 114)))


STEP = 0.02


@pytest.mark.parametrize("saturates", [False, True])
def test_sums_that_saturate_in_int16_are_noticed(monkeypatch, saturates):
    def function(net, x):
        weight = QD.dequantize_per_channel(net.codes.flatten(1)[:, :26], net.scale, net.zero, 0, *INT8)
        return fake(nn.functional.linear(fake(x, STEP, 0), weight, net.bias), 0.05, 100)

    x = 5 * torch.rand(6, 26, generator=torch.Generator().manual_seed(2))
    model, run = hand(function, x), fx.Interpreter.call_function
    scale = Hand(None).scale

    def kernel(self, target, args, kwargs):
        if str(target) != "aten.linear.default" or not saturates:
            return run(self, target, args, kwargs)
        x, weight, bias = args
        codes, weights = np.rint(x.numpy() / STEP), np.rint(weight.numpy() / scale.numpy()[:, None])
        sums = saturating(codes.astype(int), weights.astype(int))
        return torch.tensor(sums * STEP * scale.numpy() + bias.numpy(), dtype=torch.float32)

    monkeypatch.setattr(fx.Interpreter, "call_function", kernel)
    if not saturates:
        assert Pt2e().agreement(model, x)[1].ties <= 1
        return
    with pytest.raises(SpirError, match=r"%linear\S*\.code is not what the toolkit computes") as caught:
        Pt2e().read(model, x)
    assert "kernels that do not saturate" in str(caught.value)


# --- refusals -----------------------------------------------------------------------------------------------------


def refusal(model, example, *words):
    return refused(Pt2e(), model, example, *words)


def prepared(network, example, **options):
    with quiet():
        return prepare_pt2e(torch.export.export(network.eval(), (example,)).module(), x86_quantizer(**options))


def test_a_prepared_graph_is_refused():
    refusal(prepared(*drawn("lenet")), drawn("lenet")[1], "prepared and not converted", "Observer", "convert_pt2e")


def test_observers_that_never_ran_are_refused():
    network, example = drawn("lenet")
    with quiet():
        model = convert_pt2e(prepared(network, example))
    refusal(model, example, "5 of 5 activations", "observers never ran", "run the prepared model")


def test_one_observer_that_never_ran_is_refused():
    refusal(hand(lambda _, x: fake(fake(x, 0.001, 114), 1.0, 0)), images(), "1 of 2 activations")


def test_a_step_of_one_that_real_codes_use_is_no_fault():
    assert ranges(read(lambda net, x: fake(net.conv(fake(x, 0.05, 114)), 1.0, 0, INT8))) == [(-114, 141), (-128, 127)]


def test_dynamic_quantisation_is_refused():
    network, example = drawn("lenet")
    with quiet():
        model = convert_pt2e(prepared(network, example, is_dynamic=True))
    refusal(model, example, "choose_qparams takes its scale from the data", "quantise statically")


@pytest.mark.parametrize(
    ("network", "example", "word"),
    [
        (Words(), torch.zeros(2, 3, dtype=torch.int64), "aten.embedding"),
        (Sequence(), torch.randn(2, 3, 4), "aten.lstm"),
    ],
)
def test_words_and_sequences_are_refused(network, example, word):
    with quiet():
        observed = prepared(network, example)
        observed(example)
        model = convert_pt2e(observed)
    refusal(model, example, word, "no sequence")


def channels(net, x):
    codes = QD.quantize_per_channel(x, net.scale[:3], net.zero[:3], 1, *INT8)
    return net.conv(QD.dequantize_per_channel(codes, net.scale[:3], net.zero[:3], 1, *INT8))


def mixed(join):
    def function(net, x):
        x = fake(x, 0.05, 114)
        return join(x, fake(torch.max_pool2d(x, 3, 1, 1), 0.2, 4, (0, 15, torch.uint8)))

    return function


REFUSED = {
    "scales a channel": (channels, ("one scale a channel", "per tensor")),
    "widths at a sum": (mixed(torch.add), ("add of codes of 4 and 8 bits", "one number of bits")),
    "widths at a cat": (mixed(lambda a, b: torch.cat([a, b], 1)), ("cat of codes of 4 and 8 bits",)),
    "an unknown op": (lambda net, x: net.conv(nn.functional.gelu(fake(x, 0.05, 3))), ("aten.gelu", torch.__version__)),
    "a range without 0": (lambda net, x: net.conv(fake(x, 0.05, 300)), ("zero point 300 is outside", "holds 0")),
    "no scale": (lambda net, x: net.conv(fake(x, math.nan, 3)), ("not nan", "calibrate")),
    "a layer on reals": (
        lambda net, x: net.conv(torch.relu(net.conv(fake(x, 0.05, 3))[:, :3])),
        ("did not quantise", "annotate the activation"),
    ),
    "other padding": (lambda _, x: nn.functional.pad(fake(x, 0.05, 3), (1, 1), value=2.0), ("pad with zeros",)),
    "a scaled sum": (lambda _, x: torch.add(fake(x, 0.05, 3), fake(x, 0.05, 3), alpha=2), ("alpha=2",)),
    "another scale": (
        lambda _, x: QD.dequantize_per_tensor(QD.quantize_per_tensor(x, 0.05, 3, *UINT8), 0.06, 3, *UINT8),
        ("another scale",),
    ),
    "another zero point": (
        lambda _, x: QD.dequantize_per_tensor(QD.quantize_per_tensor(x, 0.05, 3, *UINT8), 0.05, 7, *UINT8),
        ("another scale or zero point",),
    ),
    "codes": (
        lambda _, x: QD.dequantize_per_tensor(torch.relu(QD.quantize_per_tensor(x, 0.05, 3, *UINT8)), 0.05, 3, *UINT8),
        ("relu reads codes", "quantize_per_tensor"),
    ),
    "codes returned": (lambda _, x: QD.quantize_per_tensor(x, 0.05, 3, *UINT8), ("output reads codes",)),
    "a layer on reals, quantised behind": (
        lambda net, x: fake(net.conv(torch.relu(net.conv(fake(x, 0.05, 3))[:, :3])), 0.1, 3),
        ("conv2d of the activation", "did not quantise"),
    ),
    "a mean that is quantised and returned": (
        both(torch.cat, lambda y: fake(y, 0.01, 0), lambda y: y),
        ("avg_pool2d of the activation", "did not quantise"),
    ),
    "a mean that leaves the padding out": (
        lambda _, x: nn.functional.avg_pool2d(fake(x, 0.05, 3), 3, 2, 1, count_include_pad=False),
        ("avg_pool2d with divisors of its own", "count_include_pad=False"),
    ),
    "a mean by another number": (
        lambda _, x: nn.functional.avg_pool2d(fake(x, 0.05, 3), 2, divisor_override=3),
        ("avg_pool2d with divisors of its own", "divisor_override"),
    ),
    "a clip above 0": (
        lambda net, x: fake(net.conv(fake(x, 0.05, 3)).clamp(0.1, 0.5), 0.01, 0),
        ("behind a clip to 0.1 .. 0.5", "test_frontend_pt2e.py line"),
    ),
    "the batch axis": (lambda net, x: net.conv(fake(x, 0.05, 3)).transpose(0, 1), ("batch axis",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_convert_is_refused(case):
    function, words = REFUSED[case]
    refusal(hand(function), images(), *words)


def test_all_unknown_ops_stand_in_one_error():
    caught = refusal(hand(lambda _, x: torch.sin(nn.functional.silu(fake(x, 0.05, 3)))), images())
    assert [d.message.split()[0] for d in caught.diagnostics] == ["aten.silu.default", "aten.sin.default"]


def test_writing_where_others_read_is_refused():
    model = hand(lambda net, x: fake(net.conv(fake(x, 0.05, 3)).relu_(), 0.1, 3))
    written = next(n for n in model.graph.nodes if str(n.target) == "aten.relu_.default")
    with model.graph.inserting_after(written):
        both = model.graph.call_function(torch.ops.aten.add.Tensor, (written, written.args[0]))
    next(u for u in written.users if u is not both).replace_input_with(written, both)
    model.recompile()
    refusal(model, images(), "relu_ writes to a tensor that others read")


@pytest.mark.parametrize("write", [lambda x: x.view(-1, 144).relu_(), lambda x: x.view(-1, 144).clamp_(min=0)])
def test_writing_without_reading_the_result_is_refused(write):
    def function(net, x):
        x = net.conv(fake(x, 0.05, 114))
        write(x)  # what is read from here on is x
        return fake(x, 0.1, 100)

    refusal(hand(function), images(), "writes to a tensor that others read", "not in place")


def test_a_graph_that_torchao_must_run_names_the_extra(monkeypatch):
    def absent(self, target, args, kwargs):
        raise NotImplementedError(f"no kernel for {target}")

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    monkeypatch.setattr(fx.Interpreter, "call_function", absent)
    caught = refusal(hand(deep), images(), "the graph needs torchao to run", "pip install 'spir[quantized]'")
    assert caught.code == "usage"


def test_an_example_that_does_not_fit_is_refused():
    assert refusal(hand(deep), torch.randn(2, 5, 6, 6), "example of shape [2, 5, 6, 6]").code == "data"
    refusal(hand(deep), images()[0], "example of shape [3, 6, 6]", "with the batch axis")


@pytest.mark.parametrize("given", [lambda y: (y, y), lambda y: {"logits": y}])
def test_several_results_are_refused(given):
    caught = refusal(hand(lambda net, x: given(net.conv(fake(x, 0.05, 3)))), images(), "returns a", "one tensor")
    assert "of 2" in str(caught) or "of 1" in str(caught)


def test_dynamic_scales_are_named_once():
    def function(net, x):
        scale, zero = QD.choose_qparams.tensor(x, 0, 255, 1e-6, torch.uint8)
        codes = QD.quantize_per_tensor.tensor(x, scale, zero, *UINT8)
        return net.conv(QD.dequantize_per_tensor.tensor(codes, scale, zero, *UINT8))

    assert len(refusal(hand(function), images(), "choose_qparams").diagnostics) == 1


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(SpirError, match="no graph of PT2E"):
        Pt2e().read(nn.Linear(2, 2), torch.randn(2, 2))
    assert not Pt2e().accepts("a text")
