"""What every reader of torch_fx works with: the graph, node by node, and one call in it, with its way to refuse.

A reader is a function whose arguments are named as torch names them, so that a call binds; what torch accepts and a
reader does not name is refused when it is given.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

import attrs
import torch
from torch import fx, nn

from spir.errors import SpirError, error, located, raise_all
from spir.frontends._trace import (
    PerBatch,
    Trace,
    Trial,
    Whole,
    class_line,
    dtype_name,
    holds,
    own_path,
    shown,
)
from spir.ir import Array, Module, Node, Op, Value, infer
from spir.ops.flatten import Flatten
from spir.ops.reshape import Reshape
from spir.types import Real, Shape, Tensor

Found = Value | tuple[Value, ...]
Reader = Callable[..., Found]

CONVERTS = "use what converts: convolution, linear, batch norm, ReLU, pooling, add, concat, products with constants"


# --- advice -------------------------------------------------------------------------------------------------------

_RELU_INSTEAD = "use ReLU and train the network again"
_OUTSIDE = "the host computes it on the raw input or behind the last layer; in between use ReLU and train again"
_NORM_INSTEAD = "use batch norm, whose statistics are fixed after training"
_PAD_INSTEAD = "pad with zeros, or with mode='replicate'"
_ADVICE = {
    **dict.fromkeys(("gelu", "silu", "mish", "elu", "celu", "selu", "softplus", "leakyrelu", "prelu"), _RELU_INSTEAD),
    **dict.fromkeys(("hardswish", "hardsigmoid", "tanh", "glu", "rrelu", "hardshrink", "softsign"), _RELU_INSTEAD),
    **dict.fromkeys(("softmax", "logsoftmax", "sigmoid"), _OUTSIDE),
    **dict.fromkeys(("softmax2d", "argmax", "logsigmoid"), "leave it out and apply it to what the network returns"),
    **dict.fromkeys(("layernorm", "groupnorm", "instancenorm1d", "instancenorm2d", "rmsnorm"), _NORM_INSTEAD),
    **dict.fromkeys(("localresponsenorm", "instancenorm", "normalize"), _NORM_INSTEAD),
    **dict.fromkeys(("reflectionpad1d", "reflectionpad2d", "circularpad1d", "circularpad2d"), _PAD_INSTEAD),
    **dict.fromkeys(("convtranspose2d", "convtranspose1d"), "use nearest upsampling and a convolution"),
    **dict.fromkeys(("unbind", "indexselect"), "take the parts by numbers or slices: x[:, 0], x[:, :2]"),
    **dict.fromkeys(("expand", "expandas", "repeat", "tile"), "bring both operands to one shape: nothing is broadcast"),
}


def advice(word: str) -> str:
    """The way out for a construct of that name."""
    return _ADVICE.get(word.lower().replace("_", ""), CONVERTS)


def refused(what: str, fix: str) -> SpirError:
    """The refusal of a construct."""
    return error("unsupported", f"{what} has no conversion", fix=fix)


# --- from nodes to ops --------------------------------------------------------------------------------------------

_SIZES = {"size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "get_device"}
_SIZE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "requires_grad"}
_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}


@attrs.frozen
class Constructs:
    """Which reader reads which construct of torch."""

    modules: dict[type[nn.Module], tuple[Reader, tuple[str, ...]]]
    """A class, its reader, and the attributes that the reader takes as arguments of the same names."""
    functions: Mapping[Any, Reader]
    methods: Mapping[str, Reader]
    properties: Mapping[str, Reader]
    sized: frozenset[Reader]
    """The readers that may see the number of samples."""

    def known(self, m: nn.Module) -> type[nn.Module] | None:
        """The class in the table that a module is; a subclass with a forward of its own is not that class."""
        owner = next((c for c in type(m).__mro__ if c in self.modules), None)
        return owner if owner is not None and type(m).forward is owner.forward else None

    def attributes(self, m: nn.Module) -> tuple[str, ...]:
        """The attributes that a known module's reader takes."""
        owner = self.known(m)
        return () if owner is None else self.modules[owner][1]

    def reader(self, node: fx.Node, whole: Whole) -> Reader | None:
        """The reader of what a node calls, where there is one."""
        if node.op == "call_module":
            owner = self.known(whole.get_submodule(str(node.target)))
            return None if owner is None else self.modules[owner][0]
        if node.op == "call_method":
            return self.methods.get(str(node.target))
        if node.target is getattr:
            return self.properties.get(str(node.args[1]))
        return self.functions.get(node.target)


