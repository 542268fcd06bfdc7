"""Sparse spikes on decoded values: what each code becomes is looked up, or stepped through where codes are many."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spir.backends.torch_ops._firing import TorchNamespace
from spir.ops._thinning import Thinning
from spir.types import Spikes, Tensor


def thinned(
    compute: Callable[..., torch.Tensor], thinning: Thinning | None, type_: Tensor, held: torch.dtype
) -> Callable[..., torch.Tensor]:
    """Codes ``[N, *shape]`` as their train decodes, in ``held``; as they are made where all spikes stay."""
    train = type_.encoding
    if thinning is None or not isinstance(train, Spikes):
        return compute
    bits, signed = train.steps, train.lo < 0
    lowest = -(2 ** (bits - 1)) if signed else 0
    known = thinning.table(bits, signed=signed)
    if known is None:
        xp = TorchNamespace(constants={})
        return lambda *x: thinning.decoded(xp, compute(*x).to(torch.int64), bits, signed=signed).to(held)
    entries = torch.tensor(known, dtype=held)

    def looked_up(*x: torch.Tensor) -> torch.Tensor:
        codes = compute(*x).to(torch.int32)
        if lowest:
            codes = codes.sub_(lowest)
        last = codes.ndim == 4 and codes.is_contiguous(memory_format=torch.channels_last)
        flat = codes.permute(0, 2, 3, 1) if last else codes
        found = torch.index_select(entries.to(codes.device), 0, flat.reshape(-1)).view(flat.shape)
        return found.permute(0, 3, 1, 2) if last else found

    return looked_up
