"""Each pass on networks of a few ops: what goes in, what comes out, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import attrs
import numpy as np
import pytest

from spir import interpreter, pipeline
from spir.driver import Context
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.conv2d import Conv2d
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_stem import NeuronStem
from spir.ops.pad import Pad
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.passes.calibrate_range import CalibrateRange
from spir.types import Current, Int, Real, Scale, Tensor, scale_of
from spir.verify import verify

IMAGE = (2, 5, 4)
TO_INTEGERS = "canonicalize, fold-bn, calibrate-range, quantize, propagate-scales"


@pytest.fixture(autouse=True)
def _reproducers_go_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def network(*lines: tuple[str, Op, str], shape: tuple[int, ...] = IMAGE, encoding: Any = None) -> Module:
    """A module of lines ``(result, op, "operand operand")`` on the input ``x``."""
    source = Tensor(shape, encoding or Real())
    types, nodes = {"x": source}, []
    for result, op, operands in lines:
        read = tuple(operands.split())
        types[result] = infer(op, tuple(types[name] for name in read))
        nodes.append(Node(result, op, read, types[result], Origin(f"net.{result}", "net.py line 7")))
    return verify(Module(Value("x", source), tuple(nodes), lines[-1][0]))


def shown(module: Module) -> list[str]:
    """The module's lines without fields and types."""
    return [f"{n.result} = {n.op.name} {' '.join(n.operands)}" for n in module.nodes]


def run(module: Module, passes: str, data: np.ndarray | None = None) -> Module:
    return pipeline.run(module, pipeline.parse(passes), Context(data, 0)).module


def images(count: int = 6, shape: tuple[int, ...] = IMAGE) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, *shape))


def conv(outputs: int, inputs: int = 2, kernel: int = 3, seed: int = 2, **fields: Any) -> Conv2d:
    rng = np.random.default_rng(seed)
    return Conv2d(Array.of(rng.standard_normal((outputs, inputs, kernel, kernel))), **fields)


def linear(outputs: int, inputs: int, seed: int = 3, bias: Array | None = None) -> Linear:
    return Linear(Array.of(np.random.default_rng(seed).standard_normal((outputs, inputs))), None, bias)


def norm(channels: int, eps: float = 1e-5, seed: int = 4) -> BatchNorm:
    rng = np.random.default_rng(seed)
    mean, gamma, beta = (Array.of(v) for v in rng.standard_normal((3, channels)))
    return BatchNorm(mean, Array.of(rng.uniform(0.1, 2, channels)), eps, gamma, beta)


def op_of(module: Module, name: str) -> Any:
    return module.definitions[name].op


def ops_of(module: Module, kind: type[Op]) -> Iterator[Node]:
    return (node for node in module.nodes if isinstance(node.op, kind))


def refusal(module: Module, passes: str, data: np.ndarray | None = None) -> SpirError:
    with pytest.raises(SpirError) as caught:
        run(module, passes, data)
    return caught.value


def text_of(refused: SpirError) -> str:
    """The error as users see it, without the notes of the pipeline runner."""
    kept = [attrs.evolve(d, notes=tuple(n for n in d.notes if n.label != "reproducer")) for d in refused.diagnostics]
    return str(SpirError(*kept))


# canonicalize


@pytest.mark.parametrize(
    "nothing",
    [
        Pad((0,) * 6),
        Slice((0, 0, 0), IMAGE, (1, 1, 1)),
        AvgPool((1, 1), (1, 1)),
        Scaling(Array.of([1.0])),
        Scaling(Array.of([1, 1])),
    ],
    ids=lambda op: op.name,
)
def test_what_does_nothing_vanishes(nothing):
    module = network(("a", Relu(), "x"), ("b", nothing, "a"), ("c", conv(3), "b"))
    assert shown(run(module, "canonicalize")) == ["a = relu x", "c = conv2d a"]


@pytest.mark.parametrize(
    "something",
    [
        Pad((0, 0, 0, 0, 0, 1)),
        Slice((0, 0, 0), IMAGE, (1, 2, 1)),
        AvgPool((1, 1), (2, 1)),
        AvgPool((3, 3), (1, 1), (1, 1, 1, 1)),
        Scaling(Array.of([1.0, -1.0])),
    ],
    ids=lambda op: op.name,
)
def test_what_does_something_stays(something):
    module = network(("a", Relu(), "x"), ("b", something, "a"), ("c", Relu(), "b"))
    assert run(module, "canonicalize") == module


def test_flatten_of_features_vanishes_and_of_an_image_stays():
    module = network(("a", Flatten(), "x"), ("b", Flatten(), "a"), ("c", linear(2, 40), "b"))
    assert shown(run(module, "canonicalize")) == ["a = flatten x", "c = linear a"]


