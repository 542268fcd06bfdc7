"""Reports: spikes, operations, energy and memory against counts made by hand, one JSON schema, one picture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spir
from spir import interpreter, report
from spir.errors import SpirError
from spir.profile import Profile
from spir.ranges import analyse
from spir.types import Int

BACKENDS = ("serial", "parallel", "hw", "hw{collapse=off}")
BITS = 5
X = np.random.default_rng(3).normal(size=(7, 2, 7, 6)).astype(np.float32)


class Bordered(nn.Module):
    """Strides, paddings, dilation, groups, an overlapping pool, a residual join, a train with two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, stride=2, padding=(2, 1))
        self.conv2 = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2)
        self.conv3 = nn.Conv2d(4, 3, (2, 1), padding=(1, 0), stride=(2, 1))
        self.fc = nn.Linear(9, 3)

    def forward(self, x):
        a = torch.relu(self.conv1(x))
        b = torch.relu(self.conv2(a) + a)
        c = torch.relu(self.conv3(F.avg_pool2d(b, 2, stride=1)))
        return self.fc(torch.flatten(c, 1)[:, :9])


@pytest.fixture(scope="module")
def compiled() -> spir.Compiled:
    torch.manual_seed(1)
    return spir.compile(Bordered().eval(), f"@stem{{bits={BITS}}}", data=X, seed=2)


def reach(f, shape) -> np.ndarray:
    """How often each element of an input is counted in the sum of what ``f`` makes of it: one element at a time."""
    found = np.zeros(shape)
    for index in np.ndindex(shape):
        one = torch.zeros(1, *shape, dtype=torch.float64)
        one[(0, *index)] = 1
        found[index] = float(f(one).sum())
    return found


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float64)


def by_hand(shapes) -> dict[str, np.ndarray]:
    """Synapses that leave each element of the four trains, counted on kernels of ones."""
    return {
        "input": reach(lambda x: F.conv2d(x, ones(4, 2, 3, 3), stride=2, padding=(2, 1)), shapes["input"]),
        "a": reach(lambda x: F.conv2d(x, ones(4, 2, 3, 3), padding=2, dilation=2, groups=2), shapes["a"]) + 1,
        "b": reach(
            lambda x: F.conv2d(
                F.conv2d(x, ones(4, 1, 2, 2), groups=4), ones(3, 4, 2, 1), padding=(1, 0), stride=(2, 1)
            ),
            shapes["b"],
        ),
        "c": reach(lambda x: F.linear(torch.flatten(x, 1)[:, :9], ones(3, 9)), shapes["c"]),
    }


def codes(compiled) -> dict[str, np.ndarray]:
    """The integer network's codes at the input and after each activation, from the reference interpreter."""
    module = next(s.module for s in compiled.stages if s.name == "propagate-scales")
    stored = interpreter.run(module, X, "*")
    names = [n.result for n in module.nodes if n.op.name in ("quantize", "requant")]
    assert len(names) == 4
    assert all(isinstance(module.types[n].encoding, Int) for n in names)
    return dict(zip(("input", "a", "b", "c"), (stored[n] for n in names), strict=True))


def popcount(integers: np.ndarray) -> np.ndarray:
    """Ones in the two's complement of BITS bits."""
    return np.vectorize(lambda v: (int(v) % 2**BITS).bit_count())(integers)


@pytest.mark.parametrize("backend", BACKENDS)
def test_spikes_are_the_ones_of_the_integer_networks_codes(compiled, backend, tmp_path):
    compiled.save(tmp_path / "net")
    found = spir.load(tmp_path / "net", backend).report(X)
    assert found.samples == 7
    for layer, values in zip(found.layers, codes(compiled).values(), strict=True):
        assert layer.spikes == popcount(values).sum() / 7
        assert layer.negative == (values < 0).sum() / 7
        assert layer.neurons == values[0].size
        assert layer.steps == BITS
        assert layer.rate == popcount(values).sum() / (7 * BITS * values[0].size)
    assert found.spikes == pytest.approx(sum(layer.spikes for layer in found.layers), rel=1e-15)
    assert all(layer.spikes > 0 for layer in found.layers)
    assert found.layers[0].negative > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_synaptic_operations_are_spikes_times_the_synapses_that_each_one_reaches(compiled, backend, tmp_path):
    compiled.save(tmp_path / "net")
    found = spir.load(tmp_path / "net", backend).report(X)
    values = codes(compiled)
    expected = by_hand({name: v.shape[1:] for name, v in values.items()})
    for layer, (name, integers) in zip(found.layers, values.items(), strict=True):
        assert layer.synaptic_operations == (popcount(integers) * expected[name]).sum() / 7, name
    assert found.synaptic_operations == pytest.approx(sum(x.synaptic_operations for x in found.layers), rel=1e-15)
    assert len(np.unique(expected["input"])) > 2, "borders and strides make a difference here"


