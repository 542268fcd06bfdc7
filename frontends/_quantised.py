"""What the readers of quantisation toolkits share: a graph of fake quantisers as a module of reals, and its proof.

A toolkit's activation is ``r = S (q - Z)`` with codes q in ``lo..hi``. The codes ``q - Z`` mean the same reals without
a zero point, and 0 pads them, so every zero point becomes a shifted range. ReLU and other clips move into the ranges of
the quantisers next to them, which is exact because rounding keeps order. What is read is then run on samples, layer by
layer on the toolkit's own codes, and every integer must be the toolkit's.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from spir.errors import SpirError, error, located, raise_all
from spir.frontends import _arithmetic as arithmetic
from spir.frontends import _layers as layers
from spir.frontends import _shapes as shapes
from spir.frontends import _windows as windows
from spir.frontends._reading import Shaped, live
from spir.frontends._trace import floats, holds, two_samples
from spir.ir import Array, Module, Node, Op, Origin, Value, infer
from spir.ops._linear import WeightedMap, channelwise
from spir.ops.add import Add
from spir.ops.avg_pool import AvgPool
from spir.ops.batch_norm import BatchNorm
from spir.ops.clip import Clip
from spir.ops.concat import Concat
from spir.ops.dequantize import Dequantize
from spir.ops.flatten import Flatten
from spir.ops.global_avg_pool import GlobalAvgPool
from spir.ops.max_pool import MaxPool
from spir.ops.pad import Pad
from spir.ops.permute import Permute
from spir.ops.quantize import Quantize
from spir.ops.relu import Relu
from spir.ops.reshape import Reshape
from spir.ops.slice import Slice
from spir.ops.upsample import Upsample
from spir.types import Real, Reals, Shape, Tensor
from spir.verify import verify

TIE = 2.0**-10
"""How far from a tie, in codes, a toolkit's float32 may fall on the other side."""
FINE = 10
"""Where a toolkit pools or adds activations that it did not quantise: bits below the step of the code that follows."""
UNIT = 2.0**-53
SAMPLES = 8
Ends = tuple[float, float]
OPEN: Ends = (-math.inf, math.inf)


# --- which models belong to a toolkit -----------------------------------------------------------------------------

_PT2E_SPACES = {"quantized_decomposed", "torchao", "onednn", "x86", "arm", "quantized"}
_PT2E_HOMES = ("torchao.",)
_FX_HOMES = (
    *("torch.ao.nn.quantized.", "torch.ao.nn.quantizable.", "torch.ao.nn.qat.", "torch.ao.nn.sparse.quantized."),
    *("torch.ao.nn.intrinsic.qat.", "torch.ao.nn.intrinsic.quantized.", "torch.ao.quantization."),
)
_FX_CALLS = ("quantize_per_tensor", "quantize_per_channel", "quantize_per_tensor_dynamic", "dequantize")


def toolkit_of(model: object) -> str:
    """``pt2e`` for graphs of torchao, ``fx`` for what torch.ao.quantization made, and empty for any other model."""
    if isinstance(model, torch.export.ExportedProgram):
        return toolkit_of(model.graph_module)
    if not isinstance(model, nn.Module):
        return ""
    calls = [n for n in model.graph.nodes if n.op != "call_module"] if isinstance(model, fx.GraphModule) else []
    parameters = (type(p).__module__ + "." for p in model.parameters())
    homes = [type(m).__module__ + "." for m in model.modules()]
    if any(_space(n) in _PT2E_SPACES for n in calls) or any(h.startswith(_PT2E_HOMES) for h in (*parameters, *homes)):
        return "pt2e"
    called = any(n.target == "dequantize" or getattr(n.target, "__name__", "") in _FX_CALLS for n in calls)
    return "fx" if called or any(home.startswith(_FX_HOMES) for home in homes) else ""


def _space(node: fx.Node) -> str:
    """``aten`` of ``torch.ops.aten.relu.default``; empty for what is no op of a library."""
    return str(node.target).partition(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""


def versions() -> str:
    """The toolkit as an error names it: ``torch 2.13.0, torchao 0.18.0``."""
    try:
        return f"torch {torch.__version__}, torchao {version('torchao')}"
    except PackageNotFoundError:
        return f"torch {torch.__version__}, no torchao"


# --- values on their way ------------------------------------------------------------------------------------------


@attrs.frozen
class Codes:
    """The lattice of an activation: ``scale * code`` for codes ``lo..hi``, without a zero point; ``bits`` as given."""

    scale: float
    lo: int
    hi: int
    bits: int


@attrs.frozen(eq=False)
class Weight:
    """A quantised constant: integers without a zero point, and scales ``[1]`` or one along ``axis``."""

    codes: NDArray[np.int64]
    scale: Reals
    axis: int = 0

    @property
    def shape(self) -> Shape:
        """Outputs first."""
        return self.codes.shape

    @property
    def reals(self) -> Reals:
        """What it stands for."""
        return np.asarray(self.codes * np.moveaxis(channelwise(self.scale, self.codes.ndim), 0, self.axis))


@attrs.frozen(eq=False)
class Made:
    """How codes came about: the real that was quantised, the toolkit's node, and the moves and maxima since."""

    source: Flow
    node: fx.Node
    moves: tuple[Op, ...] = ()


@attrs.frozen(eq=False)
class Flow(Value):
    """A value of the module, the clip that it still awaits, and what is proved of it."""

    clip: Ends = OPEN
    codes: Codes | None = None
    made: Made | None = None
    linear: tuple[WeightedMap, Flow] | None = None
    """The layer that made it, and what the layer read."""
    reach: float = math.inf
    """No magnitude is larger."""
    doubt: float = 0.0
    """How far float64 may be from the exact value."""


@attrs.frozen(eq=False)
class _Check:
    """One quantiser of the toolkit: which real it rounds, and the range that is left of its codes."""

    node: fx.Node
    source: str
    codes: Codes
    doubt: float
    code: str = ""
    """The integers of the module that take its place, where the module has any."""


@attrs.frozen
class Agreement:
    """One quantiser against the toolkit: how many codes were compared, and how many fell to other sides of a tie."""

    layer: str
    codes: int
    ties: int


# --- a toolkit's graph --------------------------------------------------------------------------------------------

Reader = Callable[..., Any]


@attrs.frozen
class Toolkit:
    """Which reader reads which call of a toolkit's graph, and what its calls give."""

    name: str
    calls: Mapping[Any, Reader]
    """By the text of an op of a library, by a function, or by the name of a method."""
    modules: Mapping[type[nn.Module], tuple[Reader, Callable[[Any], dict[str, Any]]]]
    """A class, its reader, and the arguments that the reader takes from a module."""
    stored: Callable[[torch.Tensor], torch.Tensor]
    """The integers of what a quantiser of the graph gives."""
    advice: Callable[[str], str]
    """The way out for a call without a reader."""

    def reader(self, node: fx.Node, model: fx.GraphModule) -> tuple[Reader, dict[str, Any]] | None:
        """The reader of a node, with what it takes from the module that is called."""
        if node.op == "call_module":
            owner = model.get_submodule(str(node.target))
            found = self.modules.get(type(owner))
            return None if found is None else (found[0], found[1](owner))
        key = str(node.target) if _space(node) else node.target
        reader = self.calls.get(key)
        return None if reader is None else (reader, {})


class _Answers(fx.Interpreter):
    """The toolkit's own graph on samples; keeps its codes, constants and shapes, and sees what it overwrites."""

    def __init__(self, model: fx.GraphModule, toolkit: Toolkit) -> None:
        super().__init__(model)
        self.extra_traceback = False
        self.toolkit = toolkit
        self.fed: set[fx.Node] = set()
        self.codes: dict[fx.Node, NDArray[np.int64]] = {}
        self.constants: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, tuple[tuple[int, ...], ...]] = {}
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        if not n.users and n.target == "_guards_fn":  # it compares sizes with those of the export
            return None
        if n.op == "placeholder" or not self.fed.isdisjoint(n.all_input_nodes):
            self.fed.add(n)
        before = {m: v._version for m, v in self.env.items() if isinstance(v, torch.Tensor)}
        result = super().run_node(n)
        self._refuse_overwriting(n, before)
        if n not in self.fed or not holds(result, torch.Tensor):
            self.constants[n] = result
        elif n.op != "output":
            parts = result if isinstance(result, tuple | list) else (result,)
            self.shapes[n] = tuple(tuple(part.shape) for part in parts if isinstance(part, torch.Tensor))
            found = self.toolkit.reader(n, self.module) if n.op != "placeholder" else None  # type: ignore[arg-type]
            if found is not None and found[0] in QUANTISERS:
                self.codes[n] = self.toolkit.stored(result).numpy().astype(np.int64)
        return result

    def _refuse_overwriting(self, n: fx.Node, before: Mapping[fx.Node, int]) -> None:
        """Refuses a call that writes to a tensor, or to a view of one, that is read later."""
        read = [m for m in before if m not in self.user_to_last_uses.get(n, ())]
        if any(self.env[m]._version != before[m] for m in read if m in self.fed):
            raise error(
                "unsupported",
                f"{_word(n)} writes to a tensor that others read",
                from_=str(origin_of(n)),
                fix="use the form that is not in place: inplace=False, x.relu()",
            )


