"""SPIR: a compiler from trained networks to spiking networks, exact where it says so.

snn = spir.compile(model, passes="@stem{bits=8}", data=images, backend="hw")
logits = snn(x)
"""

from spir.driver import Compiled, compile, load  # noqa: A004 - the word of the field
from spir.errors import SpirError, SpirWarning
from spir.ir import Module
from spir.rewriting import Pass
from spir.text import parse

__all__ = ["Compiled", "Module", "Pass", "SpirError", "SpirWarning", "compile", "load", "parse"]
__version__ = "0.1.0"
