"""The command line: parses, calls, prints."""

from __future__ import annotations

from lntune.cli import look, measure  # each registers its commands
from lntune.cli.base import app

__all__ = ["app", "look", "main", "measure"]


def main() -> None:
    """Entry point."""
    app()
