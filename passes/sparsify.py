"""sparsify: bit-coded trains to trains of fewer spikes, by settings that are given or searched for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import attrs

from spir.contracts import Bounded, Calibrated, Contract
from spir.errors import Diagnostic, SpirError, error, raise_all
from spir.ir import Module, Node, Op
from spir.ops._linear import LinearMap
from spir.ops._thinning import READINGS, Thinning, check_thinning
from spir.ops._threshold import Triple, divisors
from spir.ops.encode import Encode
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.options import option, spelled
from spir.passes._thrift import Measured, Search
from spir.rewriting import Context, Pass, Rewriter
from spir.types import Spikes


@attrs.frozen
class Sparsify(Pass):
    """encode, neuron_stem -> encode{rot, drlo}, neuron_stem{rot, drlo}: fewer spikes, of other codes.

    RoT (``rot``) rounds codes to multiples of 2^k: of a code nothing changes by more than 2^(k-1), or, where it
    saturates, 2^k - 1. DRLO (``drlo``) drops low spikes, in the reading ``mode``; with both, RoT comes first. It takes
    the trains that activations emit: not the input's (``input = on`` takes that, too), nor those of lowered max-pools.
    A second sparsify on the same train replaces the first.

    With ``max_drop`` settings are searched, train by train, for the fewest synaptic operations that cost no more than
    so many points of top-1 accuracy on the calibration data, or, where these have no labels, of top-1 agreement with
    the network before. What was found is noted as pipeline text, and stands in the pipeline of the result in place of
    the search. Trains that are thin already keep their settings.

    Source: SDANN eq 22 (RoT); DRLO is a reconstruction. The search is ours.
    """

    name: ClassVar[str] = "sparsify"
    rot: int = option(0, "k of RoT: codes become multiples of 2^k; 0 is off", ge=0, le=62)
    drlo: int = option(0, "k of DRLO: so many spikes, or bits, stay; 0 is off", ge=0, le=62)
    mode: str = option("count", "the reading of DRLO: k spikes, k bits from the leading one, bit k up", one_of=READINGS)
    input: bool = option(False, "thin what enters the network, too")
    max_drop: float | None = option(None, "search, and lose at most so many points of top-1", ge=0, le=100)
    images: int | None = option(None, "calibration samples that the search looks at, else all", ge=1)

    def contract(self) -> Contract:
        """Other values, measured; a search answers to the calibration data."""
        return Bounded() if self.max_drop is None else Calibrated()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses options without effect, a network without such trains and settings beyond their bits."""
        self._check()
        trains = self._trains(module)
        if self.max_drop is not None:
            return self._searched(module, trains, self.max_drop, context)
        raise_all(refusal for node in trains if (refusal := self._refusal(node)) is not None)
        if self.drlo:
            _reconstruction(self.mode, context)
        thinning = Thinning(self.rot, self.drlo, self.mode)
        return self._thinned(module, dict.fromkeys((node.result for node in trains), thinning))

    def settled(self, before: Module, after: Module) -> tuple[Pass, ...]:
        """What a search found, one clause a setting."""
        if self.max_drop is None:
            return (self,)
        names: dict[Thinning, list[str]] = {}
        for name, node in after.definitions.items():
            found, was = _thinning(node.op), _thinning(before.definitions[name].op)
            if found is not None and found != was:
                names.setdefault(found, []).append(f"%{name}")
        return tuple(
            Sparsify(rot=t.rot, drlo=t.drlo, mode=t.mode, input=self.input, layers="|".join(layers))
            for t, layers in sorted(names.items(), key=lambda item: (item[0].rot, item[0].drlo))
        )

    def _check(self) -> None:
        searching = self.max_drop is not None
        if searching and (self.rot or self.drlo):
            raise error("option", f"{self.name}: max_drop searches for rot and drlo", fix="give one or the other")
        if not searching and not (self.rot or self.drlo):
            raise error("option", f"{self.name} is told neither rot nor drlo", fix="rot=1, drlo=4, or max_drop=0.3")
        if not searching and self.images is not None:
            raise error("option", f"{self.name}: images is for max_drop", fix="leave images out")
        if not searching and not self.drlo and self.mode != READINGS[0]:
            raise error("option", f"{self.name}: mode={self.mode} is a reading of drlo", fix="drlo=4, or no mode")

    def _trains(self, module: Module) -> tuple[Node, ...]:
        """The selected trains.

        Raises:
            SpirError[type]: there are none.
        """
        coded = [node for node in module.nodes if _is_coded(node)]
        if not coded:
            what = f"{self.name} finds no bit-coded trains"
            raise error("type", what, fix="neurons of neuron=stem emit them: run it behind derive-thresholds, as @stem")
        found = [node for node in coded if self.selects(node) and (self.input or not _enters(node, module))]
        found = [node for node in found if not _passes_on(node, module)]
        if not found:
            names = ", ".join(node.result for node in coded if not _enters(node, module))
            raise error(
                "type",
                f"{self.name} selects no train that an activation emits",
                fix=f"layers: {names}" if names and self.layers != "*" else "input=on takes the input's train",
            )
        return tuple(found)

    def _refusal(self, node: Node) -> SpirError | None:
        try:
            check_thinning(node.type.steps, self.rot, self.drlo, self.mode)
        except SpirError as refusal:
            shown = f"%{node.result} = {node.op.name} : {node.type}"
            return refusal.note("op", shown).note("from", str(node.origin))
        return None

    def _thinned(self, module: Module, settings: Mapping[str, Thinning]) -> Module:
        """The module with these settings; other trains keep theirs."""
        rewriter = Rewriter(module, self.name)
        for node in module.nodes:
            thinning = settings.get(node.result)
            if thinning is None or not isinstance(node.op, (Encode, NeuronStem)):
                rewriter.keep(node)
                continue
            mode = thinning.mode if thinning.drlo else READINGS[0]
            op = attrs.evolve(node.op, rot=thinning.rot, drlo=thinning.drlo, drlo_mode=mode)
            rewriter.emit(op, *(rewriter.now(o) for o in node.operands), name=node.result, origin=node.origin)
        return rewriter.finish()

    def _searched(self, module: Module, trains: tuple[Node, ...], budget: float, context: Context) -> Module:
        """With the settings that a search finds."""
        free = tuple(node for node in trains if _thinning(node.op) is None)
        if not free:
            raise error("type", f"{self.name}: every selected train is thin already", fix="leave the other clause out")
        if context.data is None:
            raise error("data", f"{self.name} needs calibration data", fix="give data=images, or --data in a shell")
        out = module.types[module.output].shape
        if out[0] < 2:
            raise error("type", f"{self.name}: an output of shape {list(out)} has no top-1", fix="rot=, drlo=")
        some = slice(self.images)
        labels = None if context.labels is None else context.labels[some]
        if labels is not None and not 0 <= labels.min() <= labels.max() < out[0]:
            raise error(
                "data",
                f"{self.name}: labels are {labels.min()}..{labels.max()}, and the network tells {out[0]} classes apart",
                fix="give classes from 0 on, or data without labels",
            )
        search = Search(
            *(module, free, self.mode, context.data[some], labels, context),
            made=lambda settings: self._thinned(module, settings),
            title=self.name,
        )
        found = search.run(budget)
        made = self._thinned(module, found.settings)
        self._note(search, found, made, context)
        return made

    def _note(self, search: Search, found: Measured, made: Module, context: Context) -> None:
        whole = search.whole.operations
        saved = 100 * (1 - found.operations / whole) if whole else 0.0
        context.note(
            f"{len(found.settings)} of {len(search.trains)} trains thinned: {saved:.1f} % fewer synaptic operations "
            f"there, {found.drop:.2f} points of {search.measure} lost on {len(search.x)} samples"
        )
        if search.agreed is not None:
            chance = 1 / made.types[made.output].shape[0]
            wrong = "; no better than chance, so that the budget holds nothing: are the labels right?"
            context.note(f"{100 * search.agreed:.2f} % of the labels before{wrong * (search.agreed <= chance)}")
        single = 100 / len(search.x)
        if self.max_drop is not None and single > self.max_drop:
            context.note(f"one sample is {single:.3g} points, more than the budget: other samples may lose far more")
        if not found.settings:
            context.note(f"nothing was found within {self.max_drop} points: the network stays as it is")
        clauses = self.settled(search.module, made)
        if clauses:
            context.note("without searching: " + ", ".join(f"{p.name}{spelled(p)}" for p in clauses))
        for mode in sorted({t.mode for t in found.settings.values() if t.drlo}):
            _reconstruction(mode, context)


