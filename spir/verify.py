"""The rules that every module obeys: names, order of definition, inferred types, weights."""

from __future__ import annotations

import re
from collections.abc import Iterator

from spir.errors import SpirError, error, raise_all
from spir.ir import Module, Node, infer
from spir.text import show_node
from spir.types import Real, Tensor

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")


def verify(module: Module) -> Module:
    """The module itself, when it is well formed; every recorded type is inferred again.

    Raises:
        SpirError: all violations at once, each with its op and origin.
    """
    refusals: list[SpirError] = []
    types: dict[str, Tensor] = {}
    if not NAME.match(module.input.name):
        refusals.append(error("module", f"%{module.input.name} is not a name"))
    types[module.input.name] = module.input.type
    for node in module.nodes:
        try:
            check(node, types)
        except SpirError as refusal:
            refusals.append(refusal.note("op", show_node(node)).note("from", str(node.origin)))
        types[node.result] = node.type
    refusals += _hosted(module)
    if module.output not in types:
        refusals.append(error("module", f"the output %{module.output} is not defined"))
    raise_all(refusals)
    return module


def _hosted(module: Module) -> Iterator[SpirError]:
    """Refuses ops of the host that stand between quantised values."""
    discrete: set[str] = set()
    behind: dict[str, Node] = {}
    if not isinstance(module.input.type.encoding, Real):
        discrete.add(module.input.name)
    for node in module.nodes:
        depends = not discrete.isdisjoint(node.operands)
        hosts = [behind[o] for o in node.operands if o in behind] or ([node] if node.op.host and depends else [])
        if depends or not isinstance(node.type.encoding, Real):
            discrete.add(node.result)
        if not hosts:
            continue
        if isinstance(node.type.encoding, Real):
            behind[node.result] = hosts[0]
        else:
            yield error(
                "module",
                f"%{hosts[0].result} = {hosts[0].op.name} is for the host, and %{node.result} makes integers of it",
                op=show_node(hosts[0]),
                from_=str(hosts[0].origin),
                fix="leave it before the first quantiser, or behind the readout",
            )


def check(node: Node, types: dict[str, Tensor]) -> None:
    """One node against the types defined before it."""
    if not NAME.match(node.result):
        raise error("module", f"%{node.result} is not a name")
    if node.result in types:
        raise error("module", f"%{node.result} is defined twice", fix="rename one of them")
    for name in node.operands:
        if name not in types:
            raise error("module", f"%{name} is used before its definition", fix="define it above, or fix the name")
    operands = tuple(types[name] for name in node.operands)
    if any(array.data is None for array in node.op.arrays().values()) or not all(t.known for t in operands):
        return
    found = infer(node.op, operands)
    if found != node.type:
        raise error("type", f"%{node.result} is {found}, and the module says {node.type}")
