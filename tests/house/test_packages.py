"""What is shipped: the wheel, the sdist, and the wheel that the sdist gives."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

pytestmark = pytest.mark.xdist_group("packages")  # one build for them all

MEGABYTE = 1_000_000
LINKS = {"passes", "backends", "frontends"}
DATA = {".lark", ".toml", ".safetensors", ".npz", ".json", ".typed"}


def source_of(path: Path) -> str | None:
    """The place in the package of a tracked file, if it has one."""
    if path.parts[0] in LINKS:
        path = "spir" / path
    inside = path.parts[0] == "spir" and (path.suffix in {".py", *DATA} or path.name == "py.typed")
    return path.as_posix() if inside else None


@pytest.fixture(scope="module")
def expected(tracked) -> set[str]:
    return {place for path in tracked if (place := source_of(path))}


@pytest.fixture(scope="module")
def built(repository, tracked, tmp_path_factory) -> Path:
    """The sdist, and the wheel built from it, of a copy that holds what git holds."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for path in tracked:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / path, copy / path, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    shown = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


def test_links_are_relative_and_held_by_git(repository, tracked):
    for name in LINKS:
        assert Path("spir", name) in tracked, f"git ignores spir/{name}"
        assert (repository / "spir" / name).readlink() == Path("..", name)


def test_the_wheel_holds_the_package_and_nothing_else(wheel, expected):
    names = zipfile.ZipFile(wheel).namelist()
    info = {name for name in names if PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert set(names) - info == expected
    assert {PurePosixPath(name).name for name in info} >= {"METADATA", "WHEEL", "LICENSE", "entry_points.txt"}


def test_the_wheel_holds_plug_ins_grammars_and_the_demo(wheel):
    names = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    for folder in sorted(LINKS):
        inside = [p for p in names if p.parts[:2] == ("spir", folder) and p.name != "__init__.py"]
        assert inside, f"the wheel holds nothing of {folder}/"
    assert {p.suffix for p in names if p.parent == PurePosixPath("spir")} >= {".py", ".lark"}
    assert {p.suffix for p in names if p.parent == PurePosixPath("spir/demo")} >= {".py", ".safetensors"}
    assert PurePosixPath("spir/py.typed") in names


def test_the_sdist_holds_the_package_and_what_builds_it(built, expected):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        assert not [m.name for m in archive if m.issym() or m.islnk()], "the sdist holds links"
        names = {PurePosixPath(*PurePosixPath(m.name).parts[1:]).as_posix() for m in archive if m.isfile()}
    assert {name for name in names if name.startswith("spir/")} == expected
    assert names >= {"pyproject.toml", "README.md", "LICENSE"}
    assert not [n for n in names if PurePosixPath(n).parts[0] in {"benchmarks", "tests", "docs", *LINKS}]


def test_both_are_small(built):
    for path in built.iterdir():
        assert path.stat().st_size < 3 * MEGABYTE, f"{path.name} has {path.stat().st_size} bytes"


def test_the_wheel_finds_its_plug_ins(wheel, expected, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import sys, spir, spir.discovery as d; print(spir.__file__, *d.names('passes'), sep='\\n')"
    path = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-P", "-c", code]
    shown = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    where, *passes = shown.stdout.split()
    assert Path(where).is_relative_to(tmp_path)
    files = [PurePosixPath(name) for name in expected if name.startswith("spir/passes/")]
    assert set(passes) >= {p.stem.replace("_", "-") for p in files if len(p.parts) == 3 and p.name[0] != "_"}
