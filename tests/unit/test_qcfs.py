"""QCFS: the op by exact fractions, the module and its gradients by hand, the exchange of ReLUs, and the trace."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.networks import TUNED, WEIGHTS
from spir.backends.serial import Serial
from spir.conformance.examples import module_of
from spir.errors import SpirError
from spir.frontends.modules.qcfs import QCFS, swap_relu
from spir.frontends.torch_fx import TorchFx
from spir.interpreter import run
from spir.ir import Array, infer
from spir.ops.qcfs import Qcfs
from spir.types import Int, Real, Scale, Tensor
from tests.unit.lambdas import Lambda

X = Tensor((2, 3), Real())


def formula(x, levels, theta, psi=0.0, phi=0.0, lo=0):
    """Equation 9 on one number, without rounding until the end."""
    theta, psi, phi = Fraction(theta), Fraction(psi), Fraction(phi)
    steps = math.floor(((Fraction(x) + psi) * levels + theta / 2) / theta)
    return float((theta + phi) / levels * min(max(steps, lo), levels))


def around_ties(levels, theta):
    """Every tie from below the lowest step to above the highest, and its neighbours."""
    ties = [(k + 0.5) * theta / levels for k in range(-levels - 2, levels + 2)]
    return [v for t in ties for v in (np.nextafter(t, -np.inf), t, np.nextafter(t, np.inf))] + [0.0, -1e9, 1e9]


# the op


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("levels", [1, 2, 4, 8, 65_536])
@pytest.mark.parametrize("theta", [0.5, 1.0, 6.0])
def test_ties_go_up_and_nothing_else_does(levels, theta, signed):
    few = min(levels, 8)  # of many levels the lowest
    x = np.array(around_ties(few, theta * few / levels))
    op = Qcfs(levels, Array.of([theta]), signed=signed)
    found = op.reference((Tensor((len(x),), Real()),), x[None])[0]
    ties = {v for v in x.tolist() if (Fraction(v) * levels / Fraction(theta) + Fraction(1, 2)).denominator == 1}
    assert len(ties) >= 2 * few
    expected = [formula(v, levels, theta, lo=-levels * signed) for v in x.tolist()]
    for value, got, wanted in zip(x.tolist(), found.tolist(), expected, strict=True):
        beside = value not in ties and any(abs(value - t) < 1e-12 * theta for t in ties)
        assert got == wanted or (beside and abs(got - wanted) <= theta / levels)  # x L + theta / 2 may round to a tie


def test_shifts_and_thresholds_are_those_of_the_channel():
    theta, psi, phi = [0.5, 2.0], [0.25, -1.0], [-0.5, 1.0]
    op = Qcfs(4, Array.of(theta), Array.of(psi), Array.of(phi), signed=True)
    x = np.random.default_rng(0).standard_normal((50, 2, 3)) * 2
    found = op.reference((X,), x)
    for where in np.ndindex(*x.shape):
        c = where[1]
        assert found[where] == pytest.approx(formula(x[where], 4, theta[c], psi[c], phi[c], lo=-4), abs=1e-15)
    assert not found[:, 0].any()  # theta + phi = 0
    assert {*np.unique(found[:, 1])} <= {k * 0.75 for k in range(-4, 5)}


def test_a_shift_counts_before_the_tie():
    op = Qcfs(4, Array.of([1.0]), psi=Array.of([0.125]))
    assert op.reference((X,), np.full((1, 2, 3), 0.25)).tolist() == [[[0.5] * 3] * 2]  # 0.375 is the tie at 0.5


@pytest.mark.parametrize(
    ("op", "type_", "words"),
    [
        (Qcfs(4, Array.of([1.0])), Tensor((2,), Int(0, 3, Scale.of(0.5))), "works on reals, not int"),
        (Qcfs(0, Array.of([1.0])), X, "levels = 0"),
        (Qcfs(65_537, Array.of([1.0])), X, "levels = 65537"),
        (Qcfs(4, Array.of([1.0, 0.0])), X, "a threshold of 0"),
        (Qcfs(4, Array.of([-0.5])), X, "a threshold of -0.5"),
        (Qcfs(4, Array.of([1.0, 1.0, 1.0])), X, r"threshold has shape \[3\], not \[1\] or \[2\]"),
        (Qcfs(4, Array.of(1.0)), X, r"threshold has shape \[\], not \[1\] or \[2\]"),
        (Qcfs(4, Array.of([1.0]), psi=Array.of([[0.0]])), X, r"psi has shape \[1, 1\]"),
        (Qcfs(4, Array.of([1.0]), phi=Array.of([0.0] * 3)), X, r"phi has shape \[3\]"),
        (Qcfs(4, Array.of([1.0]), phi=Array.of([0.0, -1.5])), X, r"threshold \+ phi = -0.5"),
    ],
)
def test_what_the_op_refuses(op, type_, words):
    with pytest.raises(SpirError, match=words) as caught:
        infer(op, (type_,))
    assert caught.value.code == "type"
    assert "fix: " in str(caught.value)


def test_the_lowering_equals_the_reference_to_the_bit_also_on_ties():
    for op in (
        Qcfs(4, Array.of([0.3, 1.7]), Array.of([0.01, -0.2]), Array.of([0.1, 0.0]), signed=True),
        Qcfs(10, Array.of([0.7])),
    ):
        module = module_of(X, ("y", op, "x"))
        x = np.random.default_rng(1).choice(around_ties(op.levels, float(op.threshold.values[0])), (40, 2, 3))
        assert Serial().prepare(module).run(x, keep="*")["y"].tobytes() == run(module, x, keep="*")["y"].tobytes()


# the module


@pytest.mark.parametrize("levels", [1, 4, 10])
@pytest.mark.parametrize("theta", [0.75, 0.3])
def test_the_module_is_the_op_to_the_bit(levels, theta):
    module = QCFS(levels, theta).double()
    x = torch.tensor(around_ties(levels, theta), dtype=torch.float64)[None]
    op = Qcfs(levels, Array.of([module.threshold.item()]))
    assert module(x).detach().numpy().tobytes() == op.reference((Tensor(x.shape[1:], Real()),), x.numpy()).tobytes()


def test_gradients_by_hand():
    module = QCFS(4, 2.0).double()
    x = torch.tensor([-1.0, 0.0, 0.3, 0.5, 0.8, 1.9, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    y = module(x)
    assert y.tolist() == [0.0, 0.0, 0.5, 0.5, 1.0, 2.0, 2.0, 2.0]
    for i in range(len(x)):
        (slope,) = torch.autograd.grad(y[i], module.threshold, retain_graph=True)
        inside, above = 0 < x[i] < 2, x[i] >= 2
        assert slope.item() == pytest.approx(1.0 if above else (y[i] - x[i]).item() / 2 if inside else 0.0)
    (gradient,) = torch.autograd.grad(y, x, torch.arange(1.0, 9.0, dtype=torch.float64))
    assert gradient.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]


def test_the_gradient_is_that_of_floor_taken_for_the_identity():
    def straight(x, theta, levels):
        z = torch.clamp(x / theta, 0, 1)
        rounded = torch.floor(z * levels + 0.5) / levels
        return theta * (z + (rounded - z).detach())

    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    module, weight = QCFS(3, 0.8).double(), torch.randn(3, 4, 5, dtype=torch.float64)
    found = torch.autograd.grad((module(x) * weight).sum(), [x, module.threshold])
    expected = torch.autograd.grad((straight(x, module.threshold, 3) * weight).sum(), [x, module.threshold])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("levels", "threshold"), [(0, 1.0), (2.5, 1.0), (4, 0.0), (4, -1.0), (4, math.nan), (4, math.inf)]
)
def test_a_module_needs_a_level_and_a_positive_threshold(levels, threshold):
    with pytest.raises(SpirError, match=r"error\[usage\]: (levels|threshold) = .*\n +fix: "):
        QCFS(levels, threshold)


# the exchange


class Block(nn.Module):
    """A ReLU as a function, and one in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        y += x
        return F.relu(y, inplace=True)