def test_a_network_that_does_nothing_keeps_one_op():
    module = network(("a", Scaling(Array.of([1.0])), "x"))
    assert run(module, "canonicalize") == module


def test_an_output_that_does_nothing_is_what_stands_before_it():
    module = network(("a", Relu(), "x"), ("b", Scaling(Array.of([1.0])), "a"))
    assert run(module, "canonicalize").output == "a"


def test_a_relu_of_a_relu_is_one():
    module = network(("a", Relu(), "x"), ("b", Relu(), "a"), ("c", Relu(), "b"), ("d", Add(), "b c"))
    assert shown(run(module, "canonicalize")) == ["a = relu x", "d = add a a"]


def test_a_convolution_does_its_own_padding():
    module = network(("a", Pad((0, 0, 1, 2, 0, 3)), "x"), ("b", conv(3, padding=(1, 0, 0, 1)), "a"))
    after = run(module, "canonicalize")
    assert shown(after) == ["b = conv2d x"]
    assert op_of(after, "b").padding == (2, 2, 0, 4)


def test_a_convolution_takes_all_pads_before_it():
    module = network(
        ("a", Pad((0, 0, 1, 0, 0, 0)), "x"), ("b", Pad((0, 0, 0, 1, 2, 0)), "a"), ("c", conv(3, padding=(1,) * 4), "b")
    )
    after = run(module, "canonicalize")
    assert shown(after) == ["c = conv2d x"]
    assert op_of(after, "c").padding == (2, 2, 3, 1)


def test_padded_channels_stay():
    module = network(("a", Pad((1, 0, 1, 1, 1, 1)), "x"), ("b", conv(3, 3), "a"))
    assert run(module, "canonicalize") == module


def test_a_pad_with_another_reader_stays_for_that_one():
    module = network(
        ("a", Pad((0, 0, 1, 1, 1, 1)), "x"),
        ("b", conv(2), "a"),
        ("c", AvgPool((3, 3), (1, 1)), "a"),
        ("d", Add(), "b c"),
    )
    assert shown(run(module, "canonicalize")) == ["a = pad x", "b = conv2d x", "c = avg_pool a", "d = add b c"]


# fold-bn


@pytest.mark.parametrize("bias", [None, Array.of([0.5, -1.0, 2.0])], ids=["no bias", "bias"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.25])
def test_the_fold_uses_the_eps_of_the_layer(eps, bias):
    source, layer = conv(3, bias=bias), norm(3, eps)
    after = run(network(("a", source, "x"), ("b", layer, "a")), "fold-bn")
    assert shown(after) == ["b = conv2d x"]
    own = np.zeros(3) if bias is None else bias.values
    for c in range(3):
        gain = layer.weight.values[c] / np.sqrt(layer.var.values[c] + eps)
        np.testing.assert_allclose(op_of(after, "b").weight.values[c], gain * source.weight.values[c], rtol=1e-14)
        offset = layer.bias.values[c] + gain * (own[c] - layer.mean.values[c])
        np.testing.assert_allclose(op_of(after, "b").bias.values[c], offset, rtol=1e-13)


def test_a_batch_norm_folds_into_a_matrix():
    after = run(network(("a", linear(3, 6), "x"), ("b", norm(3), "a"), shape=(6,)), "fold-bn")
    assert shown(after) == ["b = linear x"]


def test_weights_with_two_readers_stay_as_they_are():
    module = network(("a", conv(2, kernel=1), "x"), ("b", norm(2), "a"), ("c", Add(), "a b"))
    after = run(module, "fold-bn")
    assert shown(after) == ["a = conv2d x", "b = conv2d x", "c = add a b"]
    assert op_of(after, "a") == op_of(module, "a")
    assert op_of(after, "b").weight != op_of(after, "a").weight


def test_two_batch_norms_of_one_convolution_each_make_their_own_weights():
    module = network(("a", conv(2), "x"), ("b", norm(2, seed=5), "a"), ("c", norm(2, seed=6), "a"), ("d", Add(), "b c"))
    after = run(module, "fold-bn")
    assert shown(after) == ["b = conv2d x", "c = conv2d x", "d = add b c"]


def test_two_batch_norms_in_a_row_fold_both():
    after = run(network(("a", conv(2), "x"), ("b", norm(2, seed=5), "a"), ("c", norm(2, seed=6), "b")), "fold-bn")
    assert shown(after) == ["c = conv2d x"]


def test_a_gamma_of_0_makes_weights_of_0():
    layer = attrs.evolve(norm(2), weight=Array.of([0.0, 1.0]), var=Array.of([0.0, 1.0]))
    folded = op_of(run(network(("a", conv(2), "x"), ("b", layer, "a")), "fold-bn"), "b")
    assert not folded.weight.values[0].any()
    assert folded.bias.values[0] == layer.bias.values[0]


