"""expand-parallel and fuse-parallel: matrices over time in a neuron's place, and one product a layer without them."""

from __future__ import annotations

import attrs
import numpy as np
import pytest

from spir import interpreter
from spir.ir import Array, Module
from spir.ops.add import Add
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.mix import Mix
from spir.ops.neuron_matrix import NeuronMatrix
from spir.ops.neuron_parallel import NeuronParallel
from spir.ops.neuron_stem import NeuronStem
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.types import Current, Int, Scale, Spikes
from tests.unit.small_networks import conv, images, network, op_of, ops_of, refusal, run, shown, text_of

ONE = Scale.of(1.0)
NEURON = NeuronParallel(4, Array.of([3]), Array.of([8]), 16, 0.5)
CURRENT = Current(4, "rate", -80, 80, -20, 20, ONE)
STEM = NeuronStem(4, Array.of([3]), Array.of([8]), 16, 0.5)


def weights(seed: int, size: int = 2) -> Linear:
    return Linear(Array.of(np.random.default_rng(seed).integers(-4, 5, (size, size))), Array.of([1.0]))


def chain(**fields: object) -> Module:
    """Two neurons and what reads their trains: weights, a sum, a readout."""
    return network(
        ("a", attrs.evolve(NEURON, **fields), "x"),
        ("b", weights(1), "a"),
        ("c", attrs.evolve(NEURON, scale=2.0, **fields), "b"),
        ("d", weights(2), "c"),
        ("e", Scaling(Array.of([3]), Array.of([2.0])), "a"),
        ("f", Add(), "d e"),
        ("y", Integrate(Array.of([5])), "f"),
        shape=(2,),
        encoding=CURRENT,
    )


def currents(count: int = 40) -> np.ndarray:
    return np.random.default_rng(3).integers(-20, 21, (4, count, 2))


def same_values(before: Module, after: Module, x: np.ndarray) -> None:
    a, b = interpreter.run(before, x, "*"), interpreter.run(after, x, "*")
    for name in a.keys() & b.keys():
        np.testing.assert_array_equal(before.types[name].integers(a[name]), after.types[name].integers(b[name]))
        if isinstance(before.types[name].encoding, Spikes):
            np.testing.assert_array_equal(a[name], b[name])


# expand-parallel


@pytest.mark.parametrize("order", ["suffix", "prefix"])
def test_a_neuron_becomes_the_two_published_matrices_or_their_product(order):
    module = chain(order=order)
    two, one = run(module, "expand-parallel"), run(module, "expand-parallel{matrices=1}")
    assert shown(two) == [
        "a.mixed = mix x",
        "a = neuron_matrix a.mixed",
        "b = linear a",
        "c.mixed = mix b",
        "c = neuron_matrix c.mixed",
        "d = linear c",
        "e = scale a",
        "f = add d e",
        "y = integrate f",
    ]
    assert shown(one) == ["a = neuron_matrix x", "b = linear a", "c = neuron_matrix b", *shown(two)[5:]]
    for after in (two, one):
        assert [after.types[n] for n in "acy"] == [module.types[n] for n in "acy"]
        same_values(module, after, currents())
    levels = [1, 2, 3, 4] if order == "prefix" else [4, 3, 2, 1]
    assert op_of(one, "a").rows.values.tolist() == levels
    assert op_of(two, "a").rows.values.tolist() == [x * level for x, level in enumerate(levels, 1)]
    assert op_of(two, "a.mixed") == Mix(Array.of(np.ones((4, 4), dtype=int)), 4)


def test_neurons_without_a_published_form_stay():
    signed, integers = chain(signed=True), network(("y", NEURON, "x"), shape=(2,), encoding=Int(-50, 50, ONE))
    other = network(("y", NEURON, "x"), shape=(2,), encoding=attrs.evolve(CURRENT, steps=5))
    for module in (signed, integers, other):
        assert run(module, "expand-parallel") == module
    assert run(signed, "expand-parallel{matrices=1}") == signed
    assert shown(run(other, "expand-parallel{matrices=1}")) == ["y = neuron_matrix x"]


def test_only_the_layers_asked_for_get_matrices():
    after = run(chain(), 'expand-parallel{layers="net.c"}')
    assert [node.result for node in ops_of(after, NeuronMatrix)] == ["c"]
    with_nothing = refusal(chain(), 'expand-parallel{layers="net.b"}')
    assert "expand-parallel finds no parallel neurons" in str(with_nothing)


def test_a_maximum_stays_on_the_trains_of_matrices():
    lines = [("a", conv(3), "x"), ("b", Relu(), "a"), ("c", conv(2, 3, kernel=1), "b"), ("d", Relu(), "c")]
    module = network(*lines, ("e", MaxPool((2, 2), (1, 1)), "d"), ("f", conv(2, 2, kernel=1), "e"))
    spiking = run(module, "@parallel{steps=4, fused=false}", images())
    assert spiking.types["e.unit"].train is not None
    for passes in ("expand-parallel", "expand-parallel{matrices=1}", "expand-parallel, fuse-parallel"):
        after = run(spiking, passes)
        assert after.types["e.unit"] == spiking.types["e.unit"]
        same_values(spiking, after, images())


# fuse-parallel


