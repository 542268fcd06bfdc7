"""Pipelines as text and in action: parse, run, verify, check contracts, keep a journal, leave a reproducer."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shlex
import tempfile
import time
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import attrs
import lark

from spir import interpreter, probes
from spir.contracts import Calibrated, Change, change, changes, check
from spir.discovery import find
from spir.errors import SpirError, error, located
from spir.ir import Module
from spir.options import Scalar, build, spelled
from spir.rewriting import Context, Pass
from spir.store import to_bytes, write_aside
from spir.text import caret, parse_with, show
from spir.types import Reals
from spir.verify import verify

_DIGITS = 100


T = TypeVar("T")


@attrs.frozen
class Recipe:
    """A named pipeline with typed options; a subclass is one file of ``spir/recipes``."""

    name: ClassVar[str]

    def pipeline(self) -> str:
        """The pipeline text; an option left out drops its clause."""
        raise NotImplementedError(f"{type(self).__name__}.pipeline")  # abstract: each recipe defines it


@functools.cache
def _grammar() -> lark.Lark:
    text = files("spir").joinpath("pipeline.lark").read_text(encoding="utf-8")
    return lark.Lark(text, parser="lalr", lexer="contextual", propagate_positions=True, maybe_placeholders=True)


def settings(text: str) -> list[tuple[str, dict[str, Scalar], str]]:
    """``name{option=value}, ...`` as (name, options, line with caret).

    Raises:
        SpirError[pipeline]: text that does not parse.
    """
    tree, lines = parse_with(_grammar(), text, "pipeline"), text.split("\n")
    found = []
    for step in tree.children:
        if step is None:
            continue
        head, *given = typing.cast("list[Any]", typing.cast("lark.Tree[lark.Token]", step).children)
        at = caret(lines, head.line, head.column)
        values: dict[str, Scalar] = {}
        for setting in given:
            if setting is None:
                continue
            label, value = setting.children
            if str(label) in values:
                raise error("option", f"{head} is given {label} twice", at=caret(lines, label.line, label.column))
            with located(at=caret(lines, value.line, value.column)):
                values[str(label)] = _value(value)
        found.append((str(head), values, at))
    return found


def _value(token: lark.Token) -> Any:
    if token.type == "STRING":
        try:
            return json.loads(token)
        except json.JSONDecodeError as refusal:
            raise error(
                "pipeline",
                f"a string that does not read: {refusal.msg.lower()}",
                fix="write strings as JSON does: \\\\ is a backslash",
            ) from None
    if token.type == "NUMBER":
        if len(token) > _DIGITS or not math.isfinite(float(token)):
            raise error("pipeline", "a number beyond all options", fix="a smaller number")
        return int(token) if token.lstrip("-").isdigit() else float(token)
    return {"on": True, "off": False, "true": True, "false": False, "none": None}.get(str(token), str(token))


def parse(text: str) -> tuple[Pass, ...]:
    """The passes that a text names; ``@name{...}`` is a recipe and expands to its own text.

    Raises:
        SpirError[pipeline], SpirError[name], SpirError[option]: each with its place and the nearest name.
    """
    found: list[Pass] = []
    for name, values, at in settings(text):
        with located(at=at):
            if name.startswith("@"):
                found += parse(build(_plugin("recipes", name[1:], Recipe), values).pipeline())
            else:
                found.append(build(_plugin("passes", name, Pass), values))
    return tuple(found)


def _plugin(kind: str, name: str, base: type[T]) -> type[T]:
    found = find(kind, name)
    if not issubclass(found, base):
        raise error(
            "name", f"{found.__module__}.{found.__name__} is no {base.__name__}", fix=f"subclass {base.__name__}"
        )
    return found


def resolve(passes: str | Iterable[str | Pass]) -> tuple[Pass, ...]:
    """Pipeline text, or a list of texts and passes, as passes.

    Raises:
        SpirError[usage]: something else.
    """
    if isinstance(passes, str):
        return parse(passes)
    if not isinstance(passes, Iterable):
        raise error("usage", f"a pipeline is text, or a list of texts and passes, not {type(passes).__name__}")
    found: list[Pass] = []
    for step in passes:
        if not isinstance(step, (str, Pass)):
            raise error("usage", f"a pipeline holds texts and passes, not {type(step).__name__}")
        found += parse(step) if isinstance(step, str) else [step]
    return tuple(found)


def spell(passes: Iterable[Pass], *, every: bool = False) -> str:
    """Pipeline text that parses to the same passes; with ``every``, options at their default too."""
    return ", ".join(f"{p.name}{spelled(p, every=every)}" for p in passes)


@attrs.frozen
class Entry:
    """One line of the journal: what ran, what it promised, what was measured, on what."""

    step: str
    contract: str
    checked: str
    largest: float | None
    relative: float | None
    value: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    seconds: float


@attrs.frozen
class Stage:
    """A pass and the module that came out of it."""

    name: str
    module: Module


@attrs.frozen
class Outcome:
    """The last module, the journal and every module on the way."""

    module: Module
    journal: tuple[Entry, ...]
    stages: tuple[Stage, ...]


def run(
    module: Module,
    passes: tuple[Pass, ...],
    context: Context,
    *,
    checked: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Runs passes in order; verifies after each, and checks its contract on probes.

    Raises:
        SpirError: a pass or its contract fails; the note ``reproducer`` names the files that show it again.
    """
    journal: list[Entry] = []
    stages: list[Stage] = []
    memory: dict[tuple[int, tuple[float, ...]], dict[str, Reals]] = {}
    for index, step in enumerate(passes):
        progress(step.name)
        _covers(step, module)
        start = time.perf_counter()
        try:
            after = verify(step.run(module, context))
            worst, label = _check(step, module, after, context, memory) if checked else (None, "not checked")
        except SpirError as refusal:
            path = _reproducer(module, passes[index:], context.seed)
            raise refusal.note("pass", spell([step])).note("reproducer", path) from refusal.__cause__
        seconds = time.perf_counter() - start
        journal.append(
            Entry(
                step=spell([step], every=True),
                contract=str(step.contract()),
                checked=label,
                largest=worst.largest if worst else None,
                relative=worst.relative if worst and math.isfinite(worst.relative) else None,
                value=worst.value if worst else "",
                before=_census(module),
                after=_census(after),
                seconds=seconds,
            )
        )
        stages.append(Stage(step.name, after))
        module = after
    return Outcome(module, tuple(journal), tuple(stages))


