"""Calcium-gated spikes of a network that was trained with quantisation, on real images; what the benchmark counts."""

from __future__ import annotations

import functools
import json

import attrs
import matplotlib.pyplot as plt
import numpy as np
import pytest

from benchmarks import ca_lif
from benchmarks.ca_lif import Subject, fed_with_trains, one_by_one, shuffled, spiking
from spir.demo.lenet import images
from spir.ir import Array
from spir.ops.neuron_ca_lif import NeuronCaLif

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@functools.cache
def lenet5() -> Subject:
    """On six of the shipped images."""
    x, y = images()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ca_lif, "data", lambda _name: (np.asarray(x), np.asarray(y)))
        return Subject.of("qat_lenet5_7bit", 6)


@pytest.mark.parametrize("way", [w for w in ca_lif.WAYS if w != "events"])
def test_counts_are_the_integers_of_the_quantised_network_however_spikes_come(way):
    found = lenet5().measure(way, 0)
    assert (found.mismatches, found.frame_mismatches) == (0, 0)
    assert found.integer_accuracy == found.spiking_accuracy == 100.0
    assert found.elements > 0
    assert found.active > 0.2 * found.elements
    if way != "parallel":
        assert found.negative_spikes > 0
        assert found.rounding_spikes > 0


def test_one_spike_after_the_other_counts_the_same():
    subject = lenet5()
    one = attrs.evolve(subject, x=subject.x[:1] / 8, y=subject.y[:1])  # a dim image has few spikes
    found = one.measure("events", 0)
    assert found.mismatches == 0
    assert found.frames > 500  # as many as the image has spikes, and those that round


def test_a_wrong_threshold_is_found():
    subject = lenet5()
    module = spiking(subject.integers, "serial")
    first = next(n for n in module.nodes if isinstance(n.op, NeuronCaLif))
    wrong = attrs.evolve(first.op, add=Array.of(first.op.add.values + 5 * np.max(first.op.add.values)))
    nodes = tuple(attrs.evolve(n, op=wrong) if n is first else n for n in module.nodes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ca_lif, "spiking", lambda *_: attrs.evolve(module, nodes=nodes))
        assert subject.measure("serial", 0).mismatches > 0


def test_shuffled_trains_hold_the_same_spikes_and_single_ones_come_alone():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 2, (20, 3, 4))
    for pairs in (False, True):
        mixed = shuffled(frames, rng, pairs=pairs)
        np.testing.assert_array_equal(mixed.sum(axis=0), frames.sum(axis=0))
        assert (mixed != frames).any()
    codes = np.array([[[3, 0, -2]]])
    alone = one_by_one(codes, 9, rng)
    np.testing.assert_array_equal(alone.sum(axis=0), codes)
    assert np.abs(alone).sum(axis=(1, 2, 3)).max() == 1
    module, before = fed_with_trains(spiking(lenet5().integers, "serial"), 300, (-1, 1))
    assert (module.input.type.steps, module.input.type.shape) == (300, before.shape)


def test_a_run_goes_on_where_its_file_ends(tmp_path, monkeypatch, capsys):
    subject = lenet5()
    monkeypatch.setattr(Subject, "of", lambda *_: subject)
    path = tmp_path / "lines.json"
    words = ["ca_lif", "--networks", "qat_lenet5_7bit", "--ways", "parallel", "--slice", "4", "--json", str(path)]
    monkeypatch.setattr("sys.argv", words)
    assert ca_lif.main() == 0
    assert [(part["images"], part["mismatches"]) for part in json.loads(path.read_text())] == [(4, 0), (2, 0)]
    path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    measured = []
    wrapped = Subject.measure
    monkeypatch.setattr(Subject, "measure", lambda s, *given: measured.append(len(s.x)) or wrapped(s, *given))
    assert ca_lif.main() == 0
    assert measured == [2]
    assert len(json.loads(path.read_text())) == 2
    assert "qat_lenet5_7bit" in capsys.readouterr().out


def test_a_sweep_is_drawn(tmp_path):
    accuracy = [60.0 + i for i in range(len(ca_lif.WINDOWS))]
    ca_lif.draw({"qat_lenet5_7bit": accuracy, "qat_lenet5": accuracy}, tmp_path / "steps.png")
    assert plt.imread(tmp_path / "steps.png").std() > 0.1  # lines on white
