"""What users see when something cannot be done: located diagnostics with a way out.

Imported by everything, imports nothing of SPIR.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import attrs

# The codes SPIR raises today. Method diagnostics carry the name that the theory gives them.
CODES = {
    "usage": "an argument of the API or the command line",
    "option": "an option of a pass, backend or recipe",
    "pipeline": "pipeline text",
    "name": "an unknown pass, backend, frontend, op or recipe",
    "data": "example or calibration data",
    "unsupported": "a construct of the model that has no conversion",
    "trace": "a model that torch.fx cannot trace",
    "weights": "a weight that is missing, altered or not finite",
    "syntax": "IR text that does not parse",
    "module": "IR text or a module that breaks the rules of the language",
    "type": "operands that an op refuses",
    "contract": "a pass that broke its promise",
    "backend": "a module that a backend refuses",
    "profile": "a hardware profile that cannot be read",
    "artifact": "a saved network that cannot be read or written",
    "io": "a file that cannot be read or written",
    "E-MAXPOOL": "max-pool on trains that are not nested",
    "E-ORDER-MIX": "sorted trains of both orders side by side",
    "E-T-NE-L": "more or fewer steps than the levels that a network was trained with",
    "E-FP-TIE": "float sums at float thresholds",
    "E-ANALOG-IN": "an input that no train carries",
    "E-PHI-DEAD": "a channel without spikes to calibrate",
    "E-CAP": "counts that a window of steps does not hold",
    "E-BURST": "more than one threshold a step where one spike may leave",
    "E-SCALE": "scales that an op cannot take",
    "E-RESID-DELAY": "branches of unequal depth where none waits",
    "E-RESID-SCALE": "branches whose scales do not meet",
    "E-MULT-RANGE": "a multiplier that its width cannot express",
    "E-SCALED": "sums that are scaled to fit a register",
    "E-CALIB-OVF": "a scale from data below the worst case",
    "E-VRANGE": "a register that cannot hold a proved bound",
    "W-RECON": "a behaviour that is a reconstruction, because the source does not say",
    "E-ISUM": "a weight sum of one time step beyond its register",
    "E-DIVISOR": "a requantisation that a chip without multiplier cannot do by dividing",
    "E-SIGNED-SPIKE": "negative spikes on a chip that sends none",
}


@attrs.frozen
class Note:
    """One labelled line below the message, such as ``from: features.3 (MaxPool2d, lenet.py line 41)``."""

    label: str
    text: str


@attrs.frozen
class Diagnostic:
    """One finding: a code of `CODES`, one sentence, and labelled notes."""

    code: str = attrs.field(validator=attrs.validators.in_(CODES))
    message: str
    notes: tuple[Note, ...] = ()

    def note(self, label: str, text: str) -> Diagnostic:
        """The same finding with one more note; a label that is already there stays as it is."""
        if not text or any(n.label == label for n in self.notes):
            return self
        return attrs.evolve(self, notes=(*self.notes, Note(label, text)))

    def render(self, severity: str) -> str:
        """The one layout of errors and warnings."""
        width = max((len(n.label) for n in self.notes), default=0)
        column = max(11, width + 4)
        lines = [f"{severity}[{self.code}]: {self.message}"]
        order = {"at": 0, "op": 1, "from": 2, "fix": 9}
        for note in sorted(self.notes, key=lambda n: order.get(n.label, 5)):
            first, *rest = note.text.split("\n")
            lines.append(f"{note.label:>{column}}: {first}")
            lines += [f"{'':{column}}  {line}" for line in rest]
        return "\n".join(lines)


class SpirError(Exception):
    """Every mistake of a user, one or more diagnostics at once; `str` renders them all."""

    def __init__(self, *diagnostics: Diagnostic) -> None:
        super().__init__(*diagnostics)
        self.diagnostics = diagnostics

    @property
    def code(self) -> str:
        """The code of the first diagnostic."""
        return self.diagnostics[0].code

    def __str__(self) -> str:
        return "\n".join(d.render("error") for d in self.diagnostics)

    def note(self, label: str, text: str) -> SpirError:
        """The same error with one more note on every diagnostic."""
        return SpirError(*(d.note(label, text) for d in self.diagnostics))


class SpirWarning(UserWarning):
    """A finding that does not stop the compilation."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic)
        self.diagnostic = diagnostic

    def __str__(self) -> str:
        return self.diagnostic.render("warning")


def error(code: str, message: str, *, fix: str = "", **notes: str) -> SpirError:
    """A `SpirError` of one diagnostic; keyword arguments become notes (``from_`` for ``from``)."""
    labelled = tuple(Note(label.rstrip("_"), text) for label, text in notes.items() if text)
    way_out = (Note("fix", fix),) if fix else ()
    return SpirError(Diagnostic(code, message, labelled + way_out))


@contextmanager
def located(**notes: str) -> Iterator[None]:
    """Adds notes, such as ``op=...`` and ``from_=...``, to any `SpirError` that passes through."""
    try:
        yield
    except SpirError as refusal:
        noted = refusal
        for label, text in notes.items():
            noted = noted.note(label.rstrip("_"), text)
        raise noted from refusal.__cause__


def raise_all(refusals: Iterable[SpirError]) -> None:
    """Raises one error that holds the diagnostics of all ``refusals``; does nothing when there are none."""
    diagnostics = [d for refusal in refusals for d in refusal.diagnostics]
    if diagnostics:
        raise SpirError(*diagnostics)


def unknown(kind: str, name: str, known: Iterable[str], code: str = "name") -> SpirError:
    """The error for a name that nobody owns, with the near miss or the list."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(names)}" if names else ""
    return error(code, f"there is no {kind} {name!r}", fix=fix)
