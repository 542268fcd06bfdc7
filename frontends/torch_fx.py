"""torch_fx: traces an nn.Module with torch.fx and reads the trace as a module of reals.

Each construct of torch has one reader, a function with the argument names of its torch counterpart; the tables at the
end say which. The trace is then run on two samples, interpreted, and compared with the model itself, so that whatever
a trace cannot see (a hook that changes values, code that treats tracing specially) is refused and not lost.
"""

from __future__ import annotations

import inspect
import operator
import re
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, ClassVar

import attrs
import torch
import torch.nn.functional as F
from torch import fx, nn

from spir.errors import SpirError, error, located, raise_all
from spir.frontends._trace import (
    PerBatch,
    Trace,
    Trial,
    Whole,
    answer_of,
    check_signature,
    class_line,
    compare,
    copied,
    dtype_name,
    floats,
    holds,
    kind_of,
    own_path,
    shown,
)
from spir.ir import Array, Module, Node, Op, Value, infer
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.conv2d import Conv2d
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.linear import Linear
from spir.ops.pad import Pad
from spir.ops.relu import Relu
from spir.ops.scale import Scaling
from spir.ops.slice import Slice
from spir.types import Real, Shape, Tensor
from spir.verify import verify

_CONVERTS = "use what converts: convolution, linear, batch norm, ReLU, average pooling, add, products with constants"


# --- the public class ---------------------------------------------------------------------------------------------


@attrs.frozen
class TorchFx:
    """Reads a trained ``nn.Module``: eval semantics, float64 parameters, module path and source line of each op."""

    name: ClassVar[str] = "torch_fx"

    def accepts(self, model: object) -> bool:
        """Whether the model is a network of torch."""
        return isinstance(model, nn.Module)

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
        if not self.accepts(model):
            raise error("usage", f"a model is a torch.nn.Module, not {kind_of(model)}", fix="give the network itself")
        check_signature(model)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's remarks on padding='same' and the like are not the user's doing
            given = floats(model, example)
            batch = torch.cat([given[:1], given[-1:]])
            whole, exact = copied(model), copied(model).double()
            answer = answer_of(whole, batch, given)
            trace = Trace.of(whole, lambda m: _known(m) is not None)
            module = verify(_Reading(trace, exact, Trial.of(trace, exact, batch)).module(batch))
            compare(module, exact, batch, answer)
        return module


# --- from nodes to ops --------------------------------------------------------------------------------------------