def test_an_element_at_the_border_reaches_fewer_synapses():
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).eval()
    x = np.random.default_rng(0).normal(size=(4, 1, 4, 4)).astype(np.float32)
    module = spir.compile(net, "@stem", data=x).module
    paths = report.synapses(module)
    train = next(n for n in paths if n.endswith(".train"))
    assert paths[train][0].tolist() == [[12, 18, 18, 12], [18, 27, 27, 18], [18, 27, 27, 18], [12, 18, 18, 12]]


def test_counts_do_not_depend_on_how_batches_are_cut(compiled, monkeypatch):
    whole = compiled.report(X)
    monkeypatch.setattr("spir.driver.CHUNK_BYTES", 1)
    assert compiled.report(X).layers == whole.layers


def test_counts_are_a_mean_over_samples(compiled):
    singles = [compiled.report(X[i : i + 1]).layers for i in range(7)]
    for together, alone in zip(compiled.report(X).layers, zip(*singles, strict=True), strict=True):
        assert together.spikes == pytest.approx(np.mean([layer.spikes for layer in alone]))


def test_a_network_without_spikes_reports_none():
    net = spir.compile(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), "fold-bn", example=np.zeros((1, 3), np.float32))
    found = net.report(np.ones((2, 3), np.float32))
    assert (found.layers, found.spikes, found.synaptic_operations) == ((), 0, 0)
    assert found.coverage == {"real": 3}
    assert len(found.reals) == 3


def test_coverage_counts_the_values_of_each_encoding(compiled):
    found = compiled.report(X)
    kinds = [str(t.encoding).split("[")[0] for t in compiled.module.types.values()]
    assert found.coverage == {
        kind: kinds.count(k)
        for kind, k in (("current", "current"), ("int", "int"), ("real", "real"), ("spikes", "spikes"))
    }
    assert found.reals == ("x",)


