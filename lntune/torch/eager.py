"""PyTorch's own layer norm and its backward, for every call that no kernel serves.

They take what lntune's functions take, among it affine vectors in another dtype than the input,
which PyTorch's operators refuse in part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_LOW = frozenset({torch.float16, torch.bfloat16})
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""(dx, dgamma, dbeta), None for those that are not wanted."""


def layer_norm(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """y of lntune.layer_norm, shaped as the input and in its dtype."""
    shape = tuple(shape)
    if input.device.type == "cuda" and has_mixed_dtypes(input, weight, bias):
        x, weight, bias = in_float32(input, weight, bias)
        return functional.layer_norm(x, shape, weight, bias, eps).to(input.dtype)
    return functional.layer_norm(input, shape, *_in_one_dtype(input, shape, weight, bias), eps)


def layer_norm_forward(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of lntune.layer_norm_forward, the statistics as a kernel gives them: of shape
    (rows,), in float32 or wider.
    """
    if input.device.type == "cpu" or not has_mixed_dtypes(input, weight, bias):
        affine = _in_one_dtype(input, shape, weight, bias)
        y, *statistics = torch.native_layer_norm(input, list(shape), *affine, eps)
    else:
        x, weight, bias = in_float32(input, weight, bias)
        y, *statistics = torch.native_layer_norm(x, list(shape), weight, bias, eps)
        y = y.to(input.dtype)
    mean, rstd = (s.to(torch.promote_types(s.dtype, torch.float32)).flatten() for s in statistics)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    input: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """PyTorch's own backward, given float32 statistics (rows,) whatever the input's dtype.

    On CPUs low precision takes its mixed-dtype form, in which weight and statistics are float32:
    the other would round the statistics to the input's dtype first. On GPUs statistics are float32
    always, and all the rest has to be of one dtype.
    """
    if input.device.type == "cuda":
        if has_mixed_dtypes(input, weight, bias):
            x, gamma, beta = in_float32(input, weight, bias)
            grads = layer_norm_backward(dy.float(), x, shape, mean, rstd, gamma, beta, wanted)
            like = (input, weight, bias)
            return tuple(
                g if g is None or t is None else g.to(t.dtype)
                for g, t in zip(grads, like, strict=True)
            )  # type: ignore[return-value]
        low = False
    else:
        low = input.itemsize < torch.float32.itemsize
    shape = list(shape)
    statistics_shape = [*input.shape[: input.ndim - len(shape)], *[1] * len(shape)]
    gamma = weight
    if low:
        gamma = (
            torch.ones(shape, dtype=torch.float32, device=input.device)
            if weight is None
            else weight.float()
        )
    beta = bias.float() if bias is not None and low else bias
    dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        dy.contiguous(),
        input.contiguous(),
        shape,
        mean.view(statistics_shape),
        rstd.view(statistics_shape),
        gamma,
        beta,
        list(wanted),
    )
    if wanted[1] and weight is not None and dgamma is not None:
        dgamma = dgamma.to(weight.dtype)
    if wanted[2] and bias is not None and dbeta is not None:
        dbeta = dbeta.to(bias.dtype)
    return dx if wanted[0] else None, dgamma if wanted[1] else None, dbeta if wanted[2] else None


def autocast_widens(input: Tensor) -> bool:
    """True where autocast has PyTorch's layer norm compute in float32, and give it: on GPUs, not on
    CPUs.
    """
    return input.device.type == "cuda" and input.dtype in _LOW and torch.is_autocast_enabled("cuda")


def has_mixed_dtypes(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """True where an affine vector is of another dtype than the input, which PyTorch's CUDA kernels
    refuse.
    """
    return any(v is not None and v.dtype != input.dtype for v in (weight, bias))


def in_float32(
    input: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All three in float32."""
    return (
        input.float(),
        None if weight is None else weight.float(),
        None if bias is None else bias.float(),
    )


def _in_one_dtype(
    input: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The affine vectors as PyTorch's CPU kernels take them, both in one dtype: forward refuses a
    mixed pair, and backward a float32 bias without a weight.
    """
    if bias is None or bias.dtype == (input if weight is None else weight).dtype:
        return weight, bias
    return (
        torch.ones(tuple(shape), dtype=torch.float32, device=input.device)
        if weight is None
        else weight.float()
    ), bias.float()
