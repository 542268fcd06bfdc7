"""propagate-scales: a network of reals with quantised weights and activations to the integer network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

import attrs
import numpy as np

from spir.contracts import Bounded, Calibrated, Contract
from spir.errors import SpirError, error
from spir.ir import Array, Module, Node, Op, Origin
from spir.ops._linear import LinearMap, Relabelling, WeightedMap, channelwise, per_channel
from spir.ops.add import Add
from spir.ops.batch_norm import BatchNorm
from spir.ops.concat import Concat
from spir.ops.dequantize import Dequantize
from spir.ops.integrate import Integrate
from spir.ops.max_pool import MaxPool
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.options import option
from spir.passes._codes import is_code
from spir.passes._gains import offset_behind
from spir.passes._sums import read_by_a_sum
from spir.rewriting import Context, Pass, Rewriter
from spir.types import REGISTER_BITS, Int, Real, Reals, scale_of

THRESHOLD = 8
"""Bits that an integer threshold has at least; more where more codes ask for them, so that none is moved by 1/8."""
CUT = Fraction(10, 9)
"""How much of a range steps that are whole may leave out: a tenth."""
WHOLE_BITS = 4
"""Bits of the multiples of steps that are whole, so that scaled integration divides what lies beyond them."""
FINER = 16
"""Bits that a code is multiplied by where a bias is added to it."""


@attrs.frozen
class PropagateScales(Pass):
    """dequantize; linear ops on reals; quantize -> linear ops on integers; requant.  Output -> integrate (readout).

    Nothing is moved but biases: scales live in types, so an integer value's scale is known from its operands. Each
    requant solves M = S_x S_w / S_y as mul / 2^s, s per channel (SDANN eqs 8-10, 17), its bias and the half of
    round-half-up inside ``add``; with ``grid = threshold`` it is (1, bias + theta / 2, theta), theta a whole number of
    steps of the sum, without any multiplier. Where branches of a sum, or of a concatenation that a sum reads, have
    unequal scales, ``wide`` multiplies them by integers of ``width`` bits to one fine scale; ``rescale`` requantises
    each branch that is no activation by a signed code, over the range that the calibration data reach, in steps that
    are a power of two times those of the other branch. Branches that ``width`` bits cannot join are rescaled; notes say
    at what cost. With ``whole`` steps of activations behind pools and joins, whose sums have one scale, are whole
    multiples of it of 4 bits, the least that leave out a tenth of the range at most: a divisor is their law, without a
    multiplier. What meets others in a concatenation keeps its step. What the host computes behind the last layer reads
    the dequantised readout.
    """

    name: ClassVar[str] = "propagate-scales"
    join: str = option("wide", "how branches of unequal scale meet", one_of=("wide", "rescale"))
    bits: int = option(24, "bits of the multipliers of requant", ge=2, le=31)
    width: int = option(32, "bits of the multipliers of join = wide", ge=13, le=48)
    factor: int = option(12, "bits of the smallest inexact multiplier of join = wide, at least", ge=4, le=24)
    grid: str = option("shift", "requant by multiplier and shift, or by a threshold", one_of=("shift", "threshold"))
    whole: bool = option(False, "behind pools and joins, steps are whole multiples of those of the sum")

    def contract(self) -> Contract:
        """Rounded multipliers and biases, measured; with rescale also a code more."""
        return Calibrated() if self.join == "rescale" else Bounded()

    def run(self, module: Module, context: Context) -> Module:
        """Walks the module once; the joins that rescale look at the calibration data first."""
        if self.layers != "*":
            what = f"{self.name} converts the whole network, because scales meet across layers"
            raise error("option", what, fix="leave layers out, and choose layers in calibrate-range and quantize")
        if all(isinstance(t.encoding, Real) for t in module.types.values()):
            raise error(
                "type",
                f"{self.name} finds no integers, and would leave a network of reals",
                fix="run calibrate-range and quantize before",
            )
        walk = _Walk(self, Rewriter(module, self.name), context)
        for node in module.nodes:
            walk.step(node)
        return walk.finish()


@attrs.frozen(eq=False)
class _Carried:
    """An integer value of the new module, and the real bias ``[*shape]`` that it lacks."""

    value: str
    bias: Reals | None = None


@attrs.define(eq=False)
class _Walk:
    step_: PropagateScales
    rewriter: Rewriter
    context: Context
    carried: dict[str, _Carried] = attrs.field(factory=dict)
    reached: dict[str, float] = attrs.field(factory=dict)
    hosted: dict[str, str] = attrs.field(factory=dict)

    def step(self, node: Node) -> None:
        """One node of the old module."""
        operands = [self.carried[o] for o in node.operands if o in self.carried]
        match node.op:
            case Dequantize():
                code = self.rewriter.now(node.operands[0])
                self.carried[node.result] = operands[0] if operands else _Carried(code)
            case Quantize() if not operands:
                name = self.named(node)
                code = self.rewriter.emit(node.op, self.rewriter.now(node.operands[0]), name=name, origin=node.origin)
                self.rewriter.replace(node.result, code)
            case Quantize() if operands:
                op = self.whole(node, operands[0])
                self.carried[node.result] = _Carried(self.requant(node, op, operands[0], self.named(node)))
            case LinearMap() if operands:
                self.carried[node.result] = self.linear(node, node.op, operands)
            case Shift() if operands:
                self.carried[node.result] = self.shift(node.op, operands[0])
            case MaxPool() if operands:
                self.carried[node.result] = self.pool(node, node.op, operands[0])
            case _ if operands and node.op.host:
                self.context.note(f"%{node.result}: {node.op.name} is left to the host, on reals")
                reals = (self.real(name) for name in node.operands)
                self.rewriter.emit(node.op, *reals, name=node.result, origin=node.origin)
            case _ if operands:
                raise error(
                    "type",
                    f"%{node.result} = {node.op.name} stands between quantised values and works on reals",
                    from_=str(node.origin),
                    fix="run fold-bn before quantize"
                    if isinstance(node.op, BatchNorm)
                    else "calibrate-range and quantize must cover this layer before propagate-scales",
                )
            case _:
                self.rewriter.keep(node)

    def named(self, node: Node) -> str:
        """The name that stays: the decoded value's, where there is one."""
        readers = self.rewriter.module.readers[node.result]
        single = len(readers) == 1 and isinstance(readers[0].op, Dequantize)
        return readers[0].result if single else node.result

    def linear(self, node: Node, op: LinearMap, operands: list[_Carried]) -> _Carried:
        """The same map on integers; its bias, and what the operands lacked, is carried on."""
        if len(operands) < len(node.operands):
            raise error(
                "type",
                f"%{node.result} = {op.name} joins a quantised branch with one of reals",
                from_=str(node.origin),
                fix="quantize both branches",
            )
        if isinstance(op, Add) or (isinstance(op, Concat) and (op.axis > 0 or self.summed(node))):
            operands = self.meet(node, operands)
        shapes = [self.rewriter.type(c.value).shape for c in operands]
        bias = offset_behind(op, [c.bias for c in operands], shapes)
        if isinstance(op, WeightedMap) and op.bias is not None:
            own = np.broadcast_to(channelwise(op.bias.values, len(node.type.shape)), node.type.shape)
            bias = own if bias is None else bias + own
            op = attrs.evolve(op, bias=None)
        name = node.result if bias is None else self.rewriter.fresh(f"{node.result}.sum")
        return _Carried(self.rewriter.emit(op, *(c.value for c in operands), name=name, origin=node.origin), bias)

    def summed(self, node: Node) -> bool:
        """Whether a sum over channels reads a value, so that all its channels must share one scale."""
        return read_by_a_sum(node.result, self.rewriter.module)

    def shift(self, op: Shift, x: _Carried) -> _Carried:
        """The constant joins the bias."""
        shape = self.rewriter.type(x.value).shape
        offset = np.broadcast_to(channelwise(op.offset.values, len(shape)), shape)
        return _Carried(x.value, offset if x.bias is None else x.bias + offset)

    def pool(self, node: Node, op: MaxPool, x: _Carried) -> _Carried:
        """The maximum of integers; a bias that varies within a channel is added before, any other after."""
        bias = None if x.bias is None else per_channel(x.bias)
        if bias is not None and bias.ndim > 1:
            fine = self.finer(node, x.value, bias)
            value = self.auxiliary(Integrate(self.steps(node, bias, fine)), fine, "biased", node.origin)
            x, bias = _Carried(value), None
        name = node.result if bias is None else self.rewriter.fresh(f"{node.result}.sum")
        value = self.rewriter.emit(op, x.value, name=name, origin=node.origin)
        shape = self.rewriter.type(value).shape
        return _Carried(value, None if bias is None else np.broadcast_to(channelwise(bias, len(shape)), shape))

    def requant(self, node: Node, op: Quantize, x: _Carried, name: str) -> str:
        """``quantize`` of an integer value as an integer triple."""
        requant = self.threshold(node, op, x) if self.step_.grid == "threshold" else self.solve(node, op, x)
        return self.rewriter.emit(requant, x.value, name=name, origin=node.origin)

    def whole(self, node: Node, x: _Carried) -> Quantize:
        """With ``whole``, codes in whole steps of the sum, where that has one scale."""
        assert isinstance(node.op, Quantize)  # the caller asked
        scale = scale_of(self.rewriter.type(x.value))
        if not self.step_.whole or scale.size > 1 or self.concatenated(node):
            return node.op
        times = Fraction(node.op.scale) / scale.known[0]
        grain = 2 ** max(0, math.floor(times / CUT).bit_length() - WHOLE_BITS)
        multiple = max(1, grain * math.ceil(times / CUT / grain))
        if multiple > 2 * times:
            self.context.note(
                f"%{self.named(node)}: steps {float(multiple / times):.2g} times as coarse, as those of its sum are"
            )
        return attrs.evolve(node.op, scale=float(scale.known[0] * multiple))

    def concatenated(self, node: Node) -> bool:
        """Whether codes meet others in a concatenation, where all have one scale."""
        found = [node.result]
        for value in found:
            for reader in self.rewriter.module.readers[value]:
                if isinstance(reader.op, Concat):
                    return True
                if isinstance(reader.op, (Dequantize, Relabelling, MaxPool, Scaling, Shift)):
                    found.append(reader.result)
        return False

    def solve(self, node: Node, op: Quantize, x: _Carried) -> Requant:
        """The triple: per channel the finest grid 2^s whose multiplier fits ``bits`` and whose products fit a register.

        Raises:
            SpirError[E-MULT-RANGE]: a channel has no such grid, or its multiplier rounds to 0 where its sum shows.
        """
        type_ = self.rewriter.type(x.value)
        ratios = [s / Fraction(op.scale) for s in scale_of(type_).known]
        offset = np.zeros(1) if x.bias is None else per_channel(x.bias) / op.scale
        reach, most = type_.range.magnitude, self.largest_offsets(offset, len(ratios))
        shifts = np.array([self.grid(r, reach, o) for r, o in zip(ratios, most, strict=True)])
        factors = [
            math.floor(r * 2 ** int(s) + Fraction(1, 2)) if s > 0 else 0 for r, s in zip(ratios, shifts, strict=True)
        ]
        free = [self.free(r) for r in ratios]
        cut = [s < f for s, f in zip(shifts, free, strict=True)]
        # a channel whose whole sum stays below 2^-6 of a step may as well be multiplied by 0
        starved = [r for r, factor in zip(ratios, factors, strict=True) if not factor and r * reach * 2**6 > 1]
        top = Fraction(max(op.hi, -op.lo))
        missed = [
            min(top, r * reach) * abs(Fraction(factor, 2 ** int(s)) / r - 1) if s > 0 and c else Fraction(0)
            for r, factor, s, c in zip(ratios, factors, shifts, cut, strict=True)
        ]
        if shifts.min() < 1 or starved or max(missed) > 1:
            raise error(
                "E-MULT-RANGE",
                f"%{self.named(node)}: scales {scale_of(type_)} over {op.scale!r} have no multiplier of "
                f"{self.step_.bits} bits" + " whose products fit 64 bits" * any(cut),
                from_=str(node.origin),
                fix="propagate-scales{join=rescale}, a smaller width, or fewer bits for activations"
                if any(cut)
                else "more bits for the multipliers (propagate-scales{bits=31}), or fewer for activations",
            )
        if max(missed) > Fraction(1, 8):
            self.context.note(
                f"%{self.named(node)}: multipliers of {max(factors).bit_length()} bits, because products fill 64 bits; "
                f"they miss by up to {float(max(missed)):.2g} codes, and join=rescale or a smaller width would not"
            )
        grid = channelwise(shifts, offset.ndim)
        add = np.floor(offset * 2.0**grid + 0.5).astype(np.int64) + 2 ** (grid - 1)
        div = 2 ** int(shifts[0]) if (shifts == shifts[0]).all() else Array.of(2**shifts)
        return Requant(Array.of(factors), Array.of(add), div, op.lo, op.hi, op.scale)

    def threshold(self, node: Node, op: Quantize, x: _Carried) -> Requant:
        """The triple ``(1, add, theta)``: a code is reached where the sum reaches a multiple of one integer.

        A threshold of too few bits is counted in 2^-f of a step of the sum, and then ``mul`` is 2^f.

        Raises:
            SpirError[E-MULT-RANGE]: products do not fit a register.
        """
        type_ = self.rewriter.type(x.value)
        reach = type_.range.magnitude
        # a channel whose whole sum stays below 2^-6 of a threshold may as well have a smaller one
        thetas = [min(Fraction(op.scale) / s, Fraction(2**6 * reach + 1)) for s in scale_of(type_).known]
        bits = max(THRESHOLD, max(op.hi, -op.lo).bit_length() + 1)
        extra = [max(0, bits - math.floor(math.log2(t))) for t in thetas]
        div = [round(t * 2**f) for t, f in zip(thetas, extra, strict=True)]
        offset = np.zeros(1) if x.bias is None else per_channel(x.bias) / op.scale
        most = max(self.largest_offsets(offset, len(div)))
        wide = max(2**f * reach + (most + 2) * d for f, d in zip(extra, div, strict=True))
        if max(extra) >= REGISTER_BITS or wide >= 2**61:
            raise error(
                "E-MULT-RANGE",
                f"%{self.named(node)}: thresholds of {float(min(thetas)):.3g} .. {float(max(thetas)):.3g} steps, and "
                "products do not fit 64 bits",
                from_=str(node.origin),
                fix="propagate-scales{grid=shift}, or fewer bits for activations",
            )
        each = channelwise(np.array(div), offset.ndim)
        add = np.floor((offset + 0.5) * each).astype(np.int64)
        single = len(set(div)) == 1
        return Requant(
            Array.of([2**f for f in extra] if max(extra) else [1]),
            Array.of(add),
            div[0] if single else Array.of(div),
            op.lo,
            op.hi,
            op.scale,
        )

    def grid(self, ratio: Fraction, reach: int, offset: float) -> int:
        """The largest s with round(ratio 2^s) below 2^bits and |mul z| + |add| inside a register; below 1: none."""
        shift = self.free(ratio)
        room, each = Fraction(2) ** (REGISTER_BITS - 2), Fraction(offset) + 2  # sums of lowered pools need a bit more
        while shift >= 1 and (
            round(ratio * 2**shift) >= 2**self.step_.bits or (ratio * reach + each) * 2**shift + reach >= room
        ):
            shift -= 1
        return shift

    def free(self, ratio: Fraction) -> int:
        """The largest s that the bits of the multiplier allow, were registers endless."""
        shift = min(self.step_.bits - 1 - math.floor(math.log2(ratio)), REGISTER_BITS - 2)
        return shift - (shift > 0 and round(ratio * 2**shift) >= 2**self.step_.bits)

    @staticmethod
    def largest_offsets(offset: Reals, channels: int) -> list[float]:
        """The largest |bias| of each channel, or of all where the channels share one grid."""
        rows = np.abs(offset).reshape(len(offset), -1).max(axis=1)
        found = np.broadcast_to(rows, (channels,)) if channels > 1 else rows.max(keepdims=True)
        return [float(v) for v in found]

    def meet(self, node: Node, operands: list[_Carried]) -> list[_Carried]:
        """Operands of one scale."""
        scales = [scale_of(self.rewriter.type(c.value)) for c in operands]
        if all(s == scales[0] for s in scales) and (scales[0].size == 1 or not self.summed(node)):
            return operands
        if self.step_.join == "rescale":
            return self.rescale(node, operands)
        met = self.widen(node, operands)
        if met is None and self.context.data is None:
            raise self.apart(node, operands)
        return self.rescale(node, operands) if met is None else met

    def reach(self, names: Sequence[str]) -> float:
        """The largest magnitude of old values on the calibration data.

        Raises:
            SpirError[data]: there is none.
        """
        found, module, data = self.reached, self.rewriter.module, self.context.data
        wanted = set(names) - found.keys()
        if wanted and data is None:
            what = f"{self.step_.name}{{join=rescale}} needs calibration data"
            raise error("data", what, fix="give data=images, or --data in a shell")
        if wanted and data is not None:
            joins = (n for n in module.nodes if isinstance(n.op, (Add, Concat)))
            wanted |= {o for n in joins if self.step_.join == "rescale" for o in n.operands}
            for values in self.context.evaluate(module, data, "|".join(sorted(wanted))):
                for name in wanted & values.keys():
                    found[name] = max(found.get(name, 0.0), float(np.abs(values[name]).max()))
        return max(found[name] for name in names)

    def widen(self, node: Node, operands: list[_Carried]) -> list[_Carried] | None:
        """Every operand times integers, to a scale fine enough that the smallest inexact factor has `factor` bits.

        None where a factor is wider than ``width``.
        """
        scales = [scale_of(self.rewriter.type(c.value)) for c in operands]
        channels = 1 if isinstance(node.op, Concat) or self.summed(node) else max(s.size for s in scales)
        rows = [s.known * max(1, channels // s.size) for s in scales]
        columns = zip(*rows, strict=True) if channels > 1 else [tuple(v for row in rows for v in row)]
        target = [_fine(column, self.step_.factor) for column in columns]
        met = []
        for operand, row in zip(operands, rows, strict=True):
            steps = [Fraction(t) for t in target] * (len(row) // len(target))
            factors = [round(s / t) for s, t in zip(row, steps, strict=True)]
            if max(factors) >= 2**self.step_.width:
                return None
            if all(f == 1 and s == t for f, s, t in zip(factors, row, steps, strict=True)):
                met.append(operand)
                continue
            op = Scaling(Array.of(factors), Array.of(target))
            met.append(_Carried(self.auxiliary(op, operand.value, "wide", node.origin), operand.bias))
        return met

    def rescale(self, node: Node, operands: list[_Carried]) -> list[_Carried]:
        """Activations stay, sums become signed codes in power-of-two steps; then the coarser are multiplied.

        Raises:
            SpirError[E-RESID-SCALE]: the activations alone do not meet.
        """
        types = [self.rewriter.type(c.value) for c in operands]
        codes = [c.bias is None and self.is_code(c.value) for c in operands]
        ranges = [t.encoding for t, code in zip(types, codes, strict=True) if code]
        bits = max((_bits(e) for e in ranges if isinstance(e, Int)), default=self.code_bits)
        top = 2 ** (bits - 1) - 1
        step = float(np.float32(self.reach(node.operands) / top)) or 1.0
        if any(codes):
            step = float(scale_of(types[codes.index(True)]).floats()[0])
        met = []
        for name, operand, type_, code in zip(node.operands, operands, types, codes, strict=True):
            if code:
                met.append(operand)
                continue
            # a branch that hardly reaches anything: no finer than the multipliers express, nor than the sum can show
            finest = max(step / 2**12, float(max(scale_of(type_).known)) / 2 ** (self.step_.bits - 2))
            wanted = max(self.reach([name]) / top, finest)
            own = step * 2.0 ** math.ceil(math.log2(wanted / step))
            fresh = self.rewriter.fresh(f"{operand.value}.code")
            met.append(_Carried(self.requant(node, Quantize(own, -top - 1, top), operand, fresh)))
            self.context.note(f"%{name}: {type_.size} rescaling neurons, so that it meets the others in %{node.result}")
        joined = self.widen(node, met)
        if joined is None:
            raise self.apart(node, met)
        return joined

    @property
    def code_bits(self) -> int:
        """The bits of the network's codes."""
        ops = (n.op for n in self.rewriter.module.nodes if isinstance(n.op, Quantize))
        return max((op.hi - op.lo).bit_length() for op in ops)

    def apart(self, node: Node, operands: list[_Carried]) -> SpirError:
        """The refusal of branches that do not meet."""
        scales = " and ".join(str(self.rewriter.type(c.value).encoding) for c in operands)
        return error(
            "E-RESID-SCALE",
            f"%{node.result} joins scales whose ratio needs a multiplier beyond {self.step_.width} bits ({scales})",
            from_=str(node.origin),
            fix="propagate-scales{join=rescale} with calibration data, or a larger width"
            if self.context.data is None
            else "a larger width, or fewer bits: activations this far apart do not meet in one step",
        )

    def is_code(self, value: str) -> bool:
        """Whether a value is an activation's code, and not a sum."""
        return is_code(value, self.rewriter, pools=True)

    def auxiliary(self, op: Op, operand: str, suffix: str, origin: Origin) -> str:
        """A value that the old module did not have."""
        return self.rewriter.emit(op, operand, name=self.rewriter.fresh(f"{operand}.{suffix}"), origin=origin)

    def steps(self, node: Node, bias: Reals, value: str) -> Array:
        """A bias ``[C]`` or ``[*shape]`` in whole steps of a value.

        Raises:
            SpirError[E-VRANGE]: more steps than registers hold.
        """
        steps = bias / channelwise(scale_of(self.rewriter.type(value)).floats(), bias.ndim)
        if np.abs(steps).max() >= 2.0**REGISTER_BITS:
            raise error(
                "E-VRANGE",
                f"the bias of %{node.result} is {np.abs(steps).max():.3g} steps of its sum, and registers have 64 bits",
                from_=str(node.origin),
                fix="fewer bits for activations or weights",
            )
        return Array.of(np.floor(steps + 0.5).astype(np.int64))

    def finer(self, node: Node, value: str, bias: Reals) -> str:
        """A code in finer steps, where its bias is no whole number of its own."""
        own = scale_of(self.rewriter.type(value))
        steps = bias / channelwise(own.floats(), bias.ndim)
        room = REGISTER_BITS - 1 - max(self.rewriter.type(value).range.magnitude, 1).bit_length()
        if np.abs(steps - np.floor(steps + 0.5)).max() < 2.0**-12 or not self.is_code(value) or room < FINER:
            return value
        finer = Scaling(Array.of([2**FINER]), Array.of(own.floats() / 2**FINER))
        return self.auxiliary(finer, value, "fine", node.origin)

    def readout(self, old: str) -> str:
        """A carried value as integers that lack nothing."""
        x, node = self.carried[old], self.rewriter.module.definitions[old]
        if x.bias is not None:
            value = self.finer(node, x.value, per_channel(x.bias))
            op = Integrate(self.steps(node, per_channel(x.bias), value))
            return self.rewriter.emit(op, value, name=old, origin=node.origin)
        return x.value if self.is_code(x.value) else self.auxiliary(Integrate(), x.value, "readout", node.origin)

    def real(self, old: str) -> str:
        """The real number that a carried value stands for, for the host."""
        if old not in self.carried:
            return self.rewriter.now(old)
        known = self.hosted.get(old)
        if known is None:
            origin, value = self.rewriter.module.definitions[old].origin, self.readout(old)
            if self.is_code(value):
                value = self.auxiliary(Integrate(), value, "readout", origin)
            known = self.hosted[old] = self.auxiliary(Dequantize(), value, "real", origin)
        return known

    def finish(self) -> Module:
        """The module, with a readout where its output is a sum."""
        old = self.rewriter.module.output
        if old in self.carried:
            self.rewriter.replace(old, self.readout(old))
        return self.rewriter.finish()


def _fine(scales: Sequence[Fraction], bits: int) -> float:
    """A step of which every scale is a multiple within 2^-bits: the finest scale, divided by a power of two."""
    finest, extra = min(scales), 0
    while any((r := s / finest * 2**extra).denominator > 1 and r < 2**bits for s in scales):
        extra += 1
    return float(finest / 2**extra)


def _bits(encoding: Int) -> int:
    return max(encoding.hi, -encoding.lo - 1, 1).bit_length() + (encoding.lo < 0)
