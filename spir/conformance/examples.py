"""A module with stored inputs that hit ties, range ends and thresholds; it prints as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from spir import interpreter
from spir.discovery import find
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops._neuron import Neuron
from spir.ops._threshold import Triple, law
from spir.ops.encode import Encode, bits, sort
from spir.ops.integrate import Integrate
from spir.ops.pad import Pad
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.ops.slice import Slice
from spir.types import SORTED, Int, Integers, Real, Scale, Spikes, Stored, Tensor, weights
from spir.verify import verify

SAMPLES = 7
POOL = 24
SHOWN = 128


@attrs.frozen(eq=False, repr=False)
class Example:
    """A module and stored inputs for it; `repr` is the module's text, its small arrays and the inputs."""

    module: Module
    x: Stored

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(repr(self))

    def __repr__(self) -> str:
        arrays = [f"@{name} = {numbers(a.values)}" for name, a in self.module.arrays().items() if a.data is not None]
        of_sample = self.x if self.module.input.type.train is None else self.x.swapaxes(0, 1)
        given = [f"%{self.module.input.name} of sample {n} = {numbers(values)}" for n, values in enumerate(of_sample)]
        return "\n".join([str(self.module).rstrip(), *arrays, *given])

    def __len__(self) -> int:
        return int(self.x.shape[0 if self.module.input.type.train is None else 1])

    def take(self, samples: list[int]) -> Example:
        """The same module on some of the samples, in the order given."""
        return attrs.evolve(self, x=take(self.module.input.type, self.x, samples))


def take(type_: Tensor, stored: Stored, samples: list[int]) -> Stored:
    """Some samples of a stored value; trains have their frames before the batch axis."""
    chosen: Stored = stored[samples] if type_.train is None else stored[:, samples]
    return chosen


def numbers(values: NDArray[Any]) -> str:
    """An array on one line; of a large one the beginning."""
    if values.size <= SHOWN:
        return str(values.tolist())
    first = ", ".join(map(str, values.reshape(-1)[:SHOWN].tolist()))
    return f"[{first}, ...] (the first of {values.size} values {list(values.shape)})"


def module_of(source: Tensor, *lines: tuple[str, Op, str]) -> Module:
    """A module from lines ``(result, op, "operand operand")`` on the input ``x``.

    Raises:
        SpirError: operands that an op refuses.
    """
    types, nodes = {"x": source}, []
    for result, op, operands in lines:
        read = tuple(operands.split())
        types[result] = infer(op, tuple(types[name] for name in read))
        nodes.append(Node(result, op, read, types[result], Origin("net." + result)))
    return verify(Module(Value("x", source), tuple(nodes), lines[-1][0] if lines else "x"))


# inputs


