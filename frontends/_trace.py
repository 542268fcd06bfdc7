"""What torch_fx knows of a model before it reads an op: the trace, a trial run of it, and the user's names for things.

Nothing here touches the model: copies are run and traced, in eval mode and on the CPU.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from spir.errors import SpirError, error
from spir.interpreter import run
from spir.ir import Module, Origin
from spir.types import Shape

# What torch, fx and a user's forward raise for a mistake; anything else is a defect and passes through.
_RAISED = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NameError, AssertionError, ArithmeticError)
_TORCH = str(Path(torch.__file__).parent) + os.sep


# --- the model and its example ------------------------------------------------------------------------------------


class Whole(nn.Module):
    """The model as a part, so that defaults of its forward hold and its own path is as visible as any other."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        """The model on one tensor."""
        return self.network(x)


def own_path(path: str) -> str:
    """A path inside `Whole` as the user knows it."""
    return path.removeprefix("network").removeprefix(".")


def copied(model: nn.Module) -> Whole:
    """A copy in eval mode on the CPU.

    Raises:
        SpirError[trace]: a model that cannot be copied.
    """
    try:
        return Whole(copy.deepcopy(model)).cpu().eval()
    except _RAISED as failure:
        raise error(
            "trace",
            "the model cannot be copied, and SPIR works on a copy alone",
            torch=_first_line(failure),
            fix="make copy.deepcopy(model) work; torch.nn.utils.remove_weight_norm helps where weights are recomputed",
        ) from None


def check_signature(model: nn.Module) -> None:
    """Refuses a forward that does not take exactly one tensor.

    Raises:
        SpirError[unsupported]: with the names of its inputs.
        SpirError[trace]: TorchScript, which has no Python forward.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise error("trace", "a TorchScript module cannot be traced", fix="give the nn.Module that it was made of")
    unborn = [n for n, p in (*model.named_parameters(), *model.named_buffers()) if nn.parameter.is_lazy(p)]
    if unborn:
        what = f"{', '.join(unborn[:4])}: lazy layers have no weights before the model has run"
        raise error("weights", what, from_=class_line(model), fix="run one batch through it, or load its weights")
    parameters = inspect.signature(model.forward).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]
    if len(needed) > 1 or not parameters:
        raise error(
            "unsupported",
            f"forward takes {len(needed)} inputs ({', '.join(needed)}), and a network has one",
            from_=class_line(model),
            fix="wrap the model in one that takes a single tensor and makes the others constants",
        )


def class_line(model: nn.Module) -> str:
    """The class of a model and the place of its forward."""
    code = getattr(model.forward, "__code__", None)
    place = f", {Path(code.co_filename).name} line {code.co_firstlineno}" if code else ""
    return f"{type(model).__name__}.forward{place}"


def floats(model: nn.Module, example: object) -> torch.Tensor:
    """The example in the dtype of the model, once it is known to be a batch of finite floats.

    Raises:
        SpirError[data]: it is not.
    """
    fix = "give a batch as the model receives it, for example torch.zeros(1, 3, 32, 32)"
    if not isinstance(example, torch.Tensor | np.ndarray):
        raise error("data", f"an example is a tensor, not {kind_of(example)}", fix=fix)
    given = torch.as_tensor(example).detach().cpu()
    if not given.dtype.is_floating_point:
        raise error(
            "data",
            f"the example is of type {dtype_name(given)}, not floating",
            fix="give it as the model receives it: converted to float and normalised",
        )
    if given.ndim < 2 or not given.numel():
        raise error("data", f"the example has shape {list(given.shape)}, which is no batch of samples", fix=fix)
    if not torch.isfinite(given).all():
        bad = int((~torch.isfinite(given)).sum())
        raise error("data", f"{bad} of {given.numel()} values of the example are NaN or infinite", fix="repair them")
    own = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), given.dtype)
    return given.to(own)


def two_samples(given: torch.Tensor) -> torch.Tensor:
    """The first sample and the last, moved: an example of zeros would show nothing of what a network computes."""
    noise = torch.randn(given[-1:].shape, generator=torch.Generator().manual_seed(0)).to(given.dtype)
    return torch.cat([given[:1], given[-1:] + noise * (given[-1].abs().max() or 1)])


