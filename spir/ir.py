"""Op, Node, Value, Module: flat, frozen, ordered; arrays are equal by content.

A module is one input, a list of nodes in order of definition and the name of its output. An `Op` holds attributes and
meaning, a `Node` applies it to named values and records type and origin. Origins never take part in equality.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar

import attrs
import numpy as np
from numpy.typing import ArrayLike, NDArray

from spir.errors import SpirError, error
from spir.types import Interval, Shape, Stored, Tensor


@attrs.frozen
class Array:
    """A constant: int64 or float64, read-only, equal by a digest of dtype, shape and content.

    ``data`` is None when the module was read from text without its weights: it compares and prints, but does not run.
    """

    digest: str
    data: NDArray[Any] | None = attrs.field(eq=False, repr=False, default=None)

    @classmethod
    def of(cls, values: ArrayLike) -> Array:
        """Copies values; integers become int64, all else float64.

        Raises:
            SpirError[weights]: NaN or infinite values.
        """
        given = np.asarray(values)
        integral = given.dtype.kind in "iub"
        data = np.array(given, dtype=np.int64 if integral else np.float64, order="C")
        if not integral and not np.isfinite(data).all():
            bad = int((~np.isfinite(data)).sum())
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(data))[0]) if data.ndim else ()
            raise error(
                "weights",
                f"{bad} of {data.size} values are NaN or infinite, the first at {list(first)}",
                fix="repair the checkpoint: a diverged training run leaves such values",
            )
        data.setflags(write=False)
        head = f"{data.dtype.name}{list(data.shape)}".encode()
        return cls(hashlib.blake2b(head + data.tobytes(), digest_size=8).hexdigest(), data)

    @property
    def values(self) -> NDArray[Any]:
        """The numbers.

        Raises:
            SpirError[weights]: the module was read without its weights.
        """
        if self.data is None:
            raise error("weights", f"the array #{self.digest} is not here", fix="read the module with weights=")
        return self.data

    @property
    def integral(self) -> bool:
        """Whether it holds integers."""
        return self.values.dtype.kind == "i"


@attrs.frozen
class Origin:
    """Where an op comes from: module path and place in the user's model, and the passes that touched it."""

    path: str = ""
    place: str = ""
    trail: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path} ({self.place})" if self.place else self.path

    def then(self, step: str) -> Origin:
        """The same origin after one more pass."""
        return self if step in self.trail else attrs.evolve(self, trail=(*self.trail, step))


@attrs.frozen
class Op:
    """Attributes and meaning of one operation; a subclass is one file of ``spir/ops``.

    A subclass gives ``infer`` (the type rule), ``bounds`` (the interval rule, for integer carriers), ``reference``
    (the meaning, in NumPy) and ``corners`` (cases that every backend is checked on).
    """

    name: ClassVar[str]
    operands: ClassVar[int | None] = 1
    """How many operands; None means two or more."""
    host: ClassVar[bool] = False
    """Whether the host computes it, on reals, before the first encoder or after a readout."""

    def infer(self, *types: Tensor) -> Tensor:
        """The result type.

        Raises:
            SpirError: operands that the op refuses.
        """
        raise NotImplementedError(f"{type(self).__name__}.infer")  # abstract: each op file defines it

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """Sound bounds of the decoded result integers from bounds of the operands of given shapes', per channel."""
        raise error("type", f"{self.name} has no interval rule: it works on real values")

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        """The meaning: stored operands of the given types to the stored result."""
        raise NotImplementedError(f"{type(self).__name__}.reference")  # abstract: each op file defines it

    @classmethod
    def corners(cls) -> Iterator[tuple[Op, tuple[Tensor, ...]]]:
        """Ops with operand types that sit on the edges of what the op allows."""
        yield from ()

    def arrays(self) -> dict[str, Array]:
        """The constants by field name."""
        return {a.name: v for a in attrs.fields(type(self)) if isinstance(v := getattr(self, a.name), Array)}


@attrs.frozen
class Value:
    """A name and a type."""

    name: str
    type: Tensor


@attrs.frozen
class Node:
    """One line of a module: ``%result = op %operands {attributes} : type  from "origin"``."""

    result: str
    op: Op
    operands: tuple[str, ...]
    type: Tensor
    origin: Origin = attrs.field(factory=Origin, eq=False)


@attrs.frozen(slots=False)
class Module:
    """One input, nodes in order, one output; every name is defined once, before its use."""

    input: Value
    nodes: tuple[Node, ...]
    output: str

    @cached_property
    def types(self) -> dict[str, Tensor]:
        """The type of every value, in order of definition."""
        return {self.input.name: self.input.type} | {n.result: n.type for n in self.nodes}

    @cached_property
    def definitions(self) -> dict[str, Node]:
        """The node of every value but the input."""
        return {n.result: n for n in self.nodes}

    @cached_property
    def readers(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read each value, in order, each once."""
        found: dict[str, list[Node]] = {name: [] for name in self.types}
        for node in self.nodes:
            for operand in dict.fromkeys(node.operands):
                found[operand].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def operand_types(self, node: Node) -> tuple[Tensor, ...]:
        """The types of a node's operands."""
        return tuple(self.types[name] for name in node.operands)

    def enters(self, node: Node) -> bool:
        """Whether a node reads the input, or what the host makes of it."""
        source = self.definitions.get(node.operands[0])
        return source is None or source.op.host

    def arrays(self) -> dict[str, Array]:
        """Every constant under its printed name, ``result.field``."""
        return {f"{n.result}.{field}": array for n in self.nodes for field, array in n.op.arrays().items()}

    def __str__(self) -> str:
        from spir.text import show  # the printer knows the IR, not the other way round

        return show(self)


def infer(op: Op, operands: tuple[Tensor, ...]) -> Tensor:
    """`Op.infer` behind the checks that all ops share.

    Raises:
        SpirError[type]: a wrong number of operands, or types that the op refuses.
    """
    wanted = op.operands
    if len(operands) != wanted if wanted is not None else len(operands) < 2:
        raise error("type", f"{op.name} takes {wanted or 'two or more'} operands, not {len(operands)}")
    try:
        return op.infer(*operands)
    except SpirError as refusal:
        prefixed = [attrs.evolve(d, message=f"{op.name}: {d.message}") for d in refusal.diagnostics]
        raise SpirError(*prefixed) from None


def kept(name: str, keep: str) -> bool:
    """Whether a value's name matches a pattern such as ``layer2.*``; several are separated by ``|``."""
    plain, patterns = _split(keep)
    return name in plain or any(fnmatchcase(name, pattern) for pattern in patterns)


@functools.lru_cache(maxsize=64)
def _split(keep: str) -> tuple[frozenset[str], tuple[str, ...]]:
    parts = keep.split("|")
    return frozenset(parts), tuple(p for p in parts if any(c in p for c in "*?["))
