"""The ``spir`` command: demo, compile, run, opt, diff, check, list."""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import json
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import spir
from spir import artifact, difference, driver, options, pipeline, store
from spir.backend import Counting
from spir.discovery import find, names
from spir.errors import SpirError, error
from spir.ir import Module
from spir.profile import HOME, Profile, profiles
from spir.report import measured
from spir.text import parse, show

KINDS = ("passes", "backends", "frontends", "ops", "recipes")
EXITS = {"contract": 1, "usage": 2, "io": 4}
NOT_READ = "an .npz file, with :x or :x,y for the names of its arrays (default x, then y)"
CHECKED = "off, probes, or data: hold every pass against its contract on probes, or on all of --data, too"
STORED = "an artifact folder, or a .spir file with its .safetensors beside it"

# How numpy and zipfile say that a file is no npz, is cut off, packed in an unknown way, or encrypted.
NO_NPZ = (ValueError, EOFError, TypeError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)


@attrs.frozen
class Result:
    """What a command prints: text for people, one object for programs, and the exit code."""

    text: str
    data: dict[str, Any]
    code: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 ok, 1 a check or comparison failed, 2 usage, 3 SpirError, 4 input or output, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        command: Callable[[argparse.Namespace], Result] = arguments.command
        result = command(arguments)
        print(json.dumps(result.data, default=str, allow_nan=False) if arguments.json else result.text)
    except SpirError as refusal:
        return _failed(refusal, as_json=arguments.json)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 4
    except OSError as cause:
        named = error("io", f"{cause.filename or 'a file'}: {cause.strerror}", fix="check the path")
        return _failed(named, as_json=arguments.json)
    return result.code