def answer_of(whole: Whole, batch: torch.Tensor, given: torch.Tensor) -> Any:
    """What the model makes of the batch, in its own dtype.

    Raises:
        SpirError[data]: the model fails on the example; located at the module and the line where it failed.
        SpirError[unsupported]: it takes the whole example, and not two samples of it.
    """
    try:
        return whole(batch.clone())
    except _RAISED as failure:
        path, owner, origin = _failed(failure, whole)
        if len(given) != len(batch) and _takes(whole, given):
            raise _fixed_batch("forward", origin, failure) from None
        raise error(
            "data",
            f"the model fails on an example of shape {list(given.shape)}",
            from_=str(origin),
            torch=_first_line(failure),
            fix=_wanted(path, owner),
        ) from None


def _takes(whole: Whole, given: torch.Tensor) -> bool:
    try:
        whole(given.clone())
    except _RAISED:
        return False
    return True


def _fixed_batch(construct: str, origin: Origin, failure: BaseException) -> SpirError:
    return error(
        "unsupported",
        f"{construct} holds for one number of samples only",
        from_=str(origin),
        torch=_first_line(failure),
        fix="take the number of samples from x.size(0), or keep the batch axis out of it",
    )


def _wanted(path: str, owner: nn.Module | None) -> str:
    """What to give where a module refused its operand."""
    if isinstance(owner, nn.Conv2d):
        return f"{path} takes [N, {owner.in_channels}, height, width]: give images of the shape the model was built for"
    if isinstance(owner, nn.Linear):
        return f"{path} takes [N, {owner.in_features}]: give samples of the shape the model was built for"
    return "give one or more samples as model(example) takes them, with the batch axis"


# --- tracing ------------------------------------------------------------------------------------------------------

_SYMBOLS = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "truediv": "/",
    "floordiv": "//",
    "mod": "%",
    "pow": "**",
    "matmul": "@",
    "getitem": "[...]",
    "neg": "-",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
}


@attrs.frozen
class Site:
    """Where a node of the trace was called: the module whose forward did, or that was called, and the source line."""

    path: str
    line: str = ""


class _Proxy(fx.Proxy):
    """A traced value whose augmented assignments stay in place; plain fx would turn ``x += y`` into ``x = x + y``."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Leaves are torch's own modules and those that ``reads`` knows; sites are noted, and hooks are not traced."""

    def __init__(self, reads: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.reads = reads
        self.sites: dict[fx.Node, Site] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        foreign = type(m).__module__.startswith(("torch.nn.modules.", "torch.ao."))
        return self.reads(m) or (foreign and not isinstance(m, nn.Sequential))

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return super().call_module(m, m.forward, args, kwargs)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        self.sites[proxy.node] = Site(own_path(self.scope.module_path), _user_line(_outwards(sys._getframe())))
        return proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


@attrs.frozen
class Trace:
    """The graph of a forward, and where each of its nodes was called."""

    whole: Whole
    graph: fx.Graph
    sites: Mapping[fx.Node, Site]

    @classmethod
    def of(cls, whole: Whole, reads: Callable[[nn.Module], bool]) -> Trace:
        """Traces a model; modules that ``reads`` knows are not entered.

        Raises:
            SpirError[trace]: at the user's line.
        """
        tracer = _Tracer(reads)
        try:
            return cls(whole, tracer.trace(whole), tracer.sites)
        except _RAISED as failure:
            _, _, origin = _failed(failure, whole)
            flow = isinstance(failure, fx.proxy.TraceError)
            raise error(
                "trace",
                "forward takes a decision that depends on a tensor" if flow else "forward cannot be traced",
                from_=str(origin),
                torch="" if flow else _first_line(failure),
                fix="decide outside of forward, or by an attribute that is set when the model is built"
                if flow
                else "keep to calls of torch and of submodules: no item assignment, no Python numbers made of tensors",
            ) from None

    def word(self, node: fx.Node) -> str:
        """The word for what a node calls: a class, a function, a method or an attribute."""
        if node.op == "call_module":
            return type(self.whole.get_submodule(str(node.target))).__name__
        if node.target is getattr:
            return str(node.args[1])
        return node.target if isinstance(node.target, str) else node.target.__name__

    def construct(self, node: fx.Node) -> str:
        """What a node calls, spelled so that the user can search for it."""
        word = self.word(node)
        if node.op == "call_module":
            home = type(self.whole.get_submodule(str(node.target))).__module__
            return f"torch.nn.{word}" if home.startswith("torch.nn.modules.") else f"{home}.{word}"
        if node.op == "call_method" or node.target is getattr:
            return f"Tensor.{word}"
        for space, prefix in ((F, "torch.nn.functional"), (torch, "torch")):
            if getattr(space, word, None) is node.target:
                return f"{prefix}.{word}"
        if getattr(node.target, "__module__", "") == "_operator":
            plain = word[1:] if word.startswith("i") and word[1:] in _SYMBOLS else word
            return f"the operator {_SYMBOLS.get(plain, plain)}{'=' * (plain != word)}"
        return f"{getattr(node.target, '__module__', '')}.{word}"

    def origin(self, node: fx.Node, word: str = "") -> Origin:
        """The path of the module that a node calls, else of ``word`` below the module that calls; with its line."""
        site = self.sites.get(node, Site(""))
        inside = "" if node.op == "call_module" and site.path else word or self.word(node)
        return _origin(".".join(part for part in (site.path, inside) if part), self.word(node), site.line)


def _outwards(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    """Frames from the innermost to the one that started the model, which is left out; none outside of the model."""
    frames: list[tuple[FrameType, int]] = []
    while frame is not None:
        if frame.f_code is Whole.forward.__code__:
            return frames
        frames.append((frame, frame.f_lineno))
        frame = frame.f_back
    return []


def _user_line(frames: Iterable[tuple[FrameType, int]]) -> str:
    """``lenet.py line 41`` of the innermost frame that is neither torch's nor SPIR's; empty where there is none."""
    for frame, line in frames:
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, "<eval_with_key>")) and file != Whole.forward.__code__.co_filename:
            return f"{Path(file).name} line {line}"
    return ""