def test_the_json_form_is_plain_data_of_one_schema(compiled):
    found = compiled.report(X).json()
    read = json.loads(json.dumps(found, allow_nan=False))
    assert read["schema"] == "spir-report/2"
    assert set(read) == {
        "schema",
        "backend",
        "samples",
        "layers",
        "readouts",
        "maps",
        "additions",
        "memory",
        "registers",
        "overflows",
        "energies",
        "coverage",
        "spiking",
        "unconverted",
        "analogue",
        "reals",
        "host",
        "integers",
        "windows",
        "latency",
        "delays",
        "intervals",
        "journal",
        "source",
        "spikes",
        "spikes_behind_input",
        "synaptic_operations",
        "operations_behind_input",
        "updates",
        "macs",
        "macs_left",
        "twins",
    }
    assert set(read["layers"][0]) == {
        "value",
        "op",
        "origin",
        "input",
        "code",
        "neurons",
        "steps",
        "spikes",
        "by_bit",
        "rate_by_bit",
        "negative",
        "rate",
        "synapses",
        "synaptic_operations",
        "updates",
        "sum_bits",
        "state_bits",
        "sum_room",
        "state_room",
        "twins",
    }
    assert set(read["readouts"][0]) == {"value", "elements", "sum_bits", "state_bits", "sum_room", "state_room"}
    assert set(read["maps"][0]) == {"value", "op", "origin", "carrier", "macs", "weights", "weight_bits"}
    assert set(read["memory"]) == {"weights", "biases", "constants", "states", "kib"}
    prices = {"source", "synaptic_operation", "mac", "neuron_update"}
    assert [set(energy) for energy in read["energies"]] == [
        {"prices", "synaptic_operations", "input", "neuron_updates", "macs_left", "ann_macs"}
    ]
    assert set(read["energies"][0]["prices"]) == prices
    assert read["registers"] is None
    assert set(compiled.report(X, "darwin3").json()["registers"]) == {*("owner", "sum_bits", "state_bits", "assumed")}
    page = (Path(__file__).parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
    rows = [value for value in read.values() if isinstance(value, dict) and "blake2b" not in str(value)]
    rows += [value[0] for value in read.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    named = {key for row in (read, *rows) for key in row} - set(read["journal"][0]) - set(read["coverage"])
    assert not {key for key in named if f"`{key}`" not in page}, "the page lists every field"
    assert set(read["journal"][0]) == {
        "step",
        "contract",
        "checked",
        "largest",
        "relative",
        "value",
        "before",
        "after",
        "seconds",
        "mean",
        "notes",
    }
    assert (read["backend"], read["source"]["seed"]) == ("serial", "2")


def test_the_text_names_layers_totals_contracts_probes_and_source(compiled):
    found = compiled.report(X)
    text = str(found)
    lines = text.splitlines()
    assert lines[0] == "backend serial, 7 samples; figures a sample"
    for layer in found.layers:
        (row,) = [line for line in lines if line.startswith(f"{layer.value} ")]
        assert row.split() == [
            layer.value,
            layer.op,
            str(layer.neurons),
            str(BITS),
            f"{layer.spikes:.1f}",
            f"{layer.rate:.3f}",
            f"{layer.synaptic_operations:.0f}",
            str(layer.sum_bits or "-"),
            str(layer.state_bits or "-"),
        ]
    (total,) = [line for line in lines if line.startswith("total ")]
    assert total.split()[1:] == [f"{found.spikes:.1f}", f"{found.synaptic_operations:.0f}"]
    (behind,) = [line for line in lines if line.startswith("without input ")]
    assert behind.split()[2:] == [f"{found.spikes_behind_input:.1f}", f"{found.operations_behind_input:.0f}"]
    for entry in found.journal:
        at = lines.index(f"  {entry.step}")
        assert lines[at + 1].startswith(f"      {entry.contract}; checked on {entry.checked}: ")
    assert lines[-1].startswith("made from: data 7 samples, blake2b ")
    assert lines[-1].endswith("; seed 2; check probes")


def test_the_text_says_what_was_not_checked(compiled):
    net = spir.compile(compiled.stages[0].module, "canonicalize", data=X, check="off")
    assert "      exact; not checked" in str(net.report(X)).splitlines()


def test_registers_are_those_that_a_run_needs_and_trains_of_integers_have_none(compiled):
    ranges = analyse(compiled.module)
    first, *later = compiled.report(X).layers
    assert (first.op, first.sum_bits, first.state_bits) == ("encode", None, None)
    for layer in later:
        (current,) = compiled.module.definitions[layer.value].operands
        lo, hi = ranges[current].frame.hull
        assert 2 ** (layer.sum_bits - 2) < max(-lo, hi + 1) <= 2 ** (layer.sum_bits - 1)
        lo, hi = (ranges[current].value | ranges[current].prefix).hull
        assert 2 ** (layer.state_bits - 2) < max(-lo, hi + 1) <= 2 ** (layer.state_bits - 1)


def test_the_latency_is_a_window_a_layer_and_one_for_the_input(compiled):
    found = compiled.report(X)
    neurons = [layer for layer in found.layers if layer.op == "neuron_stem"]
    assert (found.windows, found.latency, found.delays) == (len(neurons) + 1, (len(neurons) + 1) * BITS, ())
    assert f"latency (a reconstruction): {found.windows} windows, {found.latency} steps\n" in str(found)


def test_samples_follow_each_other_by_as_many_steps_as_neurons_are_busy(compiled):
    found = compiled.report(X)
    assert found.intervals == {"one": 2 * BITS, "two": BITS}
    line = f"a sample every {2 * BITS} steps with one state variable a neuron, {BITS} with two (a reconstruction)"
    assert line in str(found).splitlines()
    integers = spir.compile(compiled.stages[0].module, "canonicalize", data=X).report(X)
    assert integers.intervals == {"one": 0, "two": 0}
    assert "a sample every" not in str(integers)


class Halved(nn.Module):
    """Two activations and a join, small enough to count by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 2, 3, padding=1) for i in (2, 2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.a(x))
        return self.c(F.relu(self.b(x)) + x)


RANGES = "fold-bn, calibrate-range{method=mse, levels=4}, calibrate-qcfs{steps=4}"
INTEGERS = f"{RANGES}, quantize, propagate-scales"
NEURONS = f"{INTEGERS}, derive-thresholds{{neuron=parallel}}, fuse-neuron"


@pytest.mark.parametrize(
    ("passes", "line"),
    [
        ("fold-bn", "activations that spike: 0 of 2; not spiking: relu, relu_1"),
        (RANGES, "activations that spike: 0 of 2; not spiking: relu, relu_1"),
        (
            INTEGERS,
            "activations that spike: 0 of 2; not spiking: relu.unit, relu_1.unit; read as an analogue current: x.clip",
        ),
        (NEURONS, "activations that spike: 2 of 2; read as an analogue current: x.clip"),
        (f"{NEURONS}, fuse-parallel", "activations that spike: 2 of 2; read as an analogue current: x.clip"),
        ("@stem", "activations that spike: 2 of 2"),
    ],
)
def test_coverage_says_what_spikes_and_what_does_not(passes, line):
    torch.manual_seed(2)
    found = spir.compile(Halved().eval(), passes, data=X, check="off").report(X)
    assert line in str(found).splitlines()


def test_fused_synapses_count_as_those_of_one_product_a_step():
    torch.manual_seed(2)
    model = Halved().eval()
    stepped, fused = (
        spir.compile(model, passes, data=X, check="off").report(X) for passes in (NEURONS, f"{NEURONS}, fuse-parallel")
    )
    assert stepped.spikes == fused.spikes > 0
    assert stepped.synaptic_operations == fused.synaptic_operations > 9 * stepped.spikes


def test_neurons_that_spike_both_ways_are_counted_with_the_spikes_that_need_a_twin():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 5), torch.nn.ReLU())
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    snn = spir.compile(model.eval(), "@ca-lif", data=x, check="off")
    report = snn.report(x)
    found = {layer.value: layer for layer in report.layers}
    assert report.twins == sum(layer.twins for layer in report.layers) == 4 + 6 + 5
    for name, trace in snn.trace(x, "|".join(found)).items():
        assert found[name].negative == -np.minimum(trace.frames, 0).sum() / len(x)
        assert found[name].spikes == np.abs(trace.frames).sum() / len(x)
    assert "15 neurons need a twin on targets without signed spikes" in str(report)
    assert spir.compile(model, "@stem", data=np.abs(x), check="off").report(x).twins == 4


@pytest.mark.parametrize("backend", ["serial", "hw"])
def test_spikes_by_bit_are_the_bits_of_the_codes(compiled, backend, tmp_path):
    compiled.save(tmp_path / "net")
    found = spir.load(tmp_path / "net", backend).report(X)
    for layer, values in zip(found.layers, codes(compiled).values(), strict=True):
        bits = [((values % 2**BITS) >> place & 1).sum() / 7 for place in reversed(range(BITS))]
        assert layer.code == "bits"
        assert layer.by_bit == tuple(bits)
        assert layer.rate_by_bit == tuple(b / layer.neurons for b in bits)
        assert sum(layer.by_bit) == pytest.approx(layer.spikes, rel=1e-15)
    assert "firing rate by frame, of bits the most significant first:" in str(found)


def test_long_trains_are_not_counted_frame_by_frame_and_many_frames_are_cut_in_the_text():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    long = spir.compile(model, "@ca-lif", data=x, check="off").report(x)
    assert all(layer.steps > 64 and layer.by_bit is None and layer.rate_by_bit is None for layer in long.layers)
    assert "firing rate by frame" not in str(long)
    short = spir.compile(model, "@parallel-free{steps=20}", data=x, check="off").report(x)
    (layer,) = short.layers
    assert (layer.code, len(layer.by_bit)) == ("suffix", 20)
    assert list(layer.by_bit) == sorted(layer.by_bit), "spikes fill the last steps"
    (row,) = [line for line in str(short).splitlines() if line.endswith("  and 4 more")]
    assert row.split()[:2] == [layer.value, f"{layer.rate_by_bit[0]:.3f}"]


# --- synapses, against dense matrices ---------------------------------------------------------------------------------


def connections(maps, shape) -> np.ndarray:
    """For each element of the shape, the entries that are not 0 in its columns of the maps' dense matrices."""
    total = np.zeros(shape)
    for f in maps:
        for index in np.ndindex(*shape):
            one = torch.zeros(1, *shape)
            one[(0, *index)] = 1
            total[index] += int((f(one) != 0).sum())
    return total


class Drawn(nn.Module):
    """A small network whose strides, borders, groups, pool and skip path are drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        kernel, groups = (int(k) for k in rng.integers(1, 4, 2)), int(rng.integers(1, 3))
        self.first = nn.Conv2d(1, 4, tuple(kernel), int(rng.integers(1, 3)), tuple(map(int, rng.integers(0, 3, 2))))
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.third = nn.Conv2d(4, 2, 2, stride=int(rng.integers(1, 3)), padding=1)
        self.pooled, self.skips = bool(seed & 1), bool(seed & 2)
        shape = self(torch.zeros(1, 1, 6, 5), last=False).shape
        self.fc = nn.Linear(int(np.prod(shape)), 3)

    def join(self, a):
        return self.second(a) + a if self.skips else self.second(a)

    def sink(self, b):
        return self.third(F.avg_pool2d(b, 2) if self.pooled else b)

    def forward(self, x, last=True):
        a = F.relu(self.first(x))
        b = F.relu(self.join(a))
        c = F.relu(self.sink(b)).flatten(1)
        return self.fc(c) if last else c


def without_biases(module: nn.Module) -> None:
    for part in module.children():
        part.bias = None


@pytest.mark.parametrize("seed", range(5))
def test_synaptic_operations_are_the_entries_of_dense_matrices_under_the_integer_networks_ones(seed):
    model = Drawn(seed).eval()
    x = np.random.default_rng(seed).normal(size=(3, 1, 6, 5)).astype(np.float32)
    snn = spir.compile(model, f"@stem{{bits={BITS}}}", data=x, check="off")
    found = snn.report(x)
    module = next(s.module for s in snn.stages if s.name == "propagate-scales")
    stored = interpreter.run(module, x, "*")
    values = [stored[n.result] for n in module.nodes if n.op.name in ("quantize", "requant")]
    without_biases(model)
    with torch.no_grad():
        skip = [lambda a: a] if model.skips else []
        leaving = [
            connections([model.first], values[0].shape[1:]),
            connections([model.second, *skip], values[1].shape[1:]),
            connections([model.sink], values[2].shape[1:]),
            connections([lambda c: model.fc(c.flatten(1))], values[3].shape[1:]),
        ]
    for layer, integers, synapses in zip(found.layers, values, leaving, strict=True):
        assert layer.synapses == synapses.sum()
        assert layer.synaptic_operations == (popcount(integers) * synapses).sum() / 3
    assert found.operations_behind_input == pytest.approx(
        found.synaptic_operations - found.layers[0].synaptic_operations, rel=1e-15
    )
    assert [layer.input for layer in found.layers] == [True, False, False, False]
    assert found.spikes_behind_input == pytest.approx(found.spikes - found.layers[0].spikes, rel=1e-15)


def test_weights_of_0_are_synapses():
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    with torch.no_grad():
        model[2].weight[:, ::2] = 0
    first, second = spir.compile(model, "@stem", data=x, check="off").report(x).layers
    assert (first.synapses, second.synapses) == (24, 12)
    assert second.synaptic_operations == 2 * second.spikes > 0


def test_synapses_are_counted_in_integers_where_float64_is_not_exact(compiled, monkeypatch):
    paths = report.synapses(compiled.module)
    monkeypatch.setattr("spir.costs.EXACT_IN_FLOAT64", 1)
    for name, counted in report.synapses(compiled.module).items():
        assert counted.dtype == paths[name].dtype == np.int64
        np.testing.assert_array_equal(counted, paths[name])


class Twice(nn.Module):
    """One sum that two layers of neurons read, each with a range of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x)
        return self.b(F.relu(x) + F.hardtanh(x, 0.0, 0.25))


def test_a_current_that_two_layers_read_takes_its_synapses_twice():
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    found = spir.compile(Twice().eval(), "@stem", data=x, check="off").report(x)
    assert [layer.synapses for layer in found.layers if layer.input] == [4 * 6 * 2]


def test_an_input_of_trains_is_the_input_layer():
    text = """module {
  input %x : tensor<2, spikes[3, bits, 0..7] * 0.5>
  %y = integrate %x : tensor<2, int[0, 7] * 0.5>
  output %y
}"""
    frames = np.array([[[1, 0]], [[0, 1]], [[1, 1]]])
    for backend in BACKENDS:
        found = spir.compile(spir.parse(text), "", backend=backend).report(frames)
        (layer,) = found.layers
        assert (layer.op, layer.input, layer.by_bit, layer.updates) == ("input", True, (1, 1, 2), None)
        assert (layer.synaptic_operations, found.operations_behind_input) == (4, 0)
        assert [(end.value, end.elements, end.sum_bits, end.state_bits) for end in found.readouts] == [("y", 2, 2, 4)]


# --- the integer network's operations, memory, energy -----------------------------------------------------------------


def test_macs_are_the_taps_inside_the_image(compiled):
    found = compiled.report(X)
    shapes = {name: torch.ones(1, *v.shape[1:]) for name, v in codes(compiled).items()}
    expected = {
        "conv1": F.conv2d(shapes["input"], torch.ones(4, 2, 3, 3), stride=2, padding=(2, 1)),
        "conv2": F.conv2d(shapes["a"], torch.ones(4, 2, 3, 3), padding=2, dilation=2, groups=2),
        "conv3": F.conv2d(
            F.avg_pool2d(shapes["b"], 2, stride=1), torch.ones(3, 4, 2, 1), padding=(1, 0), stride=(2, 1)
        ),
        "fc": torch.full((3,), 9.0),
    }
    assert [(m.value.split(".")[0], m.macs) for m in found.maps] == [(k, int(v.sum())) for k, v in expected.items()]
    assert found.macs == sum(m.macs for m in found.maps)
    assert [m.weights for m in found.maps] == [72, 72, 24, 27]
    assert all(m.weight_bits == BITS and m.carrier == "spikes" for m in found.maps)
    assert found.macs_left == 0
    pooled = F.avg_pool2d(shapes["b"], 2, stride=1).numel()
    assert found.additions == 3 * pooled + shapes["b"].numel(), "a window of 4 takes 3 additions, a join of 2 takes 1"
    assert "stay, on integers" in str(found)


def test_an_analogue_input_keeps_its_macs_and_no_synaptic_operations_are_counted_for_it():
    found = spir.compile(Halved().eval(), NEURONS, data=X, check="off").report(X)
    assert [m.carrier for m in found.maps] == ["integers", "spikes", "spikes"]
    assert (
        found.macs_left
        == found.maps[0].macs
        == reach(lambda x: F.conv2d(x, ones(2, 2, 3, 3), padding=1), (2, 7, 6)).sum()
    )
    (paper,) = found.energies
    assert (paper.input, paper.macs_left) == (None, 0.23 * found.macs_left)
    assert not any(layer.input for layer in found.layers)
    assert "without input" not in str(found)
    fused = spir.compile(Halved().eval(), f"{NEURONS}, fuse-parallel", data=X, check="off").report(X)
    assert [m.carrier for m in fused.maps] == ["integers", "spikes", "spikes"]


def test_real_layers_have_macs_that_no_price_is_for():
    net = spir.compile(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), "fold-bn", example=np.zeros((1, 3), np.float32))
    found = net.report(np.ones((2, 3), np.float32))
    assert [(m.carrier, m.macs, m.weight_bits) for m in found.maps] == [("reals", 6, None)]
    assert (found.macs, found.energies, found.memory.kib) == (0, (), 0)


