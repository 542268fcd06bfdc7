"""hw on registers of stated width: what they keep, what is counted, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import spir
from spir.backend import Counting
from spir.backends.hw import Hw
from spir.backends.serial import Serial
from spir.conformance.examples import Example, corners, module_of, probing_input
from spir.errors import SpirError
from spir.ir import Array, Module
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_matrix import NeuronMatrix
from spir.ops.neuron_parallel import NeuronParallel
from spir.ops.neuron_stem import NeuronStem
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.profile import HOME
from spir.types import Int, Scale, Spikes, Tensor
from tests.unit.registers import Recount, flat

ONE = Scale.of(1.0)
MODES = ("saturate", "wrap")
COLLAPSE = ("auto", "off")


@pytest.fixture
def chip(tmp_path):
    """Writes a profile that differs from the ideal one, and gives its path."""

    def write(**figures) -> str:
        lines = (HOME / "ideal.toml").read_text(encoding="utf-8").split("[source]")[0].splitlines()
        kept = [line for line in lines if line.split(" ")[0] not in figures]
        spelled = {True: "true", False: "false"}
        given = [f"{k} = {spelled.get(v, v) if isinstance(v, bool) else repr(v)}" for k, v in figures.items()]
        path = Path(tmp_path, f"chip{len(list(tmp_path.iterdir()))}.toml")
        path.write_text("\n".join([*kept, *given]), encoding="utf-8")
        return str(path)

    return write


def linear(*rows: list[int]) -> Linear:
    return Linear(weight=Array.of([*rows]), weight_scale=Array.of([1.0]))


def bits(steps: int, size: int = 1, *, signed: bool = False) -> Tensor:
    return Tensor((size,), Spikes(steps, "bits", *Spikes.limits(steps, "bits", signed=signed), ONE))


def small(rng: np.random.Generator) -> Module:
    """Two layers of STEM neurons and a readout, on six signed inputs of four bits."""
    first, second, third = (rng.integers(-9, 10, shape) for shape in ((5, 6), (4, 5), (3, 4)))
    stem = NeuronStem(4, Array.of([1]), Array.of(rng.integers(-20, 20, 5)), 8, 1.0)
    signed = NeuronStem(3, Array.of([3, 2, -1, 1]), Array.of([4]), 16, 1.0, signed=True)
    return module_of(
        bits(4, 6, signed=True),
        ("a", linear(*first.tolist()), "x"),
        ("n", stem, "a"),
        ("b", linear(*second.tolist()), "n"),
        ("m", signed, "b"),
        ("c", linear(*third.tolist()), "m"),
        ("y", Integrate(bias=Array.of([100, 0, -100])), "c"),
    )


def by_hand(module: Module, x: np.ndarray, sum_bits: int, state_bits: int, *, wrap: bool) -> tuple[list, dict]:
    """`small` on one sample in plain integers: the readout, and overflows by value, register and channel."""
    counts: dict[tuple[str, str, int], int] = {}

    def held(value: int, width: int, *register) -> int:
        half = 2 ** (width - 1)
        if -half <= value < half:
            return value
        counts[register] = counts.get(register, 0) + 1
        return (value + half) % (2 * half) - half if wrap else max(-half, min(half - 1, value))

    frames = x.tolist()
    for layer, neuron in (("a", "n"), ("b", "m"), ("c", "y")):
        weight = module.definitions[layer].op.weight.values.tolist()
        states = [0] * len(weight)
        for t, frame in enumerate(frames):
            for o, row in enumerate(weight):
                total = held(sum(w * s for w, s in zip(row, frame, strict=True)), sum_bits, layer, "sum", o)
                states[o] = held(states[o] + total * 2 ** (len(frames) - 1 - t), state_bits, neuron, "state", o)
        op = module.definitions[neuron].op
        if neuron == "y":
            bias = op.bias.values.tolist()
            return [
                held(v + b, state_bits, "y", "state", o) for o, (v, b) in enumerate(zip(states, bias, strict=True))
            ], counts
        mul, add = (np.broadcast_to(a.values, len(states)).tolist() for a in (op.mul, op.add))
        lo, hi = op.clip
        codes = [min(max((m * v + a) // op.div, lo), hi) for m, v, a in zip(mul, states, add, strict=True)]
        frames = [[(c % 2**op.bits) >> (op.bits - 1 - t) & 1 for c in codes] for t in range(op.bits)]
        if lo < 0:
            frames[0] = [-spike for spike in frames[0]]
    raise AssertionError


@pytest.mark.parametrize("collapse", COLLAPSE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_registers_keep_and_count_what_plain_integers_do(chip, mode, collapse, seed):
    rng = np.random.default_rng(seed)
    module, widths = small(rng), ((4, 7), (5, 6), (3, 6), (4, 6))[seed]
    x = probing_input(module, seed)
    profile = chip(sum_bits=widths[0], state_bits=widths[1])
    program = Hw(collapse=collapse, profile=profile, overflow=mode).prepare(module)
    stored, overflows = program.run_counting(x)
    expected, counts = [], {}
    for sample in x.swapaxes(0, 1):
        row, found = by_hand(module, sample, *widths, wrap=mode == "wrap")
        expected.append(row)
        counts = {k: counts.get(k, 0) + found.get(k, 0) for k in counts | found}
    np.testing.assert_array_equal(stored["y"], expected)
    assert flat(overflows) == counts
    assert counts
    assert {which for _, which, _ in counts} == {"sum", "state"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name", ["neuron_stem", "neuron_parallel", "neuron_ca_lif", "neuron_matrix", "integrate", "requant"]
)
def test_every_neuron_keeps_its_state_in_the_register(chip, name, mode):
    rng, overflowed = np.random.default_rng(5), 0
    for module in corners(name):
        width = int(rng.integers(3, 8))
        x = probing_input(module, 1)
        backend = Hw(profile=chip(state_bits=width), overflow=mode)  # prepare refuses scaled states that may wrap
        stored, overflows = backend.build(module).run_counting(x, "*")
        recount = Recount(module, 64, width, mode)
        found = recount.run(x)
        assert flat(overflows) == dict(recount.counts)
        for value, array in found.items():
            np.testing.assert_array_equal(stored[value], array)
        overflowed += bool(recount.counts)
    assert overflowed


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("width", [2, 8, 16])
def test_a_sum_at_the_very_end_of_its_register_fits_and_one_more_does_not(chip, width, sign):
    end = 2 ** (width - 1) - 1 if sign > 0 else -(2 ** (width - 1))
    profile, ones = chip(sum_bits=width), np.ones((1, 1, 1), dtype=np.int64)
    fits, more = (module_of(bits(1), ("l", linear([w]), "x"), ("y", Integrate(), "l")) for w in (end, end + sign))
    program = Hw(profile=profile, overflow="saturate").prepare(fits)
    assert not program.registers.loose
    stored, overflows = program.run_counting(ones)
    assert (stored["y"].item(), dict(overflows)) == (end, {})
    assert Hw(profile=profile).prepare(fits).run(ones)["y"].item() == end
    with pytest.raises(SpirError) as caught:
        Hw(profile=profile).prepare(more)
    (found,) = caught.value.diagnostics
    needs = f"the weight sum of %l needs {width + 1} bits in channel 0, and registers have {width}"
    assert (found.code, found.message) == ("E-ISUM", f"{needs}: it may be {end + sign}, 1 beyond")
    for mode, kept in (("saturate", end), ("wrap", -end - 1)):
        stored, overflows = Hw(profile=profile, overflow=mode).prepare(more).run_counting(ones)
        assert (stored["y"].item(), flat(overflows)) == (kept, {("l", "sum", 0): 1})


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("biased", [False, True])
def test_a_state_at_the_very_end_of_its_register_fits_and_one_more_does_not(chip, sign, biased):
    end = 127 if sign > 0 else -128
    x, profile = np.ones((2, 1, 1), dtype=np.int64), chip(state_bits=8)

    def module(to: int) -> Module:  # 3 w + bias
        bias = Array.of([to - 3 * 20 * sign]) if biased else None
        if biased:
            return module_of(bits(2), ("l", linear([20 * sign]), "x"), ("y", Integrate(bias=bias), "l"))
        codes = Tensor((1,), Int(min(to, 0), max(to, 0), ONE))
        return module_of(codes, ("y", Integrate(), "x"))

    def given(to: int) -> np.ndarray:
        return x if biased else np.array([[to]])

    program = Hw(profile=profile, overflow="wrap").prepare(module(end))
    assert not program.registers.loose
    assert program.run(given(end))["y"].item() == end
    with pytest.raises(SpirError, match=rf"the accumulator of %y needs 9 bits .* may be {end + sign}, 1 beyond"):
        Hw(profile=profile).prepare(module(end + sign))
    stored, overflows = Hw(profile=profile, overflow="wrap").prepare(module(end + sign)).run_counting(given(end + sign))
    assert (stored["y"].item(), flat(overflows)) == (-end - 1, {("y", "state", 0): 1})


def test_a_prefix_that_overflows_counts_although_the_value_fits(chip):
    module = module_of(bits(8, signed=True), ("d", Scaling(Array.of([2])), "x"), ("y", Integrate(), "d"))
    minus_one = np.array([-1, *[1] * 7]).reshape(8, 1, 1)
    stored, overflows = Hw(profile=chip(state_bits=8), overflow="saturate").prepare(module).run_counting(minus_one)
    assert stored["y"].item() == -128 + 254
    assert flat(overflows) == {("y", "state", 0): 1}
    wrapped, overflows = Hw(profile=chip(state_bits=8), overflow="wrap").prepare(module).run_counting(minus_one)
    assert wrapped["y"].item() == -2  # the sum of all frames, modulo 2^8
    assert flat(overflows) == {("y", "state", 0): 2}  # -256 becomes 0, and 128 becomes -128


@pytest.mark.parametrize("mode", MODES)
def test_counts_and_results_do_not_depend_on_batches_or_threads(chip, mode, monkeypatch):
    module = small(np.random.default_rng(9))
    example = Example(module, probing_input(module, 2))
    x = example.take([i % len(example) for i in range(90)]).x
    program = Hw(profile=chip(sum_bits=5, state_bits=8), overflow=mode).prepare(module)
    stored, overflows = program.run_counting(x, "*")
    total: dict = {}
    for i in range(0, 90, 7):
        some, counts = program.run_counting(x[:, i : i + 7], "*")
        np.testing.assert_array_equal(some["m"], stored["m"][:, i : i + 7])
        total = {k: total.get(k, 0) + flat(counts).get(k, 0) for k in total | flat(counts)}
    assert flat(overflows) == total
    again, counts = program.run_counting(x, "*")
    assert flat(counts) == total
    monkeypatch.setattr("spir.backends._hw_threads.workers", lambda: 1)
    monkeypatch.setattr("spir.backends._hw_program.workers", lambda: 1)
    alone, counts = program.run_counting(x, "*")
    assert flat(counts) == total
    for name, values in stored.items():
        np.testing.assert_array_equal(values, again[name])
        np.testing.assert_array_equal(values, alone[name])
    np.testing.assert_array_equal(program.run(x)["y"], stored["y"])


def test_an_overflow_that_is_an_error_names_the_first_of_the_first_sample(chip):
    module = module_of(bits(3, 2), ("l", linear([1, 1], [3, 4], [5, 1]), "x"), ("y", Integrate(), "l"))
    fine, late, early = [[0, 0]] * 3, [[0, 1], [1, 0], [1, 1]], [[1, 1]] * 3
    x = np.array([fine, fine, late, early]).swapaxes(0, 1)
    profile = chip(sum_bits=3)
    program = Hw(profile=profile, overflow="error").prepare(module)
    assert program.run(x[:, :2])["y"].shape == (2, 3)
    told = set()
    for given in (x, x[:, 1:], x[:, 2:3], np.repeat(x, 20, axis=1)):
        with pytest.raises(SpirError) as caught:
            program.run(given)
        told.add(str(caught.value))
    (text,) = told
    assert text.startswith("error[E-ISUM]: the weight sum of %l is 4 in channel 1 at step 0, and 3 bits hold -4..3\n")
    assert "from: net.l" in text
    assert "overflow=saturate goes on and counts" in text
    with pytest.raises(SpirError, match="the weight sum of %l is 7 in channel 1 at step 0"):
        program.run(x[:, 3:])
    narrow = Hw(profile=chip(state_bits=6), overflow="error").prepare(module)
    with pytest.raises(
        SpirError, match=r"\[E-VRANGE\]: the accumulator of %y is 42 in channel 1 at step 1, and 6 bits"
    ):
        narrow.run(x)


def test_a_network_that_fits_runs_as_it_did_and_counts_nothing():
    module = small(np.random.default_rng(3))
    plain = Hw().prepare(module)
    x = probing_input(module, 4)
    for overflow in ("saturate", "wrap", "error"):
        program = Hw(accumulator=16, overflow=overflow).prepare(module)
        assert program.merged == plain.merged == {"x", "a", "n", "b", "m", "c"}
        stored, overflows = program.run_counting(x)
        assert not overflows
        np.testing.assert_array_equal(stored["y"], plain.run(x)["y"])


def test_only_what_may_overflow_is_stepped(chip):
    module = small(np.random.default_rng(3))
    found = Hw(profile=chip(state_bits=64, sum_bits=5), overflow="saturate").prepare(module)
    assert {name for name, which in found.registers.loose if which == "sum"} == {"a", "b", "c"} - found.merged
    wide = Hw(profile=chip(sum_bits=7), overflow="saturate").prepare(module)
    assert wide.merged


def test_a_chip_without_multiplier_adds_the_offset_in_the_state(chip):
    profile = chip(state_bits=8, requant="divisor", largest_divisor=16)
    stem = NeuronStem(3, Array.of([1]), Array.of([40, -30]), 8, 1.0)
    fused = module_of(bits(3, 2), ("l", linear([9, 9], [-9, -9]), "x"), ("n", stem, "l"), ("y", Integrate(), "n"))
    law = Requant(Array.of([1]), Array.of([40, -30]), 8, 0, 7, 1.0)
    apart = module_of(bits(3, 2), ("l", linear([9, 9], [-9, -9]), "x"), ("s", Integrate(), "l"), ("n", law, "s"))
    x = np.array([[[1, 1], [1, 0], [0, 0]], [[1, 1], [0, 1], [0, 0]], [[0, 1], [1, 1], [0, 0]]])
    with pytest.raises(SpirError) as caught:
        Hw(profile=profile).prepare(fused)
    (found,) = caught.value.diagnostics
    assert found.code == "E-DIVISOR"
    assert found.message == "sum and offset of %n need 9 bits, and a state has 8: they may be 166, 39 beyond"
    # the first sample is 13 x 9 + 40 = 157 and -13 x 9 - 30 = -147
    for mode, first in (("saturate", [7, 0]), ("wrap", [0, 7])):
        for module in (fused, apart):
            stored, overflows = Hw(profile=profile, overflow=mode).prepare(module).run_counting(x, "n")
            codes = stored["n"] if module is apart else np.tensordot([4, 2, 1], stored["n"], 1)
            assert codes.tolist() == [first, [7, 0], [5, 0]]
            assert flat(overflows) == {("n", "state", 0): 1, ("n", "state", 1): 1}


LIMITS = {
    "weight_bits": ({"weight_bits": 4}, "backend", "a weight of %l is 9, which takes 5 bits, and ideal has 4"),
    "sum_bits": ({"sum_bits": 4}, "E-ISUM", "the weight sum of %l needs 5 bits in channel 0, and registers have 4"),
    "state_bits": ({"state_bits": 6}, "E-VRANGE", "the accumulator of %n needs 7 bits in channel 0"),
    "fan_in": ({"fan_in": 1}, "backend", "a neuron of channel 1 behind %l has 2 synapses, and ideal allows 1"),
    "signed_spikes": ({"signed_spikes": False}, "E-SIGNED-SPIKE", "%n sends spikes of -1"),
    "steps": ({"steps": 2}, "backend", "%l takes 3 time steps, and ideal allows 2"),
    "multiplier": (
        {"requant": "multiplier", "multiplier_bits": 2, "product_bits": 64},
        "E-MULT-RANGE",
        "the multiplier 5 of %n takes 3 bits, and ideal has 2",
    ),
    "product": (
        {"requant": "multiplier", "multiplier_bits": 8, "product_bits": 8},
        "E-VRANGE",
        "mul * z + add of %n needs 10 bits, and the product has 8: it may be 319, 192 beyond",
    ),
    "shift after": (
        {"requant": "multiplier", "multiplier_bits": 8, "product_bits": 64},
        "E-MULT-RANGE",
        "%n divides by 6, and ideal shifts by powers of two",
    ),
    "divisor without multiplier": (
        {"requant": "divisor", "largest_divisor": 5},
        "E-DIVISOR",
        "%n multiplies by 5, and ideal has no multiplier",
    ),
    "divisor": ({"requant": "divisor", "largest_divisor": 5}, "E-DIVISOR", "%n divides by 6, and ideal by 5 at most"),
    "threshold": (
        {"requant": "divisor", "largest_divisor": 5, "state_bits": 4},
        "E-DIVISOR",
        "the first threshold of %n is 6 * 2^2 = 24, and a state of 4 bits holds up to 7",
    ),
    "shift": ({"requant": "shift"}, "E-MULT-RANGE", "%n multiplies by 5, and ideal has no multiplier"),
    "shift by": ({"requant": "shift"}, "E-MULT-RANGE", "%n divides by 6, and ideal shifts by powers of two"),
}
FIXES = {
    "weight_bits": "quantize{weights=4}",
    "sum_bits": "fewer weight bits, split fan-in, or propagate-scales{join=rescale}; accumulator=7 holds",
    "state_bits": "accumulator=7 holds every sum and state, scale-integration{bits=6}",
    "fan_in": "no pass splits a neuron",
    "signed_spikes": "quantize{input=unsigned} for raw pixels, relu behind every layer; or neuron=stem",
    "steps": "quantize{bits=2}",
    "multiplier": "propagate-scales{bits=2}",
    "product": "fewer bits of multipliers",
    "shift after": "propagate-scales{grid=shift}",
    "divisor without multiplier": "scale-integration{bits=63, divisor=5}",
    "divisor": "scale-integration{bits=63, divisor=5}",
    "threshold": "scale-integration{bits=4, divisor=5}, or @sdann{accumulator=4, divisor=5}, or fewer bits of codes",
    "shift": "no pass makes all steps powers of two",
    "shift by": "no pass makes all steps powers of two",
}


def limited() -> Module:
    """Weighs up to 9, sums 0..9, states 0..63, one to two synapses, signed spikes, 3 steps, (5 z + 4) // 6."""
    stem = NeuronStem(3, Array.of([5]), Array.of([4]), 6, 1.0, signed=True)
    return module_of(bits(3, 2), ("l", linear([9, 0], [4, -2]), "x"), ("n", stem, "l"), ("y", Integrate(), "n"))


