"""quantize: weights and clips to integers, and where constants per channel go."""

from __future__ import annotations

import numpy as np
import pytest

from spir import interpreter
from spir.ir import Array, Module, Op
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.qcfs import Qcfs
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.ops.slice import Slice
from spir.ops.upsample import Upsample
from tests.unit.small_networks import (
    BIAS,
    IMAGE,
    TO_INTEGERS,
    conv,
    images,
    linear,
    network,
    op_of,
    ops_of,
    refusal,
    run,
    shown,
    text_of,
)


def test_every_output_channel_has_its_own_scale():
    weight = np.array([[0.5, -1.0], [0.0008, 0.002], [300.0, 0.0]])
    module = network(("a", Linear(Array.of(weight)), "x"), shape=(2,))
    op = op_of(run(module, "quantize"), "a")
    assert op.weight_scale.values.tolist() == [float(np.float32(v / 127)) for v in (1.0, 0.002, 300.0)]
    assert op.weight.values.tolist() == [[64, -127], [51, 127], [127, 0]]


def test_a_dead_channel_takes_the_scale_of_a_live_one():
    module = network(("a", Linear(Array.of([[0.0, 0.0], [0.5, 0.1], [0.0, 0.0]])), "x"), shape=(2,))
    op = op_of(run(module, "quantize"), "a")
    assert len(set(op.weight_scale.values.tolist())) == 1
    assert op.weight.values.tolist() == [[0, 0], [127, 25], [0, 0]]


def test_a_layer_without_a_live_channel_still_converts():
    dead = Linear(Array.of(np.zeros((2, 2))), None, Array.of([0.5, -0.5]))
    module = network(("a", dead, "x"), ("b", Relu(), "a"), shape=(2,))
    data = images(shape=(2,))
    found = interpreter.run(run(module, "@stem", data), data)["b"]
    assert found.sum(axis=0).any(axis=0).tolist() == [True, False]


def test_weights_may_have_other_bits_than_activations():
    module = network(("a", conv(3), "x"), ("b", Relu(), "a"))
    after = run(module, "calibrate-range, quantize{bits=4, weights=6}", images())
    assert np.abs(op_of(after, "a").weight.values).max() == 31
    assert (op_of(after, "b.code").lo, op_of(after, "b.code").hi) == (0, 15)
    assert (op_of(after, "x.clip.code").lo, op_of(after, "x.clip.code").hi) == (-8, 7)


def test_a_clip_becomes_codes_and_keeps_its_name_for_what_they_mean():
    after = run(network(("a", Relu(), "x")), "calibrate-range, quantize", np.abs(images()))
    assert shown(after) == [
        "x.clip.code = quantize x",
        "x.clip = dequantize x.clip.code",
        "a.code = quantize x.clip",
        "a = dequantize a.code",
    ]
    largest = np.abs(images()).max()
    assert op_of(after, "x.clip.code") == Quantize(float(np.float32(largest / 127)), -128, 127)


def test_a_channel_too_small_to_show_is_multiplied_by_0():
    module = network(("a", Linear(Array.of([[1.0], [1e-30]])), "x"), ("b", Relu(), "a"), shape=(1,))
    assert op_of(run(module, TO_INTEGERS, images(shape=(1,))), "b").mul.values[1] == 0


def test_all_relus_without_a_range_are_refused_at_once():
    module = network(("a", Relu(), "x"), ("b", conv(2), "a"), ("c", Relu(), "b"))
    assert text_of(refusal(module, "quantize{bits=5}")) == (
        "error[type]: %a has no range to divide into 32 steps\n"
        "       from: net.a (net.py line 7)\n"
        "       pass: quantize{bits=5}\n"
        "        fix: run calibrate-range before quantize, over the same layers\n"
        "error[type]: %c has no range to divide into 32 steps\n"
        "       from: net.c (net.py line 7)\n"
        "       pass: quantize{bits=5}\n"
        "        fix: run calibrate-range before quantize, over the same layers"
    )


