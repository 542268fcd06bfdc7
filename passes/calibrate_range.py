"""calibrate-range: activations to clipped activations, with ranges from data."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

import attrs
import numpy as np

from spir.contracts import Calibrated, Contract
from spir.errors import error
from spir.ir import Array, Module
from spir.ops.clip import Clip
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.options import option
from spir.rewriting import Context, Pass, Rewriter
from spir.types import Real, Reals


@attrs.frozen(eq=False)
class _Tail:
    """The smallest and largest values seen, as many as a percentile needs: exact, mergeable, independent of batches."""

    smallest: Reals
    largest: Reals

    @classmethod
    def of(cls, values: Reals, keep: int) -> _Tail:
        """The ends of one shard."""
        flat = values.reshape(-1)
        if keep == 1:
            return cls(flat.min(keepdims=True), flat.max(keepdims=True))
        if keep >= flat.size:
            return cls(np.sort(flat), np.sort(flat))
        split = np.partition(flat, (keep - 1, flat.size - keep))
        return cls(np.sort(split[:keep]), np.sort(split[-keep:]))

    def merge(self, other: _Tail, keep: int) -> _Tail:
        """The ends of both shards."""
        low = np.sort(np.concatenate([self.smallest, other.smallest]))
        high = np.sort(np.concatenate([self.largest, other.largest]))
        return _Tail(low[:keep], high[-keep:])


@attrs.frozen
class CalibrateRange(Pass):
    """relu -> clip{0, hi}; the input -> clip{lo, hi}: ranges that the calibration data reach.

    ``max`` takes the extremes; ``percentile`` leaves ``100 - percentile`` per cent of the values outside at each end.
    A value that the data leave at 0 takes the widest range of the network, so that its scale is a live one.
    """

    name: ClassVar[str] = "calibrate-range"
    method: str = option("max", "max, or percentile", one_of=("max", "percentile"))
    percentile: float | None = option(None, "the share of values inside, for method = percentile: 99.99", ge=50, le=100)

    def contract(self) -> Contract:
        """Values beyond the calibrated range change."""
        return Calibrated()

    def run(self, module: Module, context: Context) -> Module:
        """Measures every selected relu and the input, then rewrites them."""
        if context.data is None:
            raise error("data", f"{self.name} needs calibration data", fix="compile(..., data=images)")
        if self.method == "max" and self.percentile is not None:
            raise error("option", f"{self.name}: method=max takes no percentile", fix="method=percentile")
        selected = [n for n in module.nodes if isinstance(n.op, Relu) and isinstance(n.type.encoding, Real)]
        watched = {n.result for n in selected if self.selects(n)}
        ranged = all(isinstance(n.op, (Clip, Quantize)) for n in module.readers[module.input.name])
        if isinstance(module.input.type.encoding, Real) and not ranged:
            watched.add(module.input.name)
        ends = self._measure(module, context, watched)
        live = max((max(-low, high) for low, high in ends.values()), default=0.0) or 1.0
        rewriter = Rewriter(module, self.name)
        if module.input.name in ends:
            low, high = ends[module.input.name]
            name = rewriter.fresh(f"{module.input.name}.clip")
            origin = module.readers[module.input.name][0].origin if module.readers[module.input.name] else None
            top = max(high, 0.0) if low or high else live
            clip = Clip(Array.of([min(low, 0.0)]), Array.of([top]))
            clipped = rewriter.emit(clip, module.input.name, name=name, origin=rewriter.origin(origin, "input"))
            rewriter.replace(module.input.name, clipped)
        for node in module.nodes:
            if node.result not in watched:
                rewriter.keep(node)
                continue
            high = ends[node.result][1]
            clip = Clip(Array.of([0.0]), Array.of([high if high > 0 else live]))
            rewriter.emit(clip, rewriter.now(node.operands[0]), name=node.result, origin=node.origin)
        return rewriter.finish()

    def _measure(self, module: Module, context: Context, watched: set[str]) -> dict[str, tuple[float, float]]:
        assert context.data is not None  # run refused
        inside = 100 if self.method == "max" else self.percentile or 99.99
        outside = 1 - Fraction(str(inside)) / 100  # as the decimal reads
        keep = {n: 1 + int(outside * len(context.data) * module.types[n].size) for n in watched}
        tails: dict[str, _Tail] = {}
        for values in context.evaluate(module, context.data, "|".join(sorted(watched))):
            for name in watched & values.keys():
                tail = _Tail.of(values[name], keep[name])
                tails[name] = tails[name].merge(tail, keep[name]) if name in tails else tail
        return {name: (float(tail.smallest[-1]), float(tail.largest[0])) for name, tail in tails.items()}
