"""calibrate-range: activations to clipped activations, with ranges from data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.contracts import Calibrated, Contract
from spir.errors import error
from spir.ir import Array, Module, Node, Op, Origin
from spir.ops._linear import LinearMap, Relabelling, WeightedMap
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.concat import Concat
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.max_pool import MaxPool
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.options import option
from spir.passes._codes import only_quantised
from spir.passes._gains import keeps_channels
from spir.rewriting import Context, Pass, Rewriter
from spir.types import Real, Reals

Ends = tuple[Reals, Reals]
"""The smallest and largest value to reach, ``[G]`` each."""
BINS = 2048
"""Of the histograms that method = mse looks at."""


LEAST = 2.0**-12
"""Of the widest channel's range: no channel gets a smaller one of its own."""


@attrs.frozen(eq=False)
class _Tail:
    """The smallest and largest values seen ``[G, keep]``, sorted: exact, mergeable, independent of how data is cut."""

    smallest: Reals
    largest: Reals

    @classmethod
    def of(cls, values: Reals, keep: int) -> _Tail:
        """The ends of one shard ``[G, n]``."""
        n = values.shape[1]
        if keep == 1:
            return cls(values.min(axis=1, keepdims=True), values.max(axis=1, keepdims=True))
        if keep >= n:
            return cls(np.sort(values), np.sort(values))
        split = np.partition(values, (keep - 1, n - keep))
        return cls(np.sort(split[:, :keep]), np.sort(split[:, -keep:]))

    def merge(self, other: _Tail, keep: int) -> _Tail:
        """The ends of both shards."""
        low = np.sort(np.concatenate([self.smallest, other.smallest], axis=1))
        high = np.sort(np.concatenate([self.largest, other.largest], axis=1))
        return _Tail(low[:, :keep], high[:, -keep:])

    @property
    def ends(self) -> Ends:
        """What a quantiser should reach, ``[G]`` each."""
        return self.smallest[:, -1] + 0.0, self.largest[:, 0] + 0.0  # no -0, which the order of data decides

    @property
    def live(self) -> Ends:
        """The same, but the largest value where so many are 0 that the range would end there."""
        low, high = self.ends
        return low, np.where(high > 0, high, self.largest[:, -1])


def histogram(values: Reals, top: Reals) -> NDArray[np.int64]:
    """Counts ``[G, BINS]`` of magnitudes ``[G, n]`` between 0 and ``top`` ``[G]``; counts of shards add up."""
    width = np.where(top > 0, top, 1.0)[:, None] / BINS
    index = np.minimum((np.abs(values) / width).astype(np.int64), BINS - 1)
    groups = len(values)
    flat = (index + np.arange(groups)[:, None] * BINS).reshape(-1)
    return np.bincount(flat, minlength=groups * BINS).reshape(groups, BINS)


def least_error(counts: NDArray[np.int64], top: Reals, levels: int) -> Reals:
    """The clip ``[G]`` that makes the mean squared error of ``levels`` steps smallest; ties take the widest."""
    centres = (np.arange(BINS) + 0.5) / BINS
    best, least = np.ones(len(counts)), np.full(len(counts), np.inf)
    for share in np.arange(100, 19, -1) / 100:
        step = share / levels
        missed = (centres - np.clip(np.floor(centres / step + 0.5), 0, levels) * step) ** 2
        found = counts @ missed
        best, least = np.where(found < least, share, best), np.minimum(found, least)
    return np.asarray(best * top)


@attrs.frozen(eq=False)
class _Point:
    """A value that needs a range: its own limits, and whether codes of it are signed.

    ``lo`` and ``hi`` are the model's own limits, ``[1]`` or ``[C]``; infinite where it has none. Between other limits
    than 0 code 0 stands for the lowest value that the data reach, so that far limits cost no codes.
    """

    lo: Reals
    hi: Reals
    signed: bool
    above: bool = False
    """Of a signed point: nothing below 0 ever reaches it."""

    @property
    def moves(self) -> bool:
        """Whether code 0 stands for another number than 0."""
        return not self.signed and bool(self.lo.any())