def test_layers_may_have_bits_of_their_own():
    module = network(("a", conv(2, seed=7), "x"), ("b", Relu(), "a"), ("c", conv(2, kernel=1), "b"), ("d", Relu(), "c"))
    after = run(module, 'calibrate-range, quantize{bits=3, layers="net.a|net.b"}, quantize{bits=8}', images())
    assert op_of(after, "b.code").hi == 7
    assert op_of(after, "d.code").hi == 255
    assert np.abs(op_of(after, "a").weight.values).max() == 3
    spiking = run(after, "propagate-scales, derive-thresholds, fuse-neuron")
    assert [spiking.types[name].steps for name in ("b", "d")] == [3, 8]


def test_constants_in_a_row_fold_together():
    module = network(
        ("k", Scaling(Array.of([3.0])), "x"),
        ("a", Scaling(Array.of([0.5, -2.0])), "k"),
        ("b", conv(3), "a"),
        ("c", Relu(), "b"),
    )
    after = run(module, "calibrate-range, quantize", images())
    assert not list(ops_of(after, Scaling))
    found, wanted = (interpreter.run(m, images(), "b")["b"] for m in (after, module))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


def test_sums_that_another_sum_reads_before_an_activation_share_one_scale():
    module = network(
        ("a", conv(2), "x"),
        ("b", AvgPool((2, 2), (1, 1)), "a"),
        ("c", conv(2, 1, kernel=1, groups=2), "b"),
        ("d", Flatten(), "c"),
        ("e", linear(3, 4), "d"),
        ("f", Relu(), "e"),
    )
    after = run(module, "calibrate-range{layers=net.f}, quantize", images())
    assert [op_of(after, name).weight_scale.values.shape for name in "ace"] == [(1,), (1,), (3,)]
    spiking = run(after, "propagate-scales, derive-thresholds, fuse-neuron", images())
    assert spiking.types["e"].encoding.scale.size == 3


def test_constants_per_channel_fold_into_the_weights_that_read_them():
    factor = np.array([0.5, -3.0])
    for kernel in (conv(3), Conv2d(Array.of(np.random.default_rng(4).standard_normal((4, 1, 3, 3))), groups=2)):
        module = network(("a", Scaling(Array.of(factor)), "x"), ("b", kernel, "a"), ("c", Relu(), "b"))
        after = run(module, "calibrate-range, quantize", images())
        assert not list(ops_of(after, Scaling))
        found, wanted = (interpreter.run(m, images(), "b")["b"] for m in (after, module))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "between",
    [
        MaxPool((2, 2), (1, 1)),
        AvgPool((2, 2), (1, 1)),
        GlobalAvgPool(6),
        Flatten(),
        Reshape((2, 6)),
        Pad((0, 0, 1, 0, 0, 1)),
        Slice((0, 0, 0), (2, 2, 2), (1, 1, 1)),
        Upsample((2, 1)),
        Permute((0, 2, 1)),
        Shift(Array.of([0.25, -0.5])),
    ],
    ids=lambda op: op.name,
)
def test_constants_per_channel_sink_below_whatever_lets_them_pass(between):
    factor = Array.of([0.5, 3.0])
    module = network(("a", conv(2), "x"), ("r", Relu(), "a"), ("k", Scaling(factor), "r"), ("b", between, "k"))
    shape = module.types["b"].shape
    flat = [*lines(module), ("f", Flatten(), "b"), ("z", linear(3, int(np.prod(shape))), "f")]
    module = network(*flat)
    after = run(module, "calibrate-range, quantize{bits=12}", images())
    assert not list(ops_of(after, Scaling))
    found, wanted = (interpreter.run(m, images(), "z")["z"] for m in (after, module))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.003 * np.abs(wanted).max())


def lines(module: Module) -> list[tuple[str, Op, str]]:
    return [(n.result, n.op, " ".join(n.operands)) for n in module.nodes]


