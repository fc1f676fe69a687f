"""Building: the code each instruction set gets, the loops a schedule makes, and what goes wrong on
the way.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import product
from kernel_arguments import arguments, written

from lntune import device as device_module
from lntune.backends.cpu import runtime
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError, LntuneError, ScheduleError, ToolchainError
from lntune.kernels import compiler
from lntune.schedule import Schedule, all_schedules, get

PLANS = {name: s for name, s in all_schedules().items() if s.kind == "cpu" and not s.propose}
GOLDEN = Path(__file__).parent / "golden"
FIXED = Device("cpu", "golden", "x86-64-v3", 8)
# bfloat16 is widened and rounded, and every schedule takes it; 100 = three vectors of x86-64-v3 by
# four, and a tail.
CASE = Case("layer_norm", 100, "bfloat16", 512)


def shown(plan: Schedule, case: Case, device: Device, form: str) -> str:
    """The kernel of the default knobs as text."""
    case = for_op(case, plan)
    return compiler.show(case, plan, plan.default(case, device), device, form)


def for_op(case: Case, plan: Schedule) -> Case:
    """The case for the operator of a schedule."""
    return Case(plan.op, case.hidden, case.dtype, case.rows)


@pytest.mark.parametrize("name", PLANS)
def test_golden_loops(name: str) -> None:
    """The loops a schedule makes at its default knobs, for a fixed device, are those last approved
    of: a change of them must be meant. To approve, run with LNTUNE_UPDATE_GOLDEN=1 and look at the
    difference.
    """
    path = GOLDEN / f"{name}.txt"
    text = shown(PLANS[name], CASE, FIXED, "tir").rstrip() + "\n"
    if os.environ.get("LNTUNE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.is_file(), f"{path} is missing; write it with LNTUNE_UPDATE_GOLDEN=1"
    assert text == path.read_text(), (
        "the loops have changed; if that is meant, write them anew with LNTUNE_UPDATE_GOLDEN=1"
    )


@pytest.mark.parametrize("op", ["layer_norm_backward", "lnlstm_step_backward"])
def test_blocks_write_rows_that_lie_together(op: str) -> None:
    """On a CPU the rows of a block lie one behind the other, and the next block's begin where they
    end: where cores write rows next to each other, their prefetchers take lines away from one
    another.
    """
    from tvm import sym, tirx

    (plan,) = (s for s in PLANS.values() if s.op == op)
    case, device = Case(op, 256, "float32", 512), Device("cpu", "two", "x86-64-v3", 2)
    setting = plan.default(case, device)
    rows, loops, values = 37, [], []
    func = compiler.scheduled(case, plan, setting, device)["main"]
    count = func.params[0].shape[0]

    def walk(statement: Any) -> None:
        match type(statement).__name__:
            case "For":
                loops.append(statement)
                walk(statement.body)
                loops.pop()
            case "SeqStmt":
                for one in statement.seq:
                    walk(one)
            case "SBlockRealize":
                if statement.block.name_hint in ("dx", "dc"):
                    for block, turn in ((0, 0), (0, 1), (1, 0)):
                        known = sym.Analyzer()
                        known.bind(count, tirx.IntImm("int64", rows))
                        for loop in loops[2:]:
                            known.bind(loop.loop_var, tirx.IntImm("int64", 0))
                        known.bind(loops[0].loop_var, tirx.IntImm("int64", block))
                        known.bind(loops[1].loop_var, tirx.IntImm("int64", turn))
                        values.append(int(known.simplify(statement.iter_values[0])))
                walk(statement.block.body)

    walk(func.body)
    a_group = setting.together
    of_a_block = -(-rows // (2 * a_group)) * a_group
    assert values[:3] == [0, a_group, of_a_block]


def test_golden_files_belong_to_schedules() -> None:
    """No golden file with loops is left of a schedule that is gone."""
    assert {p.stem for p in GOLDEN.glob("*.txt") if "T.prim_func" in p.read_text()} == set(PLANS)


@pytest.mark.parametrize("name", PLANS)
def test_the_same_code_every_time(name: str) -> None:
    """A schedule is pure: applied twice it gives the same loops."""
    assert shown(PLANS[name], CASE, FIXED, "tir") == shown(PLANS[name], CASE, FIXED, "tir")


VECTORS = {
    "x86-64-v4": (r"%zmm\d", None),
    "x86-64-v3": (r"%ymm\d", r"%zmm\d"),
    "x86-64-v2": (r"%xmm\d", r"%[yz]mm\d"),
    "aarch64": (r"\bv\d+\.4s\b", r"%[xyz]mm\d"),
}
"""By instruction set: what its vectors' registers look like, and wider ones."""


@pytest.mark.parametrize(
    ("name", "dtype", "isa"), product(tuple(PLANS), ("bfloat16", "float32"), tuple(VECTORS))
)
def test_vectors_are_as_wide_as_the_machine(name: str, dtype: str, isa: str) -> None:
    """Every level of instruction set, another family's too, gets assembly with vectors of just its
    width, in arithmetic.
    """
    has, has_not = VECTORS[isa]
    device, case = Device("cpu", "other", isa, 4), Case(PLANS[name].op, 1024, dtype, 512)
    if PLANS[name].reason_invalid(PLANS[name].default(case, device), case, device):
        pytest.skip(f"{name} does not take {dtype}")
    text = shown(PLANS[name], case, device, "asm")
    arithmetic = "\n".join(
        line
        for line in text.splitlines()
        if re.search(r"(add|sub|mul)ps\b|fmadd|f(add|sub|mul|mla)\b", line)
    )
    assert re.search(has, arithmetic)
    assert has_not is None or not re.search(has_not, text)


