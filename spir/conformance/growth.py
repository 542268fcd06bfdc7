"""Random typed modules, op by op: every op that is installed takes part, reals, integers, trains and currents meet.

A step is an op's name and a seed; a step that fits nowhere leaves the module as it is. So a list of steps shrinks well:
each draws its numbers for itself.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np

from spir.conformance.examples import corners
from spir.discovery import find, names
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops._linear import WeightedMap
from spir.ops._neuron import Neuron
from spir.ops._thinning import READINGS
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.encode import Encode
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.mix import Mix
from spir.ops.neuron_ca_lif import NeuronCaLif
from spir.ops.neuron_matrix import NeuronMatrix
from spir.ops.neuron_parallel import NeuronParallel
from spir.ops.pad import Pad
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.types import SORTED, Current, Encoding, Int, Real, Scale, Spikes, Tensor, scale_of
from spir.verify import verify

BRIDGES = (Integrate(), Quantize(0.5, -128, 127), Dequantize())
"""What leads from one kind of value to another, for ops that do not run on the first."""
Step = tuple[str, int]

LARGEST = 100
MOST_STEPS = 12
"""Of sorted trains."""
TRIES = 6
HALF = Scale.of(0.5)
SHAPES = ((2, 4, 3), (3, 3, 3), (1, 4, 4), (4,), (2, 3))
ENCODINGS: tuple[Encoding, ...] = (
    Int(-128, 127, HALF),
    Int(3, 9, HALF),
    Int(-9, -4, HALF),
    Spikes(8, "bits", 0, 255, HALF),
    Spikes(4, "bits", -8, 7, HALF),
    Spikes(5, "bits", -3, 2, HALF),
    Spikes(4, "rate", -4, 4, HALF),
    Spikes(6, "rate", -2, 3, HALF),
    Spikes(4, "suffix", 0, 4, HALF),
    Spikes(5, "prefix", -5, 5, HALF),
    Current(4, "bits", -90, 80, -6, 6, HALF),
    Current(4, "rate", -20, 20, -6, 6, HALF),
    Current(4, "direct", -40, 40, -10, 10, HALF),
    Real(),
)


@functools.cache
def starts() -> tuple[Module, ...]:
    """Modules to grow from: an input of every encoding and shape, and every corner of every op."""
    plain = [Module(Value("x", Tensor(shape, encoding)), (), "x") for encoding in ENCODINGS for shape in SHAPES]
    return (*plain * 6, *(module for name in names("ops") for module in corners(name) if module is not None))


@functools.cache
def moves() -> tuple[str, ...]:
    """The names of all ops; those that carry a network from one kind of value to the next come up more often."""
    known = names("ops")
    turns = [name for name in known if issubclass(find("ops", name), (Neuron, Requant, Quantize, Encode, WeightedMap))]
    return (*known, *turns * 5)


def grown(start: Module, steps: Sequence[Step]) -> Module:
    """The module after all the steps that fit."""
    module = start
    for index, (name, seed) in enumerate(steps):
        module = _step(module, name, Dice(random.Random(seed)), index)
    return module


def _step(module: Module, name: str, dice: Dice, index: int) -> Module:
    """The module with one more op on some of its values, where one is found that fits, if need be behind a bridge."""
    for operand in dice.values(module)[:TRIES]:
        if (found := _applied(module, name, operand, dice, f"{name}{index}")) is not None:
            return found
    for bridge in BRIDGES if dice.chance(0.6) else ():
        label = f"{bridge.name}{index}"
        try:
            longer = _extended(module, ((label, bridge, (module.output,)),))
        except SpirError:  # another kind of value
            continue
        if longer is module:  # it would grow too large
            continue
        if (found := _applied(longer, name, label, dice, f"{name}{index}_")) is not None:
            return found
    return module


def _applied(module: Module, name: str, operand: str, dice: Dice, label: str) -> Module | None:
    """The module with an op of a name that reads a value, or None where none fits."""
    for op in dice.ops(name, module.types[operand]):
        for operands in dice.operands(module, op, operand):
            for lines in (((label, op, operands),), _meeting(module, op, operands, label, dice)):
                try:
                    longer = _extended(module, lines)
                except SpirError:  # such as shapes or scales that do not meet
                    continue
                if longer is not module:
                    return longer
    return None


def _extended(module: Module, lines: Sequence[tuple[str, Op, tuple[str, ...]]]) -> Module:
    """The module and more lines; as it is where there are none, or where values would grow too large."""
    if not lines:
        return module
    types, nodes = dict(module.types), list(module.nodes)
    for result, op, operands in lines:
        types[result] = infer(op, tuple(types[o] for o in operands))
        nodes.append(Node(result, op, operands, types[result], Origin(f"net.{result}")))
    found = verify(Module(module.input, tuple(nodes), lines[-1][0]))
    return found if types[found.output].size <= LARGEST else module


def _meeting(
    module: Module, op: Op, operands: tuple[str, ...], label: str, dice: Dice
) -> tuple[tuple[str, Op, tuple[str, ...]], ...]:
    """A join of unequal scales: the branches are first multiplied by integers and then stand for the first's steps."""
    types = [module.types[o] for o in operands]
    if len(types) < 2 or any(isinstance(t.encoding, Real) for t in types):
        return ()
    wanted = scale_of(types[0])
    lines, read = [], [operands[0]]
    for k, (operand, type_) in enumerate(zip(operands[1:], types[1:], strict=True)):
        read.append(operand)
        if scale_of(type_) != wanted:
            factor = Array.of(dice.rng.choice([[3], [305], [11_000_000], [dice.rng.randint(1, 2000)]]))
            lines.append((f"{label}.{k}", Scaling(factor, Array.of(wanted.floats())), (operand,)))
            read[-1] = lines[-1][0]
    return (*lines, (label, op, tuple(read)))


