"""compile(), load() and what they return; the only file that picks frontends and backends, and only by name."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import attrs
import numpy as np
from numpy.typing import NDArray

from spir import artifact, pipeline, report
from spir.backend import Backend, Counting, Executable, Overflows, Packing, Steered
from spir.batches import bytes_of, count, cut
from spir.costs import Prices, Registers
from spir.discovery import find, names
from spir.errors import Diagnostic, SpirError, SpirWarning, error, located
from spir.ir import Module, kept
from spir.options import build, spelled
from spir.packing import Packed
from spir.pipeline import Entry, Stage
from spir.profile import Profile
from spir.rewriting import Pass
from spir.types import Int, Real, Reals, Spikes, Stored, Tensor
from spir.verify import verify

CHUNK_BYTES = 256 * 2**20
CHECKS = ("off", "probes", "data")


@attrs.frozen(eq=False, repr=False)
class Trace:
    """One value of one run: its type, the stored array or the words that hold its train, and what it means."""

    type: Tensor
    held: Stored | Packed

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """One batch after the other."""
        type_, held = parts[0].type, [part.held for part in parts]
        if isinstance(held[0], Packed):
            return cls(type_, Packed.concatenate([words for words in held if isinstance(words, Packed)]))
        return cls(type_, np.concatenate([part.stored for part in parts], axis=1 if type_.train else 0))

    def __repr__(self) -> str:
        return f"Trace({self.type}, stored {list(self.held.shape)})"

    @property
    def stored(self) -> Stored:
        """Reals and integers ``[N, *shape]``, trains and currents ``[T, N, *shape]``."""
        return self.held.frames if isinstance(self.held, Packed) else self.held

    @property
    def words(self) -> Packed:
        """The spikes in machine words.

        Raises:
            SpirError[usage]: no train of spikes, or one of more than 64 frames.
        """
        if not isinstance(self.type.encoding, Spikes):
            raise error("usage", f"{self.type.encoding} is no train of spikes", fix="read .stored or .decoded")
        return self.held if isinstance(self.held, Packed) else Packed.of(self.frames)

    @property
    def decoded(self) -> Reals:
        """The real tensor it stands for, ``[N, *shape]`` float64."""
        train = self.type.train
        if isinstance(self.held, Packed) and train is not None:
            integers = Tensor(self.type.shape, Int(train.lo, train.hi, train.scale))
            return integers.decode(self.held.integers(train.code))
        return self.type.decode(self.stored)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Net spikes of each element, summed over frames: ``[N, *shape]``; integers as they are.

        Raises:
            SpirError[usage]: a real value has no spikes.
        """
        self._discrete()
        if isinstance(self.held, Packed):
            return self.held.counts
        stored = np.asarray(self.held, dtype=np.int64)
        return stored.sum(axis=0) if self.type.train else stored

    @property
    def frames(self) -> NDArray[np.int64]:
        """``[T, N, *shape]``; an integer is one frame.

        Raises:
            SpirError[usage]: a real value has no frames.
        """
        self._discrete()
        stored = np.asarray(self.stored, dtype=np.int64)
        return stored if self.type.train else stored[None]

    def _discrete(self) -> None:
        if str(self.type.encoding) == "real":
            raise error("usage", "a real value has neither spikes nor frames", fix="read .decoded")


