"""Widening of element types in TE expressions."""

from __future__ import annotations

from typing import Any


def widen(value: Any) -> Any:
    """A float16, bfloat16 or float32 expression as float32.

    bfloat16 is the upper half of a float32, and is written so. A plain cast means the same but is miscompiled: inside a
    reduction of several values TVM's bfloat16 legalization converts the bits as if they were an integer.
    """
    from tvm import tirx

    if str(value.dtype) != "bfloat16":
        return value.astype("float32")
    bits = tirx.reinterpret("uint16", value).astype("uint32")
    return tirx.reinterpret("float32", bits << tirx.const(16, "uint32"))
