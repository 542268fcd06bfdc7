"""Bad input: passes in an order that cannot work, and data that fit nothing, are refused with place and way out."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spir
from spir import interpreter
from spir.cli import main
from spir.driver import backend_of
from spir.errors import SpirError
from spir.ops.concat import Concat
from spir.text import parse
from spir.types import Real, Scale, Spikes, Tensor
from tests.unit.lambdas import Lambda

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


class Pooled(nn.Module):
    """Pools over padding and without, on a concatenation and on a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 2, 1)
        self.conv3 = nn.Conv2d(4, 3, 1)
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        x = F.max_pool2d(torch.cat([F.relu(self.conv1(x)), F.relu6(self.conv2(x))], 1), 3, 2, 1)
        return self.fc(torch.flatten(F.max_pool2d(F.relu(self.conv3(x)), 2), 1))


@pytest.fixture(scope="module")
def pooled() -> Pooled:
    torch.manual_seed(0)
    return Pooled().eval()


@pytest.fixture(scope="module")
def lowered(pooled) -> spir.Module:
    return spir.compile(pooled, "@stem{max_pool=lower}", data=X, check="off").module


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
    "calibrate-range, quantize, propagate-scales, fold-bn": (
        """\
error[type]: %bn = batch_norm stands between quantised values and works on reals
          from: bn (BatchNorm2d, test_bad_input.py line N)
          pass: propagate-scales
           fix: run fold-bn before quantize"""
    ),
    f"{SCALED}, lower-max-pool, compose-linear, derive-thresholds, quantize, fuse-neuron, fuse-neuron, propagate-scales"
    ", compose-linear, derive-thresholds": (
        """\
error[type]: encode: works on integers, not spikes[8, bits, -128..127] * S
            op: %x.clip.train = encode %x.clip.train_1
          from: input (Conv2d, test_bad_input.py line N)
          pass: derive-thresholds
           fix: quantize reals; integrate a train"""
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


@pytest.mark.parametrize("late", ["calibrate-range, fold-bn, quantize", "calibrate-range, quantize, fold-bn"])
def test_a_batch_norm_that_is_folded_late_makes_another_network_of_the_same_meaning(late):
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        model.bn.running_mean.copy_(torch.tensor([0.3, -0.2]))
        model.bn.running_var.copy_(torch.tensor([0.2, 4.0]))
        model.bn.weight.copy_(torch.tensor([1.5, -0.7]))
        wanted = model(TENSOR).numpy()
    rest = "propagate-scales, derive-thresholds, fuse-neuron"
    found = spir.compile(model, f"{late}, {rest}", data=X)(X)
    right = spir.compile(model, ", ".join(WHOLE), data=X)(X)
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-3 * np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


def test_passes_that_need_data_say_so(net):
    for passes in ("calibrate-range", "fold-bn, calibrate-range{method=percentile}"):
        with pytest.raises(SpirError) as caught:
            spir.compile(net, passes, example=X)
        last = passes.split(", ")[-1]
        assert plain(caught.value) == (
            f"error[data]: calibrate-range needs calibration data\n          pass: {last}\n"
            "           fix: give data=images, or --data in a shell"
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
PAIRS = f"{ONE}; a pair (x, y) has one class number for each sample"
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
        PAIRS,
    ),
    "a pair in place of pairs": (
        lambda: (X, np.zeros(6)),
        "batches of the calibration data have shapes [6, 1, 4, 4], [6]",
        PAIRS,
    ),
    "empty pairs": (lambda: [()], "batches of the calibration data have shapes [0]", PAIRS),
    "labels first": (lambda: [(np.zeros(6), X)], "batches of the calibration data have shapes [6]", PAIRS),
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


RECIPES = ("@stem{per=channel}", "@stem{range=mse, join=rescale}", "@stem{max_pool=lower}")
WRONG = {
    "nan": lambda: np.where(np.arange(6)[:, None, None, None] == 5, np.nan, X),
    "infinite": lambda: [X, -X * np.inf],
    "bytes": lambda: (9 * X).astype(np.uint8),
    "empty": lambda: X[:0],
    "ragged": lambda: [X, X[:, :, 1:]],
    "another shape": lambda: [np.concatenate([X, X], axis=1)],
    "no batch axis": lambda: X[0],
    "texts": lambda: X.astype(str),
}


@pytest.mark.parametrize("passes", RECIPES)
@pytest.mark.parametrize("what", WRONG)
def test_data_that_cannot_be_right_are_refused_whatever_the_passes_do_with_them(pooled, what, passes):
    with pytest.raises(SpirError) as caught:
        spir.compile(pooled, passes, data=WRONG[what](), example=X)
    (found,) = caught.value.diagnostics
    assert found.code == "data"
    assert "fix" in {note.label for note in found.notes}


@pytest.mark.parametrize("backend", ["serial", "parallel", "hw"])
@pytest.mark.parametrize("what", WRONG)
def test_inputs_that_cannot_be_right_are_refused_whatever_runs_them(lowered, what, backend):
    x = WRONG[what]()
    snn = spir.compile(lowered, [], backend=backend)
    for call in (snn, snn.trace, snn.report):
        with pytest.raises(SpirError) as caught:
            call(x)
        assert caught.value.code == "data"
        assert "fix: " in str(caught.value)


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


# --- options ------------------------------------------------------------------------------------------------------

# what is asked for, the code, and words of the message and of the way out
OPTIONS = {
    "calibrate-range{method=mse, percentile=99}": ("option", "method=mse takes no percentile", "method=percentile"),
    "calibrate-range{percentile=99}": ("option", "method=max takes no percentile", "method=percentile"),
    "calibrate-range{method=percentile, percentile=49}": ("option", "is outside 50..100", "take one of 50..100"),
    "calibrate-range{method=mean}": ("option", "calibrate-range{method} called 'mean'", "max, mse, percentile"),
    "calibrate-range{method=mse, bits=1}": ("option", "calibrate-range{bits} = 1 is outside 2..16", "take one of"),
    "calibrate-range{method=mse, bits=8.0}": (
        "option",
        "calibrate-range{bits} takes int, not 8.0",
        "bits of the codes",
    ),
    "calibrate-range{per=chanel}": ("option", "calibrate-range{per} called 'chanel'", "did you mean 'channel'?"),
    "calibrate-range{per=on}": ("option", "calibrate-range{per} called 'on'", "channel, tensor"),
    "lower-max-pool{materialise=2}": ("option", "lower-max-pool{materialise} takes on/off, not 2", "one train"),
    "lower-max-pool{materialize=off}": ("option", "lower-max-pool called 'materialize'", "did you mean 'materialise'?"),
    "lower-max-pool{layers=pool9}": ("option", "no layer matches 'pool9'", "layers: conv1"),
    "compose-linear{largest=0}": ("option", "compose-linear{largest} = 0 is outside 1..", "take one of 1.."),
    "compose-linear{largest=1e3}": ("option", "compose-linear{largest} takes int, not 1000.0", "so many weights"),
    "propagate-scales{width=12}": ("option", "propagate-scales{width} = 12 is outside 13..48", "take one of"),
    "propagate-scales{bits=32}": ("option", "propagate-scales{bits} = 32 is outside 2..31", "take one of"),
    "propagate-scales{join=wider}": ("option", "propagate-scales{join} called 'wider'", "did you mean 'wide'?"),
    "@stem{max_pool=lowered}": ("option", "stem{max_pool} called 'lowered'", "did you mean 'lower'?"),
    "@stem{max_pool=off}": ("option", "stem{max_pool} called 'off'", "keep, lower"),
    "@stem{range=mse, percentile=99}": ("option", "method=mse takes no percentile", "method=percentile"),
    "@stem{range=median}": ("option", "stem{range} called 'median'", "max, mse, percentile"),
    "@stem{per=layer}": ("option", "stem{per} called 'layer'", "channel, tensor"),
    "@stem{bits=17}": ("option", "stem{bits} = 17 is outside 2..16", "take one of 2..16"),
    "@stem{maxpool=lower}": ("option", "there is no option of stem called 'maxpool'", "did you mean 'max_pool'?"),
    "lower-maxpool": ("name", "there is no pass 'lower-maxpool'", "did you mean 'lower-max-pool'?"),
    "max-pool": ("name", "there is no pass 'max-pool'", "lower-max-pool"),
}


@pytest.mark.parametrize("passes", OPTIONS)
def test_an_option_that_cannot_be_is_refused_with_what_it_may_be(pooled, passes):
    code, message, fix = OPTIONS[passes]
    with pytest.raises(SpirError) as caught:
        spir.compile(pooled, passes, data=X)
    (found,) = caught.value.diagnostics
    notes = {note.label: note.text for note in found.notes}
    assert found.code == code
    assert message in found.message
    assert fix in notes["fix"]
    assert "at" in notes or "pass" in notes or "layers: " in fix


@pytest.mark.parametrize("check", ["none", "", " probes", None, True, 1])
def test_a_check_that_there_is_not_is_refused(pooled, check):
    with pytest.raises(SpirError) as caught:
        spir.compile(pooled, "@stem", data=X, check=check)
    assert str(caught.value) == f"error[usage]: check = {check!r} is unknown\n        fix: one of: off, probes, data"


RUNNERS = {
    "hw{collapse=on}": ("option", "hw{collapse} called 'on'", "auto, off"),
    "hw{accumulator=7}": ("option", "hw{accumulator} = 7 is outside 8..64", "take one of 8..64"),
    "hw{accumulator=16.5}": ("option", "hw{accumulator} takes int, not 16.5", "bits of sum and state registers"),
    "hw{accumulator=8}": ("E-ISUM", "and registers have 8", "holds every sum and state"),
    "hw{overflow=clip}": ("option", "hw{overflow} called 'clip'", "error, refuse, saturate, wrap"),
    "hw{profile=darwin}": ("option", "there is no profile 'darwin'", "did you mean 'darwin3'?"),
    "hw{profile=gone.toml}": ("io", "the profile gone.toml cannot be read", "name a file"),
    "hw{profile=darwin3}": ("E-VRANGE", "registers have 16", "scale-integration{bits=16, divisor=255}"),
    "hw{device=cpu}": ("option", "there is no option of hw called 'device'", "collapse"),
    "serial{collapse=off}": ("option", "there is no option of serial called 'collapse'", "device"),
    "serial{device=0}": ("option", "serial{device} takes str, not 0", "cuda"),
    'serial{device="cuda:9999"}': ("backend", "not cuda:9999", "device=cpu"),
    "hw, serial": ("usage", "names 2 backends", "hw, parallel, serial"),
    "": ("usage", "names 0 backends", "hw, parallel, serial"),
    "cpu": ("name", "there is no backend 'cpu'", "hw, parallel, serial"),
}


@pytest.mark.parametrize("backend", RUNNERS)
def test_a_backend_that_cannot_be_is_refused_with_what_it_may_be(lowered, backend):
    code, message, fix = RUNNERS[backend]
    with pytest.raises(SpirError) as caught:
        spir.compile(lowered, [], backend=backend)
    found, *_ = caught.value.diagnostics
    assert found.code == code
    assert message in found.message
    assert fix in {note.label: note.text for note in found.notes}["fix"]


def test_the_devices_that_a_refusal_offers_read_as_they_are_written(lowered):
    with pytest.raises(SpirError, match="there is no device 'tpu'") as caught:
        spir.compile(lowered, [], backend="serial{device=tpu}")
    offered = re.findall(r"device=[^\s,]+", str(caught.value).splitlines()[-1])
    assert len(offered) == 3
    assert {backend_of(f"serial{{{text}}}").device for text in offered} == {"cpu", "cuda", "cuda:1"}


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(pooled, lowered, tmp_path_factory) -> Path:
    """Two networks that share all names, one that ends early, and inputs."""
    folder = tmp_path_factory.mktemp("command")
    spir.compile(pooled, "@stem{max_pool=lower}", data=X, check="off").save(folder / "lowered")
    spir.compile(pooled, "@stem", data=X, check="off").save(folder / "kept")
    early = nn.Sequential(pooled.conv1, nn.ReLU()).eval()
    spir.compile(early, "@stem", data=X, check="off").save(folder / "early")
    spir.compile(nn.ReLU(), "@stem", data=X, check="off").save(folder / "other")
    for name, x in (
        ("x", X),
        ("nan", X * np.nan),
        ("bytes", X.astype(np.uint8)),
        ("empty", X[:0]),
        ("small", X[..., 1:]),
    ):
        np.savez(folder / f"{name}.npz", x=x)
    return folder


COMMANDS = {
    "diff kept lowered --data nan.npz": (3, "error[data]: ", "check the preprocessing"),
    "diff kept lowered --data bytes.npz": (3, "error[data]: the data holds bytes", "converted to float"),
    "diff kept lowered --data empty.npz": (3, "error[data]: there are no samples", "give one or more"),
    "diff kept lowered --data small.npz": (3, "error[data]: the network takes [N, 1, 4, 4]", "of that shape"),
    "diff kept lowered --data gone.npz": (4, "error[io]: ", "check the path"),
    "diff kept gone --data x.npz": (4, "error[io]: gone is not there", "check the path"),
    "diff kept x.npz --data x.npz": (3, "error[artifact]: ", "give a folder that save() wrote"),
    "diff kept lowered --data x.npz --backend seriall": (
        3,
        "error[name]: there is no backend 'seriall'",
        "did you mean 'serial'?",
    ),
    "diff kept lowered --data x.npz --backend hw{accumulator=8}": (3, "error[E-ISUM]: ", "holds every sum"),
    "check seriall": (3, "error[name]: there is no backend 'seriall'", "did you mean 'serial'?"),
    "check hw{accumulator=99}": (3, "error[option]: hw{accumulator} = 99", "take one of 8..64"),
    "check hw --examples 0": (2, "error[usage]: --examples 0 is no number of modules", "1 or more"),
    "run lowered --data x.npz --backend serial{device=tpu}": (3, "error[backend]: there is no device", "device=cpu"),
    "run lowered --data bytes.npz": (3, "error[data]: the input holds bytes", "converted to float"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_on_the_command_line_is_one_error_with_the_way_out(here, command, monkeypatch, capsys):
    code, message, fix = COMMANDS[command]
    monkeypatch.chdir(here)
    assert main(command.split()) == code
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith(message)
    assert fix in printed.err.splitlines()[-1]


def test_networks_whose_outputs_cannot_be_compared_do_not_count_as_alike(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    assert main(["diff", "kept", "early", "--data", "x.npz"]) != 0
    assert "nothing differs" not in capsys.readouterr().out


# --- networks that need care --------------------------------------------------------------------------------------


def wanted_and_found(model: nn.Module, passes: str, x: np.ndarray = X) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy(), spir.compile(model.eval(), passes, data=X, check="off")(x)


def conv(inputs: int, outputs: int, kernel: int = 3, **fields) -> nn.Conv2d:
    torch.manual_seed(inputs + outputs)
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **fields)


@pytest.mark.parametrize("max_pool", ["keep", "lower"])
@pytest.mark.parametrize(
    ("activation", "code", "pool"),
    [(nn.ReLU(), "_1", "_2"), (nn.Hardtanh(), "_1.clip", "_2.sum")],
    ids=["relu", "tanh"],
)
def test_padding_never_wins_a_maximum(activation, code, pool, max_pool):
    layer = conv(1, 3)
    with torch.no_grad():
        layer.bias -= 0.4  # many codes are the lowest
    model = nn.Sequential(layer, activation, nn.MaxPool2d(3, 2, 1), conv(3, 2))
    snn = spir.compile(model.eval(), f"@stem{{max_pool={max_pool}}}", data=X, check="off")
    codes = snn.stages[5].module
    found = {name: codes.types[name].decode(v) for name, v in interpreter.run(codes, X, f"{code}|{pool}").items()}
    pooled = F.max_pool2d(torch.from_numpy(found[code]), 3, 2, 1).numpy()
    np.testing.assert_array_equal(found[pool], pooled)
    np.testing.assert_array_equal(snn.trace(X)[f"{pool}.code" if max_pool == "keep" else pool].decoded, pooled)


@pytest.mark.parametrize("max_pool", ["keep", "lower"])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(3), nn.AvgPool2d(3), nn.MaxPool2d(2, 3), nn.AvgPool2d(3, 2)], ids=str)
def test_what_fills_no_whole_window_is_left_out_as_torch_does(pool, max_pool):
    model = nn.Sequential(nn.ReLU(), pool, conv(1, 2, 1))
    left_out = X.copy()
    covered = 1 + int(pool(torch.arange(16.0).view(1, 1, 4, 4)).shape[-1] - 1) * pool.stride + pool.kernel_size - 1
    left_out[:, :, covered:], left_out[:, :, :, covered:] = 9, -9
    snn = spir.compile(model.eval(), f"@stem{{max_pool={max_pool}}}", data=X, check="off")
    found, wanted = snn(X), model(TENSOR).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())
    np.testing.assert_array_equal(snn(left_out), found)


