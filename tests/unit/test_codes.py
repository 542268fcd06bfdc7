"""Diagnostics of the methods: every failure that theory names is diagnosed, shown to be impossible, or not there yet.

`TABLE` lists all of them. A code that is diagnosed stands in `spir.errors.CODES` and is provoked below; one that cannot
happen has a test below that says why; one that is not there yet names what has to come first, and nothing raises it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spir
from spir import interpreter
from spir.driver import backend_of
from spir.errors import CODES, SpirError, SpirWarning
from spir.frontends.modules.qcfs import QCFS
from spir.ir import Array, Module, Op
from spir.ops.add import Add
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_ca_lif import NeuronCaLif
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.scale import Scaling
from spir.schedule import Delay, schedule
from spir.text import parse
from spir.types import Current, Int, Scale, Spikes, Tensor
from tests.unit.lambdas import Lambda
from tests.unit.small_networks import network, op_of, ops_of, run

DIAGNOSED, CANNOT, LATER = "diagnosed", "cannot happen", "not yet"
PTL, IC_SNN = "no tandem learning", "no IC-SNN passes"
DARWIN3 = "no backend for Darwin3"

# code: (methods, whether it applies, why)
TABLE = {
    "E-SCALE": ("all", DIAGNOSED, "zero points do not exist; unequal channel scales fold into weights or are refused"),
    "E-ROUND": ("all", CANNOT, "one rule, halves up, in quantisers, integer network and neurons"),
    "E-MAXPOOL": ("Ca-LIF, STEM, rate", DIAGNOSED, "by the type of the op, and by the pass that lowers pools"),
    "E-RESID-SCALE": ("all", DIAGNOSED, "by the type of a sum, and by the pass that mends joins"),
    "E-RESID-DELAY": (
        "STEM, parallel",
        DIAGNOSED,
        "by hw, for a pipeline without delays; else trains carry no clock, and delays follow from the depth",
    ),
    "E-LEAK-FLUSH": ("Ca-LIF", CANNOT, "every frame of the window brings its share, with or without spikes"),
    "E-LEAK-FRAC": ("Ca-LIF, PTL", CANNOT, "shares are whole numbers that add up to the bias"),
    "E-BURST": (
        "Ca-LIF",
        DIAGNOSED,
        "by the type of a neuron of one spike a step; the pass that fuses it adds the drain",
    ),
    "E-CAP": (
        "Ca-LIF, rate",
        DIAGNOSED,
        "by encoder, neuron and derivation; a warning where counts are cut to a window",
    ),
    "E-TIE-LOOP": ("Ca-LIF", CANNOT, "a neuron rounds once, and ties go up"),
    "E-GATE-LAG": ("Ca-LIF", CANNOT, "the gate is the current count"),
    "E-ROUND-ORDER": ("Ca-LIF", CANNOT, "a neuron rounds behind the last frame of its operand, so layers do in turn"),
    "E-SIGNED-SPIKE": ("Ca-LIF", DIAGNOSED, "by hw, for chips whose profile says that they send none"),
    "E-VRANGE": ("all", DIAGNOSED, "every register has a proved bound"),
    "E-ISUM": ("STEM, all", DIAGNOSED, "the sum of one step has a register of its own"),
    "E-SCALED": ("STEM", DIAGNOSED, "a note with the bound of every layer; only bits are scaled"),
    "E-CALIB-OVF": ("STEM", DIAGNOSED, "r from data and a register that wraps"),
    "E-SIGN-BIT": ("STEM", CANNOT, "the sign bit is a spike of -1 in the first frame"),
    "E-FLOORBIAS": ("STEM, PTL", CANNOT, "the half stands in `add`"),
    "E-T-NE-L": ("parallel", DIAGNOSED, "a warning without calibration data, which mend the mean errors"),
    "E-FP-TIE": ("parallel", DIAGNOSED, "a note where thresholds are floats; on integers ties are exact"),
    "E-ORDER-MIX": ("parallel", DIAGNOSED, "by the type of a concatenation; a sum of both orders is of code rate"),
    "E-EARLY-EXIT": ("STEM, parallel", CANNOT, "a readout reads all frames, and fewer are refused"),
    "E-ANALOG-IN": ("parallel, PTL, IC-SNN", DIAGNOSED, "a note of parallel neurons; STEM encodes its input"),
    "E-BN-EPS": ("PTL", CANNOT, "the fold takes the layer's own eps"),
    "E-COUNT-SCALE": ("PTL, IC-SNN", LATER, f"{PTL}, {IC_SNN}"),
    "E-V0": ("IC-SNN", LATER, IC_SNN),
    "E-DIVISOR": ("Darwin3 STEM", DIAGNOSED, "by hw, for chips whose profile has no multiplier"),
    "E-REARM": ("Darwin3 STEM", LATER, DARWIN3),
    "E-IDENT": ("residual", CANNOT, "an identity branch gets multipliers of stated width, or rescaling neurons"),
    "E-MULT-RANGE": ("all", DIAGNOSED, "where a channel lives; a dead one takes the scale of a live one"),
    "E-PAD-OFFSET": ("Ca-LIF, parallel", CANNOT, "an offset before padding differs from place to place"),
    "E-PHI-DEAD": ("parallel", DIAGNOSED, "a note with the channels, whose phi stays 0"),
    "W-RECON": (
        "IC-SNN, DRLO, pipelining",
        DIAGNOSED,
        "a note with the reading of DRLO; reports say so of the latency and the interval",
    ),
}
METHOD = re.compile(r"[EW]-[A-Z0-9]+(?:-[A-Z0-9]+)*")
LITERAL = re.compile(rf'"({METHOD.pattern})"')

X = np.random.default_rng(0).normal(size=(6, 2, 6, 6)).astype(np.float32)
BACKENDS = ("serial", "parallel", "hw", "hw{collapse=off}")

shown: dict[str, str] = {}


def shows(code: str) -> Callable[[Callable], Callable]:
    """Marks the test that shows why a failure cannot happen."""

    def mark(test: Callable) -> Callable:
        shown[code] = test.__name__
        return test

    return mark


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> None:
    """Where reproducers go."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def conv(inputs: int, outputs: int, seed: int = 0, factor: float = 1.0) -> nn.Conv2d:
    torch.manual_seed(seed)
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    with torch.no_grad():
        layer.weight *= factor
        layer.bias *= factor
    return layer


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).eval()


