"""Text: every module reads back, equality sees every field and weight, and no text escapes with a bare exception."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import attrs
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from spir.discovery import find, names
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops._thinning import READINGS
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.neuron_stem import NeuronStem
from spir.ops.pad import Pad
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.text import parse, show
from spir.types import Current, Encoding, Int, Real, Scale, Spikes, Tensor
from spir.verify import verify

ALPHABET = string.ascii_letters + "_"


@attrs.frozen
class Dice:
    """Random fields of ops: drawn from one seed, because drawing each by itself is slow; what shrinks is the length."""

    rng: random.Random

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def scale(self) -> float:
        return self.rng.choice([0.1, 0.5, 3.0, 1e-300, 10 ** self.rng.uniform(-6, 6)])

    def scales(self, *sizes: int) -> Array:
        return Array.of([self.scale() for _ in range(self.rng.choice(sizes))])

    def array(self, *shapes: tuple[int, ...], real: bool) -> Array:
        rng, shape = np.random.default_rng(self.rng.randrange(2**32)), self.rng.choice(shapes)
        return Array.of(rng.standard_normal(shape) if real else rng.integers(-127, 128, shape))

    def whole(self, lo: int, hi: int, size: int = 2) -> Any:
        return tuple(self.rng.randint(lo, hi) for _ in range(size))

    def label(self) -> str:
        return self.rng.choice(ALPHABET) + "".join(
            self.rng.choices(ALPHABET + string.digits + ".", k=self.rng.randrange(8))
        )

    def triple(self, x: Tensor) -> dict[str, Any]:
        mul, add = (self.array((1,), x.shape[:1], x.shape, real=False) for _ in range(2))
        return {"mul": mul, "add": add, "div": self.rng.randint(1, 2**30), "scale": self.scale()}


def conv2d(dice: Dice, x: Tensor, *, real: bool) -> Op:
    groups = dice.rng.choice([1, x.shape[0]])
    outputs = groups * dice.rng.randint(1, 2)
    kernel = tuple(min(k, d) for k, d in zip(dice.whole(1, 3), x.shape[1:], strict=True))
    floats = real and dice.flag()
    return Conv2d(
        weight=dice.array((outputs, x.shape[0] // groups, *kernel), real=floats),
        weight_scale=None if floats else dice.scales(1, outputs),
        bias=dice.array((outputs,), real=True) if real and dice.flag() else None,
        stride=dice.whole(1, 2),
        padding=dice.whole(0, 2, 4),
        dilation=(1, dice.rng.randint(1, 2)),
        groups=groups,
    )


def linear(dice: Dice, x: Tensor, *, real: bool) -> Op:
    outputs = dice.rng.randint(1, 3)
    floats = real and dice.flag()
    return Linear(
        weight=dice.array((outputs, x.shape[0]), real=floats),
        weight_scale=None if floats else dice.scales(1, outputs),
        bias=dice.array((outputs,), real=True) if real and dice.flag() else None,
    )


def avg_pool(dice: Dice, x: Tensor, *, real: bool) -> Op:
    return AvgPool(dice.whole(1, 2), dice.whole(1, 2), dice.whole(0, 1, 4))


def global_avg_pool(dice: Dice, x: Tensor, *, real: bool) -> Op:
    return GlobalAvgPool(x.shape[1] * x.shape[2], dice.flag())


def pad(dice: Dice, x: Tensor, *, real: bool) -> Op:
    return Pad(dice.whole(0, 1, 2 * len(x.shape)))


def slice_(dice: Dice, x: Tensor, *, real: bool) -> Op:
    starts = tuple(dice.rng.randint(0, d // 2) if d > 1 else 0 for d in x.shape)
    stops = tuple(dice.rng.randint(s + 1, d) for s, d in zip(starts, x.shape, strict=True))
    return Slice(starts, stops, dice.whole(1, 2, len(x.shape)))


def scale(dice: Dice, x: Tensor, *, real: bool) -> Op:
    if not real and dice.flag():
        return Scaling(dice.array((x.shape[0],), real=False), dice.scales(1, x.shape[0]))
    return Scaling(dice.array((1,), x.shape[:1], real=dice.flag()))


def batch_norm(dice: Dice, x: Tensor, *, real: bool) -> Op:
    size = x.shape[:1]
    affine = [dice.array(size, real=True) if dice.flag() else None for _ in range(2)]
    return BatchNorm(dice.array(size, real=True), dice.scales(*size), dice.scale(), *affine)


def clip(dice: Dice, x: Tensor, *, real: bool) -> Op:
    return Clip(Array.of([-dice.scale()] * dice.rng.choice([1, x.shape[0]])), dice.scales(1))


def quantize(dice: Dice, x: Tensor, *, real: bool) -> Op:
    lo, hi = sorted(dice.whole(-128, 255))
    return Quantize(dice.scale(), lo, hi)


def requant(dice: Dice, x: Tensor, *, real: bool) -> Op:
    lo, hi = dice.rng.choice([(0, 255), (-128, 127), (-3, 3)])
    return Requant(**dice.triple(x), lo=lo, hi=hi)


def neuron_stem(dice: Dice, x: Tensor, *, real: bool) -> Op:
    bits = dice.rng.randint(1, 16)
    return NeuronStem(**dice.triple(x), bits=bits, signed=dice.flag(), **thinned(dice, bits))


def thinned(dice: Dice, bits: int) -> dict[str, Any]:
    rot, drlo = (dice.rng.randrange(bits) if dice.flag() else 0 for _ in range(2))
    return {"rot": rot, "drlo": drlo, "drlo_mode": dice.rng.choice(READINGS)}


def integrate(dice: Dice, x: Tensor, *, real: bool) -> Op:
    return Integrate(dice.array((1,), x.shape[:1], x.shape, real=False) if dice.flag() else None)


def encode(dice: Dice, x: Tensor, *, real: bool) -> Op:
    lo, hi = x.range.hull
    bits = dice.rng.randint(1, 3) + max(-lo, hi).bit_length()
    return Encode(bits, **thinned(dice, bits))


def plain(op: Op) -> Any:
    return lambda *_, **__: op


SHAPED = (conv2d, conv2d, avg_pool, global_avg_pool)
ALWAYS = (pad, slice_, scale, plain(Flatten()), plain(Add()))
ON_REALS = (batch_norm, clip, quantize, quantize, plain(Relu()))
ON_INTEGERS = (requant, encode, encode, integrate, plain(Relu()), plain(Dequantize()))
ON_TRAINS = (neuron_stem, neuron_stem, integrate)


def encoding(dice: Dice) -> Encoding:
    step = Scale.of(
        dice.rng.choice([Fraction(dice.scale()), Fraction(dice.rng.randint(1, 99), dice.rng.randint(1, 99))])
    )
    return dice.rng.choice(
        [
            *[Real()] * 4,
            *[Int(-128, 127, step)] * 2,
            Spikes(8, "bits", 0, 255, step),
            Spikes(4, "bits", -8, 7, step),
            Spikes(4, "rate", -4, 4, step),
            Spikes(4, "suffix", 0, 4, step),
            Current(4, "direct", -40, 40, -10, 10, step),
        ]
    )


def network(dice: Dice, length: int) -> Module:
    """A chain of random ops that types allow; an add reads earlier values too."""
    shape = dice.rng.choice([(2, 4, 3), (3, 3, 3), (1, 5, 5), (4,), (2, 3)])
    start = Value(dice.label(), Tensor(shape, encoding(dice)))
    module = Module(start, (), start.name)
    for _ in range(3 * length):
        x = module.types[module.output]
        if len(module.nodes) == length or x.size > 200:
            break
        real = isinstance(x.encoding, Real)
        kinds = ON_REALS if real else ON_INTEGERS if x.train is None else ON_TRAINS
        shaped = SHAPED if len(x.shape) == 3 else (linear,) * 3 if len(x.shape) == 1 else ()
        op = dice.rng.choice((*ALWAYS, *kinds, *shaped))(dice, x, real=real)
        operands = (module.output,)
        if isinstance(op, Add):
            others = [name for name, type_ in module.types.items() if type_.shape == x.shape]
            operands = (*operands, *dice.rng.choices(others, k=dice.rng.randint(1, 2)))
        try:
            result = infer(op, tuple(module.types[o] for o in operands))
        except SpirError:
            continue  # such as scales that do not meet
        name = dice.label()
        if name not in module.types:
            origin = Origin(
                *("".join(dice.rng.choices('a.1"\\\n\té\u2028', k=4)) if dice.flag() else "" for _ in range(2))
            )
            module = Module(module.input, (*module.nodes, Node(name, op, operands, result, origin)), name)
    return module


modules = st.builds(
    lambda length, seed: network(Dice(random.Random(seed)), length), st.sampled_from(range(1, 7)), st.integers(0, 2**32)
)


@settings(max_examples=200)
@given(modules)
def test_every_module_reads_back_from_its_text(module):
    event(f"{len(module.nodes)} ops")
    for node in module.nodes:
        event(str(node.op.name))
    verify(module)
    text, weights = show(module), module.arrays()
    parsed = parse(text, weights)
    assert parsed == module
    assert show(parsed) == text
    bare = parse(text)
    assert bare == module
    assert show(bare) == text
    for ours, theirs in zip(module.nodes, parsed.nodes, strict=True):
        if ours.origin.path:
            assert (theirs.origin.path, theirs.origin.place) == (ours.origin.path, ours.origin.place)
        assert theirs.type.known
        assert all(a.data is not None for a in theirs.op.arrays().values())


# equality


def other_values(value: Any) -> Iterator[Any]:
    """Values that differ from a field's in one place."""
    if isinstance(value, Array):
        for at in np.ndindex(*value.values.shape):
            changed = value.values.copy()
            changed[at] = changed[at] + 1 if value.integral else np.nextafter(changed[at], np.inf)
            yield Array.of(changed)
        yield Array.of(value.values[None])
        yield Array.of(value.values.astype(float if value.integral else int))
        yield None
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1)
    elif isinstance(value, float):
        yield from (np.nextafter(value, np.inf).item(), np.nextafter(value, 0).item())
    elif isinstance(value, tuple):
        for index, part in enumerate(value):
            yield (*value[:index], part + 1, *value[index + 1 :])
        yield (*value, 0)
    elif value is None:
        yield Array.of([0])
    else:
        yield f"{value}x"


