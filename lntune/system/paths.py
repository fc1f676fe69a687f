"""The folders of schedules, tuning logs and built kernels.

`schedules/` and `tuning_logs/` are content that is read by path. In a wheel they sit in
`lntune/_bundled/`, in a checkout beside the package; a user's own folders are searched first.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

from lntune.errors import InputError, StoreError, got_expected
from lntune.system import callers, scratch, trust

PACKAGE = Path(__file__).resolve().parent.parent


class CacheWarning(UserWarning):
    """Kernels are kept elsewhere than in the cache."""


def is_checkout() -> bool:
    """True when the package runs from a source tree (its content folders lie beside it)."""
    return not (PACKAGE / "_bundled").is_dir() and (PACKAGE.parent / "schedules").is_dir()


def content(name: str) -> Path:
    """The shipped folder `name` ("schedules" or "tuning_logs"): bundled, else beside the package.

    Bundled first, so that an installed lntune never picks up a stranger's
    `site-packages/schedules`.
    """
    bundled = PACKAGE / "_bundled" / name
    return bundled if bundled.is_dir() else PACKAGE.parent / name


def _distinct(folders: list[Path]) -> list[Path]:
    """The folders without those that are another one's second name; the first stays."""
    distinct: dict[Path, Path] = {}
    for folder in folders:
        distinct.setdefault(folder.resolve(), folder)
    return list(distinct.values())


def schedule_dirs() -> list[Path]:
    """Folders searched for schedule files, the user's first (`LNTUNE_SCHEDULES`, separated like
    PATH); they need not be there.
    """
    extra = [expanded(p) for p in os.environ.get("LNTUNE_SCHEDULES", "").split(os.pathsep) if p]
    return _distinct([*extra, content("schedules")])


def expanded(value: str) -> Path:
    """A path of the environment's with the home folder in the place of `~`; as it stands, which is
    nothing, where the user has none.
    """
    try:
        return Path(value).expanduser()
    except RuntimeError:
        return Path(value)


def _named(variable: str, value: str) -> Path:
    """The folder that a variable of the environment names.

    Raises:
        InputError: it is in a home folder, and there is none.
    """
    try:
        return Path(value).expanduser()
    except RuntimeError as e:
        expected = "a folder that exists; the user has no home folder"
        remedy = "Set HOME, or give the whole path."
        raise InputError(got_expected(variable, value, expected, remedy)) from e


def _users(kind: Callable[..., Path]) -> Path | None:
    """One of the user's folders as platformdirs knows them; None where there is neither HOME nor an
    account, as in containers.
    """
    try:
        folder = kind("lntune")
    except RuntimeError:
        return None
    # "~/.cache" as it stands, by older releases of platformdirs
    return folder if folder.is_absolute() else None


def log_dir() -> Path:
    """Where new measurements are written: `LNTUNE_LOG_DIR`, a checkout's own folder, or the user's
    data folder; where there is no home, or it is not the user's, the user's private temporary
    folder.

    Raises:
        InputError: `LNTUNE_LOG_DIR` is in a home folder, and there is none.
    """
    if env := os.environ.get("LNTUNE_LOG_DIR"):
        return _named("LNTUNE_LOG_DIR", env)
    if is_checkout():
        return content("tuning_logs")
    data = _users(platformdirs.user_data_path)
    return (data if data and (_exists(data) or _writable(data)) else private()) / "tuning_logs"


def log_dirs() -> list[Path]:
    """Folders read for measurements: the one written to, and the shipped one, unless
    `LNTUNE_SHIPPED_LOGS` is 0.
    """
    shipped = os.environ.get("LNTUNE_SHIPPED_LOGS", "") != "0"
    written = log_dir()
    if why := log_doubt(written):
        _warn_once(why, why, trust.TrustWarning)
    return _distinct([written, *([content("tuning_logs")] if shipped else [])])


