"""Which trains to thin by how much: a search for the fewest synaptic operations that a budget of accuracy allows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.costs import synapses
from spir.ir import Module, Node
from spir.ops._thinning import Thinning
from spir.rewriting import Context
from spir.types import Reals, Spikes, scale_of

ROUNDINGS = (0, 1, 2, 3, 4)
KEPT = {"count": (0, 4, 3, 2), "window": (0, 5, 4, 3), "position": (0, 2, 3, 4)}
"""The k of RoT and, by reading, of DRLO that are tried on every train."""
COUNTED = 64
"""Samples on which spikes are counted."""
PROBED = 256
"""Samples on which a single setting is weighed; the budget is held on all."""

Settings = Mapping[str, Thinning]
"""By the name of the train; trains that stay whole are left out."""


@attrs.frozen
class Measured:
    """Settings with what they cost: points of top-1 lost, and synaptic operations a sample."""

    settings: Settings
    drop: float
    operations: float


@attrs.frozen(eq=False, slots=False)
class Search:
    """One network, the trains that may be thinned, and samples ``[N, *shape]`` with their classes, where known.

    ``made`` puts settings into the network; ``title`` opens each line of progress. Nothing is random.
    """

    module: Module
    trains: tuple[Node, ...]
    mode: str
    x: NDArray[np.generic]
    labels: NDArray[np.int64] | None
    context: Context
    made: Callable[[Settings], Module]
    title: str

    def run(self, budget: float) -> Measured:
        """The fewest operations found within ``budget`` points of top-1.

        Settings are weighed one train at a time by how far they move the answers and by the operations that they save:
        first RoT and DRLO apart, then what may pay, next to what the other trains chose. At a price of movement each
        train takes what pays best, and the price is the lowest that the budget allows. Uniform settings take part. In
        the end trains take one more step each, the cheapest first, while the budget holds.
        """
        moves = self._weighed({}, {node.result: list(self._apart(node)) for node in self.trains}, "first")
        moves = {node.result: list(self._together(node, moves[node.result])) for node in self.trains}
        best = min(self._priced(moves, budget), self._uniform(moves, budget), key=_operations)
        near = {name: [move.thinning for move in _front(found)] for name, found in moves.items()}
        moves = self._weighed(best.settings, near, "second")
        best = min(best, self._priced(moves, budget), key=_operations)
        return self._mended(best, moves, budget)

    @property
    def measure(self) -> str:
        """What a budget is counted in."""
        return "top-1 accuracy" if self._labelled else "top-1 agreement with the network before"

    @property
    def agreed(self) -> float | None:
        """The accuracy of the whole network on the samples, where their classes are known."""
        return float((self._answers.argmax(axis=1) == self.labels).mean()) if self._labelled else None

    @property
    def whole(self) -> Measured:
        """The network as it is."""
        return self._whole

    @property
    def _labelled(self) -> bool:
        return self.labels is not None and self._answers.ndim == 2

    def _grid(self, node: Node) -> Iterator[Thinning]:
        """Every setting of a train that says something of its own."""
        for rot, drlo in itertools.product(ROUNDINGS, KEPT[self.mode]):
            thinning = Thinning.of(rot, drlo, self.mode if drlo else Thinning().mode)
            room = node.type.steps - rot
            says = not drlo or (rot < drlo < node.type.steps if self.mode == "position" else drlo < room)
            if thinning is not None and room > 0 and says:
                yield thinning

    def _apart(self, node: Node) -> Iterator[Thinning]:
        return (thinning for thinning in self._grid(node) if not (thinning.rot and thinning.drlo))

    # what is measured

    @cached_property
    def _answers(self) -> Reals:
        """Of the whole network, for all samples."""
        return self._output({}, len(self.x))

    @cached_property
    def _whole(self) -> Measured:
        return Measured({}, 0.0, self._counted({}))

    @cached_property
    def _paths(self) -> dict[str, NDArray[np.int64]]:
        found = synapses(self.module)
        return {node.result: found[node.result] for node in self.trains}

    def _output(self, settings: Settings, samples: int) -> Reals:
        module = self.made(settings)
        parts = self.context.evaluate(module, self.x[:samples], "")
        return np.concatenate([part[module.output] for part in parts])

    def _measured(self, settings: Settings, budget: float) -> Measured:
        """On all samples; operations are counted where the budget holds, else they are without end."""
        chosen, before = self._output(settings, len(self.x)).argmax(axis=1), self._answers.argmax(axis=1)
        if self._labelled:
            lost = int((before == self.labels).sum()) - int((chosen == self.labels).sum())
        else:
            lost = int((before != chosen).sum())
        drop = 100 * lost / before.size
        return Measured(settings, drop, self._counted(settings) if drop <= budget else math.inf)

    def _counted(self, settings: Settings) -> float:
        """Synaptic operations a sample of the trains that may be thinned."""
        codes = self._codes(settings)
        return sum(
            float(_spikes(node, _listed(node)) @ self._weighted(node, codes[node.result])) for node in self.trains
        )

    def _codes(self, settings: Settings) -> dict[str, NDArray[np.int64]]:
        module, names = self.made(settings), "|".join(node.result for node in self.trains)
        parts: dict[str, list[NDArray[np.int64]]] = {node.result: [] for node in self.trains}
        for part in self.context.evaluate(module, self.x[:COUNTED], names):
            for name, held in parts.items():
                held.append(_integers(part[name], module, name))
        return {name: np.concatenate(held) for name, held in parts.items()}

    def _weighted(self, node: Node, codes: NDArray[np.int64]) -> Reals:
        """How many synapses a sample see each code of a train, from the lowest on."""
        paths = np.broadcast_to(self._paths[node.result], codes.shape)
        listed = _listed(node)
        found = np.bincount((codes - listed[0]).ravel(), paths.ravel(), len(listed))
        return np.asarray(found / len(codes))

    @cached_property
    def _seen(self) -> dict[str, Reals]:
        codes = self._codes({})
        return {node.result: self._weighted(node, codes[node.result]) for node in self.trains}

    # what is chosen

    def _weighed(
        self, around: Settings, tried: Mapping[str, Sequence[Thinning | None]], sweep: str
    ) -> dict[str, list[_Move]]:
        """For every train what settings save and cost, the others set as they are."""
        found: dict[str, list[_Move]] = {name: [] for name in tried}
        done, total = 0, sum(map(len, tried.values()))
        for node in self.trains:
            others = {name: thinning for name, thinning in around.items() if name != node.result}
            for thinning in dict.fromkeys((None, *tried[node.result])):
                self.context.progress(f"{self.title}: {sweep} sweep, {done} of {total} settings")
                own = {} if thinning is None else {node.result: thinning}
                found[node.result].append(_Move(thinning, self._saved(node, thinning), self._change({**others, **own})))
                done += thinning is not None
        return found

    def _saved(self, node: Node, thinning: Thinning | None) -> float:
        """Operations a sample, on the train as the whole network emits it."""
        fewer = _spikes(node, _listed(node)) - _spikes(node, _thinned(node, thinning))
        return float(fewer @ self._seen[node.result])

    def _together(self, node: Node, apart: Sequence[_Move]) -> Iterator[_Move]:
        """All settings of a train, where RoT and DRLO together are taken to cost what they cost apart."""
        whole = next(move.cost for move in apart if move.thinning is None)
        costs = {move.thinning: move.cost - whole for move in apart}
        yield from (move for move in apart if move.thinning is None)
        for thinning in self._grid(node):
            parts = (Thinning.of(thinning.rot, 0, Thinning().mode), Thinning.of(0, thinning.drlo, thinning.mode))
            yield _Move(thinning, self._saved(node, thinning), whole + sum(costs[part] for part in parts))

    def _uniform(self, moves: Mapping[str, list[_Move]], budget: float) -> Measured:
        """The best setting that is the same everywhere: of those that pay, the one that saves most in the budget."""
        shared: list[tuple[_Move, Settings]] = []
        for thinning in dict.fromkeys(one for node in self.trains for one in self._grid(node)):
            own = {name: move for name, of in moves.items() for move in of if move.thinning == thinning}
            saved, cost = sum(move.saved for move in own.values()), sum(move.cost for move in own.values())
            shared.append((_Move(thinning, saved, cost), dict.fromkeys(own, thinning)))
        settings = {move.thinning: given for move, given in shared}
        for move in reversed(_front([move for move, _ in shared])):
            self.context.progress(f"{self.title}: the same everywhere")
            found = self._measured(settings[move.thinning], budget)
            if found.drop <= budget:
                return found
        return self._whole

    def _change(self, settings: Settings) -> float:
        """How far the answers of a sample move against each other: their mean square, a share of the answers' own.

        Shares of independent trains add up, and no single sample weighs most, as in the divergence of probabilities.
        """
        if not settings:
            return 0.0
        samples = min(PROBED, len(self.x))
        return _power(self._output(settings, samples) - self._answers[:samples]) / max(self._power, 1e-300)

    @cached_property
    def _power(self) -> float:
        return _power(self._answers)

    def _priced(self, moves: Mapping[str, list[_Move]], budget: float) -> Measured:
        """What pays best at the lowest price of movement that the budget allows, by bisection."""
        steps = sorted({price for found in moves.values() for price in _prices(_front(found))})
        best, low, high = self._whole, 0, len(steps)
        while low < high:
            at = (low + high) // 2
            paid = {name: max(of, key=lambda m: m.worth(steps[at])).thinning for name, of in moves.items()}
            settings = {name: thinning for name, thinning in paid.items() if thinning is not None}
            found = self._measured(settings, budget)
            self.context.progress(f"{self.title}: {found.drop:.2f} points lost at price {at} of {len(steps)}")
            if found.drop <= budget:
                best, high = min(best, found, key=_operations), at
            else:
                low = at + 1
        return best

    def _mended(self, best: Measured, moves: Mapping[str, list[_Move]], budget: float) -> Measured:
        """One step more for each train, its cheapest, the cheapest of all first, where the budget still holds."""
        steps: list[tuple[float, str, _Move]] = []
        for name, known in moves.items():
            own = next((move for move in known if move.thinning == best.settings.get(name)), known[0])
            more = [move for move in known if move.saved > own.saved]
            prices = ((max(move.cost - own.cost, 0.0) / (move.saved - own.saved), name, move) for move in more)
            steps += sorted(prices, key=_price)[:1]
        for tried, (_, name, move) in enumerate(sorted(steps, key=_price)):
            assert move.thinning is not None  # it saves something
            self.context.progress(f"{self.title}: {tried} of {len(steps)} repairs")
            best = min(best, self._measured({**best.settings, name: move.thinning}, budget), key=_operations)
        return best


@attrs.frozen
class _Move:
    """A setting of one train: synaptic operations a sample that it saves, and how far the answers move with it."""

    thinning: Thinning | None
    saved: float
    cost: float

    def worth(self, price: float) -> float:
        """What is saved, less what the movement costs at a price."""
        return self.saved - price * self.cost


def _price(step: tuple[float, str, _Move]) -> tuple[float, str]:
    return step[:2]


def _operations(found: Measured) -> float:
    return found.operations


def _front(moves: Sequence[_Move]) -> list[_Move]:
    """The moves that pay best at some price: the corners of the upper hull, from the cheapest on."""
    front: list[_Move] = []
    for move in sorted(moves, key=lambda m: (m.cost, -m.saved)):
        if front and move.saved <= front[-1].saved:
            continue
        while len(front) > 1 and _slope(front[-2], move) >= _slope(front[-2], front[-1]):
            front.pop()
        front.append(move)
    return front


def _prices(front: Sequence[_Move]) -> Iterator[float]:
    """Just below every price at which the dearer of two neighbours starts to pay."""
    return (_slope(one, other) * (1 - 2.0**-30) for one, other in itertools.pairwise(front))


def _slope(one: _Move, other: _Move) -> float:
    """Operations saved for the movement; more than anything where the step is free."""
    return (other.saved - one.saved) / max(other.cost - one.cost, 1e-12)


def _power(answers: Reals) -> float:
    """Mean square of what tells one class from another."""
    return float(np.square(answers - answers.mean(axis=1, keepdims=True)).mean())


def _integers(decoded: Reals, module: Module, name: str) -> NDArray[np.int64]:
    """Codes of what a train decodes to."""
    type_ = module.types[name]
    steps = scale_of(type_).floats().reshape(-1, *(1,) * (len(type_.shape) - 1))
    return np.asarray(np.rint(decoded / steps), dtype=np.int64)


def _listed(node: Node) -> NDArray[np.int64]:
    """All codes of a train, in order."""
    train = node.type.encoding
    assert isinstance(train, Spikes)  # only trains are thinned
    low, high = Spikes.limits(train.steps, "bits", signed=train.lo < 0)
    return np.arange(low, high + 1)


def _thinned(node: Node, thinning: Thinning | None) -> NDArray[np.int64]:
    """What all codes of a train become, in order."""
    codes, train = _listed(node), node.type.encoding
    assert isinstance(train, Spikes)  # only trains are thinned
    return codes if thinning is None else thinning.codes(codes, train.steps, signed=train.lo < 0)


def _spikes(node: Node, codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many spikes codes have; the sign of a signed train is one."""
    found = np.zeros_like(codes)
    for index in range(node.type.steps):
        found += codes >> index & 1
    return found