@pytest.mark.parametrize(
    "pool",
    [nn.AvgPool2d(3, ceil_mode=True), nn.AvgPool2d(3, 2, 1, count_include_pad=False)],
    ids=["ceil", "without padding"],
)
@pytest.mark.parametrize("behind", ["conv2d", "linear"])
def test_windows_of_unequal_size_are_divided_by_their_own(pool, behind):
    first = nn.Sequential(conv(1, 3), nn.ReLU(), pool)
    tail = conv(3, 2) if behind == "conv2d" else nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    wanted, found = wanted_and_found(nn.Sequential(first, tail), "@stem")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


def test_branches_whose_scales_no_multiplier_joins_are_rescaled_with_data_and_a_note():
    model = Lambda(lambda s, x: F.relu(1e-12 * s.a(x) + F.relu(s.b(x))), a=conv(1, 2), b=conv(1, 2))
    with torch.no_grad():
        wanted = model(TENSOR).numpy()
    snn = spir.compile(model, "@stem", data=X, check="off")
    np.testing.assert_allclose(snn(X), wanted, rtol=0, atol=0.02 * np.abs(wanted).max())
    assert any("rescaling neurons" in note for entry in snn.journal for note in entry.notes)


def test_what_the_host_computes_may_stand_right_behind_an_activation():
    wanted, found = wanted_and_found(nn.Sequential(conv(1, 2), nn.ReLU(), nn.Sigmoid()), "@stem")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.01)


