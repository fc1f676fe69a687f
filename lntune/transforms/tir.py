"""Statements and modules of TVM's tensor IR with a part replaced: its nodes cannot be changed in
place, so each is built anew of the old one's fields.
"""

from __future__ import annotations

from typing import Any

_BLOCK_FIELDS = (
    "iter_vars",
    "reads",
    "writes",
    "name_hint",
    "body",
    "init",
    "alloc_buffers",
    "match_buffers",
    "annotations",
)
"""What an SBlock is built of, in the order of its constructor."""


def loop_with(loop: Any, body: Any, without: str = "") -> Any:
    """A For loop with another body, and `without` one of its annotations."""
    return type(loop)(
        loop.loop_var,
        loop.min,
        loop.extent,
        loop.kind,
        body,
        loop.thread_binding,
        {key: value for key, value in loop.annotations.items() if key != without},
    )


def block_with(block: Any, **changed: Any) -> Any:
    """An SBlock with other values of the fields named."""
    return type(block)(*(changed.get(name, getattr(block, name)) for name in _BLOCK_FIELDS))


def module_with(module: Any, body: Any) -> Any:
    """An IRModule of the function `main` alone, with another body."""
    import tvm

    return tvm.IRModule({"main": module["main"].with_body(body)})


def with_variables(statement: Any, replacements: dict[Any, Any]) -> Any:
    """The statement with variables (buffers among them) replaced."""
    import tvm
    import tvm_ffi

    return tvm_ffi.structural_map(statement, [(tvm.ir.Var, lambda v: replacements.get(v, v))])


def with_own_variables(statement: Any) -> Any:
    """A copy of a statement with loop variables and block axes of its own."""
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    own: dict[Any, Any] = {}

    def loop_of(loop: Any) -> None:
        own[loop.loop_var] = variable_like(loop.loop_var)

    def axes_of(block: Any) -> None:
        own.update({axis.var: variable_like(axis.var) for axis in block.iter_vars})

    tvm_ffi.structural_walk(statement, [(tirx.For, loop_of), (SBlock, axes_of)])
    return with_variables(statement, own)


def variable_like(var: Any, name: str = "") -> Any:
    """Another variable, or buffer, of the same type; of the same name where none is given."""
    import tvm

    return tvm.ir.Var(name or str(var.name), var.ty)


def scope(buffer: Any) -> str:
    """The memory that a buffer is in: "global", "local" (registers), "shared.dyn"."""
    return str(buffer.scope())


def rows(func: Any) -> Any:
    """The variable of a PrimFunc that is the number of rows."""
    from tvm import tirx

    return next(
        p.ty.shape[0]
        for p in func.params
        if hasattr(p.ty, "shape") and isinstance(p.ty.shape[0], tirx.Var)
    )
