"""@sdann: a ReLU network to STEM neurons for fixed-point hardware: narrow accumulators, sparse spikes."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.errors import error
from spir.options import option
from spir.pipeline import Recipe


@attrs.frozen
class Sdann(Recipe):
    """`@stem` with pools and branches as layers of neurons; then scale-integration, calibrate-bias, sparsify.

    Without ``accumulator`` spikes equal the integer network, bit for bit. With it they fit registers of so many bits,
    and every layer says by how much it may differ; RoT and DRLO trade accuracy for operations, by hand or within a
    budget.

    Source: SDANN (Chen et al. 2025, arXiv 2505.12221).
    """

    name: ClassVar[str] = "sdann"
    bits: int = option(8, "bits of activations and weights; also the frames of a train", ge=2, le=16)
    weights: int | None = option(None, "bits of weights where they differ from `bits`", ge=2, le=16)
    range: str | None = option(None, "how ranges are calibrated", one_of=("max", "percentile", "mse"))
    max_pool: str = option("lower", "pools become neurons, or stay on integrated values", one_of=("lower", "keep"))
    accumulator: int | None = option(None, "bits of sums and states: 16", ge=4, le=63)
    r: str | None = option(None, "scales from proved bounds, or from the data", one_of=("guaranteed", "data"))
    per: str | None = option(None, "one scale a layer; one a channel with divisor", one_of=("layer", "channel"))
    divisor: int | None = option(None, "the largest divisor of a chip without multiplier: 255", ge=1, le=2**31 - 1)
    rot: int = option(0, "low bits that RoT rounds away; 0 is off", ge=0, le=15)
    drlo: int = option(0, "spikes of a train that DRLO keeps; 0 is off", ge=0, le=16)
    max_drop: float | None = option(None, "the accuracy that sparse spikes may cost, in points", ge=0, le=100)

    def __attrs_post_init__(self) -> None:
        for label in ("r", "per", "divisor"):
            if self.accumulator is None and getattr(self, label) is not None:
                raise error("option", f"@sdann: {label} is of scaled integration", fix="accumulator=16")
        if self.divisor is not None and self.max_pool == "keep":
            raise error("option", "@sdann: only neurons divide, and pools stay on integers", fix="max_pool=lower")

    def pipeline(self) -> str:
        """The passes in order."""
        passes = [
            "canonicalize",
            "fold-bn",
            _clause("calibrate-range", method=self.range, bits=self.bits if self.range == "mse" else None, pools="on"),
            _clause("quantize", bits=self.bits, weights=self.weights),
            _clause("propagate-scales", join="rescale", whole="on" if self.divisor else None),
            *(["lower-max-pool"] if self.max_pool == "lower" else []),
            "derive-thresholds{neuron=stem}",
            "fuse-neuron",
        ]
        if self.accumulator is not None:
            per = self.per or ("channel" if self.divisor else None)
            given = {"bits": self.accumulator, "r": self.r, "per": per, "divisor": self.divisor}
            passes.append(_clause("scale-integration", **given))
            passes.append(_clause("calibrate-bias", register=self.accumulator))
        if self.rot or self.drlo or self.max_drop is not None:
            passes.append(_clause("sparsify", rot=self.rot or None, drlo=self.drlo or None, max_drop=self.max_drop))
        return ", ".join(passes)


def _clause(name: str, **given: object) -> str:
    shown = ", ".join(f"{label}={value}" for label, value in given.items() if value is not None)
    return f"{name}{{{shown}}}" if shown else name
