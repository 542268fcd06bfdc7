"""compile and what it returns: arguments, data of every form, calls, traces, and a model left as it was."""

from __future__ import annotations

import copy

import attrs
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spir
from spir import driver, interpreter, store
from spir.backends.serial import Serial
from spir.discovery import names
from spir.errors import SpirError
from spir.ir import Module
from spir.pipeline import parse as passes_of
from spir.types import Spikes

RECIPE = "@stem{bits=4}"
BACKENDS = ("serial", "parallel", "hw", "hw{collapse=off}")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(9, 1, 5, 5)).astype(np.float32)


class Doubled(nn.Module):
    """Two convolutions with a residual join, a batch norm that has seen data, and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3, padding=1)
        self.bn = nn.BatchNorm2d(2)
        self.conv2 = nn.Conv2d(2, 2, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv1(x)))
        x = torch.relu(self.conv2(x) + x)
        return self.fc(torch.flatten(nn.functional.avg_pool2d(x, 2), 1))


@pytest.fixture(scope="module")
def model() -> Doubled:
    torch.manual_seed(0)
    made = Doubled()
    made.bn.running_mean.fill_(0.25)
    made.bn.running_var.fill_(0.5)
    return made.eval()


@pytest.fixture(scope="module", params=BACKENDS)
def snn(request, model) -> driver.Compiled:
    return spir.compile(model, RECIPE, data=X, backend=request.param)


@pytest.fixture(scope="module")
def any_snn(model) -> driver.Compiled:
    return spir.compile(model, RECIPE, data=X)


def refused(*args, **kwargs) -> str:
    with pytest.raises(SpirError) as caught:
        spir.compile(*args, **kwargs)
    return str(caught.value)


# --- arguments ----------------------------------------------------------------------------------------------------


def test_without_passes_the_recipes_are_listed(model):
    assert refused(model, data=X) == (
        "error[usage]: compile needs passes: what to convert to, and how\n"
        "        fix: a recipe: @ca-lif, @parallel, @parallel-free, @sdann, @stem; or passes: "
        f"{', '.join(names('passes'))}"
    )


ARGUMENTS = [
    ({"check": "probe"}, "error[usage]: check = 'probe' is unknown\n        fix: one of: off, probes, data"),
    ({"check": None}, "error[usage]: check = None is unknown\n        fix: one of: off, probes, data"),
    (
        {"train": X},
        "error[usage]: train, validation and loss go with passes that train, and none here does",
    ),
    ({"loss": abs}, "error[usage]: train, validation and loss go with passes that train, and none here does"),
    ({"seed": -1}, "error[usage]: seed = -1 is no seed\n        fix: a whole number, 0 or more"),
    ({"seed": "1"}, "error[usage]: seed = '1' is no seed\n        fix: a whole number, 0 or more"),
    ({"seed": True}, "error[usage]: seed = True is no seed\n        fix: a whole number, 0 or more"),
    ({"frontend": "torchfx"}, "error[name]: there is no frontend 'torchfx'\n        fix: did you mean 'torch_fx'?"),
    (
        {"backend": "seriel"},
        """\
error[name]: there is no backend 'seriel'
         at: line 1
             seriel
             ^
        fix: did you mean 'serial'?""",
    ),
    (
        {"backend": "hw{collapse=maybe}"},
        """\
