"""Bad input: passes in an order that cannot work, and data that fit nothing, are refused with place and way out."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spir
from spir.errors import SpirError
from spir.types import Real, Spikes

X = np.random.default_rng(0).normal(size=(6, 1, 4, 4)).astype(np.float32)
TENSOR = torch.from_numpy(X)
WHOLE = ("fold-bn", "calibrate-range", "quantize", "propagate-scales", "derive-thresholds", "fuse-neuron")


class Net(nn.Module):
    """A batch norm, a residual join and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding=1)
        self.bn = nn.BatchNorm2d(2)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(2, 2, 1)
        self.act2 = nn.ReLU()
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        x = self.act1(self.bn(self.conv1(x)))
        x = self.act2(self.conv2(x) + x)
        return self.fc(torch.flatten(x, 1))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> Path:
    """Where reproducers go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


# --- orders -------------------------------------------------------------------------------------------------------

SCALED = "fold-bn, calibrate-range, quantize, propagate-scales"
ORDERS = {
    "fold-bn, quantize": (
        """\
error[type]: %act1 has no range to divide into 256 steps
          from: act1 (ReLU, test_bad_input.py line N)
          pass: quantize
           fix: run calibrate-range before quantize, over the same layers
error[type]: %act2 has no range to divide into 256 steps
          from: act2 (ReLU, test_bad_input.py line N)
          pass: quantize
           fix: run calibrate-range before quantize, over the same layers"""
    ),
    "fold-bn, calibrate-range{layers=act1}, quantize{bits=4, layers=act2}": (
        """\
error[type]: %act2 has no range to divide into 16 steps
          from: act2 (ReLU, test_bad_input.py line N)
          pass: quantize{layers=act2, bits=4}
           fix: run calibrate-range before quantize, over the same layers"""
    ),
    "calibrate-range, quantize, fold-bn, propagate-scales": (
        """\
error[type]: %bn = batch_norm stands between quantised values and works on reals
          from: bn (BatchNorm2d, test_bad_input.py line N)
          pass: propagate-scales
           fix: run fold-bn; a batch_norm that follows no conv2d or linear is not folded: move it behind one"""
    ),
    'fold-bn, calibrate-range, quantize{layers="act*|input"}, propagate-scales': (
        """\
error[type]: conv2d: float weights cannot act on int[-128, 127] * S
            op: %bn.sum = conv2d %x.clip
          from: conv1 (Conv2d, test_bad_input.py line N)
          pass: propagate-scales
           fix: quantize the weights"""
    ),
    "fold-bn, calibrate-range, propagate-scales": (
        """\
error[type]: propagate-scales finds no integers, and would leave a network of reals
          pass: propagate-scales
           fix: run calibrate-range and quantize before"""
    ),
    "fold-bn, calibrate-range, quantize, derive-thresholds": (
        """\
error[type]: dequantize: works on integers, not spikes[8, bits, -128..127] * S
            op: %x.clip = dequantize %x.clip.code.train
          from: input (Conv2d, test_bad_input.py line N)
          pass: derive-thresholds
           fix: integrate a train first"""
    ),
    "derive-thresholds": (
        """\
error[type]: derive-thresholds finds no integers to convert, and would leave the network without spikes
          pass: derive-thresholds
           fix: run calibrate-range, quantize and propagate-scales before, over the same layers"""
    ),
    f"{SCALED}, derive-thresholds{{layers=layer9}}": (
        """\
error[option]: derive-thresholds{layers}: no layer matches 'layer9'
        fix: layers: input, conv1, act1, conv2, add, act2, flatten, fc"""
    ),
    f"{SCALED}, fuse-neuron": (
        """\
error[type]: fuse-neuron finds no trains to fuse, and would leave the network without neurons
          pass: fuse-neuron
           fix: run derive-thresholds before, over the same layers"""
    ),
    f"{SCALED}, derive-thresholds, derive-thresholds": (
        """\
error[type]: encode: works on integers, not spikes[8, bits, -128..127] * S
            op: %x.clip.train = encode %x.clip.train_1
          from: input (Conv2d, test_bad_input.py line N)
          pass: derive-thresholds
           fix: quantize reals; integrate a train"""
    ),
    f"{SCALED}, derive-thresholds{{neuron=stam}}": (
        """\
