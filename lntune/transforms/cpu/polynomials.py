"""What sigmoid and tanh are on CPUs: arithmetic that vectorizes.

LLVM has no vector exp of its own, and calls to libm, one element at a time, would cost more than
the rest of a kernel. The polynomials are those of expf and tanhf in the Cephes library (S. L.
Moshier), within two units in the last place of the result where it is not below 1e-38. NaN stays
NaN. They come last, before LLVM: TVM's passes walk over all of an expression, again and again.
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


def expanded(module: Any, once: bool = True) -> Any:
    """The IRModule, whose calls of both functions of float32 numbers, or vectors of them, are
    arithmetic. `once`: what stands in it several times is the value of a variable.

    A call in whose argument another stands is left to TVM: its analyzer puts the values of
    variables into those of others, which takes for ever where they are nested.
    """
    import tvm
    import tvm_ffi

    arithmetic = {"tirx.sigmoid": _sigmoid, "tirx.tanh": _tanh}

    def function_of(call: Any) -> Any:
        if not _type(call).startswith("float32"):
            return None
        return arithmetic.get(getattr(call.op, "name", ""))

    def replaced(call: Any, mutator: Any) -> Any:
        function = function_of(call)
        nested: list[Any] = []
        if function is not None:
            tvm_ffi.structural_walk(call.args[0], [(tvm.ir.Call, nested.append)])
        call = mutator.default_mutate(call)
        if function is None or any(function_of(inner) for inner in nested):
            return call
        held = _Held(once)
        return held.around(function(held(call.args[0]), held))

    functions = {
        name: func.with_body(tvm_ffi.structural_mutate(func.body, [(tvm.ir.Call, replaced)]))
        for name, func in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


class _Held:
    """Values that stand several times in an expression, as variables or written out."""

    def __init__(self, as_variables: bool) -> None:
        self._as_variables = as_variables
        self._values: list[tuple[Any, Any]] = []

    def __call__(self, value: Any) -> Any:
        """What stands for a value."""
        import tvm

        if not self._as_variables:
            return value
        variable = tvm.ir.Var(f"held_{len(self._values)}", _type(value))
        self._values.append((variable, value))
        return variable

    def around(self, expression: Any) -> Any:
        """An expression in which variables have their values."""
        from tvm import tirx

        for variable, value in reversed(self._values):
            expression = tirx.Let(variable, value, expression)
        return expression


def _type(value: Any) -> str:
    """The type of a number, or of a vector: "float32x16"."""
    return str(value.ty)


def _constant(value: float, like: Any) -> Any:
    from tvm import tirx

    return tirx.const(value, _type(like))


def _bits(dtype: str, value: Any) -> Any:
    """The bits of a number, or of each of a vector, as another type of 32."""
    from tvm import tirx

    lanes = _type(value).partition("x")[2]
    return tirx.reinterpret(f"{dtype}x{lanes}" if lanes else dtype, value)


def _horner(coefficients: tuple[float, ...], x: Any) -> Any:
    value = _constant(coefficients[0], x)
    for c in coefficients[1:]:
        value = value * x + _constant(c, x)
    return value


def _exp(x: Any, held: _Held) -> Any:
    """e to the x, x cut to -87 .. 88."""
    from tvm import tirx

    def f32(value: float) -> Any:
        return _constant(value, x)

    # One instruction each, written so that NaN, which compares false, stays.
    x = held(tirx.Select(x < f32(_SMALLEST), f32(_SMALLEST), x))
    x = held(tirx.Select(x > f32(_LARGEST), f32(_LARGEST), x))
    # Through the bits and back, because TVM simplifies (rounded - _ROUNDING) to what is to be
    # rounded. They hold n below those of _ROUNDING, which the shift into the exponent's place
    # pushes out.
    bits = held(_bits("int32", x * f32(_LOG2E) + f32(_ROUNDING)))
    n = held(_bits("float32", bits) - f32(_ROUNDING))
    power = _bits("float32", (bits + _constant(127, bits)) << _constant(23, bits))
    r = held(x - n * f32(_LN2_HIGH) - n * f32(_LN2_LOW))
    return (_horner(_EXP, r) * (r * r) + r + f32(1.0)) * power


def _sigmoid(x: Any, held: _Held) -> Any:
    one = _constant(1.0, x)
    return one / (one + _exp(held(_constant(0.0, x) - x), held))


def _tanh(x: Any, held: _Held) -> Any:
    from tvm import tirx

    z = held(x * x)
    small = _horner(_TANH, z) * z * x + x
    large = _constant(1.0, x) - _constant(2.0, x) / (_exp(held(x + x), held) + _constant(1.0, x))
    inside = tirx.all(x < _constant(_POLYNOMIAL, x), x > _constant(-_POLYNOMIAL, x))
    return tirx.Select(inside, small, large)
