"""torch_fx: traces an nn.Module with torch.fx and reads the trace as a module of reals.

Each construct of torch has one reader, a function with the argument names of its torch counterpart: they stand by
family in private modules, and the tables of `_constructs` say which reads what. The trace is then run on two samples,
interpreted, and compared with the model itself, so that whatever a trace cannot see (a hook that changes values, code
that treats tracing specially) is refused and not lost.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import attrs
import torch
from torch import nn

from spir.errors import error
from spir.frontends._constructs import CONSTRUCTS
from spir.frontends._quantised import toolkit_of
from spir.frontends._reading import Reading
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
from spir.ir import Module
from spir.verify import verify


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
            trace = Trace.of(whole, lambda m: CONSTRUCTS.known(m) is not None)
            module = verify(Reading(CONSTRUCTS, trace, exact, Trial.of(trace, exact, batch)).module(batch))
            compare(module, exact, batch, answer)
        return module