def counting() -> Module:
    """A train of signed counts."""
    return module_of(Tensor((2,), Int(-4, 4, ONE)), ("n", Encode(4, "isi"), "x"), ("y", Integrate(), "n"))


def test_signed_bits_need_no_signed_spikes(chip):
    """Their sign stands in the first frame, whose spikes go over synapses of negated weights."""
    assert not list(Hw(profile=chip(signed_spikes=False)).refusals(limited()))


@pytest.mark.parametrize("overflow", ["refuse", "saturate"])
@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_is_refused_with_the_first_layer_by_how_much_and_the_way_out(chip, name, overflow):
    figures, code, message = LIMITS[name]
    module = counting() if name == "signed_spikes" else limited()
    refused = [d for r in Hw(profile=chip(**figures), overflow=overflow).refusals(module) for d in r.diagnostics]
    if overflow == "saturate" and name in ("sum_bits", "state_bits"):
        assert not refused
        return
    found = [d for d in refused if d.message.startswith(message)]
    assert [d.code for d in found] == [code]
    notes = {note.label: note.text for note in found[0].notes}
    assert FIXES[name] in notes["fix"]
    assert notes["from"] == ("net.n" if "%n" in message else "net.l")
    assert notes["op"].startswith("%n = " if "%n" in message else "%l = ")