def test_energies_are_counts_times_prices_and_what_has_no_price_is_absent(compiled, tmp_path):
    alone = compiled.report(X)
    given = compiled.report(X, profile="darwin3")
    (paper,), (same, darwin) = alone.energies, given.energies
    behind, of_input = alone.operations_behind_input, alone.layers[0].synaptic_operations
    assert paper == same
    assert paper.synaptic_operations == 0.03 * behind
    assert paper.input == pytest.approx(0.03 * of_input, rel=1e-12)
    assert (paper.neuron_updates, paper.macs_left, paper.ann_macs) == (None, 0, 0.23 * alone.macs)
    assert (darwin.synaptic_operations, darwin.ann_macs, darwin.neuron_updates) == (5.47 * behind, None, None)
    assert darwin.prices.source.startswith("darwin3: press release")
    updates = sum(layer.neurons * layer.steps for layer in alone.layers if not layer.input)
    loihi = compiled.report(X, Profile.load("loihi")).energies[1]
    assert alone.updates == updates
    assert (loihi.synaptic_operations, loihi.neuron_updates) == (23.6 * behind, 81 * updates)
    assert compiled.report(X, "ideal").energies == (paper,), "a profile that states no price adds no row"
    assert "prices of one source alone" in str(alone)
    assert "prices of one source alone" not in str(given)
    (row,) = [line for line in str(given).splitlines() if "darwin3: press release" in line]
    assert row.split()[:5] == [f"{5.47e-6 * behind:.4g}", f"{5.47e-6 * of_input:.4g}", "-", "-", "-"]


