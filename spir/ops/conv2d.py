"""conv2d: a strided, dilated, grouped 2-d convolution with zero padding."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import attrs
import numpy as np
from numpy.typing import NDArray

from spir.errors import error
from spir.ir import Array
from spir.ops._linear import WeightedMap, channelwise, reached, split_by_sign, surrounded, weighted, widest, windows
from spir.types import Int, Interval, Real, Scale, Shape, Spikes, Tensor, scale_of


@attrs.frozen
class Conv2d(WeightedMap):
    """``y[o] = sum_{i, u, v} w[o, i, u, v] x[i, s*p + d*u - pad, ...] (+ bias[o])`` on ``[C, H, W]``.

    ``weight`` is ``[O, I/groups, kh, kw]``: float, or integers with ``weight_scale`` ``[1]`` or ``[O]``. ``padding`` is
    top, bottom, left, right. A bias is allowed on reals only.
    """

    name: ClassVar[str] = "conv2d"
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def shape(self, *shapes: Shape) -> Shape:
        """``[C, H, W]`` to ``[O, H', W']``."""
        (shape,) = shapes
        weight = self.weight.values
        if len(shape) != 3 or weight.ndim != 4:
            raise error("type", f"needs [C, H, W] and weights [O, I, kh, kw], not {list(shape)} and {weight.ndim}-d")
        outputs, inputs, kh, kw = weight.shape
        if inputs * self.groups != shape[0] or outputs % self.groups:
            raise error(
                "type",
                f"weights {list(weight.shape)} in {self.groups} groups read {inputs * self.groups} channels, "
                f"and the operand has {shape[0]}",
            )
        if min(*self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise error("type", "stride and dilation are positive, padding is not negative")
        top, bottom, left, right = self.padding
        height = windows(shape[1], kh, self.stride[0], self.dilation[0], top, bottom)
        width = windows(shape[2], kw, self.stride[1], self.dilation[1], left, right)
        if height < 1 or width < 1:
            raise error("type", f"a {kh}x{kw} kernel does not fit into {shape[1]}x{shape[2]} with this padding")
        return outputs, height, width

    def scale(self, *types: Tensor) -> Scale:
        """Input scale x weight scale; a depthwise convolution may read per-channel scales."""
        (x,) = types
        incoming = scale_of(x)
        if incoming.size == 1 or self.groups != x.shape[0]:
            return super().scale(x)
        repeat = self.weight.values.shape[0] // self.groups
        return incoming.map(lambda values: (v for v in values for _ in range(repeat))) * self.weight_steps

    def bounds(self, shapes: tuple[Shape, ...], *intervals: Interval) -> Interval:
        """Sign-split sums over the taps that a window has inside the image, for every kind of window that occurs."""
        (x,), ((channels, height, width),) = intervals, shapes
        kh, kw = self.weight.values.shape[2:]
        top, bottom, left, right = self.padding
        rows = reached(height, kh, self.stride[0], self.dilation[0], top, bottom)
        columns = reached(width, kw, self.stride[1], self.dilation[1], left, right)
        if (x.lo <= 0).all() and (x.hi >= 0).all():
            rows, columns = widest(rows), widest(columns)
        found = [self._sums(self.weight.values[:, :, r][..., c], x.broadcast(channels)) for r in rows for c in columns]
        return functools.reduce(Interval.__or__, found)

    def _sums(self, weight: NDArray[np.int64], x: Interval) -> Interval:
        """Bounds of the sum over some taps ``[O, I/groups, taps]``, group by group."""
        outputs, inputs = weight.shape[:2]
        split = split_by_sign(weight, outputs, inputs)
        size = outputs // self.groups
        parts = [
            weighted(
                split[:, g * size : (g + 1) * size],
                x.map(lambda ends, g=g: ends[g * inputs : (g + 1) * inputs]),  # type: ignore[misc]
            )
            for g in range(self.groups)
        ]
        return Interval(np.concatenate([p.lo for p in parts]), np.concatenate([p.hi for p in parts]))

    def apply(self, *x: NDArray[Any], real: bool) -> NDArray[Any]:
        """One matrix product a kernel position and group, added up."""
        (x0,) = x
        weight = self.weights(x0, real=real)
        outputs, inputs, kh, kw = weight.shape
        _, height, width = self.shape(x0.shape[1:])
        top, bottom, left, right = self.padding
        padded = surrounded(x0, ((top, bottom), (left, right)))
        grouped = padded.reshape(len(x0), self.groups, inputs, *padded.shape[2:])
        split = weight.reshape(self.groups, outputs // self.groups, inputs, kh, kw)
        result = np.zeros((len(x0), self.groups, outputs // self.groups, height * width), dtype=x0.dtype)
        for u in range(kh):
            for v in range(kw):
                seen = grouped[
                    ...,
                    u * self.dilation[0] :: self.stride[0],
                    v * self.dilation[1] :: self.stride[1],
                ][..., :height, :width]
                result += np.matmul(split[None, ..., u, v], seen.reshape(*seen.shape[:3], -1))
        result = result.reshape(len(x0), outputs, height, width)
        return result if self.bias is None else result + channelwise(self.bias.values, 3)

    def adjoint(self, y: NDArray[Any], *shapes: Shape) -> tuple[NDArray[Any], ...]:
        """Every kernel position that an element reaches, borders and strides included."""
        (shape,) = shapes
        outputs, inputs, kh, kw = self.weight.values.shape
        height, width = y.shape[2:]
        top, bottom, left, right = self.padding
        size = (shape[1] + top + bottom, shape[2] + left + right)
        back = np.zeros((len(y), self.groups, inputs, *size), dtype=y.dtype)
        turned = self.weight.values.astype(y.dtype).reshape(self.groups, outputs // self.groups, inputs, kh, kw)
        grouped = y.reshape(len(y), self.groups, outputs // self.groups, height * width)
        for u in range(kh):
            for v in range(kw):
                rows = slice(u * self.dilation[0], None, self.stride[0])
                columns = slice(v * self.dilation[1], None, self.stride[1])
                given = np.matmul(turned[..., u, v].swapaxes(1, 2), grouped)
                back[..., rows, columns][..., :height, :width] += given.reshape(*given.shape[:3], height, width)
        return (back.reshape(len(y), shape[0], *size)[..., top : top + shape[1], left : left + shape[2]],)

    @classmethod
    def corners(cls) -> Iterator[tuple[Conv2d, tuple[Tensor, ...]]]:
        """Asymmetric padding, stride, dilation, groups, a 3x1 kernel, a dead channel, a kernel as large as the map."""
        rng = np.random.default_rng(0)

        def integer(shape: Shape, **fields: Any) -> Conv2d:
            weight = rng.integers(-127, 128, shape)
            weight[-1] = 0
            scale = Array.of(2.0 ** -rng.integers(3, 9, shape[0]).astype(float))
            return Conv2d(weight=Array.of(weight), weight_scale=scale, **fields)

        image = (4, 5, 6)
        spikes, ints = Spikes(8, "bits", 0, 255, Scale.of(0.5)), Int(-128, 127, Scale.of(0.5))
        signed = Spikes(4, "bits", -8, 7, Scale.of(0.25))
        variants = (
            integer((3, 4, 3, 3), padding=(1, 1, 1, 1)),
            integer((3, 4, 3, 1), padding=(2, 0, 0, 1), stride=(2, 1)),
            integer((8, 1, 3, 3), groups=4, padding=(1, 1, 1, 1)),
            integer((2, 2, 2, 2), groups=2, dilation=(2, 3)),
            integer((5, 4, 5, 6)),
        )
        for op in variants:
            for encoding in (spikes, signed, ints):
                yield op, (Tensor(image, encoding),)
        real = Array.of(rng.standard_normal((3, 4, 3, 3)))
        yield cls(weight=real, bias=Array.of(rng.standard_normal(3)), stride=(2, 2)), (Tensor(image, Real()),)
