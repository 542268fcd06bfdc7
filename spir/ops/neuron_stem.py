"""neuron_stem: accumulate b weighted frames, requantise, emit b bits (SDANN)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Array
from spir.ops._neuron import ArrayNamespace, Neuron, no_window
from spir.ops._threshold import Triple, check_triple, law, law_bounds
from spir.ops.encode import Encode, bits
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.types import Current, Interval, Scale, Shape, Spikes, Stored, Tensor


@attrs.frozen
class NeuronStem(Neuron):
    """The spatio-temporal neuron: integrates ``sum_t 2^(b-1-t) I(t)``, maps it by the integer triple, emits bits.

    Accumulate: V += I(t) << (b-1-t). Requantise: Y = (mul V + add) // div, the half of round-half-up inside ``add``.
    Generate: spike iff Y >= 2^(b-1-t), then Y -= 2^(b-1-t), MSB first; with ``signed`` the first step spikes -1 iff
    Y < 0, then Y += 2^(b-1). Thresholds do the ReLU and both clips (Theorem STEM-2).

    Source: SDANN eqs 12-14 and 18-21 (the printed equations are lost: reconstruction, proved by STEM-1 to STEM-3).
    """

    name: ClassVar[str] = "neuron_stem"
    bits: int
    mul: Array
    add: Array
    div: int | Array
    scale: float = attrs.field(converter=float)
    signed: bool = False

    @property
    def clip(self) -> tuple[int, int]:
        """The clip range that b bits realise."""
        return Spikes.limits(self.bits, "bits", signed=self.signed)

    @property
    def triple(self) -> Triple:
        """STEM decodes before it decides (Theorem STEM-3)."""
        return self.mul, self.add, self.div, *self.clip

    def infer(self, *types: Tensor) -> Tensor:
        """A bit-coded train or current of any length to ``bits`` frames."""
        (x,) = types
        if x.train is None or x.train.code != "bits":
            raise error(
                "type",
                f"accumulates bit-coded frames, not {x.encoding}",
                fix="encode the input with code = bits, or use the unfused integrate; requant; encode",
            )
        check_triple(self.mul, self.add, self.div, x.shape, x)
        return Tensor(x.shape, Spikes(self.bits, "bits", *self.clip, Scale.of(self.scale)))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The law at both ends."""
        return law_bounds(self.mul, self.add, self.div, *self.clip, intervals[0])

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Decode, apply the law, write the bits: the three ops in a row."""
        z = types[0].integers(np.asarray(stored[0], dtype=np.int64))
        return bits(law(z, self.mul, self.add, self.div, *self.clip), self.bits, signed=self.signed)

    def fire(self, xp: ArrayNamespace, currents: Iterator[Any]) -> Iterator[Any]:
        """Two phases: doubling accumulation of all frames, then one comparison a bit."""
        first = next(currents)
        potential = first
        for current in currents:
            potential = potential * 2 + current
        div = self.div if isinstance(self.div, int) else xp.constant(self.div, first)
        potential = (potential * xp.constant(self.mul, first) + xp.constant(self.add, first)) // div
        for t in range(self.bits):
            threshold = 2 ** (self.bits - 1 - t)
            if self.signed and t == 0:
                fires = potential < 0
                potential = xp.where(fires, potential + threshold, potential)
                yield xp.where(fires, -1, 0)
            else:
                fires = potential >= threshold
                potential = xp.where(fires, potential - threshold, potential)
                yield xp.where(fires, 1, 0)

    @classmethod
    def derive(cls, source: Requant | Quantize, order: str | None = None, steps: int | None = None) -> Encode:
        """0..2^b-1 or -2^(b-1)..2^(b-1)-1 become b bits."""
        no_window("stem", steps)
        if order is not None:
            raise error("option", f"neuron stem emits bits, in no order {order!r}", fix="neuron=parallel, or no order")
        signed = source.lo < 0
        length = max(source.hi, -source.lo - 1, 0 if signed else 1).bit_length() + signed
        realised = Spikes.limits(length, "bits", signed=signed)
        if (source.lo, source.hi) != realised:
            raise error(
                "type",
                f"neuron stem realises clip ranges 0..2^b-1 and -2^(b-1)..2^(b-1)-1, not {source.lo}..{source.hi}",
                fix=f"quantize to {realised[0]}..{realised[1]}",
            )
        return Encode(steps=length)

    @classmethod
    def fuse(cls, integrate: Integrate | None, requant: Requant, encode: Encode) -> Self | None:
        """Only where the clip range is the neuron's own and no bias was added in between."""
        signed = requant.lo < 0
        if encode.code != "bits" or integrate is None or integrate.bias is not None:
            return None
        if (requant.lo, requant.hi) != Spikes.limits(encode.steps, "bits", signed=signed):
            return None
        return cls(encode.steps, requant.mul, requant.add, requant.div, requant.scale, signed)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Signed and unsigned in and out, other lengths out than in, ties, saturation at both ends."""
        scale = Scale.of(0.5)
        unsigned = Current(4, "bits", -90, 80, -6, 6, scale)
        for bits_out, signed in ((4, False), (8, True), (1, False), (2, True)):
            op = cls(bits_out, Array.of([3, -2, 1]), Array.of([8, 8, 7]), 16, 0.25, signed)
            for encoding in (unsigned, Spikes(8, "bits", -128, 127, scale), Spikes(1, "bits", 0, 1, scale)):
                yield op, (Tensor((3, 2, 2), encoding),)
        yield attrs.evolve(op, div=Array.of([16, 7, 1])), (Tensor((3, 2, 2), unsigned),)
