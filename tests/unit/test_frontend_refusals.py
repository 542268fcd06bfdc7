"""What torch_fx cannot read it refuses: all at once, at the user's line, with a way out."""

from __future__ import annotations

import inspect
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spir.errors import SpirError
from spir.frontends.torch_fx import TorchFx
from tests.unit.lambdas import Lambda

HERE = "test_frontend_refusals.py"


def refusal(model, x=None) -> SpirError:
    with pytest.raises(SpirError) as caught:
        TorchFx().read(model, torch.randn(2, 4, 8, 8) if x is None else x)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return caught.value


def line(function, text) -> int:
    """The line of a function's source that holds a text."""
    source, start = inspect.getsourcelines(function)
    return start + next(i for i, row in enumerate(source) if text in row)


class Unready(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GELU(), nn.MaxPool2d(2, return_indices=True))
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x, _ = self.features(x)
        x = F.silu(x) + x.mean((2, 3), keepdim=True)
        gate = x.sigmoid()
        x = x * gate
        x = self.up(x)
        return torch.softmax(self.fc(x.flatten(1)), 1)


def test_everything_that_does_not_convert_stands_in_one_error():
    texts = ("features", "silu", "gate =", "* gate", "self.up")
    at = {text: line(Unready.forward, text) for text in texts}
    assert str(refusal(Unready())) == (
        "error[unsupported]: torch.nn.GELU has no conversion\n"
        f"       from: features.1 (GELU, {HERE} line {at['features']})\n"
        "        fix: use ReLU and train the network again\n"
        "error[unsupported]: torch.nn.MaxPool2d with return_indices=True has no conversion\n"
        f"       from: features.2 (MaxPool2d, {HERE} line {at['features']})\n"
        "        fix: leave the indices out: what reads them does not convert\n"
        "error[unsupported]: torch.nn.functional.silu has no conversion\n"
        f"       from: silu (silu, {HERE} line {at['silu']})\n"
        "        fix: use ReLU and train the network again\n"
        "error[unsupported]: the operator + of samples of shapes [4, 3, 3] and [4, 1, 1] has no conversion\n"
        f"       from: add (add, {HERE} line {at['silu']})\n"
        "        fix: bring both operands to one shape: nothing is broadcast\n"
        "error[unsupported]: Tensor.sigmoid has no conversion\n"
        f"       from: sigmoid (sigmoid, {HERE} line {at['gate =']})\n"
        "        fix: the host computes it on the raw input or behind the last layer; "
        "in between use ReLU and train again\n"
        "error[unsupported]: the operator * of two activations has no conversion\n"
        f"       from: mul (mul, {HERE} line {at['* gate']})\n"
        "        fix: multiply by constants only: gates do not convert\n"
        "error[unsupported]: torch.nn.ConvTranspose2d has no conversion\n"
        f"       from: up (ConvTranspose2d, {HERE} line {at['self.up']})\n"
        "        fix: use nearest upsampling and a convolution"
    )


class Branching(nn.Module):
    def forward(self, x):
        if x.mean() > 0:
            return x
        return F.relu(x)


def test_control_flow_on_data():
    assert str(refusal(nn.Sequential(nn.ReLU(), Branching()))) == (
        "error[trace]: forward takes a decision that depends on a tensor\n"
        f"       from: 1 (Branching, {HERE} line {line(Branching.forward, 'mean')})\n"
        "        fix: decide outside of forward, or by an attribute that is set when the model is built"
    )


def test_code_that_cannot_be_traced():
    def erase(x):
        y = F.relu(x)
        y[:, 0] = 0
        return y

    assert str(refusal(Lambda(erase))) == (
        "error[trace]: forward cannot be traced\n"
        f"       from: Lambda ({HERE} line {line(erase, '= 0')})\n"
        "      torch: '_Proxy' object does not support item assignment\n"
        "        fix: keep to calls of torch and of submodules: no item assignment, no Python numbers made of tensors"
    )


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4 * 6 * 6, 2)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.fc(x.flatten(1))


