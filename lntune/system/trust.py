"""Who besides the user can write a path. Shared objects, GPU code and Python files run as the user
who loads them, so what others can change or put in its place is not loaded.

The path's every folder counts, and that of every link on the way: who can write to one can put
something else in the place of what lies below. Write access is what owners have (a mode is theirs
to change), what the bits of group and others give, and access control lists, whose most shows in
the group's bits. Three kinds of writers do no harm:

- the user, root, and the owners of `/`, of Python and of lntune, who run code as the user already.
  A cache that an administrator made beside the Python that all use is thus used as it is.
- a group that is one user's alone: the user's own first group, of the user's name and without other
  members, as most Linux systems make it and why files there are writable for groups. A number alone
  says it only where user or group have no name, as in containers: elsewhere a group may have the
  number of a user by chance.
- whoever may make files in a sticky folder, such as /tmp: they cannot move another's. A sticky
  folder is passed through, but files in it are not trusted: anyone can add some.

`LNTUNE_TRUST` names folders (separated like PATH) that are trusted with all below them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import stat
import sys
from pathlib import Path
from typing import NamedTuple

VARIABLE = "LNTUNE_TRUST"
"""Environment variable that names the folders which are trusted whoever can write to them."""
_LINKS = 40
"""Links that Linux follows in one path."""
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_PLAIN_LIST = 4 + 3 * 8
"""Bytes of an access control list that says no more than a mode."""


class TrustWarning(UserWarning):
    """Others can write to a folder of tuning logs."""


class Doubt(NamedTuple):
    """Who else can write a path: `reason`, a sentence without its end; `place`, the path itself or
    a folder above; `who` can change its mode, empty for the user; `command`, what takes from others
    what they have there, without the place, empty where it is all another's.
    """

    reason: str
    place: Path
    who: str = ""
    command: str = ""

    def remedy(self, folder: Path, variable: str) -> str:
        """What to do about it, in a sentence. `folder` is what was to be used, which `variable`
        names.
        """
        first = f"Name a folder of your own with {variable}"
        if self.command:
            # what is in it was likely made in the same way
            inside = self.place.is_relative_to(os.path.realpath(folder))
            program, option = self.command.split()
            words = ("-R", option, folder) if inside else (option, self.place)
            run = shlex.join((program, *map(str, words)))
            first = f"Have {self.who} run {run}" if self.who else f"Run {run}"
        return f"{first}; where it is meant, set {VARIABLE}={shlex.quote(str(folder))}."


_closed: set[tuple[int, str]] = set()
"""Users and folders that nobody else can write to; asked once a process."""


def doubt_folder(folder: Path) -> Doubt | None:
    """Who else can change what a folder holds; None where nobody can, or the system does not say
    (Windows). A folder that is missing in a sticky one is made, before somebody else makes it.
    """
    if not hasattr(os, "geteuid"):
        return None
    key = os.geteuid(), os.fspath(folder)
    if key in _closed:
        return None
    if doubt := _walked(folder, making=True):
        return None if _named(folder) else doubt
    with contextlib.suppress(PermissionError):  # another's home
        if folder.is_absolute() and folder.is_dir():
            _closed.add(key)
    return None


def doubt_file(file: Path) -> Doubt | None:
    """Who else can change a file, put another in its place, or others beside it; None as of a
    folder. The file need not be there.
    """
    if doubt := doubt_folder(file.parent):
        return doubt
    if not hasattr(os, "geteuid"):
        return None
    try:
        status = file.lstat()
    except OSError:
        return None
    linked = stat.S_ISLNK(status.st_mode)
    doubt = _walked(file, making=False) if linked else _of(file, status, last=True)
    return None if doubt is None or _named(file) else doubt


def make(folder: Path) -> None:
    """Make a folder and those above it so that others cannot write to them, whatever the umask is;
    where `LNTUNE_TRUST` names it, as the umask has it, for those who share it.

    Raises:
        OSError: it cannot be made.
    """
    missing = [f for f in (folder, *folder.parents) if not f.is_dir()]
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):
            one.mkdir(mode=0o777 if _named(one) else 0o755)
    if not folder.is_dir():
        raise NotADirectoryError(20, os.strerror(20), str(folder))


def close(file: Path) -> None:
    """Take from others what the umask has given them of a new file; of one that is shared, see
    `make`, nothing is taken.
    """
    mode = file.stat().st_mode
    if mode & _WRITABLE and not _named(file):
        file.chmod(stat.S_IMODE(mode) & ~_WRITABLE)


def _named(path: Path) -> bool:
    """True where the user trusts a path, whoever can write it."""
    names = [n for n in os.environ.get(VARIABLE, "").split(os.pathsep) if n]
    if not names:
        return False
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(_at_home(name))) for name in names)


def _at_home(name: str) -> Path:
    """A path with the home folder in the place of `~`, as it stands where there is none."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _walked(path: Path, making: bool) -> Doubt | None:
    """The first doubt on the way from `/` to a path, links followed; one lstat a name. What cannot
    be looked at cannot be loaded either and is no doubt. `making`: as doubt_folder.
    """
    here, links = Path("/"), 0
    with contextlib.suppress(OSError):
        waiting = [*reversed(path.parts if path.is_absolute() else (Path.cwd() / path).parts)]
        while waiting:
            name = waiting.pop()
            if name == "..":
                here = here.parent
                continue
            place = here / name
            try:
                status = place.lstat()
            except FileNotFoundError:
                if not making or not _is_for_all(here.lstat().st_mode):
                    return None
                with contextlib.suppress(FileExistsError):
                    place.mkdir(mode=0o755)
                status = place.lstat()
            if doubt := _of(place, status, last=not waiting):
                return doubt
            if not stat.S_ISLNK(status.st_mode):
                here = place
            elif (links := links + 1) > _LINKS:
                return None
            else:
                waiting += reversed(place.readlink().parts)
    return None


