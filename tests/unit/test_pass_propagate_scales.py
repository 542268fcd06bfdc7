"""propagate-scales: where biases end, how branches meet, and the integers of each requant."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import attrs
import numpy as np
import pytest

from spir import interpreter, pipeline
from spir.driver import Context
from spir.ir import Array, Module, Node, Op
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.ops.slice import Slice
from spir.ops.softmax import Softmax
from spir.ops.upsample import Upsample
from spir.types import scale_of
from tests.unit.small_networks import (
    BIAS,
    IMAGE,
    TO_INTEGERS,
    conv,
    images,
    linear,
    network,
    norm,
    op_of,
    ops_of,
    refusal,
    run,
    shown,
    text_of,
)

# where biases end


THROUGH: dict[str, list[tuple[str, Op, str]]] = {
    "nothing": [("s", conv(2, bias=BIAS), "x")],
    "average pool": [("a", conv(2, bias=BIAS), "x"), ("s", AvgPool((2, 2), (1, 1)), "a")],
    "padded average pool": [("a", conv(2, bias=BIAS), "x"), ("s", AvgPool((3, 2), (2, 1), (1, 1, 0, 1)), "a")],
    "global average pool": [("a", conv(2, bias=BIAS), "x"), ("s", GlobalAvgPool(6), "a")],
    "pad": [("a", conv(2, bias=BIAS), "x"), ("s", Pad((1, 0, 0, 1, 2, 0)), "a")],
    "slice": [("a", conv(2, bias=BIAS), "x"), ("s", Slice((1, 0, 0), (2, 3, 2), (1, 2, 1)), "a")],
    "flatten": [("a", conv(2, bias=BIAS), "x"), ("s", Flatten(), "a")],
    "scale": [("a", conv(2, bias=BIAS), "x"), ("s", Scaling(Array.of([-2.0, 0.5])), "a")],
    "add with an activation": [
        ("a", conv(2, bias=BIAS), "x"),
        ("b", Relu(), "a"),
        ("c", conv(2, kernel=1, seed=9, bias=BIAS), "b"),
        ("s", Add(), "b c"),
    ],
    "add with a bias": [
        ("a", conv(2, bias=BIAS), "x"),
        ("b", conv(2, seed=9, bias=BIAS), "x"),
        ("s", Add(), "a b a"),
    ],
    "depthwise convolution": [
        ("a", conv(2, bias=BIAS), "x"),
        ("s", conv(2, 1, seed=9, groups=2, padding=(1,) * 4, bias=BIAS), "a"),
    ],
    "padded convolution": [
        ("a", conv(2, bias=BIAS), "x"),
        ("s", conv(2, seed=9, padding=(1, 0, 1, 2), bias=BIAS), "a"),
    ],
    "matrix": [("a", conv(2, bias=BIAS), "x"), ("b", Flatten(), "a"), ("s", linear(3, 12), "b")],
    "max pool": [("a", conv(2, bias=BIAS), "x"), ("s", MaxPool((2, 2), (1, 1), (1, 0, 0, 1)), "a")],
    "shift": [("a", conv(2, bias=BIAS), "x"), ("s", Shift(Array.of([-0.3, 0.2])), "a")],
    "reshape": [("a", conv(2, bias=BIAS), "x"), ("s", Reshape((2, 6)), "a")],
    "permute": [("a", conv(2, bias=BIAS), "x"), ("s", Permute((0, 2, 1)), "a")],
    "upsample": [("a", conv(2, bias=BIAS), "x"), ("s", Upsample((2, 1)), "a")],
    "concat": [
        ("a", conv(2, bias=BIAS), "x"),
        ("b", conv(2, seed=9, bias=Array.of([-0.1, 0.2])), "x"),
        ("s", Concat(), "a b"),
    ],
}
ACTIVATIONS = 'calibrate-range{layers="net.[brs]"}'  # no clip between weights: their biases meet
WAYS = pytest.mark.parametrize("way", THROUGH)


def assert_same_codes(real: Module, integer: Module, name: str, x: np.ndarray) -> None:
    """The integer network has the codes of the network of reals, except at ties that a join's multipliers round."""
    wanted = interpreter.run(real, x, f"{name}.code")[f"{name}.code"]
    found = integer.types[name].integers(np.asarray(interpreter.run(integer, x, name)[name], dtype=np.int64))
    apart = np.abs(wanted - found)
    assert apart.max() <= 1
    assert apart.mean() <= (0.01 if list(ops_of(integer, Scaling)) else 0)
    assert len(np.unique(found)) > 5


