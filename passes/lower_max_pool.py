"""lower-max-pool: the maximum of integers by additions and neurons."""

from __future__ import annotations

from typing import ClassVar

import attrs

from spir.contracts import Contract, Exact
from spir.errors import SpirError, error, raise_all
from spir.ir import Array, Module, Node, Op, Origin
from spir.ops._linear import Relabelling
from spir.ops._neuron import Neuron
from spir.ops.add import Add
from spir.ops.concat import Concat
from spir.ops.encode import Encode
from spir.ops.max_pool import MaxPool
from spir.ops.pad import Pad
from spir.ops.requant import Requant
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.options import option
from spir.passes._codes import is_code
from spir.rewriting import Context, Pass, Rewriter
from spir.types import Int, Real, Shape, Spikes, scale_of


@attrs.frozen
class LowerMaxPool(Pass):
    """max_pool(x) -> a tournament of max(a, b) = b + relu(a - b), first along rows, then along columns.

    It works on the codes of activations, before derive-thresholds: relu is a requant of multiplier 1, which becomes a
    neuron of as many bits as the codes have, and which never saturates. requant(max_pool(x)) becomes
    max_pool(requant(x)) first, because the law is monotone. What a maximum leaves is a sum of trains; with
    ``materialise`` one more neuron, of multiplier 1, makes one train of it.

    Source: exact on integers, a tournament with threshold 1 (math of Ca-LIF, 1.8), and for STEM because b + relu(a - b)
    lies between a and b.
    """

    name: ClassVar[str] = "lower-max-pool"
    materialise: bool = option(True, "end in one train, by an identity neuron, instead of in a sum of trains")

    def contract(self) -> Contract:
        """A maximum is a maximum."""
        return Exact()

    def run(self, module: Module, context: Context) -> Module:
        """Lowers every selected pool of integers, and refuses those it cannot.

        Raises:
            SpirError[E-MAXPOOL]: every pool that is left, with the reason.
        """
        pools = [n for n in module.nodes if isinstance(n.op, MaxPool) and self.selects(n)]
        raise_all(_misplaced(n) for n in pools if not _is_integer_network(n, module))
        if not pools:
            return module
        rewriter = _Tournament(module, self.name, materialise=self.materialise)
        lowered = self.walk(rewriter, self.rewrite)
        raise_all(_left(n, lowered) for n in lowered.nodes if isinstance(n.op, MaxPool) and self.selects(n))
        for text in rewriter.notes:
            context.note(text)
        return lowered

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """A tournament for a pool of codes, and for the requant of a pool of sums."""
        assert isinstance(rewriter, _Tournament)  # run made it
        operand = rewriter.now(node.operands[0])
        match node.op:
            case MaxPool() if _is_one_code(operand, rewriter) and not _apart(node.op, operand, rewriter):
                return rewriter.lowered(node, node.op, operand)
            case Requant() if _monotone(node.op):
                return self._hoisted(node, node.op, operand, rewriter)
        return None

    @staticmethod
    def _hoisted(node: Node, op: Requant, operand: str, rewriter: _Tournament) -> str | None:
        """The requant of every value in front of the pool of all; constants in between go along."""
        between: list[Scaling] = []
        source = rewriter.definition(operand)
        while source is not None and isinstance(source.op, Scaling) and _rises(source.op):
            between.insert(0, source.op)
            source = rewriter.definition(source.operands[0])
        if source is None or not isinstance(source.op, MaxPool):
            return None
        (value,) = source.operands
        if _apart(source.op, value, rewriter, lo=op.lo):
            return None
        for scaling in between:
            value = rewriter.emit(scaling, value, name=rewriter.fresh(f"{node.result}.scaled"), origin=node.origin)
        each = rewriter.emit(op, value, name=rewriter.fresh(f"{node.result}.each"), origin=node.origin)
        return rewriter.lowered(node, source.op, each)


def _rises(op: Scaling) -> bool:
    """Whether larger values stay larger, in the whole of each channel."""
    return op.multiplier.ndim == 1 and bool((op.multiplier >= 0).all())