@attrs.frozen(eq=False)
class Run:
    """What a toolkit's graph gives for some samples."""

    samples: torch.Tensor
    output: torch.Tensor
    codes: Mapping[fx.Node, NDArray[np.int64]]
    constants: Mapping[fx.Node, Any]
    shapes: Mapping[fx.Node, tuple[Shape, ...]]
    """Per sample: one shape, or one for each of several results."""

    def quantiser(self, node: fx.Node) -> list[Any]:
        """Scale, zero point and what else a quantiser of the graph is given."""
        given = [*(node.args if "input" in node.kwargs else node.args[1:])]
        given += [value for name, value in node.kwargs.items() if name != "input"]
        found: list[Any] = fx.node.map_arg(given, self._constant)
        return found

    def _constant(self, node: fx.Node) -> Any:
        return self.constants[node]

    @classmethod
    def of(cls, model: fx.GraphModule, toolkit: Toolkit, example: object) -> Run:
        """Runs two samples or more, as many at once as the graph takes.

        Raises:
            SpirError[data]: an example that is no batch of floats, or that the graph does not take.
            SpirError[unsupported]: a graph of several inputs or results, or one that overwrites what is read later.
            SpirError[usage]: torchao is missing.
        """
        inputs = [n for n in model.graph.nodes if n.op == "placeholder"]
        if len(inputs) != 1:
            names = ", ".join(n.name for n in inputs)
            raise error(
                "unsupported", f"the graph takes {len(inputs)} inputs ({names})", fix="export one that takes one"
            )
        given = floats(model, example).float()
        samples = torch.cat([given[: SAMPLES - 1], two_samples(given)[1:]])
        fixed = getattr(inputs[0].meta.get("val"), "shape", (None,))[0]
        size = fixed if isinstance(fixed, int) else len(samples)
        parts = [torch.cat([part, samples[: size - len(part)]]) for part in samples.split(size)] if size else [samples]
        while size and any(len(part) < size for part in parts):
            parts = [torch.cat([part, part])[:size] for part in parts]
        runs = [_answers(model, toolkit, part, given) for part in parts]
        outputs = [_one(answer) for _, answer in runs]
        first = runs[0][0]
        kept = len(samples)
        for node, shape in ((node, shape) for node, several in first.shapes.items() for shape in several):
            if not shape or shape[0] != len(parts[0]):
                raise error(
                    "unsupported",
                    f"{node.name} gives shape {list(shape)} for {len(parts[0])} samples: the batch axis is not first",
                    from_=str(origin_of(node)),
                    fix="keep the batch axis first, and one more: x.flatten(1), x.mean((2, 3))",
                )
        codes = {n: np.concatenate([run.codes[n] for run, _ in runs])[:kept] for n in first.codes}
        per_sample = {n: tuple(shape[1:] for shape in several) for n, several in first.shapes.items()}
        return cls(samples, torch.cat(outputs)[:kept], codes, first.constants, per_sample)


def _answers(model: fx.GraphModule, toolkit: Toolkit, part: torch.Tensor, given: torch.Tensor) -> tuple[_Answers, Any]:
    run = _Answers(model, toolkit)
    try:
        return run, run.run(part.clone())
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as failure:
        if isinstance(failure, NotImplementedError) and importlib.util.find_spec("torchao") is None:
            raise error(
                "usage",
                f"the graph needs torchao to run: {_first_line(failure)}",
                from_=str(origin_of(run.current)),
                fix="pip install 'spir[quantized]'",
            ) from None
        raise error(
            "data",
            f"the graph fails on an example of shape {list(given.shape)}, of which it was given {len(part)} samples",
            from_=str(origin_of(run.current)),
            torch=_first_line(failure),
            fix="give one or more samples as the converted model takes them, with the batch axis",
        ) from None


def _first_line(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]


