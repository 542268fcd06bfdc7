"""@parallel: a QCFS network to parallel spiking neurons; lossless in as many steps as it has levels."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.options import option
from spir.pipeline import Recipe
from spir.recipes._parallel import spiking


@attrs.frozen
class Parallel(Recipe):
    """``fold-bn, calibrate-range, calibrate-qcfs{steps}, quantize, propagate-scales``, then parallel neurons, fused."""

    name: ClassVar[str] = "parallel"
    steps: int = option(4, "T; with T = L, the levels of the network, its neurons lose nothing", ge=1, le=65536)
    bits: int = option(8, "bits of the input and of weights", ge=2, le=16)
    order: str | None = option(None, "where trains spike: suffix or prefix", one_of=("suffix", "prefix"))
    fused: bool = option(True, "one synaptic product a layer, instead of one a step")

    def pipeline(self) -> str:
        """The passes in order."""
        tail = spiking(f"steps={self.steps}", self.bits, self.order, fused=self.fused)
        return f"canonicalize, fold-bn, calibrate-range, {tail}"
