"""What torch_fx cannot read it refuses: all at once, at the user's line, with a way out."""

from __future__ import annotations

import inspect

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
        self.features = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GELU(), nn.MaxPool2d(2))
        self.fc = nn.Linear(36, 10)

    def forward(self, x):
        x = self.features(x)
        x = F.silu(x) + 0.5
        x = torch.cat([x, x], 1)[:, :4]
        gate = x.sigmoid()
        x = x * gate
        return torch.softmax(self.fc(x.flatten(1)), 1)


def test_everything_that_does_not_convert_stands_in_one_error():
    at = {text: line(Unready.forward, text) for text in ("features", "silu", "cat", "gate =", "* gate", "softmax")}
    assert str(refusal(Unready())) == (
        "error[unsupported]: torch.nn.GELU has no conversion\n"
        f"       from: features.1 (GELU, {HERE} line {at['features']})\n"
        "        fix: use ReLU and train the network again\n"
        "error[unsupported]: torch.nn.MaxPool2d has no conversion\n"
        f"       from: features.2 (MaxPool2d, {HERE} line {at['features']})\n"
        "        fix: max-pool is not converted yet: replace it by average pooling\n"
        "error[unsupported]: torch.nn.functional.silu has no conversion\n"
        f"       from: silu (silu, {HERE} line {at['silu']})\n"
        "        fix: use ReLU and train the network again\n"
        "error[unsupported]: the operator + of a constant has no conversion\n"
        f"       from: add (add, {HERE} line {at['silu']})\n"
        "        fix: fold it into the bias of the layer before\n"
        "error[unsupported]: torch.cat has no conversion\n"
        f"       from: cat (cat, {HERE} line {at['cat']})\n"
        "        fix: add the branches instead of joining their channels\n"
        "error[unsupported]: Tensor.sigmoid has no conversion\n"
        f"       from: sigmoid (sigmoid, {HERE} line {at['gate =']})\n"
        "        fix: leave it out of the network and apply it to the logits; the class does not change\n"
        "error[unsupported]: the operator * of two activations has no conversion\n"
        f"       from: mul (mul, {HERE} line {at['* gate']})\n"
        "        fix: multiply by constants only: gates do not convert\n"
        "error[unsupported]: torch.softmax has no conversion\n"
        f"       from: softmax (softmax, {HERE} line {at['softmax']})\n"
        "        fix: leave it out of the network and apply it to the logits; the class does not change"
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
    "count_include_pad": (
        lambda s, x: s.a(x),
        {"a": nn.AvgPool2d(3, padding=1, count_include_pad=False)},
        "torch.nn.AvgPool2d with padding and count_include_pad=False",
        "count_include_pad=True",
    ),
    "divisor_override": (
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        {},
        "torch.nn.functional.avg_pool2d with divisor_override=3",
        "multiply by a constant",
    ),
    "ceil_mode": (
        lambda x: F.avg_pool2d(x, 3, ceil_mode=True),
        {},
        "with ceil_mode=True and windows",
        "ceil_mode=False",
    ),
    "adaptive windows": (
        lambda x: F.adaptive_avg_pool2d(x, 3),
        {},
        "torch.nn.functional.adaptive_avg_pool2d from 8x8 to 3x3, with windows of unequal size, has no conversion",
        "divides the image",
    ),
    "pad mode": (lambda x: F.pad(x, (1, 1, 0, 0), mode="reflect"), {}, "F.pad with mode='reflect'", "zeros"),
    "pad value": (lambda x: F.pad(x, (1, 1), value=1.0), {}, "with value=1.0", "pad with zeros"),
    "cropping": (lambda x: F.pad(x, (-1, 1)), {}, "by [-1, 1]", "slice"),
    "constant": (lambda x: x + 0.5, {}, "the operator + of a constant has no conversion", "bias of the layer before"),
    "constant left": (lambda x: 1 - x, {}, "the operator - of a constant", "bias"),
    "constant tensor": (lambda s, x: x + s.b, {"b": nn.Parameter(torch.ones(4, 1, 1))}, "+ of a constant", "bias"),
    "broadcast": (
        lambda x: x + x.mean((2, 3), keepdim=True),
        {},
        "the operator + of samples of shapes [4, 8, 8] and [4, 1, 1] has no conversion",
        "one shape",
    ),
    "pixelwise factor": (
        lambda s, x: x * s.g,
        {"g": nn.Parameter(torch.ones(8))},
        "the operator * by a constant of shape [8]",
        "one per channel",
    ),
    "reciprocal": (lambda x: 1 / x, {}, "the operator / by an activation", "constants only"),
    "division by the batch": (lambda x: x / x.size(0), {}, "the operator / by the number of samples", "constant"),
    "active dropout": (lambda x: F.dropout(x, 0.5), {}, "dropout with training=True", "training=self.training"),
    "linear on images": (
        lambda s, x: s.a(x),
        {"a": nn.Linear(8, 3)},
        "torch.nn.Linear on samples of shape [4, 8, 8]",
        "x.flatten(1)",
    ),
    "mean over one axis": (lambda x: x.mean(3), {}, "Tensor.mean over [3]", "x.mean((2, 3))"),
    "partial flatten": (
        lambda x: x.flatten(2),
        {},
        "Tensor.flatten from [4, 8, 8] to [4, 64] a sample",
        "x.flatten(1)",
    ),
    "new axis": (lambda x: x[:, None], {}, "the operator [...] with such an index", "slice with numbers"),
    "chosen channels": (lambda x: x[:, [0, 2]], {}, "the operator [...] with such an index", "slice with numbers"),
    "another dtype": (
        lambda x: torch.mean(x, (2, 3), dtype=torch.float64),
        {},
        "torch.mean to float64",
        "leave the cast",
    ),
    "two shares": (lambda x: torch.chunk(x, 2, 1)[0], {}, "torch.chunk", "convolution"),
    "item": (lambda x: x / x.max(), {}, "Tensor.max has no conversion", "max-pool"),
    "transposed": (lambda x: x.transpose(2, 3), {}, "Tensor.transpose has no conversion", "convolution"),
    "attribute": (lambda x: F.relu(x.mT), {}, "Tensor.mT has no conversion", "convolution"),
    "weights from data": (
        lambda x: F.linear(x.flatten(1), x.flatten(1)),
        {},
        "torch.nn.functional.linear",
        "",
    ),
    "floor": (lambda x: x // 2, {}, "the operator // has no conversion", "convolution"),
    "layer norm": (lambda s, x: s.a(x), {"a": nn.LayerNorm(8)}, "torch.nn.LayerNorm", "batch norm"),
    "unread": (lambda s, x: (s.a(x), F.relu(x))[1], {"a": nn.Tanh()}, "torch.nn.Tanh", "ReLU"),
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


def view_then_write(s, x):
    y = s.conv(x)
    flat = y.flatten(1)
    y.relu_()
    return flat


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
    "None": lambda _: None,
}


@pytest.mark.parametrize(("what", "function"), RETURNS.items(), ids=RETURNS)
def test_outputs_other_than_one_tensor(what, function):
    caught = refusal(Lambda(function))
    assert caught.code == "unsupported"
    assert f"the network returns {what}, and one tensor converts" in str(caught)


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
