"""Random networks of bit-coded neurons: trains of unequal lengths, branches of unequal depth, integers in between."""

from __future__ import annotations

import numpy as np

from spir.conformance.examples import module_of
from spir.ir import Array, Module, Op
from spir.ops.add import Add
from spir.ops.concat import Concat
from spir.ops.conv2d import Conv2d
from spir.ops.encode import Encode
from spir.ops.flatten import Flatten
from spir.ops.integrate import Integrate
from spir.ops.linear import Linear
from spir.ops.max_pool import MaxPool
from spir.ops.neuron_stem import NeuronStem
from spir.ops.quantize import Quantize
from spir.ops.requant import Requant
from spir.types import Real, Scale, Spikes, Tensor

ONE = Array.of([1.0])
READINGS = ("count", "window", "position")


class _Network:
    """Lines of a module, its trains, and which of them have how many frames and channels."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.lines: list[tuple[str, Op, str]] = []
        self.trains: list[tuple[str, int, int]] = []  # name, frames, channels
        self.usual = int(self.rng.integers(1, 5))

    def line(self, op: Op, operands: str) -> str:
        self.lines.append((f"v{len(self.lines)}", op, operands))
        return self.lines[-1][0]

    def any(self) -> tuple[str, int, int]:
        recent = self.trains[-4:]
        return recent[self.rng.integers(len(recent))]

    def current(self) -> tuple[str, int]:
        """A convolution of any train, or the sum of two that have as many frames; and its frames."""
        name, steps, channels = self.any()
        made = self.conv(name, channels)
        other, length, more = self.any()
        if length == steps and self.rng.random() < 0.8:
            if self.rng.random() < 0.3:
                made = self.conv(self.line(Concat(), f"{name} {other}"), channels + more)
            else:
                made = self.line(Add(), " ".join(self.shuffled(made, other if more == 2 else self.conv(other, more))))
        return made, steps

    def shuffled(self, *names: str) -> list[str]:
        return [str(name) for name in self.rng.permutation(names)]

    def conv(self, name: str, channels: int) -> str:
        size = int(self.rng.choice([1, 3]))
        weight = self.rng.integers(-3, 4, (2, channels, size, size))
        return self.line(Conv2d(Array.of(weight), ONE, padding=(size // 2,) * 4), name)

    def bits(self) -> int:
        return self.usual if self.rng.random() < 0.6 else int(self.rng.integers(1, 6))

    def law(self) -> tuple[Array, Array, int]:
        div = 2 ** int(self.rng.integers(0, 4))
        return Array.of(self.rng.integers(1, 4, 2)), Array.of(self.rng.integers(-9, 10, 2)), div

    def neuron(self) -> None:
        made, _ = self.current()
        bits, signed = self.bits(), bool(self.rng.random() < 0.3)
        shift = int(self.rng.choice([0, 0, 2]))
        rot = int(self.rng.integers(0, bits)) if self.rng.random() < 0.2 else 0
        drlo = int(self.rng.integers(0, bits)) if self.rng.random() < 0.2 else 0
        reading = str(self.rng.choice(READINGS)) if drlo else "count"
        op = NeuronStem(bits, *self.law(), 1.0, signed, shift, rot, drlo, reading)
        self.trains.append((self.line(op, made), bits, 2))

    def integers(self) -> None:
        """Sums that become a train again, at once, or behind a pool or another sum."""
        name, _ = self.current()
        z = self.line(Integrate(Array.of(self.rng.integers(-5, 6, 2))), name)
        if self.rng.random() < 0.4:
            z = self.line(MaxPool((3, 3), (1, 1), padding=(1, 1, 1, 1)), z)
        if self.rng.random() < 0.4:
            z = self.line(Add(), " ".join(self.shuffled(z, self.line(Integrate(), self.current()[0]))))
        bits = self.bits()
        made = self.line(Requant(*self.law(), 0, 2**bits - 1, 1.0), z)
        self.trains.append((self.line(Encode(bits), made), bits, 2))


def stem_network(seed: int) -> Module:
    """A network of 1 to 7 layers, other ones for other seeds; its output is a readout."""
    network = _Network(seed)
    rng, first = network.rng, network.usual
    if rng.random() < 0.3:
        source = Tensor((2, 3, 3), Spikes(first, "bits", 0, 2**first - 1, Scale.of(1)))
        network.trains.append(("x", first, 2))
    else:
        source = Tensor((2, 3, 3), Real())
        code = network.line(Quantize(1.0, 0, 2**first - 1), "x")
        network.trains.append((network.line(Encode(first), code), first, 2))
    for _ in range(int(rng.integers(1, 8))):
        (network.neuron if rng.random() < 0.75 else network.integers)()
    name, _, channels = network.trains[-1]
    flat = network.line(Flatten(), name)
    logits = network.line(Linear(Array.of(rng.integers(-9, 10, (4, 9 * channels))), ONE), flat)
    network.line(Integrate(Array.of(rng.integers(-9, 10, 4))), logits)
    return module_of(source, *network.lines)


def inputs(module: Module, samples: int, seed: int = 0) -> np.ndarray:
    """Reals inside and outside of the range, or frames of bits."""
    rng, source = np.random.default_rng(seed), module.input.type
    if source.train is None:
        return rng.uniform(-2, 18, (samples, *source.shape))
    return rng.integers(0, 2, (source.steps, samples, *source.shape))
