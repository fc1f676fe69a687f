"""Which kernel serves a call: the tiers, other devices' records, warnings, strict mode and
reload.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from pathlib import Path
from typing import Any, cast, get_args

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_records import final_here

import lntune
from lntune import device, knobs, schedule
from lntune.case import TYPICAL_ROWS, Case
from lntune.certainty import Verdict
from lntune.device import Device
from lntune.errors import InputError, NotTunedError, UnknownNameError
from lntune.log import records
from lntune.log.decision import Advantage, Decision
from lntune.log.records import Record, Setting, Timing
from lntune.log.select import Choice, Tier, select, served, tune_commands
from lntune.system import paths
from lntune.torch import dispatch
from lntune.versions import Code

OLD = Code("0123456789ab")
HIDDEN = 192
CASE = Case("layer_norm", HIDDEN, "float32", 8)
HERE = device.current()


@pytest.fixture(autouse=True)
def own_logs(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Only the test's own log is read, and no decision outlives the test."""
    monkeypatch.setattr(paths, "log_dirs", lambda: [log_dir])
    lntune.reload()
    yield
    lntune.strict(False)


def schedules() -> dict[str, schedule.Schedule]:
    """Those of the operator, for this device's kind."""
    return schedule.for_op("layer_norm", HERE.kind)


def final(case: Case = CASE, tuned: float = 1.0, eager: float = 2.0, **changes: Any) -> Record:
    """A final measurement of the schedule's default knobs on this device."""
    return final_here(case, tuned, eager, **changes)


def choose(*candidates: Record, case: Case = CASE) -> Choice:
    """The choice for a case among the given records."""
    return select(case, HERE, candidates, schedules())


def at(case: Case = CASE, **changes: Any) -> Case:
    """The case with some fields changed."""
    return msgspec.structs.replace(case, **changes)


def test_exact() -> None:
    """A record of the same bucket serves every row count in it, and counts as measured; another
    dtype's does not.
    """
    for rows in (2, 8, 15):
        choice = choose(final(), case=at(rows=rows))
        assert (choice.tier, choice.measured, choice.record) == ("exact", True, final())
        assert "1.00 us against eager's 2.00 us" in choice.steps[-1]
    assert choose(final(), case=at(dtype="bfloat16")).tier == "default"


def test_bucket() -> None:
    """Without one, a record of the same hidden size in the nearest bucket serves, and is not called
    measured.
    """
    choice = choose(final(at(rows=4096)), final(at(rows=32)))
    assert (choice.tier, choice.measured) == ("bucket", False)
    assert choice.record is not None and choice.record.case.rows == 32


def test_near() -> None:
    """Then the nearest hidden size within a factor of two, of the same bucket."""
    choice = choose(final(at(hidden=384)), final(at(hidden=256)), final(at(hidden=193, rows=512)))
    assert (choice.tier, choice.measured) == ("near", False)
    assert choice.record is not None and choice.record.case.hidden == 256
    assert choose(final(at(hidden=385)), final(at(hidden=95))).tier == "default"
    assert choose(final(at(hidden=384))).tier == choose(final(at(hidden=96))).tier == "near"


def test_default_and_eager() -> None:
    """Without records the schedule's default knobs serve; without a schedule, eager mode, which
    nobody measured.
    """
    choice = choose()
    assert (choice.tier, choice.schedule, choice.measured) == (
        "default",
        next(iter(schedules())),
        False,
    )
    assert [s.split(":")[0] for s in choice.steps] == ["exact", "bucket", "near", "default"]
    nothing = select(CASE, HERE, [], {})
    assert (nothing.tier, nothing.measured) == ("eager", False)
    assert {c.tier for c in (choice, nothing)} < set(get_args(Tier))


def test_the_order_of_the_tiers() -> None:
    """exact before bucket before near, however fast each was."""
    exact, bucket, near = (
        final(tuned=1.9),
        final(at(rows=32), tuned=0.5),
        final(at(hidden=256), tuned=0.1),
    )
    assert choose(near, bucket, exact).tier == "exact"
    assert choose(near, bucket).tier == "bucket"
    assert choose(near).tier == "near"


