"""Ranges from data: the same however data are cut, safe where nothing is alive, and no worse than the extremes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spir import driver, interpreter
from spir.conformance.strategies import bounded
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.conv2d import Conv2d
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.passes.calibrate_range import CalibrateRange
from spir.types import Real, Reals, Tensor, scale_of
from spir.verify import verify

SHAPE = (3, 4, 3)
METHODS = [
    CalibrateRange(method=method, percentile=90.0 if method == "percentile" else None, per=per, bits=bits)
    for method, bits in (("max", None), ("percentile", None), ("mse", 3), ("mse", 8))
    for per in ("tensor", "channel")
]
STEPS = pytest.mark.parametrize("step", METHODS, ids=lambda step: f"{step.method} {step.per} {step.bits}")


def network(*lines: tuple[str, Op, str]) -> Module:
    """A module of lines ``(result, op, "operand operand")`` on the input ``x``."""
    source = Tensor(SHAPE, Real())
    types, nodes = {"x": source}, []
    for result, op, operands in lines:
        read = tuple(operands.split())
        types[result] = infer(op, tuple(types[name] for name in read))
        nodes.append(Node(result, op, read, types[result], Origin(f"net.{result}")))
    return verify(Module(Value("x", source), tuple(nodes), lines[-1][0]))


def numbers(*values: float) -> Array:
    return Array.of([float(v) for v in values])


@attrs.frozen(eq=False)
class Shards:
    """A context that hands out data in the shards it is given; each activation is elementwise, so that no sum rounds.

    ``data`` is what the shards hold together.
    """

    shards: tuple[Reals, ...]
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def data(self) -> Reals:
        return np.concatenate(self.shards)

    def note(self, text: str) -> None:
        raise AssertionError(text)

    def evaluate(
        self, module: Module, x: Any, keep: str = "*", *, batch: int | None = None
    ) -> Iterator[Mapping[str, Reals]]:
        for shard in self.shards:
            yield interpreter.decoded(module, interpreter.run(module, shard, keep))


ELEMENTWISE = network(
    ("k", Scaling(numbers(1, 0.01, -3)), "x"),
    ("r", Relu(), "k"),
    ("six", Clip(numbers(0), numbers(1.5)), "r"),
    ("k2", Scaling(numbers(2, 1, 0)), "x"),
    ("low", Clip(numbers(-0.5), numbers(2.0)), "k2"),
    ("even", Clip(numbers(-0.5), numbers(0.5)), "low"),
    ("end", Relu(), "even"),
)


@STEPS
@bounded(6)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_shards_in_any_cut_and_order_give_equal_ranges(step, sizes, seed):
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((sum(sizes), *SHAPE)) * 10.0 ** rng.integers(-3, 3)
    whole = step.run(ELEMENTWISE, Shards((data,)))
    assert step.run(ELEMENTWISE, Shards((data,))) == whole
    cut = np.split(data, np.cumsum(sizes)[:-1])
    for shards in (cut, cut[::-1], [*np.split(rng.permutation(data), len(data))]):
        assert step.run(ELEMENTWISE, Shards(tuple(shards))) == whole


def quantised(x: Reals, top: Reals, bits: int, *, signed: bool) -> Reals:
    """What codes of some bits make of ``[G, n]`` values, in steps of ``top / levels``."""
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    step = (top / levels)[:, None]
    return np.clip(np.floor(x / step + 0.5), -levels - 1 if signed else 0, levels) * step


def reach(module: Module, name: str) -> Reals:
    """The range ``[G]`` of an activation: that of its clip, times the gains behind it."""
    node = module.definitions[name]
    if isinstance(node.op, Scaling):
        return node.op.factor.values * reach(module, node.operands[0])
    assert isinstance(node.op, Clip)
    return np.maximum(-node.op.lo.values, node.op.hi.values)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@bounded(15)
@given(st.integers(2, 8), st.sampled_from([0.3, 1.0, 3.0, 8.0]), st.integers(0, 2**32 - 1))
def test_mse_is_never_worse_than_max_on_its_own_data(per, bits, tail, seed):
    """Up to what a histogram of 2048 bins cannot see: values move by half a bin, 2^-12 of the range."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((40, *SHAPE))
    data = np.sign(normal) * np.abs(normal) ** tail
    module = network(("r", Relu(), "x"))
    fitted = CalibrateRange(method="mse", per=per, bits=bits).run(module, Shards((data,)))
    extremes = CalibrateRange(per=per).run(module, Shards((data,)))
    for name, values, signed in (("x.clip", data, True), ("r", np.maximum(data, 0), False)):
        rows = values.swapaxes(0, 1).reshape(SHAPE[0], -1) if per == "channel" and not signed else values.reshape(1, -1)
        tops = [reach(module_, name) for module_ in (fitted, extremes)]
        errors = [((quantised(rows, top, bits, signed=signed) - rows) ** 2).mean(axis=1) for top in tops]
        assert (tops[0] <= tops[1] * (1 + 1e-6)).all()
        assert (np.sqrt(errors[0]) <= np.sqrt(errors[1]) + tops[1] * 2.0**-11).all(), name


