"""neuron_ca_lif: integrate, fire both signs, gate on the count, round once at the end (calcium-gated LIF)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error, unknown
from spir.ir import Array
from spir.ops._linear import channelwise
from spir.ops._neuron import ArrayNamespace, Neuron
from spir.ops._threshold import Triple, check_triple, divisors, law_bounds
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.types import Current, Interval, Scale, Shape, Spikes, Stored, Tensor, check_register

MODES = ("multi", "single")


@attrs.frozen
class NeuronCaLif(Neuron):
    """The calcium-gated bipolar neuron, threshold ``V = div``: what is integrated leaves as spikes of both signs.

    Each frame adds ``mul I(t)`` and a share of the leak to v. From v >= V on it spikes +1, v loses V and the count y
    gains 1; from v <= -V on it spikes -1, and the reverse; y never leaves ``lo..hi`` (lo = 0 is the gate of the paper:
    no negative spike without a positive one before; hi saturates). With ``mode = multi`` that repeats until v is
    between the thresholds, with ``single`` there is one spike a frame, and ``drain`` more frames without input let the
    rest out. One last frame rounds: +1 where 2 v >= V, -1 where 2 v < -V. As a layer rounds after its operand has
    ended, layers round one after the other.

    The bias ``B = add - div // 2`` reaches v in ``steps`` exact shares, ``floor((t + 1) B / T) - floor(t B / T)`` in
    frame t of the window, whether spikes come or not. Counts are those of ``requant``, for every order of events
    (theorem CA, with ties up).

    Source: Gao et al., Front. Neurosci. 17:1141701, eqs 2 to 5, made exact: integer shares, flushed; the current count
    as gate; one asymmetric rounding (the paper's rounding phase, with thresholds that do not change meanwhile).
    """

    name: ClassVar[str] = "neuron_ca_lif"
    two_phase: ClassVar[bool] = False
    windowed: ClassVar[bool] = True
    steps: int
    """T, the window: frames of the operand that come before any layer rounds."""
    mul: Array
    add: Array
    div: int | Array
    lo: int
    hi: int
    scale: float = attrs.field(converter=float)
    mode: str = "multi"
    drain: int = 0

    @property
    def triple(self) -> Triple:
        """Theorem CA."""
        return self.mul, self.add, self.div, self.lo, self.hi

    def infer(self, *types: Tensor) -> Tensor:
        """A train or current whose frames all weigh 1, to as many net frames, the drain and one that rounds."""
        (x,) = types
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES, code="type")
        if x.train is None or x.train.code == "bits":
            raise error(
                "type",
                f"reads frames that weigh the same, not {x.encoding}",
                fix="encode the input with code = isi, or use the unfused integrate; requant; encode",
            )
        if not 1 <= self.steps <= x.steps or not self.lo <= 0 <= self.hi:
            raise error(
                "type", f"a window of {self.steps} of {x.steps} frames and counts {self.lo}..{self.hi} from 0 on"
            )
        check_triple(self.mul, self.add, self.div, x.shape, x)
        if self.mode == "multi" and self.drain:
            raise error("type", "mode multi leaves nothing to drain", fix="drain = 0, or mode = single")
        needed = self.undrained(x.train) if self.mode == "single" else 0
        if self.drain < needed:
            raise error(
                "E-BURST",
                f"a frame may bring more than one threshold, and {self.drain} frames cannot let the rest out",
                fix=f"drain = {needed} is proved to do, or mode = multi",
            )
        check_register(self.state(x.train).times(np.array([2], dtype=object)), "twice the membrane potential")
        frames, most = x.steps + self.drain + 1, max(self.hi, -self.lo)
        if self.mode == "single" and most > frames:
            raise error(
                "E-CAP",
                f"counts up to {most} do not fit {frames} frames of one spike",
                fix="more steps, a narrower clip range, or mode = multi",
            )
        span = max(1, self.hi - self.lo) if self.mode == "multi" else 1
        return Tensor(x.shape, Spikes.rate(frames, self.lo, self.hi, Scale.of(self.scale), (-span, span)))

    @property
    def leak(self) -> Array:
        """B: what reaches v over the window, whatever spikes come."""
        halves = divisors(self.div) // 2
        add = self.add.values
        return Array.of(add - (halves if halves.size == 1 else channelwise(halves, add.ndim)))

    def _carried(self, train: Spikes | Current) -> NDArray[np.object_]:
        """What a frame brings at most, its share of the leak included, in whole numbers ``[1]`` or ``[C]``."""
        factor = np.abs(self.mul.values.astype(object)).reshape(len(self.mul.values), -1).max(axis=1)
        leak = np.abs(self.leak.values.astype(object)).reshape(len(self.leak.values), -1).max(axis=1)
        return np.asarray(factor * max(-train.frame[0], train.frame[1]) + -(-leak // self.steps), dtype=object)

    def state(self, train: Spikes | Current) -> Interval:
        """All that its frames can bring, in one direction."""
        reach = self._carried(train) * (train.steps + 1)
        return Interval(-reach, reach)

    def undrained(self, train: Spikes | Current) -> int:
        """Frames that certainly let out what one spike a frame leaves behind.

        Nothing stays where no frame brings more than V. Else each of them leaves its excess at most, and never more
        spikes than the range of counts are missing.
        """
        div = divisors(self.div).astype(object)
        excess = np.maximum(self._carried(train) - div, 0) * train.steps
        return min(int((-(-excess // div)).max()), self.hi - self.lo)

    def in_mode(self, mode: str, train: Spikes | Current) -> Self:
        """The neuron with several spikes a frame (multi), or one (single), and the drain which that needs."""
        if mode not in MODES:
            raise unknown("mode", mode, MODES, code="option")
        plain = attrs.evolve(self, mode=mode, drain=0)
        return attrs.evolve(plain, drain=plain.undrained(train)) if mode == "single" else plain

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """The law at both ends."""
        return law_bounds(self.mul, self.add, self.div, self.lo, self.hi, intervals[0])

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """Event by event as the equations read: spike after spike until v is between the thresholds."""
        frames = np.asarray(stored[0], dtype=np.int64)
        rank = frames.ndim - 2
        mul, leak = channelwise(self.mul.values, rank), channelwise(self.leak.values, rank)
        threshold = channelwise(divisors(self.div), rank)
        whole, rest = leak // self.steps, leak % self.steps
        v, y = np.zeros(frames.shape[1:], np.int64), np.zeros(frames.shape[1:], np.int64)
        emitted = np.zeros((len(frames) + self.drain + 1, *frames.shape[1:]), np.int64)
        for t, spikes in enumerate(emitted):
            if t < len(frames):
                v += mul * frames[t]
            if t < self.steps:
                v += whole + (t + 1) * rest // self.steps - t * rest // self.steps
            rounding = t == len(emitted) - 1
            while True:
                up = (2 * v >= threshold if rounding else v >= threshold) & (y < self.hi)
                down = (2 * v < -threshold if rounding else v <= -threshold) & (y > self.lo)
                fired = up.astype(np.int64) - down
                v -= fired * threshold
                y += fired
                spikes += fired
                if rounding or self.mode == "single" or not fired.any():
                    break
        return emitted

    def fire(self, xp: ArrayNamespace, currents: Iterator[Any]) -> Iterator[Any]:
        """As many spikes at once as v holds thresholds, within what the count allows."""
        first = next(currents)
        mul, leak = xp.constant(self.mul, first), xp.constant(self.leak, first)
        threshold = self.div if isinstance(self.div, int) else xp.constant(self.div, first)
        whole, rest = leak // self.steps, leak % self.steps
        v = count = xp.zeros_like(first)

        def spiking(due: Any) -> Any:
            room, owed = self.hi - count, self.lo - count
            due = xp.where(due > room, room, due)
            return xp.where(due < owed, owed, due)

        silence = itertools.repeat(xp.zeros_like(first), self.drain)
        for t, current in enumerate(itertools.chain([first], currents, silence)):
            charge = current * mul
            if t < self.steps:
                charge = charge + (whole + (t + 1) * rest // self.steps - t * rest // self.steps)
            v = xp.hold(v + charge)
            spikes = spiking(self._due(xp, v, threshold))
            v, count = v - spikes * threshold, count + spikes
            yield spikes
        yield spiking(xp.where(2 * v >= threshold, 1, 0) - xp.where(2 * v < -threshold, 1, 0))

    def _due(self, xp: ArrayNamespace, v: Any, threshold: Any) -> Any:
        """Thresholds that v holds, with its sign."""
        if self.mode == "single":
            return xp.where(v >= threshold, 1, 0) - xp.where(v <= -threshold, 1, 0)
        return xp.where(v >= 0, v // threshold, -(-v // threshold))

    @classmethod
    def derive(cls, source: Requant | Quantize, order: str | None = None, steps: int | None = None) -> Encode:
        """Counts up to T become spikes spread over T steps."""
        if order is not None:
            raise error(
                "option", f"neuron ca-lif emits rates, in no order {order!r}", fix="neuron=parallel, or no order"
            )
        most = max(source.hi, -source.lo, 1)
        window = most if steps is None else steps
        if not source.lo <= 0 <= source.hi:
            raise error("type", f"neuron ca-lif counts from 0 on, not within {source.lo}..{source.hi}")
        if most > window:
            raise error(
                "E-CAP",
                f"codes of {source.lo}..{source.hi} are more than {window} steps of one spike hold",
                fix=f"steps={most}, or shorten-window{{steps={window}}} before, which is not lossless",
            )
        return Encode(steps=window, code="isi")

    @classmethod
    def fuse(cls, integrate: Integrate | None, requant: Requant, encode: Encode) -> Self | None:
        """Where the train of exact counts follows, and no bias was added in between."""
        if encode.code != "isi" or encode.density != 1 or integrate is None or integrate.bias is not None:
            return None
        if not requant.lo <= 0 <= requant.hi:
            return None
        return cls(encode.steps, requant.mul, requant.add, requant.div, requant.lo, requant.hi, requant.scale)

    @classmethod
    def corners(cls) -> Iterator[tuple[Self, tuple[Tensor, ...]]]:
        """Gated, ungated, saturated, ties, odd thresholds; one spike a frame with and without drain; long operands."""
        scale = Scale.of(0.5)
        current = Current(6, "rate", -90, 80, -15, 14, scale)
        for lo, hi, mode in ((0, 9, "multi"), (-4, 5, "multi"), (0, 0, "multi"), (0, 6, "single"), (-3, 4, "single")):
            op = cls(4, Array.of([3, -2, 1]), Array.of([8, -11, 7]), Array.of([16, 7, 6]), lo, hi, 0.25)
            spikes = Spikes.rate(5, -9, 9, scale, (-3, 4))
            for encoding in (current, spikes, Spikes(7, "rate", 0, 5, scale)):
                yield op.in_mode(mode, encoding), (Tensor((3, 2, 2), encoding),)
        wide = cls(2, Array.of([1]), Array.of([20]), 40, 0, 3, 0.25)
        yield wide.in_mode("single", current), (Tensor((3, 2, 2), current),)