@pytest.mark.parametrize(
    "figures", [LIMITS[n][0] for n in ("weight_bits", "sum_bits", "state_bits", "fan_in", "steps")]
)
def test_at_a_limit_nothing_is_refused(chip, figures):
    ((name, value),) = figures.items()
    least = {"weight_bits": 5, "sum_bits": 5, "state_bits": 7, "fan_in": 2, "steps": 3}[name]
    assert value < least
    assert not list(Hw(profile=chip(**{name: least})).refusals(limited()))


def test_what_no_setting_can_run_says_all_that_breaks_at_once(chip):
    profile = chip(
        weight_bits=3,
        sum_bits=3,
        state_bits=4,
        fan_in=1,
        steps=1,
        requant="divisor",
        largest_divisor=2,
    )
    with pytest.raises(SpirError) as caught:
        Hw(profile=profile).prepare(limited())
    codes = [d.code for d in caught.value.diagnostics]
    assert codes == ["backend", "backend", "backend", "E-ISUM", "E-VRANGE", *["E-DIVISOR"] * 3]
    assert "also: %n" in str(caught.value)


def test_the_first_layer_is_named_and_the_others_beside_it(chip):
    module = small(np.random.default_rng(0))
    refused = list(Hw(profile=chip(sum_bits=3)).refusals(module))
    (found,) = (d for r in refused for d in r.diagnostics)
    notes = {note.label: note.text for note in found.notes}
    assert notes["op"].startswith("%a = ")
    assert notes["also"] == "%b, %c"


