"""Warnings that point at the line of a user's program that led to them, through whatever of lntune
and PyTorch lies between.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from lntune.words import visible_lines

_HERE = f"{Path(__file__).resolve().parent.parent}{os.sep}"


class Place(NamedTuple):
    """A line of a program. `registry` is where Python notes what was warned of there."""

    file: str
    line: int
    module: str
    registry: dict[str | tuple[str, type[Warning], int], int]


def _not_the_users() -> tuple[str, ...]:
    """How the names of files begin whose lines are not the user's: ours, PyTorch's, those of code
    that PyTorch generates, and where Python enters and leaves the block of a `with`.
    """
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    libraries = (_HERE, *([f"{Path(torch).parent}{os.sep}"] if torch else []))
    return (*libraries, contextlib.__file__, "<eval_with_key>", "<frozen ")


def place() -> Place:
    """The innermost line on the stack that is neither lntune's nor PyTorch's; the outermost of all
    where there is none.
    """
    frame: FrameType | None = sys._getframe(1)
    others = _not_the_users()
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(others) or frame.f_back is None:
            module = str(frame.f_globals.get("__name__", "<unknown>"))
            registry = frame.f_globals.setdefault("__warningregistry__", {})
            return Place(name, frame.f_lineno, module, registry)
        frame = frame.f_back
    raise AssertionError("a function is called by something")


def warn(message: str, category: type[Warning], at: Place | None = None) -> None:
    """Warn of something at the caller's line, or at another. Strangers' words that are in it do
    nothing to a terminal.
    """
    file, line, module, registry = at or place()
    warnings.warn_explicit(visible_lines(message), category, file, line, module, registry)


def action(message: str, category: type[Warning], at: Place) -> str:
    """What the user's filters have done with a warning: "ignore", "error", "default" and so on."""
    for response, text, kind, module, line in warnings.filters:
        words_fit = issubclass(category, kind) and _fits(text, message)
        if words_fit and _fits(module, at.module) and line in (0, at.line):
            return str(response)
    return "default"


def _fits(pattern: object, text: str) -> bool:
    """A filter's pattern, which is None, a compiled expression, or among those that Python begins
    with a plain text.
    """
    if pattern is None or isinstance(pattern, str):
        return pattern in (None, text)
    return bool(pattern.match(text))  # type: ignore[attr-defined]
