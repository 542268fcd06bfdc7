"""What a pass changed: two modules on the same inputs, value by value, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
from numpy.typing import NDArray

from spir import batches, interpreter
from spir.contracts import Change, change
from spir.ir import Module
from spir.probes import Probes
from spir.rewriting import Context
from spir.types import Reals

PROBE_BYTES = 2**30  # what the values of the probes that a module runs on at once may take
DATA_BYTES = 2**28  # the same for calibration samples
GROUP_BYTES = 2**30  # what the values of one sample that are looked at together may take
MEMORY_BYTES = 2**30  # what may be remembered for the next pass

Pair = tuple[str, str]


def pairs(before: Module, after: Module) -> tuple[Pair, ...]:
    """What is compared, by its names before and after: every value that both name, and the outputs."""
    shared = [(name, name) for name in before.types if name in after.types]
    return tuple(dict.fromkeys([*shared, (before.output, after.output)]))


@attrs.define(eq=False)
class Memory:
    """What a module decoded to on its probes, batch by batch, for the pass that comes next."""

    key: tuple[int, tuple[float, ...], int] | None = None
    parts: list[dict[str, Reals]] = attrs.field(factory=list)


@attrs.define(eq=False)
class _Tally:
    """Adds up changes, batch by batch."""

    found: dict[Pair, Change] = attrs.field(factory=dict)

    def add(self, pair: Pair, before: Reals, after: Reals) -> None:
        part = change(pair[0], before, after)
        self.found[pair] = self.found[pair] + part if pair in self.found else part


def on_probes(
    before: Module,
    after: Module,
    made: Probes,
    *,
    scales: tuple[float, ...] = (),
    first: int = 0,
    memory: Memory | None = None,
) -> list[Change]:
    """The change of each pair, by the reference interpreter.

    Args:
        before: what entered the pass.
        after: what left it.
        made: the probes.
        scales: of input quantisers, which the probes depend on.
        first: probes before this one run, but do not count.
        memory: holds the side ``before`` from the last call, and takes the side ``after`` where that is small.
    """
    memory = Memory() if memory is None else memory
    size = min(len(made), *(batches.at_once(PROBE_BYTES, side) for side in (before, after)))  # one runs at a time
    known = memory.parts if memory.key == (id(before), scales, size) else []
    small = sum(t.size for t in after.types.values()) * batches.WORD * len(made) <= MEMORY_BYTES
    wanted = pairs(before, after)
    held: list[dict[str, Reals]] = []
    tally = _Tally()
    for index, x in enumerate(batches.cut(before, made.x, size)):
        left = known[index] if known else dict(_decoded(before, x, "|".join(a for a, _ in wanted)))
        right: dict[str, Reals] = {}
        counted = slice(max(0, first - index * size), None)
        for name, values in _decoded(after, x, "*" if small else "|".join(b for _, b in wanted)):
            for pair in wanted:
                if pair[1] == name and values[counted].size:
                    tally.add(pair, left[pair[0]][counted], values[counted])
            if small:
                right[name] = values
        held.append(right)
    memory.key, memory.parts = ((id(after), scales, size), held) if small else (None, [])
    return list(tally.found.values())


def _decoded(module: Module, x: NDArray[Any], keep: str) -> Iterator[tuple[str, Reals]]:
    """Decoded values one by one, so that no frames stand in memory but those that are still read."""
    for name, stored in interpreter.walk(module, x, keep):
        yield name, module.types[name].decode(stored)


def on_data(
    before: Module,
    after: Module,
    x: NDArray[Any],
    context: Context,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Change]:
    """The change of each pair on samples ``[N, *shape]``, by the context's fast way to run modules.

    Args:
        before: what entered the pass.
        after: what left it.
        x: the samples.
        context: runs them.
        progress: called with the number of samples done, once a batch.
    """
    size = batches.at_once(DATA_BYTES, before, after)
    tally = _Tally()
    for group in _groups(before, after):
        left = context.evaluate(before, x, "|".join(a for a, _ in group), batch=size)
        right = context.evaluate(after, x, "|".join(b for _, b in group), batch=size)
        done = 0
        for old, new in zip(left, right, strict=True):
            _compare(group, old, new, tally)
            done += len(old[group[0][0]])
            progress(done)
    return list(tally.found.values())


def _compare(group: list[Pair], old: Mapping[str, Reals], new: Mapping[str, Reals], tally: _Tally) -> None:
    for pair in group:
        tally.add(pair, old[pair[0]], new[pair[1]])


def _groups(before: Module, after: Module) -> Iterator[list[Pair]]:
    """Pairs that one run may keep together: a network too large for that runs several times."""
    group: list[Pair] = []
    total = 0
    for pair in pairs(before, after):
        taken = batches.bytes_of((before.types[pair[0]], after.types[pair[1]]))
        if group and total + taken > GROUP_BYTES:
            yield group
            group, total = [], 0
        group.append(pair)
        total += taken
    if group:
        yield group
