"""What is special to serial: it steps through time, leaves torch as it was, and computes in types that are exact."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
import torch

from spir import interpreter
from spir.backends.serial import Serial
from spir.backends.torch_ops import _exactness
from spir.backends.torch_ops._lowering import Use
from spir.backends.torch_ops.conv2d import Conv2dLowering
from spir.backends.torch_ops.linear import LinearLowering
from spir.conformance.examples import module_of, stored_input
from spir.discovery import find, names
from spir.errors import SpirError
from spir.ir import Array, Op
from spir.ops.conv2d import Conv2d
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.types import Current, Int, Real, Scale, Spikes, Tensor
from tests.conformance.networks import images, plain

CPU = torch.device("cpu")


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal integers, or reals within 1e-12 of the largest."""
    assert found.shape == expected.shape
    if expected.dtype.kind == "f":
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max(initial=1e-300))
    else:
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)


def on_integers(corner) -> bool:
    return not any(isinstance(type_.encoding, Real) for type_ in corner.values[1])


CORNERS = [
    pytest.param(op, types, id=f"{name}-{i}")
    for name in names("ops")
    for i, (op, types) in enumerate(find("ops", name).corners())
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize(("op", "types"), [p for p in CORNERS if len(set(p.values[1])) > 1 and on_integers(p)])
def test_operands_of_several_types_meet(op, types, dtype):
    rng = np.random.default_rng(4)
    stored = [stored_input(t, rng) for t in types]
    lowering = find("backends.torch_ops", op.name).of(Use(op, types, dtype, CPU))
    operands = [torch.tensor(x) if t.train else torch.tensor(x)[None] for t, x in zip(types, stored, strict=True)]
    frames = list(lowering.steps(*(iter(x) for x in operands)))
    found = torch.stack(frames).to(torch.int64).numpy()
    same(found if types[0].train else found[0], op.reference(types, *stored))


def test_the_state_of_torch_stays_and_autocast_is_kept_out():
    module, x = plain(), images(4)
    expected = interpreter.run(module, x)["y"]
    before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Serial().prepare(module).run(x)["y"]
        assert torch.is_autocast_enabled("cpu")
    same(found, expected)
    assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) == before
    assert not torch.is_inference_mode_enabled()


def test_every_frame_is_stepped_for_itself(monkeypatch):
    shapes = []
    original = Conv2dLowering.map

    def counted(self, *x):
        shapes.append(tuple(x[0].shape))
        return original(self, *x)

    network = Serial().prepare(plain())
    monkeypatch.setattr(Conv2dLowering, "map", counted)
    network.run(images(7))
    assert shapes == [(7, 3, 8, 8)] * 8 + [(7, 4, 4, 4)] * 8


def test_currents_flow_into_a_neuron_frame_by_frame(monkeypatch):
    events = []
    original, fire = Conv2dLowering.map, NeuronStem.fire

    def counted(self, *x):
        events.append("frame")
        return original(self, *x)

    def watched(self, xp, currents):
        return fire(self, xp, (events.append("current") or current for current in currents))

    network = Serial().prepare(plain())
    monkeypatch.setattr(Conv2dLowering, "map", counted)
    monkeypatch.setattr(NeuronStem, "fire", watched)
    network.run(images(2))
    assert events == ["frame", "current"] * 16
    events.clear()
    network.run(images(2), keep="c1")
    assert events == ["frame"] * 8 + ["current"] * 8 + ["frame", "current"] * 8


def test_the_input_quantiser_rounds_as_numpy_does():
    scale = 0.1
    steps = np.arange(-140, 141)
    ties = np.concatenate([(steps + 0.5) * scale, np.nextafter((steps + 0.5) * scale, np.inf), steps * scale])
    x = np.concatenate([ties, np.random.default_rng(0).uniform(-14, 14, 100_000), [1e300, -1e300]])[:, None]
    module = module_of(Tensor((1,), Real()), ("q", Quantize(scale=scale, lo=-128, hi=127), "x"))
    same(Serial().prepare(module).run(x)["q"], np.clip(np.floor(x / scale + 0.5), -128, 127).astype(np.int64))


def exact_sums(op, x: np.ndarray) -> np.ndarray:
    """The integer sums of a 3x3 convolution with padding 1, or of a matrix, as Python counts."""
    weight = op.weight.values.astype(object)
    if weight.ndim == 2:
        return x.astype(object) @ weight.T
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))).astype(object)
    height, width = x.shape[2:]
    total = np.zeros((len(x), len(weight), height, width), dtype=object)
    for u in range(3):
        for v in range(3):
            seen = padded[:, :, u : u + height, v : v + width]
            total += np.einsum("oi,nihw->nohw", weight[..., u, v], seen)
    return total


