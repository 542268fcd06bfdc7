"""Reports: spikes and synaptic operations against counts made by hand, and one JSON schema."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spir
from spir import interpreter, report
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
    assert read["schema"] == "spir-report/1"
    assert set(read) == {
        "schema",
        "backend",
        "samples",
        "layers",
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
        "journal",
        "source",
        "spikes",
        "synaptic_operations",
        "twins",
    }
    assert set(read["layers"][0]) == {
        "value",
        "op",
        "origin",
        "neurons",
        "steps",
        "spikes",
        "negative",
        "rate",
        "synaptic_operations",
        "sum_bits",
        "state_bits",
        "twins",
    }
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
    assert (first.op, first.sum_bits, first.state_bits) == ("encode", 0, 0)
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
