"""derive-thresholds: the integer network to spiking neurons."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.contracts import Contract, Exact
from spir.errors import Diagnostic, SpirError, error, located, raise_all
from spir.ir import Module, Node
from spir.ops._linear import LinearMap
from spir.ops.concat import Concat
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.max_pool import MaxPool
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.options import option
from spir.passes._neurons import neuron_class
from spir.rewriting import Context, Pass, Rewriter
from spir.types import SORTED, Spikes

LONGEST = 65535
"""Steps of a window."""


@attrs.frozen
class DeriveThresholds(Pass):
    """requant -> integrate; requant; encode{code of the neuron}.  quantize -> quantize; encode.

    Copies integers; what is special to a neuron stands in the neuron's file. A max_pool stays on sorted trains, else on
    integers: behind the requant, in front of the encoder, or on integrated sums; what is added to such a sum is
    integrated too. Behind float weights quantize; dequantize -> quantize; encode; integrate; dequantize: thresholds are
    floats there. Where the neuron takes the charge of all steps at once (parallel), the input stays an integer: the
    first layer reads an analogue current.
    """

    name: ClassVar[str] = "derive-thresholds"
    neuron: str = option("stem", "the neuron model")
    steps: int | None = option(None, "T of neuron=ca-lif: as many as the largest code needs", ge=1, le=65535)
    order: str | None = option(None, "where sorted trains spike: suffix, the last steps, or prefix", one_of=SORTED)

    def contract(self) -> Contract:
        """Every train decodes to the integer it replaces (theorems STEM-1 to STEM-3; PC-1; CA)."""
        return Exact()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses a network without integers, and all clip ranges that the neuron does not realise; then rewrites."""
        neuron = neuron_class(self.neuron)
        refusals: list[SpirError] = []
        found = [
            (n, n.op)
            for n in module.nodes
            if isinstance(n.op, (Requant, Quantize)) and self.selects(n)
            if not (neuron.charged and module.enters(n))
        ]
        if not found:
            raise error(
                "type",
                f"{self.name} finds no integers to convert, and would leave the network without spikes",
                fix="run calibrate-range, quantize and propagate-scales before, over the same layers",
            )
        settled = self
        if neuron.windowed and self.steps is None:
            widest, op = max(found, key=lambda pair: max(pair[1].hi, -pair[1].lo))
            most = max(op.hi, -op.lo, 1)
            if most > LONGEST:
                raise error(
                    "E-CAP",
                    f"%{widest.result} has codes up to {most}, and windows have {LONGEST} steps at most",
                    from_=str(widest.origin),
                    fix="quantise it to fewer bits; in a toolkit, quantise what this layer reads: XNNPACKQuantizer "
                    "and FX do before means, X86InductorQuantizer only behind quantised layers such as max-pools",
                )
            settled = attrs.evolve(self, steps=most)
        for node, op in found:
            try:
                with located(op=f"%{node.result} = {op.name}", from_=str(node.origin)):
                    settled.encoder(op)
            except SpirError as refusal:
                refusals.append(refusal)
        raise_all(refusals)
        for node in module.nodes:
            if not isinstance(node.op, Quantize):
                continue
            if neuron.charged and module.enters(node):
                analogue = f"%{node.result} stays an integer, and layers that read it take an analogue current"
                context.note(Diagnostic("E-ANALOG-IN", analogue).render("note"))
            elif not module.enters(node):
                ties = f"%{node.result}: float sums meet float thresholds; ties may fall either way"
                context.note(Diagnostic("E-FP-TIE", ties).render("note"))
        return Pass.run(settled, module, context)

    def encoder(self, source: Requant | Quantize) -> Encode:
        """What follows an op in the unfused form of the neuron."""
        return neuron_class(self.neuron).derive(source, self.order, self.steps)

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """The unfused form of the neuron."""
        neuron = neuron_class(self.neuron)
        operands = [rewriter.now(o) for o in node.operands]
        trains = [rewriter.type(o).train for o in operands]
        match node.op:
            case Requant():
                return encoded(node, integrated(operands[0], rewriter, node), self.encoder(node.op), rewriter)
            case Quantize() if not rewriter.module.enters(node):
                code, name = rewriter.keep(node), rewriter.fresh(f"{node.result}.train")
                spikes = rewriter.emit(self.encoder(node.op), code, name=name, origin=node.origin)
                count = rewriter.fresh(f"{node.result}.count")
                return rewriter.emit(Integrate(), spikes, name=count, origin=node.origin)
            case Quantize() if not neuron.charged:
                code = rewriter.keep(node)
                name = rewriter.fresh(f"{node.result}.train")
                return rewriter.emit(self.encoder(node.op), code, name=name, origin=node.origin)
            case MaxPool() if trains[0] is None or trains[0].code not in SORTED:
                train = rewriter.type(operands[0]).encoding
                joined = rewriter.definition(operands[0])
                if joined is not None and not isinstance(train, Spikes) and _branches(joined, rewriter):
                    return pooled_apart(node, joined, rewriter)
                total = integral(operands[0], rewriter, node)
                if isinstance(train, Spikes):
                    return encoded(node, total, _as_long(train), rewriter)
                source = rewriter.definition(total)
                while source is not None and isinstance(source.op, MaxPool):
                    source = rewriter.definition(source.operands[0])
                if source is not None and isinstance(source.op, Requant if neuron.charged else (Requant, Quantize)):
                    return encoded(node, total, self.encoder(source.op), rewriter)
                return rewriter.emit(node.op, total, name=node.result, origin=node.origin)
            case LinearMap() if any(trains) and not all(trains):
                take = integrated if neuron.charged else integral
                whole = (take(o, rewriter, node) for o in operands)
                return rewriter.emit(node.op, *whole, name=node.result, origin=node.origin)
        return None


