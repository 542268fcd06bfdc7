"""shorten-window: counts, biases and steps of an integer network times T / T0."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from spir import interpreter
from spir.errors import SpirWarning
from spir.ir import Array
from spir.ops.add import Add
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from tests.unit.small_networks import BIAS, conv, images, network, op_of, refusal, run

WHOLE = "canonicalize, calibrate-range, quantize, propagate-scales{grid=threshold}"


def integers():
    """Two layers with a skip, 8 bits."""
    module = network(
        ("a", conv(3, bias=Array.of([0.3, -0.2, 0.1])), "x"),
        ("b", Relu(), "a"),
        ("c", conv(3, 3, kernel=1, seed=5), "b"),
        ("s", Add(), "c b"),
        ("d", Relu(), "s"),
        ("e", conv(2, 3, kernel=1, seed=6, bias=BIAS), "d"),
    )
    return run(module, WHOLE, images(40))


def test_a_window_that_holds_the_codes_changes_nothing_and_is_silent():
    module = integers()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(module, "shorten-window{steps=255}") == run(module, "shorten-window{steps=999}") == module


def test_counts_biases_and_steps_are_scaled_and_thresholds_stay():
    module = integers()
    with pytest.warns(SpirWarning, match=r"E-CAP.*T = 51 steps for codes up to 255 are not lossless"):
        short = run(module, "shorten-window{steps=51}")  # a fifth
    for before, after in zip(module.nodes, short.nodes, strict=True):
        match before.op, after.op:
            case Quantize(scale=scale, lo=-128, hi=127), Quantize() as made:
                assert (made.scale, made.lo, made.hi) == (pytest.approx(5 * scale), -25, 25)
            case Requant() as given, Requant() as made:
                assert (made.lo, made.hi, made.scale) == (0, 51, pytest.approx(5 * given.scale))
                assert (made.mul, made.div) == (given.mul, given.div)
                half = (given.div if isinstance(given.div, int) else given.div.values) // 2
                np.testing.assert_allclose(made.add.values - half, (given.add.values - half) / 5, atol=0.5)
            case Integrate(bias=Array()) as given, Integrate() as made:
                np.testing.assert_allclose(made.bias.values, given.bias.values / 5, atol=0.5)
            case Scaling(to=Array()) as given, Scaling() as made:
                assert made.factor == given.factor
                np.testing.assert_allclose(made.to.values, 5 * given.to.values)
            case given, made:
                assert given == made


def test_fewer_steps_come_near_the_network_and_more_steps_nearer():
    module, x = integers(), images(40)
    wanted = interpreter.decoded(module, interpreter.run(module, x, "e"))["e"]
    errors = []
    for steps in (8, 32, 128):
        with pytest.warns(SpirWarning):
            snn = run(module, f"shorten-window{{steps={steps}}}, derive-thresholds{{neuron=ca-lif, steps={steps}}}")
        found = interpreter.decoded(snn, interpreter.run(snn, x, "e"))["e"]
        errors.append(float(np.abs(found - wanted).mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05 * np.abs(wanted).mean()


def test_the_spikes_of_a_short_window_count_what_its_integers_say():
    with pytest.warns(SpirWarning):
        short = run(integers(), "shorten-window{steps=20}")
    x = images(20)
    wanted = interpreter.decoded(short, interpreter.run(short, x, "*"))
    for mode in ("multi", "single"):
        snn = run(short, f"derive-thresholds{{neuron=ca-lif}}, fuse-neuron{{mode={mode}}}")
        found = interpreter.decoded(snn, interpreter.run(snn, x, "*"))
        for name in ("b", "d", "e"):
            np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        ("shorten-window{layers=net.b}", "takes the whole network, because counts meet across layers"),
        ("derive-thresholds, shorten-window", "finds spikes already"),
    ],
)
def test_what_it_cannot_shorten_it_refuses(passes, text):
    assert text in str(refusal(integers(), passes))


def test_codes_that_a_window_leaves_without_a_count_are_refused_by_name():
    fine = network(
        ("a", Quantize(0.5, 0, 15), "x"),
        ("b", Requant(Array.of([99]), Array.of([0]), 1, 0, 1485, 0.01), "a"),
        shape=(2,),
    )
    assert "%a has codes up to 15 and would have none in 50 of 1485 steps" in str(
        refusal(fine, "shorten-window{steps=50}")
    )
    wide = network(("a", Quantize(0.5, 0, 99999), "x"), shape=(2,))
    assert "%a has codes up to 99999, and windows have" in str(refusal(wide, "derive-thresholds{neuron=ca-lif}"))


def test_reals_are_refused_with_the_pass_that_comes_before():
    module = network(("a", conv(3), "x"), ("b", Relu(), "a"), ("c", conv(2, 3, kernel=1), "b"))
    assert "finds no integers" in str(refusal(module, "shorten-window"))
    quantised = run(module, "calibrate-range, quantize", images())
    assert "run propagate-scales before" in str(refusal(quantised, "shorten-window"))
    assert op_of(quantised, "x.clip") is not None
