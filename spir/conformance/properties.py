"""What a backend must hold on one example; each property raises `Failure` with the example, as short as it gets.

Integers, trains and currents are compared to the bit. Reals are compared op by op, each op's result with its reference
on the operands that the backend itself computed, within `TOLERANCE` of the largest operand or result: float sums have
an order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.backend import Backend, Executable
from spir.conformance.examples import Example, module_of, take
from spir.errors import Diagnostic, SpirError
from spir.ir import Module, Node, Op, kept
from spir.text import show_node
from spir.types import Int, Interval, Real, Scale, Shape, Stored, Tensor

TOLERANCE = 1e-12
DEPENDS = "the result depends on the batch"


class Failure(AssertionError):  # noqa: N818 - a finding, of which a suite has many
    """A backend that does not hold a property: what is wrong, and the example."""

    def __init__(self, message: str, example: Example) -> None:
        super().__init__(f"{message}\n{example!r}")
        self.message = message
        self.example = example


class Refused(Exception):  # noqa: N818 - no error: the one exemption from a comparison
    """The backend refuses the module, before anything is built."""

    def __init__(self, refusal: SpirError) -> None:
        super().__init__(refusal)
        self.refusal = refusal


Property = Callable[[Backend, Example], None]


def values(backend: Backend, example: Example) -> None:
    """Every value equals the interpreter's; memory is stated."""
    executable = prepared(backend, example)
    agree(example, _run(executable, example, "*"))
    size: object = executable.bytes_per_sample
    if not isinstance(size, int) or size < 1:
        raise Failure(f"bytes_per_sample is {size!r}, not a positive number", example)


def refusals(backend: Backend, example: Example) -> None:
    """What is refused names op, origin and fix, all at once, before anything is built."""
    found = _refused(backend, example)
    if not found:
        return
    for diagnostic in found:
        _check_refusal(diagnostic, example)
    if _refused(backend, example) != found:
        raise Failure("asked again, it refuses other things", example)
    try:
        prepared(backend, example)
    except Refused as told:
        if list(told.refusal.diagnostics) != found:
            raise Failure(f"prepare raises other refusals than `refusals` gives:\n{told.refusal}", example) from told
        raise
    raise Failure("prepare accepts a module that `refusals` refuses", example)


