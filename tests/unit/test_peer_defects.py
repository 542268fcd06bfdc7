"""Defects seen in other tools, as negative tests: none of them can happen here.

Some are tested where the code is: `ELSEWHERE` says where. Some need a method or a format that is not there yet:
`LATER` says what. The rest follow, and after them what users of other tools complain about most.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import spir
from spir import difference, pipeline
from spir.backend import Backend
from spir.discovery import find, names
from spir.driver import backend_of
from spir.errors import SpirError
from spir.ir import Module
from spir.ops.clip import Clip
from spir.options import fields, spelled
from spir.passes.quantize import quantise_weight
from spir.types import Real, Spikes, scale_of
from tests.unit.lambdas import Lambda
from tests.unit.small_networks import ops_of

ELSEWHERE = {
    "a functional relu of the stem is never converted": (
        "unit/test_op_matrix.py",
        "test_a_functional_stem_relu_stands_where_the_model_has_it",
    ),
    "parts of the names of classes decide what converts": (
        "unit/test_op_matrix.py",
        "test_the_name_of_a_class_says_nothing",
    ),
    "functional and unknown activations stay in silence": (
        "unit/test_op_matrix.py",
        "test_nothing_analogue_is_kept_in_silence",
    ),
    "every other functional relu is lost": ("unit/test_op_matrix.py", "test_functional_relus_are_all_found"),
    "kernels that are not square, and groups, have wrong shapes": (
        "unit/test_op_matrix.py",
        "test_kernels_that_are_not_square_and_groups_have_the_shapes_of_torch",
    ),
    "y + y and x + constant become x": ("unit/test_op_matrix.py", "test_both_operands_of_y_plus_y_are_kept"),
    "a bias is drawn at random": ("unit/test_op_matrix.py", "test_the_bias_of_every_layer_is_its_own"),
    "the padding of an average pool is set to 0": ("unit/test_op_matrix.py", "test_average_pools_keep_their_padding"),
    "a batch norm is folded without its eps": (
        "unit/test_codes.py",
        "test_a_fold_takes_the_eps_of_the_layer_and_one_without_would_differ",
    ),
    "a leaky shift leaves a share of the error": (
        "unit/test_pass_calibrate_qcfs.py",
        "test_no_channel_has_a_mean_error_before_or_behind_any_activation",
    ),
    "the number of levels is fixed in the script": (
        "unit/test_pass_calibrate_qcfs.py",
        "test_as_many_steps_as_levels_change_nothing_and_need_no_data",
    ),
    "a saved network cannot be trusted": (
        "unit/test_artifact.py",
        "test_an_altered_weight_is_refused_even_with_a_checksum_that_fits",
    ),
}
LATER = {
    "augmentation is always off": "no pass trains yet; inputs are never preprocessed",
    "soft reset is exported as hard reset": "no export to NIR yet",
    "fields of an import are ignored": "no import from NIR yet",
    "a time constant is divided by 0": "no leaky neuron yet",
}

X = np.random.default_rng(0).normal(size=(12, 2, 6, 6)).astype(np.float32)
BACKENDS = ("serial", "parallel", "hw", "hw{collapse=off}")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> None:
    """Where reproducers go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_every_defect_that_is_tested_elsewhere_is(repository):
    for file, name in ELSEWHERE.values():
        tree = ast.parse((repository / "tests" / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


class Net(nn.Module):
    """Something for every pass: two relus in a row, a batch norm, pools, branches far apart, a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(12, 4)
        with torch.no_grad():
            self.conv2.weight *= 1e-3
            self.conv2.bias *= 1e-3
            self.fc.weight -= self.fc.weight.mean(dim=0)  # no class wins always
            self.fc.bias *= 0

    def forward(self, x):
        x = F.max_pool2d(F.relu(F.relu(self.bn(self.conv1(x)))), 2)
        return self.fc(torch.flatten(F.avg_pool2d(F.relu(self.conv2(x) + x), 2, 1), 1))


def built(model: nn.Module, change=None) -> nn.Module:
    """A model in evaluation mode, its parameters changed in place."""
    model = model.eval()
    with torch.no_grad():
        if change is not None:
            change(model)
    return model


def small(change=None) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    return built(nn.Sequential(*layers), change)


def output(model: nn.Module, x: np.ndarray = X) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def stage(snn: spir.Compiled, name: str) -> Module:
    return next(s.module for s in snn.stages if s.name == name)


# --- a dead channel, a zero channel, a dead layer -----------------------------------------------------------------


def filled(index, weight: float, bias: float):
    """Sets weights and biases of channels of the first layer."""

    def change(model) -> None:
        model[0].weight[index] = weight
        model[0].bias[index] = bias

    return change


def everything_zero(model) -> None:
    for parameter in model.parameters():
        parameter.zero_()


EVERYWHERE = slice(None)
DEAD = {
    "a dead channel": filled(1, 0, -1),
    "a channel of zeros": filled(1, 0, 0),
    "a channel that weights kill": filled(1, -1e-20, -1),
    "a dead layer": filled(EVERYWHERE, 0, -1),
    "a layer of zeros": filled(EVERYWHERE, 0, 0),
    "nothing but zeros": everything_zero,
}
RANGES = ("", "range=mse, per=channel", "percentile=100, per=channel, join=rescale")


@pytest.mark.parametrize("options", RANGES)
@pytest.mark.parametrize("what", DEAD)
def test_what_is_dead_converts_with_finite_scales_everywhere(what, options):
    model = small(DEAD[what])
    snn = spir.compile(model, f"@stem{{{options}}}", data=X, backend="hw", check="off")
    for type_ in snn.module.types.values():
        if not isinstance(type_.encoding, Real):
            scales = scale_of(type_).floats()
            assert np.isfinite(scales).all()
            assert (scales > 0).all()
    wanted = output(model)
    np.testing.assert_allclose(snn(X), wanted, rtol=0, atol=0.02 * max(np.abs(wanted).max(), 1e-30))


@pytest.mark.parametrize("options", RANGES)
def test_data_of_zeros_give_finite_scales(options):
    with pytest.warns(spir.errors.SpirWarning, match="says nothing of ranges"):
        snn = spir.compile(small(), f"@stem{{{options}}}", data=0 * X, check="off")
    assert np.isfinite(snn(X)).all()
    np.testing.assert_allclose(snn(0 * X), output(small(), 0 * X), rtol=0, atol=0.02)


# --- options are never ignored ------------------------------------------------------------------------------------

PASSES = "canonicalize, fold-bn, calibrate-range, quantize, propagate-scales, compose-linear, lower-max-pool"
PASSES += ", shorten-window{steps=300}"
PASSES += ", derive-thresholds, fuse-neuron, sparsify{rot=1}"
NARROW = "canonicalize, fold-bn, calibrate-range{pools=on}, quantize, propagate-scales{join=rescale}, lower-max-pool"
NARROW += ", derive-thresholds, fuse-neuron, calibrate-bias, scale-integration"
PARALLEL = "canonicalize, fold-bn, calibrate-range, calibrate-qcfs, quantize, propagate-scales"
PARALLEL += ", derive-thresholds{neuron=parallel}, fuse-neuron, expand-parallel, fuse-parallel"

# what an option changes: the step as it is, and with another value of the option
CHANGES = {
    ("passes", "canonicalize", "layers"): ("canonicalize", "canonicalize{layers=fc}"),
    ("passes", "fold-bn", "layers"): ("fold-bn", "fold-bn{layers=fc}"),
    ("passes", "calibrate-range", "layers"): ("calibrate-range", "calibrate-range{layers=fc}"),
    ("passes", "calibrate-range", "method"): (
        "calibrate-range{per=channel}",
        "calibrate-range{per=channel, method=mse, bits=3}",
    ),
    ("passes", "calibrate-range", "percentile"): (
        "calibrate-range{method=percentile}",
        "calibrate-range{method=percentile, percentile=60}",
    ),
    ("passes", "calibrate-range", "per"): ("calibrate-range", "calibrate-range{per=channel}"),
    ("passes", "calibrate-range", "bits"): ("calibrate-range{method=mse}", "calibrate-range{method=mse, bits=2}"),
    ("passes", "calibrate-range", "pools"): ("calibrate-range", "calibrate-range{pools=on}"),
    ("passes", "calibrate-range", "levels"): ("calibrate-range{method=mse}", "calibrate-range{method=mse, levels=2}"),
    ("passes", "calibrate-qcfs", "layers"): ("calibrate-qcfs", "calibrate-qcfs{layers=fc}"),
    ("passes", "calibrate-qcfs", "steps"): ("calibrate-qcfs", "calibrate-qcfs{steps=3}"),
    ("passes", "calibrate-qcfs", "update"): ("calibrate-qcfs", "calibrate-qcfs{update=paper}"),
    ("passes", "calibrate-qcfs", "order"): ("calibrate-qcfs", "calibrate-qcfs{order=joint}"),
    ("passes", "calibrate-qcfs", "weights"): ("calibrate-qcfs", "calibrate-qcfs{weights=refit}"),
    ("passes", "calibrate-qcfs", "batch"): ("calibrate-qcfs{order=joint}", "calibrate-qcfs{order=joint, batch=7}"),
    ("passes", "calibrate-qcfs", "epochs"): ("calibrate-qcfs{order=joint}", "calibrate-qcfs{order=joint, epochs=2}"),
    ("passes", "quantize", "float_weights"): ("quantize", "quantize{float_weights=on}"),
    ("passes", "quantize", "layers"): ("quantize", "quantize{layers=fc}"),
    ("passes", "quantize", "bits"): ("quantize", "quantize{bits=4}"),
    ("passes", "quantize", "weights"): ("quantize", "quantize{weights=4}"),
    ("passes", "quantize", "input"): ("quantize", "quantize{input=unsigned}"),
    ("passes", "propagate-scales", "layers"): ("propagate-scales", "propagate-scales{layers=fc}"),
    ("passes", "propagate-scales", "join"): ("propagate-scales", "propagate-scales{join=rescale}"),
    ("passes", "propagate-scales", "bits"): ("propagate-scales", "propagate-scales{bits=12}"),
    ("passes", "propagate-scales", "width"): ("propagate-scales", "propagate-scales{width=13}"),
    ("passes", "propagate-scales", "factor"): ("propagate-scales", "propagate-scales{factor=20}"),
    ("passes", "propagate-scales", "grid"): ("propagate-scales", "propagate-scales{grid=threshold}"),
    ("passes", "propagate-scales", "whole"): (
        "propagate-scales{join=rescale}",
        "propagate-scales{join=rescale, whole=on}",
    ),
    ("passes", "compose-linear", "layers"): ("compose-linear", "compose-linear{layers=conv1}"),
    ("passes", "compose-linear", "largest"): ("compose-linear", "compose-linear{largest=1}"),
    ("passes", "lower-max-pool", "layers"): ("lower-max-pool", "lower-max-pool{layers=fc}"),
    ("passes", "lower-max-pool", "materialise"): ("lower-max-pool", "lower-max-pool{materialise=off}"),
    ("passes", "derive-thresholds", "layers"): ("derive-thresholds", "derive-thresholds{layers=fc}"),
    ("passes", "derive-thresholds", "neuron"): ("derive-thresholds", "derive-thresholds{neuron=none_yet}"),
    ("passes", "derive-thresholds", "order"): (
        "derive-thresholds{neuron=parallel}",
        "derive-thresholds{neuron=parallel, order=prefix}",
    ),
    ("passes", "expand-parallel", "layers"): ("expand-parallel", "expand-parallel{layers=fc}"),
    ("passes", "expand-parallel", "matrices"): ("expand-parallel", "expand-parallel{matrices=1}"),
    ("passes", "fuse-parallel", "layers"): ("fuse-parallel", "fuse-parallel{layers=fc}"),
    ("passes", "fuse-neuron", "layers"): ("fuse-neuron", "fuse-neuron{layers=fc}"),
    ("passes", "sparsify", "layers"): ("sparsify{rot=1}", "sparsify{rot=1, layers=conv1}"),
    ("passes", "sparsify", "rot"): ("sparsify{rot=1}", "sparsify{rot=2}"),
    ("passes", "sparsify", "drlo"): ("sparsify{drlo=3}", "sparsify{drlo=2}"),
    ("passes", "sparsify", "mode"): ("sparsify{drlo=3}", "sparsify{drlo=3, mode=window}"),
    ("passes", "sparsify", "input"): ("sparsify{rot=1}", "sparsify{rot=1, input=on}"),
    ("passes", "sparsify", "max_drop"): ("sparsify{max_drop=0}", "sparsify{max_drop=50}"),
    ("passes", "sparsify", "images"): ("sparsify{max_drop=0}", "sparsify{max_drop=0, images=1}"),
    ("passes", "calibrate-bias", "layers"): (
        "calibrate-bias{when=always}",
        "calibrate-bias{when=always, layers=conv1}",
    ),
    ("passes", "calibrate-bias", "bits"): ("calibrate-bias{when=always}", "calibrate-bias{when=always, bits=2}"),
    ("passes", "calibrate-bias", "register"): ("calibrate-bias", "calibrate-bias{register=4}"),
    ("passes", "calibrate-bias", "when"): ("calibrate-bias", "calibrate-bias{when=always}"),
    ("passes", "scale-integration", "layers"): (
        "scale-integration{bits=14}",
        "scale-integration{bits=14, layers=conv1}",
    ),
    ("passes", "scale-integration", "bits"): ("scale-integration{bits=15}", "scale-integration{bits=14}"),
    ("passes", "scale-integration", "sum_bits"): (
        "scale-integration{bits=14}",
        "scale-integration{bits=14, sum_bits=5}",
    ),
    ("passes", "scale-integration", "r"): ("scale-integration{bits=14}", "scale-integration{bits=14, r=data}"),
    ("passes", "scale-integration", "per"): ("scale-integration{bits=14}", "scale-integration{bits=14, per=channel}"),
    ("passes", "scale-integration", "overflow"): (
        "scale-integration{bits=14, r=data}",
        "scale-integration{bits=14, r=data, overflow=wrap}",
    ),
    ("passes", "scale-integration", "divisor"): (
        "scale-integration{bits=14}",
        "scale-integration{bits=14, divisor=255}",
    ),
    ("passes", "fuse-neuron", "neuron"): ("fuse-neuron", "fuse-neuron{neuron=none_yet}"),
    ("recipes", "parallel", "steps"): ("@parallel", "@parallel{steps=3}"),
    ("recipes", "parallel", "bits"): ("@parallel", "@parallel{bits=4}"),
    ("recipes", "parallel", "order"): ("@parallel", "@parallel{order=prefix}"),
    ("recipes", "parallel", "fused"): ("@parallel", "@parallel{fused=off}"),
    ("passes", "derive-thresholds", "steps"): (
        "derive-thresholds{neuron=ca-lif}",
        "derive-thresholds{neuron=ca-lif, steps=300}",
    ),
    ("passes", "fuse-neuron", "mode"): ("fuse-neuron", "fuse-neuron{mode=single}"),
    ("passes", "shorten-window", "layers"): ("shorten-window{steps=300}", "shorten-window{steps=300, layers=fc}"),
    ("passes", "shorten-window", "steps"): ("shorten-window{steps=300}", "shorten-window{steps=100}"),
    ("recipes", "ca-lif", "steps"): ("@ca-lif{steps=300}", "@ca-lif"),
    ("recipes", "ca-lif", "bits"): ("@ca-lif", "@ca-lif{bits=4}"),
    ("recipes", "ca-lif", "input"): ("@ca-lif", "@ca-lif{input=unsigned}"),
    ("recipes", "ca-lif", "mode"): ("@ca-lif", "@ca-lif{mode=single}"),
    ("recipes", "ca-lif", "join"): ("@ca-lif", "@ca-lif{join=rescale}"),
    ("recipes", "parallel-free", "steps"): ("@parallel-free", "@parallel-free{steps=8}"),
    ("recipes", "parallel-free", "bits"): ("@parallel-free", "@parallel-free{bits=4}"),
    ("recipes", "parallel-free", "update"): ("@parallel-free", "@parallel-free{update=paper}"),
    ("recipes", "parallel-free", "weights"): ("@parallel-free", "@parallel-free{weights=keep}"),
    ("recipes", "parallel-free", "order"): ("@parallel-free", "@parallel-free{order=prefix}"),
    ("recipes", "parallel-free", "fused"): ("@parallel-free", "@parallel-free{fused=off}"),
    ("recipes", "sdann", "bits"): ("@sdann", "@sdann{bits=4}"),
    ("recipes", "sdann", "weights"): ("@sdann", "@sdann{weights=4}"),
    ("recipes", "sdann", "range"): ("@sdann{bits=3}", "@sdann{bits=3, range=mse}"),
    ("recipes", "sdann", "max_pool"): ("@sdann", "@sdann{max_pool=keep}"),
    ("recipes", "sdann", "accumulator"): ("@sdann", "@sdann{accumulator=14}"),
    ("recipes", "sdann", "r"): ("@sdann{accumulator=14}", "@sdann{accumulator=14, r=data}"),
    ("recipes", "sdann", "per"): ("@sdann{accumulator=14}", "@sdann{accumulator=14, per=channel}"),
    ("recipes", "sdann", "divisor"): ("@sdann{accumulator=14}", "@sdann{accumulator=14, divisor=255}"),
    ("recipes", "sdann", "rot"): ("@sdann", "@sdann{rot=1}"),
    ("recipes", "sdann", "drlo"): ("@sdann", "@sdann{drlo=2}"),
    ("recipes", "sdann", "max_drop"): ("@sdann", "@sdann{max_drop=50}"),
    ("recipes", "stem", "bits"): ("@stem", "@stem{bits=4}"),
    ("recipes", "stem", "weights"): ("@stem", "@stem{weights=4}"),
    ("recipes", "stem", "range"): ("@stem{bits=3}", "@stem{bits=3, range=mse}"),
    ("recipes", "stem", "percentile"): ("@stem{range=percentile}", "@stem{range=percentile, percentile=60}"),
    ("recipes", "stem", "per"): ("@stem", "@stem{per=channel}"),
    ("recipes", "stem", "join"): ("@stem", "@stem{join=rescale}"),
    ("recipes", "stem", "max_pool"): ("@stem", "@stem{max_pool=lower}"),
}
RUNS = {
    ("backends", "hw", "collapse"): ("hw", "hw{collapse=off}"),
    ("backends", "hw", "accumulator"): ("hw", "hw{accumulator=8}"),
    ("backends", "hw", "profile"): ("hw", "hw{profile=darwin3}"),
    ("backends", "hw", "pipeline"): ("hw", "hw{pipeline=two}"),
    ("backends", "hw", "delays"): ("hw{pipeline=one}", "hw{pipeline=one, delays=off}"),
    ("backends", "hw", "overflow"): ("hw{accumulator=8}", "hw{accumulator=8, overflow=wrap}"),
    ("backends", "parallel", "device"): ("parallel", 'parallel{device="cuda:9999"}'),
    ("backends", "serial", "device"): ("serial", 'serial{device="cuda:9999"}'),
}
MANY = np.random.default_rng(1).normal(size=(60, 2, 6, 6)).astype(np.float32)


@functools.cache
def before(step: str, whole: str = PASSES) -> Module:
    """The network as a pass of a whole pipeline finds it."""
    torch.manual_seed(0)
    steps = whole.split(", ")
    found = next(i for i, s in enumerate(steps) if s.startswith(step))
    return spir.compile(Net().eval(), ", ".join(steps[:found]), data=MANY, check="off").module


def outcome(module: Module, passes: str) -> Module | str:
    try:
        return spir.compile(module, passes, data=MANY, check="off").module
    except SpirError as refusal:
        return refusal.diagnostics[0].message


@pytest.mark.filterwarnings("ignore:.*T = 100 steps for codes up to 255 are not lossless")
@pytest.mark.parametrize("option", CHANGES, ids="-".join)
def test_an_option_of_a_pass_changes_the_pipeline_and_what_it_makes(option):
    kind, name, _ = option
    one, other = CHANGES[option]
    sorting = "neuron=parallel" in one or name not in PASSES
    whole = NARROW if name in ("calibrate-bias", "scale-integration") else PARALLEL if sorting else PASSES
    module = before("canonicalize" if kind == "recipes" else name, whole)
    assert pipeline.spell(pipeline.parse(one), every=True) != pipeline.spell(pipeline.parse(other), every=True)
    made = outcome(module, one)
    assert isinstance(made, Module)
    assert made != outcome(module, other)


@pytest.mark.parametrize("option", RUNS, ids="-".join)
def test_an_option_of_a_backend_changes_how_it_is_spelled_and_what_it_prepares(option):
    one, other = (backend_of(text) for text in RUNS[option])
    assert spelled(one, every=True) != spelled(other, every=True)
    model, recipe = (Net().eval(), "@stem{join=rescale}") if option[2] == "delays" else (small(), "@stem")
    module = spir.compile(model, recipe, data=X, check="off").module
    assert prepared(one, module) != prepared(other, module)


def prepared(backend: Backend, module: Module) -> set[str]:
    """The trains that a backend merges, or its refusals."""
    refused = {str(refusal) for refusal in backend.refusals(module)}
    return refused or set(getattr(backend.prepare(module), "merged", ()))


def options() -> Iterator[tuple[str, str, str]]:
    for kind in ("passes", "recipes", "backends", "frontends"):
        for name in names(kind):
            owner = find(kind, name)
            yield from ((kind, name, option) for option in (fields(owner) if attrs.has(owner) else ()))


def test_every_option_there_is_is_tested():
    assert set(options()) == {*CHANGES, *RUNS}


OWNERS = sorted({(kind, name) for kind, name, _ in (*CHANGES, *RUNS)})


@pytest.mark.parametrize(("kind", "name"), OWNERS)
def test_an_option_that_nobody_knows_is_refused_with_those_there_are(kind, name):
    read = backend_of if kind == "backends" else pipeline.parse
    with pytest.raises(SpirError) as caught:
        read(f"{'@' * (kind == 'recipes')}{name}{{time_steps=8}}")
    assert caught.value.code == "option"
    assert f"there is no option of {name} called 'time_steps'" in str(caught.value)
    assert "fix: " in str(caught.value)


UNUSED = ("calibrate-range{percentile=99}", "calibrate-range{method=mse, percentile=99}", "calibrate-range{bits=4}")
UNUSED += ("calibrate-range{levels=4}", "calibrate-qcfs{epochs=2}", "calibrate-qcfs{batch=2}")
UNUSED += ("sparsify{rot=1, mode=window}", "sparsify{rot=1, images=9}", "sparsify{rot=1, max_drop=1}")
UNUSED += ("quantize{float_weights=on, weights=4}",)


@pytest.mark.parametrize("passes", [*UNUSED, "@stem{range=mse, percentile=99}"])
def test_an_option_that_the_others_leave_without_effect_is_refused(passes):
    with pytest.raises(SpirError) as caught:
        spir.compile(small(), passes, data=X)
    assert caught.value.code == "option"


# --- ranges are those of all batches, whatever their order -------------------------------------------------------


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_max_is_the_maximum_of_all_batches_whatever_their_order(where, per):
    batches = [X[:4], X[4:8], X[8:]]
    batches[where] = 9 * batches[where]
    passes = f"calibrate-range{{per={per}}}"
    found = spir.compile(small(), passes, data=batches).module
    whole = np.concatenate(batches)
    largest = {"_1": output(small()[:2], whole).max(), "_3": output(small()[:4], whole).max(), "x.clip": whole.max()}
    clips = list(ops_of(found, Clip))
    assert len(clips) == 3
    for node in clips:
        name = node.result if node.result == "x.clip" else node.result.removesuffix(".clip")
        np.testing.assert_allclose(node.op.hi.values, largest[name], rtol=1e-5)
    for order in ((1, 2, 0), (2, 1, 0)):
        assert spir.compile(small(), passes, data=[batches[i] for i in order]).module == found


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_other_ranges_do_not_depend_on_the_order_or_the_size_of_batches_either(method):
    found = [
        spir.compile(small(), f"calibrate-range{{method={method}}}", data=data).module
        for data in (X, X[::-1].copy(), [X[:1], X[1:]], [X[9:], X[:9]])
    ]
    assert all(module == found[0] for module in found)


# --- pools, arrays, readouts, weights, files ----------------------------------------------------------------------


def pooled(model_pool: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), model_pool, nn.Conv2d(3, 2, 2)).eval()


@pytest.mark.parametrize("max_pool", ["keep", "lower"])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(4, 1)], ids=str)
def test_a_maximum_on_the_way_of_spikes_is_exact(pool, max_pool):
    snn = spir.compile(pooled(pool), f"@stem{{max_pool={max_pool}}}", data=X, check="off")
    integer = stage(snn, "propagate-scales")
    for backend in BACKENDS:
        executable = backend_of(backend).prepare(snn.module)
        assert not difference.compare(integer, snn.module, X, executable=executable).differs
    assert isinstance(snn.module.types["_1" if max_pool == "lower" else "_2"].encoding, Spikes)
    wanted = output(pooled(pool))
    np.testing.assert_allclose(snn(X), wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_in_and_out_are_of_one_kind(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    x = X[:, :, 0]
    from_arrays = spir.compile(model, "@stem", data=x, backend=backend, check="off")
    from_tensors = spir.compile(model, "@stem", data=torch.from_numpy(x), backend=backend, check="off")
    assert from_arrays.module == from_tensors.module
    one, other = from_arrays(x), from_tensors(torch.from_numpy(x))
    assert isinstance(one, np.ndarray)
    assert isinstance(other, torch.Tensor)
    assert other.dtype == torch.float32
    np.testing.assert_array_equal(one, other.numpy())


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("options", ["", "{per=channel}"])
def test_the_readout_has_its_own_scale_and_bias_whatever_hidden_scales_are(factor, options):
    def change(model) -> None:
        model[0].weight *= factor
        model[0].bias *= factor
        model[2].weight /= factor**2
        model[5].bias.copy_(torch.tensor([0.5, -0.25, 10.0]))

    model = small(change)
    snn = spir.compile(model, f"@stem{options}", data=X, check="off")
    *_, product, readout = snn.module.nodes
    steps = scale_of(readout.type).floats()
    incoming = scale_of(snn.module.operand_types(product)[0]).floats()
    np.testing.assert_array_equal(steps, incoming * product.op.weight_scale.values)
    np.testing.assert_allclose(readout.op.bias.values * steps, model[5].bias.detach().numpy(), rtol=0, atol=steps.max())
    wanted = output(model)
    np.testing.assert_allclose(snn(X), wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


MAGNITUDES = st.floats(-35, 35).map(lambda e: 10.0**e)


@given(st.lists(MAGNITUDES, min_size=1, max_size=6), st.integers(2, 16), st.integers(0, 2**32 - 1))
def test_every_live_channel_keeps_its_largest_weight(magnitudes, bits, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((len(magnitudes), 3, 2, 2)) * np.reshape(magnitudes, (-1, 1, 1, 1))
    weight[rng.random(len(weight)) < 0.2] = 0
    codes, scale = quantise_weight(weight, bits)
    live = weight.reshape(len(weight), -1).any(axis=1)
    top = 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(np.abs(codes).reshape(len(codes), -1).max(axis=1), np.where(live, top, 0))
    assert (np.abs(codes * scale.reshape(-1, 1, 1, 1) - weight) <= scale.reshape(-1, 1, 1, 1) * 0.5001).all()


@pytest.mark.parametrize("spread", [1e-12, 1e-4, 1e4, 1e12])
def test_weights_and_activations_of_unequal_size_stay_alive(spread):
    def change(model) -> None:
        model[0].weight[0] *= spread
        model[0].bias[0] *= spread
        model[2].weight[:, 0] /= spread

    model = small(change)
    snn = spir.compile(model, "@stem{per=channel}", data=X, check="off")
    for node in stage(snn, "quantize").nodes:
        if weight := node.op.arrays().get("weight"):
            assert weight.values.reshape(len(weight.values), -1).any(axis=1).all()
    if 1e-4 <= spread <= 1e4:  # beyond, the gain of a channel ends at 2^-12 of the widest one's
        assert snn.trace(X)["_1.clip"].counts.reshape(len(X), 3, -1).any(axis=(0, 2)).all()
        wanted = output(model)
        np.testing.assert_allclose(snn(X), wanted, rtol=0, atol=0.05 * np.abs(wanted).max())


@pytest.mark.parametrize("options", ["", "{max_pool=lower, per=channel, join=rescale}"])
def test_the_network_that_is_saved_is_the_one_that_ran(options, tmp_path):
    torch.manual_seed(0)
    model = Net().eval()
    snn = spir.compile(model, f"@stem{options}", data=X, check="off")
    ran = snn(X)
    snn.save(tmp_path / "net")
    built(model, everything_zero)  # the network keeps its own weights
    for backend in (None, *BACKENDS):
        loaded = spir.load(tmp_path / "net", backend)
        assert loaded.module == snn.module
        np.testing.assert_array_equal(loaded(X), ran)


# --- what users complain about most -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.Identity(), nn.Dropout()], ids=str)
def test_a_network_of_which_nothing_converts_is_refused(model):
    with pytest.raises(SpirError, match="finds no integers, and would leave a network of reals"):
        spir.compile(model, "@stem", data=X)


def test_a_report_says_which_values_are_spikes_and_which_stay_real():
    model = Lambda(
        lambda s, x: s.fc(F.relu(s.b(s.a(x).relu())).flatten(1)).softmax(1),
        a=nn.Conv2d(2, 3, 3),
        b=nn.Conv2d(3, 3, 3),
        fc=nn.Linear(12, 2),
    )
    report = spir.compile(model, "@stem", data=X).report(X)
    assert report.coverage["spikes"] == 4  # the input, two relus and what flatten moves
    assert report.reals == ("x", "fc.real", "softmax")
    assert "real values: x, fc.real, softmax" in str(report)
    assert [(layer.value, layer.op) for layer in report.layers] == [
        ("x.clip.train", "encode"),
        ("relu", "neuron_stem"),
        ("relu_1", "neuron_stem"),
    ]


COLLAPSES = {
    "clipping": "calibrate-range{layers='1'}, calibrate-range{layers='3', method=percentile, percentile=85}, quantize",
    "rounding": "calibrate-range, quantize{weights=2, layers='2'}, quantize",
}


@pytest.mark.parametrize("cause", COLLAPSES)
def test_a_layer_that_ruins_the_network_is_named_with_the_cause(cause):
    passes = COLLAPSES[cause].replace("'", '"') + ", propagate-scales, derive-thresholds, fuse-neuron"
    snn = spir.compile(small(), passes, data=X, check="off")
    found = difference.compare(snn.stages[0].module, snn.module, X, executable=snn.executable)
    worst = max(found.layers, key=lambda layer: getattr(layer, cause) / layer.magnitude)
    others = [layer for layer in found.layers if layer is not worst]
    assert (worst.value, worst.origin) == ("_3", "3 (ReLU)")
    assert getattr(worst, cause) / worst.magnitude > 5 * max(getattr(o, cause) / o.magnitude for o in others)
    assert worst.value in str(found)


JOINS = {
    "concatenation": (lambda s, x: s.b(torch.cat([F.relu(s.a(x)), F.relu(s.c(x))], 1)), 6),
    "upsampling": (lambda s, x: s.b(F.interpolate(F.max_pool2d(F.relu(s.a(x)), 2), scale_factor=2)), 3),
    "a sum": (lambda s, x: s.b(F.relu(s.a(x)) + s.c(x)), 3),
    "a sum of unequal sizes": (lambda s, x: s.b(F.relu(s.a(x)) + 1e-3 * F.relu(s.c(x))), 3),
}


@pytest.mark.parametrize("options", ["", "join=rescale, max_pool=lower"])
@pytest.mark.parametrize("what", JOINS)
def test_branches_convert_and_meet(what, options):
    function, channels = JOINS[what]
    torch.manual_seed(0)
    a, b, c = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(channels, 2, 3), nn.Conv2d(2, 3, 3, padding=1)
    model = Lambda(function, a=a, b=b, c=c).eval()
    snn = spir.compile(model, f"@stem{{{options}}}", data=X, check="off")
    wanted = output(model)
    np.testing.assert_allclose(snn(X), wanted, rtol=0, atol=0.03 * np.abs(wanted).max())


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_no_size_of_weights_silences_the_network(factor):
    def change(model) -> None:
        model[0].weight *= factor
        model[0].bias *= factor

    snn, plain = (spir.compile(small(c), "@stem", data=X, check="off") for c in (change, None))
    for layer, other in zip(snn.report(X).layers, plain.report(X).layers, strict=True):
        assert layer.rate > 0
        if layer.value != "_3":  # whose bias did not grow
            assert layer.rate == pytest.approx(other.rate, rel=0.01)


def test_a_layer_that_never_spikes_shows_in_the_report():
    report = spir.compile(small(DEAD["a dead layer"]), "@stem", data=X).report(X)
    silent = [layer.value for layer in report.layers if not layer.spikes]
    assert silent == ["_1"]
    (row,) = (line for line in str(report).splitlines() if line.startswith("_1 "))
    assert row.split()[:7] == ["_1", "neuron_stem", "108", "8", "0.0", "0.000", "0"]
