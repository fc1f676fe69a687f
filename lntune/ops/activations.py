"""exp, sigmoid and tanh of float32 expressions of TVM's tensor language (TE), in arithmetic that
vectorizes.

LLVM has no vector exp of its own: calls to libm, one element at a time, would cost more than the
rest of a kernel. The polynomials are those of expf and tanhf in the Cephes library (S. L. Moshier),
within two units in the last place of the result where it is not below 1e-38. NaN stays NaN.

An argument stands many times in the expression made of it, so it should be an element of a stage
and no formula: LLVM finds what is equal again, TVM's own passes walk over all of it. (tirx.Let
would say it once; TVM 0.27 fails to vectorize a Let in a loop that was partitioned.)
"""

from __future__ import annotations

from typing import Any

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_TANH = (
    -5.70498872745e-3,
    2.06390887954e-2,
    -5.37397155531e-2,
    1.33314422036e-1,
    -3.33332819422e-1,
)
_ROUNDING = 1.5 * 2.0**23
"""Added to a small float32 it leaves the nearest integer in the lowest bits: rounding that needs no
conversion, which has no meaning for NaN."""
_LARGEST, _SMALLEST = 88.0, -87.0
"""exp beyond these is outside the normal range of float32."""
_POLYNOMIAL = 0.625
"""|x| below which tanh is the polynomial: 1 - 2 / (exp(2 x) + 1) would lose the digits of a small
x.
"""


def _f32(value: float) -> Any:
    from tvm import tirx

    return tirx.const(value, "float32")


def _horner(coefficients: tuple[float, ...], x: Any) -> Any:
    value = _f32(coefficients[0])
    for c in coefficients[1:]:
        value = value * x + _f32(c)
    return value


def exp(x: Any) -> Any:
    """e to the x, x cut to -87 .. 88."""
    from tvm import tirx

    # One instruction each, written so that NaN, which compares false, stays.
    x = tirx.Select(x < _f32(_SMALLEST), _f32(_SMALLEST), x)
    x = tirx.Select(x > _f32(_LARGEST), _f32(_LARGEST), x)
    # Through the bits and back, because TVM simplifies (rounded - _ROUNDING) to what is to be
    # rounded. They hold n below those of _ROUNDING, which the shift into the exponent's place
    # pushes out.
    bits = tirx.reinterpret("int32", x * _f32(_LOG2E) + _f32(_ROUNDING))
    n = tirx.reinterpret("float32", bits) - _f32(_ROUNDING)
    power = tirx.reinterpret(
        "float32", (bits + tirx.const(127, "int32")) << tirx.const(23, "int32")
    )
    r = x - n * _f32(_LN2_HIGH) - n * _f32(_LN2_LOW)
    return (_horner(_EXP, r) * (r * r) + r + _f32(1.0)) * power


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _f32(1.0) / (_f32(1.0) + exp(_f32(0.0) - x))


def tanh(x: Any) -> Any:
    """The hyperbolic tangent, to the last digits of small x, too."""
    from tvm import tirx

    z = x * x
    small = _horner(_TANH, z) * z * x + x
    large = _f32(1.0) - _f32(2.0) / (exp(x + x) + _f32(1.0))
    return tirx.Select(tirx.all(x < _f32(_POLYNOMIAL), x > _f32(-_POLYNOMIAL)), small, large)