error[option]: there is no value of hw{collapse} called 'maybe'
         at: line 1
             hw{collapse=maybe}
             ^
        fix: one of: auto, off""",
    ),
    (
        {"backend": "hw, serial"},
        "error[usage]: 'hw, serial' names 2 backends\n        fix: one of: hw, parallel, serial",
    ),
    ({"backend": ""}, "error[usage]: '' names 0 backends\n        fix: one of: hw, parallel, serial"),
    ({"backend": None}, "error[usage]: a backend is text such as 'serial', not NoneType"),
    ({"backend": Serial}, "error[usage]: a backend is text such as 'serial', not type"),
    ({"passes": 3}, "error[usage]: a pipeline is text, or a list of texts and passes, not int"),
]


@pytest.mark.parametrize(("given", "text"), ARGUMENTS, ids=lambda v: None if isinstance(v, str) else str(v)[:30])
def test_an_argument_that_is_wrong_is_refused_with_what_it_may_be(model, given, text):
    assert refused(model, **{"passes": "fold-bn", "data": X} | given) == text


@pytest.mark.parametrize("thing", [3, "model", [nn.ReLU()], nn.functional.relu])
def test_what_no_frontend_reads_is_refused(thing):
    assert f"error[usage]: no frontend reads a {type(thing).__name__}" in refused(thing, "fold-bn", data=X)


def test_a_model_without_data_or_example_is_refused(model):
    text = refused(model, "fold-bn")
    assert text == ("error[data]: the input shape is not known\n        fix: give data=, or example= with one batch")


def test_an_example_is_enough_for_passes_that_measure_nothing(model):
    made = spir.compile(model, "canonicalize, fold-bn", example=torch.from_numpy(X[:1]))
    with torch.no_grad():
        np.testing.assert_allclose(made(X), model(torch.from_numpy(X)).numpy(), rtol=1e-5, atol=1e-6)
    assert made.source["data"] == "none"


def test_passes_and_backends_may_be_objects(model, any_snn):
    made = spir.compile(model, [*passes_of("@stem{bits=4}")], data=X, backend=Serial())
    assert made.module == any_snn.module
    assert made.source == any_snn.source


def test_a_module_compiles_as_it_is(any_snn):
    again = spir.compile(any_snn.stages[0].module, RECIPE, data=X)
    assert isinstance(again.stages[0].module, Module)
    assert again.module == any_snn.module


def test_a_check_on_data_needs_data(model, any_snn):
    text = "error[data]: check = 'data' needs calibration data\n        fix: give data=, or check='probes'"
    assert refused(model, "fold-bn", example=X, check="data") == text
    with pytest.raises(SpirError) as caught:
        driver.opt(any_snn.stages[0].module, "fold-bn", check="data")
    assert str(caught.value) == text


def test_a_check_on_data_makes_the_same_network_and_says_so_in_journal_and_report(model, any_snn):
    made = spir.compile(model, RECIPE, data=X, check="data")
    assert made.module == any_snn.module
    assert made.source["check"] == "data"
    for entry, before in zip(made.journal, any_snn.journal, strict=True):
        assert entry.checked.endswith("9 calibration samples")
        assert entry.largest >= (0 if entry.contract == "calibrated" else before.largest * (1 - 1e-9))
        assert entry.mean <= entry.largest
    exact = [e for e in made.journal if e.contract == "exact"]
    assert len(exact) >= 3
    assert not any(e.largest for e in exact)
    shown = made.report(X)
    assert f"and 9 calibration samples: %{made.journal[1].value} changed most, by " in str(shown)
    assert shown.json()["journal"][3]["mean"] == made.journal[3].mean > 0


def test_evaluate_yields_batches_of_the_size_that_is_asked_for(any_snn):
    context = driver.Context(X, 0)
    found = list(context.evaluate(any_snn.module, X, "", batch=4))
    assert [len(part[any_snn.module.output]) for part in found] == [4, 4, 1]
    (whole,) = context.evaluate(any_snn.module, X, "")
    np.testing.assert_array_equal(np.concatenate([p[any_snn.module.output] for p in found]), whole["fc"])


# --- data ---------------------------------------------------------------------------------------------------------


class Counting:
    """Batches of (x, y), and how often they were asked for."""

    def __init__(self) -> None:
        self.rounds = 0
        self.batches = 0

    def __iter__(self):
        self.rounds += 1
        for start in range(0, 9, 4):
            self.batches += 1
            yield X[start : start + 4], np.zeros(len(X[start : start + 4]))


def test_an_iterable_is_read_once(model):
    data = Counting()
    spir.compile(model, RECIPE, data=data)
    assert (data.rounds, data.batches) == (1, 3)


LABELS = torch.zeros(9)
FORMS = {
    "tensor": lambda: torch.from_numpy(X),
    "tensor with gradients": lambda: torch.from_numpy(X).requires_grad_(),
    "loader of pairs": lambda: DataLoader(TensorDataset(torch.from_numpy(X), LABELS), batch_size=4),
    "loader of x": lambda: DataLoader(torch.from_numpy(X), batch_size=2),
    "list of arrays": lambda: [X[:5], X[5:]],
    "list of pairs": lambda: [[X[:5], LABELS[:5]], (X[5:], LABELS[5:])],
    "one pair": lambda: (X, np.arange(9)),
    "pair of tensors": lambda: (torch.from_numpy(X), torch.arange(9)),
    "two batches": lambda: (X[:5], X[5:]),
    "generator": lambda: (X[i : i + 1] for i in range(9)),
    "iterable": Counting,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same_network(model, any_snn, form):
    made = spir.compile(model, RECIPE, data=FORMS[form](), check="off")
    assert made.module == any_snn.module
    assert made.source["data"] == any_snn.source["data"]


def test_the_source_names_passes_data_seed_and_check(model, any_snn):
    assert any_snn.source == {
        "passes": ", ".join(e.step for e in any_snn.journal),
        "data": f"9 samples, blake2b {driver._digest(X)}",
        "seed": "0",
        "check": "probes",
    }
    other = X.copy()
    other[8, 0, 4, 4] = np.nextafter(other[8, 0, 4, 4], np.float32(9))
    made = spir.compile(model, "fold-bn", data=other, seed=5, check="off")
    assert made.source["data"] != any_snn.source["data"]
    assert (made.source["seed"], made.source["check"]) == ("5", "off")


def test_an_exception_of_the_users_own_loader_is_not_taken_for_bad_data(model):
    def loader():
        yield X
        raise TypeError("inside the loader")

    with pytest.raises(TypeError, match="inside the loader"):
        spir.compile(model, "fold-bn", data=loader())


# --- calls --------------------------------------------------------------------------------------------------------


def test_an_array_gives_an_array_and_a_tensor_a_tensor_of_the_same_numbers(snn):
    array, tensor = snn(X), snn(torch.from_numpy(X))
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)
    assert (array.dtype, tensor.dtype) == (np.float32, torch.float32)
    assert array.shape == (9, 3)
    assert tensor.device == torch.device("cpu")
    assert not tensor.requires_grad
    np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64])
def test_logits_are_float32_whatever_comes_in(any_snn, dtype):
    given = torch.arange(-25, 25).reshape(2, 1, 5, 5).to(dtype)
    assert any_snn(given).dtype == torch.float32
    np.testing.assert_array_equal(any_snn(given).numpy(), any_snn(given.float().numpy()))


def test_the_logits_are_what_the_reference_decodes_to(snn):
    stored = interpreter.run(snn.module, X)
    expected = interpreter.decoded(snn.module, stored)[snn.module.output].astype(np.float32)
    np.testing.assert_array_equal(snn(X), expected)


@pytest.mark.parametrize("size", [1, 2, 7, 9])
@pytest.mark.parametrize("chunk", [1, 2**28])
def test_the_result_does_not_depend_on_the_batch(snn, size, chunk, monkeypatch):
    whole = snn(X)
    monkeypatch.setattr(driver, "CHUNK_BYTES", chunk)
    parts = [snn(X[i : i + size]) for i in range(0, 9, size)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_call_takes_no_more_samples_at_a_time_than_memory_allows(any_snn, monkeypatch):
    sizes = []

    class Watched:
        bytes_per_sample = 10

        def run(self, x, keep=""):
            sizes.append(len(x))
            return any_snn.executable.run(x, keep)

    monkeypatch.setattr(driver, "CHUNK_BYTES", 45)
    attrs.evolve(any_snn, executable=Watched())(X)
    assert sizes == [4, 4, 1]


def test_nothing_is_remembered_between_calls_and_the_input_stays(snn):
    x = X.copy()
    first = snn(x)
    snn(-3 * x)
    snn.trace(x)
    np.testing.assert_array_equal(snn(x), first)
    np.testing.assert_array_equal(x, X)


def test_two_compilations_are_the_same(model, any_snn):
    again = spir.compile(model, RECIPE, data=X)
    assert again.module == any_snn.module
    assert str(again.module) == str(any_snn.module)
    without_time = [attrs.evolve(e, seconds=0.0) for e in again.journal]
    assert without_time == [attrs.evolve(e, seconds=0.0) for e in any_snn.journal]


CALLS = [
    (X[0], "the network takes [N, 1, 5, 5], and the input is [1, 5, 5]", "add the batch axis"),
    (X[:, :, :4], "the network takes [N, 1, 5, 5], and the input is [9, 1, 4, 5]", "give a batch of that shape"),
    (X[:0], "the network takes [N, 1, 5, 5], and the input is [0, 1, 5, 5]", "give a batch of that shape"),
    (3, "the network takes [N, 1, 5, 5], and the input is []", "give a batch of that shape"),
    ("a", "the input is of type <U1, not numbers", "give a float array or tensor"),
    (None, "the input is of type object, not numbers", "give a float array or tensor"),
    ([[1, 2], [3]], "the input is ragged", "give batches [N, *shape] of one shape"),
]


@pytest.mark.parametrize("method", ["__call__", "trace", "report"])
@pytest.mark.parametrize(("x", "message", "fix"), CALLS, ids=[c[1][:24] + str(i) for i, c in enumerate(CALLS)])
def test_an_input_that_does_not_fit_is_refused(snn, method, x, message, fix):
    with pytest.raises(SpirError) as caught:
        getattr(snn, method)(x)
    assert str(caught.value).splitlines() == [f"error[data]: {message}", f"        fix: {fix}"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_input_with_one_number_that_is_none_is_refused(snn, bad):
    x = X.copy()
    x[8, 0, 4, 4] = bad
    with pytest.raises(SpirError, match=r"error\[data\]: .*NaN or infinite"):
        snn(x)


@pytest.mark.parametrize("x", [torch.from_numpy(X).bfloat16(), torch.from_numpy(X).to_sparse()])
def test_tensors_that_numpy_does_not_hold_are_refused(any_snn, x):
    with pytest.raises(SpirError, match=r"(?s)error\[data\]: the input is no array: .*fix: give a dense float32 array"):
        any_snn(x)


# --- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_the_model_comes_back_as_it_was(model, training):
    used = copy.deepcopy(model).train(training)
    calls = []
    handle = used.conv1.register_forward_hook(lambda *_: calls.append(1))
    before = {name: (id(t), t.clone(), t.dtype, t.requires_grad) for name, t in used.state_dict(keep_vars=True).items()}
    modes = [m.training for m in used.modules()]
    spir.compile(used, RECIPE, data=X)
    after = used.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    for name, (identity, values, dtype, gradient) in before.items():
        assert (id(after[name]), after[name].dtype, after[name].requires_grad) == (identity, dtype, gradient)
        assert torch.equal(after[name], values)
        assert after[name].grad is None
    assert [m.training for m in used.modules()] == modes
    assert list(used.conv1._forward_hooks) == [handle.id]


def test_a_model_in_training_mode_is_read_as_in_evaluation(model, any_snn):
    assert spir.compile(copy.deepcopy(model).train(), RECIPE, data=X, check="off").module == any_snn.module


def test_a_network_keeps_its_weights_when_the_model_trains_on(model):
    used = copy.deepcopy(model)
    made = spir.compile(used, "fold-bn", data=X)
    before = made(X)
    with torch.no_grad():
        for parameter in used.parameters():
            parameter.add_(1.0)
    np.testing.assert_array_equal(made(X), before)


# --- traces -------------------------------------------------------------------------------------------------------


def test_a_trace_holds_every_value_in_order(snn):
    assert list(snn.trace(X)) == list(snn.module.types)


def test_traced_values_have_the_shapes_of_their_types(snn):
    for name, found in snn.trace(X[:4]).items():
        type_ = snn.module.types[name]
        assert found.type == type_
        lead = (type_.steps, 4) if type_.train else (4,)
        assert found.stored.shape == (*lead, *type_.shape)
        assert found.decoded.shape == (4, *type_.shape)
        assert found.decoded.dtype == np.float64
        if name == "x":
            continue
        assert found.frames.shape == (type_.steps, 4, *type_.shape)
        assert found.counts.shape == (4, *type_.shape)
        np.testing.assert_array_equal(found.counts, found.frames.sum(axis=0))


def test_a_trace_is_what_the_reference_stores(snn):
    expected = interpreter.run(snn.module, X, "*")
    for name, found in snn.trace(X).items():
        np.testing.assert_array_equal(found.stored, expected[name])


def test_a_trace_does_not_depend_on_the_batch(snn, monkeypatch):
    whole = snn.trace(X)
    monkeypatch.setattr(driver, "CHUNK_BYTES", 1)
    for name, found in snn.trace(X).items():
        np.testing.assert_array_equal(found.stored, whole[name].stored)


def test_trains_decode_by_the_weights_of_their_frames(any_snn):
    for found in any_snn.trace(X).values():
        if isinstance(found.type.encoding, Spikes):
            whole = sum(2 ** (3 - t) * found.frames[t] for t in range(4))
            np.testing.assert_array_equal(found.decoded, whole * float(found.type.encoding.scale.known[0]))


def test_keep_selects_by_pattern_and_always_gives_the_output(any_snn):
    output = any_snn.module.output
    assert list(any_snn.trace(X, keep="x")) == ["x", output]
    trains = [n for n in any_snn.module.types if n.endswith(".train")]
    assert trains
    assert list(any_snn.trace(X, keep="x|*.train")) == ["x", *trains, output]
    assert list(any_snn.trace(X, keep="")) == [output]
    assert list(any_snn.trace(X, keep=output)) == [output]


def test_a_pattern_that_matches_nothing_is_refused_with_the_names(any_snn):
    with pytest.raises(SpirError) as caught:
        any_snn.trace(X, keep="layer9.*")
    names = ", ".join(list(any_snn.module.types)[:12])
    assert str(caught.value) == f"error[usage]: no value matches 'layer9.*'\n        fix: names: {names}"


def test_reals_have_neither_spikes_nor_frames(any_snn):
    real = any_snn.trace(X, keep="x")["x"]
    for attribute in ("counts", "frames"):
        with pytest.raises(SpirError) as caught:
            getattr(real, attribute)
        assert str(caught.value) == (
            "error[usage]: a real value has neither spikes nor frames\n        fix: read .decoded"
        )


# --- stages and progress ------------------------------------------------------------------------------------------


def test_every_module_on_the_way_is_there_by_name(any_snn):
    assert [stage.name for stage in any_snn.stages] == [
        "frontend",
        "canonicalize",
        "fold-bn",
        "calibrate-range",
        "quantize",
        "propagate-scales",
        "derive-thresholds",
        "fuse-neuron",
    ]
    assert any_snn.stages[-1].module is any_snn.module


def test_stages_are_written_in_order_and_read_back(any_snn, tmp_path):
    folder = tmp_path / "deep" / "stages"
    any_snn.save_stages(folder)
    (folder / "99-older.spir").write_text("")
    any_snn.save_stages(str(folder))
    texts = sorted(folder.glob("*.spir"))
    assert [path.name for path in texts] == [f"{i:02d}-{s.name}.spir" for i, s in enumerate(any_snn.stages)]
    for path, stage in zip(texts, any_snn.stages, strict=True):
        weights = path.with_suffix(".safetensors")
        assert spir.parse(path.read_text(), store.from_bytes(weights.read_bytes(), weights)) == stage.module


def test_stages_go_into_a_folder_of_their_own(any_snn, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SpirError, match=r"(?s)holds notes.txt, and stages .*fix: choose an empty or new folder"):
        any_snn.save_stages(tmp_path)
    with pytest.raises(SpirError, match=r"(?s)is a file, and stages .*fix: choose another name"):
        any_snn.save_stages(tmp_path / "notes.txt")
    with pytest.raises(SpirError, match=r"(?s)there are no stages.*fix: compile it"):
        attrs.evolve(any_snn, stages=()).save_stages(tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_progress_names_each_step_as_it_starts(model):
    seen = []
    spir.compile(model, "canonicalize, fold-bn", data=X, progress=seen.append)
    assert seen == ["read the model", "canonicalize", "fold-bn", "prepare serial"]


def test_spikes_and_the_integer_network_decode_alike_at_every_shared_value(snn):
    integers = next(s.module for s in snn.stages if s.name == "propagate-scales")
    expected = interpreter.decoded(integers, interpreter.run(integers, X, "*"))
    found = snn.trace(X)
    shared = expected.keys() & found.keys()
    assert len(shared) >= 6
    for name in shared:
        np.testing.assert_array_equal(found[name].decoded, expected[name])


def test_opt_runs_passes_on_a_module_without_a_backend(any_snn):
    first = any_snn.stages[0].module
    assert driver.opt(first, "canonicalize, fold-bn").module == any_snn.stages[2].module
    with pytest.raises(SpirError, match=r"the model takes \[1, 5, 5\] a sample, and the data holds \[5, 5\]"):
        driver.opt(first, "fold-bn", data=X[:, 0])
    with pytest.raises(SpirError, match="seed = -1 is no seed"):
        driver.opt(first, "fold-bn", seed=-1)


@pytest.mark.parametrize("change", [lambda x: x[:, ::-1], lambda x: x.astype(">f4"), lambda x: x.astype(np.longdouble)])
def test_data_may_be_reversed_big_endian_or_longer_than_float64(change):
    data = change(np.random.default_rng(0).standard_normal((4, 3, 5, 5)).astype(np.float32))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU())
    snn = spir.compile(model, "@stem", data=data, example=data)
    assert snn(data).shape == (4, 2, 3, 3)


def test_raw_bytes_are_refused_as_data_and_as_input():
    x = np.random.default_rng(0).random((4, 3, 5, 5), dtype=np.float32)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU())
    raw = (255 * x).astype(np.uint8)
    for call in (
        lambda: spir.compile(model, "@stem", data=raw, example=x),
        lambda: spir.compile(model, "@stem", data=x)(raw),
    ):
        with pytest.raises(SpirError, match="holds bytes, and the network was read on floats"):
            call()


def test_a_module_that_reads_trains_is_called_with_trains():
    text = """module {
  input %x : tensor<2, spikes[3, bits, 0..7] * 0.5>
  %y = integrate %x : tensor<2, int[0, 7] * 0.5>
  output %y
}"""
    snn = spir.compile(spir.parse(text), "")
    frames = np.array([[[1, 0]], [[0, 1]], [[1, 1]]])
    assert snn(frames).tolist() == [[2.5, 1.5]]
    assert spir.compile(spir.parse(text), "", backend="hw").report(frames).samples == 1
