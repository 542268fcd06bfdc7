"""The shared ResNets and LeNet-5 on real images: a bounded part of what ``benchmarks/stem_exact.py`` judges in full."""

from __future__ import annotations

import attrs
import numpy as np
import pytest

import spir
from benchmarks.data import cifar10
from benchmarks.networks import resnet20, resnet32
from spir.demo.lenet import calibration, images, lenet5
from spir.driver import backend_of
from spir.equality import compare
from spir.interpreter import decoded
from spir.interpreter import run as interpret
from spir.ir import Array

BACKENDS = ("serial", "parallel", "hw{collapse=off}", "hw")
IMAGES = 8
pytestmark = pytest.mark.xdist_group("real networks")  # compiled once, for one worker


def resnet(make, name, data):
    split = cifar10(name)
    return make(data / f"{name}.safetensors"), split.x_train[:50], split.x_test[:IMAGES]


@pytest.fixture(scope="module", params=["lenet5", "resnet20", "resnet32"])
def compiled(request, spir_data):
    if request.param == "lenet5":
        model, ranges, x = lenet5(), calibration()[:100], images()[0][:100]
    else:
        make = {"resnet20": resnet20, "resnet32": resnet32}[request.param]
        model, ranges, x = resnet(make, f"cifar10_{request.param}", spir_data)
    return spir.compile(model, "@stem{bits=8}", data=ranges), x


def stages(snn):
    return {stage.name: stage.module for stage in snn.stages}


@pytest.mark.parametrize("backend", BACKENDS)
def test_spikes_decode_to_the_integer_network_in_every_layer(compiled, backend):
    snn, x = compiled
    found = compare(stages(snn)["propagate-scales"], snn.module, backend_of(backend).prepare(snn.module), x)
    layers = [node for node in snn.module.nodes if node.op.name in ("conv2d", "linear", "neuron_stem", "add")]
    assert len(found) >= len(layers)
    assert sum(a.active for a in found) > 0.2 * sum(a.elements for a in found)
    assert [a for a in found if a.mismatches] == []


def test_every_stage_prints_and_parses_to_itself(compiled):
    snn, _ = compiled
    for stage in snn.stages:
        assert spir.parse(str(stage.module), stage.module.arrays()) == stage.module, stage.name


def test_folding_batch_norm_changes_nothing_beyond_float_rounding(compiled):
    snn, x = compiled
    before, after = stages(snn)["canonicalize"], stages(snn)["fold-bn"]
    a, b = (decoded(m, interpret(m, x, "*")) for m in (before, after))
    assert not any(node.op.name == "batch_norm" for node in after.nodes)
    for name in a.keys() & b.keys():
        assert np.abs(a[name] - b[name]).max() <= 1e-10 * np.abs(a[name]).max(), name


def test_a_module_differs_when_any_one_weight_differs(compiled):
    snn, _ = compiled
    for node in snn.module.nodes:
        for field, array in node.op.arrays().items():
            changed = array.values.copy()
            changed.flat[-1] += 1
            other = attrs.evolve(node, op=attrs.evolve(node.op, **{field: Array.of(changed)}))
            nodes = tuple(other if n is node else n for n in snn.module.nodes)
            assert attrs.evolve(snn.module, nodes=nodes) != snn.module, f"{node.result}.{field}"
