"""The module: a drop-in for torch.nn.LayerNorm."""

from __future__ import annotations

from torch import Tensor, nn

from lntune.torch.layer_norm import layer_norm
from lntune.torch.registration import register_with_quantization


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on tuned kernels: the same arguments, parameters, initialization and
    state_dict.

    A subclass, so `isinstance(m, nn.LayerNorm)` and everything built on it (weight-decay groups,
    initializers, sharding policies) go on working.
    """

    def forward(self, input: Tensor) -> Tensor:  # (..., *normalized_shape)
        """See lntune.layer_norm."""
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


register_with_quantization(LayerNorm, nn.LayerNorm)


__all__ = ["LayerNorm"]