@pytest.mark.parametrize("order", ["suffix", "prefix"])
@pytest.mark.parametrize("passes", ["", "expand-parallel, ", "expand-parallel{matrices=1}, "])
def test_a_layer_makes_one_product_of_the_sum_of_a_train(passes, order):
    module = chain(order=order)
    after = run(module, f"{passes}fuse-parallel")
    assert shown(after) == [
        "x.count = integrate x",
        "a = neuron_parallel x.count",
        "a.count = integrate a",
        "b = linear a.count",
        "c = neuron_parallel b",
        "c.count = integrate c",
        "d = linear c.count",
        "e = scale a.count",
        "f = add d e",
        "y = integrate f",
    ]
    assert [op_of(after, n) for n in "acy"] == [op_of(module, n) for n in "acy"]
    same_values(module, after, currents())


def test_fusing_twice_changes_nothing():
    once = run(chain(signed=True), "fuse-parallel")
    assert run(once, "fuse-parallel") == once


LEVELS = "the levels 1..T of one threshold"


def leaky() -> NeuronMatrix:
    charge, one = Array.of(np.tril([[2, 0], [1, 2]])), Array.of([1])
    return NeuronMatrix(charge, Array.of([2, 2]), Array.of([0, 0]), one, one, 8, 0.5)


def test_all_that_does_not_fuse_is_refused_at_once():
    half = Mix(Array.of([[2, 0], [0, 2]]), 2)
    module = network(
        ("a", leaky(), "x"),
        ("m", half, "x"),
        ("y", Integrate(), "m"),
        shape=(2,),
        encoding=Current(2, "rate", -40, 40, -20, 20, ONE),
    )
    refused = text_of(refusal(module, "fuse-parallel"))
    reasons = [line for line in refused.splitlines() if line.startswith("error")]
    assert reasons == [
        f"error[type]: %a does not fuse: its matrix does not compare the sum of all frames with {LEVELS}",
        "error[type]: %m does not fuse: not only matrices read it",
    ]
    assert refused.count("fix: derive-thresholds{neuron=parallel}, or leave fuse-parallel out") == 2
    assert "op: %a = neuron_matrix" in refused
    assert refused.count("from: net.") == 2


@pytest.mark.parametrize(
    ("module", "options", "text"),
    [
        (
            network(("y", STEM, "x"), shape=(2,), encoding=Spikes(4, "bits", 0, 15, ONE)),
            "",
            "error[type]: %y does not fuse: neuron_stem is no neuron of parallel conversion",
        ),
        (
            network(("y", Integrate(), "x"), shape=(2,), encoding=CURRENT),
            "",
            "error[type]: fuse-parallel finds no neurons to fuse",
        ),
        (
            chain(),
            '{layers="net.a"}',
            "error[option]: fuse-parallel fuses the whole network, because layers read each other's trains",
        ),
    ],
    ids=["a stem neuron", "no neurons", "layers"],
)
def test_what_it_cannot_fuse_it_says(module, options, text):
    refused = text_of(refusal(module, f"fuse-parallel{options}"))
    assert refused.splitlines()[0] == text
    assert "fix: " in refused


# derive-thresholds and fuse-neuron


RELUS = [("a", conv(3), "x"), ("b", Relu(), "a"), ("c", conv(2, 3, kernel=1), "b"), ("d", Relu(), "c")]
TO_INTEGERS = "calibrate-range, calibrate-qcfs{steps=3}, quantize, propagate-scales"


@pytest.mark.parametrize(
    ("option", "order"), [("", "suffix"), (", order=suffix", "suffix"), (", order=prefix", "prefix")]
)
def test_the_order_of_all_trains_is_the_one_asked_for(option, order):
    integers = run(network(*RELUS), TO_INTEGERS, images())
    unfused = run(integers, f"derive-thresholds{{neuron=parallel{option}}}")
    assert [line.split(" = ")[1].split()[0] for line in shown(unfused)][:8] == [
        *("quantize", "conv2d", "requant", "encode"),
        *("conv2d", "integrate", "requant", "encode"),
    ]
    codes = {t.encoding.code for t in unfused.types.values() if isinstance(t.encoding, Spikes)}
    assert codes == {order}
    fused = run(unfused, "fuse-neuron")
    neurons = list(ops_of(fused, NeuronParallel))
    assert len(neurons) == 2
    assert {n.op.order for n in neurons} == {order}
    assert fused.operand_types(neurons[0])[0].train is None  # the charge of the analogue input
    assert fused.operand_types(neurons[1])[0].train is not None
    same_values(unfused, fused, images())


def test_a_neuron_that_does_not_sort_refuses_an_order():
    integers = run(network(*RELUS), "calibrate-range, quantize, propagate-scales", images())
    refused = text_of(refusal(integers, "derive-thresholds{order=prefix}"))
    assert "error[option]: neuron stem emits bits, in no order 'prefix'" in refused
    assert "fix: neuron=parallel, or no order" in refused
    assert "clip ranges 0..T and -T..T, not -128..127" not in str(
        refusal(integers, "derive-thresholds{neuron=stem, order=suffix}")
    )


def test_a_maximum_of_the_analogue_input_stays_on_integers():
    module = network(("p", MaxPool((2, 2), (1, 1)), "x"), *[(r, op, o.replace("x", "p")) for r, op, o in RELUS])
    after = run(module, f"{TO_INTEGERS}, derive-thresholds{{neuron=parallel}}, fuse-neuron", images())
    assert isinstance(after.types["p"].encoding, Int)
    assert len(list(ops_of(after, NeuronParallel))) == 2
