"""Where the tensors of a checked kernel lie: between guards, which show what is read or written
outside, aligned and not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FENCE = 67  # elements behind a boundary; odd, so that a tensor is aligned to one element only
ALIGNED = 64  # the same where kernels ask for whole accesses of 16 bytes, as a GPU's do
GUARD = 1024
"""Elements on either side, beside a row: what a wrong index hits first."""
POISON = 0xFF
"""A byte of a NaN in every dtype: an element that is never written shows, whatever belongs
there.
"""


@dataclass(frozen=True)
class Guarded:
    """A contiguous tensor `view` inside a larger one, the rest of which is not the kernel's."""

    view: torch.Tensor
    edges: tuple[torch.Tensor, torch.Tensor]
    untouched: tuple[torch.Tensor, torch.Tensor]

    @property
    def broken(self) -> bool:
        """Whether something was written outside."""
        import torch

        return not all(map(torch.equal, self.edges, self.untouched))


def guarded(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    fill: float | None = None,
    fence: int = FENCE,
    place: str = "cpu",
) -> Guarded:
    """A tensor of a shape `fence` elements behind a boundary of 64 bytes, on PyTorch's device
    `place`, with a row and GUARD elements at least on either side. All of it holds `fill`, or bytes
    that are a NaN when it is None.
    """
    import torch

    count, row = math.prod(shape), shape[-1] if shape else 1
    room = -(-(row + GUARD) // ALIGNED) * ALIGNED
    start = room + fence
    whole = torch.empty(start + count + room, dtype=dtype, device=place)
    if fill is None:
        whole.view(torch.uint8).fill_(POISON)
    else:
        whole.fill_(fill)
    edges = tuple(part.view(torch.uint8) for part in (whole[:start], whole[start + count :]))
    return Guarded(
        whole[start : start + count].view(shape),
        (edges[0], edges[1]),
        (edges[0].clone(), edges[1].clone()),
    )