def test_prices_for_8_bits_name_the_maps_with_wider_weights(compiled):
    assert "states no price" not in str(compiled.report(X))
    wide = spir.compile(Halved().eval(), "@stem{bits=8, weights=10}", data=X, check="off").report(X)
    assert [m.weight_bits for m in wide.maps] == [10, 10, 10]
    (note,) = [line for line in str(wide).splitlines() if "states no price" in line]
    assert note.endswith(": " + ", ".join(m.value for m in wide.maps))


def test_room_is_what_registers_have_beyond_the_proved_need(compiled, tmp_path):
    assert all(layer.sum_room is layer.state_room is None for layer in compiled.report(X).layers)
    path = tmp_path / "chip.toml"
    text = 'name = "chip"\nweight_bits = 8\nsum_bits = 9\nstate_bits = 12\noverflow = "wrap"\nfan_in = "none"\n'
    path.write_text(text + 'signed_spikes = true\nsteps = "none"\nrequant = "any"\n', encoding="utf-8")
    found = compiled.report(X, str(path))
    first, *later = found.layers
    assert (first.sum_room, first.state_room) == (None, None)
    for row in (*later, *found.readouts):
        assert (row.sum_room, row.state_room) == (9 - row.sum_bits, 12 - row.state_bits)
    assert min(layer.state_room for layer in later) < 0
    assert "room: chip holds sums in 9 bits and states in 12, less the proved need" in str(found)
    guessed = compiled.report(X, "speck")
    assert guessed.registers.assumed == ("sum_bits",)
    assert "states in 16 (assumed: sum_bits), less the proved need" in str(guessed)
    compiled.save(tmp_path / "net")
    own = spir.load(tmp_path / "net", "hw{accumulator=24}").report(X)
    assert [layer.state_room for layer in own.layers[1:]] == [24 - layer.state_bits for layer in later]