def test_factors_of_joins_are_weights_and_fan_in_counts_paths(chip):
    wide = module_of(bits(2, 2), ("s", Scaling(Array.of([300, 1])), "x"), ("l", linear([1, 2], [0, 0]), "s"))
    (refusal,) = Hw(profile=chip(weight_bits=8)).refusals(wide)
    assert "the factor of %s is 300, which takes 10 bits" in str(refusal)
    assert "propagate-scales{join=rescale}" in str(refusal)
    assert not list(Hw(profile=chip(fan_in=2)).refusals(wide))
    assert len(list(Hw(profile=chip(fan_in=1)).refusals(wide))) == 1


def test_a_matrix_without_a_law_is_for_chips_that_know_any(chip):
    plain = NeuronParallel(2, Array.of([1]), Array.of([0]), 2, 1.0)
    leaky = NeuronMatrix(Array.of([[2, 0], [1, 2]]), Array.of([2, 2]), Array.of([0, 0]), plain.mul, plain.add, 2, 1.0)
    module = module_of(Tensor((1,), Spikes(2, "suffix", 0, 2, ONE)), ("n", leaky, "x"))
    assert not list(Hw(profile=chip()).refusals(module))
    (refusal,) = Hw(profile=chip(requant="divisor", largest_divisor=9)).refusals(module)
    assert "compares by a matrix over time, and ideal has one law: divisor" in str(refusal)


