"""calibrate-bias: biases in steps of what a neuron emits, where the register of the sums is too narrow for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


@attrs.frozen
class CalibrateBias(Pass):
    """requant, neuron_stem {add = bias + half a step} -> {add = q_b div + half a step}: the bias in steps of its codes.

    A bias in steps of the sum, S_b = S_w S_x, needs more bits than a chip has: with S_b := S_y it fits those of a code,
    ``q_b = round(b / S_y)``, at the price of half a code at most. ``when = needed`` does so where a bias in steps of
    the sum, in 2^r of them behind scale-integration, would not fit ``register`` bits, and ``always`` everywhere. In
    layers that stay, a bias that does not fit, of a channel that no sum brings to another code than the least, or the
    largest, becomes the nearest to 0 with which that is so: exact. A bias beyond ``bits`` is refused.

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
        moved: list[str] = []
        while new := self._seen(module, [name for name in names if name not in moved]):
            module = _with(module, self.name, {name: self._in_codes(module, name) for name in new})
            moved += new
        cut = self._unseen(module, [name for name in names if name not in moved])
        rest = len(names) - len(moved)
        context.note(f"biases in steps of codes: {_listed(moved) or 'none'}; {rest} fit {self.register} bits")
        if cut:
            what = "biases of channels that always give the same code cut, which changes none"
            context.note(f"{what}: {_listed(cut)}")
        return _with(module, self.name, cut)

    def _seen(self, module: Module, names: Sequence[str]) -> list[str]:
        """The laws to move: with a bias beyond its register that some sum shows, or that no cut makes fit."""
        if self.when == "always":
            return list(names)
        return [
            name for name, add in self._unseen(module, names).items() if self._wide(_given(module, name, add)).any()
        ]

    def _unseen(self, module: Module, names: Sequence[str]) -> dict[str, Array]:
        """Laws with a bias beyond its register: their constants, where what no sum shows is cut."""
        wide = {name: bad for name in names if (bad := self._wide(module.definitions[name].op)).any()}
        found = analyse(module) if wide else {}
        made = {}
        for name, bad in wide.items():
            node = module.definitions[name]
            op: Any = node.op
            law = op.law if isinstance(op, NeuronStem) else op.triple
            near = nearest(law, decided(node, module, found))
            bad, add = (channelwise(v, near.ndim) for v in (bad, op.add.values))
            made[name] = Array.of(np.where(bad, near, add).astype(np.int64))
        return made

    def _wide(self, op: Any) -> NDArray[np.bool_]:
        """The biases that would not fit their register, in steps of the sum; none with ``always``."""
        bias = op.add.values.astype(object) - _steps(op) // 2
        factors = np.abs(op.mul.values.astype(object).reshape(len(op.mul.values), -1)).min(axis=1)
        wide = _beyond(np.abs(bias) // np.maximum(channelwise(factors, bias.ndim), 1), self.register)
        return wide & (self.when == "needed")

    def _in_codes(self, module: Module, name: str) -> Array:
        """The constants of biases in whole codes; half a step stands in them, so that division rounds."""
        node = module.definitions[name]
        op: Any = node.op
        each = _steps(op)
        codes = op.add.values.astype(object) // each
        if _beyond(codes, self.bits).any():
            needed = max(int(codes.max()), ~int(codes.min())).bit_length() + 1
            raise error(
                "E-VRANGE",
                f"%{name} has biases of {codes.min()}..{codes.max()} codes, and {self.bits} bits hold "
                f"-{2 ** (self.bits - 1)}..{2 ** (self.bits - 1) - 1}",
                from_=str(node.origin),
                fix=f"bits={needed}" if needed <= MOST_BITS else "layers= leaves this one as it is",
            )
        return Array.of((codes * each + each // 2).astype(np.int64))


def _given(module: Module, name: str, add: Array) -> Any:
    op: Any = module.definitions[name].op
    return attrs.evolve(op, add=add)


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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"%{name}" for name in names)


def _beyond(numbers: NDArray[Any], bits: int) -> NDArray[np.bool_]:
    return np.asarray((numbers >= 2 ** (bits - 1)) | (numbers < -(2 ** (bits - 1))), dtype=bool)


def _steps(op: Any) -> NDArray[Any]:
    """The divisor of each constant: a step of the codes."""
    return channelwise(divisors(op.div).astype(object), op.add.values.ndim)