def test_a_profile_that_there_is_not_is_named(compiled):
    with pytest.raises(SpirError, match="there is no profile 'darwin'"):
        compiled.report(X, "darwin")


def test_memory_is_what_is_stored_at_the_width_it_needs():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    snn = spir.compile(model, "@stem{bits=8}", data=x, check="off")
    found = snn.report(x)
    assert found.memory.weights == 8 * (3 * 4 + 4 * 2)
    (_, neuron), (end,) = found.layers, found.readouts
    assert found.memory.states == 4 * neuron.state_bits + 2 * end.state_bits

    def width(values) -> int:
        return max(int(v).bit_length() if v >= 0 else (-int(v) - 1).bit_length() for v in values.reshape(-1)) + 1

    ops = [n.op for n in snn.module.nodes]
    law = next(op for op in ops if op.name == "neuron_stem")
    (bias,) = (op.bias for op in ops if op.name == "integrate")
    divisors = np.array([law.div]) if isinstance(law.div, int) else law.div.values
    assert found.memory.biases == sum(a.values.size * width(a.values) for a in (law.add, bias))
    assert found.memory.constants == sum(a.size * width(a) for a in (law.mul.values, divisors))
    parts = attrs.astuple(found.memory)
    assert found.memory.kib == sum(parts) / 8192
    assert f"{sum(parts) / 8192:.2f} KiB in all" in str(found)


# --- the picture ------------------------------------------------------------------------------------------------------


def test_a_plot_is_a_picture_of_every_layer(compiled, tmp_path):
    found = compiled.report(X)
    found.plot(tmp_path / "few.png")
    many = attrs.evolve(found, layers=found.layers * 8)
    many.plot(str(tmp_path / "many.svg"))
    assert (tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "many.svg").read_text(encoding="utf-8")
    assert drawn.count(f"<!-- {found.layers[-1].value} -->") == 8
    assert "spikes a sample" in drawn


def test_a_plot_that_cannot_be_made_says_why(compiled, tmp_path, monkeypatch):
    found = compiled.report(X)
    for path, said in (("x.xyz", "no picture is called x.xyz"), ("none/x.png", "No such file")):
        with pytest.raises(SpirError, match=said):
            found.plot(tmp_path / path)
    with pytest.raises(SpirError, match="no spikes to draw"):
        attrs.evolve(found, layers=()).plot(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SpirError, match=r"pip install 'spir\[plot\]'"):
        found.plot(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