def test_sums_that_64_bits_cannot_simulate_are_refused_whatever_overflow_is(chip):
    codes = Tensor((1,), Int(0, 2**62, ONE))
    module = module_of(codes, ("y", Integrate(), "x"))
    (refusal,) = Hw(profile=chip(state_bits=60), overflow="wrap").refusals(module)
    assert "the accumulator of %y may leave the 64 bits that registers are simulated in" in str(refusal)


def test_integers_that_no_train_carries_pass_through_the_state_register(chip):
    law = Requant(Array.of([1]), Array.of([0]), 1, -1000, 1000, 1.0)
    for module in (
        module_of(Tensor((1,), Int(-200, 200, ONE)), ("y", law, "x")),
        module_of(Tensor((1,), Int(-100, 100, ONE)), ("l", linear([2]), "x"), ("y", law, "l")),
    ):
        x = np.array([[-100], [100], [64], [-64], [3]])
        program = Hw(profile=chip(state_bits=8), overflow="saturate").prepare(module)
        stored, overflows = program.run_counting(x)
        recount = Recount(module, 64, 8, "saturate")
        np.testing.assert_array_equal(stored["y"], recount.run(x)["y"])
        assert flat(overflows) == dict(recount.counts)


@pytest.mark.parametrize("collapse", COLLAPSE)
@pytest.mark.parametrize("code", ["bits", "suffix", "isi"])
def test_an_encoder_clips_what_a_register_that_overflowed_brings(chip, code, collapse):
    codes = Tensor((1,), Int(0, 7, ONE))
    encode = Encode(steps=4 if code == "bits" else 14, code=code)
    module = module_of(codes, ("d", Scaling(Array.of([2])), "x"), ("e", encode, "d"), ("y", Integrate(), "e"))
    x = np.array([[0], [1], [3], [4], [7]])
    for mode, expected in (("saturate", [0, 2, 6, 7, 7]), ("wrap", [0, 2, 6, 0, 0])):
        program = Hw(collapse=collapse, profile=chip(state_bits=4), overflow=mode).prepare(module)
        stored, overflows = program.run_counting(x, "*")
        assert stored["y"].reshape(-1).tolist() == expected  # 8 and 14 wrap to -8 and -2, and no threshold is reached
        assert module.types["e"].integers(stored["e"]).reshape(-1).tolist() == expected
        assert flat(overflows)["d", "state", 0] == 2


