"""CUDA's own expf and tanhf where a definition has the polynomials of lntune/ops/activations.py,
which are meant for the vectors of CPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lntune.ops.activations import sigmoid, tanh


def with_cuda_functions(func: Any) -> Any:
    """The PrimFunc with CUDA's own functions for activations.

    expf and tanhf are as accurate in a third of the instructions, and __fdividef, whose error is
    below two units in the last place, spares the slow path of a division; a denominator it flushes
    to 0 is one of a sigmoid below 1e-37. An expression is recognized as an activation by comparing
    it with the activation of the one tensor element that stands in it.
    """
    import tvm_ffi
    from tvm import tirx

    def call(name: str, *values: Any) -> Any:
        return tirx.call_pure_extern("float32", name, *values)

    one, zero = tirx.const(1.0, "float32"), tirx.const(0.0, "float32")
    known: dict[Any, tuple[Any, Any]] = {
        tirx.Div: (sigmoid, lambda x: call("__fdividef", one, one + call("expf", zero - x))),
        tirx.Select: (tanh, lambda x: call("tanhf", x)),
    }

    def replaced(value: Any, mutator: Any) -> Any:
        definition, cuda_function = known[type(value)]
        x = _only_load(value)
        return (
            cuda_function(x)
            if x is not None and _is_activation(definition, value, x)
            else mutator.default_mutate(value)
        )

    return tvm_ffi.structural_mutate(func, [(kind, replaced) for kind in known])


@functools.cache
def _model(definition: Callable[[Any], Any]) -> tuple[Any, Any, list[Any]]:
    """(a variable, the activation of it simplified, other forms of it seen so far): simplifying
    takes longest of all about a definition.
    """
    import tvm

    x = tvm.ir.Var("x", "float32")
    return x, tvm.sym.Analyzer().simplify(definition(x)), []


def _is_activation(definition: Callable[[Any], Any], value: Any, load: Any) -> bool:
    """Whether an expression is an activation, which are of float32, of the one tensor element that
    it loads.
    """
    import tvm
    import tvm_ffi

    x, expected, seen = _model(definition)
    if str(load.ty) != str(x.ty):
        return False
    form = tvm_ffi.structural_map(value, [(tvm.ir.TensorLoad, lambda _: x)])
    if any(tvm_ffi.structural_equal(form, other) for other in seen):
        return True
    if not tvm_ffi.structural_equal(tvm.sym.Analyzer().simplify(form), expected):
        return False
    seen.append(form)
    return True


def _only_load(value: Any) -> Any:
    """The tensor element that an expression loads, however often, or None where it loads
    several.
    """
    import tvm
    import tvm_ffi

    loads: list[Any] = []

    def collect(load: Any) -> None:
        if not any(tvm_ffi.structural_equal(load, other) for other in loads):
            loads.append(load)

    tvm_ffi.structural_walk(value, [(tvm.ir.TensorLoad, collect)])
    return loads[0] if len(loads) == 1 else None
