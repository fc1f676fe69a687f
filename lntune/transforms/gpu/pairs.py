"""bfloat16 widened in pairs: two of them lie in one register, and each is one operation away from
float32, a shift or a mask.

A bfloat16 is the upper half of a float32. Taken one by one nvcc first cuts the second of a pair out
of its register and then moves it back up, two operations in place of one; widening is a third of
what a kernel in low precision computes.
"""

from __future__ import annotations

from typing import Any

from lntune.transforms import tir

FIRST, SECOND = "lntune_first", "lntune_second"
"""What CUDA source calls with a pair's address: macros, see SOURCE."""
_HALF = 16
"""Bits of a bfloat16, which is the upper half of a float32."""
SOURCE = f"""#define {FIRST}(pair) __uint_as_float(*(const unsigned int*)(pair) << 16)
#define {SECOND}(pair) __uint_as_float(*(const unsigned int*)(pair) & 0xffff0000u)
"""


def widened_in_pairs(func: Any) -> Any:
    """The PrimFunc with every bfloat16 of a thread's arrays that is widened taken from its pair,
    where its index is known: loops over registers are to be unrolled, expressions simplified.
    """
    import tvm
    import tvm_ffi

    def widened(call: Any, mutator: Any) -> Any:
        load = _load(call)
        if load is None:
            return mutator.default_mutate(call)
        return _from_pair(load)

    return func.with_body(tvm_ffi.structural_mutate(func.body, [(tvm.ir.Call, widened)]))


def _load(call: Any) -> Any:
    """The element of a thread's array that a call widens, where it is of a pair; else None. Written
    as in ops/dtypes.py: reinterpret(float32, uint32(reinterpret(uint16, element)) << 16).
    """
    import tvm
    from tvm import tirx
    from tvm.ir.prim.expr import LShift

    def of_reinterpret(value: Any, dtype: str) -> Any:
        name = str(getattr(getattr(value, "op", None), "name", ""))
        return value.args[0] if name == "tirx.reinterpret" and str(value.ty) == dtype else None

    shifted = of_reinterpret(call, "float32")
    upper = isinstance(shifted, LShift) and isinstance(shifted.a, tirx.Cast)
    value = of_reinterpret(shifted.a.value, "uint16") if upper else None
    fits = (
        isinstance(value, tvm.ir.TensorLoad)
        and int(shifted.b) == _HALF
        and str(value.source.dtype) == "bfloat16"
        and tir.scope(value.source) == "local"
        and len(value.indices) == len(value.source.shape) == 1
        and isinstance(value.indices[0], tirx.IntImm)
        and int(value.source.shape[0]) % 2 == 0
    )
    return value if fits else None


def _from_pair(load: Any) -> Any:
    """The element widened from the pair that it is of."""
    from tvm import tirx

    index = int(load.indices[0])
    pair = tirx.BufferLoad(load.source, [tirx.IntImm(load.indices[0].ty, index - index % 2)])
    return tirx.call_pure_extern("float32", SECOND if index % 2 else FIRST, tirx.address_of(pair))
