"""Weights fitted so that a network of few levels meets the sums of the one that it stands for: ridge regression."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs
import numpy as np

from spir.ir import Array, Module, Node
from spir.ops._linear import surrounded
from spir.ops.add import Add
from spir.ops.conv2d import Conv2d
from spir.ops.linear import Linear
from spir.types import Real, Reals

PENALTIES = (math.inf, 10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""What may hold the weights near those given, in mean squares of the columns; with the first only the bias moves."""
WIDEST = 4608
"""Inputs of an output, at most: the work grows with their third power. 512 channels under a 3x3 kernel."""
BLOCK = 2**24
"""Elements of the columns that stand in memory at once."""


def sites(module: Module) -> Mapping[str, Node]:
    """Where the sum of a layer with float weights is complete, with the branches that are added to it -> the layer.

    One layer a sum: of two branches with weights the later one; the other one's sum is its own result.
    """
    found: dict[str, Node] = {}
    for node in reversed(module.nodes):
        if not isinstance(node.op, (Conv2d, Linear)) or node.op.weight_scale is not None:
            continue
        place = node.result
        while place != module.output and isinstance(node.type.encoding, Real):
            readers = module.readers[place]
            if len(readers) != 1 or not isinstance(readers[0].op, Add) or readers[0].operands.count(place) > 1:
                break
            place = readers[0].result
        found[node.result if place in found else place] = node
    return found


def columns(node: Node) -> int:
    """Inputs of one output of a layer."""
    assert isinstance(node.op, (Conv2d, Linear))  # what `sites` finds
    return math.prod(node.op.weight.values.shape[1:])


def refitted(node: Node, operand: Sequence[Reals], sums: Sequence[Reals], *, rectified: bool) -> Node | None:
    """The layer with weights and bias that make up for what its sum misses; ``sums`` change in place.

    Linear regression of what is missed on what the layer reads, held near the given weights (ridge). Each half of the
    samples is predicted with weights fitted to the other half, under each of `PENALTIES`: the best one fits both.

    Args:
        node: a convolution or linear layer of reals.
        operand: ``[n, *shape]`` parts of what it reads.
        sums: ``[2 n, *shape]`` parts of the sum: what it should be in even samples, what it is in odd ones.
        rectified: whether a rectifier reads the sum: where both are below 0, nothing is missed. As it depends on the
            fit who is below 0, a first fit goes without (Zhang et al. 1505.06798, section 3.3, solve it alike).

    Returns:
        None where nothing is missed, or where there is one sample.
    """
    op = node.op
    assert isinstance(op, (Conv2d, Linear))  # what `sites` finds
    if sum(map(len, operand)) < 2 or all((part[0::2] == part[1::2]).all() for part in sums):
        return None
    step = _step(op, operand, (part[0::2] - part[1::2] for part in sums))
    if rectified:
        again = (_missed(part, step.apply(x, real=True)) for x, part in zip(operand, sums, strict=True))
        step = _step(op, operand, again)
    for x, part in zip(operand, sums, strict=True):
        part[1::2] += step.apply(x, real=True)
    assert step.bias is not None  # _step gives one
    bias = step.bias.values + (0.0 if op.bias is None else op.bias.values)
    weight = Array.of(op.weight.values + step.weight.values)
    return attrs.evolve(node, op=attrs.evolve(op, weight=weight, bias=Array.of(bias)))


