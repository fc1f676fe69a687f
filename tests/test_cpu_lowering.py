"""Passes from scheduled modules to what LLVM compiles on CPUs: the same code as from all that TVM's
own pipeline does; and kernels of trials, which take their arguments on trust.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import code_digests
import pytest
from grids import exhaustive
from knob_samples import sample

from lntune import check, device, ops, schedule
from lntune.backends.backend import Scheduled
from lntune.backends.cpu import llvm, lowering, signature
from lntune.backends.cpu.backend import BACKEND
from lntune.case import Case
from lntune.device import Device
from lntune.kernels import compiler
from lntune.measure import trial
from lntune.measure.jobs import Candidate, Try
from lntune.schedule import Schedule
from lntune.transforms.cpu import polynomials

PLANS = {name: s for name, s in schedule.all_schedules().items() if s.kind == "cpu"}
HERE, OTHER = code_digests.DEVICES["cpu"]
NORM = Case("layer_norm", 100, "float32", 32)
STEP = 24
"""Hidden elements of an LSTM's step, of which each statement takes TVM's own pipeline a while."""
SOME = {"lnlstm_step": 2, "lnlstm_step_backward": 1}
"""Kernels that are compared of a case, where not one with each value of each knob."""


def goal_of(machine: Device) -> Any:
    """TVM's target."""
    import tvm

    return tvm.target.Target(llvm.target(machine))


def by_default(module: Any, machine: Device) -> Any:
    """lowering.lower by TVM's own pipeline, whole but for activations."""
    import tvm

    goal = goal_of(machine)
    pipeline, host_passes, _ = tvm.tirx.get_default_tir_pipeline(goal)
    lowered = pipeline(tvm.tirx.transform.BindTarget(goal.with_host(goal))(module))
    return host_passes()(polynomials.expanded(lowered))


def settings() -> list[Any]:
    """(schedule, case, device) of every schedule, with tails of every width and without; in every
    run the two take turns.
    """
    parameters = []
    for number, (name, plan) in enumerate(PLANS.items()):
        if name == "metaschedule_step_backward":
            continue  # TVM's sketches leave empty branches, which LLVM takes out
        for at, (hidden, dtype, rows, machine) in enumerate(
            (
                (STEP if "lstm" in plan.op else 1000, "bfloat16", 512, HERE),
                (16 if "lstm" in plan.op else 256, "float32", 32, OTHER),
            )
        ):
            case = Case(plan.op, hidden, dtype, rows)
            if plan.space(case, machine):
                one = pytest.param(plan, case, machine, id=f"{name}-{case}")
                parameters.append(one if at == number % 2 else exhaustive(one))
    return parameters


@pytest.mark.parametrize(("plan", "case", "machine"), settings())
def test_code_is_that_of_the_whole_pipeline(plan: Schedule, case: Case, machine: Device) -> None:
    """What is left out changes nothing, whatever the knobs: what LLVM is given is the same to the
    letter. Whole groups of rows apart are asked for by annotation, and have the whole pipeline.
    """
    some = SOME.get(plan.op) if machine is HERE else 1
    for setting in sample(plan, case, machine)[:some]:
        module = compiler.scheduled(case, plan, setting, machine)
        assert lowering._is_plain(module) or getattr(setting, "pairs", False), setting
        ours = lowering.lower(module, goal_of(machine))
        assert str(ours.script()) == str(by_default(module, machine).script()), setting


def scheduled(setting: Any = None) -> Any:
    """The module of layer norm's first schedule."""
    here, plan = device.current(), PLANS["cached_rows"]
    return compiler.scheduled(NORM, plan, setting or plan.default(NORM, here), here)


def test_rows_that_are_left_over_make_conditions() -> None:
    """Kernels with and without conditions are both among those compared."""
    import tvm

    plan, case = PLANS["cached_rows"], Case("layer_norm", 256, "float32", 32)
    default = plan.default(case, HERE)
    found = set()
    for together in (1, 2):
        setting = dataclasses.replace(default, together=together)
        module = compiler.scheduled(case, plan, setting, HERE)
        blocks = tvm.transform.Sequential(lowering._to_blocks())(module)
        found.add(lowering._has_conditions(blocks))
    assert found == {False, True}


def test_what_was_left_out_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with an annotation goes through TVM's own pipeline, and computes the same."""
    from tvm import s_tir

    sch = s_tir.Schedule(scheduled())
    block = sch.get_child_blocks(sch.get_sblock("root"))[0]
    sch.annotate(sch.get_loops(block)[-1], "pragma_unroll_explicit", 1)
    assert not lowering._is_plain(sch.mod)
    monkeypatch.setattr(lowering, "_to_blocks", lambda: pytest.fail("our own passes"))
    assert check.verify(NORM, llvm.in_memory(sch.mod, device.current())).ok


