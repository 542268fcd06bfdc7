"""propagate-scales: a network of reals with quantised weights and activations to the integer network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar

import attrs
import numpy as np

from spir.contracts import Bounded, Calibrated, Contract
from spir.errors import error
from spir.ir import Array, Module, Node, Op, Origin
from spir.ops._linear import LinearMap, WeightedMap, channelwise
from spir.ops.add import Add
from spir.ops.batch_norm import BatchNorm
from spir.ops.dequantize import Dequantize
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.options import option
from spir.rewriting import Context, Pass, Rewriter
from spir.types import REGISTER_BITS, Int, Real, Reals, Scale, scale_of


@attrs.frozen
class PropagateScales(Pass):
    """dequantize; linear ops on reals; quantize -> linear ops on integers; requant.  Output -> integrate (readout).

    Nothing is moved but biases: scales live in types, so an integer value's scale is known from its operands. Each
    requant solves M = S_x S_w / S_y as mul / 2^s, s per channel (SDANN eqs 8-10, 17), its bias and the half of
    round-half-up inside ``add``. Where branches of a sum have unequal scales, ``wide`` multiplies both by integers of
    ``width`` bits to one fine scale; ``rescale`` requantises each branch that is no activation by a signed code, over
    the range that the calibration data reach, in steps that are a power of two times those of the other branch.
    """

    name: ClassVar[str] = "propagate-scales"
    join: str = option("wide", "how branches of unequal scale meet", one_of=("wide", "rescale"))
    bits: int = option(24, "bits of the multipliers of requant", ge=2, le=31)
    width: int = option(32, "bits of the multipliers of join = wide", ge=13, le=48)

    def contract(self) -> Contract:
        """Rounded multipliers and biases, measured; with rescale also a code more."""
        return Calibrated() if self.join == "rescale" else Bounded()

    def run(self, module: Module, context: Context) -> Module:
        """Walks the module once; the joins that rescale look at the calibration data first."""
        if all(isinstance(t.encoding, Real) for t in module.types.values()):
            raise error(
                "type",
                f"{self.name} finds no integers, and would leave a network of reals",
                fix="run calibrate-range and quantize before",
            )
        walk = _Walk(self, Rewriter(module, self.name), self._reach(module, context))
        for node in module.nodes:
            walk.step(node)
        return walk.finish()

    def _reach(self, module: Module, context: Context) -> dict[str, float]:
        """The largest magnitude of each operand of a sum on the calibration data, for join = rescale."""
        sums = {o for n in module.nodes if isinstance(n.op, Add) for o in n.operands}
        if self.join != "rescale" or not sums:
            return {}
        if context.data is None:
            raise error("data", f"{self.name}{{join=rescale}} needs calibration data", fix="compile(..., data=images)")
        found = dict.fromkeys(sums, 0.0)
        for values in context.evaluate(module, context.data, "|".join(sorted(sums))):
            for name in sums:
                found[name] = max(found[name], float(np.abs(values[name]).max()))
        return found


@attrs.frozen(eq=False)
class _Carried:
    """An integer value of the new module, and the real bias ``[*shape]`` that it lacks."""

    value: str
    bias: Reals | None = None


@attrs.define(eq=False)
class _Walk:
    step_: PropagateScales
    rewriter: Rewriter
    reach: Mapping[str, float]
    carried: dict[str, _Carried] = attrs.field(factory=dict)

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
                self.carried[node.result] = _Carried(self.requant(node, node.op, operands[0], self.named(node)))
            case LinearMap() if operands:
                self.carried[node.result] = self.linear(node, node.op, operands)
            case _ if operands:
                lone = isinstance(node.op, BatchNorm)
                raise error(
                    "type",
                    f"%{node.result} = {node.op.name} stands between quantised values and works on reals",
                    from_=str(node.origin),
                    fix="run fold-bn; a batch_norm that follows no conv2d or linear is not folded: move it behind one"
                    if lone
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
        if isinstance(op, Add):
            operands = self.meet(node, operands)
        shapes = [self.rewriter.type(c.value).shape for c in operands]
        bias = None
        if any(c.bias is not None for c in operands):
            zeros = (np.zeros(s) if c.bias is None else c.bias for c, s in zip(operands, shapes, strict=True))
            plain = attrs.evolve(op, bias=None) if isinstance(op, WeightedMap) else op
            bias = plain.apply(*(z[None] for z in zeros), real=True)[0]
        if isinstance(op, WeightedMap) and op.bias is not None:
            own = np.broadcast_to(channelwise(op.bias.values, len(node.type.shape)), node.type.shape)
            bias = own if bias is None else bias + own
            op = attrs.evolve(op, bias=None)
        name = node.result if bias is None else self.rewriter.fresh(f"{node.result}.sum")
        return _Carried(self.rewriter.emit(op, *(c.value for c in operands), name=name, origin=node.origin), bias)

    def requant(self, node: Node, op: Quantize, x: _Carried, name: str) -> str:
        """``quantize`` of an integer value as an integer triple."""
        requant = self.solve(node, op, x)
        return self.rewriter.emit(requant, x.value, name=name, origin=node.origin)

    def solve(self, node: Node, op: Quantize, x: _Carried) -> Requant:
        """The triple: per channel the finest grid 2^s whose multiplier fits ``bits`` and whose products fit a register.

        Raises:
            SpirError[E-MULT-RANGE]: a channel has no such grid, or its multiplier rounds to 0 where its sum shows.
        """
        type_ = self.rewriter.type(x.value)
        ratios = [s / Fraction(op.scale) for s in scale_of(type_).known]
        offset = np.zeros(1) if x.bias is None else per_channel(x.bias) / op.scale
        reach, most = type_.range.magnitude, self.largest_offsets(offset, len(ratios))
        shifts = np.array([self.shift(r, reach, o) for r, o in zip(ratios, most, strict=True)])
        factors = [
            math.floor(r * 2 ** int(s) + Fraction(1, 2)) if s > 0 else 0 for r, s in zip(ratios, shifts, strict=True)
        ]
        # a channel whose whole sum stays below 2^-6 of a step may as well be multiplied by 0
        starved = [r for r, factor in zip(ratios, factors, strict=True) if not factor and r * reach * 2**6 > 1]
        if shifts.min() < 1 or starved:
            raise error(
                "E-MULT-RANGE",
                f"%{self.named(node)}: scales {scale_of(type_)} over {op.scale!r} have no multiplier of "
                f"{self.step_.bits} bits",
                from_=str(node.origin),
                fix="more bits for the multipliers (propagate-scales{bits=31}), or fewer for activations",
            )
        grid = channelwise(shifts, offset.ndim)
        add = np.floor(offset * 2.0**grid + 0.5).astype(np.int64) + 2 ** (grid - 1)
        div = 2 ** int(shifts[0]) if (shifts == shifts[0]).all() else Array.of(2**shifts)
        return Requant(Array.of(factors), Array.of(add), div, op.lo, op.hi, op.scale)

    def shift(self, ratio: Fraction, reach: int, offset: float) -> int:
        """The largest s with round(ratio 2^s) below 2^bits and |mul z| + |add| inside a register; below 1: none."""
        shift = min(self.step_.bits - 1 - math.floor(math.log2(ratio)), REGISTER_BITS - 2)
        room, each = Fraction(2) ** REGISTER_BITS, Fraction(offset) + 2
        while shift >= 1 and (
            round(ratio * 2**shift) >= 2**self.step_.bits or (ratio * reach + each) * 2**shift + reach >= room
        ):
            shift -= 1
        return shift

    @staticmethod
    def largest_offsets(offset: Reals, channels: int) -> list[float]:
        """The largest |bias| of each channel, or of all where the channels share one grid."""
        rows = np.abs(offset).reshape(len(offset), -1).max(axis=1)
        found = np.broadcast_to(rows, (channels,)) if channels > 1 else rows.max(keepdims=True)
        return [float(v) for v in found]

    def meet(self, node: Node, operands: list[_Carried]) -> list[_Carried]:
        """Operands of one scale."""
        scales = [scale_of(self.rewriter.type(c.value)) for c in operands]
        if all(s == scales[0] for s in scales):
            return operands
        if self.step_.join == "rescale":
            return self.rescale(node, operands)
        return self.widen(node, operands, scales)

    def widen(self, node: Node, operands: list[_Carried], scales: list[Scale]) -> list[_Carried]:
        """Every operand times integers, to a scale fine enough that the smallest inexact factor has 12 bits."""
        channels = max(s.size for s in scales)
        rows = [s.known * (channels // s.size) for s in scales]
        target = []
        for column in zip(*rows, strict=True):
            finest = min(column)
            extra = 0
            while any((r := s / finest * 2**extra).denominator > 1 and r < 2**12 for s in column):
                extra += 1
            target.append(float(finest / 2**extra))
        met = []
        for operand, row in zip(operands, rows, strict=True):
            factors = [round(s / Fraction(t)) for s, t in zip(row, target, strict=True)]
            if all(f == 1 and s == Fraction(t) for f, s, t in zip(factors, row, target, strict=True)):
                met.append(operand)
                continue
            if max(factors) >= 2**self.step_.width:
                raise error(
                    "E-RESID-SCALE",
                    f"%{node.result} joins scales whose ratio needs a multiplier of {max(factors).bit_length()} bits",
                    from_=str(node.origin),
                    fix="propagate-scales{join=rescale}, or a larger width",
                )
            op = Scaling(Array.of(factors), Array.of(target))
            met.append(_Carried(self.auxiliary(op, operand.value, "wide", node.origin), operand.bias))
        return met

    def rescale(self, node: Node, operands: list[_Carried]) -> list[_Carried]:
        """Activations stay, sums become signed codes in power-of-two steps; then the coarser are multiplied."""
        types = [self.rewriter.type(c.value) for c in operands]
        codes = [self.is_code(c) for c in operands]
        ranges = [t.encoding for t, code in zip(types, codes, strict=True) if code]
        bits = max((_bits(e) for e in ranges if isinstance(e, Int)), default=8)
        top = 2 ** (bits - 1) - 1
        step = float(np.float32(max(self.reach[name] for name in node.operands) / top)) or 1.0
        if any(codes):
            step = float(scale_of(types[codes.index(True)]).floats()[0])
        met = []
        for name, operand, type_, code in zip(node.operands, operands, types, codes, strict=True):
            if code:
                met.append(operand)
                continue
            # a branch that hardly reaches anything: no finer than the multipliers express, nor than the sum can show
            finest = max(step / 2**12, float(max(scale_of(type_).known)) / 2 ** (self.step_.bits - 2))
            wanted = max(self.reach[name] / top, finest)
            own = step * 2.0 ** math.ceil(math.log2(wanted / step))
            fresh = self.rewriter.fresh(f"{operand.value}.code")
            met.append(_Carried(self.requant(node, Quantize(own, -top - 1, top), operand, fresh)))
        return self.widen(node, met, [scale_of(self.rewriter.type(c.value)) for c in met])

    def is_code(self, operand: _Carried) -> bool:
        """Whether a value is an activation's code, moved perhaps, and not a sum."""
        source = self.rewriter.definition(operand.value)
        while source is not None and isinstance(source.op, LinearMap) and source.op.relabels and operand.bias is None:
            source = self.rewriter.definition(source.operands[0])
        return source is not None and isinstance(source.op, (Requant, Quantize))

    def auxiliary(self, op: Op, operand: str, suffix: str, origin: Origin) -> str:
        """A value that the old module did not have."""
        return self.rewriter.emit(op, operand, name=self.rewriter.fresh(f"{operand}.{suffix}"), origin=origin)

    def finish(self) -> Module:
        """The module, with a readout where its output is a sum."""
        old = self.rewriter.module.output
        if old in self.carried:
            x = self.carried[old]
            origin = self.rewriter.module.definitions[old].origin
            if x.bias is not None:
                lacked = per_channel(x.bias)
                steps = lacked / channelwise(scale_of(self.rewriter.type(x.value)).floats(), lacked.ndim)
                if np.abs(steps).max() >= 2.0**REGISTER_BITS:
                    raise error(
                        "E-VRANGE",
                        f"the bias of %{old} is {np.abs(steps).max():.3g} steps of its sum, and registers have 64 bits",
                        from_=str(origin),
                        fix="fewer bits for activations or weights",
                    )
                bias = Array.of(np.floor(steps + 0.5).astype(np.int64))
                self.rewriter.emit(Integrate(bias), x.value, name=old, origin=origin)
            elif self.is_code(x):
                self.rewriter.replace(old, x.value)
            else:
                self.rewriter.replace(old, self.auxiliary(Integrate(), x.value, "readout", origin))
        return self.rewriter.finish()


def per_channel(bias: Reals) -> Reals:
    """``[*shape]`` as ``[C]`` where every position of a channel agrees."""
    flat = bias.reshape(len(bias), -1)
    return flat[:, 0] if (flat == flat[:, :1]).all() else bias


def _bits(encoding: Int) -> int:
    return max(encoding.hi, -encoding.lo - 1, 1).bit_length() + (encoding.lo < 0)