def test_an_example_with_other_channels():
    message = "Given groups=1, weight of size [4, 3, 3, 3], expected input[2, 1, 8, 8] to have 3 channels, "
    assert str(refusal(Plain(), torch.randn(5, 1, 8, 8))) == (
        "error[data]: the model fails on an example of shape [5, 1, 8, 8]\n"
        f"       from: conv (Conv2d, {HERE} line {line(Plain.forward, 'self.conv')})\n"
        f"      torch: {message}but got 1 channels instead\n"
        "        fix: conv takes [N, 3, height, width]: give images of the shape the model was built for"
    )


def test_an_example_of_another_size():
    assert str(refusal(Plain(), torch.randn(1, 3, 9, 8))) == (
        "error[data]: the model fails on an example of shape [1, 3, 9, 8]\n"
        f"       from: fc (Linear, {HERE} line {line(Plain.forward, 'self.fc')})\n"
        "      torch: mat1 and mat2 shapes cannot be multiplied (2x168 and 144x2)\n"
        "        fix: fc takes [N, 144]: give samples of the shape the model was built for"
    )


def test_a_weight_that_is_not_finite():
    model = Plain()
    with torch.no_grad():
        model.conv.weight[1, 2, 0, 0] = float("nan")
    assert str(refusal(model, torch.randn(1, 3, 8, 8))) == (
        "error[weights]: 1 of 108 values are NaN or infinite, the first at [1, 2, 0, 0]\n"
        f"         from: conv (Conv2d, {HERE} line {line(Plain.forward, 'self.conv')})\n"
        "    parameter: conv.weight\n"
        "          fix: repair the checkpoint: a diverged training run leaves such values"
    )


def test_a_functional_weight_that_is_not_finite():
    model = Lambda(lambda s, x: x * s.gain, gain=nn.Parameter(torch.tensor([float("inf")])))
    caught = refusal(model)
    assert caught.code == "weights"
    assert "parameter: gain" in str(caught)


def hard_coded(x):
    return F.relu(x).view(5, -1)


def test_a_batch_size_that_is_written_as_a_number():
    text = str(refusal(Lambda(hard_coded), torch.randn(5, 4, 8, 8)))
    assert text.startswith("error[unsupported]: forward holds for one number of samples only")
    assert f"{HERE} line {line(hard_coded, 'view')}" in text


MIXES = {
    "x.flatten(0)": lambda x: x.flatten(0),
    "flatten(x)": torch.flatten,
    "mean of all": torch.mean,
    "mean over the batch": lambda x: x.mean((0, 2, 3)),
    "view": lambda x: x.view(-1, 8),
    "view of two": lambda x: x.view(x.size(0) * 4, 64),
    "the first sample": lambda x: x[0],
    "batch slice": lambda x: x[1:],
    "batch transposed": lambda x: x.reshape(4, -1),
    "squeeze": lambda x: x.mean((2, 3), keepdim=True).squeeze(),
    "permute": lambda x: x.permute(1, 0, 2, 3),
    "transpose": lambda x: x.transpose(0, 1),
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, x]),
    "chunk": lambda x: x.chunk(2)[0],
    "maximum of all": lambda x: x.max(),
    "new axis": lambda x: x[None],
    "logit": lambda x: x.mean((1, 2, 3)),
}


@pytest.mark.parametrize("function", MIXES.values(), ids=MIXES)
def test_the_batch_axis_is_left_alone(function):
    caught = refusal(Lambda(function))
    assert {d.code for d in caught.diagnostics} == {"unsupported"}
    assert "batch axis" in str(caught)
    assert HERE in str(caught) or function in (torch.flatten, torch.mean)