def stored_input(type_: Tensor, rng: np.random.Generator, n: int = SAMPLES) -> Stored:
    """Random stored values of a type: both range ends first, then anything between."""
    encoding, shape = type_.encoding, (n, *type_.shape)
    if isinstance(encoding, Real):
        x = rng.integers(-4000, 4001, shape) / 8  # halves of quantize's steps, so ties are among them
        x[n // 2 :] += rng.standard_normal((n - n // 2, *type_.shape))
        return x
    value = rng.integers(encoding.lo, encoding.hi, shape, endpoint=True)
    value[:1], value[1:2] = encoding.lo, encoding.hi
    if (written := stored_values(type_, value)) is not None:
        return written
    assert type_.train is not None  # integers were written
    steps, (lo, hi) = type_.steps, type_.train.frame
    frames = rng.integers(lo, hi, (steps, *shape), endpoint=True)
    frames[:, :1], frames[:, 1:2] = lo, hi
    if type_.train.code == "direct":
        frames[:] = frames[0]
    total = np.tensordot(np.array(weights(type_.train.code, steps)), frames, axes=1)
    allowed: Integers = frames * ((total >= encoding.lo) & (total <= encoding.hi))
    return allowed


def stored_values(type_: Tensor, value: Integers) -> Integers | None:
    """Integers ``[N, *shape]`` as a type stores them; None where its code has more than one way, or none."""
    encoding = type_.encoding
    if isinstance(encoding, Int):
        return value
    if not isinstance(encoding, Spikes):
        return None
    if encoding.code == "bits":
        return bits(value, encoding.steps, signed=encoding.lo < 0)
    if encoding.code in SORTED:
        return sort(value, encoding.steps, encoding.code)
    return None


def probing_input(module: Module, seed: int, n: int = SAMPLES) -> Stored:
    """Inputs that hit range ends, zero, and the ties and thresholds of quantisers, requants and neurons.

    Range ends come first; the rest is chosen from a pool of samples for what it hits anywhere in the module.
    """
    rng, type_ = np.random.default_rng(seed), module.input.type
    pool = [stored_input(type_, rng, POOL), *_aimed(module, rng)]
    axis = 0 if type_.train is None else 1
    candidates: Any = np.concatenate(pool, axis=axis)
    found = interpreter.run(module, candidates, "*")
    hits = hit(module, found)
    chosen = [0, 1]
    seen = set().union(*(hits[i] for i in chosen))
    while len(chosen) < n:
        rest = [i for i in range(candidates.shape[axis]) if i not in chosen]
        best = max(rest, key=lambda i: len(hits[i] - seen))
        chosen.append(best)
        seen |= hits[best]
    return take(type_, candidates, chosen)


def hit(module: Module, stored: Mapping[str, Stored]) -> list[set[tuple[str, str]]]:
    """For each sample which thresholds it hits: (value, tie, at a threshold, below one, zero, saturated)."""
    first = stored[module.input.name]
    found: list[set[tuple[str, str]]] = [set() for _ in range(first.shape[0 if module.input.type.train is None else 1])]
    for node in module.nodes:
        source = module.types[node.operands[0]]
        if isinstance(node.op, Quantize):
            events = _quantised(node.op, np.asarray(stored[node.operands[0]], dtype=np.float64))
        elif (triple := getattr(node.op, "triple", None)) is not None:
            events = _thresholds(triple, source.integers(np.asarray(stored[node.operands[0]], dtype=np.int64)))
        else:
            continue
        for event, where in events.items():
            for sample in np.flatnonzero(where.reshape(len(where), -1).any(axis=1)):
                found[sample].add((node.result, event))
    return found


def _quantised(op: Quantize, x: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    y = x / op.scale + 0.5
    code = np.floor(y)
    return {
        "tie": y == code,
        "above a tie": np.floor(np.nextafter(x, -np.inf) / op.scale + 0.5) < code,
        "below a tie": np.floor(np.nextafter(x, np.inf) / op.scale + 0.5) > code,
        "zero": x == 0,
        "saturated below": code < op.lo,
        "lowest": code == op.lo,
        "highest": code == op.hi,
        "saturated above": code > op.hi,
    }


def _thresholds(triple: Triple, z: Integers) -> dict[str, NDArray[np.bool_]]:
    mul, add, div, lo, hi = triple
    y = law(z, *triple)
    wide = 2**62
    open_ended = law(z, mul, add, div, -wide, wide)
    return {
        "tie": law(z, mul, Array.of(add.values - 1), div, lo, hi) != y,
        "at a threshold": law(z - 1, *triple) != y,
        "below a threshold": law(z + 1, *triple) != y,
        "zero": z == 0,
        "lowest": y == lo,
        "highest": y == hi,
        "saturated": (open_ended < lo) | (open_ended > hi),
    }


def _aimed(module: Module, rng: np.random.Generator) -> Iterator[Stored]:
    """Samples at zero and around the thresholds of what reads the input."""
    type_ = module.input.type
    wanted: list[NDArray[Any]] = [np.zeros(1)]
    for node in module.readers[module.input.name]:
        if isinstance(node.op, Quantize):
            wanted.append(_ties(node.op))
        elif (triple := getattr(node.op, "triple", None)) is not None:
            wanted.append(_steps(triple, type_, rng))
    aims = np.concatenate(wanted)
    drawn = rng.choice(aims, (4, *type_.shape))
    drawn[0] = 0
    if isinstance(type_.encoding, Real):
        yield drawn
        return
    values = np.clip(drawn, type_.encoding.lo, type_.encoding.hi).astype(np.int64)
    if (written := stored_values(type_, values)) is not None:
        yield written


def _ties(op: Quantize) -> NDArray[np.float64]:
    ties = (np.array([op.lo - 1, op.lo, -1, 0, 1, op.hi - 1, op.hi]) + 0.5) * op.scale
    return np.concatenate([ties, np.nextafter(ties, -np.inf), np.nextafter(ties, np.inf), [op.lo * op.scale]])


def _steps(triple: Triple, type_: Tensor, rng: np.random.Generator) -> Integers:
    """Decoded integers at, below and above steps of a law."""
    lo, hi = type_.range.hull
    drawn = rng.integers(lo, hi, (256, *type_.shape), endpoint=True)
    mul, add, div, low, high = triple
    y = law(drawn, *triple)
    tie = drawn[law(drawn, mul, Array.of(add.values - 1), div, low, high) != y][:16]
    at = np.concatenate([tie, drawn[law(drawn - 1, *triple) != y][:16]])
    steps: Integers = np.clip(np.concatenate([at - 1, at, at + 1, [lo, hi]]), lo, hi)
    return steps


# corners


def corners(name: str) -> Iterator[Module | None]:
    """Every corner of an op as a module; None for one whose operands no ops make from one input."""
    for op, types in find("ops", name).corners():  # type: ignore[attr-defined]
        yield corner(op, types)


def corner(op: Op, types: tuple[Tensor, ...]) -> Module | None:
    """The op on operands of exactly these types, all made from one input; None where no ops make them.

    One operand is the input; the others are made from it by slices, pads, requantisation and encoding.
    """
    for source in sorted(range(len(types)), key=lambda i: len(_reached(types, i)), reverse=True):
        ways = [[] if i == source else _way(types[source], wanted, i) for i, wanted in enumerate(types)]
        if any(way is None for way in ways):
            continue
        lines: list[tuple[str, Op, str]] = []
        operands = []
        for i, way in enumerate(ways):
            read = "x"
            for k, step in enumerate(way or ()):
                lines.append((f"{'abcdefgh'[i % 8]}{i}_{k}", step, read))
                read = lines[-1][0]
            operands.append(read)
        return module_of(types[source], *lines, ("y", op, " ".join(operands)))
    return None


def _reached(types: tuple[Tensor, ...], source: int) -> list[int]:
    return [i for i, wanted in enumerate(types) if i == source or _way(types[source], wanted, i) is not None]


def _way(source: Tensor, wanted: Tensor, turn: int) -> list[Op] | None:
    """Ops that make values of one type from another's; other values where that is possible, the same where not."""
    for way in _ways(source, wanted, turn):
        made = source
        try:
            for op in way:
                made = infer(op, (made,))
        except SpirError:  # such as a product beyond registers
            continue
        if made == wanted:
            return way
    return None


def _ways(source: Tensor, wanted: Tensor, turn: int) -> Iterator[list[Op]]:
    resized = list(_resized(source, wanted))
    if isinstance(wanted.encoding, Real) and isinstance(source.encoding, Real):
        yield resized or list(_shifted(wanted, turn))
    elif isinstance(wanted.encoding, (Int, Spikes)) and not isinstance(source.encoding, Real):
        decoded: list[Op] = [Integrate()] if source.train else []
        coded: list[Op] = [Encode(wanted.steps)] if wanted.train else []
        for requant in _requants(source, wanted.encoding):
            yield [*resized, *decoded, requant, *coded]
    yield resized


def _resized(source: Tensor, wanted: Tensor) -> Iterator[Op]:
    if source.shape == wanted.shape or len(source.shape) != len(wanted.shape):
        return
    stop = tuple(min(a, b) for a, b in zip(source.shape, wanted.shape, strict=True))
    if stop != source.shape:
        yield Slice((0,) * len(stop), stop, (1,) * len(stop))
    if stop != wanted.shape:
        yield Pad(tuple(n for a, b in zip(stop, wanted.shape, strict=True) for n in (0, b - a)))


def _shifted(wanted: Tensor, turn: int) -> Iterator[Op]:
    """Each value in its neighbour's place, by ops that only move values: such run without arithmetic on reals, too."""
    axis = len(wanted.shape) - 1 - turn % len(wanted.shape)
    before = [1 if i == axis else 0 for i in range(len(wanted.shape))]
    yield Pad(tuple(n for count in before for n in (count, 0)))
    yield Slice((0,) * len(before), wanted.shape, (1,) * len(before))


def _requants(source: Tensor, wanted: Int | Spikes) -> Iterator[Requant]:
    """The range of one type turned round onto another's: exactly, or roughly where products would be too wide."""
    scale = float(wanted.scale.known[0])
    if Scale.of(scale) != wanted.scale:
        return
    lo, hi = source.range.with_zero().hull  # a pad lets zero in
    span, reach = max(1, hi - lo), wanted.hi - wanted.lo
    for mul, div in ((reach, span), (1, max(1, span // max(1, reach)))):
        add = wanted.lo * div + mul * hi
        if max(abs(add), div) < 2**62:
            yield Requant(Array.of([-mul]), Array.of([add]), div, wanted.lo, wanted.hi, scale)


def is_neuron(name: str) -> bool:
    """Whether an op of this name fires."""
    return issubclass(find("ops", name), Neuron)