def _one(answer: Any) -> torch.Tensor:
    """The one tensor that a graph returns, out of the tuples around it."""
    while isinstance(answer, tuple | list) and len(answer) == 1:
        (answer,) = answer
    if not isinstance(answer, torch.Tensor):
        several = isinstance(answer, tuple | list | dict)
        what = f"a {type(answer).__name__.removeprefix('immutable_')}" + (f" of {len(answer)}" if several else "")
        fix = "wrap the model in one that returns the logits alone, and quantise that"
        raise error("unsupported", f"the graph returns {what}, and one tensor converts", fix=fix)
    return answer


def own_copy(model: fx.GraphModule) -> fx.GraphModule:
    """A copy on the CPU, so that the user's model stays as it is.

    Raises:
        SpirError[trace]: a model that cannot be copied.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on the tensors that a graph remembers
            return copy.deepcopy(model).cpu()
    except (RuntimeError, TypeError, AttributeError) as failure:
        fix = "make copy.deepcopy(model) work"
        raise error("trace", "the model cannot be copied", torch=_first_line(failure), fix=fix) from None


def origin_of(node: fx.Node | None) -> Origin:
    """The module and the source line that a node was made of, as far as the toolkit kept them."""
    if node is None:
        return Origin()
    traced = node
    while not (traced.meta.get("stack_trace") or traced.stack_trace) and traced.all_input_nodes:
        traced = traced.all_input_nodes[0]  # a quantiser that the toolkit put in has the line of what it quantises
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(traced.meta.get("stack_trace") or traced.stack_trace or ""))
    own = [(Path(file).name, line) for file, line in frames if f"{Path('site-packages', 'torch')}" not in file]
    place = f"{own[-1][0]} line {own[-1][1]}" if own else ""
    return Origin(_path(node), ", ".join(part for part in (_word(node), place) if part))


def _path(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    path, owner = next(reversed((node.meta.get("nn_module_stack") or {"": ("", "")}).values()))
    home = owner if isinstance(owner, str) else f"{owner.__module__}."
    if path and home.startswith("torch.nn.modules.") and "Sequential" not in str(owner):
        return str(path)
    return f"{path}.{node.name}" if path else node.name


def _word(node: fx.Node) -> str:
    if _space(node):
        return str(node.target).split(".")[1]
    return node.target if isinstance(node.target, str) else node.target.__name__


# --- reading ------------------------------------------------------------------------------------------------------


class Reading:
    """Reads a toolkit's graph node by node into a module of reals; refusals are collected."""

    def __init__(self, model: fx.GraphModule, toolkit: Toolkit, run: Run) -> None:
        self.model = model
        self.toolkit = toolkit
        self.answers = run
        self.nodes: list[Node] = []
        self.types: dict[str, Tensor] = {}
        self.checks: list[_Check] = []
        self.largest = float(run.samples.abs().max())
        self.values: dict[fx.Node, Any] = dict(run.constants)

    def module(self) -> Module:
        """The verified module, without the ops that nobody reads.

        Raises:
            SpirError: what cannot be read; a layer whose integers are not the toolkit's.
        """
        x = Tensor(tuple(self.answers.samples.shape[1:]), Real())
        self.types["x"] = x
        returned: Any = None
        for node in self.model.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = Flow("x", x)
            elif node.op == "output":
                returned = _returned(fx.node.map_arg(node.args, self.values.get))
            elif node.users and node.op != "get_attr":
                self.step(node)
        if not isinstance(returned, Flow):
            raise error("unsupported", "what the graph returns does not depend on its input", fix="return the logits")
        output = self.finished(returned)
        return verify(Module(Value("x", x), live(self.nodes, output.name), output.name))

    def step(self, node: fx.Node) -> None:
        """One call of the graph; calls on constants alone keep what they gave, but for quantised constants."""
        found = self.toolkit.reader(node, self.model)
        fed = any(holds(self.values.get(a), Flow) for a in node.all_input_nodes)
        if not fed and (found is None or found[0] not in DEQUANTISERS):
            return
        if node in self.answers.constants and fed:  # a size
            return
        with located(from_=str(origin_of(node))):
            reader, bound = self.bound(node)
            value = reader(*bound.args, **bound.kwargs)
            given = [v.type.shape for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Flow)]
            wanted = self.answers.shapes.get(node, ())
            if given and given != list(wanted):
                shown = " and ".join(str(list(shape)) for shape in wanted)
                raise Call(self, node).refuse(f"to shape {shown} a sample", "use whole windows and shapes")
        self.values[node] = value

    def bound(self, node: fx.Node) -> tuple[Reader, inspect.BoundArguments]:
        """The reader of a call and its arguments; None stands for what is not read yet."""
        found = self.toolkit.reader(node, self.model)
        assert found is not None  # `survey` came first
        reader, attributes = found
        args, kwargs = fx.node.map_arg((list(node.args), dict(node.kwargs)), self.values.get)
        if "input" in kwargs:
            args = [kwargs.pop("input"), *args]
        call = Call(self, node)
        try:
            bound = inspect.signature(reader).bind(call, *args, **kwargs, **attributes)
        except TypeError:
            raise call.refuse("with these arguments", "leave the extra arguments out") from None
        bound.apply_defaults()
        return reader, bound

    def append(self, op: Op, names: Sequence[str], base: str, origin: Origin) -> tuple[str, Tensor]:
        """Appends an op on named values."""
        inferred = infer(op, tuple(self.types[name] for name in names))
        name = self.unique(base)
        self.types[name] = inferred
        self.nodes.append(Node(name, op, tuple(names), inferred, origin))
        return name, inferred

    def unique(self, base: str) -> str:
        """``base`` as a name of the language, with a number where it is taken."""
        name = re.sub(r"[^A-Za-z0-9_.]", "_", base)
        name = name if re.match(r"[A-Za-z_]", name) else f"_{name}"
        return (
            name
            if name not in self.types
            else next(f"{name}_{i}" for i in range(1, len(self.types) + 1) if f"{name}_{i}" not in self.types)
        )

    def fake(self, source: Flow, codes: Codes, node: fx.Node | None, origin: Origin, base: str) -> Flow:
        """``quantize; dequantize`` of a value; ``node`` is the toolkit's, where it is a quantiser of the toolkit."""
        code, _ = self.append(Quantize(codes.scale, codes.lo, codes.hi), [source.name], f"{base}.code", origin)
        name, made = self.append(Dequantize(), [code], f"{base}.unit" if base in self.types else base, origin)
        if node is not None:
            self.checks.append(_Check(node, source.name, codes, source.doubt, code))
        reach = max(-codes.lo, codes.hi) * codes.scale
        since = None if node is None else Made(attrs.evolve(source, clip=OPEN), node)
        return Flow(name, made, OPEN, codes, since, reach=reach, doubt=reach * UNIT)

    def narrowed(self, x: Flow, lo: int, hi: int) -> Flow:
        """Codes in a narrower range: quantised so from the start, and moved as before."""
        assert x.codes is not None  # the callers asked
        codes = attrs.evolve(x.codes, lo=max(lo, x.codes.lo), hi=min(hi, x.codes.hi))
        base = f"{x.name}.clipped"
        if x.made is None:
            origin = next(n.origin for n in self.nodes if n.result == x.name)
            return self.fake(attrs.evolve(x, clip=OPEN), codes, None, origin, base)
        made = x.made
        found = self.fake(made.source, codes, made.node, origin_of(made.node), base)
        for op in made.moves:
            name, moved = self.append(op, [found.name], f"{base}.{op.name}", origin_of(made.node))
            found = attrs.evolve(found, name=name, type=moved)
        return attrs.evolve(found, made=made)

    def clipped(self, x: Flow) -> Flow:
        """The value with its clip in the range of its codes, where the ends of the clip are codes; else as it is."""
        if x.clip == OPEN or x.codes is None:
            return x
        codes = x.codes
        lo, hi = (end / codes.scale for end in x.clip)
        if any(e > codes.lo and e < codes.hi and abs(e - round(e)) > TIE / 2**6 for e in (lo, hi)):
            return x
        ends = (codes.lo if lo <= codes.lo else round(lo), codes.hi if hi >= codes.hi else round(hi))
        if ends == (codes.lo, codes.hi):
            return attrs.evolve(x, clip=OPEN)
        return self.narrowed(x, *ends)

    def finished(self, x: Flow) -> Flow:
        """The output, with a clip that nobody quantised as an op of reals."""
        x = self.clipped(x)
        if x.clip == OPEN:
            return x
        lo, hi = x.clip
        op = Relu() if x.clip == (0, math.inf) else Clip(Array.of([max(lo, -x.reach)]), Array.of([min(hi, x.reach)]))
        name, made = self.append(op, [x.name], f"{x.name}.{op.name}", self.nodes[-1].origin)
        return attrs.evolve(x, name=name, type=made, clip=OPEN)