@pytest.mark.parametrize("name", PLANS)
def test_signatures_of_schedules(name: str) -> None:
    """Every schedule's kernels take what their operator says, in the first variant and the last, so
    that trials need not check it; and not what another case has.
    """
    plan = PLANS[name]
    every = ops.get(plan.op).variants
    for variant in dict.fromkeys((every[0], every[-1])):
        case = Case(plan.op, 48, "bfloat16", 32, variant)
        module = compiler.scheduled(case, plan, plan.default(case, HERE), HERE)
        assert signature.is_of(module, case, HERE)
        assert not signature.is_of(module, Case(plan.op, 47, "bfloat16", 32, variant), HERE)
        assert not signature.is_of(module, Case(plan.op, 48, "float16", 32, variant), HERE)


def test_a_kernel_that_takes_something_else_checks_it() -> None:
    """One for other numbers of elements, which a trial must not be killed by, refuses them."""
    here, plan = device.current(), PLANS["cached_rows"]
    other = Case("layer_norm", 101, "float32", 32)
    module = compiler.scheduled(other, plan, plan.default(other, here), here)
    kernel = BACKEND.in_memory(
        Scheduled(NORM, plan, plan.default(NORM, here), here, module, checked=False)
    )
    with pytest.raises(Exception, match="101"):
        check.verify(NORM, kernel)


def test_kernels_of_trials_take_their_arguments_on_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody else's do: what a trial measures is the same code but for that."""
    plan, here = PLANS["cached_rows"], device.current()
    asked: list[bool] = []
    real = lowering.lower

    def lower(module: Any, goal: Any, asserts: bool = True) -> Any:
        asked.append(asserts)
        return real(module, goal, asserts)

    monkeypatch.setattr(lowering, "lower", lower)
    candidate = Candidate.of(plan.name, plan.default(NORM, here))
    assert trial.run(Try(NORM, here, candidate, 0.001)).status == "ok"
    compiler.in_memory(NORM, plan, plan.default(NORM, here), here)
    assert asked == [False, True]
    goal = goal_of(here)
    checked, trusting = (
        str(llvm.generate(real(scheduled(), goal, asserts), goal).mod.inspect_source())
        for asserts in (True, False)
    )
    assert "TypeError" in checked and "TypeError" not in trusting
    body = "__tvm_parallel_lambda" if "__tvm_parallel_lambda" in checked else "main_compute_"
    assert (body in trusting) == (body in checked)


def test_types_are_still_checked() -> None:
    """TVM's schedules refuse arguments of other types, with its own message, call after call."""
    from tvm import s_tir

    sch = s_tir.Schedule(scheduled())
    loop = sch.get_loops(sch.get_child_blocks(sch.get_sblock("root"))[0])[0]
    for _ in range(2):
        with pytest.raises(TypeError, match="loop"):
            sch.unroll("rows")
    sch.unroll(loop)


def test_what_cannot_be_a_key_is_asked_anew() -> None:
    """A list is no key; what is one is asked once."""
    asked: list[Any] = []
    count = compiler.remembered(lambda given: asked.append(given) or len(asked))
    assert [count("a"), count("a"), count(["b"]), count(["b"])] == [1, 1, 2, 3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_in_each_other_and_plain_exponentials(dtype: str) -> None:
    """A definition of somebody's own may have an activation in another's argument, other types, and
    exponentials of any size: it is right, and does not take for ever to build.
    """
    import torch
    from tvm import s_tir, te, tirx

    n = te.var("rows", "int64")
    x = te.placeholder((n, tirx.IntImm("int64", 37)), dtype, name="x")
    inner = lambda v: tirx.tanh(v) + tirx.sigmoid(tirx.tanh(v))  # noqa: E731
    nested = te.compute(x.shape, lambda i, k: tirx.tanh(inner(x[i, k])), name="nested")
    plain = te.compute(x.shape, lambda i, k: tirx.exp(x[i, k]), name="plain")
    sch = s_tir.Schedule(te.create_prim_func([x, nested, plain]))
    for name in ("nested", "plain"):
        _, columns = sch.get_loops(sch.get_sblock(name))
        sch.vectorize(sch.split(columns, [None, 8])[1])
    given = torch.linspace(-8, 8, 74, dtype=getattr(torch, dtype)).view(2, 37)
    given[0, 0], given[1, -1] = -float("inf"), 1e30
    outputs = [torch.empty_like(given) for _ in range(2)]
    llvm.in_memory(sch.mod, device.current())(given, *outputs)
    expected = torch.tanh(torch.tanh(given) + torch.sigmoid(torch.tanh(given))), torch.exp(given)
    for output, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, right, rtol=1e-5, atol=1e-7)
