"""What the gate costs: CPU seconds of the check of a trial and of a finalist, CPU and wall time of
the check before a first call, of kernels with default knobs on this CPU. The first check of a case
makes its problems, which are kept, but before a first call.

    python bench/check_cost.py
    python bench/check_cost.py --busy 2    checks before first calls, beside two busy processes
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from lntune import backends, schedule
from lntune import device as devices
from lntune.case import Case
from lntune.kernels import compiler
from lntune.torch import apart

CASES = (
    Case("layer_norm", 1024, "float32", 512),
    Case("layer_norm", 1024, "bfloat16", 512),
    Case("layer_norm_backward", 1024, "float32", 512),
    Case("lnlstm_step", 512, "float32", 32),
    Case("lnlstm_step_backward", 512, "float32", 32),
)
CALLS, FIRST = 5, 15
"""Calls of a check, and of a first check, which are short and have neighbours."""


def main() -> None:
    """Print a line a case and check."""
    parser = argparse.ArgumentParser(description="what the checks of kernels cost")
    parser.add_argument(
        "--busy",
        type=int,
        default=0,
        metavar="N",
        help="first checks only, beside N busy processes",
    )
    busy = parser.parse_args().busy
    device = devices.current()
    backend = backends.of(device)
    for case in CASES:
        plan = next(iter(schedule.for_op(case.op, device.kind).values()))
        kernel = compiler.in_memory(case, plan, plan.default(case, device), device)
        for thoroughly in () if busy else (False, True):
            verify = functools.partial(backend.verify, case, device, kernel, thoroughly)
            spent, _ = times(verify)
            which = "finalist" if thoroughly else "trial"
            later = middle(spent[1:])
            print(f"{case}, {which}: {later:.0f} ms of a CPU, {spent[0]:.0f} ms the first time")
        with neighbours(busy):
            verify_shortly = functools.partial(backend.verify_shortly, case, device, kernel)
            spent, waited = times(functools.partial(apart.run, verify_shortly), FIRST)
        beside = f" beside {busy} busy processes" if busy else ""
        print(
            f"{case}, before a first call{beside}: {middle(spent):.0f} ms of a CPU,"
            f" {middle(waited):.0f} ms of time, {max(waited):.0f} ms at most"
        )


def times(check: Callable[[], Any], calls: int = CALLS) -> tuple[list[float], list[float]]:
    """Milliseconds of a CPU, and of time, of each call of a check; what is wrong is printed."""
    spent, waited = [], []
    for _ in range(calls):
        begun, started = time.process_time(), time.perf_counter()
        outcome = check()
        spent.append((time.process_time() - begun) * 1e3)
        waited.append((time.perf_counter() - started) * 1e3)
        if outcome.message:
            print(outcome.message)
    return spent, waited


def middle(values: list[float]) -> float:
    """The middle one."""
    return sorted(values)[len(values) // 2]


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """In the block so many processes keep a CPU busy each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
