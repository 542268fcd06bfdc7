"""benchmarks.mutants: where faults go, that they still apply, and that a fault is told from a sound tree."""

from __future__ import annotations

import ast
import shutil
from collections import Counter

import attrs
import pytest

from benchmarks.mutants import (
    DRAWN,
    KINDS,
    NAMED,
    PER_FILE,
    ROOT,
    Copy,
    Fault,
    Mutant,
    Record,
    Verdict,
    drawn,
    enough,
    listed,
    named,
    sites,
)


@pytest.fixture(scope="module")
def lots() -> list[Mutant]:
    return drawn(ROOT)


def changes(text: str) -> list[tuple[str, str]]:
    """The kind of every site of a text, and the text with the fault in it."""
    source = text.encode()
    return [(m.kind, m.applied(source).decode()) for m in sites("text.py", source)]


def verdict(kind: str, how: str, name: str = "a") -> Verdict:
    return Verdict(name, kind, "spir/ops/add.py", 3, ("-a", "+b"), "", how, "", "fast" if how else "", 1.5)


def test_there_are_named_faults():
    assert len(NAMED) >= 20
    assert len({fault.name for fault in NAMED}) == len(NAMED)


@pytest.mark.parametrize("fault", NAMED, ids=lambda fault: fault.name)
def test_a_named_fault_still_applies_and_parses(fault):
    mutant, source = fault.placed(ROOT), (ROOT / fault.file).read_bytes()
    changed = mutant.applied(source)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    assert fault.meaning


def test_a_fault_whose_line_is_gone_is_an_error(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old in ("y = 1", "x = 1"):
        with pytest.raises(LookupError, match="times, not once"):
            Fault("lost", "a.py", old, "z = 1", "nothing").placed(tmp_path)
    with pytest.raises(LookupError, match=r"frame-weight(.|\n)*gain-lost"):
        named(tmp_path)


def test_the_draw_is_of_60_and_always_the_same(lots):
    assert len(lots) == DRAWN == 60
    assert lots == drawn(ROOT)
    assert len({m.name for m in (*lots, *named(ROOT))}) == DRAWN + len(NAMED)


def test_the_draw_shows_every_kind_and_no_file_dominates(lots):
    assert {m.kind for m in lots} == set(KINDS)
    assert max(Counter(m.file for m in lots).values()) <= PER_FILE
    assert {m.file.split("/")[0] for m in lots} == {"spir", "passes", "backends"}


def test_every_drawn_mutant_parses_and_is_another_program(lots):
    for mutant in lots:
        source = (ROOT / mutant.file).read_bytes()
        changed = mutant.applied(source)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)), mutant
        rest = source[: mutant.start] + source[mutant.start + len(mutant.old.encode()) :]
        assert rest == changed[: mutant.start] + changed[mutant.start + len(mutant.new.encode()) :], mutant
        assert [line[0] for line in mutant.diff(source)].count("+") == 1, mutant


def test_every_mutant_is_listed_with_its_lines(lots):
    shown = "\n".join(listed(lots, ROOT))
    assert all(f"{m.name}  {m.kind}  {m.file}:{m.line}" in shown for m in lots)
    assert shown.count("\n    +") == DRAWN


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a < b", [("comparison", "a <= b")]),
        ("a <= b == c", [("comparison", "a < b == c"), ("comparison", "a <= b != c")]),
        ("(a) >= (b)", [("comparison", "(a) > (b)")]),
        ("é != b", [("comparison", "é == b")]),
        ("a + b", [("arithmetic", "a - b")]),
        ("(a  # +\n * b)", [("arithmetic", "(a  # +\n + b)")]),
        ("a //= b", [("arithmetic", "a /= b")]),
        ("a << -b", [("arithmetic", "a >> -b"), ("arithmetic", "a << +b")]),
        ("f(7)", [("integer", "f(8)")]),
        ("f(-1, 0)", [("integer", "f(0, 0)"), ("integer", "f(-1, 1)")]),
        ("a[0] = b[2]", [("index", "a[1] = b[2]"), ("index", "a[0] = b[1]")]),
        ("a[-1]", [("index", "a[-2]")]),
        ("a[1:-1]", [("index", "a[2:-1]"), ("index", "a[1:-2]")]),
        ("a[:n]", [("index", "a[:n + 1]")]),
        ("a.sum(axis=(1, 2))", [("index", "a.sum(axis=(0, 2))"), ("index", "a.sum(axis=(1, 1))")]),
        ("np.moveaxis(a, 0, -1)", [("index", "np.moveaxis(a, 1, -1)"), ("index", "np.moveaxis(a, 0, -2)")]),
    ],
)
def test_a_site_changes_where_it_stands(text, expected):
    assert changes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        '"""2 < 3."""',
        "f'{1 + 1}'",
        "raise error('type', str(1 + 1))",
        "yield error('type', 'x' * 2, also=a < b)",
        "assert a < 2",
        "def f(x: Literal[1]) -> Literal[2]: pass",
        "@lru_cache(maxsize=1024)\ndef f(): pass",
        "class A:\n    steps: ClassVar[int] = 3\n    bits: int = option(8, 'bits', ge=2, le=16)",
        "class A:\n    def corners(cls): yield cls(1)\n    def __repr__(self): return str(self.a + 1)",
        "a is None or b in c",
        "[a] + b, (a,) * n, 'x' * n",
        "a.reshape(-1)",
        "True, 0.5",
        "a | b, a @ b",
    ],
)
def test_what_computes_nothing_is_no_site(text):
    assert changes(text) == []


