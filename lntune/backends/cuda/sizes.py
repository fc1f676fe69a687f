"""Sizes that depend on the number of rows, as Python expressions: of a grid, of memory, of loops
over rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lntune.errors import BuildError

_INDEX = ("blockIdx", "threadIdx")


def number(expression: str, rows: int, strides: Mapping[str, int] | None = None) -> int:
    """The value of an expression; `strides` are row strides in elements, by the names that
    expressions have for them.
    """
    # expressions come from `text` alone
    return int(eval(expression, {"__builtins__": {}}, {"rows": rows, **(strides or {})}))


def text(expression: Any, known: Collection[str], bound: Mapping[str, Any]) -> str:
    """A size as a Python expression. `known` are the numbers that a call brings, such as rows;
    `bound` are values that have been given names.

    Raises:
        BuildError: it is not of the kinds that sizes have.
    """
    from tvm import tirx

    # sizes are not negative, for which floored and truncated division are the same
    operators = {
        tirx.Add: "+",
        tirx.Sub: "-",
        tirx.Mul: "*",
        tirx.FloorDiv: "//",
        tirx.Div: "//",
        tirx.FloorMod: "%",
        tirx.Mod: "%",
        tirx.RShift: ">>",
    }
    if isinstance(expression, tirx.IntImm):
        return str(int(expression))
    if isinstance(expression, tirx.Var) and expression.name in known:
        return str(expression.name)
    if isinstance(expression, tirx.Var) and expression.name in bound:
        return text(bound[expression.name], known, bound)
    if isinstance(expression, tirx.Cast):
        return text(expression.value, known, bound)
    if type(expression) in operators:
        left, right = (text(side, known, bound) for side in (expression.a, expression.b))
        return f"({left} {operators[type(expression)]} {right})"
    raise BuildError(f"a launch's size is of a form that is not known: {expression}")


def of_loops(kernel: Any, known: Collection[str], bound: Mapping[str, Any]) -> tuple[str, ...]:
    """How often the first block of a kernel, a lowered PrimFunc, goes round each of its loops whose
    ends depend on the number of rows; those that are of an unknown form are left out. `known` and
    `bound` are as in text.
    """
    import tvm_ffi
    from tvm import tirx

    zero, named, loops = tirx.IntImm("int64", 0), dict(bound), list[Any]()

    def bind(statement: Any) -> None:
        named[str(statement.var.name)] = statement.value

    def index(var: Any) -> None:
        if str(var.name).startswith(_INDEX):
            named[str(var.name)] = zero

    tvm_ffi.structural_walk(
        kernel.body,
        [(tirx.Bind, bind), (tirx.Var, index), (tirx.For, lambda loop: loops.append(loop.extent))],
    )
    found = []
    for extent in loops:
        try:
            size = text(extent, known, named)
        except BuildError:
            continue
        if "rows" in size:
            found.append(size)
    return tuple(dict.fromkeys(found))
