"""The theorems of parallel conversion, their worked examples, and whole networks of parallel neurons."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from spir import driver, interpreter, pipeline
from spir.conformance.strategies import MOVES, Builder, Network, bounded
from spir.driver import Context
from spir.equality import compare
from spir.errors import SpirError
from spir.ir import Array, Module, infer
from spir.ops._linear import channelwise
from spir.ops._neuron import Neuron
from spir.ops.concat import Concat
from spir.ops.encode import sort
from spir.ops.max_pool import MaxPool
from spir.ops.mix import Mix
from spir.ops.neuron_matrix import NeuronMatrix
from spir.ops.neuron_parallel import NeuronParallel
from spir.ops.relu import Relu
from spir.types import SORTED, Current, Scale, Spikes, Tensor
from tests.unit.small_networks import network

ONE = Scale.of(1)
BACKENDS = ("serial", "parallel", "hw", "hw{collapse=off}")
REFUSALS = ("E-RESID-SCALE", "E-MULT-RANGE", "E-VRANGE", "E-SCALE")  # a network that no integers of 64 bits hold
pytestmark = pytest.mark.filterwarnings("ignore:.*the calibration data may not be what the model was trained on")
ORDERS = pytest.mark.parametrize("order", SORTED)


@pytest.fixture(autouse=True, scope="module")
def _reproducers_go_aside(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("reproducers")))
        yield


class Numpy:
    """What `fire` asks of an array library."""

    where = staticmethod(np.where)
    zeros_like = staticmethod(np.zeros_like)
    hold = staticmethod(lambda state: state)

    @staticmethod
    def constant(array: Array, like: Any) -> Any:
        return channelwise(array.values, like.ndim - 1).astype(like.dtype)


def count(total: Fraction, theta: Fraction, psi: Fraction, steps: int, *, signed: bool = False) -> int:
    """Equation 5 on a sum: ``clip(floor((S + psi) / theta), lo, T)``."""
    return min(max(math.floor((total + psi) / theta), -steps * signed), steps)


def train(n: int, steps: int, order: str) -> list[int]:
    """A sorted train, spelled out."""
    spikes, silence = [1 if n > 0 else -1] * abs(n), [0] * (steps - abs(n))
    return silence + spikes if order == "suffix" else spikes + silence


def neuron(steps: int, theta: int, psi: int, order: str = "suffix", *, signed: bool = False) -> NeuronParallel:
    return NeuronParallel(steps, Array.of([1]), Array.of([psi]), theta, 0.5, order, signed)


def carrier(frames: np.ndarray) -> Tensor:
    """The type of a current that holds these frames ``[T, 1, 1]``."""
    reach = int(np.abs(frames).max()) + 1
    return Tensor((1,), Current(len(frames), "rate", -reach * len(frames), reach * len(frames), -reach, reach, ONE))


def trains_of(op: Neuron, currents: list[int]) -> list[int]:
    """The spikes that a neuron makes of currents, after `reference` and `fire` have agreed, and the type has held."""
    frames = np.array(currents)[:, None, None]
    x = carrier(frames)
    found = op.reference((x,), frames)
    stepped = np.stack(list(op.fire(Numpy, iter(frames))))
    assert found.dtype == np.int64
    assert (stepped == found).all()
    result = infer(op, (x,))
    lo, hi = op.bounds((x.shape,), x.range).hull
    assert lo <= result.integers(result.read(found)).item() <= hi
    return [int(s) for s in found.ravel()]


def published(op: NeuronParallel, currents: list[int]) -> list[int]:
    """Lambda_PRE, then Lambda_PC."""
    frames = np.array(currents)[:, None, None]
    x = carrier(frames)
    pre, charged = NeuronMatrix.published(op)
    mixed, type_ = pre.reference((x,), frames), infer(pre, (x,))
    result = infer(charged, (type_,))
    assert result == infer(op, (x,)) or op.steps == 1
    assert type_.decode(mixed).sum() == pytest.approx(sum(currents))
    return [int(s) for s in result.read(charged.reference((type_,), mixed)).ravel()]


# PC-1


@st.composite
def charges(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    """T, threshold, shift, and currents whose sum lies at, right below or right above a threshold, or anywhere."""
    steps = draw(st.one_of(st.integers(1, 8), st.sampled_from([16, 31, 64])))
    theta, psi = draw(st.integers(1, 40)), draw(st.integers(-50, 50))
    currents = draw(st.lists(st.integers(-30, 30), min_size=steps, max_size=steps))
    if draw(st.booleans()):
        level = draw(st.integers(-steps - 1, steps + 1))
        at = draw(st.integers(0, steps - 1))
        currents[at] += level * theta - psi + draw(st.sampled_from([-1, 0, 0, 1])) - sum(currents)
    return steps, theta, psi, currents


@ORDERS
@given(given_=charges())
@example(given_=(1, 1, 0, [0]))
@example(given_=(64, 2, 1, [1] * 64))
def test_pc_1_five_ways_to_one_train_whose_count_is_that_of_qcfs(order, given_):
    steps, theta, psi, currents = given_
    wanted = count(Fraction(sum(currents)), Fraction(theta), Fraction(psi), steps)
    event("a tie" if (sum(currents) + psi) % theta == 0 else "no tie")
    op = neuron(steps, theta, psi, order)
    spikes = train(wanted, steps, order)
    assert trains_of(op, currents) == spikes
    assert published(op, currents) == spikes
    assert trains_of(NeuronMatrix.of(op, steps), currents) == spikes
    assert op.search(np.array([[sum(currents)]])).item() == wanted
    law = NeuronMatrix.of(op, steps).count_law
    assert law is not None
    assert trains_of(law, currents) == spikes
    assert law == op or steps == 1


@ORDERS
@given(given_=charges())
def test_pc_1_holds_for_signed_counts(order, given_):
    steps, theta, psi, currents = given_
    wanted = count(Fraction(sum(currents)), Fraction(theta), Fraction(psi), steps, signed=True)
    op = neuron(steps, theta, psi, order, signed=True)
    assert trains_of(op, currents) == train(wanted, steps, order)
    assert op.search(np.array([[sum(currents)]])).item() == wanted


@given(
    st.integers(1, 64), st.fractions(-20, 20, max_denominator=16), st.fractions(Fraction(1, 16), 4, max_denominator=16)
)
def test_pc_1_a_sum_on_the_scale_of_reals_counts_as_the_activation_does(steps, mean, theta):
    """QCFS of L = T levels on the mean current, against a neuron of integers: 2 S + theta >= 2 (T - x + 1) theta."""
    wanted = count(mean * steps, theta, theta / 2, steps)
    common = math.lcm(mean.denominator, theta.denominator)
    integers = [int(mean * common)] * steps
    whole = int(theta * common)
    op = NeuronParallel(steps, Array.of([2]), Array.of([whole]), 2 * whole, float(theta))
    spikes = trains_of(op, integers)
    assert spikes == train(wanted, steps, "suffix")
    total = sum(integers)
    assert spikes == [int(2 * total + whole >= 2 * (steps - x + 1) * whole) for x in range(1, steps + 1)]


@given(st.integers(1, 8), st.permutations(range(8)), st.data())
def test_pc_1_holds_for_any_timing(steps, order, data):
    currents = data.draw(st.lists(st.integers(-9, 9), min_size=8, max_size=8))
    op = neuron(steps, 5, 2)
    assert trains_of(op, currents) == trains_of(op, [currents[i] for i in order])
    assert trains_of(op, currents) == trains_of(op, [sum(currents)])


def test_one_matrix_is_the_product_of_both():
    for steps in (1, 2, 3, 4, 8, 16):
        pre, charged = NeuronMatrix.published(neuron(steps, 8, 4))
        product, plain = charged.after(pre), NeuronMatrix.of(neuron(steps, 8, 4), steps)
        for op in (product, plain):
            rows = [
                [Fraction(a, row) for a in line]
                for line, row in zip(op.matrix.values.tolist(), op.rows.values.tolist(), strict=True)
            ]
            assert rows == [[Fraction(1, steps - x)] * steps for x in range(steps)]
        assert product.count_law == plain.count_law == neuron(steps, 8, 4)


def test_the_published_matrices_of_four_steps():
    pre, charged = NeuronMatrix.published(neuron(4, 8, 4))
    lambda_pre = pre.matrix.values / pre.divisor
    lambda_pc = 4 * charged.matrix.values / charged.rows.values[:, None]  # behind T times finer steps
    np.testing.assert_allclose(lambda_pre, np.full((4, 4), 1 / 4))
    np.testing.assert_allclose(lambda_pc, [[1, 0, 0, 0], [2 / 3, 2 / 3, 0, 0], [2 / 3, 2 / 3, 2 / 3, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("currents", "spikes"),
    [
        ([1, 9, 0, 9], [0, 0, 1, 1]),
        ([30, -3, -2, -5], [0, 1, 1, 1]),
        ([50, 0, 0, 0], [1, 1, 1, 1]),
        ([-9, 1, 2, 1], [0, 0, 0, 0]),
    ],
)
def test_worked_examples(currents, spikes):
    op = neuron(4, 8, 4)
    assert trains_of(op, currents) == published(op, currents) == spikes
    assert trains_of(attrs.evolve(op, order="prefix"), currents) == spikes[::-1]


def test_lambda_pc_without_lambda_pre_is_wrong_on_uneven_currents():
    _, charged = NeuronMatrix.published(neuron(4, 8, 4))
    alone = attrs.evolve(charged, matrix=Array.of(4 * charged.matrix.values))
    assert trains_of(alone, [1, 9, 0, 9]) == [0, 1, 1, 1]
    assert alone.count_law is None
    even = np.full((4, 1, 1), 5)
    on_even = Tensor((1,), Current(4, "direct", -80, 80, -20, 20, ONE))
    assert infer(alone, (on_even,)).train.code == "suffix"  # there it is right
    assert alone.reference((on_even,), even).ravel().tolist() == train(
        count(Fraction(20), Fraction(8), Fraction(4), 4), 4, "suffix"
    )


@given(st.integers(1, 64), st.integers(1, 9), st.integers(-9, 9), st.booleans())
def test_the_search_takes_as_many_comparisons_as_the_levels_have_bits(steps, theta, psi, signed):
    comparisons = 0

    class Counted(np.ndarray):
        def __ge__(self, other):
            nonlocal comparisons
            comparisons += 1
            return np.asarray(self) >= np.asarray(other)

    op = neuron(steps, theta, psi, signed=signed)
    reach = (steps + 2) * theta + abs(psi)
    z = np.arange(-reach, reach + 1)[:, None]
    found = op.search(z.view(Counted))
    wanted = [count(Fraction(v), Fraction(theta), Fraction(psi), steps, signed=signed) for v in z.ravel().tolist()]
    assert np.asarray(found).ravel().tolist() == wanted
    levels = steps * (1 + signed) + 1
    assert comparisons == math.ceil(math.log2(levels))


def test_float32_loses_ties_that_integers_keep():
    """Charges placed on the ties of thresholds: the published ``T / level * mean(I) + b >= theta`` against integers."""
    rng, steps, wrong, ties = np.random.default_rng(0), 16, 0, 0
    for theta in rng.integers(1, 2**20, 100):
        for n in range(1, steps + 1):
            total = int(theta) * (2 * n - 1)  # twice the charge, which lies on the tie below n
            share = np.float32(total / 2**21 / steps)
            threshold, currents = np.float32(theta / 2**20), np.full(steps, share, dtype=np.float32)
            mean = currents.mean(dtype=np.float32) * np.float32(steps)
            levels = np.arange(1, steps + 1, dtype=np.float32)
            found = (mean / levels + threshold / np.float32(2) / levels >= threshold).sum()
            wrong += int(found != n)
            op = NeuronParallel(steps, Array.of([1]), Array.of([int(theta)]), 2 * int(theta), 1.0)
            assert trains_of(op, [total]) == train(n, steps, "suffix")
            ties += 1
    assert ties == 1600
    assert 0.01 * ties < wrong < 0.5 * ties


# sorted trains


@ORDERS
@pytest.mark.parametrize("signed", [False, True])
def test_sorted_trains_are_nested_so_the_maximum_is_a_train(order, signed):
    for steps in range(1, 9):
        low = -steps * signed
        for a, b in itertools.product(range(low, steps + 1), repeat=2):
            both = [max(s, t) for s, t in zip(train(a, steps, order), train(b, steps, order), strict=True)]
            assert both == train(max(a, b), steps, order)


def test_trains_of_both_orders_are_not_nested():
    both = [max(s, t) for s, t in zip(train(2, 4, "suffix"), train(1, 4, "prefix"), strict=True)]
    assert sum(both) == 3


# matrices that are no parallel neuron


def leaky(steps: int = 4) -> NeuronMatrix:
    """Lambda of a leaky neuron that halves, without its reset."""
    tril = [[2 ** (steps - 1 - x + j) if j <= x else 0 for j in range(steps)] for x in range(steps)]
    one = Array.of([1])
    return NeuronMatrix(Array.of(tril), Array.of([2 ** (steps - 1)] * steps), Array.of([0] * steps), one, one, 8, 0.5)


def matrix(rows: list[int], shift: list[int] | None = None) -> NeuronMatrix:
    ones = np.ones((len(rows), 3), dtype=np.int64)
    given_ = [1] * len(rows) if shift is None else shift
    return NeuronMatrix(Array.of(ones), Array.of(rows), Array.of(given_), Array.of([1]), Array.of([4]), 8, 0.5)


@given(st.lists(st.integers(-20, 20), min_size=4, max_size=4))
def test_a_leaky_matrix_charges_with_its_leak(currents):
    spikes = trains_of(leaky(), currents)
    potentials = itertools.accumulate(map(Fraction, currents), lambda v, i: v / 2 + i)
    assert spikes == [int(v >= 8) for v in potentials]


@pytest.mark.parametrize(
    "op",
    [leaky(), matrix([2, 3, 1]), matrix([1, 2, 4]), matrix([1, 1, 1]), matrix([3, 2, 1], [1, 2, 3])],
    ids=["leaky", "rows out of order", "a level left out", "one level", "unequal shifts"],
)
def test_a_matrix_without_a_count_law_is_not_fused(op):
    assert op.count_law is None
    assert op.triple is None
    frames = op.matrix.values.shape[1]
    module = network(("y", op, "x"), encoding=Current(frames, "rate", -60, 60, -15, 15, ONE), shape=(1,))
    assert module.types["y"].train.code == "rate"
    with pytest.raises(SpirError, match="its matrix does not compare the sum of all frames") as refused:
        pipeline.run(module, pipeline.parse("fuse-parallel"), Context(None, 0))
    assert "from: net.y" in str(refused.value)
    assert "fix: derive-thresholds{neuron=parallel}, or leave fuse-parallel out" in str(refused.value)


@pytest.mark.parametrize(("rows", "order"), [([4, 3, 2, 1], "suffix"), ([2, 4, 6], "prefix"), ([5], "suffix")])
def test_multiples_of_one_threshold_are_fused_whatever_it_is(rows, order):
    law = matrix(rows).count_law
    assert law is not None
    assert (law.order, law.steps, law.div) == (order, len(rows), 8 * min(rows))


# PC-2


def pool(builder: Builder) -> None:
    """A maximum, mostly over an activation: windows that tile, or that overlap beyond the edge."""
    if len(builder.shape) != 3 or min(builder.shape[1:]) < 2:
        return
    if builder.chance(0.7):
        builder.add(Relu())
    tiled, overlapping = MaxPool((2, 2), (2, 2)), MaxPool((2, 2), (1, 1), (1, 0, 0, 1))
    builder.add(tiled if builder.chance(0.6) else overlapping)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Layers, residual joins, average and maximum pools; some channels dead, some sums signed."""
    builder = Builder(draw(st.integers(0, 2**32 - 1)))
    builder.layer()
    for move in draw(st.lists(st.sampled_from((*MOVES, *[pool] * 4)), min_size=1, max_size=5)):
        move(builder)
    if draw(st.booleans()):
        builder.linear()
    return Network(builder.module(), builder.calibration())


