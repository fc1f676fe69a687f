"""TVM's own tuner as a contender: its kernels as texts, replayed for any number of rows, proposed
by its search and tried like others.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cpu_kernels import DEVICE, assert_right
from fake_worker import FakeWorker, fake, finals, settings, tried
from hypothesis import given
from hypothesis import strategies as st

from lntune import knobs, ops, schedule, tune
from lntune.backends import device_of
from lntune.case import Case
from lntune.errors import InputError, ScheduleError, ToolchainError, UnfitError
from lntune.kernels import compiler
from lntune.log import records, select
from lntune.log.records import Record
from lntune.measure.jobs import Candidate, Outcome, Try
from lntune.search import Budget
from lntune.transforms.metaschedule import decisions, proposals, space
from lntune.transforms.metaschedule.decisions import Choice
from lntune.tune import candidates
from lntune.tune import proposals as asked
from lntune.tune.proposals import Answers, Ask, Proposed

__all__ = ["fake"]

CASE = Case("layer_norm", 64, "float32", 32)
BACKWARD = Case("layer_norm_backward", 64, "bfloat16", 32)
OURS = [s for s in schedule.all_schedules().values() if s.propose]

tiles = st.lists(st.integers(0, 65536), min_size=2, max_size=5).map(tuple)
choices = st.builds(
    Choice,
    st.integers(0, 999),
    st.lists(st.integers(-2, 999) | tiles, max_size=20).map(tuple),
)


@given(choices)
def test_a_choice_is_read_back_from_its_text(choice: Choice) -> None:
    """Any sketch with any decisions."""
    assert decisions.refusal(str(choice)) is None
    assert decisions.parse(str(choice)) == choice


MALFORMED = (
    *(
        "3/",
        "/3",
        "3//4",
        "a",
        "3/-3",
        "3/4x",
        "3/x4",
        "03",
        "3/1e5",
        "3 4",
        "3/4,5",
        "-1",
        "3/4\n",
    ),
    *("__import__('os')", '{"insts": []}', "3/9999999999", "3/" + "1/" * 600 + "1", "٣/٤"),
)


@pytest.mark.parametrize("text", MALFORMED)
def test_malformed_traces_are_refused(text: str) -> None:
    """What is no sketch with decisions is an error that names the knob, wherever it comes from, and
    is shown in part where it is long; nothing of it is run.
    """
    plan = schedule.get("metaschedule")
    with pytest.raises(InputError, match=r"knob trace: got .*, .*expected") as error:
        plan.setting({"trace": text})
    assert len(str(error.value)) < 300
    with pytest.raises(InputError, match="trace"):
        knobs.changed(plan.knobs(), [f"trace={text}"] if text == text.strip() else ["trace=a"])
    with pytest.raises(InputError, match="trace"):
        decisions.parse(text)


def test_a_trace_is_a_text() -> None:
    """Numbers and lists of a log are no traces."""
    for value in (3, True, None, [3, 4], {"sketch": 3}):
        with pytest.raises(InputError, match="expected a text"):
            schedule.get("metaschedule").setting({"trace": value})


def test_such_schedules_are_tuned_only_where_they_are_named() -> None:
    """No default run tries them, nothing untuned is served by them, and on GPUs there are none."""
    for plan in OURS:
        case = Case(plan.op, 64, "float32", 32)
        assert plan.name not in {s.name for s in candidates.to_tune(case, DEVICE)}
        assert [s.name for s in candidates.to_tune(case, DEVICE, [plan.name])] == [plan.name]
        assert select.untuned(case, DEVICE, {plan.name: plan}).schedule == ""
        with pytest.raises(ScheduleError, match="is not for this device, a gpu"):
            tune.check_settings(
                settings(plan.name, device=device_of("cuda:sm_90")), [case], dry=True
            )
    assert {plan.op for plan in OURS} == set(ops.OPS)


@pytest.fixture(scope="module")
def plain() -> space.Space:
    """The space of a small case."""
    return space.of(CASE, "plain", DEVICE)


def some(of: space.Space, number: int) -> Choice:
    """A choice of a sketch, which TVM has drawn."""
    choice = of.choice(of.sketch(number).trace)
    assert choice is not None and choice.sketch == number
    return choice


def test_a_trace_stands_for_the_same_code(plain: space.Space) -> None:
    """A space made anew has the same sketches, and a choice of it is the same kernel."""
    import tvm

    again = space.Space(CASE.typical, "plain", DEVICE, (), None)
    assert len(again) == len(plain) > 1
    for number in range(len(plain)):
        choice = some(plain, number)
        tvm.ir.assert_structural_equal(plain.module(choice), again.module(choice))


def test_what_the_space_has_not_is_refused(plain: space.Space) -> None:
    """A sketch that is not there, decisions too many or too few, tiles that do not make up the loop
    or are too long, and places that a block or value has not: each is said, and none is mended.
    """
    number = next(
        n for n in range(len(plain)) if sum(isinstance(d, tuple) for d in some(plain, n).decisions)
    )
    choice = some(plain, number)
    at = next(i for i, d in enumerate(choice.decisions) if isinstance(d, tuple))
    value = next(
        i for i, d in enumerate(choice.decisions) if isinstance(d, int)
    )  # how far loops are unrolled: the first that is a number

    def other(place: int, decision: decisions.Decision) -> Choice:
        return Choice(number, (*choice.decisions[:place], decision, *choice.decisions[place + 1 :]))

    for wrong, reason in (
        (Choice(99, choice.decisions), "sketches"),
        (Choice(number, choice.decisions[1:]), "decisions"),
        (Choice(number, (*choice.decisions, 0)), "decisions"),
        (other(at, (3, 5)), "instead"),
        (other(at, (1, 128)), "at most"),
        (other(at, (64,) * 3), "extents"),
        (other(at, (64, 0)), "extents"),
        (other(at, 4), "extents"),
        (other(value, 4), "values"),
        (other(value, (1, 1)), "values"),
        (other(len(choice.decisions) - 1, 77), "instead"),
    ):
        with pytest.raises(UnfitError, match=reason):
            plain.module(wrong)


def test_a_trace_that_does_not_fit_is_an_invalid_candidate() -> None:
    """A trial of it ends before anything is built, with the reason."""
    from lntune.measure import trial

    given = {"sums": "plain", "trace": "99/1"}
    job = Try(CASE, DEVICE, Candidate("metaschedule", tuple(given.items())), 0.01)
    outcome = trial.run(job)
    assert outcome.status == "invalid" and "sketches" in outcome.message


@pytest.mark.parametrize("case", [CASE, BACKWARD], ids=str)
def test_traces_make_kernels_for_any_rows(case: Case) -> None:
    """Some sketches, those that tile a loop over the rows among them, are right for every number of
    rows that a candidate is checked with.
    """
    (plan,) = (s for s in OURS if s.op == case.op)
    blocks = case.blocks(DEVICE) if case.op.endswith("backward") else None
    own = space.of(case.typical, "plain", DEVICE, (), blocks)
    built = 0
    for number in range(0, len(own), max(1, len(own) // 4)):
        setting = plan.knobs("plain", str(some(own, number)))
        try:
            kernel = compiler.in_memory(case, plan, setting, DEVICE)
        except UnfitError as e:  # sums over rows that are shared out by a number of them
            assert "known number of rows" in str(e) and case is BACKWARD
            continue
        assert_right(case, kernel)
        built += 1
    assert built >= 2


def test_sums_are_added_to() -> None:
    """The LSTM's backward, whose sums over rows are added to what their tensors hold, does so as
    its definition is, without a schedule.
    """
    case = Case("lnlstm_step_backward", 8, "float32", 32)
    plan = schedule.get("metaschedule_step_backward")
    assert_right(case, compiler.in_memory(case, plan, plan.default(case, DEVICE), DEVICE))


def test_the_search_proposes_and_learns(plain: space.Space) -> None:
    """Batches have nothing twice and nothing that is known; the same seed and the same times give
    the same proposals.
    """
    known = some(plain, 0)
    runs = []
    for _ in range(2):
        search = proposals.Search(plain, 7)
        search.tell(known, 1e-6)
        batches = []
        for _ in range(2):
            batches.append(search.ask())
            for place, choice in enumerate(batches[-1]):
                search.tell(choice, math.inf if place == 1 else (1 + place) * 1e-6)
        runs.append(batches)
    assert runs[0] == runs[1]
    every = [choice for batch in runs[0] for choice in batch]
    assert len(every) == len({*every, known}) - 1 > proposals.BATCH // 2


class Canned:
    """A process of proposals that answers what it was given."""

    def __init__(self, *answers: Proposed) -> None:
        self.answers, self.jobs, self.pid = list(answers), list[Ask](), 1

    def ask(self, job: Ask, seconds: float) -> Proposed:
        """The next answer."""
        self.jobs.append(job)
        return self.answers.pop(0)

    def __enter__(self) -> Canned:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def proposed(*traces: str) -> Proposed:
    """These traces."""
    return Proposed(tuple({"sums": "plain", "trace": trace} for trace in traces), "canned")


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A log folder of the test's own."""
    monkeypatch.setenv("LNTUNE_LOG_DIR", str(tmp_path / "log"))
    yield tmp_path / "log"