@attrs.frozen
class CalibrateRange(Pass):
    """relu, clip -> clip{0, hi}; the input, and sums that weights read -> clip{lo, hi}: ranges that the data reach.

    ``max`` takes the extremes; ``percentile`` leaves ``100 - percentile`` per cent of the values outside at each end;
    ``mse`` takes the clip with the least squared error for codes of ``bits``, or for ``levels`` behind the first layer.
    With ``per = channel`` a relu becomes scale{g}(clip{0, hi}(scale{1 / g}(x))), g per channel, so that every channel
    uses all codes; quantize folds g into the weights that read it. A clip whose range does not start at 0 stands
    between two shifts. A value or channel that the data leave at 0 takes the widest range around, so that its scale is
    a live one; none takes less than 2^-12 of it. With ``pools = on`` an average pool that weights read is divided into
    steps, too: it becomes a layer of neurons of its own, and no sum of one step counts the spikes of whole windows.
    """

    name: ClassVar[str] = "calibrate-range"
    method: str = option("max", "max, percentile or mse", one_of=("max", "percentile", "mse"))
    percentile: float | None = option(None, "the share of values inside, for method = percentile: 99.99", ge=50, le=100)
    per: str = option("tensor", "one range a tensor, or one a channel of activations", one_of=("tensor", "channel"))
    bits: int | None = option(None, "bits of the codes that method = mse fits: 8", ge=2, le=16)
    pools: bool = option(False, "average pools that weights read become neurons, for chips with narrow sums")
    levels: int | None = option(None, "codes above 0 that method = mse fits to activations", ge=1, le=65535)

    def contract(self) -> Contract:
        """Values beyond the calibrated range change."""
        return Calibrated()

    def run(self, module: Module, context: Context) -> Module:
        """Measures every value that needs a range, then clips it."""
        hosted = _hosted(module)
        points = self._points(module, hosted)
        if context.data is None and (points or not any(isinstance(n.op, Quantize) for n in module.nodes)):
            raise error("data", f"{self.name} needs calibration data", fix="give data=images, or --data in a shell")
        if self.method != "percentile" and self.percentile is not None:
            raise error("option", f"{self.name}: method={self.method} takes no percentile", fix="method=percentile")
        for label, given in (("bits", self.bits), ("levels", self.levels)):
            if self.method != "mse" and given is not None:
                what = f"{self.name}: method={self.method} takes no {label}"
                raise error("option", what, fix=f"method=mse, or no {label}")
        if not points:
            return module
        rewriter = Rewriter(module, self.name)
        ends, reach = self._measure(module, context, points)
        live = max((float(np.max(np.maximum(-low, high))) for low, high in ends.values()), default=0.0) or 1.0
        source = module.input.name
        if source in points:
            readers = module.readers[source]
            origin = rewriter.origin(readers[0].origin if readers else None, "input")
            self._enter(source, origin, _around(ends[source], live), rewriter)
        for node in module.nodes:
            point = points.get(node.result)
            if node.result in hosted:  # it reads what is not clipped
                rewriter.emit(node.op, *node.operands, name=node.result, origin=node.origin)
            elif point is None or point.signed:
                rewriter.keep(node)
            else:
                self._clip(node, point, ends[node.result], reach[node.result], live, rewriter)
                _note_narrow(node.result, point, ends[node.result], context)
            if point is not None and point.signed:
                low, high = _around(ends[node.result], live)
                top = max(-low, high)
                around = (low, high) if node.result in hosted else (0.0 if point.above else -top, top)
                self._enter(node.result, node.origin, around, rewriter)
        return rewriter.finish()

    def _points(self, module: Module, hosted: set[str]) -> dict[str, _Point]:
        """The values that need a range: what enters the network, activations, and sums that weights read."""
        none, sums = np.array([np.inf]), _read_by_weights(module)
        found = {n: _Point(-none, none, signed=True) for n in _entering(module, hosted) if not _ranged(n, module)}
        if self.pools:
            pools = (n for n in _pools(module) if self.selects(module.definitions[n]))
            found |= {n: _Point(-none, none, signed=True, above=_above(n, module)) for n in pools}
        for node in module.nodes:
            chosen = self.selects(node) and isinstance(node.type.encoding, Real) and not _signed_before(node)
            if chosen and not only_quantised(node, module) and (point := _point(node, sums)):
                found[node.result] = point
        return found

    @staticmethod
    def _enter(value: str, origin: Origin, ends: tuple[float, float], rewriter: Rewriter) -> None:
        """A signed range behind a value that keeps its name."""
        clip = Clip(*(Array.of([end]) for end in ends))
        rewriter.replace(value, rewriter.emit(clip, value, name=rewriter.fresh(f"{value}.clip"), origin=origin))

    @staticmethod
    def _clip(node: Node, point: _Point, ends: Ends, reach: Reals, live: float, rewriter: Rewriter) -> None:
        """The activation as a clip, between gains and shifts where it needs them."""
        base = np.maximum(point.lo, ends[0]) if point.moves else np.zeros(1)
        top = ends[1] - base
        widest = float(top.max()) if top.max() > 0 else live
        top = np.minimum(np.where(top > 0, top, widest), point.hi - base)
        top = np.where(top > 0, top, widest)
        whole = float(top.max())
        gain = np.array([float(np.float32(max(t / whole, LEAST))) for t in top])
        before: list[tuple[str, Op]] = [("shifted", Shift(Array.of(-base)))] if point.moves else []
        after: list[tuple[str, Op]] = [("unshifted", Shift(Array.of(base)))] if point.moves else []
        if (gain != 1).any():
            before.append(("even", Scaling(Array.of(1 / gain))))
            after.insert(0, ("gained", Scaling(Array.of(gain))))
        before_it = node.op.reach if isinstance(node.op, Clip) else None
        own = np.minimum(reach, point.hi) if before_it is None else before_it.values
        most = np.maximum((own - base) / gain, whole)
        narrowed = (most > whole * (1 + 2.0**-20)).any()  # gains are float32
        clip = Clip(Array.of([0.0]), Array.of([whole]), Array.of(most) if narrowed else None)
        chain: list[tuple[str, Op]] = [*before, ("clip", clip), *after]
        value = rewriter.now(node.operands[0])
        for word, op in chain:
            name = node.result if op is chain[-1][1] else rewriter.fresh(f"{node.result}.{word}")
            value = rewriter.emit(op, value, name=name, origin=node.origin)

    def _measure(
        self, module: Module, context: Context, points: Mapping[str, _Point]
    ) -> tuple[dict[str, Ends], dict[str, Reals]]:
        """The ends ``[G]`` of every value, and how far it reached beyond them."""
        assert context.data is not None  # run refused
        inside = (self.percentile or 99.99) if self.method == "percentile" else 100
        outside = 1 - Fraction(str(inside)) / 100  # as the decimal reads
        tails: dict[str, _Tail] = {}
        for name, values in self._values(module, context, points):
            keep = 1 + int(outside * len(context.data) * module.types[name].size / len(values))
            tail = _Tail.of(values, keep)
            tails[name] = tails[name].merge(tail, keep) if name in tails else tail
        plain = {name for name, point in points.items() if point.signed or point.moves}
        ends = {name: tail.ends if name in plain else tail.live for name, tail in tails.items()}
        found = self._fitted(module, context, points, ends) if self.method == "mse" else ends
        return found, {name: tail.largest[:, -1] + 0.0 for name, tail in tails.items()}

    def _fitted(
        self, module: Module, context: Context, points: Mapping[str, _Point], ends: Mapping[str, Ends]
    ) -> dict[str, Ends]:
        """The ends, moved in to where the squared error is least."""
        counts: dict[str, NDArray[np.int64]] = {}
        reach = {name: np.maximum(-low, high) for name, (low, high) in ends.items()}
        for name, values in self._values(module, context, points):
            counts[name] = counts.get(name, 0) + histogram(values, reach[name])
        found = {}
        for name, point in points.items():
            if point.moves:
                found[name] = ends[name]
                continue
            bits = self.bits or 8
            levels = 2 ** (bits - 1) - 1 if point.signed and not point.above else 2**bits - 1
            source = module.definitions.get(name)
            if self.levels is not None and source is not None and not source.op.host:
                levels = self.levels
            top = least_error(counts[name], reach[name], levels)
            found[name] = np.maximum(ends[name][0], -top), np.minimum(ends[name][1], top)
        return found

    def _values(self, module: Module, context: Context, points: Mapping[str, _Point]) -> Iterator[tuple[str, Reals]]:
        """Batch by batch the values ``[G, n]`` of every point; G is 1, or the channels."""
        assert context.data is not None  # run refused
        apart = {n for n, p in points.items() if self.per == "channel" and not p.signed and keeps_channels(n, module)}
        for batch in context.evaluate(module, context.data, "|".join(sorted(points))):
            for name in points.keys() & batch.keys():
                x = batch[name]
                yield name, x.swapaxes(0, 1).reshape(x.shape[1], -1) if name in apart else x.reshape(1, -1)


