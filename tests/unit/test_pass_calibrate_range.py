"""calibrate-range: ranges from data, for the input, activations and sums that weights read."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import attrs
import numpy as np
import pytest

from spir import interpreter
from spir.ir import Array, Module
from spir.ops.clip import Clip
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.max_pool import MaxPool
from spir.ops.relu import Relu
from spir.ops.tanh import Tanh
from spir.passes.calibrate_range import CalibrateRange
from tests.unit.small_networks import (
    BIAS,
    IMAGE,
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


def test_ranges_need_data():
    assert text_of(refusal(network(("a", Relu(), "x")), "calibrate-range")) == (
        "error[data]: calibrate-range needs calibration data\n"
        "       pass: calibrate-range\n"
        "        fix: give data=images, or --data in a shell"
    )


def test_max_takes_the_extremes():
    data = images()
    after = run(network(("a", conv(3), "x"), ("b", Relu(), "a")), "calibrate-range", data)
    assert shown(after) == ["x.clip = clip x", "a = conv2d x.clip", "b = clip a"]
    assert (op_of(after, "x.clip").lo.values, op_of(after, "x.clip").hi.values) == (data.min(), data.max())
    seen = interpreter.run(network(("a", conv(3), "x"), ("b", Relu(), "a")), data)["b"]
    assert op_of(after, "b").lo.values == 0
    assert op_of(after, "b").hi.values == pytest.approx(seen.max(), rel=1e-14)


@pytest.mark.parametrize(("data", "lo", "hi"), [(np.full((2, *IMAGE), -3.0), -3, 0), (np.full((2, *IMAGE), 5.0), 0, 5)])
def test_a_range_holds_0(data, lo, hi):
    clip = op_of(run(network(("a", Relu(), "x")), "calibrate-range", data), "x.clip")
    assert (clip.lo.values, clip.hi.values) == (lo, hi)


@attrs.frozen
class Chunked:
    """A context that cuts batches where it is told."""

    data: np.ndarray
    size: int
    seed: int = 0

    def note(self, text: str) -> None:
        """Where most codes stand for nothing."""

    def evaluate(self, module: Module, x: np.ndarray, keep: str = "*") -> Iterator[dict[str, Any]]:
        for start in range(0, len(x), self.size):
            yield interpreter.decoded(module, interpreter.run(module, x[start : start + self.size], keep))


@pytest.mark.parametrize("percentile", [50, 75.0, 90.0, 99.0, 99.9, 99.99, 100])
@pytest.mark.parametrize("count", [1, 10, 25, 37])
def test_a_percentile_leaves_its_share_outside_however_the_data_is_cut(percentile, count):
    data, module = images(count), network(("a", Relu(), "x"))
    outside = int((100 - Fraction(str(percentile))) * data.size / 100)
    step, flat = CalibrateRange(method="percentile", percentile=percentile), np.sort(data, axis=None)
    expected = (min(flat[outside], 0), max(flat[-1 - outside], 0))
    for size in (1, 3, 100):
        after = step.run(module, Chunked(data, size))
        clip = op_of(after, "x.clip")
        assert (clip.lo.values, clip.hi.values) == expected
        assert op_of(after, "a").hi.values == (flat[-1 - outside] if flat[-1 - outside] > 0 else flat[-1])


def test_only_the_layers_asked_for_are_calibrated():
    module = network(("a", Relu(), "x"), ("b", conv(2), "a"), ("c", Relu(), "b"))
    assert shown(run(module, 'calibrate-range{layers="net.c"}', images())) == [
        "x.clip = clip x",
        "a = relu x.clip",
        "b = conv2d a",
        "c = clip b",
    ]


def test_an_input_that_has_its_range_keeps_it():
    module = network(("a", Relu(), "x"), ("b", conv(2), "a"), ("c", Relu(), "b"))
    once = run(module, "calibrate-range{layers=net.a}", images())
    twice = run(once, "calibrate-range", 2 * images())
    assert shown(twice) == ["x.clip = clip x", "a = clip x.clip", "b = conv2d a", "c = clip b"]
    assert op_of(twice, "x.clip") == op_of(once, "x.clip")


def test_a_percentile_that_no_method_asks_for_is_refused():
    refused = refusal(network(("a", Relu(), "x")), "calibrate-range{percentile=60.0}", images())
    assert refused.code == "option"
    assert "fix: method=percentile" in str(refused)


def test_an_activation_that_never_fires_takes_the_widest_range_of_the_network():
    module = network(("a", conv(2, bias=Array.of([-1e3, -1e3])), "x"), ("b", Relu(), "a"))
    after = run(module, "calibrate-range", images())
    assert op_of(after, "b").hi.values == np.abs(images()).max()


def test_zeros_as_data_give_every_value_a_range():
    module = network(("a", conv(2), "x"), ("b", Relu(), "a"))
    after = run(module, "calibrate-range", np.zeros_like(images()))
    assert [op_of(after, name).hi.values for name in ("x.clip", "b")] == [1, 1]


def test_a_range_per_channel_is_a_clip_between_gains():
    data = images()
    module = network(("a", conv(2), "x"), ("r", Relu(), "a"), ("b", conv(2, kernel=1), "r"))
    after = run(module, "calibrate-range{per=channel}", data)
    assert shown(after) == [
        "x.clip = clip x",
        "a = conv2d x.clip",
        "r.even = scale a",
        "r.clip = clip r.even",
        "r = scale r.clip",
        "b = conv2d r",
    ]
    tops = interpreter.run(module, data, "r")["r"].max(axis=(0, 2, 3))
    gains = op_of(after, "r").factor.values
    np.testing.assert_allclose(gains * op_of(after, "r.clip").hi.values, tops, rtol=1e-6)
    np.testing.assert_allclose(op_of(after, "r.even").factor.values * gains, 1, rtol=1e-15)


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [
        (0.0, 0.5, ["r = clip a"]),
        (0.0, 600.0, ["r = clip a"]),
        (-0.5, 0.5, ["r.shifted = shift a", "r.clip = clip r.shifted", "r = shift r.clip"]),
        (-0.5, 2.0, ["r.shifted = shift a", "r.clip = clip r.shifted", "r = shift r.clip"]),
        (0.5, 2.0, ["r.shifted = shift a", "r.clip = clip r.shifted", "r = shift r.clip"]),
    ],
)
def test_a_clip_of_the_model_takes_the_range_that_is_reached_inside_it(lo, hi, expected):
    module = network(("a", conv(2), "x"), ("r", Clip(Array.of([lo]), Array.of([hi])), "a"))
    after = run(module, "calibrate-range", images())
    assert shown(after)[2:] == expected
    clip = next(n.op for n in after.nodes if isinstance(n.op, Clip) and n.result in ("r", "r.clip"))
    reached = np.clip(interpreter.run(module, images(), "r")["r"], lo, hi)
    assert clip.hi.values == pytest.approx(reached.max() - (reached.min() if lo else 0.0))
    assert clip.lo.values == 0
    found, wanted = (interpreter.run(m, images(), "r")["r"] for m in (after, module))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


def test_sums_that_other_weights_read_get_a_signed_range_and_keep_their_name():
    module = network(
        ("a", conv(2), "x"),
        ("p", MaxPool((2, 2), (1, 1)), "a"),
        ("f", Flatten(), "p"),
        ("b", linear(3, 4), "f"),
    )
    after = run(module, "calibrate-range", images())
    assert shown(after) == [
        "x.clip = clip x",
        "a = conv2d x.clip",
        "p = max_pool a",
        "p.clip = clip p",
        "f = flatten p.clip",
        "b = linear f",
    ]
    seen = interpreter.run(module, images(), "p")["p"]
    clip = op_of(after, "p.clip")
    np.testing.assert_allclose([clip.lo.values[0], clip.hi.values[0]], [-np.abs(seen).max(), np.abs(seen).max()])
    spiking = run(after, "quantize, propagate-scales, derive-thresholds, fuse-neuron")
    assert {n.result for n in ops_of(spiking, Encode)} == {"x.clip.train", "p.clip"}


def test_what_the_host_computes_before_the_first_layer_stays_in_front_of_the_clip():
    module = network(("t", Tanh(), "x"), ("a", conv(2), "t"), ("r", Relu(), "a"))
    after = run(module, "calibrate-range", images())
    assert shown(after)[:3] == ["t = tanh x", "t.clip = clip t", "a = conv2d t.clip"]
    assert op_of(after, "t.clip").hi.values == pytest.approx(np.tanh(images()).max())
    assert interpreter.run(run(module, "@stem", images()), images(), "r")["r"].any()


def test_calibrating_twice_changes_nothing():
    module = network(
        ("a", conv(2, bias=BIAS), "x"),
        ("b", conv(2, kernel=1), "a"),
        ("r", Relu(), "b"),
        ("s", Clip(Array.of([0.0]), Array.of([6.0])), "r"),
    )
    once = run(module, "calibrate-range", images())
    assert run(once, "calibrate-range", images()) == once


def test_the_fit_to_levels_leaves_the_input_its_bits_and_has_the_least_error_of_all_clips():
    module, x = network(("a", conv(2), "x"), ("b", Relu(), "a"), ("c", conv(1, 2, kernel=1), "b")), images(30)
    values = interpreter.run(module, x, "b")["b"].ravel()

    def error_of(top: float, levels: int) -> float:
        return float(((np.clip(np.floor(values * levels / top + 0.5), 0, levels) * top / levels - values) ** 2).mean())

    usual = run(module, "calibrate-range{method=mse}", x)
    for levels in (1, 4, 16):
        after = run(module, f"calibrate-range{{method=mse, levels={levels}}}", x)
        assert op_of(after, "x.clip") == op_of(usual, "x.clip")
        top = op_of(after, "b").hi.values.item()
        assert top < op_of(usual, "b").hi.values.item()
        best = min(error_of(t, levels) for t in np.linspace(0.05, 1, 400) * values.max())
        assert error_of(top, levels) <= 1.02 * best


@pytest.mark.parametrize("options", ["levels=4", "method=percentile, levels=4"])
def test_levels_that_no_method_asks_for_are_refused(options):
    refused = str(refusal(network(("a", Relu(), "x")), f"calibrate-range{{{options}}}", images()))
    assert "takes no levels" in refused
    assert "fix: method=mse, or no levels" in refused
