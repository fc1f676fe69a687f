"""Element types in expressions of TVM's tensor language (TE): widening to float32, and sums of
several values at once.
"""

from __future__ import annotations

from typing import Any


def widen(value: Any) -> Any:
    """A float16, bfloat16 or float32 expression as float32.

    bfloat16 is the upper half of a float32, and is written so. A plain cast means the same but is
    miscompiled: inside a reduction of several values TVM's bfloat16 legalization converts the bits
    as if they were an integer.
    """
    from tvm import tirx

    if str(value.dtype) != "bfloat16":
        return value.astype("float32")
    bits = tirx.reinterpret("uint16", value).astype("uint32")
    return tirx.reinterpret("float32", bits << tirx.const(16, "uint32"))


def sum_of(count: int) -> Any:
    """A TE reducer that adds `count` float32 values at once: te.sum over tuples, in one loop."""
    from tvm import te, tirx

    def add(one: Any, other: Any) -> Any:
        """Elementwise sum; TE passes tuples when one reduction carries several values, plain
        expressions for one.
        """
        return tuple(a + b for a, b in zip(one, other, strict=True)) if count > 1 else one + other

    def zero(*dtypes: str) -> Any:
        return (
            tuple(tirx.const(0.0, d) for d in dtypes) if count > 1 else tirx.const(0.0, dtypes[0])
        )

    return te.comm_reducer(add, zero, name="add")
