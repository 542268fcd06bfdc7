"""calibrate-qcfs: clipped activations, or QCFS of other levels, to QCFS of T levels whose mean errors are gone."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import ClassVar

import attrs
import numpy as np

from spir.contracts import Calibrated, Contract
from spir.errors import Diagnostic, SpirError, SpirWarning, error, raise_all
from spir.ir import Array, Module, Node, Op
from spir.ops.clip import Clip
from spir.ops.qcfs import Qcfs
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.ops.shift import Shift
from spir.options import option
from spir.passes._gains import keeps_channels
from spir.passes._refit import WIDEST, columns, refitted, sites
from spir.rewriting import Context, Pass, Rewriter
from spir.types import Real, Reals, Stored

MOMENTUM = 0.99
"""Of ``order = joint``."""


@attrs.frozen
class CalibrateQcfs(Pass):
    """clip{0, theta}, qcfs{L} -> qcfs{T, theta, psi, phi}, psi and phi one a channel: DA-QCFS.

    Two networks run side by side, the given one and the one of T levels; in the given one calibrated clips let through
    all that the data reached before. At every activation psi becomes the mean error of what comes in, and phi makes the
    mean error of what goes out vanish. ``order = sequential`` finishes each activation on all data before the next one
    sees it: both means are exact. ``joint`` goes batch by batch with momentum 0.99, as published. ``update = paper`` is
    the published rule for phi, which leaves a mean error as large as phi itself; ``integrating`` leaves none. Signed
    activations get psi alone. A channel that never spikes at level T keeps phi = 0 and is named. QCFS of T levels stay
    as they are: T = L is lossless (theorem PC-1).

    ``weights = refit`` goes past the paper: before psi, convolutions and linear layers with float weights take those
    that bring their sums nearest to the given network's (ridge regression on the same data; nothing is trained).

    Source: Hao et al. 2412.13610, eq 9 and algorithm 1 (confirmed in the authors' code; the fixed points are derived).
    """

    name: ClassVar[str] = "calibrate-qcfs"
    steps: int = option(4, "T: the levels of every activation, and the steps of a train", ge=1, le=65536)
    update: str = option("integrating", "the rule for phi", one_of=("integrating", "paper"))
    order: str = option("sequential", "one activation after the other, or all", one_of=("sequential", "joint"))
    weights: str = option("keep", "the layers' weights: as they are, or fitted", one_of=("keep", "refit"))
    batch: int | None = option(None, "samples a batch, for order = joint: 32", ge=1)
    epochs: int | None = option(None, "how often order = joint goes through the data: once", ge=1)

    def contract(self) -> Contract:
        """Fewer levels, measured."""
        return Calibrated()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses activations without a range; then calibrates on all data."""
        if self.order == "sequential" and (self.batch or self.epochs):
            raise error("option", f"{self.name}: order=sequential takes no batch or epochs", fix="order=joint")
        if self.order == "joint" and self.weights == "refit":
            raise error("option", f"{self.name}: order=joint fits no weights", fix="order=sequential, or weights=keep")
        raise_all(refusal for node in module.nodes if (refusal := self._refusal(node, module)) is not None)
        points = {n.result: n for n in module.nodes if self._is_point(n, module)}
        known = [n for n in module.nodes if isinstance(n.op, Qcfs)]
        if not points and not known:
            raise error(
                "type",
                f"{self.name} finds no activations of reals with a range",
                fix="run calibrate-range before, over the same layers",
            )
        if context.data is None and points:
            self._without_data(points.values())
        found = {name: _Fit.of(node, module, self.steps) for name, node in points.items()}
        layers = {} if context.data is None or not points else self._calibrate(found, module, context)
        rewriter = Rewriter(module, self.name)
        for node in module.nodes:
            fit = found.get(node.result)
            if fit is None:
                rewriter.keep(layers.get(node.result, node))
                continue
            operand = rewriter.now(node.operands[0])
            rewriter.emit(fit.qcfs, operand, name=node.result, origin=node.origin)
            if fit.silent:
                silent = f"%{node.result}: {fit.silent} never spike at T = {self.steps}, so phi = 0"
                context.note(Diagnostic("E-PHI-DEAD", silent).render("note"))
        return rewriter.finish()

    def _refusal(self, node: Node, module: Module) -> SpirError | None:
        if not isinstance(node.type.encoding, Real) or not self.selects(node):
            return None
        lopsided = isinstance(node.op, Clip) and self._is_point(node, module) and _lopsided(node.op)
        if not isinstance(node.op, Relu) and not lopsided:
            return None
        return error(
            "type",
            f"%{node.result} has no range to divide into {self.steps} levels",
            from_=str(node.origin),
            fix="run calibrate-range before, over the same layers",
        )

    def _is_point(self, node: Node, module: Module) -> bool:
        """Whether an activation gets other levels: not what enters the network."""
        if not self.selects(node) or not isinstance(node.type.encoding, Real):
            return False
        if isinstance(node.op, Qcfs):
            return node.op.levels != self.steps
        return isinstance(node.op, Clip) and not module.enters(node)

    def _without_data(self, points: Iterable[Node]) -> None:
        """Other levels without calibration: not lossless, and only where the model has thresholds."""
        if any(not isinstance(node.op, Qcfs) for node in points):
            raise error("data", f"{self.name} needs calibration data", fix="give data=images, or --data in a shell")
        if self.weights == "refit":
            raise error("data", f"{self.name}: weights are fitted to data", fix="give data=images, or weights=keep")
        trained = sorted({node.op.levels for node in points if isinstance(node.op, Qcfs)})
        finding = Diagnostic(
            "E-T-NE-L", f"T = {self.steps} steps for L = {', '.join(map(str, trained))} levels are not lossless"
        )
        advice = "give calibration data, or take as many steps as the model has levels"
        warnings.warn(SpirWarning(finding.note("fix", advice)), stacklevel=2)

    def _calibrate(self, found: Mapping[str, _Fit], module: Module, context: Context) -> Mapping[str, Node]:
        """Both networks side by side: even samples pass the given activations, odd ones those of T levels.

        Returns:
            The layers that get other weights.
        """
        rewriter = Rewriter(module, self.name)
        for node in module.nodes:
            if node.result in found:
                operand = rewriter.now(node.operands[0])
                rewriter.emit(Shift(Array.of([0.0])), operand, name=node.result, origin=node.origin)
            else:
                rewriter.keep(node)
        bare = rewriter.finish()
        assert context.data is not None  # the caller asked
        twice = np.repeat(context.data, 2, axis=0)

        places = self._layers(bare, context) if self.weights == "refit" else {}
        readers = Counter(node.operands[0] for node in places.values())
        read: dict[str, list[Reals]] = {}
        layers: dict[str, Node] = {}

        def visit(name: str, parts: list[Reals]) -> None:
            if (layer := places.get(name)) is not None:
                (operand,) = layer.operands
                made = refitted(layer, read[operand], parts, rectified=_rectified(name, bare, found))
                if made is not None:
                    layers[layer.result] = attrs.evolve(made, origin=made.origin.then(self.name))
                readers[operand] -= 1
                if not readers[operand]:
                    del read[operand]
            if name in found:
                found[name].visit(parts, self.update, settle=self.order == "sequential")
            if name in readers:
                read[name] = [part[1::2].copy() for part in parts]

        stops = "|".join({*found, *places, *readers})
        if self.order == "sequential":
            context.steer(bare, twice, stops, visit)
        for _ in range((self.epochs or 1) if self.order == "joint" else 0):
            context.steer(bare, twice, stops, visit, batch=2 * (self.batch or 32))
        return layers

    def _layers(self, module: Module, context: Context) -> dict[str, Node]:
        """The layers to fit, by the value where their sums are complete; others are named."""
        found = {place: node for place, node in sites(module).items() if self.selects(node)}
        wide = [node for node in found.values() if columns(node) > WIDEST]
        for node in wide:
            context.note(f"%{node.result} keeps its weights: {columns(node)} inputs of an output, {WIDEST} are fitted")
        return {place: node for place, node in found.items() if node not in wide}


def _rectified(name: str, module: Module, found: Mapping[str, _Fit]) -> bool:
    """Whether an activation from 0 up is all that reads a value, behind gains that calibration puts there."""
    while len(readers := module.readers[name]) == 1 and isinstance(gain := readers[0].op, Scaling):
        if (gain.factor.values <= 0).any():
            return False
        name = readers[0].result
    return len(readers) == 1 and (fit := found.get(readers[0].result)) is not None and not fit.given.signed


def _lopsided(op: Clip) -> bool:
    """Whether a range neither starts at 0 nor is symmetric."""
    lo, hi = np.broadcast_arrays(op.lo.values, op.hi.values)
    return bool((hi <= 0).any() or not (not lo.any() or (lo == -hi).all()))


@attrs.define(eq=False)
class _Fit:
    """One activation while it is calibrated: psi ``[C]``, phi ``[C]`` or ``[1]``."""

    node: Node
    given: Qcfs
    """What the node does, with the levels that it gets."""
    psi: Reals
    phi: Reals
    spikes: Reals | None = None
    """How much each channel spikes, as far as it was seen."""

    @classmethod
    def of(cls, node: Node, module: Module, levels: int) -> _Fit:
        """With the shifts that the activation has, or none."""
        op, channels = node.op, node.type.shape[0]
        assert isinstance(op, (Clip, Qcfs))  # the caller asked
        if isinstance(op, Qcfs):
            given = attrs.evolve(op, levels=levels)
        else:
            given = Qcfs(levels, op.hi, signed=bool((op.lo.values < 0).any()))
        known = [a.values for a in (given.threshold, given.phi) if a is not None]
        apart = channels if keeps_channels(node.result, module) else max(map(len, known))
        psi, phi = (np.zeros(1) if a is None else a.values for a in (given.psi, given.phi))
        return cls(node, given, np.broadcast_to(psi, (channels,)).copy(), np.broadcast_to(phi, (apart,)).copy())

    @property
    def qcfs(self) -> Qcfs:
        """The activation as it stands."""
        phi = Array.of(self.phi) if self.phi.any() else None
        psi = Array.of(self.psi) if self.psi.any() else None
        return attrs.evolve(self.given, psi=psi, phi=phi)

    @property
    def _aim(self) -> Op:
        """What the node did before its range was calibrated."""
        op = self.node.op
        return attrs.evolve(op, hi=op.reach) if isinstance(op, Clip) and op.reach is not None else op

    @property
    def silent(self) -> str:
        """The channels without a spike."""
        if self.spikes is None or self.given.signed:
            return ""
        found = np.flatnonzero(self.spikes == 0)
        shown = ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        every = "its channels" if len(self.spikes) == 1 else f"channels {shown}"
        return every if found.size else ""

    def visit(self, parts: list[Reals], update: str, *, settle: bool) -> None:
        """What both networks make of ``[2 n, *shape]`` values; ``settle`` on all of them, else one step of momentum."""
        error_in = _mean((part[0::2] - part[1::2] for part in parts), len(self.psi))
        if self.given.psi is not None:
            error_in = error_in + self.given.psi.values
        self.psi = error_in if settle else MOMENTUM * self.psi + (1 - MOMENTUM) * error_in
        types, aim = (self.node.type,), self._aim
        for part in parts:
            part[0::2] = aim.reference(types, part[0::2])
        if not self.given.signed:
            bare = attrs.evolve(self.qcfs, phi=None)
            height = _mean((bare.reference(types, part[1::2]) for part in parts), len(self.phi))
            self.spikes = height if settle or self.spikes is None else self.spikes + height
            target = _mean((part[0::2] for part in parts), len(self.phi))
            self.phi = self._phi(target, height, update, settle=settle)
        made = self.qcfs
        for part in parts:
            part[1::2] = made.reference(types, part[1::2])

    def _phi(self, target: Reals, height: Reals, update: str, *, settle: bool) -> Reals:
        """The phi that makes ``height (1 + phi / theta)`` the target on average; one spike is never more than theta."""
        theta, levels = self.given.threshold.values, self.given.levels
        share = height / theta
        if settle:
            under = share if update == "integrating" else 1 + share
            phi = np.divide(target - height, under, out=np.zeros_like(height), where=height > 0)
        else:
            missed = target - height - self.phi * share
            kept = 1.0 if update == "integrating" else MOMENTUM
            assert self.spikes is not None  # the caller counts first
            phi = np.where(self.spikes > 0, kept * self.phi + (1 - MOMENTUM) * missed, 0.0)
        return np.asarray(np.clip(phi, -theta, (levels - 1) * theta))


def _mean(parts: Iterable[Stored], groups: int) -> Reals:
    """The mean of each channel ``[C]``, or of all ``[1]``, over parts ``[n, *shape]``: sums and counts add up."""
    total, count = np.zeros(1), 0
    for part in parts:
        total = total + part.sum(axis=tuple(axis for axis in range(part.ndim) if axis != 1))
        count += part.size // part.shape[1]
    mean = np.asarray(total / count)
    return mean if groups > 1 else mean.mean(keepdims=True)