POOLED_ORDERS = (
    "fold-bn, lower-max-pool, calibrate-range, quantize, propagate-scales, derive-thresholds, fuse-neuron",
    f"{SCALED}, derive-thresholds, lower-max-pool, fuse-neuron",
    f"{SCALED}, derive-thresholds, fuse-neuron, lower-max-pool",
)


@pytest.mark.parametrize("passes", POOLED_ORDERS)
def test_pools_that_are_lowered_too_early_or_too_late_are_refused_or_become_neurons(passes):
    model = nn.Sequential(conv(1, 2), nn.ReLU(), nn.MaxPool2d(2), conv(2, 2))
    with contextlib.suppress(SpirError):
        module = spir.compile(model.eval(), passes, data=X, check="off").module
        assert {node.op.name for node in module.nodes}.isdisjoint({"max_pool", "requant"})


MANY_NETWORKS = {
    "a pool first": lambda s, x: s.a(F.max_pool2d(x, 2)),
    "a pool last": lambda s, x: F.max_pool2d(s.a(x), 2),
    "a pool of sums": lambda s, x: s.b(F.max_pool2d(s.a(x), 2)),
    "signed and dilated": lambda s, x: s.b(F.max_pool2d(s.a(x).clamp(-1, 1), 3, 2, 1, 2)),
    "negative gains before a pool": lambda s, x: s.b(F.max_pool2d(F.relu(s.a(x)) * s.g, 2)),
    "gains mixed by a permutation": lambda s, x: s.c((F.relu(s.a(x)) * s.g).permute(0, 2, 1, 3)),
    "a concatenation of a sum and a code": lambda s, x: s.d(torch.cat([s.a(x), F.relu(s.a(x))], 1)),
    "a concatenation of the input": lambda s, x: s.e(torch.cat([x, F.relu6(s.a(x))], 1)),
    "the larger of two": lambda s, x: s.b(torch.maximum(s.a(x), x)),
    "a difference": lambda s, x: s.b(F.relu(s.a(x)) - F.relu(x)),
    "channels become space": lambda s, x: s.a(F.pixel_shuffle(F.relu(s.f(x)), 2)),
    "a mask": lambda s, x: s.b(F.relu(s.a(x)) * s.m),
    "nothing is left": lambda s, x: s.a(0 * x),
    "windows of unequal size": lambda s, x: s.b(F.avg_pool2d(F.relu(s.a(x)), 3, ceil_mode=True)),
    "no layer at all": lambda s, x: s.flatten(x),
    "a step beyond floats": lambda s, x: s.b(s.a(x).clamp(-1e-38, 1e-38)),
    "branches far apart": lambda s, x: s.b(F.relu(1e12 * s.a(x)) + F.relu(x)),
    "constants only": lambda s, x: s.a(x) * 1e30 + 1e-30,
}
CHOICES = ("", "range=mse, per=channel", "max_pool=lower, join=rescale, bits=2, weights=16")


