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

from spir import probes
from spir.contracts import Calibrated, Change, check, worst
from spir.discovery import find
from spir.errors import SpirError, error, located
from spir.ir import Module
from spir.measure import Memory, on_data, on_probes
from spir.options import Scalar, build, spelled
from spir.rewriting import Context, Pass
from spir.store import to_bytes, write_aside
from spir.text import caret, parse_with, show
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
    """One line of the journal: what ran, what it promised, what was measured, on what, and what the pass noted.

    ``value`` changed most, by ``largest`` and on average ``mean``; ``relative`` is ``largest`` over its magnitude.
    """

    step: str
    contract: str
    checked: str
    largest: float | None
    relative: float | None
    value: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    seconds: float
    mean: float | None = None
    notes: tuple[str, ...] = ()


@attrs.frozen
class Stage:
    """A pass and the module that came out of it."""

    name: str
    module: Module


@attrs.frozen
class Outcome:
    """The last module, the journal and every module on the way.

    ``passes`` make the same without searching: what a pass searched for stands there as it was found.
    """

    module: Module
    journal: tuple[Entry, ...]
    stages: tuple[Stage, ...]
    passes: tuple[Pass, ...]


def run(
    module: Module,
    passes: tuple[Pass, ...],
    context: Context,
    *,
    checked: bool = True,
    data: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Runs passes in order; verifies after each, and holds it against its contract.

    Args:
        module: what enters the first pass.
        passes: what to run.
        context: what passes see; its notes go into the journal.
        checked: contracts are checked on probes.
        data: contracts are checked on all of the context's data, too.
        progress: called with the name of each pass as it starts, and with the samples done.

    Raises:
        SpirError: a pass or its contract fails; the note ``reproducer`` names the files that show it again.
    """
    journal: list[Entry] = []
    stages: list[Stage] = []
    settled: list[Pass] = []
    memory = Memory()
    for index, step in enumerate(passes):
        progress(step.name)
        _covers(step, module)
        start, noted = time.perf_counter(), len(context.notes)
        try:
            after = verify(step.run(module, context))
            most, label = None, "not checked"
            if checked:
                most, label = _check(step, module, after, context, memory, data=data, progress=progress)
        except SpirError as refusal:
            path = _reproducer(module, passes[index:], context.seed, data=data)
            raise refusal.note("pass", spell([step])).note("reproducer", path) from refusal.__cause__
        seconds = time.perf_counter() - start
        journal.append(
            Entry(
                step=spell([step], every=True),
                contract=str(step.contract()),
                checked=label,
                largest=most.largest if most else None,
                relative=most.relative if most and math.isfinite(most.relative) else None,
                value=most.value if most else "",
                before=_census(module),
                after=_census(after),
                seconds=seconds,
                mean=most.mean if most else None,
                notes=tuple(context.notes[noted:]),
            )
        )
        stages.append(Stage(step.name, after))
        settled += step.settled(module, after)
        module = after
    return Outcome(module, tuple(journal), tuple(stages), tuple(settled))


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
    memory: Memory,
    *,
    data: bool,
    progress: Callable[[str], None],
) -> tuple[Change | None, str]:
    """The worst change, and on what it was looked for: probes, and all of the data where that is asked for."""
    contract = step.contract()
    scales = tuple(dict.fromkeys(probes.input_scales(before) + probes.input_scales(after)))
    made = probes.make(before, context.data, scales, context.seed)
    samples = dict(made.kinds).get("calibration", 0) if isinstance(contract, Calibrated) else 0
    # what leaves the calibrated range on purpose says nothing about the calibration
    first, label = (len(made) - samples, f"{samples} calibration samples") if samples else (0, str(made))
    found = on_probes(before, after, made, scales=scales, first=first, memory=memory)
    most = check(contract, step.name, found, label)
    if not data or context.data is None:
        return most, label
    count = f"{len(context.data)} calibration samples"
    whole = on_data(before, after, context.data, context, lambda done: progress(f"{step.name}: {done} of {count}"))
    overall = check(contract, step.name, whole, count)
    if samples:  # they are among the data
        return overall, count
    return worst(c for c in (most, overall) if c is not None), f"{label} and {count}"


def _reproducer(module: Module, rest: tuple[Pass, ...], seed: int, *, data: bool) -> str:
    """The module before the failing pass and the pipeline from there on, as files for ``spir opt``."""
    seeded = f" --seed {seed}" if seed else ""
    same = " --check data --data THE_SAME" if data else ""
    text = f"// spir opt THIS --passes {shlex.quote(spell(rest, every=True))}{seeded}{same}\n{show(module)}"
    digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
    owner = os.getuid() if hasattr(os, "getuid") else 0
    path = Path(tempfile.gettempdir()) / f"spir-{owner}" / f"reproducer-{digest}.spir"
    try:
        write_aside(path, text.encode())
        write_aside(path.with_suffix(".safetensors"), to_bytes(module.arrays()))
    except SpirError as refusal:
        return f"could not be written ({refusal.diagnostics[0].message})"
    return str(path)
