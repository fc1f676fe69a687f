"""`lntune bringup`, the first minutes with a device: look, smoke check, tune the default grids in
order of value, verify, benchmark, sum up.

All that is measured is in the tuning log at once, and the log is the only memory: killed at any
moment, the same command goes on. A case with a final of this device and of its schedule as it is
now is not tuned again unless everything else is.
"""

from __future__ import annotations

import datetime
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from lntune import backends, ops, schedule
from lntune.case import Case
from lntune.commands import doctor
from lntune.commands.bringup import known, outcome, target, value
from lntune.commands.bringup.outcome import Results
from lntune.commands.bringup.steps import Bench, Copy, Helper, Smoke, Verify
from lntune.device import Device
from lntune.log import records, select
from lntune.log.records import Record
from lntune.measure.jobs import Candidate, Outcome, Try, record_fields
from lntune.report.bringup import Smoked, Stage, Summary
from lntune.report.columns import say
from lntune.report.progress import StepProgress, TuningProgress
from lntune.system import paths, toolchain
from lntune.tune import TRIAL_SECONDS, TRIAL_TIMEOUT, tune
from lntune.tune import Settings as TuneSettings
from lntune.tune.builders import Builders, Key, default_count
from lntune.words import counted, trials

SHARES = {"smoke": 0.25, "verify": 0.1, "bench": 0.2}
"""Parts of the budget: what the smoke check may take at most, and what is kept for verifying and
for the benchmark. The rest is tuning.
"""
SMALL_CASE_SECONDS = 1.0
"""What a case of the grid of small cases gets at least, see Backend.case_seconds."""
BENCH_SECONDS = 1.0
COMPILE_SECONDS = 15.0
"""What torch.compile is thought to take before the first time it is known."""
VERIFY_SECONDS = 60.0
"""When a verification that does not answer is given up."""
SMOKE_SIZES = {"float32": 1000, "bfloat16": 1024}
"""Hidden sizes of the smoke check: an odd one, and one of whole vectors."""
SMOKE_ROWS = 24
SMOKE_SECONDS, SMOKE_LEAST = 30.0, 5.0
"""Seconds one kernel may take: while the smoke check has time, and in any case."""


@dataclass(frozen=True)
class Settings:
    """What a user may choose; `seconds` is the whole run's budget, `trials` a bound of each case's
    search, with which no case is tuned again.
    """

    seconds: float = 600.0
    target: str = ""
    ops: tuple[str, ...] = ()
    grid: str = "default"
    trials: int | None = None
    with_compile: bool = True
    seed: int = 0
    output: Path | None = None


def run(settings: Settings, out: Console) -> Summary:
    """A bringup of about `settings.seconds`. `out` shows how it goes; the summary, also of a run
    that was interrupted, is the caller's to show.

    With `settings.output` the summary as it stands is written there after every stage, and when the
    run ends or is ended.

    Raises:
        InputError, UnknownNameError: a target, operator or grid that is not there.
        ToolchainError: nothing can be built here.
        LogError: the tuning log cannot be written.
    """
    device, note = target.find(settings.target)
    bringup = _Bringup(
        settings, device, note, value.cases(device, settings.ops, settings.grid), out
    )
    try:
        bringup.everything()
    except KeyboardInterrupt:
        bringup.results.interrupted = True
    return bringup.summed_up()