def _around(ends: Ends, live: float) -> tuple[float, float]:
    """Ends of a signed range: they hold 0, and are live where all values are 0."""
    low, high = (float(end.item()) for end in ends)
    return min(low, 0.0), max(high, 0.0) if low or high else live


def _note_narrow(name: str, point: _Point, ends: Ends, context: Context) -> None:
    """Says where most codes of a range that begins at 0 stand for values that the data never take."""
    low, high = float(ends[0].min()), float(ends[1].max())
    if not point.moves and low > high / 2:
        context.note(f"%{name}: the data reach {low:.3g}..{high:.3g} only, and codes begin at 0")


def _hosted(module: Module) -> set[str]:
    """What the host makes of the input."""
    hosted: set[str] = set()
    for node in module.nodes:
        if node.op.host and hosted.union([module.input.name]).issuperset(node.operands):
            hosted.add(node.result)
    return hosted


def _entering(module: Module, hosted: set[str]) -> list[str]:
    """The input and what the host makes of it, where the network reads them."""
    known = [module.input.name, *hosted] if isinstance(module.input.type.encoding, Real) else []
    return [name for name in module.types if name in known and any(not n.op.host for n in module.readers[name])]


def _ranged(name: str, module: Module) -> bool:
    """Whether whatever reads a value divides it into steps already, or was told its range."""
    return all(isinstance(n.op, Quantize) or n.op.host or _calibrated(n) for n in module.readers[name])