def encoded(node: Node, total: str, encode: Encode, rewriter: Rewriter) -> str:
    """The node on integers, then its train; integers that only pools read need none where these stay on integers."""
    readers = rewriter.module.readers[node.result]
    if encode.code not in SORTED and readers and all(isinstance(n.op, MaxPool) for n in readers):
        return rewriter.emit(node.op, total, name=node.result, origin=node.origin)
    code = rewriter.emit(node.op, total, name=rewriter.fresh(f"{node.result}.code"), origin=node.origin)
    return rewriter.emit(encode, code, name=node.result, origin=node.origin)


def _branches(joined: Node, rewriter: Rewriter) -> bool:
    """Whether a value is made of the channels of several trains of spikes."""
    spikes = (isinstance(rewriter.type(o).encoding, Spikes) for o in joined.operands)
    return isinstance(joined.op, Concat) and joined.op.axis == 0 and all(spikes)


def pooled_apart(node: Node, joined: Node, rewriter: Rewriter) -> str:
    """Branches of unlike codes pooled before they meet, because no one train holds both."""
    each = []
    for operand in joined.operands:
        train = rewriter.type(operand).encoding
        assert isinstance(train, Spikes)  # the caller asked
        code, branch = rewriter.fresh(f"{node.result}.code"), rewriter.fresh(f"{node.result}.branch")
        rewriter.emit(node.op, integral(operand, rewriter, node), name=code, origin=node.origin)
        each.append(rewriter.emit(_as_long(train), code, name=branch, origin=node.origin))
    return rewriter.emit(joined.op, *each, name=node.result, origin=node.origin)


def _as_long(train: Spikes) -> Encode:
    """The encoder of trains of the same length and code."""
    return Encode(train.steps, "isi" if train.code == "rate" else train.code)


def integral(value: str, rewriter: Rewriter, node: Node) -> str:
    """The integers of a value: what was encoded, else an integral."""
    source = rewriter.definition(value)
    if source is not None and isinstance(source.op, Encode) and source.op.lossless:
        return source.operands[0]
    return integrated(value, rewriter, node)


def integrated(value: str, rewriter: Rewriter, node: Node) -> str:
    """The integral of a train or current; integers as they are."""
    if rewriter.type(value).train is None:
        return value
    name = rewriter.fresh(f"{node.result}.integral")
    return rewriter.emit(Integrate(), value, name=name, origin=node.origin)
