"""Finds ops, passes, backends, frontends and recipes by their file name or their entry point.

``passes/fold_bn.py`` is the pass ``fold-bn``: nobody edits a list. Third parties join through the entry point
groups ``spir.ops``, ``spir.passes``, ``spir.backends``, ``spir.frontends`` and ``spir.recipes``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import EntryPoint, entry_points

from spir.errors import error, unknown


def spelled(kind: str, file_name: str) -> str:
    """The name users write for a file: ops keep underscores, all else takes hyphens where it is pipeline text."""
    return file_name.replace("_", "-") if kind in ("passes", "recipes") else file_name


@functools.cache
def owners(kind: str) -> dict[str, str | EntryPoint]:
    """Name -> module path or entry point, for one of ops, passes, backends, frontends, recipes.

    Raises:
        SpirError[name]: two owners claim one name.
    """
    package = importlib.import_module(f"spir.{kind}")
    found: dict[str, str | EntryPoint] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_") and not info.ispkg:
            found[spelled(kind, info.name)] = f"spir.{kind}.{info.name}"
    for point in entry_points(group=f"spir.{kind}"):
        if point.name in found:
            raise error(
                "name",
                f"two owners claim the name {point.name!r} among {kind}",
                owners=f"{describe(found[point.name])}\n{describe(point)}",
                fix="uninstall one of them, or rename its entry point",
            )
        found[point.name] = point
    return found


def describe(owner: str | EntryPoint) -> str:
    """Who owns a name, for messages."""
    return owner if isinstance(owner, str) else f"{owner.value} (entry point {owner.group})"


def names(kind: str) -> list[str]:
    """Every name of a kind, sorted."""
    return sorted(owners(kind))


@functools.cache
def find(kind: str, name: str) -> type:
    """The class that owns ``name`` among ``kind``.

    Raises:
        SpirError[name]: nobody does; the message names the nearest.
    """
    known = owners(kind)
    if name not in known:
        raise unknown(kind.removesuffix("es") if kind == "passes" else kind.removesuffix("s"), name, known)
    owner = known[name]
    if not isinstance(owner, str):
        try:
            loaded = owner.load()
        except (ImportError, AttributeError) as cause:
            raise error("name", f"{describe(owner)} does not load: {cause}", fix="repair or uninstall it") from cause
        if not isinstance(loaded, type):
            raise error("name", f"{describe(owner)} is no class", fix="let the entry point name a class")
        return loaded
    module = importlib.import_module(owner)
    own = [
        c
        for n, c in vars(module).items()
        if inspect.isclass(c) and c.__module__ == module.__name__ and not n.startswith("_")
    ]
    if len(own) != 1:
        raise error("name", f"{owner} defines {len(own)} public classes, and must define one", fix="one class a file")
    return own[0]
