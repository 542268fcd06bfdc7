"""pt2e: a graph that torchao's PT2E quantisation made, as a module of reals with fake quantisers.

`torch.export`, `prepare_pt2e` or `prepare_qat_pt2e`, calibration or training, and `convert_pt2e` give a graph of aten
ops between ``quantize_per_tensor`` and ``dequantize_per_tensor``. What lowers it to int8 kernels comes later and is not
read. The toolkit's names are compared as text, so that reading needs the graph alone.
"""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import attrs
import torch
from torch import fx

from spir.errors import error
from spir.frontends import _layers as layers
from spir.frontends import _quantised as q
from spir.frontends import _shapes as shapes
from spir.frontends import _windows as windows
from spir.ir import Module


@attrs.frozen
class Pt2e:
    """Reads a converted PT2E graph: integer weights, one scale an activation, and the toolkit's integers, proved."""

    name: ClassVar[str] = "pt2e"

    def accepts(self, model: object) -> bool:
        """Whether torchao's PT2E has been at work: prepared and lowered graphs, too, which `read` refuses."""
        return q.toolkit_of(model) == "pt2e"

    def read(self, model: Any, example: torch.Tensor) -> Module:
        """The graph as a verified module of reals; the model itself is left as it was.

        Args:
            model: what `convert_pt2e` returns, or an exported program of it.
            example: one or more samples as the model receives them, with the batch axis.

        Raises:
            SpirError[usage]: no graph of PT2E; torchao is missing.
            SpirError[unsupported]: a graph that is not converted, dynamic or lowered; every call without a reader.
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
        whole = model.module() if isinstance(model, torch.export.ExportedProgram) else model
        if not isinstance(whole, torch.nn.Module) or not self.accepts(whole):
            fix = "give what convert_pt2e returns, or leave frontend= out"
            raise error("usage", f"a {type(model).__name__} is no graph of PT2E", fix=fix)
        if not isinstance(whole, fx.GraphModule):
            raise error(
                "unsupported",
                f"a {type(model).__name__} with tensors of torchao has no conversion: it quantises weights alone, or "
                "activations as it runs",
                toolkit=q.versions(),
                fix="quantise statically: torch.export, prepare_pt2e, calibration, convert_pt2e",
            )
        q.unconverted(whole, "convert_pt2e(model), of torchao.quantization.pt2e.quantize_pt2e")
        return q.imported(q.own_copy(whole), _TOOLKIT, example)


def _advice(word: str) -> str:
    if word.startswith(("onednn", "quantized.", "x86", "arm")):
        return "give the graph as convert_pt2e returns it, before it is lowered to int8 kernels"
    if any(part in word for part in ("embedding", "lstm", "gru", "rnn", "attention")):
        return "use convolutions and linear layers: a network takes one tensor of numbers, and no sequence"
    return "use what converts: conv2d, linear, ReLU, ReLU6, pooling, add, cat, and quantisers per tensor"


_TOOLKIT = q.Toolkit(
    "pt2e",
    {
        "quantized_decomposed.quantize_per_tensor.default": q.quantize,
        "quantized_decomposed.quantize_per_tensor.tensor": q.quantize,
        "quantized_decomposed.dequantize_per_tensor.default": q.dequantize,
        "quantized_decomposed.dequantize_per_tensor.tensor": q.dequantize,
        "quantized_decomposed.dequantize_per_channel.default": q.dequantize_per_channel,
        "aten.conv1d.default": q.conv1d,
        "aten.conv1d.padding": q.conv1d,
        "aten.conv2d.default": q.conv2d,
        "aten.conv2d.padding": q.conv2d,
        "aten.linear.default": q.linear,
        "aten.batch_norm.default": q.batch_norm,
        "aten.relu.default": q.relu,
        "aten.relu_.default": q.relu,
        "aten.relu6.default": q.relu6,
        "aten.relu6_.default": q.relu6,
        "aten.hardtanh.default": q.hardtanh,
        "aten.hardtanh_.default": q.hardtanh,
        "aten.clamp.default": q.clamp,
        "aten.clamp_.default": q.clamp,
        "aten.clamp_min.default": q.clamp_min,
        "aten.dropout.default": q.dropout,
        "aten.dropout_.default": q.dropout,
        "aten.feature_dropout.default": q.dropout,
        "aten.clone.default": layers.same,
        "aten.contiguous.default": layers.same,
        "aten.detach.default": layers.same,
        "aten.alias.default": layers.same,
        "aten.flatten.using_ints": shapes.reshape,
        "aten.view.default": shapes.reshape,
        "aten._unsafe_view.default": shapes.reshape,
        "aten.reshape.default": shapes.reshape,
        "aten.squeeze.dims": shapes.reshape,
        "aten.squeeze.dim": shapes.reshape,
        "aten.unsqueeze.default": shapes.reshape,
        "aten.permute.default": shapes.permute,
        "aten.transpose.int": shapes.transpose,
        "aten.pad.default": windows.pad,
        "aten.slice.Tensor": q.slice_,
        "aten.select.int": shapes.select,
        "aten.chunk.default": shapes.split,
        "aten.split.Tensor": shapes.split,
        "aten.max_pool1d.default": windows.max_pool1d,
        "aten.max_pool2d.default": windows.max_pool2d,
        "aten.avg_pool1d.default": windows.avg_pool1d,
        "aten.avg_pool2d.default": windows.avg_pool2d,
        "aten.adaptive_avg_pool1d.default": windows.adaptive_avg_pool1d,
        "aten.adaptive_avg_pool2d.default": windows.adaptive_avg_pool2d,
        "aten.mean.dim": windows.mean,
        "aten.upsample_nearest2d.vec": windows.interpolate,
        "aten.add.Tensor": q.add,
        "aten.add_.Tensor": q.add,
        "aten.cat.default": q.cat,
        "aten.sym_size.int": q.sized,
        operator.getitem: shapes.getitem,
    },
    {},
    lambda codes: codes,
    _advice,
)