@WAYS
def test_a_bias_ends_in_the_requant_whatever_stands_between(way):
    module = network(*THROUGH[way], ("r", Relu(), "s"))
    quantised = run(module, f"{ACTIVATIONS}, quantize", images())
    integer = run(quantised, "propagate-scales{bits=31, width=48}", images())
    assert not [n for n in integer.nodes if getattr(n.op, "bias", None) is not None]
    assert_same_codes(quantised, integer, "r", images(50))


@WAYS
def test_a_bias_ends_in_the_readout_whatever_stands_between(way):
    module = network(*THROUGH[way])
    quantised = run(module, f"{ACTIVATIONS}, quantize", images())
    integer = run(quantised, "propagate-scales{width=48}", images())
    assert [n.result for n in integer.nodes if getattr(n.op, "bias", None) is not None] == ["s"]
    assert isinstance(op_of(integer, "s"), Integrate)
    x = images(50)
    wanted = interpreter.run(quantised, x)["s"]
    step = scale_of(integer.types["s"]).floats().max()
    np.testing.assert_allclose(
        integer.types["s"].decode(interpreter.run(integer, x)["s"]),
        wanted,
        rtol=0,
        atol=step + 2e-4 * abs(wanted).max(),
    )


def test_a_bias_that_zero_padding_cuts_off_differs_from_place_to_place():
    module = network(*THROUGH["padded convolution"], ("r", Relu(), "s"))
    integer = run(module, f"{ACTIVATIONS}, quantize, propagate-scales", images())
    assert op_of(integer, "r").add.values.shape == integer.types["r"].shape
    inner = network(*THROUGH["nothing"], ("r", Relu(), "s"))
    assert op_of(run(inner, TO_INTEGERS, images()), "r").add.values.shape == (2,)


def test_constants_per_channel_that_a_permutation_mixes_are_refused_with_their_place():
    module = network(
        ("a", conv(2), "x"),
        ("r", Relu(), "a"),
        ("k", Scaling(Array.of([1.0, 3.0])), "r"),
        ("p", Permute((1, 0, 2)), "k"),
        ("b", conv(3, 3, kernel=2), "p"),
    )
    refused = refusal(module, TO_INTEGERS, images())
    assert refused.code == "E-SCALE"
    assert {"op": "%p = permute %k", "from": "net.p (net.py line 7)"}.items() <= {
        n.label: n.text for n in refused.diagnostics[0].notes
    }.items()
    assert "fix:" in str(refused)


@pytest.mark.filterwarnings("ignore:.*the calibration data may not be what the model was trained on")
def test_no_offset_of_a_gain_near_0_drowns_in_the_rounding_of_weights():
    """The offset goes through the float weights: through rounded ones, offset / gain would blow up half a step."""
    for gamma in ([1.0, 1.0], [1.0, 1e-2], [1.0, -1e-8], [0.0, 1.0], [0.0, 0.0]):
        layer = attrs.evolve(norm(2), weight=Array.of(gamma), bias=Array.of([0.5, -1.0]))
        module = network(
            ("a", conv(2, bias=BIAS), "x"), ("r", Relu(), "a"), ("n", layer, "r"), ("s", conv(3, padding=(1,) * 4), "n")
        )
        wanted = interpreter.run(module, images(50), "s")["s"]
        integer = run(module, TO_INTEGERS, images(50))
        found = integer.types["s"].decode(interpreter.run(integer, images(50), "s")["s"])
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.03 * np.abs(wanted).max(), err_msg=str(gamma))


