"""What serves a step of training: decided on steps of training that were timed, both passes alike,
while inference has its own decision; gradients, whoever serves; and how a tuning run times steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fake_worker import FakeWorker, always_ok, fake, settings, took
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from made_up_records import final_here, timing

import lntune
from lntune import backends, device, knobs, ops, schedule
from lntune.case import Case
from lntune.log import caches, records, slower
from lntune.log.decision import Advantage, Decision
from lntune.log.records import Record
from lntune.measure import training
from lntune.measure.jobs import Outcome, Training
from lntune.ops import layer_norm_backward
from lntune.report import rows, tables
from lntune.system import paths
from lntune.torch import devices, dispatch, layer_norm_node
from lntune.torch.choices import _records
from lntune.torch.lnlstm_sequence import by_steps, lnlstm_sequence
from lntune.tune import loop, times, tune

HERE = device.current()
HIDDEN, ROWS = 192, 8
BACKWARD = Case("layer_norm_backward", HIDDEN, "float32", ROWS)
PAIRS = (("layer_norm", "layer_norm_backward"), ("lnlstm_step", "lnlstm_step_backward"))
Steps = tuple[float, float] | None
__all__ = ["fake"]


@pytest.fixture(autouse=True)
def own_logs(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only the test's own log is read, and no decision outlives the test."""
    monkeypatch.setattr(paths, "log_dirs", lambda: [log_dir])
    lntune.reload()
    yield
    lntune.reload()


def final(
    op: str,
    tuned: float,
    eager: float,
    steps: Steps = None,
    verdict: Any = None,
    hidden: int = HIDDEN,
) -> Record:
    """A final of default knobs with medians in microseconds; of a backward also of steps of
    training, by kernels and in eager mode, and a verdict on these.
    """
    case = Case(op, hidden, "float32", ROWS)
    decision = Decision("alone", "time", training=verdict and Advantage(1.0, None, None, verdict))
    timed = {} if steps is None else {"tuned": timing(steps[0]), "eager": timing(steps[1])}
    return final_here(case, tuned, eager, training=timed, decision=decision, time="2026-12-01")


def tiers(forward: Record, backward: Record) -> tuple[str, str, str]:
    """What the forward of inference, that of training and the backward rest on."""
    lntune.reload()
    for record in (forward, backward):
        _records[HERE, record.case.op] = [record]
    case, op = forward.case, ops.get(forward.case.op)
    named = msgspec.structs.replace(case, variant=op.training)
    choices = [dispatch.choose(c, HERE) for c in (case, named, backward.case)]
    assert all(bool(c.schedule) == (c.tier != "eager") for c in choices)
    assert all(c.measured for c in choices)
    return tuple(c.tier for c in choices)  # type: ignore[return-value]


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_a_step_that_is_slower_is_eagers_though_its_passes_are_faster(
    forward: str, backward: str
) -> None:
    """Kernels win each pass alone and lose the step: eager mode has both passes of training, and
    the kernel the forward of inference.
    """
    alone = final(forward, 1.0, 2.0)
    assert tiers(alone, final(backward, 1.0, 2.0, (12.0, 10.0))) == ("exact", "eager", "eager")
    certain = final(backward, 1.0, 2.0, (10.1, 10.0), "SLOWER")
    assert tiers(alone, certain) == ("exact", "eager", "eager")
    steps = lntune.explain(forward, HIDDEN, rows=ROWS)
    assert steps.tier == "exact" and "eager's step was faster, 10.00 us" in steps.training
    assert "in training: served by eager mode; training: eager's step" in str(steps)


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
@pytest.mark.parametrize("steps", [(10.0, 12.0), (10.1, 10.0), (10.0, 10.0)])
def test_a_step_that_is_not_slower_is_the_kernels_though_a_pass_is(
    forward: str, backward: str, steps: Steps
) -> None:
    """Eager mode wins a pass alone, not the step, or nobody knows: kernels have both passes of
    training, eager mode the forward of inference where it is faster there.
    """
    verdict = "UNSURE"
    assert tiers(final(forward, 2.0, 1.0), final(backward, 1.0, 2.0, steps, verdict)) == (
        "eager",
        "exact",
        "exact",
    )
    assert "kernels made the step in 10" in lntune.explain(forward, HIDDEN, rows=ROWS).training
    assert tiers(final(forward, 1.0, 2.0), final(backward, 2.0, 1.0, steps, verdict)) == (
        "exact",
        "exact",
        "exact",
    )
    assert lntune.explain(forward, HIDDEN, rows=ROWS).training == ""


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_without_steps_each_pass_is_decided_alone(forward: str, backward: str) -> None:
    """As records have it of before steps were timed, which still are read."""
    for us in ((1.0, 2.0), (2.0, 1.0)):
        for other in ((1.0, 2.0), (2.0, 1.0)):
            mine, its = ("exact" if a < b else "eager" for a, b in (us, other))
            assert tiers(final(forward, *us), final(backward, *other)) == (mine, mine, its)
    new = msgspec.json.encode(final(backward, 1.0, 2.0))
    old = msgspec.json.decode(new)
    for name in ("training", "forward"):
        del old[name]
    del old["decision"]["training"]
    assert msgspec.json.decode(msgspec.json.encode(old), type=Record) == final(backward, 1.0, 2.0)


