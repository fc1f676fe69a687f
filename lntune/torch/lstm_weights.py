"""Loading the weights of other LSTMs into a LayerNormLSTM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lntune.errors import InputError, got_expected
from lntune.torch.lstm import LayerNormLSTM


def from_lstm(lstm: nn.LSTM, **options: Any) -> LayerNormLSTM:
    """`LayerNormLSTM.from_lstm`."""
    return LayerNormLSTM.from_lstm(lstm, **options)


def load_custom_lstm(module: LayerNormLSTM, state_dict: Mapping[str, Tensor]) -> LayerNormLSTM:
    """Load, in place, the weights of a script_lnlstm of PyTorch's
    benchmarks/fastrnns/custom_lstms.py, and return the module.

    That LSTM has layers.{k}.cell.* or, bidirectional, layers.{k}.directions.{0,1}.cell.*, the same
    gate order, normalizes all gates together, carries the normalized cell and has no b, which is
    set to 0. Its eps is nn.LayerNorm's 1e-5 and not in the state_dict (0 where it was made with
    decompose_layernorm=True).

    Args:
        module: of the same sizes, layers and directions, with carried=True, norm_bias=True,
            per_gate=False and forget_bias=0.
        state_dict: what the script module's state_dict() returned.

    Raises:
        InputError: an option of the module that cannot give the same results; a key that is
            missing, unexpected or of another shape. Nothing is loaded then.
    """
    if not isinstance(module, LayerNormLSTM):
        raise InputError(got_expected("module", type(module).__name__, "a LayerNormLSTM"))
    for option, needed in (
        ("carried", True),
        ("norm_bias", True),
        ("per_gate", False),
        ("forget_bias", 0.0),
    ):
        if (got := getattr(module, option)) != needed:
            raise InputError(
                got_expected(
                    f"module.{option}",
                    got,
                    str(needed),
                    f"Make the module with {option}={needed}: that LSTM is so.",
                )
            )
    parameters: dict[str, nn.Parameter] = {}
    for k, suffix in module.suffixes():
        cell = (
            f"layers.{k}.directions.{int(suffix.endswith('_reverse'))}.cell."
            if module.bidirectional
            else f"layers.{k}.cell."
        )
        parameters |= {
            cell + name: getattr(module, name + suffix) for name in ("weight_ih", "weight_hh")
        }
        for theirs, ours in (
            ("layernorm_i", "ln_ih"),
            ("layernorm_h", "ln_hh"),
            ("layernorm_c", "ln_c"),
        ):
            parameters |= {
                f"{cell}{theirs}.{part}": getattr(module, f"{ours}_{part}{suffix}")
                for part in ("weight", "bias")
            }
    for key, p in parameters.items():
        if key not in state_dict:
            raise InputError(
                got_expected(
                    "state_dict",
                    f"no {key}",
                    f"one of shape {tuple(p.shape)}",
                    "Check num_layers and bidirectional.",
                )
            )
        if tuple(state_dict[key].shape) != tuple(p.shape):
            raise InputError(
                got_expected(
                    f"state_dict[{key!r}]",
                    f"shape {tuple(state_dict[key].shape)}",
                    f"shape {tuple(p.shape)}",
                )
            )
    for key in state_dict:
        if key not in parameters:
            raise InputError(
                got_expected(
                    "state_dict", key, "no such key", "Check num_layers and bidirectional."
                )
            )
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(state_dict[key])
        if module.bias:
            for _, suffix in module.suffixes():
                getattr(module, "bias" + suffix).zero_()
    return module


__all__ = ["from_lstm", "load_custom_lstm"]