def _calibrated(node: Node) -> bool:
    """Whether a clip is this pass's own, and not the model's."""
    return isinstance(node.op, Clip) and CalibrateRange.name in node.origin.trail


def _signed_before(node: Node) -> bool:
    """Whether a signed range was measured by an earlier run."""
    return isinstance(node.op, Clip) and _calibrated(node) and bool((node.op.lo.values < 0).any())


def _point(node: Node, sums: set[str]) -> _Point | None:
    """The range that a node's result needs, if any."""
    none = np.array([np.inf])
    match node.op:
        case Relu():
            return _Point(np.zeros(1), none, signed=False)
        case Clip(lo=lo, hi=hi):
            return _Point(lo.values, hi.values, signed=False)
    return _Point(-none, none, signed=True) if node.result in sums else None


def _pools(module: Module) -> set[str]:
    """Average pools that weights read, and those that others read on the way there."""
    found: set[str] = set()
    waiting = [o for n in module.nodes if isinstance(n.op, WeightedMap) for o in n.operands]
    seen = set(waiting)
    while waiting:
        node = module.definitions.get(waiting.pop())
        if node is None or not isinstance(node.op, (AvgPool, GlobalAvgPool, MaxPool, Concat, Relabelling)):
            continue
        if isinstance(node.op, (AvgPool, GlobalAvgPool)) and not only_quantised(node, module):
            found.add(node.result)
        waiting += [o for o in node.operands if o not in seen]
        seen.update(node.operands)
    return found


def _above(name: str, module: Module) -> bool:
    """Whether a value is made of activations that are never below 0."""
    node = module.definitions.get(name)
    match node.op if node is not None else None:
        case Relu():
            return True
        case Clip(lo=lo):
            return bool(lo.values.min() >= 0)
        case AvgPool() | GlobalAvgPool() | MaxPool() | Concat() | Relabelling():
            assert node is not None  # it has an op
            return all(_above(o, module) for o in node.operands)
    return False


def _read_by_weights(module: Module) -> set[str]:
    """Sums of weighted values that other weights read before any activation: spikes must be made of them."""
    sums: set[str] = set()
    for node in module.nodes:
        passes = isinstance(node.op, (LinearMap, BatchNorm, Shift, MaxPool))
        if isinstance(node.op, WeightedMap) or (passes and not sums.isdisjoint(node.operands)):
            sums.add(node.result)
    found = set()
    for node in module.nodes:
        if isinstance(node.op, WeightedMap):
            (value,) = node.operands
            while (source := module.definitions.get(value)) is not None and isinstance(source.op, Relabelling):
                (value,) = source.operands
            found.add(value)
    return found & sums
