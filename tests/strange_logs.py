"""Tuning logs that a stranger may have made: plain ones, changed at random, byte by byte and value
by value.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from made_log import finals
from made_up_records import final_here, rival, samples

from lntune import schedule
from lntune.case import Case
from lntune.log.decision import Advantage, Decision
from lntune.log.records import Record, Setting, log_path
from lntune.system import toolchain
from lntune.versions import Code

TEXTS = [
    "",
    "../../../x",
    "/etc/passwd",
    "a/b",
    "..",
    "\x00",
    "\x1b]0;you\x07\x1b[31m",
    "\x9b31m",
    "\u202egpj",
    "<script>alert(1)</script>",
    "$\\frac{",
    "[red]x[/][link=http://x]",
    "{0.__class__}%s%n",
    "a" * 9_000,
    "'; import os #",
    "nan",
    "1e999",
    "layer_norm",
    "cpu",
    "gpu",
    "tuned",
    "eager",
    "9999-99-99T99:99:99",
    "$(touch x)",
    "\N{SNOWMAN}" * 50,
]
NUMBERS = [0, -1, 1, 2, 3, 7, 2**31, 2**53, 2**62, 2**63, 2**64, 10**400, 0.5, 1e-6, 1e15, 1e308]
NUMBERS += [5e-324, -0.0, 1e24, 65_536, 65_537]
ODD: list[Any] = [None, True, False, [], {}, [[]], {"": {}}, [0] * 1000, {"schema": 3}]
SPOILS = [b"\x00", b"\xff", b"\x1b[2J", b"NaN", b"Infinity", b"[" * 20_000, b'{"a":' * 20_000]
SPOILS += [b"\n", b"}", b'"', b",", b"\\ud800", b"1" * 5_000, b" " * 5_000_000]
"""What stands where nobody expects it."""


def plain() -> list[Record]:
    """A log with everything that records have: finals of this machine and of another, with rivals
    and decisions, and trials of this machine that stand.
    """
    sure = Advantage(1.5, 1.4, 1.6, "FASTER")
    decision = Decision("better", "time", sure, 0, (0,), sure, sure, sure)
    log = list(finals(Code()))[:12]
    for case in (
        Case("layer_norm", 64, "float32", 8),
        Case("layer_norm_backward", 64, "float32", 8),
    ):
        final = final_here(case)
        timed = {"tuned": samples(1.0), "eager": samples(2.0), "default": samples(1.1)}
        log.append(
            msgspec.structs.replace(
                final,
                timings=timed,
                cold=timed,
                training=timed,
                rivals=(rival(final.schedule, samples(1.2)),),
                decision=decision,
                default=Setting(final.schedule, final.knobs),
                forward=Setting("cached_rows", {}),
                noticed=("the clock changed",),
                errors={"y": 0.5},
                versus_eager={"y": 1.0},
                run="0123",
                time="2026-03-04T03:00:05.000+00:00",
            )
        )
        trial = {"role": "trial", "versions": toolchain.versions(), "decision": None, "rivals": ()}
        log.append(msgspec.structs.replace(log[-1], **trial))
        log.append(msgspec.structs.replace(log[-1], status="wrong", message="y: off", timings={}))
    assert schedule.get(log[-1].schedule)
    return log


def strange(folder: Path, seed: int) -> Path:
    """A folder of logs in which one to six things are not as they should be."""
    draw = random.Random(seed)
    lines: dict[Path, list[bytes]] = {}
    for record in plain():
        path = log_path(folder, record.device, record.case.op)
        lines.setdefault(path, []).append(msgspec.json.encode(record))
    for _ in range(draw.randint(1, 6)):
        log = lines[draw.choice(list(lines))]
        place = draw.randrange(len(log))
        log[place] = draw.choice(_CHANGES)(log[place], draw)
    for path, log in lines.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n".join(log) + b"\n" * draw.randint(0, 1))
    return folder


def _bytes(line: bytes, draw: random.Random) -> bytes:
    """Bytes that are cut out, doubled, changed or put in."""
    a, b = sorted(draw.randrange(len(line) + 1) for _ in range(2))
    ways = (
        line[:a] + line[b:],
        line[:b] + line[a:],
        line[:a],
        line[:a] + bytes([draw.randrange(256)]) + line[a + 1 :],
        line[:a] + draw.choice(SPOILS) + line[a:],
        line + line,
        draw.randbytes(200),
    )
    return draw.choice(ways)


def _value(line: bytes, draw: random.Random) -> bytes:
    """A value somewhere in a record that is another one, gone, or has company."""
    try:
        whole: Any = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        return line
    at: Any = whole
    while isinstance(at, dict | list) and at:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = draw.choice(keys)
        if not isinstance(at[key], dict | list) or not at[key] or draw.random() < 0.2:
            _change(at, key, draw)
            break
        at = at[key]
    try:
        return msgspec.json.encode(whole)
    except (OverflowError, ValueError):  # a number of hundreds of digits
        import json

        return json.dumps(whole).encode()


def _change(holder: Any, key: Any, draw: random.Random) -> None:
    old = holder[key]
    like: list[Any] = TEXTS if isinstance(old, str) else NUMBERS
    choice = draw.random()
    if choice < 0.1:
        del holder[key]
    elif choice < 0.2 and isinstance(holder, dict):
        holder[draw.choice(TEXTS)] = holder.pop(key)
    elif choice < 0.3 and isinstance(holder, dict):
        holder[draw.choice(TEXTS)] = old
    elif choice < 0.8:
        holder[key] = draw.choice(like)
    else:
        holder[key] = draw.choice([*ODD, *TEXTS, *NUMBERS])


_CHANGES: list[Callable[[bytes, random.Random], bytes]] = [_bytes, _value, _value, _value]