def other_types(tensor: Tensor) -> Iterator[Tensor]:
    for index in range(len(tensor.shape)):
        shape = tuple(d + (i == index) for i, d in enumerate(tensor.shape))
        yield (
            Tensor(shape, Real())
            if isinstance(tensor.encoding, Real)
            else attrs.evolve(tensor, shape=shape, encoding=attrs.evolve(tensor.encoding, scale=Scale.of(1)))
        )
    if isinstance(tensor.encoding, Real):
        yield Tensor(tensor.shape, Int(0, 1, Scale.of(1)))
        return
    yield Tensor(tensor.shape, Real())
    yield Tensor(tensor.shape, attrs.evolve(tensor.encoding, scale=tensor.encoding.scale * Scale.of(1 + 2.0**-52)))
    codes = {"rate", "bits"} - {getattr(tensor.encoding, "code", "rate")}
    for changed in (
        *({name: value + by} for name, value in bounds(tensor.encoding) for by in (-1, 1)),
        *({"code": code} for code in codes if tensor.train),
    ):
        try:
            yield Tensor(tensor.shape, attrs.evolve(tensor.encoding, **changed))
        except SpirError:
            continue  # a code that does not hold the range


def bounds(encoding: Any) -> list[tuple[str, int]]:
    return [(a.name, v) for a in attrs.fields(type(encoding)) if isinstance(v := getattr(encoding, a.name), int)]


