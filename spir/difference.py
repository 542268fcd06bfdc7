"""Where two networks part: decoded values, layer by layer, and which layer added what.

Every value that both modules name, and the output, is compared on the same inputs. Its difference is split by asking
what the reference would make of the candidate's operands. Of one value let

    r   be what the reference decodes to,
    c   what the candidate decodes to,
    e   what the reference's own nodes give when every shared value before it is the candidate's,
    k   e clamped to what the candidate's value can stand for.

Then, element by element and with signs,

    c - r  =  (e - r)  +  (k - e)  +  (c - k)
              upstream    clipping    rounding

* **upstream**: the operands differ already, and an exact layer would show it. It is 0 where no shared value but the
  input stands before, as in the first layer.
* **clipping**: saturation. The range is the type's, ``lo * scale .. hi * scale``, and that of the `clip` or
  `dequantize` that makes a real value; a real value without one is not clipped.
* **rounding**: the rest, all that the candidate's layer adds on equal operands: rounded weights, biases, multipliers
  and codes of everything between it and the shared values before it.

Operands are handed to the reference in its own types: reals and equal steps exactly, else as the nearest code, halves
up, inside the range of the type. Where both decode alike a train is the reference's own, else one that decodes to the
code. So the finer network is the reference, or else the coarseness of its operands counts as rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from spir import batches, interpreter
from spir.backend import Executable
from spir.errors import error, located
from spir.ir import Module, Node
from spir.ops._linear import channelwise
from spir.ops.clip import Clip
from spir.ops.dequantize import Dequantize
from spir.probes import framed
from spir.types import Real, Reals, Stored, Tensor
from spir.verify import verify

SCHEMA = "spir-diff/1"
BATCH_BYTES = 2**29
LARGEST = float(np.nextafter(2.0**63, 0))  # the largest float64 that is an int64


@attrs.frozen
class Layer:
    """How one value of the candidate differs from the reference's, over all samples.

    Attributes:
        value: its name in the reference.
        candidate: its name in the candidate; another one only for the output.
        type: its type in the candidate.
        origin: where it comes from in the user's model.
        elements: numbers compared.
        differing: numbers that are not the same.
        largest: largest absolute difference.
        mean: mean absolute difference.
        magnitude: largest magnitude of the reference.
        channel: the channel (axis 0 of a sample) with the largest mean absolute difference; None where nothing differs.
        channel_mean: that mean.
        clipped: numbers that the candidate saturates.
        clipping: mean absolute part of the difference; so are the next two.
        rounding: see the module.
        upstream: see the module.
    """

    value: str
    candidate: str
    type: str
    origin: str
    elements: int
    differing: int
    largest: float
    mean: float
    magnitude: float
    channel: int | None
    channel_mean: float
    clipped: int
    clipping: float
    rounding: float
    upstream: float

    @property
    def relative(self) -> float | None:
        """Largest difference over largest magnitude; None where the reference is 0 and the candidate is not."""
        if not self.largest:
            return 0.0
        return self.largest / self.magnitude if self.magnitude else None


@attrs.frozen
class Difference:
    """All layers in the reference's order, and shared names whose shapes differ, so that they are not compared."""

    samples: int
    layers: tuple[Layer, ...]
    unlike: tuple[str, ...] = ()

    @property
    def differs(self) -> bool:
        """Whether anything does."""
        return bool(self.unlike) or self.first is not None

    @property
    def first(self) -> Layer | None:
        """The first layer that differs, in order of definition."""
        return next((layer for layer in self.layers if layer.differing), None)

    def json(self) -> dict[str, Any]:
        """Plain data of schema ``spir-diff/1``."""
        return {
            "schema": SCHEMA,
            "samples": self.samples,
            "differs": self.differs,
            "first": self.first.value if self.first else None,
            "layers": [{**attrs.asdict(layer), "relative": layer.relative} for layer in self.layers],
            "unlike": list(self.unlike),
        }

    def __str__(self) -> str:
        wide = max(20, *(len(_named(layer)) for layer in self.layers)) + 2
        titles = ("elements", "differ", "largest", "of range", "mean", "clipping", "rounding", "upstream")
        head = f"{'value':<{wide}}" + "".join(f"{t:>12}" for t in titles) + "  worst channel"
        rows = [
            f"{_named(layer):<{wide}}{layer.elements:>12}{layer.differing:>12}{layer.largest:>12.4g}"
            f"{'-' if layer.relative is None else format(layer.relative, '.4g'):>12}{layer.mean:>12.4g}"
            f"{layer.clipping:>12.4g}{layer.rounding:>12.4g}{layer.upstream:>12.4g}"
            + ("" if layer.channel is None else f"  {layer.channel} ({layer.channel_mean:.4g})")
            for layer in self.layers
        ]
        lines = [f"{self.samples} samples; mean, clipping, rounding, upstream: mean absolute differences", head, *rows]
        if self.first is not None:
            place = f", from {self.first.origin}" if self.first.origin else ""
            lines.append(f"first to differ: %{self.first.value}{place}")
        if self.unlike:
            lines.append(f"of another shape, not compared: {', '.join(f'%{name}' for name in self.unlike)}")
        if not self.differs:
            lines.append("nothing differs")
        return "\n".join(lines)


