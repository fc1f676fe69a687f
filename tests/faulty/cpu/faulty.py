"""Schedules that go wrong, each in its own way, for the tests of the worker and of the tuning loop.

`plain` is right: the operator's definition as it stands. All take the same two knobs.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.schedule import Schedule
from lntune.transforms.cpu import alignment, row_sums


@dataclass(frozen=True)
class Knobs:
    """Knobs without effect, so that there is something to search."""

    first: int = knob(1, (1, 2), "nothing")
    second: bool = knob(False, (False, True), "nothing")


def _module(case: Case, row_sum: Any = row_sums.plain_sum) -> Any:
    """The definition, unscheduled."""
    import tvm

    return tvm.IRModule(
        {
            "main": (
                alignment.element_aligned(ops.get(case.op).define(case, row_sum)).with_attr(
                    "global_symbol", "main"
                )
            )
        }
    )


def plain(case: Case, knobs: Knobs, device: Device) -> Any:
    """Right, and slow."""
    return _module(case)


def aborts(case: Case, knobs: Knobs, device: Device) -> Any:
    """As a failed assertion in the compiler does."""
    os.abort()


def segfaults(case: Case, knobs: Knobs, device: Device) -> Any:
    """The compiler dereferences a null pointer."""
    return ctypes.string_at(0)


def exits(case: Case, knobs: Knobs, device: Device) -> Any:
    """The process ends itself, with a last word."""
    print("out of luck", file=sys.stderr, flush=True)
    os._exit(3)


def hangs(case: Case, knobs: Knobs, device: Device) -> Any:
    """A pass that never ends."""
    time.sleep(3600)


def raises(case: Case, knobs: Knobs, device: Device) -> Any:
    """An error of many lines, as TVM's are."""
    raise ValueError("first line\n" + "the whole program\n" * 10_000 + "cannot schedule this")


def kernel_segfaults(case: Case, knobs: Knobs, device: Device) -> Any:
    """Builds, and then reads a terabyte behind the row."""
    from tvm import tirx

    def row_sum(rows: Any, hidden: int, expressions: Any, name: str) -> Any:
        far = tirx.IntImm("int64", 1 << 40)
        return row_sums.plain_sum(
            rows, hidden, [lambda i, k, f=f: f(i, k + far) for f in expressions], name
        )

    return _module(case, row_sum)


def wrong(case: Case, knobs: Knobs, device: Device) -> Any:
    """Sums that are a thousandth too large."""
    from tvm import tirx

    def row_sum(rows: Any, hidden: int, expressions: Any, name: str) -> Any:
        return [
            lambda i, s=s: s(i) * tirx.const(1.001, "float32")
            for s in row_sums.plain_sum(rows, hidden, expressions, name)
        ]

    return _module(case, row_sum)


def wrong_but_fast(case: Case, knobs: Knobs, device: Device) -> Any:
    """Sums nothing at all: nothing right is as fast."""
    from tvm import tirx

    return _module(
        case,
        lambda rows, hidden, expressions, name: [
            lambda i: tirx.const(0.0, "float32") for _ in expressions
        ],
    )


def noisy(case: Case, knobs: Knobs, device: Device) -> Any:
    """Right, but prints more than a pipe holds, things that look like answers among it."""
    for stream in (sys.stdout, sys.stderr):
        print('{"status":"ok"}\nready\n' + "noise\n" * 50_000, file=stream, flush=True)
    os.write(1, b'{"status":"wrong"}\n')
    return _module(case)


def tells_threads(case: Case, knobs: Knobs, device: Device) -> Any:
    """Fails with the number of threads it would have had."""
    import torch

    raise ValueError(f"{torch.get_num_threads()} threads")


def fickle(case: Case, knobs: Knobs, device: Device) -> Any:
    """Works once for each setting and then never again: it passes its trial and kills the final."""
    mark = Path(os.environ["LNTUNE_TEST_MARKS"]) / f"{knobs.first}{knobs.second}"
    if mark.exists():
        os.abort()
    mark.touch()
    return _module(case)


def _schedule(apply: Callable[[Case, Knobs, Device], Any]) -> Schedule:
    return Schedule(
        apply.__name__,
        "layer_norm",
        "cpu",
        Knobs,
        lambda case, device: Knobs(),
        lambda knobs, case, device: None,
        apply,
    )


SCHEDULES = tuple(
    _schedule(apply)
    for apply in (
        aborts,
        segfaults,
        exits,
        hangs,
        raises,
        kernel_segfaults,
        wrong,
        wrong_but_fast,
        noisy,
        tells_threads,
        fickle,
        plain,
    )
)