def _is_for_all(mode: int) -> bool:
    """True for a folder in which others can make files and cannot move another's."""
    return bool(stat.S_ISDIR(mode) and mode & stat.S_ISVTX and mode & _WRITABLE)


def _of(place: Path, status: os.stat_result, last: bool) -> Doubt | None:
    """Who else can write what has a status; `last`: nothing of the path is below it."""
    owner, mode = status.st_uid, status.st_mode
    if owner not in _trusted(os.geteuid()) and (last or owner != _unmapped()):
        return Doubt(f"{place} belongs to {_user(owner)}", place)
    if stat.S_ISLNK(mode) or not mode & _WRITABLE:
        return None
    if _is_for_all(mode) and not last:
        return None
    listed = bool(mode & stat.S_IWGRP) and _has_list(place)
    groups = bool(mode & stat.S_IWGRP) and not _is_one_users(status.st_gid, os.geteuid())
    if mode & stat.S_IWOTH:
        writers, command = "every user", f"chmod {'go-w' if groups else 'o-w'}"
    elif listed:
        writers, command = "whom its access control list names", "setfacl -b"
    elif groups:
        writers, command = f"the group {_group(status.st_gid)}", "chmod g-w"
    else:
        return None
    who = "" if os.geteuid() in (0, owner) else _user(owner)
    return Doubt(f"{place} can be written by {writers}", place, who, command)


@functools.cache
def _trusted(user: int) -> frozenset[int]:
    """The user, root, and who runs code as the user already."""
    owners = {0, user}
    for path in ("/", sys.executable, __file__):
        with contextlib.suppress(OSError):
            owners.add(Path(path).stat().st_uid)
    return frozenset(owners - {_unmapped()} | {user})


@functools.cache
def _unmapped() -> int:
    """The owner whom files seem to have that are another's whom this container knows no number of,
    mostly root's: such a one is trusted with folders above, such as `/` and `/home`, though not
    with what is loaded. -1 where all users have numbers.
    """
    with contextlib.suppress(OSError, ValueError):
        if Path("/proc/self/uid_map").read_text().split() != ["0", "0", str(2**32 - 1)]:
            return int(Path("/proc/sys/kernel/overflowuid").read_text())
    return -1


@functools.cache
def _is_one_users(number: int, user: int) -> bool:
    """True where a group is one trusted user's alone."""
    import grp
    import pwd

    try:
        group = grp.getgrgid(number)
    except KeyError:
        return number in _trusted(user)
    for owner in _trusted(user):
        try:
            account = pwd.getpwuid(owner)
        except KeyError:
            if owner == number:
                return not group.gr_mem
            continue
        own = account.pw_gid == number and (number == 0 or group.gr_name == account.pw_name)
        if own and set(group.gr_mem) <= {account.pw_name}:
            return True
    return False


def _has_list(place: Path) -> bool:
    """True where an access control list gives rights to more than owner, group and others."""
    try:
        return len(os.getxattr(place, "system.posix_acl_access")) > _PLAIN_LIST
    except (AttributeError, OSError):  # none, or a system that does not say
        return False


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"the user {number}"


def _group(number: int) -> str:
    import grp

    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)
