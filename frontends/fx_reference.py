"""fx_reference: a reference model of torch.ao.quantization's FX mode, as a module of reals with fake quantisers.

`prepare_fx` or `prepare_qat_fx`, calibration or training, and `convert_to_reference_fx` give a graph of float modules
with quantised weights between ``quantize_per_tensor`` and ``dequantize``. What `convert_fx` makes of it for one engine
is lowered to int8 kernels and is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import torch
from torch import fx, nn
from torch.ao.nn import intrinsic
from torch.ao.nn.quantized import reference

from spir.errors import error
from spir.frontends import _quantised as q
from spir.frontends._constructs import CONSTRUCTS
from spir.ir import Module


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
    if not isinstance(part, reference.Conv1d | reference.Conv2d | reference.Linear):
        return part.weight.detach()  # type: ignore[operator]
    return q.quantised_weight(part.get_quantized_weight())  # type: ignore[no-untyped-call]


def _linear(part: nn.Module) -> dict[str, Any]:
    return {"weight": _weight(part), "bias": part.bias}


def _conv(part: nn.Module) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    return _linear(part) | {name: getattr(part, name) for name in names}


def _fused(part: nn.Sequential) -> dict[str, Any]:
    reader, fields = _LAYERS[next(c for c in _LAYERS if isinstance(part[0], c))]
    return {"layer": reader, "fields": fields(part[0])}


def _taken(names: tuple[str, ...]) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda part: {name: getattr(part, name) for name in names}


_LAYERS: dict[type[nn.Module], tuple[q.Reader, Callable[[Any], dict[str, Any]]]] = {
    nn.Conv1d: (q.conv1d, _conv),
    nn.Conv2d: (q.conv2d, _conv),
    nn.Linear: (q.linear, _linear),
}

_TOOLKIT = q.Toolkit(
    "fx_reference",
    {
        **{
            call: found
            for call, read in {**CONSTRUCTS.functions, **CONSTRUCTS.methods}.items()
            if (found := q.shared(read))
        },
        torch.quantize_per_tensor: q.quantize,
        torch.dequantize: q.dequantize,
        "dequantize": q.dequantize,
        "add": q.add,
        "size": q.sized,
        getattr: q.sized,
    },
    {
        **{c: (found, _taken(names)) for c, (read, names) in CONSTRUCTS.modules.items() if (found := q.shared(read))},
        **_LAYERS,
        reference.Conv1d: _LAYERS[nn.Conv1d],
        reference.Conv2d: _LAYERS[nn.Conv2d],
        reference.Linear: _LAYERS[nn.Linear],
        intrinsic.ConvReLU1d: (q.layer_then_relu, _fused),
        intrinsic.ConvReLU2d: (q.layer_then_relu, _fused),
        intrinsic.LinearReLU: (q.layer_then_relu, _fused),
    },
    lambda codes: codes.int_repr(),
    _advice,
)
