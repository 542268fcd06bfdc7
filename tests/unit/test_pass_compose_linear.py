"""compose-linear: which maps in a row become one map, with which numbers, and which stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from spir import driver, interpreter, pipeline
from spir.conformance.examples import module_of, stored_input
from spir.driver import Context
from spir.errors import SpirError
from spir.ir import Array, Module, Op
from spir.ops._linear import WeightedMap
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.ops.upsample import Upsample
from spir.types import Current, Int, Real, Scale, Spikes, Tensor, scale_of

HALF, UNEQUAL = Scale.of(0.5), Scale.of([0.5, 0.25])
STEP = Array.of([0.5])
Line = tuple[str, Op, str]


def image(*shape: int, scale: Scale = HALF) -> Tensor:
    return Tensor(shape, Int(-4, 7, scale))


def run(module: Module, options: str = "") -> Module:
    """The module after the pass, which has kept every value that has kept its name."""
    after = pipeline.run(module, pipeline.parse(f"compose-linear{options}"), Context(None, 0), checked=False).module
    x = stored_input(module.input.type, np.random.default_rng(0))
    before, found = interpreter.run(module, x, "*"), interpreter.run(after, x, "*")
    for name in after.types.keys() & module.types.keys():
        assert np.array_equal(before[name], found[name])
        if not isinstance(module.types[name].encoding, Real):
            assert scale_of(module.types[name]) == scale_of(after.types[name])
    assert after.output == module.output
    return after


def shown(module: Module) -> list[str]:
    return [f"{n.result} = {n.op.name} {' '.join(n.operands)}" for n in module.nodes]


def counted(*shape: int) -> Array:
    """Weights 1, -2, 3, -4, ..."""
    size = int(np.prod(shape))
    return Array.of((np.arange(1, size + 1) * np.where(np.arange(size) % 2, -1, 1)).reshape(shape))


def linear(outputs: int, inputs: int, step: Array = STEP) -> Linear:
    return Linear(counted(outputs, inputs), step)


def conv(*shape: int, **fields: Any) -> Conv2d:
    return Conv2d(counted(*shape), fields.pop("step", STEP), **fields)


def only(module: Module) -> Any:
    (node,) = module.nodes
    return node.op


# what becomes one map


def test_a_matrix_of_a_matrix_is_their_product_at_the_product_of_their_scales():
    first, second = Array.of([[1, -2], [0, 3], [4, 5]]), Array.of([[1, 2, -1]])
    module = module_of(
        Tensor((2,), Int(-4, 7, HALF)),
        ("a", Linear(first, Array.of([0.25])), "x"),
        ("b", Linear(second, Array.of([0.125])), "a"),
    )
    assert only(run(module)) == Linear(Array.of([[-3, -1]]), Array.of([2.0**-5]))
    assert str(run(module)) == (
        "module {\n"
        "  input %x : tensor<2, int[-4, 7] * 0.5>\n"
        f"  %b = linear %x {{weight = @b.weight#{Array.of([[-3, -1]]).digest}, "
        f"weight_scale = @b.weight_scale#{Array.of([0.03125]).digest}}} : tensor<1, int[-28, 16] * 0.015625>"
        '  from "net.b"\n'
        "  output %b\n"
        "}\n"
    )


MOVED: dict[str, tuple[Op, tuple[int, ...]]] = {
    "conv2d": (conv(3, 2, 2, 2, padding=(1, 0, 0, 1), stride=(2, 1)), (2, 4, 3)),
    "depthwise": (conv(4, 1, 2, 2, groups=2), (2, 4, 3)),
    "avg_pool": (AvgPool((2, 2), (2, 1)), (2, 4, 3)),
    "avg_pool padded": (AvgPool((2, 2), (2, 2), (1, 0, 0, 1)), (2, 4, 3)),
    "global_avg_pool": (GlobalAvgPool(8, keepdim=True), (2, 4, 2)),
    "scale a channel": (Scaling(Array.of([3, -2])), (2, 4, 3)),
    "scale an element": (Scaling(counted(2, 2, 1)), (2, 2, 1)),
    "scale to": (Scaling(Array.of([3]), Array.of([0.25])), (2, 4, 3)),
    "scale by a float": (Scaling(Array.of([-0.25])), (2, 4, 3)),
    "slice": (Slice((0, 1, 0), (2, 4, 3), (1, 2, 1)), (2, 4, 3)),
    "pad": (Pad((1, 0, 0, 1, 2, 0)), (2, 2, 2)),
    "pad by the edge": (Pad((0, 1, 1, 0, 0, 2), edge=True), (2, 2, 2)),
    "permute": (Permute((2, 0, 1)), (2, 4, 3)),
    "upsample": (Upsample((2, 1)), (2, 2, 2)),
}


@pytest.mark.parametrize(("first", "shape"), MOVED.values(), ids=MOVED)
def test_a_matrix_behind_a_flattened_map_reads_what_the_map_read(first, shape):
    x = image(*shape)
    between = first.infer(x)
    module = module_of(x, ("a", first, "x"), ("f", Flatten(), "a"), ("l", linear(2, between.size), "f"))
    after = run(module)
    assert shown(after) == ["l.flat = flatten x", "l = linear l.flat"]
    columns = np.eye(x.size, dtype=np.int64).reshape(x.size, *shape)
    dense = [first.apply(column[None], real=False).reshape(-1) for column in columns]
    assert after.nodes[1].op.weight == Array.of(counted(2, between.size).values @ np.array(dense).T)


def test_a_matrix_behind_all_of_space_reads_the_image():
    module = module_of(image(2, 2, 4), ("g", GlobalAvgPool(8), "x"), ("l", linear(3, 2), "g"))
    after = run(module)
    assert shown(after) == ["l.flat = flatten x", "l = linear l.flat"]
    assert after.nodes[1].op == Linear(Array.of(np.repeat(counted(3, 2).values, 8, axis=1)), Array.of([0.0625]))


def test_a_matrix_behind_a_flattened_value_stays_as_it_is():
    module = module_of(image(2, 2, 2), ("f", Flatten(), "x"), ("l", linear(3, 8), "f"))
    assert run(module) == module


def test_a_row_of_maps_is_one_map():
    module = module_of(
        image(2, 4, 4),
        ("k", Scaling(Array.of([2, -1])), "x"),
        ("c", conv(3, 2, 3, 3, padding=(1,) * 4), "k"),
        ("p", AvgPool((2, 2), (2, 2)), "c"),
        ("f", Flatten(), "p"),
        ("l", linear(2, 12), "f"),
        ("m", linear(3, 2), "l"),
        ("s", Scaling(Array.of([5, 1, 0])), "m"),
    )
    after = run(module)
    assert [n.op.name for n in after.nodes] == ["flatten", "linear"]
    assert after.nodes[1].op.weight.values.shape == (3, 32)


def test_factors_multiply_the_weights_that_read_them():
    factors = Scaling(Array.of([3, -2]))
    whole = module_of(image(2, 3, 3), ("k", factors, "x"), ("c", conv(2, 2, 1, 1), "k"))
    assert only(run(whole)) == Conv2d(Array.of([[[[3]], [[4]]], [[[9]], [[8]]]]), STEP)
    grouped = module_of(image(2, 3, 3), ("k", factors, "x"), ("c", conv(4, 1, 1, 1, groups=2, padding=(1,) * 4), "k"))
    assert only(run(grouped)) == Conv2d(
        Array.of(np.reshape([3, -6, -6, 8], (4, 1, 1, 1))), STEP, groups=2, padding=(1,) * 4
    )


def test_factors_behind_weights_multiply_them():
    module = module_of(image(1, 2, 2), ("c", conv(2, 1, 1, 1), "x"), ("k", Scaling(Array.of([3, -5])), "c"))
    assert only(run(module)) == Conv2d(Array.of([[[[3]]], [[[10]]]]), STEP)
    vector = Tensor((2,), Int(0, 3, HALF))
    module = module_of(vector, ("l", linear(2, 2), "x"), ("k", Scaling(Array.of([7])), "l"))
    assert only(run(module)) == Linear(Array.of([[7, -14], [21, -28]]), STEP)


def test_a_factor_with_a_scale_of_its_own_leaves_that_scale():
    module = module_of(
        image(1, 2, 2),
        ("c", conv(2, 1, 1, 1), "x"),
        ("k", Scaling(Array.of([3, -5]), Array.of([0.125, 0.3])), "c"),
    )
    assert only(run(module)) == Conv2d(Array.of([[[[3]]], [[[10]]]]), Array.of([0.25, 0.6]))


def test_a_float_factor_turns_the_sign_of_weights_and_moves_into_their_scale():
    module = module_of(image(1, 2, 2), ("c", conv(1, 1, 1, 2), "x"), ("k", Scaling(Array.of([-0.25])), "c"))
    assert only(run(module)) == Conv2d(Array.of([[[[-1, 2]]]]), Array.of([0.125]))


def test_a_convolution_of_windows_is_one_of_wider_windows():
    module = module_of(image(1, 6, 4), ("p", AvgPool((2, 2), (2, 2)), "x"), ("c", conv(1, 1, 2, 1), "p"))
    assert only(run(module)) == Conv2d(
        Array.of([[[[1, 1], [1, 1], [-2, -2], [-2, -2]]]]), Array.of([0.125]), stride=(2, 2)
    )


def test_windows_that_overlap_add_up_in_the_weights():
    module = module_of(image(1, 1, 6), ("p", AvgPool((1, 2), (1, 1)), "x"), ("c", conv(1, 1, 1, 2, stride=(1, 2)), "p"))
    assert only(run(module)) == Conv2d(Array.of([[[[1, -1, -2]]]]), Array.of([0.25]), stride=(1, 2))


def test_dilated_taps_reach_over_windows():
    module = module_of(
        image(1, 1, 8), ("p", AvgPool((1, 2), (1, 2)), "x"), ("c", conv(1, 1, 1, 2, dilation=(1, 2)), "p")
    )
    assert only(run(module)) == Conv2d(Array.of([[[[1, 1, 0, 0, -2, -2]]]]), Array.of([0.25]), stride=(1, 2))


def test_zeros_around_windows_that_tile_an_image_are_zeros_around_the_image():
    module = module_of(
        image(1, 4, 6), ("p", AvgPool((2, 2), (2, 2)), "x"), ("c", conv(1, 1, 2, 2, padding=(1, 0, 0, 2)), "p")
    )
    found = only(run(module))
    assert (found.padding, found.stride) == ((2, 0, 0, 4), (2, 2))
    assert found.weight == Array.of(np.kron(counted(1, 1, 2, 2).values, np.ones((1, 1, 2, 2), dtype=int)))


def test_a_convolution_of_all_of_space_has_a_kernel_of_its_size():
    module = module_of(image(2, 2, 4), ("g", GlobalAvgPool(8, keepdim=True), "x"), ("c", conv(3, 2, 1, 1), "g"))
    assert only(run(module)) == Conv2d(
        Array.of(np.broadcast_to(counted(3, 2, 1, 1).values, (3, 2, 2, 4))), Array.of([0.0625]), stride=(2, 4)
    )


def test_moves_of_moves_are_one_move():
    x = image(2, 6, 8)
    cut = module_of(
        x,
        ("a", Slice((0, 1, 0), (2, 6, 8), (1, 2, 1)), "x"),
        ("b", Slice((1, 0, 2), (2, 2, 8), (1, 1, 3)), "a"),
    )
    assert only(run(cut)) == Slice((1, 1, 2), (2, 4, 8), (1, 2, 3))
    turned = module_of(x, ("a", Permute((1, 2, 0)), "x"), ("b", Permute((2, 0, 1)), "a"))
    assert only(run(turned)) == Permute((0, 1, 2))
    turned = module_of(x, ("a", Permute((2, 0, 1)), "x"), ("b", Permute((0, 2, 1)), "a"))
    assert only(run(turned)) == Permute((2, 1, 0))
    shaped = module_of(x, ("a", Reshape((4, 24)), "x"), ("b", Reshape((3, 4, 8)), "a"))
    assert only(run(shaped)) == Reshape((3, 4, 8))
    shaped = module_of(x, ("a", Reshape((4, 24)), "x"), ("b", Reshape((96,)), "a"))
    assert only(run(shaped)) == Flatten()
    shaped = module_of(x, ("a", Flatten(), "x"), ("b", Reshape((3, 32)), "a"))
    assert only(run(shaped)) == Reshape((3, 32))


def test_moves_of_spikes_stay_spikes():
    spikes = Tensor((2, 6, 8), Spikes(4, "bits", 0, 15, UNEQUAL))
    module = module_of(
        spikes,
        ("a", Slice((0, 1, 0), (2, 6, 8), (1, 2, 1)), "x"),
        ("b", Slice((1, 0, 2), (2, 2, 8), (1, 1, 3)), "a"),
    )
    assert run(module).types["b"] == module.types["b"]


def test_sums_of_sums_are_one_sum():
    module = module_of(
        image(2, 2, 2),
        ("k", Scaling(Array.of([2])), "x"),
        ("a", Add(), "x k"),
        ("b", Add(), "k x"),
        ("c", Add(), "a b k"),
    )
    assert shown(run(module)) == ["k = scale x", "c = add x k k x k"]


def test_a_sum_that_others_read_or_that_is_read_twice_stays_a_sum():
    lines: list[Line] = [("k", Scaling(Array.of([2])), "x"), ("a", Add(), "x k")]
    twice = module_of(image(2, 2, 2), *lines, ("b", Add(), "a a"))
    assert run(twice) == twice
    both = module_of(image(2, 2, 2), *lines, ("b", Add(), "a x"), ("c", Add(), "a k"), ("d", Add(), "b c"))
    assert shown(run(both)) == ["k = scale x", "a = add x k", "d = add a x a k"]


def test_codes_join_in_one_sum_as_in_a_sum_of_sums():
    source = Tensor((2,), Spikes(4, "suffix", 0, 4, HALF))
    module = module_of(source, ("k", Scaling(Array.of([-1])), "x"), ("a", Add(), "x k"), ("b", Add(), "a x"))
    assert run(module).types["b"] == module.types["b"]


# what stays


def test_reals_stay():
    x = Tensor((2, 4, 4), Real())
    weights = Array.of(np.ones((2, 2, 1, 1)))
    module = module_of(
        x,
        ("k", Scaling(Array.of([2.0])), "x"),
        ("c", Conv2d(weights, bias=Array.of([1.0, 2.0])), "k"),
        ("p", AvgPool((2, 2), (2, 2)), "c"),
        ("d", Conv2d(weights), "p"),
        ("a", Add(), "d p"),
        ("b", Add(), "a p"),
    )
    assert run(module) == module


STAYS: dict[str, tuple[Tensor, tuple[Line, ...]]] = {
    "no float64 is a ninth": (
        image(1, 6, 6),
        (("p", AvgPool((3, 3), (3, 3)), "x"), ("c", conv(1, 1, 1, 1), "p")),
    ),
    "no float64 is a seventh": (
        image(1, 1, 7),
        (("p", GlobalAvgPool(7), "x"), ("c", linear(1, 1), "p")),
    ),
    "zeros next to windows that leave a remainder": (
        image(1, 5, 4),
        (("p", AvgPool((2, 2), (2, 2)), "x"), ("c", conv(1, 1, 2, 2, padding=(1,) * 4), "p")),
    ),
    "zeros next to windows that overlap": (
        image(1, 4, 4),
        (("p", AvgPool((2, 2), (1, 1)), "x"), ("c", conv(1, 1, 2, 2, padding=(0, 1, 0, 0)), "p")),
    ),
    "windows over zeros": (
        image(1, 4, 4),
        (("p", AvgPool((2, 2), (2, 2), (1, 1, 1, 1)), "x"), ("c", conv(1, 1, 2, 2), "p")),
    ),
    "channels of unequal scales behind a factor": (
        image(2, 3, 3, scale=UNEQUAL),
        (("k", Scaling(Array.of([3])), "x"), ("c", conv(2, 1, 2, 2, groups=2), "k")),
    ),
    "channels of unequal scales under a factor": (
        image(2, 3, 3, scale=UNEQUAL),
        (("c", conv(2, 1, 2, 2, groups=2), "x"), ("k", Scaling(Array.of([3])), "c")),
    ),
    "channels of unequal scales that a factor evens out": (
        image(2, 3, 3, scale=UNEQUAL),
        (("k", Scaling(Array.of([2, 1]), Array.of([0.25])), "x"), ("c", conv(1, 2, 2, 2), "k")),
    ),
    "a factor of full shape before weights": (
        image(2, 2, 2),
        (("k", Scaling(counted(2, 2, 2)), "x"), ("c", conv(1, 2, 2, 2), "k")),
    ),
    "a factor of full shape behind weights": (
        image(2, 2, 2),
        (("c", conv(2, 2, 1, 1), "x"), ("k", Scaling(counted(2, 2, 2)), "c")),
    ),
    "a convolution of a convolution": (
        image(2, 4, 4),
        (("c", conv(2, 2, 2, 2), "x"), ("d", conv(2, 2, 2, 2), "c")),
    ),
    "weights behind a sum": (
        image(2, 4, 4),
        (("k", Scaling(Array.of([3])), "x"), ("a", Add(), "x k"), ("c", conv(2, 2, 2, 2), "a")),
    ),
    "weights behind a concatenation": (
        image(2, 4, 4),
        (("k", Scaling(Array.of([3])), "x"), ("a", Concat(), "x k"), ("c", conv(2, 4, 2, 2), "a")),
    ),
    "weights behind a nonlinear op": (
        image(2, 4, 4),
        (
            ("r", Requant(Array.of([1]), Array.of([0]), 2, 0, 3, 1.0), "x"),
            ("m", MaxPool((2, 2), (2, 2)), "r"),
            ("c", conv(2, 2, 1, 1), "m"),
        ),
    ),
}


@pytest.mark.parametrize(("x", "lines"), STAYS.values(), ids=STAYS)
def test_maps_that_are_not_exactly_one_map_stay(x, lines):
    module = module_of(x, *lines)
    assert run(module) == module


def test_what_others_read_stays_for_them():
    module = module_of(
        image(2, 4, 4),
        ("p", AvgPool((2, 2), (2, 2)), "x"),
        ("c", conv(2, 2, 1, 1), "p"),
        ("d", conv(2, 2, 1, 1, step=Array.of([0.25])), "p"),
        ("z", Scaling(Array.of([2.0])), "d"),
        ("r", Requant(Array.of([1]), Array.of([0]), 3, 0, 7, 0.125), "p"),
        ("e", Requant(Array.of([1]), Array.of([0]), 3, 0, 7, 0.125), "c"),
        ("s", Add(), "r e"),
    )
    assert shown(run(module)) == ["p = avg_pool x", "c = conv2d x", "r = requant p", "e = requant c", "s = add r e"]


def test_the_output_stays_for_the_user():
    lines: tuple[Line, ...] = (("p", AvgPool((2, 2), (2, 2)), "x"), ("c", conv(2, 2, 1, 1), "p"))
    module = module_of(image(2, 4, 4), *lines)
    middle = Module(module.input, module.nodes, "p")
    assert shown(run(middle)) == ["p = avg_pool x"]


def test_only_selected_layers_are_composed():
    module = module_of(image(2, 4, 4), ("p", AvgPool((2, 2), (2, 2)), "x"), ("c", conv(2, 2, 1, 1), "p"))
    assert run(module, '{layers="p|other"}') == module
    assert len(run(module, "{layers=c}").nodes) == 1


@pytest.mark.parametrize(("largest", "nodes"), [(23, 3), (24, 2), (10**6, 2)])
def test_no_composed_matrix_is_larger_than_asked_for(largest, nodes):
    module = module_of(
        image(2, 2, 3), ("k", Scaling(Array.of([3])), "x"), ("f", Flatten(), "k"), ("l", linear(2, 12), "f")
    )
    assert len(run(module, f"{{largest={largest}}}").nodes) == nodes


@pytest.mark.parametrize(("largest", "nodes"), [(63, 2), (64, 1)])
@pytest.mark.parametrize("pool", [AvgPool((4, 4), (4, 4)), GlobalAvgPool(16, keepdim=True)], ids=lambda op: op.name)
def test_no_composed_kernel_is_larger_than_asked_for(pool, largest, nodes):
    module = module_of(image(2, 4, 4), ("p", pool, "x"), ("c", conv(2, 2, 1, 1), "p"))
    assert len(run(module, f"{{largest={largest}}}").nodes) == nodes


def test_a_row_is_composed_as_far_as_the_largest_map_allows():
    module = module_of(
        image(2, 8, 8),
        ("p", AvgPool((2, 2), (2, 2)), "x"),
        ("q", AvgPool((2, 2), (2, 2)), "p"),
        ("f", Flatten(), "q"),
        ("l", linear(1, 8), "f"),
    )
    assert shown(run(module, "{largest=32}")) == ["p = avg_pool x", "l.flat = flatten p", "l = linear l.flat"]
    assert shown(run(module)) == ["l.flat = flatten x", "l = linear l.flat"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([[2**61 + 1, -(2**61)]], [[4]]),
        ([[2**61 + 1, -(2**61)]], [[8]]),
        ([[2**62, -(2**62)]], [[3], [1]]),
        ([[2**40, 1]], [[2**21]]),
    ],
)
def test_weights_beyond_registers_are_refused_or_stay(first, second):
    """On the constant 1 the sums of these weights cancel, and their products do not fit."""
    x = Tensor((2,), Int(1, 1, HALF))
    module = module_of(x, ("a", Linear(Array.of(first), STEP), "x"), ("b", Linear(Array.of(second), STEP), "a"))
    exact = [row[0] * (first[0][0] + first[0][1]) for row in second]
    assert outcome(module) in ([exact], "E-VRANGE")


def outcome(module: Module) -> Any:
    """What the composed module makes of ones, or the code of the refusal."""
    try:
        return interpreter.run(run(module), np.ones((1, 2)))["b"].tolist()
    except SpirError as refusal:
        return refusal.code


# what it is for


def test_behind_it_only_spikes_meet_weights():
    rng = np.random.default_rng(0)
    network = module_of(
        Tensor((1, 10, 10), Real()),
        ("c1", Conv2d(Array.of(rng.standard_normal((3, 1, 3, 3))), padding=(1,) * 4), "x"),
        ("r1", Relu(), "c1"),
        ("p1", MaxPool((2, 2), (2, 2)), "r1"),
        ("a1", AvgPool((2, 2), (1, 1)), "p1"),
        ("c2", Conv2d(Array.of(rng.standard_normal((4, 3, 2, 2))), None, Array.of(rng.standard_normal(4))), "a1"),
        ("r2", Relu(), "c2"),
        ("a2", AvgPool((2, 2), (1, 1)), "r2"),
        ("f", Flatten(), "a2"),
        ("l", Linear(Array.of(rng.standard_normal((5, 16))), None, Array.of(rng.standard_normal(5))), "f"),
    )
    data = rng.standard_normal((6, 1, 10, 10))
    before = driver.opt(network, "@stem{bits=4, max_pool=lower}", data=data).module
    after = driver.opt(network, "@stem{bits=4, max_pool=lower}, compose-linear", data=data).module
    assert not all(isinstance(t, Spikes) for t in read_by_weights(before))
    assert len(read_by_weights(after)) == len(read_by_weights(before)) == 3
    assert all(isinstance(t, Spikes) for t in read_by_weights(after))
    wanted = interpreter.run(before, data, "*")
    assert wanted["l"].any()
    for name in ("serial", "parallel", "hw{collapse=off}", "hw{collapse=auto}"):
        found = driver.backend_of(name).prepare(after).run(data, "*")
        for value in before.types.keys() & after.types.keys():
            assert np.array_equal(found[value], wanted[value]), f"{name}: %{value}"


def read_by_weights(module: Module) -> list[Any]:
    return [module.operand_types(n)[0].encoding for n in module.nodes if isinstance(n.op, WeightedMap)]


def test_currents_compose_like_spikes():
    current = Tensor((1, 4, 4), Current(4, "bits", -90, 80, -6, 6, HALF))
    module = module_of(
        current, ("p", AvgPool((2, 2), (2, 2)), "x"), ("c", conv(1, 1, 2, 2), "p"), ("y", Integrate(), "c")
    )
    assert shown(run(module)) == ["c = conv2d x", "y = integrate c"]
