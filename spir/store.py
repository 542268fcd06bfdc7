"""Arrays on disk: a safetensors file, integers in the smallest type that holds them, written aside and renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from spir.errors import error
from spir.ir import Array

_INTEGERS = (np.int8, np.int16, np.int32, np.int64)


def to_bytes(arrays: Mapping[str, Array]) -> bytes:
    """The content of a safetensors file; the same arrays give the same bytes."""
    return save({name: _narrow(array) for name, array in sorted(arrays.items())})


def _narrow(array: Array) -> np.ndarray:
    values = array.values
    if not array.integral or not values.size:
        return values
    kind = next(k for k in _INTEGERS if np.iinfo(k).min <= values.min() and values.max() <= np.iinfo(k).max)
    return values.astype(kind)


def from_bytes(content: bytes, path: Path) -> dict[str, Array]:
    """The arrays of a safetensors file.

    Raises:
        SpirError[artifact]: not such a file, or a damaged one.
    """
    try:
        return {name: Array.of(values) for name, values in load(content).items()}
    except (SafetensorError, KeyError, ValueError) as cause:
        raise error("artifact", f"{path} is no safetensors file: {cause}", fix="save the network again") from None


def write_aside(path: Path, content: bytes) -> None:
    """Writes a whole file or nothing: a temporary file beside it takes its name at the end.

    Raises:
        SpirError[io]: the disk refuses; an existing file stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as cause:
        raise error("io", f"{path} cannot be written: {cause.strerror}", fix="choose another place") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except OSError as cause:
        Path(name).unlink(missing_ok=True)
        raise error("io", f"{path} cannot be written: {cause.strerror}", fix="choose another place") from None


def read(path: Path) -> bytes:
    """A file's content.

    Raises:
        SpirError[io]: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as cause:
        raise error("io", f"{path} cannot be read: {cause.strerror}", fix="check the path") from None
