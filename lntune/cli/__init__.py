"""The command line: parses, calls, prints."""

from __future__ import annotations

from lntune.cli import bringup, look, measure  # each registers its commands
from lntune.cli.base import app

__all__ = ["app", "bringup", "look", "main", "measure"]


def main() -> None:
    """Entry point."""
    app()