def _failed(failure: BaseException, whole: Whole) -> tuple[str, nn.Module | None, Origin]:
    """The module in which a forward failed and its origin."""
    frames = list(traceback.walk_tb(failure.__traceback__))
    starts = [i for i, (frame, _) in enumerate(frames) if frame.f_code is Whole.forward.__code__]
    inside = frames[starts[-1] + 1 :][::-1] if starts else []
    paths = {id(m): own_path(path) for path, m in whole.network.named_modules(prefix="network")}
    owners = (frame.f_locals.get(name) for frame, _ in inside for name in frame.f_code.co_varnames[:1])
    owner = next((o for o in owners if isinstance(o, nn.Module) and id(o) in paths), None)
    path = paths.get(id(owner), "")
    word = type(whole.network if owner is None else owner).__name__
    line = _user_line(inside)
    return path or word, owner, _origin(path, word, line) if path else Origin(word, line)


def _origin(path: str, word: str, line: str) -> Origin:
    """``path (word, line)``."""
    return Origin(path, ", ".join(part for part in (word, line) if part))


# --- running the trace --------------------------------------------------------------------------------------------


class _Run(fx.Interpreter):
    """One run of a trace without hooks; keeps every result, and the operands that each node overwrote."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.whole, garbage_collect_values=False, graph=trace.graph)
        self.extra_traceback = False
        self.overwritten: dict[fx.Node, list[fx.Node]] = {}
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        before = {a: v._version for a in n.all_input_nodes if isinstance(v := self.env[a], torch.Tensor)}
        result = super().run_node(n)
        self.overwritten[n] = [a for a, version in before.items() if self.env[a]._version != version]
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.fetch_attr(target).forward(*args, **kwargs)


class _Constants(fx.Interpreter):
    """Runs in float64 what does not depend on the input; constants made in tracing are in the traced copy alone."""

    def __init__(self, trace: Trace, exact: Whole, fed: set[fx.Node]) -> None:
        super().__init__(trace.whole, garbage_collect_values=False, graph=trace.graph)
        self.extra_traceback = False
        self.exact = exact
        self.fed = fed

    def run_node(self, n: fx.Node) -> Any:
        return None if n in self.fed else super().run_node(n)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().double() if floating else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.exact.get_submodule(target).forward(*args, **kwargs)


@attrs.frozen
class PerBatch:
    """Stands for a number that changes with the number of samples, such as ``x.size(0)``."""


@attrs.frozen
class Trial:
    """What the nodes of a trace give for one sample and for two, and what does not depend on the input."""

    one: _Run
    two: _Run
    constants: Mapping[fx.Node, Any]
    fed: set[fx.Node]
    dtype: torch.dtype

    @classmethod
    def of(cls, trace: Trace, exact: Whole, batch: torch.Tensor) -> Trial:
        """Runs the trace, and in float64, as ``exact`` has them, its constants.

        Raises:
            SpirError[unsupported]: it holds for one number of samples only.
        """
        fed: set[fx.Node] = set()
        for node in trace.graph.nodes:
            if node.op == "placeholder" or not fed.isdisjoint(node.all_input_nodes):
                fed.add(node)
        one, two = _Run(trace), _Run(trace)
        for trial, samples in ((one, batch[:1]), (two, batch)):
            try:
                trial.run(samples.clone())
            except _RAISED as failure:
                node = trial.current
                assert node is not None  # a run fails at a node
                raise _fixed_batch(trace.construct(node), trace.origin(node), failure) from None
        constants = _Constants(trace, exact, fed)
        constants.run(batch)
        return cls(one, two, constants.env, fed, batch.dtype)

    def result(self, node: fx.Node) -> Any:
        """What the node gives for two samples."""
        return self.two.env[node]

    def shapes(self, node: fx.Node) -> tuple[Shape, ...] | None:
        """The shape per sample of the tensor, or of each, that the node gives, where all have the batch axis first."""
        one, two = self.one.env[node], self.two.env[node]
        ones, twos = (found if isinstance(found, tuple | list) else (found,) for found in (one, two))
        if not twos or len(ones) != len(twos):
            return None
        found = [_sample(a, b) for a, b in zip(ones, twos, strict=True)]
        known = tuple(shape for shape in found if shape is not None)
        return known if len(known) == len(found) else None

    def constant(self, node: fx.Node) -> Any:
        """The value of a node that carries no data: a parameter, a size, or `PerBatch`."""
        if node not in self.fed:
            return self.constants[node]
        one, two = self.one.env[node], self.two.env[node]
        return two if type(one) is type(two) and one == two else PerBatch()

    def shares(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether two results have elements in the same memory."""
        return any(_overlap(a, b) for a in tensors(self.result(node)) for b in tensors(self.result(other)))


