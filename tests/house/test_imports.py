"""The import diagram: this table is the diagram, and the syntax trees keep to it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

GRAMMAR = ("spir.errors", "spir.options", "spir.types", "spir.ir")
OPS = ("spir.ops._", "spir.ops")
# a fused neuron equals three ops, and so knows them
NEURONS = ("spir.ops._neuron", "spir.ops.neuron_", "spir.ops.neuron_parallel", "spir.ops.neuron_matrix")
LANGUAGE = ("spir.discovery", *GRAMMAR, *OPS, *NEURONS)
BOUNDS = (*LANGUAGE, "spir.text", "spir.ranges", "spir.schedule", "spir.verify")
MEANING = (*BOUNDS, "spir.interpreter")
REWRITING = (*MEANING, "spir.probes", "spir.contracts", "spir.store", "spir.rewriting")
RESULTS = (
    *(
        *REWRITING,
        "spir.profile",
        "spir.packing",
        "spir.batches",
        "spir.measure",
        "spir.pipeline",
        "spir.backend",
        "spir.equality",
        "spir.difference",
    ),
    *("spir.costs", "spir.report", "spir.artifact", "spir.recipes"),
)

# Row -> the rows it may import, all of them above it. A row holds the module of that name, or what lies below the
# package of that name; one that ends in _ holds every module whose name begins so. The longest row wins. Siblings
# (plug-ins of one kind) never import each other: what they share is private, so its name begins with _.
DIAGRAM: dict[str, tuple[str, ...]] = {
    "spir.errors": (),
    "spir.discovery": ("spir.errors",),
    "spir.options": ("spir.errors",),
    "spir.profile": ("spir.errors",),
    "spir.types": ("spir.errors",),
    "spir.packing": ("spir.errors", "spir.types"),
    "spir.ir": ("spir.errors", "spir.discovery", "spir.types"),
    "spir.ops._": GRAMMAR,
    "spir.ops": (*GRAMMAR, "spir.ops._"),
    "spir.ops._neuron": (*GRAMMAR, *OPS),
    "spir.ops.neuron_": (*GRAMMAR, *OPS, "spir.ops._neuron"),
    "spir.ops.neuron_parallel": (*GRAMMAR, *OPS, "spir.ops._neuron"),
    # matrices are the published form of that neuron, and are fused to it
    "spir.ops.neuron_matrix": (*GRAMMAR, *OPS, "spir.ops._neuron", "spir.ops.neuron_parallel"),
    "spir.text": LANGUAGE,
    "spir.ranges": (*LANGUAGE, "spir.text"),
    "spir.schedule": (*LANGUAGE, "spir.text", "spir.ranges"),
    "spir.verify": (*LANGUAGE, "spir.text", "spir.ranges", "spir.schedule"),
    "spir.interpreter": BOUNDS,
    "spir.batches": ("spir.errors", "spir.discovery", "spir.types", "spir.ir"),
    "spir.store": ("spir.errors", "spir.discovery", "spir.types", "spir.ir"),
    "spir.probes": MEANING,
    "spir.contracts": (*MEANING, "spir.probes"),
    "spir.rewriting": (*MEANING, "spir.probes", "spir.contracts"),
    "spir.costs": (*BOUNDS, "spir.profile"),
    "spir.passes._": (*REWRITING, "spir.costs"),
    "spir.passes": (*REWRITING, "spir.costs", "spir.passes._"),
    "spir.measure": (*REWRITING, "spir.batches"),
    "spir.pipeline": (*REWRITING, "spir.measure"),
    "spir.backend": (*BOUNDS, "spir.packing"),
    "spir.backends._": (*BOUNDS, "spir.profile", "spir.backend"),
    "spir.backends.torch_ops": (*BOUNDS, "spir.backend"),
    "spir.backends": (
        *(*BOUNDS, "spir.profile", "spir.packing", "spir.batches", "spir.backend"),
        *("spir.backends._", "spir.backends.torch_ops"),
    ),
    "spir.frontends.modules": ("spir.errors",),
    "spir.frontends._": (*MEANING, "spir.frontends.modules"),
    "spir.frontends": (*MEANING, "spir.frontends._", "spir.frontends.modules"),
    "spir.recipes._": ("spir.errors", "spir.options"),
    "spir.recipes": (
        "spir.recipes._",
        "spir.errors",
        "spir.discovery",
        "spir.options",
        "spir.rewriting",
        "spir.pipeline",
    ),
    "spir.report": (*REWRITING, "spir.profile", "spir.costs", "spir.pipeline", "spir.backend"),
    "spir.artifact": (*REWRITING, "spir.pipeline", "spir.backend"),
    "spir.equality": (*MEANING, "spir.batches", "spir.backend"),
    "spir.difference": (*MEANING, "spir.probes", "spir.batches", "spir.backend"),
    "spir.driver": RESULTS,
    "spir": (*RESULTS, "spir.driver"),
    "spir.demo": (*RESULTS, "spir.driver", "spir"),
    "spir.conformance": (*RESULTS, "spir.driver", "spir"),
    "spir.cli": (*RESULTS, "spir.driver", "spir", "spir.demo", "spir.conformance"),
    "spir.__main__": ("spir.cli",),
}

# (importer, imported) -> why an arrow may point up, from inside a function alone.
UPWARD: dict[tuple[str, str], str] = {
    ("spir.ir", "spir.text"): "str(module) is its text, and the printer knows the IR",
}

PLUGINS = ("spir.ops", "spir.passes", "spir.backends", "spir.frontends", "spir.recipes")
SIBLINGS = (*PLUGINS, "spir.ops.neuron_")
WITH_TORCH = (
    *("spir.frontends", "spir.backends.serial", "spir.backends.parallel", "spir.backends.torch_ops", "spir.demo"),
    # and passes that train, by name
)
ON_TORCH_OPS = ("spir.backends.serial", "spir.backends.parallel", "spir.backends.torch_ops")
BY_STRING = ("spir.discovery", "spir.driver", "spir.cli")  # may import a module whose name is a string


class Import(NamedTuple):
    """One imported module and where it stands."""

    target: str
    line: int
    late: bool
    typing_only: bool


def files() -> dict[str, Path]:
    """Module name -> file, through the links."""
    found = {}
    for folder, _, names in os.walk(ROOT / "spir", followlinks=True):
        for name in names:
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return dict(sorted(found.items()))


FILES = files()
TREES = {module: ast.parse(path.read_text(encoding="utf-8"), path.name) for module, path in FILES.items()}
PACKAGES = {module for module, path in FILES.items() if path.name == "__init__.py"}


def within(module: str, row: str) -> bool:
    return module.startswith(row) if row.endswith("_") else module == row or module.startswith(row + ".")


def row_of(module: str) -> str | None:
    """The longest row that holds a module; the row `spir` holds itself alone."""
    rows = [row for row in DIAGRAM if within(module, row) and (row != "spir" or module == "spir")]
    return max(rows, key=len, default=None)


def unit_of(module: str) -> str | None:
    """What may import its own parts: a plug-in by its name, or else a whole row."""
    row = row_of(module)
    return ".".join(module.split(".")[:3]) if row in SIBLINGS else row


def imports(tree: ast.AST, *, late: bool = False, typing_only: bool = False) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, late, typing_only)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(full if full in FILES else str(node.module), node.lineno, late, typing_only)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from imports(ast.Module(node.body, []), late=late, typing_only=True)
            yield from imports(ast.Module(node.orelse, []), late=late, typing_only=typing_only)
        else:
            inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(node, late=inside, typing_only=typing_only)


def strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Every string constant that is no docstring."""
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node