class Every(nn.Module):
    """All forms of ReLU: modules, one shared, one in place; functions and methods; and what follows them in place."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(Block(), Block())
        self.act = nn.ReLU()
        self.rough = nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(8, 4))

    def forward(self, x):
        x = self.act(self.block(x) - 0.3)
        y = x - 0.2
        self.rough(y)
        z = (x - 0.1).relu() + self.act(x - 0.4) + y
        w = z - 0.5
        w.relu_()
        return self.head(torch.relu(w - 0.05) + F.relu_(z - 1) + w)


def every():
    torch.manual_seed(3)
    return Every().eval()


PATHS = (
    *("block.0.qcfs1", "block.0.qcfs2", "block.1.qcfs1", "block.1.qcfs2", "act", "rough", "qcfs1", "act_2"),
    *("qcfs2", "qcfs3", "qcfs4", "head.2"),
)


def test_every_call_of_relu_gets_a_module_of_its_own():
    model, x = every(), torch.randn(16, 3, 4, 4)
    before = copy.deepcopy(model.state_dict())
    swapped = swap_relu(model, 4, x)
    found = [name for name, m in swapped.named_modules() if isinstance(m, QCFS)]
    assert set(found) == set(PATHS)
    assert not [m for m in swapped.modules() if isinstance(m, nn.ReLU)]
    assert set(swapped.state_dict()) == {*before, *(f"{path}.threshold" for path in PATHS)}
    assert isinstance(model.act, nn.ReLU)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(value, swapped.state_dict()[name])
        assert value.data_ptr() != swapped.state_dict()[name].data_ptr()


def test_with_many_levels_it_computes_what_the_model_does():
    model, x = every(), torch.randn(16, 3, 4, 4)
    swapped = swap_relu(model.double(), 2**16, x.double(), threshold=8.0)
    for module in swapped.modules():
        if isinstance(module, QCFS):
            module.threshold.data.fill_(64.0)
    torch.testing.assert_close(swapped(x.double()), model(x.double()), rtol=0, atol=0.05)


def test_thresholds_leave_the_least_squared_error():
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    swapped = swap_relu(nn.Sequential(nn.Identity(), nn.ReLU()), 4, x)
    theta = swapped.get_submodule("1").threshold.item()

    def missed(threshold):
        return (QCFS(4, threshold)(x) - x.relu()).square().sum().item()

    assert missed(theta) <= min(missed(float(x.max()) * k / 100) for k in range(1, 101)) + 1e-6


def test_without_positive_values_and_without_data_the_threshold_is_the_given_one():
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2))
    for swapped in (swap_relu(model, 4, -torch.ones(2, 3), 2.5), swap_relu(model, 4, threshold=2.5)):
        assert swapped.get_submodule("0").threshold.item() == 2.5


def test_names_that_are_taken_are_left_alone():
    model = Lambda(lambda self, x: F.relu(self.qcfs1(x)), qcfs1=nn.Linear(3, 3))
    assert {"qcfs1.weight", "qcfs2.threshold"} <= set(swap_relu(model, 2).state_dict())


def test_the_copy_trains_and_keeps_the_mode():
    model = every().train()
    swapped = swap_relu(model, 4, torch.randn(8, 3, 4, 4))
    assert swapped.training
    assert swapped.get_submodule("block.0.bn").training
    swapped(torch.randn(8, 3, 4, 4)).square().sum().backward()
    assert all(p.grad is not None for p in swapped.parameters())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        (nn.Linear(3, 2), "usage", "Linear calls no relu"),
        (nn.Sequential(nn.Linear(3, 2), nn.ReLU6()), "usage", "Sequential calls no relu"),
        (Lambda(lambda x: F.relu(x) if x.sum() > 0 else x), "trace", "cannot be traced"),
        (Lambda(lambda self, x: F.dropout(F.relu(x), training=self.training), a=nn.Identity()), "trace", "in training"),
        (Lambda(lambda x: F.relu(x) + torch.rand(3)), "unsupported", "outputs differ by"),
        (Lambda(lambda x: F.relu(x).reshape(2, 2)), "data", r"fails on data of shape \[5, 3\]"),
        (Lambda(lambda x: F.relu(x) / 0), "data", "no tensor of finite values"),
    ],
)
def test_what_the_exchange_refuses(model, code, words):
    with pytest.raises(SpirError, match=words) as caught:
        swap_relu(model, 4, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    assert caught.value.code == code
    assert "fix: " in str(caught.value)


def test_a_hook_that_changes_values_is_not_lost():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    model.register_forward_hook(lambda *call: call[-1] + 1)
    with pytest.raises(SpirError, match="does something that its trace does not show"):
        swap_relu(model, 4, torch.randn(5, 3))


# the trace


def test_a_trace_reads_one_op_for_each_module_and_computes_the_same():
    torch.manual_seed(0)
    x = torch.randn(16, 3, 4, 4)
    swapped = swap_relu(every(), 4, x)
    for model in (swapped, nn.Sequential(nn.Sequential(nn.Identity(), swapped)), swap_relu(every(), 3)):
        module = TorchFx().read(model, x[:2])
        ops = {node.result: node.op for node in module.nodes if isinstance(node.op, Qcfs)}
        assert len(ops) == len(PATHS)
        assert sum(node.op.name == "relu" for node in module.nodes) == 0
        thresholds = {m.threshold.item() for m in model.modules() if isinstance(m, QCFS)}
        assert {op.threshold.values.item() for op in ops.values()} == thresholds
        expected = copy.deepcopy(model).double()(x.double()).detach().numpy()
        found = run(module, x.double().numpy(), keep="*")[module.output]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_module_written_by_hand_is_read_with_its_path():
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(QCFS(5, 0.75)), nn.Linear(3, 2))
    module = TorchFx().read(model, torch.randn(2, 4))
    (node,) = (node for node in module.nodes if isinstance(node.op, Qcfs))
    assert node.op == Qcfs(5, Array.of([0.75]))
    assert "1.0" in str(node.origin)
    assert "QCFS" in str(node.origin)


@pytest.mark.parametrize(("value", "words"), [(-1.0, "a threshold of -1"), (math.nan, "NaN")])
def test_a_threshold_that_training_ruined_is_refused(value, words):
    model = nn.Sequential(nn.Linear(4, 3), QCFS(4))
    model[1].threshold.data.fill_(value)
    with pytest.raises(SpirError, match=words) as caught:
        TorchFx().read(model, torch.randn(2, 4))
    assert "from: 1 (QCFS" in str(caught.value)


# the trained networks


@pytest.mark.parametrize("name", TUNED)
def test_trained_networks_load_and_are_read(name):
    path = WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip("not trained yet")
    model = TUNED[name](path)
    sites = [m for m in model.modules() if isinstance(m, QCFS)]
    assert len(sites) == (4 if name == "qcfs_lenet5" else 19)
    assert all(m.threshold > 0 for m in sites)
    shape = (1, 28, 28) if name == "qcfs_lenet5" else (3, 32, 32)
    module = TorchFx().read(model, torch.rand(2, *shape))
    assert sum(isinstance(node.op, Qcfs) for node in module.nodes) == len(sites)