error[option]: there is no neuron 'stam'
          pass: derive-thresholds{neuron=stam}
           fix: did you mean 'stem'?"""
    ),
}


def plain(refusal: SpirError) -> str:
    """The text without the reproducer's name, line numbers and the digits of scales."""
    lines = [line for line in str(refusal).splitlines() if not line.startswith("    reproducer: ")]
    text = re.sub(r"line \d+\)", "line N)", "\n".join(lines))
    return re.sub(r"\* 0\.\d+", "* S", text)


@pytest.mark.parametrize("passes", ORDERS)
@pytest.mark.parametrize("check", ["probes", "off"])
def test_an_order_that_cannot_work_is_refused_with_its_place_and_the_way_out(net, passes, check):
    with pytest.raises(SpirError) as caught:
        spir.compile(net, passes, data=X, check=check)
    assert plain(caught.value) == ORDERS[passes]


def test_passes_that_need_data_say_so(net):
    for passes in ("calibrate-range", "fold-bn, calibrate-range{method=percentile}"):
        with pytest.raises(SpirError) as caught:
            spir.compile(net, passes, example=X)
        last = passes.split(", ")[-1]
        assert plain(caught.value) == (
            f"error[data]: calibrate-range needs calibration data\n          pass: {last}\n"
            "           fix: compile(..., data=images)"
        )
    quantised = spir.compile(net, "fold-bn, calibrate-range, quantize", data=X).module
    with pytest.raises(SpirError, match=r"propagate-scales\{join=rescale\} needs calibration data"):
        spir.compile(quantised, "propagate-scales{join=rescale}")


def compiled_or_error(module: spir.Module, passes: tuple[str, ...]) -> spir.Compiled | SpirError:
    try:
        return spir.compile(module, passes, data=X, check="off")
    except SpirError as refusal:
        return refusal


def test_every_order_of_the_whole_pipeline_is_refused_or_gives_the_spikes_of_the_right_order(net):
    right = spir.compile(net, [*WHOLE], data=X, check="off")
    expected = right.trace(X)
    accepted = []
    for order in itertools.permutations(WHOLE[1:]):  # fold-bn first: another place only moves the refusal
        found = compiled_or_error(right.stages[1].module, order)
        if isinstance(found, SpirError):
            assert found.code == "type", order
            assert all({"pass", "fix"} <= {n.label for n in d.notes} for d in found.diagnostics), order
            continue
        accepted.append(order)
        for name, value in found.trace(X).items():
            np.testing.assert_array_equal(value.decoded, expected[name].decoded)
    assert accepted == [WHOLE[1:]]


def test_a_pipeline_that_ends_in_spikes_leaves_no_reals_but_the_input(net):
    module = spir.compile(net, [*WHOLE], data=X).module
    reals = [name for name, t in module.types.items() if isinstance(t.encoding, Real)]
    assert reals == ["x"]
    assert sum(isinstance(t.encoding, Spikes) for t in module.types.values()) == 4


@pytest.mark.parametrize("extra", ["canonicalize", "fold-bn", "quantize", "propagate-scales", "fuse-neuron"])
def test_a_pass_that_comes_too_late_changes_nothing(net, extra):
    before = spir.compile(net, [*WHOLE], data=X)
    assert spir.compile(net, [*WHOLE, extra], data=X).module == before.module


# --- data ---------------------------------------------------------------------------------------------------------

