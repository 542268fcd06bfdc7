"""Networks of a few ops, and passes run on them."""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import numpy as np
import pytest

from spir import pipeline
from spir.driver import Context
from spir.errors import SpirError
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops.batch_norm import BatchNorm
from spir.ops.conv2d import Conv2d
from spir.ops.linear import Linear
from spir.types import Real, Tensor
from spir.verify import verify

IMAGE = (2, 5, 4)
BIAS = Array.of([0.7, -0.4])
TO_INTEGERS = "canonicalize, fold-bn, calibrate-range, quantize, propagate-scales"


def network(*lines: tuple[str, Op, str], shape: tuple[int, ...] = IMAGE, encoding: Any = None) -> Module:
    """A module of lines ``(result, op, "operand operand")`` on the input ``x``."""
    source = Tensor(shape, encoding or Real())
    types, nodes = {"x": source}, []
    for result, op, operands in lines:
        read = tuple(operands.split())
        types[result] = infer(op, tuple(types[name] for name in read))
        nodes.append(Node(result, op, read, types[result], Origin(f"net.{result}", "net.py line 7")))
    return verify(Module(Value("x", source), tuple(nodes), lines[-1][0]))


def shown(module: Module) -> list[str]:
    """The module's lines without fields and types."""
    return [f"{n.result} = {n.op.name} {' '.join(n.operands)}" for n in module.nodes]


def run(module: Module, passes: str, data: np.ndarray | None = None) -> Module:
    return pipeline.run(module, pipeline.parse(passes), Context(data, 0)).module


def images(count: int = 6, shape: tuple[int, ...] = IMAGE) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, *shape))


def conv(outputs: int, inputs: int = 2, kernel: int = 3, seed: int = 2, **fields: Any) -> Conv2d:
    rng = np.random.default_rng(seed)
    return Conv2d(Array.of(rng.standard_normal((outputs, inputs, kernel, kernel))), **fields)


def linear(outputs: int, inputs: int, seed: int = 3, bias: Array | None = None) -> Linear:
    return Linear(Array.of(np.random.default_rng(seed).standard_normal((outputs, inputs))), None, bias)


def norm(channels: int, eps: float = 1e-5, seed: int = 4) -> BatchNorm:
    rng = np.random.default_rng(seed)
    mean, gamma, beta = (Array.of(v) for v in rng.standard_normal((3, channels)))
    return BatchNorm(mean, Array.of(rng.uniform(0.1, 2, channels)), eps, gamma, beta)


def op_of(module: Module, name: str) -> Any:
    return module.definitions[name].op


def ops_of(module: Module, kind: type[Op]) -> Iterator[Node]:
    return (node for node in module.nodes if isinstance(node.op, kind))


def refusal(module: Module, passes: str, data: np.ndarray | None = None) -> SpirError:
    """What passes refuse a module with; the reproducer goes aside."""
    with TemporaryDirectory() as aside, pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", aside)
        with pytest.raises(SpirError) as caught:
            run(module, passes, data)
    return caught.value


def text_of(refused: SpirError) -> str:
    """The error as users see it, without the notes of the pipeline runner."""
    kept = [attrs.evolve(d, notes=tuple(n for n in d.notes if n.label != "reproducer")) for d in refused.diagnostics]
    return str(SpirError(*kept))
