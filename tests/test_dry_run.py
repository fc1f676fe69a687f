"""The tuner without the device: what a dry run builds, checks, prunes, ranks and reckons, and that
it logs nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_ahead import facts
from typer.testing import CliRunner, Result

from lntune import backends, knobs, schedule
from lntune.backends import cuda, device_of
from lntune.case import Case
from lntune.cli import app
from lntune.errors import BuildError, InputError, ToolchainError, UnknownNameError
from lntune.measure.jobs import Candidate, Check, Outcome
from lntune.report import dry_runs
from lntune.tune import Settings, builders, dry
from lntune.tune.candidates import Candidates, steps

GPU = device_of("cuda:sm_90")
CASE, OTHER = Case("layer_norm", 1024, "float32", 4096), Case("layer_norm", 768, "bfloat16", 4096)
needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"needs a CUDA compiler: {cuda.available()}"
)


def run(*arguments: object) -> Result:
    """A command of lntune in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA compiler that nobody asks for more than its name."""
    monkeypatch.setattr(cuda, "identity", lambda: "a compiler")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, compiler: None) -> Iterator[type]:
    """Builders of the test's own; everything works unless the test says otherwise."""

    class Fake:
        jobs: list[Check]
        answer: Any = staticmethod(lambda job: Outcome("ok", facts=facts(), seconds=2.0))
        starting: Any = staticmethod(lambda: None)

        def __init__(self, threads: int | None = None) -> None:
            self.pid: int | None = None

        def start(self) -> None:
            """The process comes up."""
            type(self).starting()
            self.pid = 1

        def run(self, job: Check, timeout: float) -> Outcome:
            """What `answer` says."""
            self.jobs.append(job)
            return type(self).answer(job)  # type: ignore[no-any-return]

        def kill(self) -> None:
            """Nothing runs."""

        stop = kill

    Fake.jobs = []
    monkeypatch.setattr(builders, "Worker", Fake)
    yield Fake


def test_what_is_built(worker: Any, log_dir: Path) -> None:
    """Of each case the default and its surroundings are built and checked, as many as asked for;
    nothing is logged.
    """
    seen: list[tuple[Case, int, int, int]] = []
    summary = dry.run(
        [CASE, OTHER],
        Settings(device=GPU, seconds=None, trials=5),
        lambda *progress: seen.append(progress),
    )
    assert all((job.device, type(job)) == (GPU, Check) for job in worker.jobs)
    for index, case in enumerate((CASE, OTHER)):
        plan = summary.plans[index]
        known = Candidates(case, GPU)
        assert {job.candidate for job in worker.jobs if job.case == case} == set(list(known)[:5])
        assert (
            plan.case,
            plan.candidates,
            plan.built,
            plan.verified,
            plan.pruned,
            plan.failed,
        ) == (case, len(known), 5, 5, {}, {})
        assert plan.measured == 5  # as many as a run with the same options
        assert [s for s in seen if s[0] == case] == [(case, index, 2, n) for n in range(6)]
    assert (summary.device, summary.compiler, summary.interrupted, summary.wrong) == (
        GPU,
        "a compiler",
        False,
        0,
    )
    assert not log_dir.exists()


def test_the_surroundings_of_the_default_come_first() -> None:
    """Candidates behind the seeds are ordered by steps from the default knobs on a GPU; on a CPU as
    their values are written.
    """
    plan = schedule.get("shared_row")
    default = plan.default(CASE, GPU)
    known = Candidates(CASE, GPU)
    away = [steps(default, plan.knobs(**c.knobs)) for c in known if c not in known.seeds]
    assert away == sorted(away)
    assert (away[0], known.defaults) == (0, [Candidate.of("shared_row", default)])
    assert len(known) == len(plan.space(CASE, GPU)) == len(list(known))
    cpu = Candidates(CASE, device_of("cpu"))
    (name,) = {c.schedule for c in cpu}
    written = [Candidate.of(name, k) for k in schedule.get(name).space(CASE, device_of("cpu"))]
    assert cpu.seeds
    first = {*cpu.defaults, *cpu.seeds}
    assert [c for c in cpu if c not in first] == [c for c in written if c not in first]


def test_what_is_pruned_and_what_fails(worker: Any) -> None:
    """Problems prune all but the default knobs; failures are told with their message; a run would
    measure the share that is left.
    """
    known = list(Candidates(CASE, GPU))
    answers = {
        # the default is measured nevertheless
        known[0]: Outcome("ok", facts=facts(spills=16), seconds=2.0),
        known[1]: Outcome("ok", facts=facts(spills=8), seconds=2.0),
        known[2]: Outcome("ok", facts=facts(spills=8), seconds=2.0),
        known[3]: Outcome("wrong", "y: off", facts=facts()),
        known[4]: Outcome("compile", "no"),
    }
    worker.answer = staticmethod(
        lambda job: answers.get(job.candidate, Outcome("ok", facts=facts(), seconds=2.0))
    )
    summary = dry.run([CASE], Settings(device=GPU, seconds=None))
    (plan,) = summary.plans
    assert plan.pruned == {"spills 8 bytes": 2}
    named = [f"shared_row {knobs.describe(c.knobs)}" for c in known[:5]]
    assert plan.failed == {"wrong: y: off": [named[3]], "compile: no": [named[4]]}
    assert (plan.built, plan.verified, summary.wrong) == (dry.TRIALS, dry.TRIALS - 2, 2)
    assert plan.measured == round(len(known) * (dry.TRIALS - 4) / dry.TRIALS)
    text = "\n".join(dry_runs.lines(summary))
    assert "pruned: layer_norm 4096x1024 float32: 2 x spills 8 bytes" in text
    assert f"FAILED: layer_norm 4096x1024 float32: 1 x wrong: y: off (first: {named[3]})" in text


