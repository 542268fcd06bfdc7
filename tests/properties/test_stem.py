"""The theorems of the spatio-temporal neuron: codec, saturation law, layer; their preconditions and examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from spir.ir import Array, infer
from spir.ops._linear import channelwise
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_stem import NeuronStem
from spir.ops.requant import Requant
from spir.types import Int, Scale, Spikes, Tensor

ONE = Scale.of(1)
SIGNS = pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
Number = int | Fraction


class Numpy:
    """What `NeuronStem.fire` asks of an array library."""

    where = staticmethod(np.where)
    zeros_like = staticmethod(np.zeros_like)
    hold = staticmethod(lambda state: state)

    @staticmethod
    def constant(array: Array, like: Any) -> Any:
        return channelwise(array.values, like.ndim - 1).astype(like.dtype)


def limits(bits: int, *, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def clamp(value: int, bits: int, *, signed: bool) -> int:
    lo, hi = limits(bits, signed=signed)
    return min(max(value, lo), hi)


def up(value: Fraction) -> int:
    """Round half up."""
    return math.floor(value + Fraction(1, 2))


def train(value: int, bits: int, *, signed: bool) -> list[int]:
    """The two's complement digits of a code, MSB first, as Python writes them; the sign bit counts negative."""
    digits = [int(digit) for digit in f"{value % 2**bits:0{bits}b}"]
    return [-digits[0], *digits[1:]] if signed else digits


def generate(y: Number, bits: int, *, signed: bool = False) -> tuple[list[int], list[Number]]:
    """Equations 20 and 21, literally, on any number: spikes and the potential before each step."""
    spikes, potentials = [], []
    for t in range(bits):
        potentials.append(y)
        threshold = 2 ** (bits - 1 - t)
        if signed and t == 0:
            spike = -1 if y < 0 else 0
        else:
            spike = 1 if y >= threshold else 0
        y -= spike * threshold
        spikes.append(spike)
    return spikes, potentials


def doubling(y: Number, bits: int, wrap: Callable[[Number], Number] = lambda v: v) -> list[int]:
    """The generator of constant threshold: V <- 2 (V - s 2^(b-1))."""
    spikes = []
    for _ in range(bits):
        spike = int(y >= 2 ** (bits - 1))
        y = wrap(2 * (y - spike * 2 ** (bits - 1)))
        spikes.append(spike)
    return spikes


def int16(value: Number) -> int:
    return (int(value) + 2**15) % 2**16 - 2**15


def fired(neuron: NeuronStem, currents: np.ndarray) -> np.ndarray:
    return np.stack(list(neuron.fire(Numpy, iter(currents))))


def both_ways(neuron: NeuronStem, z: np.ndarray) -> np.ndarray:
    """The spikes for decoded inputs ``[N, 1]``, after `fire` and `reference` have agreed."""
    reach = int(np.abs(z).max(initial=1)).bit_length() + 1
    x = Tensor(z.shape[1:], Spikes(reach, "bits", *limits(reach, signed=True), ONE))
    frames = np.array([train(v, reach, signed=True) for v in z.ravel().tolist()]).T.reshape(reach, *z.shape)
    infer(neuron, (x,))
    found = neuron.reference((x,), frames)
    assert (fired(neuron, frames) == found).all()
    return found


# STEM-1: the codec


@SIGNS
@pytest.mark.parametrize("bits", range(1, 13))
def test_stem_1_the_codec_returns_every_code(bits, signed):
    lo, hi = limits(bits, signed=signed)
    x = np.arange(lo, hi + 1)[:, None]
    integers = Tensor((1,), Int(lo, hi, ONE))
    spikes = infer(Encode(bits), (integers,))
    frames = Encode(bits).reference((integers,), x)
    assert frames.shape == (bits, len(x), 1)
    assert (spikes.integers(frames) == x).all()
    assert frames[:, :, 0].T.tolist() == [train(v, bits, signed=signed) for v in range(lo, hi + 1)]


def test_the_train_of_3_is_00000011():
    frames = Encode(8).reference((Tensor((1,), Int(0, 255, ONE)),), np.array([[3]]))
    assert frames.ravel().tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


# STEM-2: the saturation law


