"""Random networks through the pipeline: every backend has the integer network's numbers in every layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from spir import driver, interpreter, pipeline
from spir.conformance.strategies import Network, bounded, networks
from spir.equality import compare, shared
from spir.errors import SpirError
from spir.ir import Module
from spir.ops._neuron import Neuron
from spir.ops.encode import Encode
from spir.text import parse
from spir.types import Real, Stored, scale_of

pytestmark = pytest.mark.filterwarnings("ignore:.*the calibration data may not be what the model was trained on")

BACKENDS = ("serial", "parallel", "hw{collapse=off}", "hw{collapse=auto}")
REFUSALS = ("E-RESID-SCALE", "E-MULT-RANGE", "E-VRANGE", "E-SCALE")  # a network that no integers of 64 bits hold


@pytest.fixture(autouse=True, scope="module")
def _reproducers_go_aside(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("reproducers")))
        yield


@st.composite
def recipes(draw: st.DrawFn) -> str:
    """Settings of the whole pipeline."""
    bits = draw(st.one_of(st.integers(2, 8), st.sampled_from([8, 12, 16])))
    found = [f"bits={bits}", f"join={draw(st.sampled_from(['wide', 'rescale']))}"]
    if draw(st.booleans()):
        found += ["range=percentile", f"percentile={draw(st.sampled_from([90.0, 99.0, 99.99]))}"]
    if draw(st.integers(0, 3)) == 0:
        found.append(f"weights={draw(st.integers(2, 8))}")
    return f"@stem{{{', '.join(found)}}}"


def compiled(network: Network, passes: str) -> dict[str, Module] | None:
    """The module after each pass, contracts checked on the way; None for a network that is refused."""
    try:
        outcome = driver.opt(network.module, passes, data=network.data)
    except SpirError as refusal:
        located = all(note in str(refusal) for note in ("from: net.", "pass: propagate-scales", "fix: "))
        if refusal.code not in REFUSALS or not located:
            raise
        event(f"refused: {refusal.code}")
        return None
    return {stage.name: stage.module for stage in outcome.stages}


def same(found: dict[str, Stored], wanted: dict[str, Stored], label: str) -> None:
    assert list(found) == list(wanted), label
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype, f"{label}: %{name}"
        assert np.array_equal(found[name], values), f"{label}: %{name}"


def activity(module: Module, stored: dict[str, Stored]) -> float:
    """The share of a network's spike slots behind the input that hold a spike."""
    trains = [
        stored[n.result] for n in module.nodes if isinstance(n.op, (Neuron, Encode)) and n.operands[0] != "x.clip"
    ]
    return float(np.mean([np.mean(train != 0) for train in trains])) if trains else 0.0


def agree(network: Network, stages: dict[str, Module], last: str) -> dict[str, Stored]:
    """Every value of a spiking module, after all backends, the interpreter and the integer network have agreed."""
    iann, module = stages["propagate-scales"], stages[last]
    x = network.inputs(stages["quantize"])
    wanted = interpreter.run(module, x, "*")
    for name in BACKENDS:
        executable = driver.backend_of(name).prepare(module)
        same(executable.run(x, "*"), wanted, name)
        agreements = compare(iann, module, executable, x)
        assert [a for a in agreements if a.mismatches] == [], name
        assert {a.value for a in agreements} == {n for n, t in iann.types.items() if not isinstance(t.encoding, Real)}
    reference = interpreter.run(iann, x, "*")
    for name in shared(iann, module):
        a, b = (m.types[name].integers(r[name]) for m, r in ((iann, reference), (module, wanted)))
        assert np.array_equal(a, b), name
        assert scale_of(iann.types[name]) == scale_of(module.types[name])
    return wanted