def test_an_offset_before_zero_padding_is_cut_off_at_the_border():
    """Against an explicit sum over the kernel's taps that lie inside the image."""
    offset, weight = np.array([0.7, -0.4]), np.random.default_rng(9).standard_normal((3, 2, 3, 3))
    module = network(
        ("r", Relu(), "x"),
        ("n", Shift(Array.of(offset)), "r"),
        ("s", Conv2d(Array.of(weight), padding=(1, 0, 2, 1)), "n"),
    )
    integer = run(module, TO_INTEGERS, images())
    (readout,) = ops_of(integer, Integrate)
    steps = scale_of(integer.types["s"]).floats().reshape(-1, 1, 1)
    wanted = np.zeros((3, *integer.types["s"].shape[1:]))
    for row, column in np.ndindex(*wanted.shape[1:]):
        for u, v in np.ndindex(3, 3):
            if 0 <= row + u - 1 < IMAGE[1] and 0 <= column + v - 2 < IMAGE[2]:
                wanted[:, row, column] += weight[:, :, u, v] @ offset
    assert readout.op.bias.values.shape == wanted.shape
    # half a step of rounding, and nine taps whose weights may be half a weight step off
    atol = 0.5 * steps.max() + 18 * 0.5 * np.abs(weight).max() / 127 * np.abs(offset).max()
    np.testing.assert_allclose(readout.op.bias.values * steps, wanted, rtol=0, atol=atol)


def test_a_maximum_lets_a_bias_per_channel_pass_and_takes_one_per_position_in():
    pool = MaxPool((2, 2), (1, 1))
    same = network(("a", conv(2, bias=BIAS), "x"), ("p", pool, "a"), ("r", Relu(), "p"))
    assert shown(run(same, TO_INTEGERS, images()))[1:] == [
        "a.sum = conv2d x.clip",
        "p.sum = max_pool a.sum",
        "r = requant p.sum",
    ]
    offset = Shift(Array.of(np.random.default_rng(5).standard_normal((2, 3, 2))))
    varied = network(("a", conv(2), "x"), ("h", offset, "a"), ("p", pool, "h"), ("r", Relu(), "p"))
    integer = run(varied, TO_INTEGERS, images())
    assert shown(integer)[1:] == [
        "a = conv2d x.clip",
        "a.biased = integrate a",
        "p = max_pool a.biased",
        "r = requant p",
    ]
    assert op_of(integer, "a.biased").bias.values.shape == (2, 3, 2)


# joins


def joined(*, factor: float = 1.0, **fields: Any) -> Module:
    """A residual join of an activation and a convolution."""
    weight = np.random.default_rng(11).standard_normal((2, 2, 1, 1)) * factor
    return network(
        ("a", Relu(), "x"), ("b", Conv2d(Array.of(weight), **fields), "a"), ("c", Add(), "a b"), ("d", Relu(), "c")
    )


def test_a_wide_join_multiplies_both_branches_by_integers_of_12_or_more_bits():
    integer = run(joined(), TO_INTEGERS, images())
    assert shown(integer)[-6:] == [
        "a = requant x.clip",
        "b = conv2d a",
        "a.wide = scale a",
        "b.wide = scale b",
        "c = add a.wide b.wide",
        "d = requant c",
    ]
    for name, source in (("a.wide", "a"), ("b.wide", "b")):
        factors = op_of(integer, name).factor.values
        scales, targets = scale_of(integer.types[source]).known, scale_of(integer.types[name]).known
        for c, factor in enumerate(factors.tolist()):
            ratio = scales[c % len(scales)] / targets[c % len(targets)]
            assert factor == ratio or factor >= 2**12
            assert abs(factor - ratio) <= Fraction(1, 2)
    assert scale_of(integer.types["a.wide"]) == scale_of(integer.types["b.wide"])


def test_branches_of_one_scale_meet_as_they_are():
    module = network(("a", Relu(), "x"), ("b", Slice((0, 1, 0), (2, 5, 4), (1, 1, 1)), "a"), ("c", Add(), "b b"))
    assert shown(run(module, TO_INTEGERS, images()))[-3:-1] == ["b = slice a", "c = add b b"]


def test_branches_in_an_exact_ratio_take_the_ratio_itself():
    module = network(("a", Relu(), "x"), ("b", Scaling(Array.of([4.0])), "a"), ("c", Add(), "a b"))
    integer = run(module, TO_INTEGERS, images())
    assert shown(integer)[-3:] == ["b.wide = scale b", "c = add a b.wide", "c.readout = integrate c"]
    assert op_of(integer, "b.wide").factor.values.tolist() == [4]