def test_a_compiled_network_tells_its_overflows(chip):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(48, 2)
    ).eval()
    x = np.random.default_rng(0).normal(size=(12, 2, 6, 6)).astype(np.float32)
    narrow = chip(sum_bits=10, state_bits=14)
    snn = spir.compile(model, "@stem", data=x, check="off", backend=Hw(profile=narrow, overflow="saturate"))
    found = snn.overflows(x)
    assert isinstance(snn.executable, Counting)
    assert found
    assert all(counts.dtype == np.int64 and counts.any() for counts in found.values())
    halves = [flat(snn.overflows(part)) for part in (x[:5], x[5:])]
    assert flat(found) == {k: sum(h.get(k, 0) for h in halves) for k in halves[0] | halves[1]}
    assert not spir.compile(snn.module, [], backend="hw").overflows(x)
    with pytest.raises(SpirError, match=r"\[usage\]: serial has no registers that could overflow"):
        spir.compile(snn.module, [], backend=Serial()).overflows(x)
    told = snn.report(x).overflows
    counted = {(o.value, o.register): (o.channels, round(o.times * len(x))) for o in told}
    assert counted == {k: (int((v > 0).sum()), int(v.sum())) for k, v in found.items()}
    assert f"{told[0].value} {told[0].register} {told[0].times:.4g} in" in str(snn.report(x))
    assert spir.compile(snn.module, [], backend="hw").report(x).overflows is None
    with pytest.raises(SpirError, match=r"E-ISUM|E-VRANGE"):
        spir.compile(snn.module, [], backend=Hw(profile=narrow))
    failing = spir.compile(snn.module, [], backend=Hw(profile=narrow, overflow="error"))
    for run in (failing, failing.overflows, failing.report):
        with pytest.raises(SpirError, match="at step"):
            run(x)