TIMES = st.floats(1.0, 100.0)
VERDICTS = st.sampled_from([None, "FASTER", "SLOWER", "SAME", "UNSURE"])


@given(TIMES, TIMES, TIMES, TIMES, st.tuples(TIMES, TIMES), VERDICTS)
@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_nothing_is_chosen_that_is_certainly_slower(
    tuned: float, eager: float, back: float, eager_back: float, steps: Any, verdict: Any
) -> None:
    """Whatever was measured: both passes of training are of one kind, which is eager mode's exactly
    where its step was faster by more than a tie or certainly; inference has its own decision.
    """
    forward = final("layer_norm", tuned, eager)
    backward = final("layer_norm_backward", back, eager_back, steps, verdict)
    inference, *passes = tiers(forward, backward)
    behind = steps[0] > steps[1] * slower.MARGIN or verdict == "SLOWER"
    assert passes == ["eager" if behind else "exact"] * 2
    assert inference == ("eager" if tuned > eager * slower.MARGIN else "exact")


def test_what_serves_a_step(log_dir: Path) -> None:
    """Where eager mode's step is faster a call of which gradients are asked is PyTorch's own, with
    its node of the graph and its gradients.
    """
    records.append(log_dir, final("layer_norm", 1.0, 2.0))
    records.append(log_dir, final("layer_norm_backward", 1.0, 2.0, (12.0, 10.0)))
    lntune.reload()
    leaves = [torch.randn(ROWS, HIDDEN), torch.randn(HIDDEN), torch.randn(HIDDEN)]
    for leaf in leaves:
        leaf.requires_grad_()
    dy = torch.randn(ROWS, HIDDEN)
    for _ in range(2):
        y = lntune.layer_norm(leaves[0], (HIDDEN,), *leaves[1:])
        expected = torch.nn.functional.layer_norm(leaves[0], (HIDDEN,), *leaves[1:])
        assert y.grad_fn is not None and y.grad_fn.name() == expected.grad_fn.name()  # type: ignore[union-attr]
        assert all(
            map(
                torch.equal,
                torch.autograd.grad(y, leaves, dy),
                torch.autograd.grad(expected, leaves, dy),
            )
        )


def sequence(hidden: int = HIDDEN) -> dict[str, Any]:
    """Arguments of a sequence of two steps whose gradients are asked."""
    sizes = {
        "gates_x": (2 * ROWS, 4 * hidden),
        "h_0": (ROWS, hidden),
        "c_0": (ROWS, hidden),
        "matrix": (4 * hidden, hidden),
        "weight_x": None,
        "weight_h": (4 * hidden,),
        "weight_c": (hidden,),
        "bias": (4 * hidden,),
        "bias_c": (hidden,),
    }
    return {n: None if s is None else torch.randn(s).requires_grad_() for n, s in sizes.items()}


