"""The spir command: its output, one JSON object, its exit codes, and no traceback for a mistake of a user."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import spir
from spir import cli, driver, store
from spir.contracts import Exact
from spir.errors import SpirError
from spir.profile import HOME, Profile, profiles
from spir.rewriting import Pass
from spir.text import parse

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 1, 4, 4)).astype(np.float32)
MODELS = """
import functools
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(*small())

ready = small()
class Zoo:
    best = ready
def sized(width): return small()
def nothing(): return None
def failing(): raise ZeroDivisionError("inside the factory")
partial = functools.partial(sized, 3)
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with models and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "models_here.py").write_text(MODELS)
    (tmp_path / "raising_here.py").write_text("import json\njson.loads('{')\n")
    (tmp_path / "incomplete_here.py").write_text("import a_module_that_is_nowhere\n")
    np.savez(tmp_path / "d.npz", x=X, y=np.array([0, 1, 0, 1, 0, 1]), labels=np.arange(3), column=np.zeros((6, 1)))
    yield tmp_path
    for name in ("models_here", "raising_here", "incomplete_here"):
        sys.modules.pop(name, None)


@pytest.fixture
def saved(here, capsys) -> Path:
    assert cli.main(["compile", "models_here:small", "--passes", "@stem{bits=4}", "--data", "d.npz", "-o", "net"]) == 0
    capsys.readouterr()
    return here / "net"


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Runs a command; the exit code, stdout and stderr, none of which shows a traceback."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def fails(call, code: int, *arguments: str) -> str:
    """The text of an error: on stderr for people, the same findings on stdout as JSON for programs."""
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    found, out, quiet = call(*arguments, "--json")
    assert (found, quiet) == (code, "")
    read = json.loads(out)
    assert read["schema"] == "spir-error/1"
    assert [e["message"] for e in read["errors"]]
    assert all(f"error[{e['code']}]: {e['message']}" in err for e in read["errors"])
    return err


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["small", "Small", "ready", "Zoo.best"])
def test_compile_takes_a_function_a_class_or_a_model_and_writes_an_artifact(here, call, model):
    code, out, err = call(
        "compile",
        f"models_here:{model}",
        "--passes",
        "@stem{bits=4}",
        "--data",
        "d.npz",
        "-o",
        "out",
        "--backend",
        "hw",
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "wrote out"
    step = 'quantize{layers="*", bits=4, weights=none, input=signed, float_weights=off}'
    told = f"{step}: calibrated; checked on 4 calibration samples: %"
    assert any(line.startswith(told) for line in out.splitlines())
    assert driver.load(here / "out").backend.name == "hw"


def test_compile_takes_a_shape_where_no_data_is_needed(here, call):
    assert call("compile", "models_here:small", "--passes", "", "--example-shape", "1, 4,4", "-o", "out")[0] == 0
    assert driver.load(here / "out").module.input.type.shape == (1, 4, 4)


def test_compile_reads_ir_text_with_the_arrays_beside_it(here, saved, call):
    for name in ("module.spir", "weights.safetensors"):
        (here / Path(name).with_stem("net").name).write_bytes((saved / name).read_bytes())
    assert call("compile", "net.spir", "--passes", "", "-o", "again")[0] == 0
    assert driver.load(here / "again").module == driver.load(saved).module


def test_compile_hands_on_seed_and_check(here, call):
    arguments = ("--passes", "canonicalize", "--data", "d.npz:x", "--seed", "7", "--check", "off", "-o", "out")
    assert call("compile", "models_here:small", *arguments)[0] == 0
    source = driver.load(here / "out").source
    assert (source["seed"], source["check"]) == ("7", "off")


def test_run_gives_accuracy_outputs_and_a_report(here, saved, call):
    snn = driver.load(saved)
    code, out, err = call("run", "net", "--data", "d.npz", "--save-output", "o.npz", "--report", "--backend", "hw")
    accuracy = 100 * np.mean(snn(X).argmax(axis=1) == [0, 1, 0, 1, 0, 1])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("6 samples on hw in ")
    assert lines[1] == f"accuracy {accuracy:.2f} %"
    assert "backend hw, 6 samples; figures a sample" in lines
    assert lines[-1] == "wrote o.npz"
    with np.load(here / "o.npz") as read:
        np.testing.assert_array_equal(read["output"], snn(X))


def test_run_reports_on_a_chip(here, saved, call):
    arguments = ("run", "net", "--data", "d.npz", "--report", "--profile", "darwin3")
    code, out, err = call(*arguments, "--json")
    found = json.loads(out)["report"]
    assert (code, err) == (0, "")
    assert found["registers"] == {"owner": "darwin3", "sum_bits": 16, "state_bits": 16, "assumed": []}
    assert [e["prices"]["synaptic_operation"] for e in found["energies"]] == [0.03, 5.47]
    assert "  darwin3: press release on Darwin3" in call(*arguments)[1]
    assert "there is no profile 'darwin4'" in fails(call, 3, *arguments[:-1], "darwin4")
    assert "add --report" in fails(call, 2, "run", "net", "--data", "d.npz", "--profile", "darwin3")


def test_chips_are_listed_with_their_figures_and_guesses(call):
    code, out, _ = call("list", "profiles")
    found = json.loads(call("list", "profiles", "--json")[1])
    assert code == 0
    assert [e["name"] for e in found["entries"]] == profiles() == [line.split(" ")[0] for line in out.splitlines()[:-1]]
    assert "darwin3              weight_bits=8, sum_bits=16, state_bits=16" in out
    assert "largest_divisor=255 (assumed)" in out
    for entry in found["entries"]:
        chip = Profile.load(entry["file"])
        assert (entry["weight_bits"], entry["state_bits"]) == (chip.weight_bits, chip.state_bits)
        assert entry.get("fan_in") == chip.fan_in


def test_a_chip_of_ones_own_is_a_path_and_a_saved_network_says_which_it_was_for(here, saved, call):
    (here / "chips").mkdir()
    (here / "chips" / "mine.toml").write_text((HOME / "ideal.toml").read_text())
    spir.compile(driver.load(saved).module, "", backend="hw{profile=./chips/mine.toml}").save(here / "net")
    assert call("run", "net", "--data", "d.npz")[0] == 0
    (here / "chips" / "mine.toml").unlink()
    with pytest.raises(SpirError) as caught:
        driver.load(here / "net")
    assert 'net was saved for hw{profile="./chips/mine.toml"}; any other backend' in str(caught.value)
    assert driver.load(here / "net", "serial")(X).shape[0] == len(X)


def test_a_report_lists_what_registers_did_not_hold(saved, call):
    arguments = ("run", "net", "--data", "d.npz", "--report", "--backend", "hw{accumulator=8, overflow=saturate}")
    (first, *_) = json.loads(call(*arguments, "--json")[1])["report"]["overflows"]
    assert first["times"] > 0
    head = "overflows on hw{accumulator=8, overflow=saturate}: "
    assert f"{head}{first['value']} {first['register']} {first['times']:.4g} in" in call(*arguments)[1]
    plain = [a for a in arguments if a != "--report"]
    (found, *_) = json.loads(call(*plain, "--json")[1])["overflows"]
    assert (found["value"], found["register"]) == (first["value"], first["register"])
    assert found["times"] == round(first["times"] * len(X))
    assert f"overflows: {found['value']} {found['register']} {found['times']}" in call(*plain)[1]


def test_arrays_may_be_named(here, saved, call):
    np.savez(here / "named.npz", images=X, classes=driver.load(saved)(X).argmax(axis=1))
    assert "accuracy 100.00 %" in call("run", "net", "--data", "named.npz:images,classes")[1]
    assert "accuracy" not in call("run", "net", "--data", "named.npz:images")[1]
    assert "accuracy" in call("run", "net", "--data", "d.npz:")[1], "no names are the default names"


def test_opt_prints_the_module_after_the_passes_that_are_asked_for(here, saved, call):
    first, second, *_ = (s.module for s in driver.compile(parse_model(), "canonicalize, fold-bn", data=X).stages)
    (here / "in.spir").write_text(str(first))
    (here / "in.safetensors").write_bytes(store.to_bytes(first.arrays()))
    assert call("opt", "in.spir")[1] == str(first)
    out = call("opt", "in.spir", "--passes", "canonicalize, fold-bn", "--print-after", "canonicalize")[1]
    assert out == f"// after canonicalize\n{second}"
    out = call("opt", "in.spir", "--passes", "canonicalize, fold-bn", "--print-after", "all")[1]
    assert [line for line in out.splitlines() if line.startswith("//")] == ["// after canonicalize", "// after fold-bn"]


def parse_model():
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


def test_opt_writes_text_and_arrays_that_read_back(here, call):
    module = driver.compile(parse_model(), "", example=X).module
    (here / "in.spir").write_text(str(module))
    (here / "w.safetensors").write_bytes(store.to_bytes(module.arrays()))
    arguments = ("--weights", "w.safetensors", "--data", "d.npz", "--passes", "calibrate-range, quantize")
    assert call("opt", "in.spir", *arguments, "-o", "deep/out.spir")[0] == 0
    arrays = here / "deep" / "out.safetensors"
    read = parse((here / "deep" / "out.spir").read_text(), store.from_bytes(arrays.read_bytes(), arrays))
    assert read == driver.opt(module, "calibrate-range, quantize", data=X).module


class Telling(Pass):
    name = "telling"

    def contract(self):
        return Exact()

    def run(self, module, context):
        context.note("%pool: 6 neurons an output\n4 windows")
        return module


def test_notes_are_shown_and_what_opt_prints_parses(here, saved, call, monkeypatch):
    monkeypatch.setattr("spir.pipeline.find", lambda *_: Telling)
    arguments = ("opt", "net/module.spir", "--passes", "telling")
    code, out, _ = call(*arguments, "--print-after", "telling")
    lines = out.splitlines()
    assert (code, lines[:3]) == (0, ["// after telling", "//   %pool: 6 neurons an output", "//   4 windows"])
    module = driver.load(saved).module
    assert parse(out, module.arrays()) == module
    (entry,) = json.loads(call(*arguments, "--json")[1])["journal"]
    assert entry["notes"] == ["%pool: 6 neurons an output\n4 windows"]
    out = call("compile", "net/module.spir", "--passes", "telling", "-o", "out")[1]
    at = out.splitlines().index("    %pool: 6 neurons an output")
    assert out.splitlines()[at + 1] == "    4 windows"
    report = str(driver.load("out").report(X)).splitlines()
    at = next(i for i, line in enumerate(report) if line.startswith("  telling"))
    assert report[at + 2 : at + 4] == ["      %pool: 6 neurons an output", "      4 windows"]


def test_opt_and_compile_check_on_data(here, call):
    arguments = ("--passes", "canonicalize, fold-bn", "--data", "d.npz", "--check", "data")
    code, out, _ = call("compile", "models_here:small", *arguments, "-o", "out", "--stages", "stages")
    assert code == 0
    assert "4 calibration) and 6 calibration samples: nothing changed; " in out.splitlines()[0]
    assert out.splitlines()[-2:] == ["wrote stages: 3 stages", "wrote out"]
    read = json.loads(call("opt", "stages/00-frontend.spir", *arguments, "--json")[1])
    assert all(e["checked"].endswith(" and 6 calibration samples") for e in read["journal"])
    assert "mean" in read["journal"][0]
    without = ("opt", "stages/00-frontend.spir", "--passes", "fold-bn", "--check", "data")
    assert "fix: give data=, or check='probes'" in fails(call, 3, *without)


# --- diff ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stages(here, capsys) -> Path:
    arguments = ("--passes", "@stem{bits=4}", "--data", "d.npz", "-o", "net", "--stages", "stages")
    assert cli.main(["compile", "models_here:small", *arguments]) == 0
    capsys.readouterr()
    return here / "stages"


@pytest.mark.parametrize("backend", [(), ("--backend", "hw")])
def test_diff_of_networks_that_agree_exits_with_0(stages, call, backend):
    code, out, err = call("diff", "stages/05-propagate-scales.spir", "net", "--data", "d.npz:x", *backend)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "net against stages/05-propagate-scales.spir"
    assert out.splitlines()[-1] == "nothing differs"


def test_diff_shows_every_shared_layer_and_exits_with_1(stages, call):
    arguments = ("diff", "stages/02-fold-bn.spir", "net", "--data", "d.npz")
    code, out, _ = call(*arguments)
    assert code == 1
    assert "first to differ: %" in out.splitlines()[-1]
    code, out, _ = call(*arguments, "--json")
    read = json.loads(out)
    assert (code, read["schema"], read["samples"], read["differs"]) == (1, "spir-diff/1", 6, True)
    assert (read["reference"], read["candidate"]) == ("stages/02-fold-bn.spir", "net")
    relu, fc = read["layers"][0], read["layers"][-1]
    assert (relu["upstream"], relu["elements"]) == (0, 48)
    assert fc["upstream"] > 0
    assert read["first"] == relu["value"]


def test_diff_of_two_compilations(here, saved, call):
    arguments = ("--passes", "@stem{bits=6}", "--data", "d.npz", "-o", "six")
    assert call("compile", "models_here:small", *arguments)[0] == 0
    assert call("diff", "six", "net", "--data", "d.npz")[0] == 1
    assert call("diff", "six", "six", "--data", "d.npz")[0] == 0


def test_mistakes_of_diff_are_refused_with_the_way_out(here, saved, call):
    shutil.copy(Path("net") / "module.spir", "bare.spir")
    np.savez(here / "bytes.npz", x=np.zeros((2, 1, 4, 4), dtype=np.uint8))
    for arguments, code, message in (
        (("net", "nowhere", "--data", "d.npz"), 4, "nowhere is not there"),
        (("net", "nowhere.spir", "--data", "d.npz"), 4, "nowhere.spir cannot be read"),
        (("net", "models_here.py", "--data", "d.npz"), 3, "models_here.py is no artifact"),
        (("net", "bare.spir", "--data", "d.npz"), 3, "error[weights]"),
        (("net", "net", "--data", "d.npz:y"), 3, "the network takes [N, 1, 4, 4], and the data is [6]"),
        (("net", "net", "--data", "bytes.npz"), 3, "the data holds bytes"),
        (("net", "net", "--data", "d.npz", "--backend", "hv"), 3, "there is no backend 'hv'"),
    ):
        err = fails(call, code, "diff", *arguments)
        assert message in err, arguments
        assert "fix: " in err


@pytest.mark.parametrize("kind", cli.KINDS)
def test_list_names_everything_of_a_kind_with_its_options(call, kind):
    code, out, _ = call("list", kind)
    assert code == 0
    read = json.loads(call("list", kind, "--json")[1])
    assert (read["schema"], read["kind"]) == ("spir-list/1", kind)
    assert read["entries"]
    for entry in read["entries"]:
        assert entry["summary"]
        assert f"{entry['name']:<20} {entry['summary']}" in out.splitlines()
        for option, shown in entry["options"].items():
            assert f"{option}={shown['default']}: {shown['doc']}" in out
    if kind == "passes":
        assert {e["name"]: e for e in read["entries"]}["quantize"]["options"]["bits"]["default"] == "8"


def test_the_demo_shows_three_stages_and_a_table_without_mismatches(call):
    code, out, err = call("demo", "--images", "20", "--json")
    assert (code, err) == (0, "")
    read = json.loads(out)
    assert (read["schema"], read["images"]) == ("spir-demo/1", 20)
    assert list(read["stages"]) == ["frontend", "propagate-scales", "fuse-neuron"]
    rows = {row["network"]: row for row in read["rows"]}
    assert list(rows) == ["float network", "integer network", "serial", "hw{collapse=off}", "hw"]
    for name in ("serial", "hw{collapse=off}", "hw"):
        assert rows[name]["mismatches"] == 0
        assert rows[name]["compared"] > 20 * 10_000
        assert rows[name]["spikes"] == rows["serial"]["spikes"] > 0
        assert rows[name]["accuracy"] == rows["integer network"]["accuracy"] >= 0.9


def test_demo_fails_with_1_where_networks_differ(call, monkeypatch):
    monkeypatch.setattr("spir.demo.show.run", lambda *_: ("text", {"schema": "spir-demo/1"}, True))
    assert call("demo") == (1, "text\n", "")


JSON = {
    "spir-compile/1": ("compile", "models_here:small", "--passes", "fold-bn", "--data", "d.npz", "-o", "out"),
    "spir-run/1": ("run", "net", "--data", "d.npz", "--report", "--save-output", "o.npz"),
    "spir-opt/1": ("opt", "net/module.spir", "--weights", "net/weights.safetensors", "--passes", "fuse-neuron"),
    "spir-list/1": ("list", "recipes"),
}


@pytest.mark.parametrize("schema", JSON)
def test_json_is_one_object_of_a_versioned_schema(saved, call, schema):
    code, out, err = call(*JSON[schema], "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["schema"] == schema
    assert out.count("\n") == 1


def test_the_command_runs_as_a_program(tmp_path):
    arguments = [sys.executable, "-m", "spir.cli", "list", "passes", "--json"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "fold-bn" in {e["name"] for e in json.loads(done.stdout)["entries"]}
    assert done.stderr == ""


# --- exit codes ---------------------------------------------------------------------------------------------------


class Broken(Pass):
    name = "broken"

    def contract(self):
        return Exact()

    def rewrite(self, node, rewriter):
        return node.operands[0] if node.op.name == "relu" else None


def test_a_broken_contract_exits_with_1(here, call, monkeypatch):
    monkeypatch.setattr("spir.pipeline.find", lambda *_: Broken)
    arguments = ("--passes", "broken", "--example-shape", "1,4,4", "-o", "out")
    err = fails(call, 1, "compile", "models_here:small", *arguments)
    assert "broken promises exact" in err
    assert "reproducer: " in err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [(), ("nothing",), ("list",), ("list", "nothing"), ("compile", "m:f"), ("run", "net"), ("demo", "--images", "x")],
)
def test_a_command_line_that_argparse_refuses_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: spir")


def test_a_refusal_of_spir_exits_with_3(here, call):
    err = fails(call, 3, "compile", "models_here:small", "--passes", "fold-bm", "--data", "d.npz", "-o", "out")
    assert "did you mean 'fold-bn'?" in err


def test_a_file_that_is_not_there_exits_with_4(here, saved, call):
    text = "error[io]: no.npz cannot be read: No such file or directory\n        fix: check the path\n"
    assert fails(call, 4, "run", "net", "--data", "no.npz") == text
    assert fails(call, 4, "run", "net", "--data", "no.npz:x") == text
    assert "no.spir cannot be read" in fails(call, 4, "opt", "no.spir")
    assert "no.safetensors cannot be read" in fails(call, 4, "opt", "net/module.spir", "--weights", "no.safetensors")


def test_an_output_that_cannot_be_written_exits_with_4(here, saved, call):
    err = fails(call, 4, "run", "net", "--data", "d.npz", "--save-output", "nowhere/o.npz")
    assert err.startswith("error[io]: nowhere/o.npz: No such file or directory\n")
    weights = ("--weights", "net/weights.safetensors")
    err = fails(call, 4, "opt", "net/module.spir", *weights, "-o", "d.npz/out.spir")
    assert err.startswith("error[io]: d.npz/out.s")
    arguments = ("--passes", "", "--data", "d.npz", "-o", "d.npz/out")
    assert fails(call, 4, "compile", "models_here:small", *arguments).startswith(
        "error[io]: d.npz/out cannot be written"
    )


def test_an_interruption_exits_with_130(here, saved, call, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "load", interrupted)
    assert call("run", "net", "--data", "d.npz") == (130, "", "interrupted\n")


# --- mistakes -----------------------------------------------------------------------------------------------------


def npz(**arrays) -> bytes:
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    return packed.getvalue()


def npy() -> bytes:
    packed = io.BytesIO()
    np.save(packed, X)
    return packed.getvalue()


def damaged() -> bytes:
    content = bytearray(npz(x=X))
    content[120:140] = bytes(20)
    return bytes(content)


NO_NPZ = {
    "a text": b"x,y\n1,2\n",
    "nothing": b"",
    "an npy": npy(),
    "a truncated npz": npz(x=X)[:-30],
    "the head of an npz": npz(x=X)[:50],
    "a damaged npz": damaged(),
    "an npz of objects": npz(x=np.array([{}, []], dtype=object)),
    "an npz of nothing": npz(),
    "a pickle": b"\x80\x04\x95\x00\x00.",
}


@pytest.mark.parametrize("what", NO_NPZ)
def test_data_that_is_no_npz_is_refused(here, saved, call, what):
    (here / "bad.npz").write_bytes(NO_NPZ[what])
    assert fails(call, 3, "run", "net", "--data", "bad.npz") == (
        "error[data]: bad.npz holds no arrays\n"
        "        fix: give an .npz file, with :x or :x,y for the names of its arrays (default x, then y)\n"
    )


def test_no_damage_of_an_npz_escapes_as_another_error(here):
    good, refusals = npz(x=X, y=np.arange(6)), 0
    for place in range(0, len(good), 5):
        content = bytearray(good)
        content[place] ^= 0x55
        (here / "bad.npz").write_bytes(content)
        code = code_of_data("bad.npz")
        assert code in ("", "data"), place
        refusals += code == "data"
    assert refusals > 50


def code_of_data(path: str) -> str:
    """The code of the refusal, if any."""
    try:
        cli._data(path)
    except SpirError as refusal:
        return refusal.code
    return ""


def test_an_array_that_is_not_there_is_refused_with_those_that_are(here, saved, call):
    assert fails(call, 3, "run", "net", "--data", "d.npz:images") == (
        "error[data]: d.npz holds no array 'images'\n        fix: one of: x, y, labels, column\n"
    )
    np.savez(here / "other.npz", images=X)
    assert "other.npz holds no array 'x'" in fails(call, 3, "run", "net", "--data", "other.npz")


@pytest.mark.parametrize(("name", "shape"), [("labels", "[3] of int64"), ("column", "[6, 1] of float64")])
def test_labels_that_do_not_go_with_the_outputs_are_refused(here, saved, call, name, shape):
    assert fails(call, 3, "run", "net", "--data", f"d.npz:x,{name}") == (
        f"error[data]: labels {shape} do not go with outputs [6, 2]\n"
        "        fix: give one class number a sample, or name x only\n"
    )


MODEL_MISTAKES = [
    ("models_here", "'models_here' names no model", "package.module:factory, or a .spir file"),
    (":small", "':small' names no model", "package.module:factory"),
    ("models_here:", "'models_here:' names no model", "package.module:factory"),
    ("no_such_package:f", "No module named 'no_such_package'", "run from the folder that holds the package"),
    ("incomplete_here:f", "No module named 'a_module_that_is_nowhere'", "run from the folder"),
    ("models_here:large", "models_here has no large", "name a function, class or model there"),
    ("models_here:Zoo.worst", "models_here has no Zoo.worst", "name a function"),
    ("raising_here:f", "'raising_here:f' raises JSONDecodeError: Expecting property name", "a module that imports"),
    ("models_here:sized", "raises TypeError: sized() missing 1 required positional", "that takes no arguments"),
    ("models_here:failing", "raises ZeroDivisionError: inside the factory", "at: "),
    ("models_here:nothing", "no frontend reads a NoneType", "give a torch.nn.Module"),
    ("models_here:partial", "no frontend reads a partial", "give a torch.nn.Module"),
    ("models_here:functools", "no frontend reads a module", "give a torch.nn.Module"),
    ("..:f", "'..:f'", ""),
]


@pytest.mark.parametrize(("model", "message", "fix"), MODEL_MISTAKES, ids=[m[0] for m in MODEL_MISTAKES])
def test_a_model_that_cannot_be_had_exits_with_2(here, call, model, message, fix):
    err = fails(call, 2, "compile", model, "--passes", "fold-bn", "--data", "d.npz", "-o", "out")
    assert message in err
    assert fix in err


def test_the_place_where_the_users_code_raises_is_shown(here, call):
    err = fails(call, 2, "compile", "models_here:failing", "--passes", "", "--data", "d.npz", "-o", "out")
    line = MODELS.splitlines().index('def failing(): raise ZeroDivisionError("inside the factory")') + 1
    assert f"at: {here / 'models_here.py'} line {line}" in err


@pytest.mark.parametrize("shape", ["3,", "0,3", "-1,3", "1.5", "a", "³", "9" * 30, "99999999,99999999"])
def test_a_shape_that_is_none_exits_with_2(here, call, shape):
    arguments = ("--passes", "", f"--example-shape={shape}", "-o", "out")
    assert fails(call, 2, "compile", "models_here:small", *arguments) == (
        f"error[usage]: --example-shape {shape!r} is no shape\n        fix: positive numbers, such as 3,32,32\n"
    )


OTHER_MISTAKES = [
    (("opt", "net/module.spir", "--print-after", "fold-bn"), 2, "--print-after fold-bn: no such pass runs"),
    (("opt", "net/module.spir", "--passes", "derive-thresholds"), 3, "works on integers, not spikes"),
    (("opt", "d.npz"), 3, "error[syntax]: d.npz is no text"),
    (("opt", "models_here.py"), 3, "error[syntax]: did not expect 'import'"),
    (("opt", "net/module.spir", "--weights", "d.npz"), 3, "d.npz is no safetensors file"),
    (("run", "nowhere", "--data", "d.npz"), 4, "nowhere is not there"),
    (("run", "net", "--data", "d.npz", "--backend", "hv"), 3, "there is no backend 'hv'"),
    (("run", "net", "--data", "d.npz:y"), 3, "the network takes [N, 1, 4, 4], and the input is [6]"),
    (("demo", "--images", "0"), 2, "--images 0 is outside 1..1000"),
    (("demo", "--images", "1001"), 2, "--images 1001 is outside 1..1000"),
    (("compile", "models_here:small", "--passes", "@stem", "-o", "o"), 3, "the input shape is not known"),
    (("compile", "models_here:small", "--passes", "", "--data", "d.npz", "--seed=-1", "-o", "o"), 2, "seed = -1"),
    (("compile", "models_here:small", "--passes", "", "--data", "d.npz", "--check", "x", "-o", "o"), 2, "check = 'x'"),
    (("compile", "models_here:small", "--passes", "", "--data", "d.npz", "-o", "."), 3, "holds files that are no art"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"), OTHER_MISTAKES, ids=lambda v: " ".join(v)[:60] if isinstance(v, tuple) else None
)
def test_a_mistake_is_one_located_error(saved, call, arguments, code, message):
    assert message in fails(call, code, *arguments)


def test_opt_never_writes_text_where_its_arrays_go(here, saved, call):
    shutil.copy(Path("net") / "module.spir", "in.spir")
    shutil.copy(Path("net") / "weights.safetensors", "in.safetensors")
    weights = Path("in.safetensors").read_bytes()
    assert "fix: -o in.spir" in fails(call, 2, "opt", "in.spir", "-o", "in.safetensors")
    assert Path("in.safetensors").read_bytes() == weights