# --- diagnosed ----------------------------------------------------------------------------------------------------


def read(*lines: str, of: str, **arrays) -> None:
    """Module text on ``%x`` whose output is its last line's value; ``@name`` is an array of keyword ``name``."""
    held = {name: Array.of(values) for name, values in arrays.items()}
    body = "\n".join(re.sub(r"@(\w+)", lambda m: f"@{m[1]}#{held[m[1]].digest}", line) for line in lines)
    output = lines[-1].split(" = ")[0]
    parse(f"module {{\n input %x : {of}\n {body}\n output {output}\n}}\n", held)


def constants_mixed_by_a_permutation() -> None:
    model = Lambda(
        lambda s, x: s.b((F.relu(s.a(x)) * s.g).permute(0, 2, 1, 3)),
        a=conv(2, 3),
        b=conv(6, 2),
        g=nn.Buffer(torch.tensor([1.0, 3.0, 0.1]).view(3, 1, 1)),
    )
    spir.compile(model, "@stem", data=X)


def unequal_channels_in_a_sum() -> None:
    read(
        '%a = quantize %x {scale = 1.0, lo = 0, hi = 7} : tensor<1, int[0, 7] * 1.0>  from "a"',
        '%b = quantize %x {scale = 0.5, lo = 0, hi = 7} : tensor<1, int[0, 7] * 0.5>  from "b"',
        f'%c = concat %a, %b : tensor<2, int[0, 7] * {Scale.of([1.0, 0.5])}>  from "cat"',
        '%y = linear %c {weight = @w, weight_scale = @s} : tensor<1, int[0, 14] * 1.0>  from "fc"',
        of="tensor<1, real>",
        w=[[1, 1]],
        s=[1.0],
    )