@SIGNS
@pytest.mark.parametrize("bits", range(1, 7))
def test_stem_2_the_neuron_emits_the_clamped_floor_of_every_fraction(bits, signed):
    lo, hi = limits(bits, signed=signed)
    for div in (1, 2, 3, 7, 8):
        z = np.arange((2 * lo - 5) * div, (2 * hi + 5) * div + 1)[:, None]
        found = both_ways(NeuronStem(bits, Array.of([1]), Array.of([0]), div, 1.0, signed), z)
        for spikes, value in zip(found[:, :, 0].T.tolist(), z.ravel().tolist(), strict=True):
            y = Fraction(value, div)
            code = clamp(math.floor(y), bits, signed=signed)
            assert spikes == train(code, bits, signed=signed) == generate(y, bits, signed=signed)[0]


@SIGNS
@given(
    bits=st.integers(1, 16),
    z=st.integers(-(2**20), 2**20),
    mul=st.integers(-(2**12), 2**12),
    offset=st.integers(-(2**30), 2**30),
    div=st.integers(1, 2**20),
)
def test_stem_2_holds_for_any_rational_potential(signed, bits, z, mul, offset, div):
    y = Fraction(mul * z + offset, div)
    code = clamp(math.floor(y), bits, signed=signed)
    event("inside" if code == math.floor(y) else "saturated")
    found = both_ways(NeuronStem(bits, Array.of([mul]), Array.of([offset]), div, 1.0, signed), np.array([[z]]))
    assert found.ravel().tolist() == train(code, bits, signed=signed) == generate(y, bits, signed=signed)[0]


@given(st.floats(-600, 600), st.booleans())
def test_stem_2_holds_for_any_real_potential(y, signed):
    code = clamp(math.floor(y), 8, signed=signed)
    assert generate(Fraction(y), 8, signed=signed)[0] == train(code, 8, signed=signed)


def test_the_upper_clip_and_the_relu_are_free():
    neuron = NeuronStem(8, Array.of([1]), Array.of([0]), 1, 1.0)
    assert both_ways(neuron, np.array([[-1], [-255], [256], [10**6]]))[:, :, 0].T.tolist() == [
        [0] * 8,
        [0] * 8,
        [1] * 8,
        [1] * 8,
    ]


# STEM-3: the layer

