"""Faults put into the source on purpose, one at a time: how many of them do the tests notice?

    python -m benchmarks.mutants [--json mutants.json] [--resume] [--only drawn|named] [--list] [--workers 1]

60 mutants are drawn, with a fixed seed and uniformly over sites, but at most 5 a file, from ``spir/ops``, ``passes``
and ``backends``. A site is

- comparison: an order or an equality; ``<`` becomes ``<=``, ``==`` becomes ``!=``;
- arithmetic: an operator or a minus; ``+`` becomes ``-``, ``*`` becomes ``+``, ``//`` becomes ``/``;
- integer: a whole number outside subscripts; n becomes n + 1;
- index: an axis, a subscript, a step or an end of a slice; axes and subscripts go to a neighbour, ends one further.

Left out is what computes nothing: docstrings, f-strings, what is raised or handed to ``error``, assertions,
annotations, decorators, ``corners``, ``__repr__`` and ``__str__``, ClassVar declarations and ``option(...)``. Left out
is also what any run would notice, which would flatter the rate: ``is`` and ``in``, ``|`` and ``@``, sums and products
of literal sequences, the -1 of ``reshape``. A mutant replaces characters where they stand; the rest of the file stays
byte for byte.

The named faults are written by hand: a line of the source, what stands there instead, and what that would mean. A line
that is no longer found is an error, so that the list cannot rot.

Every mutant is put into a copy of the tree, as git sees it, and the tests of the copy run in stages, fast ones first,
until one fails: without tests marked slow, those of ``tests/house`` and those of this script, and with hypothesis
stopping at the first example that fails. The tests must pass without a mutant first; that run also sets the time limit,
four times what a stage took and 300 s at least. A run beyond it, a crash and an import that fails count as caught, and
the result says which. Every verdict is written to ``--json`` as soon as it is known; ``--resume`` keeps those on the
same source.

The exit code is 1 when a named fault survives or fewer than 90 % of the drawn mutants are caught, and 2 when nothing
can be judged.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import queue
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs
from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("spir/ops/*.py", "passes/*.py", "backends/**/*.py")
CODE = ("spir", "passes", "backends", "frontends", "benchmarks", "tests")
OWN = ("benchmarks/mutants.py", "tests/unit/test_mutants.py")
KINDS = ("comparison", "arithmetic", "integer", "index")
DRAWN, PER_FILE, SEED = 60, 5, 0
WANTED = 0.9
SECONDS, SLACK = 300, 4
MEMORY = 12 * 2**30
ELSEWHERE = 70
CHILD = "from benchmarks.mutants import watch; raise SystemExit(watch())"

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
}
SILENT_FUNCTIONS = {"corners", "__repr__", "__str__"}
SILENT_CALLS = {"error", "unknown", "option", "note", "NotImplementedError"}
AXIS_CALLS = {"moveaxis", "swapaxes", "transpose", "permute", "unfold"}
AXIS_KEYWORDS = {"axis", "axes", "dim", "dims"}
SHAPE_CALLS = {"reshape", "view"}
BEFORE_OPERATOR = rb"(?:[\s)\\]|#[^\n]*\n)*"


@attrs.frozen
class Mutant:
    """One change of one file: the bytes from ``start`` on, which are ``old``, become ``new``."""

    name: str
    kind: str
    file: str
    line: int
    start: int
    old: str
    new: str
    meaning: str = ""

    def applied(self, source: bytes) -> bytes:
        """The file with the fault in it.

        Raises:
            LookupError: other bytes stand there.
        """
        old = self.old.encode()
        end = self.start + len(old)
        if source[self.start : end] != old:
            raise LookupError(f"{self.name}: {self.file}:{self.line} no longer reads {self.old!r}")
        return source[: self.start] + self.new.encode() + source[end:]

    def diff(self, source: bytes) -> tuple[str, ...]:
        """The lines before, with a minus, and after, with a plus."""
        before, after = source.decode().splitlines(), self.applied(source).decode().splitlines()
        found = list(difflib.unified_diff(before, after, lineterm="", n=0))[2:]
        return tuple(line for line in found if not line.startswith("@@"))


@attrs.frozen
class Fault:
    """A fault with a name: what stands in a file, exactly once, what is to stand there, and what this means."""

    name: str
    file: str
    old: str
    new: str
    meaning: str

    def placed(self, root: Path) -> Mutant:
        """The mutant of a tree.

        Raises:
            LookupError: the text is not there, or there more than once.
        """
        path = root / self.file
        source = path.read_bytes() if path.is_file() else b""
        found = source.count(self.old.encode())
        if found != 1:
            raise LookupError(f"{self.name}: {self.file} holds {found} times, not once:\n{self.old}")
        start = source.index(self.old.encode())
        line = source.count(b"\n", 0, start) + 1
        return Mutant(self.name, "named", self.file, line, start, self.old, self.new, self.meaning)


NAMED = (
    Fault(
        "weight-sign",
        "backends/torch_ops/_lowering.py",
        "return self.tensor(weight)\n",
        "return self.tensor(weight).abs()\n",
        "integer weights lose their sign on serial",
    ),
    Fault(
        "sign-bit",
        "spir/ops/encode.py",
        "frames[0] *= -1",
        "frames[0] *= 1",
        "the sign bit of two's complement counts positive",
    ),
    Fault(
        "half-removed",
        "passes/propagate_scales.py",
        " + 2 ** (grid - 1)",
        "",
        "requant rounds down instead of to the nearest",
    ),
    Fault(
        "tie-at-threshold",
        "spir/ops/_thinning.py",
        "fires = potential >= threshold",
        "fires = potential > threshold",
        "a potential at the threshold does not fire",
    ),
    Fault(
        "frame-late-in-encode",
        "spir/ops/encode.py",
        "np.arange(steps - 1, -1, -1)",
        "np.arange(steps, 0, -1)",
        "the bits come one frame late, and the last is lost",
    ),
    Fault(
        "frame-weight",
        "spir/types.py",
        "tuple(2 ** (steps - 1 - t) for t in range(steps))",
        "tuple(2 ** (steps - t) for t in range(steps))",
        "every frame weighs twice what it should, for the interpreter and all backends alike",
    ),
    Fault(
        "frame-threshold-in-hw",
        "backends/_hw_program.py",
        "threshold = 2 ** (steps - 1 - t)",
        "threshold = 2 ** (steps - t)",
        "hw writes the bits of a value one frame late",
    ),
    Fault(
        "padding-axes",
        "backends/torch_ops/conv2d.py",
        "F.pad(x, (left, right, top, bottom))",
        "F.pad(x, (top, bottom, left, right))",
        "uneven padding of rows goes to columns on serial",
    ),
    Fault(
        "shared-weight",
        "passes/fold_bn.py",
        "weight=Array.of(weight * channelwise(gain, weight.ndim))",
        "weight=Array.of(weight.setflags(write=True) or weight.__imul__(channelwise(gain, weight.ndim)))",
        "the fold overwrites weights that another layer shares",
    ),
    Fault(
        "concat-scale",
        "spir/ops/concat.py",
        "return Scale.of(value for row in rows for value in row)",
        "return scale_of(types[0])",
        "a concatenation takes the first operand's scale for all",
    ),
    Fault(
        "carried-bias",
        "passes/propagate_scales.py",
        "bias = own if bias is None else bias + own",
        "bias = own",
        "a bias that an operand lacks is lost at the next bias",
    ),
    Fault(
        "bias-without-border",
        "passes/propagate_scales.py",
        "bias = offset_behind(op, [c.bias for c in operands], shapes)\n",
        "bias = offset_behind(op, [c.bias for c in operands], shapes)\n"
        "        if bias is not None:\n"
        "            middle = tuple(slice(n // 2, n // 2 + 1) for n in bias.shape[1:])\n"
        "            bias = np.broadcast_to(bias[(slice(None), *middle)], bias.shape)\n",
        "a bias carried through a padded convolution is the same at the border as inside",
    ),
    Fault(
        "eps-dropped",
        "spir/ops/batch_norm.py",
        "gain = 1.0 / np.sqrt(self.var.values + self.eps)",
        "gain = 1.0 / np.sqrt(self.var.values)",
        "batch normalisation is folded without eps",
    ),
    Fault(
        "dead-channel",
        "passes/quantize.py",
        "live.max() if live.size else 1.0)",
        "0.0)",
        "a channel of zero weights has scale zero, or as good as zero",
    ),
    Fault(
        "pool-padding",
        "spir/ops/max_pool.py",
        'lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(np.int64).min',
        "lowest = 0",
        "padding wins against negative values",
    ),
    Fault(
        "tournament-without-zero",
        "passes/lower_max_pool.py",
        "over = self.neuron(self.auxiliary(Add(), a, minus), *span, code)",
        "over = self.auxiliary(Add(), a, minus)",
        "b + (a - b) in place of b + relu(a - b): the first player always wins",
    ),
    Fault(
        "clamp-short",
        "spir/ops/_threshold.py",
        "channelwise(divisors(div), rank)), lo, hi)",
        "channelwise(divisors(div), rank)), lo, hi - 1)",
        "the largest code is never reached",
    ),
    Fault(
        "prefix-does-not-fit",
        "spir/ranges.py",
        "        held = read.value | read.prefix\n",
        "        held = read.value\n",
        "hw takes a network although a prefix of its frames overflows the accumulator",
    ),
    Fault(
        "float32-too-far",
        "backends/torch_ops/_exactness.py",
        "if magnitude < EXACT_FLOAT32 and",
        "if magnitude < 4 * EXACT_FLOAT32 and",
        "float32 is used for sums beyond 2^24",
    ),
    Fault(
        "last-chunk",
        "backends/_hw_program.py",
        "range(0, samples, size)",
        "range(0, samples - size + 1, size)",
        "hw leaves out the samples that fill no whole chunk",
    ),
    Fault(
        "overwritten-operand",
        "backends/torch_ops/encode.py",
        "copy=True",
        "copy=False",
        "the encoder of serial uses up integers that another op reads",
    ),
    Fault(
        "bounds-without-border",
        "spir/ops/conv2d.py",
        "rows = reached(height, kh, self.stride[0], self.dilation[0], top, bottom)",
        "rows = reached(height, kh, self.stride[0], self.dilation[0], 0, 0)",
        "the interval rule forgets windows that hang over the border",
    ),
    Fault(
        "codes-joined",
        "spir/types.py",
        'if len(codes) > 1 and "bits" in codes:',
        'if len(codes) > 2 and "bits" in codes:',
        "trains whose frames weigh differently may be added",
    ),
    Fault(
        "types-unverified",
        "spir/verify.py",
        "if found != node.type:",
        "if found.shape != node.type.shape:",
        "a module may state ranges and scales that its ops do not have",
    ),
    Fault(
        "falling-law-hoisted",
        "passes/lower_max_pool.py",
        "bool((op.mul.values >= 0).all())",
        "bool(op.mul.values.size)",
        "a requant with a negative multiplier changes places with a maximum",
    ),
    Fault(
        "gain-lost",
        "passes/_gains.py",
        "weight * each.reshape(len(weight), inputs, *(1,) * (weight.ndim - 2))",
        "weight",
        "gains per channel are taken off and not folded into the weights",
    ),
    Fault(
        "half-of-scaled-terms",
        "spir/ops/_accumulation.py",
        "return (frame * raised + half) // low",
        "return (frame * raised) // low",
        "backends cut the low bits of scaled terms instead of rounding them",
    ),
    Fault(
        "end-of-a-register",
        "backends/_hw_registers.py",
        "return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1",
        "return -(2 ** (bits - 1)), 2 ** (bits - 1)",
        "registers of hw hold one number more than their bits",
    ),
    Fault(
        "least-scale",
        "passes/scale_integration.py",
        "[bits <= self.bits for bits",
        "[bits <= self.bits + 1 for bits",
        "the scale that is called guaranteed lets states overflow by one bit",
    ),
    Fault(
        "mean-of-rounding",
        "passes/scale_integration.py",
        "math.floor((x - o) / Fraction(k))",
        "math.floor((x + o) / Fraction(k))",
        "what rounding adds on average is added once more instead of taken out",
    ),
    Fault(
        "half-of-rot",
        "spir/ops/_thinning.py",
        "return 2 ** (self.rot - 1) if self.rot else 0",
        "return 0",
        "RoT cuts low bits instead of rounding them",
    ),
    Fault(
        "bias-cut-too-far",
        "spir/ops/_threshold.py",
        "lo * d + d - 1 - most",
        "lo * d + d - most",
        "the bias of a channel that is off is cut until its largest sum shows",
    ),
    Fault(
        "steps-of-a-concatenation",
        "passes/propagate_scales.py",
        " or self.concatenated(node)",
        "",
        "codes that meet in a concatenation take whole steps of their own",
    ),
)


class Sites(ast.NodeVisitor):
    """Every site of one file, as the mutant that stands for it."""

    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.found: list[Mutant] = []
        self._lines = [0]
        for line in source.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))
        self._index = False

    def add(self, kind: str, start: int, end: int, new: str) -> None:
        """One site."""
        old = self.source[start:end].decode()
        text = f"{self.file} {start} {old} {new}"
        name = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        line = self.source.count(b"\n", 0, start) + 1
        self.found.append(Mutant(name, kind, self.file, line, start, old, new))

    def begin(self, node: ast.expr) -> int:
        """The first byte of an expression."""
        return self._lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr) -> int:
        """The byte behind an expression."""
        assert node.end_lineno is not None  # the parser
        assert node.end_col_offset is not None  # gives both
        return self._lines[node.end_lineno - 1] + node.end_col_offset

    def operator(self, kind: str, left: ast.expr, symbols: tuple[str, str]) -> None:
        """The operator behind an operand."""
        old, new = symbols
        found = re.compile(BEFORE_OPERATOR + b"(" + re.escape(old.encode()) + b")").match(self.source, self.end(left))
        assert found is not None  # the parser saw it
        self.add(kind, found.start(1), found.end(1), new)

    def indices(self, nodes: Iterable[ast.AST]) -> None:
        """Visits what numbers axes or elements."""
        before, self._index = self._index, True
        for node in nodes:
            self.visit(node)
        self._index = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Defaults and body."""
        if node.name not in SILENT_FUNCTIONS:
            for part in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
                self.visit(part)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """The body."""
        for part in node.body:
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """The value, unless it declares a ClassVar."""
        if node.value is not None and "ClassVar" not in ast.unparse(node.annotation):
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Texts are left out."""

    def visit_Raise(self, node: ast.Raise) -> None:
        """Refusals are left out."""

    def visit_Assert(self, node: ast.Assert) -> None:
        """Assertions are left out."""

    def visit_Call(self, node: ast.Call) -> None:
        """Axes are indices; refusals and declarations of options are left out."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in SILENT_CALLS:
            return
        self.visit(node.func)
        given = [a for a in node.args if not (name in SHAPE_CALLS and ast.unparse(a) == "-1")]
        if name in AXIS_CALLS:
            self.indices(given)
        else:
            for argument in given:
                self.visit(argument)
        for keyword in node.keywords:
            if keyword.arg in AXIS_KEYWORDS:
                self.indices([keyword.value])
            else:
                self.visit(keyword.value)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """What is inside the brackets is an index."""
        self.visit(node.value)
        self.indices([node.slice])

    def visit_Slice(self, node: ast.Slice) -> None:
        """Ends that are no plain number go one further, too."""
        self.generic_visit(node)
        if isinstance(node.upper, (ast.Name, ast.Attribute, ast.Call, ast.Subscript)):
            start, end = self.begin(node.upper), self.end(node.upper)
            self.add("index", start, end, f"{self.source[start:end].decode()} + 1")
        for number in (node.lower, node.upper, node.step):
            if number is not None and (value := _number(number)) is not None:
                self.add("index", self.begin(number), self.end(number), str(value + 1 if value >= 0 else value - 1))

    def visit_Compare(self, node: ast.Compare) -> None:
        """Each operator of a chain."""
        for left, op in zip((node.left, *node.comparators), node.ops, strict=False):
            if type(op) in COMPARISONS:
                self.operator("comparison", left, COMPARISONS[type(op)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Arithmetic, but not that of sequences."""
        if type(node.op) in ARITHMETIC and not _sequence(node):
            self.operator("arithmetic", node.left, ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """Arithmetic, but not that of sequences."""
        if type(node.op) in ARITHMETIC and not _sequence(node.value):
            old, new = ARITHMETIC[type(node.op)]
            self.operator("arithmetic", node.target, (f"{old}=", f"{new}="))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """A minus, or a number below 0."""
        if _number(node) is not None:
            self._whole(node)
            return
        if isinstance(node.op, ast.USub):
            self.add("arithmetic", self.begin(node), self.begin(node) + 1, "+")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """A number from 0 on."""
        if _number(node) is not None:
            self._whole(node)

    def _whole(self, node: ast.expr) -> None:
        value = _number(node)
        assert value is not None  # the callers asked
        if not self._index:
            self.add("integer", self.begin(node), self.end(node), str(value + 1))
        else:
            self.add("index", self.begin(node), self.end(node), str(value - 1 if value else 1))


def _number(node: ast.AST) -> int | None:
    """The whole number that an expression writes down; True and False are none."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inside = _number(node.operand)
        return None if inside is None else -inside
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def _sequence(node: ast.AST) -> bool:
    """Whether an expression is made of a literal list, tuple or text."""
    if isinstance(node, ast.BinOp):
        return _sequence(node.left) or _sequence(node.right)
    text = isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    return text or isinstance(node, (ast.List, ast.Tuple, ast.ListComp, ast.JoinedStr))


def sites(file: str, source: bytes) -> list[Mutant]:
    """Every site of a file, in order of place; one mutant a place."""
    walk = Sites(file, source)
    walk.visit(ast.parse(source, file))
    return sorted({(m.start, len(m.old)): m for m in walk.found}.values(), key=lambda m: (m.start, len(m.old)))


def drawn(root: Path) -> list[Mutant]:
    """The mutants drawn from a tree: the first of each kind, then as they come, at most ``PER_FILE`` a file."""
    files = sorted({path.relative_to(root).as_posix() for pattern in SOURCES for path in root.glob(pattern)})
    order = [mutant for file in files for mutant in sites(file, (root / file).read_bytes())]
    random.Random(SEED).shuffle(order)
    first = [next(m for m in order if m.kind == kind) for kind in KINDS]
    taken: dict[str, Mutant] = {}
    held: Counter[str] = Counter()
    for mutant in (*first, *order):
        if len(taken) < DRAWN and held[mutant.file] < PER_FILE and mutant.name not in taken:
            taken[mutant.name] = mutant
            held[mutant.file] += 1
    return sorted(taken.values(), key=lambda m: (m.file, m.start, m.name))


def named(root: Path) -> list[Mutant]:
    """The named faults of a tree.

    Raises:
        LookupError: all those whose text is not there exactly once.
    """
    placed, lost = [], []
    for fault in NAMED:
        try:
            placed.append(fault.placed(root))
        except LookupError as reason:
            lost.append(str(reason))
    if lost:
        raise LookupError("\n".join(lost))
    return placed


@attrs.frozen
class Verdict:
    """What became of a mutant."""

    name: str
    kind: str
    file: str
    line: int
    diff: tuple[str, ...]
    meaning: str
    how: str
    """test, import, crash or timeout; empty where it survived."""
    by: str
    """The test that failed, where one did."""
    stage: str
    seconds: float

    @property
    def caught(self) -> bool:
        """Whether anything noticed."""
        return bool(self.how)


@attrs.frozen
class Run:
    """One stage of tests on a copy: how it failed, if it did, and at which tests."""

    how: str
    failed: tuple[str, ...]
    seconds: float
    tail: str


class _Failures:
    """A plug-in of pytest that notes what fails."""

    def __init__(self) -> None:
        self.failed: list[tuple[str, str]] = []

    def pytest_configure(self) -> None:
        """After the profile that `tests/conftest.py` loads: the same examples, not shrunk for minutes."""
        import hypothesis

        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.target]
        hypothesis.settings.register_profile("first", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("first")

    def pytest_collectreport(self, report: Any) -> None:
        """A file that does not import."""
        if report.failed:
            self.failed.append(("import", report.nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test that fails, or cannot begin or end."""
        if report.failed:
            self.failed.append(("test", report.nodeid))


def watch() -> int:
    """Runs pytest inside a copy and writes what failed; the first argument names the file, pytest has the rest.

    A fault that asks for all memory fails.
    """
    import resource

    import pytest

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    place, *arguments = sys.argv[1:]
    failures = _Failures()
    code = int(pytest.main(arguments, plugins=[failures]))
    origin = getattr(sys.modules.get("spir"), "__file__", None)
    if origin is not None and not Path(origin).resolve().is_relative_to(Path.cwd().resolve()):
        print(f"spir was imported from {origin}", file=sys.stderr)
        return ELSEWHERE
    Path(place).write_text(json.dumps(failures.failed), encoding="utf-8")
    return code


@attrs.frozen
class Copy:
    """A copy of the tree, which one worker has for itself; the files and tests ``without`` are left out."""

    root: Path
    without: tuple[str, ...] = ()

    @classmethod
    def of(cls, tree: Path, folder: Path, without: Sequence[str] = ()) -> Copy:
        """Every file and link that git holds, or would hold after ``git add``, compiled by content, not by date."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout
        root = folder / "tree"
        for name in sorted(set(listed.rstrip("\0").split("\0"))):
            if os.path.lexists(tree / name):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, root / name, follow_symlinks=False)
        return cls(root, tuple(without)).compiled()

    def again(self, folder: Path) -> Copy:
        """Another copy, of the same content."""
        shutil.copytree(self.root, folder / "tree", symlinks=True)
        return Copy(folder / "tree", self.without)

    def compiled(self) -> Copy:
        """Bytecode that Python checks against the content of its source: two mutants may share size and second."""
        folders = [name for name in CODE if (self.root / name).is_dir()]
        command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", *folders]
        subprocess.run(command, cwd=self.root, check=False, capture_output=True)
        return self

    @property
    def digest(self) -> str:
        """Of all code and tests but this script and its test; what is left out is named behind."""
        found = hashlib.blake2b(digest_size=8)
        for path in sorted(p for name in CODE for p in (self.root / name).rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts and name not in OWN:
                found.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        return " without ".join((found.hexdigest(), *self.without))

    @property
    def stages(self) -> dict[str, list[str]]:
        """The tests, those first that are fast and close to ops, passes and backends."""
        files, left_out = sorted((self.root / "tests").rglob("test_*.py")), (*OWN, *self.without)
        names = [name for p in files if (name := p.relative_to(self.root).as_posix()) not in left_out]
        names = [name for name in names if not name.startswith("tests/house/")]
        firsts = ("tests/unit/test_ops.py", "tests/ir/", "tests/unit/test_pass")
        fast = [name for head in firsts for name in names if name.startswith(head)]
        conformance = [name for name in names if name.startswith("tests/conformance/")]
        rest = [name for name in names if name not in fast and name not in conformance]
        rest.sort(key=lambda name: (not name.startswith("tests/properties/"), name.startswith("tests/golden/"), name))
        found = {"fast": list(dict.fromkeys(fast)), "conformance": conformance, "rest": rest}
        return {stage: tests for stage, tests in found.items() if tests}

    def test(self, tests: Sequence[str], limit: float | None) -> Run:
        """Runs tests up to the first failure; without a limit, all of them, whose bytecode is kept.

        Raises:
            RuntimeError: another spir than the copy's was imported.
        """
        folder = self.root.parent
        report, output = folder / "failed.json", folder / "output.txt"
        report.unlink(missing_ok=True)
        options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", f"--basetemp={folder / 'pytest'}"]
        options += [f"--deselect={name}" for name in self.without]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.root)}
        variables.pop("PYTEST_ADDOPTS", None)
        if limit is not None:
            options.append("-x")
            variables["PYTHONDONTWRITEBYTECODE"] = "1"
        start = time.perf_counter()
        with output.open("wb") as stream:
            command = [sys.executable, "-c", CHILD, str(report), *options, *tests]
            child = subprocess.Popen(
                command, cwd=self.root, env=variables, stdout=stream, stderr=stream, start_new_session=True
            )
            code = _ended(child, limit)
        seconds = time.perf_counter() - start
        tail = output.read_text(encoding="utf-8", errors="replace")[-3000:]
        if code == ELSEWHERE:
            raise RuntimeError(tail)
        if code is None:
            return Run("timeout", (), seconds, tail)
        ended = report.is_file()
        found = json.loads(report.read_text(encoding="utf-8")) if ended else []
        how = found[0][0] if found else "" if code == 0 else "import" if ended else "crash"
        return Run(how, tuple(test for _, test in found), seconds, tail)

    def judge(self, mutant: Mutant, limits: Mapping[str, float]) -> Verdict:
        """Puts a mutant in, runs the stages until one notices, and takes it out again."""
        path = self.root / mutant.file
        source = path.read_bytes()
        seconds, stage, run = 0.0, "", Run("", (), 0.0, "")
        path.write_bytes(mutant.applied(source))
        try:
            for stage, tests in self.stages.items():
                run = self.test(tests, limits[stage])
                seconds += run.seconds
                if run.how:
                    break
        finally:
            path.write_bytes(source)
        facts = (mutant.name, mutant.kind, mutant.file, mutant.line, mutant.diff(source), mutant.meaning)
        return Verdict(*facts, run.how, "".join(run.failed[:1]), stage if run.how else "", round(seconds, 1))


def _ended(child: subprocess.Popen[bytes], limit: float | None) -> int | None:
    """The exit code; None where the time was over and the child with its children was ended."""
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@attrs.frozen
class Record:
    """What ``--json`` holds: which source was judged, how long its tests take, and the verdicts."""

    digest: str
    baseline: dict[str, float]
    verdicts: dict[str, Verdict] = attrs.field(factory=dict)

    @classmethod
    def read(cls, path: Path, digest: str) -> Record:
        """What a file holds on this source; nothing where it is absent or on another."""
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if held.get("digest") != digest:
            return cls(digest, {})
        found: dict[str, Verdict] = {}
        for row in held["rows"]:
            del row["caught"]
            found[row["name"]] = Verdict(**{**row, "diff": tuple(row["diff"])})
        return cls(digest, held["baseline"], found)

    def holds(self, mutant: Mutant, root: Path) -> bool:
        """Whether a mutant was judged; one of the same name that changes something else is another."""
        found = self.verdicts.get(mutant.name)
        return found is not None and found.diff == mutant.diff((root / mutant.file).read_bytes())

    def write(self, path: Path) -> None:
        """The whole file or nothing."""
        rows = [{**attrs.asdict(v), "caught": v.caught} for v in self.verdicts.values()]
        text = json.dumps({"digest": self.digest, "baseline": self.baseline, "rows": rows}, indent=1)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)


def log(text: str) -> None:
    """A line with the time, to stderr."""
    print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}", file=sys.stderr, flush=True)