@st.composite
def pipelines(draw: st.DrawFn) -> str:
    """From the model to parallel neurons, in any form."""
    steps, order = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 64])), draw(st.sampled_from(["", *SORTED]))
    per = draw(st.sampled_from(["", "{per=channel}"]))
    more = draw(st.sampled_from(["", ", expand-parallel", ", expand-parallel{matrices=1}"]))
    more += draw(st.sampled_from(["", ", fuse-parallel"]))
    ordered = f", order={order}" if order else ""
    return (
        f"canonicalize, fold-bn, calibrate-range{per}, calibrate-qcfs{{steps={steps}}}, quantize, propagate-scales, "
        f"derive-thresholds{{neuron=parallel{ordered}}}, fuse-neuron{more}"
    )


def stages_of(network_: Network, passes: str) -> dict[str, Module] | None:
    """The module after each pass, whose contracts were checked; None for a network that no integers hold."""
    try:
        outcome = driver.opt(network_.module, passes, data=network_.data)
    except SpirError as refusal:
        if refusal.code not in REFUSALS or "fix: " not in str(refusal):
            raise
        event(f"refused: {refusal.code}")
        return None
    return {stage.name: stage.module for stage in outcome.stages}


@bounded(30)
@given(networks(), pipelines())
def test_pc_2_every_layer_is_the_integer_network_on_every_backend(network_, passes):
    stages = stages_of(network_, passes)
    if stages is None:
        return
    iann = stages["propagate-scales"]
    x = network_.inputs(stages["quantize"])
    last = list(stages)[-1]
    for name in {"derive-thresholds", last}:
        module = stages[name]
        wanted = interpreter.run(module, x, "*")
        mixed = any(isinstance(n.op, Mix) for n in module.nodes)  # serial alone runs it
        for backend in BACKENDS[: 1 if mixed else None] if name == last else ("serial",):
            executable = driver.backend_of(backend).prepare(module)
            if backend == "hw{collapse=off}":
                assert not executable.merged
            agreements = compare(iann, module, executable, x)
            assert [a for a in agreements if a.mismatches] == [], backend
            assert iann.output in {a.value for a in agreements} or module.output != iann.output
            found = executable.run(x, "*")
            assert all(np.array_equal(found[v], wanted[v]) for v in wanted), backend
    module = stages[last]
    for node in module.nodes:
        if isinstance(node.type.encoding, Spikes):
            assert node.type.encoding.code in SORTED
            node.type.read(wanted[node.result])
    kinds = {n.op.name for n in module.nodes}
    event(f"{len([n for n in module.nodes if isinstance(n.op, Neuron)])} neurons")
    for kind in kinds & {"mix", "max_pool", "add", "avg_pool", "neuron_matrix"}:
        event(kind)
    event("signed" if any(t.train and t.train.lo < 0 for t in module.types.values()) else "unsigned")