WHOLE = "canonicalize, fold-bn, calibrate-range{pools=on}, quantize, propagate-scales{join=rescale"


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.7, 4.0, 30.0])
def test_whole_steps_behind_pools_and_joins_are_multiples_of_those_of_the_sum(factor):
    lines = (
        *(
            ("w", conv(2), "x"),
            ("a", Relu(), "w"),
            ("b", Conv2d(Array.of(factor * np.eye(2).reshape(2, 2, 1, 1))), "a"),
        ),
        *(("c", Add(), "a b"), ("d", Relu(), "c"), ("e", AvgPool((2, 2), (2, 2)), "d"), ("f", conv(3, kernel=1), "e")),
        ("g", Relu(), "f"),
    )
    free, whole = (run(network(*lines), WHOLE + more, images()) for more in ("}", ", whole=on}"))
    for name in ("d", "e.clip"):
        law = op_of(whole, name)
        (source,) = (n.operands[0] for n in whole.nodes if n.result == name)
        (step,) = scale_of(whole.types[source]).known
        times = Fraction(law.scale) / step
        assert times == round(times) >= 1
        assert isinstance(law.div, int)
        assert abs(Fraction(law.div, int(law.mul.values[0])) / times - 1) < Fraction(1, 2**22)
        asked = Fraction(op_of(free, name).scale)
        assert law.scale * 10 >= asked * 9 or times == 1
        assert law.scale < 2 * asked or times == 1
    x = images(20)
    fine, coarse = (m.types["d"].decode(interpreter.run(m, x, "d")["d"]) for m in (free, whole))
    steps = [op_of(m, "d").scale for m in (free, whole)]
    assert np.abs(np.minimum(fine, 255 * steps[1]) - coarse).max() <= sum(steps) / 2 + 1e-9


def test_codes_that_a_concatenation_joins_keep_the_step_that_they_share():
    lines = (
        *(("w", conv(2), "x"), ("a", Relu(), "w"), ("p", AvgPool((3, 3), (1, 1), (1, 1, 1, 1)), "a")),
        *(("c", Concat(), "a p"), ("f", conv(3, inputs=4, kernel=1), "c"), ("g", Relu(), "f")),
    )
    free, whole = (run(network(*lines), WHOLE + more, images()) for more in ("}", ", whole=on}"))
    assert whole == free


def test_rescale_takes_signed_codes_in_steps_a_power_of_two_from_the_other_branch():
    integer = run(joined(factor=20.0), TO_INTEGERS + "{join=rescale}", images())
    assert [n.result for n in ops_of(integer, Requant)] == ["a", "b.code", "d"]
    code = op_of(integer, "b.code")
    assert (code.lo, code.hi) == (-128, 127)
    step = Fraction(code.scale) / Fraction(op_of(integer, "a").scale)
    assert step.denominator == 1
    assert step.numerator.bit_count() == 1
    (met,) = ops_of(integer, Scaling)
    assert met.operands == ("b.code",)
    assert met.op.factor.values.tolist() == [step.numerator]
    reached = interpreter.run(run(joined(factor=20.0), "calibrate-range, quantize", images()), images(), "b")["b"]
    assert 63 * code.scale < np.abs(reached).max() <= 127 * code.scale


def test_rescale_of_two_sums_measures_both():
    module = network(("a", conv(2), "x"), ("b", conv(2, seed=9), "x"), ("c", Add(), "a b"), ("d", Relu(), "c"))
    integer = run(module, TO_INTEGERS + "{join=rescale}", images())
    first, second = op_of(integer, "a.code"), op_of(integer, "b.code")
    assert abs(np.log2(first.scale / second.scale)) % 1 == 0
    assert all(interpreter.run(integer, images(), name)[name].any() for name in ("a.code", "b.code"))


