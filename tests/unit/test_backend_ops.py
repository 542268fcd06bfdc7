"""Ops beyond the first networks on serial and hw: corners, maxima, joins, what the host computes, memory."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spir import interpreter
from spir.backends.hw import Hw
from spir.backends.parallel import Parallel
from spir.backends.serial import Serial
from spir.backends.torch_ops._lowering import Use
from spir.backends.torch_ops.max_pool import MaxPoolLowering
from spir.conformance.examples import corners, module_of, probing_input, stored_input
from spir.discovery import find
from spir.errors import SpirError
from spir.ir import Array, Module
from spir.ops.add import Add
from spir.ops.clip import Clip
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.conv_transpose2d import ConvTranspose2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.product import Product
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.reshape import Reshape
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.ops.sigmoid import Sigmoid
from spir.ops.softmax import Softmax
from spir.ops.tanh import Tanh
from spir.ops.upsample import Upsample
from spir.types import Current, Int, Real, Scale, Spikes, Tensor

OPS = (
    *(Concat, ConvTranspose2d, MaxPool, Pad, Permute, Product, Reshape),
    *(Scaling, Shift, Sigmoid, Softmax, Tanh, Upsample),
)
BACKENDS: dict[str, Any] = {
    "serial": Serial(),
    "parallel": Parallel(),
    "hw": Hw(),
    "hw, frame by frame": Hw(collapse="off"),
}
ONE = Scale.of(1.0)


def agree(module: Module, x: np.ndarray, backend: Any) -> None:
    """Every value is the interpreter's: integers to the bit, reals within 1e-12 of the largest."""
    found = backend.prepare(module).run(x, keep="*")
    for name, expected in interpreter.run(module, x, keep="*").items():
        assert (found[name].dtype, found[name].shape) == (expected.dtype, expected.shape)
        reach = 1e-12 * np.abs(expected).max(initial=1e-300) if expected.dtype.kind == "f" else 0
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=reach, err_msg=f"{name}\n{module}")


def refused_on_reals(module: Module) -> bool:
    """Whether hw leaves an op of the module alone because it is no work of the host."""
    ops = (node.op for node in module.nodes if isinstance(node.type.encoding, Real))
    return any(isinstance(op, (Shift, MaxPool, Scaling)) for op in ops)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [op.name for op in OPS])
def test_every_corner_equals_the_interpreter(op, backend):
    assert issubclass(find("ops", op), OPS)
    made = 0
    for index, module in enumerate(corners(op)):
        assert module is not None
        if backend.startswith("hw") and refused_on_reals(module):
            with pytest.raises(SpirError, match="works on reals"):
                BACKENDS[backend].prepare(module)
            continue
        agree(module, probing_input(module, index), BACKENDS[backend])
        made += 1
    assert made or op in ("shift", "product")  # the second factor of the corner is made by a scale of reals


# maxima

SIGNED = Int(-9, -3, ONE)
ENCODINGS = (
    *(SIGNED, Int(-(2**62), 2**62, ONE), Int(-(2**30), 2**30, ONE), Int(0, 255, ONE)),
    *(Spikes(4, "suffix", 0, 4, ONE), Spikes(4, "suffix", -4, 3, ONE), Current(3, "direct", -18, 15, -6, 5, ONE)),
)


@st.composite
def pools(draw: st.DrawFn) -> tuple[MaxPool, tuple[int, int, int]]:
    def pair(least: int, most: int) -> tuple[int, int]:
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    op = MaxPool(kernel=pair(1, 3), stride=pair(1, 3), padding=(*pair(0, 2), *pair(0, 2)), dilation=pair(1, 2))
    shape = (draw(st.integers(1, 3)), *pair(1, 6))
    try:
        op.shape(shape)
    except SpirError:
        assume(False)
    return op, shape


@settings(max_examples=40)
@given(pools(), st.sampled_from(ENCODINGS), st.integers(0, 99))
def test_the_maximum_of_any_window_equals_the_interpreter(drawn, encoding, seed):
    op, shape = drawn
    module = module_of(Tensor(shape, encoding), ("y", op, "x"))
    x = stored_input(module.types["x"], np.random.default_rng(seed), 3)
    for backend in (BACKENDS["serial"], BACKENDS["parallel"], BACKENDS["hw"]):
        agree(module, x, backend)


