"""Theorem CA: counts do not depend on when spikes come. Its corollary, its worked examples, and each way it fails."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import assume, event, example, given
from hypothesis import strategies as st

from spir import driver, interpreter
from spir.conformance.strategies import bounded
from spir.errors import SpirError
from spir.ir import Array, Module, infer
from spir.ops._linear import channelwise
from spir.ops.add import Add
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_ca_lif import NeuronCaLif
from spir.ops.requant import Requant
from spir.ranges import analyse
from spir.types import Current, Int, Scale, Spikes, Tensor
from tests.unit.small_networks import network

ONE = Scale.of(1)
WHOLE = Int(-255, 255, ONE)
BACKENDS = ("serial", "parallel", "hw", "hw{collapse=off}")
CURRENTS = st.lists(st.integers(-40, 40), min_size=1, max_size=12)
MODES = pytest.mark.parametrize("mode", ["multi", "single"])


class Numpy:
    """What `fire` asks of an array library."""

    where = staticmethod(np.where)
    zeros_like = staticmethod(np.zeros_like)
    hold = staticmethod(lambda state: state)

    @staticmethod
    def constant(array: Array, like: Any) -> Any:
        return channelwise(array.values, like.ndim - 1).astype(like.dtype)


def up(value: Fraction) -> int:
    """Round half up."""
    return math.floor(value + Fraction(1, 2))


def neuron(threshold: int, leak: int = 0, steps: int = 1, lo: int = 0, hi: int = 255) -> NeuronCaLif:
    return NeuronCaLif(steps, Array.of([1]), Array.of([leak + threshold // 2]), threshold, lo, hi, 0.5)


def carrier(currents: list[int]) -> Tensor:
    reach = max(map(abs, currents)) + 1
    return Tensor(
        (1,), Current(len(currents), "rate", -reach * len(currents), reach * len(currents), -reach, reach, ONE)
    )


def trains_of(op: NeuronCaLif, currents: list[int]) -> list[int]:
    """What the reference and the steps that backends take both emit."""
    frames = np.array(currents, dtype=np.int64).reshape(-1, 1, 1)
    type_ = carrier(currents)
    made = infer(op, (type_,))
    reference = op.reference((type_,), frames)
    fired = np.stack(list(op.fire(Numpy(), iter(frames))))
    np.testing.assert_array_equal(reference, fired)
    assert made.train is not None
    assert len(reference) == made.steps
    assert made.train.frame[0] <= reference.min() <= reference.max() <= made.train.frame[1]
    return [int(n) for n in reference.reshape(-1)]


def fitted(op: NeuronCaLif, currents: list[int], mode: str) -> NeuronCaLif:
    train = carrier(currents).train
    assert train is not None
    return op.in_mode(mode, train)


# one neuron


@MODES
@bounded(200)
@given(CURRENTS, st.integers(1, 30), st.integers(-60, 60), st.sampled_from([(0, 255), (0, 3), (-4, 5), (-255, 255)]))
@example([5], 10, 0, (0, 255))
@example([-5], 10, 0, (-255, 255))
@example([6, 5, -3, -7], 4, 0, (0, 255))
def test_counts_are_the_rounded_quotient_for_every_order_of_events(mode, currents, threshold, leak, ends):
    lo, hi = ends
    assume(mode == "multi" or hi <= len(currents))
    op = fitted(neuron(threshold, leak, len(currents), lo, hi), currents, mode)
    wanted = min(max(up(Fraction(sum(currents) + leak, threshold)), lo), hi)
    for order in (currents, currents[::-1], sorted(currents), sorted(currents, reverse=True)):
        found = trains_of(op, order)
        assert sum(found) == wanted
        event(f"negative spikes: {any(n < 0 for n in found)}, rounded: {found[-1] != 0}")
    running = np.cumsum(trains_of(op, currents))
    assert lo <= running.min() <= running.max() <= hi


@bounded(100)
@given(CURRENTS, st.integers(1, 30), st.data())
def test_pairs_of_opposite_spikes_anywhere_change_no_count(currents, threshold, data):
    many = list(currents)
    for _ in range(data.draw(st.integers(1, 6))):
        weight = data.draw(st.integers(-50, 50))
        for spike in (weight, -weight):
            many.insert(data.draw(st.integers(0, len(many))), spike)
    assert sum(trains_of(neuron(threshold), many)) == sum(trains_of(neuron(threshold), currents))


@bounded(100)
@given(st.integers(1, 20), st.integers(-300, 300))
def test_the_leak_comes_in_whole_shares_that_add_up_with_or_without_spikes(steps, leak):
    shares = [(t + 1) * leak // steps - t * leak // steps for t in range(steps)]
    assert sum(shares) == leak
    assert max(shares) - min(shares) <= 1
    assert sum(trains_of(neuron(7, leak, steps), [0] * steps)) == max(0, up(Fraction(leak, 7)))


def test_the_worked_examples():
    """Counts as they run, then the rounding."""
    assert list(np.cumsum(trains_of(neuron(4), [6, 5, -3, -7]))) == [1, 2, 2, 1, 0]  # a plain LIF reports 2
    assert list(np.cumsum(trains_of(neuron(10), [14, 9, -4, -12, 8]))) == [1, 2, 2, 1, 1, 2]
    assert list(np.cumsum(trains_of(neuron(10), [-12, -4, 8, 9, 14]))) == [0, 0, 0, 0, 1, 2]
    assert trains_of(neuron(10), [5]) == [0, 1]  # a tie, up
    assert trains_of(neuron(10, lo=-9), [-5]) == [0, 0]  # a tie, up too


@bounded(100)
@given(CURRENTS, st.integers(1, 40))
def test_one_spike_a_step_needs_no_drain_where_no_step_brings_more_than_a_threshold(currents, threshold):
    reach = max(map(abs, currents)) + 1
    op = fitted(neuron(threshold, hi=min(255, len(currents))), currents, "single")
    assert (op.drain == 0) == (reach <= threshold)


# each way it fails


def run(events: list[int], threshold: int, *, gate: str = "current", tie: str = "up", rounds: int = 1) -> int:
    """A neuron taken apart, so that single rules can be broken; multi-fire, gated."""
    v = y = 0
    for e in events:
        before, v = y, v + e
        while True:
            if v >= threshold:
                v, y = v - threshold, y + 1
            elif v <= -threshold and (y if gate == "current" else before) > 0:
                v, y = v + threshold, y - 1
            else:
                break
    for _ in range(rounds):
        if 2 * v >= threshold:
            v, y = v - threshold, y + 1
        elif (2 * v < -threshold or (tie == "both" and 2 * v == -threshold)) and y > 0:
            v, y = v + threshold, y - 1
    return y


def test_without_rounding_the_order_shows():
    assert run([10, -5], 10, rounds=0) == 1
    assert run([-5, 10], 10, rounds=0) == 0
    assert run([10, -5], 10) == run([-5, 10], 10) == 1


def test_a_leak_that_only_events_bring_loses_what_is_due_without_them():
    """The share of the second step, in which no spike comes."""
    op = neuron(10, 20, 2)
    assert sum(trains_of(op, [3, 0])) == up(Fraction(23, 10)) == 2
    assert run([3 + 10], 10) == 1


def test_layers_that_round_together_lose_the_spikes_of_rounding():
    """Two neurons in a row: the first one's rounding spike has to reach the second before that rounds."""
    first = neuron(10)
    late = trains_of(first, [5])
    assert sum(late) == 1
    assert sum(trains_of(neuron(1, steps=2), late)) == 1
    assert sum(trains_of(neuron(1), late[:-1])) == 0


