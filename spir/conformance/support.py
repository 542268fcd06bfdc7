"""Which backend runs which op, as a table: found by asking and running, so that it cannot be out of date for long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from spir import driver
from spir.backend import Backend
from spir.conformance.examples import Example, corners, is_neuron, module_of, probing_input
from spir.conformance.properties import Refused, calls_of_reference, prepared
from spir.discovery import owners
from spir.errors import SpirError
from spir.ir import Module
from spir.types import Tensor

HEAD = """# What runs where

Every op and neuron on every backend, found by running the corners of each. This page is generated; to write it anew:

    UPDATE_GOLDEN=1 python -m pytest tests/conformance/test_support.py

| mark | meaning |
|---|---|
| yes | the backend runs it, and equals the interpreter |
| reference | the backend runs the op's own reference |
| refused | the backend refuses it before anything is built, with the reason |
"""


@attrs.frozen
class Case:
    """One corner on one backend: what the op acts on, and a mark with the reason of a refusal."""

    carrier: str
    mark: str
    why: str = ""


def shipped() -> list[str]:
    """The backends that are files of this project, not entry points."""
    return [name for name, owner in sorted(owners("backends").items()) if isinstance(owner, str)]


def table(backends: Sequence[str] | None = None) -> str:
    """The page ``docs/support.md``, for the shipped backends or for those named.

    Raises:
        SpirError[name]: no such backend.
    """
    runners = {text: driver.backend_of(text) for text in backends or shipped()}
    parts = [HEAD]
    known = [name for name, owner in sorted(owners("ops").items()) if isinstance(owner, str)]
    for title, neuron in (("Ops", False), ("Neurons", True)):
        rows = [(name, _examples(name)) for name in known if is_neuron(name) == neuron]
        parts.append(_section(title, rows, runners))
    return "\n".join(parts)


def _examples(name: str) -> list[Example]:
    found = enumerate(corners(name))
    return [Example(module, probing_input(module, index)) for index, module in found if module is not None]


def _section(title: str, rows: Sequence[tuple[str, list[Example]]], runners: Mapping[str, Backend]) -> str:
    head = [f"| {title[:-1].lower()} | {' | '.join(runners)} |", f"|{'---|' * (1 + len(runners))}"]
    lines = [
        f"| {name} | {' | '.join(cell([case(runner, one) for one in examples]) for runner in runners.values())} |"
        for name, examples in rows
    ]
    return "\n".join([f"## {title}\n", *head, *lines]) + "\n"


def case(backend: Backend, example: Example) -> Case:
    """What a backend does with one corner."""
    node = example.module.definitions[example.module.output]
    carrier = _carrier(example.module.types[node.operands[0]])
    with calls_of_reference(node.op) as calls:
        try:
            prepared(backend, example).run(example.x)
        except Refused as told:
            return _refused(backend, example.module, carrier, told.refusal)
    return Case(carrier, "reference" if calls else "yes")


def _refused(backend: Backend, module: Module, carrier: str, refusal: SpirError) -> Case:
    """With the reason for the op itself, where those that make its operands are refused, too."""
    node, types = module.nodes[-1], set(module.operand_types(module.nodes[-1]))
    told = list(refusal.diagnostics)
    if len(types) == 1 and len(module.nodes) > 1:
        bare = module_of(types.pop(), (node.result, node.op, " ".join("x" for _ in node.operands)))
        told = [diagnostic for one in backend.refusals(bare) for diagnostic in one.diagnostics]
    return Case(carrier, "refused", told[0].message) if told else Case(carrier, "yes")


def _carrier(type_: Tensor) -> str:
    if type_.train is not None:
        return type_.train.code
    return "integers" if str(type_.encoding).startswith("int") else "reals"


def cell(cases: Sequence[Case]) -> str:
    """All corners of an op on a backend in one cell: ``yes; refused on reals: why``."""
    marks = list(dict.fromkeys(one.mark for one in cases))
    parts = []
    for mark in sorted(marks, key=("yes", "reference", "refused").index):
        mine = [one for one in cases if one.mark == mark]
        on = "" if len(marks) == 1 or mark == "yes" else f" on {_shown(mine, cases)}"
        why = "; ".join(dict.fromkeys(one.why for one in mine if one.why))
        parts.append(f"{mark}{on}" + (f": {why}" if why else ""))
    return "; ".join(parts)


def _shown(mine: Sequence[Case], cases: Sequence[Case]) -> str:
    """The carriers of some cases; one that other cases have too is there in part."""
    other = {one.carrier for one in cases if one.mark != mine[0].mark}
    return " and ".join(f"some {c}" if c in other else c for c in dict.fromkeys(one.carrier for one in mine))
