"""The checks, their results, and the run of them all on one backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from spir import driver
from spir.backend import Backend
from spir.conformance import strategies
from spir.conformance.examples import Example, corners, is_neuron, module_of, probing_input
from spir.conformance.properties import PROPERTIES, Failure, Property, Refused, foreign, foreign_example
from spir.discovery import names
from spir.errors import SpirError, error
from spir.types import Real, Tensor

SCHEMA = "spir-check/1"
EXAMPLES = 40
SOME = 5
"""Corners of each op for the properties other than values and refusals, spread evenly."""
NOT_MADE = "a corner whose operands no ops make from one input"


@attrs.frozen
class Row:
    """What came of one property on one subject.

    Attributes:
        group: the property, such as ``values``.
        kind: ``op``, ``neuron``, ``modules`` or ``recipe``.
        subject: the name of the op, neuron or recipe, or ``random``.
        run: cases that were run and hold.
        refused: cases that the backend refused as it should.
        failed: cases that do not hold; of random modules at most one, the shortest found.
        why: the first refusal.
        failure: the first failure: what is wrong, the module as text, its inputs.
    """

    group: str
    kind: str
    subject: str
    run: int
    refused: int
    failed: int
    why: str = ""
    failure: str = ""


@attrs.frozen
class Report:
    """All rows of one backend."""

    backend: str
    examples: int
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(row.failed for row in self.rows)

    def json(self) -> dict[str, Any]:
        """The report as one object."""
        rows = [attrs.asdict(row) for row in self.rows]
        head = {"schema": SCHEMA, "backend": self.backend, "examples": self.examples, "passed": self.passed}
        return {**head, "rows": rows}

    def __str__(self) -> str:
        groups = list(dict.fromkeys(row.group for row in self.rows))
        found = {(row.kind, row.subject, row.group): row for row in self.rows}
        lines = [["", *groups]]
        for kind, subject in dict.fromkeys((row.kind, row.subject) for row in self.rows):
            rows = [found.get((kind, subject, group)) for group in groups]
            label = subject if kind in ("op", "neuron") else f"{kind}: {subject}"
            lines.append([label, *("" if row is None else _cell(row) for row in rows)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(groups) + 1)]
        table = ["  ".join(f"{text:<{w}}" for text, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        run, refused, failed = (sum(getattr(row, n) for row in self.rows) for n in ("run", "refused", "failed"))
        verdict = f"{self.backend}: {run} cases hold, {refused} are refused (-), {failed} fail (!)"
        failures = [f"{row.group} of {row.subject}: {row.failure}" for row in self.rows if row.failed]
        return "\n".join([*table, "", *(f"{text}\n" for text in failures), verdict])


def _cell(row: Row) -> str:
    parts = [str(row.run)] if row.run or not row.refused + row.failed else []
    parts += [f"-{row.refused}"] if row.refused else []
    parts += [f"!{row.failed}"] if row.failed else []
    return " ".join(parts)


@attrs.frozen
class Check:
    """One property on one subject: `run` gives a row, `hold` raises what failed."""

    group: str
    kind: str
    subject: str
    examples: int = EXAMPLES

    def __str__(self) -> str:
        return f"{self.group}-{self.subject}"

    def run(self, backend: str | Backend) -> Row:
        """The cases on a backend, up to the first failure of each random search.

        Raises:
            SpirError[backend]: the backend refuses even a module without ops, so it runs nowhere here.
        """
        runner = _usable(backend)
        tally = _Tally()
        if self.kind == "modules":
            self._search(runner, tally, strategies.examples(), self.examples)
        elif self.kind == "recipe":
            self._search(runner, tally, strategies.converted(self.subject), max(2, self.examples // 8))
        else:
            for example in self._corners(tally):
                tally.count(self._property, runner, example)
        first = "" if tally.failure is None else str(tally.failure)
        return Row(self.group, self.kind, self.subject, tally.run, tally.refused, tally.failed, tally.why, first)

    def hold(self, backend: str | Backend) -> Row:
        """The row, where nothing failed.

        Raises:
            AssertionError: the first case that does not hold.
        """
        row = self.run(backend)
        if row.failed:
            raise AssertionError(f"{self.group} of {self.subject}: {row.failure}")
        return row

    @property
    def _property(self) -> Property:
        return foreign if self.subject == FOREIGN else PROPERTIES[self.group]

    def _corners(self, tally: _Tally) -> Iterator[Example]:
        if self.subject == FOREIGN:
            yield foreign_example()
            return
        known = _corner_examples(self.subject)
        if self.group not in ("values", "refusals"):
            known = known[:: -(-len(known) // SOME)]
        for index, example in enumerate(known):
            if example is None:
                tally.fail(AssertionError(f"{NOT_MADE}: corner {index} of {self.subject}"))
                continue
            yield attrs.evolve(example, x=example.x.copy())  # a backend may spoil it

    def _search(self, backend: Backend, tally: _Tally, drawn: st.SearchStrategy[Example], most: int) -> None:
        """Random examples, the same on every run; the first that fails is made as small as it gets."""

        @settings(
            max_examples=most,
            derandomize=True,
            database=None,
            deadline=None,
            print_blob=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(drawn)
        def holds(example: Example) -> None:
            tally.count(self._property, backend, example, raises=True)

        try:
            holds()
        except Failure as failure:
            tally.failure = failure  # the smallest


@functools.cache
def _corner_examples(name: str) -> tuple[Example | None, ...]:
    found = enumerate(corners(name))
    return tuple(None if m is None else Example(m, probing_input(m, index)) for index, m in found)


FOREIGN = "(unknown ops)"


@attrs.define
class _Tally:
    """Counts of one check; of a search only up to its first failure, for what follows makes that one smaller."""

    run: int = 0
    refused: int = 0
    failed: int = 0
    why: str = ""
    failure: AssertionError | None = None

    def fail(self, failure: AssertionError) -> None:
        self.failed += 1
        self.failure = self.failure or failure

    def count(self, holds: Property, backend: Backend, example: Example, *, raises: bool = False) -> None:
        """Runs one case; with ``raises`` a failure is handed on to the search."""
        searching = raises and self.failed > 0
        try:
            holds(backend, example)
            self.run += not searching
        except Refused as told:
            self.refused += not searching
            self.why = self.why or told.refusal.diagnostics[0].message
        except Failure as failure:
            if not searching:
                self.fail(failure)
            if raises:
                raise


def checks(examples: int = EXAMPLES) -> tuple[Check, ...]:
    """Every property on every op and neuron that is installed, on random modules and on what recipes make of networks.

    Args:
        examples: random modules for ``values``; a quarter of that for the other properties.
    """
    found = []
    for group in PROPERTIES:
        found += [Check(group, "neuron" if is_neuron(name) else "op", name) for name in names("ops")]
        found.append(Check(group, "modules", "random", examples if group == "values" else max(1, examples // 4)))
    found += [Check("values", "recipe", name, examples) for name in names("recipes")]
    found.append(Check("refusals", "op", FOREIGN))
    return tuple(found)


def check(
    backend: str | Backend, *, examples: int = EXAMPLES, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Runs the suite on a backend: text such as ``hw{collapse=off}``, or an instance.

    Raises:
        SpirError[name], SpirError[option]: no such backend. SpirError[backend]: it runs nowhere on this machine.
    """
    runner = _usable(backend)
    rows = []
    for one in checks(examples):
        progress(f"{one.group} of {one.subject}")
        rows.append(one.run(runner))
    label = backend if isinstance(backend, str) else runner.name
    return Report(label, examples, tuple(rows))


def _usable(backend: str | Backend) -> Backend:
    runner = backend if isinstance(backend, Backend) else driver.backend_of(backend)
    empty: Sequence[SpirError] = list(runner.refusals(module_of(Tensor((1,), Real()))))
    if empty:
        raise error(
            "backend",
            f"{runner.name} refuses a module without ops: {empty[0].diagnostics[0].message}",
            fix=next((n.text for n in empty[0].diagnostics[0].notes if n.label == "fix"), "another backend"),
        )
    return runner
