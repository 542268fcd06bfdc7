"""What ops that the host computes share: they work on reals, before the first encoder or after a readout."""

from __future__ import annotations

from spir.errors import error
from spir.types import Real, Tensor


def real_operand(*types: Tensor) -> Tensor:
    """The first operand, when all are reals.

    Raises:
        SpirError[type]: integers or trains.
    """
    for type_ in types:
        if not isinstance(type_.encoding, Real):
            raise error(
                "type",
                f"is computed by the host, on reals, not on {type_.encoding}",
                fix="leave it before the first encoder, or behind the readout",
            )
    return types[0]