def test_eager_where_it_was_faster() -> None:
    """A record in which eager won by more than the margin sends the call to eager, measured; a tie
    goes to the kernel.
    """
    choice = choose(final(tuned=2.1, eager=2.0))
    assert (choice.tier, choice.measured) == ("eager", True)
    assert "eager was faster, 2.00 us against 2.10 us" in choice.steps[-1]
    assert choose(final(tuned=2.03, eager=2.0)).tier == "exact"


def test_the_latest_final_counts() -> None:
    """A later measurement replaces an earlier one; trials and failures never serve."""
    later = final(tuned=3.0, eager=1.0, time="2026-02-01")
    for files in ([[later], [final()]], [[final()], [later]]):
        assert choose(*records.merged(files)).tier == "eager"
    assert (
        choose(final(role="trial")).tier
        == choose(final(status="wrong", timings={})).tier
        == "default"
    )


@pytest.mark.parametrize(
    "change",
    [{"name": "Other CPU"}, {"isa": "x86-64"}, {"cores": 999}, {"features": ("amx",)}],
    ids=str,
)
def test_foreign_records_never_serve(change: dict[str, Any]) -> None:
    """A record of a device that differs in one field is left out, and the steps name the device and
    the field.
    """
    other = msgspec.structs.replace(HERE, **change)
    choice = choose(final(device=other, tuned=0.01))
    assert choice.tier == "default"
    (step,) = (s for s in choice.steps if "another device" in s)
    assert other.slug in step and f"{next(iter(change))}: " in step


def test_records_of_another_kind_are_not_spoken_of() -> None:
    """Nobody expects a GPU's record to serve a CPU, so it is left out without a word."""
    choice = choose(final(device=msgspec.structs.replace(HERE, kind="gpu"), tuned=0.01))
    assert choice.tier == "default"
    assert not [s for s in choice.steps if "another device" in s]


def test_records_that_no_longer_fit() -> None:
    """A schedule that is gone, a knob of another age, knobs that do not fit: said, and the next
    tier serves.
    """
    for changes, reason in (
        ({"schedule": "gone"}, "which is not there"),
        ({"knobs": {"wings": 2}}, "does not fit today's"),
        ({"knobs": {**final().knobs, "lanes": 8, "unroll": 4}}, "do not fit here"),
    ):
        choice = choose(final(**changes), final(at(rows=32)))
        assert choice.tier == "bucket"
        assert any(reason in s and s.startswith("exact: ") for s in choice.steps)


def test_a_stale_record_is_mentioned() -> None:
    """A record of an older version of the schedule still serves, says that it wants to be measured
    again, and does not count as measured.
    """
    choice = choose(final(code=OLD))
    assert choice.tier == "exact" and "code has changed" in choice.steps[-1]
    assert (choice.stale, choice.measured) == (True, False)
    assert "code has changed" not in choose(final()).steps[-1]
    eager = choose(final(code=OLD, eager=0.5))
    assert (eager.tier, eager.stale, eager.measured) == ("eager", True, False)


UNUSABLE: list[dict[str, Any]] = [
    {"schedule": "gone"},
    {"knobs": {"wings": 2}},
    {"knobs": {"lanes": 8, "unroll": 4}},
]


@pytest.mark.parametrize("changes", UNUSABLE, ids=["schedule", "space", "fit"])
def test_what_cannot_be_used_hides_nothing(changes: dict[str, Any]) -> None:
    """A newest record whose schedule is absent, or whose knobs are outside today's space or do not
    fit, leaves an older one of the same case in its place, and `why` names it.
    """
    older, newest = (
        final(),
        final(
            time="2026-06-01", **{**changes, "knobs": {**final().knobs, **changes.get("knobs", {})}}
        ),
    )
    choice = choose(older, newest)
    assert (choice.tier, choice.record, choice.measured) == ("exact", older, True)
    assert "2026-06-01" in choice.steps[0] and "passed over for an older one" in choice.steps[0]