class Reading:
    """Reads a graph node by node; refusals are collected, and what follows them is read on a stand-in."""

    def __init__(self, constructs: Constructs, trace: Trace, exact: Whole, trial: Trial) -> None:
        self.constructs = constructs
        self.trace = trace
        self.exact = exact
        self.trial = trial
        self.nodes: list[Node] = []
        self.types: dict[str, Tensor] = {}
        self.values: dict[fx.Node, Found | None] = {}
        self.refusals: list[tuple[int, SpirError]] = []
        self.named: set[fx.Node] = set()
        """The calls of which an op has the name."""
        self.flow: dict[str, tuple[str, ...]] = {}
        """Every value and stand-in with its operands."""
        self.hosted: dict[str, tuple[int, SpirError]] = {}
        """What the host would compute, with the refusal of that between two layers."""
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
        output: Found | None = None
        for node in self.trace.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = x
            elif node.op == "output":
                output = self.output(node)
            elif node in self.trial.fed and not self.is_constant(node):
                self.values[node] = self.value(node)
                self.overwrite(node)
        found = sorted([*self.refusals, *self.misplaced()], key=lambda located: located[0])
        raise_all(refusal for _, refusal in found)
        assert isinstance(output, Value)  # else its refusal was raised
        return Module(x, live(self.nodes, output.name), output.name)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether a node that depends on the input looks at nothing but sizes, or does nothing at all."""
        if node.target is torch._assert:
            return True
        if holds(self.trial.result(node), torch.Tensor):
            return False
        reads = node.op == "call_method" and node.target in _SIZES
        reads |= node.target is getattr and node.args[1] in _SIZE_ATTRIBUTES
        return reads or not any(a in self.values for a in node.all_input_nodes)

    def value(self, node: fx.Node) -> Found | None:
        """The value of a node; after a refusal a stand-in of the same type, or None where no type fits."""
        reader = self.constructs.reader(node, self.exact)
        shapes = self.trial.shapes(node)
        origin = self.trace.origin(node)
        try:
            with located(from_=str(origin)):
                if reader is None:
                    raise refused(self.trace.construct(node), advice(self.trace.word(node)))
                if any(a in self.values and self.values[a] is None for a in node.all_input_nodes):
                    return None
                return self.call(node, reader, shapes)
        except SpirError as refusal:
            self.refusals.append((self.order[node], refusal))
            return self.stand_in(node, shapes)

    def stand_in(self, node: fx.Node, shapes: tuple[Shape, ...] | None) -> Found | None:
        """What takes the place of a refused node, so that everything behind it is read as well."""
        name = f"refused {len(self.flow)}"
        operands = (self.values.get(a) for a in node.all_input_nodes)
        self.flow[name] = tuple(v.name for found in operands for v in _each(found))
        if shapes is None or any(0 in shape for shape in shapes):
            return None
        found = tuple(Value(name, Tensor(shape, Real())) for shape in shapes)
        return found[0] if isinstance(self.trial.result(node), torch.Tensor) else found

    def call(self, node: fx.Node, reader: Reader, shapes: tuple[Shape, ...] | None) -> Found:
        """What the reader makes of the node's arguments, checked against what torch made of them."""
        construct = self.trace.construct(node)
        result = self.trial.result(node)
        if shapes is None:
            raise error(
                "unsupported",
                f"{construct} mixes samples, or leaves only the batch axis: it gives {shown(result)} for two samples",
                fix="keep the batch axis first, and one more: x.flatten(1), x.mean((2, 3)), x.view(x.size(0), -1)",
            )
        several = any(isinstance(self.values.get(a), tuple) for a in node.all_input_nodes)  # whose own call was checked
        if isinstance(result, torch.Tensor) and result.dtype != self.trial.dtype and not several:
            raise refused(f"{construct} to {dtype_name(result)}", "leave the cast out: SPIR computes reals in float64")
        args = list(fx.node.map_arg(node.args, self.argument))
        named = fx.node.map_arg(node.kwargs, self.argument)
        kwargs = {_NUMPY_NAMES.get(name, name): value for name, value in named.items()}
        if "input" in kwargs:
            args.insert(0, kwargs.pop("input"))
        if reader not in self.constructs.sized and any(holds(a, PerBatch) for a in (args, kwargs)):
            raise refused(f"{construct} by the number of samples", "make the number a constant of the model")
        call = Call(self, node, construct, shapes)
        if node.op == "call_module":
            owner = self.exact.get_submodule(str(node.target))
            kwargs |= {name: getattr(owner, name) for name in self.constructs.attributes(owner)}
        try:
            bound = inspect.signature(reader).bind(call, *args, **kwargs)
        except TypeError:
            names = ", ".join(sorted(kwargs)) or "these arguments"
            raise refused(f"{construct} with {names}", "leave the extra arguments out") from None
        found = reader(*bound.args, **bound.kwargs)
        if [v.type.shape for v in _each(found)] != list(shapes):
            read = " and ".join(str(list(v.type.shape)) for v in _each(found))
            wanted = " and ".join(str(list(shape)) for shape in shapes)
            raise refused(f"{construct} from {read} to {wanted} a sample", CONVERTS)
        return found

    def argument(self, node: fx.Node) -> Any:
        """An argument: data as a `Value`, several as a tuple of them, all else as the constant it is."""
        return self.values[node] if node in self.values else self.trial.constant(node)

    def misplaced(self) -> list[tuple[int, SpirError]]:
        """The refusals of what the host would compute with layers both before and behind it."""
        behind: set[str] = set()
        for name, operands in self.flow.items():
            if name not in self.hosted or behind.intersection(operands):
                behind.add(name)
        before: set[str] = set()
        for name, operands in reversed(self.flow.items()):
            if name not in self.hosted or name in before:
                before.update(operands)
        return [refusal for name, refusal in self.hosted.items() if name in behind & before]

    def overwrite(self, node: fx.Node) -> None:
        """After an op in place, all that names the same memory is the result."""
        result = self.values[node]
        for operand in self.trial.two.overwritten[node]:
            before = self.values.get(operand)
            for other in [o for o in self.values if o is not node and self.trial.shares(o, operand)]:
                if self.values[other] == before:
                    self.values[other] = result
                elif any(self.order[user] > self.order[node] for user in other.users):
                    refusal = refused(
                        f"{self.trace.construct(node)} in place on a tensor of which a view is read later",
                        "use the form that is not in place",
                    )
                    self.refusals.append((self.order[node], refusal.note("from", str(self.trace.origin(node)))))

    def output(self, node: fx.Node) -> Found | None:
        """The one tensor that the model returns."""
        (returned,) = node.args
        found = self.values.get(returned) if isinstance(returned, fx.Node) else None
        if not isinstance(returned, fx.Node) or isinstance(found, tuple):
            parts = found if isinstance(found, tuple) else returned
            many = len(parts) if isinstance(parts, tuple | list | dict) else 0
            spelled = type(parts).__name__.removeprefix("immutable_")
            what = f"a {spelled} of {many}" if many else repr(parts)
            message = f"the network returns {what}, and one tensor converts"
            self.refuse_output(node, message, "wrap the model in one that returns the logits alone")
            return None
        if returned not in self.values:
            what = "what the network returns does not depend on its input"
            self.refuse_output(node, what, "return what the layers compute")
        return found

    def refuse_output(self, node: fx.Node, what: str, fix: str) -> None:
        """Notes what is wrong with the result of the model."""
        refusal = error("unsupported", what, from_=class_line(self.exact.network), fix=fix)
        self.refusals.append((self.order[node], refusal))

    def unique(self, base: str) -> str:
        """``base`` as a name of the language, with a number where it is taken."""
        name = re.sub(r"[^A-Za-z0-9_.]", "_", base)
        name = name if re.match(r"[A-Za-z_]", name) else f"_{name}"
        counted = (f"{name}_{i}" for i in range(1, len(self.types) + 2))
        return next(n for n in chain([name], counted) if n not in self.types)


