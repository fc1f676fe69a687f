"""Files with a digest: every changed bit is found before a file is loaded, and what was damaged is
put aside, said and made again.
"""

from __future__ import annotations

import concurrent.futures
import random
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lntune import device, schedule
from lntune.backends.cpu import runtime
from lntune.backends.emulated.emulator import _runtime
from lntune.case import Case
from lntune.errors import BuildError, ToolchainError
from lntune.kernels import cache
from lntune.system import native, paths, sealed
from lntune.system.sealed import DamagedError, DamagedWarning

CASE = Case("layer_norm", 96, "float32", 8, "weight")


def wanted() -> tuple[Any, ...]:
    """(case, schedule, knobs, device) of a kernel."""
    plan, here = schedule.get("cached_rows"), device.current()
    return CASE, plan, plan.default(CASE.typical, here), here


def works(kernel: Callable[..., None]) -> bool:
    """True when the kernel of CASE is right."""
    x, w, y = torch.randn(3, 96), torch.randn(96), torch.empty(3, 96)
    kernel(x, w, 1e-5, y)
    return torch.allclose(y, torch.nn.functional.layer_norm(x, (96,), w), atol=1e-5)


@pytest.fixture(scope="module")
def kernel(cache_dir: Path) -> Path:
    """A built kernel that is only looked at."""
    return cache.prepare(*wanted())


