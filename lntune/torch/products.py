"""Matrix products, by whichever of PyTorch's libraries is fast on this CPU.

On x86 PyTorch multiplies float32 matrices by MKL, which on another maker's CPU leaves 512-bit
vectors unused; oneDNN, which PyTorch brings too and which multiplies lower precision for it, does
not: it was found 2.2 times as fast on an EPYC, from 32 rows on. Everywhere else, and where
`torch.backends.mkldnn` is switched off, products are PyTorch's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from lntune import device
from lntune.torch.constants import constant
from lntune.torch.support import exporting, in_transform, is_checkpointed, kernel_support

_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

_LEAST = 1 << 20
"""Multiplications from which on a product by oneDNN pays: it takes some 10 us to start."""
_LEAST_RECORDED = 1 << 24
"""The same for one that autograd records, where an operator of our own costs some 20 us more than
PyTorch's.
"""
_PACKED_FROM = {True: (32, 1 << 19), False: (8, 0)}
"""By whether the matrix is float32: times and elements from which on packing it pays. It costs two
or three products; a small float32 matrix is in the cache and multiplied as fast as it is, low
precision may have no other fast way.
"""

Times = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""f(a, plus, out): a @ matrix.T, plus `plus` unless that is None, in `out` or, where that is None,
in a new tensor; all of one dtype.
"""


def product(a: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ matrix.T, contiguous, of two matrices in any layout, in `out` or in a new tensor; not
    differentiable.
    """
    if not _faster(a.numel() * matrix.shape[0], _LEAST, a, matrix):
        return torch.mm(a, matrix.t(), out=out)
    # oneDNN's operator copies a first factor that is not contiguous. The second may be the first:
    # of the transposed product.
    if not a.is_contiguous() and a.numel() > matrix.numel() + a.shape[0] * matrix.shape[0]:
        result = _onednn(matrix, a).t()
        return result.contiguous() if out is None else out.copy_(result)
    result = _onednn(a, matrix)
    return result if out is None else out.copy_(result)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """torch.nn.functional.linear(x, weight), differentiable as often, for x (..., in) and weight
    (out, in).
    """
    # a program for elsewhere, and for any sizes: nothing is decided by those that are seen now
    if exporting() or _tracing():
        return functional.linear(x, weight)
    if _faster(x.numel() * weight.shape[0], _LEAST_RECORDED, x, weight) and _ordinary(x, weight):
        y: Tensor = torch.ops.lntune.linear(x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], weight.shape[0])
    return functional.linear(x, weight)


def _ordinary(x: Tensor, weight: Tensor) -> bool:
    """True where an operator of our own may stand for PyTorch's, which transforms of functions
    know.
    """
    if torch.compiler.is_compiling():
        return not in_transform()
    return bool(kernel_support((x, weight), 1, watched=is_checkpointed(x, weight)))


def repeated(matrix: Tensor, rows: int, times: int) -> Times:
    """Products with one matrix, computed in its dtype, of up to `rows` rows, about `times` of them.

    For a few rows a product mostly reads and rearranges its matrix. oneDNN can have it rearranged
    once (torch.compile does the same for inference): 1.1 to 1.5 times as fast at 32 rows, depending
    on the CPU.
    """
    single, cpu = matrix.dtype == torch.float32, matrix.device.type == "cpu"
    least_times, least = _PACKED_FROM[single]
    if cpu and _enabled() and times >= least_times and matrix.numel() >= least:
        try:
            return _in_dtype(
                matrix.dtype, _by_onednn(torch.ops.mkldnn._reorder_linear_weight(matrix, rows))
            )
        # another PyTorch, or a CPU without instructions for the dtype
        except (AttributeError, RuntimeError):
            pass
    if _faster(rows * matrix.numel(), _LEAST, matrix):
        return _in_dtype(matrix.dtype, _by_onednn(matrix))
    if cpu and not single:
        # a plain loop multiplies by matrices in any other order, on CPUs without instructions for
        # it
        matrix = matrix.contiguous()
    transposed = matrix.t()

    def by_pytorch(a: Tensor, plus: Tensor | None, out: Tensor | None) -> Tensor:
        return (
            torch.mm(a, transposed, out=out)
            if plus is None
            else torch.addmm(plus, a, transposed, out=out)
        )

    return _in_dtype(matrix.dtype, by_pytorch)


def _by_onednn(matrix: Tensor) -> Times:
    """Products with a matrix, rearranged or not, by oneDNN."""
    added = torch.ops.mkldnn._linear_pointwise.binary

    def times(a: Tensor, plus: Tensor | None, out: Tensor | None) -> Tensor:
        result = _onednn(a, matrix) if plus is None else added(a, plus, matrix, None, "add")
        return result if out is None else out.copy_(result)

    return times


def _in_dtype(dtype: torch.dtype, times: Times) -> Times:
    """The same for tensors of any dtype, multiplied in `dtype`; where that is another, `plus` is
    added to the rounded product.
    """

    def converted(a: Tensor, plus: Tensor | None, out: Tensor | None) -> Tensor:
        if a.dtype == dtype:
            return times(a, plus, out)
        result = times(a.to(dtype), None, None).to(a.dtype)
        result = result if plus is None else result.add_(plus)
        return result if out is None else out.copy_(result)

    return converted


def _onednn(a: Tensor, matrix: Tensor) -> Tensor:
    """a @ matrix.T; `matrix` may be one that oneDNN has rearranged."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(a, matrix, None, "none", [], ""))


def _enabled() -> bool:
    """True where PyTorch has oneDNN, not switched off, with the operators that torch.compile
    uses.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _faster(multiplications: int, least: int, *factors: Tensor) -> bool:
    """True where a product of so many multiplications is faster by oneDNN than by PyTorch's own
    operator.
    """
    return (
        all(f.dtype == torch.float32 and f.device.type == "cpu" for f in factors)
        and multiplications >= least
        # which has PyTorch's operators multiply in low precision
        and not torch.is_autocast_enabled("cpu")
        and onednn_pays()
    )


onednn_pays: Callable[[], bool] = constant(lambda: mkl_is_slow() and _enabled())
"""True where MKL is slow and oneDNN can be used."""


_AVX512 = 64
"""Bytes of a vector."""


def mkl_is_slow() -> bool:
    """True where MKL multiplies with vectors half as wide as the CPU's."""
    wide = device.current().vector_bytes == _AVX512
    return wide and device.vendor() not in ("", "GenuineIntel")


@torch.library.custom_op("lntune::linear", mutates_args=(), device_types="cpu")
def linear_op(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of two matrices in any layout."""
    return product(x, weight)


@linear_op.register_fake
def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    want_x, want_weight = ctx.needs_input_grad
    op = torch.ops.lntune.linear
    return op(grad, weight.t()) if want_x else None, op(grad.t(), x.t()) if want_weight else None


linear_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.lntune.linear)
def _flops(x: torch.Size, weight: torch.Size, **_: Any) -> int:
    """What a FlopCounterMode counts for PyTorch's product."""
    return 2 * math.prod(x) * weight[0]
