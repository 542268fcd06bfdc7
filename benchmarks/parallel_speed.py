"""Fused parallel spikes against the float network, serial stepping and SpikingJelly, taking turns: ResNet-20.

    SPIR_DATA=path/to/data python -m benchmarks.parallel_speed [--rounds 30] [--threads 1] [--json out.json]
    SPIR_DATA=path/to/data python -m benchmarks.parallel_speed --memory

The float network has batch norm folded, ReLU in place and no gradients, in the faster of the two memory formats, which
is measured first. `parallel` is called as users call it, on float32 tensors. A sample repeats a call for at least half
a second; a round takes one sample of every candidate; a ratio is the median over the rounds of the ratio within a
round. Before timing, the logits of `parallel` are held bit for bit against those of `serial`, which steps every frame
of the network before fuse-parallel, and a difference ends the run. Every candidate is judged on test images in the same
run.

SpikingJelly (rate coding, ranges at 99.9 %, the faster of its two step modes, measured first) runs in a process and an
environment of its own, which benchmarks/peers/make_env.sh makes; without it its row is left out.

`--memory` asks each candidate, in a fresh process, how far the resident set rises above what it is before the first
call, when modules are imported, the network is loaded and ready, and the images are there. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

import attrs
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import fx

import spir
from benchmarks.data import Images, Labels, Split, cifar10, data_file
from benchmarks.hw_speed import folded, seconds
from benchmarks.networks import STORED, resnet20
from spir.driver import Compiled

STEPS = (4, 8, 16, 32, 64)
BATCHES = (1, 16, 128)
SLOW_STEPS = 32
"""The steps of the candidates that walk through time."""
PEER_BATCH = 128
CALIBRATION = 400
SAMPLE_SECONDS = 0.5
WARM_UPS = 3
MODE = "99.9%"
PEER = Path(__file__).parent / "peers" / ".venv"
WORKER = Path(__file__).parent / "peers" / "spikingjelly_resnet20.py"
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
CLOSE = 1e-3
"""By which two float networks with the same weights may differ in a logit."""
MEMORY_BAR = 1.3

ANN = "float network"
SERIAL = f"serial, T={SLOW_STEPS}"
JELLY = f"SpikingJelly, T={SLOW_STEPS}"
Logits = npt.NDArray[np.float32]
Call = Callable[[], object]
Sample = Callable[[], float]
"""Takes one sample and says how many seconds a call lasted."""


def log(text: str) -> None:
    """A line with the time, to stderr."""
    print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}", file=sys.stderr, flush=True)


def in_place(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network whose ReLUs write over what they read, which nothing else reads in a ResNet."""
    traced = fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        if node.target is F.relu:
            if len(node.args[0].users) != 1:
                raise ValueError(f"{node.args[0]} has another reader than {node}")
            node.kwargs = {**node.kwargs, "inplace": True}
    traced.recompile()
    return traced


def float_network() -> torch.nn.Module:
    """ResNet-20 as the float candidates run it."""
    return in_place(folded(resnet20(data_file(f"{STORED['resnet20']}.safetensors"))))


def call_float(model: torch.nn.Module, x: torch.Tensor, layout: torch.memory_format) -> Call:
    """A call of the float network on images that lie in its memory format already."""
    model = model.to(memory_format=layout)  # type: ignore[call-overload]  # the stubs leave it out
    given = x.contiguous(memory_format=layout)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        logits: torch.Tensor = model(given)
        return logits

    return run


def fused_name(steps: int) -> str:
    """How a fused candidate is called."""
    return f"parallel, T={steps}"


@attrs.frozen(eq=False)
class Pair:
    """The spiking network of one T: fused on `parallel`, and before fuse-parallel on `serial`."""

    fused: Compiled
    stepped: Compiled

    @classmethod
    def of(cls, model: torch.nn.Module, calibration: Images, steps: int) -> Self:
        """Compiles once; the pipeline with ``fused=off`` ends where fuse-parallel begins."""
        recipe = f"@parallel-free{{steps={steps}}}"
        log(f"compile {recipe}")
        fused = spir.compile(model, recipe, data=calibration, backend="parallel", check="off")
        before = fused.stages[-2]
        if (before.name, fused.stages[-1].name) != ("fuse-neuron", "fuse-parallel"):
            raise SystemExit(f"{recipe} does not end in fuse-neuron, fuse-parallel")
        return cls(fused, spir.compile(before.module, "", backend="serial"))


