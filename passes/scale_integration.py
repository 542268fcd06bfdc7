"""scale-integration: sums that fit an accumulator of n bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.contracts import Calibrated, Contract
from spir.errors import Diagnostic, SpirError, error, raise_all
from spir.ir import Array, Module, Node
from spir.ops._accumulation import MOST, errors, frame_bounds, scaled
from spir.ops._linear import Relabelling, channelwise
from spir.ops._threshold import Divisor, divisors, nearest
from spir.ops.integrate import Integrate
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.requant import Requant
from spir.options import option
from spir.ranges import Ranges, analyse
from spir.rewriting import Context, Pass, Rewriter
from spir.types import Integers, Interval, Tensor, Train, scale_of, weights

SAMPLES = 64
"""Calibration samples that the error of every layer is measured on."""
Law = tuple[Array, Array, Divisor]
Extent = tuple[Integers, Integers]


@attrs.frozen
class ScaleIntegration(Pass):
    """integrate, neuron_stem -> the same with shift r: every weighted term is counted in 2^r, rounded half up.

    ``r = guaranteed`` takes the least r with which no input whatever takes the state beyond ``bits``: the sums of the
    largest terms, with the very shift that is performed. ``r = data`` takes the least that holds the states of the
    calibration data: overflow is possible then, the accumulator must saturate, and notes say how much room was left.
    With ``per = channel`` each channel has its own, but for readouts, whose channels are compared with each other.
    What rounding adds on average is taken out of the constant of the law. A sum of one step that does not fit its
    register is refused (E-ISUM): no r mends that. A layer with r = 0 stays exact; every other is bounded, and notes
    give the bound in steps of its codes, and the error on the first 64 samples where there are any.
    ``divisor`` asks for a law without multiplier: division by one integer of 1..divisor a channel, of which b-bit
    thresholds are multiples, so that the state must hold divisor x 2^(b-1) too.

    Source: SDANN eqs 15 to 19 (the printed equations are lost: a reconstruction), with derived bounds.
    """

    name: ClassVar[str] = "scale-integration"
    bits: int = option(16, "bits of the accumulator, with its sign", ge=4, le=63)
    sum_bits: int | None = option(None, "bits of the sum of one step, where they differ from `bits`", ge=4, le=63)
    r: str = option("guaranteed", "from proved bounds, or from the data", one_of=("guaranteed", "data"))
    per: str = option("layer", "one r a layer, or one a channel", one_of=("layer", "channel"))
    overflow: str = option("saturate", "what the accumulator does", one_of=("saturate", "wrap"))
    divisor: int | None = option(None, "the largest divisor of a chip without multiplier: 255", ge=1, le=2**31 - 1)

    def contract(self) -> Contract:
        """Bounded per neuron; what it does to the network is measured."""
        return Calibrated()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses what no r mends, all at once; then scales."""
        nodes = [n for n in module.nodes if self.selects(n) and _accumulates(n, module)]
        self._refuse(nodes, module, context)
        found = analyse(module)
        raise_all(refusal for n in nodes if (refusal := self._sum(n, found[n.operands[0]])) is not None)
        seen = self._seen(nodes, module, context) if self.r == "data" else {}
        chosen = {n.result: self._chosen(n, module, found, seen) for n in nodes}
        divides = self.divisor is not None and self.r == "guaranteed"  # else no sum has bounds that a register keeps
        sums = {n.result: _ends(n, module, found, _shift(chosen[n.result]))[0] for n in nodes if divides}
        room = {n.result: self._room(n, chosen[n.result], found, seen) for n in nodes} if self.r == "data" else {}
        walk = _Walk(self, Rewriter(module, self.name), context, chosen, sums, room)
        for node in module.nodes:  # laws behind a chosen sum follow it, whatever `layers` says
            if (value := walk.step(node)) is None:
                walk.rewriter.keep(node)
            else:
                walk.rewriter.replace(node.result, value)
        after = walk.rewriter.finish()
        walk.measure(module, after)
        return after

    def _refuse(self, nodes: list[Node], module: Module, context: Context) -> None:
        if not nodes:
            raise error(
                "type",
                f"{self.name} finds no sums of bit-coded trains",
                fix="derive-thresholds{neuron=stem} before, over the same layers",
            )
        for node in nodes:
            op: Any = node.op
            if scaled(op.shift):
                raise error(
                    "type",
                    f"%{node.result} is scaled already",
                    from_=str(node.origin),
                    fix="scale once: its options go to the clause that did it, or to @sdann{accumulator=16, r=...}",
                )
            divides = self.divisor is not None and isinstance(op, NeuronStem)
            if divides and (op.mul.values.ndim > 1 or op.mul.values.min() < 1):
                raise error(
                    "E-DIVISOR",
                    f"%{node.result} multiplies by {op.mul.values.min()}..{op.mul.values.max()}, one a "
                    f"{'position' if op.mul.values.ndim > 1 else 'channel'}, and one positive divisor does not do that",
                    from_=str(node.origin),
                    fix="no divisor",
                )
        if self.r == "data" and context.data is None:
            raise error(
                "data", f"{self.name}{{r=data}} needs calibration data", fix="give data=images, or r=guaranteed"
            )
        if self.r == "data" and self.overflow == "wrap":
            raise error(
                "E-CALIB-OVF",
                f"{self.name}: r from data lets rare sums overflow, and a register that wraps turns their signs",
                from_=str(nodes[0].origin),
                fix="r=guaranteed, or overflow=saturate where the chip does that",
            )
        for node in nodes:
            waiting = [node] if isinstance(node.op, Integrate) else []
            while waiting:
                for reader in module.readers[waiting.pop().result]:
                    if isinstance(reader.op, (MaxPool, Relabelling)):
                        waiting.append(reader)
                    elif not isinstance(reader.op, Requant if self.divisor is None else ()) and not reader.op.host:
                        raise error(
                            "type",
                            f"%{reader.result} = {reader.op.name} reads %{node.result}, and sums are scaled apart"
                            if self.divisor is None
                            else f"%{reader.result} = {reader.op.name} reads %{node.result}, and only neurons divide",
                            from_=str(reader.origin),
                            fix="lower-max-pool and fuse-neuron before, so that only neurons read sums",
                        )

    def _sum(self, node: Node, read: Ranges) -> SpirError | None:
        """The refusal of a sum of one step that its register does not hold."""
        frame, width = read.first | read.rest, self.sum_bits or self.bits
        if max(frame.bits) <= width:
            return None
        channel = frame.bits.index(max(frame.bits))
        lo, hi = int(frame.lo[channel]), int(frame.hi[channel])
        beyond = max(hi - (2 ** (width - 1) - 1), -(2 ** (width - 1)) - lo)
        return error(
            "E-ISUM",
            f"the sum of one step of %{node.operands[0]} reaches {lo}..{hi} in channel {channel}, {beyond} beyond a "
            f"register of {width} bits",
            from_=str(node.origin),
            fix="calibrate-range{pools=on} where average pools are read, propagate-scales{join=rescale} where branches "
            f"meet, both in @sdann; or weights of fewer bits, by {max(frame.bits) - width}: quantize{{weights=...}}, "
            "@sdann{weights=...}",
        )

    def _seen(self, nodes: list[Node], module: Module, context: Context) -> dict[str, Extent]:
        """The least and the largest state of every accumulator on the data, by its operand, per channel."""
        assert context.data is not None  # _refuse asked
        names = {n.operands[0] for n in nodes}
        seen: dict[str, Extent] = {}
        for stored in context.stored(module, context.data, "|".join(sorted(names))):
            for name in names:
                train = module.types[name].train
                assert train is not None  # accumulators read trains
                for lo, hi in _states(np.asarray(stored[name]), train):
                    low, high = seen.get(name, (lo, hi))
                    seen[name] = np.minimum(low, lo), np.maximum(high, hi)
        return seen

    def _chosen(self, node: Node, module: Module, found: Mapping[str, Ranges], seen: Mapping[str, Extent]) -> Integers:
        """r, ``[1]`` or ``[C]``."""
        type_ = module.operand_types(node)[0]
        assert type_.train is not None  # only those accumulate
        channels = type_.shape[0]
        by = np.zeros(channels, dtype=np.int64)
        for r in range(MOST):
            z: Interval | None = None
            if self.r == "guaranteed":
                z, held = _ends(node, module, found, r)
            else:
                held = _reached(seen[node.operands[0]], r, type_.steps)
            bias = _bias_bounds(node, r)
            held = held | (held + bias) if bias is not None else held
            fits = np.array([bits <= self.bits for bits in held.broadcast(channels).bits])
            if self.divisor is not None and isinstance(node.op, NeuronStem):
                fits &= self._divides(node.op, r, type_, held, z)
            by = np.where((by == r) & ~fits, r + 1, by)
            if (by <= r).all():
                break
        else:
            raise error(
                "E-DIVISOR" if self.divisor is not None else "E-VRANGE",
                f"no r lets %{node.result} fit {self.bits} bits",
                from_=str(node.origin),
                fix="more bits, fewer bits of codes or weights, or a larger divisor",
            )
        by = by if self.per == "channel" and isinstance(node.op, NeuronStem) else by.max(keepdims=True)
        if self.divisor is not None and isinstance(node.op, NeuronStem):
            quotients = _quotients(node.op, by, channels)
            least = quotients.index(min(quotients))
            if 2 * quotients[least] < 1:
                raise error(
                    "E-DIVISOR",
                    f"%{node.result} would be divided by {float(quotients[least]):.2g} in channel {least}, and the "
                    "least divisor is 1",
                    from_=str(node.origin),
                    fix="per=channel, " * (self.per == "layer")
                    + "more bits, fewer bits of codes, or r=data where the register saturates (overflow=saturate)",
                )
        return by

    def _room(self, node: Node, by: Integers, found: Mapping[str, Ranges], seen: Mapping[str, Extent]) -> str:
        """How much of the register the states of the data left, and what proved bounds would need."""
        (lo, hi), read = seen[node.operands[0]], found[node.operands[0]]
        each = np.broadcast_to(by, lo.shape)
        most = max(max(-int(a), int(b)) / 2 ** int(r) for a, b, r in zip(lo, hi, each, strict=True))
        bounds = (read.value | read.prefix).broadcast(len(lo))
        proved = max(max(-int(a), int(b)) / 2 ** int(r) for a, b, r in zip(bounds.lo, bounds.hi, each, strict=True))
        limit = 2 ** (self.bits - 1)
        filled = f"states of the data fill {100 * most / limit:.0f} % of the register"
        return f"{filled}, proved bounds {100 * proved / limit:.0f} %"

    def _divides(self, op: NeuronStem, r: int, x: Tensor, held: Interval, z: Interval | None) -> NDArray[np.bool_]:
        """Whether a divisor within the limit stands for the law at r, channel by channel, and the state holds it."""
        channels, limit = x.shape[0], 2 ** (self.bits - 1) - 1
        _, add, div = divided(op, np.array([r]), x.steps, z)
        rows = np.broadcast_to(add.values, (channels, *add.values.shape[1:])).reshape(channels, -1).astype(object)
        by, state = np.broadcast_to(divisors(div).astype(object), (channels,)), held.broadcast(channels)
        inside = (state.hi + rows.max(axis=1) <= limit) & (state.lo + rows.min(axis=1) >= -limit)
        return np.array((by <= self.divisor) & (by * 2 ** (op.bits - 1) <= limit) & inside, dtype=bool)


