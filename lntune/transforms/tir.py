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


def loop_with(loop: Any, body: Any) -> Any:
    """A For loop with another body."""
    return type(loop)(
        loop.loop_var,
        loop.min,
        loop.extent,
        loop.kind,
        body,
        loop.thread_binding,
        dict(loop.annotations),
    )


def block_with(block: Any, **changed: Any) -> Any:
    """An SBlock with other values of the fields named."""
    return type(block)(*(changed.get(name, getattr(block, name)) for name in _BLOCK_FIELDS))


def module_with(module: Any, body: Any) -> Any:
    """An IRModule of the function `main` alone, with another body."""
    import tvm

    return tvm.IRModule({"main": module["main"].with_body(body)})


def scope(buffer: Any) -> str:
    """The memory that a buffer is in: "global", "local" (registers), "shared.dyn"."""
    return str(buffer.scope())