def plugin_names(package: str) -> set[str]:
    """The file names of the plug-ins of one kind."""
    inside = [module.removeprefix(package + ".") for module in FILES if module.startswith(package + ".")]
    return {name for name in inside if "." not in name and not name.startswith("_")}


def test_the_diagram_itself_points_one_way():
    seen: set[str] = set()
    for row, below in DIAGRAM.items():
        assert set(below) <= seen, f"{row} may import {set(below) - seen}, which stand below it in the table"
        seen.add(row)
    assert all(reason for reason in UPWARD.values())


@pytest.mark.parametrize("module", FILES)
def test_every_module_stands_in_the_diagram(module):
    assert row_of(module), f"{module} stands in no row of DIAGRAM: add a row that says what it may import"


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    allowed = DIAGRAM.get(row_of(module) or "", ())
    for found in imports(TREES[module]):
        if not within(found.target, "spir"):
            continue
        row = row_of(found.target)
        where = f"{module}:{found.line} imports {found.target}"
        assert row, f"{where}, which stands in no row of DIAGRAM"
        late = (found.late or found.typing_only) and (module, found.target) in UPWARD
        own = unit_of(found.target) == unit_of(module)
        assert row in allowed or own or late, f"{where}; {row_of(module)} may import {', '.join(allowed) or 'nothing'}"