@bounded(60)
@given(networks(), recipes())
def test_every_layer_is_the_same_on_every_backend_and_in_the_integer_network(network, recipe):
    stages = compiled(network, recipe)
    if stages is None:
        return
    module = stages["fuse-neuron"]
    wanted = agree(network, stages, "fuse-neuron")
    active = activity(module, wanted)
    event(f"spikes: {'none' if not active else 'under 5 %' if active < 0.05 else 'more'}")
    event(f"{min(len(network.module.nodes) // 5 * 5, 20)} or more ops")
    event("a residual join" if network.joins else "no join")
    event("a dead channel" if network.dead else "every channel alive")


@bounded(20)
@given(networks(), recipes())
def test_neurons_in_three_ops_are_the_same_on_every_backend_and_in_the_integer_network(network, recipe):
    stages = compiled(network, recipe)
    if stages is None:
        return
    unfused = agree(network, stages, "derive-thresholds")
    fused = interpreter.run(stages["fuse-neuron"], network.inputs(stages["quantize"]), "*")
    for name in fused:
        assert np.array_equal(unfused[name], fused[name]), name


@bounded(15)
@given(networks(), recipes())
def test_every_stage_reads_back_from_its_text(network, recipe):
    stages = compiled(network, recipe)
    for module in [network.module, *(stages or {}).values()]:
        read = parse(str(module), module.arrays())
        assert read == module
        assert str(read) == str(module)
        assert parse(str(module)) == module


@bounded(12)
@given(networks(), recipes(), st.integers(1, 5))
def test_no_result_depends_on_the_batch(network, recipe, size):
    stages = compiled(network, recipe)
    if stages is None:
        return
    module, x = stages["fuse-neuron"], network.inputs(stages["quantize"])
    for name in BACKENDS:
        executable = driver.backend_of(name).prepare(module)
        whole, part = executable.run(x, "*"), executable.run(x[size : 2 * size], "*")
        for value, type_ in module.types.items():
            cut = whole[value][:, size : 2 * size] if type_.train else whole[value][size : 2 * size]
            if not isinstance(type_.encoding, Real):
                assert np.array_equal(cut, part[value]), (name, value)


def test_the_networks_are_deep_joined_dead_in_places_converted_and_alive():
    seen: Counter[str] = Counter()

    @settings(max_examples=100, derandomize=True, database=None)
    @given(networks())
    def count(network: Network) -> None:
        features: dict[str, Any] = {
            "all": True,
            "5 or more ops": len(network.module.nodes) >= 5,
            "a residual join": network.joins > 0,
            "a dead channel": network.dead,
            "a channel of dead weights": network.dead_weights,
        }
        stages = compiled(network, "@stem{bits=4}")
        if stages is not None:
            module = stages["fuse-neuron"]
            stored = interpreter.run(module, network.inputs(stages["quantize"]), "*")
            neurons = [n.result for n in module.nodes if isinstance(n.op, Neuron)]
            features |= {
                "converted": True,
                "neurons": bool(neurons),
                "spikes": any(stored[name].any() for name in neurons),
                "spikes in every layer": bool(neurons) and all(stored[name].any() for name in neurons),
                "outputs that vary": len(np.unique(module.types[module.output].integers(stored[module.output]))) > 3,
            }
        for feature, present in features.items():
            seen[feature] += bool(present)

    count()
    shares = {feature: number / seen["all"] for feature, number in seen.items()}
    shown = ", ".join(f"{feature} {share:.0%}" for feature, share in shares.items())
    assert shares["5 or more ops"] >= 1 / 3, shown
    assert shares["a residual join"] >= 1 / 5, shown
    assert shares["a dead channel"] >= 1 / 10, shown
    assert shares["a channel of dead weights"] >= 1 / 10, shown
    assert shares["converted"] >= 0.95, shown
    assert shares["neurons"] >= 0.6, shown
    assert shares["spikes"] >= 0.9 * shares["neurons"], shown
    assert shares["spikes in every layer"] >= 0.5 * shares["neurons"], shown
    assert shares["outputs that vary"] >= 0.5, shown


def test_the_pipeline_under_test_is_the_recipe():
    names = [step.name for step in pipeline.parse("@stem{bits=4}")]
    assert names[-4:] == ["quantize", "propagate-scales", "derive-thresholds", "fuse-neuron"]
