"""One file, one public class, one name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PASSES = sorted((ROOT / "passes").glob("*.py"))
PLUGINS = [
    path
    for path in [*sorted((ROOT / "spir" / "ops").glob("*.py")), *PASSES, *sorted((ROOT / "backends").glob("*.py"))]
    if not path.name.startswith("_")
]


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), path.name)


def public_classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in tree_of(path).body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def registered(owner: ast.ClassDef) -> str | None:
    """The text that the body of a class gives to `name`, if it does."""
    for node in owner.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if [ast.unparse(t) for t in targets if t] == ["name"] and isinstance(value, ast.Constant):
            return str(value.value)
    return None


def snake(name: str) -> str:
    """Conv2d -> conv2d, FoldBN -> fold_bn, GlobalMean -> global_mean."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@pytest.mark.parametrize(("name", "file"), [("Conv2d", "conv2d"), ("FoldBN", "fold_bn"), ("GlobalMean", "global_mean")])
def test_a_class_gives_its_file_its_name(name, file):
    assert snake(name) == file


def test_there_are_plug_ins():
    assert PLUGINS


@pytest.mark.parametrize("path", PLUGINS, ids=label)
def test_a_file_holds_one_public_class(path):
    found = [owner.name for owner in public_classes(path)]
    assert len(found) == 1, f"{label(path)} holds {found or 'no public class'}; a name that begins with _ is private"


@pytest.mark.parametrize("path", PLUGINS, ids=label)
def test_a_file_has_the_name_of_its_class(path):
    for owner in public_classes(path):
        name = registered(owner)
        expected = name.replace("-", "_") if name else snake(owner.name)
        assert path.stem == expected, f"{label(path)} holds {owner.name}, so its name is {expected}.py"


@pytest.mark.parametrize("path", PLUGINS, ids=label)
def test_module_and_class_say_what_they_are(path):
    assert ast.get_docstring(tree_of(path)), f"{label(path)} has no docstring"
    for owner in public_classes(path):
        assert ast.get_docstring(owner), f"{label(path)}: {owner.name} has no docstring"


@pytest.mark.parametrize("path", [p for p in PASSES if p in PLUGINS], ids=label)
def test_a_pass_opens_with_before_and_after(path):
    docstrings = [ast.get_docstring(node) or "" for node in (tree_of(path), *public_classes(path))]
    opened = any("->" in text.split("\n\n")[0] for text in docstrings)
    assert opened, f"{label(path)}: the first paragraph of the docstring shows no `before -> after`"