FORM = "give an array, a tensor, a DataLoader or an iterable"
SHAPE = "give samples [N, *shape], N >= 1"
ONE = "give batches [N, *shape] of one shape"
NUMBERS = "give a float array or tensor"
DENSE = "give a dense float32 array or tensor"
DATA = {
    "no batches": (list, "the calibration data is empty", "a few hundred samples are enough"),
    "a used generator": (lambda: iter(()), "the calibration data is empty", "a few hundred samples are enough"),
    "no samples": (lambda: X[:0], "the calibration data has shape [0, 1, 4, 4]", SHAPE),
    "no samples in batches": (lambda: [X[:0]], "the calibration data has shape [0, 1, 4, 4]", SHAPE),
    "one number": (lambda: np.array(3.0), "the calibration data has shape []", SHAPE),
    "a vector": (lambda: np.zeros(3), "the calibration data has shape [3]", SHAPE),
    "an integer": (lambda: 3, "data is of type int", FORM),
    "a function": (lambda: lambda: X, "data is of type function", FORM),
    "a text": (lambda: "d.npz", "the data is of type <U1, not numbers", NUMBERS),
    "a dictionary": (lambda: {"x": X}, "the data is of type <U1, not numbers", NUMBERS),
    "dictionaries": (lambda: [{"x": X}], "the data is of type object, not numbers", NUMBERS),
    "complex numbers": (lambda: X.astype(complex), "the data is of type complex128, not numbers", NUMBERS),
    "objects": (lambda: X.astype(object), "the data is of type object, not numbers", NUMBERS),
    "bfloat16": (TENSOR.bfloat16, "the data is no array: Got unsupported ScalarType BFloat16", DENSE),
    "batches of bfloat16": (
        lambda: [TENSOR.bfloat16()],
        "the data is no array: Got unsupported ScalarType BFloat16",
        DENSE,
    ),
    "ragged lists": (lambda: [[[[1, 2], [3]]]], "the data is ragged", ONE),
    "ragged batches": (
        lambda: [X, X[:, :, :3]],
        "batches of the calibration data have shapes [6, 1, 3, 4], [6, 1, 4, 4]",
        ONE,
    ),
    "a pair in place of pairs": (
        lambda: (X, np.zeros(6)),
        "batches of the calibration data have shapes [6, 1, 4, 4], [6]",
        ONE,
    ),
    "empty pairs": (lambda: [()], "batches of the calibration data have shapes [0]", ONE),
    "labels first": (lambda: [(np.zeros(6), X)], "batches of the calibration data have shapes [6]", ONE),
    "nan": (lambda: X * np.nan, "the calibration data holds NaN or infinite values", "check the preprocessing"),
    "one infinity": (
        lambda: [X, np.where(np.arange(96).reshape(X.shape) == 95, np.inf, X)],
        "the calibration data holds NaN or infinite values",
        "check the preprocessing",
    ),
}


@pytest.mark.parametrize("what", DATA)
def test_data_that_are_none_are_refused_before_the_model_is_read(what):
    data, message, fix = DATA[what]
    with pytest.raises(SpirError) as caught:
        spir.compile(None, "calibrate-range", data=data())
    assert str(caught.value) == f"error[data]: {message}\n        fix: {fix}"


def test_data_of_another_shape_than_the_example_are_refused(net):
    with pytest.raises(SpirError) as caught:
        spir.compile(net, "calibrate-range", data=X[:, :, :3], example=X)
    assert str(caught.value) == (
        "error[data]: the model takes [1, 4, 4] a sample, and the data holds [1, 3, 4]\n"
        "        fix: give calibration data as the model receives it"
    )


EXAMPLES = {
    "no batch axis": (X[0], "the model fails on an example of shape [1, 4, 4]", "conv1"),
    "another size": (X[:, :, :3], "the model fails on an example of shape [6, 1, 3, 4]", "fc"),
    "integers": (X.astype(int), "the example is of type int64, not floating", ""),
    "a number": (3.0, "the example has shape []", ""),
    "a text": ("x", "the example is of type <U1, not numbers", ""),
    "bfloat16": (TENSOR.bfloat16(), "the example is no array: Got unsupported ScalarType BFloat16", ""),
    "infinite": (X * np.inf, "values of the example are NaN or infinite", ""),
    "empty": (X[:0], "the example has shape [0, 1, 4, 4]", ""),
}


@pytest.mark.parametrize("what", EXAMPLES)
def test_an_example_that_the_model_does_not_take_is_refused(net, what):
    example, message, place = EXAMPLES[what]
    with pytest.raises(SpirError) as caught:
        spir.compile(net, "fold-bn", example=example)
    assert caught.value.code == "data"
    text = str(caught.value)
    assert message in text.splitlines()[0]
    assert "fix: " in text
    assert f"from: {place}" in text or not place


def test_samples_without_a_batch_axis_are_refused(net):
    with pytest.raises(SpirError) as caught:
        spir.compile(net, "calibrate-range", data=TensorDataset(TENSOR))
    assert "the model fails on an example of shape [6, 4, 4]" in str(caught.value)


# --- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_with_their_layer(bad):
    torch.manual_seed(0)
    broken = Net().eval()
    with torch.no_grad():
        broken.conv2.weight[1, 0] = bad
    with pytest.raises(SpirError) as caught:
        spir.compile(broken, "fold-bn", data=X)
    text = str(caught.value)
    assert "NaN or infinite" in text
    assert "conv2" in text
    assert "fix: " in text


def test_a_loader_of_three_batches_is_what_the_pass_sees(net):
    loader = DataLoader(TensorDataset(TENSOR, torch.zeros(6)), batch_size=2)
    found = spir.compile(net, "fold-bn, calibrate-range", data=loader).module
    assert found == spir.compile(net, "fold-bn, calibrate-range", data=X).module