def test_the_order_by_rank(worker: Any) -> None:
    """The default comes first, as in a run, and then what ranks highest, with what it takes of a
    multiprocessor.
    """
    known = list(Candidates(CASE, GPU))
    takes = {known[2]: 32, known[3]: 200}
    worker.answer = staticmethod(
        lambda job: Outcome("ok", facts=facts(takes.get(job.candidate, 128)), seconds=2.0)
    )
    (plan,) = dry.run([CASE], Settings(device=GPU, seconds=None, trials=4)).plans
    assert [one.registers for one in plan.first] == [128, 32, 128]
    assert plan.first[0].knobs == knobs.describe(known[0].knobs)
    scores = [one.score for one in plan.first]
    assert scores[1] is not None and scores[2] is not None and scores[1] > scores[2] > 0
    assert plan.first[1].occupancy == 1.0


@pytest.mark.parametrize(
    ("seconds", "build", "each"), [(None, 0.0, 0.19), (60.0, 0.01, 0.19), (60.0, 38.0, 38.0)]
)
def test_the_time_a_run_would_take(
    worker: Any, monkeypatch: pytest.MonkeyPatch, seconds: float | None, build: float, each: float
) -> None:
    """The device's time for each candidate, or the builders' where it is longer, and the finals, in
    which four are made again; a budget says how many fit in.
    """
    monkeypatch.setattr(builders, "usable_cores", lambda: 2)
    worker.answer = staticmethod(lambda job: Outcome("ok", facts=facts(), seconds=build))
    summary = dry.run([CASE, OTHER], Settings(device=GPU, seconds=seconds))
    for plan in summary.plans:
        assert plan.measured == plan.candidates
        assert plan.seconds == pytest.approx(
            plan.measured * each + 4 * backends.of(GPU).trial_overhead + 4 / 3, abs=0.1
        )
    if seconds is None:
        assert [p.within for p in summary.plans] == [p.measured for p in summary.plans]
    # of 30 s some 9 are for the final, and what that does not take goes to the next case
    elif each < 1:
        assert [p.within for p in summary.plans] == [
            pytest.approx((30 - 9) / each, abs=2),
            pytest.approx((60 - 21 - 3.27) * 0.7 / each, abs=2),
        ]
    else:
        assert [p.within for p in summary.plans] == [1, 1]
    assert summary.run_seconds == pytest.approx(sum(p.seconds for p in summary.plans), abs=0.1)
    assumed = backends.of(GPU).trial_overhead + 0.04
    assert f"{assumed:.2f} s of the GPU for a candidate (assumed" in summary.assumption


