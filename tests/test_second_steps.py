"""Kernels that are right for few rows, and wrong from the second step of their blocks over the rows
on, or where a block has a certain number of them: each is rejected wherever kernels are checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fake_gpu import FakeGpu
from grids import product

from lntune import backends, check, ops, schedule
from lntune.backends import device_of
from lntune.backends.cuda import launcher
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import calls as emulated
from lntune.case import Case
from lntune.check import problems
from lntune.commands import bench
from lntune.commands.check import check_cases
from lntune.device import Device
from lntune.kernels import cache, candidate_facts, compiler
from lntune.log import records
from lntune.log.records import Record
from lntune.measure import trial
from lntune.measure.jobs import Candidate, Check, Try

GPU = device_of("cuda:sm_90")
FAULTY = Path(__file__).parent / "faulty_gpu"
BACKWARD = Case("layer_norm_backward", 64, "float32", 512)

KERNELS: dict[str, tuple[str, Case, dict[str, Any]]] = {
    "one row a block": (
        "shared_row_backward",
        BACKWARD,
        {"threads_per_row": 32, "rows_per_block": 1},
    ),
    "two rows a block": (
        "shared_row_backward",
        BACKWARD,
        {"threads_per_row": 16, "rows_per_block": 2},
    ),
    "sums apart": (
        "shared_row_backward",
        msgspec.structs.replace(BACKWARD, dtype="bfloat16"),
        {"threads_per_row": 32, "rows_per_block": 2, "partial_sums": "separate_kernel"},
    ),
    "an LSTM's step": ("gated_row_backward", Case("lnlstm_step_backward", 32, "float32", 512), {}),
}


def program(which: str) -> tuple[Case, Program]:
    """One of KERNELS for a GPU of 132 multiprocessors."""
    name, case, changed = KERNELS[which]
    plan = schedule.get(name)
    setting = plan.default(case, GPU)
    setting = type(setting)(**{**vars(setting), **changed})
    assert plan.valid(setting, case, GPU) is None
    return case, compiler.program(case, plan, setting, GPU)


def verdict(case: Case, made: Program, more: bool = True) -> check.Verdict:
    """The check of a program in the emulator, with all rows it takes or the usual ones."""
    kernel = emulated.kernel(case, made)
    rows = backends.of(GPU).more_rows(case, GPU, kernel) if more else ()
    return check.verify(case, kernel, check.ALIGNED, device=GPU, more_rows=rows)


LOOP = re.compile(
    r"^ *for \(int64_t (\w+) = \(int64_t\)0; \1 < (.*rows.*); \+\+\1\) \{\n", re.MULTILINE
)


def parts(source: str) -> tuple[str, re.Match[str], str]:
    """The source before the loop over rows, its first line, and what follows."""
    (loop,) = LOOP.finditer(source)
    return source[: loop.start()], loop, source[loop.end() :]


def loaded_of_an_earlier_row(source: str) -> str:
    """From the second step on a matrix is read where the step before has read it."""
    before, loop, after = parts(source)
    (line,) = re.findall(r"^.* = \*\(\w+\*\)\((?:x|c)_ptr .*$", after, re.MULTILINE)[:1]
    step = loop[1]
    earlier = re.sub(rf"\b{step}\b", f"({step} - ({step} > 0))", line)
    assert earlier != line
    return before + loop[0] + after.replace(line, earlier, 1)


def last_rows_missing(source: str) -> str:
    """Who has more than a step leaves out the last, which not all blocks have."""
    before, loop, after = parts(source)
    step, end = loop[1], loop[2]
    taken = [int(number) for number in re.findall(r"rows \+ \(int64_t\)(\d+)", end)]
    whole = f"(rows / (int64_t){taken[0] + 1})"
    shorter = f"({end}) > 1 ? {whole} : ({end})"
    return before + loop[0].replace(f"{step} < {end};", f"{step} < ({shorter});") + after


def sums_begun_again(source: str) -> str:
    """Every step sets the sums to 0."""
    before, loop, after = parts(source)
    zeros = re.findall(r"^ *\w+_local_ptr\[.*\] = 0x0p\+0f.*;\n", before, re.MULTILINE)
    assert zeros
    return before + loop[0] + "".join(zeros) + after


def registers_left(source: str) -> str:
    """A matrix is loaded in the first step only."""
    before, loop, after = parts(source)
    found = re.search(
        r"^( *)\*\(\w+\*\)\((\w+_local_ptr\w*) \+ .*\) = \*\(\w+\*\)\((?:x|c)_ptr .*$",
        after,
        re.MULTILINE,
    )
    assert found
    declared = re.search(rf"^ *alignas\(\d+\) \w+ {found[2]}\[\d+\];\n", after, re.MULTILINE)
    assert declared
    once = f"{found[1]}if ({loop[1]} == 0) {{ {found[0].strip()} }}"
    after = after.replace(found[0], once, 1).replace(declared[0], "", 1)
    return before + declared[0] + loop[0] + after


WRONG = (loaded_of_an_earlier_row, last_rows_missing, sums_begun_again, registers_left)


@pytest.mark.slow
@pytest.mark.parametrize("which", KERNELS)
def test_right_kernels_pass(which: str) -> None:
    """What the shipped schedules make is right in the second step and the third, and with every
    number of rows in a block.
    """
    case, made = program(which)
    assert backends.of(GPU).more_rows(case, GPU, emulated.kernel(case, made))[-1] > 2 * GPU.cores
    found = verdict(case, made)
    assert found.ok, found.message


@pytest.mark.slow
@pytest.mark.parametrize(("which", "spoil"), product(tuple(KERNELS), WRONG))
def test_wrong_from_the_second_step_on(which: str, spoil: Callable[[str], str]) -> None:
    """A kernel that is wrong there alone passes the check of 1 and 21 rows, and is rejected with as
    many as all blocks take two steps of.
    """
    case, made = program(which)
    wrong = msgspec.structs.replace(made, source=spoil(made.source))
    assert verdict(case, wrong, more=False).ok
    found = verdict(case, wrong)
    assert not found.ok
    assert re.search(r"\((normal inputs, [1-9]\d\d+ rows)", found.message), found.message


@pytest.mark.slow
def test_wrong_for_some_numbers_of_rows_in_a_block() -> None:
    """A forward of four rows to a block whose last block leaves one out where it has three is
    rejected, which 1 and 21 rows do not show.
    """
    case, plan = Case("layer_norm", 64, "float32", 512), schedule.get("shared_row")
    setting = plan.default(case, GPU)
    setting = type(setting)(
        **{**vars(setting), "threads_per_row": 8, "rows_per_block": 4, "vector_width": 4}
    )
    made = compiler.program(case, plan, setting, GPU)
    assert verdict(case, made).ok
    source = re.sub(r"< rows\)", "< rows - (rows % 4 == 3))", made.source)
    wrong = msgspec.structs.replace(made, source=source)
    assert verdict(case, wrong, more=False).ok
    found = verdict(case, wrong)
    assert re.search("normal inputs, (3|11) rows", found.message), found.message


# --- wherever kernels are checked


@pytest.fixture(autouse=True)
def folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The schedules of tests/faulty_gpu beside the shipped ones."""
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(FAULTY))
    schedule._load.cache_clear()
    yield
    schedule._load.cache_clear()


