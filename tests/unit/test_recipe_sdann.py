"""@sdann: spikes equal the integer network, narrow registers hold every sum, and heads may be signed and linear."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spir
from spir import equality, pipeline
from spir.driver import backend_of
from spir.errors import SpirError

X = np.random.default_rng(3).standard_normal((24, 3, 12, 12)).astype(np.float32)


class Detector(nn.Module):
    """A YOLO-like network: a residual backbone with pools, and a linear head of boxes, scores and classes a cell."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(12, 2 * (5 + 3), 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.down(F.relu(self.deep(x) + x)))


def detector() -> nn.Module:
    """With running statistics of real activations."""
    model = Detector().train()
    with torch.no_grad():
        for _ in range(8):
            model(torch.from_numpy(X))
    return model.eval()


@pytest.mark.parametrize("backend", ["serial", "hw", "hw{collapse=off}"])
def test_a_signed_linear_head_runs_exactly(backend):
    model = detector()
    snn = spir.compile(model, "@sdann", data=X, backend=backend)
    integers = {stage.name: stage.module for stage in snn.stages}["propagate-scales"]
    found = equality.compare(integers, snn.module, backend_of(backend).prepare(snn.module), X, batch=8)
    assert sum(layer.mismatches for layer in found) == 0
    assert sum(layer.active for layer in found) > 0.3 * sum(layer.elements for layer in found)
    logits = np.asarray(snn(X))
    assert logits.shape == (24, 16, 3, 3)
    assert logits.min() < 0 < logits.max()
    with torch.no_grad():
        wanted = model(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(logits, wanted, atol=0.08 * np.abs(wanted).max())


@pytest.mark.parametrize("r", ["guaranteed", "data"])
def test_sixteen_bits_hold_every_sum_and_state(r):
    passes = f"@sdann{{accumulator=14, r={r}}}"
    overflow = "refuse" if r == "guaranteed" else "saturate"
    snn = spir.compile(detector(), passes, data=X, backend=f"hw{{accumulator=14, overflow={overflow}}}", check="off")
    wide = spir.compile(detector(), "@sdann", data=X, backend="hw", check="off")
    exact = np.asarray(wide(X))
    np.testing.assert_allclose(snn(X), exact, atol=0.05 * np.abs(exact).max())
    assert not sum(int(counts.sum()) for counts in snn.overflows(X).values())
    with pytest.raises(SpirError, match="scale-integration"):
        spir.compile(wide.module, "", backend="hw{accumulator=14}")


def test_the_recipe_is_text_and_options_left_out_leave_their_clause_out():
    plain = (
        "canonicalize, fold-bn, calibrate-range{pools=on}, quantize, propagate-scales{join=rescale}, lower-max-pool, "
        "derive-thresholds, fuse-neuron"
    )
    assert pipeline.spell(pipeline.parse("@sdann")) == plain
    narrow = f"{plain}, scale-integration{{r=data, per=channel, divisor=255}}, calibrate-bias, sparsify{{rot=1}}"
    narrow = narrow.replace("{join=rescale}", "{join=rescale, whole=on}")
    assert pipeline.spell(pipeline.parse("@sdann{accumulator=16, r=data, divisor=255, rot=1}")) == narrow
    assert pipeline.spell(pipeline.parse("@sdann{rot=0, drlo=0}")) == plain
    assert pipeline.spell(pipeline.parse("@sdann{max_drop=0}")) == f"{plain}, sparsify{{max_drop=0}}"
    with pytest.raises(SpirError, match="accumulator=16"):
        pipeline.parse("@sdann{per=channel}")


def test_a_guaranteed_scale_holds_where_registers_wrap_and_chips_divide():
    passes, chip = "@sdann{accumulator=14, divisor=255}", "profile=darwin3, accumulator=14"
    snn, wraps = (
        spir.compile(detector(), passes, data=X, backend=f"hw{{{chip}{more}}}", check="off")
        for more in ("", ", overflow=wrap")
    )
    np.testing.assert_array_equal(snn(X), wraps(X))
    assert not wraps.overflows(X)
    data = passes.replace("divisor", "r=data, divisor")
    with pytest.raises(SpirError, match=r"E-CALIB-OVF") as caught:
        spir.compile(detector(), data, data=X, backend=f"hw{{{chip}, overflow=wrap}}", check="off")
    assert "scale-integration{bits=14, r=guaranteed, divisor=255}, or @sdann{accumulator=14, r=g" in str(caught.value)
    assert "ran: canonicalize, fold-bn, calibrate-range{pools=on}" in str(caught.value)


def test_what_is_scaled_is_not_scaled_again_and_runs_where_frames_are_seen():
    snn = spir.compile(detector(), "@sdann{accumulator=14}", data=X, check="off")
    with pytest.raises(SpirError, match=r"is scaled already(.|\n)*or to @sdann\{accumulator=16, r="):
        spir.compile(snn.module, "scale-integration{bits=14, divisor=255}", data=X)
    with pytest.raises(SpirError, match=r"neuron_stem scales every frame \(r > 0\)(.|\n)*fix: backend serial or hw"):
        spir.compile(snn.module, "", backend="parallel")