# name: (function, parts, what the message says, what the advice says)
PARTIAL = {
    "padding_mode": (
        lambda s, x: s.a(x),
        {"a": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")},
        "torch.nn.Conv2d with padding_mode='reflect' has no conversion",
        "train with padding_mode='zeros'",
    ),
    "batch statistics": (
        lambda s, x: s.a(x),
        {"a": nn.BatchNorm2d(4, track_running_stats=False)},
        "torch.nn.BatchNorm2d by the statistics of the batch has no conversion",
        "track_running_stats=True",
    ),
    "F.batch_norm": (
        lambda x: F.batch_norm(x, None, None, training=True),
        {},
        "torch.nn.functional.batch_norm by the statistics of the batch",
        "training=self.training",
    ),
    "adaptive windows": (
        lambda x: F.adaptive_avg_pool2d(x, 3),
        {},
        "torch.nn.functional.adaptive_avg_pool2d from 8x8 to 3x3, with windows of unequal size, has no conversion",
        "divides the image",
    ),
    "adaptive maxima": (
        lambda s, x: s.a(x),
        {"a": nn.AdaptiveMaxPool2d((8, 5))},
        "torch.nn.AdaptiveMaxPool2d from 8x8 to 8x5, with windows of unequal size",
        "divides the image",
    ),
    "indices": (
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        {},
        "max_pool2d_with_indices with return_indices=True",
        "indices",
    ),
    "adaptive indices": (
        lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0],
        {},
        "adaptive_max_pool2d_with_indices with return_indices=True",
        "indices",
    ),
    "pool of an image without channels": (
        lambda x: F.max_pool2d(x[:, 0], 2),
        {},
        "F.max_pool2d on samples of shape [8, 8]",
        "[N, channels, height, width]",
    ),
    "pool of a line on images": (
        lambda x: F.max_pool1d(x[:, 0, 0], 2),
        {},
        "F.max_pool1d on samples of shape [8]",
        "[N, channels, length]",
    ),
    "pad mode": (lambda x: F.pad(x, (1, 1, 0, 0), mode="reflect"), {}, "F.pad with mode='reflect'", "zeros"),
    "nn.ReflectionPad2d": (lambda s, x: s.a(x), {"a": nn.ReflectionPad2d(1)}, "torch.nn.ReflectionPad2d", "zeros"),
    "pad value": (lambda x: F.pad(x, (1, 1), value=1.0), {}, "with value=1.0", "pad with zeros"),
    "cropping": (lambda x: F.pad(x, (-1, 1)), {}, "by [-1, 1]", "slice"),
    "clamp to nothing": (lambda x: x.clamp(1, 1), {}, "Tensor.clamp from 1 to 1 has no conversion", "below the upper"),
    "clamp turned round": (lambda x: x.clamp(2, -1), {}, "Tensor.clamp from 2 to -1", "below the upper end"),
    "clamp by data": (lambda x: torch.clamp(x, x.relu()), {}, "torch.clamp to ends that are tensors", "one number"),
    "threshold that jumps": (
        lambda s, x: s.a(x),
        {"a": nn.Threshold(0.5, 0.0)},
        "torch.nn.Threshold at 0.5 to 0, which jumps, has no conversion",
        "ReLU",
    ),
    "broadcast": (
        lambda x: x + x.mean((2, 3), keepdim=True),
        {},
        "the operator + of samples of shapes [4, 8, 8] and [4, 1, 1] has no conversion",
        "one shape",
    ),
    "broadcast to a constant": (
        lambda s, x: x.mean((2, 3), keepdim=True) + s.b,
        {"b": nn.Parameter(torch.ones(4, 8, 8))},
        "the operator + of samples of shapes [4, 1, 1] and [4, 8, 8]",
        "one shape",
    ),
    "pixelwise factor": (
        lambda s, x: x * s.g,
        {"g": nn.Parameter(torch.full((8,), 0.5))},
        "the operator * by a constant of shape [8]",
        "one per channel",
    ),
    "maximum of a dimension": (lambda x: x.max(3).values, {}, "Tensor.max over a dimension", "x.amax((2, 3))"),
    "maximum by name": (lambda x: torch.max(x, dim=3)[0], {}, "torch.max over a dimension", "x.amax((2, 3))"),
    "minimum of a dimension": (lambda x: x.min(3)[0], {}, "Tensor.min over a dimension", "two tensors"),
    "maximum over channels": (lambda x: x.amax(1), {}, "Tensor.amax over [1]", "keep the channels"),
    "mean over channels": (lambda x: torch.mean(x, 1), {}, "torch.mean over [1]", "keep the channels"),
    "reciprocal": (lambda x: 1 / x, {}, "the operator / by an activation", "constants only"),
    "rounded quotient": (
        lambda x: torch.div(x, 2, rounding_mode="floor"),
        {},
        "torch.div with rounding_mode='floor'",
        "without rounding",
    ),
    "division by the batch": (lambda x: x / x.size(0), {}, "the operator / by the number of samples", "constant"),
    "active dropout": (lambda x: F.dropout(x, 0.5), {}, "dropout with training=True", "training=self.training"),
    "chosen channels": (lambda x: x[:, [0, 2]], {}, "the operator [...] with such an index", "slice with numbers"),
    "no channels": (lambda x: F.relu(x[:, 4:]), {}, "[...] that leaves no element has no conversion", "keep"),
    "a mask": (lambda s, x: x[:, s.m], {"m": nn.Buffer(torch.ones(4) > 0)}, "the operator [...] with such", "slice"),
    "cat with a constant": (
        lambda x: torch.cat([torch.tensor([]), x], 1),
        {},
        "torch.cat with a constant has no conversion",
        "what the layers compute",
    ),
    "bilinear": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        {},
        "torch.nn.functional.interpolate with mode='bilinear'",
        "nearest",
    ),
    "nn.UpsamplingBilinear2d": (
        lambda s, x: s.a(x),
        {"a": nn.UpsamplingBilinear2d(scale_factor=2)},
        "torch.nn.UpsamplingBilinear2d with mode='bilinear'",
        "nearest",
    ),
    "upsampling by halves": (lambda x: F.interpolate(x, scale_factor=1.5), {}, "from 8x8 to 12x12", "whole factors"),
    "upsampling by almost 2": (
        lambda x: F.interpolate(x[:, :, :2, :2], scale_factor=2.4),
        {},
        "from 2x2 to 4x4",
        "whole factors",
    ),
    "downsampling": (lambda x: F.interpolate(x, size=4), {}, "from 8x8 to 4x4", "whole factors"),
    "unbind": (lambda x: x.unbind(1)[0], {}, "Tensor.unbind has no conversion", "x[:, 0]"),
    "expand": (lambda x: x.mean(3, keepdim=True).expand(-1, -1, -1, 8), {}, "Tensor.expand", "nothing is broadcast"),
    "softmax of samples": (lambda x: x.softmax(0), {}, "Tensor.softmax over the batch axis", "dim=1"),
    "softmax of no dimension": (
        lambda s, x: s.a(x.flatten(2)),
        {"a": nn.Softmax()},
        "torch.nn.Softmax over the batch axis",
        "dim=1",
    ),
    "a gate per channel": (
        lambda x: x * x.mean((2, 3), keepdim=True),
        {},
        "the operator * of two activations has no conversion",
        "gates do not convert",
    ),
    "matrix product of activations": (
        lambda x: torch.matmul(x, x),
        {},
        "torch.matmul of such operands",
        "constant matrix",
    ),
    "a constant per sample": (
        lambda s, x: torch.cat([x, s.c.expand(x.size(0), -1, -1, -1)], 1),
        {"c": nn.Parameter(torch.ones(1, 1, 8, 8))},
        "Tensor.expand has no conversion",
        "one shape",
    ),
    "another dtype": (
        lambda x: torch.mean(x, (2, 3), dtype=torch.float64),
        {},
        "torch.mean to float64",
        "leave the cast",
    ),
    "part of a maximum": (
        lambda x: F.relu(x.max(3, keepdim=True)[0]),
        {},
        "Tensor.max over a dimension has no conversion",
        "amax",
    ),
    "attribute": (lambda x: F.relu(x.real), {}, "Tensor.real has no conversion", "convolution"),
    "weights from data": (
        lambda x: F.linear(x.flatten(1), x.flatten(1)),
        {},
        "torch.nn.functional.linear",
        "",
    ),
    "comparison": (lambda x: (x > 0).to(x.dtype), {}, "the operator > has no conversion", ""),
    "broadcast in place": (
        lambda x: operator.iadd(x.relu(), x.mean((2, 3), keepdim=True)),
        {},
        "the operator += of samples of shapes [4, 8, 8] and [4, 1, 1]",
        "one shape",
    ),
    "floor": (lambda x: x // 2, {}, "the operator // has no conversion", "convolution"),
    "layer norm": (lambda s, x: s.a(x), {"a": nn.LayerNorm(8)}, "torch.nn.LayerNorm", "batch norm"),
    "unread": (lambda s, x: (s.a(x), F.relu(x))[1], {"a": nn.ELU()}, "torch.nn.ELU", "ReLU"),
}


