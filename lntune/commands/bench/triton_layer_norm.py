"""The forward of Triton's tutorial on layer norm (05-layer-norm.py of the triton repository), a
contender of the benchmark on GPUs: a program a row, the row in blocks.

Triton brings no layer norm of its own, and its tutorial has this one in a script. Needs triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from lntune.case import Case

_MOST_BYTES = 65536
"""Of a row: the tutorial holds one in a single block."""


@triton.jit  # type: ignore[untyped-decorator]
def _forward(x, y, weight, bias, mean, rstd, stride, hidden, eps, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """One row."""
    row = tl.program_id(0)
    y += row * stride
    x += row * stride
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for offset in range(0, hidden, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        total += tl.load(x + at, mask=at < hidden, other=0.0).to(tl.float32)
    middle = tl.sum(total, axis=0) / hidden
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for offset in range(0, hidden, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < hidden, other=0.0).to(tl.float32)
        value = tl.where(at < hidden, value - middle, 0.0)
        squares += value * value
    scale = 1 / tl.sqrt(tl.sum(squares, axis=0) / hidden + eps)
    tl.store(mean + row, middle)
    tl.store(rstd + row, scale)
    for offset in range(0, hidden, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        mask = at < hidden
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        out = (value - middle) * scale * tl.load(weight + at, mask=mask) + tl.load(
            bias + at, mask=mask
        )
        tl.store(y + at, out, mask=mask)


def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Layer norm of a contiguous (rows, hidden) tensor on a GPU, with the tutorial's choice of
    block and warps.

    Raises:
        RuntimeError: a row is beyond 64 KB, which the tutorial does not serve.
    """
    rows, hidden = x.shape
    block = min(_MOST_BYTES // x.element_size(), int(triton.next_power_of_2(hidden)))
    if hidden > block:
        raise RuntimeError("this layer norm does not serve rows of 64 KB and more")
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    warps = min(max(block // 256, 1), 8)
    _forward[(rows,)](
        x,
        y,
        weight,
        bias,
        mean,
        rstd,
        x.stride(0),
        hidden,
        eps,
        BLOCK=block,
        num_warps=warps,
        num_ctas=1,
    )
    return y


def bound_call(_case: Case, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """The call bound to the operator's named inputs, see `Op.peers`."""
    x, weight, bias, eps = inputs["x"], inputs["weight"], inputs["bias"], float(inputs["eps"])
    return lambda: forward(x, weight, bias, eps)
