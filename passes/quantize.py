"""quantize: clipped activations and weights to integers, still inside a network of reals."""

from __future__ import annotations

from typing import ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.contracts import Calibrated, Contract
from spir.errors import SpirError, error, raise_all
from spir.ir import Array, Module, Node, Op
from spir.ops._linear import Relabelling, WeightedMap, channelwise
from spir.ops.avg_pool import AvgPool
from spir.ops.clip import Clip
from spir.ops.concat import Concat
from spir.ops.dequantize import Dequantize
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.max_pool import MaxPool
from spir.ops.qcfs import Qcfs
from spir.ops.quantize import Quantize as QuantizeOp
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.options import option
from spir.passes._codes import only_quantised
from spir.passes._gains import folded, shifted, sunk
from spir.passes._sums import read_by_a_sum
from spir.rewriting import Context, Pass, Rewriter
from spir.types import Real, Reals


@attrs.frozen
class Quantize(Pass):
    """clip, qcfs -> quantize; dequantize.  Float weights -> integers x weight_scale per output channel.

    Constants per channel sink through pools, moves and concatenations and fold into the weights that read them. Clips
    that meet in a concatenation share one step: clip -> scale{g}(dequantize(quantize(scale{1 / g}(x)))), so that each
    keeps its own range. Where another sum over channels reads a weighted value before any activation, its channels
    share one weight_scale. The input and signed ranges take -2^(b-1)..2^(b-1)-1, others 0..2^b-1; zero is code 0. With
    ``input = unsigned`` it takes 0..2^b-1: raw pixels of 8 bits, which the model itself normalises, stay exact. A
    qcfs keeps its levels: shift{psi}, then the same gains, one a channel, with the rise of phi in the last.
    Scales are rounded to float32, so that the product of two is an exact float64.
    """

    name: ClassVar[str] = "quantize"
    bits: int = option(8, "bits of activations, and of weights unless `weights` says otherwise", ge=2, le=16)
    weights: int | None = option(None, "bits of weights", ge=2, le=16)
    input: str = option("signed", "codes of the input; unsigned for raw pixels", one_of=("signed", "unsigned"))
    float_weights: bool = option(False, "leave weights as they are, for backends that multiply spikes by floats")

    def contract(self) -> Contract:
        """Rounding, measured."""
        return Calibrated()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses activations without a range, all at once; then quantises."""
        if self.float_weights and self.weights is not None:
            raise error("option", f"{self.name}: float weights have no bits", fix="weights or float_weights")
        if self.input == "unsigned":
            raise_all(refusal for node in module.nodes if (refusal := self._below(node, module)) is not None)
        raise_all(
            refusal
            for node in module.nodes
            if not only_quantised(node, module) and (refusal := self._refusal(node)) is not None
        )
        steps = self._steps(module)

        def rewrite(node: Node, rewriter: Rewriter) -> str | None:
            step = steps.get(node.result)
            return self.rewrite(node, rewriter) if step is None else self._codes(node, step, rewriter)

        return self.walk(Rewriter(module, self.name), rewrite)

    def _steps(self, module: Module) -> dict[str, float]:
        """The step of every range of reals: the widest of those that it meets in concatenations."""
        ranged = [n for n in module.nodes if isinstance(n.op, (Clip, Qcfs)) and isinstance(n.type.encoding, Real)]
        own = {n.result: self._quantiser(n, module).scale for n in ranged}
        return {name: max(own[other] for other in group) for group in meeting(module) for name in group}

    def _refusal(self, node: Node) -> SpirError | None:
        if not isinstance(node.op, Relu) or not isinstance(node.type.encoding, Real) or not self.selects(node):
            return None
        return error(
            "type",
            f"%{node.result} has no range to divide into {2**self.bits} steps",
            from_=str(node.origin),
            fix="run calibrate-range before quantize, over the same layers",
        )

    def _below(self, node: Node, module: Module) -> SpirError | None:
        if not isinstance(node.op, Clip) or not module.enters(node) or node.op.lo.values.min() >= 0:
            return None
        return error(
            "option",
            f"{self.name}: the input goes down to {node.op.lo.values.min():.4g}, and unsigned codes begin at 0",
            from_=str(node.origin),
            fix="input=signed; or feed raw pixels to a model that normalises them itself, which folds into weights",
        )

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """A weight becomes integers, and constants sink towards it."""
        match node.op:
            case WeightedMap(weight_scale=None) if not self.float_weights:
                return self._weights(node, node.op, rewriter)
            case Concat() | MaxPool() | AvgPool() | GlobalAvgPool() | Relabelling():
                return sunk(node, rewriter)
            case Scaling(factor=factor) if factor.integral:
                return sunk(node, rewriter)
        return None

    def _codes(self, node: Node, step: float, rewriter: Rewriter) -> str:
        """A range as a quantiser of a step that others may share, between the constants that it needs."""
        op, each, rise, psi = self._quantiser(node, rewriter.module), np.ones(1), np.ones(1), None
        if isinstance(node.op, Qcfs):
            each, rise, psi = node.op.threshold.values / node.op.threshold.values.max(), node.op.rise, node.op.psi
            if rewriter.module.enters(node) and ((each != 1).any() or op.scale != step):
                raise error(
                    "E-SCALE",
                    f"%{node.result} gives the input unequal thresholds, and nothing multiplies before the network",
                    from_=str(node.origin),
                    fix="one threshold for an activation of the input, and no concatenation with others",
                )
        # hardware has no gain before its input
        gain = np.ones(1) if rewriter.module.enters(node) else np.array([short(g) for g in each * (op.scale / step)])
        height = gain * rise
        before: list[tuple[str, Op]] = [] if psi is None else [("shifted", Shift(psi))]
        before += [("even", Scaling(Array.of(1 / gain)))] if (gain != 1).any() else []
        chain = [*before, ("code", attrs.evolve(op, scale=step)), ("unit", Dequantize())]
        chain += [("gained", Scaling(Array.of(height)))] if (height != 1).any() else []
        value = rewriter.now(node.operands[0])
        for word, constant in chain:
            name = node.result if constant is chain[-1][1] else rewriter.fresh(f"{node.result}.{word}")
            value = rewriter.emit(constant, value, name=name, origin=node.origin)
        return value

    def _weights(self, node: Node, op: WeightedMap, rewriter: Rewriter) -> str:
        """Integer weights, with the gains of their operand in them; what its offset adds follows."""
        together = read_by_a_sum(node.result, rewriter.module)
        whole, operand, offset = folded(op, rewriter.now(node.operands[0]), rewriter)
        codes, scale = quantise_weight(whole.weight.values, self.weights or self.bits, together=together)
        made = attrs.evolve(whole, weight=Array.of(codes), weight_scale=Array.of(scale))
        name = node.result if offset is None else rewriter.fresh(f"{node.result}.linear")
        rewriter.emit(made, operand, name=name, origin=node.origin)
        return name if offset is None else shifted(name, offset, node.result, node.origin, rewriter)

    def _quantiser(self, node: Node, module: Module) -> QuantizeOp:
        """The quantiser of a range: signed for what enters the network and for ranges below 0."""
        if isinstance(node.op, Qcfs):
            step = short(float(node.op.threshold.values.max()) / node.op.levels)
            return QuantizeOp(step, -node.op.levels * node.op.signed, node.op.levels)
        assert isinstance(node.op, Clip)  # the callers asked
        lo, hi = float(node.op.lo.values.min()), float(node.op.hi.values.max())
        if lo < 0 or (module.enters(node) and self.input == "signed"):
            top = 2 ** (self.bits - 1) - 1
            return QuantizeOp(short(max(-lo, hi) / top), -top - 1, top)
        top = 2**self.bits - 1
        return QuantizeOp(short(hi / top), 0, top)


def meeting(module: Module) -> list[set[str]]:
    """The ranges of reals in groups: those whose values meet in a concatenation share one."""
    groups: dict[str, set[str]] = {}
    behind: dict[str, set[str]] = {}
    for node in module.nodes:
        reached = set().union(*(behind.get(o, set()) for o in node.operands))
        match node.op:
            case Clip() | Qcfs() if isinstance(node.type.encoding, Real):
                groups[node.result] = {node.result}
                behind[node.result] = {node.result}
            case Concat():
                group = set().union(*(groups[clip] for clip in reached))
                groups.update(dict.fromkeys(group, group))
                behind[node.result] = {min(reached)} if reached else set()
            case MaxPool() | Relabelling() | Scaling() | Shift():
                behind[node.result] = reached
    return [group for name, group in groups.items() if name == min(group)]


def short(scale: float) -> float:
    """The nearest float32, as a float64."""
    return float(np.float32(scale)) or float(np.finfo(np.float32).tiny)


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