@attrs.frozen(eq=False)
class Context:
    """What passes see: calibration data, the seed, a fast way to run modules, and a place for notes."""

    data: NDArray[Any] | None
    seed: int
    labels: NDArray[np.int64] | None = None
    progress: Callable[[str], None] = lambda _: None
    notes: list[str] = attrs.field(factory=list, init=False)

    def note(self, text: str) -> None:
        """Adds a line to the notes of the pass that runs."""
        self.notes.append(text)

    def evaluate(
        self, module: Module, x: NDArray[Any], keep: str = "*", *, batch: int | None = None
    ) -> Iterator[Mapping[str, Reals]]:
        """Decoded values of the names that match ``keep``, ``batch`` samples at a time, else as memory permits.

        Trains are not stepped through where what they decode to says all.
        """
        executable = _fastest(module)
        for part in cut(module, x, batch or _at_once(executable, module, keep)):
            stored = (
                executable.run_packed(part, keep) if isinstance(executable, Packing) else executable.run(part, keep)
            )
            yield {name: Trace(module.types[name], stored.pop(name)).decoded for name in list(stored)}

    def stored(self, module: Module, x: NDArray[Any], keep: str = "*") -> Iterator[Mapping[str, Stored]]:
        """See `spir.rewriting.Context`."""
        executable = backend_of("serial").prepare(module)
        for part in cut(module, x, _at_once(executable, module, keep)):
            yield executable.run(part, keep)

    def steer(
        self,
        module: Module,
        x: NDArray[Any],
        stops: str,
        visit: Callable[[str, list[Reals]], None],
        *,
        batch: int | None = None,
    ) -> None:
        """See `spir.rewriting.Context`."""
        executable = backend_of("serial").prepare(module)
        assert isinstance(executable, Steered)  # serial is
        size = max(2, _at_once(executable, module, stops) // 2 * 2)
        for samples in (x,) if batch is None else cut(module, x, batch):
            walks = [executable.steer(part, stops) for part in cut(module, samples, size)]
            while here := [stop for walk in walks if (stop := next(walk, None)) is not None]:
                visit(here[0][0], [np.asarray(values, dtype=np.float64) for _, values in here])
                here.clear()  # or memory holds these and the next ones


@attrs.frozen(eq=False, repr=False)
class Compiled:
    """A compiled network: call it, trace it, report on it, save it.

    Attributes:
        module: the module that runs.
        backend: the backend that runs it, with its options.
        journal: one entry a pass.
        stages: every module on the way; empty after `load`.
        source: what it was made from: pipeline text, data and its digest, seed.
        executable: the module, made ready by the backend.
    """

    module: Module
    backend: Backend
    journal: tuple[Entry, ...]
    stages: tuple[Stage, ...]
    source: Mapping[str, str]
    executable: Executable

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.module.input.type.shape))
        return f"Compiled({shape}, {len(self.module.nodes)} ops on {self.backend.name}{spelled(self.backend)})"

    def __call__(self, x: Any) -> Any:
        """Decoded outputs ``[N, *shape]``, float32: an array for an array, a tensor on the same device for a tensor.

        Any batch size; the result does not depend on it, and nothing is remembered between calls.

        Raises:
            SpirError[data]: an input of the wrong shape or type.
        """
        batch = self._batch(x)
        parts = [p[self.module.output].decoded for p in self._runs(batch, "")]
        result = np.concatenate(parts).astype(np.float32)
        return x.float().new_tensor(result) if _is_tensor(x) else result

    def trace(self, x: Any, keep: str = "*") -> dict[str, Trace]:
        """Every value whose name matches ``keep`` (several patterns are separated by ``|``), and the output.

        Raises:
            SpirError[data], SpirError[usage]: an input of the wrong shape; a pattern that matches nothing.
        """
        if not isinstance(keep, str):
            raise error("usage", f"keep is a pattern of names, not {type(keep).__name__}", fix='such as "layer2.*|fc"')
        parts = list(self._runs(self._batch(x), keep, packed=True))
        found = {name: Trace.joined([part[name] for part in parts]) for name in parts[0]}
        if keep and set(found) <= {self.module.output} and not kept(self.module.output, keep):
            raise error("usage", f"no value matches {keep!r}", fix=f"names: {', '.join(list(self.module.types)[:12])}")
        return found

    def report(self, x: Any, profile: str | Profile | None = None) -> report.Report:
        """Spikes, operations, energy, memory, coverage and the journal, measured on ``x``.

        Args:
            x: inputs, as for a call.
            profile: a chip, or the name or path of one (see `Profile.load`), for the room in its registers and the
                prices of its operations; without one that of the backend, where it models a chip.

        Raises:
            SpirError[data]: an input of the wrong shape or type.
            SpirError[option], SpirError[profile], SpirError[io]: a profile that there is not, or that cannot be read.
        """
        asked = getattr(self.backend, "chip", None) if profile is None else profile
        chip = asked if asked is None or isinstance(asked, Profile) else Profile.load(str(asked))
        batch = self._batch(x)
        counter = report.Counter(self.module)
        ready = self.executable
        for part in cut(self.module, batch, _at_once(ready, self.module, counter.keep)):
            if isinstance(ready, Counting) and ready.simulates:
                counter.add(*ready.run_counting(part, counter.keep))
            else:
                counter.add(ready.run(part, counter.keep))
        samples, name = count(self.module, batch), f"{self.backend.name}{spelled(self.backend)}"
        if chip is None:
            return counter.finish(samples, self.journal, self.source, name)
        owner = chip.name if profile is not None else name
        registers, prices = Registers.of(chip, owner), Prices.of(chip)
        return counter.finish(samples, self.journal, self.source, name, registers, (prices,) if prices else ())

    def overflows(self, x: Any) -> Overflows:
        """How often registers overflow on ``x``, by value and register; empty where none does.

        Raises:
            SpirError[usage]: a backend without registers. SpirError[data]: an input of the wrong shape or type.
            SpirError[E-ISUM], SpirError[E-VRANGE]: the first overflow, where the backend's options call it an error.
        """
        batch, ready, total = self._batch(x), self.executable, dict[tuple[str, str], NDArray[np.int64]]()
        if not isinstance(ready, Counting):
            raise error(
                "usage",
                f"{self.backend.name} has no registers that could overflow",
                fix='backend="hw{accumulator=16, overflow=saturate}"',
            )
        for part in cut(self.module, batch, _at_once(ready, self.module, "")) if ready.simulates else ():
            for register, counts in ready.run_counting(part)[1].items():
                total[register] = total.get(register, 0) + counts
        return total

    def save(self, path: str | Path) -> None:
        """Writes the artifact folder whole or not at all; an older artifact there is replaced.

        Raises:
            SpirError[artifact]: a non-empty folder that is no artifact. SpirError[io]: the disk refuses.
        """
        backend = f"{self.backend.name}{spelled(self.backend)}"
        artifact.write(Path(path), artifact.Artifact(self.module, self.journal, backend, dict(self.source)))

    def save_stages(self, path: str | Path) -> None:
        """Writes every stage as ``NN-pass.spir`` with its arrays beside it; stages of an older compilation go away.

        Raises:
            SpirError[artifact]: a folder that holds anything else. SpirError[io]: the disk refuses.
        """
        artifact.write_stages(Path(path), self.stages)

    def _batch(self, x: Any) -> NDArray[Any]:
        batch = _array(x, "the input")
        if self.module.input.type.train is not None:
            self.module.input.type.read(batch)
            return batch
        shape = self.module.input.type.shape
        if batch.shape[1:] != shape or not len(batch):
            raise error(
                "data",
                f"the network takes [N, {', '.join(map(str, shape))}], and the input is {list(batch.shape)}",
                fix="add the batch axis" if batch.shape == shape else "give a batch of that shape",
            )
        check_floats(batch, self.module, "the input")
        return batch

    def _runs(self, batch: NDArray[Any], keep: str, *, packed: bool = False) -> Iterator[dict[str, Trace]]:
        ready = self.executable
        run = ready.run_packed if packed and isinstance(ready, Packing) else ready.run
        for part in cut(self.module, batch, _at_once(ready, self.module, keep)):
            yield {name: Trace(self.module.types[name], values) for name, values in run(part, keep).items()}


