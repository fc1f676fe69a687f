"""`lntune compare --measure`: what is measured, what is logged of it, and that nothing is served by
it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from made_up_records import record, samples
from typer.testing import CliRunner

from lntune import device as device_module
from lntune import schedule
from lntune.case import Case
from lntune.cli import app
from lntune.commands import compare as measuring
from lntune.compare import run, sides
from lntune.errors import InputError
from lntune.log import records, select
from lntune.log.records import Record, Rival
from lntune.measure import calls, trial
from lntune.measure.jobs import Candidate, Final, Job, Open, Outcome

CASE = Case("layer_norm", 1024, "bfloat16", 8)
HERE = device_module.current()
Answer = Callable[[Final], Outcome]


def answered(job: Final) -> Outcome:
    """A measurement in which the later candidates are slower."""
    rivals = tuple(
        Rival(c.schedule, c.knobs, samples(60 + 10 * i), schedule.get(c.schedule).code)
        for i, c in enumerate(job.candidates[1:])
    )
    timings = {"tuned": samples(50), "eager": samples(100, seed=1), "copy": samples(40, seed=2)}
    timings |= {"default": samples(80, seed=3)} if job.default else {}
    timings |= {"compile": samples(90, seed=4)} if job.with_compile else {}
    return Outcome("ok", timings=timings, winner=0, rivals=rivals)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Final]:
    """What a worker that answers by `answered` was asked."""
    return worker(monkeypatch, answered)


def worker(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> list[Final]:
    """A worker in place of the real one; the jobs that it gets."""
    asked: list[Final] = []

    class Fake:
        def __init__(self, threads: int | None = None) -> None: ...

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None: ...

        def start(self) -> None: ...

        def run(self, job: Job, timeout: float) -> Outcome:
            if isinstance(job, Open):
                return Outcome("ok")
            assert isinstance(job, Final) and timeout > job.seconds
            asked.append(job)
            return answer(job)

    monkeypatch.setattr(measuring, "Worker", Fake)
    return asked


def measure(log: Path, *names: str, cases: tuple[Case, ...] = (CASE,)) -> list[str]:
    """Measure sides and log it; what failed."""
    options, failures = run.Options(log_dir=log), list[str]()
    compared = run.parse(names, options)
    measuring.measure(compared, cases, 0.1, options, lambda *_: None, failures.append)
    return failures


def logged(log: Path, role: str = "comparison") -> list[Record]:
    """The records of a role."""
    return [r for r in records.read([log]) if r.role == role]


def default(name: str, **knobs: Any) -> Candidate:
    """A schedule's default knobs, with some changed."""
    setting = Candidate.of(name, schedule.get(name).untuned(CASE, HERE))
    return Candidate(name, tuple({**setting.knobs, **knobs}.items()))


