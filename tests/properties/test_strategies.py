"""What the strategies of the conformance suite draw: everything installed, ties and ends, and readable text."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from spir import interpreter, options, pipeline
from spir.conformance.examples import Example, corners, hit, is_neuron, module_of, probing_input, stored_input
from spir.conformance.growth import grown, starts
from spir.conformance.strategies import backends, examples, modules, ops, pipelines
from spir.discovery import names
from spir.driver import backend_of
from spir.errors import SpirError
from spir.ir import Array, infer
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.text import parse, show
from spir.types import Int, Real, Scale, Spikes, Tensor
from spir.verify import verify


def test_random_modules_hold_every_op_and_join_unequal_scales():
    seen: Counter[str] = Counter()

    @settings(max_examples=300, derandomize=True, database=None, deadline=None)
    @given(modules())
    def count(module):
        verify(module)
        kinds = {node.op.name for node in module.nodes}
        seen.update(kinds | {"all"} | ({"long"} if len(module.nodes) > 5 else set()))
        carriers = {type_.train.code if type_.train else str(type_.encoding)[:3] for type_ in module.types.values()}
        seen.update(carriers)
        if len(carriers) > 2:
            seen["three kinds of value"] += 1
        seen["made to meet"] += any(getattr(n.op, "to", None) is not None and "." in n.result for n in module.nodes)

    count()
    assert {node.op.name for module in starts() for node in module.nodes} == set(names("ops"))
    assert len(set(names("ops")) & set(seen)) >= 0.7 * len(names("ops"))
    assert seen["long"] >= seen["all"] / 5
    assert seen["three kinds of value"] >= seen["all"] / 6
    assert {"rea", "int", "bits", "rate", "suffix"} <= set(seen)
    assert seen["made to meet"] >= 1


def test_every_corner_is_made_from_one_input():
    for name in names("ops"):
        assert all(module is not None for module in corners(name)), name


@settings(max_examples=60)
@given(examples())
def test_an_example_is_allowed_runs_and_prints_as_text(example):
    interpreter.run(example.module, example.x)
    text = repr(example)
    assert text.startswith(show(example.module).rstrip())
    assert "Tensor(" not in text
    assert "Array(" not in text
    assert f"%{example.module.input.name} of sample {len(example) - 1} = [" in text


X = Tensor((3, 2), Int(-200, 200, Scale.of(0.5)))
HALF = Requant(Array.of([1]), Array.of([8]), 16, -4, 3, 0.5)


@pytest.mark.parametrize(
    ("module", "events"),
    [
        (
            module_of(Tensor((4,), Real()), ("y", Quantize(0.1, -8, 7), "x")),
            {
                *("tie", "above a tie", "below a tie", "zero", "lowest", "highest"),
                *("saturated below", "saturated above"),
            },
        ),
        (
            module_of(X, ("y", HALF, "x")),
            {"tie", "at a threshold", "below a threshold", "zero", "lowest", "highest", "saturated"},
        ),
    ],
)
def test_inputs_hit_ties_thresholds_zero_and_both_ends(module, events):
    for seed in range(5):
        found = hit(module, interpreter.run(module, probing_input(module, seed), "*"))
        assert {event for _, event in set().union(*found)} >= events


def test_inputs_start_with_both_ends_of_the_range():
    one = Scale.of(1)
    for encoding in (Int(-3, 9, one), Spikes(4, "bits", -8, 7, one), Spikes(4, "suffix", 0, 4, one)):
        type_ = Tensor((2, 2), encoding)
        values = type_.integers(stored_input(type_, np.random.default_rng(0)))
        assert (values[0] == encoding.lo).all()
        assert (values[1] == encoding.hi).all()


def test_a_failing_example_prints_as_the_text_of_its_module_and_its_inputs():
    @settings(max_examples=100, derandomize=True, database=None, phases=(Phase.generate,))
    @given(examples())
    def no_neuron_fires(example: Example) -> None:
        found = interpreter.run(example.module, example.x, "*")
        fired = [n.result for n in example.module.nodes if is_neuron(n.op.name) and found[n.result].any()]
        assert not fired

    with pytest.raises(AssertionError) as failure:
        no_neuron_fires()
    told = "\n".join(failure.value.__notes__)
    assert "example=module {\n  input %x : tensor<" in told
    assert "\n%x of sample 0 = [" in told
    assert "Example(" not in told


def test_a_step_that_fits_nowhere_leaves_the_module_as_it_is():
    flat = next(module for module in starts() if len(module.input.type.shape) == 1 and not module.nodes)
    assert grown(flat, [("max_pool", seed) for seed in range(20)]) is flat


@settings(max_examples=60)
@given(st.sampled_from([X, Tensor((4,), Real()), Tensor((2, 3, 3), Spikes(4, "bits", 0, 15, Scale.of(1)))]), st.data())
def test_ops_are_drawn_with_options_of_their_own(operand, data):
    op = data.draw(ops(operand))
    try:
        result = infer(op, (operand,) * (op.operands or 2))
    except SpirError:
        return
    assert result.shape


@settings(max_examples=100)
@given(pipelines())
def test_random_pipelines_parse_and_print(text):
    steps = pipeline.parse(text)
    assert pipeline.parse(pipeline.spell(steps)) == steps


@settings(max_examples=30)
@given(st.data())
def test_random_backends_are_built(data):
    for name in names("backends"):
        text = data.draw(backends(name))
        made = backend_of(text)
        assert backend_of(f"{name}{options.spelled(made)}") == made


@settings(max_examples=40)
@given(modules())
def test_random_modules_read_back_from_their_text(module):
    assert parse(show(module), module.arrays()) == module