def _returned(value: Any) -> Any:
    while isinstance(value, tuple | list) and len(value) == 1:
        (value,) = value
    return value


# --- one call -----------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Call(Shaped[Flow]):
    """One call of a toolkit's graph, as its reader sees it: a reader of torch_fx or one of those below."""

    reading: Reading
    node: fx.Node
    scale: Array | None = None
    """Of the integer weights of the layer that is called."""

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """What the call gives, per sample: one shape, or one for each of several results."""
        return self.reading.answers.shapes[self.node]

    @property
    def shape(self) -> Shape:
        """What the call gives, per sample, where it gives one tensor."""
        return self.shapes[0]

    def refuse(self, what: str, fix: str) -> SpirError:
        """The refusal of this call for a reason, with the toolkit's versions."""
        word = f"{_word(self.node)} {what}".strip()
        return error("unsupported", f"{word} has no conversion", toolkit=versions(), fix=fix)

    def array(self, values: Any, source: object = None) -> Array:
        """A constant in float64; of quantised weights the integers. ``source`` is for other readers' parameters.

        Raises:
            SpirError[weights]: NaN or infinite values.
            SpirError[unsupported]: what depends on the input.
        """
        del source  # a graph does not tell
        if isinstance(values, Weight):
            return Array.of(values.codes)
        if not isinstance(values, torch.Tensor):
            raise self.refuse("with weights that depend on the input", "make the weights parameters")
        return Array.of(values.detach().double().numpy())

    def optional(self, values: Any) -> Array | None:
        """A constant that may be missing."""
        return None if values is None else self.array(values)

    def emit(self, op: Op, *operands: Flow) -> Flow:
        """Appends the op of a reader of torch_fx, in its place among codes and clips.

        Raises:
            SpirError[unsupported]: an op that codes do not take.
        """
        (x,) = operands
        if isinstance(op, _MOVES):
            return self.moved(op, x)
        if isinstance(op, AvgPool):
            return self.mean(op, x, op.divisor)
        if isinstance(op, GlobalAvgPool):
            return self.mean(op, x, op.positions)
        if isinstance(op, WeightedMap):
            return self.weighted(attrs.evolve(op, weight_scale=self.scale), x)
        if isinstance(op, BatchNorm):
            return self.normed(op, x)
        fix = "let every mean divide by its window: leave count_include_pad=False, divisor_override and ceil_mode out"
        raise self.refuse("with divisors of its own", fix)

    def beside(self, op: Op, *operands: Flow) -> Flow:
        """Appends a step that prepares or completes the op of a reader."""
        return self.emit(op, *operands)

    def append(self, op: Op, *operands: Flow, reach: float, doubt: float) -> Flow:
        """Appends an op on values without a clip."""
        origin = origin_of(self.node)
        name, made = self.reading.append(op, [o.name for o in operands], origin.path or op.name, origin)
        return Flow(name, made, reach=reach, doubt=doubt)

    def moved(self, op: Op, x: Flow) -> Flow:
        """An op that moves values or takes the largest of them: clips, codes and what is proved pass it."""
        if isinstance(op, Pad) and not x.clip[0] <= 0 <= x.clip[1]:
            x = self.settled(x)
        found = self.append(op, x, reach=x.reach, doubt=x.doubt)
        made = None if x.made is None else attrs.evolve(x.made, moves=(*x.made.moves, op))
        return attrs.evolve(found, clip=x.clip, codes=x.codes, made=made)

    def mean(self, op: Op, x: Flow, count: int) -> Flow:
        """A mean of windows of so many values."""
        read = self.settled(x, count)
        seen = read.reach if math.isfinite(read.reach) else self.reading.largest
        return self.append(op, read, reach=read.reach, doubt=read.doubt + (count + 1) * UNIT * seen)

    def weighted(self, op: WeightedMap, x: Flow) -> Flow:
        """A layer of weights."""
        read = self.settled(x)
        weight = op.weights(np.zeros(0), real=True)
        terms = weight[0].size
        gain = float(np.abs(weight).reshape(len(weight), -1).sum(axis=1).max())
        bias = 0.0 if op.bias is None else float(np.abs(op.bias.values).max())
        seen = read.reach if math.isfinite(read.reach) else self.reading.largest
        doubt = gain * read.doubt + (terms + 3) * UNIT * (gain * seen + bias)
        made = self.append(op, read, reach=gain * read.reach + bias if gain else bias, doubt=doubt)
        return attrs.evolve(made, linear=(op, read))

    def normed(self, op: BatchNorm, x: Flow) -> Flow:
        """A batch norm that the toolkit left: folded into the layer before it, where there is one."""
        gain, offset = op.affine()
        if x.linear is None or x.clip != OPEN:
            read, largest = self.settled(x), float(np.abs(gain).max())
            reach = largest * read.reach + float(np.abs(offset).max())
            seen = reach if math.isfinite(reach) else largest * self.reading.largest
            return self.append(op, read, reach=reach, doubt=read.doubt * largest + 4 * UNIT * seen)
        layer, operand = x.linear
        own = 0.0 if layer.bias is None else layer.bias.values
        codes, scale = layer.weight.values, layer.weight_scale
        if scale is None:
            folded = attrs.evolve(layer, weight=Array.of(codes * channelwise(gain, codes.ndim)))
        else:
            signed = codes * channelwise(np.sign(gain).astype(np.int64), codes.ndim)
            steps = scale.values * np.where(gain == 0, 1.0, np.abs(gain))
            folded = attrs.evolve(layer, weight=Array.of(signed), weight_scale=Array.of(steps))
        return self.weighted(attrs.evolve(folded, bias=Array.of(own * gain + offset)), operand)

    def settled(self, x: Any, window: int = 0) -> Flow:
        """An operand with its clip applied: in the range of its codes, or else in fine steps of the code that follows.

        Args:
            x: an operand of this call.
            window: how many such values the mean that follows takes, where it takes a mean.

        Raises:
            SpirError[unsupported]: an activation that reaches a layer without being quantised.
        """
        if not isinstance(x, Flow):
            raise self.refuse("of a constant", "let the layers before take the constant in, as a bias or a gain")
        reading = self.reading
        read: Flow = reading.clipped(x)
        if read.clip == OPEN:
            return read
        follows = self.following()
        if follows is None or not math.isfinite(min(read.reach, max(map(abs, read.clip)))):
            raise self.refuse(
                f"of the activation %{read.name}, which the toolkit did not quantise,",
                "let the toolkit quantise it: annotate the activation, the pool or the sum in its configuration",
            )
        step, largest = follows
        lo, hi = max(read.clip[0], -read.reach), min(read.clip[1], read.reach)
        if window and lo >= 0:
            hi = min(hi, window * largest)
        ends = [math.floor(end / step + 0.5) for end in (lo, hi)]
        if hi < read.clip[1] and not ends[0]:
            ends[1] = 2 ** ends[1].bit_length() - 1  # no value is larger: a range that neurons have
        codes = Codes(step, ends[0], ends[1], 0)
        place = f"not quantised by the toolkit: read in 2^-{FINE} of the step that follows"
        origin = origin_of(self.node)
        origin = attrs.evolve(origin, place=", ".join(p for p in (origin.place, place) if p))
        found = reading.fake(read, codes, None, origin, f"{read.name}.fine")
        return attrs.evolve(found, codes=None, doubt=found.doubt + read.doubt)

    def following(self) -> Ends | None:
        """The steps that an operand of this call may take, and the largest result of this call that is told apart.

        Half a step, times what batch norms make of it, over all operands of the sums that follow, is at most 2^-11 of
        every code. A result may be cut off where nothing but moves, clips and quantisers follow; else none is.
        None: the result reaches a layer or the output without a quantiser.
        """
        steps: list[float] = []
        largest = 0.0
        waiting: list[tuple[fx.Node, float]] = [(self.node, 1.0)]
        while waiting:
            node, gain = waiting.pop()
            if node.op == "output":
                return None
            found = self.reading.toolkit.reader(node, self.reading.model)
            if found is None or found[0] in SIZES or not node.users:
                continue
            reader = found[0]
            if reader in LAYERS:
                return None
            if reader in QUANTISERS:
                codes = codes_of(*self.reading.answers.quantiser(node))
                steps.append(codes.scale * 2.0**-FINE / gain)
                largest = max(largest, (codes.hi + 0.5) * codes.scale)
                continue
            if reader in _NORMS:
                gain *= self._gain(self.reading.bound(node)[1].arguments)
            elif reader is add:
                gain *= 2
            if node is not self.node and not _keeps_order(reader):
                largest = math.inf
            waiting += ((user, gain) for user in node.users)
        return (min(steps), largest) if steps else None

    def _gain(self, given: Mapping[str, Any]) -> float:
        """The largest factor of a batch norm."""
        weight = 1.0 if given["weight"] is None else self.array(given["weight"]).values
        if given["running_var"] is None:
            return math.inf
        factors = np.abs(weight / np.sqrt(self.array(given["running_var"]).values + given["eps"]))
        return max(float(factors.max()), 2.0**-FINE)