def one_spike_where_a_step_brings_more() -> None:
    read(
        "%y = neuron_ca_lif %x {steps = 2, mul = @m, add = @a, div = 5, lo = 0, hi = 3, scale = 1.0, mode = single}"
        ' : tensor<1, spikes[3, rate, 0..3, frame -1..1] * 1.0>  from "a"',
        of="tensor<1, current[2, rate, -28..28, frame -14..14] * 1.0>",
        m=[1],
        a=[2],
    )


def more_codes_than_a_window_has_steps() -> None:
    short = "canonicalize, calibrate-range, quantize, propagate-scales, derive-thresholds{neuron=ca-lif, steps=128}"
    spir.compile(sequential(conv(2, 3), nn.ReLU(), conv(3, 2)), short, data=X)


def a_maximum_of_bits() -> None:
    read(
        '%p = max_pool %x {kernel = [2, 2], stride = [1, 1]} : tensor<1x1x1, spikes[1, bits, 0..1] * 1.0>  from "pool"',
        of="tensor<1x2x2, spikes[1, bits, 0..1] * 1.0>",
    )


def a_maximum_of_sums_to_lower() -> None:
    spir.compile(sequential(conv(2, 3), nn.MaxPool2d(2)), "@stem{max_pool=lower}", data=X)


def branches_as_they_are() -> None:
    read(
        "%a = quantize %x {scale = 0.5, lo = 0, hi = 7} : tensor<1, int[0, 7] * 0.5>",
        "%b = quantize %x {scale = 0.25, lo = 0, hi = 7} : tensor<1, int[0, 7] * 0.25>",
        '%y = add %a, %b : tensor<1, int[0, 14] * 0.5>  from "add"',
        of="tensor<1, real>",
    )


def branches_too_far_apart() -> None:
    model = Lambda(lambda s, x: F.relu(F.relu(s.a(x)) + s.b(x)), a=conv(2, 2), b=conv(2, 2, 1, factor=1e-6))
    quantised = spir.compile(model, "calibrate-range, quantize", data=X).module
    spir.compile(quantised, "propagate-scales{width=13}")


def a_step_that_no_multiplier_reaches() -> None:
    spir.compile(sequential(conv(2, 3), nn.Hardtanh(-1e-30, 1e-30), conv(3, 2)), "@stem", data=X)


def on_a_chip(*lines: tuple[str, Op, str], backend: str, signed: bool = False) -> None:
    bits = Spikes(8, "bits", -128 if signed else 0, 127 if signed else 255, Scale.of(1.0))
    backend_of(backend).prepare(network(*lines, shape=(2,), encoding=bits))


def registers_of_eight_bits() -> None:
    ones = Linear(weight=Array.of([[1, 1]]), weight_scale=Array.of([1.0]))
    on_a_chip(("a", ones, "x"), ("y", Integrate(), "a"), backend="hw{accumulator=8}")


def sums_of_eight_bits() -> None:
    on_a_chip(
        ("a", Linear(weight=Array.of([[100, 100]]), weight_scale=Array.of([1.0])), "x"), backend="hw{accumulator=8}"
    )


def signs_on_a_chip_without() -> None:
    counts = network(("a", Encode(9, "isi"), "x"), shape=(2,), encoding=Int(-9, 9, Scale.of(1.0)))
    backend_of("hw{profile=speck}").prepare(counts)


def a_multiplier_on_a_chip_without() -> None:
    stem = NeuronStem(4, Array.of([3]), Array.of([0]), 64, 1.0)
    on_a_chip(("a", stem, "x"), backend="hw{profile=darwin3}")