def test_symmetric_ties_never_settle():
    assert [run([5], 10, tie="both", rounds=n) for n in range(1, 6)] == [1, 0, 1, 0, 1]
    assert [run([5], 10, rounds=n) for n in range(1, 6)] == [1, 1, 1, 1, 1]


def test_a_gate_that_lags_lets_counts_run_below_zero():
    """The counter-example: V = 1/3, one step with +9, then -11; thirds as steps."""
    assert run([27, -33], 1, gate="previous") == -6
    assert run([27, -33], 1) == 0


def test_one_spike_a_step_without_drain_loses_spikes_and_is_refused():
    """V = 5, a single step of 14: 2 spikes and the rounding are not 3."""
    op = attrs.evolve(neuron(5, hi=3), mode="single")
    with pytest.raises(SpirError, match=r"E-BURST.*\n.*drain = 2 is proved to do"):
        infer(op, (carrier([14]),))
    frames = np.array([[[14]]])
    assert op.reference((carrier([14]),), frames).sum() == 2
    assert sum(trains_of(attrs.evolve(op, drain=2), [14])) == 3


def test_counts_beyond_the_window_are_refused():
    single = attrs.evolve(neuron(5, hi=9), mode="single")
    with pytest.raises(SpirError, match=r"E-CAP.*counts up to 9 do not fit 3 frames"):
        infer(single, (Tensor((1,), Current(2, "rate", -6, 6, -3, 3, ONE)),))
    with pytest.raises(SpirError, match=r"E-CAP.*codes of 0..255 are more than 128 steps"):
        NeuronCaLif.derive(requant_to(255), steps=128)


