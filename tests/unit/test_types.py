"""Types: what each encoding decodes to, exact scales, joins, intervals, and what no type may say."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spir.errors import SpirError
from spir.types import (
    Current,
    Int,
    Interval,
    Real,
    Scale,
    Spikes,
    Tensor,
    check_register,
    exact,
    join,
    same_scale,
    scale_of,
    weights,
)

ONE = Scale.of(1)
positive = st.fractions(min_value=Fraction(1, 10**30), max_value=10**30)
floats = st.floats(min_value=0, exclude_min=True, allow_infinity=False)


def message(refusal: pytest.ExceptionInfo[SpirError]) -> str:
    return f"{refusal.value.code}: {refusal.value.diagnostics[0].message}"


def decoded(tensor: Tensor, stored: object) -> list[float]:
    return tensor.decode(np.asarray(stored)).tolist()


# scales


@given(positive | floats.map(Fraction))
def test_exact_reads_back_as_the_same_fraction(value):
    text = exact(value)
    assert (Fraction(text) if "/" in text else Fraction(float(text))) == value


@given(floats)
def test_exact_is_the_shortest_float64_where_there_is_one(value):
    assert exact(Fraction(value)) == repr(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Fraction(1, 3), "1/3"),
        (Fraction(0.1), "0.1"),
        (Fraction(1, 10), "1/10"),
        (Fraction(3), "3.0"),
        (Fraction(10**400 + 1), str(10**400 + 1)),
        (Fraction(1, 2**1100), f"1/{2**1100}"),
    ],
)
def test_exact_writes_a_quotient_only_where_no_float64_is_equal(value, text):
    assert exact(value) == text


@given(st.lists(positive, min_size=1, max_size=4), st.lists(positive, min_size=1, max_size=4))
def test_the_product_of_scales_is_exact_channel_by_channel(a, b):
    if len(a) > 1 and len(b) > 1:
        a, b = a[: len(b)], b[: len(a)]
    size = max(len(a), len(b))
    expected = [x * y for x, y in zip(a * (size // len(a)), b * (size // len(b)), strict=True)]
    found = Scale.of(a) * Scale.of(b)
    assert found == Scale.of(expected)
    assert found.known == (tuple(expected) if len(set(expected)) > 1 else tuple(expected[:1]))


@given(st.lists(positive, min_size=2, max_size=4), st.integers(0, 3), positive)
def test_scales_are_equal_if_and_only_if_their_values_are(values, index, other):
    changed = list(values)
    changed[index % len(values)] = other
    assert (Scale.of(values) == Scale.of(changed)) == (values == changed or len({*values, *changed}) == 1)


def test_float_products_that_should_be_equal_are_equal_as_scales():
    assert 0.1 * 0.7 * 0.3 != 0.1 * (0.7 * 0.3)
    a, b, c = Scale.of(0.1), Scale.of(0.7), Scale.of(0.3)
    assert (a * b) * c == a * (b * c) == c * (b * a)


def test_equal_channels_collapse_to_one_scale():
    assert Scale.of([0.5, 0.5, 0.5]) == Scale.of(0.5)
    assert Scale.of([Fraction(1, 2), 0.5]).size == 1


def test_a_scale_per_channel_prints_its_size_and_digest():
    scale = Scale.of([0.5, 0.25])
    assert str(scale) == f"[2 #{scale.digest}]"
    assert len(scale.digest) == 16
    assert str(Scale.of(0.1)) == "0.1"
    assert scale.floats().tolist() == [0.5, 0.25]


def test_a_scale_that_was_read_without_its_weights_compares_but_has_no_values():
    scale = Scale.of([0.5, 0.25])
    read = Scale(2, scale.digest)
    assert read == scale
    with pytest.raises(SpirError) as refusal:
        read * ONE
    assert message(refusal) == f"weights: the scale #{scale.digest} is not known without the weights"


@pytest.mark.parametrize("value", [0, 0.0, -0.5, math.inf, math.nan, Fraction(-1, 3)])
def test_a_scale_is_positive_and_finite(value):
    for given_ in (value, [1.0, value]):
        with pytest.raises(SpirError) as refusal:
            Scale.of(given_)
        assert message(refusal) == f"type: a scale is a positive finite number, not {value}"


def test_operands_of_unequal_scales_are_refused_with_the_way_out():
    tensors = [Tensor((1,), Int(0, 1, Scale.of(s))) for s in (0.5, 0.25)]
    assert same_scale(tensors[:1]) == Scale.of(0.5)
    with pytest.raises(SpirError) as refusal:
        same_scale(tensors)
    assert str(refusal.value) == (
        "error[E-RESID-SCALE]: operands of scales 0.5 and 0.25 cannot meet\n"
        "        fix: propagate-scales{join=wide} or {join=rescale} makes them meet"
    )


def test_a_real_has_neither_scale_nor_range():
    x = Tensor((1,), Real())
    with pytest.raises(SpirError, match="a real value has no scale"):
        scale_of(x)
    with pytest.raises(SpirError, match="the range of a real value is not known"):
        x.range  # noqa: B018 - the property raises


# decode


def test_reals_decode_to_themselves():
    assert decoded(Tensor((2,), Real()), [[0.1, -3.0]]) == [[0.1, -3.0]]


def test_integers_decode_to_integer_times_scale():
    assert decoded(Tensor((2,), Int(-4, 4, Scale.of(0.1))), [[3, -4]]) == [[3 * 0.1, -4 * 0.1]]


def test_a_scale_per_channel_acts_on_the_first_axis_of_the_shape():
    tensor = Tensor((2, 1, 3), Int(0, 9, Scale.of([0.5, 4.0])))
    assert decoded(tensor, [[[[1, 2, 3]], [[1, 2, 3]]]]) == [[[[0.5, 1.0, 1.5]], [[4.0, 8.0, 12.0]]]]


def test_bits_weigh_the_most_significant_frame_first():
    assert weights("bits", 4) == (8, 4, 2, 1)
    assert decoded(Tensor((1,), Spikes(4, "bits", 0, 15, ONE)), [[[1]], [[0]], [[1]], [[1]]]) == [[11.0]]


@pytest.mark.parametrize("steps", range(1, 9))
def test_signed_bits_are_a_negative_spike_in_the_first_frame(steps):
    low = -(2 ** (steps - 1))
    tensor = Tensor((1,), Spikes(steps, "bits", low, -low - 1, ONE))
    found = []
    for first, *rest in product([-1, 0], *[[0, 1]] * (steps - 1)):
        found += decoded(tensor, [[[frame]] for frame in (first, *rest)])[0]
    assert sorted(found) == list(range(low, -low))


@pytest.mark.parametrize("code", ["rate", "suffix"])
def test_the_frames_of_a_count_weigh_one_each(code):
    assert weights(code, 3) == (1, 1, 1)
    assert decoded(Tensor((1,), Spikes(3, code, -3, 3, Scale.of(0.5))), [[[1]], [[1]], [[-1]]]) == [[0.5]]


@pytest.mark.parametrize(("code", "value"), [("bits", 5 * 4 - 3 * 2 + 7), ("rate", 9), ("direct", 9)])
def test_a_current_decodes_as_its_code(code, value):
    tensor = Tensor((1,), Current(3, code, -99, 99, -9, 9, ONE))
    assert decoded(tensor, [[[5]], [[-3]], [[7]]]) == [[value]]
    assert tensor.integers(np.array([[[5]], [[-3]], [[7]]])).dtype == np.int64


@given(st.lists(st.integers(-9, 9), min_size=6, max_size=6), st.lists(st.integers(-9, 9), min_size=6, max_size=6))
def test_decoding_is_linear_in_the_frames(a, b):
    tensor = Tensor((1,), Current(6, "bits", -(10**6), 10**6, -99, 99, Scale.of(0.25)))
    x, y = (np.array(frames).reshape(6, 1, 1) for frames in (a, b))
    assert tensor.decode(3 * x - y) == 3 * tensor.decode(x) - tensor.decode(y)


# ranges


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("code", ["bits", "rate", "suffix", "prefix"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_limits_of_a_code_are_the_least_and_the_largest_value_of_its_trains(steps, code, signed):
    if code == "bits":
        choices = [[-1, 0] if signed else [0, 1], *[[0, 1]] * (steps - 1)]
    else:
        choices = [[-1, 0, 1] if signed else [0, 1]] * steps
    values = [sum(w * f for w, f in zip(weights(code, steps), train, strict=True)) for train in product(*choices)]
    assert Spikes.limits(steps, code, signed=signed) == (min(values), max(values))


@pytest.mark.parametrize(("lo", "hi"), [(0, 31), (-16, 15), (-3, 2), (0, 9), (-16, -1)])
def test_frame_and_prefix_hold_what_the_bits_of_every_value_pass_through(lo, hi):
    spikes = Spikes(5, "bits", lo, hi, ONE)
    frames, prefixes = [], []
    for value in range(lo, hi + 1):
        bits = [int(bit) for bit in f"{value & 31:05b}"]
        bits[0] *= -1 if lo < 0 else 1
        partial = [b * w for b, w in zip(bits, (16, 8, 4, 2, 1), strict=True)]
        frames += bits
        prefixes += [sum(partial[:t]) for t in range(1, 6)]
    assert spikes.frame[0] <= min(frames) <= max(frames) <= spikes.frame[1]
    assert spikes.prefix[0] <= min(prefixes) <= max(prefixes) <= spikes.prefix[1]
    assert spikes.prefix == (-16 if lo < 0 else 0, max(hi, 0))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Int(3, 2, ONE), "type: an empty range 3..2"),
        (lambda: Int(0, 2**63, ONE), "E-VRANGE: a range of 65 bits, and registers have 64"),
        (lambda: Spikes(8, "bits", 0, 256, ONE), "type: 8 frames of code bits hold 0..255, not 0..256"),
        (lambda: Spikes(8, "bits", -1, 128, ONE), "type: 8 frames of code bits hold -128..127, not -1..128"),
        (lambda: Spikes(4, "rate", 0, 5, ONE), "type: 4 frames of code rate hold 0..4, not 0..5"),
        (lambda: Spikes(4, "suffix", -5, 0, ONE), "type: 4 frames of code suffix hold -4..4, not -5..0"),
        (lambda: Spikes(0, "bits", 0, 0, ONE), "type: a train has one or more frames, not 0"),
        (lambda: Spikes(64, "bits", 0, 1, ONE), "type: a train of 64 bits, and registers hold 63 and a sign"),
        (lambda: Spikes(4, "direct", 0, 1, ONE), "type: there is no code of frames called 'direct'"),
        (lambda: Current(4, "suffix", 0, 1, 0, 1, ONE), "type: there is no code of frames called 'suffix'"),
        (lambda: Current(-2, "rate", 0, 1, 0, 1, ONE), "type: a train has one or more frames, not -2"),
        (lambda: Current(2, "rate", 2, 1, 0, 1, ONE), "type: an empty range 2..1"),
        (lambda: Tensor((), Real()), "type: a tensor has one or more positive dimensions, not []"),
        (lambda: Tensor((3, 0), Real()), "type: a tensor has one or more positive dimensions, not [3, 0]"),
        (lambda: Tensor((3, 2), Int(0, 1, Scale.of([1, 2]))), "type: scales of 2 channels on 3 channels"),
    ],
)
def test_a_type_that_means_nothing_is_refused(make, text):
    with pytest.raises(SpirError) as refusal:
        make()
    assert message(refusal) == text


def test_types_print_what_they_say():
    shape, scale = (16, 32, 32), Scale.of(0.0235)
    for encoding, text in (
        (Real(), "tensor<16x32x32, real>"),
        (Int(0, 255, scale), "tensor<16x32x32, int[0, 255] * 0.0235>"),
        (Spikes(8, "bits", 0, 255, scale), "tensor<16x32x32, spikes[8, bits, 0..255] * 0.0235>"),
        (
            Current(8, "bits", -9, 9, -3, 4, scale),
            "tensor<16x32x32, current[8, bits, -9..9, frame -3..4] * 0.0235>",
        ),
    ):
        assert str(Tensor(shape, encoding)) == text


def test_a_tensor_knows_its_size_and_frames():
    train = Tensor((3, 2), Spikes(8, "bits", 0, 255, ONE))
    assert (train.size, train.steps, train.train) == (6, 8, train.encoding)
    assert (Tensor((3, 2), Real()).steps, Tensor((3, 2), Int(0, 1, ONE)).train) == (1, None)
    assert Tensor((2,), Int(0, 1, Scale(2, "0" * 16))).known is False


# joins

TRAINS = {
    "direct": Current(4, "direct", 0, 1, 0, 1, ONE),
    "rate": Spikes(4, "rate", 0, 1, ONE),
    "suffix": Spikes(4, "suffix", 0, 1, ONE),
    "prefix": Spikes(4, "prefix", 0, 1, ONE),
    "bits": Spikes(4, "bits", 0, 1, ONE),
}
JOINS = {
    ("direct", "direct"): "direct",
    ("direct", "rate"): "rate",
    ("direct", "suffix"): "rate",
    ("direct", "bits"): None,
    ("rate", "rate"): "rate",
    ("rate", "suffix"): "rate",
    ("rate", "bits"): None,
    ("suffix", "suffix"): "suffix",
    ("suffix", "prefix"): "rate",
    ("prefix", "prefix"): "prefix",
    ("suffix", "bits"): None,
    ("bits", "bits"): "bits",
}


@pytest.mark.parametrize(("pair", "code"), JOINS.items(), ids=map("+".join, JOINS))
def test_codes_join_as_the_table_says(pair, code):
    for first, second in (pair, pair[::-1]):
        if code is not None:
            assert join([TRAINS[first], TRAINS[second]]) == (4, code)
            continue
        with pytest.raises(SpirError) as refusal:
            join([TRAINS[first], TRAINS[second]])
        a, b = sorted(pair)
        assert message(refusal) == f"type: trains of codes {a} and {b} cannot meet: their frames weigh differently"


@pytest.mark.parametrize("code", ["suffix", "prefix", "bits"])
def test_trains_of_unequal_length_do_not_join(code):
    with pytest.raises(SpirError) as refusal:
        join([Spikes(5, code, 0, 1, ONE), Spikes(4, code, 0, 1, ONE)])
    assert message(refusal) == "type: trains of 4 and 5 frames cannot meet"


def test_rates_of_unequal_length_join_in_the_longer_one():
    assert join([Spikes(5, "rate", 0, 1, ONE), Spikes(4, "rate", 0, 1, ONE)]) == (5, "rate")


def test_net_spikes_of_a_step_are_part_of_the_type_and_the_usual_ones_are_not_spelled():
    train = Spikes.rate(3, -5, 9, ONE, (-3, 4))
    assert str(train) == "spikes[3, rate, -5..9, frame -3..4] * 1.0"
    assert (train.frame, train.prefix) == ((-3, 4), (-9, 12))
    assert Spikes.rate(3, 0, 2, ONE, (0, 1)) == Spikes(3, "rate", 0, 2, ONE)
    assert Spikes.rate(3, -1, 2, ONE, (-1, 1)) == Spikes(3, "rate", -1, 2, ONE)
    for code, lo, net in (("bits", 0, (-1, 2)), ("rate", 0, (1, 2)), ("rate", 0, (0, 1)), ("rate", -1, (-1, 1))):
        with pytest.raises(SpirError, match="frames of"):
            Spikes(3, code, lo, 2, ONE, net)
    with pytest.raises(SpirError, match=r"3 frames of code rate hold -9\.\.12, not -5\.\.13"):
        Spikes(3, "rate", -5, 13, ONE, (-3, 4))


def test_in_one_step_both_orders_are_one():
    single = [Spikes(1, order, 0, 1, ONE) for order in ("prefix", "suffix")]
    assert join(single) == join(single[1:]) == (1, "suffix")
    assert join(single[:1]) == (1, "prefix")


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("column", [[1, 0, 1], [1, -1, 0], [0, 1, 0], [1, 1, -1]])
def test_spikes_that_are_not_sorted_are_refused_with_the_code_that_takes_them(column, last):
    order, end = ("suffix", "last") if last else ("prefix", "first")
    type_ = Tensor((1,), Spikes(3, order, -3, 3, ONE))
    with pytest.raises(SpirError) as refusal:
        type_.read(np.array(column)[:, None, None])
    assert str(refusal.value).splitlines() == [
        f"error[data]: spikes of code {order} fill the {end} steps with one sign",
        "        fix: give code rate",
    ]
    for fine in ([0, 0, -1], [0, 1, 1], [-1, -1, -1], [0, 0, 0]):
        train = fine if last else fine[::-1]
        assert type_.read(np.array(train)[:, None, None]).ravel().tolist() == train


# intervals

ends = st.lists(st.integers(-(2**70), 2**70), min_size=3, max_size=3)


def made(lo, hi):
    return Interval.of([min(p) for p in zip(lo, hi, strict=True)], [max(p) for p in zip(lo, hi, strict=True)])


def at(interval: Interval, shares: tuple[float, ...]) -> list[int]:
    """A point of an interval, channel by channel."""
    return [lo + int((hi - lo) * Fraction(s)) for lo, hi, s in zip(interval.lo, interval.hi, shares, strict=True)]


share = st.tuples(*[st.sampled_from([0.0, 0.3, 0.5, 1.0])] * 3)


@given(ends, ends, ends, ends, share, share, st.lists(st.integers(-(2**40), 2**40), min_size=3, max_size=3))
def test_interval_arithmetic_holds_every_point(a, b, c, d, where, elsewhere, factor):
    x, y = made(a, b), made(c, d)
    p, q = at(x, where), at(y, elsewhere)
    for result, points in (
        (x + y, [i + j for i, j in zip(p, q, strict=True)]),
        (x | y, p),
        (x | y, q),
        (x.times(np.array(factor, dtype=object)), [i * f for i, f in zip(p, factor, strict=True)]),
        (x.with_zero(), p),
        (x.with_zero(), [0, 0, 0]),
    ):
        assert all(lo <= v <= hi for lo, v, hi in zip(result.lo, points, result.hi, strict=True))
    assert all(abs(v) <= x.magnitude for v in p)
    assert x.hull == (min(x.lo), max(x.hi))


def test_one_interval_broadcasts_over_channels_and_never_wraps():
    spread = (Interval.of(0, 2**62) + Interval.of(0, 2**62)).broadcast(3)
    assert list(spread.hi) == [2**63] * 3


def test_a_register_that_cannot_hold_a_bound_is_named_with_its_channel():
    check_register(Interval.of([0, -(2**63) + 1], [0, 2**63 - 1]), "the sum")
    with pytest.raises(SpirError) as refusal:
        check_register(Interval.of([0, -(2**63)], [5, 0]), "the sum")
    assert message(refusal) == "E-VRANGE: the sum needs 65 bits in channel 1, and registers have 64"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spikes(10**12, "rate", 0, 5, Scale.of(1.0)), "1000000000000 frames are more than 65536"),
        (lambda: Tensor((2**30, 2**30), Real()), "more than 2^40 elements a sample"),
        (lambda: Scale.of(Fraction(10**400)), "is beyond float64"),
        (lambda: Scale.of(Fraction(1, 10**400)), "is beyond float64"),
        (lambda: Current(2, "bits", 0, 1, 5, 2, Scale.of(1.0)), "an empty range of frames 5..2"),
    ],
)
def test_sizes_that_no_machine_holds_are_refused(make, message):
    with pytest.raises(SpirError) as refusal:
        make()
    assert message in str(refusal.value)