def test_a_disturbed_final_does_not_replace_a_quiet_one() -> None:
    """Finals of one scheduler turn serve where there is nothing else, and say so; a quiet one,
    however old, comes before them.
    """
    turns = {
        name: Timing((us, us + 1), us)
        for name, us in (("tuned", 7998.0), ("eager", 7996.0), ("copy", 7991.0))
    }
    for disturbed in (final(time="2026-06-01", timings=turns), final(time="2026-06-01", busy=True)):
        choice = choose(final(), disturbed)
        assert (
            choice.record == final()
            and "disturbed" in choice.steps[0]
            and "passed over" in choice.steps[0]
        )
        alone = choose(disturbed)
        assert (alone.record, alone.measured) == (
            disturbed,
            True,
        ) and "it was disturbed" in alone.steps[-1]
    # not known is not disturbed
    assert (
        choose(final(busy=False), final(time="2026-06-01", busy=None)).steps[0].count("2026-06-01")
    )


@pytest.mark.parametrize("elsewhere", [at(rows=32), at(hidden=256)])
@pytest.mark.parametrize("eager", [0.5, 2.0])
def test_a_disturbed_final_decides_on_its_own_case_alone(elsewhere: Case, eager: float) -> None:
    """Neither its kernel nor that eager mode was faster there holds for another row bucket or
    hidden size: a quiet record of a further one decides, else default knobs serve, and it is said
    why.
    """
    disturbed = final(elsewhere, eager=eager, busy=True)
    alone = choose(disturbed)
    assert alone.tier == "default"
    assert any("disturbed" in s and "no case but its own" in s for s in alone.steps)
    further = final(at(hidden=300))
    assert choose(disturbed, further).record == further
    assert choose(disturbed, case=elsewhere).record == disturbed
    quiet = msgspec.structs.replace(disturbed, busy=False)
    assert choose(quiet).record == quiet


def test_stale_before_disturbed() -> None:
    """What was measured in quiet, of a schedule that has changed since, still says more than what
    was measured in turns of the scheduler.
    """
    old, disturbed = final(code=OLD), final(time="2026-06-01", busy=True)
    assert choose(old, disturbed).record == old
    assert choose(old, final(time="2026-05-01"), old).record == final(time="2026-05-01")


kinds = st.tuples(
    st.sampled_from([{}, *UNUSABLE]),
    st.sampled_from(["now", "then"]),
    st.sampled_from([None, False, True]),
    st.sampled_from(["1970", "2026", "2038"]),
)


def of(number: int, kind: Any) -> Record:
    """A final of a kind, told from others by its run."""
    changes, source, busy, time = kind
    record = final(
        run=str(number), busy=busy, time=time, **{k: v for k, v in changes.items() if k != "knobs"}
    )
    record = msgspec.structs.replace(record, knobs={**record.knobs, **changes.get("knobs", {})})
    return record if source == "now" else msgspec.structs.replace(record, code=OLD)


def usable(kind: Any) -> bool:
    """True when a final of the kind can serve."""
    return not kind[0]


def quiet(kind: Any) -> bool:
    """True when a final of the kind was not disturbed."""
    return kind[2] is not True


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=st.lists(kinds, max_size=5), added=kinds, place=st.integers(0, 5))
def test_which_record_serves(before: list[Any], added: Any, place: int) -> None:
    """One order decides. A record that cannot be used never changes the choice; nor does a
    disturbed one where a usable one is not; nor a stale one where one is neither stale nor
    disturbed. Of what serves, none is disturbed or stale while another is not.
    """
    log = [of(number, kind) for number, kind in enumerate(before)]
    chosen = choose(*log).record
    more = [*log[:place], of(9, added), *log[place:]]
    now = choose(*more).record
    others = [kind for kind in before if usable(kind)]
    if (
        not usable(added)
        or (not quiet(added) and any(map(quiet, others)))
        or (added[1] == "then" and any(quiet(k) and k[1] == "now" for k in others))
    ):
        assert now == chosen
    elif place >= len(log) and quiet(added) and added[1] == "now":
        assert now is not None and now.run == "9"  # tuned again, it serves
    assert (now is None) == (not others and not usable(added))
    if now is not None and now.busy:
        assert not any(quiet(k) for k in others)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(logs=st.lists(st.lists(kinds, max_size=3), max_size=3), seed=st.randoms())