def requant_to(hi: int) -> Requant:
    return Requant(Array.of([1]), Array.of([2]), 4, 0, hi, 0.5)


# intervals between spikes


@bounded(200)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1.0, 0.5, 0.25, 0.3]), st.integers(-40, 40))
def test_intervals_hold_the_counts_of_the_rule_in_order_and_never_collide(steps, full, alpha, x):
    assume(abs(x) <= full)
    frames = Encode(steps, "isi", full, alpha).reference((Tensor((1,), Int(-40, 40, ONE)),), np.array([[x]]))[:, 0, 0]
    size, share = abs(x), Fraction(str(alpha))
    count = math.floor(share * steps * size / full)
    assert frames.sum() == count * np.sign(x)
    at = [math.floor(n * full / (share * size)) for n in range(1, count + 1)]
    assert list(np.nonzero(frames)[0] + 1) == at
    assert len(set(at)) == count
    assert all(1 <= t <= steps for t in at)


@pytest.mark.parametrize("alpha", [0.9, 0.1, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_share_that_is_no_binary_fraction_is_what_its_digits_say(backend, alpha):
    module = network(("t", Encode(255, "isi", 256, alpha), "x"), ("y", Integrate(), "t"), shape=(3,), encoding=WHOLE)
    x = np.array([[255, 100, -3]])
    wanted = [math.floor(Fraction(str(alpha)) * 255 * abs(v) / 256) * (1 if v > 0 else -1) for v in x[0].tolist()]
    assert interpreter.run(module, x, "y")["y"].tolist() == [wanted]
    found = driver.backend_of(backend).prepare(module).run(x, "*")
    assert found["y"].tolist() == [wanted]
    np.testing.assert_array_equal(found["t"], interpreter.run(module, x, "t")["t"])


def test_intervals_that_no_register_counts_are_refused():
    with pytest.raises(SpirError, match=r"E-VRANGE.*intervals of"):
        infer(Encode(255, "isi", 255, 0.123456789012345678), (Tensor((1,), WHOLE),))
    with pytest.raises(SpirError, match=r"alpha = 1\.0 and full = 0"):
        infer(Encode(255, "isi", 0), (Tensor((1,), WHOLE),))


def test_shares_of_a_leak_near_the_register_do_not_wrap():
    op = NeuronCaLif(255, Array.of([1]), Array.of([3 * 2**57]), 2**57, 0, 9, 1.0)
    current = Tensor((1,), Current(255, "rate", -9, 9, -5, 5, ONE))
    assert op.reference((current,), np.zeros((255, 1, 1), np.int64)).sum() == 3
    assert sum(op.fire(Numpy(), iter(np.zeros((255, 1, 1), np.int64)))).item() == 3


def test_a_frame_range_holds_what_is_left_where_a_train_has_ended():
    short = Current(3, "rate", -400, -200, -105, -77, ONE)
    module = network(("r", NeuronCaLif(1, Array.of([1]), Array.of([0]), 9, -3, 3, 1.0), "x"), ("s", Add(), "r x"),
                     shape=(1,), encoding=short)  # fmt: skip
    train = module.types["s"].train
    assert train is not None
    assert train.frame == (-111, 6)
    assert analyse(module)["s"].frame.hull == (-111, 6)


def test_intervals_of_a_code_that_no_window_holds_are_refused():
    with pytest.raises(
        SpirError, match=r"E-CAP.*codes of 0..255.*\n.*steps = 255, or full = 255, which is not lossless"
    ):
        infer(Encode(128, "isi"), (Tensor((1,), Int(0, 255, ONE)),))
    lossy = infer(Encode(128, "isi", 255), (Tensor((1,), Int(0, 255, ONE)),))
    assert lossy.encoding == Spikes(128, "rate", 0, 128, Scale.of(Fraction(255, 128)))


# networks


def layered(seed: int, mode: str) -> tuple[Module, Module]:
    """Three layers with a skip, on a train that holds net spikes; and the integer network that they stand for."""
    rng = np.random.default_rng(seed)
    sizes, steps = (4, 5, 5, 3), 6
    spikes = Spikes.rate(steps, -24, 24, ONE, (-4, 4))
    lines: list[Any] = []
    whole: list[Any] = [("x.sum", Integrate(), "x")]
    read, known = "x", "x.sum"
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        op = Linear(Array.of(rng.integers(-9, 10, (outputs, inputs))), ONE_SCALE)
        div = Array.of(rng.integers(3, 40, outputs))
        triple = (Array.of([2]), Array.of(rng.integers(-30, 40, outputs)), div)
        lo, hi = (0, 9) if i != 1 else (-4, 5)
        lines.append((f"s{i}", op, read))
        whole.append((f"s{i}", op, known))
        joined = f"s{i}"
        if i == 1:
            lines.append(("t1", Add(), "s1 s0"))
            whole.append(("t1", Add(), "s1 s0"))
            joined = "t1"
        module = network(*lines, shape=(4,), encoding=spikes)
        train = module.types[joined].train
        assert train is not None
        plain = NeuronCaLif(steps, *triple, lo, hi, 1.0).in_mode(mode, train)
        lines.append((f"y{i}", plain, joined))
        whole.append((f"y{i}", Requant(*triple, lo, hi, 1.0), joined))
        read = known = f"y{i}"
    return network(*lines, shape=(4,), encoding=spikes), network(*whole, shape=(4,), encoding=spikes)


ONE_SCALE = Array.of([1.0])


@MODES
@bounded(15)
@given(st.integers(0, 2**32 - 1))
def test_every_layer_counts_what_the_integer_network_says_however_spikes_come(mode, seed):
    spiking, whole = layered(seed, mode)
    rng = np.random.default_rng(seed)
    x = rng.integers(-4, 5, (6, 8, 4))
    shuffled = rng.permuted(x, axis=0)
    pairs = np.clip(x + (noise := rng.integers(-1, 2, x.shape)) - np.roll(noise, 1, axis=0), -4, 4)
    same = pairs.sum(axis=0) == x.sum(axis=0)
    pairs = np.where(same, pairs, x)
    wanted = interpreter.decoded(whole, interpreter.run(whole, x, "*"))
    for given_ in (x, shuffled, pairs):
        reference = interpreter.run(spiking, given_, "*")
        counts = interpreter.decoded(spiking, reference)
        for name in ("y0", "y1", "y2", "t1"):
            np.testing.assert_array_equal(counts[name], wanted[name])
        for backend in BACKENDS:
            found = driver.backend_of(backend).prepare(spiking).run(given_, "*")
            for name, stored in reference.items():
                np.testing.assert_array_equal(found[name], stored)
    spikes = reference["y0"]
    event(f"negative spikes: {bool((spikes < 0).any())}; rounding: {bool(spikes[-1].any())}")
