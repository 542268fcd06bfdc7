"""fx_reference: a reference model of torch.ao.quantization's FX mode, as a module of reals with fake quantisers.

`prepare_fx` or `prepare_qat_fx`, calibration or training, and `convert_to_reference_fx` give a graph of float modules
with quantised weights between ``quantize_per_tensor`` and ``dequantize``. What `convert_fx` makes of it for one engine
is lowered to int8 kernels and is not read.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.ao.nn import intrinsic
from torch.ao.nn.quantized import reference

from spir.errors import error
from spir.frontends import _quantised as q
from spir.ir import Module
from spir.ops._linear import channelwise


@attrs.frozen
class FxReference:
    """Reads a reference model of FX: integer weights, one scale an activation, and the toolkit's integers, proved."""

    name: ClassVar[str] = "fx_reference"

    def accepts(self, model: object) -> bool:
        """Whether torch.ao.quantization has been at work: prepared and lowered models, too, which `read` refuses."""
        return q.toolkit_of(model) == "fx"

    def read(self, model: Any, example: torch.Tensor) -> Module:
        """The reference model as a verified module of reals; the model itself is left as it was.

        Args:
            model: what `convert_to_reference_fx` returns.
            example: one or more samples as the model receives them, with the batch axis.

        Raises:
            SpirError[usage]: no model of torch.ao.quantization.
            SpirError[unsupported]: a model that is not converted, dynamic or lowered; every call without a reader.
            SpirError[trace]: integers that are not the toolkit's.
            SpirError[data], SpirError[weights]
        """
        return self._imported(model, example)[0]

    def agreement(self, model: Any, example: torch.Tensor) -> tuple[q.Agreement, ...]:
        """Layer by layer, how many codes were compared with the toolkit's, and how many fell to other sides of a tie.

        Raises:
            SpirError: as `read`.
        """
        return self._imported(model, example)[1]

    def _imported(self, model: Any, example: torch.Tensor) -> tuple[Module, tuple[q.Agreement, ...]]:
        if not self.accepts(model):
            fix = "give what convert_to_reference_fx returns, or leave frontend= out"
            raise error("usage", f"a {type(model).__name__} is no model of torch.ao.quantization", fix=fix)
        q.unconverted(model, _CONVERT)
        for path, part in model.named_modules():
            home = type(part).__module__
            if home.startswith("torch.ao.nn.") and ".dynamic." in home:
                raise _refused(path, part, "it quantises activations as it runs", "quantise statically: prepare_fx")
            if home.startswith("torch.ao.nn.") and "quantized" in home and ".reference." not in home:
                raise _refused(path, part, "it is lowered to int8 kernels", _CONVERT)
        if not isinstance(model, fx.GraphModule):
            raise error(
                "unsupported",
                f"a {type(model).__name__} of the eager mode has no conversion",
                toolkit=q.versions(),
                fix="prepare_fx or prepare_qat_fx, then convert_to_reference_fx",
            )
        return q.imported(q.own_copy(model).eval(), _TOOLKIT, example)


_CONVERT = "convert_to_reference_fx(model), of torch.ao.quantization.quantize_fx"


def _refused(path: str, part: nn.Module, why: str, fix: str) -> Exception:
    what = f"{type(part).__module__}.{type(part).__name__} has no conversion: {why}"
    return error("unsupported", what, from_=f"{path} ({type(part).__name__})", toolkit=q.versions(), fix=fix)


def _advice(word: str) -> str:
    if any(part in word.lower() for part in ("embedding", "lstm", "gru", "rnn", "attention")):
        return "use convolutions and linear layers: a network takes one tensor of numbers, and no sequence"
    return "use what converts: Conv2d, Linear, ReLU, ReLU6, pooling, add, cat, and quantisers per tensor"


# --- what FX alone has --------------------------------------------------------------------------------------------


def _weight(part: nn.Module) -> q.Weight | torch.Tensor:
    """The weight of a reference module as its own quantiser gives it; the weight of a float module as it is."""
    if not isinstance(part, reference.Conv2d | reference.Linear):
        return part.weight.detach()  # type: ignore[operator]
    found = part.get_quantized_weight()  # type: ignore[no-untyped-call]
    codes = found.int_repr().to(torch.int64).numpy()
    if found.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return q.Weight(codes - found.q_zero_point(), np.array([found.q_scale()]))
    axis, zeros = found.q_per_channel_axis(), found.q_per_channel_zero_points().numpy().astype(np.int64)
    moved = np.moveaxis(codes, axis, 0) - channelwise(zeros, codes.ndim)
    return q.Weight(np.moveaxis(moved, 0, axis), found.q_per_channel_scales().double().numpy(), axis)


