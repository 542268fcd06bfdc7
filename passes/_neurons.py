"""Neuron models by the name that pipeline text gives them."""

from __future__ import annotations

from spir.discovery import find, names
from spir.errors import unknown
from spir.ops._neuron import Neuron


def neuron_names() -> list[str]:
    """Every neuron model that pipelines derive, sorted."""
    found = {n: find("ops", n) for n in names("ops") if n.startswith("neuron_")}
    return [n.removeprefix("neuron_").replace("_", "-") for n, op in found.items() if getattr(op, "derived", True)]


def neuron_class(name: str) -> type[Neuron]:
    """The neuron of a name.

    Raises:
        SpirError[option]: there is none.
    """
    if name not in neuron_names():
        raise unknown("neuron", name, neuron_names(), code="option")
    found = find("ops", f"neuron_{name.replace('-', '_')}")
    assert issubclass(found, Neuron)
    return found
