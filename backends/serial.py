"""serial: steps through time on torch, frame after frame; any op, any neuron, any device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from spir.backend import Backend
from spir.backends.torch_ops._device import absent, lossy, quiet
from spir.backends.torch_ops._exactness import sum_dtype
from spir.backends.torch_ops._firing import Firing
from spir.backends.torch_ops._lowering import Lowering, Use
from spir.discovery import find, names
from spir.errors import SpirError, error, located
from spir.ir import Module, Node, kept
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops.conv2d import Conv2d
from spir.ops.max_pool import MaxPool
from spir.options import option
from spir.ranges import Ranges, analyse
from spir.text import show_node
from spir.types import Real, Stored, Tensor

LOWERINGS = "backends.torch_ops"
Frames = list[torch.Tensor] | Iterator[torch.Tensor]


@attrs.frozen
class Serial(Backend):
    """The readable backend: a value is its frames in order, an op is what it does to one frame, a neuron is its loop.

    Reals run in float64, linear ops on integers in the fastest type that is proved exact, state in int64.
    """

    name: ClassVar[str] = "serial"
    device: str = option("cpu", "where to run: cpu, cuda or cuda:1")

    def refusals(self, module: Module) -> Iterator[SpirError]:
        """An absent device, ops without a torch lowering, kernels that lose integers."""
        if (missing := absent(self.device)) is not None:
            yield missing
            return
        lowered = names(LOWERINGS)
        for node in module.nodes:
            if not isinstance(node.op, Neuron) and node.op.name not in lowered:
                yield error(
                    "backend",
                    f"serial has no torch lowering of {node.op.name}",
                    fix=f"add backends/torch_ops/{node.op.name}.py, or rewrite the op with a pass",
                    op=show_node(node),
                    from_=str(node.origin),
                )
        yield from lossy(module, self.device)

    def build(self, module: Module) -> _Executable:
        """Lowers every op once."""
        device = torch.device(self.device)
        ranges = analyse(module)
        chosen = {n.result: _arithmetic(n, module.operand_types(n), ranges, device) for n in module.nodes}
        carried = _carried(module, chosen)
        steps = []
        for node in module.nodes:
            with located(op=show_node(node), from_=str(node.origin)):
                kind = Firing if isinstance(node.op, Neuron) else find(LOWERINGS, node.op.name)
                use = Use(node.op, module.operand_types(node), chosen[node.result], device)
                lowering = kind.of(use)  # type: ignore[attr-defined]
            steps.append(_Step(node, lowering, carried[node.result]))
        return _Executable(module, tuple(steps), device)


@attrs.frozen(eq=False)
class _Step:
    """A node, how it runs, and the type that its result's frames are handed on in."""

    node: Node
    lowering: Lowering[Any]
    carried: torch.dtype | None