def test_a_disturbed_measurement_says_what_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement that other work disturbed is logged, and it is said that a quiet one of the
    same sides is compared in its place.
    """
    worker(monkeypatch, lambda job: msgspec.structs.replace(answered(job), busy=True))
    (said,) = measure(tmp_path, "cached_rows", "eager")
    assert said == f"{CASE}: {measuring.DISTURBED}" and len(logged(tmp_path)) == 1


def test_sides_are_measured_together_and_compared(tmp_path: Path, jobs: list[Final]) -> None:
    """Two schedules, eager mode and torch.compile are one measurement, of default knobs where
    nothing is known better; the log then answers by itself.
    """
    names = "cached_rows", "widened_rows:lanes=8", "eager", "compile", "default"
    assert not measure(tmp_path, *names)
    (job,) = jobs
    assert job.candidates == (default("cached_rows"), default("widened_rows", lanes=8))
    assert job.with_compile and job.default == default("cached_rows")
    assert job.sides == ("compile", "default", "eager") and job.most_seconds > job.seconds
    (entry,) = logged(tmp_path)
    assert (entry.schedule, entry.case, entry.status) == ("cached_rows", CASE, "ok")
    options = run.Options(log_dir=tmp_path)
    results = run.compare_sides(run.parse(names, options), options=options)
    assert [(r.b, r.cases[0].method) for r in results] == [(name, "paired") for name in names[1:]]


def test_the_best_that_was_measured_is_taken(tmp_path: Path, jobs: list[Final]) -> None:
    """Of a schedule's settings with the knobs given: the best of its final, failing that its
    fastest trial; what is stale, does not fit any more, or has other knobs is not taken.
    """
    code = schedule.get("cached_rows").code

    def tried(us: float, role: str = "trial", **fields: Any) -> None:
        knobs = default("cached_rows", **fields.pop("knobs")).knobs
        entry = record(
            1024, 8, "bfloat16", device=HERE, role=role, knobs=knobs, code=code, **fields
        )
        timings = {**entry.timings, "tuned": samples(us)}
        records.append(tmp_path, msgspec.structs.replace(entry, timings=timings))

    tried(9, knobs={"lanes": 8, "unroll": 2, "pairs": False, "sample": False})
    tried(7, knobs={"lanes": 8, "unroll": 4, "pairs": False, "sample": False})
    tried(5, knobs={"lanes": 4, "unroll": 4, "pairs": False, "sample": False})
    measure(tmp_path, "cached_rows:lanes=8", "cached_rows", "eager")
    tried(20, "final", knobs={"lanes": 8, "unroll": 2, "pairs": False, "sample": False}, time="2")
    measure(tmp_path, "cached_rows:lanes=8", "eager")
    measure(tmp_path, "tuned", "eager")
    knobs = [[(c.knobs["lanes"], c.knobs["unroll"]) for c in job.candidates] for job in jobs]
    assert knobs == [[(8, 4), (4, 4)], [(8, 2)], [(8, 2)]]


def test_eager_alone_is_measured_beside_a_kernel(tmp_path: Path, jobs: list[Final]) -> None:
    """What has no schedule among its sides is measured beside the default knobs."""
    measure(tmp_path, "eager", "compile")
    assert [job.candidates for job in jobs] == [(default("cached_rows"),)]


def test_what_cannot_be_measured_is_said(tmp_path: Path, jobs: list[Final]) -> None:
    """A side that is not there in a case leaves that case out, with the reason; files were measured
    before.
    """
    assert measure(tmp_path, "tuned", "eager") == [f"{CASE}: nothing is tuned; lntune tune does it"]
    case = Case("layer_norm", 64, "float32", 8)
    assert measure(tmp_path, "widened_rows", "eager", cases=(case,)) == [
        f"{case}: widened_rows does not fit: float32 rows need no widening"
    ]
    assert not jobs
    with pytest.raises(InputError, match="expected schedules, default, tuned, eager or compile"):
        measuring.contenders([sides.Runs("file.json", [])])


def test_a_candidate_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a comparison fails each candidate is measured alone: the one to blame is logged as what
    it did, and said; the other is measured, not logged.
    """

    def answer(job: Final) -> Outcome:
        bad = any(c.schedule == "widened_rows" for c in job.candidates)
        return Outcome("wrong", "y: error") if bad else answered(job)

    jobs = worker(monkeypatch, answer)
    failures = measure(tmp_path, "cached_rows", "widened_rows")
    assert failures == [f"{CASE}: widened_rows wrong: y: error"]
    assert [len(job.candidates) for job in jobs] == [2, 1, 1]
    assert [(r.schedule, r.status) for r in logged(tmp_path)] == [("widened_rows", "wrong")]


