"""Branches of unequal range that meet in concatenations and sums: equal on every backend, and close to the floats."""

from __future__ import annotations

import random
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from spir import driver, interpreter
from spir.conformance.strategies import bounded
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops._linear import LinearMap, WeightedMap
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.clip import Clip
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.types import Real, Reals, Tensor
from spir.verify import verify

BACKENDS = ("serial", "parallel", "hw{collapse=off}", "hw{collapse=auto}")
IMAGE = (2, 4, 4)


@pytest.fixture(autouse=True, scope="module")
def _reproducers_go_aside(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("reproducers")))
        yield


class Branching:
    """Grows a network whose branches differ in range by up to four decades."""

    def __init__(self, seed: int) -> None:
        self.dice, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.types = {"x": Tensor(IMAGE, Real())}
        self.nodes: list[Node] = []

    def add(self, op: Op, *operands: str) -> str:
        name = f"{op.name}{len(self.nodes)}"
        type_ = infer(op, tuple(self.types[o] for o in operands))
        self.nodes.append(Node(name, op, operands, type_, Origin(f"net.{name}")))
        self.types[name] = type_
        return name

    def conv(self, operand: str, outputs: int, size: float = 1.0) -> str:
        inputs = self.types[operand].shape[0]
        weight = Array.of(self.rng.standard_normal((outputs, inputs, 3, 3)) * size / np.sqrt(9 * inputs))
        bias = Array.of(0.3 * size * self.rng.standard_normal(outputs)) if self.dice.random() < 0.7 else None
        return self.add(Conv2d(weight, None, bias, padding=(1, 1, 1, 1)), operand)

    def branch(self, operand: str, outputs: int) -> str:
        """A relu, a clamp of the model, or a signed sum, of some size."""
        size = 10.0 ** self.dice.uniform(-2, 2)
        total = self.conv(operand, outputs, size)
        kind = self.dice.choice(["relu", "relu", "clamp", "signed"])
        if kind == "signed":
            return total
        if kind == "relu":
            return self.add(Relu(), total)
        return self.add(Clip(Array.of([self.dice.choice([0.0, -0.2]) * size]), Array.of([0.9 * size])), total)

    def network(self, branches: int, join: str) -> Module:
        """Branches, a join of them and of one that is read twice, a pool, weights, a residual sum, and a head."""
        equal = [self.branch("x", 3) for _ in range(branches)]
        if join == "add":
            met = self.add(Add(), *equal, *self.dice.choices(equal, k=self.dice.randint(0, 2)))
            met = self.add(Relu(), met)
        else:
            shared = self.dice.choices(equal, k=self.dice.randint(0, 1))
            met = self.add(Concat(), *equal, *shared)
        pools = [None, MaxPool((2, 2), (2, 2)), MaxPool((3, 3), (1, 1), (1,) * 4), AvgPool((2, 2), (1, 1))]
        pool = self.dice.choice(pools)
        met = met if pool is None else self.add(pool, met)
        body = self.add(Relu(), self.conv(met, 2))
        if self.dice.random() < 0.6:
            more = self.conv(met, 2, 5.0)
            body = self.add(Relu(), self.add(Add(), body, more))
        if self.dice.random() < 0.6:
            body = self.add(Concat(), body, met)
        flat = self.add(Flatten(), body)
        inputs = self.types[flat].size
        head = Array.of(self.rng.standard_normal((2, inputs)) / np.sqrt(inputs))
        last = self.add(Linear(head, None, Array.of([0.5, -0.5])), flat)
        return verify(Module(Value("x", self.types["x"]), tuple(self.nodes), last))