def test_pc_2_reaches_pools_joins_matrices_and_signed_trains():
    seen: dict[str, int] = {}
    passes = "canonicalize, fold-bn, calibrate-range, calibrate-qcfs{steps=3}, quantize, propagate-scales, "
    passes += "derive-thresholds{neuron=parallel}, fuse-neuron, expand-parallel"

    @bounded(40)
    @given(networks())
    def reach(network_: Network) -> None:
        stages = stages_of(network_, passes)
        if stages is None:
            return
        module = stages["expand-parallel"]
        found = {n.op.name for n in module.nodes}
        found |= (
            {"signed"}
            if any(isinstance(t.encoding, Spikes) and t.encoding.lo < 0 for t in module.types.values())
            else set()
        )
        found |= {"pooled trains"} if any(isinstance(n.op, MaxPool) and n.type.train for n in module.nodes) else set()
        for kind in found | {"all"}:
            seen[kind] = seen.get(kind, 0) + 1

    reach()
    for kind in ("add", "mix", "neuron_matrix", "pooled trains", "signed"):
        assert seen.get(kind, 0) >= seen["all"] / 10, seen


def test_one_step_has_one_order():
    assert NeuronMatrix.of(neuron(1, 8, 4, "prefix"), 1).count_law == neuron(1, 8, 4)
    both = tuple(Tensor((1, 2, 2), Spikes(1, order, 0, 1, ONE)) for order in SORTED)
    joined = infer(Concat(), both)
    assert infer(MaxPool((2, 2), (1, 1)), (joined,)).train.code == "suffix"


@pytest.mark.parametrize("div", [2**59, Array.of([2**59, 1])])
@pytest.mark.parametrize("steps", [16, 64])
def test_levels_beyond_64_bits_do_not_wrap(div, steps):
    neuron = NeuronParallel(steps, Array.of([1]), Array.of([0]), div, 1.0)
    module = network(("y", neuron, "x"), shape=(2,), encoding=Spikes(16, "suffix", 0, 16, Scale.of(1.0)))
    counts = np.array([[0, 0], [16, 16], [7, 1]])
    frames = sort(counts, 16, "suffix")
    wanted = interpreter.run(module, frames)["y"]
    for backend in ("serial", "parallel", "hw", "hw{collapse=off}"):
        np.testing.assert_array_equal(driver.backend_of(backend).prepare(module).run(frames)["y"], wanted, backend)
    np.testing.assert_array_equal(neuron.search(counts), wanted.sum(axis=0))