layers = st.fixed_dictionaries(
    {
        "fan_in": st.integers(1, 12),
        "outputs": st.integers(1, 4),
        "bits_in": st.integers(1, 8),
        "bits": st.integers(1, 8),
        "signed_in": st.booleans(),
        "signed": st.booleans(),
        "shift": st.integers(1, 20),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(max_examples=500)
@given(layers)
def test_stem_3_a_layer_is_the_rounded_clamped_integer_layer(drawn):
    rng = np.random.default_rng(drawn["seed"])
    bits, shift, signed = drawn["bits"], drawn["shift"], drawn["signed"]
    lo, hi = limits(drawn["bits_in"], signed=drawn["signed_in"])
    weight = rng.integers(-127, 128, (drawn["outputs"], drawn["fan_in"]))
    x = rng.integers(lo, hi, (5, drawn["fan_in"]), endpoint=True)
    spread = int(np.abs(x @ weight.T).max()) + 1
    mul = rng.integers(1, 2 + 2 ** (bits + shift) // spread, drawn["outputs"])
    bias = rng.integers(-(2**bits), 2**bits, drawn["outputs"], endpoint=True)
    add = (bias << shift) + (1 << (shift - 1))

    integers = Tensor((drawn["fan_in"],), Int(lo, hi, ONE))
    spikes = infer(Encode(drawn["bits_in"]), (integers,))
    synapses = Linear(Array.of(weight), Array.of([1.0]))
    current = infer(synapses, (spikes,))
    neuron = NeuronStem(bits, Array.of(mul), Array.of(add), 2**shift, 1.0, signed)
    result = infer(neuron, (current,))

    frames = synapses.reference((spikes,), Encode(drawn["bits_in"]).reference((integers,), x))
    found = neuron.reference((current,), frames)
    assert (fired(neuron, frames) == found).all()

    requant = Requant(Array.of(mul), Array.of(add), 2**shift, *limits(bits, signed=signed), 1.0)
    steps = ((Integrate(), current), (requant, infer(Integrate(), (current,))), (Encode(bits), None))
    unfused, type_ = frames, current
    for op, _ in steps:
        unfused, type_ = op.reference((type_,), unfused), infer(op, (type_,))
    assert (unfused == found).all()
    assert type_ == result

    saturated = 0
    for n, o in np.ndindex(len(x), drawn["outputs"]):
        total = sum(int(w) * int(v) for w, v in zip(weight[o], x[n], strict=True))
        y = Fraction(int(mul[o]), 2**shift) * total + int(bias[o])
        code = clamp(up(y), bits, signed=signed)
        saturated += code != up(y)
        assert found[:, n, o].tolist() == train(code, bits, signed=signed)
    event(f"saturated: {'none' if not saturated else 'some' if saturated < found[0].size else 'all'}")


def test_without_the_half_the_neuron_floors():
    z = np.arange(-64, 256)[:, None]
    floors = both_ways(NeuronStem(5, Array.of([1]), Array.of([0]), 8, 1.0), z)
    rounds = both_ways(NeuronStem(5, Array.of([1]), Array.of([4]), 8, 1.0), z)
    spikes = Tensor((1,), Spikes(5, "bits", 0, 31, ONE))
    floored, rounded = spikes.integers(floors).ravel(), spikes.integers(rounds).ravel()
    assert rounded.tolist() == [clamp(up(Fraction(v, 8)), 5, signed=False) for v in z.ravel().tolist()]
    assert floored.tolist() == [clamp(v // 8, 5, signed=False) for v in z.ravel().tolist()]
    assert (floored[68], rounded[68]) == (0, 1)  # z = 4: one half is 1, and its floor 0
    inside = slice(64, 64 + 31 * 8)
    assert (rounded - floored)[inside].mean() == 0.5  # half a step too low on average


def test_an_accumulator_of_16_bits_that_wraps_breaks_the_layer():
    currents = np.full((8, 1, 1), 300)
    neuron = NeuronStem(8, Array.of([1]), Array.of([128]), 256, 1.0)
    assert 300 * 255 > 2**15
    spikes = Tensor((1,), Spikes(8, "bits", 0, 255, ONE))
    assert spikes.integers(fired(neuron, currents)).item() == clamp(up(Fraction(300 * 255, 256)), 8, signed=False)
    wrapped = spikes.integers(fired(neuron, currents.astype(np.int16)).astype(np.int64)).item()
    assert wrapped == clamp(up(Fraction(int16(300 * 255), 256)), 8, signed=False) != 255


# worked examples


def test_83_is_generated_as_0_1_0_1_0_0_1_1():
    spikes, potentials = generate(83, 8)
    assert spikes == [0, 1, 0, 1, 0, 0, 1, 1]
    assert potentials == [83, 83, 19, 19, 3, 3, 3, 1]
    left = [v - s * 2 ** (7 - t) for t, (s, v) in enumerate(zip(spikes, potentials, strict=True))]
    assert left == [83, 19, 19, 3, 3, 3, 1, 0]
    found = both_ways(NeuronStem(8, Array.of([1]), Array.of([0]), 1, 1.0), np.array([[83]]))
    assert found.ravel().tolist() == spikes


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_a_constant_threshold_and_doubling_generate_the_same_spikes(bits):
    for numerator in range(3 * 2**bits * 3):
        y = Fraction(numerator, 3)
        assert doubling(y, bits) == generate(y, bits)[0]


def test_doubling_in_16_bits_needs_a_potential_that_was_clamped_first():
    wrong = [y for y in range(-(2**15), 2**15) if doubling(y, 8, int16) != generate(y, 8)[0]]
    assert not [y for y in wrong if 0 <= y < 2**8]
    assert [y for y in wrong if y < 0]
    assert [y for y in wrong if y >= 2**8]


def test_the_or_of_two_trains_is_not_the_train_of_the_maximum():
    a, b = np.meshgrid(np.arange(256), np.arange(256))
    integers = Tensor(a.shape, Int(0, 255, ONE))
    spikes = infer(Encode(8), (integers,))
    trains = [Encode(8).reference((integers,), v[None]) for v in (a, b)]
    wrong = spikes.integers(np.maximum(*trains)) != np.maximum(a, b)
    assert (int(wrong.sum()), wrong.size) == (52670, 65536)
