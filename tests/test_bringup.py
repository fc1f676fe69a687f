"""The first minutes with a device, on the CPU: order of value, a budget that is kept, failures that
are said. For kill -9 see test_killed_commands.py.
"""

from __future__ import annotations

import io
import json
import os
import signal
import time
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from on_gpu import Here, here
from rich.console import Console
from typer.testing import CliRunner

from lntune import backends, ops, schedule
from lntune import device as device_module
from lntune.backends import device_of
from lntune.backends.cpu import backend as cpu_backend
from lntune.backends.cuda import driver
from lntune.backends.cuda.model import Pair
from lntune.case import Case
from lntune.cli import app
from lntune.commands import bringup
from lntune.commands.bringup import known, outcome, steps, target, value
from lntune.commands.bringup.steps import Answer, Bench, Copy, Helper, Smoke, Verify
from lntune.errors import InputError, LogError, UnknownNameError
from lntune.log import records
from lntune.log.records import Record, Timing
from lntune.measure.jobs import Candidate, Outcome, Try, record_fields
from lntune.ops.op import Priority
from lntune.report import bringup as report
from lntune.report import progress
from lntune.system import interrupts, paths
from lntune.tune import builders, times
from lntune.versions import Code

__all__ = ["here"]

FAULTY = Path(__file__).parent / "faulty"
CPU = device_module.current()
GPU = device_of("nvidia/nvidia-h100")
SMALL = value.cases(CPU, (), "small")
CODE = schedule.get("cached_rows").code


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The schedules of tests/faulty are there, and come first."""
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(FAULTY))
    monkeypatch.setenv("LNTUNE_TEST_MARKS", str(tmp_path))
    schedule._load.cache_clear()
    yield
    schedule._load.cache_clear()


def final(
    case: Case, at: str = "2026-01-01T00:00:00", tuned: float = 10.0, **fields: Any
) -> Record:
    """A final of this CPU: eager takes 20 us, a copy 15."""
    timings = {
        "tuned": Timing((tuned,), tuned),
        "eager": Timing((20.0,), 20.0),
        "copy": Timing((15.0,), 15.0),
    }
    given = {
        "role": "final",
        "device": CPU,
        "schedule": "cached_rows",
        "code": CODE,
        "status": "ok",
        "timings": timings,
        "time": at,
        **fields,
    }
    return Record(case=case, threads=1, knobs={}, **given)


# --------------------------------------------------------------------------------------------------
# order of value


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_the_plan_is_every_default_grid(device: Any) -> None:
    """Each case of each operator's default grid is in the plan once, and what is dearer is never
    before what is worth more.
    """
    plan = value.cases(device)
    assert len(set(plan)) == len(plan)
    assert {case for op in ops.OPS.values() for case in op.grid} <= set(plan)
    costs = [value.cost(case, device.kind) for case in plan]
    assert costs == sorted(costs)


def test_what_comes_first_on_a_gpu() -> None:
    """First layer norm's forward in bfloat16 and float32 on many rows of 1024 and 4096, then
    backward, then the LSTM's step.
    """
    plan = value.cases(GPU)
    first = plan[:8]
    assert {(c.op, c.hidden, c.dtype, c.rows) for c in first} == {
        ("layer_norm", hidden, dtype, rows)
        for hidden in (1024, 4096)
        for dtype in ("bfloat16", "float32")
        for rows in (4096, 32768)
    }
    at = [next(i for i, case in enumerate(plan) if case.op == op) for op in ops.OPS]
    assert at == sorted(at)
    assert {c.dtype for c in plan if c.op == "layer_norm"} == {"bfloat16", "float32", "float16"}


def test_every_size_has_its_step() -> None:
    """Every hidden size and number of rows of a plan is in its operator's priority: none falls to
    the last place because nobody thought of it.
    """
    for device in (CPU, GPU):
        for case in value.cases(device):
            priority = ops.get(case.op).priority
            assert case.hidden in priority.hidden, case
            assert case.rows in priority.rows[device.kind], case
    steps = [op.priority.operator for op in ops.OPS.values()]
    assert steps == sorted(set(steps)), "the operators' own order is that of their worth"


def test_an_operator_that_says_nothing_of_its_worth_comes_last() -> None:
    """Without a priority a case costs more than any of the plans' of an operator that has one."""
    case = Case("layer_norm", 1024, "float32", 4096)
    for device in (CPU, GPU):
        least = Priority().steps(case, device.kind) + value.DTYPES[case.dtype]
        assert all(value.cost(other, device.kind) < least for other in value.cases(device))


