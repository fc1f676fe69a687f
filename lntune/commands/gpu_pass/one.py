"""Kernels called in a process of their own, for a tool that watches it.

    python -m lntune.commands.gpu_pass.one check|profile TARGET KERNELS

KERNELS is a JSON list of Kernel. `check` compares each with float64 and exits with 1 where one is
wrong; `profile` calls each once before and once while profiling is on (cudaProfilerStart).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import msgspec

from lntune import backends
from lntune.case import Case
from lntune.commands.gpu_pass import checks
from lntune.measure.jobs import Candidate


class Kernel(msgspec.Struct, frozen=True):
    """A kernel, and on how many rows it is called."""

    case: Case
    candidate: Candidate
    rows: int


@contextlib.contextmanager
def _profiling() -> Iterator[None]:
    """In the block a profiler that was told to wait for it records."""
    import torch

    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.profiler.stop()


def main(mode: str, target: str, text: str) -> int:
    """The exit code."""
    device, wrong = backends.device_of(target), 0
    for one in msgspec.json.decode(text, type=list[Kernel]):
        kernel = checks.load(one.case, one.candidate, device)
        if mode == "check":
            verdict = checks.against_float64(one.case, kernel, [one.rows], device)
            print(f"{one.case}, {one.rows} rows: {verdict.message or 'right'}", flush=True)
            wrong += not verdict.ok
            continue
        case = msgspec.structs.replace(one.case, rows=one.rows)
        given = backends.of(device).inputs(case, device)[0]
        values = list(checks.arguments(case, given, one.rows, device).values())
        kernel(*values)
        with _profiling():
            kernel(*values)
            checks.clock_of(device).wait()
        print(f"profiled {case}: {dict(one.candidate.knobs)}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
