"""What is built here loads on older systems: no symbol is newer than those of glibc 2.28."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lntune import device, schedule
from lntune.backends.cpu import runtime
from lntune.backends.cuda import driver
from lntune.case import Case
from lntune.errors import BuildError
from lntune.kernels import cache, direct
from lntune.system import elf, native, toolchain
from lntune.torch import layer_norm_node

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not a system of glibc"),
]

LIBRARIES = {
    "runtime": runtime.ensure_library,
    "direct": direct.ensure_library,
    "node": layer_norm_node.ensure_library,
    "launcher": driver.ensure_library,
}
SYSTEMS = r"(libc|libm|libdl|libpthread|libgcc_s|libstdc\+\+|ld-linux.*)\.so\.\d+"
"""Libraries that every system has, and PyTorch needs, too."""


def assert_portable(path: Path) -> None:
    """A file asks for nothing that is newer than the oldest system that is served."""
    assert elf.too_new(path) == []
    assert [n.library for n in elf.needed(path) if not re.fullmatch(SYSTEMS, n.library)] == []


@pytest.mark.parametrize("name", LIBRARIES)
def test_our_own_c(name: str) -> None:
    """What lntune compiles once a machine asks for no newer symbols, whatever this system has."""
    assert_portable(LIBRARIES[name]())


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("layer_norm", "cached_rows"),
        ("layer_norm_backward", "blocked_rows"),
        ("lnlstm_step", "fused_step"),
    ],
)
def test_kernels(op: str, name: str) -> None:
    """Kernels ask for next to nothing, not even for the C library's mathematics."""
    here, case, plan = device.current(), Case(op, 64, "bfloat16", 32), schedule.get(name)
    path = cache.prepare(case, plan, plan.default(case, here), here)
    assert_portable(path)
    assert {n.library for n in elf.needed(path)} <= {"libc.so.6", "ld-linux-x86-64.so.2"}


def test_the_reader_agrees_with_readelf() -> None:
    """The versions that are read are those that binutils print."""
    if not shutil.which("readelf"):
        pytest.skip("there is no readelf")
    path = layer_norm_node.ensure_library()
    command = ["readelf", "--wide", "--version-info", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needs = shown[shown.index("'.gnu.version_r'") :]
    assert sorted(re.findall(r"Name: (\S+)", needs)) == sorted(n.version for n in elf.needed(path))
    assert elf.newest(elf.needed(path))["GLIBC"] >= (2, 2, 5)


def test_what_is_too_new_is_seen(tmp_path: Path) -> None:
    """A library that is compiled as usual asks for this system's own versions, which is told."""
    if tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 34):
        pytest.skip("this system is old itself")
    source = tmp_path / "some.c"
    source.write_text(
        "#include <pthread.h>\n"
        "void *f(void *p) { return p; }\n"
        "int g(void) { pthread_t t; return pthread_create(&t, 0, f, 0); }\n"
    )
    usual, ours = tmp_path / "usual.so", tmp_path / "ours.so"
    toolchain.run_compiler([*toolchain.shared(), str(source)], usual)
    assert elf.too_new(usual) == ["GLIBC_2.34 of libc.so.6"]
    included = ["-include", str(native.PORTABLE)]
    toolchain.run_compiler([*included, *toolchain.shared(), str(source)], ours)
    assert elf.too_new(ours) == []


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    """Our own C is compiled to the same file each time, wherever that lies."""
    for name in ("one", "two"):
        native._compile(runtime.SOURCE, native.PLAIN, tmp_path / name / "runtime.so")
    one, two = ((tmp_path / name / "runtime.so").read_bytes() for name in ("one", "two"))
    assert one == two


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    """A text, a file cut short and one of nothing are told from a library that needs nothing."""
    path = tmp_path / "some.so"
    for content in (b"", b"some text\n" * 20, runtime.ensure_library().read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(BuildError, match="no shared library of Linux"):
            elf.needed(path)
