"""The operators as PyTorch functions and modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lntune.case import Case


def _layer_norm(case: Case, given: dict[str, Any]) -> Callable[[], Any]:
    from lntune.torch.layer_norm import layer_norm

    x, weight, bias, eps, shape = (
        given["x"],
        given.get("weight"),
        given.get("bias"),
        given["eps"],
        (case.hidden,),
    )
    return lambda: layer_norm(x, shape, weight, bias, eps)


def _layer_norm_backward(case: Case, given: dict[str, Any]) -> Callable[[], Any]:
    from lntune.torch.layer_norm_backward import layer_norm_backward

    dy, x, mean, rstd, weight, shape = (
        given["dy"],
        given["x"],
        given["mean"],
        given["rstd"],
        given["weight"],
        (case.hidden,),
    )
    return lambda: layer_norm_backward(dy, x, shape, mean, rstd, weight, weight)


def _lnlstm_step(case: Case, given: dict[str, Any]) -> Callable[[], Any]:
    from lntune.torch.lnlstm import lnlstm_step

    names = ("gates_x", "gates_h", "c", "weight_x", "weight_h", "weight_c", "bias", "bias_c")
    values: tuple[Any, ...] = (
        *(given.get(name) for name in names),
        given["eps"],
        "carried" in case.variant,
    )
    return lambda: lnlstm_step(*values)


def _lnlstm_step_backward(case: Case, given: dict[str, Any]) -> Callable[[], Any]:
    from lntune.ops.lnlstm_step import TENSORS, statistics, tokens_of
    from lntune.torch.lnlstm_backward import accumulate

    tokens = tokens_of(case)
    tensors = {name: given[name] for name in TENSORS if name in given}
    stats = tuple(given[name] for name in statistics(tokens))
    sums = {name: given[name] for name in given if name.startswith(("dweight", "dbias"))}
    dh, dc_new, carried = given["dh"], given["dc_new"], "carried" in tokens
    return lambda: accumulate(dh, dc_new, tensors, stats, carried, sums)


CALLS: dict[str, Callable[[Case, dict[str, Any]], Callable[[], Any]]] = {
    "layer_norm": _layer_norm,
    "layer_norm_backward": _layer_norm_backward,
    "lnlstm_step": _lnlstm_step,
    "lnlstm_step_backward": _lnlstm_step_backward,
}
"""Operator -> the public call bound to named inputs: what a benchmark times."""
