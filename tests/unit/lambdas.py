"""A network made of one function, for tests of the frontend."""

from __future__ import annotations

from torch import nn


class Lambda(nn.Module):
    """A network of one function, which sees the network where that has parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        self.parts = tuple(parts)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x) if self.parts else self.function(x)
