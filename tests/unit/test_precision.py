"""Where precision could be lost in silence: joins, cut multipliers, far limits, pools of unlike branches, the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spir
from spir.backends.torch_ops._firing import TorchNamespace
from spir.driver import backend_of
from spir.equality import compare
from spir.errors import SpirError
from spir.ir import Array
from spir.ops._linear import WeightedMap
from spir.ops.add import Add
from spir.ops.concat import Concat
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.max_pool import MaxPool
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.ops.shift import Shift
from spir.ops.slice import Slice
from spir.passes.lower_max_pool import LowerMaxPool
from spir.passes.quantize import meeting
from spir.schedule import schedule
from spir.types import Int, Scale, Spikes
from tests.unit.small_networks import network

X = np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)
SPIKING = "derive-thresholds{neuron=stem}, fuse-neuron"


class Of(nn.Module):
    """A function of the input and some convolutions."""

    def __init__(self, f: Callable[..., torch.Tensor], *channels: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.m = f, nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.f(x, *self.m)


def compiled(model: nn.Module, passes: str) -> tuple[Any, float]:
    """The network, equal on every backend in every layer, and its error relative to the largest output."""
    snn = spir.compile(model.eval(), passes, data=X)
    whole = {stage.name: stage.module for stage in snn.stages}["propagate-scales"]
    for text in ("serial", "parallel", "hw", "hw{collapse=off}"):
        found = compare(whole, snn.module, backend_of(text).prepare(snn.module), X[:6])
        assert not sum(a.mismatches for a in found)
    wanted = model(torch.from_numpy(X)).detach().numpy()
    return snn, float(np.abs(snn(X) - wanted).max() / np.abs(wanted).max())


def stages(bits: int, *, propagate: str = "", after: str = "") -> str:
    steps = f"canonicalize, fold-bn, calibrate-range, quantize{{bits={bits}}}, propagate-scales{{{propagate}}}"
    return f"{steps}, {after}{SPIKING}"


@pytest.mark.parametrize(("bits", "most"), [(5, 0.3), (8, 0.04), (12, 0.003), (16, 0.0003)])
def test_a_rescaled_sum_has_the_bits_of_the_network(bits, most):
    model = Of(lambda x, a, b: F.relu(a(x) + b(x)), (3, 4), (3, 4))
    assert compiled(model, stages(bits, propagate="join=rescale"))[1] < most


def test_rescaled_and_other_branches_of_few_bits_meet_in_a_concatenation():
    model = Of(lambda x, a, b, c: torch.cat([a(x) + b(x), F.relu(c(x))], 1), (3, 4), (3, 4), (3, 4))
    assert compiled(model, stages(5, propagate="join=rescale"))[1] < 0.3


def unequal(factor: float) -> nn.Module:
    return Of(lambda x, a, b: F.relu(F.avg_pool2d(a(x) * factor + F.relu(b(x)), 8)).flatten(1), (3, 4), (3, 4))


def test_multipliers_that_registers_cut_to_nothing_are_refused_with_a_way_out_that_works():
    with pytest.raises(SpirError) as refused:
        compiled(unequal(1e-7), stages(16, propagate="width=48"))
    assert refused.value.diagnostics[0].code == "E-MULT-RANGE"
    assert "join=rescale" in str(refused.value)
    assert "a smaller width" in str(refused.value)
    assert compiled(unequal(1e-7), stages(16, propagate="width=32"))[1] < 1e-3
    assert compiled(unequal(1e-7), stages(16, propagate="join=rescale"))[1] < 1e-3


def test_multipliers_that_registers_cut_short_are_noted():
    model = Of(lambda x, a, b: F.relu(F.max_pool2d(F.relu(a(x)), 2) + b(x[:, :, :4, :4]) * 1e-4), (3, 4), (3, 4))
    snn, error = compiled(model, stages(16, after="lower-max-pool{materialise=off}, "))
    (note,) = [n for e in snn.journal for n in e.notes if "multipliers of" in n]
    assert "because products fill 64 bits" in note
    assert error < 1e-3


@pytest.mark.parametrize(("lo", "hi"), [(-10.0, 20.0), (-100.0, 200.0), (-1e6, 2e6), (0.1, 50.0)])
def test_limits_far_from_the_data_cost_no_codes(lo, hi):
    model = Of(lambda x, a, b: b(torch.clamp(a(x), lo, hi)), (3, 4), (4, 4))
    assert compiled(model, "@stem")[1] < 0.04


def test_codes_that_the_data_hardly_use_are_noted():
    snn, _ = compiled(Of(lambda x, a, b: b(torch.clamp(a(x), max=100.0)), (3, 4), (4, 4)), "@stem")
    assert any("only, and codes begin at 0" in note for entry in snn.journal for note in entry.notes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_output_goes_beyond_the_limits_of_the_model(bits):
    torch.manual_seed(0)
    found = compiled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardtanh()), f"@stem{{bits={bits}}}")[0](10 * X)
    assert -1 - 1e-6 <= found.min() < found.max() <= 1 + 1e-6


@pytest.mark.parametrize("options", ["", "max_pool=lower", "per=channel", "per=channel, max_pool=lower"])
@pytest.mark.parametrize("second", [F.relu, F.hardtanh])
def test_pools_of_unlike_branches_hand_spikes_to_weights(options, second):
    def forward(x: torch.Tensor, *m: nn.Module) -> torch.Tensor:
        return m[2](F.max_pool2d(torch.cat([F.relu(m[0](x)), second(m[1](x))], 1), 2))

    snn, error = compiled(Of(forward, (3, 4), (3, 4), (8, 4)), f"@stem{{{options}}}")
    assert error < 0.04
    for node in snn.module.nodes:
        if isinstance(node.op, WeightedMap):
            assert all(type_.train is not None for type_ in snn.module.operand_types(node))


@pytest.mark.parametrize("join", [lambda t, x: torch.cat([t, x], 1), torch.add], ids=["concat", "add"])
def test_the_host_reads_the_input_itself_beside_the_network(join):
    model = Of(lambda x, a: F.relu(a(join(torch.tanh(x), x))), (6 if join is not torch.add else 3, 4))
    snn, error = compiled(model, "@stem")
    assert error < 0.04
    (tanh,) = [n for n in snn.module.nodes if n.op.name == "tanh"]
    assert tanh.operands == ("x",)


def test_pools_of_pools_materialise_by_themselves():
    model = Of(lambda x, a, b: b(F.max_pool2d(F.max_pool2d(F.relu(a(x)), 2), 2)), (3, 4), (4, 4))
    assert compiled(model, stages(8, after="lower-max-pool{materialise=off}, "))[1] < 0.04


def test_codes_of_unequal_scale_that_moved_after_they_met_are_not_lowered():
    one, zero = Array.of([1]), Array.of([0])
    module = network(
        ("a", Requant(one, zero, 1, 0, 255, 0.5), "x"),
        ("b", Requant(one, zero, 1, 0, 255, 0.25), "x"),
        ("c", Concat(), "a b"),
        ("s", Slice((0, 0, 0), (3, 4, 4), (1, 1, 1)), "c"),
        ("p", MaxPool((2, 2), (2, 2)), "s"),
        shape=(2, 4, 4),
        encoding=Int(0, 255, Scale.of(1.0)),
    )
    with pytest.raises(SpirError, match="unequal scales that were moved after they met"):
        spir.driver.opt(module, [LowerMaxPool()], check="off")


def test_groups_of_clips_and_windows_take_one_look_at_each_value():
    sums = [(f"a{i}", Add(), f"{f'a{i - 1}' if i else 'x'} " * 2) for i in range(40)]
    law = Requant(Array.of([1]), Array.of([0]), 2**40, 0, 255, 1.0)
    lines = (*sums, ("r", law, "a39"), ("e", Encode(8), "r"))
    module = network(*lines, shape=(1,), encoding=Int(0, 1, Scale.of(1.0)))
    assert schedule(module).windows == 1  # 2^40 ways lead back to the input
    assert isinstance(module.types["e"].encoding, Spikes)
    assert meeting(module) == []


def test_a_sum_below_a_64th_of_a_step_is_multiplied_by_nothing():
    lines = (("d", Dequantize(), "x"), ("q", Quantize(2.0**63, 0, 255), "d"))
    module = network(*lines, shape=(1,), encoding=Int(-(2**56), 2**56, Scale.of(1.0)))
    (requant,) = [n.op for n in spir.driver.opt(module, "propagate-scales", check="off").module.nodes]
    assert requant.mul.values.tolist() == [0]


@pytest.mark.parametrize(("bias", "refused"), [(2.0**63, True), (-(2.0**63), True), (2.0**62, False)])
def test_a_readout_bias_of_2_to_the_63_steps_does_not_fit(bias, refused):
    lines = (("d", Dequantize(), "x"), ("y", Shift(Array.of([bias])), "d"))
    module = network(*lines, shape=(1,), encoding=Int(0, 1, Scale.of(1.0)))
    if refused:
        with pytest.raises(SpirError, match="E-VRANGE"):
            spir.driver.opt(module, "propagate-scales", check="off")
        return
    assert spir.driver.opt(module, "propagate-scales", check="off").module.nodes


@pytest.mark.parametrize(("x", "y"), [(1, 0), (-1, 0), (0, 1), (2, -1), (5, 3)])
def test_a_choice_between_two_numbers_on_torch_is_that_of_numpy(x, y):
    condition = np.array([True, False, True])
    found = TorchNamespace(constants={}).where(torch.from_numpy(condition), x, y)
    assert found.tolist() == np.where(condition, x, y).tolist()
