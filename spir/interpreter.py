"""The one reference semantics: runs each op's reference in order, whole trains at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from spir.errors import located
from spir.ir import Module, kept
from spir.types import Reals, Stored


def run(module: Module, x: NDArray[Any], keep: str = "") -> dict[str, Stored]:
    """Stored values by name: those that match ``keep``, and the output.

    Args:
        module: any verified module with its weights.
        x: ``[N, *shape]``, the input as the model receives it.
        keep: pattern of names, see `spir.ir.kept`.

    Raises:
        SpirError[data], SpirError[weights]
    """
    return dict(walk(module, x, keep))


def walk(module: Module, x: NDArray[Any], keep: str = "*") -> Iterator[tuple[str, Stored]]:
    """Like `run`, value by value in order, each forgotten after its last reader."""
    last = {name: (nodes[-1].result if nodes else name) for name, nodes in module.readers.items()}
    values: dict[str, Stored] = {module.input.name: module.input.type.read(x)}
    if kept(module.input.name, keep) or module.input.name == module.output:
        yield module.input.name, values[module.input.name]
    for node in module.nodes:
        with located(op=str(node.op.name), from_=str(node.origin)):
            operands = (values[name] for name in node.operands)
            values[node.result] = node.op.reference(module.operand_types(node), *operands)
        if kept(node.result, keep) or node.result == module.output:
            yield node.result, values[node.result]
        for name in dict.fromkeys(node.operands):
            if last[name] == node.result:
                del values[name]


def decoded(module: Module, stored: Mapping[str, Stored]) -> dict[str, Reals]:
    """The real tensors that stored values stand for."""
    return {name: module.types[name].decode(values) for name, values in stored.items()}