@attrs.frozen(eq=False)
class Worker:
    """SpikingJelly in its own process."""

    process: subprocess.Popen[str]
    folder: Path
    answer: Mapping[str, Any]
    """What the conversion said: versions."""

    @classmethod
    def start(cls, environment: Path, folder: Path, calibration: Images, threads: int) -> Self | None:
        """A worker with a converted network; None, and a line that says why, where its environment is missing."""
        python = environment / "bin" / "python"
        if not python.is_file():
            log(f"SpikingJelly is left out: {environment} is no environment; benchmarks/peers/make_env.sh makes one")
            return None
        process = subprocess.Popen(
            [str(python), str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            text=True,
        )
        log("SpikingJelly converts")
        starting = cls(process, folder, {})
        starting.ask("threads", count=threads)
        weights = str(data_file(f"{STORED['resnet20']}.safetensors"))
        return attrs.evolve(
            starting, answer=starting.ask("convert", weights=weights, calibration=starting.give(calibration), mode=MODE)
        )

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            RuntimeError: it refuses, or is gone.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None  # both are pipes
        try:
            self.process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker ended at {command!r}, exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the worker refuses {command!r}: {answer['error']}")
        return answer

    def give(self, array: npt.NDArray[Any]) -> str:
        """The name of a file that holds an array."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".npy", delete=False) as file:
            np.save(file, array)
        return file.name

    def take(self, command: str, **arguments: Any) -> Logits:
        """The logits that a command writes."""
        out = str(self.folder / "logits.npy")
        self.ask(command, out=out, **arguments)
        found: Logits = np.load(out)
        return found

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None  # a pipe
        self.process.stdin.close()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@attrs.frozen
class Row:
    """One candidate at one batch size: seconds a call, a sample a round."""

    batch: int
    candidate: str
    samples: tuple[float, ...]


@attrs.frozen
class Ratio:
    """How much longer one candidate takes than another: median and quartiles over the rounds."""

    batch: int
    candidate: str
    to: str
    median: float
    low: float
    high: float


@attrs.frozen
class Judgement:
    """How one candidate does on test images."""

    candidate: str
    images: int
    accuracy: float
    agreement: float
    """Share of the images to which it gives the class that the float network gives."""


def quartiles(samples: Iterable[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one sample, that sample."""
    given = list(samples)
    if len(given) < 2:
        return given[0], given[0], given[0]
    low, middle, high = statistics.quantiles(given, n=4, method="inclusive")
    return low, middle, high


def ratio(rows: Mapping[tuple[int, str], Row], batch: int, candidate: str, to: str) -> Ratio | None:
    """The ratio of two rows, round by round; None where one is missing."""
    above, below = rows.get((batch, candidate)), rows.get((batch, to))
    if above is None or below is None or above is below:
        return None
    low, middle, high = quartiles(a / b for a, b in zip(above.samples, below.samples, strict=True))
    return Ratio(batch, candidate, to, middle, low, high)


def ratios(rows: Iterable[Row], steps: tuple[int, ...]) -> list[Ratio]:
    """All ratios that are reported, of the rows that are there."""
    found = {(row.batch, row.candidate): row for row in rows}
    wanted = [(batch, candidate, ANN) for batch, candidate in found]
    slowest = fused_name(SLOW_STEPS)
    for batch in dict.fromkeys(batch for batch, _ in found):
        wanted += [(batch, fused_name(max(steps)), fused_name(min(steps))), (batch, slowest, SERIAL)]
        wanted += [(batch, slowest, JELLY), (batch, SERIAL, JELLY)]
    return [r for batch, candidate, to in wanted if (r := ratio(found, batch, candidate, to)) is not None]


def measured(candidates: Mapping[str, Sample], rounds: int, batch: int) -> list[Row]:
    """So many rounds, in each of which every candidate takes one sample."""
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        for name, sample in candidates.items():
            samples[name].append(sample())
        log(f"batch {batch}: round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}")
    return [Row(batch, name, tuple(found)) for name, found in samples.items()]


def warm(run: Call) -> Sample:
    """Calls a candidate a few times; what takes samples of it from then on."""
    for _ in range(WARM_UPS):
        run()
    return lambda: seconds(run)


def faster(choices: Mapping[str, Sample], rounds: int = 3) -> str:
    """The choice with the least median, of samples that take turns."""
    found: dict[str, list[float]] = {name: [] for name in choices}
    for _ in range(rounds):
        for name, sample in choices.items():
            found[name].append(sample())
    best = min(found, key=lambda name: statistics.median(found[name]))
    log("; ".join(f"{name}: {1e3 * statistics.median(times):.1f} ms" for name, times in found.items()) + f": {best}")
    return best


@attrs.frozen(eq=False)
class Contest:
    """Everything that takes part."""

    split: Split
    pairs: Mapping[int, Pair]
    worker: Worker | None
    peer_batch: int
    rounds: int
    chosen: dict[str, str] = attrs.field(factory=dict)
    """Which memory format and which step mode were the faster ones."""

    def check(self, batches: tuple[int, ...]) -> None:
        """Ends the run unless parallel and serial give the same logits, bit for bit, on every batch that is timed."""
        for steps, pair in self.pairs.items():
            x = torch.tensor(self.split.x_test[: max(batches)])
            wanted = pair.stepped(x)
            for batch in batches:
                if not torch.equal(pair.fused(x[:batch]), wanted[:batch]):
                    raise SystemExit(f"T={steps}, batch {batch}: parallel differs from serial: nothing is timed")
            log(f"T={steps}: parallel gives the logits of serial on {len(x)} images, in batches of {batches}")

    def step_mode(self, x: Images) -> str:
        """The faster step mode of SpikingJelly."""
        assert self.worker is not None  # the callers asked
        found = {mode: self._jelly(x, mode, warm_ups=1) for mode in ("s", "m")}
        return faster(found, rounds=1)

    def _jelly(self, x: Images, step_mode: str, warm_ups: int = WARM_UPS) -> Sample:
        """Samples of SpikingJelly, which times itself."""
        worker = self.worker
        assert worker is not None  # the callers asked
        what = {"x": worker.give(x), "steps": SLOW_STEPS, "step_mode": step_mode}
        for _ in range(warm_ups):
            worker.ask("time", seconds=0, **what)
        return lambda: float(worker.ask("time", seconds=SAMPLE_SECONDS, **what)["seconds"])

    def rows(self, batch: int) -> list[Row]:
        """All candidates of one batch size."""
        images = self.split.x_test[:batch]
        x = torch.tensor(images)
        log(f"batch {batch}: which memory format, and warm-up")
        layouts = {name: warm(call_float(float_network(), x, layout)) for name, layout in FORMATS.items()}
        layout = self.chosen[f"{ANN}, batch {batch}"] = faster(layouts)
        candidates: dict[str, Sample] = {ANN: layouts[layout]}
        for steps, pair in self.pairs.items():
            candidates[fused_name(steps)] = warm(partial(pair.fused, x))
        if SLOW_STEPS in self.pairs:
            candidates[SERIAL] = warm(partial(self.pairs[SLOW_STEPS].stepped, x))
        if self.worker is not None and batch == self.peer_batch:
            step_mode = self.chosen[f"{JELLY}, batch {batch}"] = self.step_mode(images)
            candidates[JELLY] = self._jelly(images, step_mode)
        return measured(candidates, self.rounds, batch)

    def judge(self, count: int) -> list[Judgement]:
        """Every candidate on the first ``count`` test images."""
        x, y = self.split.x_test[:count], self.split.y_test[:count]
        given = torch.tensor(x)
        log(f"accuracy on {len(x)} images")
        parts = [call_float(float_network(), part, torch.contiguous_format)() for part in given.split(self.peer_batch)]
        floats = np.concatenate([np.asarray(part) for part in parts])
        logits: dict[str, Logits] = {ANN: floats}
        logits |= {fused_name(steps): np.asarray(pair.fused(given)) for steps, pair in self.pairs.items()}
        if SLOW_STEPS in self.pairs:
            logits[SERIAL] = np.asarray(self.pairs[SLOW_STEPS].stepped(given))
        if (worker := self.worker) is not None:
            file = worker.give(x)
            apart = float(np.abs(worker.take("floats", x=file) - floats).max())
            if apart > CLOSE:
                raise SystemExit(f"the float network of SpikingJelly is another one: a logit is {apart} away")
            logits[JELLY] = worker.take("logits", x=file, steps=SLOW_STEPS, step_mode="s", batch=self.peer_batch)
        return [judged(name, found, y, floats) for name, found in logits.items()]


def judged(name: str, logits: Logits, y: Labels, floats: Logits) -> Judgement:
    """Accuracy and agreement of logits."""
    classes = logits.argmax(axis=1)
    return Judgement(name, len(y), float((classes == y).mean()), float((classes == floats.argmax(axis=1)).mean()))


def resident() -> dict[str, int]:
    """Resident set now and at its highest, in bytes.

    Raises:
        RuntimeError: a system that does not say.
    """
    status = Path("/proc/self/status")
    if not status.is_file():
        raise RuntimeError("memory is read from /proc/self/status, which this system does not have")
    found = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
    return {name: 1024 * int(found[name].split()[0]) for name in ("VmRSS", "VmHWM")}


def peak(run: Call, calls: int = WARM_UPS) -> int:
    """Bytes by which the resident set rises while a candidate is called, the first call included."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # pages that loading has left in the heap would hide what the calls take
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the highest is from now on
    before = resident()["VmRSS"]
    for _ in range(calls):
        run()
    return resident()["VmHWM"] - before


def probe(candidate: str, file: Path) -> int:
    """`peak` of a candidate in this process: a memory format of the float network, or a saved network's folder."""
    x = torch.from_numpy(np.load(file))
    if candidate in FORMATS:
        return peak(call_float(float_network(), x, FORMATS[candidate]))
    fused = spir.load(candidate, backend="parallel")
    return peak(partial(fused, x))


@attrs.frozen
class Footprint:
    """How much memory one candidate takes above what it has before the first call, in each of some processes."""

    batch: int
    candidate: str
    bytes: tuple[int, ...]


def footprints(pairs: Mapping[int, Pair], x: Images, processes: int, threads: int) -> list[Footprint]:
    """Every candidate in fresh processes, taking turns."""
    found: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.npy")
        np.save(file, x)
        candidates = {f"{ANN}, {name}": name for name in FORMATS}
        for steps, pair in pairs.items():
            candidates[fused_name(steps)] = str(saved := Path(folder, f"{steps}"))
            pair.fused.save(saved)
        for number in range(processes):
            for name, candidate in candidates.items():
                command = [sys.executable, "-m", "benchmarks.parallel_speed", "--threads", str(threads)]
                command += ["--probe", candidate, str(file)]
                root = Path(__file__).resolve().parent.parent
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                shown = subprocess.run(
                    command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True
                )
                found.setdefault(name, []).append(int(shown.stdout))
            log(f"memory: {number + 1} of {processes} processes each")
    return [Footprint(len(x), name, tuple(taken)) for name, taken in found.items()]


def show_rows(rows: list[Row], found: list[Judgement], title: str) -> Table:
    """Times and accuracies as a table."""
    by_name = {j.candidate: j for j in found}
    images = found[0].images if found else 0
    table = Table(title=title)
    heads = ("batch", "candidate", "median ms", "quartiles ms", f"accuracy, {images} images", "class of the float")
    for head in heads:
        table.add_column(head, justify="left" if head == "candidate" else "right")
    for row in rows:
        low, middle, high = (1e3 * t for t in quartiles(row.samples))
        shown = by_name.get(row.candidate)
        rates = (f"{100 * shown.accuracy:.2f} %", f"{100 * shown.agreement:.2f} %") if shown else ("", "")
        table.add_row(str(row.batch), row.candidate, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}", *rates)
    return table


def show_ratios(found: list[Ratio], rounds: int) -> Table:
    """Ratios as a table."""
    table = Table(title=f"ratios of times within a round, {rounds} rounds")
    for head in ("batch", "candidate", "to", "median", "quartiles"):
        table.add_column(head, justify="left" if head in ("candidate", "to") else "right")
    for r in found:
        table.add_row(str(r.batch), r.candidate, r.to, f"{r.median:.3f}", f"{r.low:.3f} .. {r.high:.3f}")
    return table


def show_memory(found: list[Footprint]) -> Table:
    """Peaks as a table, with ratios to the leaner float network."""
    middles = {f.candidate: quartiles(map(float, f.bytes)) for f in found}
    least = min(middle for name, (_, middle, _) in middles.items() if name.startswith(ANN))
    processes = len(found[0].bytes)
    table = Table(title=f"resident peak above the start, batch {found[0].batch}, {processes} fresh processes each")
    for head in ("candidate", "median MB", "quartiles MB", "ratio to the leaner float", f"bar {MEMORY_BAR}"):
        table.add_column(head, justify="left" if head == "candidate" else "right")
    for name, (low, middle, high) in middles.items():
        cells = (f"{middle / 1e6:.1f}", f"{low / 1e6:.1f} .. {high / 1e6:.1f}", f"{middle / least:.2f}")
        bar = "" if name.startswith(ANN) else "within" if middle <= MEMORY_BAR * least else "above"
        table.add_row(name, *cells, bar)
    return table


def numbers(text: str) -> tuple[int, ...]:
    """Numbers separated by commas."""
    return tuple(int(part) for part in text.split(","))


def write(path: Path | None, found: Mapping[str, Any]) -> None:
    """Writes what was found as JSON, where a file is named."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1, default=attrs.asdict) + "\n", encoding="utf-8")


def main() -> int:
    """Prints times, accuracies and ratios, or memory; exit code 1 when memory is above its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="samples of each candidate")
    parser.add_argument("--steps", type=numbers, default=STEPS, help="T of the fused networks")
    parser.add_argument("--batches", type=numbers, default=BATCHES, help="batch sizes")
    parser.add_argument("--threads", type=int, default=1, help="threads of every candidate")
    parser.add_argument("--images", type=int, default=500, help="test images that judge accuracy")
    parser.add_argument("--calibration", type=int, default=CALIBRATION, help="training images to calibrate on")
    parser.add_argument("--peer", type=Path, default=PEER, help="the environment of SpikingJelly")
    parser.add_argument("--peer-batch", type=int, default=PEER_BATCH, help="the batch size at which it takes part")
    parser.add_argument("--memory", action="store_true", help="measure memory, not time, at the largest batch size")
    parser.add_argument("--processes", type=int, default=5, help="with --memory: fresh processes of each candidate")
    parser.add_argument("--json", type=Path, help="write every sample here, too")
    parser.add_argument("--probe", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.probe:
        print(probe(arguments.probe[0], Path(arguments.probe[1])))
        return 0
    console = Console(width=150)
    split = cifar10(STORED["resnet20"])
    model = resnet20(data_file(f"{STORED['resnet20']}.safetensors"))
    calibration = split.x_train[: arguments.calibration]
    pairs = {steps: Pair.of(model, calibration, steps) for steps in arguments.steps}
    settings = {"threads": arguments.threads, "torch": torch.__version__, "calibration": len(calibration)}
    if arguments.memory:
        x = split.x_test[: max(arguments.batches)]
        taken = footprints(pairs, x, arguments.processes, arguments.threads)
        console.print(show_memory(taken))
        write(arguments.json, {"settings": settings, "memory": taken})
        least = min(statistics.median(f.bytes) for f in taken if f.candidate.startswith(ANN))
        spiking = [statistics.median(f.bytes) for f in taken if not f.candidate.startswith(ANN)]
        return int(max(spiking) > MEMORY_BAR * least)
    with tempfile.TemporaryDirectory() as folder:
        worker = None
        if arguments.peer_batch in arguments.batches:
            worker = Worker.start(arguments.peer, Path(folder), calibration, arguments.threads)
        contest = Contest(split, pairs, worker, arguments.peer_batch, arguments.rounds)
        try:
            contest.check(arguments.batches)
            found = contest.judge(arguments.images)
            begun = os.getloadavg()
            rows = [row for batch in arguments.batches for row in contest.rows(batch)]
        finally:
            if worker is not None:
                worker.close()
    load = f"load {begun[0]:.1f} before, {os.getloadavg()[0]:.1f} after"
    title = f"ResNet-20, {arguments.rounds} rounds, threads {arguments.threads}, {load}"
    console.print(show_rows(rows, found, title))
    console.print(show_ratios(compared := ratios(rows, arguments.steps), arguments.rounds))
    console.print("; ".join(f"{name}: {choice}" for name, choice in contest.chosen.items()))
    if worker is None:
        console.print("SpikingJelly was left out.")
    settings |= {"chosen": contest.chosen, "load": [begun, os.getloadavg()], "peer": worker.answer if worker else None}
    write(arguments.json, {"settings": settings, "rows": rows, "ratios": compared, "accuracy": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
