"""nvcc: CUDA C++ to a cubin or to a fat binary."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import msgspec

from lntune.architectures import Architecture
from lntune.backends.cuda import locate
from lntune.backends.cuda.compiled import Compiled, failure
from lntune.errors import BuildError, ToolchainError
from lntune.system import paths, toolchain

FLAGS = ("-O3", "-std=c++17", "-Xptxas", "-v", "-diag-suppress=177")
"""No fast math: it would flush denormals and drop the correct rounding of division and square root.
The warning that is switched off is about variables nobody reads, of which generated source has
many."""
ENVIRONMENT = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
"""What nvcc reads by itself, and what its output therefore depends on."""


@functools.cache
def _release(path: str) -> str:
    """The release nvcc states, such as "13.0.88"."""
    try:
        done = toolchain.run([path, "--version"], timeout=60)
        answer = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as e:
        answer = str(e)
    if release := re.search(r"release [\d.]+, V([\d.]+)", answer):
        return release[1]
    raise ToolchainError(
        f"{path} is not a working nvcc; asked for its version it says:"
        f" {answer.strip()[:200] or 'nothing'}. Set LNTUNE_NVCC to one."
    )


class Nvcc(msgspec.Struct, frozen=True):
    """An nvcc by its path. It needs a host compiler, which it looks for itself (NVCC_CCBIN names
    another).
    """

    path: str

    @property
    def identity(self) -> str:
        """What its output depends on, besides source and flags."""
        settings = [f"{name}={value}" for name in ENVIRONMENT if (value := os.environ.get(name))]
        return " ".join(["nvcc", _release(self.path), *FLAGS, *settings])

    def cubin(self, source: str, arch: Architecture) -> Compiled:
        """Machine code, PTX and log of one architecture."""
        with _folder() as name:
            folder = Path(name)
            log = self._run(
                source,
                ["-cubin", f"-arch={arch.name}", "--keep", "--keep-dir", "."],
                folder,
                arch.name,
            )
            ptx = "\n".join(
                p.read_text(encoding="utf-8", errors="replace")
                for p in sorted(folder.glob("*.ptx"))
            )
            return Compiled((folder / "out").read_bytes(), log, ptx)

    def _run(self, source: str, arguments: list[str], folder: Path, archs: str) -> str:
        """Compile kernel.cu in the folder to `out`; its log. Names are relative, so that messages
        are the same every time.
        """
        try:
            (folder / "kernel.cu").write_text(source, encoding="utf-8")
            command = [self.path, *FLAGS, *arguments, "kernel.cu", "-o", "out"]
            # where an nvcc that is killed leaves its files
            own = {**os.environ, "TMPDIR": str(folder)}
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                cwd=folder,
                env=own,
            )
        except OSError as e:
            raise BuildError(
                f"cannot run {self.path} in {folder}: {e.strerror or e}. Check LNTUNE_NVCC and the"
                " space in TMPDIR."
            ) from e
        if done.returncode:
            raise failure(f"nvcc {_release(self.path)}", archs, done.stdout + done.stderr)
        return done.stdout + done.stderr


def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for one compilation."""
    try:
        return tempfile.TemporaryDirectory(prefix="lntune-cuda-", ignore_cleanup_errors=True)
    except OSError as e:
        raise BuildError(
            f"cannot make a temporary folder: {e.strerror or e}. Free some space, or set TMPDIR."
        ) from e


def find() -> Nvcc | None:
    """The nvcc to use: LNTUNE_NVCC, else a toolkit's, else the first on PATH.

    Raises:
        ToolchainError: LNTUNE_NVCC names none.
    """
    requested = os.environ.get("LNTUNE_NVCC")
    if requested:
        path = shutil.which(paths.expanded(requested))
        if not path:
            raise ToolchainError(
                f"LNTUNE_NVCC: got {requested}, expected the path of nvcc, or nvrtc for the"
                " library. Correct it or unset it."
            )
    else:
        path = locate.program("nvcc")
    # Absolute, because it runs in a temporary folder; not resolved, because it may be a wrapper
    # that looks at its own name.
    return Nvcc(str(Path(path).absolute())) if path else None
