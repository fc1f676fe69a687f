"""Build hook: puts schedules/ and tuning_logs/ into the wheel as lntune/_bundled/.

Not into an editable install, whose copy would go stale beside the checkout; and file by file,
because a folder included as a whole brings along the lock files and editors' leftovers that lie in
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("schedules", "tuning_logs")
SUFFIXES = (".py", ".jsonl", ".md")


class BundleHook(BuildHookInterface[Any]):
    """Names the content files of a standard wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files to `build_data["force_include"]`, source path -> path in the wheel."""
        if version != "standard":
            return
        root = Path(self.root)
        for folder in FOLDERS:
            for path in sorted((root / folder).rglob("*")):
                if path.is_file() and path.suffix in SUFFIXES:
                    build_data["force_include"][str(path)] = (
                        f"lntune/_bundled/{path.relative_to(root).as_posix()}"
                    )