def _failed(refusal: SpirError, *, as_json: bool) -> int:
    if as_json:
        found = [attrs.asdict(d) for d in refusal.diagnostics]
        print(json.dumps({"schema": "spir-error/1", "errors": found}))
    else:
        print(refusal, file=sys.stderr)
    return EXITS.get(refusal.code, 3)


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="spir", description="Compiles trained networks to exact spiking networks.")
    top.add_argument("--version", action="version", version=f"spir {spir.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.set_defaults(command=run)
        return sub

    sub = command("demo", _demo, "Everything on the shipped network: LeNet-5 on MNIST images, offline.")
    sub.add_argument("--images", type=int, default=1000, help="how many of the 1000 shipped images")

    sub = command("compile", _compile, "Compiles a model and saves the artifact.")
    sub.add_argument(
        "model", metavar="MODEL", help="package.module:factory (the working folder counts), or a .spir file"
    )
    sub.add_argument("--passes", required=True, help="pipeline text, such as '@stem{bits=8}'")
    sub.add_argument("--backend", default="serial", help="such as 'hw{collapse=off}'")
    sub.add_argument("--data", help=f"calibration inputs: {NOT_READ}")
    sub.add_argument("--example-shape", help="one sample's shape, such as 3,32,32, where there is no data")
    sub.add_argument("--weights", help="safetensors for a .spir file (default: beside it)")
    sub.add_argument("--check", default="probes", help=CHECKED)
    sub.add_argument("--stages", metavar="DIR", help="a folder for the module after each pass, NN-pass.spir")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("-o", "--output", required=True, help="the artifact folder")

    sub = command("run", _run, "Runs a saved network on inputs.")
    sub.add_argument("artifact", help="the artifact folder")
    sub.add_argument("--data", required=True, help=f"inputs, with labels for an accuracy: {NOT_READ}")
    sub.add_argument("--backend", help="another backend than the saved one")
    sub.add_argument("--save-output", help="an .npz file for the outputs")
    sub.add_argument("--report", action="store_true", help="count spikes, operations, energy and memory, too")
    sub.add_argument("--profile", help="the report's chip: a name such as darwin3, or a .toml file")

    sub = command("opt", _opt, "Runs passes on IR text.")
    sub.add_argument("input", help="a .spir file")
    sub.add_argument("--passes", default="", help="pipeline text")
    sub.add_argument("--weights", help="safetensors of its arrays (default: beside it, when it is there)")
    sub.add_argument("--data", help=f"calibration inputs: {NOT_READ}")
    sub.add_argument("--check", default="probes", help=CHECKED)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--print-after", default="", help="all, or names of passes, separated by commas")
    sub.add_argument("-o", "--output", help="a .spir file; its arrays go beside it")

    sub = command("diff", _diff, "Compares decoded values of two networks, layer by layer; exits with 1 if any differ.")
    sub.add_argument("reference", metavar="A", help=f"what counts as right, the finer network: {STORED}")
    sub.add_argument("candidate", metavar="B", help="what is judged, likewise")
    sub.add_argument("--data", required=True, help=f"inputs: {NOT_READ}")
    sub.add_argument("--backend", help="runs B, such as 'hw' (default: the reference interpreter)")

    sub = command("check", _check, "Runs the conformance suite on a backend; exits with 1 if any case fails.")
    sub.add_argument("backend", metavar="BACKEND", help="such as serial, or 'hw{collapse=off}'")
    sub.add_argument("--examples", type=int, default=40, help="how many random modules")

    sub = command("list", _list, "Lists passes, backends, frontends, ops or recipes with their options; or profiles.")
    sub.add_argument("kind", choices=(*KINDS, "profiles"))
    return top


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("start", total=None)
        yield lambda step: shown.update(task, description=step)


def _demo(arguments: argparse.Namespace) -> Result:
    from spir.demo.show import run  # torch takes seconds to load, and no other command's start needs it

    with _progress() as progress:
        text, data, failed = run(arguments.images, progress)
    return Result(text, data, int(failed))


def _compile(arguments: argparse.Namespace) -> Result:
    data = _calibration(arguments.data) if arguments.data else None
    model = _model(arguments.model, arguments.weights)
    example = _example(arguments.example_shape) if arguments.example_shape else None
    with _progress() as progress:
        compiled = driver.compile(
            model,
            arguments.passes,
            data=data,
            example=example,
            backend=arguments.backend,
            check=arguments.check,
            seed=arguments.seed,
            progress=progress,
        )
        if arguments.stages:
            compiled.save_stages(arguments.stages)
        compiled.save(arguments.output)
    lines = []
    for entry in compiled.journal:
        lines.append(f"{entry.step}: {measured(entry)}; {entry.seconds:.2f} s")
        lines += [f"    {line}" for note in entry.notes for line in note.splitlines()]
    journal = [attrs.asdict(entry) for entry in compiled.journal]
    data_ = {"schema": "spir-compile/1", "artifact": arguments.output, "journal": journal}
    if arguments.stages:
        data_["stages"] = arguments.stages
        lines.append(f"wrote {arguments.stages}: {len(compiled.stages)} stages")
    return Result("\n".join([*lines, f"wrote {arguments.output}"]), data_)


def _run(arguments: argparse.Namespace) -> Result:
    if arguments.profile and not arguments.report:
        raise error("usage", "--profile is for the report", fix="add --report")
    profile = Profile.load(arguments.profile) if arguments.profile else None
    x, y = _data(arguments.data)
    compiled = driver.load(arguments.artifact, arguments.backend)
    start = time.perf_counter()
    with _progress() as progress:
        progress(f"run {len(x)} samples on {compiled.backend.name}")
        output = compiled(x)
        seconds = time.perf_counter() - start
        report = compiled.report(x, profile) if arguments.report else None
    data: dict[str, Any] = {"schema": "spir-run/1", "samples": len(x), "seconds": seconds}
    lines = [f"{len(x)} samples on {compiled.backend.name} in {seconds:.2f} s"]
    if y is not None:
        if y.shape != output.shape[:1] or output.ndim != 2 or y.dtype.kind not in "iu":
            raise error(
                "data",
                f"labels {list(y.shape)} of {y.dtype} do not go with outputs {list(output.shape)}",
                fix="give one class number a sample, or name x only",
            )
        data["accuracy"] = float((output.argmax(axis=1) == y).mean())
        lines.append(f"accuracy {100 * data['accuracy']:.2f} %")
    if report is not None:
        data["report"] = report.json()
        lines.append(str(report))
    elif isinstance(compiled.executable, Counting) and compiled.executable.simulates:
        found = compiled.overflows(x)
        data["overflows"] = [{"value": v, "register": r, "times": int(c.sum())} for (v, r), c in found.items()]
        each = (f"{v} {r} {c.sum()}" for (v, r), c in found.items())
        lines.append(f"overflows: {', '.join(each) or 'none on these samples'}")
    if arguments.save_output:
        target = Path(arguments.save_output)
        with target.open("wb") as file:
            np.savez(file, output=output)
        data["output"] = str(target)
        lines.append(f"wrote {target}")
    return Result("\n".join(lines), data)


def _opt(arguments: argparse.Namespace) -> Result:
    module = _module(Path(arguments.input), arguments.weights)
    data = _calibration(arguments.data) if arguments.data else None
    steps = pipeline.parse(arguments.passes)
    asked = [name.strip() for name in arguments.print_after.split(",") if name.strip()]
    for name in asked:
        if name != "all" and name not in {s.name for s in steps}:
            raise error("usage", f"--print-after {name}: no such pass runs", fix="all, or a pass of --passes")
    with _progress() as progress:
        outcome = driver.opt(module, steps, data=data, check=arguments.check, seed=arguments.seed, progress=progress)
    ran = zip(outcome.stages, outcome.journal, strict=True)
    told = [(s, e.notes) for s, e in ran if "all" in asked or s.name in asked]
    shown = [s for s, _ in told]
    parts = [
        "\n".join([f"// after {s.name}", *(f"//   {line}" for n in notes for line in n.splitlines()), show(s.module)])
        for s, notes in told
    ]
    if not shown or shown[-1].module != outcome.module:
        parts.append(show(outcome.module))
    if arguments.output:
        target = Path(arguments.output)
        if target.suffix != ".spir":
            raise error("usage", f"-o {target} is no .spir file", fix=f"-o {target.with_suffix('.spir')}")
        store.write_aside(target.with_suffix(".safetensors"), store.to_bytes(outcome.module.arrays()))
        store.write_aside(target, show(outcome.module).encode())
    stages = {s.name: show(s.module) for s in shown}
    journal = [attrs.asdict(entry) for entry in outcome.journal]
    data_ = {"schema": "spir-opt/1", "module": show(outcome.module), "stages": stages, "journal": journal}
    return Result("\n".join(parts).rstrip(), data_)


def _diff(arguments: argparse.Namespace) -> Result:
    x, _ = _data(arguments.data)
    reference, candidate = _stored(Path(arguments.reference)), _stored(Path(arguments.candidate))
    driver.check_floats(x, reference, "the data")
    executable = driver.backend_of(arguments.backend).prepare(candidate) if arguments.backend else None
    with _progress() as progress:
        progress("compare")
        found = difference.compare(
            reference,
            candidate,
            x,
            executable=executable,
            progress=lambda done: progress(f"compare: {done} of {len(x)} samples"),
        )
    data = {**found.json(), "reference": arguments.reference, "candidate": arguments.candidate}
    text = f"{arguments.candidate} against {arguments.reference}\n{found}"
    return Result(text, data, int(found.differs))


def _stored(path: Path) -> Module:
    return _module(path, None) if path.suffix == ".spir" and not path.is_dir() else artifact.read(path).module


def _check(arguments: argparse.Namespace) -> Result:
    try:
        from spir import conformance  # hypothesis comes with an extra
    except ModuleNotFoundError as cause:
        raise error("usage", f"spir check needs {cause.name}", fix="pip install 'spir[conformance]'") from None
    if arguments.examples < 1:
        raise error("usage", f"--examples {arguments.examples} is no number of modules", fix="1 or more")
    with _progress() as progress:
        report = conformance.check(arguments.backend, examples=arguments.examples, progress=progress)
    return Result(str(report), report.json(), int(not report.passed))


def _list(arguments: argparse.Namespace) -> Result:
    if arguments.kind == "profiles":
        return _chips()
    rows, lines = [], []
    for name in names(arguments.kind):
        owner = find(arguments.kind, name)
        summary = (inspect.getdoc(sys.modules[owner.__module__]) or "").split("\n")[0]
        known = {
            label: {"default": options.spell(a.default), "doc": a.metadata["doc"], "values": options.limits(a)}
            for label, a in (options.fields(owner) if attrs.has(owner) else {}).items()
        }
        summary = summary.removeprefix(f"{name}: ")
        rows.append({"name": name, "summary": summary, "options": known})
        lines.append(f"{name:<20} {summary}")
        for label, o in known.items():
            lines.append(f"{'':<22}{label}={o['default']}: {o['doc']}" + f" ({o['values']})" * bool(o["values"]))
    return Result("\n".join(lines), {"schema": "spir-list/1", "kind": arguments.kind, "entries": rows})


def _chips() -> Result:
    """The profiles, with their figures; guesses are marked."""
    chips = {name: Profile.load(name) for name in profiles()}
    rows = [{"name": name, "file": str(HOME / f"{name}.toml"), **chip.figures} for name, chip in chips.items()]
    lines = []
    for name, chip in chips.items():
        shown = (f"{label}={value}" + " (assumed)" * (label in chip.assumed) for label, value in chip.figures.items())
        lines.append(f"{name:<20} {', '.join(shown)}")
    text = "\n".join([*lines, f"files: {HOME}"])
    return Result(text, {"schema": "spir-list/1", "kind": "profiles", "entries": rows})


def _model(text: str, weights: str | None) -> Any:
    if text.endswith(".spir"):
        return _module(Path(text), weights)
    package, colon, attribute = text.partition(":")
    if not colon or not package or not attribute:
        raise error("usage", f"{text!r} names no model", fix="package.module:factory, or a .spir file")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(package)
    except ModuleNotFoundError as cause:
        raise error("usage", f"{text!r}: {cause}", fix="run from the folder that holds the package") from None
    except Exception as cause:
        raise _raised(text, cause) from cause
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise error("usage", f"{text!r}: {package} has no {attribute}", fix="name a function, class or model there")
        found = getattr(found, part)
    if not inspect.isclass(found) and not inspect.isfunction(found):
        return found
    try:
        return found()
    except Exception as cause:
        raise _raised(text, cause) from cause


def _raised(text: str, cause: Exception) -> SpirError:
    place = traceback.extract_tb(cause.__traceback__)[-1]
    return error(
        "usage",
        f"{text!r} raises {type(cause).__name__}: {cause}",
        at=f"{place.filename} line {place.lineno}",
        fix="give a module that imports, and a function or class that takes no arguments",
    )


def _module(path: Path, weights: str | None) -> Module:
    beside = (path.with_suffix(".safetensors"), path.with_name("weights.safetensors"))
    source = Path(weights) if weights else next((file for file in beside if file.is_file()), None)
    arrays = store.from_bytes(store.read(source), source) if source else None
    try:
        text = store.read(path).decode()
    except UnicodeDecodeError:
        raise error("syntax", f"{path} is no text", fix="give a .spir file") from None
    return parse(text, arrays)


def _data(text: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    path, colon, asked = text.partition(".npz:")
    file = Path(f"{path}.npz" if colon else path)
    content = store.read(file)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files} if hasattr(found, "files") else {}
    except NO_NPZ:
        arrays = {}
    if not arrays:
        raise error("data", f"{file} holds no arrays", fix=f"give {NOT_READ}")
    wanted = asked.split(",") if asked else ["x", "y"] if "y" in arrays else ["x"]
    for name in wanted:
        if name not in arrays:
            raise error("data", f"{file} holds no array {name!r}", fix=f"one of: {', '.join(arrays)}")
    return arrays[wanted[0]], arrays[wanted[1]] if len(wanted) > 1 else None


def _calibration(text: str) -> Any:
    """Inputs, with their labels where the file holds some."""
    x, y = _data(text)
    return x if y is None else [(x, y)]


def _example(text: str) -> NDArray[np.float32]:
    parts = text.split(",")
    try:
        sizes = [int(p) for p in parts if p.strip().isdecimal()]
        if len(sizes) == len(parts) and all(sizes):
            return np.zeros((1, *sizes), dtype=np.float32)
    except (ValueError, MemoryError):  # more elements than memory, or than numpy counts
        pass
    raise error("usage", f"--example-shape {text!r} is no shape", fix="positive numbers, such as 3,32,32")


if __name__ == "__main__":
    sys.exit(main())
