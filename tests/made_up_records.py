"""Records of measurements that nobody made, for tests of what is said of them."""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import msgspec

from lntune import device, knobs, schedule
from lntune.case import Case
from lntune.device import Device
from lntune.log.records import Record, Rival, Timing

HERE = Device("cpu", "Some CPU", "x86-64-v3", 4)
THERE = Device("cpu", "Other CPU", "x86-64-v4", 8)


def timing(*samples: float) -> Timing:
    """A contender's samples in microseconds."""
    return Timing(samples, statistics.median(samples))


def samples(median: float, noise: float = 0.01, count: int = 60, seed: int = 0) -> Timing:
    """Made-up samples: gaussian around the median, `noise` its relative deviation."""
    generator = random.Random(seed)
    return timing(*(median * (1 + noise * generator.gauss(0, 1)) for _ in range(count)))


def rival(schedule: str, timing: Timing, **knobs: Any) -> Rival:
    """A finalist that did not win."""
    return Rival(schedule, knobs, timing)


def record(
    hidden: int = 1024,
    rows: int = 512,
    dtype: str = "float32",
    device: Device = HERE,
    **fields: Any,
) -> Record:
    """A final record of layer norm; unless told otherwise the kernel takes 50 us, eager mode 100, a
    copy 40 and the default knobs 60.
    """
    times = {"tuned": 50, "eager": 100, "copy": 40, "default": 60}
    timings = {name: samples(us, seed=i) for i, (name, us) in enumerate(times.items())}
    values: dict[str, Any] = {
        "role": "final",
        "threads": 2,
        "schedule": "cached_rows",
        "knobs": {"lanes": 4},
        "status": "ok",
        "timings": timings,
        "run": "run",
        "time": "2026-01-02T03:04:05.000+00:00",
    }
    case = Case(fields.pop("op", "layer_norm"), hidden, dtype, rows)
    return Record(case=case, device=device, **{**values, **fields})


def bench_file(path: Path, measured: list[Record]) -> Path:
    """A file as `lntune bench --output` writes it."""
    path.write_bytes(
        msgspec.json.encode({"outputs": "given", "cases": [], "summary": {}, "records": measured})
    )
    return path


def final_here(case: Case, tuned: float = 1.0, eager: float = 2.0, **fields: Any) -> Record:
    """A final, on this machine, of the default knobs of the first schedule for a case."""
    here = device.current()
    name, plan = next(iter(schedule.for_op(case.op, here.kind).items()))
    values: dict[str, Any] = {
        "role": "final",
        "device": here,
        "threads": 1,
        "schedule": name,
        "code": plan.code,
        "knobs": knobs.to_dict(plan.default(case.typical, here)),
        "status": "ok",
        "timings": {"tuned": timing(tuned), "eager": timing(eager)},
        "time": "2026-01-01",
    }
    return Record(case=case, **{**values, **fields})
