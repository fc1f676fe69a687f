"""What is known of a GPU candidate before it is measured, and the order that follows from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lntune import schedule
from lntune.backends import cuda, device_of
from lntune.backends.cuda import device_code
from lntune.backends.cuda.device_code import Launch, Program
from lntune.case import Case
from lntune.commands import inspect as inspection
from lntune.errors import InputError
from lntune.kernels import cache, candidate_facts
from lntune.kernels.candidate_facts import facts, moved, shortened
from lntune.measure import trial
from lntune.measure.jobs import Build, Candidate
from lntune.system import sealed
from lntune.tune import ranking

DEVICE = device_of("cuda:sm_90")
CASE = Case("layer_norm", 1024, "float32", 4096)
PLAN = schedule.get("shared_row")
needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"needs a CUDA compiler: {cuda.available()}"
)

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) main_kernel(const float* x, float* y) {
  float held[200];
  for (int i = 0; i < 200; ++i) held[i] = x[i * 1024 + threadIdx.x];
  for (int i = 0; i < 200; ++i)
    y[i * 1024 + threadIdx.x] = held[i] * held[(i * 7 + (int)held[0]) % 200];
}
"""


def knobs(**changed: Any) -> Any:
    """The default knobs for CASE, changed."""
    return dataclasses.replace(PLAN.default(CASE, DEVICE), **changed)


@needs_compiler
def test_the_facts_of_a_good_candidate() -> None:
    """The default knobs: registers, occupancy and accesses of 16 bytes as `lntune inspect` has
    them, blocks for the case's rows, no problems.
    """
    details = facts(CASE, PLAN, knobs(), DEVICE)
    (kernel,), (part,) = details.kernels, details.parts
    closer = inspection.inspect_case(CASE, PLAN, knobs(), DEVICE).kernels[0]
    assert kernel.resources == closer.resources
    assert kernel.occupancy == closer.occupancy
    assert set(kernel.code.global_loads) == {128}
    assert part.blocks * knobs().rows_per_block == CASE.rows
    assert details.problems == ()
    assert 0 < ranking.score(details, CASE, DEVICE) <= 1
    # an addition for each of two sums, a subtraction, and a product with the weight at least
    assert 4 < details.instructions(CASE) < 40
    few = msgspec.structs.replace(CASE, rows=1024)
    assert facts(few, PLAN, knobs(), DEVICE).instructions(few) == details.instructions(CASE)


@needs_compiler
def test_a_candidate_is_lowered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that builds a candidate lowers it once, for its facts and for the stored file, and the
    file is the one that is stored where nothing was lowered before.
    """
    generate, lowered = device_code.generate, []

    def counting(*arguments: Any) -> Program:
        lowered.append(1)
        return generate(*arguments)

    contents = []
    monkeypatch.setattr(device_code, "generate", counting)
    for name, build in (
        ("job", lambda: trial.run(Build(CASE, DEVICE, Candidate.of(PLAN.name, knobs())))),
        ("prepare", lambda: cache.prepare(CASE, PLAN, knobs(), DEVICE)),
    ):
        lowered.clear()
        monkeypatch.setenv("LNTUNE_CACHE_DIR", str(tmp_path / name))
        build()
        assert len(lowered) == 1
        contents.append(sealed.read(cache.path_of(CASE, PLAN, knobs(), DEVICE)).content)
    assert contents[0] == contents[1]


@needs_compiler
def test_spills_and_stack_are_problems() -> None:
    """A kernel whose array does not fit its registers is not worth measuring."""
    program = Program(SPILLING, (Launch("main_kernel", ("x", "y"), ("1", "1", "1"), (1024, 1, 1)),))
    assert any("stack frame" in p for p in facts(CASE, PLAN, knobs(), DEVICE, program).problems)


@needs_compiler
def test_zero_occupancy_is_a_problem() -> None:
    """A block that no multiprocessor has room for is not worth measuring, and ranks at nothing."""
    source = 'extern "C" __global__ void main_kernel(float* y) { y[threadIdx.x] = 0; }'
    details = facts(
        CASE,
        PLAN,
        knobs(),
        DEVICE,
        Program(source, (Launch("main_kernel", ("y",), ("1", "1", "1"), (32, 1, 1), 300_000),)),
    )
    assert any("zero occupancy" in p for p in details.problems)
    assert ranking.score(details, CASE, DEVICE) == 0


def test_reading_again_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is read for each of its three uses is found out, once for all candidates that do
    so.
    """
    assert moved(CASE, PLAN, knobs(), DEVICE) == ()
    assert moved(CASE, PLAN, knobs(row_storage="reload"), DEVICE) == ("reads x 3 times",)
    monkeypatch.setattr(candidate_facts, "_emulated", lambda *_: pytest.fail("asked again"))
    assert moved(CASE, PLAN, knobs(row_storage="reload", threads_per_row=64), DEVICE) == (
        "reads x 3 times",
    )
    assert moved(
        msgspec.structs.replace(CASE, hidden=4096), PLAN, knobs(row_storage="reload"), DEVICE
    ) == ("reads x 3 times",)


@needs_compiler
def test_what_the_default_does_is_no_problem() -> None:
    """Rows that nothing holds are read again by the default knobs, so that is not held against
    other candidates of such rows.
    """
    long = Case("layer_norm", 65536, "float32", 4096)
    default = PLAN.default(long, DEVICE)
    assert default.row_storage == "reload"
    for other in (
        default,
        dataclasses.replace(default, rolled=False),
        dataclasses.replace(default, rolled=False, threads_per_row=256),
    ):
        assert not any("times" in p for p in facts(long, PLAN, other, DEVICE).problems)
    assert "reads x 3 times" in facts(CASE, PLAN, knobs(row_storage="reload"), DEVICE).problems


def test_a_candidate_that_cannot_be_run_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the emulator refuses is left to the verification, and asked again next time."""
    asked = []

    def fails(*_: Any) -> Any:
        asked.append(1)
        raise InputError("no")

    monkeypatch.setattr(candidate_facts, "_emulated", fails)
    case = msgspec.structs.replace(CASE, dtype="float16")
    assert moved(case, PLAN, knobs(), DEVICE) == moved(case, PLAN, knobs(), DEVICE) == ()
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("hidden", "changed", "short"),
    [
        (1024, {}, 1024),
        (16384, {}, 1024),
        (16385, {"vector_width": 1}, 1025),
        (5003, {"vector_width": 1}, 1931),
        (12288, {"threads_per_row": 1024, "vector_width": 2}, 2048),
    ],
)
def test_a_short_row_for_the_emulator(hidden: int, changed: dict[str, Any], short: int) -> None:
    """The shortest row that the knobs fit, as ragged as the case's own; the case itself where there
    is none.
    """
    case = msgspec.structs.replace(CASE, hidden=hidden)
    short_case = shortened(case, PLAN, knobs(**changed), DEVICE)
    assert short_case == msgspec.structs.replace(case, hidden=short)
    assert PLAN.reason_invalid(knobs(**changed), short_case, DEVICE) is None
    assert (short_case.hidden - hidden) % 1024 == 0
