"""What a chip can hold: widths, limits and energies as data, one TOML file a chip, each figure with its source."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import attrs

from spir.errors import SpirError, error, raise_all, unknown

HOME = Path(__file__).parent / "profiles"
WIDEST = 64
OVERFLOWS = ("saturate", "wrap", "error")
REQUANTS = ("any", "multiplier", "divisor", "shift")
ASSUMED = "ASSUMED"


def profiles() -> list[str]:
    """The names of the profiles that come with SPIR, sorted."""
    return sorted(path.stem for path in HOME.glob("*.toml"))


Reading = Callable[[Any], Any]
"""What a figure in a file stands for; raises ValueError with what is wanted instead."""


def _whole(low: int, high: int) -> Reading:
    def read(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number within {low}..{high}")
        return value

    return read


def _limit(value: Any) -> int | None:
    if value is None or value == "none":
        return None
    if type(value) is not int or value < 1:
        raise ValueError('a whole number from 1 on, or "none"')
    return value


def _word(*known: str) -> Reading:
    def read(value: Any) -> str:
        if value not in known:
            raise ValueError("one of " + ", ".join(known))
        return str(value)

    return read


def _switch(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def _energy(value: Any) -> float | None:
    if value is None or value == "none":
        return None
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ValueError("picojoules, 0 or more")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value


def _texts(value: Any) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(v, str) and v.strip() for v in value.values()):
        raise ValueError("a table of texts, one for each figure")
    return MappingProxyType(dict(value))


def _accept(_instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Refuses what the figure's reading refuses."""
    try:
        attribute.metadata["read"](value)
    except ValueError as wanted:
        raise _wrong(attribute.name, value, str(wanted)) from None


def _figure(read: Reading, **default: Any) -> Any:
    """A field of a profile, by what reads it."""
    return attrs.field(kw_only=True, metadata={"read": read}, validator=_accept, **default)


def _wrong(name: str, value: Any, wanted: str) -> SpirError:
    return error("profile", f"{name} = {value!r} is not {wanted}", fix=f"give {name} {wanted}")


