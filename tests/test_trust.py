"""Nothing runs that others wrote: who can write to a folder is known, and what they could have
written is not loaded.
"""

from __future__ import annotations

import grp
import importlib.util
import os
import pwd
import py_compile
import stat
import struct
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lntune
from lntune import device, schedule
from lntune.case import Case
from lntune.commands import build, doctor
from lntune.commands.doctor import cpu, folders, gpu, packages
from lntune.errors import ScheduleError, StoreError
from lntune.kernels import verdicts
from lntune.schedule import ScheduleWarning, files
from lntune.system import native, paths, sealed, toolchain, trust
from lntune.system.trust import doubt_file, doubt_folder
from lntune.torch.untuned import UntunedWarning

STRANGER = 54321
GROUP = 43210
Give = Callable[..., None]
IS_ONE_USERS, TRUSTED = trust._is_one_users, trust._trusted


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing was asked or said yet, nothing is trusted by name, and all groups but one are the
    user's own.
    """
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.setattr(trust, "_is_one_users", lambda number, user: number != GROUP)
    forget()
    yield
    forget()


def forget() -> None:
    """What a new process has."""
    trust._closed.clear()
    paths._said.clear()
    for function in (IS_ONE_USERS, TRUSTED, paths._private):
        function.cache_clear()


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Give:
    """`give(path, owner, group)` makes a file another's; who is not root is told so by lstat."""
    if os.geteuid() == 0:
        return lambda path, owner=-1, group=-1: os.chown(path, owner, group, follow_symlinks=False)
    given: dict[str, dict[int, int]] = {}
    lstat = Path.lstat

    def told(path: Path) -> os.stat_result:
        fields = list(lstat(path))
        for index, value in given.get(str(path), {}).items():
            fields[index] = value
        return os.stat_result(fields)

    def note(path: Path, owner: int = -1, group: int = -1) -> None:
        named = {stat.ST_UID: owner, stat.ST_GID: group}
        given[str(path)] = {index: value for index, value in named.items() if value >= 0}

    monkeypatch.setattr(Path, "lstat", told)
    return note


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Three folders, one in the other, and a file in the last."""
    places = [tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/c", tmp_path / "a/b/c/x.so"]
    for folder in places[:3]:
        folder.mkdir(mode=0o755)
        folder.chmod(0o755)
    places[3].touch()
    places[3].chmod(0o644)
    return places


def reason(path: Path) -> str:
    """What is said of a file, and whether it can be mended."""
    forget()
    doubt = doubt_file(path)
    return doubt.reason if doubt else ""


def test_what_is_the_users_alone(chain: list[Path], give: Give) -> None:
    """The user's own files and root's are trusted, read-only ones and links too; so are those that
    are not there yet, in folders that are not there yet.
    """
    *above, file = chain
    assert reason(file) == ""
    for path in chain:
        give(path, 0)
    assert reason(file) == ""
    for path in chain:
        path.chmod(path.stat().st_mode & 0o555)
    assert reason(file) == reason(above[0] / "not" / "there") == ""
    for path in above:
        path.chmod(0o755)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    ("mode", "said"),
    [(0o777, "every user"), (0o757, "every user"), (0o775, f"the group {GROUP}")],
    ids=lambda value: oct(value) if isinstance(value, int) else "",
)
def test_what_others_can_write(
    place: int, mode: int, said: str, chain: list[Path], give: Give
) -> None:
    """Write access for all or for a group anywhere on the way is said, with where, whose, and the
    command that takes it away, which does.
    """
    path = chain[place]
    give(path, group=GROUP)
    path.chmod(mode)
    assert reason(chain[3]) == f"{path} can be written by {said}"
    doubt = doubt_file(chain[3])
    assert doubt is not None
    remedy = doubt.remedy(chain[1], "LNTUNE_CACHE_DIR")
    assert remedy.endswith(f"; where it is meant, set LNTUNE_TRUST={chain[1]}.")
    assert (" -R " in remedy and f" {chain[1]};" in remedy) if place else f" {path};" in remedy
    assert os.system(remedy.partition(";")[0].removeprefix("Run ")) == 0
    assert doubt_file(chain[3]) is None  # a doubt is not remembered


@pytest.mark.parametrize("place", range(4))
def test_what_is_anothers(place: int, chain: list[Path], give: Give) -> None:
    """Whose a folder, or a file, is can change it whatever its mode."""
    chain[place].chmod(0o555)
    give(chain[place], STRANGER)
    assert reason(chain[3]) == f"{chain[place]} belongs to the user {STRANGER}"
    doubt = doubt_file(chain[3])
    assert doubt is not None
    remedy = doubt.remedy(chain[1], "LNTUNE_CACHE_DIR")
    assert remedy.startswith("Name a folder of your own with LNTUNE_CACHE_DIR; where it is meant")


def test_a_command_for_who_can_run_it(chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode is its owner's to change."""
    monkeypatch.setattr(trust, "_trusted", lambda user: {user, os.getuid()})
    chain[0].chmod(0o777)
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    doubt = doubt_file(chain[3])
    owner = trust._user(os.getuid())
    assert doubt is not None
    remedy = doubt.remedy(chain[1], "LNTUNE_CACHE_DIR")
    assert remedy.startswith(f"Have {owner} run chmod o-w {chain[0]};")


