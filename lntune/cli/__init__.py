"""The command line: parses, calls, prints."""

from __future__ import annotations

import gc
import os

from lntune.cli import (  # each registers its commands
    bench,
    bringup,
    compare,
    exchange,
    logs,
    look,
    measure,
    report,
    search,
    ship,
)
from lntune.cli.base import app

__all__ = [
    "app",
    "bench",
    "bringup",
    "compare",
    "exchange",
    "logs",
    "look",
    "main",
    "measure",
    "report",
    "search",
    "ship",
]


def main() -> None:
    """Entry point."""
    os.environ.pop("LNTUNE_RECORD_CASES", None)  # a user's program is meant, not what we call
    # Imports make hundreds of thousands of objects; looks for garbage among them take a fifth of
    # the time.
    gc.set_threshold(100_000, 20, 20)
    app()