@attrs.frozen
class Profile:
    """One chip: what its registers and memories hold, and what its operations cost.

    Attributes:
        name: of the chip.
        weight_bits: bits of a weight, two's complement.
        sum_bits: bits of the register in which the weight sum of one time step is formed, two's complement.
        state_bits: bits of the register that a neuron keeps from step to step, two's complement.
        overflow: what the registers do with a number that they do not hold: saturate, wrap (two's complement), or
            error, where it must not happen.
        fan_in: synapses of one neuron at most; None: no fixed number.
        signed_spikes: whether spikes of -1 travel.
        steps: time steps of one train at most; None: no fixed number.
        requant: how a state becomes a code. any: every integer law; multiplier: by an integer and a shift; divisor: by
            counting how often an integer goes into the state, without a multiplier; shift: by a power of two alone.
        multiplier_bits: bits of the magnitude of a multiplier, which may be negative (multiplier only).
        product_bits: bits of the register that holds multiplier x state + offset, two's complement (multiplier only).
        largest_divisor: (divisor only).
        synaptic_operation_pj: picojoules of one spike over one synapse; None: not known.
        neuron_update_pj: picojoules of one update of one neuron; None: not known.
        source: where each figure comes from; a text that begins with ASSUMED marks a guess.
    """

    name: str = _figure(_text)
    weight_bits: int = _figure(_whole(1, WIDEST))
    sum_bits: int = _figure(_whole(2, WIDEST))
    state_bits: int = _figure(_whole(2, WIDEST))
    overflow: str = _figure(_word(*OVERFLOWS))
    fan_in: int | None = _figure(_limit)
    signed_spikes: bool = _figure(_switch)
    steps: int | None = _figure(_limit)
    requant: str = _figure(_word(*REQUANTS))
    multiplier_bits: int | None = _figure(_limit, default=None)
    product_bits: int | None = _figure(_limit, default=None)
    largest_divisor: int | None = _figure(_limit, default=None)
    synaptic_operation_pj: float | None = _figure(_energy, default=None)
    neuron_update_pj: float | None = _figure(_energy, default=None)
    source: Mapping[str, str] = attrs.field(kw_only=True, factory=dict, metadata={"read": _texts}, validator=_accept)

    def __attrs_post_init__(self) -> None:
        raise_all(_of_kind(self))

    @property
    def figures(self) -> dict[str, Any]:
        """What is stated, by name; a limit that is none, and a price that is not known, are left out."""
        return attrs.asdict(self, filter=lambda a, value: a.name not in ("name", "source") and value is not None)

    @property
    def assumed(self) -> tuple[str, ...]:
        """The figures that are guesses."""
        return tuple(name for name, text in self.source.items() if text.startswith(ASSUMED))

    @classmethod
    def load(cls, name: str) -> Self:
        """A profile by its name, or by the path of a ``.toml`` file, which ends so.

        Raises:
            SpirError[option]: no profile has that name. SpirError[io]: the file cannot be read. SpirError[profile]: a
                figure that is unknown, missing, of the wrong kind or impossible; all of them at once.
        """
        path = Path(name) if name.endswith(".toml") else HOME / f"{name}.toml"
        if not name.endswith(".toml") and name not in profiles():
            refusal = unknown("profile", name, profiles(), code="option")
            raise refusal.note("also", "a path that ends in .toml names a profile of your own")
        try:
            given = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
            raise error("profile", f"{path} is no TOML: {cause}", fix=f"start from {HOME / 'ideal.toml'}") from None
        except OSError as cause:
            reason = cause.strerror or type(cause).__name__
            fix = f"name a file that is there, or one of: {', '.join(profiles())}"
            raise error("io", f"the profile {path} cannot be read: {reason}", fix=fix) from None
        try:
            return cls.read(given)
        except SpirError as refusal:
            raise refusal.note("at", str(path)) from None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """From the tables of a file.

        Raises:
            SpirError[profile]: see `load`.
        """
        known = {a.name: a for a in attrs.fields(cls)}
        read: dict[str, Any] = {}
        refusals = [unknown("figure of a profile called", name, known, code="profile") for name in given.keys() - known]
        for name, a in known.items():
            if name not in given:
                if a.default is attrs.NOTHING:
                    refusals.append(error("profile", f"the profile has no {name}", fix=f"add {name} = ..."))
                continue
            try:
                read[name] = a.metadata["read"](given[name])
            except ValueError as wanted:
                refusals.append(_wrong(name, given[name], str(wanted)))
        raise_all(refusals)
        return cls(**read)


NEEDS = {"multiplier": ("multiplier_bits", "product_bits"), "divisor": ("largest_divisor",)}
"""The figures that go with a kind of requantisation, and with no other."""


def _of_kind(profile: Profile) -> Iterator[SpirError]:
    """Figures that contradict each other, and sources of what is no figure."""
    needed = NEEDS.get(profile.requant, ())
    for name in (name for names in NEEDS.values() for name in names):
        value = getattr(profile, name)
        if value is None and name in needed:
            yield error("profile", f"requant = {profile.requant!r} needs {name}", fix=f"add {name} = ...")
        elif value is not None and name not in needed:
            yield error("profile", f"{name} = {value} says nothing where requant = {profile.requant!r}", fix="drop it")
    for name in ("multiplier_bits", "product_bits"):
        value = getattr(profile, name)
        if value is not None and value > WIDEST:
            yield _wrong(name, value, f"a whole number within 1..{WIDEST}")
    if profile.largest_divisor is not None and profile.largest_divisor >= 2 ** (WIDEST - 1):
        yield _wrong("largest_divisor", profile.largest_divisor, f"a number of {WIDEST} bits")
    figures = {a.name for a in attrs.fields(Profile)} - {"name", "source"}
    for name in profile.source.keys() - figures:
        yield unknown("figure to give a source for called", name, figures, code="profile")
