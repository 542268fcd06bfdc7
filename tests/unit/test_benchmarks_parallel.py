"""benchmarks.parallel_speed and parallel_accuracy: what they time is right, and what they count is found."""

from __future__ import annotations

import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import parallel_accuracy, parallel_speed
from benchmarks.hw_speed import folded
from benchmarks.networks import resnet20
from benchmarks.parallel_accuracy import Compilation, Lossless, Tally, Watched, levels
from benchmarks.parallel_speed import (
    ANN,
    FORMATS,
    JELLY,
    SERIAL,
    Pair,
    Row,
    Worker,
    call_float,
    fused_name,
    in_place,
    peak,
    quartiles,
    ratios,
)
from spir.equality import compare
from spir.frontends.modules.qcfs import swap_relu
from spir.ir import Array

ECHO = """
import json, sys
for line in sys.stdin:
    command = json.loads(line)
    name = command.pop("do")
    if name == "end":
        break
    print(json.dumps({"error": "no"} if name == "fail" else {"did": name, **command}), flush=True)
"""


def small() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def images(count: int = 20) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (count, 1, 6, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def compilation() -> Compilation:
    x = images()
    model = swap_relu(small(), 4, torch.from_numpy(x))
    return Compilation.of("small", model, "@parallel{steps=4}", x)


def test_the_float_network_that_is_timed_is_the_network():
    torch.manual_seed(0)
    model = resnet20()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = model(x)
    timed = in_place(folded(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in timed.modules())
    assert timed.code.count("inplace = True") == 19
    for layout in FORMATS.values():
        torch.testing.assert_close(call_float(timed, x, layout)(), wanted, rtol=1e-4, atol=1e-4)


def test_a_relu_does_not_write_over_what_another_reads():
    class Twice(nn.Module):
        def forward(self, x):
            y = x + 1
            return nn.functional.relu(y) + y

    with pytest.raises(ValueError, match="another reader"):
        in_place(Twice())


def test_a_pair_is_one_network_fused_and_stepped():
    x = images()
    pair = Pair.of(small(), x, 4)
    assert not any(node.type.train for node in pair.fused.module.nodes if node.op.name == "conv2d")
    assert any(node.type.train for node in pair.stepped.module.nodes if node.op.name == "conv2d")
    given = torch.from_numpy(x)
    assert torch.equal(pair.fused(given), pair.stepped(given))


def test_ratios_are_those_of_one_round():
    one, other = fused_name(4), fused_name(64)
    rows = [Row(16, ANN, (1.0, 2.0, 4.0)), Row(16, one, (1.0, 3.0, 8.0)), Row(16, other, (2.0, 6.0, 16.0))]
    found = {(r.candidate, r.to): (r.low, r.median, r.high) for r in ratios(rows, (4, 64))}
    assert found == {(one, ANN): (1.25, 1.5, 1.75), (other, ANN): (2.5, 3.0, 3.5), (other, one): (2.0, 2.0, 2.0)}
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_the_slow_candidates_are_compared_at_their_own_steps():
    rows = [Row(128, name, (seconds,)) for name, seconds in ((fused_name(32), 1.0), (SERIAL, 30.0), (JELLY, 60.0))]
    found = {(r.candidate, r.to): r.median for r in ratios(rows, (4, 64))}
    assert found == {
        (fused_name(32), SERIAL): 1 / 30,
        (fused_name(32), JELLY): 1 / 60,
        (SERIAL, JELLY): 0.5,
    }


def test_a_missing_environment_is_said_and_left_out(tmp_path, capsys):
    assert Worker.start(tmp_path / "none", tmp_path, images(), 1) is None
    assert "make_env.sh" in capsys.readouterr().err


@pytest.mark.usefixtures("spir_data")
def test_a_worker_answers_refuses_and_ends(tmp_path, monkeypatch):
    script = tmp_path / "echo.py"
    script.write_text(ECHO, encoding="utf-8")
    monkeypatch.setattr(parallel_speed, "WORKER", script)
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    worker = Worker.start(tmp_path, tmp_path, images(2), 1)
    assert worker.answer["did"] == "convert"
    assert np.array_equal(np.load(worker.answer["calibration"]), images(2))
    with pytest.raises(RuntimeError, match="refuses 'fail': no"):
        worker.ask("fail")
    with pytest.raises(RuntimeError, match="ended at 'end'"):
        worker.ask("end")
    worker.close()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_a_peak_is_what_a_call_takes():
    assert 30e6 < peak(lambda: np.ones(4_000_000).sum(), calls=1) < 40e6
    assert peak(lambda: None) < 4e6


@pytest.mark.parametrize("way", parallel_accuracy.WAYS)
def test_no_way_differs(compilation, way):
    watched, x = compilation.watched(way), images()
    found = compare(compilation.integers, watched.module, watched, x)
    assert sum(a.active for a in found) > 0
    assert not any(a.mismatches for a in found)
    assert watched.frames.mismatches == watched.counts.mismatches == 0
    assert (watched.frames.elements > 0) == (watched.counts.elements > 0) == (way != "serial")
    assert len(np.concatenate(watched.classes)) == len(x)


def test_another_network_differs_in_everything(compilation):
    broken = compilation.watched("serial")
    nodes = list(broken.module.nodes)
    at = next(i for i, node in enumerate(nodes) if node.op.name == "conv2d")
    weight = Array.of(-nodes[at].op.weight.values)
    nodes[at] = attrs.evolve(nodes[at], op=attrs.evolve(nodes[at].op, weight=weight))
    other = attrs.evolve(broken.module, nodes=tuple(nodes))
    watched = Watched(other, parallel_accuracy.Interpreted(other), (broken.module, broken.executable))
    assert any(a.mismatches for a in compare(compilation.integers, other, watched, images()))
    assert watched.frames.mismatches > 0
    assert watched.counts.mismatches > 0


def test_arrays_of_other_shapes_differ_everywhere():
    tally = Tally()
    tally.add(np.zeros(6), np.zeros(5))
    tally.add(np.zeros(6), np.array([0, 0, 1, 0, 0, 1]))
    assert (tally.elements, tally.mismatches) == (12, 8)


def test_levels_are_read_from_the_network():
    assert levels(swap_relu(small(), 8)) == 8


def test_outcomes_are_read_as_written(tmp_path):
    values = {field.name: 1 if field.type in ("int", "float") else "a" for field in attrs.fields(Lossless)}
    rows = [Lossless(**values), parallel_accuracy.Free(*("a", "b", *10 * (1,)))]
    parallel_accuracy.write(tmp_path / "out.json", rows)
    assert parallel_accuracy.read(tmp_path / "out.json") == rows
    assert parallel_accuracy.read(tmp_path / "none.json") == []


def test_a_network_without_weights_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel_accuracy, "WEIGHTS", tmp_path)
    assert parallel_accuracy.lossless("qcfs_lenet5", 1, 1, set()) == []
    assert "train_qcfs qcfs_lenet5" in capsys.readouterr().err