def error_bound(module: Module, x: Reals) -> Reals:
    """How far the output of the quantised network can lie from the network of floats that it was made of.

    Every rounding of an activation adds half a step, clips add nothing, because ranges cover these inputs; weights w'
    with half a step h of rounding turn an error e of their operand x' into |w'| e + h sum(|x'| + e); all other maps
    carry it on. A multiplier of a join is off by 2^-13 of the value, one of a requant by 2^-23.
    """
    values = interpreter.decoded(module, interpreter.run(module, x, "*"))
    bound: dict[str, Reals] = {"x": np.zeros_like(x)}
    for node in module.nodes:
        errors = [bound[o] for o in node.operands]
        found = values[node.operands[0]]
        match node.op:
            case Quantize(scale=step):
                new = errors[0] + step / 2 + 2.0**-20 * (np.abs(found) + step)
            case WeightedMap(weight=weight, weight_scale=Array() as scale):
                ones, half = Array.of(np.ones_like(weight.values)), Array.of(scale.values / 2)
                each = attrs.evolve(node.op, bias=None, weight=Array.of(np.abs(weight.values)))
                rounded = attrs.evolve(node.op, bias=None, weight=ones, weight_scale=half)
                new = each.apply(errors[0], real=True) + rounded.apply(np.abs(found) + errors[0], real=True)
            case Scaling(factor=factor):
                new = Scaling(Array.of(np.abs(factor.values))).apply(errors[0], real=True)
            case Add() | Concat():
                slack = [e + 2.0**-12 * np.abs(values[o]) for e, o in zip(errors, node.operands, strict=True)]
                new = node.op.apply(*slack, real=True)
            case LinearMap():
                new = node.op.apply(*errors, real=True)
            case MaxPool():
                new = node.op.reference((module.types[node.operands[0]],), errors[0])
            case _:  # dequantize, shift
                assert isinstance(node.op, Shift) or node.op.name == "dequantize"
                new = errors[0]
        bound[node.result] = new
    return bound[module.output]


@st.composite
def recipes(draw: st.DrawFn) -> str:
    found: dict[str, Any] = {
        "bits": draw(st.sampled_from([4, 8, 8])),
        "join": draw(st.sampled_from(["wide", "wide", "rescale"])),
        "per": draw(st.sampled_from(["tensor", "channel"])),
        "max_pool": draw(st.sampled_from(["keep", "lower"])),
    }
    return f"@stem{{{', '.join(f'{label}={value}' for label, value in found.items())}}}"


@bounded(10)
@given(st.integers(0, 2**32 - 1), st.integers(2, 3), st.sampled_from(["concat", "concat", "add"]), recipes())
def test_what_meets_is_equal_on_every_backend_and_close_to_the_floats(seed, branches, join, recipe):
    module = Branching(seed).network(branches, join)
    data = np.random.default_rng(seed).standard_normal((12, *IMAGE))
    try:
        outcome = driver.opt(module, recipe, data=data, check="off")
    except SpirError as refusal:  # a maximum of sums that a sum reads stays on integrated values
        if refusal.code != "E-MAXPOOL" or "max_pool=lower" not in recipe:
            raise
        recipe = recipe.replace("lower", "keep")
        outcome = driver.opt(module, recipe, data=data, check="off")
    stages = {stage.name: stage.module for stage in outcome.stages}
    iann, spiking = stages["propagate-scales"], outcome.module
    event(recipe.split("join=")[1].split(",")[0])

    x = np.concatenate([data, 3 * data[:4], np.zeros((1, *IMAGE))])
    reference, wanted = interpreter.run(iann, x, "*"), interpreter.run(spiking, x, "*")
    for name in BACKENDS:
        found = driver.backend_of(name).prepare(spiking).run(x, "*")
        for value, stored in wanted.items():
            assert np.array_equal(found[value], stored), f"{name}: %{value}"
    for name in iann.types.keys() & spiking.types.keys():
        if not isinstance(iann.types[name].encoding, Real):
            integers = [m.types[name].integers(s[name]) for m, s in ((iann, reference), (spiking, wanted))]
            assert np.array_equal(*integers), name

    exact = interpreter.run(module, data, module.output)[module.output]
    apart = np.abs(iann.types[iann.output].decode(reference[iann.output])[: len(data)] - exact)
    if "join=wide" in recipe:  # rescaled branches are rounded once more
        assert (apart <= error_bound(stages["quantize"], data) * 1.01 + 1e-6 * np.abs(exact).max()).all()
    if "bits=8" in recipe:  # measured over 300 networks: 0.5 % at the median, at most 2.1 % and 4.9 %
        assert apart.mean() <= (0.03 if "join=wide" in recipe else 0.06) * np.abs(exact).max()
