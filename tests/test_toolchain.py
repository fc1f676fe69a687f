"""How compilers are found and called, and what becomes of what they say."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from lntune import schedule
from lntune.case import Case
from lntune.device import current
from lntune.errors import BuildError, ToolchainError, gist
from lntune.kernels import compiler
from lntune.system import toolchain


def program(path: Path, text: str) -> Path:
    """A shell script that may be run."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs, first on PATH; the real compiler is there as `real++`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "real++").symlink_to(toolchain.command()[0])
    program(programs / "cache", f'echo "$@" >> {tmp_path}/asked\nexec "$@"')
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return programs


@pytest.mark.slow
@pytest.mark.parametrize(
    "cxx",
    ["cache real++", "real++ -O0", "real++ ", " real++", "cache real++ -O1 '-DSAID=\"two words\"'"],
)
def test_cxx_is_split_as_a_shell_does(
    cxx: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher before the compiler, options behind it and stray blanks are understood, and all
    words are used for every library.
    """
    monkeypatch.setenv("CXX", cxx)
    source = tmp_path / "some.c"
    source.write_text("int some(void) { return 0; }\n")
    toolchain.run_compiler(["-shared", "-fPIC", str(source)], tmp_path / "some.so")
    assert (tmp_path / "some.so").read_bytes()[:4] == b"\x7fELF"
    case, plan, device = (
        Case("layer_norm", 32, "float32", 8),
        schedule.get("cached_rows"),
        current(),
    )
    compiler.to_file(case, plan, plan.default(case, device), device, tmp_path / "kernel.so")
    assert (tmp_path / "kernel.so").read_bytes()[:4] == b"\x7fELF"
    asked = (
        (tmp_path / "asked").read_text().splitlines() if "cache" in cxx else ["real++", "real++"]
    )
    assert [line.split()[0] for line in asked] == ["real++", "real++"]
    assert all(word in toolchain.command() for word in ("-O0", '-DSAID="two words"') if word in cxx)


def test_a_path_with_blanks_is_one_word(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CXX may name a compiler in a folder whose name has blanks, without quotes as well."""
    path = folder / "my compiler" / "c++"
    path.parent.mkdir()
    program(path, "exit 0")
    for cxx in (str(path), f"'{path}'", f'"{path}" -O0'):
        monkeypatch.setenv("CXX", cxx)
        assert toolchain.command()[0] == str(path)


@pytest.mark.parametrize("cxx", ["", "   "])
def test_no_wish_is_the_first_compiler(cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty CXX is none."""
    monkeypatch.setenv("CXX", cxx)
    assert toolchain.command() == (
        shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"),
    )


@pytest.mark.parametrize(
    ("cxx", "says"),
    [
        ("'g++", "No closing quotation"),
        ("no-such++ -O0", "CXX=no-such\\+\\+ -O0"),
        ("''", "CXX=''"),
    ],
)
def test_a_wish_that_is_none(cxx: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be split, or is not there, is told with what CXX says."""
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(ToolchainError, match=says):
        toolchain.command()


def test_messages_that_are_not_utf8(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that complains in Latin-1 is quoted as well as can be."""
    monkeypatch.setenv(
        "CXX", str(program(folder / "latin", "printf 'erreur: fichier sp\\351cial\\n' >&2; exit 1"))
    )
    with pytest.raises(BuildError, match="erreur: fichier sp\ufffdcial"):
        toolchain.run_compiler(["some.c"], tmp_path / "some.so")


@pytest.mark.parametrize(
    ("said", "last"),
    [
        (
            "collect2: fatal error: ld terminated with signal 25 [File size limit exceeded]\n"
            "compilation terminated.",
            "collect2: fatal error: ld terminated with signal 25 [File size limit exceeded]"
            " (ulimit -f raises the limit)",
        ),
        (
            "g++: internal compiler error: File size limit exceeded signal terminated program as\n"
            "Please submit a full bug report, with preprocessed source (by using -freport-bug).\n"
            "See <file:///usr/share/doc/gcc-12/README.Bugs> for instructions.",
            "g++: internal compiler error: File size limit exceeded signal terminated program as"
            " (ulimit -f raises the limit)",
        ),
        (
            "/usr/bin/ld: cannot find -lnope: No such file or directory\n"
            "collect2: error: ld returned 1 exit status",
            "/usr/bin/ld: cannot find -lnope: No such file or directory",
        ),
        (
            "In file included from a.c:1:\nb.h:1:9: error: expected something\n"
            "    1 | int f( {\n      |        ~^",
            "b.h:1:9: error: expected something",
        ),
        ("a.o: undefined symbol: f\nclang: error: linker command failed with exit code 1", "a.o: "),
        ("quoi ?\nnon", "non"),
    ],
)
def test_the_line_that_counts_comes_last(
    said: str, last: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an error is quoted by its ends, in a table or as a child's last words, the compiler's
    complaint is there, and not the sentence that it takes its leave with.
    """
    (tmp_path / "said").write_text(said)
    fails = program(folder / "fails", f"cat {tmp_path}/said >&2; exit 1")
    monkeypatch.setenv("CXX", str(fails))
    with pytest.raises(BuildError) as caught:
        toolchain.run_compiler(["some.c"], tmp_path / "some.so")
    assert str(caught.value).splitlines()[-1].startswith(last)
    assert gist(caught.value).startswith(str(fails)) and last in gist(caught.value)


@pytest.mark.slow
def test_what_is_being_compiled_is_the_users_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask, object files and the compiler's own temporary files lie in folders that
    nobody else can enter.
    """
    log = tmp_path / "modes"
    look = (
        f'for one in "$TMPDIR" "$@"; do case "$one" in *.o) one=$(dirname "$one");; esac;'
        f' [ -d "$one" ] && stat -c "%a $one" "$one" >> {log}; done; exec real++ "$@"'
    )
    monkeypatch.setenv("CXX", str(program(folder / "looks", look)))
    case, here = Case("layer_norm", 32, "float32", 8), current()
    plan = schedule.get("cached_rows")
    before = os.umask(0)
    try:
        compiler.to_file(case, plan, plan.default(case, here), here, tmp_path / "c" / "x.so")
    finally:
        os.umask(before)
    seen = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
    assert len({place for _, place in seen}) > 1
    assert {mode for mode, place in seen if place != str(tmp_path / "c")} == {"700"}, seen


def test_a_compiler_that_does_not_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that may be run and is no program is an error of ours with the remedy; one that fails
    in silence is told with its exit code.
    """
    broken = program(folder / "broken", "")
    broken.write_bytes(b"\x7fELF broken")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ToolchainError, match=r"cannot run the C\+\+ compiler .*broken: .*Set CXX"):
        toolchain.run_compiler(["some.c"], tmp_path / "some.so")
    monkeypatch.setenv("CXX", str(program(folder / "silent", "exit 3")))
    with pytest.raises(BuildError, match="exit code 3"):
        toolchain.run_compiler(["some.c"], tmp_path / "some.so")


def test_metadata_that_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose metadata has no version is as one that is not installed."""
    monkeypatch.setattr(toolchain.importlib.metadata, "version", lambda _: None)
    toolchain.installed.cache_clear()
    try:
        assert toolchain.installed("apache-tvm") == toolchain.MISSING
    finally:
        toolchain.installed.cache_clear()
