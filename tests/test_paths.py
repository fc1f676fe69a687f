"""Where things are looked for: the user's wishes first, then what was shipped."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from lntune.errors import InputError
from lntune.system import paths

VARIABLES = ("LNTUNE_SHIPPED_LOGS", "LNTUNE_SCHEDULES", "LNTUNE_LOG_DIR", "LNTUNE_CACHE_DIR")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of lntune's variables is set, and the home is empty."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty installation to put folders into; paths takes it for its own package."""
    folder = tmp_path / "site" / "lntune"
    folder.mkdir(parents=True)
    monkeypatch.setattr(paths, "PACKAGE", folder)
    return folder


def test_a_checkout_uses_its_own_folders(package: Path) -> None:
    """In a source tree, schedules and logs lie beside the package and new measurements go there."""
    (package.parent / "schedules").mkdir()
    assert paths.is_checkout()
    assert paths.schedule_dirs() == [package.parent / "schedules"]
    assert paths.log_dir() == package.parent / "tuning_logs"
    assert paths.log_dirs() == [package.parent / "tuning_logs"]


def test_a_wheel_uses_what_it_brought(package: Path, tmp_path: Path) -> None:
    """Installed, the bundled folders are read, even where a stranger's `schedules` lies beside the
    package; measurements go to the user's data folder and never into the installation.
    """
    (package / "_bundled" / "schedules").mkdir(parents=True)
    (package / "_bundled" / "tuning_logs").mkdir()
    (package.parent / "schedules").mkdir()
    assert not paths.is_checkout()
    assert paths.schedule_dirs() == [package / "_bundled" / "schedules"]
    assert paths.log_dir().is_relative_to(tmp_path / "home")
    assert paths.log_dirs() == [paths.log_dir(), package / "_bundled" / "tuning_logs"]


def test_the_users_schedules_come_first(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LNTUNE_SCHEDULES is a list like PATH, `~` is the home, empty entries are nothing, and what
    was shipped comes last.
    """
    monkeypatch.setenv("LNTUNE_SCHEDULES", os.pathsep.join(["/a", "", "~/mine"]))
    assert paths.schedule_dirs() == [
        Path("/a"),
        Path("~/mine").expanduser(),
        package.parent / "schedules",
    ]


def test_the_users_log_folder(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LNTUNE_LOG_DIR is written to and read first, the shipped logs after it."""
    monkeypatch.setenv("LNTUNE_LOG_DIR", "~/logs")
    assert paths.log_dir() == Path("~/logs").expanduser()
    assert paths.log_dirs() == [Path("~/logs").expanduser(), package.parent / "tuning_logs"]


def test_shipped_logs_can_be_left_out(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LNTUNE_SHIPPED_LOGS=0 leaves only the folder that is written to."""
    for value, count in (("0", 1), ("", 2), ("1", 2)):
        monkeypatch.setenv("LNTUNE_SHIPPED_LOGS", value)
        assert paths.log_dirs()[0] == paths.log_dir() and len(paths.log_dirs()) == count


def test_a_folder_named_twice_is_read_once(
    package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The shipped folder under another name (relative, through a link, listed again) is not read a
    second time.
    """
    (package.parent / "schedules").mkdir()
    (package.parent / "tuning_logs").mkdir()
    link = tmp_path / "link"
    link.symlink_to(package.parent / "schedules")
    monkeypatch.chdir(package.parent)
    monkeypatch.setenv("LNTUNE_LOG_DIR", "tuning_logs")
    monkeypatch.setenv("LNTUNE_SCHEDULES", os.pathsep.join([str(link), "/a", "schedules"]))
    assert paths.log_dirs() == [Path("tuning_logs")]
    assert paths.schedule_dirs() == [link, Path("/a")]


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """LNTUNE_CACHE_DIR moves the built kernels; without it they lie in the user's cache folder."""
    assert paths.cache_dir().is_relative_to(tmp_path / "home")
    monkeypatch.setenv("LNTUNE_CACHE_DIR", "~/kernels")
    assert paths.cache_dir() == Path("~/kernels").expanduser()


@pytest.mark.parametrize("name", VARIABLES)
def test_an_empty_variable_is_no_wish(
    name: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable set to nothing is the same as one not set."""
    unset = (paths.schedule_dirs(), paths.log_dir(), paths.cache_dir())
    monkeypatch.setenv(name, "")
    assert (paths.schedule_dirs(), paths.log_dir(), paths.cache_dir()) == unset


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of /tmp; nothing was said yet."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    paths._said.clear()
    paths._private.cache_clear()
    return folder


@pytest.fixture
def homeless(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Neither HOME nor an account; the user's private folder."""
    for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)

    def unknown(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return temporary / f"lntune-{os.getuid()}"


def test_without_a_home(homeless: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and measurements go to the user's private temporary folder, which is said once a
    process of kernels.
    """
    with pytest.warns(
        paths.CacheWarning, match="no home folder; kernels are kept in .*LNTUNE_CACHE_DIR"
    ) as caught:
        assert [paths.cached("kernels", "x.so") for _ in range(3)] == [
            homeless / "kernels" / "x.so"
        ] * 3
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert homeless.stat().st_mode & 0o777 == 0o700
    assert paths.log_dir() == homeless / "tuning_logs"
    monkeypatch.setenv("LNTUNE_CACHE_DIR", "~/x")
    with pytest.warns(paths.CacheWarning, match="LNTUNE_CACHE_DIR=~/x is in a home folder"):
        assert paths.cached("x") == homeless / "x"


def test_a_wish_in_a_home_that_is_not_there(
    homeless: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of logs that cannot be found is an error that names the variable and what to do; one
    of schedules stays as it was named, for those who look into it to say.
    """
    monkeypatch.setenv("LNTUNE_LOG_DIR", "~/x")
    with pytest.raises(InputError, match=r"LNTUNE_LOG_DIR: got ~/x, .* Set HOME"):
        paths.log_dirs()
    monkeypatch.setenv("LNTUNE_SCHEDULES", "~/x")
    assert Path("~/x") in paths.schedule_dirs()


def test_a_home_of_platformdirs_that_is_none(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Releases that answer with `~` as it stands do not make a folder of that name."""
    monkeypatch.setattr(paths.platformdirs, "user_cache_path", lambda name: Path("~/.cache") / name)
    with pytest.warns(paths.CacheWarning):
        assert paths.cache_dir() == homeless


def test_a_cache_that_cannot_be_written(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is used where it is, as in a read-only image; what is not goes to the private
    folder, which is said. A cache that the user named stays the cache.
    """
    file = paths.cache_dir() / "kernels" / "old.so"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert paths.cached("kernels", "old.so") == file
    with pytest.warns(paths.CacheWarning, match=f"the cache {paths.cache_dir()} cannot be written"):
        assert (
            paths.cached("kernels", "new.so")
            == temporary / f"lntune-{os.getuid()}" / "kernels" / "new.so"
        )
    monkeypatch.setenv("LNTUNE_CACHE_DIR", str(tmp_path / "named"))
    assert paths.cached("kernels", "new.so") == tmp_path / "named" / "kernels" / "new.so"


@pytest.mark.parametrize("trap", ["link", "open", "file"])
def test_a_private_folder_that_is_anothers_is_not_taken(
    trap: str, temporary: Path, tmp_path: Path
) -> None:
    """Code is run out of it: a link, a folder that others may write and a file are passed by."""
    place = temporary / f"lntune-{os.getuid()}"
    if trap == "link":
        place.symlink_to(tmp_path)
    elif trap == "open":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.touch()
    folder = paths.private()
    assert folder != place
    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert paths.private() == folder
