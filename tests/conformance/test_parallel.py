"""parallel: values and trains without a loop over time, laws in floats that are proved, and what it refuses."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spir import interpreter
from spir.backend import Packing
from spir.backends.parallel import Parallel
from spir.backends.serial import Serial
from spir.backends.torch_ops import _counting
from spir.backends.torch_ops._charging import Charge, Counting
from spir.backends.torch_ops._counting import Law, Sums
from spir.conformance import strategies
from spir.conformance.examples import module_of
from spir.errors import SpirError
from spir.ir import Array
from spir.ops._neuron import Neuron
from spir.ops._threshold import law
from spir.ops.add import Add
from spir.ops.conv2d import Conv2d
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.packing import Packed
from spir.ranges import analyse
from spir.types import Int, Interval, Real, Scale, Spikes, Tensor
from tests.conformance.networks import NETWORKS, example, images, plain, residual

CPU = torch.device("cpu")
FLOATS = (torch.float32, torch.float64)


def whole_range(lo: int, hi: int, reach: int | None = None) -> Sums:
    """Every integer between two bounds."""
    far = max(-lo, hi, 0) if reach is None else reach
    one, zero = np.ones(1, dtype=np.int64), np.zeros((1, 1), dtype=np.int64)
    return Sums(Interval.of(lo, hi), np.array([far], dtype=object), one, zero)


def law_of(triple, sums: Sums, dtype: torch.dtype = torch.float32, shape=None) -> Law | None:
    return Law.of(triple, sums, shape or triple[0].values.shape, dtype, CPU)


def counts(found: Law, z: np.ndarray) -> np.ndarray:
    """What the expression makes of integers ``[N, C]``."""
    dtype = found.step.dtype
    return found(torch.tensor(z, dtype=dtype) + found.offset).to(torch.int64).numpy()


@st.composite
def triples(draw, *, positive: bool = True):
    """A law of a few channels, with ties, saturation, a divisor a channel, and the bounds of its sums."""
    channels = draw(st.integers(1, 4))
    lo = draw(st.sampled_from([0, 0, -1, -8, 3]))
    levels = draw(st.sampled_from([1, 2, 3, 4, 7, 15, 16, 31, 64, 255]))
    small = draw(st.booleans())
    mul = draw(
        st.lists(st.integers(1 if positive else -3, 9 if small else 2**24), min_size=channels, max_size=channels)
    )
    div = draw(st.lists(st.integers(1, 40 if small else 2**31), min_size=channels, max_size=channels))
    spread = max(div)
    add = draw(st.lists(st.integers(-3 * spread, 3 * spread), min_size=channels, max_size=channels))
    low = draw(st.integers(-3000, 0))
    constants = Array.of(mul), Array.of(add), Array.of(div) if draw(st.booleans()) else div[0]
    return (*constants, lo, lo + levels), low, low + draw(st.integers(0, 6000))


@given(triples(), st.sampled_from(FLOATS))
@settings(max_examples=300, deadline=None)
def test_a_law_in_floats_is_the_law_on_its_whole_range(drawn, dtype):
    triple, lo, hi = drawn
    found = law_of(triple, whole_range(lo, hi), dtype)
    assume(found is not None)
    z = np.broadcast_to(np.arange(lo, hi + 1)[:, None], (hi - lo + 1, len(triple[0].values)))
    np.testing.assert_array_equal(counts(found, z), law(z, *triple))


@given(triples())
@settings(max_examples=200, deadline=None)
def test_float64_holds_every_law_of_small_sums(drawn):
    triple, lo, hi = drawn
    assert law_of(triple, whole_range(lo, hi), torch.float64) is not None


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 8, 16, 32, 63, 64])
@pytest.mark.parametrize("lo", [0, -1])
def test_thresholds_of_whole_steps_always_run_in_float32(levels, lo):
    rng = np.random.default_rng(levels)
    theta = rng.integers(1, 2**20 // levels, 64)
    triple = Array.of([1]), Array.of(rng.integers(-theta, theta)), Array.of(theta), lo * levels, levels
    found = law_of(triple, whole_range(-(2**20), 2**20), shape=(64,))
    assert found is not None
    near = (np.arange(lo * levels - 1, levels + 2)[:, None, None] * theta - triple[1].values) + np.arange(-2, 3)[
        :, None
    ]
    z = np.clip(near.reshape(-1, 64), -(2**20), 2**20)
    np.testing.assert_array_equal(counts(found, z), law(z, *triple))


@pytest.mark.parametrize("bits", [8, 16])
def test_laws_of_many_levels_are_exact_in_float64(bits):
    rng = np.random.default_rng(bits)
    mul, div, reach = rng.integers(2**23, 2**24, 3), 2**40, 2**16 * 2 ** (bits - 8)
    triple = Array.of(mul), Array.of(rng.integers(0, div, 3) + div // 2), div >> 8, 0, 2**bits - 1
    found = law_of(triple, whole_range(-reach, reach), torch.float64)
    assert found is not None
    z = np.stack([rng.integers(-reach, reach, 400_000) for _ in mul], axis=1)
    np.testing.assert_array_equal(counts(found, z), law(z, *triple))


def test_a_tie_of_every_step_is_decided_as_the_law_does():
    triple = Array.of([2]), Array.of([8]), 16, 0, 255
    found = law_of(triple, whole_range(-100, 3000))
    z = np.arange(-100, 3001)[:, None]
    np.testing.assert_array_equal(counts(found, z), law(z, *triple))


@pytest.mark.parametrize(
    "triple",
    [
        (Array.of([1, 0]), Array.of([3]), 4, 0, 7),
        (Array.of([1, -2]), Array.of([3]), 4, 0, 7),
        (Array.of([1]), Array.of([3]), 4, 5, 5),
        (Array.of([2**40]), Array.of([3]), 2**61, 0, 7),
        (Array.of([1]), Array.of([3]), 4, 0, 2**23),
    ],
)
def test_what_no_float_law_covers_is_left_to_integers(triple):
    assert law_of(triple, whole_range(-50, 50), torch.float64, shape=(2,)) is None


def test_sums_too_wide_for_a_type_have_no_law_in_it():
    triple = Array.of([1]), Array.of([0]), 2**22, 0, 7
    assert law_of(triple, whole_range(0, 100, reach=2**24)) is None
    assert law_of(triple, whole_range(0, 100, reach=2**24), torch.float64) is not None
    assert law_of(triple, whole_range(0, 100, reach=2**53), torch.float64) is None


@pytest.mark.parametrize("wrong", ["offset", "step"])
def test_the_proof_catches_a_wrong_constant(monkeypatch, wrong):
    triple = Array.of([3, 5]), Array.of([8, 9]), 16, 0, 15
    assert law_of(triple, whole_range(-40, 400)) is not None
    original = torch.tensor

    def spoiled(values, **fields):
        made = original(values, **fields)
        constants = made.is_floating_point() and made.ndim == 1
        spoiled.seen += constants
        return (
            made + (0.6 if wrong == "offset" else 0.1) if constants and spoiled.seen == 1 + (wrong == "step") else made
        )

    spoiled.seen = 0
    monkeypatch.setattr(_counting.torch, "tensor", spoiled)
    assert law_of(triple, whole_range(-40, 400)) is None


def test_sums_that_cannot_come_leave_more_room():
    triple = Array.of([11_243_451]), Array.of([70_340_862_587]), 97_479_444_199, 0, 15
    far, offsets = 2**22, 4665 * np.arange(4)
    everything = whole_range(-far, far)
    assert law_of(triple, everything) is None
    found = law_of(triple, attrs.evolve(everything, pitch=np.array([1024]), offsets=offsets[:, None]))
    z = (1024 * np.arange(-(2**12), 2**12)[:, None] + offsets).reshape(-1, 1)
    z = z[np.abs(z[:, 0]) <= far]
    np.testing.assert_array_equal(counts(found, z), law(z, *triple))


@given(st.integers(1, 9), st.lists(st.integers(-20, 20), min_size=1, max_size=4), st.integers(-60, 60))
def test_neighbours_are_the_nearest_sums(pitch, offsets, bound):
    sums = attrs.evolve(whole_range(-99, 99), pitch=np.array([pitch]), offsets=np.array(offsets)[:, None])
    known = sorted({pitch * i + o for i in range(-99, 100) for o in offsets})
    at = np.array([[bound]])
    assert sums.below(at).item() == max(z for z in known if z <= bound)
    assert sums.above(at).item() == min(z for z in known if z >= bound)


def compared(module, x, keep="*") -> None:
    """Every value on parallel, serial and the interpreter, whole and in words."""
    ready = Parallel().prepare(module)
    assert isinstance(ready, Packing)
    found, words, wanted = ready.run(x, keep), ready.run_packed(x, keep), interpreter.run(module, x, keep)
    stepped = Serial().prepare(module).run(x, keep)
    assert list(found) == list(words) == list(wanted)
    for name, values in wanted.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(found[name], values, rtol=1e-12, atol=1e-12)
            continue
        np.testing.assert_array_equal(found[name], values)
        np.testing.assert_array_equal(found[name], stepped[name])
        held, type_ = words[name], module.types[name]
        single = isinstance(type_.encoding, Spikes) and max(map(abs, type_.encoding.frame)) <= 1
        assert isinstance(held, Packed) == (single and type_.steps <= 64)
        np.testing.assert_array_equal(held.frames if isinstance(held, Packed) else held, values)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_value_equals_serial_and_the_interpreter(name):
    shown = example(name)
    compared(shown.module, shown.x)


@given(strategies.examples())
@settings(max_examples=40, deadline=None)
def test_random_networks_equal_serial_and_the_interpreter(drawn):
    assume(not list(Parallel().refusals(drawn.module)))
    compared(drawn.module, drawn.x)


@pytest.mark.parametrize("name", NETWORKS)
def test_pieces_of_a_batch_and_single_values_are_those_of_the_whole(name, monkeypatch):
    shown = example(name, 9)
    whole = Parallel().prepare(shown.module).run(shown.x, "*")
    monkeypatch.setattr("spir.backends.parallel.CACHE_BYTES", 1)
    ready = Parallel().prepare(shown.module)
    for wanted in (*whole, "*"):
        for value, found in ready.run(shown.x, wanted).items():
            np.testing.assert_allclose(found, whole[value], rtol=1e-12, atol=1e-12)
    packed = ready.run_packed(shown.x, "*")
    assert all(p.positive.shape[0] == 9 for p in packed.values() if isinstance(p, Packed))


def test_a_train_of_any_length_takes_one_product(monkeypatch):
    shapes = []
    original = torch.nn.functional.conv2d

    def counted(x, *rest, **fields):
        shapes.append(tuple(x.shape))
        return original(x, *rest, **fields)

    monkeypatch.setattr(torch.nn.functional, "conv2d", counted)
    network = Parallel().prepare(plain())
    shapes.clear()
    network.run(images(7))
    assert shapes == [(7, 3, 8, 8), (7, 4, 4, 4)]
    shapes.clear()
    network.run(images(7), "c2")
    assert shapes == [(7, 3, 8, 8), (8 * 7, 4, 4, 4), (7, 4, 4, 4)]


def counting_of(module, name: str) -> Counting:
    found = Parallel().prepare(module).steps[name].compute
    assert isinstance(found, Counting)
    return found


def test_a_weighted_sum_that_one_neuron_reads_takes_its_offset_along():
    found = counting_of(plain(), "n1")
    assert (found.reads, found.inner, found.dtype) == (("e",), {"c1"}, torch.float32)


def test_a_join_of_unequal_scales_is_one_sum():
    module = residual()
    charge = Charge.of(module.definitions["n3"], module, analyse(module))
    assert {name: factor.tolist() for name, factor in charge.terms.items()} == {"a": [2]}
    rng = np.random.default_rng(2)
    weight = Array.of(rng.integers(-3, 4, (4, 4, 3, 3)))
    scales = Array.of([0.01])
    lines = [
        ("c1", Conv2d(weight, scales, padding=(1,) * 4), "x"),
        ("s1", Scaling(Array.of([1024, 512, 64, 8]), Array.of([0.001])), "c1"),
        ("s2", Scaling(Array.of([4665, 5005, 7417, 5744]), Array.of([0.001])), "x"),
        ("a", Add(), "s1 s2"),
        ("y", NeuronStem(2, Array.of([8779011]), Array.of([2**30]), 2**39, 0.5), "a"),
    ]
    module = module_of(Tensor((4, 5, 5), Spikes(2, "bits", 0, 3, Scale.of(0.5))), *lines)
    found = counting_of(module, "y")
    assert (found.reads, found.inner) == (("x", "x"), {"c1", "s1", "s2", "a"})
    assert found.dtype == torch.float32
    compared(
        module, Encode(2).reference((Tensor((4, 5, 5), Int(0, 3, Scale.of(0.5))),), rng.integers(0, 4, (50, 4, 5, 5)))
    )


def test_a_value_that_others_read_stays():
    one = Linear(Array.of([[2, 1], [0, 3]]), Array.of([1.0]))
    act = Requant(Array.of([1]), Array.of([0]), 2, 0, 7, 1.0)
    source = Tensor((2,), Int(0, 9, Scale.of(1.0)))
    module = module_of(source, ("l", one, "x"), ("a", act, "l"), ("b", act, "l"), ("y", Add(), "a b"))
    assert counting_of(module, "a").reads == ("l",)
    module = attrs.evolve(module_of(source, ("l", one, "x"), ("a", act, "l")), output="l")
    assert counting_of(module, "a").reads == ("l",)
    compared(module, np.array([[9, 4], [0, 1]]), "")


@attrs.frozen
class FramesMatter(Neuron):
    name = "neuron_of_frames"
    code = "bits"

    def infer(self, *types):
        return Tensor(types[0].shape, Spikes(2, "bits", 0, 3, Scale.of(1.0)))

    def bounds(self, shapes, *intervals):
        return Interval.of(0, 3)


def test_every_neuron_without_a_law_is_refused_at_once():
    source = Tensor((2,), Spikes(2, "bits", 0, 3, Scale.of(1.0)))
    module = module_of(source, ("a", FramesMatter(), "x"), ("b", FramesMatter(), "a"))
    with pytest.raises(SpirError) as refusal:
        Parallel().prepare(module)
    assert [d.code for d in refusal.value.diagnostics] == ["backend"] * 2
    assert "neuron_of_frames has no count law" in str(refusal.value)
    assert "fix: fuse-parallel, or backend serial" in str(refusal.value)


@pytest.mark.parametrize("device", ["gpu", "cuda:999", ""])
def test_an_absent_device_is_refused(device):
    with pytest.raises(SpirError, match="device=cpu") as refusal:
        Parallel(device=device).prepare(plain())
    assert refusal.value.code == "backend"


def test_the_state_of_torch_stays():
    before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
    network = Parallel().prepare(plain())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = network.run(images(4))["y"]
        assert torch.is_autocast_enabled("cpu")
    np.testing.assert_array_equal(found, interpreter.run(plain(), images(4))["y"])
    assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) == before
    assert not torch.is_inference_mode_enabled()


def test_trains_beyond_a_word_stay_frames():
    module = module_of(
        Tensor((3,), Real()),
        ("q", Quantize(0.1, 0, 70), "x"),
        ("e", Encode(70, "suffix"), "q"),
        ("f", Flatten(), "e"),
        ("y", Integrate(), "f"),
    )
    x = np.array([[0.0, 3.4, 7.0]])
    found = Parallel().prepare(module).run_packed(x, "*")
    assert isinstance(found["e"], np.ndarray)
    np.testing.assert_array_equal(found["e"], interpreter.run(module, x, "e")["e"])
