"""The benchmark: who is measured and how, a heap that keeps its pages, a busy machine, and what
surrounds a kernel.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from kernel_arguments import inputs
from typer.testing import CliRunner

import lntune
from lntune import backends, check, device, ops, schedule, timing
from lntune.case import Case
from lntune.check import Verdict
from lntune.cli import app
from lntune.commands import bench
from lntune.commands.bench import call_cost, training
from lntune.errors import BuildError, InputError
from lntune.log.records import Record, Timing
from lntune.report.training import facts, steps_lines, steps_of
from lntune.system import heap
from lntune.torch import bound_call, dispatch

CASE = Case("layer_norm", 64, "float32", 8)
glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be told to keep its pages"
)


@pytest.fixture(autouse=True)
def fresh_decisions() -> Iterator[None]:
    """Decisions of this test's log serve no other."""
    dispatch.reload()
    yield
    dispatch.reload()


# --- who is measured


def test_everyone_who_allocates() -> None:
    """By default eager, the op as a user calls it, torch.compile and a clone are measured, and the
    kernel is checked.
    """
    seen = []
    result = bench.run([CASE], 0.02, page_faults=True, on_case=lambda *a: seen.append(a))
    (record,) = result.records
    assert set(record.timings) == {"eager", "tuned", "compile", "copy"}
    assert len({len(t.samples_us) for t in record.timings.values()}) == 1, (
        "interleaved: each is in every round"
    )
    assert (record.role, record.status, record.case, record.threads) == (
        "bench",
        "ok",
        CASE,
        torch.get_num_threads(),
    )
    assert (
        record.schedule == "cached_rows"
        and record.knobs
        and record.code.schedule
        and record.message.startswith("default: ")
    )
    assert record.errors and max(record.errors.values()) <= 1
    assert record.versions["torch"] and record.time
    assert result.outputs == "allocated by every call with page faults"
    assert seen == [(0, 1, CASE)]


@pytest.mark.filterwarnings("ignore::lntune.torch.untuned.UntunedWarning")
@pytest.mark.parametrize("name", ops.OPS)
def test_every_operators_call(name: str) -> None:
    """What the benchmark times as an operator's public call gives the operator's outputs."""
    op, case = ops.get(name), Case(name, 64, "float32", 8)
    here = device.current()
    (inputs,) = backends.of(here).inputs(case, here)
    result = bound_call(case, inputs)()
    outputs = op.eager(case, inputs)
    torch.testing.assert_close(
        result[0] if isinstance(result, tuple) else result,
        next(iter(outputs.values())),
        atol=1e-4,
        rtol=1e-4,
    )


def test_what_an_operator_names_is_there() -> None:
    """The modules of PyTorch calls and of others' kernels that operators name exist, and the cases
    they name are their own.
    """
    for op in ops.OPS.values():
        for module in (op.binding, *op.peers.values()):
            assert importlib.util.find_spec(module), module
        more = [case for cases in op.more_cases.values() for case in cases]
        telling = [case for cases in op.telling for case in cases]
        assert {case.op for case in (*op.grid, *more, *telling)} == {op.name}
        assert set(op.more_cases) <= set(schedule.KINDS)
        assert set(telling) <= {*op.grid, *more}


def test_training_steps() -> None:
    """Modules are measured as they train: forward and backward, and the forward alone; the step's
    gradients are eager's.
    """
    seen: list[int] = []
    (record,) = training.run(
        [CASE], 0.02, with_compile=False, on_result=lambda sofar: seen.append(len(sofar))
    )
    assert set(record.timings) == {"eager", "tuned", "eager forward", "tuned forward"}
    assert len({len(t.samples_us) for t in record.timings.values()}) == 1, (
        "interleaved: each is in every round"
    )
    assert (record.role, record.case, record.schedule) == ("bench-training", CASE, "cached_rows")
    assert seen == [1]
    x, dy = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    steps = []
    for kind in (torch.nn.LayerNorm, lntune.LayerNorm):
        module = training._module(CASE, kind)
        steps.append(training._step(module, x, (x, module.weight, module.bias), dy))
    torch.testing.assert_close(*steps, atol=1e-5, rtol=1e-4)


def test_training_is_of_layer_norm() -> None:
    """Another operator is refused with what measures it."""
    with pytest.raises(InputError, match="LN-LSTM"):
        training.run([Case("lnlstm_step", 64, "float32", 8)], 0.01)