@attrs.frozen
class Dice:
    """The random numbers of one step."""

    rng: random.Random

    def values(self, module: Module) -> list[str]:
        """The names of a module's values, most often the last one first."""
        known = list(module.types)
        last = known.pop()
        self.rng.shuffle(known)
        return [last, *known] if self.rng.random() < 0.7 else [*known, last]

    def operands(self, module: Module, op: Op, first: str) -> Iterator[tuple[str, ...]]:
        """Operands that begin with ``first``, for ops of one and of several."""
        if op.operands == 1:
            yield (first,)
            return
        known = list(module.types)
        for _ in range(TRIES):
            more = self.rng.choice([1, 1, 2]) if op.operands is None else op.operands - 1
            yield (first, *self.rng.choices(known, k=more))

    def ops(self, name: str, x: Tensor) -> Iterator[Op]:
        """Ops of a name that may fit a first operand: made to measure, or from the corners."""
        owner = find("ops", name)
        maker = MAKERS.get(name) or (functools.partial(neuron, owner) if issubclass(owner, Neuron) else None)
        if maker is not None:
            try:
                if (made := maker(self, x)) is not None:
                    yield made
            except SpirError:  # fields that the op refuses
                pass
        known = [op for op, _ in owner.corners()]  # type: ignore[attr-defined]
        yield from self.rng.sample(known, min(2, len(known)))

    def chance(self, share: float) -> bool:
        """True for a share of the throws."""
        return self.rng.random() < share

    def whole(self, lo: int, hi: int, size: int) -> Any:
        """So many integers of a range."""
        return tuple(self.rng.randint(lo, hi) for _ in range(size))

    def integers(self, *shape: int) -> Array:
        """Integer weights, small or of 8 bits, with a dead channel now and then."""
        largest = self.rng.choice([3, 9, 127])
        values = np.array([self.rng.randint(-largest, largest) for _ in range(math.prod(shape))]).reshape(shape)
        if self.chance(0.2):
            values[self.rng.randrange(shape[0])] = 0
        return Array.of(values)

    def reals(self, *shape: int) -> Array:
        """Real weights."""
        return Array.of(np.reshape([self.rng.gauss(0, 1) for _ in range(math.prod(shape))], shape))

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of constants for a value: one, one a channel, one an element."""
        return self.rng.choice([(1,), x.shape[:1], x.shape])


def conv2d(dice: Dice, x: Tensor) -> Op | None:
    """Strides, dilation, groups, padding on any side."""
    if len(x.shape) != 3:
        return None
    groups = dice.rng.choice([1, 1, x.shape[0]])
    outputs, kernel = groups * dice.rng.randint(1, 2), [dice.rng.randint(1, min(3, d)) for d in x.shape[1:]]
    shape = (outputs, x.shape[0] // groups, *kernel)
    padding = dice.whole(0, 2, 4) if dice.chance(0.6) else (0,) * 4
    fields: tuple[Any, ...] = (dice.whole(1, 2, 2), padding, (1, dice.rng.randint(1, 2)), groups)
    return Conv2d(*_weights(dice, x, shape), *fields)


def linear(dice: Dice, x: Tensor) -> Op | None:
    """A small matrix."""
    return Linear(*_weights(dice, x, (dice.rng.randint(1, 4), x.shape[0]))) if len(x.shape) == 1 else None


def _weights(dice: Dice, x: Tensor, shape: tuple[int, ...]) -> tuple[Array, Array | None, Array | None]:
    real = isinstance(x.encoding, Real)
    bias = dice.reals(shape[0]) if real and dice.chance(0.5) else None
    if real and dice.chance(0.7):
        return dice.reals(*shape), None, bias
    steps = [2.0 ** -dice.rng.randint(0, 6) for _ in range(dice.rng.choice([1, shape[0]]))]
    return dice.integers(*shape), Array.of(steps), bias


def avg_pool(dice: Dice, x: Tensor) -> Op | None:
    """Windows that may overlap or hang over the edge."""
    if len(x.shape) != 3:
        return None
    return AvgPool(dice.whole(1, 2, 2), dice.whole(1, 2, 2), dice.whole(0, 1, 4))


def global_avg_pool(dice: Dice, x: Tensor) -> Op | None:
    """The mean over space."""
    return GlobalAvgPool(math.prod(x.shape[1:]), dice.chance(0.5)) if len(x.shape) == 3 else None


def pad(dice: Dice, x: Tensor) -> Op:
    """Zeros on any side of any dimension."""
    return Pad(dice.whole(0, 1, 2 * len(x.shape)))


def slice_(dice: Dice, x: Tensor) -> Op:
    """A part of every dimension."""
    start = tuple(dice.rng.randrange(max(1, d // 2)) for d in x.shape)
    return Slice(start, x.shape, dice.whole(1, 2, len(x.shape)))


def scale(dice: Dice, x: Tensor) -> Op:
    """Integer or real constants."""
    size = dice.rng.choice([1, x.shape[0]])
    return Scaling(dice.integers(size) if dice.chance(0.5) else dice.reals(size))


def integrate(dice: Dice, x: Tensor) -> Op:
    """With a bias or without; of bits now and then scaled."""
    return Integrate(dice.integers(*dice.shape(x)) if dice.chance(0.6) else None, shift(dice, x))


def shift(dice: Dice, x: Tensor) -> int | Array:
    """By which terms of bits are scaled, in a quarter of the cases."""
    if x.train is None or x.train.code != "bits" or not dice.chance(0.25):
        return 0
    return Array.of(dice.whole(0, 6, x.shape[0])) if dice.chance(0.5) else dice.rng.randint(1, 6)


def requant(dice: Dice, x: Tensor) -> Requant | None:
    """A law whose steps lie inside the operand's range, with the half of round-half-up, often with exact ties."""
    if isinstance(x.encoding, Real):
        return None
    bits = dice.rng.randint(1, 8)
    lo = dice.rng.choice([0, 0, -(2 ** (bits - 1))])
    low, high = x.range.hull
    if dice.chance(0.4):
        div = 2 ** dice.rng.randint(1, min(60, max(1, (high - low).bit_length() - 1)))
        mul, add = Array.of([dice.rng.choice([1, -1])]), Array.of([div // 2 + div * dice.rng.randint(-1, 1)])
        return Requant(mul, add, div, lo, lo + 2**bits - 1, 0.5)
    mul = dice.integers(*dice.shape(x))
    if dice.chance(0.5):
        mul = Array.of(np.maximum(np.abs(mul.values), 1))
    widest = (high - low + 1) * int(np.abs(mul.values).max(initial=1))
    div = max(1, dice.rng.choice([widest >> bits, widest >> (bits - 1), 1 << (widest >> bits).bit_length(), 2, 7]))
    if div > 2**60:
        return None  # offsets of two steps would leave the registers
    size = math.prod(mul.values.shape)
    offsets = [dice.rng.randint(-2 * div, 2 * div) if dice.chance(0.5) else 0 for _ in range(size)]
    add = Array.of(np.reshape(offsets, mul.values.shape) + div // 2)
    divisor = Array.of(dice.whole(div, 2 * div, x.shape[0])) if dice.chance(0.2) else div
    return Requant(mul, add, divisor, lo, lo + 2**bits - 1, dice.rng.choice([0.5, 0.25, 0.1]))


def neuron(kind: type[Neuron], dice: Dice, x: Tensor) -> Op | None:
    """The neuron that a requant becomes."""
    law = requant(dice, x)
    bits = Integrate(shift=shift(dice, x)) if kind.name == "neuron_stem" else Integrate()
    return None if law is None else kind.fuse(bits, law, thin(dice, kind.derive(law)))


def neuron_parallel(dice: Dice, x: Tensor) -> NeuronParallel | None:
    """A law of some levels, sorted at either end."""
    law, steps = requant(dice, x), dice.rng.randint(1, 9)
    if law is None:
        return None
    order, signed = dice.rng.choice(SORTED), dice.chance(0.3)
    return NeuronParallel(steps, law.mul, law.add, law.div, law.scale, order, signed)


def neuron_matrix(dice: Dice, x: Tensor) -> Op | None:
    """The matrices of a parallel neuron, fused or Lambda_PC alone, or any lower-triangular one."""
    plain = neuron_parallel(dice, x)
    if plain is None or x.train is None:
        return None
    plain = attrs.evolve(plain, steps=x.steps, signed=False)
    fused = NeuronMatrix.of(plain, x.steps)
    leaky = np.tril([[dice.rng.randint(0, 4) for _ in range(x.steps)] for _ in range(x.steps)])
    rows = Array.of([dice.rng.randint(1, 4) for _ in range(x.steps)])
    made = (fused, NeuronMatrix.published(plain)[1], attrs.evolve(fused, matrix=Array.of(leaky), rows=rows))
    return dice.rng.choice(made)


def neuron_ca_lif(dice: Dice, x: Tensor) -> Op | None:
    """A law of small counts, with one spike a frame or several."""
    law = requant(dice, x)
    if law is None or x.train is None or x.train.code == "bits":
        return None
    lo, hi = dice.rng.choice([(0, 3), (0, 9), (-4, 5), (-1, 1), (0, 0), (0, 40)])
    steps = dice.rng.randint(1, x.steps)
    plain = NeuronCaLif(steps, law.mul, law.add, law.div, lo, hi, law.scale)
    single = plain.in_mode("single", x.train)
    return single if dice.chance(0.4) and hi <= x.steps + single.drain else plain


def mix(dice: Dice, x: Tensor) -> Op | None:
    """Uniform, or frames in another order, some of them twice."""
    if x.train is None:
        return None
    order = dice.rng.sample(range(x.steps), x.steps)
    eye = np.eye(x.steps, dtype=np.int64)
    matrix, divisor = dice.rng.choice([(np.ones_like(eye), x.steps), (eye[order], 1), (eye + eye[order], 2)])
    return Mix(Array.of(matrix), divisor)


def encode(dice: Dice, x: Tensor) -> Op | None:
    """As many bits or steps as the range needs, or one more."""
    if not isinstance(x.encoding, Int):
        return None
    lo, hi = x.range.hull
    most = max(-lo, hi, 1)
    if most <= MOST_STEPS and dice.chance(0.3):
        full = dice.rng.choice([None, most, most + 3])
        steps = most + dice.rng.randint(0, 2) if full is None else dice.rng.randint(1, most + 3)
        return Encode(steps, "isi", full, dice.rng.choice([1.0, 1.0, 0.5]))
    if max(-lo, hi) <= MOST_STEPS and dice.chance(0.5):
        return Encode(max(-lo, hi, 1) + dice.rng.randint(0, 1), dice.rng.choice(SORTED))
    return thin(dice, Encode(max(-lo - 1, hi, 1).bit_length() + (lo < 0) + dice.rng.randint(0, 1)))


def thin(dice: Dice, encode: Encode) -> Encode:
    """Bits with fewer spikes, in a quarter of the cases."""
    if encode.code != "bits" or not dice.chance(0.25):
        return encode
    rot, drlo = dice.rng.randrange(min(encode.steps, 5)), dice.rng.randrange(encode.steps)
    return attrs.evolve(encode, rot=rot, drlo=drlo, drlo_mode=dice.rng.choice(READINGS))


def quantize(dice: Dice, x: Tensor) -> Op | None:
    """Steps that inputs have ties on."""
    if not isinstance(x.encoding, Real):
        return None
    lo, hi = dice.rng.choice([(-128, 127), (0, 255), (-8, 7), (0, 1), (0, 0), (-5, -2)])
    return Quantize(dice.rng.choice([0.25, 0.5, 2.0, 0.1]), lo, hi)


def batch_norm(dice: Dice, x: Tensor) -> Op:
    """With and without affine parameters."""
    size = x.shape[0]
    var = Array.of([dice.rng.choice([1.0, 0.1, 1e-6, 4.0]) for _ in range(size)])
    affine = [dice.reals(size) if dice.chance(0.5) else None for _ in range(2)]
    return BatchNorm(dice.reals(size), var, 1e-3, *affine)


def clip(dice: Dice, x: Tensor) -> Op:
    """Per tensor or per channel."""
    size = dice.rng.choice([1, x.shape[0]])
    lo = [dice.rng.choice([0.0, -1.5, -40.0]) for _ in range(size)]
    return Clip(Array.of(lo), Array.of([low + dice.rng.choice([0.0, 1.5, 60.0]) for low in lo]))


MAKERS: dict[str, Callable[[Dice, Tensor], Op | None]] = {
    "avg_pool": avg_pool,
    "batch_norm": batch_norm,
    "clip": clip,
    "conv2d": conv2d,
    "encode": encode,
    "global_avg_pool": global_avg_pool,
    "integrate": integrate,
    "linear": linear,
    "mix": mix,
    "neuron_ca_lif": neuron_ca_lif,
    "neuron_matrix": neuron_matrix,
    "neuron_parallel": neuron_parallel,
    "pad": pad,
    "quantize": quantize,
    "requant": requant,
    "scale": scale,
    "slice": slice_,
}