def batches(backend: Backend, example: Example) -> None:
    """No sample's result depends on the others: their number, their order, or whether there are any."""
    executable, n = prepared(backend, example), len(example)
    whole, exact = _run(executable, example, "*"), settled(example.module)
    agree(example, whole)
    order = list(range(n))
    for chosen in ([], order[:1], order[-1:], order[: n // 2], order[::-1], order * 5):
        part = example.take(chosen)
        found = _run(executable, part, "*")
        for name in exact & found.keys():
            wanted = take(example.module.types[name], whole[name], chosen)
            if not _same(found[name], wanted):
                claim = f"%{name} of samples {chosen} differs from the same samples in a batch of {n}"
                raise Failure(f"{DEPENDS}: {claim}", example)
        try:
            agree(part, found)
        except Failure as failure:
            raise Failure(f"{DEPENDS}: of samples {chosen} {failure.message}", example) from failure


def repeats(backend: Backend, example: Example) -> None:
    """Two runs and two builds agree to the bit; no run leaves a trace in the next."""
    executable = prepared(backend, example)
    first = _run(executable, example, "*")
    wanted = {name: stored.copy() for name, stored in first.items()}
    _run(executable, example.take(list(range(len(example)))[::-1][:3]), "")
    for stored in first.values():
        if stored.flags.writeable:
            stored[...] = 1  # the caller's own
    again = {
        "a second run": _run(executable, example, "*"),
        "a second build": _run(prepared(backend, example), example, "*"),
    }
    for label, found in again.items():
        for name, stored in wanted.items():
            if name not in found or not _same(found[name], stored):
                raise Failure(f"{label} gives another %{name}: state is kept between calls", example)


def keeps(backend: Backend, example: Example) -> None:
    """Any pattern of names gives those values and the output, in order, and the values are those of a full run."""
    executable, module = prepared(backend, example), example.module
    whole = _run(executable, example, "*")
    names = list(module.types)
    middle = names[len(names) // 2]
    patterns = ["", "nothing", module.input.name, middle, names[-1], f"{names[0]}|{names[-1]}", f"{middle[:1]}*", "?"]
    for pattern in dict.fromkeys(patterns):
        found = _run(executable, example, pattern)
        wanted = [name for name in names if kept(name, pattern) or name == module.output]
        if list(found) != wanted:
            raise Failure(f"keep={pattern!r} gives {list(found)}, not {wanted}", example)
        for name in wanted:
            if not _alike(module.types[name], found[name], whole[name]):
                raise Failure(f"keep={pattern!r} gives another %{name} than keep='*'", example)


def inputs(backend: Backend, example: Example) -> None:
    """The input stays as it is and is nobody else's; any layout will do; one that the type forbids is refused."""
    executable, type_ = prepared(backend, example), example.module.input.type
    before = example.x.copy()
    whole = _run(executable, example, "*")
    if not _same(example.x, before):
        raise Failure("the run changes its input", attrs.evolve(example, x=before))
    for name, stored in whole.items():
        if np.shares_memory(stored, example.x):
            raise Failure(f"%{name} shares memory with the input", example)
    locked = example.x.copy()
    locked.setflags(write=False)
    layouts: dict[str, Any] = {
        "read-only": locked,
        "of Fortran order": np.asfortranarray(example.x),
        "a view": _view(example.x),
    }
    for label, x in layouts.items():
        found = _run(executable, attrs.evolve(example, x=x), "*")
        for name, stored in whole.items():
            if not _alike(example.module.types[name], found[name], stored):
                raise Failure(f"an input that is {label} gives another %{name}", example)
    for label, x in forbidden(type_, example.x):
        try:
            executable.run(x)
        except SpirError as refusal:
            if refusal.code != "data":
                raise Failure(f"{label} is refused as error[{refusal.code}], not error[data]", example) from refusal
            continue
        except Exception as raised:
            raise Failure(f"{label} raises {type(raised).__name__}: {raised}, no SpirError", example) from raised
        raise Failure(f"{label} is accepted", example)


PROPERTIES: dict[str, Property] = {
    "values": values,
    "refusals": refusals,
    "batches": batches,
    "repeats": repeats,
    "keeps": keeps,
    "inputs": inputs,
}


# running


def prepared(backend: Backend, example: Example) -> Executable:
    """The executable of a module that is not refused.

    Raises:
        Refused: the backend refuses before it builds. Failure: it raises anything else, or later.
    """
    kind, built = _watched(type(backend))  # type: ignore[arg-type]  # a class hashes; attrs speaks of its instances
    built.clear()
    watched: Backend = kind(**{a.alias: getattr(backend, a.name) for a in attrs.fields(type(backend)) if a.init})
    try:
        return watched.prepare(example.module)
    except SpirError as raised:
        if not built:
            raise Refused(raised) from None
        raise Failure(f"refused late: build raises what `refusals` does not say:\n{raised}", example) from raised
    except Exception as raised:
        claim = f"{'build' if built else 'refusals'} raises {type(raised).__name__}: {raised}"
        raise Failure(f"refused late: {claim}", example) from raised


@functools.cache
def _watched(kind: type[Backend]) -> tuple[Any, list[Module]]:
    """The same kind of backend, and a list that gets what it builds."""
    built: list[Module] = []

    def build(self: Backend, module: Module) -> Executable:
        built.append(module)
        return kind.build(self, module)

    return type(kind.__name__, (kind,), {"build": build, "__slots__": ()}), built


def _refused(backend: Backend, example: Example) -> list[Diagnostic]:
    try:
        return [diagnostic for refusal in backend.refusals(example.module) for diagnostic in refusal.diagnostics]
    except Exception as raised:
        raise Failure(f"refusals raises {type(raised).__name__}: {raised}", example) from raised


def _run(executable: Executable, example: Example, keep: str) -> dict[str, Stored]:
    try:
        return executable.run(example.x, keep)
    except Exception as raised:
        claim = f"the run of {len(example)} samples, keep={keep!r}, raises {type(raised).__name__}:\n{raised}"
        raise Failure(f"refused late: {claim}", example) from raised


def _check_refusal(found: Diagnostic, example: Example) -> None:
    """It names an op of the module as text shows it, its origin and a way out."""
    notes, text = {note.label: note.text for note in found.notes}, found.render("error")
    missing = [label for label in ("op", "from", "fix") if not notes.get(label)]
    if missing:
        raise Failure(f"a refusal names no {' and no '.join(missing)}:\n{text}", example)
    nodes = [node for node in example.module.nodes if f"%{node.result} = " in notes["op"]]
    if not nodes:
        raise Failure(f"a refusal names an op that the module does not have:\n{text}", example)
    if not any(str(node.origin) in notes["from"] for node in nodes):
        raise Failure(f"a refusal names another origin than its op's:\n{text}", example)


# comparing


def agree(example: Example, found: Mapping[str, Stored]) -> None:
    """Every value has its type's dtype and shape, and is what its op makes of the operands found.

    Raises:
        Failure: with the first op that differs, and the one sample on which it does.
    """
    module = example.module
    if list(found) != list(module.types):
        raise Failure(f"a full run gives {list(found)}, not {list(module.types)}", example)
    for name, type_ in module.types.items():
        _check_form(name, type_, found[name], example)
    if not len(example):
        return
    source = module.input
    _check_value(source.name, source.type, found[source.name], source.type.read(example.x), example)
    for node in module.nodes:
        operands = [found[name] for name in node.operands]
        with np.errstate(over="ignore"):  # a sigmoid far from 0
            wanted = node.op.reference(module.operand_types(node), *operands)
        reach = max(np.abs(values).max(initial=1e-300) for values in (*operands, wanted))
        _check_value(node.result, node.type, found[node.result], wanted, example, reach, node)


def _check_form(name: str, type_: Tensor, stored: Stored, example: Example) -> None:
    dtype = np.float64 if isinstance(type_.encoding, Real) else np.int64
    shape = (*((type_.steps,) if type_.train else ()), len(example), *type_.shape)
    found = getattr(stored, "dtype", type(stored)), getattr(stored, "shape", None)
    if found != (dtype, shape):
        raise Failure(f"%{name} is {found[0]} {found[1]}, not {np.dtype(dtype)} {shape}", example)


def _check_value(
    name: str,
    type_: Tensor,
    found: Stored,
    wanted: Stored,
    example: Example,
    reach: float = 0.0,
    node: Node | None = None,
) -> None:
    wrong = _unlike(type_, found, wanted, reach)
    if not wrong.any():
        return
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    axis = 0 if type_.train is None else 1
    shown = f"%{name} at {list(at)} is {found[at]}, and the reference says {wanted[at]}"
    claim = f"{shown} ({int(wrong.sum())} of {wrong.size} values differ)"
    if node is not None:
        claim += f"\n{show_node(node)}"
    raise Failure(claim, _shortest(example, at[axis]))


def _shortest(example: Example, sample: int) -> Example:
    """The part of the example that the failure speaks of."""
    return example.take([sample]) if len(example) > 1 else example


def _same(a: Stored, b: Stored) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _unlike(type_: Tensor, found: Stored, wanted: Stored, reach: float) -> NDArray[np.bool_]:
    if not isinstance(type_.encoding, Real):
        return np.asarray(found != wanted)
    close = np.abs(found - wanted) <= TOLERANCE * reach
    unlike: NDArray[np.bool_] = ~(close | (found == wanted) | (np.isnan(found) & np.isnan(wanted)))
    return unlike


def _alike(type_: Tensor, found: Stored, wanted: Stored) -> bool:
    reach = float(np.abs(wanted).max(initial=1e-300))
    return found.shape == wanted.shape and not _unlike(type_, found, wanted, reach).any()


def settled(module: Module) -> set[str]:
    """Values that no rounded real stands behind: integers whose only reals are the input's."""
    rounded: set[str] = set()
    for node in module.nodes:
        if isinstance(node.type.encoding, Real) or rounded & set(node.operands):
            rounded.add(node.result)
    return set(module.types) - rounded


# inputs


def _view(x: Stored) -> Stored:
    """The same numbers in every other place of a larger array."""
    seen: Any = np.repeat(x, 2, axis=-1)[..., ::2]
    return np.asarray(seen)


def forbidden(type_: Tensor, x: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Inputs that a type does not allow."""
    axis = 0 if type_.train is None else 1
    yield "an input without the batch axis", x.take(0, axis=axis)
    yield "an input of another shape", np.concatenate([x, x], axis=-1)
    yield "an input of words", np.full(x.shape, "a")
    if not len(x) or not x.size:
        return
    broken = x.astype(np.float64, order="C")
    broken.reshape(-1)[-1] = np.nan
    yield "an input with a NaN", broken
    if isinstance(type_.encoding, Real):
        return
    broken = np.zeros(x.shape)
    broken.reshape(-1)[-1] = 0.5
    yield "an input with a fraction", broken
    far = np.zeros(x.shape, dtype=np.int64)
    far.reshape(-1)[-1] = max(abs(end) for end in (*_frame(type_), type_.encoding.lo, type_.encoding.hi)) + 1
    yield "an input out of range", far


def _frame(type_: Tensor) -> tuple[int, int]:
    return type_.train.frame if type_.train is not None else (0, 0)


# an op that no backend knows


@attrs.frozen
class Foreign(Op):
    """The identity on integers, under a name that no backend has heard of."""

    name: ClassVar[str] = "conformance_foreign"

    def infer(self, *types: Tensor) -> Tensor:
        return types[0]

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        return intervals[0]

    def reference(self, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        return stored[0].copy()


def foreign(backend: Backend, example: Example) -> None:
    """Two ops that the backend cannot know are both refused, by their names, or run by their reference."""
    assert all(isinstance(node.op, Foreign) for node in example.module.nodes)  # the suite gives this example
    refusals_of(backend, example, [node.result for node in example.module.nodes])


def refusals_of(backend: Backend, example: Example, results: Sequence[str]) -> None:
    """As `refusals`; where anything is refused, all of these are."""
    try:
        refusals(backend, example)
    except Refused as told:
        text = "\n".join(note.text for d in told.refusal.diagnostics for note in d.notes if note.label == "op")
        silent = [f"%{name}" for name in results if f"%{name} = " not in text]
        if silent:
            claim = f"it refuses one op and is silent about {', '.join(silent)}: all refusals come at once"
            raise Failure(f"{claim}\n{told.refusal}", example) from None
        raise
    values(backend, example)


def foreign_example() -> Example:
    """Two unknown ops in a row, on integers."""
    source = Tensor((3,), Int(-4, 4, Scale.of(0.5)))
    module = module_of(source, ("a", Foreign(), "x"), ("b", Foreign(), "a"))
    return Example(module, np.arange(-4, 5).reshape(3, 3))


# who runs the reference


@contextmanager
def calls_of_reference(op: Op) -> Iterator[list[str]]:
    """Notes every call of the reference of an op's class while it is open."""
    kind, seen = type(op), list[str]()
    own, original = kind.__dict__.get("reference"), kind.reference

    def noted(self: Op, types: tuple[Tensor, ...], *stored: Stored) -> Stored:
        seen.append(str(self.name))
        return original(self, types, *stored)

    kind.reference = noted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        if own is None:
            del kind.reference
        else:
            kind.reference = own  # type: ignore[method-assign]