def test_choosing_operators_and_grids() -> None:
    """Only the operators asked for; a name that is not there is told with the near miss."""
    assert {case.op for case in value.cases(CPU, ("lnlstm_step",))} == {"lnlstm_step"}
    assert [case.op for case in value.cases(CPU, ("layer_norm",), "small")] == ["layer_norm"]
    with pytest.raises(UnknownNameError, match="'layer_norm'"):
        value.cases(CPU, ("layer_nrom",))
    with pytest.raises(UnknownNameError, match="'small'"):
        value.cases(CPU, (), "smal")


def test_the_telling_cases() -> None:
    """On a GPU the benchmark begins with what moves the most data and has every operator; of a plan
    without any of them it has the first.
    """
    telling = value.telling(value.cases(GPU))
    assert sorted(telling) == sorted(c for op in ops.OPS.values() for c in sum(op.telling, ()))
    assert telling[0] == Case("layer_norm", 4096, "bfloat16", 32768)
    firsts = [case for op in ops.OPS.values() for case in op.telling[0]]
    assert telling[: len(firsts)] == firsts
    assert {case.op for case in telling[:6]} == set(ops.OPS)
    assert {case.op for case in value.telling(value.cases(CPU))} == set(ops.OPS)
    assert value.telling(SMALL) == SMALL


# --------------------------------------------------------------------------------------------------
# what the log knows


def test_the_log_is_the_memory(log_dir: Path) -> None:
    """A case counts as tuned when the log has a final of this device and of the schedule as it is
    now, in whatever row of its bucket.
    """
    case, stale, foreign, missing = (
        Case("layer_norm", hidden, "float32", 24) for hidden in (192, 193, 194, 195)
    )
    records.append(log_dir, final(msgspec.structs.replace(case, rows=100)))
    records.append(log_dir, final(stale, code=Code("of yesterday")))
    records.append(
        log_dir, final(foreign, device=msgspec.structs.replace(CPU, cores=CPU.cores + 1))
    )
    assert list(known.finals(CPU, [case, stale, foreign, missing])) == [case]


def test_a_benchmark_is_known_until_the_case_is_tuned_again(log_dir: Path) -> None:
    """A benchmark in the log is not measured again, unless there is a newer final; one that eager
    mode serves has no schedule.
    """
    case, eager = SMALL[0], SMALL[1]
    records.append(log_dir, final(case, "2026-01-01T00:00:00"))
    records.append(log_dir, final(case, "2026-01-02T00:00:00", role=known.BENCH))
    records.append(
        log_dir,
        final(eager, "2026-01-02T00:00:00", role=known.BENCH, schedule="eager", code=Code()),
    )
    assert list(known.benchmarked(CPU, SMALL)) == [case, eager]
    records.append(log_dir, final(case, "2026-01-03T00:00:00"))
    assert list(known.benchmarked(CPU, SMALL)) == [eager]


def test_failures_are_counted_by_kind(log_dir: Path) -> None:
    """Trials are counted by status and each kind of failure has an example; finals and benchmarks
    that went well are no trials.
    """
    for status, message in (
        ("ok", ""),
        ("wrong", "y: error 1"),
        ("wrong", "y: error 2"),
        ("timeout", "no answer"),
    ):
        records.append(log_dir, final(SMALL[0], role="trial", status=status, message=message))
    records.append(log_dir, final(SMALL[0]))
    records.append(log_dir, final(SMALL[0], status="run", message="died"))
    counted, examples = known.failures(CPU, SMALL)
    assert counted == {"ok": 1, "wrong": 2, "timeout": 1, "run": 1}
    assert set(examples) == {"wrong", "timeout", "run"}
    assert "y: error 2" in examples["wrong"] and str(SMALL[0]) in examples["wrong"]