def _linear(part: nn.Module) -> dict[str, Any]:
    return {"weight": _weight(part), "bias": part.bias}


def _conv(part: nn.Module) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return _linear(part) | {name: getattr(part, name) for name in names}


def _fused(part: nn.Sequential) -> dict[str, Any]:
    layer = part[0]
    if isinstance(layer, nn.Conv2d):
        return {"layer": q.conv2d, "fields": _conv(layer)}
    return {"layer": q.linear, "fields": _linear(layer)}


def _norm(part: nn.BatchNorm2d) -> dict[str, Any]:
    names = ("weight", "bias", "running_mean", "running_var", "eps")
    return {name: getattr(part, name) for name in names}


def _nothing(part: nn.Module) -> dict[str, Any]:
    del part  # the reader takes the operand alone
    return {}


def _named(*names: str) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda part: {name: getattr(part, name) for name in names}


_LARGEST = _named("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = _named("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

_TOOLKIT = q.Toolkit(
    "fx_reference",
    {
        torch.quantize_per_tensor: q.quantize,
        torch.dequantize: q.dequantize,
        "dequantize": q.dequantize,
        F.conv2d: q.conv2d,
        torch.conv2d: q.conv2d,
        F.linear: q.linear,
        F.relu: q.relu,
        torch.relu: q.relu,
        "relu": q.relu,
        F.relu6: q.relu6,
        F.hardtanh: q.hardtanh,
        torch.clamp: q.clamp,
        "clamp": q.clamp,
        F.dropout: q.dropout,
        "contiguous": q.same,
        "clone": q.same,
        "detach": q.same,
        torch.flatten: q.reshape,
        torch.reshape: q.reshape,
        torch.squeeze: q.reshape,
        torch.unsqueeze: q.reshape,
        "flatten": q.reshape,
        "view": q.reshape,
        "reshape": q.reshape,
        "squeeze": q.reshape,
        "unsqueeze": q.reshape,
        "permute": q.permute,
        torch.permute: q.permute,
        "transpose": q.transpose,
        torch.transpose: q.transpose,
        "size": q.sized,
        getattr: q.sized,
        operator.getitem: q.getitem,
        F.pad: q.padded,
        F.max_pool2d: q.max_pool2d,
        torch.max_pool2d: q.max_pool2d,
        F.avg_pool2d: q.avg_pool2d,
        F.adaptive_avg_pool2d: q.adaptive_avg_pool2d,
        torch.mean: q.mean,
        "mean": q.mean,
        operator.add: q.add,
        operator.iadd: q.add,
        torch.add: q.add,
        "add": q.add,
        torch.cat: q.cat,
        torch.concat: q.cat,
    },
    {
        reference.Conv2d: (q.conv2d, _conv),
        reference.Linear: (q.linear, _linear),
        nn.Conv2d: (q.conv2d, _conv),
        nn.Linear: (q.linear, _linear),
        intrinsic.ConvReLU2d: (q.layer_then_relu, _fused),
        intrinsic.LinearReLU: (q.layer_then_relu, _fused),
        nn.BatchNorm2d: (q.batch_norm, _norm),
        nn.ReLU: (q.relu, _nothing),
        nn.ReLU6: (q.relu6, _nothing),
        nn.Hardtanh: (q.hardtanh, _named("min_val", "max_val")),
        nn.MaxPool2d: (q.max_pool2d, _LARGEST),
        nn.AvgPool2d: (q.avg_pool2d, _AVERAGE),
        nn.AdaptiveAvgPool2d: (q.adaptive_avg_pool2d, _named("output_size")),
        nn.Flatten: (q.reshape, _nothing),
        nn.Identity: (q.same, _nothing),
        nn.Dropout: (q.same, _nothing),
        nn.Dropout2d: (q.same, _nothing),
    },
    lambda codes: codes.int_repr(),
    _advice,
)