def _sample(one: object, two: object) -> Shape | None:
    """The shape per sample of what one sample and two samples gave."""
    if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor) or two.ndim < 2:
        return None
    kept = one.shape[:1] == (1,) and two.shape[:1] == (2,) and one.shape[1:] == two.shape[1:]
    return tuple(two.shape[1:]) if kept else None


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    places = torch.arange(a.untyped_storage().nbytes() // a.element_size())
    mine, others = (places.as_strided(t.shape, t.stride(), t.storage_offset()) for t in (a, b))
    return bool(torch.isin(mine, others).any())


def tensors(result: object) -> list[torch.Tensor]:
    """The tensors in a result."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result for t in tensors(part)] if isinstance(result, tuple | list) else []


def compare(module: Module, exact: Whole, batch: torch.Tensor, answer: Any) -> None:
    """Refuses a module that does not compute what the model does, hooks and all.

    Raises:
        SpirError[unsupported]: with the largest difference.
    """
    samples, eps = batch.double(), torch.finfo(batch.dtype).eps
    tolerance = max(1e-9, 16 * eps)  # what torch computed of buffers while it traced is rounded to their dtype
    try:
        expected: Any = exact(samples.clone())
    except _RAISED:  # a cast in forward, or a constant of its own dtype
        expected, tolerance = answer, math.sqrt(eps)
    values = run(module, samples.numpy(), keep="*")
    found = values[module.output]
    if isinstance(expected, torch.Tensor) and expected.shape == found.shape:
        largest = max(float(np.abs(v).max()) for v in values.values())
        difference = float(np.abs(found - expected.double().numpy()).max())
        if difference <= tolerance * largest:  # and neither is NaN
            return
        how = f"their outputs differ by {difference:.3g}"
    else:
        how = f"they return {shown(expected)} and shape {list(found.shape)}"
    raise error(
        "unsupported",
        f"the model does something that its trace does not show: on the example {how}",
        from_=class_line(exact.network),
        fix="move into forward what hooks change, and take out what is random or treats tracing specially",
    )


# --- names of things ----------------------------------------------------------------------------------------------


def kind_of(value: object) -> str:
    """The type of something that is not what was asked for."""
    return f"an object of type {type(value).__name__}"


def dtype_name(values: torch.Tensor) -> str:
    """``float32`` of ``torch.float32``."""
    return str(values.dtype).removeprefix("torch.")


def _first_line(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]


def shown(result: object) -> str:
    """The shape of a tensor, or the type of something else."""
    return f"shape {list(result.shape)}" if isinstance(result, torch.Tensor) else f"a {type(result).__name__}"


def holds(argument: object, kind: type) -> bool:
    """Whether an argument is, or has inside, something of a kind."""
    if isinstance(argument, kind):
        return True
    if isinstance(argument, slice):
        return holds((argument.start, argument.stop, argument.step), kind)
    inner = argument.values() if isinstance(argument, dict) else argument if isinstance(argument, tuple | list) else ()
    return any(holds(a, kind) for a in inner)