def _each(found: Found | None) -> tuple[Value, ...]:
    return found if isinstance(found, tuple) else () if found is None else (found,)


def live(nodes: Sequence[Node], output: str) -> tuple[Node, ...]:
    """The nodes that the output needs."""
    needed, found = {output}, []
    for node in reversed(nodes):
        if node.result in needed:
            needed.update(node.operands)
            found.append(node)
    return tuple(reversed(found))


# --- one call -----------------------------------------------------------------------------------------------------


V = TypeVar("V", bound=Value)


class Shaped(Generic[V]):
    """The steps that readers of shapes take beside the op of their call."""

    __slots__ = ()

    def beside(self, op: Op, *operands: V) -> V:
        """Appends an op that prepares or completes the one that has the module's name."""
        raise NotImplementedError  # abstract: each reader defines it

    def refuse(self, what: str, fix: str) -> SpirError:
        """The refusal of this call for a reason."""
        raise NotImplementedError  # abstract: each reader defines it

    def reshaped(self, x: V, shape: Shape) -> V:
        """The same elements under another shape, as a step beside the op of this call."""
        return x if x.type.shape == shape else self.beside(Flatten() if len(shape) == 1 else Reshape(to=shape), x)

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

    def line(self, x: V) -> V:
        """``[C, L]`` as the image ``[C, 1, L]``.

        Raises:
            SpirError[unsupported]: a sample of another rank.
        """
        if len(x.type.shape) != 2:
            fix = "give the example its batch axis: [N, channels, length]"
            raise self.refuse(f"on samples of shape {list(x.type.shape)}", fix)
        channels, length = x.type.shape
        return self.beside(Reshape(to=(channels, 1, length)), x)