def test_who_runs_code_as_the_user_already(
    chain: list[Path], give: Give, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who owns the Python that runs may own a cache beside it: an administrator who is not root."""
    for path in chain:
        give(path, STRANGER)
    assert f"{STRANGER}" in reason(chain[3])
    python_of_a_stranger(tmp_path, monkeypatch)
    assert reason(chain[3]) == ""


def python_of_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the Python that runs seem a stranger's."""
    python = tmp_path / "python"
    real = Path.stat
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(
        Path,
        "stat",
        lambda p, **k: SimpleNamespace(st_uid=STRANGER) if p == python else real(p, **k),
    )


def test_sticky_folders(chain: list[Path], give: Give) -> None:
    """In a folder such as /tmp others cannot move what is mine, and what is theirs is not taken;
    files in such a folder itself are not trusted, as anyone can add some.
    """
    for place in (0, 1):
        chain[place].chmod(0o1777)
    assert reason(chain[3]) == ""
    chain[2].chmod(0o1777)
    assert reason(chain[3]) == f"{chain[2]} can be written by every user"
    chain[2].chmod(0o755)
    give(chain[2], STRANGER)
    assert "belongs to" in reason(chain[3])


def test_a_missing_folder_is_made_before_others_do(chain: list[Path]) -> None:
    """Where all users may make a folder the user's is made at once, closed whatever the umask;
    elsewhere looking changes nothing.
    """
    before = os.umask(0)
    try:
        assert doubt_file(chain[0] / "new" / "x.so") is None
        assert not (chain[0] / "new").exists()
        chain[0].chmod(0o1777)
        assert doubt_file(chain[0] / "new" / "deep" / "x.so") is None
    finally:
        os.umask(before)
    assert (chain[0] / "new").stat().st_mode & 0o777 == 0o755
    assert not (chain[0] / "new" / "deep").exists()


def test_links(chain: list[Path], tmp_path: Path, give: Give) -> None:
    """Both the way to a link and the way that it shows count, for links of folders and of files,
    whole and relative ones, and through `..`; links in a circle are looked at no further.
    """
    open_ = tmp_path / "open"
    open_.mkdir()
    inner = open_ / "inner"
    inner.mkdir(mode=0o755)
    (inner / "x.so").touch(mode=0o644)
    inside, outside = tmp_path / "inside", open_ / "outside"
    inside.symlink_to("open/inner")
    outside.symlink_to(chain[2])
    back = chain[2] / ".." / ".." / ".." / "open" / "inner" / "x.so"
    linked = chain[2] / "linked.so"
    linked.symlink_to(inner / "x.so")
    ways = [inside / "x.so", outside / "x.so", back, linked]
    assert [reason(way) for way in ways] == [""] * 4
    open_.chmod(0o777)
    assert [reason(way) for way in ways] == [f"{open_} can be written by every user"] * 4
    open_.chmod(0o1777)
    assert [reason(way) for way in ways] == [""] * 4
    give(outside, STRANGER)  # a link of theirs, in /tmp
    assert reason(outside / "x.so") == f"{outside} belongs to the user {STRANGER}"
    (chain[2] / "round").symlink_to("round")
    assert reason(chain[2] / "round" / "x.so") == reason(chain[2] / "round") == ""


def test_relative_paths(chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is that of the working directory at the moment."""
    monkeypatch.chdir(chain[1])
    assert reason(Path("c/x.so")) == ""
    other = chain[0] / "other"
    (other / "c").mkdir(parents=True)
    (other / "c").chmod(0o777)
    monkeypatch.chdir(other)
    assert doubt_file(Path("c/x.so")) is not None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([0o700, 0o755, 0o775, 0o777, 0o1755, 0o1777]), min_size=1, max_size=6)
)
def test_below_an_open_folder_nothing_is_trusted(modes: list[int]) -> None:
    """Whatever the modes on the way, what lies below a folder that all users can write to and that
    is not sticky is not trusted; and if no folder is one, and the last not open at all, it is.
    """
    trust._closed.clear()
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        made = []
        for number, mode in enumerate(modes):
            folder /= str(number)
            folder.mkdir()
            folder.chmod(mode)
            made.append(folder)
        (folder / "x.so").touch(mode=0o644)
        opened = [m for m in modes if m == 0o777]
        assert (doubt_file(folder / "x.so") is not None) == bool(opened or modes[-1] == 0o1777)
        if opened:
            assert doubt_folder(folder) is not None
            assert doubt_folder(folder / "new") is not None


@pytest.mark.parametrize(
    ("number", "accounts", "groups", "alone"),
    [
        (1000, {1000: ("ann", 1000)}, {1000: ("ann", [])}, True),
        (1000, {1000: ("ann", 1000)}, {1000: ("ann", ["ann"])}, True),
        (1000, {1000: ("ann", 1000)}, {1000: ("ann", ["bob"])}, False),
        (1007, {1000: ("ann", 1007)}, {1007: ("ann", [])}, True),  # not every number is free
        (1000, {1000: ("ann", 1000)}, {1000: ("physics", [])}, False),  # by chance
        (100, {1000: ("ann", 100)}, {100: ("users", [])}, False),  # all users' first group
        (1007, {1000: ("ann", 100)}, {1007: ("ann", [])}, False),
        (0, {0: ("root", 0)}, {0: ("root", [])}, True),
        (0, {0: ("root", 0)}, {0: ("wheel", ["root"])}, True),
        (0, {0: ("root", 0)}, {0: ("wheel", ["root", "bob"])}, False),
        (1000, {}, {}, True),  # a container's user, who is but a number
        (1000, {}, {1000: ("ann", ["bob"])}, False),
        (1001, {}, {}, False),
    ],
)
def test_a_group_that_is_one_users(
    number: int,
    accounts: dict[int, tuple[str, int]],
    groups: dict[int, tuple[str, list[str]]],
    alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A user's own group, by name, is as good as the user, unless it has other members."""
    monkeypatch.setattr(trust, "_trusted", lambda user: {0, user})
    monkeypatch.setattr(
        pwd, "getpwuid", lambda n: SimpleNamespace(pw_name=accounts[n][0], pw_gid=accounts[n][1])
    )
    monkeypatch.setattr(
        grp, "getgrgid", lambda n: SimpleNamespace(gr_name=groups[n][0], gr_mem=groups[n][1])
    )
    assert IS_ONE_USERS(number, 1000) is alone


@pytest.mark.parametrize("named", [True, False])
def test_access_control_lists(
    named: bool, chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that lets another user write is seen, also where the group is the user's own; one that
    says what the mode says is none.
    """
    none = 2**32 - 1
    entries = [(1, 7, none), (4, 7, none), (32, 5, none)]
    if named:
        entries[1:1] = [(2, 7, STRANGER)]
        entries[-1:-1] = [(16, 7, none)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    chain[1].chmod(0o775)
    monkeypatch.setattr(os, "getxattr", lambda path, name: value)
    doubt = doubt_file(chain[3])
    if named:
        assert doubt is not None
        remedy = doubt.remedy(chain[1], "LNTUNE_CACHE_DIR")
        assert remedy.startswith(f"Run setfacl -R -b {chain[1]};")
        assert doubt.reason == f"{chain[1]} can be written by whom its access control list names"
    else:
        assert doubt is None


def test_a_container_that_knows_no_root(
    chain: list[Path], give: Give, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where root's folders seem nobody's, and so does its Python, they are passed through; what is
    loaded is somebody's.
    """
    monkeypatch.setattr(trust, "_unmapped", lambda: STRANGER)
    python_of_a_stranger(tmp_path, monkeypatch)
    for folder in chain[:2]:
        give(folder, STRANGER)
    assert reason(chain[3]) == ""
    give(chain[2], STRANGER)
    assert reason(chain[3]) == f"{chain[2]} belongs to the user {STRANGER}"


def test_what_the_user_trusts_by_name(
    chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LNTUNE_TRUST is a list of folders, under any of their names, with all below them, and nothing
    beside or above.
    """
    for folder in chain[:3]:
        folder.chmod(0o777)
    (tmp_path / "link").symlink_to(chain[1])
    monkeypatch.setenv("HOME", str(chain[0]))
    for value, trusted in {
        str(chain[0]): True,
        f"/nowhere{os.pathsep}{tmp_path / 'link'}": True,
        "~/b": True,
        "1": False,
        os.pathsep: False,
        str(chain[3].parent / "d"): False,
        str(tmp_path / "a" / "b" / "c")[:-1]: True,  # b/
        f"{chain[1]}/cc": False,
    }.items():
        monkeypatch.setenv(trust.VARIABLE, value)
        assert (doubt_file(chain[3]) is None) is trusted, value
    monkeypatch.setenv(trust.VARIABLE, str(chain[2]))
    assert doubt_folder(chain[2]) is None and doubt_folder(chain[1]) is not None


def test_a_system_that_does_not_say(chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files have no owners, as on Windows, everything is trusted."""
    chain[0].chmod(0o777)
    monkeypatch.delattr(os, "geteuid")
    assert doubt_file(chain[3]) is None and doubt_folder(chain[2]) is None


def test_it_is_quick(chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """One lstat a name, and for the next file of a folder one in all."""
    looked = []
    lstat = Path.lstat
    monkeypatch.setattr(Path, "lstat", lambda p: looked.append(p) or lstat(p))  # type: ignore[func-returns-value]
    assert doubt_file(chain[3]) is None
    assert sorted(looked) == sorted({chain[3], *chain[3].parents})
    looked.clear()
    assert doubt_file(chain[2] / "y.so") is None
    assert looked == [chain[2] / "y.so"]


# --- the cache


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is the user's alone, and a temporary folder in the place of /tmp."""
    temporary, folder = tmp_path / "temporary", tmp_path / "cache"
    for one in (temporary, folder):
        one.mkdir(mode=0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("LNTUNE_CACHE_DIR", str(folder))
    return folder


def test_a_cache_that_others_can_write_is_left_alone(cached: Path, tmp_path: Path) -> None:
    """What is in it is neither loaded nor changed: files are kept in a private folder, which is
    said once with who, where and what to do; when that is done the cache is used again.
    """
    private = tmp_path / "temporary" / f"lntune-{os.getuid()}"
    cached.chmod(0o777)
    with pytest.warns(paths.CacheWarning) as caught:
        for name in ("x.so", "y.so"):
            assert paths.cached("kernels", name) == private / "kernels" / name
    assert [str(w.message) for w in caught] == [
        f"the cache {cached} is not used, since what others put there would run as you:"
        f" {cached} can be written by every user; kernels are kept in {private}."
        f" Run chmod -R o-w {cached}; where it is meant, set LNTUNE_TRUST={cached}."
    ]
    assert caught[0].filename == __file__
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    cached.chmod(0o755)
    assert paths.cached("kernels", "x.so") == cached / "kernels" / "x.so"


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [False, True])
def test_threads_whose_first_calls_come_at_once(
    trusted: bool, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an open cache threads that come at the same moment warn once, of one that is trusted not
    at all; all have the same place, and the kernel is built once and right.
    """
    cached.chmod(0o777)
    if trusted:
        monkeypatch.setenv(trust.VARIABLE, str(cached))
    lntune.reload()
    x, count = torch.randn(4, 40), 8
    together, places, results = threading.Barrier(count), [], []

    def first_call() -> None:
        together.wait()
        places.append(paths.cached("kernels", "x.so"))
        results.append(lntune.layer_norm(x, (40,)))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            threads = [threading.Thread(target=first_call) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len([w for w in caught if w.category is paths.CacheWarning]) == (not trusted)
    where = cached if trusted else tmp_path / "temporary" / f"lntune-{os.getuid()}"
    assert set(places) == {where / "kernels" / "x.so"}
    assert len(results) == count
    for y in results:
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (40,)))
    assert len([*where.rglob("kernels/layer_norm/*.so")]) == 1
    lntune.reload()


def test_the_default_cache_is_asked_too(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that others can write are built elsewhere, which is said once for all of them, with
    what mends them all.
    """
    monkeypatch.delenv("LNTUNE_CACHE_DIR")
    monkeypatch.setattr(paths.platformdirs, "user_cache_path", lambda name: cached / name)
    file = paths.cached("kernels", "x.so")
    assert file == cached / "lntune" / "kernels" / "x.so"
    file.parent.mkdir(parents=True)
    other = file.with_name("y.so")
    for one in (file, other):
        one.touch(mode=0o644)
        assert paths.cached("kernels", one.name) == one
        one.chmod(0o666)
    with pytest.warns(paths.CacheWarning, match=f"{file} can be written by every user") as caught:
        for name in ("x.so", "y.so"):
            assert paths.cached("kernels", name).is_relative_to(tmp_path / "temporary")
    assert len(caught) == 1
    assert f". Run chmod -R o-w {cached / 'lntune'};" in str(caught[0].message)


def test_a_cache_that_is_shared_on_purpose(
    cached: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """A team's folder that is trusted by name is used without a word, and what is added to it can
    be written by the team.
    """
    cached.chmod(0o777)
    monkeypatch.setenv(trust.VARIABLE, str(cached))
    before = os.umask(0o002)
    try:
        path = paths.cached("kernels", "op", "x.so")
        with native.atomic(path) as temporary:
            temporary.write_text("")
    finally:
        os.umask(before)
    assert path.is_relative_to(cached)
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (path.parent.parent, path.parent, path)]
    assert modes == [0o775, 0o775, 0o664]
    assert not recwarn.list


def test_what_is_stored_is_closed(cached: Path) -> None:
    """Whatever the umask, such as that of root in some containers, others cannot write to what is
    put into a cache, and so it is trusted.
    """
    before = os.umask(0)
    try:
        path = paths.cached("kernels", "op", "x.so")
        with native.atomic(path) as temporary:
            temporary.write_text("")
            temporary.chmod(0o777)  # as the linker does
        verdicts.note(path, verdicts.Checked("", "", "", True, "", 0.0, {}))
    finally:
        os.umask(before)
    verdict = verdicts.path_of(path, {})
    modes = [
        stat.S_IMODE(p.stat().st_mode) for p in (path.parent.parent, path.parent, path, verdict)
    ]
    assert modes == [0o755, 0o755, 0o755, 0o644]
    assert reason(path) == ""


def test_nowhere_to_keep_kernels(cached: Path, tmp_path: Path) -> None:
    """Where the temporary folder is open as well, and not sticky, nothing is built: an error that
    says what to do, on which eager mode serves.
    """
    cached.chmod(0o777)
    (tmp_path / "temporary").chmod(0o777)
    with pytest.raises(StoreError, match=rf"{tmp_path}/temporary can be written .*LNTUNE_TRUST="):
        paths.cached("kernels", "x.so")
    x = torch.randn(4, 40)
    lntune.reload()
    with pytest.warns(UntunedWarning) as caught:
        y = lntune.layer_norm(x, (40,))
    reason = "eager mode serves it: no folder can be made that is yours alone"
    assert len([w for w in caught if reason in str(w.message)]) == 1
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (40,)))
    lntune.reload()


CASE = Case("layer_norm", 48, "float32", 8, "plain")
EVIL = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("EVIL"), "w")); }
"""


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [False, True])
def test_a_library_that_another_put_into_the_cache(
    trusted: bool,
    own_cache: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_dir: Path,
) -> None:
    """A stranger's library under the name of a kernel, whole by its digest and facts, is run only
    where the user says that the folder is trusted; else the call is served by a kernel built
    elsewhere, and right, and is told once why.
    """
    temporary = tmp_path / "temporary"
    private = temporary / f"lntune-{os.getuid()}"
    private.mkdir(parents=True, mode=0o700)
    private.chmod(0o700)
    (private / "runtime").symlink_to(cache_dir / "runtime")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    lntune.reload()
    with monkeypatch.context() as patch:
        patch.setenv("LNTUNE_CHECK", "0")  # which would load it
        built = Path(build.build_case(CASE, device.current()).path)
    assert built.is_relative_to(own_cache)
    source = tmp_path / "evil.c"
    source.write_text(EVIL)
    facts = sealed.facts(built)
    toolchain.run_compiler(["-shared", "-fPIC", "-x", "c", str(source)], built)
    sealed.seal(built, facts)
    own_cache.chmod(0o777)
    ran, x = tmp_path / "ran", torch.randn(8, 48)
    monkeypatch.setenv("EVIL", str(ran))
    if trusted:
        monkeypatch.setenv(trust.VARIABLE, str(own_cache))
    forget()
    lntune.reload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = lntune.layer_norm(x, (48,))
            torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (48,)))
            lntune.reload()
    assert ran.exists() is trusted
    said = [str(w.message) for w in caught if w.category is paths.CacheWarning]
    assert len(said) == (not trusted)
    assert bool(list(private.glob("kernels/layer_norm/*.so"))) is not trusted


# --- schedules

MINE = """
from dataclasses import dataclass
from pathlib import Path
from lntune.schedule import Schedule

Path({ran!r}).touch()

@dataclass(frozen=True)
class Knobs:
    pass

def default(case, device):
    return Knobs()

SCHEDULES = (Schedule("mine", "layer_norm", "cpu", Knobs, default, lambda *_: None, default),)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A schedule file of the user's, which touches the file `ran` of its folder's when it runs."""
    file = tmp_path / "schedules" / "cpu" / "mine.py"
    file.parent.mkdir(parents=True)
    file.write_text(MINE.format(ran=str(tmp_path / "ran")))
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(tmp_path / "schedules"))
    schedule._load.cache_clear()
    yield file
    schedule._load.cache_clear()


@pytest.mark.parametrize("up", range(3))
def test_schedules_that_others_can_write_are_not_run(up: int, mine: Path, tmp_path: Path) -> None:
    """They are left out like others that cannot be used: said once with what to do, an error where
    one is asked for by name; and used as soon as it is mended.
    """
    opened = (mine, *mine.parents)[up]
    if up:
        mine.with_name("mine_too.py").write_text(mine.read_text().replace('"mine"', '"mine_too"'))
    mode = opened.stat().st_mode
    opened.chmod(0o777)
    with pytest.warns(ScheduleWarning) as caught:
        assert "cached_rows" in schedule.all_schedules() and schedule.all_schedules()
    folder = mine.parent.parent
    assert [str(w.message) for w in caught] == [
        f"left out: the schedules in {folder} are not run, since others can change them: {opened}"
        f" can be written by every user. Run chmod -R o-w {folder}; where it is meant, set"
        f" LNTUNE_TRUST={folder}."
    ]
    with pytest.raises(ScheduleError, match="since others can change them"):
        schedule.get("mine")
    assert not (tmp_path / "ran").exists()
    opened.chmod(mode)
    schedule._load.cache_clear()
    assert schedule.get("mine").path == mine and (tmp_path / "ran").exists()


def test_schedules_that_are_shared_on_purpose(
    mine: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """A colleague's folder that is trusted by name is used."""
    mine.parent.chmod(0o777)
    monkeypatch.setenv(trust.VARIABLE, str(mine.parent))
    assert schedule.get("mine").path == mine
    assert not recwarn.list


def test_bytecode_is_left_alone(mine: Path, tmp_path: Path) -> None:
    """What lies in `__pycache__`, whose folder others may be able to write, is not run."""
    other = tmp_path / "other.py"
    other.write_text(mine.read_text().replace("mine", "evil"))
    times = mine.stat()
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    planted = importlib.util.cache_from_source(str(mine))
    py_compile.compile(str(other), planted, doraise=True)
    spec = importlib.util.spec_from_file_location("planted", mine)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.SCHEDULES[0].name == "evil"  # as Python loads it
    assert [s.name for s in files.load_file(mine, "cpu")] == ["mine"]


# --- logs and the doctor


def test_a_log_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read, as it holds no code; that is said once, and the doctor says it."""
    logs = tmp_path / "logs"
    logs.mkdir(mode=0o755)
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(logs))
    assert paths.log_doubt(logs) == ""
    (finding,) = [f for f in folders.examine() if f.topic == "tuning log"]
    assert finding.status == "ok"
    logs.chmod(0o1777)  # anyone can add a file
    forget()
    with pytest.warns(trust.TrustWarning, match=f"records in {logs}: {logs} can be") as caught:
        assert paths.log_dirs() == paths.log_dirs() == [logs]
    assert len(caught) == 1
    (finding,) = [f for f in folders.examine() if f.topic == "tuning log"]
    assert finding.status == "warn" and finding.detail.endswith("can be written by every user")
    assert finding.remedy == f"Run chmod -R o-w {logs}; where it is meant, set LNTUNE_TRUST={logs}."


def test_a_user_who_wants_an_error(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user's filters make an error of reaches the user; nothing serves in its place."""
    log_dir.mkdir(exist_ok=True)
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(log_dir))
    log_dir.chmod(0o777)
    lntune.reload()
    with warnings.catch_warnings():
        warnings.simplefilter("error", trust.TrustWarning)
        with pytest.raises(trust.TrustWarning):
            lntune.layer_norm(torch.randn(4, 40), (40,))
    lntune.reload()


