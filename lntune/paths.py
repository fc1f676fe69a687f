"""Where things lie: schedules, tuning logs, built kernels.

`schedules/` and `tuning_logs/` are content the engine reads by path. In a wheel they sit in `lntune/_bundled/`, in a
checkout beside the package; a user's own folders come on top and are searched first.
"""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

PACKAGE = Path(__file__).resolve().parent


def is_checkout() -> bool:
    """True when the package runs from a source tree (its content folders lie beside it)."""
    return not (PACKAGE / "_bundled").is_dir() and (PACKAGE.parent / "schedules").is_dir()


def content(name: str) -> Path:
    """The shipped folder `name` ("schedules" or "tuning_logs"): bundled first, then beside the package.

    Bundled first, so that a stranger's `site-packages/schedules` is never picked up by an installed lntune.
    """
    bundled = PACKAGE / "_bundled" / name
    return bundled if bundled.is_dir() else PACKAGE.parent / name


def _distinct(folders: list[Path]) -> list[Path]:
    """The folders without those that are another one's second name; the first stays."""
    found: dict[Path, Path] = {}
    for folder in folders:
        found.setdefault(folder.resolve(), folder)
    return list(found.values())


def schedule_dirs() -> list[Path]:
    """Folders searched for schedule files, the user's first (`LNTUNE_SCHEDULES`, separated like PATH)."""
    extra = [Path(p).expanduser() for p in os.environ.get("LNTUNE_SCHEDULES", "").split(os.pathsep) if p]
    return _distinct([*extra, content("schedules")])


def log_dir() -> Path:
    """Where new measurements are written: `LNTUNE_LOG_DIR`, a checkout's own folder, or the user's data folder."""
    if env := os.environ.get("LNTUNE_LOG_DIR"):
        return Path(env).expanduser()
    if is_checkout():
        return content("tuning_logs")
    return platformdirs.user_data_path("lntune") / "tuning_logs"


def log_dirs() -> list[Path]:
    """Folders read for measurements: the one written to, then the shipped one."""
    return _distinct([log_dir(), content("tuning_logs")])


def cache_dir() -> Path:
    """Where built kernels are kept: `LNTUNE_CACHE_DIR` or the user's cache folder. Safe to delete at any time."""
    if env := os.environ.get("LNTUNE_CACHE_DIR"):
        return Path(env).expanduser()
    return platformdirs.user_cache_path("lntune")