class _Bringup:
    """One run."""

    def __init__(
        self, settings: Settings, device: Device, note: str, plan: list[Case], out: Console
    ) -> None:
        self.settings, self.device, self.note, self.plan, self.out = (
            settings,
            device,
            note,
            plan,
            out,
        )
        self.begun = time.monotonic()
        self.end = self.begun + settings.seconds
        self.results = Results()
        self.id = uuid.uuid4().hex[:12]
        self.before = known.finals(device, plan)

    def left(self, reserved: float = 0.0) -> float:
        """Seconds until the end, less a part of the whole that is reserved."""
        return self.end - time.monotonic() - reserved * self.settings.seconds

    def everything(self) -> None:
        """All stages, the cheapest and most telling first."""
        say(
            self.out,
            f"{self.device.name}, {self.device.slug}{': ' + self.note if self.note else ''}",
        )
        self.stage("doctor", self.examine)
        with Helper() as helper:
            self.stage("copy", lambda: self.copy(helper))
            self.stage("smoke", lambda: self.smoke(helper))
            if not any(smoked.works for smoked in self.results.smoke):
                return
            self.stage("tune", lambda: self.tune(helper))
            self.stage("verify", lambda: self.verify(helper))
            self.stage("bench", lambda: self.bench(helper))

    def stage(self, name: str, do: Callable[[], str]) -> None:
        """Do a stage, say in a line what came of it, and write the summary as it stands."""
        begun = time.monotonic()
        detail = do()
        self.results.stages.append(Stage(name, detail, round(time.monotonic() - begun, 2)))
        say(self.out, f"{name}: {detail} ({self.results.stages[-1].seconds:.1f} s)")
        self.summed_up()

    def examine(self) -> str:
        """The doctor; what it does not like is kept."""
        findings = doctor.examine()
        # what is tuned is this command's business
        looked_at = [f for f in findings if f.status != "ok" and f.topic != "tuned cases"]
        self.results.doctor = [
            f"{f.status} {f.topic}: {f.detail} {f.remedy}".strip() for f in looked_at
        ]
        count = counted(len(findings), "finding")
        return f"{count}, {len(self.results.doctor)} of them to be looked at"

    def copy(self, helper: Helper) -> str:
        """The yardstick."""
        helper.start()
        answer = helper.do(Copy(self.device), max(5.0, self.left()))
        if answer.bandwidth is None:
            return f"not measured: {answer.error}"
        self.results.copy_gbps = answer.bandwidth / 1e9
        return f"{self.results.copy_gbps:,.1f} GB/s"

    def builders(self, kernels: Sequence[Key], timeout: float) -> Builders:
        """Processes that build kernels on all cores before a step needs them; none for a CPU, whose
        kernels are built in no time. What fails to build fails again, and is recorded, in its step.
        """
        ahead = backends.of(self.device).builds_ahead
        count = min(default_count(), len(kernels)) if ahead else 0
        return Builders(self.device, timeout, count=count, wanted=kernels)

    def smoke(self, helper: Helper) -> str:
        """What serves every operator where nothing is tuned, on a small shape: built, loaded,
        checked against float64.
        """
        cases = [
            Case(op, hidden, dtype, SMOKE_ROWS)
            for dtype, hidden in SMOKE_SIZES.items()
            for op in dict.fromkeys(c.op for c in self.plan)
        ]
        schedules = {case: schedule.for_op(case.op, self.device.kind) for case in cases}
        served = {case: select.untuned(case, self.device, schedules[case]) for case in cases}
        defaults = {
            case: Candidate.of(name, setting) for case, (name, setting, _) in served.items() if name
        }
        until = time.monotonic() + SHARES["smoke"] * self.settings.seconds
        with (
            self.builders(list(defaults.items()), SMOKE_SECONDS) as builders,
            StepProgress(self.out, "smoke", len(cases)) as progress,
        ):
            for case, (name, _, steps) in served.items():
                progress(str(case))
                if not name:
                    reason = (
                        "; ".join(steps)
                        if schedules[case]
                        else f"{case.op} has no schedule for a {self.device.kind}"
                    )
                    self.results.smoke.append(Smoked(case, "", "invalid", reason))
                    continue
                default = schedules[case][name]
                if self.left() <= 0:
                    break
                builders.wait(case, defaults[case], until - time.monotonic())
                job = Try(case, self.device, defaults[case], TRIAL_SECONDS, self.settings.seed)
                seconds = min(
                    SMOKE_SECONDS, max(min(SMOKE_LEAST, self.left()), until - time.monotonic())
                )
                answer = helper.do(Smoke(job), seconds, patient=True)
                result = answer.outcome or Outcome("run", answer.error)
                self.log(
                    case,
                    role="trial",
                    schedule=default.name,
                    code=default.code,
                    knobs=defaults[case].knobs,
                    **record_fields(result),
                )
                self.results.smoke.append(Smoked(case, default.name, result.status, result.message))
        failed = [smoked for smoked in self.results.smoke if not smoked.works]
        for smoked in failed:
            say(self.out, f"smoke: {smoked}")
        self.results.not_smoked = len(cases) - len(self.results.smoke)
        rest = f", {self.results.not_smoked} not reached" if self.results.not_smoked else ""
        return f"{len(self.results.smoke) - len(failed)} of {len(self.results.smoke)} work{rest}"

    def log(self, case: Case, **fields: Any) -> None:
        """Append a record of this run."""
        import torch

        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        threads, versions = torch.get_num_threads(), toolchain.versions()
        records.append(
            paths.log_dir(),
            Record(
                case=case,
                device=self.device,
                threads=threads,
                versions=versions,
                run=self.id,
                time=now,
                **fields,
            ),
        )

    def tune(self, helper: Helper) -> str:
        """New cases in order of value, those last whose operator failed the smoke check; then, with
        time left, the known ones again.
        """
        works = {smoked.case.op for smoked in self.results.smoke if smoked.works}
        new = sorted(
            (case for case in self.plan if case not in self.before),
            key=lambda case: case.op not in works,
        )
        known_cases = [
            case for case in self.plan if case in self.before and self.settings.trials is None
        ]
        least = (
            backends.of(self.device).case_seconds
            if self.settings.grid == "default"
            else SMALL_CASE_SECONDS
        )
        sentences: list[str] = []
        for waiting, seed in (
            (new, self.settings.seed),
            (known_cases, self.settings.seed + len(known_cases) + 1),
        ):
            while waiting and not self.results.interrupted:
                seconds = self.left(SHARES["verify"] + SHARES["bench"])
                # the tuner's child starts first
                count = int((seconds - helper.start_seconds) / least)
                if count < 1:
                    break
                sentences.append(self._tune(waiting[:count], seconds, seed))
                del waiting[:count]
        if self.results.interrupted:
            raise KeyboardInterrupt
        return "; ".join(sentences) or "nothing to tune in the time there is"

    def _tune(self, cases: list[Case], seconds: float, seed: int) -> str:
        timeout = min(TRIAL_TIMEOUT, max(5.0, self.settings.seconds / 10))
        settings = TuneSettings(
            seconds=seconds,
            trials=self.settings.trials,
            seed=seed,
            timeout=timeout,
            device=self.device,
        )
        with TuningProgress(self.out) as progress:
            tuning = tune(cases, settings, progress)
        self.results.tuned |= {record.case: record for record in tuning.finals}
        self.results.interrupted = tuning.interrupted
        if self.settings.output is not None and tuning.pairs:
            outcome.write_pairs(tuning.pairs, self.settings.output)
        return (
            f"{len(tuning.finals)} of {counted(len(cases), 'case')} in"
            f" {trials(tuning.trials, tuning.earlier.total())}"
        )

    def verify(self, helper: Helper) -> str:
        """What serves the tuned cases, those of this run first, the most valuable first: the
        default variant of all, then the variants that PyTorch calls besides.
        """
        # Where tuning took longer than its share, what is left is divided as the shares are.
        left = self.left()
        until = time.monotonic() + max(
            self.left(SHARES["bench"]),
            left * SHARES["verify"] / (SHARES["verify"] + SHARES["bench"]),
        )
        tuned = [case for case in self.plan if case in self.results.tuned]
        tuned += [
            case for case in self.plan if case in self.before and case not in self.results.tuned
        ]
        todo = [
            msgspec.structs.replace(case, variant=ops.get(case.op).check_variant(""))
            for case in tuned
        ]
        todo += [
            msgspec.structs.replace(case, variant=variant)
            for case in tuned
            for variant in ops.get(case.op).checked
        ]
        finals = known.finals(self.device, tuned)
        served = [finals[msgspec.structs.replace(case, variant="")] for case in todo]
        kernels = [(case, Candidate.of_record(r)) for case, r in zip(todo, served, strict=True)]
        checked = 0
        with (
            self.builders(kernels, VERIFY_SECONDS) as builders,
            StepProgress(self.out, "verify", len(todo)) as progress,
        ):
            for case, candidate in kernels:
                progress(str(case))
                builders.wait(case, candidate, min(VERIFY_SECONDS, until - time.monotonic()))
                if (left := until - time.monotonic()) <= 0:
                    break
                answer = helper.do(
                    Verify(case, self.device),
                    min(VERIFY_SECONDS, left),
                    patient=left >= VERIFY_SECONDS,
                )
                if answer.late and left < VERIFY_SECONDS:
                    break  # the time was over, which is not the kernel's fault
                checked += 1
                self.results.wrong += [
                    f"{r.case}: {r.schedule}: {r.message}" for r in answer.results if not r.ok
                ]
                self.results.wrong += [f"{case}: {answer.error}"] if answer.error else []
        self.results.verified, self.results.not_verified = checked, len(todo) - checked
        return (
            f"{checked} of {counted(len(todo), 'kernel')} checked, {len(self.results.wrong)} wrong"
        )

    def bench(self, helper: Helper) -> str:
        """The telling cases against eager, torch.compile and whoever else is installed, unless the
        log has them.
        """
        telling = value.telling(self.plan)
        known_cases = known.benchmarked(self.device, telling)
        takes = BENCH_SECONDS + (COMPILE_SECONDS if self.settings.with_compile else 1.0)
        todo = [case for case in telling if case not in known_cases]
        with StepProgress(self.out, "bench", len(todo)) as progress:
            for case in todo:
                left = self.left()
                if left < takes:
                    self.results.not_benchmarked[str(case)] = "the time was over"
                    continue
                progress(str(case))
                begun = time.monotonic()
                answer = helper.do(
                    Bench(case, self.device, BENCH_SECONDS, self.settings.with_compile), left
                )
                takes = time.monotonic() - begun
                if answer.record is None:
                    self.results.not_benchmarked[str(case)] = answer.error
                    continue
                served = {
                    name: getattr(answer.record, name) for name in ("schedule", "code", "knobs")
                }
                self.log(case, role=known.BENCH, **served, **record_fields(answer.record))
                self.results.wrong += (
                    [f"{case}: {answer.record.schedule}: {answer.record.message}"]
                    if answer.record.status == "wrong"
                    else []
                )
        benchmarked = len(telling) - len(self.results.not_benchmarked)
        count = counted(len(telling), "case")
        return f"{benchmarked} of {count}, {len(known_cases)} of them known before"

    def summed_up(self) -> Summary:
        """The summary as things stand, which is also written where that was asked for."""
        seconds = time.monotonic() - self.begun
        summary = outcome.summary(
            self.device,
            self.note,
            self.plan,
            self.results,
            len(self.before),
            seconds,
            self.settings.seconds,
        )
        if self.settings.output is not None:
            outcome.write(summary, self.settings.output)
        return summary