def test_the_order_of_files_does_not_decide(logs: list[list[Any]], seed: Any) -> None:
    """The same record serves in whatever order the files are read."""
    files = [
        [of(10 * number + line, kind) for line, kind in enumerate(log)]
        for number, log in enumerate(logs)
    ]
    chosen = choose(*records.merged(files)).record
    seed.shuffle(files)
    assert choose(*records.merged(files)).record == chosen


def test_a_wrong_clock_does_not_decide_for_ever() -> None:
    """A final dated 2038 is superseded by the next one, of its own file or of another."""
    wrong, right = final(time="2038-01-19T03:14:07Z"), final(time="2026-02-01", tuned=1.5)
    for files in ([[wrong, right]], [[wrong], [right]], [[right], [wrong]]):
        assert choose(*records.merged(files)).record == right


@given(
    cases=st.sets(
        st.builds(
            Case,
            st.sampled_from(["layer_norm", "lnlstm_step"]),
            st.integers(1, 4),
            st.sampled_from(["float32", "bfloat16"]),
            st.sampled_from(TYPICAL_ROWS),
        )
    )
)
def test_the_commands_that_tune_cases(cases: set[Case]) -> None:
    """Together they name every case once, and no other."""
    named: list[Case] = []
    for command in tune_commands(cases):
        words = command.split()
        lists = [words[n].split(",") for n in (4, 6, 8)]
        named += [Case(words[2], int(h), d, int(r)) for h, d, r in itertools.product(*lists)]
    assert sorted(named) == sorted(cases)
    assert tune_commands([CASE], " --target cuda")[0].endswith("--rows 8 --target cuda")


def test_what_a_report_shows_is_what_serves() -> None:
    """`served` gives for each case the record that `select` rests on, or where none can be used the
    latest.
    """
    busy, removed = final(busy=True, time="2026-06-01"), final(at(rows=32), schedule="gone")
    serving = served(
        [final(), busy, final(at(rows=32), time="2025"), removed], schedule.all_schedules()
    )
    assert serving == {final().key: final(), removed.key: final(at(rows=32), time="2025")}
    assert served([removed], schedule.all_schedules()) == {removed.key: removed}


# What follows goes through lntune.layer_norm.

X = torch.randn(8, HIDDEN)


