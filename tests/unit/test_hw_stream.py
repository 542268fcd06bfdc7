"""hw as a pipeline: samples in a row through all layers at once give what each of them gives alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import spir
from spir import interpreter
from spir.backends._hw_stream import Stream, _Pipeline
from spir.backends.hw import Hw
from spir.conformance.examples import module_of
from spir.conformance.strategies import bounded
from spir.demo.lenet import calibration, images, lenet5
from spir.errors import SpirError
from spir.ir import Array, Module
from spir.ops.add import Add
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.schedule import STATES, Delay, schedule
from spir.types import Real, Scale, Spikes, Tensor
from tests.unit.stem_networks import inputs, stem_network

ONE, ZERO = Array.of([1]), Array.of([0])


def same(found: dict, expected: dict, samples: int, module: Module) -> None:
    """All values of the first samples, by name."""
    assert set(found) == set(expected)
    for name, values in expected.items():
        wanted = values[:, :samples] if module.types[name].train else values[:samples]
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


def first(x: np.ndarray, samples: int, module: Module) -> np.ndarray:
    return x[:, :samples] if module.input.type.train else x[:samples]


def residual(depth: int) -> Module:
    """Two trains that meet, one of them behind ``depth`` neurons more."""
    lines = [("q", Quantize(1.0, 0, 15), "x"), ("e", Encode(4), "q")]
    last = "e"
    for i in range(depth):
        lines += [(f"c{i}", Linear(Array.of([[1, 2], [3, -1]]), Array.of([1.0])), last)]
        lines += [(f"n{i}", NeuronStem(4, ONE, ZERO, 2, 1.0), f"c{i}")]
        last = f"n{i}"
    return module_of(Tensor((2,), Real()), *lines, ("s", Add(), f"{last} e"), ("y", Integrate(), "s"))


X = np.random.default_rng(3).integers(0, 16, (6, 2)).astype(np.float64)


@given(st.integers(0, 10_000))
@bounded(8)
def test_samples_in_a_row_give_what_each_gives_alone_and_a_step_less_between_them_is_refused(seed):
    module = stem_network(seed)
    x = inputs(module, 5, seed)
    alone = Hw(collapse="off").prepare(module).run(x, "*")
    same(alone, interpreter.run(module, x, "*"), 5, module)
    for states in STATES:
        stream = Hw(pipeline=states).prepare(module)
        for samples in (1, 2, 5):
            same(stream.run(first(x, samples, module), "*"), alone, samples, module)
        if stream.interval > 1:
            hasty = Stream(stream.program, states, stream.interval - 1)
            same(hasty.run(first(x, 1, module), "*"), alone, 1, module)
            with pytest.raises(SpirError, match="which still holds sample 0") as caught:
                hasty.run(first(x, 2, module))
            assert f"fix: an interval of {stream.interval} steps" in str(caught.value)


@pytest.mark.parametrize(("states", "interval"), [("one", 16), ("two", 8)])
def test_the_demo_network_streams_images(states, interval):
    snn = spir.compile(lenet5(), "@stem", data=calibration(), backend=f"hw{{pipeline={states}}}", check="off")
    x, _ = images()
    stream = snn.executable
    assert (stream.interval, stream.latency, stream.steps(4)) == (interval, 40, 40 + 3 * interval)
    alone = spir.compile(snn.module, [], backend="hw").executable.run(x[:4], "*")
    same(stream.run(x[:4], "*"), alone, 4, snn.module)
    np.testing.assert_array_equal(snn(x[:4]), spir.compile(snn.module, [])(x[:4]))


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_so_many_samples_take_the_latency_and_an_interval_for_each_but_the_first(states, samples, monkeypatch):
    stream, taken = Hw(pipeline=states).prepare(residual(3)), []
    step = _Pipeline.step
    monkeypatch.setattr(_Pipeline, "step", lambda self, now: taken.append(now) or step(self, now))
    found = stream.run(X[:samples])["y"]
    assert taken == [*range(stream.steps(samples))]
    assert stream.steps(samples) == 16 + (samples - 1) * {"one": 8, "two": 4}[states]
    assert stream.steps(0) == 0
    assert len(found) == samples


@pytest.mark.parametrize("states", STATES)
def test_what_nobody_reads_is_streamed_to_its_end(states):
    module = residual(2)
    early = Module(module.input, module.nodes, "n0")
    stream, x = Hw(pipeline=states).prepare(early), X[:3]
    assert stream.latency == 8
    same(stream.run(x, "*"), interpreter.run(module, x, "*"), 3, module)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_without_delays_a_network_of_unequal_branches_is_refused_and_would_compute_something_else(depth):
    module = residual(depth)
    assert schedule(module).delays == (Delay("s", "e", depth, 4 * depth),)
    with pytest.raises(SpirError) as caught:
        Hw(pipeline="two", delays=False).prepare(module)
    (found,) = caught.value.diagnostics
    assert found.code == "E-RESID-DELAY"
    assert found.message == (
        f"%e comes {4 * depth} steps ({depth} windows) before the other branch of %s, and its bits would meet others "
        "of another weight"
    )
    assert f"fix: delays=on, which keeps {4 * depth} frames of it" in str(caught.value)
    wanted = interpreter.run(module, X, "y")["y"]
    stream = Hw(pipeline="two").prepare(module)
    np.testing.assert_array_equal(stream.run(X)["y"], wanted)
    assert (Stream(stream.program, "two", delays=False).run(X)["y"] != wanted).any()


def test_without_delays_branches_of_equal_depth_run():
    module = residual(0)
    for states in STATES:
        stream = Hw(pipeline=states, delays=False).prepare(module)
        same(stream.run(X, "*"), interpreter.run(module, X, "*"), len(X), module)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("overflow", ["saturate", "wrap"])
def test_registers_overflow_as_often_and_keep_the_same(states, overflow):
    rng = np.random.default_rng(5)
    given = (rng.integers(low, 61, (6, 6)) for low in (-60, 0, -60))
    weights = [Linear(Array.of(each), Array.of([1.0])) for each in given]
    module = module_of(
        Tensor((6,), Spikes(4, "bits", -8, 7, Scale.of(1))),
        ("a", weights[0], "x"),
        ("n", NeuronStem(4, ONE, Array.of(rng.integers(-99, 99, 6)), 16, 1.0), "a"),
        ("b", weights[1], "n"),
        ("z", Integrate(), "b"),
        ("e", Encode(13), "z"),  # what wraps below 0 has no code
        ("c", weights[2], "e"),
        ("y", Integrate(Array.of([9] * 6)), "c"),
    )
    x = rng.integers(0, 2, (4, 5, 6)) * np.array([-1, 1, 1, 1])[:, None, None]
    options = {"accumulator": 8, "overflow": overflow}
    wanted, counts = Hw(collapse="off", **options).prepare(module).run_counting(x, "*")
    found, counted = Hw(pipeline=states, **options).prepare(module).run_counting(x, "*")
    same(found, wanted, 5, module)
    assert {which for _, which in counts} == {"sum", "state"}
    assert counted.keys() == counts.keys()
    for register, total in counts.items():
        np.testing.assert_array_equal(counted[register], total)
    with pytest.raises(SpirError, match="the accumulator of %n is -480 in channel 0 at step 0"):
        Hw(pipeline=states, accumulator=8, overflow="error").prepare(module).run(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            module_of(Tensor((3,), Spikes(4, "rate", 0, 4, Scale.of(1))), ("y", Integrate(), "x")),
            "the pipeline is one of bit-coded neurons, and %x is spikes[4, rate",
        ),
        (
            module_of(Tensor((3,), Real()), ("q", Quantize(1.0, 0, 4), "x"), ("e", Encode(4, "suffix"), "q")),
            "the pipeline is one of bit-coded neurons, and %e is spikes[4, suffix",
        ),
    ],
    ids=["rate", "sorted"],
)
def test_a_network_that_is_no_pipeline_of_bits_is_refused(module, message):
    with pytest.raises(SpirError) as caught:
        Hw(pipeline="two").prepare(module)
    assert caught.value.code == "backend"
    assert message in str(caught.value)
    assert "fix: convert with @stem, or pipeline=off" in str(caught.value)


def test_what_hw_refuses_a_pipeline_refuses_too():
    module = module_of(
        Tensor((3,), Real()), ("r", Relu(), "x"), ("q", Quantize(1.0, 0, 15), "r"), ("e", Encode(4), "q")
    )
    with pytest.raises(SpirError, match="hw computes on integers, and relu works on reals"):
        Hw(pipeline="two").prepare(module)


@pytest.mark.parametrize("text", ["hw{delays=off}", "hw{pipeline=off, delays=off}"])
def test_delays_without_a_pipeline_are_refused(text):
    with pytest.raises(SpirError, match="delays are those of a pipeline, and it is off"):
        spir.compile(residual(1), [], backend=text)


def test_a_network_without_trains_takes_a_sample_a_step():
    module = module_of(Tensor((2,), Real()), ("q", Quantize(1.0, 0, 4), "x"), ("y", Add(), "q q"))
    stream = Hw(pipeline="one").prepare(module)
    assert (stream.latency, stream.interval) == (0, 1)
    same(stream.run(X, "*"), interpreter.run(module, X, "*"), len(X), module)


def test_no_samples_take_no_steps():
    stream = Hw(pipeline="two").prepare(residual(1))
    assert stream.run(X[:0], "*")["y"].shape == (0, 2)
    assert stream.bytes_per_sample == Hw(collapse="off").prepare(residual(1)).bytes_per_sample