def forgetful(device: Device) -> Candidate:
    """A backward whose blocks, one to a multiprocessor, end after their first step."""
    setting = schedule.get("forgets").default(BACKWARD, device)
    changed = {"threads_per_row": 32, "rows_per_block": 1, "blocks_per_sm": 1}
    return Candidate.of("forgets", type(setting)(**{**vars(setting), **changed}))


@pytest.mark.slow
def test_trials_and_dry_runs_reject_it(fake_gpu: FakeGpu) -> None:
    """On a GPU, here an imagined one, the candidate is wrong before it is timed; a dry run, which
    has the emulator alone, says so too.
    """
    device = launcher.device(0)
    for job in (
        Try(BACKWARD, device, forgetful(device), 0.001),
        Check(BACKWARD, device, forgetful(device)),
    ):
        outcome = trial.run(job)
        assert (outcome.status, outcome.timings) == ("wrong", {})
        assert re.search(r"normal inputs, [1-9]\d\d rows", outcome.message), outcome.message


@pytest.mark.slow
def test_check_and_bench_reject_it(log_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lntune bench` and `lntune check` of what serves a case, which `lntune bringup` calls, find
    that it is wrong, also where no first check did; once found, the next choice serves.
    """
    device = msgspec.structs.replace(device_of("emulated:sm_90"), cores=GPU.cores)
    one, plan = forgetful(device), schedule.get("forgets")
    record = Record(
        role="final", case=BACKWARD, device=device, threads=1, schedule=one.schedule,
        code=plan.code, knobs=one.knobs, status="ok", busy=False,
        timings={"tuned": records.Timing((1.0,), 1.0), "eager": records.Timing((2.0,), 2.0)},
        time="2026-01-01T00:00:00.000+00:00",
    )  # fmt: skip
    records.append(log_dir, record)

    def measured() -> tuple[str, str]:
        (one,) = bench.run([BACKWARD], 0.01, with_compile=False, device=device).records
        return one.schedule, one.status

    with monkeypatch.context() as unchecked:
        unchecked.setenv("LNTUNE_CHECK", "0")
        assert measured() == ("forgets", "wrong")
    (result, *_) = check_cases([BACKWARD], device)
    assert (result.schedule, result.ok) == ("forgets", False)
    assert "normal inputs, 269 rows" in result.message
    assert measured() == ("shared_row_backward", "ok")


@pytest.mark.slow
def test_loaded_kernels_know_their_rows() -> None:
    """A kernel from the cache is checked with the same rows as one that was compiled just now."""
    device = device_of("emulated:sm_90")
    backend, plan = backends.of(device), schedule.get("shared_row_backward")
    setting = plan.default(BACKWARD, device)
    loaded = cache.kernel(BACKWARD, plan, setting, device)
    compiled = compiler.in_memory(BACKWARD, plan, setting, device)
    expected = backend.more_rows(BACKWARD, device, compiled)
    assert expected
    assert backend.more_rows(BACKWARD, device, loaded) == expected


def test_the_emulator_gets_fewer_multiprocessors_where_it_would_take_long() -> None:
    """A dry run checks thousands of blocks of many rows on fewer of them; the rest as they are."""
    case, plan = (
        Case("layer_norm_backward", 1024, "float32", 32768),
        schedule.get(KERNELS["one row a block"][0]),
    )
    default = plan.default(case, GPU)
    many = type(default)(**{**vars(default), "blocks_per_sm": 16})
    assert plan.valid(many, case, GPU) is None
    short = candidate_facts.to_emulate(case, plan, many, GPU)
    assert 1 <= short.device.cores < GPU.cores
    few = candidate_facts.to_emulate(BACKWARD, plan, plan.default(BACKWARD, GPU), GPU)
    assert few.device.cores == GPU.cores


# --- the check itself


def test_problems_of_many_rows_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is computed once for a case and a number of rows; the oldest makes room."""
    check.forget()
    case = msgspec.structs.replace(BACKWARD, variant="weight+dx+dgamma+dbeta")
    first = problems.of_rows(case, 40, "cpu")
    assert problems.of_rows(case, 40, "cpu") is first
    monkeypatch.setattr(problems, "KEPT_BYTES", int(2.5 * first.bytes))
    second = problems.of_rows(case, 41, "cpu")
    assert problems.of_rows(case, 40, "cpu") is first  # used last
    problems.of_rows(case, 42, "cpu")
    assert problems.of_rows(case, 40, "cpu") is first
    assert problems.of_rows(case, 41, "cpu") is not second
    assert first.bytes > 40 * 64 * (2 * 4 + 8)
    check.forget()
    assert problems.of_rows(case, 40, "cpu") is not first
    check.forget()


@pytest.mark.parametrize("op", ops.OPS)
def test_the_truth_is_computed_where_its_inputs_are(op: str) -> None:
    """A reference takes tensors of any device and makes none on another: on a GPU the truth of many
    rows is computed there.
    """
    for variant in ops.get(op).variants:
        case = Case(op, 8, "bfloat16", 3, variant)
        given = ops.get(op).inputs(case, 3, "normal", 0)
        moved = {n: v.to("meta") if hasattr(v, "to") else v for n, v in given.items()}
        truth = ops.get(op).reference(case, moved)
        assert {value.device.type for value in truth.values()} == {"meta"}
