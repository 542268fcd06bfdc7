"""@stem: a ReLU network to STEM neurons (SDANN), exact against its own 8-bit integer network."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.options import option
from spir.pipeline import Recipe


@attrs.frozen
class Stem(Recipe):
    """``fold-bn, calibrate-range, quantize, propagate-scales, derive-thresholds{neuron=stem}, fuse-neuron``."""

    name: ClassVar[str] = "stem"
    bits: int = option(8, "bits of activations and weights; also the frames of a train", ge=2, le=16)
    weights: int | None = option(None, "bits of weights where they differ from `bits`", ge=2, le=16)
    range: str | None = option(None, "how ranges are calibrated", one_of=("max", "percentile", "mse"))
    percentile: float | None = option(None, "the share of values inside; it asks for range=percentile", ge=50, le=100)
    per: str | None = option(None, "one range a tensor, or one a channel", one_of=("tensor", "channel"))
    join: str | None = option(None, "how residual branches meet", one_of=("wide", "rescale"))
    max_pool: str = option("keep", "pools stay on integrated values, or become neurons", one_of=("keep", "lower"))

    def pipeline(self) -> str:
        """The passes in order."""
        method = "percentile" if self.range is None and self.percentile is not None else self.range
        ranges = _clause(
            "calibrate-range",
            method=method,
            percentile=self.percentile,
            per=self.per,
            bits=self.bits if method == "mse" else None,
        )
        lowered = "lower-max-pool, " if self.max_pool == "lower" else ""
        return (
            f"canonicalize, fold-bn, {ranges}, {_clause('quantize', bits=self.bits, weights=self.weights)}, "
            f"{_clause('propagate-scales', join=self.join)}, {lowered}derive-thresholds{{neuron=stem}}, fuse-neuron"
        )


def _clause(name: str, **given: object) -> str:
    shown = ", ".join(f"{label}={value}" for label, value in given.items() if value is not None)
    return f"{name}{{{shown}}}" if shown else name
