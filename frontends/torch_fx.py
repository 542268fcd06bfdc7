"""torch_fx: traces an nn.Module with torch.fx and reads the trace as a module of reals.

Each construct of torch has one reader, a function with the argument names of its torch counterpart: they stand by
family in private modules, and the tables at the end say which reads what. The trace is then run on two samples,
interpreted, and compared with the model itself, so that whatever a trace cannot see (a hook that changes values, code
that treats tracing specially) is refused and not lost.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any, ClassVar

import attrs
import torch
import torch.nn.functional as F
from torch import nn

from spir.errors import error
from spir.frontends import _arithmetic as arithmetic
from spir.frontends import _layers as layers
from spir.frontends import _shapes as shapes
from spir.frontends import _windows as windows
from spir.frontends._quantised import toolkit_of
from spir.frontends._reading import Constructs, Reader, Reading
from spir.frontends._trace import (
    Trace,
    Trial,
    answer_of,
    check_signature,
    compare,
    copied,
    floats,
    kind_of,
    two_samples,
)
from spir.frontends.modules.qcfs import QCFS
from spir.ir import Module
from spir.verify import verify

# --- the public class ---------------------------------------------------------------------------------------------


@attrs.frozen
class TorchFx:
    """Reads a trained ``nn.Module``: eval semantics, float64 parameters, module path and source line of each op."""

    name: ClassVar[str] = "torch_fx"

    def accepts(self, model: object) -> bool:
        """Whether the model is a network of torch that no quantisation toolkit has changed."""
        return isinstance(model, nn.Module) and not toolkit_of(model)

    def read(self, model: nn.Module, example: torch.Tensor) -> Module:
        """The network as a verified module of reals; the model itself is left as it was.

        Args:
            model: takes one tensor and returns one tensor, batch axis first.
            example: one or more samples as the model receives them, with the batch axis.

        Raises:
            SpirError[usage]: no nn.Module.
            SpirError[data]: an example that is no batch of finite floats, or that the model does not take.
            SpirError[trace]: Python code in forward that cannot be traced.
            SpirError[unsupported]: every construct without a conversion, at once.
            SpirError[weights]: parameters that are not finite.
        """
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        if not isinstance(model, nn.Module):
            raise error("usage", f"a model is a torch.nn.Module, not {kind_of(model)}", fix="give the network itself")
        check_signature(model)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's remarks on padding='same' and the like are not the user's doing
            given = floats(model, example)
            batch = two_samples(given)
            whole, exact = copied(model), copied(model).double()
            answer = answer_of(whole, batch, given)
            trace = Trace.of(whole, lambda m: _CONSTRUCTS.known(m) is not None)
            module = verify(Reading(_CONSTRUCTS, trace, exact, Trial.of(trace, exact, batch)).module(batch))
            compare(module, exact, batch, answer)
        return module


# --- tables -------------------------------------------------------------------------------------------------------

_CONVOLUTION = ("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")
_TRANSPOSED = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_STATISTICS = ("running_mean", "running_var", "weight", "bias", "eps")
_LARGEST = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_UPSAMPLING = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")

_MODULES: dict[type[nn.Module], tuple[Reader, tuple[str, ...]]] = {
    nn.Conv1d: (layers.conv1d, _CONVOLUTION),
    nn.Conv2d: (layers.conv2d, _CONVOLUTION),
    nn.Linear: (layers.linear, ("weight", "bias")),
    nn.BatchNorm1d: (layers.batch_norm, _STATISTICS),
    nn.BatchNorm2d: (layers.batch_norm, _STATISTICS),
    nn.ReLU: (layers.relu, ()),
    nn.ReLU6: (layers.relu6, ()),
    nn.Hardtanh: (layers.hardtanh, ("min_val", "max_val")),
    nn.Threshold: (layers.threshold, ("threshold", "value")),
    nn.MaxPool1d: (windows.max_pool1d, _LARGEST),
    nn.MaxPool2d: (windows.max_pool2d, _LARGEST),
    nn.AvgPool1d: (windows.avg_pool1d, _AVERAGE),
    nn.AvgPool2d: (windows.avg_pool2d, (*_AVERAGE, "divisor_override")),
    nn.AdaptiveAvgPool1d: (windows.adaptive_avg_pool1d, ("output_size",)),
    nn.AdaptiveAvgPool2d: (windows.adaptive_avg_pool2d, ("output_size",)),
    nn.AdaptiveMaxPool1d: (windows.adaptive_max_pool1d, ("output_size", "return_indices")),
    nn.AdaptiveMaxPool2d: (windows.adaptive_max_pool2d, ("output_size", "return_indices")),
    nn.Upsample: (windows.interpolate, _UPSAMPLING),
    nn.ZeroPad1d: (windows.constant_pad, ("padding", "value")),
    nn.ZeroPad2d: (windows.constant_pad, ("padding", "value")),
    nn.ConstantPad1d: (windows.constant_pad, ("padding", "value")),
    nn.ConstantPad2d: (windows.constant_pad, ("padding", "value")),
    nn.ReplicationPad1d: (windows.replication_pad, ("padding",)),
    nn.ReplicationPad2d: (windows.replication_pad, ("padding",)),
    nn.Flatten: (shapes.reshape, ()),
    nn.Unflatten: (shapes.reshape, ()),
    nn.PixelShuffle: (shapes.pixel_shuffle, ("upscale_factor",)),
    nn.PixelUnshuffle: (shapes.pixel_unshuffle, ("downscale_factor",)),
    nn.ChannelShuffle: (shapes.channel_shuffle, ("groups",)),
    nn.Identity: (layers.identity, ()),
    nn.Dropout: (layers.identity, ()),
    nn.Dropout1d: (layers.identity, ()),
    nn.Dropout2d: (layers.identity, ()),
    nn.Dropout3d: (layers.identity, ()),
    nn.AlphaDropout: (layers.identity, ()),
    nn.FeatureAlphaDropout: (layers.identity, ()),
    nn.Sigmoid: (layers.sigmoid, ()),
    nn.Tanh: (layers.tanh, ()),
    nn.Softmax: (layers.softmax, ("dim",)),
    nn.LogSoftmax: (layers.log_softmax, ("dim",)),
    nn.Softmax2d: (layers.softmax2d, ()),
    nn.ConvTranspose2d: (layers.conv_transpose2d, _TRANSPOSED),
    QCFS: (layers.qcfs, ("levels", "threshold")),
}

_FUNCTIONS: dict[Any, Reader] = {
    F.conv1d: layers.conv1d,
    F.conv2d: layers.conv2d,
    F.linear: layers.linear,
    operator.matmul: layers.matmul,
    torch.matmul: layers.matmul,
    torch.mm: layers.matmul,
    F.batch_norm: layers.batch_norm,
    torch.batch_norm: layers.torch_batch_norm,
    F.relu: layers.relu,
    F.relu_: layers.relu,
    torch.relu: layers.relu,
    torch.relu_: layers.relu,
    F.relu6: layers.relu6,
    F.hardtanh: layers.hardtanh,
    F.hardtanh_: layers.hardtanh,
    F.threshold: layers.threshold,
    torch.threshold_: layers.threshold,
    torch.threshold: layers.threshold,
    torch.clamp: layers.clamp,
    torch.clamp_: layers.clamp,
    torch.clip: layers.clamp,
    torch.clip_: layers.clamp,
    torch.clamp_min: layers.clamp_min,
    torch.clamp_min_: layers.clamp_min,
    torch.clamp_max: layers.clamp_max,
    torch.clamp_max_: layers.clamp_max,
    F.dropout: layers.dropout,
    F.dropout1d: layers.dropout,
    F.dropout2d: layers.dropout,
    F.dropout3d: layers.dropout,
    F.alpha_dropout: layers.dropout,
    F.feature_alpha_dropout: layers.dropout,
    torch.dropout: layers.torch_dropout,
    torch.clone: layers.same,
    operator.pos: layers.identity,
    torch.positive: layers.identity,
    torch.sigmoid: layers.sigmoid,
    torch.sigmoid_: layers.sigmoid,
    torch.special.expit: layers.sigmoid,
    torch.tanh: layers.tanh,
    torch.tanh_: layers.tanh,
    F.softmax: layers.softmax,
    torch.softmax: layers.softmax,
    F.log_softmax: layers.log_softmax,
    torch.log_softmax: layers.log_softmax,
    F.conv_transpose2d: layers.conv_transpose2d,
    F.max_pool1d: windows.max_pool1d,
    torch.max_pool1d: windows.max_pool1d,
    F.max_pool1d_with_indices: windows.max_pool1d,
    F.max_pool2d: windows.max_pool2d,
    torch.max_pool2d: windows.max_pool2d,
    F.max_pool2d_with_indices: windows.max_pool2d,
    F.avg_pool1d: windows.avg_pool1d,
    F.avg_pool2d: windows.avg_pool2d,
    F.adaptive_avg_pool1d: windows.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d: windows.adaptive_avg_pool2d,
    F.adaptive_max_pool1d: windows.adaptive_max_pool1d,
    F.adaptive_max_pool1d_with_indices: windows.adaptive_max_pool1d,
    F.adaptive_max_pool2d: windows.adaptive_max_pool2d,
    F.adaptive_max_pool2d_with_indices: windows.adaptive_max_pool2d,
    torch.mean: windows.mean,
    torch.sum: windows.sum_over,
    torch.amax: windows.amax,
    F.interpolate: windows.interpolate,
    F.pad: windows.pad,
    torch.flatten: shapes.reshape,
    torch.unflatten: shapes.reshape,
    torch.reshape: shapes.reshape,
    torch.squeeze: shapes.reshape,
    torch.unsqueeze: shapes.reshape,
    torch.permute: shapes.torch_permute,
    torch.transpose: shapes.transpose,
    torch.swapaxes: shapes.swapaxes,
    torch.swapdims: shapes.transpose,
    torch.movedim: shapes.movedim,
    torch.moveaxis: shapes.movedim,
    F.pixel_shuffle: shapes.pixel_shuffle,
    F.pixel_unshuffle: shapes.pixel_unshuffle,
    F.channel_shuffle: shapes.channel_shuffle,
    F.native_channel_shuffle: shapes.channel_shuffle,
    operator.getitem: shapes.getitem,
    torch.narrow: shapes.narrow,
    torch.select: shapes.select,
    torch.chunk: shapes.split,
    torch.split: shapes.split,
    torch.split_with_sizes: shapes.split,
    torch.tensor_split: shapes.split,
    torch.cat: shapes.cat,
    torch.concat: shapes.cat,
    torch.concatenate: shapes.cat,
    torch.stack: shapes.stack,
    torch.add: arithmetic.add,
    operator.add: arithmetic.add,
    operator.iadd: arithmetic.add,
    torch.sub: arithmetic.sub,
    torch.subtract: arithmetic.sub,
    operator.sub: arithmetic.sub,
    operator.isub: arithmetic.sub,
    torch.rsub: arithmetic.rsub,
    torch.mul: arithmetic.mul,
    torch.multiply: arithmetic.mul,
    operator.mul: arithmetic.mul,
    operator.imul: arithmetic.mul,
    torch.div: arithmetic.div,
    torch.divide: arithmetic.div,
    torch.true_divide: arithmetic.div,
    operator.truediv: arithmetic.div,
    operator.itruediv: arithmetic.div,
    torch.neg: arithmetic.neg,
    torch.negative: arithmetic.neg,
    operator.neg: arithmetic.neg,
    torch.maximum: arithmetic.maximum,
    torch.max: arithmetic.maximum,
    torch.minimum: arithmetic.minimum,
    torch.min: arithmetic.minimum,
    torch.zeros_like: arithmetic.zeros_like,
}

_METHODS: dict[str, Reader] = {
    "matmul": layers.matmul,
    "mm": layers.matmul,
    "relu": layers.relu,
    "relu_": layers.relu,
    "clamp": layers.clamp,
    "clamp_": layers.clamp,
    "clip": layers.clamp,
    "clip_": layers.clamp,
    "clamp_min": layers.clamp_min,
    "clamp_min_": layers.clamp_min,
    "clamp_max": layers.clamp_max,
    "clamp_max_": layers.clamp_max,
    "contiguous": layers.same,
    "clone": layers.same,
    "detach": layers.same,
    "float": layers.same,
    "to": layers.same,
    "sigmoid": layers.sigmoid,
    "sigmoid_": layers.sigmoid,
    "tanh": layers.tanh,
    "tanh_": layers.tanh,
    "softmax": layers.softmax,
    "log_softmax": layers.log_softmax,
    "mean": windows.mean,
    "sum": windows.sum_over,
    "amax": windows.amax,
    "view": shapes.reshape,
    "view_as": shapes.reshape,
    "reshape": shapes.reshape,
    "reshape_as": shapes.reshape,
    "flatten": shapes.reshape,
    "unflatten": shapes.reshape,
    "squeeze": shapes.reshape,
    "unsqueeze": shapes.reshape,
    "permute": shapes.permute,
    "transpose": shapes.transpose,
    "swapaxes": shapes.swapaxes,
    "swapdims": shapes.transpose,
    "movedim": shapes.movedim,
    "moveaxis": shapes.movedim,
    "narrow": shapes.narrow,
    "select": shapes.select,
    "chunk": shapes.split,
    "split": shapes.split,
    "split_with_sizes": shapes.split,
    "tensor_split": shapes.split,
    "add": arithmetic.add,
    "add_": arithmetic.add,
    "sub": arithmetic.sub,
    "sub_": arithmetic.sub,
    "subtract": arithmetic.sub,
    "subtract_": arithmetic.sub,
    "mul": arithmetic.mul,
    "mul_": arithmetic.mul,
    "multiply": arithmetic.mul,
    "multiply_": arithmetic.mul,
    "div": arithmetic.div,
    "div_": arithmetic.div,
    "divide": arithmetic.div,
    "divide_": arithmetic.div,
    "true_divide": arithmetic.div,
    "true_divide_": arithmetic.div,
    "neg": arithmetic.neg,
    "neg_": arithmetic.neg,
    "negative": arithmetic.neg,
    "negative_": arithmetic.neg,
    "maximum": arithmetic.maximum,
    "max": arithmetic.maximum,
    "minimum": arithmetic.minimum,
    "min": arithmetic.minimum,
}

_PROPERTIES: dict[str, Reader] = {"mT": shapes.matrix_transpose, "values": shapes.values}

_CONSTRUCTS = Constructs(_MODULES, _FUNCTIONS, _METHODS, _PROPERTIES, sized=frozenset((shapes.reshape,)))
