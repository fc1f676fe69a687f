"""What a user may choose about a tuning run, and whether it makes sense."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lntune import backends, knobs, ops, schedule, search
from lntune import device as device_module
from lntune.backends import inputs
from lntune.case import Case
from lntune.device import Device
from lntune.errors import (
    InputError,
    LogError,
    ScheduleError,
    ToolchainError,
    got_expected,
)
from lntune.schedule import ScheduleWarning
from lntune.system import callers, paths, toolchain
from lntune.tune import candidates

TRIAL_TIMEOUT = 30.0


@dataclass(frozen=True)
class Settings:
    """What a user may choose. `seconds` and `trials` bound the whole run and each case's search;
    None is no bound. `again`: what earlier runs have tried is tried again.

    `knobs` are those that are not searched, `name=value` or a switch that is to be on; schedules
    that do not have them are tuned as ever.

    `workers` are how many processes of a CPU's build and check candidates beside each other, None
    for as many as there are cores and memory for, see beside.count.

    `device` is what to tune for, None this machine's CPU; a GPU has to be here, unless it is a dry
    run. `search` is a name in search.SEARCHES, the empty string for what suits the device.
    """

    search: str = ""
    schedules: tuple[str, ...] = ()
    knobs: tuple[str, ...] = ()
    seconds: float | None = 60.0
    trials: int | None = None
    seed: int = 0
    log_dir: Path | None = None
    threads: int | None = None
    timeout: float = TRIAL_TIMEOUT
    device: Device | None = None
    again: bool = False
    workers: int | None = None

    @property
    def target(self) -> Device:
        """The device to tune for."""
        return self.device or device_module.current()

    @property
    def strategy(self) -> str:
        """The search to use: on a GPU, where candidates are built ahead, one that takes what is
        ready and ranked first.
        """
        return self.search or backends.of(self.target).search


def check_settings(settings: Settings, cases: Sequence[Case], dry: bool = False) -> None:
    """Complain about everything wrong before the first second is spent; `dry`: the device need not
    be here and nothing is logged. A schedule of the user's that fails is left out, which is said,
    unless it is one that was named.

    Raises:
        InputError, UnknownNameError, ScheduleError, BuildError, LogError.
    """
    if not cases:
        raise InputError("no cases to tune: give at least one hidden size, dtype and row count.")
    for name, value in (
        ("budget", settings.seconds),
        ("trials", settings.trials),
        ("timeout", settings.timeout),
        ("workers", settings.workers),
    ):
        if value is not None and not value > 0:
            raise InputError(got_expected(name, value, "more than 0"))
    search.ensure_usable(settings.strategy)
    if (settings.workers or 1) > 1 and backends.of(settings.target).builds_ahead:
        raise InputError(
            got_expected(
                "workers",
                settings.workers,
                f"1 for {settings.target.name}, whose candidates other processes build anyway",
                "Leave it out.",
            )
        )
    device, broken = settings.target, set[str]()
    for case in cases:
        ops.get(case.op).check_variant(case.variant)
        if case.rows < 1:
            raise InputError(
                got_expected("rows", case.rows, "1 or more", "An empty batch needs no kernel.")
            )
        for name in settings.schedules:
            if schedule.get(name, case.op, device.kind).kind != device.kind:
                raise ScheduleError(f"schedule {name!r} is not for this device, a {device.kind}.")
        _check_knobs(settings, case)
        for one in candidates.to_tune(case, device, settings.schedules):
            if one.shipped or one.name in broken:
                continue
            try:
                candidates.space(one, case, device)
            except ScheduleError as e:
                if settings.schedules:
                    raise
                broken.add(one.name)
                callers.warn(f"left out: {e}", ScheduleWarning)
    if problems := toolchain.incompatible():
        raise ToolchainError("; ".join(problems) + ".")
    toolchain.compiler()
    backends.of(device).ensure_compiler()
    if dry:
        return
    backends.of(device).torch_device(device)
    inputs.check_size(cases)
    folder = (settings.log_dir or paths.log_dir()) / device.slug
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise LogError(
            f"cannot write tuning logs to {folder}: {e.strerror or e}. Choose a writable folder"
            " with --log-dir or LNTUNE_LOG_DIR."
        ) from e


def _check_knobs(settings: Settings, case: Case) -> None:
    """Complain about a knob that no schedule of a case has, or a value that it may not take.

    Raises:
        InputError, UnknownNameError.
    """
    chosen = candidates.to_tune(case, settings.target, settings.schedules)
    known = {name for one in chosen for name in knobs.values_of(one.knobs)}
    for word in settings.knobs:
        if (name := candidates.knob_of(word)) and name not in known:
            raise knobs.unknown_knob(name, [one.knobs for one in chosen])
    for one in chosen:
        candidates.fixed(one, settings.knobs)