def enough(verdicts: Iterable[Verdict]) -> bool:
    """Whether every named fault was caught, and nine in ten of those drawn."""
    found = list(verdicts)
    lots = [v.caught for v in found if v.kind != "named"]
    return all(v.caught for v in found if v.kind == "named") and sum(lots) >= WANTED * len(lots)


def table(verdicts: Sequence[Verdict]) -> Table:
    """Caught and survived, by kind."""
    shown = Table(title="mutants that the tests noticed")
    shown.add_column("kind")
    for head in ("mutants", "caught", "survived", "by a test", "import", "crash", "timeout", "share", "median seconds"):
        shown.add_column(head, justify="right")
    groups = {kind: [v for v in verdicts if v.kind == kind] for kind in KINDS}
    groups = {**groups, "all drawn": [v for v in verdicts if v.kind != "named"]}
    groups["named"] = [v for v in verdicts if v.kind == "named"]
    for kind, found in groups.items():
        if found:
            hows = Counter(v.how for v in found)
            caught = len(found) - hows[""]
            times = sorted(v.seconds for v in found)
            counts = (len(found), caught, hows[""], *(hows[how] for how in ("test", "import", "crash", "timeout")))
            share, median = f"{100 * caught / len(found):.1f} %", f"{times[len(times) // 2]:.1f}"
            shown.add_row(kind, *map(str, counts), share, median)
    return shown


