"""parallel: no loop over time on torch; every value is what it decodes to, and a neuron is its count law."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from spir.backend import Backend
from spir.backends.torch_ops._charging import Charge, Counting, Weighted, alone
from spir.backends.torch_ops._device import absent, lossy, quiet
from spir.backends.torch_ops._exactness import exact_dtype, sum_dtype
from spir.backends.torch_ops._firing import Firing
from spir.backends.torch_ops._lowering import Use
from spir.backends.torch_ops._thinning import thinned
from spir.backends.torch_ops.conv2d import Conv2dLowering
from spir.backends.torch_ops.encode import EncodeLowering
from spir.backends.torch_ops.linear import LinearLowering
from spir.backends.torch_ops.quantize import QuantizeLowering
from spir.batches import count, cut
from spir.discovery import find, names
from spir.errors import SpirError, error, located
from spir.ir import Module, Node, kept
from spir.ops._accumulation import scaled
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops._threshold import Triple
from spir.ops.encode import Encode
from spir.ops.integrate import Integrate
from spir.ops.max_pool import MaxPool
from spir.ops.mix import Mix
from spir.ops.neuron_stem import NeuronStem
from spir.ops.relu import Relu
from spir.ops.requant import Requant
from spir.options import option
from spir.packing import WORD_BITS, Packed
from spir.ranges import Ranges, analyse
from spir.text import show_node
from spir.types import SORTED, Int, Real, Spikes, Stored, Tensor, weights

LOWERINGS = "backends.torch_ops"
CACHE_BYTES = 12 * 2**20
"""Values that one piece of a batch may take on the CPU: they are read again while they are near."""
DEVICE_BYTES = 2**30
CODES = ("bits", *SORTED)
"""Codes whose trains follow from what they decode to."""


@attrs.frozen
class Parallel(Backend):
    """A train is held as the integer that it decodes to, so that a layer is one product and cost does not grow with T.

    Integers ride on the fastest type that is proved exact, reals run in float64. Trains are made where they are asked
    for, from counts; currents from the frames of their operands, with time folded into the batch.
    """

    name: ClassVar[str] = "parallel"
    device: str = option("cpu", "where to run: cpu, cuda or cuda:1")

    def refusals(self, module: Module) -> Iterator[SpirError]:
        """An absent device, neurons without a count law, ops without a torch lowering, kernels that lose integers."""
        if missing := absent(self.device):
            yield missing
            return
        for node in module.nodes:
            if found := _unfit(node, module):
                message, fix = found
                yield error("backend", message, fix=fix, op=show_node(node), from_=str(node.origin))
        yield from lossy(module, self.device)

    def build(self, module: Module) -> _Executable:
        """Lowers every op once; what only a law reads melts into it."""
        device, ranges = torch.device(self.device), analyse(module)
        steps: dict[str, _Step] = {}
        plain: dict[str, _Step] = {}
        sums: dict[str, Weighted] = {}
        for node in module.nodes:
            with located(op=show_node(node), from_=str(node.origin)):
                if (triple := _triple(node.op)) is None:
                    step = plain[node.result] = _plain(node, module, ranges, device)
                    if (weighted := _weighted(step, module, device)) is not None:
                        sums[node.result] = weighted
                else:
                    law = Counting.of(node, Charge.of(node, module, ranges), triple, sums, device)
                    thinning = node.op.thinning if isinstance(node.op, Neuron) else None
                    step = _Step(node, law.reads, thinned(law, thinning, node.type, law.held))
                    for name in law.inner:
                        del steps[name]
                steps[node.result] = step
        return _Executable(module, steps, plain, device)


@attrs.frozen(eq=False)
class _Step:
    """A node, the values that it reads, and how decoded values become its own."""

    node: Node
    reads: tuple[str, ...]
    compute: Callable[..., torch.Tensor]
    held: torch.dtype | None = None
    """What the result is converted to."""

    def __call__(self, *x: torch.Tensor) -> torch.Tensor:
        made = self.compute(*x)
        return made if self.held is None else made.to(self.held)


@attrs.frozen(eq=False, slots=False)
class _Executable:
    """The lowered module; nothing in it changes from call to call.

    Attributes:
        steps: what a run computes, in order, by result.
        plain: every node without a law, as it is by itself.
    """

    module: Module
    steps: Mapping[str, _Step]
    plain: Mapping[str, _Step]
    device: torch.device

    def run(self, x: NDArray[Any], keep: str = "") -> dict[str, Stored]:
        """See `spir.backend.Executable`.

        Raises:
            SpirError[data]: an input of the wrong shape, type or range.
        """
        parts = self._parts(x, keep, _Values.stored)
        return {name: _joined(self.module.types[name], [part[name] for part in parts]) for name in parts[0]}

    def run_packed(self, x: NDArray[Any], keep: str = "") -> dict[str, Stored | Packed]:
        """See `spir.backend.Packing`.

        Raises:
            SpirError[data]: an input of the wrong shape, type or range.
        """
        parts = self._parts(x, keep, _Values.packed)
        found: dict[str, Stored | Packed] = {}
        for name, first in parts[0].items():
            values = [part[name] for part in parts]
            packed = isinstance(first, Packed)
            found[name] = Packed.concatenate(values) if packed else _joined(self.module.types[name], values)
        return found

    def _parts(self, x: NDArray[Any], keep: str, show: Callable[[_Values, str], Any]) -> list[dict[str, Any]]:
        """What is shown of each piece of the batch."""
        stored = self.module.input.type.read(x)
        pieces = math.ceil(count(self.module, stored) / self._at_once(keep))
        with quiet(self.device):
            if pieces < 2:
                return [dict(self._walk(stored, keep, show))]
            size = math.ceil(count(self.module, stored) / pieces)
            return [dict(self._walk(piece, keep, show)) for piece in cut(self.module, stored, size)]

    def _walk(self, stored: Stored, keep: str, show: Callable[[_Values, str], Any]) -> Iterator[tuple[str, Any]]:
        given = torch.from_numpy(stored).to(self.device)
        source, shown = self.module.input, self._shown(keep)
        held = {source.name: _summed(source.type, given)}
        for name, step, gone in self.order:
            if step is not None:
                held[name] = step(*[held[operand] for operand in step.reads])
            if name in shown:
                yield name, show(_Values(self, given, dict(held)), name)
            for one in gone:
                held.pop(one, None)

    def _shown(self, keep: str) -> frozenset[str]:
        """The names that are asked for."""
        output = self.module.output
        return frozenset(n for n in self.module.types if n == output or kept(n, keep)) if keep else frozenset((output,))

    def _at_once(self, keep: str) -> int:
        """Samples that stay near, or whose frames memory takes."""
        near = CACHE_BYTES if self.device.type == "cpu" else DEVICE_BYTES
        trains = [t for t in map(self.module.types.__getitem__, self._shown(keep)) if t.train]
        frames = max((3 * 8 * t.size * t.steps for t in trains), default=1)
        return max(1, min(near // self.near, DEVICE_BYTES // frames))

    @cached_property
    def order(self) -> tuple[tuple[str, _Step | None, tuple[str, ...]], ...]:
        """Every value, how a run makes it, if it does, and what it may forget then."""
        return tuple((name, self.steps.get(name), self.forgotten[name]) for name in self.module.types)

    @cached_property
    def forgotten(self) -> Mapping[str, tuple[str, ...]]:
        """The values that nothing after this one is made of, not even where it is asked for by name."""
        last: dict[str, str] = {}
        sources: dict[str, frozenset[str]] = {self.module.input.name: frozenset((self.module.input.name,))}
        for node in self.module.nodes:
            below = frozenset[str]().union(*(sources[o] for o in node.operands))
            step = self.steps.get(node.result)
            last |= dict.fromkeys((*below, *(step.reads if step is not None else ()), node.result), node.result)
            own = frozenset((node.result,))
            melted = step is None or (node.type.train is not None and (node.result in self.plain or node.type.timed))
            sources[node.result] = below | own if melted else own
        found: dict[str, list[str]] = {name: [] for name in self.module.types}
        for name, reader in last.items():
            found[reader].append(name)
        return {name: tuple(gone) for name, gone in found.items()}

    @cached_property
    def near(self) -> int:
        """Bytes of the values of a sample that live at once, at most."""
        types, live, peak = self.module.types, {self.module.input.name}, 1
        for name in types:
            if name in self.steps:
                live.add(name)
                peak = max(peak, sum(4 * types[one].size for one in live) + 4 * types[name].size)
            live -= set(self.forgotten[name])
        return peak

    @property
    def bytes_per_sample(self) -> int:
        """The input and the values that live at once."""
        source = self.module.input.type
        return 8 * source.size * source.steps + 2 * self.near


@attrs.frozen(eq=False)
class _Values:
    """Decoded values that stand ready, and all that follows from them: the values between, trains, words."""

    network: _Executable
    given: torch.Tensor
    held: dict[str, torch.Tensor]
    framed: dict[str, torch.Tensor] = attrs.field(factory=dict, init=False)

    def stored(self, name: str) -> Stored:
        """As the type of a value stores it, in an array of its own."""
        type_ = self.network.module.types[name]
        dtype = torch.float64 if isinstance(type_.encoding, Real) else torch.int64
        found = self.value(name) if type_.train is None else self.frames(name)
        return np.array(found.to("cpu", dtype).numpy(), order="C")

    def packed(self, name: str) -> Stored | Packed:
        """In words where words hold it."""
        train = self.network.module.types[name].train
        if not isinstance(train, Spikes) or train.steps > WORD_BITS:
            return self.stored(name)
        if train.net is not None and not -1 <= train.net[0] <= train.net[1] <= 1:
            return self.stored(name)
        if train.code not in CODES:
            return Packed.of(np.asarray(self.stored(name), dtype=np.int64))
        value = self.value(name).to("cpu", torch.int64).numpy()
        return (
            Packed.bits(value, train.steps) if train.code == "bits" else Packed.sorted(value, train.steps, train.code)
        )

    def value(self, name: str) -> torch.Tensor:
        """What a value decodes to, ``[N, *shape]``."""
        if name not in self.held:
            step = self.network.plain[name]
            self.held[name] = step(*(self.value(operand) for operand in step.node.operands))
        return self.held[name]

    def frames(self, name: str) -> torch.Tensor:
        """A train, ``[T, N, *shape]``: made of its value where that says all, else of the frames of its operands."""
        if name not in self.framed:
            self.framed[name] = self._frames(name)
        return self.framed[name]

    def _frames(self, name: str) -> torch.Tensor:
        module = self.network.module
        type_ = module.types[name]
        if name == module.input.name:
            return self.given
        if isinstance(type_.encoding, Spikes) and type_.encoding.code in CODES:
            return _coded(self.value(name), type_, type_.encoding)
        node = module.definitions[name]
        if isinstance(node.op, Encode):
            return _lowered(node, module, (self.value(node.operands[0]),))
        frames = [self.frames(operand) for operand in node.operands]
        if isinstance(node.op, Neuron):
            return _lowered(node, module, tuple(frames[0]))
        if isinstance(node.op, Mix):
            return _mixed(node.op, frames[0])
        (steps, n), step = (type_.steps, frames[0].shape[1]), self.network.plain[name]
        folded: torch.Tensor = step.compute(*(_lasting(f, steps).flatten(0, 1) for f in frames))
        return folded.reshape(steps, n, *type_.shape)


def _triple(op: Any) -> Triple | None:
    return op.triple if isinstance(op, (Requant, Neuron)) else None


def _unfit(node: Node, module: Module) -> tuple[str, str] | None:
    """Why a node cannot run, and the way out."""
    op, types = node.op, (node.type, *module.operand_types(node))
    if isinstance(op, Neuron):
        if isinstance(op, NeuronStem) and scaled(op.shift):
            return f"{op.name} scales every frame (r > 0): its trains do not follow from sums", "backend serial or hw"
        if op.triple is None:
            return f"{op.name} has no count law: its trains do not follow from sums", "fuse-parallel, or backend serial"
        return None
    if isinstance(op, Integrate) and scaled(op.shift):
        return "parallel sums what trains decode to, and scaled terms say more than that", "backend serial or hw"
    if op.name not in names(LOWERINGS) and not isinstance(op, Mix):
        fix = f"add backends/torch_ops/{op.name}.py, or rewrite the op with a pass"
        return f"parallel has no torch lowering of {op.name}", fix
    if any(t.train for t in types) and not isinstance(op, (LinearMap, MaxPool, Encode, Integrate, Mix)):
        return f"what {op.name} makes of trains is not known without their frames", "backend serial"
    return None


def _plain(node: Node, module: Module, ranges: Mapping[str, Ranges], device: torch.device) -> _Step:
    """A node without a law, by itself."""
    types, dtype = module.operand_types(node), _arithmetic(node, module, ranges, device)
    whole = isinstance(node.type.encoding, Real)
    held = None if whole else exact_dtype(ranges[node.result].value.magnitude, device)
    match node.op:
        case Encode(code="isi"):
            density = node.op.density
            return _Step(node, node.operands, lambda x: _counted(x, density).to(held))
        case Encode(thinning=thinning) if held is not None:
            return _Step(node, node.operands, thinned(_same, thinning, node.type, held))
        case Integrate(bias=None):
            return _Step(node, node.operands, _same)
        case Integrate(bias=bias) if bias is not None:
            wide = max(
                int(np.abs(bias.values).max()),
                *(ranges[name].value.magnitude for name in (node.result, *node.operands)),
            )
            total = exact_dtype(wide, device)
            offset = Use(node.op, types, total, device).constant(bias)
            return _Step(node, node.operands, lambda x: x.to(total) + offset)
        case Mix(divisor=divisor):
            return _Step(node, node.operands, lambda x: x.to(held) * divisor)
    lowering = find(LOWERINGS, node.op.name).of(Use(node.op, types, dtype, device))  # type: ignore[attr-defined]
    if isinstance(lowering, QuantizeLowering) and held is not None:
        return _Step(node, node.operands, lambda x: _quantized(x, lowering, held))
    follows = whole or isinstance(node.op, (LinearMap, MaxPool, Relu))
    return _Step(node, node.operands, lowering, None if follows else held)


def _arithmetic(node: Node, module: Module, ranges: Mapping[str, Ranges], device: torch.device) -> torch.dtype | None:
    """What a node computes in, values and frames alike; None where it takes numbers as they come."""
    types = module.operand_types(node)
    if isinstance(types[0].encoding, Real) or isinstance(node.type.encoding, Real):
        return torch.float64
    if isinstance(node.op, (MaxPool, Relu)) or (isinstance(node.op, LinearMap) and node.op.relabels):
        return None
    if not isinstance(node.op, LinearMap):
        return torch.int64
    operands = [ranges[name].value | ranges[name].frame for name in node.operands]
    return sum_dtype(node.op, tuple(t.shape for t in types), operands, device)


def _weighted(step: _Step, module: Module, device: torch.device) -> Weighted | None:
    """A weighted sum of integers that may melt into the law that reads it."""
    lowering = step.compute
    if not isinstance(lowering, (Conv2dLowering, LinearLowering)) or isinstance(step.node.type.encoding, Real):
        return None
    if lowering.wide is not None or device.type != "cpu" or not alone(module, step.node.result):
        return None
    return Weighted(step.node.operands[0], lowering)


def _quantized(x: torch.Tensor, to: QuantizeLowering, held: torch.dtype) -> torch.Tensor:
    """As the quantiser, but in memory of its own and in the order that convolutions read."""
    steps = (x.to(to.dtype) / to.scale).add_(0.5).floor_().clamp_(to.lo, to.hi)
    last = x.ndim == 4 and held == torch.float32
    return steps.to(dtype=held, memory_format=torch.channels_last if last else torch.preserve_format)


def _counted(x: torch.Tensor, density: Fraction) -> torch.Tensor:
    """How many spikes stand for integers, where each is worth more than one."""
    if density == 1:
        return x
    whole = x.to(torch.int64)
    return whole.sign() * (whole.abs() * density.numerator // density.denominator)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _summed(type_: Tensor, given: torch.Tensor) -> torch.Tensor:
    """What a stored input decodes to."""
    if type_.train is None:
        return given
    factors = torch.tensor(weights(type_.train.code, type_.steps), device=given.device)
    return (given * factors.view(-1, *(1,) * (given.ndim - 1))).sum(dim=0)


def _lowered(node: Node, module: Module, frames: Sequence[torch.Tensor]) -> torch.Tensor:
    """The frames of a train that depends on when its operand spikes, or of an encoder, step by step."""
    kind: Any = Firing if isinstance(node.op, Neuron) else EncodeLowering
    lowering = kind.of(Use(node.op, module.operand_types(node), torch.int64, frames[0].device))
    return torch.stack(list(lowering.steps(iter(frames))))


def _lasting(frames: torch.Tensor, steps: int) -> torch.Tensor:
    """As long as the longest train that it meets: what has ended is silent."""
    missing = steps - len(frames)
    return frames if not missing else torch.cat([frames, frames.new_zeros((missing, *frames.shape[1:]))])


def _coded(value: torch.Tensor, type_: Tensor, train: Spikes) -> torch.Tensor:
    """The frames of a train that follow from its value."""
    integers = Tensor(type_.shape, Int(train.lo, train.hi, train.scale))
    encoder = EncodeLowering.of(Use(Encode(train.steps, train.code), (integers,), torch.int64, value.device))
    return torch.stack(list(encoder.steps(iter((value,)))))


def _mixed(op: Mix, frames: torch.Tensor) -> torch.Tensor:
    """The matrix product over time, on integers."""
    whole = frames.to(torch.int64)
    rows = [whole.new_tensor(row).view(-1, *(1,) * (whole.ndim - 1)) for row in op.matrix.values]
    return torch.stack([(whole * row).sum(dim=0) for row in rows])


def _joined(type_: Tensor, parts: list[Stored]) -> Stored:
    """The batch of its pieces."""
    if len(parts) == 1:
        return parts[0]
    whole: NDArray[Any] = np.concatenate(parts, axis=0 if type_.train is None else 1)
    return whole