def test_training_figures() -> None:
    """The table and the sentences tell the ratios of a step, between 8 and 512 rows apart, and
    where eager is faster; a disturbed case has none.
    """
    times = {
        "eager": (30.0, 30.0),
        "compile": (20.0, 20.0),
        "tuned": (15.0, 10.0),
        "eager forward": (6.0, 6.0),
        "tuned forward": (3.0, 3.0),
    }
    timings = {name: Timing(samples, samples[0]) for name, samples in times.items()}
    slow = timings | {"tuned": Timing((60.0, 60.0), 60.0)}
    base = training.run([CASE], 0.01, with_compile=False)[0]
    trainings = [
        msgspec.structs.replace(
            base, case=Case("layer_norm", 64, "float32", rows), timings=t, busy=busy
        )
        for rows, t, busy in ((8, timings, False), (1, slow, False), (32, timings, True))
    ]
    steps = steps_of(trainings)
    assert [(s.rows, s.over_eager, s.over_better) for s in steps] == [
        (1, 0.5, 20 / 60),
        (8, 2.5, (20 / 15 + 2) / 2),
        (32, None, None),
    ]
    figures = facts(steps)
    assert figures["geomean_over_eager_8_to_512_rows"] == pytest.approx(2.5)
    assert figures["geomean_forward_over_eager"] == pytest.approx(2)
    assert figures["slower_than_eager"] == ["1x64 float32: 0.50x"]
    text = "\n".join(steps_lines(steps))
    assert (
        "8 to 512 rows: geomean 2.50x over eager" in text
        and "slower than eager in 1" in text
        and "1 disturbed" in text
    )


def test_kernel_against_copy() -> None:
    """With given outputs only the kernel and a copy are measured, and the record cannot be mistaken
    for the other kind.
    """
    result = bench.run([CASE], 0.01, given_output=True)
    assert set(result.records[0].timings) == {"tuned", "copy"}
    assert (result.outputs, result.records[0].role) == ("given", "bench-given-output")


def test_strided_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `strided` everyone is given inputs whose rows are halves of wider ones, and the record
    cannot be mistaken for another kind.
    """
    seen = []
    monkeypatch.setattr(
        bench,
        "_calls",
        lambda case, copies, *rest, calls=bench._calls: (
            seen.append(copies[0]) or calls(case, copies, *rest)
        ),
    )
    result = bench.run([CASE], 0.01, with_compile=False, strided=True)
    assert (result.records[0].role, result.records[0].status) == ("bench-strided", "ok")
    assert result.outputs.endswith(", inputs half of wider rows")
    assert seen[0]["x"].stride() == (2 * CASE.hidden, 1)
    assert seen[0]["weight"].is_contiguous()


def test_the_calls_answer_as_eager_does() -> None:
    """What is timed is layer norm, for every contender: the same result from the same input."""
    given = inputs(CASE, 8)
    contenders = {
        name: call
        for name, (call,) in bench._calls(
            CASE, [given], device.current(), with_compile=True
        ).items()
    }
    with torch.inference_mode():
        for name in ("tuned", "compile"):
            torch.testing.assert_close(contenders[name](), contenders["eager"]())
        assert torch.equal(contenders["copy"](), given["x"])


def test_where_eager_serves_there_is_no_kernel_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that eager mode serves is measured as it is served, and its record says eager."""
    monkeypatch.setattr(dispatch, "choose", lambda case, *_: dispatch.Choice("eager"))
    monkeypatch.setattr(dispatch, "kernel_for", lambda case, *_: None)
    record = bench.run([CASE], 0.01, with_compile=False).records[0]
    assert (record.schedule, record.errors, record.status) == ("eager", {}, "ok")
    assert set(bench.run([CASE], 0.01, given_output=True).records[0].timings) == {"copy"}


