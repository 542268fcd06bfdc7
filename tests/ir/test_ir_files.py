"""Text in, text out: each case of ``*.spir`` here is a module, and the text or the error that comes of it.

A case opens with its claim, and ends with what is expected; without that part the module prints as itself::

    // ==== batch normalisation with one reader folds into the convolution
    // passes: fold-bn
    // @c.weight = [[[[2.0]]]]
    // data: [[[[1.0]]]]
    module {
      input %x : tensor<1x1x1, real>
      %c = conv2d %x {weight = @c.weight} : tensor<1x1x1, real>
      ...
    }
    // ---- expect
    // @b.weight = [[[[4.0]]]]
    module { ... }

``passes`` runs a pipeline, ``data`` (with ``seed``) calibrates it, ``@name`` gives an array, integers or floats, in
JSON. An array is written without its digest in the module above, which is filled in; where a digest is written, it
stands. What is expected is written without digests, of arrays and of scales per channel. After ``// ---- error``
stands the whole error, but for the place of the reproducer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

from spir import interpreter, pipeline
from spir.errors import SpirError
from spir.ir import Array, Module
from spir.text import parse, show
from spir.types import Reals
from spir.verify import verify

FOLDER = Path(__file__).parent
MOST_OPS = 15
ARRAY = re.compile(r"^// @([\w.]+) = (.*)$", re.MULTILINE)
SETTING = re.compile(r"^// (passes|data|seed): (.*)$", re.MULTILINE)
BARE = re.compile(r"@([A-Za-z_][\w.]*)(?![\w.#])")
DIGEST = re.compile(r" ?#[0-9a-f]{16}")


@attrs.frozen
class Case:
    """One claim: a module, what is done to it, and what is expected."""

    given: str
    kind: str
    expected: str

    @property
    def settings(self) -> dict[str, str]:
        return dict(SETTING.findall(self.given))

    def module(self) -> Module:
        arrays = arrays_of(self.given)
        text = self.given[self.given.index("module {") :] if "module {" in self.given else self.given
        return parse(BARE.sub(lambda m: f"@{m[1]}#{arrays[m[1]].digest}", text), arrays)


@attrs.frozen(eq=False)
class Context:
    """What passes ask for, by the interpreter."""

    data: Any
    seed: int
    notes: list[str] = attrs.field(factory=list, init=False)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def evaluate(
        self, module: Module, x: Any, keep: str = "*", *, batch: int | None = None
    ) -> Iterator[Mapping[str, Reals]]:
        yield interpreter.decoded(module, interpreter.run(module, x, keep))


def arrays_of(text: str) -> dict[str, Array]:
    return {name: Array.of(json.loads(values)) for name, values in ARRAY.findall(text)}


def cases() -> Iterator[Any]:
    for path in sorted(FOLDER.glob("*.spir")):
        blocks = re.split(r"^// ==== (.*)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for claim, body in zip(blocks[1::2], blocks[2::2], strict=True):
            given, kind, expected = (*re.split(r"^// ---- (\w+)\n", body, flags=re.MULTILINE), "same", "")[:3]
            yield pytest.param(Case(given, kind, expected), id=f"{path.stem}: {claim}")


def plain(text: str) -> list[str]:
    """The lines of a module without comments, blanks around them and digests."""
    lines = (DIGEST.sub("", re.sub(r"//.*", "", line)).strip() for line in text.splitlines())
    return [line for line in lines if line]


def written(arrays: Mapping[str, Array]) -> list[str]:
    return [f"// @{name} = {json.dumps(array.values.tolist())}" for name, array in sorted(arrays.items())]


def outcome(case: Case) -> Module:
    module = verify(case.module())
    assert len(module.nodes) <= MOST_OPS, f"a case has at most {MOST_OPS} ops"
    settings = case.settings
    if "passes" in settings:
        data = np.array(json.loads(settings["data"]), dtype=np.float64) if "data" in settings else None
        context = Context(data, int(settings.get("seed", "0")))
        module = pipeline.run(module, pipeline.parse(settings["passes"]), context).module
    assert parse(show(module), module.arrays()) == module
    return module


def without_reproducer(refusal: SpirError) -> str:
    kept = [attrs.evolve(d, notes=tuple(n for n in d.notes if n.label != "reproducer")) for d in refusal.diagnostics]
    return str(SpirError(*kept))


@pytest.mark.parametrize("case", [*cases()])
def test_the_text_becomes_what_is_expected(case):
    if case.kind == "error":
        with pytest.raises(SpirError) as refusal:
            outcome(case)
        text = DIGEST.sub("", without_reproducer(refusal.value))
        assert [line.rstrip() for line in text.splitlines()] == DIGEST.sub("", case.expected).strip("\n").splitlines()
        return
    assert case.kind in ("expect", "same")
    found = outcome(case)
    text = case.given[case.given.index("module {") :] if case.kind == "same" else case.expected
    assert plain(show(found)) == plain(text)
    arrays = arrays_of(case.given) if case.kind == "same" else arrays_of(case.given) | arrays_of(case.expected)
    assert written(found.arrays()) == written({name: arrays[name] for name in found.arrays() if name in arrays})


def test_every_file_here_holds_cases_with_claims_of_their_own():
    found = [case.id for case in cases()]
    assert len(found) == len(set(found))
    assert {str(i).split(":")[0] for i in found} == {path.stem for path in FOLDER.glob("*.spir")}
