"""lower-max-pool: what it lowers, how a pool goes behind its activation, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from spir import interpreter
from spir.errors import SpirError
from spir.ir import Array, Module, Op
from spir.ops.add import Add
from spir.ops.concat import Concat
from spir.ops.encode import Encode
from spir.ops.max_pool import MaxPool
from spir.ops.pad import Pad
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.types import Int, Scale
from tests.unit.small_networks import (
    BIAS,
    TO_INTEGERS,
    conv,
    images,
    network,
    norm,
    op_of,
    ops_of,
    refusal,
    run,
    shown,
    text_of,
)

POOL = MaxPool((2, 2), (1, 1))


def law(lo: int = 0, hi: int = 15, mul: int = 3, add: int = 8) -> Requant:
    return Requant(Array.of([mul]), Array.of([add]), 16, lo, hi, 0.5)


def integers(*lines: tuple[str, Op, str]) -> Module:
    return network(*lines, encoding=Int(-100, 100, Scale.of(0.1)))


@pytest.mark.parametrize(("lo", "hi", "edge"), [(0, 15, False), (-8, 7, True)])
def test_padding_is_0_where_that_is_the_lowest_code_and_else_the_nearest_value(lo, hi, edge):
    module = integers(("a", law(lo, hi), "x"), ("p", MaxPool((3, 3), (2, 2), (1, 1, 1, 1)), "a"))
    lowered = run(module, "lower-max-pool")
    (pad,) = ops_of(lowered, Pad)
    assert pad.op.edge == edge
    x = np.random.default_rng(0).integers(-100, 100, (20, 2, 5, 4))
    assert np.array_equal(interpreter.run(lowered, x, "p")["p"], interpreter.run(module, x, "p")["p"])


def test_a_pool_goes_behind_the_requant_that_reads_it():
    after = run(integers(("p", POOL, "x"), ("a", law(), "p")), "lower-max-pool{materialise=off}")
    assert shown(after)[0] == "a.each = requant x"
    assert op_of(after, "a.each") == law()
    assert after.output == "a"


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_a_pool_goes_behind_the_relu_whatever_constants_of_its_range_stand_between(per):
    """Positive constants per channel are monotone: they change scales, never which sum is the largest."""
    module = network(
        ("a", conv(2, bias=BIAS), "x"), ("p", POOL, "a"), ("r", Relu(), "p"), ("z", conv(2, kernel=1), "r")
    )
    integer = run(module, TO_INTEGERS.replace("calibrate-range", f"calibrate-range{{per={per}}}"), images())
    lowered = run(integer, "lower-max-pool")
    assert not list(ops_of(lowered, MaxPool))
    found, wanted = (interpreter.run(m, images(), m.output)[m.output] for m in (lowered, integer))
    assert np.array_equal(found, wanted)


@pytest.mark.filterwarnings("ignore:.*the calibration data may not be what the model was trained on")
def test_a_pool_goes_behind_a_batch_norm_of_positive_gain():
    layer = norm(2)
    layer = type(layer)(layer.mean, layer.var, layer.eps, Array.of([0.5, 2.0]), layer.bias)
    module = network(("a", conv(2), "x"), ("p", POOL, "a"), ("n", layer, "p"), ("r", Relu(), "n"))
    integer = run(module, TO_INTEGERS, images())
    lowered = run(integer, "lower-max-pool")
    assert not list(ops_of(lowered, MaxPool))
    assert np.array_equal(*(interpreter.run(m, images(), "r")["r"] for m in (lowered, integer)))


SUMS: dict[str, tuple[list[tuple[str, Op, str]], str]] = {
    "nothing": ([("p", POOL, "x")], "nothing"),
    "a sum": ([("p", POOL, "x"), ("s", Add(), "p p")], "add"),
    "a law that falls": ([("p", POOL, "x"), ("s", law(mul=-3), "p")], "requant"),
    "a negative constant": ([("p", POOL, "x"), ("k", Scaling(Array.of([-1])), "p"), ("s", law(), "k")], "scale"),
}


@pytest.mark.parametrize("what", SUMS)
def test_a_maximum_of_sums_that_no_law_follows_is_refused_with_its_reader(what):
    lines, reader = SUMS[what]
    assert text_of(refusal(integers(*lines), "lower-max-pool")) == (
        f"error[E-MAXPOOL]: %p takes the maximum of sums, and {reader} reads it\n"
        "       from: net.p (net.py line 7)\n"
        "       pass: lower-max-pool\n"
        "        fix: put a relu right before the pool, or behind it with no negative factor in between; or leave "
        "lower-max-pool out (@stem{max_pool=keep}), and the pool stays on integrated values"
    )


def test_signed_codes_between_dilated_taps_are_refused_only_where_there_is_padding():
    pool = MaxPool((2, 2), (1, 1), (1, 0, 0, 1), (2, 2))
    refused = refusal(integers(("a", law(-8, 7), "x"), ("p", pool, "a")), "lower-max-pool")
    assert text_of(refused) == (
        "error[E-MAXPOOL]: %p pads signed codes between dilated taps, and 0 is not the lowest code\n"
        "       from: net.p (net.py line 7)\n"
        "       pass: lower-max-pool\n"
        "        fix: pad nothing, or pool after a relu"
    )
    for code, padding in ((law(-8, 7), (0, 0, 0, 0)), (law(), (1, 0, 0, 1))):
        module = integers(("a", code, "x"), ("p", MaxPool((2, 2), (1, 1), padding, (2, 2)), "a"))
        assert not list(ops_of(run(module, "lower-max-pool"), MaxPool))


def test_all_pools_that_stay_are_named_at_once():
    refused = refusal(integers(("p", POOL, "x"), ("q", POOL, "p"), ("s", Add(), "q q")), "lower-max-pool")
    assert [d.message.split()[0] for d in refused.diagnostics] == ["%p", "%q"]


def test_only_the_layers_asked_for_are_lowered():
    module = integers(("a", law(), "x"), ("p", POOL, "a"), ("q", POOL, "p"))
    after = run(module, "lower-max-pool{layers=net.p}")
    assert [n.result for n in ops_of(after, MaxPool)] == ["q"]


def test_a_pool_that_leaves_a_remainder_reads_no_more_than_its_windows():
    module = integers(("a", law(), "x"), ("p", MaxPool((2, 2), (2, 2)), "a"))  # 5 rows: the last fills no window
    lowered = run(module, "lower-max-pool")
    assert lowered.types["p"].shape == (2, 2, 2)
    x = np.zeros((1, 2, 5, 4), dtype=np.int64)
    x[:, :, 4] = 100
    assert interpreter.run(lowered, x, "p")["p"].max() == 0


def test_a_pool_of_a_window_of_one_is_slices_and_an_identity_neuron_if_asked():
    module = integers(("a", law(), "x"), ("p", MaxPool((1, 1), (2, 2)), "a"))
    x = np.random.default_rng(0).integers(-100, 100, (20, 2, 5, 4))
    for option in ("on", "off"):
        lowered = run(module, f"lower-max-pool{{materialise={option}}}")
        assert [n.op.name for n in lowered.nodes] == ["requant", "slice", "slice", *["requant"][: option == "on"]]
        assert np.array_equal(interpreter.run(lowered, x, "p")["p"], interpreter.run(module, x, "p")["p"])


def test_a_train_of_bits_meets_no_pool():
    """The pass works before derive-thresholds; behind it, the op itself refuses."""
    with pytest.raises(SpirError) as caught:
        integers(("a", law(), "x"), ("t", Encode(4), "a"), ("p", POOL, "t"))
    assert caught.value.code == "E-MAXPOOL"
    assert "fix: add lower-max-pool before derive-thresholds, or pool the integrated values" in str(caught.value)


def test_trains_of_different_codes_do_not_meet_in_a_concatenation():
    with pytest.raises(SpirError) as caught:
        integers(
            ("a", law(), "x"),
            ("b", law(0, 31), "x"),
            ("s", Encode(4), "a"),
            ("t", Encode(5), "b"),
            ("c", Concat(), "s t"),
        )
    assert caught.value.code == "type"
    assert "fix: " in str(caught.value)
    with pytest.raises(SpirError, match="fix: "):
        integers(("a", law(), "x"), ("s", Encode(4), "a"), ("t", Encode(15, "suffix"), "a"), ("c", Concat(), "s t"))


OPTIONS = {
    "calibrate-range{method=mean}": "fix: one of: max, mse, percentile",
    "calibrate-range{per=layer}": "fix: one of: channel, tensor",
    "calibrate-range{method=mse, bits=1}": "take one of 2..16",
    "calibrate-range{method=mse, bits=17}": "take one of 2..16",
    "calibrate-range{method=percentile, percentile=49.0}": "take one of 50..100",
    "calibrate-range{method=percentile, percentile=101.0}": "take one of 50..100",
    "lower-max-pool{materialise=maybe}": "fix: end in one train",
    "propagate-scales{width=12}": "take one of 13..48",
    "propagate-scales{width=49}": "take one of 13..48",
    "propagate-scales{join=narrow}": "fix: one of: rescale, wide",
    "@stem{max_pool=drop}": "fix: one of: keep, lower",
    "@stem{per=pixel}": "fix: one of: channel, tensor",
    "@stem{range=mean}": "fix: one of: max, mse, percentile",
}


@pytest.mark.parametrize("passes", OPTIONS)
def test_an_option_out_of_range_is_refused_with_what_there_is(passes):
    refused = refusal(network(("a", conv(2), "x"), ("r", Relu(), "a")), passes, images())
    assert refused.code == "option"
    assert "at: line 1" in str(refused)
    assert OPTIONS[passes] in str(refused)