@pytest.mark.parametrize("name", PLANS)
def test_arguments_are_not_taken_to_be_aligned(name: str) -> None:
    """No move of assembly demands an address that is a multiple of a vector for what a caller
    passes: in LLVM IR every access to an argument is aligned to no more than an element, or a pair
    of them, which no move of a vector demands.
    """
    case = Case(PLANS[name].op, 1024, "bfloat16", 512)
    text = shown(PLANS[name], case, FIXED, "source")
    globals_ = re.findall(r"(?:load|store) <\d+ x (?:i16|i32|bfloat|half)>.*?, align (\d+)", text)
    assert globals_
    assert {int(a) for a in globals_} <= {2, 4}


@pytest.mark.parametrize(("name", "form"), product(tuple(PLANS), compiler.FORMS))
def test_every_form_can_be_shown(name: str, form: str) -> None:
    """Definition, loops, LLVM IR and assembly are texts that look like what they are."""
    text = shown(PLANS[name], CASE, FIXED, form)
    assert {"te": "T.sblock", "tir": "T.sblock", "source": "target triple", "asm": ".text"}[
        form
    ] in text


def test_cores_and_rows_do_not_matter_to_the_code_of_given_knobs() -> None:
    """Kernels take any number of rows: with the same knobs the code for 512 rows is that for
    4096.
    """
    for plan in PLANS.values():
        setting = plan.default(Case(plan.op, 1024, "bfloat16", 512), FIXED)
        texts = {
            compiler.show(Case(plan.op, 1024, "bfloat16", rows), plan, setting, FIXED, "tir")
            for rows in (512, 4096)
        }
        assert len(texts) == 1


def changed(plan: Schedule, **fields: Any) -> Schedule:
    """The schedule with some of its functions replaced."""
    return dataclasses.replace(plan, **fields)


def test_knobs_that_do_not_fit() -> None:
    """Knobs refused by the schedule raise its reason, before the compiler is asked."""
    plan = changed(get("cached_rows"), valid=lambda *_: "the moon is full", apply=None)
    with pytest.raises(
        ScheduleError, match=r"cached_rows .* does not fit .*100 bfloat16: the moon is full"
    ):
        compiler.in_memory(CASE, plan, get("cached_rows").default(CASE, FIXED), FIXED)


def test_a_schedule_that_raises() -> None:
    """What a schedule raises becomes a ScheduleError with the schedule, the knobs, the case and the
    cause.
    """

    def apply(*_: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    plan = changed(get("cached_rows"), apply=apply)
    with pytest.raises(
        ScheduleError,
        match=r"cached_rows \(.*lanes=.*\) failed on .*ZeroDivisionError: division by zero",
    ) as raised:
        compiler.in_memory(CASE, plan, plan.default(CASE, FIXED), FIXED)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_schedule_that_returns_nonsense() -> None:
    """What TVM cannot compile is a BuildError."""
    plan = changed(get("cached_rows"), apply=lambda *_: "not a module")
    with pytest.raises(LntuneError, match="TVM failed to compile"):
        compiler.in_memory(CASE, plan, plan.default(CASE, FIXED), FIXED)


def test_a_library_on_disk(tmp_path: Path) -> None:
    """A kernel written as a library, loaded again, gives bitwise what the one in memory gives; no
    other file is left.
    """
    here = device_module.current()
    for plan in (PLANS["cached_rows"], PLANS["fused_step"]):
        path = tmp_path / plan.name / "kernel.so"
        case = Case(plan.op, 64, "bfloat16", 512)
        setting = plan.default(case, here)
        compiler.to_file(case, plan, setting, here, path)
        assert [p.name for p in path.parent.iterdir()] == ["kernel.so"]
        first, second = arguments(case, 5), arguments(case, 5)
        runtime.load(path)(*first.values())
        compiler.in_memory(case, plan, setting, here)(*second.values())
        for name, output in written(case, first).items():
            assert torch.equal(output, second[name]), name


def test_a_linker_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When linking fails the error says so, and neither the library nor a half of it is there."""
    linker = tmp_path / "c++"
    linker.write_text("#!/bin/sh\necho 'disk on fire' >&2\nexit 1\n")
    linker.chmod(0o755)
    monkeypatch.setenv("CXX", str(linker))
    plan, path = get("cached_rows"), tmp_path / "out" / "kernel.so"
    with pytest.raises(BuildError, match=r"linking a kernel(.|\n)*disk on fire"):
        compiler.to_file(CASE, plan, plan.default(CASE, FIXED), FIXED, path)
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A library that cannot be stored is a BuildError that names the remedy, found before anything
    is compiled.
    """
    (tmp_path / "file").write_text("in the way")
    plan = changed(get("cached_rows"), apply=None)
    with pytest.raises(BuildError, match="LNTUNE_CACHE_DIR"):
        compiler.to_file(
            CASE, plan, plan.default(CASE, FIXED), FIXED, tmp_path / "file" / "kernel.so"
        )


def test_a_missing_compiler_is_reported_before_compiling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a linker nothing is compiled first."""
    monkeypatch.setenv("CXX", "/no/such/compiler")
    plan = changed(get("cached_rows"), apply=None)
    with pytest.raises(ToolchainError):
        compiler.to_file(CASE, plan, plan.default(CASE, FIXED), FIXED, tmp_path / "kernel.so")
