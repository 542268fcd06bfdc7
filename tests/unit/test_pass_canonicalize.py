"""canonicalize: what does nothing vanishes, and moves in a row are one."""

from __future__ import annotations

import numpy as np
import pytest

from spir import interpreter
from spir.ir import Array, Op
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.flatten import Flatten
from spir.ops.max_pool import MaxPool
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.relu import Relu
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.ops.slice import Slice
from spir.ops.upsample import Upsample
from tests.unit.small_networks import (
    IMAGE,
    conv,
    images,
    linear,
    network,
    op_of,
    run,
    shown,
)


@pytest.mark.parametrize(
    "nothing",
    [
        Pad((0,) * 6),
        Slice((0, 0, 0), IMAGE, (1, 1, 1)),
        AvgPool((1, 1), (1, 1)),
        Scaling(Array.of([1.0])),
        Scaling(Array.of([1, 1])),
        Reshape(IMAGE),
        Permute((0, 1, 2)),
        Shift(Array.of([0.0, 0.0])),
        Upsample((1, 1)),
        MaxPool((1, 1), (1, 1)),
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
        Permute((0, 2, 1)),
        Shift(Array.of([0.0, 0.1])),
        Upsample((2, 1)),
        MaxPool((1, 1), (2, 1)),
        MaxPool((3, 3), (1, 1), (1, 1, 1, 1)),
        Reshape((1, 5, 8)),
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


MOVES: dict[str, tuple[list[tuple[str, Op, str]], list[str]]] = {
    "two reshapes": ([("a", Reshape((10, 4)), "r"), ("b", Reshape((5, 8)), "a")], ["b = reshape r"]),
    "a reshape and a flatten": ([("a", Reshape((10, 4)), "r"), ("b", Flatten(), "a")], ["b = flatten r"]),
    "a flatten and a reshape": ([("a", Flatten(), "r"), ("b", Reshape((8, 5)), "a")], ["b = reshape r"]),
    "there and back": ([("a", Flatten(), "r"), ("b", Reshape(IMAGE), "a")], []),
    "two orders": ([("a", Permute((1, 0, 2)), "r"), ("b", Permute((0, 2, 1)), "a")], ["b = permute r"]),
    "an order and its inverse": ([("a", Permute((1, 2, 0)), "r"), ("b", Permute((2, 0, 1)), "a")], []),
    "an order and a reshape": (
        [("a", Permute((1, 0, 2)), "r"), ("b", Reshape((10, 4)), "a")],
        ["a = permute r", "b = reshape a"],
    ),
}


@pytest.mark.parametrize("what", MOVES)
def test_moves_in_a_row_are_one_or_none(what):
    lines, expected = MOVES[what]
    module = network(("r", Relu(), "x"), *lines, ("z", Scaling(Array.of([2.0])), "b"))
    after = run(module, "canonicalize")
    last = expected[-1].split()[0] if expected else "r"
    assert shown(after) == ["r = relu x", *expected, f"z = scale {last}"]
    found, wanted = (interpreter.run(m, images(), "z")["z"] for m in (after, module))
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("what", ["there and back", "an order and its inverse"])
def test_an_output_that_moves_there_and_back_keeps_its_value(what):
    lines, _ = MOVES[what]
    module = network(("r", Relu(), "x"), *lines)
    after = run(module, "canonicalize")
    found, wanted = (interpreter.run(m, images(), m.output)[m.output] for m in (after, module))
    assert np.array_equal(found, wanted)


def test_a_pad_that_repeats_the_edge_is_not_the_convolution_s():
    module = network(("a", Pad((0, 0, 1, 1, 1, 1), edge=True), "x"), ("b", conv(3), "a"))
    assert run(module, "canonicalize") == module