def test_a_wrong_kernel_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is measured and found wrong is recorded as wrong, with the reason."""
    monkeypatch.setattr(
        check, "verify", lambda case, kernel, *_, **__: Verdict("y: too far off", {"y": 3.0}, {})
    )
    record = bench.run([CASE], 0.01, with_compile=False).records[0]
    assert (record.status, record.message, record.errors) == ("wrong", "y: too far off", {"y": 3.0})


# --- a busy machine


def measured(others: float | None, name: str = "") -> timing.Measured:
    """A measurement during which others used this share of the machine."""
    return timing.Measured(
        {name: Timing((1.0,), 1.0)}, others, others is not None and others > timing.BUSY_SHARE
    )


@pytest.mark.parametrize(
    ("shares", "attempts", "kept"),
    [
        ([0.0, 0.5], 1, 0.0),
        ([None, 0.0], 1, None),
        ([0.5, 0.01, 0.0], 2, 0.01),
        ([0.5, 0.3, 0.4, 0.0], 3, 0.3),
        ([0.3, 0.5, 0.4], 3, 0.3),
        ([0.5, None, 0.0], 2, None),
    ],
)
def test_a_busy_measurement_is_made_again(
    shares: list[float | None], attempts: int, kept: float | None
) -> None:
    """Until one is quiet, at most three times; the least busy is kept."""
    left = iter(shares)
    done = []

    def measure() -> timing.Measured:
        done.append(measured(next(left)))
        return done[-1]

    assert timing.quietest(measure).others == kept
    assert len(done) == attempts


def test_of_measurements_that_wait_the_one_that_waited_least_is_kept() -> None:
    """Where nothing is known of others the times tell: what has waited for its turn took longer."""
    left = iter(
        [timing.Measured({"f": Timing((us,), us)}, None, True) for us in (7993.0, 31.0, 4001.0)]
    )
    assert timing.quietest(lambda: next(left)).timings["f"].median_us == 31.0


@pytest.mark.parametrize(("seconds", "count"), [(1.0, 1), (2.5, 2), (9.0, 3)])
def test_no_longer_than_there_is_time(
    monkeypatch: pytest.MonkeyPatch, seconds: float, count: int
) -> None:
    """A disturbed measurement is made again as often as the time allows, and three times at
    most.
    """
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    done = []

    def measure() -> timing.Measured:
        now[0] += 1.0
        done.append(measured(0.5))
        return done[-1]

    timing.quietest(measure, seconds=seconds)
    assert len(done) == count


def test_a_busy_case_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that stays busy through three measurements is recorded and shown as such."""
    calls = []
    real = timing.measure

    def busy(
        contenders: dict[str, Callable[[], Any]], seconds: float, *options: Any
    ) -> timing.Measured:
        calls.append(seconds)
        return msgspec.structs.replace(real(contenders, 0.001, *options), others=0.9, busy=True)

    monkeypatch.setattr(timing, "measure", busy)
    done = CliRunner().invoke(
        app, ["bench", "--hidden", "64", "--dtype", "float32", "--rows", "8", "--no-compile"]
    )
    assert done.exit_code == 0, done.output
    assert len(calls) == timing.ATTEMPTS
    assert (
        "* 1 disturbed by other work on the machine: neither times nor ratios hold" in done.output
    )


# --- the heap


FAULTS = """
import resource, torch
from lntune.system import heap

def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        torch.ones(16 << 20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with heap.kept_heap(False) as kept:
    print(int(kept), faults(10))
with heap.kept_heap() as kept:
    faults(20)  # the heap grows to what is needed
    print(int(kept), faults(10))
"""


@glibc
def test_a_kept_heap_does_not_fault() -> None:
    """Outputs of 64 MB are faulted in page by page at each call by default, and not at all once a
    kept heap has grown.
    """
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    loud, quiet = (tuple(map(int, line.split())) for line in done.stdout.splitlines())
    assert (loud[0], quiet[0]) == (0, 1)
    assert loud[1] >= 10 * 32, "pages of 2 MB, where the system hands such out; of 4 kB elsewhere"
    assert quiet[1] < 32


