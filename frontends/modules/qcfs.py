"""QCFS: the quantising activation that trains where ReLU stood, and the exchange of every ReLU for one.

Source: Bu et al., arXiv 2303.04347 (quantisation clip-floor-shift); Hao et al., arXiv 2412.13610, equation 5.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from spir.errors import error

_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_)
_METHODS = ("relu", "relu_")
_OVERWRITING = (F.relu_, torch.relu_, "relu_")
MOST_LEVELS = 65_536
_SAMPLE = 100_000  # positive values that a threshold is fitted to
_CANDIDATES = 100  # thresholds tried, as equal parts of the largest value


class QCFS(nn.Module):
    """``theta * clamp(floor(x * L / theta + 1/2) / L, 0, 1)``: ReLU in L steps up to a threshold that is learned.

    Takes and returns floats of any shape; ``threshold`` is a parameter without axes. The gradient takes floor for the
    identity: 1 for x in 0 < x < theta and 0 elsewhere; for theta it is 1 from theta on, (y - x) / theta inside, and 0
    at 0 and below. The op qcfs computes the same in the same order, so that in float64 both agree to the bit.

    Args:
        levels: L, at least 1.
        threshold: theta to start from, positive.

    Raises:
        SpirError[usage]: levels or a threshold out of range.
    """

    def __init__(self, levels: int, threshold: float = 1.0) -> None:
        super().__init__()
        _check(levels, threshold)
        self.levels = int(levels)
        self.threshold = nn.Parameter(torch.tensor(float(threshold)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        y: torch.Tensor = _Steps.apply(x, self.threshold, self.levels)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"levels={self.levels}, threshold={self.threshold.item():g}"


class _Steps(torch.autograd.Function):
    """The activation and its straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, threshold: torch.Tensor, levels: int) -> torch.Tensor:
        steps = (x * levels).add_(threshold / 2).div_(threshold).floor_().clamp_(0, levels)
        y = steps.mul_(threshold / levels)
        ctx.save_for_backward(x, y, threshold)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, y, threshold = ctx.saved_tensors
        (gradient,) = gradients
        inside = torch.ops.aten.hardtanh_backward(gradient, x, 0.0, threshold.item())  # where 0 < x < theta, else 0
        parts = (gradient * y).addcmul_(inside, x, value=-1)  # y = theta above, and 0 below
        return inside, parts.sum() / threshold, None


def swap_relu(
    model: nn.Module, levels: int, data: torch.Tensor | None = None, threshold: float = 1.0
) -> fx.GraphModule:
    """A copy of a network with a `QCFS` of its own at every call of relu, be it module, function, method or in place.

    A module keeps its path, and so its place in the state dict: ``relu1.threshold``; a second call of a shared module
    is ``relu1_2``. A function or a method that ``layer1.0`` calls becomes ``layer1.0.qcfs1``, ``layer1.0.qcfs2``, ...
    in the order of calls. Other activations stay as they are, and so do all other parameters and buffers.

    Args:
        model: takes one tensor, batch axis first; it is left as it was.
        levels: L of every QCFS, at least 1.
        data: a batch as the model receives it. Each threshold becomes the one of least squared error on the values
            that its relu receives; and the copy, with its ReLUs, must compute what the model does.
        threshold: of every QCFS without data, and of one that receives no positive value.

    Raises:
        SpirError[usage]: levels or a threshold out of range, or a model that calls no relu.
        SpirError[trace]: a forward that cannot be traced, or that computes in training something else.
        SpirError[data]: a model that fails on the data, or gives values that are not finite.
        SpirError[unsupported]: a model that does something that its trace does not show.
    """
    _check(levels, threshold)
    network = copy.deepcopy(model)
    tracer, graph = _traced(network)
    swapped = fx.GraphModule(network, graph, type(model).__name__)
    sites = _exchange(swapped, tracer.paths)
    if not sites:
        raise error(
            "usage",
            f"{type(model).__name__} calls no relu",
            fix="give the network with its ReLUs; other activations are not exchanged",
        )
    relus: dict[str, _Fit] = {}
    for path in sites:
        relus[path] = _Fit(levels, threshold)
        _put(swapped, path, relus[path])
    swapped.graph.lint()
    swapped.recompile()
    if data is not None:
        _compare(model, swapped, data)
    for path, relu in relus.items():
        like = next(network.parameters(), torch.zeros(()))
        _put(swapped, path, QCFS(levels, relu.threshold).to(like.device, like.dtype))
    return swapped.train(model.training)


def _check(levels: object, threshold: object) -> None:
    whole = isinstance(levels, (int, float)) and not isinstance(levels, bool)
    if not whole or levels % 1 or not 1 <= levels <= MOST_LEVELS:  # type: ignore[operator]
        raise error("usage", f"levels = {levels!r}", fix=f"give a whole number, 1 to {MOST_LEVELS}")
    if not isinstance(threshold, (int, float)):
        raise error("usage", f"threshold = {threshold!r}", fix="give a positive number")
    if not (threshold > 0 and math.isfinite(threshold)):
        raise error("usage", f"threshold = {threshold:g}", fix="give a positive number")


