"""calibrate-bias: biases in steps of what a neuron emits, where the register of the sums is too narrow for them."""

from __future__ import annotations

from typing import Any, ClassVar

import attrs
import numpy as np

from spir.contracts import Bounded, Contract
from spir.errors import error
from spir.ir import Array, Module, Node
from spir.ops._linear import channelwise
from spir.ops._threshold import divisors
from spir.ops.neuron_stem import NeuronStem
from spir.ops.requant import Requant
from spir.options import option
from spir.rewriting import Context, Pass, Rewriter


@attrs.frozen
class CalibrateBias(Pass):
    """requant, neuron_stem {add = bias + half a step} -> {add = q_b div + half a step}: the bias in steps of its codes.

    A bias in steps of the sum, S_b = S_w S_x, needs more bits than a chip has: with S_b := S_y it fits those of a code,
    ``q_b = round(b / S_y)``, at the price of half a code at most. ``when = needed`` does so where a bias in steps of
    the sum would not fit ``register`` bits, and ``always`` everywhere. A bias beyond ``bits`` is refused.

    Source: SDANN eqs 9 and 10 (the printed equations are lost: a reconstruction).
    """

    name: ClassVar[str] = "calibrate-bias"
    bits: int = option(16, "bits of a bias in steps of the codes, with its sign", ge=2, le=32)
    register: int = option(16, "bits of the register that a bias in steps of the sum would take", ge=4, le=63)
    when: str = option("needed", "only where such a register is too narrow, or always", one_of=("needed", "always"))

    def contract(self) -> Contract:
        """Half a code, measured."""
        return Bounded()

    def run(self, module: Module, context: Context) -> Module:
        """Refuses a network without laws; then rewrites, and says where."""
        if not any(isinstance(n.op, (Requant, NeuronStem)) for n in module.nodes):
            raise error("type", f"{self.name} finds no biases of neurons", fix="propagate-scales before")
        moved: list[str] = []
        after = self.walk(Rewriter(module, self.name), lambda node, rewriter: self._moved(node, rewriter, moved))
        rest = sum(isinstance(n.op, (Requant, NeuronStem)) and self.selects(n) for n in module.nodes) - len(moved)
        context.note(
            f"biases in steps of codes: {', '.join(moved) or 'none'}; {rest} fit {self.register} bits as they are"
        )
        return after

    def _moved(self, node: Node, rewriter: Rewriter, moved: list[str]) -> str | None:
        op: Any = node.op
        if not isinstance(op, (Requant, NeuronStem)):
            return None
        add, div = op.add.values.astype(object), divisors(op.div).astype(object)
        each = channelwise(div, add.ndim)
        bias = add - each // 2
        factors = np.abs(op.mul.values.astype(object).reshape(len(op.mul.values), -1)).min(axis=1)
        largest = np.abs(bias) // np.maximum(channelwise(factors, add.ndim), 1)
        if self.when == "needed" and int(largest.max()).bit_length() < self.register:
            return None
        codes = (bias + each // 2) // each
        if max(int(codes.max()), ~int(codes.min())).bit_length() >= self.bits:
            raise error(
                "E-VRANGE",
                f"%{node.result} has biases of {codes.min()}..{codes.max()} codes, and {self.bits} bits hold "
                f"-{2 ** (self.bits - 1)}..{2 ** (self.bits - 1) - 1}",
                from_=str(node.origin),
                fix=f"bits={max(int(codes.max()), ~int(codes.min())).bit_length() + 1}",
            )
        moved.append(f"%{node.result}")
        made = attrs.evolve(op, add=Array.of((codes * each + each // 2).astype(np.int64)))
        return rewriter.emit(made, *(rewriter.now(o) for o in node.operands), name=node.result, origin=node.origin)
