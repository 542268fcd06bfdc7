"""Typed options, the same for passes, backends and recipes: attrs fields that print, parse and explain themselves."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import attrs

from spir.errors import SpirError, error, raise_all, unknown

T = TypeVar("T")
Scalar = bool | int | float | str
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]*\Z")
_WORDS = {True: "on", False: "off"}
_RESERVED = ("on", "off", "true", "false", "none")  # what pipeline text reads as something else than a word


def option(
    default: Any, doc: str, *, ge: float | None = None, le: float | None = None, one_of: tuple[str, ...] = ()
) -> Any:
    """An attrs field of a pass, backend or recipe: a default, a sentence, and the values it takes."""
    return attrs.field(
        default=default, kw_only=True, metadata={"doc": doc, "ge": ge, "le": le, "one_of": one_of}, validator=_validate
    )


def _validate(instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    meta, kind = attribute.metadata, _kinds(type(instance), attribute.name)
    where = f"{getattr(type(instance), 'name', type(instance).__name__)}{{{attribute.name}}}"
    if value is None and type(None) in kind:
        return
    accepted = tuple(k for k in kind if k is not type(None))
    numeric = isinstance(value, int) and not isinstance(value, bool) and float in accepted
    if not (numeric or any(type(value) is k for k in accepted)):
        wanted = " or ".join("on/off" if k is bool else k.__name__ for k in accepted)
        raise error("option", f"{where} takes {wanted}, not {spell(value)}", fix=meta["doc"])
    if meta["one_of"] and value not in meta["one_of"]:
        refusal = unknown(f"value of {where} called", str(value), meta["one_of"], code="option")
        raise refusal
    low, high = meta["ge"], meta["le"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):  # so NaN is outside too
        span = f"{'' if low is None else low}..{'' if high is None else high}"
        raise error("option", f"{where} = {spell(value)} is outside {span}", fix=f"{meta['doc']}; take one of {span}")


def limits(a: attrs.Attribute[Any]) -> str:
    """The values that an option takes, where they are limited: ``a, b`` or ``2..16``."""
    low, high = a.metadata["ge"], a.metadata["le"]
    if a.metadata["one_of"]:
        return ", ".join(a.metadata["one_of"])
    return "" if low is None and high is None else f"{'' if low is None else low}..{'' if high is None else high}"


def _kinds(owner: type, name: str) -> tuple[type, ...]:
    hint = typing.get_type_hints(owner)[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def fields(owner: type) -> dict[str, attrs.Attribute[Any]]:
    """The options of a class, by name."""
    return {a.name: a for a in attrs.fields(owner) if "doc" in a.metadata}


def build(owner: type[T], values: Mapping[str, Scalar]) -> T:
    """An instance from parsed options.

    Raises:
        SpirError[option]: an unknown option, a value of the wrong kind or out of range; all of them at once.
    """
    known = fields(owner)
    label = getattr(owner, "name", owner.__name__)
    refusals: list[SpirError] = []
    meant: dict[str, Scalar] = {}
    for name, value in values.items():
        if name not in known:
            refusals.append(unknown(f"option of {label} called", name, known, code="option"))
            continue
        # on and off are words where the option is one, such as hw{collapse=off}
        word = isinstance(value, bool) and bool not in _kinds(owner, name) and str in _kinds(owner, name)
        meant[name] = _WORDS[bool(value)] if word else value
        try:
            _validate(object.__new__(owner), known[name], meant[name])
        except SpirError as refusal:
            refusals.append(refusal)
    raise_all(refusals)
    return owner(**meant)


def spell(value: Scalar | None) -> str:
    """A value as pipeline text writes it."""
    if isinstance(value, bool):
        return _WORDS[value]
    if isinstance(value, str):
        return value if _PLAIN.match(value) and value not in _RESERVED else json.dumps(value)
    return "none" if value is None else repr(value)


def spelled(instance: Any, *, every: bool = False) -> str:
    """``{bits = 8}`` without the options that have their default; with ``every``, all options."""
    shown = []
    for name, a in fields(type(instance)).items():
        value = getattr(instance, name)
        if every or value != a.default:
            shown.append(f"{name}={value if value in a.metadata['one_of'] else spell(value)}")
    return "{" + ", ".join(shown) + "}" if shown else ""