@pytest.mark.parametrize("weight_bits", [4, 30])
@pytest.mark.parametrize("total_bits", [23, 24, 25, 52, 53, 54, 62])
def test_sums_are_exact_at_every_width(weight_bits, total_bits):
    if total_bits < weight_bits + 6:
        pytest.skip("operands would be empty")
    rng = np.random.default_rng(total_bits)
    weight = rng.integers(-(2**weight_bits), 2**weight_bits, (2, 3, 3, 3), endpoint=True)
    weight[0] = 2**weight_bits - 1
    largest = (2**total_bits - 1) // int(np.abs(weight).sum(axis=(1, 2, 3)).max())
    for lo in (0, -largest):
        conv = Conv2d(weight=Array.of(weight), weight_scale=Array.of([1.0]), padding=(1, 1, 1, 1))
        matrix = Linear(weight=Array.of(weight.reshape(2, -1)), weight_scale=Array.of([1.0]))
        for op, shape in ((conv, (3, 4, 4)), (matrix, (27,))):
            source = Tensor(shape, Int(lo, largest, Scale.of(1.0)))
            x = stored_input(source, rng)
            found = Serial().prepare(module_of(source, ("y", op, "x"))).run(x)["y"]
            assert (found == exact_sums(op, x)).all()


@pytest.mark.parametrize(
    ("hi", "dtype"),
    [(2**24 - 1, torch.float32), (2**24, torch.float64), (2**53 - 1, torch.float64), (2**53, torch.int64)],
)
def test_the_type_of_sums_follows_the_proved_bound(hi, dtype):
    one = Linear(weight=Array.of([[1]]), weight_scale=Array.of([1.0]))
    module = module_of(Tensor((1,), Int(0, hi, Scale.of(1.0))), ("y", one, "x"))
    (step,) = Serial().prepare(module).steps
    assert step.lowering.dtype == dtype
    assert Serial().prepare(module).run(np.array([[hi]]))["y"].tolist() == [[hi]]


def test_the_bound_of_one_frame_counts_and_not_that_of_the_value():
    one = Linear(weight=Array.of([[2**20]]), weight_scale=Array.of([1.0]))
    module = module_of(
        Tensor((1,), Int(0, 65535, Scale.of(1.0))),
        ("e", Encode(steps=16), "x"),
        ("l", one, "e"),
        ("y", Integrate(), "l"),
    )
    network = Serial().prepare(module)
    assert [step.lowering.dtype for step in network.steps][1] == torch.float32
    assert network.steps[0].carried == torch.float32
    assert network.run(np.array([[65535]]))["y"].tolist() == [[65535 * 2**20]]


