"""@parallel-free: a ReLU network to parallel spiking neurons, without training."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.options import option
from spir.pipeline import Recipe
from spir.recipes._parallel import spiking

WIDE = 32
"""The levels that clips are fitted for from half as many steps on, at least."""


@attrs.frozen
class ParallelFree(Recipe):
    """``fold-bn``, a clip per channel, DA-QCFS, ``quantize, propagate-scales``, then parallel neurons, fused.

    At 16 to 31 steps clips are fitted for 32 levels: rounding errors of many inputs cancel out in sums, those of clips
    go one way. (Measured on images that neither calibrate nor judge; with fewer steps, or more, it did not help.)
    """

    name: ClassVar[str] = "parallel-free"
    steps: int = option(16, "T, the levels of every activation", ge=1, le=65535)
    bits: int = option(8, "bits of the input and of weights", ge=2, le=16)
    update: str | None = option(None, "the rule of calibrate-qcfs for phi", one_of=("integrating", "paper"))
    weights: str = option("refit", "whether calibrate-qcfs fits weights", one_of=("refit", "keep"))
    order: str | None = option(None, "where trains spike: suffix or prefix", one_of=("suffix", "prefix"))
    fused: bool = option(True, "one synaptic product a layer, instead of one a step")

    def pipeline(self) -> str:
        """The passes in order."""
        levels = max(self.steps, WIDE) if self.steps >= WIDE // 2 else self.steps
        clips = f"calibrate-range{{method=mse, per=channel, levels={levels}}}"
        rule = "" if self.update is None else f", update={self.update}"
        tail = spiking(f"steps={self.steps}{rule}, weights={self.weights}", self.bits, self.order, fused=self.fused)
        return f"canonicalize, fold-bn, {clips}, {tail}"
