"""Trains in machine words, and traces that hold them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spir.conformance.examples import module_of
from spir.driver import Compiled, Trace, backend_of
from spir.errors import SpirError
from spir.ops.encode import Encode, bits, sort
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.packing import Packed
from spir.types import Current, Int, Real, Scale, Spikes, Tensor

HALF = Scale.of(0.5)
FRAMES = st.integers(1, 64).flatmap(
    lambda steps: arrays.arrays(np.int64, (steps, 2, 3), elements=st.integers(-1, 1), fill=st.just(0))
)


@given(FRAMES)
def test_frames_come_back(frames):
    packed = Packed.of(frames)
    np.testing.assert_array_equal(packed.frames, frames)
    np.testing.assert_array_equal(packed.counts, frames.sum(axis=0))
    assert (packed.shape, packed.frames.dtype, packed.counts.dtype) == (frames.shape, np.int64, np.int64)
    assert packed.positive.dtype == np.uint64
    assert (packed.negative is None) == (frames >= 0).all()


def test_bit_t_is_frame_t():
    frames = np.zeros((64, 1, 2), dtype=np.int64)
    frames[[0, 5, 63], 0, 0] = 1
    frames[62, 0, 1] = -1
    packed = Packed.of(frames)
    assert packed.positive.tolist() == [[1 + 2**5 + 2**63, 0]]
    assert packed.negative is not None
    assert packed.negative.tolist() == [[0, 2**62]]


@given(st.integers(1, 63), st.booleans(), st.data())
def test_bits_are_packed_without_frames(steps, signed, data):
    lo, hi = Spikes.limits(steps, "bits", signed=signed)
    values = np.array([[lo, hi, 0, *data.draw(st.lists(st.integers(lo, hi), min_size=3, max_size=3))]])
    packed = Packed.bits(values, steps)
    np.testing.assert_array_equal(packed.frames, bits(values, steps, signed=signed))
    np.testing.assert_array_equal(packed.integers("bits"), values)


@pytest.mark.parametrize("code", ["suffix", "prefix"])
@pytest.mark.parametrize("steps", [1, 2, 7, 32, 63, 64])
def test_sorted_trains_are_packed_without_frames(steps, code):
    counts = np.arange(-steps, steps + 1)[None]
    for values in (counts, np.maximum(counts, 0)):
        packed = Packed.sorted(values, steps, code)
        np.testing.assert_array_equal(packed.frames, sort(values, steps, code))
        np.testing.assert_array_equal(packed.counts, values)
        np.testing.assert_array_equal(packed.integers(code), values)
        assert (packed.negative is None) == (values >= 0).all()


@given(FRAMES, st.booleans())
def test_batches_follow_each_other(frames, positive):
    parts = [np.abs(frames) if positive else frames, frames, frames[:, :0]]
    whole = Packed.concatenate([Packed.of(part) for part in parts])
    np.testing.assert_array_equal(whole.frames, np.concatenate(parts, axis=1))


@pytest.mark.parametrize(
    "pack",
    [
        lambda: Packed.of(np.zeros((65, 1), dtype=np.int64)),
        lambda: Packed.bits(np.zeros((1, 1), dtype=np.int64), 65),
        lambda: Packed.sorted(np.zeros((1, 1), dtype=np.int64), 65, "suffix"),
    ],
)
def test_more_than_64_frames_are_refused(pack):
    with pytest.raises(SpirError) as refusal:
        pack()
    assert str(refusal.value) == "error[usage]: a word holds 64 frames, not 65\n        fix: the unpacked form, .frames"


def test_frames_beyond_one_spike_are_refused():
    with pytest.raises(SpirError, match=r"words hold frames of -1, 0 and 1, not 0\.\.2"):
        Packed.of(np.array([[0], [2]]))


def network(code: str, steps: int, lo: int, hi: int, backend: str = "serial") -> Compiled:
    module = module_of(
        Tensor((3,), Real()),
        ("q", Quantize(0.5, lo, hi), "x"),
        ("e", Encode(steps, code), "q"),
        ("y", Integrate(), "e"),
    )
    runner = backend_of(backend)
    return Compiled(module, runner, (), (), {}, runner.prepare(module))


@pytest.mark.parametrize("backend", ["serial", "hw{collapse=off}", "parallel"])
@pytest.mark.parametrize(
    ("code", "steps", "lo", "hi"),
    [("bits", 4, -8, 7), ("bits", 3, 0, 7), ("suffix", 7, -7, 7), ("prefix", 64, 0, 64)],
)
def test_a_trace_means_the_same_in_frames_and_in_words(backend, code, steps, lo, hi, monkeypatch):
    x = np.random.default_rng(0).uniform(lo, hi, (9, 3))
    plain = network(code, steps, lo, hi).trace(x)
    wanted, other = plain["e"], network(code, steps, lo, hi, backend).trace(x)["e"]
    assert isinstance(other.held, Packed) == (backend == "parallel")
    for name in ("stored", "frames", "counts", "decoded"):
        np.testing.assert_array_equal(getattr(other, name), getattr(wanted, name))
    assert (other.words.positive == wanted.words.positive).all()
    assert repr(other) == repr(wanted) == f"Trace({wanted.type}, stored [{steps}, 9, 3])"
    np.testing.assert_array_equal(other.decoded, plain["q"].decoded)


def test_counts_and_decoded_values_of_words_need_no_frames(monkeypatch):
    found = network("bits", 5, -16, 15, "parallel").trace(np.array([[-9.0, 0.5, 7.0]]))["e"]
    monkeypatch.setattr(Packed, "frames", property(lambda _: pytest.fail("frames were made")))
    assert found.decoded.tolist() == [[-8.0, 0.5, 7.0]]
    assert found.counts.tolist() == [[-1, 1, 3]]


def test_batches_of_a_trace_are_joined_in_words(monkeypatch):
    x = np.random.default_rng(0).uniform(-4, 4, (9, 3))
    snn = network("suffix", 6, -6, 6, "parallel")
    whole = snn.trace(x)["e"]
    monkeypatch.setattr("spir.driver.CHUNK_BYTES", 1)
    cut = snn.trace(x)["e"]
    np.testing.assert_array_equal(cut.frames, whole.frames)
    assert isinstance(cut.held, Packed)


def test_words_are_refused_where_none_hold_the_value():
    long = network("suffix", 70, 0, 70, "parallel").trace(np.zeros((1, 3)))
    with pytest.raises(SpirError, match="a word holds 64 frames, not 70"):
        _ = long["e"].words
    with pytest.raises(SpirError, match="is no train of spikes") as refusal:
        _ = long["q"].words
    assert "fix: read .stored or .decoded" in str(refusal.value)
    current = Trace(Tensor((1,), Current(1, "rate", 0, 1, 0, 1, HALF)), np.zeros((1, 1, 1), dtype=np.int64))
    with pytest.raises(SpirError, match="is no train of spikes"):
        _ = current.words
    assert Trace(Tensor((1,), Int(0, 3, HALF)), np.array([[3]])).decoded.tolist() == [[1.5]]
