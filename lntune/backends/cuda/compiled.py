"""What a CUDA compiler returns, and the error where it fails."""

from __future__ import annotations

import msgspec

from lntune.errors import BuildError

_SHOWN = 5
"""A missing header brings hundreds of errors, of which the first few say what is wrong."""


class Compiled(msgspec.Struct, frozen=True):
    """Device code of one architecture: what a driver loads, the PTX it came from, and what the
    compiler and ptxas -v said.
    """

    cubin: bytes
    log: str
    ptx: str


def failure(tool: str, archs: str, output: str) -> BuildError:
    """The BuildError of a compiler that failed: its first errors, and how many there were."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    wrong = (
        [
            line
            for line in lines
            if any(word in line.lower() for word in ("error", "fatal", "not found"))
        ]
        or lines
        or ["it said nothing"]
    )
    count = f"{len(wrong)} errors, the first {_SHOWN}" if len(wrong) > _SHOWN else "it says"
    return BuildError(
        f"{tool} cannot compile the kernel for {archs}; {count}:\n" + "\n".join(wrong[:_SHOWN])
    )