@pytest.mark.parametrize(("function", "parts", "message", "advice"), PARTIAL.values(), ids=PARTIAL)
def test_forms_that_do_not_convert(function, parts, message, advice):
    caught = refusal(Lambda(function, **parts))
    (found,) = caught.diagnostics
    notes = {note.label: note.text for note in found.notes}
    assert found.code == "unsupported"
    assert message.replace("F.", "torch.nn.functional.") in found.message
    assert advice in notes["fix"]
    assert f"{HERE} line " in notes["from"]


HOSTED = {
    "sigmoid": (lambda s, x: s.b(s.a(x).sigmoid()), "Tensor.sigmoid", "last layer"),
    "tanh": (lambda s, x: s.b(torch.tanh(s.a(x))), "torch.tanh", "use ReLU"),
    "softmax": (lambda s, x: s.b(F.softmax(s.a(x), 1)), "torch.nn.functional.softmax", "last layer"),
    "product": (lambda s, x: s.b(x * s.a(x)), "the operator * of two activations", "gates do not convert"),
    "conv_transpose2d": (lambda s, x: s.b(F.conv_transpose2d(s.a(x), s.w)), "conv_transpose2d", "nearest upsampling"),
    "behind a cast of shape": (
        lambda s, x: s.b(x.flatten(2).sigmoid().view(-1, 4, 8, 8)),
        "Tensor.sigmoid",
        "behind the last layer",
    ),
    "in place": (lambda s, x: s.b(in_place(s.a(x))), "Tensor.sigmoid_", "last layer"),
    "before what is refused": (lambda s, x: F.elu(s.a(x).sigmoid()), "Tensor.sigmoid", "last layer"),
}


