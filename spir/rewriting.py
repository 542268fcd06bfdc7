"""Pass and Rewriter: a pass is options and a rewrite; the rewriter emits, infers, names and remembers origins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.contracts import Contract
from spir.errors import error, located
from spir.ir import Module, Node, Op, Origin, infer, kept
from spir.options import option
from spir.types import Reals, Stored, Tensor


class Context(Protocol):
    """What the driver lends to passes."""

    @property
    def data(self) -> NDArray[Any] | None:
        """Calibration inputs ``[N, *shape]``, or None."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The class ``[N]`` of each calibration input, where the data came with them."""

    @property
    def seed(self) -> int:
        """The seed of everything random."""

    @property
    def notes(self) -> Sequence[str]:
        """What `note` was told, in order."""

    def note(self, text: str) -> None:
        """Says what a pass cost or found, such as ``%pool1: 6 neurons an output``; the journal keeps it."""

    @property
    def progress(self) -> Callable[[str], None]:
        """Says how far a pass has come, such as ``sparsify: 20 of 95 settings``; shown while it runs."""

    def evaluate(
        self, module: Module, x: NDArray[Any], keep: str = "*", *, batch: int | None = None
    ) -> Iterator[Mapping[str, Reals]]:
        """Runs a module fast and yields decoded values of the names that match ``keep``, batch by batch.

        ``batch`` samples at a time, else as many as memory takes.
        """

    def stored(self, module: Module, x: NDArray[Any], keep: str = "*") -> Iterator[Mapping[str, Stored]]:
        """As `evaluate`, but what is stored: the frames of trains ``[T, n, *shape]``."""

    def steer(
        self,
        module: Module,
        x: NDArray[Any],
        stops: str,
        visit: Callable[[str, list[Reals]], None],
        *,
        batch: int | None = None,
    ) -> None:
        """Runs a module of reals, and at every value that matches ``stops`` goes on with what ``visit`` makes of it.

        ``visit(name, parts)`` changes the values ``[n, *shape]`` of all samples in place, in parts of an even number.
        All samples wait for each other; with ``batch`` only those of a batch do.
        """


@attrs.frozen
class Pass:
    """Options and one rewrite; a subclass is one file of ``passes/``, named as in the pipeline text.

    A subclass gives ``contract`` and either ``rewrite``, one node at a time, or ``run``.
    """

    name: ClassVar[str]
    layers: str = option("*", "which layers: a pattern of module paths or value names, several separated by |")

    def contract(self) -> Contract:
        """What the pass promises about every value that keeps its name."""
        raise NotImplementedError(f"{type(self).__name__}.contract")  # abstract: each pass defines it

    def run(self, module: Module, context: Context) -> Module:
        """The rewritten module: by default `rewrite` for every selected node, in order."""
        return self.walk(Rewriter(module, self.name), self.rewrite)

    def walk(self, rewriter: Rewriter, rewrite: Callable[[Node, Rewriter], str | None]) -> Module:
        """The rewriter's module with every selected node rewritten, in order, and the others kept."""
        for node in rewriter.module.nodes:
            if self.selects(node) and (value := rewrite(node, rewriter)) is not None:
                rewriter.replace(node.result, value)
            else:
                rewriter.keep(node)
        return rewriter.finish()

    def settled(self, before: Module, after: Module) -> tuple[Pass, ...]:
        """Passes that make ``after`` of ``before`` without searching: this one, unless it searched."""
        return (self,)

    def rewrite(self, node: Node, rewriter: Rewriter) -> str | None:
        """The value that takes the node's place, or None to keep the node."""
        raise NotImplementedError(f"{type(self).__name__}.rewrite")  # abstract: a pass defines it or `run`

    def selects(self, node: Node) -> bool:
        """Whether the ``layers`` option covers a node; ``%name`` is a value alone, and no module path."""
        return any(kept(name, self.layers) for name in (node.origin.path, node.result, f"%{node.result}"))


class Rewriter:
    """Builds the module that comes out of a pass, node by node, in order of definition."""

    def __init__(self, module: Module, step: str) -> None:
        self.module = module
        self.step = step
        self._nodes: dict[str, Node] = {}
        self._types: dict[str, Tensor] = {module.input.name: module.input.type}
        self._renamed: dict[str, str] = {}

    def now(self, name: str) -> str:
        """The value that stands for an old module's value."""
        return self._renamed.get(name, name)

    def type(self, name: str) -> Tensor:
        """The type of a value of the new module."""
        return self._types[name]

    def definition(self, name: str) -> Node | None:
        """The node of a value of the new module; None for the input."""
        return self._nodes.get(name)

    @staticmethod
    def origin(origin: Origin | None, path: str) -> Origin:
        """An origin, or one that only says ``path`` where there is none."""
        return Origin(path) if origin is None else attrs.evolve(origin, path=path)

    def fresh(self, base: str) -> str:
        """A name that neither module uses: ``base``, else ``base`` with a number."""
        taken = self._types.keys() | self.module.types.keys()
        if base not in taken:
            return base
        return next(n for i in range(1, len(taken) + 2) if (n := f"{base}_{i}") not in taken)

    def emit(self, op: Op, *operands: str, name: str, origin: Origin) -> str:
        """Appends a node on values of the new module and returns its name; the type is inferred.

        Raises:
            SpirError: the op refuses the operands; the error names op and origin.
        """
        followed = origin.then(self.step)
        if name in self._types:
            twice = error("module", f"{self.step} defines %{name} twice")
            raise twice.note("op", _shown(name, op, operands)).note("from", str(followed))
        return self._add(name, op, operands, followed)

    def keep(self, node: Node) -> str:
        """The same op on whatever its operands have become; its type is inferred again."""
        operands = tuple(self.now(o) for o in node.operands)
        if operands == node.operands and all(self._types[o] == self.module.types[o] for o in operands):
            self._nodes[node.result] = node
            self._types[node.result] = node.type
            return node.result
        return self._add(node.result, node.op, operands, node.origin)

    def _add(self, name: str, op: Op, operands: tuple[str, ...], origin: Origin) -> str:
        with located(op=_shown(name, op, operands), from_=str(origin)):
            inferred = infer(op, tuple(self._types[o] for o in operands))
        self._nodes[name] = Node(name, op, operands, inferred, origin)
        self._types[name] = inferred
        return name

    def replace(self, old: str, new: str) -> None:
        """Readers of the old module's ``old`` read ``new`` from here on."""
        if old != new:
            self._renamed[old] = new

    def finish(self) -> Module:
        """The new module without the nodes that nobody reads."""
        output = self.now(self.module.output)
        needed = {output}
        live: list[Node] = []
        for node in reversed(self._nodes.values()):
            if node.result in needed:
                needed.update(node.operands)
                live.append(node)
        return Module(self.module.input, tuple(reversed(live)), output)


def _shown(name: str, op: Op, operands: tuple[str, ...]) -> str:
    return f"%{name} = {op.name} {', '.join(f'%{o}' for o in operands)}"
