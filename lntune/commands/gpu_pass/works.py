"""The works of each step: what is measured, on what, for how long at most."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from lntune.backends.cuda import locate
from lntune.case import Case
from lntune.commands.gpu_pass import plan, roundtrips
from lntune.commands.gpu_pass.jobs import (
    Beside,
    Called,
    Compare,
    Copy,
    RoundTrip,
    Sequence,
)
from lntune.commands.gpu_pass.one import Kernel
from lntune.commands.gpu_pass.plan import BACKWARD, Sizes
from lntune.commands.gpu_pass.run import LEFT, Work
from lntune.device import Device
from lntune.kernels import cache
from lntune.measure.jobs import Candidate

TOOLS = ("memcheck", "racecheck", "synccheck")
"""compute-sanitizer's tools."""
SECTIONS = "SpeedOfLight MemoryWorkloadAnalysis SchedulerStats WarpStateStats LaunchStats Occupancy"
"""What ncu is asked for."""
COMPILED = (1024, 4096)
"""Hidden sizes that are timed against torch.compile, which takes some ten seconds for each."""
ONE = (sys.executable, "-m", "lntune.commands.gpu_pass.one")
"""What calls kernels in a process of its own, for a tool that watches it."""


def missing(listed: Iterable[tuple[Case, Candidate]], device: Device) -> list[Case]:
    """The cases whose kernels are not in the cache."""
    return [
        case
        for case, candidate in listed
        if not cache.path_of(case, *candidate.resolved(case.op), device).is_file()
    ]


def compared(device: Device, sizes: Sizes) -> Iterator[tuple[Work, Compare]]:
    """Kernels against float64, the first one before anything else."""
    for one in sizes.checked:
        case = plan.case_of(*one, sizes.few)
        job = Compare(case, device, plan.default_of(case, device), sizes.checked_rows)
        yield Work(str(case), 30, job), job


def sanitized(job: Compare, target: str, tools: Iterable[str]) -> Iterator[Work]:
    """A kernel under compute-sanitizer, on as many rows as the job says."""
    program = locate.program("compute-sanitizer")
    kernel = Kernel(job.case, job.candidate, max(job.rows))
    text = msgspec.json.encode([kernel]).decode()
    for tool in tools if program else ():
        options = [
            *("--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"),
            # our kernels alone; calls of the driver's that PyTorch expects to fail are its own
            *("--kernel-name", "kernel_substring=main_kernel"),
            *(("--report-api-errors", "no") if tool == "memcheck" else ()),
        ]
        # each tensor is an allocation of its own, and what lies beyond it is nobody's
        words = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", str(program), *options)
        yield Work(tool, 120, words=(*words, *ONE, "check", target, text))


def raced(device: Device, target: str, sizes: Sizes) -> Iterator[Work]:
    """Backwards whose blocks go over several rows each under racecheck, which sees what no emulator
    shows.
    """
    for op, hidden, dtype in sizes.checked:
        if op != BACKWARD:
            continue
        case = plan.case_of(op, hidden, dtype, sizes.few)
        candidate = plan.default_of(case, device)
        blocks = device.cores * int(candidate.knobs.get("blocks_per_sm", 1))
        rows = (sizes.turns * blocks + 5,)
        work = next(sanitized(Compare(case, device, candidate, rows), target, ("racecheck",)), None)
        if work is not None:
            yield msgspec.structs.replace(work, key=str(case))


def yardsticks(device: Device, sizes: Sizes) -> Iterator[Work]:
    """What copies reach, what a node of a graph takes, and how long blocks take to hear from each
    other.
    """
    for size in sizes.copies:
        yield Work(f"copy of {size} bytes", 20, Copy(device, size, sizes.seconds))
    for kernel in roundtrips.BLOCKS:
        yield Work(kernel, 15, RoundTrip(device, kernel, sizes.seconds))


def defaults(device: Device, sizes: Sizes, rows: int) -> Iterator[Work]:
    """Default knobs as they are called, against eager mode and others' kernels; then, beyond the
    cache, against torch.compile, where nobody else has a kernel.
    """
    cases = [case for case in plan.timed(sizes) if case.rows == rows]
    for case in cases:
        yield Work(str(case), 20, Called(case, device, sizes.seconds))
    for case in cases:
        if case.op == BACKWARD and case.hidden == sizes.hidden[0] and rows == sizes.many:
            job = Called(case, device, sizes.seconds, with_compile=True)
            yield Work(f"{case} compiled", 30, job)