_SIZES = {"size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "get_device"}
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"}


class _Reading:
    """Reads a graph node by node; refusals are collected, and what follows them is read on a stand-in."""

    def __init__(self, trace: Trace, exact: Whole, trial: Trial) -> None:
        self.trace = trace
        self.exact = exact
        self.trial = trial
        self.nodes: list[Node] = []
        self.types: dict[str, Tensor] = {}
        self.values: dict[fx.Node, Value | None] = {}
        self.refusals: list[SpirError] = []
        self.order = {node: i for i, node in enumerate(trace.graph.nodes)}
        self.parameters = {id(p): own_path(n) for n, p in chain(exact.named_parameters(), exact.named_buffers())}
        for node, value in trial.constants.items():
            if node.op == "get_attr" and node not in trial.fed:
                self.parameters[id(value)] = own_path(str(node.target))

    def module(self, batch: torch.Tensor) -> Module:
        """The module, without the ops that nobody reads.

        Raises:
            SpirError: every refusal at once.
        """
        x = Value("x", Tensor(tuple(batch.shape[1:]), Real()))
        self.types[x.name] = x.type
        output: Value | None = None
        for node in self.trace.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = x
            elif node.op == "output":
                output = self.output(node)
            elif node in self.trial.fed and not self.is_constant(node):
                self.values[node] = self.value(node)
                self.overwrite(node)
        raise_all(self.refusals)
        assert output is not None  # else its refusal was raised
        return Module(x, _live(self.nodes, output.name), output.name)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node that depends on the input looks at nothing but sizes, or does nothing at all."""
        if node.target is torch._assert:
            return True
        if holds(self.trial.result(node), torch.Tensor):
            return False
        reads = node.op == "call_method" and node.target in _SIZES
        reads |= node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES
        return reads or not any(a in self.values for a in node.all_input_nodes)

    def value(self, node: fx.Node) -> Value | None:
        """The value of a node; after a refusal a stand-in of the same type, or None where no type fits."""
        reader = _reader(node, self.exact)
        shape = self.trial.shape(node)
        origin = self.trace.origin(node)
        try:
            with located(from_=str(origin)):
                if reader is None:
                    raise _refusal(self.trace.construct(node), _advice(self.trace.word(node)))
                if any(a in self.values and self.values[a] is None for a in node.all_input_nodes):
                    return None
                return self.call(node, reader, shape)
        except SpirError as refusal:
            self.refusals.append(refusal)
            return None if shape is None else Value("refused", Tensor(shape, Real()))

    def call(self, node: fx.Node, reader: Callable[..., Value], shape: Shape | None) -> Value:
        """What the reader makes of the node's arguments, checked against what torch made of them."""
        construct = self.trace.construct(node)
        result = self.trial.result(node)
        if shape is None:
            raise error(
                "unsupported",
                f"{construct} mixes samples or drops the batch axis: it gives {shown(result)} for two samples",
                fix="keep the batch axis first and apart: x.flatten(1), x.mean((2, 3)), x.view(x.size(0), -1)",
            )
        if result.dtype != self.trial.dtype:
            raise _refusal(f"{construct} to {dtype_name(result)}", "leave the cast out: SPIR computes reals in float64")
        args = list(fx.node.map_arg(node.args, self.argument))
        kwargs = dict(fx.node.map_arg(node.kwargs, self.argument))
        if "input" in kwargs:
            args.insert(0, kwargs.pop("input"))
        if reader is not _reshape and any(holds(a, PerBatch) for a in (args, kwargs)):
            raise _refusal(f"{construct} by the number of samples", "make the number a constant of the model")
        call = _Call(self, node, construct, shape)
        if node.op == "call_module":
            owner = self.exact.get_submodule(str(node.target))
            kwargs |= {name: getattr(owner, name) for name in _attributes(owner)}
        try:
            bound = inspect.signature(reader).bind(call, *args, **kwargs)
        except TypeError:
            names = ", ".join(sorted(kwargs)) or "these arguments"
            raise _refusal(f"{construct} with {names}", "leave the extra arguments out") from None
        value: Value = reader(*bound.args, **bound.kwargs)
        if value.type.shape != shape:
            raise _refusal(f"{construct} from {list(value.type.shape)} to {list(shape)} a sample", _CONVERTS)
        return value

    def argument(self, node: fx.Node) -> Any:
        """An argument: data as a `Value`, all else as the constant it is."""
        return self.values[node] if node in self.values else self.trial.constant(node)

    def overwrite(self, node: fx.Node) -> None:
        """After an op in place, all that names the same memory is the result."""
        result = self.values[node]
        for operand in self.trial.two.overwritten[node]:
            before = self.values.get(operand)
            for other in [o for o in self.values if o is not node and self.trial.shares(o, operand)]:
                if self.values[other] == before:
                    self.values[other] = result
                elif any(self.order[user] > self.order[node] for user in other.users):
                    origin = self.trace.origin(node)
                    self.refusals.append(
                        _refusal(
                            f"{self.trace.construct(node)} in place on a tensor of which a view is read later",
                            "use the form that is not in place",
                        ).note("from", str(origin))
                    )

    def output(self, node: fx.Node) -> Value | None:
        """The one tensor that the model returns."""
        (returned,) = node.args
        origin = class_line(self.exact.network)
        if not isinstance(returned, fx.Node):
            many = len(returned) if isinstance(returned, tuple | list | dict) else 0
            spelled = type(returned).__name__.removeprefix("immutable_")
            what = f"a {spelled} of {many}" if many else repr(returned)
            self.refusals.append(
                error(
                    "unsupported",
                    f"the network returns {what}, and one tensor converts",
                    from_=origin,
                    fix="wrap the model in one that returns the logits alone",
                )
            )
            return None
        if returned not in self.values:
            self.refusals.append(
                error(
                    "unsupported",
                    "what the network returns does not depend on its input",
                    from_=origin,
                    fix="return what the layers compute",
                )
            )
            return None
        return self.values[returned]

    def unique(self, base: str) -> str:
        """``base`` as a name of the language, with a number where it is taken."""
        name = re.sub(r"[^A-Za-z0-9_.]", "_", base)
        name = name if re.match(r"[A-Za-z_]", name) else f"_{name}"
        counted = (f"{name}_{i}" for i in range(1, len(self.types) + 2))
        return next(n for n in chain([name], counted) if n not in self.types)


@attrs.frozen
class _Call:
    """One call in the model, as its reader sees it."""

    reading: _Reading
    node: fx.Node
    construct: str
    shape: Shape
    """What torch returns, per sample."""

    def emit(self, op: Op, *operands: Value) -> Value:
        """Appends an op; it is named after the module that was called, or after itself below the module that calls."""
        reading = self.reading
        origin = reading.trace.origin(self.node, op.name)
        name = reading.unique(origin.path)
        inferred = infer(op, tuple(o.type for o in operands))
        reading.nodes.append(Node(name, op, tuple(o.name for o in operands), inferred, origin))
        reading.types[name] = inferred
        return Value(name, inferred)

    def array(self, values: Any, source: object = None) -> Array:
        """A constant in float64; ``source`` is the parameter that it was made of, where it is not one itself.

        Raises:
            SpirError[weights]: NaN or infinite values, with the name of the parameter.
        """
        if not isinstance(values, torch.Tensor):
            raise _refusal(f"{self.construct} with weights that depend on the input", "make the weights parameters")
        name = self.reading.parameters.get(id(values if source is None else source), "")
        with located(parameter=name):
            return Array.of(values.detach().cpu().double().numpy())

    def optional(self, values: torch.Tensor | None) -> Array | None:
        """A constant that may be missing."""
        return None if values is None else self.array(values)

    def refuse(self, what: str, fix: str) -> SpirError:
        """The refusal of this call for a reason."""
        return _refusal(f"{self.construct} {what}", fix)

    def image(self, x: Value) -> tuple[int, int, int]:
        """Channels, height and width.

        Raises:
            SpirError[unsupported]: a sample that is no image.
        """
        if len(x.type.shape) != 3:
            fix = "give the example its batch axis: [N, channels, height, width]"
            raise self.refuse(f"on samples of shape {list(x.type.shape)}", fix)
        channels, height, width = x.type.shape
        return channels, height, width


def _live(nodes: Sequence[Node], output: str) -> tuple[Node, ...]:
    """The nodes that the output needs."""
    needed, live = {output}, []
    for node in reversed(nodes):
        if node.result in needed:
            needed.update(node.operands)
            live.append(node)
    return tuple(reversed(live))


# --- advice -------------------------------------------------------------------------------------------------------

_RELU_INSTEAD = "use ReLU and train the network again"
_OUTSIDE = "leave it out of the network and apply it to the logits; the class does not change"
_NORM_INSTEAD = "use batch norm, whose statistics are fixed after training"
_MAX_POOL = "max-pool is not converted yet: replace it by average pooling"
_ADVICE = {
    **dict.fromkeys(("gelu", "silu", "mish", "elu", "celu", "selu", "softplus", "leakyrelu", "prelu"), _RELU_INSTEAD),
    **dict.fromkeys(("relu6", "hardtanh", "hardswish", "hardsigmoid", "tanh", "clamp", "glu", "rrelu"), _RELU_INSTEAD),
    **dict.fromkeys(("softmax", "logsoftmax", "sigmoid", "softmax2d", "argmax", "logsigmoid"), _OUTSIDE),
    **dict.fromkeys(("layernorm", "groupnorm", "instancenorm1d", "instancenorm2d", "rmsnorm"), _NORM_INSTEAD),
    **dict.fromkeys(("localresponsenorm", "instancenorm", "normalize"), _NORM_INSTEAD),
    **dict.fromkeys(("maxpool2d", "maxpool1d", "adaptivemaxpool2d", "amax", "max"), _MAX_POOL),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), "add the branches instead of joining their channels"),
}