class _Fit(nn.Module):
    """ReLU that fits a threshold to the values it receives."""

    def __init__(self, levels: int, threshold: float) -> None:
        super().__init__()
        self.levels = levels
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """max(x, 0)."""
        positive = x[x > 0].double()
        if len(positive):
            positive = positive[:: math.ceil(len(positive) / _SAMPLE)]
            tried = positive.max() * torch.arange(1, _CANDIDATES + 1, device=x.device) / _CANDIDATES
            self.threshold = float(min(tried, key=lambda theta: _error(positive, theta, self.levels)))
        return torch.relu(x)


def _error(x: torch.Tensor, threshold: torch.Tensor, levels: int) -> float:
    """The squared error of QCFS on values that are positive."""
    steps = (x * levels / threshold + 0.5).floor().clamp(0, levels)
    return float((steps * (threshold / levels) - x).square().sum())


# --- the graph ----------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Notes the path of the module whose forward makes a call."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QCFS) or super().is_leaf_module(m, module_qualified_name)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(*args, **kwargs)
        self.paths[proxy.node.name] = self.scope.module_path
        return proxy


def _traced(network: nn.Module) -> tuple[_Tracer, fx.Graph]:
    """The graph of the forward, which must be one and the same in training; the network is then in evaluation mode."""
    tracer = _Tracer()
    try:
        training = _Tracer().trace(copy.deepcopy(network).train())
        graph = tracer.trace(network.eval())
    except _FAILURES as failure:
        raise error(
            "trace",
            f"the forward of {type(network).__name__} cannot be traced",
            torch=_first_line(failure),
            fix="decide outside of forward, or write nn.ReLU modules and put QCFS modules in their place",
        ) from None
    if str(training) != str(graph):
        raise error(
            "trace",
            f"the forward of {type(network).__name__} is another one in training",
            fix="use modules where it asks self.training: nn.Dropout, nn.BatchNorm2d",
        )
    return tracer, graph


def _exchange(network: fx.GraphModule, paths: dict[str, str]) -> list[str]:
    """Lets every relu of the graph call a module of its own; the paths of these."""
    found: list[str] = []
    graph = network.graph
    for node, overwrites in [(n, _overwrites(network, n)) for n in graph.nodes if _is_relu(network, n)]:
        path = _path(network, node, paths[node.name], found)
        found.append(path)
        operand = node.args[0] if node.args else node.kwargs["input"]
        _put(network, path, nn.Identity())
        with graph.inserting_before(node):
            call = graph.call_module(path, (operand,))
        if overwrites:  # what reads the operand from here on reads the result
            nodes = list(graph.nodes)
            earlier = set(nodes[: nodes.index(node)])
            operand.replace_all_uses_with(call, lambda user, earlier=earlier: user not in earlier)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    return found


def _module(network: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls."""
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_relu(network: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.target in _METHODS if node.op == "call_method" else type(_module(network, node)) is nn.ReLU


def _overwrites(network: nn.Module, node: fx.Node) -> bool:
    """Whether a relu works in place."""
    module = _module(network, node)
    if isinstance(module, nn.ReLU):
        return module.inplace
    named = node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False)
    return node.target in _OVERWRITING or bool(named)


def _path(network: nn.Module, node: fx.Node, caller: str, taken: list[str]) -> str:
    """Where the module of a relu stands: where its ReLU does, or else below its caller."""
    prefix = f"{caller}." if caller else ""
    if node.op == "call_module":
        if node.target not in taken:
            return str(node.target)
        names = (f"{node.target}_{i}" for i in itertools.count(2))
    else:
        names = (f"{prefix}qcfs{i}" for i in itertools.count(1))
    known = {name for name, _ in network.named_modules(remove_duplicate=False)}
    known |= {name for name, _ in itertools.chain(network.named_parameters(), network.named_buffers())}
    return next(name for name in names if name not in taken and name not in known)


def _put(network: fx.GraphModule, path: str, module: nn.Module) -> None:
    """Makes a module the one of a path, whatever stood there."""
    parent, _, name = path.rpartition(".")
    owner: nn.Module = network
    for part in parent.split(".") if parent else ():
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())  # its owner has no parameters, so the graph did not keep it
        owner = owner.get_submodule(part)
    setattr(owner, name, module)


def _compare(model: nn.Module, swapped: nn.Module, data: Any) -> None:
    """Runs the exchanged network with ReLUs, so that they see the data, and refuses it if the model returns another."""
    if not isinstance(data, torch.Tensor) or not data.numel():
        given = f"no samples, {list(data.shape)}" if isinstance(data, torch.Tensor) else f"a {type(data).__name__}"
        raise error("data", f"the data is {given}", fix="give a batch as a tensor: torch.as_tensor(data)")
    try:
        with torch.no_grad():
            expected: Any = copy.deepcopy(model).eval()(data.clone())
            found: Any = swapped.eval()(data.clone())
    except _FAILURES as failure:
        raise error(
            "data",
            f"the model fails on data of shape {list(data.shape)}",
            torch=_first_line(failure),
            fix="give a batch as model(data) takes it",
        ) from None
    if not isinstance(expected, torch.Tensor) or not torch.isfinite(expected).all():
        raise error("data", "the model returns no tensor of finite values", fix="repair the data or the weights")
    difference = float((expected - found).abs().max())
    if difference > math.sqrt(torch.finfo(expected.dtype).eps) * float(expected.abs().max()):
        raise error(
            "unsupported",
            f"the model does something that its trace does not show: outputs differ by {difference:.3g}",
            fix="move into forward what hooks change, and take out what is random",
        )


def _first_line(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
