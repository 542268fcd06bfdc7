"""Where two networks part: exact numbers on small modules, and a split into causes that adds up."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import spir
from spir import difference
from spir.backends.hw import Hw
from spir.difference import compare, encode
from spir.errors import SpirError
from spir.ir import Array, Module
from spir.text import parse
from spir.types import Current, Int, Real, Scale, Spikes, Tensor
from spir.verify import verify

REAL = "tensor<2, real>"


def module(body: str, output: str, given: str = REAL, **arrays) -> Module:
    """A module of lines; ``@name`` is an array of keyword ``name``."""
    held = {name: Array.of(values) for name, values in arrays.items()}
    lines = re.sub(r"@(\w+)", lambda m: f"@{m[1]}#{held[m[1]].digest}", body)
    return verify(parse(f"module {{\n input %x : {given}\n {lines}\n output %{output}\n}}", held))


FLOAT = module(f"%a = relu %x : {REAL}", "a")
CODES = module(
    f"""%a.code = quantize %x {{scale = 0.5, lo = 0, hi = 3}} : tensor<2, int[0, 3] * 0.5>
    %a = dequantize %a.code : {REAL}""",
    "a",
)
DOUBLED = f"%b = scale %a {{factor = @two}} : {REAL}"
FLOAT_DOUBLED = module(f"%a = relu %x : {REAL}\n{DOUBLED}", "b", two=[2.0])
CODES_DOUBLED = module(
    f"""%a.code = quantize %x {{scale = 0.5, lo = 0, hi = 3}} : tensor<2, int[0, 3] * 0.5>
    %a = dequantize %a.code : {REAL}
    {DOUBLED}""",
    "b",
    two=[2.0],
)
INTEGERS = module(
    """%a = quantize %x {scale = 0.5, lo = 0, hi = 3} : tensor<2, int[0, 3] * 0.5>
    %b = scale %a {factor = @two} : tensor<2, int[0, 6] * 0.5>""",
    "b",
    two=[2],
)


def parts(layer: difference.Layer) -> tuple[float, float, float]:
    return layer.clipping, layer.rounding, layer.upstream


# --- the split ----------------------------------------------------------------------------------------------------


def test_what_is_rounded_is_rounding():
    (a,) = compare(FLOAT, CODES, np.array([[0.25, 1.0], [0.75, 1.375]])).layers
    assert (a.elements, a.differing, a.largest, a.mean, a.magnitude) == (4, 3, 0.25, 0.15625, 1.375)
    assert a.relative == 0.25 / 1.375
    assert parts(a) == (0.0, 0.15625, 0.0)
    assert a.clipped == 0


def test_what_is_saturated_is_clipping():
    (a,) = compare(FLOAT, CODES, np.array([[4.0, 1.0], [0.5, 2.5]])).layers
    assert (a.differing, a.largest, a.mean) == (2, 2.5, 0.875)
    assert parts(a) == (0.875, 0.0, 0.0)
    assert a.clipped == 2


def test_an_element_may_be_saturated_and_rounded():
    narrow = module(f"%a = clip %x {{lo = @lo, hi = @hi}} : {REAL}\n{DOUBLED}", "b", lo=[-1.0], hi=[1.0], two=[2.0])
    wide = module(f"%a = clip %x {{lo = @lo, hi = @hi}} : {REAL}\n{DOUBLED}", "b", lo=[-9.0], hi=[9.0], two=[2.5])
    a, b = compare(wide, narrow, np.array([[3.0, -1.0]])).layers
    assert (*parts(a), a.clipped) == (1.0, 0.0, 0.0, 1)
    # %b: 7.5 becomes 2.5 as %a is 1, and then 2; -2.5 becomes -2
    assert (b.mean, *parts(b)) == ((5.5 + 0.5) / 2, 0.0, 0.5, 2.5)


@pytest.mark.parametrize("candidate", [CODES_DOUBLED, INTEGERS], ids=["reals", "integers"])
@pytest.mark.parametrize("x", [[[0.25, 1.0]], [[4.0, 1.0]]], ids=["rounded", "saturated"])
def test_what_an_exact_layer_inherits_is_upstream(candidate, x):
    a, b = compare(FLOAT_DOUBLED, candidate, np.array(x)).layers
    assert a.upstream == 0
    assert a.mean > 0
    assert parts(b) == (0.0, 0.0, 2 * a.mean)
    assert b.mean == 2 * a.mean


def test_what_a_chain_of_unshared_nodes_adds_counts_for_the_value_at_its_end():
    ratio = module(
        """%a = quantize %x {scale = 0.5, lo = 0, hi = 3} : tensor<2, int[0, 3] * 0.5>
        %wide = scale %a {factor = @three} : tensor<2, int[0, 9] * 0.5>
        %b = requant %wide {mul = @one, add = @half, div = 4, lo = 0, hi = 3, scale = 1.0}
            : tensor<2, int[0, 3] * 1.0>""",
        "b",
        three=[3],
        one=[1],
        half=[2],
    )
    a, b = compare(FLOAT_DOUBLED, ratio, np.array([[1.0, 0.5]])).layers
    assert (a.differing, parts(a)) == (0, (0.0, 0.0, 0.0))
    # the reference gives 2 and 1; the candidate floor((3 * 2 + 2) / 4) = 2 and floor((3 + 2) / 4) = 1
    assert b.differing == 0
    a, b = compare(FLOAT_DOUBLED, ratio, np.array([[1.5, 0.0]])).layers
    assert (b.largest, parts(b)) == (1.0, (0.0, 0.5, 0.0))  # 3 becomes floor(11 / 4) = 2


def test_causes_of_opposite_sign_are_all_shown_though_the_difference_is_small():
    less = module(f"%a = relu %x : {REAL}\n{DOUBLED}", "b", two=[1.0])
    more = module(f"%a = scale %x {{factor = @two}} : {REAL}\n%b = relu %a : {REAL}", "b", two=[2.0])
    a, b = compare(FLOAT_DOUBLED, more, np.array([[1.0, 3.0]])).layers
    assert parts(a) == (0.0, 2.0, 0.0)
    assert (b.differing, *parts(b)) == (0, 0.0, 4.0, 4.0)
    assert compare(FLOAT_DOUBLED, less, np.array([[1.0, 3.0]])).layers[1].rounding == 2.0


def test_the_reference_gets_operands_in_its_own_types():
    fine = module(
        """%a = quantize %x {scale = 0.25, lo = 0, hi = 7} : tensor<2, int[0, 7] * 0.25>
        %a_bits = encode %a {steps = 3} : tensor<2, spikes[3, bits, 0..7] * 0.25>
        %b = integrate %a_bits : tensor<2, int[0, 7] * 0.25>""",
        "b",
    )
    coarse = module(
        """%a_bits = quantize %x {scale = 0.5, lo = 0, hi = 9} : tensor<2, int[0, 9] * 0.5>
        %b = integrate %a_bits : tensor<2, int[0, 9] * 0.5>""",
        "b",
    )
    a, b = compare(fine, coarse, np.array([[0.25, 1.25], [1.0, 4.0]])).layers
    assert (a.value, a.mean) == ("a_bits", (0.25 + 0.25 + 2.25) / 4)
    # on codes of 0.5, 1.5, 1.0 and 4.0 the reference gives 0.5, 1.5, 1.0 and the 1.75 that its range holds
    assert parts(b) == (0.0, 2.25 / 4, 0.5 / 4)


# --- layers -------------------------------------------------------------------------------------------------------


def test_the_worst_channel_has_the_largest_mean_difference():
    two = module("%a = relu %x : tensor<2x3, real>", "a", "tensor<2x3, real>")
    other = module(
        """%a.code = quantize %x {scale = 1.0, lo = 0, hi = 9} : tensor<2x3, int[0, 9] * 1.0>
        %a = dequantize %a.code : tensor<2x3, real>""",
        "a",
        "tensor<2x3, real>",
    )
    x = np.array([[[0.375, 0.0, 0.0], [0.25, 0.25, 0.25]], [[1.0, 1.0, 1.0], [0.25, 0.0, 0.0]]])
    (a,) = compare(two, other, x).layers
    assert (a.largest, a.channel, a.channel_mean) == (0.375, 1, 1 / 6)


def test_layers_stand_in_the_references_order_and_the_first_that_differs_is_named():
    x = np.array([[0.5, 1.0]])
    found = compare(FLOAT_DOUBLED, INTEGERS, x)
    assert [layer.value for layer in found.layers] == ["a", "b"]
    assert (found.first, found.differs) == (None, False)
    wrong = module(
        """%a = quantize %x {scale = 0.5, lo = 0, hi = 3} : tensor<2, int[0, 3] * 0.5>
        %b = scale %a {factor = @three} : tensor<2, int[0, 9] * 0.5>""",
        "b",
        three=[3],
    )
    found = compare(FLOAT_DOUBLED, wrong, x)
    assert found.first == found.layers[1]
    assert parts(found.layers[1]) == (0.0, 0.75, 0.0)


def test_outputs_are_compared_whatever_they_are_called():
    renamed = module(f"%c = relu %x : {REAL}\n{DOUBLED.replace('%a', '%c')}", "b", two=[1.0])
    other = module(f"%c = relu %x : {REAL}", "c")
    (b,) = compare(FLOAT_DOUBLED, renamed, np.array([[1.0, 3.0]])).layers
    assert (b.value, b.candidate, b.mean) == ("b", "b", 2.0)
    (b,) = compare(FLOAT_DOUBLED, other, np.array([[1.0, 3.0]])).layers
    assert (b.value, b.candidate, b.mean) == ("b", "c", 2.0)
    assert "b ~ c" in str(compare(FLOAT_DOUBLED, other, np.array([[1.0, 3.0]])))


def test_a_name_of_another_shape_is_listed_and_counts_as_a_difference():
    x = np.ones((1, 2, 3))
    flat = module("%a = flatten %x : tensor<6, real>", "a", "tensor<2x3, real>")
    more = "%a = relu %x : tensor<2x3, real>\n%f = flatten %a : tensor<6, real>"
    found = compare(module(more, "f", "tensor<2x3, real>"), flat, x)
    assert [(layer.value, layer.candidate) for layer in found.layers] == [("f", "a")]
    assert (found.unlike, found.first, found.differs) == (("a",), None, True)
    assert "of another shape, not compared: %a" in str(found)


def test_where_the_reference_is_0_no_share_is_given():
    nothing = module(f"%a = scale %x {{factor = @f}} : {REAL}", "a", f=[0.0])
    found = compare(nothing, FLOAT, np.array([[1.0, 3.0]]))
    assert found.layers[0].relative is None
    assert json.loads(json.dumps(found.json(), allow_nan=False))["layers"][0]["relative"] is None


# --- whole networks -----------------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(11, 1, 6, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def snn() -> spir.Compiled:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    return spir.compile(net.eval(), "@stem{bits=4}", data=X[:6])


def stage(snn: spir.Compiled, name: str) -> Module:
    return next(s.module for s in snn.stages if s.name == name)


@pytest.mark.parametrize("backend", [None, "hw"])
def test_spikes_differ_nowhere_from_the_integer_network(snn, backend):
    executable = Hw().prepare(snn.module) if backend else None
    found = compare(stage(snn, "propagate-scales"), snn.module, X, executable=executable)
    assert not found.differs
    assert len(found.layers) >= 6
    assert all(parts(layer) == (0.0, 0.0, 0.0) for layer in found.layers)
    assert str(found).endswith("nothing differs")


def test_causes_bound_the_difference_and_the_first_layers_inherit_nothing(snn):
    found = compare(stage(snn, "fold-bn"), snn.module, X)
    assert all(layer.mean <= sum(parts(layer)) * (1 + 1e-12) for layer in found.layers)
    assert found.layers[0].upstream == 0
    assert found.layers[0].rounding > 0
    assert all(layer.upstream > 0 for layer in found.layers[1:])
    assert any(layer.clipped for layer in found.layers)


def test_the_result_does_not_depend_on_the_batch(snn, monkeypatch):
    reference, done = stage(snn, "fold-bn"), []
    whole = compare(reference, snn.module, X)
    monkeypatch.setattr(difference, "BATCH_BYTES", 1)
    cut = compare(reference, snn.module, X, progress=done.append)
    assert done == list(range(1, 12))
    for a, b in zip(whole.layers, cut.layers, strict=True):
        assert (a.elements, a.differing, a.clipped, a.channel) == (b.elements, b.differing, b.clipped, b.channel)
        np.testing.assert_allclose([a.mean, *parts(a), a.largest], [b.mean, *parts(b), b.largest], atol=1e-12)


def test_networks_of_trains_are_compared_on_trains():
    text = "tensor<2, spikes[3, bits, 0..7] * 0.5>"
    same = module("%y = integrate %x : tensor<2, int[0, 7] * 0.5>", "y", text)
    more = module("%y = integrate %x {bias = @b} : tensor<2, int[1, 8] * 0.5>", "y", text, b=[1])
    frames = np.array([[[1, 0], [1, 1]], [[0, 1], [1, 1]], [[1, 1], [0, 0]]])
    found = compare(same, more, frames)
    assert (found.samples, found.layers[0].mean, found.layers[0].differing) == (2, 0.5, 4)


def test_the_json_form_is_plain_data_of_one_schema(snn):
    found = compare(stage(snn, "fold-bn"), snn.module, X)
    read = json.loads(json.dumps(found.json(), allow_nan=False))
    assert set(read) == {"schema", "samples", "differs", "first", "layers", "unlike"}
    assert (read["schema"], read["samples"], read["differs"]) == ("spir-diff/1", 11, True)
    assert read["first"] == read["layers"][0]["value"]
    assert read["layers"][0]["largest"] == found.layers[0].largest
    assert {"clipping", "rounding", "upstream", "relative", "channel", "origin", "type"} <= set(read["layers"][0])


def test_the_text_is_a_row_a_layer_and_the_place_of_the_first_that_differs(snn):
    found = compare(stage(snn, "fold-bn"), snn.module, X)
    lines = str(found).splitlines()
    for layer in found.layers:
        (row,) = [line for line in lines if line.startswith(f"{layer.value} ")]
        assert row.split()[1:3] == [str(layer.elements), str(layer.differing)]
        assert row.endswith(f"  {layer.channel} ({layer.channel_mean:.4g})")
    assert lines[-1] == f"first to differ: %{found.first.value}, from {found.first.origin}"


# --- operands and refusals ----------------------------------------------------------------------------------------

HALF = Scale.of(0.5)
CARRIERS = [
    Real(),
    Int(-3, 9, HALF),
    Spikes(4, "bits", -8, 7, HALF),
    Spikes(5, "rate", -5, 5, HALF),
    Current(3, "bits", -70, 70, -10, 10, HALF),
]


@pytest.mark.parametrize("encoding", CARRIERS, ids=str)
def test_an_operand_is_the_nearest_code_inside_the_range(encoding):
    type_ = Tensor((6,), encoding)
    values = np.array([[0.0, 0.25, -0.25, 1.2, 1e30, -1e30]])
    codes = np.array([0, 1, 0, 2, getattr(encoding, "hi", 0), getattr(encoding, "lo", 0)])
    expected = values if isinstance(encoding, Real) else codes[None] * 0.5
    np.testing.assert_array_equal(type_.decode(encode(type_, values)), expected)


def refused(*args) -> str:
    with pytest.raises(SpirError) as caught:
        compare(*args)
    assert "fix: " in str(caught.value)
    return str(caught.value)


def test_networks_that_cannot_be_compared_are_refused():
    x = np.ones((1, 2))
    wider = module("%a = relu %x : tensor<3, real>", "a", "tensor<3, real>")
    assert refused(FLOAT, wider, x).startswith(
        "error[type]: one network takes tensor<2, real>, the other tensor<3, real>\n"
    )
    flat = module("%z = flatten %x : tensor<6, real>", "z", "tensor<2x3, real>")
    other = module("%y = relu %x : tensor<2x3, real>", "y", "tensor<2x3, real>")
    assert "error[usage]: the two networks share no value" in refused(flat, other, np.ones((1, 2, 3)))


@pytest.mark.parametrize("x", [np.float64(3.0), np.ones(2), np.ones((1, 3)), np.full((1, 2), np.nan), np.ones((0, 2))])
def test_samples_that_do_not_fit_are_refused(x):
    assert refused(FLOAT, CODES, x).startswith("error[data]: ")


def test_a_module_without_its_weights_is_refused():
    bare = parse(str(FLOAT_DOUBLED), None)
    for pair in ((bare, FLOAT_DOUBLED), (FLOAT_DOUBLED, bare)):
        assert "error[weights]" in refused(*pair, np.ones((1, 2)))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_values_that_are_no_numbers_are_refused():
    huge = module(f"%a = relu %x : {REAL}\n{DOUBLED}", "b", two=[1e300])
    assert "error[data]: %b of the candidate holds NaN" in refused(FLOAT_DOUBLED, huge, np.full((1, 2), 1e300))