_MOVES = (MaxPool, Pad, Permute, Reshape, Flatten, Slice, Upsample)


def codes_of(scale: Any, zero_point: Any, *ends: Any, **named: Any) -> Codes:
    """The codes without zero point of a quantiser that gives its ends, or a dtype that has them.

    Raises:
        SpirError[unsupported]: no range of numbers, or one without a code for 0.
        SpirError[weights]: a scale that is no positive number.
    """
    given = [*ends, *named.values()]
    numbers = [int(e) for e in given if isinstance(e, int | float)]
    dtype = next((e for e in given if isinstance(e, torch.dtype)), torch.quint8)
    if len(numbers) != 2:
        known = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}
        if dtype not in known:
            what = f"codes of type {str(dtype).removeprefix('torch.')} have no conversion"
            raise error("unsupported", what, toolkit=versions(), fix="quantise activations to 8 bits: quint8 or qint8")
        numbers = list(known[dtype])
    step, zero = float(scale), int(zero_point)
    if not math.isfinite(step) or step <= 0:
        fix = "calibrate before the conversion: run the prepared model on real samples"
        raise error("weights", f"a scale is a positive finite number, not {step}", fix=fix)
    lo, hi = numbers[0] - zero, numbers[1] - zero
    if not lo <= 0 <= hi:
        what = f"zero point {zero} is outside of the codes {numbers[0]}..{numbers[1]}, and no code stands for 0"
        raise error("unsupported", what, fix="use a quantiser whose range holds 0: padding adds zeros")
    return Codes(step, lo, hi, (numbers[1] - numbers[0]).bit_length())


# --- readers of quantisers ----------------------------------------------------------------------------------------