@pytest.mark.parametrize("before", [Relu(), AvgPool((2, 2), (1, 1)), Scaling(Array.of([2.0]))], ids=lambda op: op.name)
def test_a_batch_norm_without_weights_before_it_stays(before):
    module = network(("a", before, "x"), ("b", norm(2), "a"))
    assert run(module, "fold-bn") == module


def test_a_batch_norm_that_stays_is_refused_where_integers_begin():
    module = network(("a", Relu(), "x"), ("b", norm(2), "a"), ("c", Relu(), "b"))
    assert text_of(refusal(module, TO_INTEGERS, images())) == (
        "error[type]: %b = batch_norm stands between quantised values and works on reals\n"
        "       from: net.b (net.py line 7)\n"
        "       pass: propagate-scales\n"
        "        fix: run fold-bn; a batch_norm that follows no conv2d or linear is not folded: move it behind one"
    )


# calibrate-range


def test_ranges_need_data():
    assert text_of(refusal(network(("a", Relu(), "x")), "calibrate-range")) == (
        "error[data]: calibrate-range needs calibration data\n"
        "       pass: calibrate-range\n"
        "        fix: compile(..., data=images)"
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
        live = max(-flat[outside], flat[-1 - outside], 0)
        assert op_of(after, "a").hi.values == (flat[-1 - outside] if flat[-1 - outside] > 0 else live)


def test_only_the_layers_asked_for_are_calibrated():
    module = network(("a", Relu(), "x"), ("b", conv(2), "a"), ("c", Relu(), "b"))
    assert shown(run(module, 'calibrate-range{layers="net.c"}', images())) == [
        "x.clip = clip x",
        "a = relu x.clip",
        "b = conv2d a",
        "c = clip b",
    ]


# quantize


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


def test_an_activation_that_never_fires_takes_the_widest_range_of_the_network():
    module = network(("a", conv(2, bias=Array.of([-1e3, -1e3])), "x"), ("b", Relu(), "a"))
    after = run(module, "calibrate-range", images())
    assert op_of(after, "b").hi.values == np.abs(images()).max()


def test_zeros_as_data_give_every_value_a_range():
    module = network(("a", conv(2), "x"), ("b", Relu(), "a"))
    after = run(module, "calibrate-range", np.zeros_like(images()))
    assert [op_of(after, name).hi.values for name in ("x.clip", "b")] == [1, 1]


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


# propagate-scales: where biases end

BIAS = Array.of([0.7, -0.4])
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
}
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
    quantised = run(module, "calibrate-range, quantize", images())
    integer = run(quantised, "propagate-scales{bits=31, width=48}", images())
    assert not [n for n in integer.nodes if getattr(n.op, "bias", None) is not None]
    assert_same_codes(quantised, integer, "r", images(50))


@WAYS
def test_a_bias_ends_in_the_readout_whatever_stands_between(way):
    module = network(*THROUGH[way])
    quantised = run(module, "calibrate-range, quantize", images())
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
    integer = run(module, "calibrate-range, quantize, propagate-scales", images())
    assert op_of(integer, "r").add.values.shape == integer.types["r"].shape
    inner = network(*THROUGH["nothing"], ("r", Relu(), "s"))
    assert op_of(run(inner, TO_INTEGERS, images()), "r").add.values.shape == (2,)


def test_sums_that_another_sum_reads_before_an_activation_share_one_scale():
    module = network(
        ("a", conv(2), "x"),
        ("b", AvgPool((2, 2), (1, 1)), "a"),
        ("c", conv(2, 1, kernel=1, groups=2), "b"),
        ("d", Flatten(), "c"),
        ("e", linear(3, 4), "d"),
        ("f", Relu(), "e"),
    )
    after = run(module, "calibrate-range, quantize", images())
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


def test_a_scale_per_channel_before_a_sum_over_channels_is_refused_with_its_place():
    module = network(
        ("a", Scaling(Array.of([1.0, 3.0])), "x"),
        ("p", Slice((0, 1, 0), (2, 5, 4), (1, 1, 1)), "a"),
        ("b", conv(3), "p"),
        ("c", Relu(), "b"),
    )
    refused = refusal(module, TO_INTEGERS, images())
    assert refused.code == "E-SCALE"
    assert {"op": "%b = conv2d %p", "from": "net.b (net.py line 7)"}.items() <= {
        n.label: n.text for n in refused.diagnostics[0].notes
    }.items()
    assert "fix:" in str(refused)


# propagate-scales: joins


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
        "        fix: compile(..., data=images)"
    )