def listed(mutants: Iterable[Mutant], root: Path) -> Iterator[str]:
    """Each mutant in a few lines."""
    for mutant in mutants:
        meaning = f": {mutant.meaning}" if mutant.meaning else ""
        yield f"{mutant.name}  {mutant.kind}  {mutant.file}:{mutant.line}{meaning}"
        yield from (f"    {line}" for line in mutant.diff((root / mutant.file).read_bytes()))


def baseline(copy: Copy) -> dict[str, float]:
    """Seconds that each stage takes without a mutant.

    Raises:
        RuntimeError: tests that fail already.
    """
    seconds: dict[str, float] = {}
    failed: list[str] = []
    for stage, tests in copy.stages.items():
        run = copy.test(tests, None)
        seconds[stage] = round(run.seconds, 1)
        log(f"without a mutant, stage {stage} {'fails' if run.how else 'passes'} in {run.seconds:.0f} s")
        failed += run.failed or ([run.tail] if run.how else [])
    if failed:
        raise RuntimeError("\n".join(("these fail without a mutant; --without leaves tests out", *failed)))
    return seconds


def judged(mutants: Sequence[Mutant], copies: Sequence[Copy], limits: Mapping[str, float]) -> Iterator[Verdict]:
    """The verdicts, as they come."""
    if len(copies) == 1:
        yield from (copies[0].judge(mutant, limits) for mutant in mutants)
        return
    free: queue.Queue[Copy] = queue.Queue()
    for copy in copies:
        free.put(copy)

    def one(mutant: Mutant) -> Verdict:
        copy = free.get()
        try:
            return copy.judge(mutant, limits)
        finally:
            free.put(copy)

    with ThreadPoolExecutor(len(copies)) as pool:
        try:
            for done in as_completed([pool.submit(one, mutant) for mutant in mutants]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _wanted(root: Path, only: str | None, names: str | None) -> list[Mutant]:
    """The mutants asked for.

    Raises:
        LookupError: a named fault that no longer applies, or a name that no mutant has.
    """
    found = [*(named(root) if only != "drawn" else ()), *(drawn(root) if only != "named" else ())]
    if names is None:
        return found
    wanted = names.split(",")
    if lost := set(wanted) - {m.name for m in found}:
        raise LookupError(f"there is no mutant called {', '.join(sorted(lost))}; --list shows all")
    return [m for m in found if m.name in wanted]


def main() -> int:
    """Prints the table and the survivors; the exit code says whether enough were caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the verdicts here, too, each as soon as it is known")
    parser.add_argument("--resume", action="store_true", help="keep what --json holds on this source")
    parser.add_argument("--only", choices=("drawn", "named"), help="one of the two lists")
    parser.add_argument("--names", help="these mutants only, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--workers", type=int, default=1, help="copies of the tree that are tested side by side")
    parser.add_argument("--timeout", type=float, default=SECONDS, help="seconds that a stage may take at least")
    parser.add_argument("--without", action="append", default=[], help="a test file, or a test, to leave out; repeats")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a test run ends with this one
    if arguments.resume and not arguments.json:
        parser.error("--resume needs --json")
    try:
        if arguments.list:
            print("\n".join(listed(_wanted(ROOT, arguments.only, arguments.names), ROOT)))
            return 0
        return _run(arguments)
    except (LookupError, RuntimeError) as reason:
        log(f"nothing can be judged: {reason}")
        return 2


def _run(arguments: argparse.Namespace) -> int:
    """Judges what was asked for."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        first = Copy.of(ROOT, Path(folder) / "0", arguments.without)
        mutants = _wanted(first.root, arguments.only, arguments.names)
        source = first.digest
        record = Record.read(arguments.json, source) if arguments.resume else Record(source, {})
        missing = [m for m in mutants if not record.holds(m, first.root)]
        log(f"{len(missing)} of {len(mutants)} mutants to judge on source {record.digest}")
        if missing and not record.baseline:
            record.baseline.update(baseline(first))
        limits = {stage: max(arguments.timeout, SLACK * seconds) for stage, seconds in record.baseline.items()}
        copies = [first, *(first.again(Path(folder) / str(n)) for n in range(1, arguments.workers))]
        for count, verdict in enumerate(judged(missing, copies, limits), start=1):
            record.verdicts[verdict.name] = verdict
            what = f"caught by {verdict.by or verdict.how}" if verdict.caught else "SURVIVED"
            log(f"{count}/{len(missing)} {verdict.name} {verdict.file}:{verdict.line} {what} in {verdict.seconds} s")
            if arguments.json:
                record.write(arguments.json)
    found = [record.verdicts[m.name] for m in mutants]
    console = Console(width=160)
    console.print(table(found))
    for verdict in found:
        if not verdict.caught:
            text = "\n".join((f"survived: {verdict.name}  {verdict.file}:{verdict.line}", *verdict.diff))
            console.print(escape(text), highlight=False, soft_wrap=True)
    return int(not enough(found))


if __name__ == "__main__":
    raise SystemExit(main())