def in_place(x):
    x.sigmoid_()
    return x


@pytest.mark.parametrize(("function", "construct", "advice"), HOSTED.values(), ids=HOSTED)
def test_what_the_host_computes_stands_before_the_first_layer_or_behind_the_last(function, construct, advice):
    parts = {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1), "w": nn.Parameter(torch.ones(4, 4, 1, 1))}
    found = refusal(Lambda(function, **parts)).diagnostics[0]
    notes = {note.label: note.text for note in found.notes}
    assert found.message.endswith(f"{construct} has no conversion")
    assert advice in notes["fix"]
    assert f"{HERE} line " in notes["from"]


def view_then_write(s, x):
    y = s.conv(x)
    flat = y.flatten(1)
    y.relu_()
    return flat


def share_then_write(s, x):
    shares = s.conv(x).chunk(2, 1)
    shares[0].relu_()
    return torch.cat([shares[0], shares[1]], 1)


def write_to_one_share(s, x):
    one, other = s.conv(x).chunk(2, 1)
    one.relu_()
    return torch.cat([other, one], 1)


def test_writing_to_one_share_leaves_the_other_alone():
    model = Lambda(write_to_one_share, conv=nn.Conv2d(4, 4, 1))
    assert [n.op.name for n in TorchFx().read(model, torch.randn(1, 4, 8, 8)).nodes][-2:] == ["relu", "concat"]


def test_writing_to_a_share_is_refused():
    text = str(refusal(Lambda(share_then_write, conv=nn.Conv2d(4, 4, 1))))
    assert text.startswith("error[unsupported]: Tensor.relu_ in place on a tensor of which a view is read later")


def test_writing_below_a_view_is_refused():
    text = str(refusal(Lambda(view_then_write, conv=nn.Conv2d(4, 4, 1))))
    assert text.startswith("error[unsupported]: Tensor.relu_ in place on a tensor of which a view is read later")
    assert f"line {line(view_then_write, 'relu_')}" in text


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


def test_two_inputs():
    assert str(refusal(TwoInputs())) == (
        "error[unsupported]: forward takes 2 inputs (x, y), and a network has one\n"
        f"       from: TwoInputs.forward, {HERE} line {line(TwoInputs.forward, 'def')}\n"
        "        fix: wrap the model in one that takes a single tensor and makes the others constants"
    )


RETURNS = {
    "a tuple of 2": lambda x: (x, F.relu(x)),
    "a list of 1": lambda x: [x],
    "a dict of 1": lambda x: {"logits": x},
    "a tuple of 2 shares": lambda x: x.chunk(2, 1),
    "None": lambda _: None,
}