@pytest.mark.parametrize("bias", [None, Array.of([0.3, -0.2])], ids=["all 0", "a bias alone"])
def test_rescale_takes_a_branch_that_is_dead(bias):
    integer = run(joined(factor=0.0, bias=bias), TO_INTEGERS + "{join=rescale}", images())
    assert run(integer, "derive-thresholds, fuse-neuron").types["d"].steps == 8
    found = integer.types["c"].decode(interpreter.run(integer, images(), "c")["c"])
    active = integer.types["a"].decode(interpreter.run(integer, images(), "a")["a"])
    wanted = active if bias is None else active + bias.values.reshape(2, 1, 1)
    np.testing.assert_allclose(found, wanted, atol=0.3 / 64)


def test_rescale_needs_data():
    quantised = run(joined(), "calibrate-range, quantize", images())
    assert text_of(refusal(quantised, "propagate-scales{join=rescale}")) == (
        "error[data]: propagate-scales{join=rescale} needs calibration data\n"
        "       pass: propagate-scales{join=rescale}\n"
        "        fix: give data=images, or --data in a shell"
    )


def test_scales_too_far_apart_for_wide_are_refused_without_data():
    quantised = run(joined(factor=1e-4), "calibrate-range, quantize", images())
    text = re.sub(r"int\S* \S+ \* (\[[^]]*\]|[\d.e-]+)", "I", text_of(refusal(quantised, "propagate-scales{width=13}")))
    assert text == (
        "error[E-RESID-SCALE]: %c joins scales whose ratio needs a multiplier beyond 13 bits (I and I)\n"
        "       from: net.c (net.py line 7)\n"
        "       pass: propagate-scales{width=13}\n"
        "        fix: propagate-scales{join=rescale} with calibration data, or a larger width"
    )


def test_scales_too_far_apart_for_wide_are_rescaled_with_data_and_a_note_of_the_neurons():
    module = joined(factor=1e-4)
    context = Context(images(), 0)
    outcome = pipeline.run(module, pipeline.parse(TO_INTEGERS + "{width=13}"), context)
    assert [n.result for n in ops_of(outcome.module, Requant)] == ["a", "b.code", "d"]
    assert "%b: 40 rescaling neurons, so that it meets the others in %c" in str(outcome.journal[-1])
    rescaled = run(module, TO_INTEGERS + "{join=rescale}", images())
    assert shown(outcome.module) == shown(rescaled)


def test_activations_too_far_apart_for_any_width_are_refused_though_there_is_data():
    far = network(
        ("a.code", Quantize(1.0, 0, 255), "x"),
        ("a", Dequantize(), "a.code"),
        ("b.code", Quantize(1e-20, 0, 255), "x"),
        ("b", Dequantize(), "b.code"),
        ("c", Add(), "a b"),
    )
    for passes in ("propagate-scales", "propagate-scales{join=rescale}", "propagate-scales{width=48}"):
        refused = refusal(far, passes, images())
        assert refused.code == "E-RESID-SCALE"
        assert "from: net.c (net.py line 7)" in str(refused)
        assert "fix: " in str(refused)


@pytest.mark.parametrize("meets", [Add(), Concat()], ids=lambda op: op.name)
def test_sums_beyond_the_registers_are_refused_with_their_place(meets):
    channels = 2 if isinstance(meets, Add) else 4
    heavy = Conv2d(Array.of(np.full((1, channels, 3, 3), 32767)), Array.of([1.0]))
    module = network(
        ("a.code", Quantize(1.0, 0, 65535), "x"),
        ("a", Dequantize(), "a.code"),
        ("b.code", Quantize(1.1 * 2.0**-33, 0, 65535), "x"),
        ("b", Dequantize(), "b.code"),
        ("c", meets, "a b"),
        ("d", heavy, "c"),
    )
    refused = refusal(module, "propagate-scales{width=48}")
    assert refused.code == "E-VRANGE"
    assert "op: %d = conv2d %c" in str(refused)
    assert "from: net.d (net.py line 7)" in str(refused)
    assert "fix: " in str(refused)


# concatenations


BRANCHES: list[tuple[str, Op, str]] = [
    ("a", conv(2, bias=BIAS), "x"),
    ("ra", Relu(), "a"),
    ("b", conv(3, seed=9), "x"),
    ("kb", Scaling(Array.of([7.0])), "b"),
    ("rb", Relu(), "kb"),
    ("c", Concat(), "ra rb"),
]