def other_modules(module: Module) -> Iterator[Module]:
    """Modules that differ in one field or one weight."""
    yield attrs.evolve(module, output=f"{module.output}_")
    yield attrs.evolve(module, input=attrs.evolve(module.input, name=f"{module.input.name}_"))
    for changed in other_types(module.input.type):
        yield attrs.evolve(module, input=attrs.evolve(module.input, type=changed))
    for index, node in enumerate(module.nodes):
        before, after = module.nodes[:index], module.nodes[index + 1 :]
        yield attrs.evolve(module, nodes=(*before, *after))
        yield attrs.evolve(module, nodes=(*before, node, node, *after))
        for changed in other_nodes(node):
            yield attrs.evolve(module, nodes=(*before, changed, *after))


def other_nodes(node: Node) -> Iterator[Node]:
    yield attrs.evolve(node, result=f"{node.result}_")
    yield attrs.evolve(node, operands=(*node.operands, node.operands[0]))
    yield attrs.evolve(node, operands=(f"{node.operands[0]}_", *node.operands[1:]))
    yield attrs.evolve(node, op=Relu() if not isinstance(node.op, Relu) else Flatten())
    for changed in other_types(node.type):
        yield attrs.evolve(node, type=changed)
    for field in attrs.fields(type(node.op)):
        for value in other_values(getattr(node.op, field.name)):
            yield attrs.evolve(node, op=attrs.evolve(node.op, **{field.name: value}))


