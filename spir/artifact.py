"""A saved network: a folder with module.spir, weights.safetensors, journal.json and manifest.json."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from spir import store
from spir.errors import SpirError, error, located
from spir.ir import Module
from spir.pipeline import Entry, Stage
from spir.text import parse, show

FORMAT = "spir-artifact"
VERSION = 1
MANIFEST = "manifest.json"
STAGE = re.compile(r"\d\d+-.+\.(spir|safetensors)")
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


def write_stages(path: Path, stages: Sequence[Stage]) -> None:
    """Writes ``00-frontend.spir``, ``01-<pass>.spir`` and so on, each with its arrays in a ``.safetensors`` beside it.

    Stages of an older compilation are removed first.

    Raises:
        SpirError[artifact]: the folder holds anything else, or there are no stages. SpirError[io]: the disk refuses.
    """
    if not stages:
        raise error("artifact", "there are no stages: a saved network holds its last module only", fix="compile it")
    if path.is_file():
        raise error("artifact", f"{path} is a file, and stages go into a folder", fix="choose another name")
    older = sorted(path.iterdir()) if path.is_dir() else []
    if foreign := [file.name for file in older if not STAGE.fullmatch(file.name)]:
        raise error(
            "artifact",
            f"{path} holds {', '.join(foreign[:3])}, and stages go into a folder of their own",
            fix="choose an empty or new folder",
        )
    for file in older:
        file.unlink()
    for index, stage in enumerate(stages):
        target = path / f"{index:02d}-{stage.name}.spir"
        store.write_aside(target.with_suffix(".safetensors"), store.to_bytes(stage.module.arrays()))
        store.write_aside(target, show(stage.module).encode())


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
    """A journal entry of the kinds that `write` wrote, with or without mean and notes; else TypeError."""
    notes = given.pop("notes", [])
    entry = Entry(**given, notes=tuple(notes))
    texts = (entry.step, entry.contract, entry.checked, entry.value, *entry.notes)
    numbers = (entry.seconds, *(n for n in (entry.largest, entry.relative, entry.mean) if n is not None))
    tables = (entry.before, entry.after)
    for kind, values in ((str, texts), ((int, float), numbers), (dict, tables), (list, (notes,))):
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