@pytest.mark.parametrize("op", ["lnlstm_step", "lnlstm_step_backward"])
def test_a_sequence_is_eagers_throughout(op: str, log_dir: Path) -> None:
    """A sequence whose step is faster in eager mode, in training or in inference, runs on PyTorch's
    operators alone: no kernel makes its backward.
    """
    in_training = op == "lnlstm_step_backward"
    records.append(log_dir, final("lnlstm_step", 1.0, 2.0 if in_training else 0.5))
    if in_training:
        records.append(log_dir, final(op, 1.0, 2.0, (12.0, 10.0)))
    lntune.reload()
    given = sequence()
    options = ([], 1e-5, False, False, False)
    outputs = lnlstm_sequence(*given.values(), *options)
    expected = by_steps(*given.values(), *options)
    leaves = [t for t in given.values() if t is not None]
    mine, its = (torch.autograd.grad([o.sum() for o in out], leaves) for out in (outputs, expected))
    assert all(map(torch.equal, (*outputs, *mine), (*expected, *its)))
    assert "Lnlstm" not in outputs[0].grad_fn.name()  # type: ignore[union-attr]


def standing_in(case: Case, called: list[Case]) -> Any:
    """PyTorch's operators behind a kernel's arguments, noting each call."""

    def kernel(*values: Any) -> None:
        called.append(case)
        dispatch._eager_kernel(case, *values)

    return functools.partial(kernel)


