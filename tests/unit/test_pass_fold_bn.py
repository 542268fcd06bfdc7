"""fold-bn: into the weights before, else into a gain and an offset."""

from __future__ import annotations

import warnings

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import spir
from spir.errors import SpirWarning
from spir.ir import Array
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.max_pool import MaxPool
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from tests.unit.small_networks import (
    TO_INTEGERS,
    conv,
    images,
    linear,
    network,
    norm,
    op_of,
    refusal,
    run,
    shown,
    text_of,
)


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
def test_a_batch_norm_without_weights_before_it_becomes_a_gain_and_an_offset(before):
    module = network(("a", before, "x"), ("b", norm(2, eps=0.25), "a"))
    after = run(module, "fold-bn")
    assert shown(after)[1:] == ["b.gain = scale a", "b = shift b.gain"]
    layer = op_of(module, "b")
    gain = layer.weight.values / np.sqrt(layer.var.values + 0.25)
    np.testing.assert_allclose(op_of(after, "b.gain").factor.values, gain, rtol=1e-14)
    offset = layer.bias.values - gain * layer.mean.values
    np.testing.assert_allclose(op_of(after, "b").offset.values, offset, rtol=1e-13)


def test_a_batch_norm_of_the_input_is_a_gain_and_an_offset():
    after = run(network(("a", norm(2), "x"), ("b", conv(3), "a")), "fold-bn")
    assert shown(after) == ["a.gain = scale x", "a = shift a.gain", "b = conv2d a"]


def test_weights_that_are_integers_already_take_no_gain():
    module = network(("a", conv(3), "x"), ("b", norm(3), "a"))
    after = run(run(module, "quantize"), "fold-bn")
    assert shown(after) == ["a = conv2d x", "b.gain = scale a", "b = shift b.gain"]


def test_a_batch_norm_of_a_pooled_sum_does_not_pass_the_pool():
    module = network(("a", conv(3), "x"), ("p", MaxPool((2, 2), (1, 1)), "a"), ("b", norm(3), "p"))
    assert shown(run(module, "fold-bn"))[-2:] == ["b.gain = scale p", "b = shift b.gain"]


def test_a_batch_norm_that_nobody_folded_is_refused_where_integers_begin():
    module = network(("a", Relu(), "x"), ("b", norm(2), "a"), ("c", Relu(), "b"))
    assert text_of(refusal(module, TO_INTEGERS.replace("fold-bn, ", ""), images())) == (
        "error[type]: %b = batch_norm stands between quantised values and works on reals\n"
        "       from: net.b (net.py line 7)\n"
        "       pass: propagate-scales\n"
        "        fix: run fold-bn before quantize"
    )


class Normed(nn.Module):
    """A batch norm whose statistics are those of normal data behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.train()
        with torch.no_grad():
            for seed in range(80):
                self(torch.from_numpy(normal(64, seed)))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))


def normal(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(("gain", "offset"), [(0.2, 0.0), (0.229, 0.45), (58.0, 115.0), (1.0, 6.0)])
def test_data_that_the_model_was_not_trained_on_are_told(gain, offset):
    torch.manual_seed(0)
    with pytest.warns(SpirWarning, match="may not be what the model was trained on") as told:
        spir.compile(Normed(), "fold-bn", data=gain * normal(40, 100) + offset, check="off")
    text = str(told[0].message)
    assert "%bn" in text
    assert "normalise the data as in training" in text


def test_data_like_those_of_training_pass_in_silence():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (normal(40, 100), 1.5 * normal(40, 101), normal(1, 102)):
            spir.compile(Normed(), "fold-bn", data=data, check="off")
