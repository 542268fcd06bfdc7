"""The schedule: windows of neurons, delays of skip paths, latency: on chains, joins, tournaments and no trains."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spir import driver, pipeline
from spir.conformance.examples import module_of
from spir.conformance.strategies import bounded
from spir.driver import Context
from spir.errors import SpirError
from spir.ir import Array, Module, Op
from spir.ops._neuron import Neuron
from spir.ops.add import Add
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.sigmoid import Sigmoid
from spir.schedule import STATES, Delay, Phase, Schedule, schedule
from spir.types import Current, Encoding, Int, Real, Scale, Spikes, Tensor
from tests.unit.stem_networks import stem_network

ONE, ZERO, STEP = Array.of([1]), Array.of([0]), Array.of([1.0])
S = Scale.of(1)
REAL = Tensor((3,), Real())


def linear() -> Op:
    return Linear(Array.of(np.eye(3, dtype=int)), STEP)


def neuron(bits: int) -> Op:
    return NeuronStem(bits, ONE, ZERO, 1, 1.0)


def bits(steps: int) -> Encoding:
    return Spikes(steps, "bits", 0, 2**steps - 1, S)


def encoder(steps: int) -> list[tuple[str, Op, str]]:
    return [("q", Quantize(1.0, 0, 2**steps - 1), "x"), ("e", Encode(steps), "q")]


def chain(layers: Sequence[int], first: int, *, fused: bool = True) -> Module:
    """Encoder, linear maps and neurons of so many bits, and a readout."""
    lines, last = encoder(first), "e"
    for i, steps in enumerate(layers):
        lines.append((f"c{i}", linear(), last))
        if fused:
            lines.append((f"n{i}", neuron(steps), f"c{i}"))
        else:
            lines += [
                (f"z{i}", Integrate(), f"c{i}"),
                (f"r{i}", Requant(ONE, ZERO, 1, 0, 2**steps - 1, 1.0), f"z{i}"),
                (f"n{i}", Encode(steps), f"r{i}"),
            ]
        last = f"n{i}"
    return module_of(REAL, *lines, ("c", linear(), last), ("y", Integrate(), "c"))


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("layers", range(5))
def test_a_chain_of_neurons_takes_one_window_each_and_one_for_the_input(layers, steps):
    found = schedule(chain([steps] * layers, steps))
    assert (found.windows, found.latency) == (layers + 1, (layers + 1) * steps)
    assert [found.start[f"n{i}"] for i in range(layers)] == [*range(1, layers + 1)]
    assert found.start["e"] == 0
    assert found.start["y"] == found.start["c"] == layers
    assert found.delays == ()


def test_layers_of_unequal_bits_take_as_long_as_their_trains():
    found = schedule(chain([8, 2, 5], 3))
    assert (found.windows, found.latency) == (4, 3 + 8 + 2 + 5)


@pytest.mark.parametrize("layers", [[], [4], [8, 2, 5]])
def test_neurons_in_three_ops_are_scheduled_like_fused_ones(layers):
    fused, unfused = (schedule(chain(layers, 4, fused=f)) for f in (True, False))
    assert (fused.windows, fused.latency, fused.delays) == (unfused.windows, unfused.latency, unfused.delays)
    assert {name: unfused.start[name] for name in fused.start} == fused.start


def residual(depth: int, first: int, *body: int, order: str = "skip last") -> Module:
    """A neuron, and beside a shortcut as many more as ``body`` has bits; ``depth`` more follow."""
    lines = [*encoder(first), ("c", linear(), "e"), ("n", neuron(first), "c")]
    last = "n"
    for i, steps in enumerate(body):
        lines += [(f"c{i}", linear(), last), (f"n{i}", neuron(steps), f"c{i}")]
        last = f"n{i}"
    lines.append(("s", Add(), f"{last} n" if order == "skip last" else f"n {last}"))
    last = "s"
    for i in range(depth):
        lines += [(f"d{i}", linear(), last), (f"m{i}", neuron(first), f"d{i}")]
        last = f"m{i}"
    return module_of(REAL, *lines, ("y", Integrate(), last))


@pytest.mark.parametrize("order", ["skip last", "skip first"])
@pytest.mark.parametrize("branch", [1, 2, 3])
def test_a_skip_branch_waits_as_many_windows_as_the_other_has_neurons(branch, order):
    found = schedule(residual(1, 8, *[8] * branch, order=order))
    assert found.delays == (Delay("s", "n", branch, branch * 8),)
    assert (found.windows, found.latency) == (branch + 3, (branch + 3) * 8)


def test_branches_of_equal_depth_do_not_wait():
    module = module_of(
        REAL,
        *encoder(4),
        *[(f"{c}{i}", op, o) for i in "ab" for c, op, o in (("c", linear(), "e"), ("n", neuron(4), f"c{i}"))],
        ("s", Add(), "na nb"),
        ("y", Integrate(), "s"),
    )
    found = schedule(module)
    assert (found.delays, found.windows, found.latency) == ((), 2, 8)


def test_a_delay_lasts_as_many_steps_as_the_windows_it_waits_for():
    """The branch inside has 12 bits in the second of the two windows that the skip waits."""
    found = schedule(residual(0, 8, 12, 8))
    assert found.latency == 8 + 8 + 12 + 8
    assert found.delays == (Delay("s", "n", 2, 8 + 12),)


def test_both_of_two_early_operands_wait_each_for_itself():
    module = module_of(
        REAL,
        *encoder(4),
        ("a", neuron(4), "e"),
        ("b", neuron(4), "a"),
        ("s", Add(), "e b a"),
        ("y", Integrate(), "s"),
    )
    assert schedule(module).delays == (Delay("s", "e", 2, 8), Delay("s", "a", 1, 4))


def test_a_window_is_as_long_as_its_longest_train():
    module = module_of(
        REAL,
        *encoder(4),
        ("a", neuron(9), "e"),
        ("b", neuron(4), "e"),
        ("za", Integrate(), "a"),
        ("zb", Integrate(), "b"),
        ("y", Add(), "za zb"),
    )
    found = schedule(module)
    assert (found.windows, found.latency) == (2, 4 + 9)


def test_windows_behind_the_output_do_not_count():
    lines = [*encoder(4), ("a", neuron(5), "e"), ("b", neuron(6), "a")]
    module = module_of(REAL, *lines)
    assert (schedule(module).windows, schedule(module).latency) == (3, 15)
    early = Module(module.input, module.nodes, "a")
    assert (schedule(early).windows, schedule(early).latency) == (2, 9)


@pytest.mark.parametrize(
    "module",
    [
        module_of(REAL),
        module_of(REAL, ("r", Relu(), "x"), ("s", Sigmoid(), "r")),
        module_of(REAL, ("q", Quantize(1.0, 0, 3), "x"), ("l", linear(), "q"), ("d", Dequantize(), "l")),
        module_of(Tensor((3,), Int(0, 3, S)), ("l", linear(), "x"), ("r", Requant(ONE, ZERO, 1, 0, 3, 1.0), "l")),
    ],
    ids=["nothing", "reals", "quantised", "integers"],
)
def test_reals_and_integers_take_no_windows(module):
    found = schedule(module)
    assert (found.windows, found.latency, found.delays) == (0, 0, ())
    assert set(found.start.values()) == {0}


@pytest.mark.parametrize(
    "encoding", [bits(5), Spikes(5, "rate", 0, 5, S), Current(5, "bits", -90, 80, -6, 6, S)], ids=str
)
def test_an_input_of_trains_takes_one_window(encoding):
    bare = schedule(module_of(Tensor((3,), encoding)))
    assert (bare.windows, bare.latency, bare.start) == (1, 5, {"x": 0})
    read = schedule(module_of(Tensor((3,), encoding), ("y", Integrate(), "x")))
    assert (read.windows, read.latency) == (1, 5)


def test_neurons_behind_an_input_of_trains_take_one_window_each():
    x = Tensor((3,), bits(5))
    fused = module_of(x, ("a", linear(), "x"), ("n", neuron(3), "a"), ("y", Integrate(), "n"))
    unfused = module_of(x, ("z", Integrate(), "x"), ("r", Requant(ONE, ZERO, 1, 0, 7, 1.0), "z"), ("n", Encode(3), "r"))
    for module in (fused, unfused):
        found = schedule(module)
        assert (found.windows, found.latency, found.start["n"]) == (2, 8, 1)


def test_an_encoder_of_the_inputs_integers_does_not_wait():
    module = module_of(Tensor((3,), Int(0, 15, S)), ("e", Encode(4), "x"), ("y", Integrate(), "e"))
    assert (schedule(module).windows, schedule(module).start["e"]) == (1, 0)


def test_a_flattened_or_pooled_integral_waits_like_any_other():
    x = Tensor((1, 2, 2), bits(4))
    module = module_of(
        x,
        ("z", Integrate(), "x"),
        ("p", MaxPool((2, 2), (2, 2)), "z"),
        ("f", Flatten(), "p"),
        ("r", Requant(ONE, ZERO, 1, 0, 15, 1.0), "f"),
        ("e", Encode(4), "r"),
    )
    assert (schedule(module).windows, schedule(module).start["e"]) == (2, 1)


def run(module: Module, passes: str) -> Module:
    return pipeline.run(module, pipeline.parse(passes), Context(None, 0), checked=False).module


@pytest.mark.parametrize(
    ("kernel", "levels"), [((1, 1), 0), ((1, 2), 1), ((2, 2), 2), ((3, 3), 4), ((1, 5), 3), ((4, 4), 4)]
)
@pytest.mark.parametrize("form", ["fused", "unfused"])
def test_a_lowered_max_pool_takes_a_window_a_round_and_one_where_it_is_made_one_train(kernel, levels, form):
    module = module_of(
        Tensor((1, 5, 5), Real()),
        ("q", Quantize(1.0, 0, 15), "x"),
        ("c", Conv2d(Array.of([[[[1]]]]), STEP), "q"),
        ("r", Requant(ONE, ZERO, 1, 0, 15, 1.0), "c"),
        ("p", MaxPool(kernel, (1, 1)), "r"),
        ("d", Conv2d(Array.of([[[[1]]]]), STEP), "p"),
        ("y", Integrate(), "d"),
    )
    passes = "derive-thresholds" if form == "unfused" else "derive-thresholds, fuse-neuron"
    plain, materialised = (
        schedule(run(module, f"lower-max-pool{{materialise={on}}}, {passes}")) for on in ("off", "on")
    )
    single = kernel == (1, 1)  # nothing is left of it but a neuron
    assert (materialised.windows, materialised.latency) == (levels + 3, (levels + 3) * 4)
    assert (plain.windows, plain.latency) == (levels + 2 + single, (levels + 2 + single) * 4)
    assert all(delay.windows >= 1 and delay.steps == 4 * delay.windows for delay in plain.delays)
    assert bool(plain.delays) == bool(levels)


def test_a_lenet_like_network_has_the_latency_of_its_layers():
    rng = np.random.default_rng(0)
    network = module_of(
        Tensor((1, 8, 8), Real()),
        ("c1", Conv2d(Array.of(rng.standard_normal((2, 1, 3, 3)))), "x"),
        ("r1", Relu(), "c1"),
        ("c2", Conv2d(Array.of(rng.standard_normal((3, 2, 3, 3)))), "r1"),
        ("r2", Relu(), "c2"),
        ("f", Flatten(), "r2"),
        ("l1", Linear(Array.of(rng.standard_normal((5, 48)))), "f"),
        ("r3", Relu(), "l1"),
        ("l2", Linear(Array.of(rng.standard_normal((4, 5)))), "r3"),
    )
    data = rng.standard_normal((4, 1, 8, 8))
    for b in (3, 8):
        outcome = driver.opt(network, f"@stem{{bits={b}}}", data=data)
        stages = {stage.name: schedule(stage.module) for stage in outcome.stages}
        fused, unfused = stages["fuse-neuron"], stages["derive-thresholds"]
        assert sum(isinstance(n.op, Neuron) for n in outcome.module.nodes) == 3
        assert (fused.windows, fused.latency, fused.delays) == (4, 4 * b, ())
        assert (unfused.windows, unfused.latency) == (4, 4 * b)
        assert stages["propagate-scales"].windows == 0


# --- windows of neurons, and the interval between samples --------------------------------------------------------


@pytest.mark.parametrize("b", [1, 4, 8])
@pytest.mark.parametrize("layers", range(1, 5))
def test_layer_l_accumulates_in_window_l_minus_1_and_generates_in_window_l(layers, b):
    found = schedule(chain([b] * layers, b))
    phases = {phase.value: phase for phase in found.phases}
    for i in range(layers):  # layer l is n{l - 1}
        assert phases[f"n{i}"].accumulate == (i * b, (i + 1) * b)
        assert phases[f"n{i}"].generate == ((i + 1) * b, (i + 2) * b)
    assert phases["e"] == Phase("e", None, (0, b), 0, b)
    assert phases["y"] == Phase("y", (layers * b, (layers + 1) * b), None, found.latency, found.latency)
    assert (found.interval("one"), found.interval("two"), found.interval()) == (2 * b, b, b)
    for samples in (1, 2, 5):
        assert found.steps(samples, "one") == (layers + 1) * b + (samples - 1) * 2 * b
        assert found.steps(samples) == (layers + 1) * b + (samples - 1) * b
    assert found.steps(0) == 0


@pytest.mark.parametrize("b", [1, 4])
def test_without_neurons_an_input_follows_the_other_at_once(b):
    found = schedule(chain([], b))
    assert [found.interval(states) for states in STATES] == [b, b]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("layers", "first", "one", "two"),
    [([8, 2, 5], 3, 11, 8), ([3], 8, 11, 8), ([2, 2], 9, 11, 9), ([1, 9, 1], 1, 10, 9)],
)
def test_the_longest_windows_that_meet_in_a_neuron_say_the_interval(layers, first, one, two, fused):
    found = schedule(chain(layers, first, fused=fused))
    assert (found.interval("one"), found.interval("two")) == (one, two)


def test_a_neuron_that_waits_for_a_longer_train_of_its_window_holds_its_sum_meanwhile():
    module = module_of(
        REAL,
        *encoder(4),
        ("a", neuron(9), "e"),
        ("b", neuron(3), "e"),
        ("c", neuron(3), "b"),
        ("za", Integrate(), "a"),
        ("zc", Integrate(), "c"),
        ("y", Add(), "za zc"),
    )
    found = {phase.value: phase for phase in schedule(module).phases}
    assert found["c"] == Phase("c", (4, 7), (13, 16), 13, 16)
    assert found["c"].busy("two") == ((4, 13), (13, 16))
    assert found["c"].busy("one") == ((4, 16),)
    assert found["za"] == Phase("za", (4, 13), None, 16, 16)  # waits for the other sum
    assert found["zc"] == Phase("zc", (13, 16), None, 16, 16)
    assert (schedule(module).interval("one"), schedule(module).interval("two")) == (4 + 9, 12)


def test_an_integer_input_is_held_until_it_was_read_for_the_last_time():
    lines = [("e", Encode(4), "x"), ("z", Integrate(), "e")]
    direct = schedule(module_of(Tensor((3,), Int(0, 15, S)), *lines))
    later = schedule(module_of(Tensor((3,), Int(0, 15, S)), *lines, ("y", Add(), "z x")))
    assert [phase.busy("two") for phase in direct.phases if phase.value == "x"] == [((0, 0),)]
    assert [phase.busy("two") for phase in later.phases if phase.value == "x"] == [((0, 4),)]


def test_a_network_without_trains_has_no_interval():
    found = schedule(module_of(REAL, ("q", Quantize(1.0, 0, 3), "x"), ("l", linear(), "q")))
    assert [found.interval(states) for states in STATES] == [0, 0]


def test_neurons_have_one_state_variable_or_two():
    with pytest.raises(SpirError, match="there is no number of state variables called 'three'"):
        schedule(chain([4], 4)).interval("three")


def last_read(module: Module, found: Schedule, name: str, *, out: bool) -> int:
    """The step before which an integer is read for the last time; ``out``: before which trains of it are out."""
    steps = [found.begin[name]]
    for node in module.readers[name]:
        train, at = node.type.train, found.begin[node.result]
        steps.append(at + node.type.steps * out if train else last_read(module, found, node.result, out=out))
    return max(steps)


def spans(module: Module, found: Schedule, states: str) -> Iterator[tuple[str, str, int, int]]:
    """State variables, and the steps in which they hold the first sample."""
    for name, type_ in module.types.items():
        node, first = module.definitions.get(name), found.begin[name]
        read = None if node is None else node.operands[0]
        if node is None or isinstance(node.op, Encode):
            end = first + type_.steps if type_.train else last_read(module, found, name, out=states == "one")
            yield name, "code", first, end
        elif isinstance(node.op, NeuronStem):
            yield name, "sum", found.begin[read], first
            yield name, "sum" if states == "one" else "code", first, first + type_.steps
        elif isinstance(node.op, Integrate) and module.types[read].train:
            yield name, "sum", found.begin[read], last_read(module, found, name, out=states == "one")


def collides(module: Module, found: Schedule, interval: int, states: str) -> bool:
    """Whether any state variable is asked to hold two of four samples, step by step."""
    held: dict[tuple[str, str, int], int] = {}
    for name, variable, first, end in spans(module, found, states):
        for sample, step in itertools.product(range(4), range(first, end)):
            if held.setdefault((name, variable, step + sample * interval), sample) != sample:
                return True
    return False


@given(st.integers(0, 10_000))
@bounded(20)
def test_the_interval_is_the_least_at_which_no_state_variable_is_asked_to_hold_two_samples(seed):
    module = stem_network(seed)
    found = schedule(module)
    for states in STATES:
        least = next(i for i in range(1, found.latency + 2) if not collides(module, found, i, states))
        assert found.interval(states) == least