@attrs.frozen(eq=False)
class _Moments:
    """``U' U`` ``[G, k, k]``, ``U' R`` ``[G, k, o]`` and ``R' R`` ``[G, o]`` of columns U and what is missed, R."""

    columns: Reals
    mixed: Reals
    missed: Reals

    @classmethod
    def of(cls, op: Conv2d | Linear, x: Reals, missed: Reals) -> _Moments:
        """The sums over some samples; those of parts add up."""
        groups = op.groups if isinstance(op, Conv2d) else 1
        size, outputs = math.prod(op.weight.values.shape[1:]) + 1, len(op.weight.values) // groups
        found = cls(np.zeros((groups, size, size)), np.zeros((groups, size, outputs)), np.zeros((groups, outputs)))
        for u, r in _rows(op, x, missed):
            turned = u.swapaxes(1, 2)
            found += cls(turned @ u, turned @ r, (r * r).sum(axis=1))
        return found

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.columns + other.columns, self.mixed + other.mixed, self.missed + other.missed)

    def change(self, penalty: float) -> Reals:
        """The change of weights ``[G, k, o]`` with the least squares; the constant, the last column, is free."""
        if math.isinf(penalty):
            change = np.zeros_like(self.mixed)
            change[:, -1] = self.mixed[:, -1] / self.columns[:, -1, -1:]
            return change
        squares = np.diagonal(self.columns, axis1=1, axis2=2)[:, :-1].mean(axis=1)
        held = np.zeros_like(self.columns)
        each = np.arange(self.columns.shape[1] - 1)
        held[:, each, each] = penalty * np.where(squares > 0, squares, 1.0)[:, None]
        return np.asarray(np.linalg.solve(self.columns + held, self.mixed))

    def left(self, change: Reals) -> float:
        """The squares that are still missed after a change."""
        return float((self.missed + (change * (self.columns @ change - 2 * self.mixed)).sum(axis=1)).sum())


def _step(op: Conv2d | Linear, operand: Sequence[Reals], missed: Iterable[Reals]) -> Conv2d | Linear:
    """The layer that adds what is missed."""
    halves: list[_Moments | None] = [None, None]
    seen = 0
    for x, part in zip(operand, missed, strict=True):
        for i in range(2):
            mine = slice((seen + i) % 2, None, 2)
            more = _Moments.of(op, x[mine], part[mine])
            before = halves[i]
            halves[i] = more if before is None else before + more
        seen += len(x)
    one, two = halves
    assert one is not None  # there are samples
    assert two is not None
    scores = [two.left(one.change(p)) + one.left(two.change(p)) for p in PENALTIES]
    change = (one + two).change(PENALTIES[int(np.argmin(scores))])
    weight = change[:, :-1].swapaxes(1, 2).reshape(op.weight.values.shape)
    return attrs.evolve(op, weight=Array.of(weight), bias=Array.of(change[:, -1].reshape(-1)))


def _missed(part: Reals, added: Reals) -> Reals:
    """What a sum ``[2 n, *shape]`` misses without ``added``, where a rectifier sees the difference with it."""
    given, own = part[0::2], part[1::2] + added
    return np.asarray(np.where((given <= 0) & (own <= 0), 0.0, given - own) + added)


def _rows(op: Conv2d | Linear, x: Reals, missed: Reals) -> Iterator[tuple[Reals, Reals]]:
    """What each group of outputs sees ``[G, rows, k]``, a 1 last, and what it misses ``[G, rows, o]``; in blocks."""
    groups, inputs = (op.groups, x.shape[1] // op.groups) if isinstance(op, Conv2d) else (1, x.shape[1])
    taps = op.weight.values.shape[2:]
    size, positions = inputs * math.prod(taps), math.prod(missed.shape[2:])
    at_once = max(1, BLOCK // (groups * (size + 1) * positions))
    for start in range(0, len(x), at_once):
        part, r = x[start : start + at_once], missed[start : start + at_once]
        n = len(part)
        seen = _windows(op, part) if isinstance(op, Conv2d) else part
        split = np.moveaxis(seen.reshape(n, groups, inputs, *seen.shape[2:]), 2, -1 - len(taps))
        u = np.ones((groups, n * positions, size + 1))
        u[..., :-1] = split.swapaxes(0, 1).reshape(groups, n * positions, size)
        yield u, r.reshape(n, groups, -1, positions).transpose(1, 0, 3, 2).reshape(groups, n * positions, -1)


def _windows(op: Conv2d, x: Reals) -> Reals:
    """``[N, C, H', W', kh, kw]``."""
    top, bottom, left, right = op.padding
    padded = surrounded(x, ((top, bottom), (left, right)))
    down, across = ((k - 1) * d + 1 for k, d in zip(op.weight.values.shape[2:], op.dilation, strict=True))
    seen = np.lib.stride_tricks.sliding_window_view(padded, (down, across), axis=(2, 3))
    return seen[:, :, :: op.stride[0], :: op.stride[1], :: op.dilation[0], :: op.dilation[1]]
