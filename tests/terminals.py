"""A terminal of 80 columns, on which a command prints."""

from __future__ import annotations

import io
import sys

import pytest

from lntune.cli import app


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, *arguments: object, stderr: Terminal | None = None
) -> str:
    """What a command prints where standard output is a terminal of 80 columns, and standard error
    where one is given.
    """
    screen = Terminal()
    with monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "dumb")
        patch.setattr(sys, "stdout", screen)
        if stderr is not None:
            patch.setattr(sys, "stderr", stderr)
        app([str(a) for a in arguments], standalone_mode=False)
    return screen.getvalue()