@pytest.mark.parametrize("options", CHOICES)
@pytest.mark.parametrize("what", MANY_NETWORKS)
def test_a_network_converts_to_numbers_or_is_refused_with_code_place_and_way_out(what, options):
    parts = {"a": conv(1, 3), "b": conv(3, 2), "c": conv(4, 2), "d": conv(6, 2), "e": conv(4, 2), "f": conv(1, 4)}
    parts |= {
        "g": nn.Buffer(torch.tensor([0.3, -0.7, 2.0]).view(3, 1, 1)),
        "m": nn.Buffer(torch.eye(4)),
        "flatten": nn.Flatten(),
    }
    model = Lambda(MANY_NETWORKS[what], **parts)
    try:
        found = spir.compile(model, f"@stem{{{options}}}", data=X, backend="hw", check="off")(X)
    except SpirError as refusal:
        for diagnostic in refusal.diagnostics:
            assert {"from", "fix"} <= {note.label for note in diagnostic.notes}
    else:
        with torch.no_grad():
            wanted = model(TENSOR).numpy()
        assert found.shape == wanted.shape
        assert np.isfinite(found).all()
        if "bits=2" not in options:
            np.testing.assert_allclose(found, wanted, rtol=0, atol=0.04 * np.abs(wanted).max())


# --- text of modules ----------------------------------------------------------------------------------------------