def trials(device: Device, sizes: Sizes) -> Iterator[Work]:
    """Knobs that are measured beside the default ones."""
    for trial in sizes.trials:
        candidate = plan.other(trial, device)
        if candidate is not None:
            default = plan.default_of(trial.case, device)
            changed = " ".join(f"{name}={value}" for name, value in trial.knobs.items())
            job = Beside(trial.case, device, candidate, default, sizes.seconds)
            yield Work(f"{trial.case} {changed}", 20, job)


def profiled(device: Device, target: str, sizes: Sizes) -> Iterator[Work]:
    """Kernels under ncu, with the clocks as they are; those of an operator in one process, whose
    start takes longer than they do.
    """
    program = locate.program("ncu")
    for op in dict.fromkeys(op for op, *_ in sizes.profiled) if program else ():
        cases = [plan.case_of(*one, sizes.many) for one in sizes.profiled if one[0] == op]
        kernels = [Kernel(case, plan.default_of(case, device), case.rows) for case in cases]
        options = [
            *("--clock-control", "none", "--profile-from-start", "off", "--csv"),
            *(word for name in SECTIONS.split() for word in ("--section", name)),
        ]
        words = (str(program), *options, "--page", "details", *ONE, "profile", target)
        yield Work(op, 75, words=(*words, msgspec.json.encode(kernels).decode()))


def sequences(device: Device, sizes: Sizes) -> Iterator[Work]:
    """An LN-LSTM over a sequence."""
    for batch, hidden, dtype in sizes.sequences:
        job = Sequence(device, batch, hidden, dtype, sizes.steps, 2 * sizes.seconds)
        yield Work(f"batch {batch} hidden {hidden} {dtype}", 30, job)


def compiled(device: Device, sizes: Sizes) -> Iterator[Work]:
    """What serves the most telling cases by now against torch.compile too, far beyond the cache and
    within it.
    """
    for rows in (sizes.many, sizes.few):
        for hidden in [n for n in sizes.hidden if n in COMPILED] or sizes.hidden:
            for op in sizes.timed:
                for dtype in sizes.dtypes:
                    case = plan.case_of(op, hidden, dtype, rows)
                    job = Called(case, device, sizes.seconds, with_compile=True)
                    yield Work(str(case), 40, job)


def bringup(target: str, logs: Path) -> Work:
    """`lntune bringup`, which goes on where the log ends."""
    words = ("bringup", "--target", target, "--budget", f"{LEFT}s", "--log-dir", str(logs))
    output = str(logs.parent / "bringup")
    command = (sys.executable, "-m", "lntune", *words, "--output", output, "--compile")
    return Work("bringup", 600, words=command, resumed=True, least=60)


_PASSED = re.compile(r"^(tests/\S+\.py::.+?) PASSED", re.MULTILINE)


def tests(root: Path, folder: Path, step: str, which: str) -> Work:
    """The tests with markers `which`, but for those that passed before, which are listed in the
    folder: what PyTorch's users call first, then every kernel.
    """
    key = which.replace(" ", "_")
    output, known = folder / f"{step}-{key}.txt", folder / f"{step}-{key}-passed.txt"
    passed = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    if output.is_file():
        passed += _PASSED.findall(output.read_text(encoding="utf-8", errors="replace"))
        passed = list(dict.fromkeys(passed))
        known.write_text("".join(f"{one}\n" for one in passed), encoding="utf-8")
    first = ["tests/test_on_gpu_torch.py", "tests/test_on_gpu_kernels.py"]
    marked = [
        str(path.relative_to(root))
        for path in sorted((root / "tests").glob("test_*.py"))
        if re.search(r"mark\.gpu|import .*\bhere\b", path.read_text(encoding="utf-8"))
    ]
    # the bringup's own test is the next step
    files = [*first, *(name for name in marked if name not in (*first, "tests/test_bringup.py"))]
    xml = f"--junitxml={folder / f'{key}.xml'}"
    options = ("-v", "-p", "no:cacheprovider", "-m", which, xml)
    left_out = tuple(f"--deselect={one}" for one in passed)
    command = (sys.executable, "-m", "pytest", *options, *left_out, *files)
    return Work(key, 400, words=command, resumed=True, least=20)