def test_mse_of_one_far_outlier_gives_it_up():
    data = np.random.default_rng(0).uniform(-1, 1, (200, *SHAPE))
    data[0, 0, 0, 0] = 3.0
    module = network(("r", Relu(), "x"))
    fitted = CalibrateRange(method="mse", bits=4).run(module, Shards((data,)))
    assert 0.9 < reach(fitted, "r") < 1.5


def integer(module: Module, options: str, data: Reals) -> Module:
    """The integer network of a recipe."""
    outcome = driver.opt(module, f"@stem{options}", data=data, check="off")
    return next(stage.module for stage in outcome.stages if stage.name == "propagate-scales")


def outputs(module: Module, x: Reals) -> Reals:
    return module.types[module.output].decode(interpreter.run(module, x, module.output)[module.output])


def weights(*shape: int, seed: int = 0, gains: tuple[float, ...] = ()) -> Array:
    values = np.random.default_rng(seed).standard_normal(shape)
    return Array.of(values * np.array(gains or (1.0,) * shape[0]).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_a_range_per_channel_is_as_good_as_one_where_channels_differ_in_size(bits):
    """Channels of size 1, 1/30 and 1/300 that the next weights make equal again; three networks, mean error."""
    errors: dict[str, list[float]] = {"tensor": [], "channel": []}
    for seed in range(3):
        data = np.random.default_rng(seed).standard_normal((60, *SHAPE))
        sizes = np.array([1, 1 / 30, 1 / 300])
        back = weights(2, 3, 1, 1, seed=seed + 50).values / sizes.reshape(1, 3, 1, 1)
        module = network(
            ("a", Conv2d(weights(3, 3, 1, 1, seed=seed, gains=tuple(sizes))), "x"),
            ("r", Relu(), "a"),
            ("z", Conv2d(Array.of(back)), "r"),
        )
        wanted = outputs(module, data)
        for per, found in errors.items():
            apart = outputs(integer(module, f"{{bits={bits}, weights=8, per={per}}}", data), data) - wanted
            found.append(float(np.abs(apart).mean() / np.abs(wanted).mean()))
    assert np.mean(errors["channel"]) <= np.mean(errors["tensor"]), errors
    assert np.mean(errors["channel"]) < 6 / 2**bits, errors


DEAD: dict[str, tuple[Array, Array | None]] = {
    "one dead channel": (weights(3, 3, 1, 1, gains=(1, 0, 1)), None),
    "a channel that never opens": (weights(3, 3, 1, 1), numbers(0, -1e6, 0.5)),
    "no live weight": (Array.of(np.zeros((3, 3, 1, 1))), numbers(0.5, 0, -0.5)),
    "nothing at all": (Array.of(np.zeros((3, 3, 1, 1))), None),
    "nothing opens": (weights(3, 3, 1, 1), numbers(-1e6, -1e6, -1e6)),
}


@pytest.mark.parametrize("options", ["", "{per=channel}", "{range=mse}", "{range=mse, per=channel}"])
@pytest.mark.parametrize("what", DEAD)
@pytest.mark.parametrize("data", ["normal", "zeros"])
def test_what_is_dead_leaves_finite_scales_and_right_outputs(what, options, data):
    weight, bias = DEAD[what]
    x = np.random.default_rng(0).standard_normal((10, *SHAPE)) * (data == "normal")
    module = network(
        ("a", Conv2d(weight, None, bias), "x"),
        ("r", Relu(), "a"),
        ("z", Conv2d(weights(2, 3, 3, 3, seed=3), None, numbers(0.3, -0.2), padding=(1,) * 4), "r"),
    )
    found = integer(module, options, x)
    for type_ in found.types.values():
        if not isinstance(type_.encoding, Real):
            scales = scale_of(type_).floats()
            assert (np.isfinite(scales) & (scales > 1e-20)).all()
    wanted = outputs(module, x)
    np.testing.assert_allclose(outputs(found, x), wanted, rtol=0, atol=0.04 * np.abs(wanted).max() + 1e-3)


CLAMPS = {
    "relu6 that is reached": (0.0, 0.7),
    "relu6 that is never reached": (0.0, 600.0),
    "hardtanh": (-0.5, 0.5),
    "a lower end below 0": (-0.4, 1.0),
    "a lower end above 0": (0.3, 1.0),
    "all below 0": (-1.2, -0.3),
    "no upper end in reach": (-0.4, 1e9),
    "never reached": (40.0, 50.0),
}


@pytest.mark.parametrize("options", ["", "{per=channel}", "{range=mse}"])
@pytest.mark.parametrize("what", CLAMPS)
def test_the_model_s_own_clamps_convert(what, options):
    """Zero padding behind them included; outputs are within 4 % of the largest: three roundings of 8 bits each way."""
    lo, hi = CLAMPS[what]
    x = np.random.default_rng(0).standard_normal((30, *SHAPE))
    module = network(
        ("a", Conv2d(weights(3, 3, 1, 1, seed=1), None, numbers(0.2, -0.1, 0)), "x"),
        ("r", Clip(numbers(lo), numbers(hi)), "a"),
        ("z", Conv2d(weights(2, 3, 3, 3, seed=3), None, numbers(0.3, -0.2), padding=(1, 0, 2, 1)), "r"),
    )
    wanted = outputs(module, x)
    found = integer(module, options, x)
    np.testing.assert_allclose(outputs(found, x), wanted, rtol=0, atol=0.04 * np.abs(wanted).max())
    if what == "relu6 that is never reached":  # the range is the data's, not the model's
        (code,) = [n.op for n in found.nodes if isinstance(n.op, Requant)]
        assert code.scale * code.hi == pytest.approx(outputs(network(*lines_of(module)[:2]), x).max(), rel=0.05)


def lines_of(module: Module) -> list[tuple[str, Op, str]]:
    return [(n.result, n.op, " ".join(n.operands)) for n in module.nodes]


@pytest.mark.parametrize("options", ["", "{per=channel}"])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 0, 1)])
def test_a_batch_norm_before_a_padded_convolution_is_right_at_the_border(padding, options):
    x = np.random.default_rng(0).standard_normal((30, *SHAPE))
    mean, var, beta = numbers(0.3, -0.2, 0.5), numbers(0.5, 1.0, 2.0), numbers(2.0, -1.5, 1.0)
    module = network(
        ("a", Conv2d(weights(3, 3, 1, 1, seed=1)), "x"),
        ("r", Relu(), "a"),
        ("n", BatchNorm(mean, var, 1e-3, numbers(1.0, -0.8, 1.2), beta), "r"),
        ("z", Conv2d(weights(2, 3, 3, 3, seed=3), None, numbers(0.3, -0.2), padding=padding), "n"),
    )
    wanted, found = outputs(module, x), outputs(integer(module, options, x), x)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.03 * np.abs(wanted).max())