def test_every_upward_arrow_is_used():
    used = {(module, found.target) for module in FILES for found in imports(TREES[module])}
    assert set(UPWARD) <= used, f"UPWARD excuses imports that are gone: {set(UPWARD) - used}"


@pytest.mark.parametrize("package", PLUGINS)
def test_the_package_of_a_kind_of_plug_in_lists_nothing(package):
    assert package in PACKAGES, f"{package} has no __init__.py"
    found = [found.target for found in imports(TREES[package]) if found.target != "__future__"]
    assert not found, f"{package} imports {found}: plug-ins are found by their file name"


@pytest.mark.parametrize("module", FILES)
def test_third_parties_stand_where_they_belong(module):
    for found in imports(TREES[module]):
        where = f"{module}:{found.line} imports {found.target}"
        top = found.target.split(".")[0]
        if top == "torch" and not found.typing_only:
            assert any(within(module, home) for home in WITH_TORCH), f"{where}; torch stands only in {WITH_TORCH}"
        if top in ("hypothesis", "pytest"):
            assert within(module, "spir.conformance"), f"{where}; the extra `conformance` alone brings it"
        assert top not in ("passes", "backends", "frontends"), f"{where}; its name is spir.{found.target}"


@pytest.mark.parametrize("module", FILES)
def test_modules_are_imported_by_string_in_few_places(module):
    if module in BY_STRING:
        return
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")[-1]
            assert called not in ("import_module", "__import__"), f"{module}:{node.lineno} imports by a string"
    for node in strings(TREES[module]):
        named = any(str(node.value).startswith(f"{package}.") for package in PLUGINS)
        assert not named, f"{module}:{node.lineno} names {node.value!r}; only the driver names plug-ins by module"


@pytest.mark.parametrize("module", [m for m in FILES if within(m, "spir.backends")])
def test_backends_share_no_arithmetic_with_the_interpreter(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Attribute):
            assert node.attr != "reference", f"{module}:{node.lineno} uses an op's reference"
    for found in imports(TREES[module]):
        assert not within(found.target, "spir.interpreter"), f"{module}:{found.line} imports the interpreter"
        if within(found.target, "spir.backends.torch_ops"):
            at_home = any(within(module, home) for home in ON_TORCH_OPS)
            assert at_home, f"{module}:{found.line}: torch_ops serves {ON_TORCH_OPS} alone"


@pytest.mark.parametrize("module", [m for m in FILES if within(m, "spir.passes")])
def test_no_pass_names_a_backend(module):
    neurons = {op.removeprefix("neuron_") for op in plugin_names("spir.ops") if op.startswith("neuron_")}
    backends = plugin_names("spir.backends") - neurons  # a word for both, such as parallel, may mean the neuron
    for node in strings(TREES[module]):
        assert node.value not in backends, f"{module}:{node.lineno} names the backend {node.value}"


def test_importing_spir_imports_neither_torch_nor_hypothesis():
    code = "import sys, spir; print(*sorted({'torch', 'hypothesis', 'pytest'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == []
