"""What both recipes of parallel conversion end with."""

from __future__ import annotations


def spiking(calibration: str, bits: int, order: str | None, *, fused: bool) -> str:
    """From ranges to parallel neurons; ``calibration`` spells the options of calibrate-qcfs."""
    found = "" if order is None else f", order={order}"
    return (
        f"calibrate-qcfs{{{calibration}}}, quantize{{bits={bits}}}, propagate-scales{{factor=8, grid=threshold}}, "
        f"derive-thresholds{{neuron=parallel{found}}}, fuse-neuron" + ", fuse-parallel" * fused
    )