def compile(  # noqa: A001 - the word of the field
    model: Any,
    passes: str | Iterable[str | Pass] | None = None,
    *,
    data: Any = None,
    example: Any = None,
    backend: str | Backend = "serial",
    frontend: str = "auto",
    check: str = "probes",
    seed: int = 0,
    train: Any = None,
    validation: Any = None,
    loss: Any = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Compiled:
    """Reads a model, runs passes on it and prepares a backend.

    Args:
        model: a trained `torch.nn.Module` (it comes back as it was), or a `spir.ir.Module`.
        passes: pipeline text such as ``"@stem{bits=8}"``, or a list of texts and passes.
        data: calibration inputs, model-ready, read once: array, tensor, DataLoader or iterable of ``x`` or ``(x, y)``,
            or one pair ``(x, y)``; ``y`` are classes, which passes that measure accuracy read.
        example: one batch that fixes the input shape; the first of ``data`` by default.
        backend: text such as ``"hw{collapse=off}"``.
        frontend: the frontend's name, or ``auto``.
        check: ``probes`` holds every pass against its contract on probes; ``data`` does so on all of ``data``, too;
            ``off`` does not.
        seed: of everything random.
        train: kept for passes that train.
        validation: kept for passes that train.
        loss: kept for passes that train.
        progress: called with the name of each pass as it starts.

    Raises:
        SpirError: anything that cannot be converted, with its place in the model and the way out.
    """
    if passes is None:
        raise error(
            "usage",
            "compile needs passes: what to convert to, and how",
            fix=f"a recipe: {', '.join(f'@{n}' for n in names('recipes'))}; or passes: {', '.join(names('passes'))}",
        )
    _check_level(check, data)
    _check_seed(seed)
    if not all(given is None for given in (train, validation, loss)):
        raise error("usage", "train, validation and loss go with passes that train, and none here does")
    steps = pipeline.resolve(passes)
    runner = backend if isinstance(backend, Backend) else backend_of(backend)
    inputs, labels = (None, None) if data is None else _gathered(data)
    progress("read the model")
    module = _module(model, inputs if example is None else _array(example, "the example"), frontend)
    _fits(inputs, module)
    if inputs is not None and inputs.min() == inputs.max():
        finding = Diagnostic(
            "data", f"every number of the calibration data is {inputs.flat[0]}: it says nothing of ranges"
        )
        warnings.warn(SpirWarning(finding.note("fix", "calibrate on real samples")), stacklevel=2)
    outcome = _run(module, steps, Context(inputs, seed, labels, progress), check)
    progress(f"prepare {runner.name}")
    source = {
        "passes": pipeline.spell(outcome.passes, every=True),
        "data": "none" if inputs is None else f"{len(inputs)} samples, blake2b {_digest(inputs)}",
        "seed": str(seed),
        "check": check,
    }
    stages = (Stage("frontend", module), *outcome.stages)
    try:
        ready = runner.prepare(outcome.module)
    except SpirError as refusal:
        raise refusal if not outcome.passes else _behind(refusal, outcome.passes) from None
    return Compiled(outcome.module, runner, outcome.journal, stages, source, ready)


def _behind(refusal: SpirError, passes: Sequence[Pass]) -> SpirError:
    """A backend's refusal, with what ran before it: fixes name passes that may stand there."""
    *others, last = refusal.diagnostics
    told = last.note("ran", pipeline.spell(passes)).note(
        "hint", "a pass that ran takes its options there, not behind it"
    )
    return SpirError(*others, told)


def _fastest(module: Module) -> Executable:
    """On what passes run a module: spikes by their laws, where all have one."""
    if any(type_.train is not None for type_ in module.types.values()):
        try:
            return backend_of("parallel").prepare(module)
        except SpirError:  # neurons without a law
            pass
    return backend_of("serial").prepare(module)


def load(path: str | Path, backend: str | Backend | None = None) -> Compiled:
    """A saved network, on its own backend or another.

    Raises:
        SpirError[artifact]: not an artifact, a newer one, or a damaged one. SpirError[io]: it cannot be read.
    """
    saved = artifact.read(Path(path))
    if not backend:
        with located(also=f"{path} was saved for {saved.backend}; any other backend may be named to run it"):
            chosen = backend_of(saved.backend)
    else:
        chosen = backend if isinstance(backend, Backend) else backend_of(backend)
    return Compiled(saved.module, chosen, saved.journal, (), saved.source, chosen.prepare(saved.module))


def opt(
    module: Module,
    passes: str | Iterable[str | Pass],
    *,
    data: Any = None,
    check: str = "probes",
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> pipeline.Outcome:
    """Runs passes on a module, without a backend.

    Raises:
        SpirError: as `compile`.
    """
    _check_level(check, data)
    _check_seed(seed)
    inputs, labels = (None, None) if data is None else _gathered(data)
    _fits(inputs, module)
    return _run(verify(module), pipeline.resolve(passes), Context(inputs, seed, labels, progress), check)


def _run(module: Module, steps: tuple[Pass, ...], context: Context, check: str) -> pipeline.Outcome:
    return pipeline.run(module, steps, context, checked=check != "off", data=check == "data", progress=context.progress)


def backend_of(text: str) -> Backend:
    """A backend from text such as ``hw{collapse=off}``.

    Raises:
        SpirError[name], SpirError[option], SpirError[pipeline]
    """
    if not isinstance(text, str):
        raise error("usage", f"a backend is text such as 'serial', not {type(text).__name__}")
    found = pipeline.settings(text)
    if len(found) != 1:
        raise error("usage", f"{text!r} names {len(found)} backends", fix=f"one of: {', '.join(names('backends'))}")
    (name, values, at), *_ = found
    with located(at=at):
        made: object = build(find("backends", name), values)
    if not isinstance(made, Backend):
        raise error("name", f"{type(made).__module__}.{type(made).__name__} is no Backend", fix="subclass Backend")
    return made


def gather(data: Any) -> NDArray[Any]:
    """Calibration inputs as one array ``[N, *shape]``; labels of ``(x, y)`` pairs are left out.

    Raises:
        SpirError[data]: nothing, numbers that are none, samples of unequal shape, NaN or Inf.
    """
    return _gathered(data)[0]


def _gathered(data: Any) -> tuple[NDArray[Any], NDArray[np.int64] | None]:
    """Inputs ``[N, *shape]``, and classes ``[N]`` where every batch is a pair of inputs and whole numbers."""
    labels: list[NDArray[np.int64] | None] = []
    if _is_tensor(data) or isinstance(data, np.ndarray):
        whole = _array(data, "the data")
    else:
        try:
            given = iter(data)
        except TypeError:
            raise error(
                "data",
                f"data is of type {type(data).__name__}",
                fix="give an array, a tensor, a DataLoader or an iterable",
            ) from None
        if isinstance(data, (tuple, list)) and len(data) == 2 and _is_pair(*data):
            given = iter([data])
        batches = []
        for batch in given:
            pair = isinstance(batch, (tuple, list)) and batch
            batches.append(_array(batch[0] if pair else batch, "the data"))
            labels.append(_classes(batch[1], batches[-1]) if pair and len(batch) == 2 else None)
        if not batches:
            raise error("data", "the calibration data is empty", fix="a few hundred samples are enough")
        shapes = {b.shape[1:] for b in batches}
        if len(shapes) > 1 or any(b.ndim < 2 for b in batches):
            found = ", ".join(sorted({str(list(b.shape)) for b in batches})[:4])
            raise error(
                "data",
                f"batches of the calibration data have shapes {found}",
                fix="give batches [N, *shape] of one shape; a pair (x, y) has one class number for each sample",
            )
        whole = np.concatenate(batches)
    if whole.ndim < 2 or not whole.size:
        raise error(
            "data", f"the calibration data has shape {list(whole.shape)}", fix="give samples [N, *shape], N >= 1"
        )
    if not np.isfinite(whole).all():
        raise error("data", "the calibration data holds NaN or infinite values", fix="check the preprocessing")
    classes = [batch for batch in labels if batch is not None]
    return whole, np.concatenate(classes) if classes and len(classes) == len(labels) else None


def _is_pair(x: Any, y: Any) -> bool:
    """Whether these are inputs with a class for each, and not two batches."""
    known = _is_tensor(x) or isinstance(x, np.ndarray)
    return known and x.ndim > 1 and _classes(y, _array(x, "the data")) is not None


def _classes(y: Any, x: NDArray[Any]) -> NDArray[np.int64] | None:
    """One class a sample, or None for labels of any other kind."""
    try:
        found = np.asarray(y.detach().cpu() if _is_tensor(y) else y)
    except (TypeError, ValueError):  # ragged, or of a type that numpy lacks
        return None
    fits = found.dtype.kind in "iu" and x.ndim > 0 and found.shape == x.shape[:1]
    return found.astype(np.int64) if fits else None


def _module(model: Any, example: NDArray[Any] | None, frontend: str) -> Module:
    if isinstance(model, Module):
        return verify(model)
    if example is None:
        raise error("data", "the input shape is not known", fix="give data=, or example= with one batch")
    wanted = names("frontends") if frontend == "auto" else [frontend]
    for name in wanted:
        reader = find("frontends", name)()
        if frontend != "auto" or reader.accepts(model):
            read: Module = reader.read(model, example)
            return read
    raise error(
        "usage", f"no frontend reads a {type(model).__name__}", fix="give a torch.nn.Module, or a module of spir text"
    )


def _check_level(check: str, data: Any) -> None:
    if check not in CHECKS:
        raise error("usage", f"check = {check!r} is unknown", fix=f"one of: {', '.join(CHECKS)}")
    if check == "data" and data is None:
        raise error("data", "check = 'data' needs calibration data", fix="give data=, or check='probes'")


def _check_seed(seed: int) -> None:
    if type(seed) is not int or seed < 0:
        raise error("usage", f"seed = {seed!r} is no seed", fix="a whole number, 0 or more")


def check_floats(batch: NDArray[Any], module: Module, what: str) -> None:
    """Refuses bytes for a network of reals: raw images, whose accuracy would be that of chance.

    Raises:
        SpirError[data]
    """
    if isinstance(module.input.type.encoding, Real) and batch.dtype == np.uint8:
        raise error(
            "data",
            f"{what} holds bytes, and the network was read on floats",
            fix="give it as the model receives it: converted to float and normalised",
        )


def _fits(inputs: NDArray[Any] | None, module: Module) -> None:
    if inputs is not None:
        check_floats(inputs, module, "the calibration data")
    if inputs is not None and inputs.shape[1:] != module.input.type.shape:
        raise error(
            "data",
            f"the model takes {list(module.input.type.shape)} a sample, and the data holds {list(inputs.shape[1:])}",
            fix="give calibration data as the model receives it",
        )


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "detach") and hasattr(x, "cpu")


def _array(x: Any, what: str) -> NDArray[Any]:
    try:
        array = np.asarray(x.detach().cpu() if _is_tensor(x) else x)
    except ValueError:
        raise error("data", f"{what} is ragged", fix="give batches [N, *shape] of one shape") from None
    except TypeError as refusal:  # bfloat16 and sparse tensors
        raise error("data", f"{what} is no array: {refusal}", fix="give a dense float32 array or tensor") from None
    if array.dtype.kind == "f" and (array.dtype.itemsize > 8 or not array.dtype.isnative):
        array = array.astype(np.float64)
    array = np.asarray(array, order="C")
    if array.dtype.kind not in "fiub":
        raise error("data", f"{what} is of type {array.dtype}, not numbers", fix="give a float array or tensor")
    return array


def _digest(x: NDArray[Any]) -> str:
    head = f"{x.dtype}{list(x.shape)}".encode()
    return hashlib.blake2b(head + np.ascontiguousarray(x).tobytes(), digest_size=8).hexdigest()


def _at_once(executable: Executable, module: Module, keep: str) -> int:
    """Samples that memory takes, with what is kept of them."""
    shown = bytes_of(t for name, t in module.types.items() if kept(name, keep)) if keep else 0
    return max(1, CHUNK_BYTES // max(1, executable.bytes_per_sample + shown))