def _census(module: Module) -> dict[str, int]:
    return dict(sorted(Counter(str(node.op.name) for node in module.nodes).items()))


def _covers(step: Pass, module: Module) -> None:
    """Refuses a ``layers`` pattern that no layer matches: a typo would leave the network unconverted."""
    if step.layers != "*" and not any(step.selects(node) for node in module.nodes):
        paths = dict.fromkeys(node.origin.path or node.result for node in module.nodes)
        raise error(
            "option",
            f"{step.name}{{layers}}: no layer matches {step.layers!r}",
            fix=f"layers: {', '.join(list(paths)[:12])}",
        )


def _check(
    step: Pass,
    before: Module,
    after: Module,
    context: Context,
    memory: dict[tuple[int, tuple[float, ...]], dict[str, Reals]],
) -> tuple[Change | None, str]:
    scales = tuple(dict.fromkeys(probes.input_scales(before) + probes.input_scales(after)))
    made = probes.make(before, context.data, scales, context.seed)
    sides = []
    for module in (before, after):
        key = (id(module), scales)
        if key not in memory:
            memory.clear()  # only what the pass before left is asked for again
            memory[key] = interpreter.decoded(module, interpreter.run(module, made.x, "*"))
        sides.append(memory[key])
    contract, label = step.contract(), str(made)
    if isinstance(contract, Calibrated) and (samples := dict(made.kinds).get("calibration")):
        # what leaves the calibrated range on purpose says nothing about the calibration
        label = f"{samples} calibration samples"
        sides = [{name: values[-samples:] for name, values in side.items()} for side in sides]
    found = [*changes(*sides), change(before.output, sides[0][before.output], sides[1][after.output])]
    return check(contract, step.name, found, len(made)), label


def _reproducer(module: Module, rest: tuple[Pass, ...], seed: int) -> str:
    """The module before the failing pass and the pipeline from there on, as files for ``spir opt``."""
    seeded = f" --seed {seed}" if seed else ""
    text = f"// spir opt THIS --passes {shlex.quote(spell(rest, every=True))}{seeded}\n{show(module)}"
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    owner = os.getuid() if hasattr(os, "getuid") else 0
    path = Path(tempfile.gettempdir()) / f"spir-{owner}" / f"reproducer-{digest}.spir"
    try:
        write_aside(path, text.encode())
        write_aside(path.with_suffix(".safetensors"), to_bytes(module.arrays()))
    except SpirError as refusal:
        return f"could not be written ({refusal.diagnostics[0].message})"
    return str(path)