def a_pipeline_in_which_nothing_waits() -> None:
    spir.compile(Skipping().eval(), "@stem{bits=5}", data=X, backend="hw{pipeline=two, delays=off}")


def a_scale_from_data_that_wraps() -> None:
    passes = "@stem, scale-integration{r=data, overflow=wrap}"
    spir.compile(sequential(conv(2, 3), nn.ReLU(), conv(3, 2)), passes, data=X)


def a_bias_beyond_all_registers() -> None:
    model = sequential(conv(2, 3), nn.ReLU(), conv(3, 2))
    with torch.no_grad():
        model[-1].bias[0] = 1e20
    spir.compile(model, "@stem{bits=16}", data=X)


def sums_beyond_all_registers() -> None:
    read(
        '%y = linear %x {weight = @w, weight_scale = @s} : tensor<1, int[0, 9] * 1.0>  from "fc"',
        of="tensor<4, int[0, 4611686018427387903] * 1.0>",
        w=[[1] * 4],
        s=[1.0],
    )


def trains_of_both_orders() -> None:
    read(
        '%a = encode %x {steps = 3, code = "suffix"} : tensor<1x2x2, spikes[3, suffix, 0..3] * 1.0>',
        '%b = encode %x {steps = 3, code = "prefix"} : tensor<1x2x2, spikes[3, prefix, 0..3] * 1.0>',
        '%c = concat %a, %b : tensor<2x2x2, spikes[3, suffix, 0..3] * 1.0>  from "cat"',
        "%y = max_pool %c {kernel = [2, 2], stride = [1, 1]} : tensor<2x1x1, spikes[3, suffix, 0..3] * 1.0>",
        of="tensor<1x2x2, int[0, 3] * 1.0>",
    )


# code, what provokes it, the place in the model, a word of the way out
PROVOKED = [
    (
        "E-SCALE",
        constants_mixed_by_a_permutation,
        "permute (permute, test_codes.py line ",
        "one constant for all channels",
    ),
    ("E-SCALE", unequal_channels_in_a_sum, "fc", "one constant for all channels"),
    ("E-MAXPOOL", a_maximum_of_bits, "pool", "add lower-max-pool before derive-thresholds"),
    ("E-MAXPOOL", a_maximum_of_sums_to_lower, "1 (MaxPool2d", "leave lower-max-pool out"),
    ("E-ORDER-MIX", trains_of_both_orders, "cat", "one order for all layers"),
    ("E-BURST", one_spike_where_a_step_brings_more, "a", "drain = 3 is proved to do, or mode = multi"),
    ("E-CAP", more_codes_than_a_window_has_steps, "1 (ReLU", "steps=255, or shorten-window{steps=128} before"),
    ("E-RESID-SCALE", branches_as_they_are, "add", "propagate-scales{join=wide} or {join=rescale}"),
    ("E-RESID-SCALE", branches_too_far_apart, "add (add, test_codes.py line ", "propagate-scales{join=rescale}"),
    ("E-RESID-DELAY", a_pipeline_in_which_nothing_waits, "add", "delays=on, which keeps 10 frames of it"),
    ("E-MULT-RANGE", a_step_that_no_multiplier_reaches, "1 (Hardtanh", "more bits for the multipliers"),
    ("E-VRANGE", registers_of_eight_bits, "net.y", "scale-integration{bits=8}"),
    ("E-ISUM", sums_of_eight_bits, "net.a", "fewer weight bits, split fan-in, or propagate-scales{join=rescale}"),
    ("E-SIGNED-SPIKE", signs_on_a_chip_without, "net.a", "quantize{input=unsigned}"),
    ("E-DIVISOR", a_multiplier_on_a_chip_without, "net.a", "scale-integration{bits=16, divisor=255}"),
    ("E-CALIB-OVF", a_scale_from_data_that_wraps, "1 (ReLU", "r=guaranteed"),
    ("E-VRANGE", a_bias_beyond_all_registers, "2 (Conv2d", "fewer bits"),
    ("E-VRANGE", sums_beyond_all_registers, "fc", "fewer bits"),
]