# --------------------------------------------------------------------------------------------------
# the target


def test_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU by name or, with a note, where there is no GPU; a GPU that is not here, and one by
    its architecture, are refused with a reason.
    """
    monkeypatch.setattr(driver, "count", lambda: 0)
    monkeypatch.setattr(driver, "missing", lambda: "libcuda.so.1 is not there")
    assert target.find("cpu") == (CPU, "")
    device, note = target.find("")
    assert device == CPU and "libcuda.so.1" in note
    for name in ("cuda", "cuda:3"):
        with pytest.raises(InputError, match=r"libcuda\.so\.1"):
            target.find(name)
    for name in ("cuda:sm_90", "gpu", "cuda:-1"):
        with pytest.raises(InputError, match="cuda:N"):
            target.find(name)
    monkeypatch.setattr(driver, "count", lambda: 2)
    monkeypatch.setattr(driver, "missing", lambda: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert target.find("")[0] == CPU and "PyTorch" in target.find("")[1]
    with pytest.raises(InputError, match="built for CUDA"):
        target.find("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        driver, "device", lambda ordinal: msgspec.structs.replace(GPU, name=f"number {ordinal}")
    )
    assert [target.find(name)[0].name for name in ("", "cuda", "cuda:1")] == [
        "number 0",
        "number 0",
        "number 1",
    ]
    with pytest.raises(InputError, match="there are 2"):
        target.find("cuda:2")


# --------------------------------------------------------------------------------------------------
# the steps


def test_steps_in_a_child(faulty: None) -> None:
    """Each step gives its answer from a process of its own; one that kills the process or raises
    costs itself and nothing else. One that hangs is ended as the worker's are (test_worker.py).
    """
    case = SMALL[0]

    def smoke(name: str) -> Smoke:
        return Smoke(
            Try(case, CPU, Candidate.of(name, schedule.get(name).default(case, CPU)), 0.01)
        )

    with Helper() as helper:
        right = helper.do(smoke("cached_rows"), 60).outcome
        assert right is not None and right.status == "ok" and right.timings["tuned"].median_us > 0
        for name, status, says in (
            ("aborts", "run", "SIGABRT"),
            ("wrong", "wrong", "y"),
            ("raises", "compile", "schedule"),
        ):
            failed = helper.do(smoke(name), 60).outcome
            assert failed is not None and failed.status == status and says in failed.message
        (verified,) = helper.do(
            Verify(msgspec.structs.replace(case, variant="plain"), CPU), 60
        ).results
        assert verified.ok and verified.case.variant == "plain"
        assert helper.do(
            Verify(msgspec.structs.replace(case, variant="plane"), CPU), 60
        ).error.startswith("UnknownNameError")
        assert not helper.do(Copy(CPU), 60).error
        record = helper.do(Bench(case, CPU, 0.05, False), 60).record
        assert record is not None and {"eager", "tuned", "copy"} <= set(record.timings)


def test_a_gpu_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails and leaves the device's context broken says so, and the next one gets
    another child; one that fails alone does not.
    """
    from lntune.commands import check as verification
    from lntune.measure import trial

    def fails(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(verification, "check_cases", fails)
    step = Verify(SMALL[0], GPU)
    for broken in ("", "illegal memory access"):
        monkeypatch.setattr(trial, "_fault", lambda device, broken=broken: broken)
        answer = steps.perform(step)
        assert "illegal" in answer.error and answer.lost is bool(broken)
        stopped: list[bool] = []
        helper = Helper()
        monkeypatch.setattr(helper, "answer", lambda *_, a=answer: msgspec.json.encode(a))
        monkeypatch.setattr(helper, "stop", lambda s=stopped: s.append(True))
        assert helper.do(step, 1).error == answer.error
        assert bool(stopped) is bool(broken)


# --------------------------------------------------------------------------------------------------
# whole runs


class InProcess:
    """A helper without a child, for runs whose steps neither crash nor hang."""

    start_seconds = 0.0

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self) -> None:
        """Nothing to start."""

    def do(self, step: steps.Step, seconds: float, patient: bool = False) -> Answer:
        """The step, here and now."""
        return steps.perform(step)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good figures are is no matter here, only that they are there: whatever the budget, what
    ends a stage is measured briefly.
    """
    for module, name, value_ in (
        (cpu_backend, "_COPIED", 1 << 24),
        (steps, "COPY_SECONDS", 0.05),
        (times, "FINAL_SHARE", 1e-4),
    ):
        monkeypatch.setattr(module, name, value_)
    monkeypatch.setattr(bringup, "BENCH_SECONDS", 0.05)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are done without a child."""
    monkeypatch.setattr(bringup, "Helper", InProcess)


