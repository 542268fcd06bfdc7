"""The suite can fail: each of these backends is wrong in one way, and is caught by the property that speaks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import attrs
import numpy as np
import pytest

from spir import interpreter
from spir.backend import Backend
from spir.cli import main
from spir.conformance import Check, check, checks
from spir.conformance.examples import is_neuron
from spir.discovery import names
from spir.errors import SpirError, error
from spir.ir import Module, kept
from spir.ops.avg_pool import AvgPool
from spir.ops.conv2d import Conv2d
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.text import show_node
from spir.types import Real

Stored = dict[str, np.ndarray]


@attrs.define
class Run:
    """An executable that runs the interpreter, and what may be done to its input and to its values."""

    module: Module
    before: Callable[[Run, np.ndarray], np.ndarray] = lambda _, x: x
    after: Callable[[Run, Stored], Stored] = lambda _, stored: stored
    calls: int = 0
    bytes_per_sample: int = 1000

    def run(self, x: np.ndarray, keep: str = "") -> Stored:
        self.calls += 1
        read = self.before(self, x)
        n = read.shape[0 if self.module.input.type.train is None else 1]
        stored = self.after(self, self.empty() if n == 0 else interpreter.run(self.module, read, "*"))
        return {name: stored[name] for name in stored if kept(name, keep) or name == self.module.output}

    def empty(self) -> Stored:
        return {
            name: np.zeros(
                (*((t.steps,) if t.train else ()), 0, *t.shape), float if isinstance(t.encoding, Real) else int
            )
            for name, t in self.module.types.items()
        }


@attrs.frozen
class Sound(Backend):
    """Right in all things."""

    name: ClassVar[str] = "sound"

    def refusals(self, module: Module) -> Iterator[SpirError]:
        for node in module.nodes:
            if node.op.name not in names("ops"):
                yield refused(node)

    def build(self, module: Module) -> Any:
        return Run(module)


def refused(node: Any, **changed: str) -> SpirError:
    notes = {"op": show_node(node), "from_": str(node.origin), "fix": "another op"} | changed
    return error("backend", f"there is no {node.op.name}", **notes)


def spoiled(run: Run, stored: Stored, wrong: Callable[[Any, np.ndarray], np.ndarray | None]) -> Stored:
    """The values after each node whose result ``wrong`` changes is changed, and all that read it again."""
    values = dict(stored)
    for node in run.module.nodes:
        operands = [values[name] for name in node.operands]
        if operands[0].size:
            values[node.result] = node.op.reference(run.module.operand_types(node), *operands)
            changed = wrong(node, operands[0])
            values[node.result] = values[node.result] if changed is None else changed
    return values


class OffByOne(Sound):
    """A pool that leaves out the last column of what it reads."""

    def build(self, module):
        def wrong(node, x):
            if isinstance(node.op, AvgPool):
                cut = np.array(x)
                cut[..., -1] = 0
                return node.op.reference((module.types[node.operands[0]],), cut)
            return None

        return Run(module, after=lambda run, stored: spoiled(run, stored, wrong))


class RoundsTiesDown(Sound):
    """Half a step goes down, in quantisers and in every law."""

    def build(self, module):
        def wrong(node, x):
            if isinstance(node.op, Quantize):
                return np.clip(np.ceil(x / node.op.scale - 0.5), node.op.lo, node.op.hi).astype(int)
            return None

        return Run(module, after=lambda run, stored: spoiled(run, stored, wrong))


class FlipsAtATie(Sound):
    """A requant that is one too low where the law meets a step exactly."""

    def build(self, module):
        def wrong(node, x):
            if node.op.name == "requant" and isinstance(node.op.div, int):
                lowered = attrs.evolve(node.op, add=type(node.op.add).of(node.op.add.values - 1))
                return lowered.reference((module.types[node.operands[0]],), x)
            return None

        return Run(module, after=lambda run, stored: spoiled(run, stored, wrong))


class Remembers(Sound):
    """The second call adds what the first left."""

    def build(self, module):
        def after(run, stored):
            last = dict(stored)
            last[module.output] = last[module.output] + (run.calls > 1)
            return last

        return Run(module, after=after)


class SharesItsMemory(Sound):
    """Every call gives the same arrays out again."""

    def build(self, module):
        given = {}

        def after(run, stored):
            key = next(iter(stored.values())).tobytes()
            return dict(given.setdefault(key, stored))

        return Run(module, after=after)


class LooksAtTheBatch(Sound):
    """The first sample of a larger batch is another one."""

    def build(self, module):
        def wrong(node, x):
            if node.op.name != "relu" or x.shape[0] != 1:
                return None
            return np.maximum(x, 0) * 0

        return Run(module, after=lambda run, stored: spoiled(run, stored, wrong))


class ChangesItsInput(Sound):
    """A relu in place."""

    def build(self, module):
        def before(run, x):
            read = np.array(x)
            if x.flags.writeable and x.dtype.kind == "f":
                np.maximum(x, 0, out=x)
            return read

        return Run(module, before=before)


class HandsOutItsInput(Sound):
    """The kept input is the caller's own array."""

    def build(self, module):
        def before(run, x):
            run.given = x
            return x

        class Aliased(Run):
            given: Any = None

        def after(run, stored):
            return stored | ({module.input.name: run.given} if run.given.dtype == np.int64 else {})

        return Aliased(module, before=before, after=after)


