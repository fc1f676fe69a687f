"""Where things are looked for: the user's wishes first, then what was shipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lntune import paths

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
    """Installed, the bundled folders are read, even where a stranger's `schedules` lies beside the package; measurements
    go to the user's data folder and never into the installation.
    """
    (package / "_bundled" / "schedules").mkdir(parents=True)
    (package / "_bundled" / "tuning_logs").mkdir()
    (package.parent / "schedules").mkdir()
    assert not paths.is_checkout()
    assert paths.schedule_dirs() == [package / "_bundled" / "schedules"]
    assert paths.log_dir().is_relative_to(tmp_path / "home")
    assert paths.log_dirs() == [paths.log_dir(), package / "_bundled" / "tuning_logs"]


def test_the_users_schedules_come_first(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LNTUNE_SCHEDULES is a list like PATH, `~` is the home, empty entries are nothing, and what was shipped comes last."""
    monkeypatch.setenv("LNTUNE_SCHEDULES", os.pathsep.join(["/a", "", "~/mine"]))
    assert paths.schedule_dirs() == [Path("/a"), Path("~/mine").expanduser(), package.parent / "schedules"]


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


def test_a_folder_named_twice_is_read_once(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shipped folder under another name (relative, through a link, listed again) is not read a second time."""
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
def test_an_empty_variable_is_no_wish(name: str, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable set to nothing is the same as one not set."""
    unset = (paths.schedule_dirs(), paths.log_dir(), paths.cache_dir())
    monkeypatch.setenv(name, "")
    assert (paths.schedule_dirs(), paths.log_dir(), paths.cache_dir()) == unset
