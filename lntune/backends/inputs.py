"""The inputs that a case is measured with, and whether this machine's memory holds them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, got_expected

COPIES = 2
"""Times the bytes of a case's tensors that measuring it takes of memory at least: contenders have
outputs of their own.
"""


DRAWN_ROWS = 1024
"""Rows that are drawn for a device other than the CPU; they are repeated there."""


def plain(case: Case, device: Device, seed: int = 0, rows: int | None = None) -> dict[str, Any]:
    """Random normal inputs of a case by name, tensors of the CPU, with as many rows as the case
    where none are given; sums are zeros, in as many blocks as the device asks for.
    """
    import torch

    op = ops.get(case.op)
    named = op.inputs(case, case.rows if rows is None else rows, "normal", seed)
    for a in op.arguments(case):
        if a.role == "sum":
            named[a.name] = torch.zeros(a.sizes(case.rows, case.hidden, case.blocks(device)))
    return named


def copied(named: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in memory of their own."""
    import torch

    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in named.items()
    }


def on_device(
    case: Case, device: Device, place: str, seed: int = 0, most: int | None = None
) -> dict[str, Any]:
    """The same on `place`, what the device is to PyTorch, made there: `most` rows at most, or
    DRAWN_ROWS, are drawn by the CPU, which takes a second for a hundred million numbers, and
    repeated.
    """
    import torch

    drawn = min(case.rows, DRAWN_ROWS if most is None else most)
    named = plain(case, device, seed, drawn)
    by_row = {a.name for a in ops.get(case.op).arguments(case) if a.shape[:1] == ("rows",)}
    rows = torch.arange(case.rows, device=place) % max(drawn, 1)
    return {
        name: value
        if not isinstance(value, torch.Tensor)
        else value.to(place).index_select(0, rows)
        if name in by_row
        else value.to(place)
        for name, value in named.items()
    }


def memory() -> int:
    """Bytes of memory this process may use: the machine's, or what a container leaves of it."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            size = min(size, int(Path(limit).read_text(encoding="ascii")))
    return size


def check_size(cases: Sequence[Case]) -> None:
    """Complain before anything is measured about cases whose tensors this machine cannot hold, also
    those for a GPU, whose memory is taken to be no larger.

    Raises:
        InputError: with the most rows that fit.
    """
    limit = memory()
    for case in cases:
        need = COPIES * ops.get(case.op).bytes(case)
        if need > limit:
            got = f"{case.rows} of {case}, which take {need / 1e9:,.0f} GB to measure"
            most = max(1, case.rows * limit // need)
            expected = f"at most some {most} on a machine of {limit / 1e9:.0f} GB"
            raise InputError(got_expected("rows", got, expected))