@pytest.mark.parametrize(
    ("code", "provoke", "place", "fix"), PROVOKED, ids=[f"{code}: {f.__name__}" for code, f, *_ in PROVOKED]
)
def test_a_failure_is_diagnosed_with_its_code_its_place_and_the_way_out(code, provoke, place, fix):
    with pytest.raises(SpirError) as caught:
        provoke()
    (found,) = caught.value.diagnostics
    notes = {note.label: note.text for note in found.notes}
    assert found.code == code
    assert notes["from"].startswith(place)
    assert fix in notes["fix"]


def quantised(levels: int) -> nn.Module:
    return sequential(conv(2, 3), QCFS(levels), conv(3, 2))


def steps_without_data() -> str:
    with pytest.warns(SpirWarning) as told:
        spir.compile(quantised(8), "calibrate-qcfs{steps=4}", example=X)
    return str(told[0].message)


def notes_of(model: nn.Module, passes: str) -> str:
    return "\n".join(note for entry in spir.compile(model, passes, data=X).journal for note in entry.notes)


def an_input_as_it_is() -> str:
    return notes_of(quantised(4), "@parallel{steps=4}")


def float_thresholds() -> str:
    return notes_of(quantised(4), "calibrate-range, quantize{float_weights=true}, derive-thresholds{neuron=parallel}")


def a_channel_that_stays_silent() -> str:
    model = quantised(8)
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 0.1 / 8
    return notes_of(model, "calibrate-qcfs{steps=2}")


def sums_of_fourteen_bits() -> str:
    return notes_of(sequential(conv(2, 3), nn.ReLU(), conv(3, 2)), "@stem, scale-integration{bits=14}")


def a_reading_of_drlo() -> str:
    return notes_of(sequential(conv(2, 3), nn.ReLU(), conv(3, 2)), "@stem, sparsify{drlo=3, mode=window}")


# code, what tells of it, the lines of the message
TOLD = [
    (
        "E-T-NE-L",
        steps_without_data,
        """warning[E-T-NE-L]: T = 4 steps for L = 8 levels are not lossless
        fix: give calibration data, or take as many steps as the model has levels""",
    ),
    ("E-ANALOG-IN", an_input_as_it_is, "note[E-ANALOG-IN]: %x.clip stays an integer"),
    ("E-FP-TIE", float_thresholds, "note[E-FP-TIE]: %_1.code: float sums meet float thresholds"),
    ("E-SCALED", sums_of_fourteen_bits, "note[E-SCALED]: %_1: r = 5, guaranteed: bounded, "),
    ("W-RECON", a_reading_of_drlo, "note[W-RECON]: DRLO, reading window, is a reconstruction"),
    ("E-PHI-DEAD", a_channel_that_stays_silent, "note[E-PHI-DEAD]: %_1: channels 1 never spike at T = 2, so phi = 0"),
]


@pytest.mark.parametrize(("code", "tell", "text"), TOLD, ids=[code for code, *_ in TOLD])
def test_a_finding_that_stops_nothing_is_told(code, tell, text):
    assert text in tell()
    assert f"[{code}]" in text


# --- cannot happen ------------------------------------------------------------------------------------------------


def halved() -> Module:
    """Reals divided into ones and then into twos: every odd number is a tie."""
    return network(
        ("a.code", Quantize(1.0, -128, 127), "x"),
        ("a", Dequantize(), "a.code"),
        ("s", Linear(Array.of([[1]]), Array.of([1.0])), "a"),
        ("b.code", Quantize(2.0, 0, 255), "s"),
        ("b", Dequantize(), "b.code"),
        ("y", Linear(Array.of([[1]]), Array.of([1.0])), "b"),
        shape=(1,),
    )