def quantize(call: Call, x: Flow, scale: Any, zero_point: Any, *ends: Any, **named: Any) -> Flow:
    """An activation: nothing where it is there already, a narrower range where it clips more, else a rounding."""
    if isinstance(scale, Flow) or isinstance(zero_point, Flow):
        raise dynamic(call.node)
    given = codes_of(scale, zero_point, *ends, **named)
    lo, hi = (np.rint(np.float32(end) * np.float32(1 / given.scale)) for end in x.clip)  # a tie as the toolkit does
    codes = attrs.evolve(given, lo=given.lo if lo <= given.lo else int(lo), hi=given.hi if hi >= given.hi else int(hi))
    if not codes.lo <= 0 <= codes.hi:
        raise call.refuse(f"behind a clip to {x.clip[0]:g} .. {x.clip[1]:g}", "clip to a range that holds 0")
    reading = call.reading
    if x.codes is not None and x.codes.scale == codes.scale:
        held = attrs.evolve(x, clip=OPEN, codes=attrs.evolve(x.codes, bits=codes.bits))
        if not codes.lo <= x.codes.lo <= x.codes.hi <= codes.hi:
            held = reading.narrowed(x, codes.lo, codes.hi)
        reading.checks.append(_Check(call.node, held.name, codes, held.doubt))
        return held
    source = call.node.args[0]
    origin = origin_of(source if isinstance(source, fx.Node) else call.node)
    return reading.fake(x, codes, call.node, origin, "x" if x.name == "x" else origin.path)


def dequantize(
    call: Call, x: Any, scale: Any = None, zero_point: Any = None, *ends: Any, **named: Any
) -> Flow | Weight:
    """An activation as the reals that it is already; a constant as integers with one scale, or one along an axis."""
    if isinstance(x, Flow):
        source, answers = call.node.all_input_nodes[0], call.reading.answers
        if scale is not None and answers.quantiser(source)[:2] != [scale, zero_point]:
            raise call.refuse("by another scale or zero point than its quantiser's", "convert the model anew")
        return x
    del ends, named  # the codes are there
    if x.is_quantized:
        return quantised_weight(x)
    codes = x.detach().to(torch.int64).numpy() - int(zero_point)
    return Weight(codes, np.array([float(scale)]))


def quantised_weight(values: torch.Tensor) -> Weight:
    """A constant in one of torch's quantised types."""
    codes = values.int_repr().to(torch.int64).numpy()
    if values.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return Weight(codes - values.q_zero_point(), np.array([values.q_scale()]))
    axis, zeros = values.q_per_channel_axis(), values.q_per_channel_zero_points().numpy().astype(np.int64)
    codes = codes - np.moveaxis(channelwise(zeros, codes.ndim), 0, axis)
    return Weight(codes, values.q_per_channel_scales().double().numpy(), axis)


def dequantize_per_channel(
    call: Call, x: Any, scales: torch.Tensor, zero_points: torch.Tensor | None, axis: int, *ends: Any, **named: Any
) -> Weight:
    """A constant as integers with one scale along an axis."""
    del ends, named  # the codes are there
    if isinstance(x, Flow):
        raise per_channel(call.node)
    codes = x.detach().to(torch.int64).numpy()
    if zero_points is not None:
        zeros = zero_points.to(torch.int64).numpy()
        codes = codes - np.moveaxis(channelwise(zeros, codes.ndim), 0, axis)
    return Weight(codes, scales.detach().double().numpy(), int(axis))


QUANTISERS: frozenset[Reader] = frozenset((quantize,))
DEQUANTISERS: frozenset[Reader] = frozenset((dequantize, dequantize_per_channel))


def dynamic(node: fx.Node) -> SpirError:
    """The refusal of scales that are found while the network runs."""
    return _unconvertible(
        node,
        "takes its scale from the data of each run: dynamic quantisation has no conversion",
        "quantise statically: calibrate with samples, or train with fake quantisers, and convert",
    )


def per_channel(node: fx.Node) -> SpirError:
    """The refusal of activations with a scale a channel."""
    return _unconvertible(
        node,
        "gives an activation one scale a channel, and a sum over channels needs one",
        "quantise activations per tensor, and weights per channel",
    )


def _unconvertible(node: fx.Node, what: str, fix: str) -> SpirError:
    return error("unsupported", f"{_word(node)} {what}", from_=str(origin_of(node)), toolkit=versions(), fix=fix)


# --- readers of layers --------------------------------------------------------------------------------------------


def _layer(read: Reader) -> Reader:
    """A reader of torch_fx for a layer whose weights are integers, or the floats that a toolkit left."""

    @functools.wraps(read)
    def layer(call: Call, x: Flow, weight: Any, bias: Any = None, *how: Any, **named: Any) -> Any:
        if isinstance(weight, Flow):
            raise call.refuse("with weights that depend on the input", "make the weights parameters")
        if isinstance(weight, Weight):
            if weight.axis and weight.scale.size > 1:
                fix = "quantise weights per output channel, axis 0"
                raise call.refuse(f"with one scale along axis {weight.axis}", fix)
            call = attrs.evolve(call, scale=Array.of(weight.scale))
        bias = torch.from_numpy(bias.reals) if isinstance(bias, Weight) else bias
        return read(call, x, weight, bias, *how, **named)

    return layer


conv1d, conv2d, linear = (_layer(read) for read in (layers.conv1d, layers.conv2d, layers.linear))