@pytest.mark.parametrize(("workers", "trial"), [(1, 1.0), (2, 0.52)])
def test_the_start_of_the_process_that_measures(
    workers: int, trial: float, worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no part of what a candidate takes, and one of what a run takes: what is left of a
    budget is the first cases', and who comes when the time is over has nothing. Workers build
    candidates beside each other, and time each alone.
    """
    clock = [0.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            """Seconds."""
            return clock[0]

    def takes(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(builders, "usable_cores", lambda: 2)
    monkeypatch.setattr(builders, "time", Time)
    cpu = device_of("cpu")
    worker.starting = staticmethod(lambda: takes(7.0))
    worker.answer = staticmethod(lambda job: takes(0.96) or Outcome("ok"))
    cases = [Case("layer_norm", hidden, "float32", 8) for hidden in (64, 96, 128, 160)]
    settings = Settings(device=cpu, seconds=18.0, trials=2, workers=workers)
    summary = dry.run(cases, settings)
    assert (summary.start, summary.builders) == (7.0, 1)
    assert (
        "0.96 s to build and check a candidate" in summary.assumption
        and "7.0 s for the start" in summary.assumption
    )
    assert [p.seconds for p in summary.plans] == [
        pytest.approx(2 * trial + 3 * 0.96 + 4 / 3, abs=0.1)
    ] * 4
    assert summary.run_seconds == pytest.approx(7 + 4 * (2 * trial + 4.21), abs=0.3)
    # 11 s are left, of which a case with both trials takes 5.6, or a second less by two workers
    assert [p.within for p in summary.plans] == [2, 2, workers - 1, 0]
    assert summary.within == 3 + workers


def test_the_time_there_is(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the budget is over a case gets its default built and no more."""
    clock = [0.0]

    class Time:
        @staticmethod
        def monotonic() -> float:
            """Seconds."""
            return clock[0]

    def answer(job: Check) -> Outcome:
        clock[0] += 100.0
        time.sleep(0.1)  # the others wait for that
        return Outcome("ok", facts=facts(), seconds=2.0)

    monkeypatch.setattr(builders, "usable_cores", lambda: 2)
    monkeypatch.setattr(dry, "time", Time)
    worker.answer = staticmethod(answer)
    summary = dry.run([CASE, OTHER], Settings(device=GPU, seconds=50.0))
    assert [p.case for p in summary.plans] == [CASE, OTHER]
    # a builder may be ahead of what is waited for
    assert all(1 <= p.built <= 3 for p in summary.plans)


def test_an_interrupt_shows_what_there_is(worker: Any) -> None:
    """Ctrl-C ends it with the cases that are through."""

    def stop(case: Case, index: int, of: int, built: int) -> None:
        if index == 1 and built == 1:
            raise KeyboardInterrupt

    summary = dry.run([CASE, OTHER], Settings(device=GPU, seconds=None), stop)
    assert ([p.case for p in summary.plans], summary.interrupted) == ([CASE], True)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"seconds": -1.0}, InputError, "budget"),
        ({"search": "lokal"}, UnknownNameError, "'local'"),
        ({"schedules": ("cached_rows",)}, Exception, "gpu"),
    ],
)
def test_settings_are_checked(
    worker: Any, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    """What a run would refuse a dry run refuses too, before anything is built."""
    with pytest.raises(error, match=says):
        dry.run([CASE], Settings(device=GPU, **changes))
    assert worker.jobs == []


def test_without_a_cuda_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run for a GPU says what is missing and what to install."""

    def none() -> str:
        raise ToolchainError("no CUDA compiler found: install one")

    monkeypatch.setattr(cuda, "identity", none)
    with pytest.raises(BuildError, match="no CUDA compiler"):
        dry.run([CASE], Settings(device=GPU))


# --- the command


@needs_compiler
def test_the_command_for_a_gpu(log_dir: Path) -> None:
    """`lntune tune --target cuda:sm_90 --dry-run`: compiled for the device, verified in the
    emulator, nothing logged.
    """
    done = run(
        "tune",
        "layer_norm",
        "--hidden",
        256,
        "--dtype",
        "float32",
        "--rows",
        512,
        "--target",
        "cuda:sm_90",
        "--dry-run",
        "--trials",
        2,
        "--json",
    )
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    (plan,) = summary["plans"]
    assert (plan["built"], plan["verified"], plan["failed"], plan["measured"]) == (2, 2, {}, 2)
    assert plan["first"][0]["schedule"] == "shared_row"
    assert 16 <= plan["first"][0]["registers"] <= 255
    assert summary["device"]["isa"] == "sm_90"
    assert summary["measured"] == 2 and summary["run_seconds"] > 0
    assert not log_dir.exists()


def test_the_command_for_a_cpu(log_dir: Path) -> None:
    """The same for this CPU, on which candidates are checked as they are in a run."""
    done = run(
        "tune",
        "layer_norm",
        "--hidden",
        64,
        "--dtype",
        "float32",
        "--rows",
        8,
        "--dry-run",
        "--trials",
        2,
    )
    assert done.exit_code == 0, done.output
    assert "nothing was measured" in done.stdout
    assert "a run would measure 2 candidates in about" in done.stdout
    assert not log_dir.exists()


def test_wrong_candidates_fail_the_command(worker: Any) -> None:
    """Exit code 1 when a candidate is wrong or does not build, which the table counts."""
    worker.answer = staticmethod(lambda job: Outcome("wrong", "y: off"))
    done = run(
        "tune",
        "layer_norm",
        "--hidden",
        1024,
        "--dtype",
        "float32",
        "--rows",
        512,
        "--target",
        "cuda:sm_90",
        "--dry-run",
    )
    assert done.exit_code == 1
    assert f"FAILED: layer_norm 512x1024 float32: {dry.TRIALS} x wrong: y: off" in done.stdout


def test_a_case_that_no_schedule_fits(worker: Any) -> None:
    """It takes no time and is told as that, with exit code 1 where a run would measure nothing, as
    a run has that tunes nothing.
    """
    done = run(
        "tune",
        "lnlstm_step",
        "--hidden",
        16385,
        "--dtype",
        "float32",
        "--rows",
        1,
        "--target",
        "cuda:sm_90",
        "--dry-run",
    )
    assert done.exit_code == 1
    assert (
        "no schedule has valid knobs for lnlstm_step 1x16385 float32: eager mode serves it"
        in done.stdout
    )
    assert "would measure 0 candidates in about 0 s" in done.stdout


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("cuda:sm_90", "not here"),
        ("cuda", "no GPU can be used here"),
        ("cuda:sm_91", "Did you mean"),
    ],
)
def test_a_gpu_that_is_not_here(target: str, says: str) -> None:
    """Without --dry-run a GPU that is not here is an error of one line."""
    done = run("tune", "--hidden", 64, "--dtype", "float32", "--rows", 8, "--target", target)
    assert done.exit_code == 2
    assert says in done.stderr