@settings(max_examples=25)
@given(pools(), st.integers(0, 99))
def test_tap_by_tap_is_the_library_s_maximum(drawn, seed):
    op, shape = drawn
    lowering = MaxPoolLowering.of(Use(op, (Tensor(shape, SIGNED),), None, torch.device("cpu")))
    x = torch.from_numpy(np.random.default_rng(seed).integers(-9, -3, (2, *shape)))
    top, bottom, left, right = op.padding
    padded = torch.nn.functional.pad(x, (left, right, top, bottom), value=-99)
    assert torch.equal(lowering._by_taps(padded), lowering(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_reals_have_a_maximum_on_torch_alone(backend):
    module = module_of(Tensor((2, 5, 4), Real()), ("y", MaxPool((3, 3), (2, 1), (1, 0, 2, 1)), "x"))
    x = -np.abs(np.random.default_rng(1).standard_normal((3, 2, 5, 4))) - 1
    if not backend.startswith("hw"):
        agree(module, x, BACKENDS[backend])
        return
    with pytest.raises(SpirError, match="max_pool works on reals"):
        BACKENDS[backend].prepare(module)


def conv(rng: np.random.Generator, outputs: int, inputs: int, kernel: int = 3) -> Conv2d:
    weight = Array.of(rng.integers(-127, 128, (outputs, inputs, kernel, kernel)))
    return Conv2d(weight=weight, weight_scale=Array.of([0.01]), padding=(kernel // 2,) * 4)


def requant(rng: np.random.Generator, channels: int) -> Requant:
    add = Array.of(rng.integers(-(2**12), 2**14, channels))
    return Requant(mul=Array.of(rng.integers(1, 9, channels)), add=add, div=2**11, lo=0, hi=255, scale=0.02)


def pooled_network() -> Module:
    """Maxima of sums and of codes between bit-coded trains, which join and are moved about."""
    rng = np.random.default_rng(2)
    stem = NeuronStem(8, Array.of([3]), Array.of(rng.integers(0, 2**12, 5)), 2**11, 0.02)
    return module_of(
        Tensor((3, 9, 8), Real()),
        ("q", Quantize(scale=0.02, lo=-128, hi=127), "x"),
        ("e", Encode(steps=8), "q"),
        ("c1", conv(rng, 4, 3), "e"),
        ("z1", Integrate(bias=Array.of(rng.integers(-99, 99, 4))), "c1"),
        ("p1", MaxPool((3, 3), (2, 2), (1, 1, 1, 0)), "z1"),
        ("r1", requant(rng, 4), "p1"),
        ("e1", Encode(steps=8), "r1"),
        ("c2", conv(rng, 5, 4, 1), "e1"),
        ("n2", stem, "c2"),
        ("j", Concat(), "e1 n2 e1"),
        ("c3", conv(rng, 4, 13), "j"),
        ("u", Upsample((2, 1)), "j"),
        ("v", Permute((0, 2, 1)), "u"),
        ("w", Pad((0, 0, 1, 0, 0, 2), edge=True), "v"),
        ("c4", conv(rng, 2, 13), "w"),
        ("z4", Integrate(), "c4"),
        ("p4", MaxPool((2, 2), (2, 2)), "z4"),
        ("r4", requant(rng, 2), "p4"),
        ("z3", Integrate(), "c3"),
        ("r3", requant(rng, 4), "z3"),
        ("p3", MaxPool((2, 2), (1, 1), (0, 1, 1, 0), (2, 1)), "r3"),
        ("f3", Flatten(), "p3"),
        ("s4", Reshape((2 * 2 * 6,)), "r4"),
        ("y", Concat(), "f3 s4"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pooled_network_equals_the_interpreter(backend):
    module = pooled_network()
    x = np.random.default_rng(3).integers(-260, 261, (9, 3, 9, 8)) / 100
    agree(module, x, BACKENDS[backend])
    assert np.unique(interpreter.run(module, x, keep="p3")["p3"]).size > 50


def test_trains_beside_a_maximum_and_nested_ones_below_it_are_merged():
    module = pooled_network()
    trains = {name for name, type_ in module.types.items() if type_.train}
    assert Hw().prepare(module).merged == trains
    nested = Tensor((2, 4, 4), Spikes(5, "suffix", -5, 5, ONE))
    pooled = module_of(nested, ("p", MaxPool((2, 2), (2, 2)), "x"), ("c", Add(), "p p"), ("z", Integrate(), "c"))
    assert Hw().prepare(pooled).merged == {"x", "p", "c"}
    assert not Hw(collapse="off").prepare(pooled).merged
    even = Tensor((2, 4, 4), Current(3, "direct", -18, 15, -6, 5, ONE))
    alike = module_of(even, ("p", MaxPool((2, 2), (2, 2)), "x"), ("z", Integrate(), "p"))
    assert not Hw().prepare(alike).merged
    agree(alike, stored_input(even, np.random.default_rng(4)), Hw())
    for backend in BACKENDS.values():
        agree(pooled, stored_input(nested, np.random.default_rng(4)), backend)


def test_frames_flow_through_a_maximum_one_by_one(monkeypatch):
    train = Tensor((2, 4, 4), Spikes(5, "suffix", 0, 5, ONE))
    module = module_of(train, ("p", MaxPool((2, 2), (2, 2)), "x"), ("z", Integrate(), "p"))
    program = Serial().prepare(module)
    assert program.flowing == {"p"}
    assert program.run(np.ones((5, 1, 2, 4, 4)))["z"].tolist() == [[[[5, 5], [5, 5]]] * 2]


def test_maxima_and_moves_need_no_register():
    source = Tensor((1, 2, 2), Int(-(2**40), 2**40, ONE))
    module = module_of(source, ("p", MaxPool((2, 2), (2, 2)), "x"), ("f", Flatten(), "x"), ("y", Reshape((2, 2)), "f"))
    assert not list(Hw(accumulator=8).refusals(module))


# joins and moves


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_join_of_narrow_and_wide_sums_loses_nothing(backend):
    bits = Tensor((2, 3, 3), Spikes(8, "bits", 0, 255, ONE))
    module = module_of(
        bits,
        ("a", Scaling(factor=Array.of([3])), "x"),
        ("b", Scaling(factor=Array.of([2**54 - 1, -(2**54) + 3])), "x"),
        ("c", Concat(axis=2), "a b"),
        ("z", Integrate(), "c"),
    )
    agree(module, stored_input(bits, np.random.default_rng(5)), BACKENDS[backend])


@settings(max_examples=30)
@given(st.tuples(*[st.integers(0, 2)] * 6), st.sampled_from(["int", "bits"]), st.integers(0, 99))
def test_edges_of_any_dimension_equal_the_interpreter(pads, kind, seed):
    encoding = Int(4, 9, ONE) if kind == "int" else Spikes(3, "bits", -4, 3, ONE)
    module = module_of(Tensor((2, 1, 3), encoding), ("y", Pad(pads, edge=True), "x"))
    for backend in (BACKENDS["serial"], BACKENDS["parallel"], BACKENDS["hw, frame by frame"]):
        agree(module, stored_input(module.types["x"], np.random.default_rng(seed), 2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("to", [(12,), (4, 3), (3, 2, 2), (1, 3, 4), (2, 1, 3, 2)])
@pytest.mark.parametrize("shape", [(12,), (2, 6), (2, 3, 2), (2, 1, 3, 2)])
def test_every_rank_takes_every_shape(shape, to, backend):
    order = tuple(range(len(to)))[::-1]
    source = Tensor(shape, Int(-99, 99, ONE))
    module = module_of(source, ("r", Reshape(to), "x"), ("y", Permute(order), "r"))
    agree(module, stored_input(source, np.random.default_rng(6), 2), BACKENDS[backend])


# what the host computes


@settings(max_examples=30)
@given(st.data())
def test_a_transposed_convolution_of_any_kind_equals_the_interpreter(data):
    def pair(least: int, most: int) -> tuple[int, int]:
        return data.draw(st.integers(least, most)), data.draw(st.integers(least, most))

    rng, groups = np.random.default_rng(data.draw(st.integers(0, 99))), data.draw(st.sampled_from([1, 2]))
    op = ConvTranspose2d(
        weight=Array.of(rng.standard_normal((2, 3, *pair(1, 3)))),
        bias=Array.of(rng.standard_normal(3 * groups)) if data.draw(st.booleans()) else None,
        stride=pair(1, 3),
        padding=(*pair(0, 2), *pair(0, 2)),
        extra=pair(0, 3),
        dilation=pair(1, 2),
        groups=groups,
    )
    source = Tensor((2, *pair(1, 4)), Real())
    try:
        op.shape(source.shape)
    except SpirError:
        assume(False)
    module = module_of(source, ("y", op, "x"))
    for backend in (BACKENDS["serial"], BACKENDS["parallel"], BACKENDS["hw"]):
        agree(module, rng.standard_normal((2, *source.shape)), backend)


def hosted_network() -> Module:
    rng = np.random.default_rng(7)
    return module_of(
        Tensor((2, 4, 4), Real()),
        ("t", Tanh(), "x"),
        ("d", ConvTranspose2d(weight=Array.of(rng.standard_normal((2, 3, 2, 2))), stride=(2, 2)), "t"),
        ("g", Sigmoid(), "d"),
        ("m", Product(), "d g"),
        ("i", Clip(lo=Array.of([-1.0]), hi=Array.of([1.0, 0.5, 0.75])), "m"),
        ("p", Pad((0, 0, 1, 1, 1, 1)), "i"),
        ("q", Quantize(scale=1 / 128, lo=-128, hi=127), "p"),
        ("e", Encode(steps=8), "q"),
        ("c", conv(rng, 4, 3), "e"),
        ("z", Integrate(), "c"),
        ("r", Dequantize(), "z"),
        ("s", Softmax(), "r"),
        ("f", Flatten(), "s"),
        ("y", Softmax(log=True), "f"),
    )


@pytest.mark.parametrize("backend", ["hw", "hw, frame by frame"])
def test_the_host_computes_before_the_quantiser_and_behind_the_readout(backend):
    module, x = hosted_network(), np.random.default_rng(8).standard_normal((5, 2, 4, 4))
    found = BACKENDS[backend].prepare(module).run(x, keep="*")
    for node in module.nodes:  # each op on what was found: a rounded real may fall on the other side of a tie
        expected = node.op.reference(module.operand_types(node), *(found[name] for name in node.operands))
        np.testing.assert_allclose(found[node.result], expected, rtol=1e-11, atol=1e-13)
    assert np.unique(found["q"]).size > 50


def test_large_exponents_do_not_overflow():
    source = Tensor((3,), Real())
    module = module_of(source, ("a", Sigmoid(), "x"), ("b", Softmax(), "x"), ("c", Softmax(log=True), "x"))
    x = np.array([[-1e4, 0.0, 1e4], [700.0, 710.0, 720.0]])
    for backend in BACKENDS.values():
        found = backend.prepare(module).run(x, keep="*")
        assert found["a"].tolist() == [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]]
        np.testing.assert_allclose(found["b"].sum(axis=1), 1, rtol=1e-12)
        assert found["c"][0].tolist() == [-2e4, -1e4, 0.0]


def test_a_float_network_is_refused_in_one_error():
    module = module_of(
        Tensor((4,), Real()),
        ("r", Relu(), "x"),
        ("l", Linear(weight=Array.of(np.eye(4))), "r"),
        ("s", Relu(), "l"),
        ("m", Linear(weight=Array.of(np.eye(4))), "s"),
        ("t", Relu(), "m"),
        ("y", Softmax(), "t"),
    )
    with pytest.raises(SpirError) as refusal:
        Hw().prepare(module)
    assert str(refusal.value) == (
        "error[backend]: hw computes on integers, and relu works on reals\n"
        "         op: %r = relu %x : tensor<4, real>\n"
        "       from: net.r\n"
        "       also: 2 linear, 2 relu\n"
        "        fix: quantize the network first"
    )


# memory


def test_values_that_live_at_once_lie_apart():
    module = pooled_network()
    for backend in (Hw(), Hw(collapse="off")):
        program = backend.prepare(module)
        order = {name: index for index, name in enumerate(module.types)}
        held = [
            (order[name], order[program.last[name]], start, start + program.slots[name].nbytes)
            for name, start in program.places.items()
        ]
        for i, (born, dead, start, end) in enumerate(held):
            for other_born, other_dead, other_start, other_end in held[:i]:
                assert dead < other_born or other_dead < born or end <= other_start or other_end <= start
        assert program.room == max(end for *_, end in held)
        assert program.room < sum(slot.nbytes for slot in program.slots.values()) / 2


@pytest.mark.parametrize("collapse", ["auto", "off"])
def test_memory_is_used_again_from_chunk_to_chunk(collapse, monkeypatch):
    monkeypatch.setattr("spir.backends._hw_program.workers", lambda: 1)
    program, x = Hw(collapse=collapse).prepare(pooled_network()), np.random.default_rng(9).standard_normal((8, 3, 9, 8))
    whole = program.run(x, keep="*")
    monkeypatch.setattr("spir.backends._hw_program.CHUNK", 2**13)
    program = Hw(collapse=collapse).prepare(pooled_network())
    assert 1 <= program.chunk < 8
    for name, values in program.run(x, keep="*").items():
        np.testing.assert_array_equal(values, whole[name])


def test_estimates_count_all_that_lives_and_the_windows_of_wide_convolutions():
    rng = np.random.default_rng(10)
    images, weight = Tensor((8, 16, 16), Real()), Array.of(rng.standard_normal((8, 8, 3, 3)))
    module = module_of(images, ("y", Conv2d(weight=weight, padding=(1, 1, 1, 1)), "x"))
    assert Serial().prepare(module).bytes_per_sample > 8 * 9 * images.size
    narrow = module_of(
        attrs.evolve(images, encoding=Int(0, 9, ONE)),
        *((f"r{i}", Relu(), "x") for i in range(6)),
        ("y", Concat(), " ".join(f"r{i}" for i in range(6))),
    )
    for backend in BACKENDS.values():
        assert backend.prepare(narrow).bytes_per_sample > 4 * 12 * images.size
