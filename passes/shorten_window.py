"""shorten-window: an integer network to one of smaller counts, for windows of fewer steps than its codes need."""

from __future__ import annotations

import warnings
from fractions import Fraction
from typing import ClassVar

import attrs
import numpy as np

from spir.contracts import Calibrated, Contract
from spir.errors import Diagnostic, SpirWarning, error, raise_all
from spir.ir import Array, Module, Node, Op
from spir.ops._linear import channelwise
from spir.ops._threshold import divisors
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.options import option
from spir.rewriting import Context, Pass, Rewriter
from spir.types import Integers


@attrs.frozen
class ShortenWindow(Pass):
    """quantize, requant, integrate{bias} -> the same with counts, biases and steps times ``rho = T / T0``.

    T0 is the largest code of the network, the steps for which one spike stands for one code. In a window of T < T0
    steps every count is ``rho`` times as large and every spike worth 1 / rho as much; thresholds stay, and so does the
    leak of a step. That is another integer network, of about ``rho qmax`` levels a layer: not lossless, which a warning
    says. With ``T >= T0`` nothing changes.

    Source: Gao et al., Front. Neurosci. 17:1141701, where fewer steps are measured; the rule is derived. Inputs are
    rounded to the nearest count; ``encode{code = isi, full = T0}`` takes the floor as the paper does.
    """

    name: ClassVar[str] = "shorten-window"
    steps: int = option(128, "T: the steps of the window", ge=1, le=65535)

    def contract(self) -> Contract:
        """Fewer levels, measured."""
        return Calibrated()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses a part of the network, and one without integers or with spikes in it; then scales all counts."""
        if self.layers != "*":
            what = f"{self.name} takes the whole network, because counts meet across layers"
            raise error("option", what, fix="leave layers out")
        codes = [n.op for n in module.nodes if isinstance(n.op, (Quantize, Requant))]
        if not codes or any(t.train is not None for t in module.types.values()):
            what = "finds spikes already" if codes else "finds no integers"
            raise error("type", f"{self.name} {what}", fix="run it between propagate-scales and derive-thresholds")
        if any(isinstance(n.op, Quantize) and not module.enters(n) for n in module.nodes):
            raise error("type", f"{self.name} takes integer networks", fix="run propagate-scales before")
        full = max(max(op.hi, -op.lo, 1) for op in codes)
        if self.steps >= full:
            return module
        rho = Fraction(self.steps, full)
        raise_all(
            error(
                "E-CAP",
                f"%{n.result} has codes up to {max(n.op.hi, -n.op.lo)} and would have none in {self.steps} of "
                f"{full} steps",
                from_=str(n.origin),
                fix=f"more steps, or fewer bits where codes go up to {full}",
            )
            for n in module.nodes
            if isinstance(n.op, (Quantize, Requant)) and 0 < rho * max(n.op.hi, -n.op.lo) < 1
        )
        what = f"T = {self.steps} steps for codes up to {full} are not lossless"
        finding = Diagnostic("E-CAP", what).note("fix", f"steps={full}, unless accuracy may pay for time")
        warnings.warn(SpirWarning(finding), stacklevel=2)
        return self.walk(Rewriter(module, self.name), lambda node, rewriter: _shortened(node, rho, rewriter))


def _shortened(node: Node, rho: Fraction, rewriter: Rewriter) -> str | None:
    """The op on counts that are rho times as large."""
    op: Op
    match node.op:
        case Quantize(scale=scale, lo=lo, hi=hi):
            op = attrs.evolve(node.op, scale=scale / float(rho), lo=_count(lo, rho), hi=_count(hi, rho))
        case Requant(lo=lo, hi=hi, scale=scale) as given:
            half = divisors(given.div) // 2
            centre = half if half.size == 1 else channelwise(half, given.add.values.ndim)
            bias = _times(given.add.values - centre, rho)
            op = attrs.evolve(
                given, add=Array.of(bias + centre), lo=_count(lo, rho), hi=_count(hi, rho), scale=scale / float(rho)
            )
        case Scaling(to=to) if to is not None:
            op = attrs.evolve(node.op, to=Array.of(to.values / float(rho)))
        case Integrate(bias=bias) if bias is not None:
            op = attrs.evolve(node.op, bias=Array.of(_times(bias.values, rho)))
        case _:
            return None
    return rewriter.emit(op, rewriter.now(node.operands[0]), name=node.result, origin=node.origin)


def _count(end: int, rho: Fraction) -> int:
    """An end of a range."""
    size = int(abs(end) * rho)
    return size if end > 0 else -size


def _times(values: Integers, rho: Fraction) -> Integers:
    """Nearest integers."""
    exact = (2 * values.astype(object) * rho.numerator + rho.denominator) // (2 * rho.denominator)
    return np.asarray(exact.astype(np.int64))
