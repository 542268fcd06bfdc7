"""Registers that ranges call wide enough never overflow, for any input; others keep and count what a recount does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spir.backends.hw import Hw
from spir.conformance.examples import Example, module_of
from spir.conformance.strategies import bounded, examples
from spir.errors import SpirError
from spir.ir import Array
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.profile import HOME
from spir.ranges import witness
from spir.types import Scale, Spikes, Tensor
from tests.unit.registers import Recount, flat

MODES = st.sampled_from(["saturate", "wrap"])
COLLAPSE = st.sampled_from(["auto", "off"])
BITS = st.integers(2, 14)


@pytest.fixture(scope="module")
def chip(tmp_path_factory):
    """Writes a profile with registers of given widths, once for each."""
    folder, text = tmp_path_factory.mktemp("chips"), (HOME / "ideal.toml").read_text(encoding="utf-8")

    def write(sum_bits: int, state_bits: int) -> str:
        path = folder / f"{sum_bits}_{state_bits}.toml"
        if not path.exists():
            wide = text.replace("state_bits = 64", f"state_bits = {state_bits}")
            path.write_text(wide.replace("sum_bits = 64", f"sum_bits = {sum_bits}"), encoding="utf-8")
        return str(path)

    return write


@bounded(40)
@given(examples(8), BITS, BITS, MODES, COLLAPSE)
def test_any_module_keeps_and_counts_what_a_recount_does(chip, example: Example, sum_bits, state_bits, mode, collapse):
    profile = chip(sum_bits, state_bits)
    backend = Hw(collapse=collapse, profile=profile, overflow=mode)
    refused = list(backend.refusals(example.module))
    if refused:
        assert {refusal.code for refusal in refused} == {"backend"}  # ops that hw does not have
        return
    program = backend.prepare(example.module)
    stored, overflows = program.run_counting(example.x, "*")
    recount = Recount(example.module, sum_bits, state_bits, mode)
    expected = recount.run(example.x)
    assert flat(overflows) == dict(recount.counts)
    # what ranges prove, and nothing else, is wide enough
    assert {(name, which) for name, which, _ in recount.counts} <= program.registers.loose
    assert bool(program.registers.loose) == bool(list(Hw(profile=profile).refusals(example.module)))
    for name, values in expected.items():
        if values.dtype == np.int64:
            np.testing.assert_array_equal(stored[name], values)


@bounded(40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.booleans(), MODES)
def test_registers_of_the_width_that_ranges_ask_for_hold_the_worst_input_and_one_bit_less_does_not(
    chip, seed, steps, outputs, inputs, of_state, mode
):
    rng = np.random.default_rng(seed)
    op = Linear(weight=Array.of(rng.integers(-40, 41, (outputs, inputs))), weight_scale=Array.of([1.0]))
    train = Spikes(steps, "bits", 0, 2**steps - 1, Scale.of(1.0))
    module = module_of(Tensor((inputs,), train), ("l", op, "x"), ("y", Integrate(), "l"))
    ranges = Hw().prepare(module).ranges
    needs = [max(2, *getattr(ranges["l"], kind).bits) for kind in ("frame", "value")]
    frames = [
        witness(op, ((inputs,),), (ranges["x"].frame,), channel, top=top)[0].astype(np.int64)
        for channel in range(outputs)
        for top in (True, False)
    ]
    x = np.stack([np.stack(frames)] * steps)
    for collapse in ("auto", "off"):
        stored, overflows = Hw(collapse=collapse, profile=chip(*needs), overflow=mode).prepare(module).run_counting(x)
        assert not overflows
        np.testing.assert_array_equal(stored["y"], (2**steps - 1) * (np.stack(frames) @ op.weight.values.T))
    which = int(of_state)
    if needs[which] > 2:
        narrow = [bits - (i == which) for i, bits in enumerate(needs)]
        _, overflows = Hw(profile=chip(*narrow), overflow=mode).prepare(module).run_counting(x)
        assert overflows["ly"[which], ("sum", "state")[which]].sum() > 0
        with pytest.raises(SpirError, match=rf"needs {needs[which]} bits"):
            Hw(profile=chip(*narrow)).prepare(module)