def test_branches_that_weights_read_share_one_scale_and_branches_that_nobody_sums_keep_theirs():
    read = run(network(*BRANCHES, ("d", conv(2, 5, kernel=1), "c")), TO_INTEGERS, images())
    assert scale_of(read.types["c.unit"]).size == 1
    assert len({op_of(read, name).scale for name in ("ra.unit", "rb")}) == 1
    sums = network(("a", conv(2), "x"), ("b", conv(3, seed=9), "x"), ("c", Concat(), "a b"), ("r", Relu(), "c"))
    kept = run(sums, TO_INTEGERS, images())
    assert shown(kept)[-2:] == ["c = concat a b", "r = requant c"]
    assert scale_of(kept.types["c"]).size == 5


def test_concatenation_across_space_asks_for_one_scale_even_without_weights_behind():
    module = network(("a", conv(2), "x"), ("b", conv(2, seed=9), "x"), ("c", Concat(axis=1), "a b"), ("r", Relu(), "c"))
    integer = run(module, TO_INTEGERS, images())
    assert scale_of(integer.types["c"]).size == 1
    assert shown(integer)[1:-1] == [
        "a = conv2d x.clip",
        "b = conv2d x.clip",
        "a.wide = scale a",
        "b.wide = scale b",
        "c = concat a.wide b.wide",
    ]


def test_a_tail_of_the_host_reads_the_readout_as_reals():
    module = network(
        ("f", Flatten(), "x"), ("a", linear(3, 40, bias=Array.of([0.1, 0.2, 0.3])), "f"), ("p", Softmax(), "a")
    )
    integer = run(module, TO_INTEGERS, images())
    assert shown(integer)[-3:] == ["a = integrate a.sum", "a.real = dequantize a", "p = softmax a.real"]
    found, wanted = (interpreter.run(m, images(), "p")["p"] for m in (integer, module))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.1)


def test_a_step_far_finer_than_the_sum_has_no_multiplier():
    data = images(shape=(1,))
    nearly_all = Linear(Array.of([[1.0]]), None, Array.of([-0.9999 * data.max()]))
    module = network(("a", nearly_all, "x"), ("b", Relu(), "a"), shape=(1,))
    text = re.sub(r"scales .* have", "scales S have", text_of(refusal(module, TO_INTEGERS + "{bits=4}", data)))
    assert text == (
        "error[E-MULT-RANGE]: %b: scales S have no multiplier of 4 bits\n"
        "       from: net.b (net.py line 7)\n"
        "       pass: propagate-scales{bits=4}\n"
        "        fix: more bits for the multipliers (propagate-scales{bits=31}), or fewer for activations"
    )


def test_every_channel_has_a_grid_of_its_own():
    weight = Array.of([[1.0], [1e-7]])
    data = images(shape=(1,))
    module = network(("a", Linear(weight), "x"), ("b", Relu(), "a"), shape=(1,))
    requant = op_of(run(module, TO_INTEGERS, data), "b")
    assert all(2**22 <= m < 2**24 for m in requant.mul.values)
    assert requant.div.values[1] > requant.div.values[0] == requant.div.values.min()


def test_a_readout_bias_beyond_the_registers_is_refused():
    dwarf = Linear(Array.of([[1e-30]]), None, Array.of([5.0]))
    refused = refusal(network(("a", dwarf, "x"), shape=(1,)), TO_INTEGERS, images(shape=(1,)))
    text = re.sub(r"is [\d.]+e\+\d+ steps", "is N steps", text_of(refused))
    assert text == (
        "error[E-VRANGE]: the bias of %a is N steps of its sum, and registers have 64 bits\n"
        "       from: net.a (net.py line 7)\n"
        "       pass: propagate-scales\n"
        "        fix: fewer bits for activations or weights"
    )


# the triple, names, places


@pytest.mark.parametrize("bits", [8, 16, 24, 31])
def test_the_largest_multiplier_fills_its_bits(bits):
    integer = run(network(("a", conv(3), "x"), ("b", Relu(), "a")), f"{TO_INTEGERS}{{bits={bits}}}", images())
    requant = op_of(integer, "b")
    assert 2 ** (bits - 1) <= requant.mul.values.max() < 2**bits
    ratios = [s / Fraction(requant.scale) for s in scale_of(integer.types["a"]).known]
    for mul, ratio in zip(requant.mul.values.tolist(), ratios, strict=True):
        assert abs(Fraction(mul, requant.div) - ratio) <= Fraction(1, 2 * requant.div)