def test_scaled_states_that_may_leave_their_register_do_not_run_where_it_wraps(chip):
    stem = NeuronStem(4, Array.of([1]), Array.of([2]), 4, 1.0, shift=2)
    module = module_of(bits(4), ("l", linear([3]), "x"), ("n", stem, "l"))
    full = np.ones((4, 1, 1), dtype=np.int64)
    profile = chip(state_bits=5)  # 6 + 3 + 2 + 1 fits
    assert not Hw(profile=profile, overflow="wrap").prepare(module).run_counting(full)[1]
    narrow = chip(state_bits=4)
    (refusal,) = Hw(profile=narrow, overflow="wrap").refusals(module)
    assert str(refusal).startswith(
        "error[E-CALIB-OVF]: the state of %n is scaled, and may leave its 4 bits all the same"
    )
    assert "fix: overflow=saturate, or scale-integration{bits=4, r=guaranteed}, or @sdann{accumulator=4" in str(refusal)
    _, found = Hw(profile=narrow, overflow="saturate").prepare(module).run_counting(full, "*")
    assert flat(found) == {("n", "state", 0): 3}  # 6, 9, 9, 8 of 7
    (refusal,) = Hw(profile=narrow).refusals(module)
    assert "scale-integration{bits=4, r=guaranteed}" in str(refusal)