def flip(path: Path, bit: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_facts_and_content_are_what_was_stored(tmp_path: Path) -> None:
    """Whatever the content, also none and one that ends like a digest, and whatever the facts."""
    for content in (b"", b"some", sealed.end(b"inner", {"inner": "facts"}), bytes(100_000)):
        for facts in ({}, {"a": "1", "\u00e9": "two\nlines"}):
            path = tmp_path / "file"
            path.write_bytes(content)
            sealed.seal(path, facts)
            stored = sealed.read(path)
            assert (bytes(stored.content), stored.facts, sealed.facts(path)) == (
                content,
                facts,
                facts,
            )


def test_a_flipped_bit_anywhere_is_found(kernel: Path, tmp_path: Path) -> None:
    """In the code, in the facts, in the digest itself: of 400 single bits of a kernel each is
    damage, and so is every cut.
    """
    path, whole = tmp_path / "kernel.so", kernel.read_bytes()
    chosen, end = random.Random(0), len(sealed.read(kernel).content)
    bits = [chosen.randrange(8 * end) for _ in range(250)] + [
        chosen.randrange(8 * end, 8 * len(whole)) for _ in range(150)
    ]
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(DamagedError, match=r"kernel\.so is damaged"):
            runtime.load(path)
    for cut in (1, 8, 48, len(whole) - end, len(whole) // 2, len(whole)):
        path.write_bytes(whole[:-cut])
        with pytest.raises(DamagedError, match="damaged"):
            runtime.load(path)
    path.write_bytes(whole)
    assert works(runtime.load(path))


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_damaged_kernel_is_put_aside_and_built_again(
    place: float, own_cache: Path, kernel: Path
) -> None:
    """It never runs; it is kept beside under a name that says what it is, the warning has name and
    reason, and the new one is right.
    """
    path = cache.path_of(*wanted())
    path.parent.mkdir(parents=True)
    shutil.copy(kernel, path)
    flip(path, int(8 * path.stat().st_size * place))
    bad = path.read_bytes()
    with pytest.warns(
        DamagedWarning, match=rf"{path.name} is damaged: .*; it is kept as {path.name}\.damaged"
    ) as caught:
        assert works(cache.kernel(*wanted()))
    assert caught[0].filename == __file__
    assert path.with_name(f"{path.name}.damaged").read_bytes() == bad
    assert bytes(sealed.read(path).content[:4]) == b"\x7fELF"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert works(cache.kernel(*wanted()))


def test_a_damaged_kernel_that_cannot_be_built_again(
    own_cache: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not loaded: the reason why nothing can be built is the error."""
    path = cache.path_of(*wanted())
    path.parent.mkdir(parents=True)
    shutil.copy(kernel, path)
    flip(path, 40_000)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.warns(DamagedWarning), pytest.raises(ToolchainError, match="no C\\+\\+ compiler"):
        cache.kernel(*wanted())


def test_damaged_files_do_not_pile_up(tmp_path: Path) -> None:
    """The last few of a folder are kept."""
    for number in range(20):
        path = tmp_path / f"{number}.so"
        path.write_bytes(b"damaged")
        with pytest.warns(DamagedWarning):
            sealed.put_aside(path, "it is damaged.")
    assert len(list(tmp_path.iterdir())) == sealed._KEPT


def test_a_file_that_was_mended_meanwhile_stays(tmp_path: Path) -> None:
    """Another process was faster: what it put in the damaged one's place is not put aside, and
    nobody need be told.
    """
    path = tmp_path / "file"
    path.write_bytes(b"content")
    sealed.seal(path, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sealed.put_aside(path, "it is damaged.")
        sealed.put_aside(tmp_path / "gone", "it is damaged.")
    assert sealed.read(path).content == b"content"


def test_what_is_loaded_is_what_was_checked(tmp_path: Path) -> None:
    """A file that is replaced between check and load is checked again, and a damaged one found
    then.
    """
    path, other = tmp_path / "file", tmp_path / "other"
    for p in (path, other):
        p.write_bytes(p.name.encode())
        sealed.seal(p, {})
    seen: list[bytes] = []

    def load() -> bytes:
        if other.exists():
            other.replace(path)
        seen.append(path.read_bytes()[:5])
        return seen[-1]

    assert sealed.loaded(path, load) == b"other"
    assert seen == [b"other", b"other"]
    other.write_bytes(b"damaged")
    with pytest.raises(DamagedError):
        sealed.loaded(path, load)


@pytest.mark.skipif(sys.platform != "linux", reason="names are Linux's")
def test_our_own_libraries_are_checked_too(
    own_cache: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runtime and the emulator's library with a flipped bit: put aside or thrown away, and
    compiled again.
    """
    import ctypes

    (own_cache / "runtime").unlink()
    path = native.compiled(runtime.SOURCE)
    flip(path, 8 * 5000 + 3)
    with pytest.warns(DamagedWarning, match=r"runtime-.*\.so is damaged"):
        native.load(runtime.SOURCE, ctypes.CDLL)
    sealed.read(path)
    sealed.read(_runtime())


def test_a_library_that_the_system_refuses(tmp_path: Path) -> None:
    """A whole file that cannot be loaded here is built again; where that fails both reasons are
    told.
    """

    def refuse() -> None:
        raise OSError("wrong ELF class")

    builds: list[int] = []

    def make() -> None:
        builds.append(1)

    with pytest.raises(BuildError, match=r"cannot load .*wrong ELF class.*LNTUNE_CACHE_DIR"):
        native.fetch(tmp_path / "x.so", refuse, make)
    assert builds == [1]

    def fail() -> None:
        raise BuildError("no compiler")

    with pytest.raises(BuildError, match=r"wrong ELF class.*no compiler"):
        native.fetch(tmp_path / "x.so", refuse, fail)


def test_another_processs_file_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that fails because another process has just put the same file there is no failure;
    one that fails for itself is.
    """
    target = tmp_path / "kernel.so"
    real = Path.replace

    def busy(self: Path, to: Path) -> Path:
        if meanwhile:
            to.write_bytes(b"theirs")
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", busy)
    for meanwhile in (True, False):
        target.unlink(missing_ok=True)
        if meanwhile:
            with native.atomic(target) as temporary:
                temporary.write_bytes(b"ours")
            assert target.read_bytes() == b"theirs"
        else:
            with (
                pytest.raises(BuildError, match="Device or resource busy"),
                native.atomic(target) as temporary,
            ):
                temporary.write_bytes(b"ours")
    assert [p.name for p in tmp_path.iterdir()] == []
    monkeypatch.setattr(Path, "replace", real)
    assert paths.cached("x") == paths.cache_dir() / "x"


def test_threads_compile_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that want the same library at the same time wait for the one that compiles it."""
    (own_cache / "runtime").unlink()
    asked: list[Path] = []
    together = threading.Barrier(4)

    def compiler(_: object, output: Path) -> None:
        asked.append(output)
        time.sleep(0.2)
        output.write_bytes(b"made")

    def want() -> Path:
        together.wait(20)
        return native.compiled(runtime.SOURCE)

    monkeypatch.setattr(native.toolchain, "run_compiler", compiler)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len({f.result(20) for f in [pool.submit(want) for _ in range(4)]}) == 1
    assert len(asked) == 1