@pytest.mark.parametrize("dwarf", [1e-11, 1e-13, 1e-20, 1e-30])
def test_an_activation_that_never_fires_takes_any_multiplier(dwarf):
    layer = Linear(Array.of([[dwarf]]), None, Array.of([-0.05]))
    module = network(("a", layer, "x"), ("b", Relu(), "a"), shape=(1,))
    requant = op_of(run(module, TO_INTEGERS, images(shape=(1,))), "b")
    assert (requant.mul.values > 0) == (dwarf > 1e-15)
    assert requant.div < 2**63


def test_a_sum_without_a_bias_keeps_its_name_and_one_with_a_bias_gets_another():
    module = network(("a", conv(2), "x"), ("b", conv(2, bias=BIAS), "x"), ("c", Relu(), "a"), ("d", Relu(), "b"))
    module = attrs.evolve(module, nodes=(*module.nodes, Node("e", Add(), ("c", "d"), module.types["c"])), output="e")
    names = set(run(module, TO_INTEGERS, images()).types)
    assert "a" in names
    assert "b.sum" in names
    assert "b" not in names


def test_a_relu_that_no_range_covers_is_refused_with_its_place():
    module = network(("a", conv(2), "x"), ("b", Relu(), "a"), ("c", conv(2, kernel=1), "b"), ("d", Relu(), "c"))
    selected = 'calibrate-range{layers="net.d"}, quantize{layers="net.[acd]|x.clip"}, propagate-scales'
    assert text_of(refusal(module, selected, images())) == (
        "error[type]: %b = relu stands between quantised values and works on reals\n"
        "       from: net.b (net.py line 7)\n"
        "       pass: propagate-scales\n"
        "        fix: calibrate-range and quantize must cover this layer before propagate-scales"
    )


def test_a_network_that_ends_in_a_relu_ends_in_spikes():
    spiking = run(network(("a", conv(2, bias=BIAS), "x"), ("b", Relu(), "a")), "@stem", images())
    assert (spiking.output, type(op_of(spiking, "b"))) == ("b", NeuronStem)


def test_a_network_without_a_relu_is_one_readout():
    spiking = run(network(("a", conv(2, bias=BIAS), "x")), "@stem", images())
    assert shown(spiking) == [
        "x.clip = quantize x",
        "x.clip.train = encode x.clip",
        "a.sum = conv2d x.clip.train",
        "a = integrate a.sum",
    ]


@pytest.mark.parametrize("join", ["wide", "rescale"])
def test_an_input_that_is_read_twice_is_quantised_once(join):
    module = network(("a", Add(), "x x"), ("b", conv(2, kernel=1), "x"), ("c", Add(), "a b x"), ("d", Relu(), "c"))
    spiking = run(module, f"@stem{{join={join}}}", images())
    assert len(list(ops_of(spiking, Quantize))) == 1
    assert "x" not in [o for n in spiking.nodes if not isinstance(n.op, Quantize) for o in n.operands]


# thresholds in place of multipliers


def quantised_sum(gain: float, bias: float, weight: int = 1) -> Module:
    """codes -> weight x code x 0.5 + bias -> codes of step ``gain``, one feature."""
    layer = Linear(Array.of([[weight]]), Array.of([0.5]), Array.of([bias]))
    return network(
        ("q", Quantize(0.5, -127, 127), "x"),
        ("r", Dequantize(), "q"),
        ("s", layer, "r"),
        ("y", Quantize(gain, 0, 64), "s"),
        ("z", Dequantize(), "y"),
        shape=(1,),
    )


