"""What a benchmark prints, kept as text beside its figures as JSON with where they are from."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from lntune import device
from lntune.report.columns import WIDE
from lntune.system import toolchain


def screen() -> Console:
    """A console that keeps what it prints, with this machine and its cores on the first line."""
    made = Console(record=True, highlight=False, width=None if sys.stdout.isatty() else WIDE)
    here = device.current()
    made.print(f"{here.slug}, {here.cores} cores")
    return made


def keep(folder: Path, name: str, printed: Console, facts: dict[str, Any]) -> None:
    """Write NAME.json, `facts` behind the machine, versions and time, and NAME.txt to a folder."""
    here = device.current()
    known = {
        "device": here,
        "name": here.slug,
        "versions": toolchain.versions(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.encode(known | facts)
    (folder / f"{name}.json").write_bytes(msgspec.json.format(encoded, indent=1) + b"\n")
    (folder / f"{name}.txt").write_text(printed.export_text(clear=False))