CORNERS = [
    pytest.param(op, types, id=f"{name}-{index}")
    for name in names("ops")
    for index, (op, types) in enumerate(find("ops", name).corners())  # type: ignore[attr-defined]
]


def one_op(op: Op, types: tuple[Tensor, ...]) -> Module:
    """A module of one op; the types of operands after the first are recorded, not inferred."""
    extra = tuple(Node(f"x{i}", Relu(), ("x0",), t) for i, t in enumerate(types[1:], 1))
    node = Node("y", op, tuple(f"x{i}" for i in range(len(types))), infer(op, types))
    return Module(Value("x0", types[0]), (*extra, node), "y")


@pytest.mark.parametrize(("op", "types"), CORNERS)
def test_equality_and_text_see_every_field_and_every_weight_of_every_op(op, types):
    module = one_op(op, types)
    text = show(module)
    assert module == one_op(op, types)
    different = list(other_modules(module))
    for other in different:
        assert other != module
        assert show(other) != text
    values = sum(a.values.size for a in op.arrays().values())
    assert len(different) > values + len(attrs.fields(type(op)))


@settings(max_examples=50)
@given(modules)
def test_equality_sees_any_one_change_anywhere_in_a_module(module):
    for other in other_modules(module):
        assert other != module


@given(modules)
def test_equality_does_not_see_origins(module):
    moved = tuple(attrs.evolve(n, origin=n.origin.then("fold-bn")) for n in module.nodes)
    assert attrs.evolve(module, nodes=moved) == module


# only SpirError escapes

texts = modules.map(lambda module: (show(module), module.arrays()))
TOKEN = re.compile(r"[A-Za-z_][\w.]*|[%@#][\w.]*|-?\d[\w.]*|\S")
HOSTILE = [
    *(
        "0",
        "-1",
        "1",
        "2",
        "7",
        "64",
        "65",
        "0.0",
        "1e999",
        "-0.5",
        "1/0",
        "9" * 25,
        "9" * 1200,
        "1e-320",
        "1/3",
        "0x1",
    ),
    *(
        "[]",
        "[1]",
        "[0, 0]",
        "[-1, 1, 1, 1]",
        "on",
        "none",
        '""',
        '"\\x"',
        '"\t"',
        '"a',
        "\u2028",
        "\x00",
        "%",
        "@",
        "#",
    ),
    *("relu", "add", "encode", "neuron_stem", "real", "int", "spikes", "current", "bits", "rate", "suffix", "direct"),
    *("module", "input", "output", "from", "frame", "tensor", "1x0", "3x3x3", "0..0", "1..0", "-5..900", "//"),
]


def kind(word: str) -> str:
    """A word of the same kind fits the grammar in the same place."""
    return re.sub(r"-?[0-9].*", "0", word)[:1] if not re.match(r"[A-Za-z_]", word) else "a"


def survives(text: str, weights: dict[str, Array]) -> None:
    """Reads a text with and without weights; whatever is wrong with it must be a SpirError that prints."""
    for given_ in (weights, None, {}):
        try:
            module = parse(text, given_)
            assert parse(show(module), given_) == module
            verify(module)
        except SpirError as refusal:
            event(refusal.code)
            str(refusal)


@settings(max_examples=250)
@given(
    texts,
    st.lists(
        st.tuples(
            st.integers(0, 10**6), st.sampled_from("+-="), st.characters() | st.sampled_from('%@#{}[]<>",:=-.x019')
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_only_spir_errors_escape_from_texts_with_other_characters(made, edits):
    text, weights = made
    for place, kind, character in edits:
        at = place % (len(text) + 1)
        text = text[:at] + ("" if kind == "-" else character) + text[at + (kind != "+") :]
    survives(text, weights)


@settings(max_examples=400)
@given(texts, st.data())
def test_only_spir_errors_escape_from_texts_with_other_words(made, data):
    text, weights = made
    for _ in range(data.draw(st.integers(1, 2))):
        words = list(TOKEN.finditer(text))
        at = data.draw(st.sampled_from(words))
        alike = [word for word in (*HOSTILE, *(w.group() for w in words)) if kind(word) == kind(at.group())]
        word = data.draw(st.sampled_from(alike) | st.sampled_from(alike) | st.sampled_from(HOSTILE))
        text = text[: at.start()] + word + text[at.end() :]
    survives(text, weights)


@given(st.text())
def test_only_spir_errors_escape_from_any_text(text):
    survives(text, {})