def _advice(word: str) -> str:
    return _ADVICE.get(word.lower().replace("_", ""), _CONVERTS)


def _refusal(what: str, fix: str) -> SpirError:
    return error("unsupported", f"{what} has no conversion", fix=fix)


# --- readers ------------------------------------------------------------------------------------------------------
# Arguments are named as torch names them, so that a call binds; what torch accepts and a reader does not name is
# refused when it is given.


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    """One number for both axes, or one each."""
    both = (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))
    return int(both[0]), int(both[1])


def _conv2d(
    call: _Call,
    x: Value,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Value:
    call.image(x)
    if padding_mode != "zeros":
        raise call.refuse(f"with padding_mode={padding_mode!r}", "train with padding_mode='zeros'")
    kernel = call.array(weight)
    spread = _pair(dilation)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(spread, kernel.values.shape[2:], strict=True)]
        top, left = (total // 2 for total in totals)
        around = (top, totals[0] - top, left, totals[1] - left)
    else:
        rows, columns = _pair(0 if isinstance(padding, str) else padding)
        around = (rows, rows, columns, columns)
    op = Conv2d(
        weight=kernel,
        bias=call.optional(bias),
        stride=_pair(stride),
        padding=around,
        dilation=spread,
        groups=groups,
    )
    return call.emit(op, x)


def _linear(call: _Call, x: Value, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Value:
    if len(x.type.shape) != 1:
        raise call.refuse(f"on samples of shape {list(x.type.shape)}", "flatten the samples first: x.flatten(1)")
    return call.emit(Linear(weight=call.array(weight), bias=call.optional(bias)), x)


def _batch_norm(
    call: _Call,
    x: Value,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    del momentum  # moves the statistics in training only
    if training or running_mean is None or running_var is None:
        fix = "keep running statistics: track_running_stats=True, or training=self.training in the functional form"
        raise call.refuse("by the statistics of the batch", fix)
    op = BatchNorm(
        mean=call.array(running_mean),
        var=call.array(running_var),
        eps=float(eps),
        weight=call.optional(weight),
        bias=call.optional(bias),
    )
    return call.emit(op, x)


def _torch_batch_norm(
    call: _Call,
    x: Value,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Value:
    del cudnn_enabled  # how, not what
    return _batch_norm(call, x, running_mean, running_var, weight, bias, training, momentum, eps)


def _relu(call: _Call, x: Value, inplace: bool = False) -> Value:
    del inplace  # seen when the trace ran
    return call.emit(Relu(), x)


def _same(call: _Call, x: Value) -> Value:
    del call  # nothing is emitted
    return x


def _dropout(call: _Call, x: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    del inplace  # nothing is written
    if training and p:
        raise call.refuse("with training=True", "write training=self.training, so that it rests after training")
    return x


def _torch_dropout(call: _Call, x: Value, p: float, train: bool) -> Value:
    return _dropout(call, x, p, train)


def _add(call: _Call, x: Any, other: Any, alpha: float = 1) -> Value:
    first = x if isinstance(x, Value) else _times(call, other, alpha)
    second = other if isinstance(x, Value) else x
    if not isinstance(second, Value):
        if torch.as_tensor(second).count_nonzero():
            raise call.refuse("of a constant", "fold it into the bias of the layer before")
        return first
    if first.type.shape != second.type.shape:
        shapes = f"{list(first.type.shape)} and {list(second.type.shape)}"
        raise call.refuse(f"of samples of shapes {shapes}", "bring both operands to one shape: nothing is broadcast")
    return call.emit(Add(), first, _times(call, second, alpha))


def _sub(call: _Call, x: Any, other: Any, alpha: float = 1) -> Value:
    return _add(call, x, other, -alpha)


def _times(call: _Call, x: Value, factor: Any) -> Value:
    """A constant factor, one for all or one per channel; 1 changes nothing."""
    if isinstance(factor, int | float) and factor == 1:
        return x
    constant = torch.as_tensor(factor, dtype=torch.float64)
    aligned = constant.reshape((1,) * (len(x.type.shape) + 1 - constant.ndim) + tuple(constant.shape))
    if constant.numel() != 1 and aligned.numel() != aligned.shape[1]:
        raise call.refuse(
            f"by a constant of shape {list(constant.shape)}", "give one factor, or one per channel: [C, 1, 1]"
        )
    return call.emit(Scaling(factor=call.array(aligned.reshape(-1), source=factor)), x)


def _mul(call: _Call, x: Any, other: Any) -> Value:
    if isinstance(x, Value) and isinstance(other, Value):
        raise call.refuse("of two activations", "multiply by constants only: gates do not convert")
    return _times(call, x, other) if isinstance(x, Value) else _times(call, other, x)


def _div(call: _Call, x: Any, other: Any) -> Value:
    if isinstance(other, Value):
        raise call.refuse("by an activation", "divide by constants only")
    return _times(call, x, 1.0 / torch.as_tensor(other, dtype=torch.float64))


def _neg(call: _Call, x: Value) -> Value:
    return _times(call, x, -1.0)


def _avg_pool2d(
    call: _Call,
    x: Value,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    call.image(x)
    kernel, (rows, columns) = _pair(kernel_size), _pair(padding)
    if (rows or columns) and not count_include_pad:
        raise call.refuse(
            "with padding and count_include_pad=False", "set count_include_pad=True and train again, or pad nothing"
        )
    if divisor_override not in (None, kernel[0] * kernel[1]):
        raise call.refuse(f"with divisor_override={divisor_override}", "leave it out and multiply by a constant")
    op = AvgPool(kernel=kernel, stride=_pair(stride or kernel), padding=(rows, rows, columns, columns))
    if ceil_mode and op.shape(x.type.shape) != call.shape:
        raise call.refuse(
            "with ceil_mode=True and windows that reach beyond the image", "pad the image, or set ceil_mode=False"
        )
    return call.emit(op, x)


def _adaptive_avg_pool2d(call: _Call, x: Value, output_size: object) -> Value:
    del output_size  # torch has worked it out
    _, height, width = call.image(x)
    _, rows, columns = call.shape
    if (rows, columns) == (height, width):
        return x
    if (rows, columns) == (1, 1):
        return call.emit(GlobalAvgPool(positions=height * width, keepdim=True), x)
    if height % rows or width % columns:
        raise call.refuse(
            f"from {height}x{width} to {rows}x{columns}, with windows of unequal size,",
            "choose an output size that divides the image",
        )
    kernel = (height // rows, width // columns)
    return call.emit(AvgPool(kernel=kernel, stride=kernel), x)


def _mean(call: _Call, x: Value, dim: int | Sequence[int] = (), keepdim: bool = False) -> Value:
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    rank = len(x.type.shape) + 1
    if rank != 4 or {a % rank for a in axes} != {2, 3}:
        raise call.refuse(f"over {list(axes)}", "take the mean over height and width at once: x.mean((2, 3))")
    _, height, width = call.image(x)
    return call.emit(GlobalAvgPool(positions=height * width, keepdim=keepdim), x)


def _reshape(call: _Call, x: Value, *shape: object, **named: object) -> Value:
    del shape, named  # torch has worked them out
    if call.shape == x.type.shape:
        return x
    if call.shape != (x.type.size,):
        raise call.refuse(
            f"from {list(x.type.shape)} to {list(call.shape)} a sample", "flatten all but the batch axis: x.flatten(1)"
        )
    return call.emit(Flatten(), x)


def _pad(call: _Call, x: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    if mode != "constant" or value:
        how = f"with mode={mode!r}" if mode != "constant" else f"with value={value}"
        raise call.refuse(how, "pad with zeros")
    if min(pad) < 0:
        raise call.refuse(f"by {list(pad)}", "cut by a slice: x[:, :, 1:-1]")
    rank = len(x.type.shape)
    ends = [(int(a), int(b)) for a, b in zip(pad[::2], pad[1::2], strict=True)][:rank]
    ends += [(0, 0)] * (rank - len(ends))
    return call.emit(Pad(pads=tuple(chain.from_iterable(reversed(ends)))), x)


def _constant_pad(call: _Call, x: Value, padding: Sequence[int], value: float) -> Value:
    return _pad(call, x, padding, value=value)


def _getitem(call: _Call, x: Value, index: Any) -> Value:
    fix = "slice with numbers and leave the batch axis alone: x[:, :, ::2, ::2]"
    given = list(index) if isinstance(index, tuple) else [index]
    full = (2, *x.type.shape)
    if any(i is Ellipsis for i in given):
        at = next(n for n, i in enumerate(given) if i is Ellipsis)
        given[at : at + 1] = [slice(None)] * (len(full) - len(given) + 1)
    given += [slice(None)] * (len(full) - len(given))
    if len(given) != len(full) or holds(index, Value) or any(type(i) not in (int, slice) for i in given):
        raise call.refuse("with such an index", fix)
    if type(given[0]) is int or given[0].indices(2) != (0, 2, 1):
        raise call.refuse("on the batch axis", fix)
    windows = [
        (i % size, i % size + 1, 1) if isinstance(i, int) else i.indices(size)
        for i, size in zip(given[1:], x.type.shape, strict=True)
    ]
    if windows != [(0, size, 1) for size in x.type.shape]:
        start, stop, step = zip(*windows, strict=True)
        x = call.emit(Slice(start=start, stop=stop, step=step), x)
    return _reshape(call, x)


# --- tables -------------------------------------------------------------------------------------------------------

Reader = Callable[..., Value]

_STATISTICS = ("running_mean", "running_var", "weight", "bias", "eps")
_POOLING = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")

# A class, its reader, and the attributes that the reader takes as arguments of the same names.
_MODULES: dict[type[nn.Module], tuple[Reader, tuple[str, ...]]] = {
    nn.Conv2d: (_conv2d, ("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")),
    nn.Linear: (_linear, ("weight", "bias")),
    nn.BatchNorm1d: (_batch_norm, _STATISTICS),
    nn.BatchNorm2d: (_batch_norm, _STATISTICS),
    nn.ReLU: (_relu, ()),
    nn.AvgPool2d: (_avg_pool2d, _POOLING),
    nn.AdaptiveAvgPool2d: (_adaptive_avg_pool2d, ("output_size",)),
    nn.Flatten: (_reshape, ()),
    nn.ZeroPad2d: (_constant_pad, ("padding", "value")),
    nn.ConstantPad2d: (_constant_pad, ("padding", "value")),
    nn.Identity: (_same, ()),
    nn.Dropout: (_same, ()),
    nn.Dropout1d: (_same, ()),
    nn.Dropout2d: (_same, ()),
    nn.Dropout3d: (_same, ()),
    nn.AlphaDropout: (_same, ()),
    nn.FeatureAlphaDropout: (_same, ()),
}

_FUNCTIONS: dict[Any, Reader] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.relu: _relu,
    F.relu_: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.pad: _pad,
    F.dropout: _dropout,
    F.dropout1d: _dropout,
    F.dropout2d: _dropout,
    F.dropout3d: _dropout,
    F.alpha_dropout: _dropout,
    torch.dropout: _torch_dropout,
    torch.flatten: _reshape,
    torch.reshape: _reshape,
    torch.squeeze: _reshape,
    torch.mean: _mean,
    torch.add: _add,
    operator.add: _add,
    operator.iadd: _add,
    torch.sub: _sub,
    operator.sub: _sub,
    operator.isub: _sub,
    torch.mul: _mul,
    operator.mul: _mul,
    operator.imul: _mul,
    torch.div: _div,
    operator.truediv: _div,
    operator.itruediv: _div,
    torch.neg: _neg,
    operator.neg: _neg,
    operator.pos: _same,
    operator.getitem: _getitem,
}

_METHODS: dict[str, Reader] = {
    "relu": _relu,
    "relu_": _relu,
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _reshape,
    "squeeze": _reshape,
    "mean": _mean,
    "add": _add,
    "add_": _add,
    "sub": _sub,
    "sub_": _sub,
    "mul": _mul,
    "mul_": _mul,
    "div": _div,
    "div_": _div,
    "neg": _neg,
    "neg_": _neg,
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "float": _same,
}


def _known(m: nn.Module) -> type[nn.Module] | None:
    """The class in the table that a module is; a subclass with a forward of its own is not that class."""
    owner = next((c for c in type(m).__mro__ if c in _MODULES), None)
    return owner if owner is not None and type(m).forward is owner.forward else None


def _attributes(m: nn.Module) -> tuple[str, ...]:
    """The attributes that a known module's reader takes."""
    owner = _known(m)
    return () if owner is None else _MODULES[owner][1]


def _reader(node: fx.Node, whole: Whole) -> Reader | None:
    """The reader of what a node calls, where there is one."""
    if node.op == "call_module":
        owner = _known(whole.get_submodule(str(node.target)))
        return None if owner is None else _MODULES[owner][0]
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target)