@attrs.frozen
class Call(Shaped[Value]):
    """One call in the model, as its reader sees it."""

    reading: Reading
    node: fx.Node
    construct: str
    shapes: tuple[Shape, ...]
    """What torch returns, per sample: one shape, or one for each tensor."""

    @property
    def shape(self) -> Shape:
        """What torch returns, per sample, where it returns one tensor."""
        return self.shapes[0]

    def emit(self, op: Op, *operands: Value) -> Value:
        """Appends an op; the first is named after the module that was called, or after itself below the caller."""
        beside = self.node in self.reading.named
        self.reading.named.add(self.node)
        return self._append(op, operands, beside=beside)

    def beside(self, op: Op, *operands: Value) -> Value:
        """Appends an op that prepares or completes the one that has the module's name; it is named below it."""
        return self._append(op, operands, beside=True)

    def _append(self, op: Op, operands: tuple[Value, ...], *, beside: bool) -> Value:
        reading = self.reading
        origin = reading.trace.origin(self.node, op.name)
        named = self.node.op == "call_module" and origin.path != op.name
        name = reading.unique(f"{origin.path}.{op.name}" if beside and named else origin.path)
        inferred = infer(op, tuple(o.type for o in operands))
        sources = tuple(o.name for o in operands)
        reading.nodes.append(Node(name, op, sources, inferred, origin))
        reading.types[name] = inferred
        reading.flow[name] = sources
        return Value(name, inferred)

    def host(self, op: Op, *operands: Value, refusal: SpirError | None = None) -> Value:
        """Appends an op that the host computes; ``refusal`` is raised in the end where layers stand on both sides."""
        value = self.emit(op, *operands)
        reading = self.reading
        found = refusal or refused(self.construct, advice(reading.trace.word(self.node)))
        found = found.note("from", str(reading.trace.origin(self.node)))
        reading.hosted[value.name] = (reading.order[self.node], found)
        return value

    def array(self, values: Any, source: object = None) -> Array:
        """A constant in float64; ``source`` is the parameter that it was made of, where it is not one itself.

        Raises:
            SpirError[weights]: NaN or infinite values, with the name of the parameter.
        """
        if not isinstance(values, torch.Tensor):
            raise refused(f"{self.construct} with weights that depend on the input", "make the weights parameters")
        name = self.reading.parameters.get(id(values if source is None else source), "")
        with located(parameter=name):
            return Array.of(values.detach().cpu().double().numpy())

    def optional(self, values: torch.Tensor | None) -> Array | None:
        """A constant that may be missing."""
        return None if values is None else self.array(values)

    def refuse(self, what: str, fix: str) -> SpirError:
        """The refusal of this call for a reason."""
        return refused(f"{self.construct} {what}", fix)