def leaking(*frames: int, steps: int, threshold: int = 10, leak: int = 0) -> np.ndarray:
    """What a calcium-gated neuron emits."""
    op = NeuronCaLif(steps, Array.of([1]), Array.of([leak + threshold // 2]), threshold, 0, 99, 1.0)
    type_ = Tensor((1,), Current(len(frames), "rate", -999, 999, -99, 99, Scale.of(1)))
    return op.reference((type_,), np.array(frames).reshape(-1, 1, 1)).reshape(-1)


@shows("E-LEAK-FLUSH")
def test_a_neuron_without_a_spike_to_read_integrates_its_whole_bias():
    assert leaking(0, 0, 0, 0, steps=4, leak=36).tolist() == [0, 1, 1, 1, 1]


@shows("E-LEAK-FRAC")
def test_shares_of_a_bias_that_no_window_divides_add_up_to_it():
    for leak in range(300):
        assert leaking(*[0] * 7, steps=7, threshold=1, leak=leak).sum() == min(leak, 99)


@shows("E-TIE-LOOP")
def test_a_tie_is_rounded_once_and_up():
    assert leaking(5, steps=1).tolist() == [0, 1]
    assert leaking(15, -10, steps=2).tolist() == [1, 0, 0]  # -5 behind one spike stays


@shows("E-GATE-LAG")
def test_no_count_falls_below_zero_however_many_spikes_a_step_brings():
    assert leaking(9, -11, steps=2, threshold=1).tolist() == [9, -9, 0]


@shows("E-ROUND-ORDER")
def test_what_one_layer_rounds_the_next_one_reads_before_it_rounds():
    rounded = leaking(5, steps=1)
    assert len(leaking(*rounded, steps=1, threshold=1)) == len(rounded) + 1
    assert leaking(*rounded, steps=1, threshold=1).sum() == 1


EVERY = np.arange(-128, 128, dtype=np.float64)[:, None]


@shows("E-ROUND")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_up_in_quantisers_in_the_integer_network_and_in_neurons(backend):
    wanted = 2 * np.clip(np.floor(EVERY / 2 + 0.5), 0, 255)
    integer = run(halved(), "propagate-scales")
    spiking = spir.compile(integer, "derive-thresholds, fuse-neuron", backend=backend)
    np.testing.assert_array_equal(interpreter.run(halved(), EVERY, "b")["b"], wanted)
    np.testing.assert_array_equal(integer.types["b"].decode(interpreter.run(integer, EVERY, "b")["b"]), wanted)
    np.testing.assert_array_equal(spiking.trace(EVERY)["b"].decoded, wanted)
    np.testing.assert_array_equal(spiking(EVERY), wanted)


@shows("E-FLOORBIAS")
def test_the_half_stands_in_the_neuron_and_without_it_a_neuron_would_lose_half_a_step():
    module = run(halved(), "propagate-scales, derive-thresholds, fuse-neuron")
    (neuron,) = (node.op for node in ops_of(module, NeuronStem))
    assert neuron.add.values.tolist() == [neuron.div // 2]
    assert 2 * neuron.mul.values.tolist()[0] == neuron.div
    z, mul, div = np.arange(10_000), 299, 1024  # ratios of any fraction
    kept, lost = (((mul * z + add) // div - mul * z / div).mean() for add in (div // 2, 0))
    assert abs(kept) < 0.01
    assert abs(lost + 0.5) < 0.01


@shows("E-SIGN-BIT")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sign_is_a_negative_spike_so_that_signed_and_unsigned_trains_add_up(backend):
    module = network(
        ("s", Quantize(1.0, -128, 127), "x"),
        ("s.train", Encode(8), "s"),
        ("u", Quantize(1.0, 0, 255), "x"),
        ("u.train", Encode(8), "u"),
        ("sum", Add(), "s.train u.train"),
        ("y", Integrate(), "sum"),
        shape=(1,),
    )
    found = spir.compile(module, [], backend=backend).trace(EVERY)
    assert [(f.min(), f.max()) for f in found["s.train"].frames] == [(-1, 0)] + [(0, 1)] * 7
    np.testing.assert_array_equal(found["y"].decoded, EVERY + EVERY.clip(0))


class Skipping(nn.Module):
    """A skip connection over two layers of neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = conv(2, 3), conv(3, 3, 1), conv(3, 3, 2), conv(3, 3, 3)

    def forward(self, x):
        x = F.relu(self.a(x))
        return F.relu(self.d(F.relu(self.c(F.relu(self.b(x))))) + x)


def test_the_shorter_branch_of_a_join_waits_as_long_as_its_depth_says():
    snn = spir.compile(Skipping().eval(), "@stem{bits=5}", data=X)
    (late,) = schedule(snn.module).delays
    assert late == Delay(late.result, late.operand, windows=2, steps=10)
    assert snn.module.definitions[late.result].op == Add()
    assert str(snn.module.definitions[late.operand].origin).startswith("add")
    integer = snn.stages[-3].module
    np.testing.assert_array_equal(snn.trace(X)["relu_3"].decoded, decoded(integer, X, "relu_3"))


def decoded(module: Module, x: np.ndarray, name: str) -> np.ndarray:
    return module.types[name].decode(interpreter.run(module, x, name)[name])


def test_a_weight_sum_beyond_its_register_is_refused_before_anything_runs():
    model = sequential(conv(2, 3), nn.ReLU(), conv(3, 2))
    snn = spir.compile(model, "@stem", data=X, backend="hw")
    with pytest.raises(SpirError, match=r"the weight sum of %.* needs .* registers have 8") as caught:
        spir.compile(snn.module, [], backend="hw{accumulator=8}")
    enough = int(re.search(r"accumulator=(\d+) holds every sum", str(caught.value))[1])
    with pytest.raises(SpirError, match=rf"needs {enough} bits .* registers have {enough - 1}"):
        spir.compile(snn.module, [], backend=f"hw{{accumulator={enough - 1}}}")
    narrow = spir.compile(snn.module, [], backend=f"hw{{accumulator={enough}}}")
    np.testing.assert_array_equal(narrow(X), snn(X))


@shows("E-EARLY-EXIT")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_readout_and_a_neuron_of_fewer_bits_read_all_frames(backend):
    module = network(
        ("n", NeuronStem(3, Array.of([1]), Array.of([0]), 32, 32.0), "x"),
        ("y", Integrate(), "n"),
        shape=(1,),
        encoding=Spikes(8, "bits", 0, 255, Scale.of(1.0)),
    )
    snn = spir.compile(module, [], backend=backend)
    frames = (np.arange(256) >> np.arange(7, -1, -1)[:, None] & 1)[..., None]
    np.testing.assert_array_equal(snn(frames)[:, 0], np.arange(256) // 32 * 32)
    with pytest.raises(SpirError) as caught:
        snn(frames[:7])
    assert caught.value.code == "data"
    assert "takes [8, N, 1], and the data is [7, 256, 1]" in str(caught.value)


@shows("E-BN-EPS")
def test_a_fold_takes_the_eps_of_the_layer_and_one_without_would_differ():
    norm = nn.BatchNorm2d(3, eps=0.5)
    with torch.no_grad():
        norm.running_var.copy_(torch.tensor([0.01, 0.2, 1.0]))
        norm.running_mean.copy_(torch.tensor([0.3, -0.2, 0.1]))
    model = sequential(conv(2, 3), norm, nn.ReLU()).double()
    folded = spir.compile(model, "fold-bn", data=X).module
    assert not [node for node in folded.nodes if node.op.name == "batch_norm"]
    with torch.no_grad():
        wanted = model(torch.from_numpy(X).double()).numpy()
        norm.eps = 0.0
        without = model(torch.from_numpy(X).double()).numpy()
    np.testing.assert_allclose(interpreter.run(folded, X)[folded.output], wanted, rtol=1e-10, atol=1e-12)
    assert np.abs(without - wanted).max() > 0.5 * np.abs(wanted).max()


@shows("E-IDENT")
@pytest.mark.parametrize("join", ["wide", "rescale"])
def test_an_identity_branch_beyond_eight_bits_gets_wide_multipliers_or_rescaling_neurons(join):
    model = Lambda(lambda s, x: F.relu(s.b(y := F.relu(s.a(x))) + y), a=conv(2, 3), b=conv(3, 3, 1, factor=0.1))
    snn = spir.compile(model.eval(), f"@stem{{join={join}}}", data=X)
    factors = [factor for node in ops_of(snn.module, Scaling) for factor in node.op.factor.values.tolist()]
    neurons = [node.result for node in ops_of(snn.module, NeuronStem)]
    if join == "wide":
        assert max(factors) > 127
        assert neurons == ["relu", "relu_1"]
    else:
        assert all(factor & (factor - 1) == 0 for factor in factors)
        assert len(neurons) == 3
    with torch.no_grad():
        wanted = model(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(snn(X), wanted, rtol=0, atol=0.02 * np.abs(wanted).max())
    integer = next(s.module for s in snn.stages if s.name == "propagate-scales")
    np.testing.assert_array_equal(snn.trace(X)["relu_1"].decoded, decoded(integer, X, "relu_1"))


@shows("E-PAD-OFFSET")
@pytest.mark.filterwarnings("ignore:.*the calibration data may not be what the model was trained on")
def test_zero_padding_behind_an_offset_stays_zero():
    norm = nn.BatchNorm2d(2)
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([-2.0, 3.0]))
    model = sequential(norm, conv(2, 3), nn.ReLU(), conv(3, 2))
    snn = spir.compile(model, "@stem", data=X)
    with torch.no_grad():
        wanted = F.relu(model[1](norm(torch.from_numpy(X)))).numpy()
    (neuron, *_) = (node for node in snn.module.nodes if isinstance(node.op, NeuronStem))
    assert neuron.op.add.values.shape == neuron.type.shape
    np.testing.assert_allclose(snn.trace(X)[neuron.result].decoded, wanted, rtol=0, atol=0.02 * wanted.max())


def test_a_dead_channel_takes_the_multiplier_of_a_live_one():
    layer = conv(2, 3)
    with torch.no_grad():
        layer.weight[1] = 0
        layer.bias[1] = -1
    snn = spir.compile(sequential(layer, nn.ReLU(), conv(3, 2)), "@stem", data=X)
    assert op_of(snn.module, "_1").mul.values.min() >= 2**22


# --- all of them --------------------------------------------------------------------------------------------------


def test_every_diagnostic_of_the_methods_is_provoked_or_shown_to_be_impossible_or_not_there_yet(repository):
    folders = (repository / name for name in ("spir", "passes", "backends", "frontends"))
    sources = (path for folder in folders for path in folder.rglob("*.py") if path.name != "errors.py")
    raised = {code for path in sources for code in LITERAL.findall(path.read_text("utf-8"))}
    provoked = {code for code, *_ in (*PROVOKED, *TOLD)}
    listed = {code for code in CODES if METHOD.fullmatch(code)}
    named = {state: {code for code, (_, s, _) in TABLE.items() if s == state} for state in (DIAGNOSED, CANNOT, LATER)}
    assert sum(map(len, named.values())) == len(TABLE)
    assert all(methods and why for methods, _, why in TABLE.values())
    assert provoked == named[DIAGNOSED], "a diagnosed code needs something that provokes it, and only such a code"
    assert set(shown) == named[CANNOT], "a failure that cannot happen needs a test that shows it, and only such a one"
    assert listed == named[DIAGNOSED], "spir.errors.CODES and this table differ"
    assert raised == named[DIAGNOSED], "the sources raise other codes than this table says"