def test_a_negative_constant_does_not_pass_a_maximum():
    factor = Scaling(Array.of([1.0, -2.0]))
    module = network(("r", Relu(), "x"), ("k", factor, "r"), ("p", MaxPool((2, 2), (1, 1)), "k"))
    after = run(module, "calibrate-range, quantize{bits=12}", images())
    found, wanted = (interpreter.run(m, images(), "p")["p"] for m in (after, module))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.003 * np.abs(wanted).max())


def test_clips_that_meet_in_a_concatenation_share_one_step_and_keep_their_ranges():
    module = network(
        ("a", conv(2), "x"),
        ("ra", Relu(), "a"),
        ("b", Scaling(Array.of([0.01])), "a"),
        ("rb", Relu(), "b"),
        ("c", Concat(), "ra rb"),
        ("z", conv(2, 4, kernel=1), "c"),
    )
    after = run(module, "calibrate-range, quantize", images())
    assert op_of(after, "ra.code").scale == op_of(after, "rb.code").scale
    codes = interpreter.run(after, images(), "r*.code")
    assert codes["ra.code"].max() == codes["rb.code"].max() == 255
    assert shown(after)[-2:] == ["c.unit = concat ra rb.unit", "z = conv2d c.unit"]
    found, wanted = (interpreter.run(m, images(), "z")["z"] for m in (after, module))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("fan_in", [2, 3])
def test_a_sum_of_activations_with_constants_per_channel_can_be_read_by_weights(fan_in):
    """The channels of what weights read share one scale, whatever the gains of the branches were."""
    module = network(
        ("a", conv(2, bias=BIAS), "x"),
        ("ra", Relu(), "a"),
        ("b", conv(2, seed=9), "x"),
        ("rb", Relu(), "b"),
        ("s", Add(), " ".join(["ra", "rb", "ra"][:fan_in])),
        ("z", conv(2, kernel=1), "s"),
    )
    integer = run(module, "calibrate-range{per=channel}, quantize, propagate-scales", images())
    found = integer.types[integer.output].decode(interpreter.run(integer, images(), integer.output)[integer.output])
    wanted = interpreter.run(module, images(), "z")["z"]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.03 * np.abs(wanted).max())


# qcfs

EACH = {"threshold": Array.of([0.5, 2.0, 3.0]), "psi": Array.of([0.1, -0.2, 0.0]), "phi": Array.of([0.25, -1.0, 0.0])}


@pytest.mark.parametrize("signed", [False, True])
def test_a_qcfs_keeps_its_levels_between_its_shift_and_a_gain_a_channel(signed):
    op = Qcfs(5, **EACH, signed=signed)
    lines = [("a", Shift(Array.of([0.25])), "x"), ("b", op, "a"), ("c", conv(2, 3, kernel=1), "b")]
    module = network(*lines, shape=(3, 4, 4))
    after, x = run(module, "quantize"), 2 * images(20, (3, 4, 4))
    assert shown(after) == [
        *("a = shift x", "b.shifted = shift a", "b.even = scale b.shifted"),
        *("b.code = quantize b.even", "b.unit = dequantize b.code", "c = conv2d b.unit"),
    ]
    quantiser = op_of(after, "b.code")
    assert (quantiser.lo, quantiser.hi, quantiser.scale) == (-5 * signed, 5, np.float32(3.0 / 5))
    found, wanted = (interpreter.run(m, x, "*") for m in (after, module))
    assert found["b.code"].min() == -5 * signed
    assert found["b.code"].max() == 5
    units = found["b.unit"] * (op.threshold.values * op.rise / 3.0)[:, None, None]
    np.testing.assert_allclose(units, wanted["b"], rtol=1e-6)
    np.testing.assert_allclose(found["c"], wanted["c"], rtol=0, atol=0.02 * np.abs(wanted["c"]).max())