@pytest.mark.parametrize("op", ["layer_norm_backward", "lnlstm_step_backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_timed_step_is_a_users_by_the_kernels_that_are_given(
    op: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps by kernels call the given forward and backward once each, whatever the log says, and
    have eager mode's gradients; eager mode's call none; behind the block the log decides again.
    """
    for name in ("ready", "compile_once"):  # which takes long, and has tests of its own
        monkeypatch.setattr(layer_norm_node, name, lambda: False)
    called: list[Case] = []
    backward = Case(op, 16, dtype, 5)
    passes = training.passes(backward)
    kernels = {case: standing_in(case, called) for case in passes}
    with training.steps(backward, HERE, kernels) as contenders:
        called.clear()
        tuned, eager = (contenders[name][0]() for name in ("tuned", "eager"))
        assert called == list(passes)
    tolerance = {"float32": 1e-4, "bfloat16": 5e-2}[dtype]
    for mine, its in zip(tuned, eager, strict=True):
        assert mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=tolerance)
    keys = {(HERE, c.typical, devices.Layout()) for c in passes}
    assert not keys & dispatch._kernels.keys()


def test_what_is_timed() -> None:
    """Backwards with all gradients on a CPU; no forward, no part of the gradients, no GPU, and no
    single step of a sequence, whose price would have sequences served by eager mode.
    """
    assert training.is_timed(BACKWARD, HERE)
    named = msgspec.structs.replace(BACKWARD, variant=layer_norm_backward.DEFAULT_VARIANT)
    assert training.is_timed(named, HERE)
    assert not training.is_timed(msgspec.structs.replace(BACKWARD, variant="dx"), HERE)
    assert not training.is_timed(Case("layer_norm", HIDDEN, "float32", ROWS), HERE)
    assert not training.is_timed(BACKWARD, backends.device_of("emulated:sm_90"))
    assert not training.is_timed(Case("lnlstm_step_backward", HIDDEN, "float32", ROWS), HERE)


def answer(job: Any, **changes: Any) -> Outcome:
    """Everything works; a step of training takes 12 us by kernels, 10 in eager mode."""
    if not isinstance(job, Training):
        return always_ok(job)
    steps = {"tuned": took(12.0), "eager": took(10.0)}
    outcome = Outcome("ok", training=steps, forward=job.forward.as_setting)
    return msgspec.structs.replace(outcome, **changes)


def tuned(fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Any:
    """What a tuning run of a backward comes to, with its only final."""
    monkeypatch.setattr(loop, "prepare_training", lambda _: None)
    fake.answer = staticmethod(functools.partial(answer, **changes))
    summary = tune([BACKWARD], settings("blocked_rows", trials=2))
    return summary, *summary.finals


def test_a_tuning_run_times_steps_of_training(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch, log_dir: Path
) -> None:
    """Behind the final of a backward, with the winner and what serves the forward; the record has
    both, and what serves follows.
    """
    forward = final("layer_norm", 2.0, 1.0)
    plan, case = schedule.get(forward.schedule), forward.case.typical
    settings_ = map(knobs.to_dict, plan.space(case, HERE))
    changed = next(k for k in settings_ if k != forward.knobs)
    records.append(log_dir, msgspec.structs.replace(forward, knobs=changed))
    summary, record = tuned(fake, monkeypatch)
    job = fake.jobs[-1]
    assert isinstance(job, Training) and not summary.notes
    assert (job.candidate.schedule, job.candidate.knobs) == (record.schedule, record.knobs)
    assert (job.forward.schedule, job.forward.knobs) == (forward.schedule, changed)
    assert record.forward == job.forward.as_setting
    assert {n: t.median_us for n, t in record.training.items()} == {"tuned": 12.0, "eager": 10.0}
    assert record.decision.training.verdict == "SLOWER"
    assert record.decision.training.ratio == pytest.approx(10 / 12, abs=1e-4)
    lntune.reload()
    assert dispatch.choose(BACKWARD).tier == "eager"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "run", "message": "the worker died (SIGSEGV)"}, "died (SIGSEGV)"),
        ({"busy": True, "noticed": ("a neighbour took 9 %",)}, "a neighbour took 9 %"),
    ],
)
def test_steps_that_fail_or_are_disturbed_decide_nothing(
    changes: dict[str, Any], said: str, fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final stands without them, and a note says why."""
    summary, record = tuned(fake, monkeypatch, **changes)
    assert record.status == "ok" and not record.training and record.forward is None
    assert record.decision.training is None
    (note,) = summary.notes
    assert "a step of training" in note and said in note


def test_an_interrupt_while_steps_are_timed_keeps_the_final(
    fake: type[FakeWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at that moment ends the run with the final, which is logged once."""
    monkeypatch.setattr(loop, "prepare_training", lambda _: None)

    def interrupted(job: Any) -> Outcome:
        if isinstance(job, Training):
            raise KeyboardInterrupt
        return always_ok(job)

    fake.answer = staticmethod(interrupted)
    following = msgspec.structs.replace(BACKWARD, hidden=2 * HIDDEN)
    summary = tune([BACKWARD, following], settings("blocked_rows", trials=2))
    assert summary.interrupted and [f.case for f in summary.finals] == [BACKWARD]
    assert not summary.finals[0].training


def test_steps_of_training_have_their_part_of_the_time() -> None:
    """What they take is left when the final begins, so that a run keeps to its budget: two more
    kernels are built, and 0.3 s or a dozen steps of either contender are timed.
    """
    plain, trained = times.Times(), times.Times()
    trained.training = True
    for one in (plain, trained):
        one.tried(0.54)
    assert plain.steps(1e3) == 0
    assert trained.steps(math.inf) == trained.steps(1e3) == pytest.approx(1.3)
    assert trained.steps(1e5) == pytest.approx(1 + 72 * 0.1)
    assert trained.final(3, 1e3) - plain.final(3, 1e3) == pytest.approx(1.3)
    for seconds in (8.0, 30.0):
        trials, total = times.estimate(seconds, 0.54, 0.54, 1000, training=True)
        assert trials > 1 and total <= seconds + 0.54
        assert trials <= times.estimate(seconds, 0.54, 0.54, 1000)[0]


def test_what_a_report_says_of_training() -> None:
    """The ratio of a step by kernels over eager mode's is a column of a backward's table; not of
    a cold cache's, nor where nobody measured it.
    """
    backward = final("layer_norm_backward", 1.0, 2.0, (10.0, 12.0))
    backward = msgspec.structs.replace(backward, cold=backward.timings)
    (row,) = rows.rows_of([backward])
    assert row.training_over_eager == pytest.approx(1.2)
    columns = [c.name for c in tables.cases_table([row], "").columns]
    assert "in training" in columns
    cold = caches.cold(backward)
    assert cold is not None
    for record in (cold, final("layer_norm_backward", 1.0, 2.0)):
        (row,) = rows.rows_of([record])
        assert row.training_over_eager is None
        assert "in training" not in [c.name for c in tables.cases_table([row], "").columns]