@attrs.frozen(eq=False)
class _Walk:
    """The rewrite, and what it has to say."""

    step_: ScaleIntegration
    rewriter: Rewriter
    context: Context
    chosen: Mapping[str, Integers]
    sums: Mapping[str, Interval]
    room: Mapping[str, str]
    behind: dict[str, int] = attrs.field(factory=dict)
    """Scaled integers of the old module, and how many frames were summed."""
    notes: dict[str, str] = attrs.field(factory=dict)

    def step(self, node: Node) -> str | None:
        """One node."""
        match node.op:
            case NeuronStem() if node.result in self.chosen:
                by, steps = self.chosen[node.result], self.rewriter.module.operand_types(node)[0].steps
                mul, add, div = self._law(node, node.op, by, steps)
                made = attrs.evolve(node.op, mul=mul, add=add, div=div, shift=_shift(by))
                return self._emit(made, node)
            case Integrate() if node.result in self.chosen:
                by, steps = self.chosen[node.result], self.rewriter.module.operand_types(node)[0].steps
                self.behind[node.result] = steps
                bias = node.op.bias
                if bias is not None and by.any():
                    bias = _scaled_bias(bias, by, steps)
                if node.result == self.rewriter.module.output or node.op.bias is not None:
                    ends = [errors(int(r), steps) for r in by]
                    half = Fraction(1, 2)  # of a bias, which is a whole number of steps again
                    found = [
                        (least, most) if bias is None else (least - mean - half, most - mean + half)
                        for least, mean, most in ends
                    ]
                    self.notes[node.result] = self._label(node, by, found, "steps of the sum")
                return self._emit(attrs.evolve(node.op, bias=bias, shift=_shift(by)), node)
            case MaxPool() | Relabelling() if node.operands[0] in self.behind:
                self.behind[node.result] = self.behind[node.operands[0]]
            case Requant() if node.operands[0] in self.behind:
                by = self._scaled_by(node.operands[0])
                mul, add, div = self._law(node, node.op, by, self.behind[node.operands[0]])
                return self._emit(attrs.evolve(node.op, mul=mul, add=add, div=div), node)
        return None

    def _scaled_by(self, old: str) -> Integers:
        """By which r a value counts that a scaled sum became, ``[1]`` or ``[C]``: channels may have moved."""
        before, after = (
            scale_of(t).known for t in (self.rewriter.module.types[old], self.rewriter.type(self.rewriter.now(old)))
        )
        size = max(len(before), len(after))
        pairs = zip(before * (size // len(before)), after * (size // len(after)), strict=True)
        return np.array([(new / old).numerator.bit_length() - 1 for old, new in pairs], dtype=np.int64)

    def _emit(self, op: Any, node: Node) -> str:
        operands = (self.rewriter.now(o) for o in node.operands)
        return self.rewriter.emit(op, *operands, name=node.result, origin=node.origin)

    def _law(self, node: Node, op: Any, by: Integers, steps: int) -> Law:
        """The law on sums that count in 2^r, without the mean of what rounding adds."""
        limit = self.step_.divisor
        made = rescaled(op, by, steps) if limit is None else divided(op, by, steps, self.sums.get(node.result))
        mul, add, div = made
        pairs = _pairs(mul.values, divisors(div))
        size = max(len(pairs), len(by))
        each = np.broadcast_to(by, (size,))
        moved = [Fraction(int(m), int(d)) for m, d in pairs] * (size // len(pairs))
        found = [
            ((least - mean) * m, (most - mean) * m)
            for (least, mean, most), m in zip((errors(int(r), steps) for r in each), moved, strict=True)
        ]
        self.notes[node.result] = self._label(node, by, found, "codes")
        if limit is not None:
            worst = max(abs(_whole(q) / q - 1) for q in _quotients(op, by, size))
            note = (
                self.notes[node.result]
                .replace(": exact", ": no sum is rounded")
                .replace(" bounded,", " but for divisors,")
            )
            self.notes[node.result] = (
                f"{note}; divisors {divisors(div).min()}..{divisors(div).max()} miss by {_text(worst)}"
            )
        return mul, add, div

    def _label(self, node: Node, by: Integers, found: list[tuple[Fraction, Fraction]], unit: str) -> str:
        """What r does to a layer."""
        shown = str(int(by[0])) if len(set(by.tolist())) == 1 else f"{by.min()}..{by.max()}"
        how = f"%{node.result}: r = {shown}, {self.step_.r}"
        if not by.any():
            return f"{how}: exact"
        ends = [end for pair in found for end in pair]
        text = f"{how}: bounded, {float(min(ends)):+.2g} to {float(max(ends)):+.2g} {unit} before they are rounded"
        return Diagnostic("E-SCALED", text).render("note")

    def measure(self, before: Module, after: Module) -> None:
        """Writes the notes, with what changed on the first samples."""
        data, changed = self.context.data, dict[str, str]()
        if data is not None:
            changed = _measured(
                before, after, [n for n in self.notes if n in after.types], data[:SAMPLES], self.context
            )
        for name, text in self.notes.items():
            more = [part[name] for part in (self.room, changed) if name in part]
            self.context.note("; ".join([text, *more]))


def _accumulates(node: Node, module: Module) -> bool:
    (type_, *_) = module.operand_types(node)
    return isinstance(node.op, (NeuronStem, Integrate)) and type_.train is not None and type_.train.code == "bits"


def _ends(node: Node, module: Module, found: Mapping[str, Ranges], shift: int | Array) -> tuple[Interval, Interval]:
    """Proved bounds of the state in 2^r: after all frames, and after any number."""
    read = found[node.operands[0]]
    return frame_bounds(read.first, read.rest, weights("bits", module.operand_types(node)[0].steps), shift)


def _shift(by: Integers) -> int | Array:
    return int(by[0]) if len(set(by.tolist())) == 1 else Array.of(by)


def _states(stored: NDArray[Any], train: Train) -> Iterator[Extent]:
    """The least and the largest of every channel after each frame."""
    state = np.zeros(stored.shape[1:], dtype=np.int64)
    over = (0, *range(2, state.ndim))
    for frame, factor in zip(stored, weights(train.code, train.steps), strict=True):
        state += frame * factor
        yield state.min(axis=over), state.max(axis=over)


def _reached(seen: Extent, r: int, steps: int) -> Interval:
    """The states that were seen, in 2^r, with all that rounding may add."""
    lost = Fraction(min(r, steps), 2)
    lo = [math.ceil(Fraction(int(v), 2**r) - lost) for v in seen[0]]
    return Interval.of(lo, [math.floor(Fraction(int(v), 2**r) + lost) for v in seen[1]])


def _bias_bounds(node: Node, r: int) -> Interval | None:
    """What an integral adds in the end, in 2^r."""
    if not isinstance(node.op, Integrate) or node.op.bias is None:
        return None
    rows = node.op.bias.values.astype(object)
    rows = rows.reshape(len(rows), -1)
    return Interval.of(rows.min(axis=1) // 2**r - 1, rows.max(axis=1) // 2**r + 1)


def _scaled_bias(bias: Array, by: Integers, steps: int) -> Array:
    """The bias in 2^r, less the mean of what rounding adds, to the nearest."""
    rows = np.broadcast_to(bias.values, (max(len(by), len(bias.values)), *bias.values.shape[1:])).astype(object)
    each = np.broadcast_to(by, (len(rows),))
    means = [errors(int(r), steps)[1] for r in each]
    half = Fraction(1, 2)
    made = [
        _each(lambda b, r=int(r), m=m: math.floor(Fraction(int(b), 2**r) - m + half), row)
        for row, r, m in zip(rows, each, means, strict=True)
    ]
    return Array.of(np.array(made, dtype=np.int64))


def _each(rule: Callable[..., Any], *x: Any) -> Any:
    """Every element of arrays of Python numbers through a rule."""
    return np.vectorize(rule, otypes=[object])(*x)


def _ratio(a: Any, b: Any) -> Any:
    return _each(lambda x, y: Fraction(int(x), int(y)), a, b)


def _quotients(op: Any, by: Integers, channels: int) -> list[Fraction]:
    """By what a sum in 2^r would be divided, were that to be done by one number: div / (mul 2^r), mul above 0.

    One a channel, of which there are ``channels`` or as many as the law or ``by`` has.
    """
    pairs = _pairs(op.mul.values, divisors(op.div))
    size = max(channels, len(pairs), len(by))
    each = np.broadcast_to(by, (size,)).tolist()
    return [Fraction(d, m * 2**r) for (m, d), r in zip(pairs * (size // len(pairs)), each, strict=True)]


def _pairs(mul: NDArray[Any], div: Integers) -> list[tuple[int, int]]:
    size = max(len(mul), len(div))
    flat = np.abs(mul.reshape(len(mul), -1)).max(axis=1) if mul.ndim > 1 else mul  # the largest, for bounds
    return list(zip(np.broadcast_to(flat, (size,)).tolist(), np.broadcast_to(div, (size,)).tolist(), strict=True))


def _whole(q: Fraction) -> int:
    return max(1, math.floor(q + Fraction(1, 2)))


def rescaled(op: Any, by: Integers, steps: int) -> Law:
    """The law with its multiplier: divided by 2^r less where that divides, else multiplied by 2^r more.

    ``floor((mul 2^r V + add) / (2^r d)) = floor((mul V + floor(add / 2^r)) / d)``, so nothing is lost by the first.
    """
    if not by.any():
        return op.mul, op.add, op.div
    div = divisors(op.div).astype(object)
    add, mul = op.add.values.astype(object), op.mul.values.astype(object)
    size = max(len(by), len(div), len(add), len(mul))
    by, div = (np.broadcast_to(v.astype(object), (size,)) for v in (by, div))
    mul = np.broadcast_to(mul, (size, *mul.shape[1:]))
    add = np.broadcast_to(add, (size, *add.shape[1:]))
    less = all(int(d) % 2 ** int(r) == 0 for d, r in zip(div, by, strict=True))
    rows = []
    for a, m, r in zip(add, mul, by, strict=True):
        out = m * 2 ** int(r) * errors(int(r), steps)[1]
        rows.append(_each(lambda x, o, k=2 ** int(r) if less else 1: math.floor((x - o) / Fraction(k)), a, out))
    raised = mul if less else mul * channelwise(2**by, mul.ndim)
    lowered = div // 2**by if less else div
    return _arrays(raised, np.array(rows, dtype=object), lowered)


def divided(op: Any, by: Integers, steps: int, z: Interval | None = None) -> Law:
    """The law without multiplier: one divisor a channel, and the constant in steps of the sum.

    Where sums lie within ``z``, the smallest constants that give the same codes (`nearest`).
    """
    offset = _ratio(op.add.values.astype(object), channelwise(divisors(op.div).astype(object), op.add.values.ndim))
    size = max(len(by), len(divisors(op.div)), len(op.mul.values), len(offset))
    each = np.broadcast_to(by, (size,))
    whole = [_whole(q) for q in _quotients(op, by, size)]
    rows = []
    for row, d, r in zip(np.broadcast_to(offset, (size, *offset.shape[1:])), whole, each, strict=True):
        mean = errors(int(r), steps)[1]
        rows.append(_each(lambda x, d=d, m=mean: math.floor(x * d - m), row))
    law = _arrays(np.array([1], dtype=object), np.array(rows, dtype=object), np.array(whole, dtype=object))
    if z is None:
        return law
    mul, _, div = law
    return mul, Array.of(nearest((*law, *op.clip), z).astype(np.int64)), div


def _arrays(mul: Any, add: Any, div: Any) -> Law:
    made = div.astype(np.int64)
    single = len(set(made.tolist())) == 1
    return Array.of(mul.astype(np.int64)), Array.of(add.astype(np.int64)), int(made[0]) if single else Array.of(made)


def _text(share: Fraction) -> str:
    return f"{100 * float(share):.2g} %"


def _measured(before: Module, after: Module, names: list[str], x: NDArray[Any], context: Context) -> dict[str, str]:
    """What changed in every layer, in its own steps, on samples; upstream changes included."""
    pattern = "|".join(names)
    parts = [list(context.evaluate(m, x, pattern)) for m in (before, after)]
    found = {}
    for name in names:
        old, new = (np.concatenate([p[name] for p in side]) for side in parts)
        encoding: Any = after.types[name].encoding
        step = channelwise(encoding.scale.floats(), old.ndim - 1)
        change = np.abs((new - old) / step)
        found[name] = (
            f"on {len(x)} samples {change.mean():.2g} on average, {change.max():.3g} at most, what came before included"
        )
    return found