def _reconstruction(mode: str, context: Context) -> None:
    context.note(Diagnostic("W-RECON", f"DRLO, reading {mode}, is a reconstruction").render("note"))


def _thinning(op: Op) -> Thinning | None:
    return op.thinning if isinstance(op, (Encode, NeuronStem)) else None


def _is_coded(node: Node) -> bool:
    """Whether a node makes a bit-coded train of its own."""
    train = node.type.encoding
    return isinstance(node.op, (Encode, NeuronStem)) and isinstance(train, Spikes) and train.code == "bits"


def _source(node: Node, module: Module) -> Node | None:
    """What made the integers that an encoder reads, before pools and moves of elements; None for the input."""
    source = module.definitions.get(node.operands[0])
    while source is not None and (isinstance(source.op, MaxPool) or _moves(source.op)):
        source = module.definitions.get(source.operands[0])
    return source


def _moves(op: Op) -> bool:
    return isinstance(op, LinearMap) and op.relabels


def _enters(node: Node, module: Module) -> bool:
    """Whether a train carries the network's input."""
    if not isinstance(node.op, Encode):
        return False
    source = _source(node, module)
    return source is None or (isinstance(source.op, Quantize) and module.enters(source))


def _passes_on(node: Node, module: Module) -> bool:
    """Whether a neuron clips what it reads and does nothing else, as those of lowered max-pools do."""
    if isinstance(node.op, NeuronStem):
        return _identity(node.op.law)
    source = _source(node, module)
    return source is not None and isinstance(source.op, Requant) and _identity(source.op.triple)


def _identity(law: Triple) -> bool:
    mul, add, div, *_ = law
    return bool((mul.values == 1).all() and not add.values.any() and (divisors(div) == 1).all())
