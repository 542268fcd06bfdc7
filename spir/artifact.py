"""A saved network: a folder with module.spir, weights.safetensors, journal.json and manifest.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from spir import store
from spir.errors import SpirError, error, located
from spir.ir import Module
from spir.pipeline import Entry
from spir.text import parse, show

FORMAT = "spir-artifact"
VERSION = 1
MANIFEST = "manifest.json"
FILES = ("module.spir", "weights.safetensors", "journal.json")


@attrs.frozen
class Artifact:
    """What a folder holds: the module, its journal, the backend's text, and where it came from."""

    module: Module
    journal: tuple[Entry, ...]
    backend: str
    source: Mapping[str, str]


def write(path: Path, saved: Artifact) -> None:
    """Writes beside ``path`` and renames at the end, so that a failure leaves an older artifact whole.

    Raises:
        SpirError[artifact]: ``path`` holds something else. SpirError[io]: the disk refuses.
    """
    path = path.resolve() if path.is_symlink() else path  # the folder is replaced, not the link to it
    _check_target(path)
    contents = {
        "module.spir": show(saved.module).encode(),
        "weights.safetensors": store.to_bytes(saved.module.arrays()),
        "journal.json": json.dumps([attrs.asdict(e) for e in saved.journal], indent=1, allow_nan=False).encode(),
    }
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "backend": saved.backend,
        "source": dict(saved.source),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    contents[MANIFEST] = json.dumps(manifest, indent=1).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as cause:
        raise error("io", f"{path} cannot be written: {cause.strerror}", fix="choose another place") from None
    backup = aside.with_name(f"{aside.name}.old")
    try:
        for name, content in contents.items():
            store.write_aside(aside / name, content)
        aside.chmod(0o755)
        _swap(aside, path, backup)
    except OSError as cause:
        raise error("io", f"{path} cannot be written: {cause.strerror}", fix="choose another place") from None
    finally:
        if backup.exists() and not path.exists():  # interrupted between the two renames of `_swap`
            with contextlib.suppress(OSError):
                backup.rename(path)
        if path.exists():
            shutil.rmtree(backup, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _swap(new: Path, path: Path, backup: Path) -> None:
    if path.exists():
        path.rename(backup)
    new.rename(path)


def _check_target(path: Path) -> None:
    if path.is_file():
        raise error("artifact", f"{path} is a file, and an artifact is a folder", fix="choose another name")
    if path.is_dir() and any(path.iterdir()):
        try:
            _manifest(path)
        except SpirError:
            raise error(
                "artifact",
                f"{path} holds files that are no artifact, and nothing there will be overwritten",
                fix="choose an empty or new folder",
            ) from None
        if foreign := sorted({file.name for file in path.iterdir()} - {*FILES, MANIFEST}):
            raise error(
                "artifact",
                f"{path} holds {', '.join(foreign[:3])} beside an artifact, and nothing there will be overwritten",
                fix="move that away, or choose another folder",
            )


def read(path: Path) -> Artifact:
    """Reads and verifies the whole folder.

    Raises:
        SpirError[artifact]: not an artifact, a newer one, or one whose files were altered. SpirError[io]
    """
    manifest = _manifest(path)
    contents = {name: store.read(path / name) for name in FILES}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != manifest["sha256"].get(name):
            raise error("artifact", f"{path / name} is damaged: its checksum differs", fix="save the network again")
    with located(at=str(path / "module.spir")):
        weights = store.from_bytes(contents["weights.safetensors"], path / "weights.safetensors")
        try:
            text = contents["module.spir"].decode()
        except UnicodeDecodeError:
            raise error("artifact", "this is no text", fix="save the network again") from None
        module = parse(text, weights)
    try:
        journal = tuple(_entry(**entry) for entry in json.loads(contents["journal.json"]))
    except (ValueError, TypeError, RecursionError):
        raise error("artifact", f"{path / 'journal.json'} is no journal", fix="save the network again") from None
    return Artifact(module, journal, manifest["backend"], manifest["source"])


def _entry(**given: Any) -> Entry:
    """A journal entry of the kinds that `write` wrote; else TypeError."""
    entry = Entry(**given)
    texts = (entry.step, entry.contract, entry.checked, entry.value)
    numbers = (entry.seconds, *(n for n in (entry.largest, entry.relative) if n is not None))
    tables = (entry.before, entry.after)
    for kind, values in ((str, texts), ((int, float), numbers), (dict, tables)):
        if not all(isinstance(value, kind) for value in values):
            raise TypeError(given)
    return entry


def _manifest(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise error("io", f"{path} is not there", fix="check the path")
    if not (path / MANIFEST).is_file():
        raise error("artifact", f"{path} is no artifact: there is no {MANIFEST}", fix="give a folder that save() wrote")
    try:
        manifest = json.loads(store.read(path / MANIFEST))
    except (ValueError, RecursionError):
        raise error("artifact", f"{path / MANIFEST} is damaged", fix="save the network again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise error("artifact", f"{path} is no artifact of SPIR", fix="give a folder that save() wrote")
    version = manifest.get("version")
    if version != VERSION:
        newer = isinstance(version, int) and version > VERSION
        raise error(
            "artifact",
            f"{path} has format version {version}, and this SPIR reads {VERSION}",
            fix="update SPIR" if newer else "save the network again",
        )
    kinds = {"backend": str, "source": dict, "sha256": dict}
    if not all(isinstance(manifest.get(key), kind) for key, kind in kinds.items()):
        raise error("artifact", f"{path / MANIFEST} is damaged", fix="save the network again")
    return manifest
