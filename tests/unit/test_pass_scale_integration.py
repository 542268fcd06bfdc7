"""scale-integration and calibrate-bias: sums that fit a register, by how much they miss, and what no scale mends."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spir import interpreter, pipeline
from spir.conformance.strategies import bounded
from spir.driver import Context, backend_of
from spir.ir import Array, Module
from spir.ops._accumulation import errors, shifts
from spir.ops.avg_pool import AvgPool
from spir.ops.concat import Concat
from spir.ops.flatten import Flatten
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.passes.scale_integration import divided, rescaled
from spir.ranges import accumulated, analyse
from spir.types import Int, Scale, Spikes
from tests.unit.small_networks import BIAS, conv, images, linear, network, op_of, ops_of, refusal, run, text_of

SPIKING = "canonicalize, fold-bn, calibrate-range{pools=on}, quantize, propagate-scales{join=rescale}, "
FUSED = SPIKING + "derive-thresholds{neuron=stem}, fuse-neuron"
ONE = Scale.of(1)
ONES = Array.of([1.0])


def two_layers() -> Module:
    return network(
        ("a", conv(3, padding=(1, 1, 1, 1), bias=Array.of([0.7, -0.4, 0.1])), "x"),
        ("b", Relu(), "a"),
        ("c", AvgPool((2, 2), (1, 1)), "b"),
        ("d", Flatten(), "c"),
        ("e", linear(4, 36, bias=Array.of([0.5, 0.0, -1.0, 2.0])), "d"),
    )


def neuron(positive: int, negative: int, bits: int, *, signed: bool = False) -> Module:
    """One neuron of weights that add up to so much above and below 0, in synapses of at most 127."""
    weights = [w for total, sign in ((positive, 1), (negative, -1)) for w in parts(total, sign)]
    lo, hi = Spikes.limits(bits, "bits", signed=signed)
    law = NeuronStem(bits, Array.of([1]), Array.of([2**19]), 2**20, 1.0)
    lines = (("sum", Linear(Array.of([weights]), Array.of([1.0])), "x"), ("y", law, "sum"))
    return network(*lines, shape=(len(weights),), encoding=Spikes(bits, "bits", lo, hi, ONE))


def parts(total: int, sign: int) -> list[int]:
    return [sign * 127] * (total // 127) + [sign * (total % 127)] * (total % 127 > 0)


def states(module: Module, frames: np.ndarray, name: str = "y") -> list[int]:
    """The state of a neuron after each frame, by Python integers; frames are ``[T, n]`` spikes."""
    node = module.definitions[name]
    weights = module.definitions[node.operands[0]].op.weight.values[0].tolist()
    r, steps, state, found = int(shifts(node.op.shift)[0]), len(frames), 0, []
    for t, frame in enumerate(frames.tolist()):
        sum_ = sum(w * s for w, s in zip(weights, frame, strict=True))
        state += math.floor(Fraction(sum_ * 2 ** (steps - 1 - t), 2**r) + Fraction(1, 2))
        found.append(state)
    return found


def extreme(module: Module, *, top: bool) -> np.ndarray:
    """The frames ``[T, n]`` that drive the neuron furthest."""
    weights = module.definitions["sum"].op.weight.values[0]
    train = module.input.type.encoding
    ends = [(hi if (w > 0) == top else lo) for lo, hi in train.frames for w in weights.tolist()]
    return np.reshape(ends, (train.steps, len(weights)))


@bounded(60)
@given(st.integers(0, 30000), st.integers(0, 30000), st.integers(2, 8), st.booleans(), st.integers(16, 20))
def test_the_guaranteed_scale_is_the_least_that_no_input_overflows(positive, negative, bits, signed, width):
    if not positive + negative or (signed and bits < 2):
        return
    module = neuron(positive, negative, bits, signed=signed)
    after = run(module, f"scale-integration{{bits={width}}}")
    ends = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    reached = [v for top in (True, False) for v in states(after, extreme(after, top=top))]
    assert ends[0] <= min(reached) <= max(reached) <= ends[1]
    held = accumulated(after.definitions["y"], after, analyse(after))
    assert (min(held.lo), max(held.hi)) == (min(reached), max(reached))  # the bounds are reached
    r = int(shifts(op_of(after, "y").shift)[0])
    if r:
        nodes = tuple(
            attrs.evolve(n, op=attrs.evolve(n.op, shift=r - 1)) if n.result == "y" else n for n in after.nodes
        )
        less = attrs.evolve(after, nodes=nodes)
        beyond = [v for top in (True, False) for v in states(less, extreme(less, top=top))]
        assert min(beyond) < ends[0] or max(beyond) > ends[1]


def test_the_logarithm_is_a_first_guess_only():
    """N = 16643 at 6 bits: floor would give -32769 at r = 5, and the rounded shift just fits."""
    module = neuron(0, 16643, 6)
    assert math.ceil(math.log2(63 * 16643 / 32767)) == 5
    assert sum((-16643 << k) >> 5 for k in range(6)) == -32769
    after = run(module, "scale-integration")
    assert op_of(after, "y").shift == 5
    assert states(after, extreme(after, top=False))[-1] >= -32768


@bounded(60)
@given(st.lists(st.integers(-4000, 4000), min_size=2, max_size=8), st.integers(0, 9))
def test_a_scaled_sum_misses_by_no_more_than_its_bound(frames, r):
    steps = len(frames)
    exact = sum(Fraction(f * 2 ** (steps - 1 - t), 2**r) for t, f in enumerate(frames))
    found = sum(math.floor(Fraction(f * 2 ** (steps - 1 - t), 2**r) + Fraction(1, 2)) for t, f in enumerate(frames))
    least, _, most = errors(r, steps)
    assert least <= found - exact <= most


def test_the_mean_of_what_rounding_adds_is_that_of_all_residues():
    for r in range(1, 5):
        missed = [
            sum(math.floor(Fraction(f << k, 2**r) + Fraction(1, 2)) - Fraction(f << k, 2**r) for k in range(r))
            for f in range(2**r)
        ]
        assert sum(missed) / len(missed) == errors(r, r)[1] == Fraction(1, 2) * (1 - Fraction(1, 2**r))
    assert [float(e) for e in errors(2, 8)] == [-0.25, 0.375, 1.0]


@bounded(80)
@given(
    st.integers(1, 5000),
    st.integers(-(2**20), 2**20),
    st.integers(1, 2**20),
    st.integers(0, 6),
    st.integers(-3000, 3000),
)
def test_a_law_on_scaled_sums_is_the_law_on_sums_where_nothing_is_rounded(mul, add, div, r, sum_):
    law = NeuronStem(16, Array.of([mul]), Array.of([add]), div, 1.0, signed=True)
    found = rescaled(law, np.array([r]), 1)
    by = Fraction(int(found[0].values[0]) * sum_ + int(found[1].values[0]), int(np.ravel(np.asarray(found[2]))[0]))
    mean = errors(r, 1)[1]
    assert math.floor(by) == math.floor((mul * 2**r * (sum_ - mean) + add) / Fraction(div))


def test_a_divisor_stands_for_multiplier_and_shift():
    law = NeuronStem(8, Array.of([3]), Array.of([7 * 2**10 + 2**9]), 2**10, 1.0)
    mul, add, div = divided(law, np.array([2]), 8)
    assert mul.values.tolist() == [1]
    assert div == 85  # 1024 / (3 * 4) = 85.3
    assert add.values.tolist() == [math.floor(7.5 * 85 - Fraction(3, 8))]


@pytest.mark.parametrize("options", ["", "r=data", "per=channel", "divisor=255", "r=data, per=channel, divisor=255"])
def test_a_network_with_scaled_sums_computes_nearly_the_same_on_all_backends(options):
    before = run(two_layers(), FUSED, images(40))
    after = run(before, f"scale-integration{{bits=14{options and ', '}{options}}}", images(40))
    x = images(20)
    exact, found = (m.types[m.output].decode(interpreter.run(m, x)[m.output]) for m in (before, after))
    assert not np.array_equal(exact, found)
    np.testing.assert_allclose(found, exact, atol=(0.3 if "divisor" in options else 0.05) * np.abs(exact).max())
    wanted = interpreter.run(after, x, "*")
    for backend in ("serial", "hw"):
        ran = backend_of(backend).prepare(after).run(x, "*")
        assert all(np.array_equal(ran[name], wanted[name]) for name in wanted if name != "x")
    found_ranges = analyse(after)
    for node in after.nodes:
        held = accumulated(node, after, found_ranges)
        if held is not None and "data" not in options and after.operand_types(node)[0].train is not None:
            assert max(held.bits) <= 14
    if "divisor" in options:
        laws = [n.op for n in ops_of(after, NeuronStem)]
        assert all(
            (op.mul.values == 1).all() and np.max(np.asarray(getattr(op.div, "values", op.div))) <= 255 for op in laws
        )


def test_pools_that_stay_on_integers_are_scaled_too():
    lines = [
        ("a", conv(3), "x"),
        ("b", MaxPool((2, 2), (1, 1)), "a"),
        ("c", Relu(), "b"),
        ("d", conv(2, 3, kernel=1), "c"),
    ]
    before = run(network(*lines), FUSED, images(30))
    assert list(ops_of(before, MaxPool))
    after = run(before, "scale-integration{bits=13, per=channel}", images(30))
    assert any(shifts(n.op.shift).any() for n in ops_of(after, Integrate))
    x = images(10)
    exact, found = (m.types[m.output].decode(interpreter.run(m, x)[m.output]) for m in (before, after))
    np.testing.assert_allclose(found, exact, atol=0.1 * np.abs(exact).max())


def test_layers_that_fit_stay_as_they_are_and_notes_say_which():
    before = run(two_layers(), FUSED, images(40))
    after = run(before, "scale-integration{bits=40}")
    assert after == before


def test_a_sum_of_one_step_beyond_its_register_is_refused_with_its_channel():
    assert text_of(refusal(neuron(33000, 0, 4), "scale-integration")) == (
        "error[E-ISUM]: the sum of one step of %sum reaches 0..33000 in channel 0, 233 beyond a register of 16 bits\n"
        "       from: net.y (net.py line 7)\n"
        "       pass: scale-integration\n"
        "        fix: calibrate-range{pools=on} where average pools are read, propagate-scales{join=rescale} where "
        "branches meet, both in @sdann; or weights of fewer bits, by 1: quantize{weights=...}, @sdann{weights=...}"
    )
    assert shifts(op_of(run(neuron(32767, 0, 4), "scale-integration"), "y").shift)[0] > 0


REFUSED: dict[str, tuple[str, str]] = {
    "r=data, overflow=wrap": (
        (
            "E-CALIB-OVF: scale-integration: r from data lets rare sums overflow, and a register that wraps turns "
            "their signs"
        ),
        "r=guaranteed, or overflow=saturate where the chip does that",
    ),
    "divisor=255, bits=8, sum_bits=30": (
        "E-DIVISOR: no r lets %b fit 8 bits",
        "more bits, fewer bits of codes or weights, or a larger divisor",
    ),
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_no_scale_mends_is_refused(options):
    before = run(two_layers(), FUSED, images(40))
    found = refusal(before, f"scale-integration{{{options}}}", images(4))
    (diagnostic,) = found.diagnostics
    assert f"{diagnostic.code}: {diagnostic.message}" == REFUSED[options][0]
    assert {n.label: n.text for n in diagnostic.notes}["fix"] == REFUSED[options][1]


def test_networks_without_such_sums_and_scaled_ones_are_refused():
    before = run(two_layers(), FUSED, images(40))
    assert refusal(two_layers(), "scale-integration").code == "type"
    assert refusal(before, "scale-integration{r=data}").code == "data"
    scaled = run(before, "scale-integration{bits=14}")
    assert "is scaled already" in str(refusal(scaled, "scale-integration"))


def test_biases_become_whole_codes_where_the_register_is_too_narrow():
    before = run(two_layers(), FUSED, images(40))
    same = run(before, "calibrate-bias{register=40}")
    assert op_of(same, "b").add == op_of(before, "b").add
    after = run(before, "calibrate-bias{when=always}")
    law: Any = op_of(after, "b")
    div = np.asarray(getattr(law.div, "values", law.div))
    each = div.reshape(-1, *[1] * (law.add.values.ndim - 1)) if div.ndim else div
    assert not ((law.add.values - each // 2) % each).any()
    x = images(20)
    old, new = (interpreter.run(m, x, "b")["b"] for m in (before, after))
    codes = [m.types["b"].integers(v) for m, v in ((before, old), (after, new))]
    assert 0 < np.abs(codes[0] - codes[1]).max() <= 1


@bounded(150)
@given(
    st.lists(st.integers(-3, 6), min_size=2, max_size=2),
    st.lists(st.integers(-3000, 3000), min_size=2, max_size=2),
    st.integers(1, 40),
    st.tuples(st.integers(-31, 31), st.integers(-31, 31)).map(sorted),
    st.sampled_from([(0, 15), (-8, 7)]),
)
def test_a_bias_that_no_sum_shows_is_cut_to_its_register_and_changes_no_code(mul, add, div, ends, clip):
    op = Requant(Array.of(mul), Array.of(add), div, *clip, 1.0)
    before = network(("b", op, "x"), shape=(2,), encoding=Int(*ends, ONE))
    after: Any = op_of(run(before, "calibrate-bias{register=6}"), "b")
    z = np.stack([np.arange(ends[0], ends[1] + 1)] * 2, axis=1)

    def codes(law: Requant, channel: int) -> list[int]:
        return np.asarray(law.reference((before.input.type,), z))[:, channel].tolist()

    def fits(bias: int, channel: int) -> bool:
        return abs(bias) // max(abs(mul[channel]), 1) < 2**5

    def nearest(channel: int) -> int | None:
        """By trial: the bias nearest to 0 that gives the same codes, where all are one end of the clip."""
        if set(codes(op, channel)) not in ({clip[0]}, {clip[1]}):
            return None
        bias = add[channel] - div // 2
        step = -1 if bias > 0 else 1
        while bias:
            tried = attrs.evolve(op, add=Array.of([bias + step + div // 2] * 2))
            if codes(tried, channel) != codes(op, channel):
                break
            bias += step
        return bias

    for channel, made in enumerate(np.broadcast_to(after.add.values, 2).tolist()):
        if fits(add[channel] - div // 2, channel):
            assert made == add[channel]
        elif (bias := nearest(channel)) is not None and fits(bias, channel):
            assert made == bias + div // 2
            assert codes(after, channel) == codes(op, channel)
        else:  # a sum shows it: the nearest whole number of codes
            assert made == add[channel] // div * div + div // 2


@pytest.mark.parametrize(("ends", "cut"), [((0, 20), 50), ((0, 70), 50 - 21), ((0, 160), 50 - 9000)])
def test_one_channel_moves_and_another_that_is_off_stays_off(ends, cut):
    """20 is off without a bias, 70 with one of -21, which fits 6 bits; what keeps 160 off does not, and stays."""
    op = Requant(Array.of([1]), Array.of([50 + 33, 50 - 9000, 50 + 7]), 100, 0, 15, 1.0)
    before = network(("b", op, "x"), shape=(3,), encoding=Int(*ends, ONE))
    after: Any = op_of(run(before, "calibrate-bias{register=6}"), "b")
    assert after.add.values.tolist() == [50, cut, 57]
    always: Any = op_of(run(before, "calibrate-bias{when=always}"), "b")
    assert always.add.values.tolist() == [50, 50 - 9000, 50]


def test_what_no_sum_shows_is_judged_behind_the_layers_that_moved():
    """%a moves from {1} to {1, 2}, and a bias of %b cut for 1 alone would let 2 through."""
    lines = (
        ("a", Requant(Array.of([1]), Array.of([110]), 100, 0, 15, 1.0), "x"),
        ("b", Requant(Array.of([100]), Array.of([-75000]), 1, 0, 255, 1.0), "a"),
    )
    before = network(*lines, shape=(1,), encoding=Int(0, 59, ONE))
    after = run(before, "calibrate-bias{register=6}")
    x = np.arange(60).reshape(60, 1)
    codes = [set(np.ravel(interpreter.run(after, x, name)[name]).tolist()) for name in "ab"]
    assert codes == [{1, 2}, {0}]
    assert op_of(after, "b").add.values.tolist() == [-200]


@pytest.mark.parametrize("r", ["guaranteed", "data"])
def test_readouts_have_one_scale_because_classes_are_compared(r):
    before = run(two_layers(), FUSED, images(40))
    after = run(before, f"scale-integration{{bits=13, r={r}, per=channel}}", images(40))
    (readout,) = (n for n in after.nodes if isinstance(n.op, Integrate))
    assert readout.result == after.output
    assert isinstance(readout.op.shift, int)
    assert readout.op.shift > 0
    assert (shifts(op_of(after, "b").shift).size == 3) == (r == "guaranteed")


def test_a_channel_that_is_off_costs_the_others_no_divisors():
    found = []
    for bias in (-1.0, -500.0):
        layers = (("a", conv(3, bias=Array.of([0.7, bias, 0.1])), "x"), ("b", Relu(), "a"))
        fused = run(network(*layers), FUSED, images(40))
        after = run(fused, "scale-integration{bits=12, divisor=255}")
        found.append(shifts(op_of(after, "b").shift).max())
        x = images(30)
        codes = [m.types["b"].decode(interpreter.run(m, x, "b")["b"])[:, 1] for m in (fused, after)]
        assert bias > -500 or not np.any(codes)
    assert found[1] <= found[0] + 1


def test_a_channel_that_no_input_wakes_does_not_move_its_layer():
    bias = Array.of([0.7, -9000.0, 0.1])
    before = run(network(("a", conv(3, bias=bias), "x"), ("b", Relu(), "a")), FUSED, images(40))
    narrow = pipeline.run(before, pipeline.parse("scale-integration{bits=12}"), Context(None, 0)).module
    context = Context(None, 0)
    after = pipeline.run(narrow, pipeline.parse("calibrate-bias{register=12}"), context).module
    assert context.notes == [
        "biases in steps of codes: none; all others fit 12 bits",
        "biases of channels that always give the same code cut, which changes none: %b",
    ]
    x = images(30)
    old, new = (interpreter.run(m, x, "b")["b"] for m in (narrow, after))
    np.testing.assert_array_equal(old, new)
    assert np.abs(op_of(after, "b").add.values).max() < np.abs(op_of(narrow, "b").add.values).max()


def test_a_bias_of_too_many_codes_is_refused():
    before = run(
        network(("a", conv(2, bias=BIAS), "x"), ("b", Relu(), "a"), ("c", conv(2, kernel=1), "b")), FUSED, images(9)
    )
    assert refusal(before, "calibrate-bias{when=always, bits=2}").code == "E-VRANGE"
    assert refusal(network(("b", Relu(), "x")), "calibrate-bias").code == "type"


def laws(weights: list[list[int]], mul: Array, add: Array, div: Array) -> Module:
    """Two neurons on a sum."""
    source = Spikes(8, "bits", 0, 255, ONE)
    lines = (("s", Linear(Array.of(weights), ONES), "x"), ("y", NeuronStem(8, mul, add, div, 1.0), "s"))
    return network(*lines, shape=(len(weights[0]),), encoding=source)


@pytest.mark.parametrize("mul", [[3, -2], [3, 0]])
def test_no_divisor_stands_for_a_multiplier_that_is_not_positive(mul):
    module = laws([[100, 100], [50, -60]], Array.of(mul), Array.of([2048, 2048]), Array.of([4096, 4096]))
    assert refusal(module, "scale-integration{divisor=255}").code == "E-DIVISOR"


def test_a_divisor_below_one_is_refused_and_one_scale_a_channel_mends_it():
    module = laws([[127] * 8, [1] * 8], Array.of([1, 1]), Array.of([0, 0]), Array.of([2**13, 2**4]))
    assert "would be divided by 0." in str(refusal(module, "scale-integration{divisor=255, bits=14}"))
    after = run(module, "scale-integration{divisor=255, bits=14, per=channel}")
    assert op_of(after, "y").div.values.tolist() == [2**13 >> int(op_of(after, "y").shift.values[0]), 16]


def test_the_bias_of_one_channel_does_not_make_another_coarse():
    found = [
        run(
            laws([[100, 100]] * 2, Array.of([1]), Array.of(add), Array.of([4096])),
            "scale-integration{divisor=255, per=channel}",
        )
        for add in ([2048, 2048], [2048, -3000 * 4096])
    ]
    first = [int(np.broadcast_to(shifts(op_of(m, "y").shift), (2,))[0]) for m in found]
    assert first[0] == first[1]


def test_hardware_takes_every_readout_whose_scale_is_guaranteed():
    rng = np.random.default_rng(8)
    for _ in range(40):
        weights = rng.integers(-127, 128, (2, 3))
        line = (("s", Linear(Array.of(weights), ONES), "x"), ("y", Integrate(Array.of(rng.integers(-9, 9, 2))), "s"))
        module = network(*line, shape=(3,), encoding=Spikes(8, "bits", 0, 255, ONE))
        after = run(module, "scale-integration{bits=9, sum_bits=20}")
        held = accumulated(after.definitions["y"], after, analyse(after))
        assert max(held.bits) <= 9


def test_notes_bound_what_a_readout_misses_and_say_how_full_registers_are():
    weights = [[1] * 40 + [16] * 64]
    line = (("s", Linear(Array.of(weights), ONES), "x"), ("y", Integrate(), "s"))
    module = network(*line, shape=(104,), encoding=Spikes(8, "bits", 0, 255, ONE))
    context = Context(None, 0)
    after = pipeline.run(module, pipeline.parse("scale-integration"), context)
    r = int(shifts(op_of(after.module, "y").shift)[0])
    x = np.zeros((8, 1, 104), dtype=np.int64)
    for t in range(8):
        wanted = 2 ** (r - 1 - (7 - t)) if r - 1 - (7 - t) >= 0 else 0  # half of what is lost of this frame
        x[t, 0, 40 : 40 + wanted // 16] = 1
        x[t, 0, : wanted % 16] = 1
    exact, found = (interpreter.run(m, x)["y"].item() for m in (module, after.module))
    missed = found - Fraction(exact, 2**r)
    (note,) = after.journal[-1].notes
    most = float(note.split(" to +")[1].split()[0])
    assert 1.5 < missed <= most + 0.05
    full = pipeline.run(
        two_layers(), pipeline.parse(f"{FUSED}, scale-integration{{bits=14, r=data}}"), Context(images(40), 0)
    )
    assert all("states of the data fill" in line for line in full.journal[-1].notes)


def test_pools_behind_concatenations_and_other_pools_become_neurons():
    lines = [
        *(("a", conv(2), "x"), ("b", Relu(), "a"), ("q", AvgPool((2, 2), (1, 1)), "b")),
        *(("p", AvgPool((2, 1), (1, 1)), "q"), ("c", Concat(), "p p"), ("d", Flatten(), "c"), ("e", linear(2, 4), "d")),
    ]
    after = run(network(*lines), SPIKING.removesuffix(", "), images(9))
    assert {"q.clip", "p.clip"} <= {node.result for node in ops_of(after, Requant)}
    plain = run(
        network(*lines), SPIKING.removesuffix(", ").replace("pools=on", 'pools=on, layers="net.[!qp]"'), images(9)
    )
    assert not {"q.clip", "p.clip"} & {node.result for node in ops_of(plain, Requant)}