def test_the_doctor_says_it_of_temporary_files(cached: Path, tmp_path: Path) -> None:
    """In a sticky folder others cannot put one of theirs in the place of a compiler's; in one that
    is merely open they can.
    """
    for mode, status in ((0o755, "ok"), (0o1777, "ok"), (0o777, "warn")):
        (tmp_path / "temporary").chmod(mode)
        forget()
        (finding,) = [f for f in folders.examine() if f.topic == "temporary files"]
        assert finding.status == status
    assert "others can change what compilers are making" in finding.detail
    assert "TMPDIR" in finding.remedy


def test_the_doctor_says_it_of_the_cache(
    cached: Path, mine: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """A line for the cache and one for the schedules, each with what to do; no warning beside, of
    whoever looked into the cache first.
    """
    cached.chmod(0o777)
    mine.parent.chmod(0o777)
    for module in (packages, cpu, gpu):
        monkeypatch.setattr(module, "examine", lambda: [paths.cached("x")][:0])
    findings = {f.topic: f for f in doctor.examine()}
    assert not recwarn.list
    kernels, left_out = findings["kernel cache"], findings["left out"]
    assert kernels.status == "warn" and f"the cache {cached} is not used" in kernels.detail
    assert kernels.remedy.startswith(f"Run chmod -R o-w {cached};")
    assert left_out.status == "fail" and f"chmod -R o-w {mine.parent.parent};" in left_out.detail
