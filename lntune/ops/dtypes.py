"""Element types in expressions of TVM's tensor language (TE): widening to float32, and sums of
several values at once.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def widen_pair(pair: Any) -> tuple[Any, Any]:
    """Two bfloat16 that lie side by side, taken as one uint32, as two float32.

    The lower half of a pair on a little-endian machine is its first element. Each takes one
    operation, a shift or a mask, and no element changes its lane, where widening a vector of
    bfloat16 has to spread it over two.
    """
    from tvm import tirx

    upper = tirx.const(_UPPER, "uint32")
    return (
        tirx.reinterpret("float32", pair << tirx.const(16, "uint32")),
        tirx.reinterpret("float32", pair & upper),
    )


def round_pair(first: Any, second: Any, any_nan: bool = False) -> Any:
    """Two float32 rounded to bfloat16, to the nearest and of two as near to the even one, side by
    side as one uint32: what `widen_pair` takes apart.

    `any_nan`: they may be NaNs other than those that arithmetic makes of bfloat16, whose lower bits
    are zeros; one with all bits set would be rounded to a number.
    """
    from tvm import tirx

    def bits(value: int) -> Any:
        return tirx.const(value, "uint32")

    def rounded(value: Any) -> Any:
        whole = tirx.reinterpret("uint32", value)
        up = whole + (((whole >> bits(16)) & bits(1)) + bits(0x7FFF))
        return tirx.Select(tirx.isnan(value), bits(_NAN), up) if any_nan else up

    return (rounded(second) & bits(_UPPER)) | (rounded(first) >> bits(16))


def paired_placeholder(arg: Any, sizes: Mapping[str, Any], pairs: bool) -> Any:
    """The placeholder of an argument of the `sizes` that its axes have in columns; with `pairs` a
    column is two elements side by side, in bfloat16 as one uint32.
    """
    from tvm import te

    shape = [sizes[axis] for axis in arg.shape]
    if pairs and arg.dtype == "bfloat16":
        return te.placeholder(shape, "uint32", name=arg.name)
    if pairs and arg.shape[-1:] == ("hidden",):
        shape[-1] = shape[-1] * 2
    return te.placeholder(shape, arg.dtype, name=arg.name)


def element(values: Any, at: tuple[Any, ...], number: int, pairs: bool) -> Any:
    """An element of what a `paired_placeholder` stands for, in float32: with `pairs` the first or
    the second of a column.
    """
    if not pairs:
        return widen(values[at])
    if str(values.dtype) == "uint32":
        return widen_pair(values[at])[number]
    return values[(*at[:-1], at[-1] * 2 + number)]


_UPPER, _NAN = 0xFFFF0000, 0x7FC00000


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