@pytest.mark.parametrize("gain", [0.125, 0.75, 64.0, 200.0, 1000.3])
@pytest.mark.parametrize("bias", [0.0, 0.3, -2.0, 77.7])
@pytest.mark.parametrize("weight", [1, 127])
def test_a_threshold_is_the_quantiser_but_for_its_rounding(gain, bias, weight):
    after = run(quantised_sum(gain, bias, weight), "propagate-scales{grid=threshold}")
    (law,) = (node.op for node in after.nodes if isinstance(node.op, Requant))
    theta, unit = law.div, int(law.mul.values[0])
    assert unit & (unit - 1) == 0
    assert theta >= 256
    assert unit == 1 or theta < 512, "no finer than it must be"
    x = np.arange(-127, 128)[:, None] * 0.5
    found = interpreter.run(after, x, "z")["z"].reshape(-1)
    real = [(Fraction(int(c)) * weight / 4 + Fraction(bias)) / Fraction(np.float64(gain)) for c in np.arange(-127, 128)]
    for code, value in zip(found, real, strict=True):
        slack = Fraction(1, 512) * max(1, min(64, abs(value))) + Fraction(1, theta)
        low, high = (min(64, max(0, (v + Fraction(1, 2)).__floor__())) for v in (value - slack, value + slack))
        assert low <= code <= high


def test_a_whole_threshold_misses_nothing():
    after = run(quantised_sum(128.0, 0.0, 127), "propagate-scales{grid=threshold}")
    (law,) = (node.op for node in after.nodes if isinstance(node.op, Requant))
    assert (law.mul.values.tolist(), law.add.values.tolist(), law.div) == ([1], [256], 512)
    codes = np.arange(-127, 128)
    expected = np.clip(np.floor(codes * 127 / 512 + 0.5), 0, 64)
    np.testing.assert_array_equal(interpreter.run(after, codes[:, None] * 0.5, "z")["z"].reshape(-1), expected)


def test_a_threshold_that_no_register_holds_is_refused():
    found = refusal(quantised_sum(1e-30, 0.0), "propagate-scales{grid=threshold}")
    assert found.code == "E-MULT-RANGE"
    assert "grid=shift" in str(found)


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_a_factor_has_no_more_bits_than_it_was_asked_for(bits):
    clip = "calibrate-range, quantize{bits=4}"
    module = network(("a", conv(2), "x"), ("b", Relu(), "a"), ("c", conv(2, 2, kernel=1), "b"), ("d", Add(), "c b"))
    after = run(module, f"{clip}, propagate-scales{{factor={bits}}}", images())
    factors = [int(f) for node in ops_of(after, Scaling) for f in node.op.factor.values]
    inexact = [f for f in factors if f & (f - 1)]
    assert inexact
    assert 2**bits <= min(inexact) < 2 ** (bits + 6)


@pytest.mark.parametrize("top", [16, 1024, 65535])
def test_thresholds_move_no_code_by_more_than_one_however_many_there_are(top):
    layer = Linear(Array.of([[127]]), Array.of([0.37 / 127]))
    code = Quantize(0.61803, 0, top)
    wide = Quantize(0.5, -(2**15), 2**15 - 1)
    lines = (("q", wide, "x"), ("r", Dequantize(), "q"), ("s", layer, "r"), ("y", code, "s"), ("z", Dequantize(), "y"))
    x = np.linspace(-3000, 2**15, 4001)[:, None]
    counts = [
        interpreter.run(run(network(*lines, shape=(1,)), f"propagate-scales{{grid={grid}}}"), x, "*")["z"]
        for grid in ("shift", "threshold")
    ]
    assert counts[0].max() > min(top, 1000) / 2
    assert np.abs(counts[0] - counts[1]).max() <= 1


def test_a_channel_that_hardly_moves_needs_no_wide_threshold():
    layer = Linear(Array.of([[1], [100]]), Array.of([1e-22, 0.01]), Array.of([3.0, 0.0]))
    lines = (
        ("q", Quantize(0.5, -127, 127), "x"),
        ("r", Dequantize(), "q"),
        ("s", layer, "r"),
        ("y", Quantize(0.7, 0, 64), "s"),
        ("z", Dequantize(), "y"),
    )
    after = run(network(*lines, shape=(1,)), "propagate-scales{grid=threshold}")
    found = interpreter.run(after, np.linspace(-60, 60, 41)[:, None], "z")["z"]
    assert (found[:, 0] == 4).all()
    assert found[:, 1].max() > 10
