"""Which values sums over channels read."""

from __future__ import annotations

from spir.ir import Module
from spir.ops._linear import LinearMap, Relabelling, WeightedMap
from spir.ops.conv2d import Conv2d
from spir.ops.max_pool import MaxPool
from spir.ops.shift import Shift


def read_by_a_sum(name: str, module: Module) -> bool:
    """Whether a sum over channels reads a value before any activation, so that its channels must share one scale."""
    found = [name]
    for value in found:
        for reader in module.readers[value]:
            match reader.op:
                case Conv2d(groups=groups) if groups == module.types[value].shape[0]:
                    found.append(reader.result)
                case WeightedMap():
                    return True
                case Relabelling() if any(len(s) > 1 for s in reader.op.sources(module.types[value].shape)):
                    return True  # channels mix
                case LinearMap() | MaxPool() | Shift() if reader.result not in found:
                    found.append(reader.result)
    return False
