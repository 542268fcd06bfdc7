"""quantize: clipped activations and weights to integers, still inside a network of reals."""

from __future__ import annotations

import math
from typing import ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.contracts import Calibrated, Contract
from spir.errors import SpirError, error, raise_all
from spir.ir import Array, Module, Node
from spir.ops._linear import LinearMap, WeightedMap, channelwise
from spir.ops.clip import Clip
from spir.ops.conv2d import Conv2d
from spir.ops.dequantize import Dequantize
from spir.ops.linear import Linear
from spir.ops.quantize import Quantize as QuantizeOp
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.options import option
from spir.rewriting import Context, Pass, Rewriter
from spir.types import Real, Reals


@attrs.frozen
class Quantize(Pass):
    """clip -> quantize; dequantize.  Float weights -> integers x weight_scale per output channel.

    Constants per channel on the operand of a weight fold into it. Where another sum over channels reads the result
    before any activation, the channels share one weight_scale. The input and signed ranges take -2^(b-1)..2^(b-1)-1,
    others 0..2^b-1; zero is always code 0. Scales are rounded to float32, so that the product of two is an exact
    float64.
    """

    name: ClassVar[str] = "quantize"
    bits: int = option(8, "bits of activations, and of weights unless `weights` says otherwise", ge=2, le=16)
    weights: int | None = option(None, "bits of weights", ge=2, le=16)

    def contract(self) -> Contract:
        """Rounding, measured."""
        return Calibrated()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses activations without a range, all at once; then quantises."""
        raise_all(refusal for node in module.nodes if (refusal := self._refusal(node)) is not None)
        return Pass.run(self, module, context)

    def _refusal(self, node: Node) -> SpirError | None:
        if not isinstance(node.op, Relu) or not isinstance(node.type.encoding, Real) or not self.selects(node):
            return None
        return error(
            "type",
            f"%{node.result} has no range to divide into {2**self.bits} steps",
            from_=str(node.origin),
            fix="run calibrate-range before quantize, over the same layers",
        )

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """A clip becomes codes, a weight becomes integers."""
        match node.op:
            case Clip(lo=lo, hi=hi):
                entering = node.operands[0] == rewriter.module.input.name
                op = self._quantiser(float(lo.values.min()), float(hi.values.max()), signed=entering)
                operand, code = rewriter.now(node.operands[0]), rewriter.fresh(f"{node.result}.code")
                rewriter.emit(op, operand, name=code, origin=node.origin)
                return rewriter.emit(Dequantize(), code, name=node.result, origin=node.origin)
            case WeightedMap(weight_scale=None):
                together = read_by_a_sum(node.result, rewriter.module)
                weight, operand = fold_factor(node.op.weight.values, rewriter.now(node.operands[0]), rewriter)
                codes, scale = quantise_weight(weight, self.weights or self.bits, together=together)
                op_ = attrs.evolve(node.op, weight=Array.of(codes), weight_scale=Array.of(scale))
                return rewriter.emit(op_, operand, name=node.result, origin=node.origin)
        return None

    def _quantiser(self, lo: float, hi: float, *, signed: bool) -> QuantizeOp:
        if signed or lo < 0:
            top = 2 ** (self.bits - 1) - 1
            return QuantizeOp(short(max(-lo, hi) / top), -top - 1, top)
        top = 2**self.bits - 1
        return QuantizeOp(short(hi / top), 0, top)


def fold_factor(weight: Reals, operand: str, rewriter: Rewriter) -> tuple[Reals, str]:
    """Float weights times the constants per channel that their operand was multiplied by, and what it was before."""
    factors, before, source = [], operand, rewriter.definition(operand)
    while source is not None and isinstance(source.op, Scaling) and source.op.to is None:
        factors.append(source.op.factor.values)
        before = source.operands[0]
        source = rewriter.definition(before)
    if all(factor.size == 1 for factor in factors):
        return weight, operand
    inputs, channels = weight.shape[1], rewriter.type(operand).shape[0]
    whole = np.broadcast_to(math.prod(factors), (channels,)).reshape(channels // inputs, inputs)
    each = np.repeat(whole, len(weight) * inputs // channels, axis=0)
    return weight * each.reshape(len(weight), inputs, *(1,) * (weight.ndim - 2)), before


def short(scale: float) -> float:
    """The nearest float32, as a float64."""
    return float(np.float32(scale)) or float(np.finfo(np.float32).tiny)


def read_by_a_sum(name: str, module: Module) -> bool:
    """Whether a sum over channels reads a value before any activation, so that its channels must share one scale."""
    found = [name]
    for value in found:
        for reader in module.readers[value]:
            match reader.op:
                case Linear():
                    return True
                case Conv2d(groups=groups) if groups < module.types[value].shape[0]:
                    return True
                case LinearMap() if reader.result not in found:
                    found.append(reader.result)
    return False


def quantise_weight(weight: Reals, bits: int, *, together: bool = False) -> tuple[NDArray[np.int64], Reals]:
    """Integers in -(2^(b-1)-1)..2^(b-1)-1 and one scale an output channel; a dead channel takes a live one's scale.

    With ``together`` all channels share one scale.
    """
    top = 2 ** (bits - 1) - 1
    largest = np.abs(weight.reshape(1 if together else len(weight), -1)).max(axis=1)
    live = largest[largest > 0]
    largest = np.where(largest > 0, largest, live.max() if live.size else 1.0)
    scale = np.array([short(v) for v in largest / top])
    return np.clip(np.floor(weight / channelwise(scale, weight.ndim) + 0.5), -top, top).astype(np.int64), scale