class LockedInputFails(Sound):
    """It writes into its input and puts it back."""

    def build(self, module):
        def before(run, x):
            x += 0
            return x

        return Run(module, before=before)


class RefusesLate(Sound):
    """Convolutions are refused by the build."""

    def build(self, module):
        if any(isinstance(node.op, Conv2d) for node in module.nodes):
            raise error("backend", "no convolutions", fix="another op")
        return super().build(module)


class RefusesInTheRun(Sound):
    """Convolutions are refused when they are met."""

    def build(self, module):
        def before(run, x):
            if any(isinstance(node.op, Conv2d) for node in module.nodes):
                raise NotImplementedError("convolution")
            return x

        return Run(module, before=before)


class RefusesWithoutAPlace(Sound):
    """A refusal that names no op."""

    def refusals(self, module):
        if any(isinstance(node.op, Conv2d) for node in module.nodes):
            yield error("backend", "no convolutions", fix="another op")


class RefusesWithoutAFix(Sound):
    """A refusal that names no way out."""

    def refusals(self, module):
        return (refused(node, fix="") for node in module.nodes if isinstance(node.op, Conv2d))


class RefusesTheFirstOnly(Sound):
    """One refusal at a time."""

    def refusals(self, module):
        yield from list(super().refusals(module))[:1]


class RefusesNothing(Sound):
    """Unknown ops are passed through."""

    def refusals(self, module):
        return iter(())

    def build(self, module):
        def wrong(node, x):
            return x + 1 if node.op.name not in names("ops") else None

        return Run(module, after=lambda run, stored: spoiled(run, stored, wrong))


class BuildsWhatItRefuses(Sound):
    """Its prepare asks nobody."""

    def refusals(self, module):
        return (refused(node) for node in module.nodes if isinstance(node.op, Conv2d))

    def prepare(self, module):
        return self.build(module)


class KeepsTooMuch(Sound):
    """Kept values come in another order."""

    def build(self, module):
        class Reversed(Run):
            def run(self, x, keep=""):
                return dict(reversed(super().run(x, keep).items())) if keep != "*" else super().run(x, keep)

        return Reversed(module)


class KeepsOthers(Sound):
    """A value asked for by its name has another number than in a full run."""

    def build(self, module):
        class Other(Run):
            def run(self, x, keep=""):
                found = super().run(x, keep)
                return {n: v + (keep == "") if n == module.output else v for n, v in found.items()}

        return Other(module)


class TakesAnything(Sound):
    """Inputs are not looked at."""

    def build(self, module):
        def before(run, x):
            return np.clip(np.nan_to_num(x), -1, 1).astype(int) if x.dtype.kind == "f" else x

        return Run(module, before=before)


class Narrow(Sound):
    """Integers come as int32."""

    def build(self, module):
        return Run(module, after=lambda _, s: {n: v.astype(np.int32) if v.dtype == int else v for n, v in s.items()})


