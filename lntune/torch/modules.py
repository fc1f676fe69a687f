"""Modules: the drop-in for torch.nn.LayerNorm and the conversion of models."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from lntune.torch.layer_norm import layer_norm
from lntune.torch.standing import for_quantization

Model = TypeVar("Model", bound=nn.Module)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on tuned kernels: the same arguments, parameters, initialization and state_dict.

    A subclass, so `isinstance(m, nn.LayerNorm)` and everything built on it (weight-decay groups, initializers, sharding
    policies) go on working.
    """

    def forward(self, input: Tensor) -> Tensor:  # (..., *normalized_shape)
        """See lntune.layer_norm."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


for_quantization(LayerNorm, nn.LayerNorm)


def convert(model: Model) -> Model:
    """Replace every torch.nn.LayerNorm in the model, in place, by lntune.LayerNorm, and return the model.

    Parameters, buffers, hooks, training flags, devices, dtypes and sharing stay what they are: it is the module's class
    that changes. Modules of a subclass of nn.LayerNorm are left alone, since their forward is their own. A model that is
    itself an nn.LayerNorm is converted too; converting twice changes nothing.
    """
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
    return model


__all__ = ["LayerNorm", "convert"]