def test_nine_in_ten_are_enough_and_no_named_fault_may_survive():
    most = [*[verdict("index", "test")] * 9, verdict("integer", "")]
    assert enough(most)
    assert enough([*most, verdict("named", "timeout")])
    assert not enough([*most, verdict("named", "")])
    assert not enough([*most, verdict("integer", "")])


def test_a_record_holds_for_one_source(tmp_path):
    record = Record("1234", {"fast": 2.0}, {n: verdict("index", how, n) for n, how in (("a", "test"), ("b", ""))})
    record.write(tmp_path / "mutants.json")
    assert Record.read(tmp_path / "mutants.json", "1234") == record
    assert Record.read(tmp_path / "mutants.json", "5678") == Record("5678", {})
    assert Record.read(tmp_path / "absent.json", "1234") == Record("1234", {})


def test_a_verdict_holds_for_one_change(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    judged = Mutant("a", "integer", "a.py", 1, 4, "1", "2")
    record = Record("1234", {}, {"a": attrs.evolve(verdict("integer", "test"), diff=("-x = 1", "+x = 2"))})
    assert record.holds(judged, tmp_path)
    assert not record.holds(attrs.evolve(judged, new="3"), tmp_path)
    assert not record.holds(attrs.evolve(judged, name="b"), tmp_path)


@pytest.fixture
def small(tmp_path) -> Copy:
    """A tree of one function and one test."""
    tree = tmp_path / "tree"
    for folder in ("spir", "benchmarks", "tests/ir"):
        (tree / folder).mkdir(parents=True)
    (tree / "spir" / "__init__.py").write_text("def fires(v):\n    return v >= 4\n")
    (tree / "benchmarks" / "__init__.py").write_text("")
    shutil.copy(ROOT / "benchmarks" / "mutants.py", tree / "benchmarks")
    tests = ("import spir", "def test_below(): assert not spir.fires(3)", "def test_above(): assert spir.fires(5)")
    (tree / "tests" / "ir" / "test_fires.py").write_text("\n".join(tests))
    return Copy(tree).compiled()


def test_a_fault_that_shows_is_caught_and_one_that_does_not_survives(small):
    source, limits = (small.root / "spir" / "__init__.py").read_bytes(), {"fast": 60.0}
    tie, number = sites("spir/__init__.py", source)
    survived = small.judge(tie, limits)
    assert not survived.caught
    assert survived.diff == ("-    return v >= 4", "+    return v > 4")
    caught = small.judge(attrs.evolve(number, new="7"), limits)
    assert (caught.how, caught.by, caught.stage) == ("test", "tests/ir/test_fires.py::test_above", "fast")
    assert (small.root / "spir" / "__init__.py").read_bytes() == source


def test_an_import_error_and_an_endless_run_are_caught_and_named(small):
    _, number = sites("spir/__init__.py", (small.root / "spir" / "__init__.py").read_bytes())
    assert small.judge(attrs.evolve(number, new="4\nassert 0"), {"fast": 60.0}).how == "import"
    assert small.judge(attrs.evolve(number, new="4\nwhile True: pass"), {"fast": 1.0}).how == "timeout"