@pytest.mark.parametrize(("what", "function"), RETURNS.items(), ids=RETURNS)
def test_outputs_other_than_one_tensor(what, function):
    caught = refusal(Lambda(function))
    assert caught.code == "unsupported"
    assert f"the network returns {what.removesuffix(' shares')}, and one tensor converts" in str(caught)


def test_a_constant_output():
    text = str(refusal(Lambda(lambda s, _: s.a, a=nn.Parameter(torch.zeros(2, 3)))))
    assert "what the network returns does not depend on its input" in text


def test_a_hook_that_changes_values_is_not_lost():
    model = Plain()
    model.conv.register_forward_hook(lambda _m, _a, y: y * 2)
    text = str(refusal(model, torch.randn(1, 3, 8, 8)))
    assert text.startswith("error[unsupported]: the model does something that its trace does not show: on the example")
    assert "hooks" in text


def test_code_that_treats_tracing_specially_is_not_lost():
    assert "its trace does not show" in str(refusal(Lambda(lambda x: x * 2 if type(x) is torch.Tensor else F.relu(x))))


def test_a_hook_is_not_lost_on_an_example_of_zeros():
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ReLU())
    model[0].register_forward_hook(lambda _m, _a, y: y * 2)
    assert "its trace does not show" in str(refusal(model, torch.zeros(1, 4, 8, 8)))


def test_code_that_gives_nan_outside_of_its_trace_is_not_lost():
    model = nn.Sequential(nn.Conv2d(4, 4, 1))
    model[0].register_forward_hook(lambda _m, _a, y: y * float("nan"))
    assert "their outputs differ by nan" in str(refusal(model))


EXAMPLES = {
    "no tensor": ("image.png", "an example is a tensor, not an object of type str"),
    "integers": (torch.zeros(1, 4, 8, 8, dtype=torch.uint8), "the example is of type uint8, not floating"),
    "no batch": (torch.zeros(4), "the example has shape [4], which is no batch of samples"),
    "empty": (torch.zeros(0, 4, 8, 8), "the example has shape [0, 4, 8, 8], which is no batch of samples"),
    "NaN": (torch.full((1, 4, 2, 2), torch.nan), "16 of 16 values of the example are NaN or infinite"),
    "an image alone": (torch.zeros(4, 8, 8), "the model fails on an example of shape [4, 8, 8]"),
}


@pytest.mark.parametrize(("example", "message"), EXAMPLES.values(), ids=EXAMPLES)
def test_examples_that_are_none(example, message):
    caught = refusal(nn.Sequential(nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(128, 2)), example)
    assert caught.code == "data"
    assert message in str(caught)
    assert "fix: " in str(caught)


def test_a_model_is_a_module():
    assert str(refusal(lambda x: x)) == (
        "error[usage]: a model is a torch.nn.Module, not an object of type function\n"
        "        fix: give the network itself"
    )


def test_layers_in_a_list_are_not_found():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.ReLU()]

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    caught = refusal(Listed())
    assert caught.code == "trace"
    assert "not installed as a submodule" in str(caught)
    assert f"line {line(Listed.forward, 'layer(x)')}" in str(caught)


def test_a_model_that_cannot_be_copied():
    caught = refusal(nn.utils.weight_norm(nn.Linear(3, 2)), torch.zeros(1, 3))
    assert caught.code == "trace"
    assert "the model cannot be copied" in str(caught)


def test_torchscript():
    caught = refusal(torch.jit.trace(nn.ReLU(), torch.zeros(1, 2)))
    assert str(caught) == (
        "error[trace]: a TorchScript module cannot be traced\n        fix: give the nn.Module that it was made of"
    )


def test_lazy_layers_that_never_ran_are_refused_by_name():
    model = nn.Sequential(nn.LazyConv2d(2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(SpirError) as refused:
        TorchFx().read(model, torch.zeros(1, 3, 8, 8))
    (found,) = refused.value.diagnostics
    assert (found.code, "0.weight, 0.bias, 3.weight, 3.bias" in found.message) == ("weights", True)
    assert "run one batch" in str(refused.value)