def _named(layer: Layer) -> str:
    return layer.value if layer.value == layer.candidate else f"{layer.value} ~ {layer.candidate}"


def compare(
    reference: Module,
    candidate: Module,
    x: NDArray[Any],
    *,
    executable: Executable | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Difference:
    """Compares two modules value by value, in batches that fit in memory.

    Args:
        reference: what counts as right; the finer network of the two.
        candidate: what is judged.
        x: inputs ``[N, *shape]``, as both take them; ``[T, N, *shape]`` where they read trains.
        executable: runs the candidate; the reference interpreter by default.
        progress: called with the number of samples done.

    Raises:
        SpirError[type]: inputs of unequal type. SpirError[usage]: nothing to compare. SpirError[data]: samples that
            do not fit, or values that are no numbers. SpirError[weights]: a module without its arrays.
    """
    if reference.input.type != candidate.input.type:
        raise error(
            "type",
            f"one network takes {reference.input.type}, the other {candidate.input.type}",
            fix="compare networks that take the same input",
        )
    pairs, unlike = _pairs(verify(reference), verify(candidate))
    reference.input.type.read(x if x.ndim < 2 else x[:, :1] if reference.input.type.train else x[:1])
    samples, done = batches.count(reference, x), 0
    if not samples:
        raise error("data", "there are no samples to compare on", fix="give one or more")
    tallies = {name: _Tally(reference.definitions[name], candidate, other) for name, other in pairs.items()}
    for part in batches.cut(reference, x, batches.at_once(BATCH_BYTES, reference, candidate)):
        found = _run(candidate, part, pairs, executable)
        for name, wanted, expected in _both(reference, part, pairs, found):
            tallies[name].add(wanted, expected, found[pairs[name]])
        progress(done := done + batches.count(reference, part))
    return Difference(samples, tuple(tally.layer() for tally in tallies.values()), unlike)


def _pairs(reference: Module, candidate: Module) -> tuple[dict[str, str], tuple[str, ...]]:
    """Names to compare, from the reference to the candidate, in the reference's order; and those of unequal shape."""
    pairs, unlike = {}, []
    for node in reference.nodes:
        shared = node.result in candidate.definitions
        other = node.result if shared else candidate.output if node.result == reference.output else None
        if other is None or other not in candidate.definitions:
            continue
        if candidate.types[other].shape == node.type.shape:
            pairs[node.result] = other
        else:
            unlike.append(node.result)
    if not pairs:
        raise error(
            "usage",
            "the two networks share no value: no name with one shape, nor outputs of one shape",
            fix="compare stages of one compilation, or compilations of one model",
        )
    return pairs, tuple(unlike)


def _run(
    candidate: Module, x: NDArray[Any], pairs: Mapping[str, str], executable: Executable | None
) -> dict[str, Reals]:
    """The candidate's decoded values."""
    keep = "|".join(pairs.values())
    ran = interpreter.walk(candidate, x, keep) if executable is None else iter(executable.run(x, keep).items())
    return {name: candidate.types[name].decode(stored) for name, stored in ran}


def _both(
    module: Module, x: NDArray[Any], pairs: Mapping[str, str], found: Mapping[str, Reals]
) -> Iterator[tuple[str, Reals, Reals]]:
    """For each pair its name, what the module gives, and what it gives on the candidate's values ``found``."""
    last = {name: (nodes[-1].result if nodes else name) for name, nodes in module.readers.items()}
    source = module.input.type.read(x)
    values: dict[str, tuple[Stored, Stored]] = {module.input.name: (source, source)}
    for node in module.nodes:
        operands = [values[name] for name in node.operands]
        with located(op=str(node.op.name), from_=str(node.origin)):
            own = node.op.reference(module.operand_types(node), *(a for a, _ in operands))
            same = all(a is b for a, b in operands)
            expected = own if same else node.op.reference(module.operand_types(node), *(b for _, b in operands))
        if node.result in pairs:
            wanted, given = node.type.decode(own), found[pairs[node.result]]
            yield node.result, wanted, node.type.decode(expected)
            alike = wanted == given
            expected = own if alike.all() else np.where(alike, own, encode(node.type, given))
        values[node.result] = own, expected
        for name in dict.fromkeys((*node.operands, node.result)):
            if last[name] == node.result:
                del values[name]


def encode(type_: Tensor, values: Reals) -> Stored:
    """Stored numbers of a type that decode to reals ``[N, *shape]``: the nearest code, halves up, inside the range."""
    if isinstance(type_.encoding, Real):
        return values
    lo, hi = type_.encoding.lo, type_.encoding.hi
    codes = np.floor(values / channelwise(type_.encoding.scale.floats(), values.ndim - 1) + 0.5)
    whole = np.clip(np.clip(codes, -LARGEST, LARGEST).astype(np.int64), lo, hi)
    return whole if type_.train is None else framed(type_.train, whole)


def limits(module: Module, name: str) -> tuple[Reals, Reals]:
    """The least and the largest number that a value can stand for, per tensor ``[1]`` or per channel ``[C]``."""
    node = module.definitions[name]
    match node.op:
        case Clip(lo=lo, hi=hi):
            return lo.values, hi.values
        case Dequantize():
            encoding = module.types[node.operands[0]].encoding
        case _:
            encoding = node.type.encoding
    if isinstance(encoding, Real):
        return np.array([-math.inf]), np.array([math.inf])
    scale = encoding.scale.floats()
    return encoding.lo * scale, encoding.hi * scale


class _Tally:
    """Adds up one value's differences, batch by batch."""

    def __init__(self, node: Node, candidate: Module, name: str) -> None:
        self._node, self._name, self._type = node, name, candidate.types[name]
        self._lo, self._hi = (channelwise(end, len(node.type.shape)) for end in limits(candidate, name))
        self._elements = self._differing = self._clipped = 0
        self._largest = self._magnitude = 0.0
        self._channels = np.zeros(node.type.shape[0])
        self._parts = np.zeros(3)

    def add(self, wanted: Reals, expected: Reals, found: Reals) -> None:
        """One batch: ``r``, ``e`` and ``c`` of the module's docstring, each ``[N, *shape]``."""
        for side, values in (("reference", wanted), ("candidate", found), ("reference", expected)):
            if not np.isfinite(values).all():
                raise error(
                    "data",
                    f"%{self._node.result} of the {side} holds NaN or infinite values",
                    from_=str(self._node.origin),
                    fix="smaller inputs, or repair the weights",
                )
        difference = np.abs(found - wanted)
        clamped = np.clip(expected, self._lo, self._hi)
        self._elements += difference.size
        self._differing += int((difference != 0).sum())
        self._clipped += int((clamped != expected).sum())
        self._largest = max(self._largest, float(difference.max()))
        self._magnitude = max(self._magnitude, float(np.abs(wanted).max()))
        self._channels += difference.sum(axis=(0, *range(2, difference.ndim)))
        self._parts += [float(np.abs(p).sum()) for p in (clamped - expected, found - clamped, expected - wanted)]

    def layer(self) -> Layer:
        """The sums as means."""
        clipping, rounding, upstream = (float(part) / self._elements for part in self._parts)
        channel = int(self._channels.argmax()) if self._differing else None
        return Layer(
            value=self._node.result,
            candidate=self._name,
            type=str(self._type),
            origin=str(self._node.origin),
            elements=self._elements,
            differing=self._differing,
            largest=self._largest,
            mean=float(self._channels.sum()) / self._elements,
            magnitude=self._magnitude,
            channel=channel,
            channel_mean=0.0
            if channel is None
            else float(self._channels[channel]) * len(self._channels) / self._elements,
            clipped=self._clipped,
            clipping=clipping,
            rounding=rounding,
            upstream=upstream,
        )