def log_doubt(folder: Path) -> str:
    """Who else can write to a folder of tuning logs, what that means and what to do about it; empty
    where nobody can. Such records are read all the same: they hold no code, and kernels that they
    choose are checked.
    """
    doubt = trust.doubt_folder(folder) if _exists(folder) else None
    if doubt is None:
        return ""
    remedy = doubt.remedy(folder, "LNTUNE_LOG_DIR")
    return f"others can choose slower kernels by records in {folder}: {doubt.reason}. {remedy}"


def cache_dir() -> Path:
    """Where built kernels are kept: `LNTUNE_CACHE_DIR` or the user's cache folder; where there is
    no home, the user's private temporary folder. Safe to delete at any time.
    """
    if env := os.environ.get("LNTUNE_CACHE_DIR"):
        with contextlib.suppress(InputError):
            return _named("LNTUNE_CACHE_DIR", env)
        return private(f"LNTUNE_CACHE_DIR={env} is in a home folder, which the user does not have")
    return _users(platformdirs.user_cache_path) or private("the user has no home folder")


def cached(*parts: str) -> Path:
    """Where a built file lies, or is to be put: in the cache; in the user's private temporary
    folder where others can write to the cache (see `trust`), since what is built is loaded, or
    where the cache has it not and is a default that cannot be written (a container's read-only
    file system, a home that is another's).

    Raises:
        StoreError: others can write to the temporary folder, too.
    """
    path = cache_dir().joinpath(*parts)
    if doubt := trust.doubt_file(path):
        why = f"the cache {cache_dir()} is not used, since what others put there would run as you"
        remedy = doubt.remedy(cache_dir(), "LNTUNE_CACHE_DIR")
        folder = private()
        message = f"{why}: {doubt.reason}; kernels are kept in {folder}. {remedy}"
        _warn_once(why, message, CacheWarning)  # once, however many files it is true of
        return folder.joinpath(*parts)
    if os.environ.get("LNTUNE_CACHE_DIR") or _exists(path) or _writable(path.parent):
        return path
    return private(f"the cache {cache_dir()} cannot be written").joinpath(*parts)


def _exists(path: Path) -> bool:
    """True where there is a file or folder that this user may know of."""
    try:
        return path.exists()
    except PermissionError:  # another's home
        return False


def _writable(folder: Path) -> bool:
    """True where files can be made in a folder, or the folder itself can."""
    nearest = next((f for f in (folder, *folder.parents) if _exists(f)), folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def private(why: str = "") -> Path:
    """A folder below the system's temporary one that is this user's alone, the same for all of the
    user's processes. With a reason, it is said once why kernels are there.

    Raises:
        StoreError: others can write to all temporary folders.
    """
    folder = _private(scratch.system())
    if why:
        remedy = "Set LNTUNE_CACHE_DIR to a folder that lasts."
        _warn_once(why, f"{why}; kernels are kept in {folder}. {remedy}", CacheWarning)
    return folder


_said: dict[str, object] = {}


def _warn_once(identity: str, message: str, category: type[Warning]) -> None:
    """Warn of something; not again of what has the same identity, whichever threads come to it at
    the same moment.
    """
    mine = object()
    if _said.setdefault(identity, mine) is mine:
        try:
            callers.warn(message, category)
        except Warning:  # an error, as the user has it: so is the next
            del _said[identity]
            raise


@functools.cache
def _private(temporary: str) -> Path:
    """Code is run out of it, so a folder that another user made or can replace is not taken."""
    folder = Path(temporary) / f"lntune-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if hasattr(os, "getuid"):
        status = folder.lstat()
        own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if not own or status.st_mode & 0o077:
            folder = Path(tempfile.mkdtemp(prefix="lntune-"))
    if doubt := trust.doubt_folder(folder):
        remedy = doubt.remedy(Path(temporary), "LNTUNE_CACHE_DIR")
        raise StoreError(f"no folder can be made that is yours alone: {doubt.reason}. {remedy}")
    return folder
