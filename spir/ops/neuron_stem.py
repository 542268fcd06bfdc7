"""neuron_stem: accumulate b weighted frames, requantise, emit b bits (SDANN)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np

from spir.errors import error
from spir.ir import Array
from spir.ops._accumulation import MOST, accumulate, check_sum, integrated, scaled, value_bounds
from spir.ops._neuron import ArrayNamespace, Neuron, for_toolkits, no_window
from spir.ops._thinning import READINGS, Thinning, check_thinning, generate
from spir.ops._threshold import Triple, check_triple, law, law_bounds, products
from spir.ops.encode import Encode, bits
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.types import Current, Interval, Scale, Shape, Spikes, Stored, Tensor, check_register


@attrs.frozen
class NeuronStem(Neuron):
    """The spatio-temporal neuron: integrates ``sum_t 2^(b-1-t) I(t)``, maps it by the integer triple, emits bits.

    Accumulate: V += I(t) << (b-1-t); with ``shift`` r each term is shifted right by r after that, rounded half up, so
    that V counts in 2^r (scaled integration). Requantise: Y = (mul V + add) // div, the half of round-half-up inside
    ``add``. With r > 0 frames say more than what they decode to: there is no count law, and none may be merged.
    Generate: spike iff Y >= 2^(b-1-t), then Y -= 2^(b-1-t), MSB first; with ``signed`` the first step spikes -1 iff
    Y < 0, then Y += 2^(b-1). Thresholds do the ReLU and both clips (Theorem STEM-2). ``rot`` and ``drlo``, in the
    reading ``drlo_mode``, leave spikes out (`spir.ops._thinning`); 0 is off.

    Source: SDANN eqs 12-14 and 18-21 (the printed equations are lost: reconstruction, proved by STEM-1 to STEM-3).
    """

    name: ClassVar[str] = "neuron_stem"
    bits: int
    mul: Array
    add: Array
    div: int | Array
    scale: float = attrs.field(converter=float)
    signed: bool = False
    shift: int | Array = 0
    rot: int = 0
    drlo: int = 0
    drlo_mode: str = READINGS[0]

    @property
    def clip(self) -> tuple[int, int]:
        """The clip range that b bits realise."""
        return Spikes.limits(self.bits, "bits", signed=self.signed)

    @property
    def thinning(self) -> Thinning | None:
        """What becomes of the train that the law stands for."""
        return Thinning.of(self.rot, self.drlo, self.drlo_mode)

    @property
    def law(self) -> Triple:
        """What follows the sum of all terms."""
        return self.mul, self.add, self.div, *self.clip

    @property
    def triple(self) -> Triple | None:
        """STEM decodes before it decides (Theorem STEM-3), unless terms are scaled."""
        return None if scaled(self.shift) else self.law

    def infer(self, *types: Tensor) -> Tensor:
        """A bit-coded train or current of any length to ``bits`` frames."""
        (x,) = types
        if x.train is None or x.train.code != "bits":
            raise error(
                "type",
                f"accumulates bit-coded frames, not {x.encoding}",
                fix="encode the input with code = bits, or use the unfused integrate; requant; encode",
            )
        check_triple(self.mul, self.add, self.div, x.shape, check_sum(x, self.shift))
        check_thinning(self.bits, self.rot, self.drlo, self.drlo_mode)
        if self.thinning is not None:
            held = products(self.mul, self.add, check_sum(x, self.shift).range)
            check_register(held + Interval.of(0, self.thinning.half), "what rot rounds")
        return Tensor(x.shape, Spikes(self.bits, "bits", *self.clip, Scale.of(self.scale)))

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The law at both ends."""
        codes = law_bounds(*self.law, value_bounds(intervals[0], self.shift, MOST))
        return codes if self.thinning is None else self.thinning.bounds(codes, self.bits, signed=self.signed)

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Decode, apply the law, write the bits: the three ops in a row."""
        z = integrated(types[0], np.asarray(stored[0], dtype=np.int64), self.shift)
        codes = law(z, *self.law)
        if self.thinning is not None:
            codes = self.thinning.codes(codes, self.bits, signed=self.signed)
        return bits(codes, self.bits, signed=self.signed)

    def fire(self, xp: ArrayNamespace, currents: Iterator[Any]) -> Iterator[Any]:
        """Two phases: weighted accumulation of all frames, then one comparison a bit."""
        total = accumulate(xp, currents, "bits", self.shift)
        div = self.div if isinstance(self.div, int) else xp.constant(self.div, total)
        potential = (total * xp.constant(self.mul, total) + xp.constant(self.add, total)) // div
        yield from generate(xp, potential, self.bits, signed=self.signed, thinning=self.thinning)

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
                fix=f"quantize to {realised[0]}..{realised[1]}{for_toolkits(source.lo, source.hi)}",
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
        thinned = (encode.rot, encode.drlo, encode.drlo_mode)
        return cls(
            encode.steps, requant.mul, requant.add, requant.div, requant.scale, signed, integrate.shift, *thinned
        )

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
        for shift in (1, 6, Array.of([0, 2, 9])):
            yield attrs.evolve(op, shift=shift), (Tensor((3, 2, 2), unsigned),)
        for wide, signed, rot, drlo, mode in (
            (8, False, 2, 2, "count"),
            (4, True, 1, 0, "count"),
            (8, True, 0, 3, "window"),
            (6, True, 1, 3, "position"),
        ):
            thin = cls(wide, Array.of([3, -2, 1]), Array.of([8, 8, 7]), 16, 0.25, signed, 0, rot, drlo, mode)
            yield thin, (Tensor((3, 2, 2), unsigned),)