class RoundsReals(Sound):
    """Reals in float32."""

    def build(self, module):
        def wrong(node, x):
            if isinstance(node.type.encoding, Real) and isinstance(node.op, Relu | Conv2d):
                types = tuple(module.types[name] for name in node.operands)
                return node.op.reference(types, x).astype(np.float32).astype(float)
            return None

        return Run(module, after=lambda run, stored: spoiled(run, stored, wrong))


FAULTS = [
    (OffByOne, "values", "avg_pool", "%y at "),
    (RoundsTiesDown, "values", "quantize", "the reference says"),
    (FlipsAtATie, "values", "requant", "the reference says"),
    (Narrow, "values", "relu", "is int32"),
    (RoundsReals, "values", "conv2d", "%y = conv2d"),
    (RefusesInTheRun, "values", "conv2d", "refused late: the run of 7 samples, keep='*', raises NotImplementedError"),
    (RefusesLate, "values", "conv2d", "refused late: build raises what `refusals` does not say"),
    (RefusesNothing, "refusals", "(unknown ops)", "the reference says"),
    (RefusesTheFirstOnly, "refusals", "(unknown ops)", "silent about %b"),
    (RefusesWithoutAPlace, "refusals", "conv2d", "a refusal names no op and no from"),
    (RefusesWithoutAFix, "refusals", "conv2d", "a refusal names no fix"),
    (BuildsWhatItRefuses, "refusals", "conv2d", "prepare accepts a module that `refusals` refuses"),
    (LooksAtTheBatch, "batches", "relu", "depends on the batch"),
    (Remembers, "repeats", "relu", "state is kept between calls"),
    (SharesItsMemory, "repeats", "relu", "state is kept between calls"),
    (KeepsTooMuch, "keeps", "relu", "keep="),
    (KeepsOthers, "keeps", "relu", "another %y than keep='*'"),
    (ChangesItsInput, "inputs", "relu", "the run changes its input"),
    (HandsOutItsInput, "inputs", "relu", "shares memory with the input"),
    (LockedInputFails, "inputs", "relu", "read-only"),
    (TakesAnything, "inputs", "relu", "is accepted"),
]


@pytest.mark.parametrize(("fault", "group", "subject", "claim"), FAULTS, ids=lambda p: getattr(p, "__name__", None))
def test_a_wrong_backend_is_caught(fault, group, subject, claim):
    row = Check(group, "neuron" if is_neuron_name(subject) else "op", subject).run(fault())
    assert row.failed
    assert claim in row.failure
    assert "module {\n  input %x : tensor<" in row.failure
    assert "%x of sample 0 = [" in row.failure
    with pytest.raises(AssertionError, match=subject.strip("()")):
        Check(group, "op", subject).hold(fault())


def is_neuron_name(subject: str) -> bool:
    return subject in names("ops") and is_neuron(subject)


@pytest.mark.parametrize("fault", [FlipsAtATie, RoundsTiesDown, RefusesInTheRun])
def test_a_wrong_backend_is_caught_by_random_modules_and_the_example_is_small(fault):
    row = Check("values", "modules", "random", 1500).run(fault())  # it stops at the first
    assert row.failed == 1
    text = row.failure[row.failure.index("module {") : row.failure.index("\n}")]
    assert text.count("\n  %") <= 5, row.failure


def test_a_sound_backend_passes_and_a_report_shows_what_failed(capsys, monkeypatch):
    few = tuple(c for c in checks(4) if c.subject in ("avg_pool", "random", "(unknown ops)"))
    monkeypatch.setattr("spir.conformance.suite.checks", lambda _: few)
    report = check(Sound())
    few = few[:1]
    assert report.passed, str(report)
    assert report.json()["backend"] == "sound"
    broken = check(OffByOne())
    assert not broken.passed
    assert "!" in str(broken).splitlines()[1]
    assert "values of avg_pool: %y at " in str(broken)
    monkeypatch.setattr("spir.driver.backend_of", lambda _: OffByOne())
    assert main(["check", "sound"]) == 1
    assert "fail (!)" in capsys.readouterr().out.splitlines()[-1]
