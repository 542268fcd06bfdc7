"""calibrate-bias: biases in steps of what a neuron emits, where the register of the sums is too narrow for them."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.contracts import Bounded, Contract
from spir.errors import error
from spir.ir import Array, Module, Node
from spir.ops._linear import channelwise
from spir.ops._threshold import divisors, nearest
from spir.ops.neuron_stem import NeuronStem
from spir.ops.requant import Requant
from spir.options import option
from spir.ranges import analyse, decided
from spir.rewriting import Context, Pass, Rewriter

MOST_BITS = 32


@attrs.frozen
class CalibrateBias(Pass):
    """requant, neuron_stem {add = bias + half a step} -> {add = q_b div + half a step}: the bias in steps of its codes.

    A bias in steps of the sum, S_b = S_w S_x, needs more bits than a chip has: with S_b := S_y it fits those of a code,
    ``q_b = round(b / S_y)``, at the price of half a code at most. ``when = needed`` does so where a bias in steps of
    the sum, in 2^r of them behind scale-integration, would not fit ``register`` bits, and ``always`` everywhere. Of
    channels that no sum brings to another code than the least, or the largest, a bias that does not fit becomes the
    nearest to 0 with which that stays so: exact. A bias beyond ``bits`` is refused.

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
        found = analyse(module)
        moved: list[str] = []
        unseen: list[str] = []

        def step(node: Node, rewriter: Rewriter) -> str | None:
            op: Any = node.op
            if not isinstance(op, (Requant, NeuronStem)):
                return None
            law = op.law if isinstance(op, NeuronStem) else op.triple
            near = nearest(*law, decided(node, module, found))
            wide, add = (channelwise(v, near.ndim) for v in (self._wide(op), op.add.values))
            if (wide & (near != add)).any():
                unseen.append(f"%{node.result}")
                op = attrs.evolve(op, add=Array.of(np.where(wide, near, add).astype(np.int64)))
            if self.when == "always" or self._wide(op).any():
                moved.append(f"%{node.result}")
                op = attrs.evolve(op, add=self._in_codes(node, op))
            if op is node.op:
                return None
            return rewriter.emit(op, *(rewriter.now(o) for o in node.operands), name=node.result, origin=node.origin)

        after = self.walk(Rewriter(module, self.name), step)
        rest = sum(isinstance(n.op, (Requant, NeuronStem)) and self.selects(n) for n in module.nodes) - len(moved)
        context.note(f"biases in steps of codes: {', '.join(moved) or 'none'}; {rest} fit {self.register} bits")
        if unseen:
            context.note(
                f"biases of channels that always give the same code cut, which changes none: {', '.join(unseen)}"
            )
        return after

    def _wide(self, op: Any) -> NDArray[np.bool_]:
        """The biases that would not fit their register: in steps of the sum, or, with ``always``, in those of codes."""
        if self.when == "always":
            return _beyond(_codes(op), self.bits)
        bias = op.add.values.astype(object) - _steps(op) // 2
        factors = np.abs(op.mul.values.astype(object).reshape(len(op.mul.values), -1)).min(axis=1)
        return _beyond(np.abs(bias) // np.maximum(channelwise(factors, bias.ndim), 1), self.register)

    def _in_codes(self, node: Node, op: Any) -> Array:
        """The constants of biases in whole codes."""
        codes, each = _codes(op), _steps(op)
        if _beyond(codes, self.bits).any():
            needed = max(int(codes.max()), ~int(codes.min())).bit_length() + 1
            raise error(
                "E-VRANGE",
                f"%{node.result} has biases of {codes.min()}..{codes.max()} codes, and {self.bits} bits hold "
                f"-{2 ** (self.bits - 1)}..{2 ** (self.bits - 1) - 1}",
                from_=str(node.origin),
                fix=f"bits={needed}" if needed <= MOST_BITS else "layers= leaves this one as it is",
            )
        return Array.of((codes * each + each // 2).astype(np.int64))


def _beyond(numbers: NDArray[Any], bits: int) -> NDArray[np.bool_]:
    return np.asarray((numbers >= 2 ** (bits - 1)) | (numbers < -(2 ** (bits - 1))), dtype=bool)


def _codes(op: Any) -> NDArray[Any]:
    """Biases in whole codes; half a step stands in the constants, so that this rounds."""
    return np.asarray(op.add.values.astype(object) // _steps(op))


def _steps(op: Any) -> NDArray[Any]:
    """The divisor of each constant: a step of the codes."""
    return channelwise(divisors(op.div).astype(object), op.add.values.ndim)
