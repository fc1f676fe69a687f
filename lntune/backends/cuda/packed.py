"""A stored kernel packed for launcher.c: its arguments, scratch memory and launches as one table of
numbers.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lntune.errors import BuildError
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.backends.cuda.device_code import Binary

MAX_ARGUMENTS, MAX_SCRATCH, MAX_LAUNCHES, MAX_PARAMETERS, MAX_DIMS, MAX_STACK = 32, 8, 8, 48, 4, 16
"""As in launcher.c."""
_ROWS = -1
_CONSTANT, _ROWS_HERE = 0, 1
_OPERATORS: dict[type[ast.operator], int] = {
    ast.Add: 2,
    ast.Sub: 3,
    ast.Mult: 4,
    ast.FloorDiv: 5,
    ast.Mod: 6,
}
_STRIDE = 7
_ARGUMENT, _SCRATCH, _NUMBER = 0, 1, 2
_DTYPES = {
    "float32": (2, 32),
    "float64": (2, 64),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "int32": (0, 32),
    "int64": (0, 64),
}
"""DLPack's code and bits."""
_SCALARS = ("float32", "float64", "int32", "int64")


def codes(expression: str, strides: Mapping[str, int]) -> list[int]:
    """A size in `rows`, such as those of Launch, as launcher.c evaluates it: postfix, operands
    before their operator. `strides` is from the names of row strides to the numbers of the
    arguments that have them.

    Raises:
        BuildError: it is not made of rows, strides, whole numbers and + - * // % alone, or too
            deep.
    """

    def walk(node: ast.expr, depth: int) -> list[int]:
        if depth >= MAX_STACK:
            raise BuildError(f"a launch's size is nested too deeply: {expression}")
        if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 2**63:
            return [_CONSTANT, node.value]
        if isinstance(node, ast.Name) and node.id == "rows":
            return [_ROWS_HERE]
        if isinstance(node, ast.Name) and node.id in strides:
            return [_STRIDE, strides[node.id]]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return [_CONSTANT, 0, *walk(node.operand, depth + 1), _OPERATORS[ast.Sub]]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return [
                *walk(node.left, depth),
                *walk(node.right, depth + 1),
                _OPERATORS[type(node.op)],
            ]
        raise BuildError(f"a launch's size is of a form that is not known: {expression}")

    try:
        return walk(ast.parse(expression, mode="eval").body, 0)
    except SyntaxError as e:
        raise BuildError(f"a launch's size is of a form that is not known: {expression}") from e


class _Pool:
    """The expressions of a program, each once."""

    def __init__(self, strides: Mapping[str, int]) -> None:
        self.words: list[int] = []
        self._at: dict[str, int] = {}
        self._strides = strides

    def offset(self, expression: str) -> int:
        """Offset of an expression in `words`: the number of its words, then these."""
        if expression not in self._at:
            self._at[expression] = len(self.words)
            words = codes(expression, self._strides)
            self.words += [len(words), *words]
        return self._at[expression]


def pack(binary: Binary) -> tuple[list[int], bytes]:
    """The table, and the names in the order launcher.c takes them (title, arguments, kernels), each
    ended by a zero byte.

    Raises:
        BuildError: the kernel is of a form the launcher does not know.
    """
    pool = _Pool({a.stride: i for i, a in enumerate(binary.arguments) if a.stride})
    sources = {a.name: (_ARGUMENT, i) for i, a in enumerate(binary.arguments)}
    sources |= {s.name: (_SCRATCH, i) for i, s in enumerate(binary.scratch)}
    counts = (
        (len(binary.arguments), MAX_ARGUMENTS, "arguments"),
        (len(binary.scratch), MAX_SCRATCH, "scratch buffers"),
    )
    for got, most, what in (*counts, (len(binary.launches), MAX_LAUNCHES, "kernels")):
        if got > most:
            raise BuildError(f"{binary.title}: {got} {what}; the launcher takes {most}.")
    arguments: list[int] = []
    for a in binary.arguments:
        known = (
            a.dtype in (_SCALARS if a.role == "scalar" else _DTYPES) and len(a.shape) <= MAX_DIMS
        )
        if not known or (a.stride and a.shape[:1] != ("rows",)):
            form = f"{a.role}, {a.dtype}, {counted(len(a.shape), 'dimension')}"
            raise BuildError(
                f"{binary.title}: argument {a.name} is of a form the launcher does not know"
                f" ({form})."
            )
        dims = [_ROWS if size == "rows" else int(size) for size in a.shape]
        arguments += [
            int(a.role == "scalar"),
            int(bool(a.stride)),
            *_DTYPES[a.dtype],
            binary.alignment(a),
            len(dims),
            *dims,
            *[0] * (MAX_DIMS - len(dims)),
        ]
    if not any("rows" in a.shape for a in binary.arguments):
        raise BuildError(f"{binary.title}: no argument has rows.")
    scratch = [
        word
        for s in binary.scratch
        for word in (s.bytes_of_one, pool.offset(" * ".join(f"({n})" for n in s.shape) or "1"))
    ]
    launches: list[int] = []
    parameters: list[int] = []
    for launch in binary.launches:
        if len(launch.arguments) > MAX_PARAMETERS:
            takes = counted(len(launch.arguments), "parameter")
            raise BuildError(
                f"{binary.title}: {launch.kernel} takes {takes}; the launcher passes"
                f" {MAX_PARAMETERS}."
            )
        most_shared = max(
            other.shared for other in binary.launches if other.kernel == launch.kernel
        )
        grid = [pool.offset(size) for size in launch.grid]
        launches += [
            len(parameters) // 2,
            len(launch.arguments),
            *grid,
            *launch.block,
            launch.shared,
            most_shared,
            int(launch.waits),
        ]
        for name in launch.arguments:
            parameters += sources.get(name) or (_NUMBER, pool.offset(name))
    head = [len(binary.arguments), len(binary.scratch), len(binary.launches), len(parameters) // 2]
    names = [
        binary.title,
        *(a.name for a in binary.arguments),
        *(launch.kernel for launch in binary.launches),
    ]
    return [*head, *arguments, *scratch, *launches, *parameters, *pool.words], b"".join(
        name.encode() + b"\0" for name in names
    )