def _is_integer_network(pool: Node, module: Module) -> bool:
    """Whether a pool works on integers, in a module that holds no spikes yet."""
    return isinstance(pool.type.encoding, Int) and not any(isinstance(n.op, (Encode, Neuron)) for n in module.nodes)


def _misplaced(node: Node) -> SpirError:
    """Why a pool cannot be lowered at this stage."""
    real = isinstance(node.type.encoding, Real)
    what = "works on reals" if real else "stands in a network that holds spikes already"
    return error(
        "E-MAXPOOL",
        f"%{node.result} {what}",
        from_=str(node.origin),
        fix="run lower-max-pool between propagate-scales and derive-thresholds",
    )


def _monotone(op: Requant) -> bool:
    """Whether a larger sum gives no smaller code, by one law in the whole of each channel."""
    return bool((op.mul.values >= 0).all()) and op.mul.values.ndim == 1 and op.add.values.ndim == 1


def _is_one_code(value: str, rewriter: Rewriter) -> bool:
    """Whether a value is a code of one scale, or a concatenation of such."""
    found, last = rewriter.type(value).encoding, rewriter.definition(value)
    even = isinstance(found, Int) and (found.scale.size == 1 or (last is not None and isinstance(last.op, Concat)))
    return even and is_code(value, rewriter, pools=False)


def _apart(op: MaxPool, operand: str, rewriter: Rewriter, lo: int | None = None) -> bool:
    """Whether padding between taps that lie apart would have to be the lowest code, and that is not 0."""
    found = rewriter.type(operand).encoding
    lowest = found.lo if lo is None and isinstance(found, Int) else lo
    return any(op.padding) and op.dilation != (1, 1) and lowest != 0


def _left(node: Node, module: Module) -> SpirError:
    """Why a pool could not be lowered."""
    assert isinstance(node.op, MaxPool)  # the caller asked
    if any(node.op.padding) and node.op.dilation != (1, 1):
        what = f"%{node.result} pads signed codes between dilated taps, and 0 is not the lowest code"
        return error("E-MAXPOOL", what, from_=str(node.origin), fix="pad nothing, or pool after a relu")
    source = module.definitions.get(node.operands[0])
    if source is not None and isinstance(source.op, Relabelling) and scale_of(source.type).size > 1:
        what = f"%{node.result} takes the maximum of channels of unequal scales that were moved after they met"
        return error("E-MAXPOOL", what, from_=str(node.origin), fix="pool before elements move, or one range a tensor")
    readers = ", ".join(sorted({str(n.op.name) for n in module.readers[node.result]})) or "nothing"
    return error(
        "E-MAXPOOL",
        f"%{node.result} takes the maximum of sums, and {readers} reads it",
        from_=str(node.origin),
        fix="put a relu right before the pool, or behind it with no negative factor in between; or leave "
        "lower-max-pool out (@stem{max_pool=keep}), and the pool stays on integrated values",
    )


