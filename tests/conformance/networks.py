"""Networks that every backend is held to, beside corners and random modules: spiking, residual, mixed."""

from __future__ import annotations

import attrs
import numpy as np

from spir.conformance.examples import Example, module_of
from spir.ir import Array, Module
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.types import Real, Tensor


def conv(rng, outputs, inputs, kernel=3, pad=1, **fields) -> Conv2d:
    weight = rng.integers(-127, 128, (outputs, inputs, kernel, kernel))
    return Conv2d(weight=Array.of(weight), weight_scale=Array.of([0.01]), padding=(pad,) * 4, **fields)


def stem(rng, channels, div=2**12, bits=8, *, signed=False) -> NeuronStem:
    add = Array.of(rng.integers(-(2**12), 2**12, channels) + div // 2)
    return NeuronStem(bits, Array.of(rng.integers(1, 9, channels)), add, div, 0.02, signed)


def linear(rng, outputs, inputs) -> Linear:
    return Linear(weight=Array.of(rng.integers(-127, 128, (outputs, inputs))), weight_scale=Array.of([0.01]))


def spiking() -> Module:
    """Clipped reals to trains to logits, with an overlapping pool, a depthwise layer and a doubled current."""
    rng = np.random.default_rng(5)
    return module_of(
        Tensor((3, 9, 8), Real()),
        ("clipped", Clip(lo=Array.of([-2.0]), hi=Array.of([3.0, 2.0, 1.0])), "x"),
        ("q", Quantize(scale=0.02, lo=-128, hi=127), "clipped"),
        ("e", Encode(steps=8), "q"),
        ("c1", conv(rng, 4, 3), "e"),
        ("n1", stem(rng, 4), "c1"),
        ("p", AvgPool(kernel=(2, 2), stride=(2, 2), padding=(1, 0, 1, 1)), "n1"),
        ("c2", conv(rng, 6, 4), "p"),
        ("n2", stem(rng, 6, 3 * 2**12, signed=True), "c2"),
        ("d", conv(rng, 6, 1, groups=6), "n2"),
        ("n3", stem(rng, 6, 2**9), "d"),
        ("s", Add(), "d d"),
        ("n4", stem(rng, 6, 2**9), "s"),
        ("f", Flatten(), "n4"),
        ("l", linear(rng, 10, 6 * 5 * 5), "f"),
        ("z", Integrate(bias=Array.of(rng.integers(-999, 999, 10))), "l"),
        ("logits", Dequantize(), "z"),
    )


def plain() -> Module:
    """Reals, integers, trains and integers again."""
    rng = np.random.default_rng(5)
    return module_of(
        Tensor((3, 8, 8), Real()),
        ("q", Quantize(scale=0.02, lo=-128, hi=127), "x"),
        ("e", Encode(steps=8), "q"),
        ("c1", conv(rng, 4, 3), "e"),
        ("n1", stem(rng, 4), "c1"),
        ("p", AvgPool(kernel=(2, 2), stride=(2, 2)), "n1"),
        ("c2", conv(rng, 6, 4), "p"),
        ("n2", stem(rng, 6, 3000, bits=6), "c2"),
        ("f", Flatten(), "n2"),
        ("l", linear(rng, 10, 6 * 4 * 4), "f"),
        ("y", Integrate(bias=Array.of(rng.integers(-999, 999, 10))), "l"),
    )


def residual() -> Module:
    """Joins of signed with unsigned trains, and of unequal scales."""
    rng = np.random.default_rng(7)
    module = module_of(
        Tensor((4, 6, 6), Real()),
        ("q", Quantize(scale=0.02, lo=-128, hi=127), "x"),
        ("e", Encode(steps=8), "q"),
        ("c1", conv(rng, 4, 4), "e"),
        ("n1", stem(rng, 4), "c1"),
        ("c2", conv(rng, 4, 4), "n1"),
        ("n2", stem(rng, 4, signed=True), "c2"),
        ("s", Scaling(factor=Array.of([305, 734, 11_000_000, 1]), to=Array.of([0.02])), "n1"),
        ("a", Add(), "n2 s n1"),
        ("twice", Add(), "a a"),
        ("c3", conv(rng, 4, 1, groups=4), "a"),
        ("n3", stem(rng, 4, div=2**30), "twice"),
        ("g", GlobalAvgPool(positions=36), "n3"),
        ("y", Integrate(), "g"),
        ("z", Integrate(), "c3"),
    )
    return attrs.evolve(module, output="y")


def mixed() -> Module:
    """Layers on reals in front of layers on integers, and reals again."""
    rng = np.random.default_rng(8)
    weight, bias = Array.of(rng.standard_normal((4, 3, 3, 3))), Array.of(rng.standard_normal(4))
    return module_of(
        Tensor((3, 6, 6), Real()),
        ("c", Conv2d(weight=weight, bias=bias), "x"),
        ("b", BatchNorm(Array.of(np.zeros(4)), Array.of(np.ones(4)), 1e-5), "c"),
        ("k", Clip(Array.of([0.0]), Array.of([3.0])), "b"),
        ("q", Quantize(scale=0.25, lo=0, hi=12), "k"),
        ("w", conv(rng, 5, 4), "q"),
        ("r", Requant(Array.of([3]), Array.of([50]), 100, -8, 7, 0.5), "w"),
        ("u", Relu(), "r"),
        ("d", Dequantize(), "u"),
        ("f", Flatten(), "d"),
    )


def images(n: int, shape=(3, 8, 8), seed=6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


NETWORKS = {"spiking": spiking, "plain": plain, "residual": residual, "mixed": mixed}


def example(name: str, n: int = 30) -> Example:
    """A network with inputs on halves of its quantiser's steps, on steps of other sizes and anywhere."""
    module = NETWORKS[name]()
    rng, shape = np.random.default_rng(6), (n, *module.input.type.shape)
    x = rng.standard_normal(shape)
    x[: n // 3] = rng.integers(-260, 261, x[: n // 3].shape) / 100
    return Example(module, x)
