"""lntune.LayerNorm, the module that takes the place of torch.nn.LayerNorm."""

from __future__ import annotations

from torch import Tensor, nn

from lntune.torch.layer_norm import layer_norm
from lntune.torch.registration import register_with_quantization


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on tuned kernels: the same arguments, parameters, initialization and
    state_dict (Ba, Kiros, Hinton 2016, arXiv:1607.06450, eqs. 3-4).

    A subclass, so `isinstance(m, nn.LayerNorm)` and everything built on it (weight-decay groups,
    initializers, sharding policies) go on working.
    """

    def forward(self, input: Tensor) -> Tensor:
        """lntune.layer_norm of an input of shape (..., *normalized_shape), with the module's
        parameters; shaped as the input, in its dtype.

        Raises:
            InputError, NotTunedError: as lntune.layer_norm.
        """
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


register_with_quantization(LayerNorm, nn.LayerNorm)


__all__ = ["LayerNorm"]