def call(rows: int = 8) -> torch.Tensor:
    """lntune.layer_norm on so many rows."""
    return lntune.layer_norm(X.repeat(rows // 8, 1) if rows >= 8 else X[:rows], (HIDDEN,))


def test_one_warning_per_process() -> None:
    """The first untuned case says so once, with the command that mends it and the caller's line,
    whatever the variant; more are counted.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            call()
            lntune.layer_norm(X, (HIDDEN,), torch.ones(HIDDEN))
            lntune.layer_norm(X.clone().requires_grad_(), (HIDDEN,))
            lntune.layer_norm(X.view(2, 4, HIDDEN), (HIDDEN,))
        call(32)
    messages = [w for w in caught if issubclass(w.category, lntune.UntunedWarning)]
    assert len(messages) == 1
    assert [(one.case.hidden, one.case.rows, one.served) for one in lntune.untuned()] == [
        (HIDDEN, 8, "default knobs"),
        (HIDDEN, 32, "default knobs"),
    ]
    assert "served by default knobs" in str(
        messages[0].message
    ) and f"lntune tune layer_norm --hidden {HIDDEN}" in str(messages[0].message)
    assert Path(messages[0].filename).name == Path(__file__).name


@pytest.mark.filterwarnings("error::lntune.UntunedWarning")
def test_a_measured_case_is_silent_and_served(log_dir: Path) -> None:
    """With a record of its own a call has nothing to warn of, runs that record's kernel, and is
    right.
    """
    records.append(log_dir, final())
    y = [call() for _ in range(2)][-1]
    torch.testing.assert_close(
        y, torch.nn.functional.layer_norm(X, (HIDDEN,)), atol=1e-5, rtol=1e-5
    )
    choice = lntune.explain(CASE.op, CASE.hidden, CASE.dtype, CASE.rows)
    assert (choice.tier, choice.tuned_us, choice.eager_us) == ("exact", 1.0, 2.0)
    assert dispatch.kernel_for(CASE) is not None


@pytest.mark.filterwarnings("error::lntune.UntunedWarning")
def test_eager_is_called_where_it_won(log_dir: Path) -> None:
    """No kernel where eager measured faster: the result is eager's to the bit, with and without
    gradients, and no warning.
    """
    records.append(log_dir, final(tuned=5.0))
    assert dispatch.kernel_for(CASE) is None
    for _ in range(2):
        assert torch.equal(call(), torch.nn.functional.layer_norm(X, (HIDDEN,)))
        assert (
            lntune.layer_norm(X.clone().requires_grad_(), (HIDDEN,)).grad_fn.name()
            == "NativeLayerNormBackward0"
        )


def test_strict_wants_what_is_not_stale(log_dir: Path) -> None:
    """A record whose schedule has changed since is no measurement of what would run: an error in
    strict mode, else said once and served.
    """
    records.append(log_dir, final(code=OLD))
    with pytest.warns(
        lntune.UntunedWarning,
        match="was tuned before its schedule changed; served by that record. Run: lntune tune",
    ):
        call()
    assert lntune.explain(CASE.op, CASE.hidden, CASE.dtype, CASE.rows).stale is True
    lntune.strict()
    with pytest.raises(
        NotTunedError,
        match=r"measured on this device before its schedule changed.*lntune tune layer_norm",
    ):
        call()


def test_strict(log_dir: Path) -> None:
    """Strict mode raises every time, also for calls that were ready; a measured case passes, and so
    does what no kernel serves.
    """
    with pytest.warns(lntune.UntunedWarning):
        call()
    lntune.strict()
    for _ in range(3):
        with pytest.raises(
            NotTunedError,
            match=f"not measured on this device.*lntune tune layer_norm --hidden {HIDDEN}",
        ):
            call()
    records.append(log_dir, final(at(rows=32)))
    lntune.reload()
    with pytest.raises(NotTunedError):  # another bucket is a step down too
        call()
    call(32)
    lntune.layer_norm(X.double(), (HIDDEN,))
    lntune.strict(False)
    call()


@pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
def test_strict_in_a_block() -> None:
    """With `with` the mode ends with the block, however it ends, and is again what it was before,
    nested too.
    """
    with pytest.raises(lntune.NotTunedError), lntune.strict():
        call()
    call()
    with lntune.strict():
        with lntune.strict(False):
            call()
        with pytest.raises(NotTunedError):
            call()
    call()


def test_no_rows_are_pytorchs() -> None:
    """What is said of an empty batch is what a call does; sizes that make no sense are refused."""
    explanation = lntune.explain("layer_norm", 96, rows=0)
    assert explanation.tier == "eager" and "no rows" in str(explanation)
    with pytest.raises(InputError, match="hidden"):
        lntune.explain("layer_norm", 0, rows=0)


def test_explain(log_dir: Path) -> None:
    """What serves a call, as facts and in words; dtypes of PyTorch are understood, and what is not
    built is eager's.
    """
    records.append(log_dir, final())
    lntune.reload()
    choice = lntune.explain("layer_norm", HIDDEN, torch.float32, 8)
    assert (choice.tier, choice.schedule, choice.case["dtype"]) == (
        "exact",
        final().schedule,
        "float32",
    )
    assert (
        str(choice).splitlines()[0]
        == f"layer_norm hidden {HIDDEN} float32 rows 8: served by its own record"
    )
    assert str(choice).splitlines()[1].startswith(f"  {choice.schedule} ")
    assert lntune.explain("layer_norm", HIDDEN, torch.float64).tier == "eager"
    with pytest.raises(UnknownNameError, match="layer_norn"):
        lntune.explain("layer_norn", HIDDEN)


@pytest.mark.filterwarnings("ignore::lntune.UntunedWarning")
def test_reload(log_dir: Path) -> None:
    """New records count after reload(), not before: a decision once made is kept."""
    call()
    records.append(log_dir, final(tuned=5.0))
    call()
    assert dispatch.choose(CASE).tier == "default"
    lntune.reload()
    assert dispatch.choose(CASE).tier == "eager"
    assert torch.equal(call(), torch.nn.functional.layer_norm(X, (HIDDEN,)))


def test_an_unreadable_log_does_not_stop_a_model(log_dir: Path) -> None:
    """A log of this device that is a folder cannot be read: said once, eager serves; strict mode
    makes it an error.
    """
    records.log_path(log_dir, HERE, "layer_norm").mkdir(parents=True)
    with pytest.warns(lntune.UntunedWarning, match="cannot read the tuning log"):
        assert torch.equal(call(), torch.nn.functional.layer_norm(X, (HIDDEN,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    lntune.strict()
    with pytest.raises(lntune.LntuneError, match="cannot read"):
        call()


def test_each_record_is_asked_about_once() -> None:
    """A schedule is asked once whether the knobs of a final fit, and of none that is older than one
    without any fault.
    """
    asked: list[Any] = []
    name, schedule = next(iter(schedules().items()))

    def valid(knobs: Any, case: Case, device: Device) -> str | None:
        asked.append(knobs)
        return "of yesterday" if len(asked) == 1 else None

    watched = {name: dataclasses.replace(schedule, valid=valid)}
    log = [final(time=f"2026-01-0{day}") for day in (1, 2, 3)]
    choice = select(CASE, HERE, log, watched)
    assert len(asked) == 2
    assert choice.record == log[1]
    assert "of yesterday; passed over for an older one" in choice.steps[0]


LOW = at(dtype="bfloat16")
"""A case that several schedules fit."""


def test_default_knobs_serve_where_they_were_faster() -> None:
    """A final of other schedules in which the default knobs were faster, by more than the margin or
    with certainty, sends the call to these, where they can be used; a tie goes to what was tuned.
    """
    name, plan = next(iter(schedules().items()))
    default = Setting(name, knobs.to_dict(plan.untuned(LOW.typical, HERE)))
    other = next(n for n in schedules() if n != name)
    own = knobs.to_dict(schedules()[other].untuned(LOW.typical, HERE))

    def measured(us: float, verdict: str = "UNSURE", **changes: Any) -> Record:
        timings = {n: Timing((t,), t) for n, t in (("tuned", 1.0), ("eager", 2.0), ("default", us))}
        over = Advantage(us, None, None, cast(Verdict, verdict))
        decision = Decision("alone", "time", over_default=over)
        values = {"timings": timings, "schedule": other, "knobs": own, "decision": decision}
        return final(
            LOW, **{**values, "code": schedules()[other].code, "default": default, **changes}
        )

    for record in (measured(0.97), measured(0.985, "SLOWER"), measured(0.97, decision=None)):
        choice = choose(record, case=LOW)
        assert (choice.tier, choice.schedule, choice.knobs) == ("exact", name, default.knobs)
        assert choice.measured and "the default knobs were faster" in choice.steps[-2]
    gone = Setting("gone", {})
    for record in (measured(0.985), measured(1.2), measured(0.97, default=gone)):
        assert choose(record, case=LOW).schedule == other
    slow = {n: Timing((t,), t) for n, t in (("tuned", 3.0), ("eager", 2.0), ("default", 2.5))}
    assert choose(measured(2.5, timings=slow), case=LOW).tier == "eager"


def test_the_time_of_what_serves(log_dir: Path) -> None:
    """Where the default knobs serve in the place of what was tuned, their time is what is told."""
    name, plan = next(iter(schedules().items()))
    default = Setting(name, knobs.to_dict(plan.untuned(LOW.typical, HERE)))
    other = next(n for n in schedules() if n != name)
    own = knobs.to_dict(schedules()[other].untuned(LOW.typical, HERE))
    timings = {n: Timing((t,), t) for n, t in (("tuned", 1.0), ("eager", 2.0), ("default", 0.9))}
    code = schedules()[other].code
    record = final(LOW, timings=timings, schedule=other, knobs=own, code=code, default=default)
    records.append(log_dir, record)
    told = lntune.explain("layer_norm", HIDDEN, LOW.dtype, LOW.rows)
    assert (told.schedule, told.tuned_us) == (name, 0.9)