def test_elsewhere_nothing_is_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another C library is left alone, and the benchmark says that its outputs fault."""
    monkeypatch.setattr(heap, "_mallopt", lambda *_: pytest.fail("called"))
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    assert (
        bench.run([CASE], 0.01, with_compile=False).outputs
        == "allocated by every call with page faults"
    )


@glibc
@pytest.mark.parametrize(
    ("options", "outputs"),
    [
        ([], "allocated by every call from a kept heap"),
        (["--page-faults"], "allocated by every call with page faults"),
        (["--given-output"], "given"),
    ],
    ids=["kept", "faults", "given"],
)
def test_the_command_says_where_outputs_come_from(
    options: list[str], outputs: str, tmp_path: Path
) -> None:
    """Both the table and the file written with --output name how outputs are allocated."""
    file = tmp_path / "b.json"
    command = [
        "bench",
        "--hidden",
        "64",
        "--dtype",
        "float32",
        "--rows",
        "8",
        "--no-compile",
        "--time",
        "10ms",
        "--output",
        str(file),
        *options,
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"outputs {outputs}")
    assert json.loads(file.read_text())["outputs"] == outputs


# --- what surrounds a kernel


@pytest.mark.parametrize("kind", ["", "--training", "--given-output"])
def test_the_plot_of_a_benchmark(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--plot draws what was measured, of whatever kind, and says where it is; the table is printed
    as ever.
    """
    # tests beside this one may disturb all there is to draw
    monkeypatch.setattr(Record, "disturbance", "")
    command = ["bench", "--hidden", "64", "--dtype", "float32", "--rows", "1", "--time", "20ms"]
    path = tmp_path / "a.svg"
    options = ["--no-compile", *([kind] if kind else []), "--plot", str(path)]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 0, done.output
    assert f"The plot is in {path}." in done.stderr.replace("\n", " ")
    assert "layer_norm, float32" in path.read_text(encoding="utf-8")
    assert "64" in done.stdout


def test_call_cost(tmp_path: Path) -> None:
    """`bench --call-cost`: a call in each form, eager and tuned; loading in a fresh process,
    without TVM; importing.
    """
    file = tmp_path / "costs.json"
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(call_cost, "PROCESSES", 1)
        patch.setattr(call_cost.measure, "__defaults__", (1,))
        done = CliRunner().invoke(
            app,
            [
                "bench",
                "--call-cost",
                "--hidden",
                "64",
                "--time",
                "20ms",
                "--output",
                str(file),
                "--json",
            ],
        )
    assert done.exit_code == 0, done.output
    (costs,) = json.loads(done.stdout)
    assert json.loads(file.read_text()) == [costs]
    assert costs["case"]["rows"] == 1 and costs["case"]["hidden"] == 64
    forms = ("2-D", "3-D", "2-D rows")
    assert set(costs["call_us"]) == {
        f"{who} {form}" for who in ("eager", "tuned") for form in forms
    }
    assert all(v > 0 for v in (*costs["call_us"].values(), costs["import_ms"]))
    assert all((v is None) == costs["busy"] for v in costs["eager_over_tuned"].values())
    assert costs["first_load_ms"] > costs["load_ms"] > 0
    assert costs["loading_imports_tvm"] is False
    from lntune.report.costs import Costs, costs_lines, costs_table

    entries = [msgspec.convert(costs, Costs)]
    assert len(costs_table(entries).rows) == 1
    assert costs_lines(entries) == (
        ["* disturbed by other work on the machine: neither times nor ratios hold"]
        if costs["busy"]
        else []
    )


def test_call_cost_is_of_layer_norm() -> None:
    """Another operator is refused before anything is measured."""
    with pytest.raises(InputError, match="--call-cost: got lnlstm_step, expected layer_norm"):
        call_cost.measure(Case("lnlstm_step", 64, "float32", 1), 0.01)


def test_a_fresh_process_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the fresh process ends badly its last words are in the error."""
    monkeypatch.setattr(call_cost, "_SCRIPT", "raise SystemExit('no room')")
    with pytest.raises(BuildError, match="no room"):
        call_cost._fresh(CASE, CASE)


def test_results_come_case_by_case_and_an_interrupt_keeps_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After every case there is a result of all so far; an interrupt ends the run with those, and
    before the first with nothing.
    """
    one, seen = bench._one, []

    def interrupted(case: Case, *rest: Any) -> Any:
        if case.rows == 3:
            raise KeyboardInterrupt
        return one(case, *rest)

    monkeypatch.setattr(bench, "_one", interrupted)
    cases = [Case("layer_norm", 64, "float32", rows) for rows in (1, 2, 3, 4)]
    result = bench.run(
        cases,
        0.01,
        with_compile=False,
        on_result=lambda r: seen.append([record.case for record in r.records]),
    )
    assert [record.case for record in result.records] == cases[:2]
    assert seen == [cases[:1], cases[:2]]
    with pytest.raises(KeyboardInterrupt):
        bench.run(cases[2:], 0.01, with_compile=False)