def test_windows_give_the_convolution_that_the_library_gives():
    rng = np.random.default_rng(11)
    x = torch.tensor(rng.integers(-9, 9, (2, 4, 9, 8)), dtype=torch.float64)
    for groups, stride, dilation in ((1, (1, 1), (1, 1)), (2, (2, 1), (1, 2)), (4, (1, 3), (2, 1))):
        weight = torch.tensor(rng.integers(-9, 9, (8, 4 // groups, 3, 2)), dtype=torch.float64)
        found = _exactness.windows_product(x, weight, stride, dilation, groups)
        expected = torch.nn.functional.conv2d(x, weight, None, stride, 0, dilation, groups)
        assert torch.equal(found, expected)


def test_a_stored_train_is_a_module_input():
    source = Tensor((3, 4, 4), Current(4, "bits", -90, 80, -6, 6, Scale.of(0.5)))
    module = module_of(source, ("y", Integrate(), "x"))
    x = stored_input(source, np.random.default_rng(0))
    same(Serial().prepare(module).run(x)["y"], source.integers(x))


@pytest.mark.parametrize(
    ("source", "x", "message"),
    [
        (Tensor((2,), Real()), np.zeros(2), r"takes \[N, 2\], and the data is \[2\]"),
        (Tensor((2,), Real()), np.zeros((1, 3)), r"takes \[N, 2\], and the data is \[1, 3\]"),
        (Tensor((2,), Real()), np.array([["a", "b"]]), "not numbers"),
        (Tensor((2,), Int(0, 9, Scale.of(1.0))), np.full((1, 2), 0.5), "fractions"),
        (
            Tensor((2,), Int(0, 9, Scale.of(1.0))),
            np.full((1, 2), 10),
            r"the value of the data holds 10..10, and the network takes 0..9",
        ),
        (
            Tensor((2,), Spikes(2, "bits", 0, 2, Scale.of(1.0))),
            np.full((2, 1, 2), -1),
            r"frame 0 of the data holds -1..-1",
        ),
        (Tensor((2,), Spikes(2, "bits", 0, 2, Scale.of(1.0))), np.ones((2, 1, 2)), r"the value of the data holds 3..3"),
        (Tensor((2,), Spikes(2, "bits", 0, 2, Scale.of(1.0))), np.ones((1, 2)), r"takes \[2, N, 2\]"),
    ],
)
def test_a_wrong_input_is_refused(source, x, message):
    op = Relu() if isinstance(source.encoding, Real) else Integrate()
    network = Serial().prepare(module_of(source, ("y", op, "x")))
    with pytest.raises(SpirError, match=message) as refusal:
        network.run(x)
    assert refusal.value.code == "data"


@pytest.mark.parametrize("device", ["gpu", "cuda:999", "mps", ""])
def test_an_absent_device_is_refused(device):
    with pytest.raises(SpirError) as refusal:
        Serial(device=device).prepare(plain())
    assert refusal.value.code == "backend"
    assert "device=cpu" in str(refusal.value)


@attrs.frozen
class Unknown(Op):
    name = "unknown_op"

    def infer(self, *types):
        return types[0]


def test_every_op_without_a_lowering_is_refused_at_once():
    module = module_of(Tensor((2,), Real()), ("a", Unknown(), "x"), ("b", Unknown(), "a"))
    with pytest.raises(SpirError) as refusal:
        Serial().prepare(module)
    assert [d.code for d in refusal.value.diagnostics] == ["backend"] * 2
    assert "no torch lowering of unknown_op" in str(refusal.value)
    assert "net.b" in str(refusal.value)


def test_kernels_that_lose_integers_are_refused(monkeypatch):
    original = torch.nn.functional.conv2d

    def reduced(x, weight, *rest):
        return original(x.to(torch.bfloat16).to(x.dtype), weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "conv2d", reduced)
    with pytest.raises(SpirError, match="a convolution in float32 is not exact on integers on cpu") as refusal:
        Serial().prepare(plain())
    assert len(refusal.value.diagnostics) == 2
    Serial().prepare(module_of(Tensor((2,), Real()), ("y", Relu(), "x")))


def test_lowerings_on_reals_are_differentiable_in_input_and_parameters():
    rng = np.random.default_rng(12)
    op = Conv2d(weight=Array.of(rng.standard_normal((2, 3, 3, 3))), bias=Array.of([0.5, -0.5]), padding=(1, 0, 2, 1))
    lowering = Conv2dLowering.of(Use(op, (Tensor((3, 5, 5), Real()),), torch.float64, CPU))
    matrix = LinearLowering.of(
        Use(Linear(weight=Array.of(rng.standard_normal((4, 6)))), (Tensor((6,), Real()),), torch.float64, CPU)
    )
    for ready, shape in ((lowering, (2, 3, 5, 5)), (matrix, (2, 6))):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weight = ready.weight.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w, ready=ready: attrs.evolve(ready, weight=w)(x), (x, weight))


def test_memory_is_estimated_within_reason():
    size = Serial().prepare(plain()).bytes_per_sample
    assert 10_000 < size < 100_000


def test_integers_stay_exact_when_the_caller_turned_onednn_off():
    rng = np.random.default_rng(3)
    weight = Array.of(rng.integers(-127, 128, (8, 8, 3, 3)))
    op = Conv2d(weight, Array.of([0.5]), padding=(1, 1, 1, 1))
    source = Tensor((8, 16, 16), Int(0, 255, Scale.of(1.0)))
    module, x = module_of(source, ("y", op, "x")), rng.integers(0, 256, (32, 8, 16, 16))
    with torch.backends.mkldnn.flags(enabled=False):
        found = Serial().prepare(module).run(x)["y"]
    same(found, interpreter.run(module, x)["y"])


def test_the_reference_bounds_frames_that_are_wider_than_what_they_decode_to():
    wide = 2**61
    source = Tensor((1,), Current(2, "bits", -1, 1, -wide, wide, Scale.of(1.0)))
    op = Linear(Array.of([[1]]), Array.of([1.0]))
    module = module_of(source, ("c", op, "x"), ("y", Integrate(), "c"))
    x = np.array([[[wide // 2]], [[1 - wide]]])
    assert interpreter.run(module, x)["y"].tolist() == [[1]] == Serial().prepare(module).run(x)["y"].tolist()