@attrs.frozen(eq=False, slots=False)
class _Executable:
    """The lowered module; nothing in it changes from call to call."""

    module: Module
    steps: tuple[_Step, ...]
    device: torch.device

    def run(self, x: NDArray[Any], keep: str = "") -> dict[str, Stored]:
        """See `spir.backend.Executable`.

        Raises:
            SpirError[data]: an input of the wrong shape, type or range.
        """
        type_ = self.module.input.type
        stored = type_.read(x)
        frames = list(stored) if type_.train is not None else [stored]
        with quiet(self.device):
            return dict(self._walk([torch.from_numpy(frame).to(self.device) for frame in frames], keep))

    def steer(self, x: NDArray[Any], stops: str) -> Iterator[tuple[str, Stored]]:
        """See `spir.backend.Steered`."""
        frames = [torch.from_numpy(self.module.input.type.read(x)).to(self.device)]
        walk = self._walk(frames, stops, steered=True)
        for _ in range(sum(kept(name, stops) for name in self.module.types)):
            yield self._resumed(walk, stops)

    def _resumed(self, walk: Iterator[tuple[str, Stored]], stops: str) -> tuple[str, Stored]:
        with quiet(self.device):
            return next(stop for stop in walk if kept(stop[0], stops))

    def _walk(self, frames: list[torch.Tensor], keep: str, *, steered: bool = False) -> Iterator[tuple[str, Stored]]:
        """What is kept, in order, and the output; ``steered`` goes on with what the caller has made of each."""
        source, output = self.module.input, self.module.output
        values: dict[str, Frames] = {source.name: frames}
        if kept(source.name, keep) or source.name == output:
            stored = _stored(source.type, frames)
            yield source.name, stored
            if steered:
                values[source.name] = [torch.from_numpy(stored).to(self.device)]
        for step in self.steps:
            node, name = step.node, step.node.result
            made = step.lowering.steps(*(iter(values[operand]) for operand in node.operands))
            passed = (frame if step.carried is None else frame.to(step.carried) for frame in made)
            shown = kept(name, keep) or name == output
            values[name] = passed if name in self.flowing and not shown else (held := list(passed))
            if shown:
                stored = _stored(node.type, held)
                if steered:
                    del held, values[name]
                yield name, stored
                if steered:
                    values[name] = [torch.from_numpy(stored).to(self.device)]
                del stored
            for operand in self.forgotten[name]:
                del values[operand]

    @cached_property
    def flowing(self) -> frozenset[str]:
        """Frames that one neuron, readout or maximum uses up in turn, so that they never stand in memory at once."""
        readers = self.module.readers
        return frozenset(
            step.node.result
            for step in self.steps
            if isinstance(step.node.op, (LinearMap, MaxPool)) and step.node.type.train is not None
            if len(readers[step.node.result]) == 1 and not isinstance(readers[step.node.result][0].op, LinearMap)
        )

    @cached_property
    def forgotten(self) -> Mapping[str, tuple[str, ...]]:
        """The values that no node after this one reads."""
        last = {name: nodes[-1].result if nodes else name for name, nodes in self.module.readers.items()}
        found: dict[str, list[str]] = {step.node.result: [] for step in self.steps}
        for name, reader in last.items():
            found.setdefault(reader, []).append(name)
        return {name: tuple(gone) for name, gone in found.items()}

    @cached_property
    def bytes_per_sample(self) -> int:
        """The largest sum of what lives at once: values until their last reader, and the state of one op."""
        types, sizes = self.module.types, {self.module.input.name: 8 * self.module.input.type.size}
        sizes[self.module.input.name] *= self.module.input.type.steps
        peak = sizes[self.module.input.name]
        for step in self.steps:
            name, type_ = step.node.result, step.node.type
            width = step.carried.itemsize if step.carried is not None else 8
            sizes[name] = width * type_.size * (1 if name in self.flowing else type_.steps)
            widest = max(type_.size, *(types[operand].size for operand in step.node.operands))
            peak = max(peak, sum(sizes.values()) + 4 * 8 * widest + _columns(step))
            for operand in self.forgotten[name]:
                del sizes[operand]
        return peak


def _columns(step: _Step) -> int:
    """Bytes of the windows that a convolution of a sample lays out; only the kernels of float32 do without."""
    op, dtype = step.node.op, step.lowering.dtype
    if not isinstance(op, Conv2d) or dtype is None or dtype == torch.float32:
        return 0
    _, height, width = step.node.type.shape
    window: int = op.weight.values[0].size * op.groups
    return window * height * width * dtype.itemsize


def _arithmetic(
    node: Node, types: tuple[Tensor, ...], ranges: Mapping[str, Ranges], device: torch.device
) -> torch.dtype | None:
    """What a node computes in; None where it takes numbers as they come."""
    if isinstance(types[0].encoding, Real) or isinstance(node.type.encoding, Real):
        return torch.float64
    if isinstance(node.op, MaxPool):
        return None
    if not isinstance(node.op, LinearMap):
        return torch.int64
    if node.op.relabels:
        return None
    operands = [ranges[name].frame for name in node.operands]
    return sum_dtype(node.op, tuple(t.shape for t in types), operands, device)


def _carried(module: Module, chosen: Mapping[str, torch.dtype | None]) -> dict[str, torch.dtype | None]:
    """The widest type that the linear readers of a value compute in, so that frames are converted once; else None."""
    wanted: dict[str, list[torch.dtype]] = {name: [] for name in module.types}
    carried: dict[str, torch.dtype | None] = {}
    for node in reversed(module.nodes):
        found = wanted[node.result]
        carried[node.result] = max(found, key=lambda dtype: (dtype.itemsize, not dtype.is_floating_point), default=None)
        if not isinstance(node.op, LinearMap) or isinstance(node.type.encoding, Real):
            continue
        own = chosen[node.result]
        for operand in node.operands:
            wanted[operand] += found if own is None else [own]
    return carried


def _stored(type_: Tensor, frames: list[torch.Tensor]) -> Stored:
    """Frames as the stored value that they are, in an array of its own."""
    dtype = torch.float64 if isinstance(type_.encoding, Real) else torch.int64
    arrays = [np.array(frame.to("cpu", dtype).numpy(), order="C") for frame in frames]
    return arrays[0] if type_.train is None else np.stack(arrays)
