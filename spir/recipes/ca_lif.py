"""@ca-lif: a network that was trained with quantisation to calcium-gated neurons, exact against its own integers."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.options import option
from spir.pipeline import Recipe


@attrs.frozen
class CaLif(Recipe):
    """``fold-bn, calibrate-range, quantize, propagate-scales, derive-thresholds{neuron=ca-lif}, fuse-neuron``.

    What a toolkit has quantised keeps its codes; calibration data are for what is still float. Steps are as many as the
    largest code of the network needs, 255 for uint8; fewer are not lossless.
    """

    name: ClassVar[str] = "ca-lif"
    steps: int | None = option(None, "T, the window: as many as the largest code needs", ge=1, le=65535)
    bits: int = option(8, "bits of what is not quantised yet", ge=2, le=16)
    input: str = option("signed", "codes of the input; unsigned for raw pixels", one_of=("signed", "unsigned"))
    mode: str = option("multi", "several spikes a step, or one", one_of=("multi", "single"))
    join: str | None = option(None, "how residual branches meet", one_of=("wide", "rescale"))

    def pipeline(self) -> str:
        """The passes in order."""
        met = "" if self.join is None else f", join={self.join}"
        window = "" if self.steps is None else f"shorten-window{{steps={self.steps}}}, "
        steps = "" if self.steps is None else f", steps={self.steps}"
        entering = "" if self.input == "signed" else f", input={self.input}"
        mode = "" if self.mode == "multi" else f"{{mode={self.mode}}}"
        return (
            f"canonicalize, fold-bn, calibrate-range, quantize{{bits={self.bits}{entering}}}, "
            f"propagate-scales{{grid=threshold{met}}}, {window}"
            f"derive-thresholds{{neuron=ca-lif{steps}}}, fuse-neuron{mode}"
        )