def canned(monkeypatch: pytest.MonkeyPatch, *answers: Proposed) -> Canned:
    """A run's proposals are these."""
    process = Canned(*answers)
    monkeypatch.setattr(asked, "Proposer", lambda threads: process)
    return process


def traces_of(trials: Sequence[Candidate]) -> list[str]:
    """The traces of what was tried."""
    return [str(c.knobs["trace"]) for c in trials if c.schedule == "metaschedule"]


def test_proposals_are_tried_logged_and_told(
    fake: type[FakeWorker], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a schedule that lists its knobs, proposals have half of the trials; what came of them
    is told, failures too; the log has them, the final holds the best of both schedules, and a
    second run tells what the first has tried instead of trying it.
    """
    process = canned(monkeypatch, proposed("1/2", "3/4"), proposed("5"), proposed("7", "8", "9"))
    ok = fake.answer

    def answer(job: Any) -> Outcome:
        if isinstance(job, Try) and job.candidate.knobs.get("trace") == "3/4":
            return Outcome("wrong", "y is off")
        return ok(job)

    fake.answer = staticmethod(answer)
    summary = tune.tune([CASE], settings("cached_rows", "metaschedule", trials=12))
    ours = traces_of(tried(fake))
    assert [trace for trace in ours if trace] == ["1/2", "3/4", "5", "7", "8", "9"]
    assert len(tried(fake)) == 12
    assert [job.first for job in process.jobs] == [True, False, False]
    assert [us is None for _, us in process.jobs[1].told] == [False, True]
    assert {c.schedule for c in finals(fake)[0].candidates} == {"cached_rows", "metaschedule"}
    (note,) = (n for n in summary.notes if "metaschedule" in n)
    assert "canned" in note and "6 candidates" in note
    logged = [r for r in records.read([log]) if r.role == "trial"]
    assert [r.knobs["trace"] for r in logged if r.schedule == "metaschedule"] == ours
    again = [msgspec.json.decode(msgspec.json.encode(r), type=Record) for r in logged]
    assert again == logged
    process = canned(monkeypatch, Proposed())
    tune.tune([CASE], settings("metaschedule", trials=12))
    told = {given["trace"]: us for given, us in process.jobs[0].told}
    assert set(ours) <= set(told) and told["3/4"] is None
    assert len(traces_of(tried(fake))) == len(ours) + 2 - ours.count("")


def test_a_search_that_fails_ends_and_is_said(
    fake: type[FakeWorker], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash of the process costs the proposals, not the run; what the machine lacks is an
    error.
    """
    canned(monkeypatch, proposed("1/2"), Proposed(error="the worker died (SIGSEGV)"))
    summary = tune.tune([CASE], settings("metaschedule", trials=12))
    assert summary.finals and any("SIGSEGV" in note for note in summary.notes)
    canned(monkeypatch, Proposed(error="no MetaSchedule", missing=True))
    with pytest.raises(ToolchainError, match="no MetaSchedule"):
        tune.tune([Case("layer_norm", 96, "float32", 32)], settings("metaschedule", trials=12))


def test_without_metaschedule_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build of TVM may have none."""
    import tvm.s_tir

    monkeypatch.setitem(sys.modules, "tvm.s_tir.meta_schedule", None)
    monkeypatch.delattr(tvm.s_tir, "meta_schedule", raising=False)
    case = Case("layer_norm", 48, "float32", 32)
    answer = Answers().do(Ask(case, DEVICE, "metaschedule", 0, True))
    assert answer.missing and "cannot be imported" in answer.error


def test_answers_propose_settings_of_the_schedule() -> None:
    """What the process answers are knobs that the schedule takes, of both ways to sum by turns."""
    answers, seen = Answers(), list[Any]()
    plan = schedule.get("metaschedule")
    for first in (True, False):
        told = tuple((knobs.to_dict(setting), 5.0) for setting in seen)
        answer = answers.do(Ask(CASE, DEVICE, "metaschedule", 3, first, told))
        assert answer.error == "" and "cost model" in answer.note
        seen = [plan.setting(given) for given in answer.settings]
        assert len({setting.sums for setting in seen}) == 1
    assert seen[0].sums == space.SUMS[0]


def test_a_budget_ends_the_proposals() -> None:
    """Nothing is asked once it is spent, and a batch is cut short by it."""
    process = Canned(proposed("1", "2", "3"), proposed("4"))
    course = asked.Course(process, CASE, DEVICE, "metaschedule", 0)  # type: ignore[arg-type]
    budget, costs = Budget(trials=2), list[Candidate]()

    def evaluate(candidate: Candidate) -> float:
        costs.append(candidate)
        budget.count()
        return 1.0

    course.search(evaluate, budget, {})
    assert len(costs) == 2 and len(process.jobs) == 1 and not course.end


@dataclasses.dataclass(frozen=True)
class Open:
    """Knobs with an open one."""

    width: int = knobs.knob(1, (1, 2), "listed")
    text: str = knobs.open_knob("", lambda t: None if t.isdigit() or not t else "no digits", "open")


def test_open_knobs_are_in_no_space() -> None:
    """Spaces and neighbours have their default; a setting with another is told by it alone."""
    assert list(knobs.enumerate_space(Open)) == [Open(1), Open(2)]
    assert list(knobs.neighbours(Open(1, "7"))) == [Open(2, "7")]
    assert knobs.unrefined(Open(2, "7")) == Open(2)
    assert knobs.from_dict(Open, {"text": "7"}) == Open(1, "7")
    assert knobs.changed(Open(), ["text=12", "width=2"]) == Open(2, "12")
    with pytest.raises(InputError, match="knob text: got 'x', no digits"):
        knobs.from_dict(Open, {"text": "x"})
    with pytest.raises(InputError, match="default"):
        knobs.open_knob("x", lambda _: "no digits", "open")