WIDE = "9223372036854775807"
TEXTS = {
    "trains of unequal length": (
        (
            "%a = encode %x {steps = 4} : tensor<1, spikes[4, bits, 0..15] * 1.0>\n"
            "%b = encode %x {steps = 5} : tensor<1, spikes[5, bits, 0..15] * 1.0>\n"
            "%y = concat %a, %b {axis = 0} : tensor<2, spikes[4, bits, 0..15] * 1.0>"
        ),
        "tensor<1, int[0, 15] * 1.0>",
        "type",
        "concat: trains of 4 and 5 frames cannot meet",
    ),
    "a train and what it stands for": (
        (
            "%a = encode %x {steps = 4} : tensor<1, spikes[4, bits, 0..15] * 1.0>\n"
            "%y = concat %a, %x {axis = 0} : tensor<2, spikes[4, bits, 0..15] * 1.0>"
        ),
        "tensor<1, int[0, 15] * 1.0>",
        "type",
        "concat: operands are spikes[4, bits, 0..15] * 1.0 and int[0, 15] * 1.0",
    ),
    "a sum of 65 bits": (
        f"%y = add %x, %x : tensor<1, int[0, {WIDE}] * 1.0>",
        f"tensor<1, int[0, {WIDE}] * 1.0>",
        "E-VRANGE",
        "add: the sum needs 65 bits in channel 0, and registers have 64",
    ),
    "64 bits without a sign": (
        "%y = integrate %x : tensor<1, int[0, 9] * 1.0>",
        "tensor<1, spikes[64, bits, 0..9] * 1.0>",
        "type",
        "a train of 64 bits, and registers hold 63 and a sign",
    ),
    "a concatenation across space of unequal scales": (
        (
            "%a = quantize %x {scale = 0.5, lo = 0, hi = 7} : tensor<1x2, int[0, 7] * 0.5>\n"
            "%b = quantize %x {scale = 0.25, lo = 0, hi = 7} : tensor<1x2, int[0, 7] * 0.25>\n"
            "%y = concat %a, %b {axis = 1} : tensor<1x4, int[0, 7] * 0.5>"
        ),
        "tensor<1x2, real>",
        "E-RESID-SCALE",
        "concat: operands of scales 0.5 and 0.25 cannot meet",
    ),
    "a maximum of bits": (
        "%y = max_pool %x {kernel = [1, 2], stride = [1, 2]} : tensor<1x1x1, spikes[2, bits, 0..3] * 1.0>",
        "tensor<1x1x2, spikes[2, bits, 0..3] * 1.0>",
        "E-MAXPOOL",
        "max_pool: spikes[2, bits, 0..3] * 1.0 trains are not nested",
    ),
}


@pytest.mark.parametrize("what", TEXTS)
def test_text_that_breaks_a_rule_of_types_is_refused_with_its_line_and_the_way_out(what):
    body, source, code, message = TEXTS[what]
    with pytest.raises(SpirError) as caught:
        parse(f"module {{\n  input %x : {source}\n{body}\n  output %y\n}}\n")
    (found,) = caught.value.diagnostics
    assert found.code == code
    assert found.message.startswith(message)
    assert {"at", "fix"} <= {note.label for note in found.notes}


def test_two_codes_in_a_concatenation_are_refused_with_the_way_out():
    rate, bits = (Tensor((1,), Spikes(4, code, 0, 4, Scale.of(1.0))) for code in ("rate", "bits"))
    with pytest.raises(SpirError) as caught:
        Concat().infer(rate, bits)
    assert str(caught.value) == (
        "error[type]: trains of codes bits and rate cannot meet: their frames weigh differently\n"
        "        fix: convert both branches to the same neuron"
    )