def test_an_interrupt_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second case: the first one is in the log, and the measuring has ended."""

    def answer(job: Final) -> Outcome:
        if job.case != CASE:
            raise KeyboardInterrupt
        return answered(job)

    worker(monkeypatch, answer)
    other = Case("layer_norm", 128, "bfloat16", 8)
    failures = measure(tmp_path, "cached_rows", "eager", cases=(CASE, other, other))
    assert failures == ["interrupted; compared is what is in the log"]
    assert [r.case for r in logged(tmp_path)] == [CASE]


def test_a_comparison_serves_no_calls(tmp_path: Path, jobs: list[Final]) -> None:
    """Whatever was compared, what serves a case is what its final says: a record of a comparison is
    neither a final nor chosen, also where there is nothing else.
    """
    measure(tmp_path, "widened_rows", "eager")
    read = records.read([tmp_path])
    assert [r.role for r in read] == ["comparison"]
    assert records.finals(read) == records.measured(read) == {}
    schedules = schedule.for_op("layer_norm", "cpu")
    assert select.select(CASE, HERE, read, schedules).tier == "default"
    final = record(1024, 8, "bfloat16", device=HERE, code=schedule.get("cached_rows").code)
    choice = select.select(CASE, HERE, [final, *read], schedules)
    assert choice.record == final
    assert select.served([final, *read], schedules).popitem()[1] == final


def test_the_command(tmp_path: Path, jobs: list[Final]) -> None:
    """`lntune compare A B --measure` measures the cases asked for, says which on standard error,
    and compares them, though the folder of logs is new.
    """
    log = tmp_path / "new"
    asked = ["compare", "cached_rows", "widened_rows", "--measure", "--hidden", "64,128"]
    options = ["--dtype", "bfloat16", "--rows", "8", "--time", "200ms", "--log-dir", str(log)]
    done = CliRunner().invoke(app, [*asked, *options])
    assert done.exit_code == 0, done.output
    assert [(job.case.hidden, job.seconds) for job in jobs] == [(64, 0.2), (128, 0.2)]
    assert done.stderr.splitlines() == [
        "[1/2] layer_norm 8x64 bfloat16",
        "[2/2] layer_norm 8x128 bfloat16",
    ]
    assert "2 cases: 2 SLOWER" in done.stdout


def test_without_sizes_the_cases_of_the_log_are_measured(tmp_path: Path, jobs: list[Final]) -> None:
    """Those that have a final; the default grid where there is none."""
    compared = sides.parse("cached_rows", "cpu", []), sides.parse("eager", "cpu", [])
    options = run.Options(log_dir=tmp_path)
    assert len(measuring.cases_of(compared, "layer_norm", options)) > 10
    records.append(tmp_path, record(1024, 8, "bfloat16", device=HERE))
    assert measuring.cases_of(compared, "layer_norm", options) == [CASE]


@pytest.mark.slow
def test_a_real_measurement(tmp_path: Path) -> None:
    """Two schedules, built, checked and timed in the same rounds, beside everything else. Others
    may work on the machine meanwhile, which is said.
    """
    failures = measure(tmp_path, "cached_rows", "widened_rows")
    assert all(": disturbed by other work on the machine;" in said for said in failures)
    (entry,) = logged(tmp_path)
    assert set(entry.timings) == {"tuned", "eager", "copy", "default"}
    assert {entry.schedule, *(r.schedule for r in entry.rivals)} == {"cached_rows", "widened_rows"}
    timings = [*entry.timings.values(), *(r.timing for r in entry.rivals)]
    assert len({len(t.samples_us) for t in timings}) == 1
    assert 0 < entry.errors["y"] <= 1 and entry.run


@pytest.mark.slow
@pytest.mark.parametrize("why", ["", "InductorError: no compiler"])
def test_torch_compile_is_a_contender(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is wanted it is timed with the others; where it cannot be had, the others are, and
    the message says why.
    """
    eager = lambda case, copies, device: ([lambda: copies[0]] * len(copies), why)  # noqa: E731
    monkeypatch.setattr(calls, "compiled", eager)
    job = Final(CASE, HERE, (default("cached_rows"),), 0.001, with_compile=True)
    outcome = trial.run(job)
    assert outcome.status == "ok"
    assert ("compile" in outcome.timings) == (not why)
    assert outcome.message == (f"torch.compile left out: {why}" if why else "")