class _Tournament(Rewriter):
    """A rewriter that knows how to play maxima, and counts what they cost."""

    def __init__(self, module: Module, step: str, *, materialise: bool) -> None:
        super().__init__(module, step)
        self.materialise = materialise
        self.notes: list[str] = []
        self._base = ""
        self._origin = Origin()
        self._ops = self._neurons = 0
        self._pooled_again = False

    def lowered(self, node: Node, op: MaxPool, operand: str) -> str:
        """The pool of a value, named as the node."""
        self._base, self._origin, self._ops, self._neurons = node.result, node.origin, 0, 0
        self._pooled_again = any(isinstance(n.op, MaxPool) for n in self.module.readers[node.result])
        value, levels = self.pool(op, operand)
        final = self._nodes.pop(value)
        self._types.pop(value)
        name = self.emit(final.op, *final.operands, name=node.result, origin=node.origin)
        outputs = node.type.size
        self.notes.append(
            f"%{node.result}: {self._neurons} neurons ({self._neurons / outputs:.3g} an output), "
            f"{self._ops} operations and {levels} windows instead of one max_pool of {op.kernel[0]}x{op.kernel[1]}"
        )
        return name

    def pool(self, op: MaxPool, operand: str) -> tuple[str, int]:
        """Value and levels of neurons; branches of unequal scale are pooled before they meet."""
        source, type_ = self.definition(operand), self.type(operand)
        if source is not None and isinstance(source.op, Concat) and self._unlike(source):
            each = [self.pool(op, o) for o in source.operands]
            return self.auxiliary(source.op, *(value for value, _ in each)), max(levels for _, levels in each)
        code = type_.encoding
        assert isinstance(code, Int)  # rewrite asked
        _, height, width = op.shape(type_.shape)
        x = operand if not any(op.padding) else self.padded(op, operand, code.lo)
        shape = self.type(x).shape
        rows = (height - 1) * op.stride[0] + (op.kernel[0] - 1) * op.dilation[0] + 1
        taps = [self.taps(x, 2, v * op.dilation[1], op.stride[1], width, rows, shape) for v in range(op.kernel[1])]
        x, across = self.best(taps, code)
        shape = self.type(x).shape
        taps = [self.taps(x, 1, u * op.dilation[0], op.stride[0], height, width, shape) for u in range(op.kernel[0])]
        x, down = self.best(taps, code)
        if not self.materialise and x != operand and not self._pooled_again:
            return x, across + down
        return self.neuron(x, code.lo, code.hi, code), across + down + 1

    def _unlike(self, concat: Node) -> bool:
        """Whether branches of channels differ in scale or range, so that no one code holds them."""
        kinds = {(e.lo, e.hi, str(e.scale)) for o in concat.operands if isinstance(e := self.type(o).encoding, Int)}
        return isinstance(concat.op, Concat) and concat.op.axis == 0 and len(kinds) > 1

    def padded(self, op: MaxPool, operand: str, lo: int) -> str:
        """Padding that never wins: the lowest code where that is 0, else the nearest value, which the window has."""
        top, bottom, left, right = op.padding
        return self.auxiliary(Pad((0, 0, top, bottom, left, right), edge=lo != 0), operand)

    def taps(self, x: str, axis: int, first: int, stride: int, count: int, other: int, shape: Shape) -> str:
        """One tap of every window along an axis, and of the other axis what is needed."""
        stop = [shape[0], other, other]
        start, step = [0, 0, 0], [1, 1, 1]
        start[axis], step[axis], stop[axis] = first, stride, first + (count - 1) * stride + 1
        if (start, stop, step) == ([0, 0, 0], list(shape), [1, 1, 1]):
            return x
        return self.auxiliary(Slice(tuple(start), tuple(stop), tuple(step)), x)

    def best(self, players: list[str], code: Int) -> tuple[str, int]:
        """The largest of several values, by rounds of pairs, and how many rounds it took."""
        rounds = 0
        while len(players) > 1:
            pairs = list(zip(players[::2], players[1::2], strict=False))
            players = [self.maximum(a, b, code) for a, b in pairs] + players[len(pairs) * 2 :]
            rounds += 1
        return players[0], rounds

    def maximum(self, a: str, b: str, code: Int) -> str:
        """The larger of two: b + relu(a - b)."""
        minus = self.auxiliary(Scaling(Array.of([-1])), b)
        span = Spikes.limits((code.hi - code.lo).bit_length(), "bits", signed=False)
        over = self.neuron(self.auxiliary(Add(), a, minus), *span, code)
        return self.auxiliary(Add(), b, over)

    def neuron(self, x: str, lo: int, hi: int, code: Int) -> str:
        """The identity on ``lo..hi``, as a requant."""
        self._neurons += self.type(x).size
        return self.auxiliary(Requant(Array.of([1]), Array.of([0]), 1, lo, hi, float(code.scale.floats()[0])), x)

    def auxiliary(self, op: Op, *operands: str) -> str:
        """A value of the tournament."""
        self._ops += 1
        return self.emit(op, *operands, name=self.fresh(f"{self._base}.max"), origin=self._origin)
