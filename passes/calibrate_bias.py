"""calibrate-bias: biases in steps of what a neuron emits, where the register of the sums is too narrow for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.contracts import Bounded, Contract
from spir.errors import error
from spir.ir import Array, Module
from spir.ops._linear import channelwise
from spir.ops._threshold import divisors, nearest
from spir.ops.neuron_stem import NeuronStem
from spir.ops.requant import Requant
from spir.options import option
from spir.ranges import analyse, decided
from spir.rewriting import Context, Pass, Rewriter

MOST_BITS = 32
"""Of a bias."""
Moved = NDArray[np.bool_]
"""Which constants of a law stand for whole codes."""


@attrs.frozen
class CalibrateBias(Pass):
    """requant, neuron_stem {add = bias + half a step} -> {add = q_b div + half a step}: the bias in steps of its codes.

    A bias in steps of the sum, S_b = S_w S_x, needs more bits than a chip has: with S_b := S_y it fits those of a code,
    ``q_b = round(b / S_y)``, at the price of half a code at most. ``when = needed`` does so where a bias in steps of
    the sum, in 2^r of them behind scale-integration, would not fit ``register`` bits, channel by channel, and
    ``always`` everywhere. A bias that does not fit, of a channel that no sum brings to another code than the least, or
    the largest, becomes the nearest to 0 with which that is so: exact. A bias beyond ``bits`` is refused.

    Source: SDANN eqs 9 and 10 (the printed equations are lost: a reconstruction); what is exact is derived.
    """

    name: ClassVar[str] = "calibrate-bias"
    bits: int = option(16, "bits of a bias in steps of the codes, with its sign", ge=2, le=MOST_BITS)
    register: int = option(16, "bits of the register that a bias in steps of the sum would take", ge=4, le=63)
    when: str = option("needed", "only where such a register is too narrow, or always", one_of=("needed", "always"))

    def contract(self) -> Contract:
        """Half a code, measured."""
        return Bounded()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses a network without laws; then rewrites, and says where."""
        if not any(isinstance(n.op, (Requant, NeuronStem)) for n in module.nodes):
            raise error("type", f"{self.name} finds no biases of neurons", fix="propagate-scales before")
        names = [n.result for n in module.nodes if isinstance(n.op, (Requant, NeuronStem)) and self.selects(n)]
        moved: dict[str, Moved] = {}
        while new := self._seen(module, names, moved):
            module = _with(module, self.name, {name: self._in_codes(module, name, new[name]) for name in new})
            moved |= {name: channels | moved.get(name, np.False_) for name, channels in new.items()}
        cut = self._unseen(module, names, moved)
        told = (f"%{name} ({m.sum()} of {m.size})" if not m.all() else f"%{name}" for name, m in moved.items())
        context.note(
            f"biases in steps of codes: {', '.join(told) or 'none'}; all others fit {self.register} bits"
            if self.when == "needed"
            else "biases in steps of codes: all"
        )
        if cut:
            what = "biases of channels that always give the same code cut, which changes none"
            context.note(f"{what}: {', '.join(f'%{name}' for name in cut)}")
        return _with(module, self.name, cut)

    def _seen(self, module: Module, names: Sequence[str], moved: Mapping[str, Moved]) -> dict[str, Moved]:
        """The constants to move: of biases beyond their register that some sum shows, or that no cut makes fit."""
        if self.when == "always":
            left = (name for name in names if name not in moved)
            return {name: np.ones(_law_of(module, name).add.values.shape, dtype=bool) for name in left}
        cut = self._unseen(module, names, moved)
        laws = {name: _given(module, name, cut[name]) if name in cut else _law_of(module, name) for name in names}
        new = {name: self._wide(law) & ~moved.get(name, np.False_) for name, law in laws.items()}
        return {name: channels for name, channels in new.items() if channels.any()}

    def _unseen(self, module: Module, names: Sequence[str], moved: Mapping[str, Moved]) -> dict[str, Array]:
        """Constants of laws with biases beyond their register, where those that no sum shows are cut."""
        wide = {name: self._wide(_law_of(module, name)) & ~moved.get(name, np.False_) for name in names}
        found = analyse(module) if any(channels.any() for channels in wide.values()) else {}
        made = {}
        for name in (name for name in names if wide[name].any()):
            op = _law_of(module, name)
            law = op.law if isinstance(op, NeuronStem) else op.triple
            near = nearest(law, decided(module.definitions[name], module, found))
            channels, add = (channelwise(v, near.ndim) for v in (wide[name], op.add.values))
            if (channels & (near != add)).any():
                made[name] = Array.of(np.where(channels, near, add).astype(np.int64))
        return made

    def _wide(self, op: Any) -> Moved:
        """The biases that would not fit their register, in steps of the sum; none with ``always``."""
        bias = op.add.values.astype(object) - _steps(op) // 2
        factors = np.abs(op.mul.values.astype(object).reshape(len(op.mul.values), -1)).min(axis=1)
        wide = _beyond(np.abs(bias) // np.maximum(channelwise(factors, bias.ndim), 1), self.register)
        return wide & (self.when == "needed")

    def _in_codes(self, module: Module, name: str, channels: Moved) -> Array:
        """Constants of which some stand for whole codes; half a step stands in them, so that division rounds."""
        op = _law_of(module, name)
        each, add = (channelwise(v, channels.ndim) for v in (_steps(op), op.add.values.astype(object)))
        codes = np.where(channels, add // each, 0)
        if _beyond(codes, self.bits).any():
            needed = max(int(codes.max()), ~int(codes.min())).bit_length() + 1
            raise error(
                "E-VRANGE",
                f"%{name} has biases of {codes.min()}..{codes.max()} codes, and {self.bits} bits hold "
                f"-{2 ** (self.bits - 1)}..{2 ** (self.bits - 1) - 1}",
                from_=str(module.definitions[name].origin),
                fix=f"bits={needed}" if needed <= MOST_BITS else "layers= leaves this one as it is",
            )
        return Array.of(np.where(channels, codes * each + each // 2, add).astype(np.int64))


def _law_of(module: Module, name: str) -> Any:
    """The op of a law: requant or neuron_stem."""
    return module.definitions[name].op


def _given(module: Module, name: str, add: Array) -> Any:
    return attrs.evolve(_law_of(module, name), add=add)


def _with(module: Module, step: str, adds: Mapping[str, Array]) -> Module:
    """The module with other constants."""
    rewriter = Rewriter(module, step)
    for node in module.nodes:
        if node.result in adds:
            op = _given(module, node.result, adds[node.result])
            rewriter.emit(op, *(rewriter.now(o) for o in node.operands), name=node.result, origin=node.origin)
        else:
            rewriter.keep(node)
    return rewriter.finish()


def _beyond(numbers: NDArray[Any], bits: int) -> NDArray[np.bool_]:
    return np.asarray((numbers >= 2 ** (bits - 1)) | (numbers < -(2 ** (bits - 1))), dtype=bool)


def _steps(op: Any) -> NDArray[Any]:
    """The divisor of each constant: a step of the codes."""
    return channelwise(divisors(op.div).astype(object), op.add.values.ndim)
