"""When values are there: windows of neurons, delays of skip paths, latency. An analysis, never part of a type."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from spir.ir import Module, Node
from spir.ops._linear import LinearMap
from spir.ops._neuron import Neuron
from spir.ops.encode import Encode


@attrs.frozen
class Delay:
    """A branch that waits: ``operand`` of ``result`` is there ``windows`` windows before the others."""

    result: str
    operand: str
    windows: int
    steps: int


@attrs.frozen
class Schedule:
    """For every train the window in which its first frame appears, counted from that of the input.

    ``windows`` is how many the output needs, its own among them, and ``latency`` how many steps that takes; of bits the
    latency of L layers of neurons is (L + 1) b steps. Source: SDANN, pipelining (reconstruction).
    """

    start: Mapping[str, int]
    delays: tuple[Delay, ...]
    windows: int
    latency: int


def schedule(module: Module) -> Schedule:
    """The schedule of a verified module; a two-phase neuron, or an encoder of integrals, starts one window later.

    A window lasts as many steps as the longest train in it has frames.
    """
    start: dict[str, int] = {module.input.name: 0}
    late: list[tuple[str, str, int, int]] = []
    for node in module.nodes:
        ready = {o: start[o] for o in node.operands}
        latest = max(ready.values())
        if isinstance(node.op, LinearMap) and node.type.train is not None:
            late += [(node.result, o, at, latest) for o, at in ready.items() if at < latest]
        start[node.result] = latest + int(_waits(node, module))
    lengths = _lengths(start, module)
    delays = (Delay(result, o, latest - at, sum(lengths[at:latest])) for result, o, at, latest in late)
    windows = min(len(lengths), start[module.output] + 1)
    return Schedule(start, tuple(delays), windows, sum(lengths[:windows]))


def _lengths(start: Mapping[str, int], module: Module) -> list[int]:
    """The steps of each window: the frames of the longest train in it."""
    longest: dict[int, int] = {}
    for name, at in start.items():
        if module.types[name].train is not None:
            longest[at] = max(longest.get(at, 0), module.types[name].steps)
    return [longest.get(at, 0) for at in range(max(longest, default=-1) + 1)]


def _waits(node: Node, module: Module) -> bool:
    """Whether an op emits its first frame only after the last frame of what it reads."""
    if isinstance(node.op, Neuron):
        return node.op.two_phase
    return isinstance(node.op, Encode) and _integrated(node, module)


def _integrated(node: Node, module: Module) -> bool:
    """Whether integers were made of frames, and not by the input's quantiser."""
    waiting = list(node.operands)
    for name in waiting:
        source = module.definitions.get(name)
        if module.types[name].train is not None:
            return True
        waiting += [] if source is None else [o for o in source.operands if o not in waiting]
    return False