def test_branches_of_unlike_thresholds_meet_in_one_step_and_keep_their_levels():
    module = network(
        ("a", conv(2), "x"),
        ("p", Qcfs(4, Array.of([1.0]), phi=Array.of([0.25])), "a"),
        ("q", Qcfs(4, Array.of([3.0]), Array.of([0.5, 0.0])), "a"),
        ("c", Concat(), "p q"),
        ("z", conv(2, 4, kernel=1), "c"),
    )
    after = run(module, "calibrate-range, quantize{bits=16}", images())
    assert op_of(after, "p.code").scale == op_of(after, "q.code").scale == np.float32(0.75)
    found, wanted = (interpreter.run(m, images(), "z")["z"] for m in (after, module))
    assert np.mean(np.abs(found - wanted) > 0.001) < 0.01  # a sum next to a tie may fall on its other side
    spiking = run(after, "propagate-scales, derive-thresholds{neuron=parallel}, fuse-neuron")
    (joined,) = ops_of(spiking, Concat)
    assert str(joined.type.encoding).startswith("spikes[4, suffix, 0..4]")
    result = spiking.types[spiking.output].decode(interpreter.run(spiking, images())[spiking.output])
    np.testing.assert_allclose(result, found, atol=1e-4)


def test_thresholds_of_the_input_are_one_because_nothing_multiplies_before_it():
    each = network(("a", Qcfs(4, Array.of([1.0, 2.0])), "x"), ("b", conv(2), "a"))
    assert text_of(refusal(each, "quantize")) == (
        "error[E-SCALE]: %a gives the input unequal thresholds, and nothing multiplies before the network\n"
        "       from: net.a (net.py line 7)\n"
        "       pass: quantize\n"
        "        fix: one threshold for an activation of the input, and no concatenation with others"
    )
    wide = [("a", Qcfs(4, Array.of([1.0])), "x"), ("b", Qcfs(4, Array.of([3.0])), "x"), ("c", Concat(), "a b")]
    assert refusal(network(*wide), "quantize").code == "E-SCALE"
    assert shown(run(network(("a", Qcfs(4, Array.of([1.0])), "x")), "quantize")) == [
        "a.code = quantize x",
        "a = dequantize a.code",
    ]


def normalising() -> Module:
    """A padded convolution behind the normalisation of raw pixels."""
    return network(
        ("centred", Shift(Array.of([-0.5, -0.3])), "x"),
        ("normal", Scaling(Array.of([4.0, 5.0])), "centred"),
        ("a", conv(3, padding=(1, 1, 1, 1), bias=Array.of([0.1, -0.2, 0.3])), "normal"),
        ("b", Relu(), "a"),
        ("c", conv(2, 3, kernel=1), "b"),
    )


def test_raw_pixels_keep_all_their_codes_and_the_normalisation_folds_even_at_padded_borders():
    pixels = np.random.default_rng(5).integers(0, 256, (8, *IMAGE))
    pixels[0, 0, 0, 0] = 255
    x, module = pixels / 255, normalising()
    passes = "calibrate-range, quantize{bits=8, weights=16, input=unsigned}, propagate-scales"
    after = run(module, passes, x)
    (entering, *rest) = ops_of(after, Quantize)
    assert not rest
    assert (entering.op.lo, entering.op.hi) == (0, 255)
    codes = interpreter.run(after, x, entering.result)[entering.result]
    np.testing.assert_array_equal(codes, pixels)
    (first, *_) = ops_of(after, Conv2d)
    assert first.operands == (entering.result,)
    assert not list(ops_of(after, Shift))
    found, wanted = after.types["b"].decode(interpreter.run(after, x, "b")["b"]), interpreter.run(module, x, "b")["b"]
    step = float(max(after.types["b"].encoding.scale.values))
    np.testing.assert_allclose(found, wanted, atol=0.51 * step)


def test_unsigned_codes_are_refused_for_an_input_below_zero():
    assert text_of(refusal(normalising(), "calibrate-range, quantize{input=unsigned}", -np.ones((2, *IMAGE)))) == (
        "error[option]: quantize: the input goes down to -1, and unsigned codes begin at 0\n"
        "       from: input (net.py line 7)\n"
        "       pass: quantize{input=unsigned}\n"
        "        fix: input=signed; or feed raw pixels to a model that normalises them itself, which folds into weights"
    )
