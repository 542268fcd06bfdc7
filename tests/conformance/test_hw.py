"""The hw backend equals the interpreter, merged and frame by frame, and says where its registers are too narrow."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from spir import interpreter
from spir.backends import _hw_kernels as kernels
from spir.backends import _hw_threads as threads
from spir.backends.hw import Hw
from spir.conformance.examples import module_of, stored_input
from spir.discovery import find, names
from spir.errors import SpirError
from spir.ir import Array, Module, infer
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.conv2d import Conv2d
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.mix import Mix
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.types import Current, Int, Interval, Real, Scale, Spikes, Tensor
from tests.conformance.networks import conv, spiking

MODES = ("auto", "off")
HW_OPS = [*(cls.name for cls in kernels.KERNELS), "encode", "integrate", "neuron_stem", "quantize", "requant"]


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def on_integers(corner) -> bool:
    return not any(isinstance(type_.encoding, Real) for type_ in corner.values[1])


CORNERS = [
    pytest.param(op, types, id=f"{name}-{i}")
    for name in names("ops")
    for i, (op, types) in enumerate(find("ops", name).corners())
]


@pytest.mark.parametrize(("op", "types"), [p for p in CORNERS if len(set(p.values[1])) == 1])
def test_only_reals_and_mixtures_of_frames_are_refused(op, types):
    module = module_of(types[0], ("y", op, " ".join("x" for _ in types)))
    if list(Hw().refusals(module)):
        assert any(isinstance(t.encoding, Real) for t in module.types.values()) or isinstance(op, Mix)


def test_only_reals_and_ops_of_the_future_are_refused():
    integral = [p.values for p in CORNERS if on_integers(p)]
    assert {op.name for op, _ in integral} >= set(HW_OPS) - {"quantize"}


@pytest.mark.parametrize(("op", "types"), [p for p in CORNERS if len(set(p.values[1])) > 1 and on_integers(p)])
def test_operands_of_several_types_meet(op, types):
    rng = np.random.default_rng(4)
    stored = [stored_input(t, rng) for t in types]
    ranges = [Interval.of(*(t.train.frame if t.train else (t.encoding.lo, t.encoding.hi))) for t in types]
    made = kernels.kernel(op, [t.shape for t in types], ranges)
    expected = op.reference(types, *stored)
    for t in range(types[0].steps):
        frames = [x[t] if types[0].train else x for x in stored]
        moved = [kernels.inner(f, type_.shape) for f, type_ in zip(frames, types, strict=True)]
        shape = infer(op, types).shape
        out = np.empty((len(moved[0]), *kernels.inner_shape(shape)), made.dtype)
        made.act(kernels.Scratch(), out, *moved)
        same(kernels.outer(out, shape).astype(np.int64), expected[t] if types[0].train else expected)


def test_merging_takes_bit_coded_trains_in_front_of_laws_only():
    module = spiking()
    trains = {name for name, t in module.types.items() if t.train}
    assert Hw().prepare(module).merged == trains
    assert not Hw(collapse="off").prepare(module).merged


class Late(NeuronStem):
    """A neuron that hw knows nothing about but its steps."""

    name = "neuron_late"


def test_a_neuron_without_a_law_is_stepped_between_merged_trains(monkeypatch):
    module, told = spiking(), kernels.triple_of
    odd = {id(module.definitions[n].op) for n in ("n1", "n4")}
    monkeypatch.setattr("spir.backends.hw.triple_of", lambda op: None if id(op) in odd else told(op))
    program = Hw().prepare(module)
    assert {name for name, t in module.types.items() if t.train} - program.merged == {"e", "c1", "n2", "d", "s"}
    x = np.random.default_rng(8).standard_normal((5, 3, 9, 8))
    for name, values in interpreter.run(module, x, keep="*").items():
        same(program.run(x, keep="*")[name], values)


WIDE = {
    "float32 sums, window": ([305, 734, 9_000], 2**24 - 1, 2**30),
    "float64 sums": ([305, 734, 11_000_000], 3, 2**24),
    "float64 sums, window": ([305, 734, 11_000_000], 2**24 - 1, 2**48),
    "int64 law": ([305, 734, 11_000_000], 2**28 - 1, 3 * 2**52),
}


@pytest.mark.parametrize("collapse", MODES)
@pytest.mark.parametrize("case", WIDE)
def test_wide_residual_joins(case, collapse):
    factor, mul, div = WIDE[case]
    rng = np.random.default_rng(9)
    scaled = Scaling(factor=Array.of(factor), to=Array.of([0.01]))
    neuron = NeuronStem(8, Array.of([mul, -mul, mul]), Array.of([div // 2, div, -div]), div, 0.02)
    weight = Conv2d(
        weight=Array.of(rng.integers(-127, 128, (3, 3, 3, 3))), weight_scale=Array.of([0.02]), padding=(1,) * 4
    )
    module = module_of(
        Tensor((3, 4, 5), Spikes(8, "bits", 0, 255, Scale.of(0.5))),
        ("c", weight, "x"),
        ("w", scaled, "x"),
        ("s", Add(), "c w"),
        ("n", neuron, "s"),
        ("z", Integrate(), "n"),
    )
    x = stored_input(module.types["x"], rng, 40)
    sums = weight.reference((module.types["x"],), x) + scaled.reference((module.types["x"],), x)
    fired = neuron.reference((module.types["s"],), sums)
    found = Hw(collapse=collapse).prepare(module).run(x, keep="*")
    same(found["s"], sums)
    same(found["n"], fired)


@pytest.mark.parametrize("lo", [-(2**60), -300, 0, 7])
def test_the_law_in_every_type_around_its_thresholds(lo):
    rng = np.random.default_rng(10)
    for _ in range(300):
        bound = int(2 ** rng.uniform(1, 60))
        low, high = max(lo, -bound), max(lo, bound)
        div = int(2 ** rng.uniform(0, 50)) if rng.random() < 0.5 else 2 ** int(rng.integers(0, 50))
        limit = max(1, min(2**30, 2**61 // max(high, -low)))
        mul, add = (
            rng.integers(-limit, limit, 3, endpoint=True),
            rng.integers(-(2**60), 2**60, 3) >> int(rng.integers(60)),
        )
        op = Requant(mul=Array.of(mul), add=Array.of(add), div=div, lo=-8, hi=7, scale=1.0)
        made = kernels.law(op, (3,), Interval.of(low, high))
        steps = np.arange(-9, 10)[:, None] * div - add
        z = np.concatenate([steps // np.where(mul, mul, 1) + k for k in (-1, 0, 1)])
        z = np.clip(np.concatenate([z, rng.integers(low, high, (20, 3), endpoint=True)]), low, high)
        out = np.empty(z.shape)
        made.act(kernels.Scratch(), out, z.astype(kernels.carrier(max(high, -low))))
        exact = (mul.astype(object) * z + add.astype(object)) // div
        np.testing.assert_array_equal(out, np.clip(exact, -8, 7).astype(float))


def test_products_run_in_the_narrowest_type_that_is_proved():
    def dtype(weight: int) -> np.dtype:
        op = Linear(weight=Array.of([[weight, -weight]]), weight_scale=Array.of([1.0]))
        return kernels.kernel(op, [(2,)], [Interval.of(1, 255)]).dtype

    edge = 2**24 // 255  # 255 * edge stays below 2^24
    assert dtype(edge) == np.float32
    assert dtype(edge + 1) == np.float64
    assert dtype(2**53 // 255) == np.float64
    assert dtype(2**53 // 255 + 1) == np.int64


def test_integer_products_beyond_floats_are_exact():
    rng = np.random.default_rng(11)
    wide = Tensor((3, 4, 4), Int(-(2**45), 2**45, Scale.of(1.0)))
    for op in (conv(rng, 4, 3), conv(rng, 3, 1, groups=3), conv(rng, 6, 1, groups=3), AvgPool((2, 2), (1, 1))):
        module = module_of(wide, ("y", op, "x"), ("r", Relu(), "y"))
        x = stored_input(wide, rng)
        same(Hw().prepare(module).run(x, keep="y")["y"], op.reference((wide,), x))


def test_large_images_are_multiplied_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 3000)
    monkeypatch.setattr("spir.backends._hw_program.CHUNK", 1)
    module, x = spiking(), np.random.default_rng(12).standard_normal((3, 3, 9, 8))
    program = Hw().prepare(module)
    assert program.chunk == 1
    for name, values in interpreter.run(module, x, keep="*").items():
        same(program.run(x, keep="*")[name], values)


def test_workers_share_the_samples_and_give_the_blas_threads_back(monkeypatch):
    blas = threads._blas()
    before = blas[0]() if blas else None
    seen = []
    for hands in (1, 3):
        monkeypatch.setattr(threads, "workers", lambda hands=hands: hands)
        monkeypatch.setattr("spir.backends._hw_program.workers", lambda hands=hands: hands)
        x = np.random.default_rng(17).standard_normal((10, 3, 9, 8))
        seen.append(Hw().prepare(spiking()).run(x, keep="n4")["n4"])
    same(*seen)
    assert (blas[0]() if blas else None) == before


def test_an_error_in_a_worker_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(threads, "workers", lambda: 2)

    def work(parts):
        raise ZeroDivisionError(parts[0].start)

    with pytest.raises(ZeroDivisionError):
        threads.share(work, [slice(0, 1), slice(1, 2)])


def test_without_openblas_the_library_keeps_its_threads(monkeypatch):
    monkeypatch.setattr(threads, "_blas", lambda: None)
    with threads.one_thread_a_product():
        assert threads._users == 0


def test_reals_inside_a_network_are_refused_all_at_once():
    real = Tensor((4,), Real())
    module = module_of(
        real,
        ("r", Relu(), "x"),
        ("l", Linear(weight=Array.of(np.eye(4))), "r"),
        ("q", Quantize(scale=0.5, lo=0, hi=3), "l"),
    )
    with pytest.raises(SpirError) as refusal:
        Hw().prepare(module)
    assert str(refusal.value) == (
        "error[backend]: hw computes on integers, and relu works on reals\n"
        "         op: %r = relu %x : tensor<4, real>\n"
        "       from: net.r\n"
        "       also: 1 linear\n"
        "        fix: quantize the network first"
    )


def narrow() -> Module:
    weight = Linear(weight=Array.of([[1, 1], [100, 28], [-1, -2]]), weight_scale=Array.of([1.0]))
    bits = Tensor((2,), Spikes(8, "bits", 0, 255, Scale.of(1.0)))
    return module_of(bits, ("l", weight, "x"), ("z", Integrate(bias=Array.of([0, 128, 0])), "l"))


@pytest.mark.parametrize("collapse", MODES)
def test_a_narrow_accumulator_is_refused_with_its_first_layer(collapse):
    module = narrow()
    for bits in (8, 16):
        with pytest.raises(SpirError) as refusal:
            Hw(collapse=collapse, accumulator=bits).prepare(module)
        first = {8: "the weight sum of %l needs 9 bits", 16: "the accumulator of %z needs 17 bits"}[bits]
        head, op, origin, fix, *more = (line.strip() for line in str(refusal.value).split("\n"))
        code, beyond = {8: ("E-ISUM", "128, 1 beyond"), 16: ("E-VRANGE", "32768, 1 beyond")}[bits]
        assert head == f"error[{code}]: {first} in channel 1, and registers have {bits}: it may be {beyond}"
        assert op.startswith("op: %")
        assert origin == {8: "from: net.l", 16: "from: net.z"}[bits]
        assert "accumulator=17 holds every sum and state" in fix
        wide = "the accumulator of %z needs 17 bits in channel 1, and registers have 8: it may be 32768, 32641 beyond"
        others = [line for line in more if line.startswith("error")]
        assert others == {8: [f"error[E-VRANGE]: {wide}"], 16: []}[bits]
        way = f"scale-integration{{bits={bits}}}, or @sdann{{accumulator={bits}}} keeps states narrow"
        assert way in str(refusal.value)
    x = stored_input(module.types["x"], np.random.default_rng(13))
    found = Hw(collapse=collapse, accumulator=17).prepare(module).run(x)
    same(found["z"], np.tensordot(2 ** np.arange(7, -1, -1), x, 1) @ [[1, 100, -1], [1, 28, -2]] + [0, 128, 0])


def test_a_prefix_counts_towards_the_accumulator():
    scale = Scale.of(1.0)
    module = module_of(Tensor((1,), Spikes(8, "bits", -1, 0, scale)), ("z", Integrate(), "x"))
    assert not list(Hw(accumulator=8).refusals(module))  # -1 passes through -128
    doubled = module_of(module.types["x"], ("d", Add(), "x x"), ("z", Integrate(), "d"))
    refusal = str(next(Hw(accumulator=8).refusals(doubled)))
    assert "the accumulator of %z needs 9 bits in channel 0" in refusal


def test_inputs_that_the_type_does_not_allow_are_refused():
    bits = Tensor((2,), Spikes(2, "bits", -2, 1, Scale.of(1.0)))
    program = Hw().prepare(module_of(bits, ("z", Integrate(), "x")))
    for bad, message in (
        (np.zeros((2, 2)), "the network takes [2, N, 2], and the data is [2, 2]"),
        (np.ones((2, 1, 2)), "frame 0 of the data holds 1..1, and the network takes -1..0"),
        (-np.ones((2, 1, 2)), "frame 1 of the data holds -1..-1, and the network takes 0..1"),
        (np.full((2, 1, 2), 0.5), "the data holds fractions"),
        (np.full((2, 1, 2), "a"), "not numbers"),
    ):
        with pytest.raises(SpirError) as refusal:
            program.run(bad)
        assert refusal.value.code == "data"
        assert message in str(refusal.value)
    current = Tensor((2,), Current(2, "bits", 0, 3, -4, 4, Scale.of(1.0)))
    with pytest.raises(SpirError, match=r"the value of the data holds -12\.\.-12, and the network takes 0\.\.3"):
        Hw().prepare(module_of(current, ("z", Integrate(), "x"))).run(np.full((2, 1, 2), -4))
    reals = module_of(Tensor((2,), Real()), ("q", Quantize(scale=1.0, lo=0, hi=1), "x"))
    with pytest.raises(SpirError, match="2 of 4 values are NaN or infinite"):
        Hw().prepare(reals).run(np.array([[0, np.nan], [np.inf, 2]]))


def test_frames_of_an_input_current_survive_merging():
    current = Tensor((3,), Current(4, "bits", -90, 80, -6, 6, Scale.of(1.0)))
    module = module_of(current, ("s", Add(), "x x"), ("z", Integrate(), "s"))
    x = stored_input(current, np.random.default_rng(14), 50)
    program = Hw().prepare(module)
    assert program.merged == {"x", "s"}
    found = program.run(x, keep="*")
    same(found["x"], x)
    same(found["s"], 2 * x)


def test_trains_of_code_rate_are_stepped_and_sorted_ones_merged():
    for code, lo in (("rate", -5), ("suffix", 0), ("prefix", -5)):
        train = Tensor((3, 2, 2), Spikes(5, code, lo, 5, Scale.of(1.0)))
        module = module_of(train, ("c", conv(np.random.default_rng(15), 2, 3, 1, 0), "x"), ("z", Integrate(), "c"))
        x = None if code == "rate" else stored_input(train, np.random.default_rng(16))
        x = np.random.default_rng(16).integers(-1, 2, (5, 6, 3, 2, 2)) if x is None else x
        program = Hw().prepare(module)
        assert program.merged == (set() if code == "rate" else {"x", "c"})
        expected = module.definitions["c"].op.reference((train,), x)
        same(program.run(x, keep="c")["c"], expected)
        same(program.run(x)["z"], expected.sum(axis=0))


def test_a_run_imports_no_torch():
    code = """
import sys, numpy as np
from spir.backends.hw import Hw
from spir.ir import Module, Node, Value, infer
from spir.ops.quantize import Quantize
from spir.types import Real, Tensor
source, op = Tensor((2,), Real()), Quantize(scale=0.5, lo=0, hi=3)
module = Module(Value("x", source), (Node("q", op, ("x",), infer(op, (source,))),), "q")
print(Hw().prepare(module).run(np.array([[0.25, 9.0]]))["q"].tolist(), "torch" in sys.modules)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.stdout == "[[1, 3]] False\n", shown.stderr


@pytest.mark.parametrize("top", [2**24, 2**25, 2**53 // 4])
def test_constants_of_full_shape_are_added_in_a_type_that_holds_the_sum(top):
    add = top + np.arange(12).reshape(3, 2, 2) * 2 + 1
    op = Requant(Array.of([1]), Array.of(add), 1, 0, 2 * top, 1.0)
    module = module_of(Tensor((3, 2, 2), Int(-1, 1, Scale.of(1.0))), ("y", op, "x"))
    x = np.random.default_rng(0).integers(-1, 2, (5, 3, 2, 2))
    np.testing.assert_array_equal(Hw().prepare(module).run(x)["y"], x + add)