def test_scales_too_far_apart_for_wide_are_refused():
    refused = refusal(joined(factor=1e-4), TO_INTEGERS + "{width=13}", images())
    text = re.sub(r"of \d+ bits", "of N bits", text_of(refused))
    assert text == (
        "error[E-RESID-SCALE]: %c joins scales whose ratio needs a multiplier of N bits\n"
        "       from: net.c (net.py line 7)\n"
        "       pass: propagate-scales{width=13}\n"
        "        fix: propagate-scales{join=rescale}, or a larger width"
    )


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


# propagate-scales: the triple, names, places


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


# derive-thresholds, fuse-neuron


def integers(hi: int = 255, lo: int = 0) -> Module:
    """An integer network of one requant."""
    requant = Requant(Array.of([3]), Array.of([8]), 16, lo, hi, 0.5)
    return network(("a", Integrate(), "x"), ("b", requant, "a"), encoding=Int(-100, 100, Scale.of(0.1)))


def test_the_neuron_copies_the_integers_of_the_requant():
    module = run(network(("a", conv(2, bias=BIAS), "x"), ("b", Relu(), "a")), TO_INTEGERS, images())
    unfused = run(module, "derive-thresholds")
    assert shown(unfused)[-3:] == ["b.integral = integrate a.sum", "b.code = requant b.integral", "b = encode b.code"]
    assert op_of(unfused, "b.code") == op_of(module, "b")
    fused = op_of(run(unfused, "fuse-neuron"), "b")
    requant = op_of(module, "b")
    assert (fused.mul, fused.add, fused.div, fused.scale, fused.clip) == (
        requant.mul,
        requant.add,
        requant.div,
        requant.scale,
        (requant.lo, requant.hi),
    )


def test_clip_ranges_that_are_no_power_of_two_are_refused_with_the_nearest():
    assert text_of(refusal(integers(200), "derive-thresholds")) == (
        "error[type]: neuron stem realises clip ranges 0..2^b-1 and -2^(b-1)..2^(b-1)-1, not 0..200\n"
        "         op: %b = requant\n"
        "       from: net.b (net.py line 7)\n"
        "       pass: derive-thresholds\n"
        "        fix: quantize to 0..255"
    )
    assert "fix: quantize to -128..127" in str(refusal(integers(90, -128), "derive-thresholds"))


def test_an_unknown_neuron_is_named_with_the_near_miss():
    refused = refusal(integers(), "derive-thresholds{neuron=stemm}")
    assert "error[option]: there is no neuron 'stemm'" in str(refused)
    assert "fix: did you mean 'stem'?" in str(refused)


def test_an_integral_that_others_read_stays_beside_the_neuron():
    current = Current(4, "bits", -90, 80, -6, 6, Scale.of(0.5))
    requant = Requant(Array.of([3]), Array.of([8]), 16, 0, 15, 0.25)
    module = network(
        ("a", Integrate(), "x"),
        ("b", requant, "a"),
        ("c", Encode(4), "b"),
        ("d", Scaling(Array.of([3]), Array.of([0.75])), "c"),
        ("e", Integrate(), "d"),
        ("f", attrs.evolve(requant, scale=0.75), "a"),
        ("g", Add(), "e f"),
        encoding=current,
    )
    assert shown(run(module, "fuse-neuron")) == [
        "a = integrate x",
        "c = neuron_stem x",
        "d = scale c",
        "e = integrate d",
        "f = requant a",
        "g = add e f",
    ]


@pytest.mark.parametrize(
    ("bias", "hi"), [(Array.of([1]), 15), (None, 14)], ids=["a bias inside", "a clip range of its own"]
)
def test_three_ops_that_are_no_neuron_stay(bias, hi):
    current = Current(4, "bits", -90, 80, -6, 6, Scale.of(0.5))
    requant = Requant(Array.of([3]), Array.of([8]), 16, 0, hi, 0.25)
    module = network(("a", Integrate(bias), "x"), ("b", requant, "a"), ("c", Encode(4), "b"), encoding=current)
    assert run(module, "fuse-neuron") == module


def test_a_requant_of_integers_is_no_neuron():
    requant = Requant(Array.of([3]), Array.of([8]), 16, 0, 15, 0.25)
    source = Int(-90, 80, Scale.of(0.5))
    module = network(("a", Integrate(), "x"), ("b", requant, "a"), ("c", Encode(4), "b"), encoding=source)
    assert run(module, "fuse-neuron") == module


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


def test_a_neuron_that_does_not_exist_is_refused_with_the_nearest():
    module = network(("a", conv(2), "x"), ("b", Relu(), "a"))
    for name in ("derive-thresholds{neuron=stam}", "fuse-neuron{neuron=stam}"):
        passes = f"{TO_INTEGERS}, derive-thresholds, {name}" if name.startswith("fuse") else f"{TO_INTEGERS}, {name}"
        assert "did you mean 'stem'?" in str(refusal(module, passes, images()))
