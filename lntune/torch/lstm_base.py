"""What the modules of LSTMs with layer normalization have in common: options, parameters, and the
checks of their arguments.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lntune.errors import InputError, got_expected
from lntune.torch.argument_checks import check_like, checked_count, checked_flag, checked_number

_DEFAULTS: dict[str, Any] = {
    "norm_bias": True,
    "carried": False,
    "per_gate": False,
    "forget_bias": 0.0,
    "eps": 1e-5,
}


class LayerNormRNNBase(nn.Module):
    """Options, parameters and checks of the cell and of the layers."""

    def __init__(self, input_size: int, hidden_size: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.input_size, self.hidden_size = (
            checked_count("input_size", input_size),
            checked_count("hidden_size", hidden_size),
        )
        self.norm_bias, self.carried, self.per_gate = (
            checked_flag(name, options[name]) for name in ("norm_bias", "carried", "per_gate")
        )
        self.forget_bias = checked_number(
            "forget_bias", options["forget_bias"], -math.inf, math.inf, "a finite number"
        )
        self.eps = checked_number("eps", options["eps"], -math.inf, math.inf, "a finite number")

    def _add(self, suffix: str, input_size: int, bias: bool, device: Any, dtype: Any) -> None:
        """Register the parameters of one layer and direction; those the options leave out are
        None.
        """
        hidden, norm_bias = self.hidden_size, self.norm_bias
        for name, shape, exists in (
            ("weight_ih", (4 * hidden, input_size), True),
            ("weight_hh", (4 * hidden, hidden), True),
            ("bias", (4 * hidden,), bias),
            ("ln_ih_weight", (4 * hidden,), True),
            ("ln_ih_bias", (4 * hidden,), norm_bias),
            ("ln_hh_weight", (4 * hidden,), True),
            ("ln_hh_bias", (4 * hidden,), norm_bias),
            ("ln_c_weight", (hidden,), True),
            ("ln_c_bias", (hidden,), norm_bias),
        ):
            self.register_parameter(
                name + suffix,
                nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if exists else None,
            )

    def reset_parameters(self) -> None:
        """Matrices and b uniform within 1 / sqrt(hidden_size), as in torch.nn.LSTM; gains 1; biases
        of the layer norms 0.
        """
        bound = 1 / math.sqrt(self.hidden_size)
        for name, p in self.named_parameters():
            if not name.startswith("ln_"):
                nn.init.uniform_(p, -bound, bound)
            elif "_weight" in name:
                nn.init.ones_(p)
            else:
                nn.init.zeros_(p)

    def _shared(self, *biases: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to z at every step, summed once."""
        terms = [b for b in biases if b is not None]
        if self.forget_bias:
            hidden = self.hidden_size
            forget = torch.full((hidden,), self.forget_bias, device=like.device, dtype=like.dtype)
            terms.append(functional.pad(forget, (hidden, 2 * hidden)))
        return sum(terms[1:], terms[0]) if terms else None

    def _check_input(self, input: Any, name: str, dims: tuple[int, ...], like: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise InputError(got_expected(name, type(input).__name__, "a torch.Tensor"))
        if input.dim() not in dims:
            raise InputError(
                got_expected(
                    name, f"shape {tuple(input.shape)}", f"{' or '.join(map(str, dims))} dimensions"
                )
            )
        if input.shape[-1] != self.input_size:
            raise InputError(
                got_expected(
                    name,
                    f"shape {tuple(input.shape)}",
                    f"a last dimension of input_size {self.input_size}",
                )
            )
        check_like(name, input, like)

    def _state(self, hx: Any, shape: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
        """The initial (h, c), zeros without one; in the parameters' dtype, which autocast leaves
        the state in.
        """
        if hx is None:
            zeros = torch.zeros(shape, device=like.device, dtype=like.dtype)
            return zeros, zeros
        if (
            not isinstance(hx, (tuple, list))
            or len(hx) != 2  # noqa: PLR2004 (h and c)
            or not all(isinstance(s, Tensor) for s in hx)
        ):
            raise InputError(got_expected("hx", type(hx).__name__, "a pair of tensors (h_0, c_0)"))
        for name, state in zip(("hx[0]", "hx[1]"), hx, strict=True):
            if tuple(state.shape) != shape:
                raise InputError(
                    got_expected(name, f"shape {tuple(state.shape)}", f"shape {shape}")
                )
            check_like(name, state, like)
        return hx[0].to(like.dtype), hx[1].to(like.dtype)

    def _kept_whole(self, input: Any, hx: Any) -> Any:
        """A call of the module in a graph of torch.fx, which keeps torch.nn.LSTM whole too.

        Raises:
            InputError: the module is the root of the graph, which has no name to be called by.
        """
        tracer = input.tracer
        if getattr(tracer, "root", None) is self:
            remedy = (
                "Trace a module that has it, such as"
                f" torch.nn.Sequential({type(self).__name__}(...))."
            )
            raise InputError(
                got_expected(
                    "root",
                    f"a {type(self).__name__}",
                    "a module that torch.fx can look into",
                    remedy,
                )
            )
        return tracer.create_proxy(
            "call_module", tracer.path_of_module(self), (input,) if hx is None else (input, hx), {}
        )

    def _repr(self, **values: tuple[Any, Any]) -> str:
        options = {name: (getattr(self, name), default) for name, default in _DEFAULTS.items()}
        changed = [
            f"{name}={value}"
            for name, (value, default) in {**values, **options}.items()
            if value != default
        ]
        return ", ".join([str(self.input_size), str(self.hidden_size), *changed])