def go(seconds: float = 300, **changes: Any) -> tuple[report.Summary, str]:
    """A bringup of the small grid on the CPU, two candidates a case, without torch.compile:
    (summary, what it printed). It is done long before its time is over, unless the machine is very
    busy.
    """
    out = io.StringIO()
    given = {
        "seconds": seconds,
        "target": "cpu",
        "ops": ("layer_norm",),
        "grid": "small",
        "trials": 2,
        "with_compile": False,
        **changes,
    }
    return (
        bringup.run(bringup.Settings(**given), Console(file=out, width=200, highlight=False)),
        out.getvalue(),
    )


@pytest.mark.slow
def test_a_bringup_and_the_same_again(
    log_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage is done and in the log: smoke check, tuning, verification, benchmark, summary in
    both forms. The same command then finds the case and its benchmark known, and checks again what
    serves it.
    """
    summary, text = go(output=tmp_path / "out")
    assert summary.ok, text
    assert [stage.name for stage in summary.stages] == [
        "doctor",
        "copy",
        "smoke",
        "tune",
        "verify",
        "bench",
    ]
    assert summary.copy_gbps is not None and summary.copy_gbps > 0
    assert len(summary.smoke) == 2 and all(one.works for one in summary.smoke)
    assert (summary.tuned, summary.known, summary.left) == (1, 0, [])
    assert (summary.verified, summary.not_verified, summary.wrong) == (2, 0, [])
    assert [row.op for row in summary.benchmarks] == ["layer_norm"]
    assert not summary.not_benchmarked
    assert all(
        o.tuned == o.planned == o.benchmarked == 1 and (o.over_eager or o.disturbed)
        for o in summary.operators
    )
    logged = records.read([log_dir])
    assert {"trial", "final", known.BENCH} == {record.role for record in logged}
    assert sum(record.role == "trial" for record in logged) == sum(summary.trials.values()) == 2 + 2
    written = msgspec.json.decode(
        (tmp_path / "out" / "summary.json").read_bytes(), type=report.Summary
    )
    assert written.stages == summary.stages and written.operators == summary.operators
    text = (tmp_path / "out" / "summary.txt").read_text()
    assert (
        "layer_norm" in text and "next: lntune report" in text and str(log_dir / CPU.slug) in text
    )

    monkeypatch.setattr(bringup, "Helper", InProcess)
    again, _ = go()
    assert again.ok
    assert (again.tuned, again.known, again.left, again.verified) == (0, 1, [], 2)
    assert [r.role for r in records.read([log_dir]) if r not in logged] == [
        "trial",
        "trial",
    ], "the smoke check, and no more"


def tuned(
    monkeypatch: pytest.MonkeyPatch,
    takes: float,
    settings: bringup.Settings,
    works: tuple[str, ...],
) -> list[list[Case]]:
    """The calls of the tuner that a run makes on a clock of its own, on which every case takes
    `takes` seconds of those it is given; none waits.
    """
    clock = [0.0]
    calls: list[list[Case]] = []
    monkeypatch.setattr(bringup.time, "monotonic", lambda: clock[0])

    def fake(cases: list[Case], asked: Any, observer: Any) -> Any:
        calls.append(list(cases))
        clock[0] += min(asked.seconds, takes * len(cases))
        return types.SimpleNamespace(finals=[], trials=0, earlier=Counter(), interrupted=False)

    monkeypatch.setattr(bringup, "tune", fake)
    run = bringup._Bringup(
        settings,
        CPU,
        "",
        value.cases(CPU, settings.ops, settings.grid),
        Console(file=io.StringIO()),
    )
    run.results.smoke = [
        report.Smoked(Case(op, 8, "float32", 1), "s", "ok" if op in works else "run", "")
        for op in ops.OPS
    ]
    helper = types.SimpleNamespace(start_seconds=2.0)
    run.tune(helper)  # type: ignore[arg-type]
    kept = (bringup.SHARES["verify"] + bringup.SHARES["bench"]) * settings.seconds
    assert clock[0] <= settings.seconds - kept, "the others' shares are left to them"
    return calls


def test_time_is_shared_in_order_of_value(monkeypatch: pytest.MonkeyPatch, log_dir: Path) -> None:
    """New cases come first and the most valuable first, no more of them than there is time for;
    what a case does not use goes on to further ones; those of an operator that failed the smoke
    check come last; known ones are tuned again when all are done.
    """
    # not the shipped logs, which may be of this CPU
    monkeypatch.setattr(paths, "log_dirs", lambda: [log_dir])
    plan = value.cases(CPU)
    settings = bringup.Settings(seconds=100)
    (only,) = tuned(monkeypatch, backends.of(CPU).case_seconds, settings, tuple(ops.OPS))
    assert only == plan[: int((100 - 30 - 2) / backends.of(CPU).case_seconds)]
    first, second, *_ = tuned(
        monkeypatch, backends.of(CPU).case_seconds / 2, settings, tuple(ops.OPS)
    )
    assert first == only and second == plan[len(first) : len(first) + len(second)] and second
    (without,) = tuned(monkeypatch, backends.of(CPU).case_seconds, settings, ("lnlstm_step",))
    assert {case.op for case in without} == {"lnlstm_step"}
    for case in plan[5:]:
        records.append(log_dir, final(case))
    new, again, *_ = tuned(monkeypatch, 1.0, settings, tuple(ops.OPS))
    assert new == plan[:5] and again[0] == plan[5]
    assert tuned(monkeypatch, 1.0, bringup.Settings(seconds=100, trials=2), tuple(ops.OPS)) == [
        plan[:5]
    ]
    assert tuned(monkeypatch, 1.0, bringup.Settings(seconds=5), tuple(ops.OPS)) == []


@pytest.mark.exhaustive
@pytest.mark.slow
def test_an_operator_that_fails(
    faulty: None, monkeypatch: pytest.MonkeyPatch, log_dir: Path
) -> None:
    """An operator whose default knobs crash is named in the first seconds, logged, and tuned after
    the others; the others are tuned, and the whole is no success.
    """
    plans = schedule.for_op

    def first(op: str, kind: str) -> dict[str, Any]:
        schedules = plans(op, kind)
        return {"aborts": schedule.get("aborts")} if op == "layer_norm" else schedules

    monkeypatch.setattr(schedule, "for_op", first)
    monkeypatch.setattr(bringup, "SMOKE_SIZES", {"float32": 100})
    summary, text = go(ops=("layer_norm", "layer_norm_backward"), trials=1)
    assert not summary.ok
    assert [one.status for one in summary.smoke] == ["run", "ok"]
    assert "smoke: layer_norm 24x100 float32 aborts: run: the worker died (SIGABRT)" in text
    assert [o.tuned for o in summary.operators if o.op == "layer_norm_backward"] == [1]
    assert summary.trials["run"] >= 1 and "aborts" in summary.failures["run"]
    assert any("failed the smoke check" in step for step in summary.next)
    tried = [
        r.case.op
        for r in sorted(records.read([log_dir]), key=lambda r: r.time)
        if r.case in SMALL and r.role == "trial"
    ]
    assert tried == sorted(tried, reverse=True), "layer_norm_backward first"


def test_nothing_works(in_process: None, faulty: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing passes the smoke check no more time is spent: the summary says so at once."""
    monkeypatch.setattr(schedule, "for_op", lambda op, kind: {"raises": schedule.get("raises")})
    summary, _ = go()
    assert not summary.ok and summary.tuned == 0
    assert [stage.name for stage in summary.stages] == ["doctor", "copy", "smoke"]
    assert summary.next == [
        "nothing works on this device yet: see lntune doctor and the messages above"
    ]
    assert "cannot schedule this" in summary.smoke[0].message


def test_too_little_time(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget that is over before the smoke check is done ends it there, says how much was not
    reached, and is no success.
    """
    clock = iter(range(1000))
    left = bringup._Bringup.left
    monkeypatch.setattr(
        bringup._Bringup,
        "left",
        lambda self, reserved=0.0: left(self, reserved) - 150 * next(clock),
    )
    summary, text = go()
    assert 0 < len(summary.smoke) < 2 and summary.not_smoked == 2 - len(summary.smoke)
    assert not summary.ok and "1 not reached" in text
    assert summary.left and summary.verified == 0 and summary.not_benchmarked


def test_no_schedule_for_the_device(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator without a schedule for the device fails its smoke check with that reason."""
    monkeypatch.setattr(schedule, "for_op", lambda op, kind: {})
    summary, _ = go()
    assert {(one.status, one.message) for one in summary.smoke} == {
        ("invalid", "layer_norm has no schedule for a cpu")
    }


def test_a_wrong_kernel_is_found(
    in_process: None, monkeypatch: pytest.MonkeyPatch, log_dir: Path
) -> None:
    """A kernel that serves calls and is wrong is named in the summary, which then is no success."""
    records.append(log_dir, final(SMALL[0]))
    do = InProcess.do

    def spoiled(self: InProcess, step: steps.Step, seconds: float, patient: bool = False) -> Answer:
        answer = do(self, step, seconds, patient)
        if isinstance(step, Verify):
            return msgspec.structs.replace(
                answer,
                results=[
                    msgspec.structs.replace(r, ok=False, message="y: far off")
                    for r in answer.results
                ],
            )
        return answer

    monkeypatch.setattr(InProcess, "do", spoiled)
    summary, _ = go()
    assert not summary.ok
    assert len(summary.wrong) == summary.verified > 0 and "y: far off" in summary.wrong[0]
    assert "wrong" in summary.next[0]


def test_a_busy_machine_is_no_fault_of_a_kernel(
    in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps whose limit is to find what hangs get more time where others take the cores; those that
    the budget limits do not.
    """
    asked: dict[type, set[bool]] = {}

    def do(self: InProcess, step: steps.Step, seconds: float, patient: bool = False) -> Answer:
        asked.setdefault(type(step), set()).add(patient)
        return Answer("not done")

    monkeypatch.setattr(InProcess, "do", do)
    monkeypatch.setattr(
        bringup._Bringup,
        "tune",
        lambda self, helper: self.results.tuned.update({SMALL[0]: final(SMALL[0])}) or "",
    )
    monkeypatch.setattr(
        bringup.known, "finals", lambda device, cases: {case: final(case) for case in cases}
    )
    monkeypatch.setattr(bringup.Smoked, "works", True)
    go()
    assert asked == {Copy: {False}, Smoke: {True}, Verify: {True}, Bench: {False}}


def test_an_interrupt_leaves_a_summary(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, and SIGTERM and SIGHUP as a command takes them, end the run with a summary of what
    was found.
    """
    for sent in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        monkeypatch.setattr(
            bringup._Bringup,
            "smoke",
            lambda self, helper, sent=sent: os.kill(os.getpid(), sent) or time.sleep(5) or "",
        )
        with interrupts.as_ctrl_c() as came:
            summary, _ = go()
        assert summary.interrupted and not summary.ok
        assert [stage.name for stage in summary.stages] == ["doctor", "copy"]
        assert came == ([] if sent == signal.SIGINT else [sent])


def test_a_summary_that_cannot_be_written(in_process: None, tmp_path: Path) -> None:
    """The folder is named, and what to do."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"--output.*file"):
        go(output=tmp_path / "file" / "out")


def test_a_log_that_cannot_be_written(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first record shows it, with the remedy."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(tmp_path / "file" / "log"))
    with pytest.raises(LogError, match="--log-dir"):
        go()


# --------------------------------------------------------------------------------------------------
# the summary


def a_summary(**changes: Any) -> report.Summary:
    """A summary of the small grid with nothing in the log, changed."""
    summary = outcome.summary(CPU, "", SMALL, outcome.Results(), 0, 12.0, 60.0)
    return msgspec.structs.replace(summary, **changes)


def test_predictions_are_kept_beside_what_was_measured(tmp_path: Path) -> None:
    """A candidate a line, those of an earlier run before those of a later one."""
    pairs = [Pair(f"case {n}", CPU, (), 1024, 2.0, 3.0 + n) for n in range(3)]
    outcome.write_pairs(pairs[:2], tmp_path / "out")
    outcome.write_pairs(pairs[2:], tmp_path / "out")
    lines = (tmp_path / "out" / outcome.PAIRS).read_bytes().splitlines()
    assert [msgspec.json.decode(line, type=Pair) for line in lines] == pairs


def test_the_summary_in_words(log_dir: Path) -> None:
    """What a person needs is said: copy, smoke, failures by kind, slower cases, wrong kernels, what
    was not reached, the log, what next.
    """
    records.append(log_dir, final(SMALL[0], tuned=25.0))
    records.append(log_dir, final(SMALL[0], role="trial", status="wrong", message="y: error 1"))
    smoke = [
        report.Smoked(SMALL[0], "cached_rows", "ok", ""),
        report.Smoked(SMALL[1], "x", "run", "SIGSEGV"),
    ]
    results = outcome.Results(
        copy_gbps=1234.5,
        smoke=smoke,
        wrong=["a case: y"],
        verified=3,
        not_verified=2,
        not_benchmarked={"a case": "over"},
    )
    summary = outcome.summary(CPU, "a note", SMALL, results, 1, 12.0, 60.0)
    text = "\n".join(report.lines(summary))
    for part in (
        "a note",
        "1,234 GB/s",
        "1 of 2 operators",
        "SIGSEGV",
        "1 wrong",
        "y: error 1",
        "slower than eager: layer_norm 24x192 float32: 0.80x",
        "verified 3 kernels, 1 WRONG, 2 not reached",
        "not benchmarked: a case: over",
        "12 of 60 s",
        str(log_dir / CPU.slug),
        "next: kernels that serve calls are wrong",
        f"the same command goes on: {len(SMALL) - 1} case",
    ):
        assert part in text, f"{part!r} is not in\n{text}"
    assert not summary.ok


def test_shares_of_a_copy_are_of_data_beyond_the_cache() -> None:
    """A kernel is held against a copy where the data is far beyond the last cache, and only
    there.
    """
    device = msgspec.structs.replace(CPU, l3=1 << 20)
    cached, beyond = (
        Case("layer_norm", 256, "float32", 32),
        Case("layer_norm", 4096, "float32", 4096),
    )
    operator = report.operator(
        "layer_norm", 2, [final(case, device=device) for case in (cached, beyond)], []
    )
    assert operator.of_copy == operator.smallest_of_copy == pytest.approx(1.5)
    assert report.operator("layer_norm", 2, [final(cached, device=device)], []).of_copy is None


def test_disturbed_measurements_are_left_out_and_reported(log_dir: Path) -> None:
    """A final and a benchmark whose times are those of other work on the machine, 10752 times
    eager's, make no figure, and a line says so.
    """
    sound, wrong = Case("layer_norm", 256, "float32", 32), Case("layer_norm", 4096, "float32", 4096)
    far = {
        "tuned": Timing((0.744,), 0.744),
        "eager": Timing((8000.0,), 8000.0),
        "copy": Timing((15.0,), 15.0),
    }
    records_ = [final(sound), final(wrong, timings=far)]
    operator = report.operator(
        "layer_norm",
        2,
        records_,
        [
            final(
                sound,
                role="bench",
                busy=True,
                timings={**records_[0].timings, "compile": far["copy"]},
            )
        ],
    )
    assert (
        operator.tuned,
        operator.over_eager,
        operator.slower_than_eager,
        operator.disturbed,
    ) == (
        2,
        pytest.approx(2.0),
        [],
        2,
    )
    assert (operator.benchmarked, operator.over_better, operator.of_copy) == (1, None, None)
    for record in records_:
        records.append(log_dir, record)
    summed = outcome.summary(CPU, "", [sound, wrong], outcome.Results(), 0, 1.0, 1.0)
    assert (
        "1 measurement was disturbed by other work on the machine and left out: neither times nor"
        " ratios of these hold" in report.lines(summed)
    )


@pytest.mark.parametrize("ok", [True, False])
def test_the_command(ok: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options become settings, the log folder holds during the run, the exit code is 0 or 1, and
    --json has the whole summary.
    """
    seen: list[Any] = []

    def fake(settings: bringup.Settings, out: Console) -> report.Summary:
        seen.append((settings, os.environ["LNTUNE_LOG_DIR"]))
        return a_summary(ok=ok)

    monkeypatch.setattr(bringup, "run", fake)
    options = [
        "--budget",
        "2m",
        "--target",
        "cpu",
        "--ops",
        "layer_norm,lnlstm_step",
        "--grid",
        "small",
        "--trials",
        "4",
        "--no-compile",
        "--seed",
        "3",
    ]
    done = CliRunner().invoke(app, ["bringup", *options, "--log-dir", str(tmp_path), "--json"])
    assert done.exit_code == (0 if ok else 1)
    assert seen == [
        (
            bringup.Settings(120, "cpu", ("layer_norm", "lnlstm_step"), "small", 4, False, 3),
            str(tmp_path),
        )
    ]
    assert json.loads(done.stdout)["ok"] is ok
    assert "tuned" in CliRunner().invoke(app, ["bringup"]).stdout


def test_outcomes_are_records(log_dir: Path) -> None:
    """A smoke check is in the log as a trial is."""
    outcome_ = Outcome("ok", "", {"tuned": Timing((1.0,), 1.0)}, {"y": 0.5}, {"y": 1.0})
    assert set(record_fields(outcome_)) <= set(Record.__struct_fields__)


@pytest.mark.exhaustive
def test_a_bringup_on_an_imagined_gpu(
    in_process: None, here: Here, log_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage works with a GPU as the target: kernels are built ahead for it, run by the
    tuner's own processes, verified and benchmarked as they serve calls on its tensors, and logged
    as its own.
    """
    if here.real:
        summary, text = go(target="cuda", ops=(), with_compile=True)
    else:
        monkeypatch.setattr(builders, "MOST", 1)  # each imports torch and TVM, for two kernels
        summary, text = go(target="cuda")
    assert summary.ok, f"{text}\n{summary}"
    assert summary.target == here.device.isa and summary.left == []
    assert all(one.works for one in summary.smoke)
    assert (
        summary.tuned == len(summary.operators)
        and summary.verified >= 2 * summary.tuned
        and summary.wrong == []
    )
    assert len(summary.benchmarks) == summary.tuned and not summary.not_benchmarked
    assert {record.device for record in records.read([log_dir])} == {here.device}
    assert {backends.of(record.device).name for record in records.read([log_dir])} == {"cuda"}


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_steps(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal one live line, removed at the end; elsewhere plain lines, no more than one in
    five seconds. What is left to do is estimated by what is done.
    """
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with progress.StepProgress(
        Console(file=out, width=100, force_terminal=terminal, highlight=False), "verify", 3
    ) as step:
        for what in ("first", "second", "third"):
            step(what)
            clock[0] += 3
            if step._live:
                step._live.refresh()
    if terminal:
        assert (
            "verify [2/3] about 6 s left: second" in out.getvalue() and "\x1b[2K" in out.getvalue()
        )
    else:
        assert out.getvalue().splitlines() == ["verify [3/3] about 3 s left: third"]
