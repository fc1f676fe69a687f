"""sigmoid and tanh of float32 in definitions: TVM's own operators, each a single call to its
passes. Each kind of device makes something of its own of them: transforms/cpu/polynomials.py,
transforms/gpu/cuda_math.py.
"""

from __future__ import annotations

from typing import Any


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    from tvm import tirx

    return tirx.sigmoid(x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent, to the last digits of small x, too."""
    from tvm import tirx

    return tirx.tanh(x)