def batch_norm(
    call: Call,
    x: Flow,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Flow:
    """A batch norm of an exported graph."""
    del momentum, cudnn_enabled  # how, not what
    if training or running_mean is None or running_var is None:
        raise call.refuse("by the statistics of the batch", f"keep running statistics, and {AT_REST}")
    found: Flow = layers.batch_norm(call, x, running_mean, running_var, weight, bias, eps=eps)  # type: ignore[arg-type, assignment]
    return found


_NORMS: frozenset[Reader] = frozenset((batch_norm, layers.batch_norm))
AT_REST = "bring the model to eval mode before the conversion: move_exported_model_to_eval(model), or model.eval()"


# --- readers of activations and moves -----------------------------------------------------------------------------


def relu(call: Call, x: Flow, inplace: bool = False) -> Flow:
    """A clip from below."""
    return hardtanh(call, x, 0.0, math.inf, inplace)


def relu6(call: Call, x: Flow, inplace: bool = False) -> Flow:
    """A clip to 0 .. 6."""
    return hardtanh(call, x, 0.0, 6.0, inplace)


def hardtanh(call: Call, x: Flow, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Flow:
    """A clip, which waits for the quantiser that follows or joins the one before."""
    del inplace  # `survey` saw whether the operand is read again
    lo, hi = float(min_val), float(max_val)
    if not lo < hi:
        raise call.refuse(f"from {lo:g} to {hi:g}", "give a lower end that is below the upper end")
    return attrs.evolve(x, clip=(min(max(x.clip[0], lo), hi), min(max(x.clip[1], lo), hi)), linear=None)


def clamp(call: Call, x: Flow, min: float | None = None, max: float | None = None) -> Flow:  # noqa: A002 - torch's
    """A clip with ends that may be missing."""
    return hardtanh(call, x, -math.inf if min is None else min, math.inf if max is None else max)


def clamp_min(call: Call, x: Flow, min: float) -> Flow:  # noqa: A002 - torch's
    """A clip from below."""
    return clamp(call, x, min)


def dropout(call: Call, x: Flow, p: float = 0.5, training: bool = True, inplace: bool = False) -> Flow:
    """Nothing, once training is over."""
    del inplace  # nothing is written
    if training and p:
        raise call.refuse("with training=True", AT_REST)
    return x


def sized(call: Call, x: Any, *how: Any) -> Any:
    """A size, which the run of the graph shows."""
    del x, how  # of tensors only sizes are read
    raise call.refuse("of a tensor", "take no attribute but the shape")


SIZES: frozenset[Reader] = frozenset((sized,))


def slice_(call: Call, x: Flow, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    """A strided window along one dimension."""
    before = (slice(None),) * (dim % (len(x.type.shape) + 1))
    return shapes.getitem(call, x, (*before, slice(start, end, step)))  # type: ignore[arg-type]


# --- readers of joins -----------------------------------------------------------------------------------


def add(call: Call, x: Any, other: Any, alpha: float = 1) -> Flow:
    """A sum of two branches."""
    if alpha != 1:
        raise call.refuse(f"with alpha={alpha:g}", "add with alpha=1")
    operands = [call.settled(v) for v in (x, other)]
    _same_bits(call, operands)
    reach = sum(v.reach for v in operands)
    seen = reach if math.isfinite(reach) else call.reading.largest
    return call.append(Add(), *operands, reach=reach, doubt=sum(v.doubt for v in operands) + UNIT * seen)


def cat(call: Call, tensors: Sequence[Any], dim: int = 0) -> Flow:
    """Branches one after the other; codes of one scale stay codes."""
    flows = [v for v in tensors if isinstance(v, Flow)]
    axis = dim % (len(call.shape) + 1) - 1
    if len(flows) < len(tensors) or len(flows) < 2 or axis < 0:
        raise call.refuse("of constants, of one tensor or of samples", "concatenate branches, and not samples")
    if len({v.clip for v in flows}) > 1:
        flows = [call.settled(v) for v in flows]
    _same_bits(call, flows)
    reach, doubt = max(v.reach for v in flows), max(v.doubt for v in flows)
    found = call.append(Concat(axis=axis), *flows, reach=reach, doubt=doubt)
    each = [v.codes for v in flows if v.codes is not None]
    if len(each) < len(flows) or len({c.scale for c in each}) > 1:
        return attrs.evolve(found, clip=flows[0].clip)
    codes = attrs.evolve(each[0], lo=min(c.lo for c in each), hi=max(c.hi for c in each))
    return attrs.evolve(found, clip=flows[0].clip, codes=codes)


def _same_bits(call: Call, operands: Sequence[Flow]) -> None:
    bits = sorted({v.codes.bits for v in operands if v.codes is not None and v.codes.bits})
    if len(bits) > 1:
        widths = " and ".join(str(b) for b in bits)
        raise call.refuse(f"of codes of {widths} bits", "quantise the branches that meet to one number of bits")


def layer_then_relu(call: Call, x: Flow, layer: Reader, fields: dict[str, Any]) -> Flow:
    """A layer that a toolkit fused with its ReLU."""
    return relu(call, layer(call, x, **fields))


LAYERS: frozenset[Reader] = frozenset((conv1d, conv2d, linear, layer_then_relu))
OWN: Mapping[Reader, Reader] = {
    layers.conv1d: conv1d,
    layers.conv2d: conv2d,
    layers.linear: linear,
    layers.batch_norm: layers.batch_norm,
    layers.torch_batch_norm: batch_norm,
    layers.relu: relu,
    layers.relu6: relu6,
    layers.hardtanh: hardtanh,
    layers.clamp: clamp,
    layers.clamp_min: clamp_min,
    layers.dropout: dropout,
    layers.torch_dropout: dropout,
    layers.same: layers.same,
    layers.identity: layers.identity,
    arithmetic.add: add,
    shapes.cat: cat,
}
"""In place of what torch_fx reads with; readers of shapes and windows are the same."""


def shared(read: Reader) -> Reader | None:
    """The reader for a construct that torch_fx reads so; None where codes cannot take it."""
    alike = read.__module__ in (shapes.__name__, windows.__name__)
    return OWN.get(read, read if alike and read is not shapes.stack else None)


def _keeps_order(reader: Reader | None) -> bool:
    """Whether a larger operand gives no smaller result, and the largest of all operands none that is larger."""
    means = (*(windows.avg_pool1d, windows.avg_pool2d), *(windows.adaptive_avg_pool1d, windows.adaptive_avg_pool2d))
    return reader not in (add, windows.mean, *means, *_NORMS)


# --- what is refused before anything runs -------------------------------------------------------------------------

_OBSERVES = ("observer", "fake_quant", "learnable")
_DYNAMIC = ("choose_qparams", "quantize_per_tensor_dynamic", "quantized_dynamic", "dynamic_quant", "linear_dynamic")


def observer_of(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The first observer or fake quantiser inside a model, with its path."""
    for path, part in model.named_modules():
        home = type(part).__module__
        if home.startswith(("torch.ao.quantization.", "torchao.")) and any(w in home for w in _OBSERVES):
            return path, part
    return None


def unconverted(model: nn.Module, fix: str) -> None:
    """Refuses a model that is prepared and not converted.

    Raises:
        SpirError[unsupported]: with the first observer.
    """
    found = observer_of(model)
    if found is not None:
        path, part = found
        what = f"the model is prepared and not converted: {path} is a {type(part).__name__}"
        raise error("unsupported", what, toolkit=versions(), fix=fix)


def survey(model: fx.GraphModule, toolkit: Toolkit) -> None:
    """Refuses every call without a reader, at once.

    Raises:
        SpirError[unsupported]: with the toolkit's versions.
    """
    raise_all(_refusals(model, toolkit))


def _refusals(model: fx.GraphModule, toolkit: Toolkit) -> Iterable[SpirError]:
    fed: set[fx.Node] = set()
    for node in model.graph.nodes:
        if node.op == "placeholder":
            fed.add(node)
            continue
        found = None if node.op == "output" else toolkit.reader(node, model)
        if node.op == "output" or not node.users or fed.isdisjoint(node.all_input_nodes):
            continue
        if found is not None and found[0] in SIZES:
            continue
        fed.add(node)
        word = _word(node)
        if any(w in str(node.target) for w in _DYNAMIC):
            if not isinstance(node.target, str) or node.op != "call_module":
                yield dynamic(node)
        elif word in ("quantize_per_channel", "dequantize_per_channel"):
            yield per_channel(node)
        elif found is None:
            owner = model.get_submodule(word) if node.op == "call_module" else None
            what = word if owner is None else f"{type(owner).__module__}.{type(owner).__name__}"
            what = str(node.target) if _space(node) else what
            yield error(
                "unsupported",
                f"{what} has no conversion",
                from_=str(origin_of(node)),
                toolkit=versions(),
                fix=toolkit.advice(what),
            )
        elif found[0] in QUANTISERS:
            for user in node.users:
                reader = toolkit.reader(user, model) if user.op != "output" else None
                if reader is None or reader[0] not in DEQUANTISERS:
                    what = f"{user.name} reads codes, and not the reals that they stand for"
                    fix = "dequantise every activation, as the toolkit's reference graph does before it is lowered"
                    yield error("unsupported", what, from_=str(origin_of(node)), toolkit=versions(), fix=fix)


def calibrated(run: Run) -> None:
    """Refuses quantisers whose observers never saw data: they keep scale 1 and zero point 0.

    Raises:
        SpirError[unsupported]: with the first of them.
    """
    idle = [node for node in run.codes if run.quantiser(node)[:2] == [1, 0]]
    empty = [node for node in idle if len(np.unique(run.codes[node])) < 3]
    if empty or (idle and len(idle) == len(run.codes)):
        raise error(
            "unsupported",
            f"{len(idle)} of {len(run.codes)} activations have scale 1 and zero point 0: their observers never ran",
            from_=str(origin_of((empty or idle)[0])),
            toolkit=versions(),
            fix="run the prepared model on real samples, or train it, before the conversion",
        )


# --- the proof ----------------------------------------------------------------------------------------------------


def agreed(module: Module, reading: Reading) -> tuple[Agreement, ...]:
    """Every quantiser against the toolkit's codes, each fed with the toolkit's own codes before it.

    Equal means: round half up of the value in float64, whose error is bounded, unless the value lies within 2^-10 of
    a tie, where float32 may fall to the other side.

    Raises:
        SpirError[trace]: with the layer, the index and both codes; or with the largest difference of the output.
    """
    run, checks = reading.answers, {c.code: c for c in reading.checks if c.code}
    waiting: dict[str, list[_Check]] = {}
    for check in reading.checks:
        if check.code in module.types or (not check.code and check.source in module.types):
            waiting.setdefault(check.source, []).append(check)
    last = {name: (nodes[-1].result if nodes else name) for name, nodes in module.readers.items()}
    values: dict[str, Any] = {"x": module.input.type.read(run.samples.double().numpy())}
    found = [_held(c, values["x"], run, module) for c in waiting.get("x", ())]
    for node in module.nodes:
        operands = (values[name] for name in node.operands)
        fed = checks.get(node.result)
        if fed is None:
            values[node.result] = node.op.reference(module.operand_types(node), *operands)
        else:
            values[node.result] = _kept(fed, run)
        found += [_held(c, values[node.result], run, module) for c in waiting.get(node.result, ())]
        for name in dict.fromkeys(node.operands):
            if last[name] == node.result and name != module.output:
                del values[name]
    _same_output(values[module.output], reading)
    return tuple(found)


def _kept(check: _Check, run: Run) -> NDArray[np.int64]:
    """The toolkit's codes without zero point, in the range that is left of them."""
    zero = int(run.quantiser(check.node)[1])
    return np.clip(run.codes[check.node] - zero, check.codes.lo, check.codes.hi)


def _held(check: _Check, real: Reals, run: Run, module: Module) -> Agreement:
    theirs = _kept(check, run)
    exact = real / check.codes.scale
    ours = np.clip(np.floor(exact + 0.5), check.codes.lo, check.codes.hi).astype(np.int64)
    apart = np.abs(exact - np.floor(exact) - 0.5)
    band = TIE - check.doubt / check.codes.scale
    node = module.definitions.get(check.code) or module.definitions.get(check.source)
    name = check.code or check.source
    wrong = (ours != theirs) & ~(apart <= band) | (np.abs(ours - theirs) > 1)
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise error(
            "trace",
            f"%{name} is not what the toolkit computes: {int(wrong.sum())} of {wrong.size} codes differ; "
            f"at {list(at)} the value {exact[at]:.6f} rounds to {int(ours[at])}, and the toolkit has {int(theirs[at])}",
            from_=str(node.origin if node is not None else origin_of(check.node)),
            toolkit=versions(),
            fix="run the reference graph in float32, on kernels that do not saturate: lowered int8 kernels do",
        )
    return Agreement(name, ours.size, int((ours != theirs).sum()))


def _same_output(real: Reals, reading: Reading) -> None:
    """The output, where no quantiser ends the graph, to within the rounding of float32."""
    answer = reading.answers.output.double().numpy()
    largest = max(float(np.abs(answer).max()), float(np.abs(real).max()), 1e-30)
    difference = float(np.abs(real - answer).max()) if real.shape == answer.shape else math.inf
    if not difference <= 2.0**-12 * largest:
        raise error(
            "trace",
            f"the output is not what the toolkit computes: it differs by {difference:.3g} of {largest:.3g}",
            from_=str(origin_of(next(iter(reversed(reading.model.graph.nodes))))),
            toolkit=versions(),
            fix="run the reference graph in float32, on kernels that do not saturate: lowered int8 kernels do",
        )


def imported(model: fx.GraphModule, toolkit: Toolkit, example: object) -> tuple[Module, tuple[Agreement, ...]]:
    """A converted graph as a module, and how far its integers agree with the toolkit's; origins name ties.

    Raises:
        SpirError: what cannot be read, or does not agree.
    """
    survey(model, toolkit)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's remarks on its own ops are not the user's doing
        run = Run.of(model, toolkit, example)
        calibrated(run)
        reading = Reading(model, toolkit, run)
        module = reading.module()
        found = agreed(module, reading)
    ties = {a.layer: a for a in found if a.ties}
    nodes = tuple(_told(n, ties.get(n.result)) for n in module.nodes)
    return attrs.evolve(module, nodes=nodes), found


def _told(node: Node, agreement: Agreement | None) -> Node:
    """A quantiser whose origin says how many codes fell to the other side of a tie."""
    if agreement is None:
        return node
    told = f"{agreement.ties} of {agreement.codes} codes on another side of a tie"
    place = ", ".join(part for part in (node.origin.place, told) if part)
    return attrs.evolve(node, origin=attrs.evolve(node.origin, place=place))
