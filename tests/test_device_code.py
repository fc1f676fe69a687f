"""CUDA source of scheduled kernels: what is launched, and that each deviation from TVM's pipeline
is needed.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import msgspec
import pytest
from grids import exhaustive
from kernel_arguments import arguments
from typer.testing import CliRunner

from lntune import check, schedule
from lntune.backends import cuda, device_of
from lntune.backends.cuda import device_code, lowering, model
from lntune.backends.cuda.device_code import Launch, Program
from lntune.backends.cuda.program import target as target_of
from lntune.backends.cuda.sizes import number
from lntune.backends.cuda.targets import PRODUCTS, names
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import EmulatorError
from lntune.case import Case
from lntune.cli import app
from lntune.commands import inspect as inspection
from lntune.errors import BuildError, UnknownNameError
from lntune.kernels import compiler
from lntune.report import inspections
from lntune.schedule import get

GPU = device_of("cuda:sm_90")
WIDE = Case("layer_norm", 4096, "float32", 512)
"""Its default knobs share a row among several warps."""

needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}"
)


def scheduled(case: Case = WIDE, **changed: Any) -> Any:
    """The module of the first GPU schedule's default knobs, or others."""
    plan = get("shared_row")
    setting = plan.default(case, GPU)
    return plan.apply(case, type(setting)(**{**vars(setting), **changed}), GPU)


def stock(module: Any) -> Program:
    """The same by TVM's default pipeline, launched the same way."""
    import tvm

    ours = device_code.generate(module, target_of(GPU))
    target = tvm.target.Target(target_of(GPU))
    with target:
        source = tvm.compile(module, target=target).mod.imports[0].inspect_source("cuda")
    return Program(str(source), ours.launches)


def test_a_launch_says_arguments_and_sizes() -> None:
    """Arguments by the operator's names, the grid as an expression in rows, the block as numbers,
    dynamic shared memory in bytes.
    """
    (launch,) = device_code.generate(
        scheduled(threads_per_row=256, rows_per_block=2), target_of(GPU)
    ).launches
    assert set(launch.arguments) >= {"x", "weight", "bias", "y", "eps"}
    assert launch.block == (256, 2, 1)
    assert launch.threads == 512
    assert launch.blocks(7) == (4, 1, 1)
    assert launch.shared == 0
    (launch,) = device_code.generate(
        scheduled(threads_per_row=256, row_storage="shared"), target_of(GPU)
    ).launches
    assert launch.shared == WIDE.hidden * 4
    assert launch.blocks(7) == (7, 1, 1)


def test_numbers_are_arithmetic_only() -> None:
    """A launch's expression knows `rows` and nothing else, not even Python's own functions."""
    assert number("((rows + 3) // 4)", 9) == 3
    with pytest.raises(NameError):
        number("len('x')", 1)


def test_an_empty_batch_has_an_empty_grid() -> None:
    """No rows, no blocks; nothing is to be launched."""
    assert Launch("k", (), ("((rows + 3) // 4)", "1", "1"), (32, 4, 1)).blocks(0) == (0, 1, 1)


def test_storage_must_not_be_rewritten() -> None:
    """TVM's default pipeline lets all threads update one shared cell: the emulator sees the race,
    or float64 the wrong result.
    """
    module = scheduled()
    good = check.verify(
        WIDE, emulated.kernel(WIDE, device_code.generate(module, target_of(GPU))), check.ALIGNED
    )
    assert good.ok, good.message
    try:
        verdict = check.verify(WIDE, emulated.kernel(WIDE, stock(module)), check.ALIGNED)
    except EmulatorError as e:
        assert "mean" in str(e) or "shared" in str(e)
    else:
        assert not verdict.ok


@needs_compiler
def test_expressions_must_be_simplified_early() -> None:
    """By TVM's default pipeline a thread's part of the row lies in a stack frame; by ours in
    registers.
    """
    case = Case("layer_norm", 1000, "float16", 512)
    module = scheduled(case)
    frames = {}
    for name, program in (
        ("ours", device_code.generate(module, target_of(GPU))),
        ("stock", stock(module)),
    ):
        (launch,) = program.launches
        frames[name] = cuda.inspect_kernel(
            program.source, "sm_90", launch.threads
        ).resources.stack_bytes
    assert frames["ours"] == 0
    assert frames["stock"] > 0


def backward(hidden: int, dtype: str, **changed: Any) -> Program:
    """Layer norm backward of default knobs, or others: a program of several kernels."""
    plan, case = get("shared_row_backward"), Case("layer_norm_backward", hidden, dtype, 32)
    setting = plan.default(case, GPU)
    return compiler.program(case, plan, type(setting)(**{**vars(setting), **changed}), GPU)


def test_a_program_of_two_kernels_has_scratch() -> None:
    """What one kernel leaves for the next is named by both, has a size and a dtype, and is no
    argument of the operator's.
    """
    program = backward(1000, "float16", threads_per_row=128, rows_per_block=1)
    first, second = program.launches
    assert len(program.scratch) == 2  # partial sums of dgamma and of dbeta
    for between in program.scratch:
        assert between.name in first.arguments
        assert between.name in second.arguments
        assert between.dtype == "float32"
        assert between.sizes(5) == between.sizes(5000) == (int(first.grid[0]) * 1000,)
    assert set(second.arguments) == {"dgamma", "dbeta", *(s.name for s in program.scratch)}


def test_scratch_is_poisoned() -> None:
    """In the emulator a kernel that reads what no other has written gets NaN."""
    case = Case("layer_norm_backward", 64, "float32", 32)
    program = backward(64, "float32")
    values = arguments(case, 3, output=0.0)
    alone = Program(program.source, program.launches[1:], program.scratch)
    emulated.kernel(case, alone)(*values.values())
    assert values["dgamma"].isnan().all()
    assert values["dbeta"].isnan().all()


def test_sums_of_several_values_must_have_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside dynamic shared memory TVM refuses names for what is loaded, which its reductions of
    several values give.
    """
    assert (
        max(
            launch.shared
            for launch in backward(
                1000, "float32", threads_per_row=128, rows_per_block=1, row_storage="shared"
            ).launches
        )
        >= 2 * 1000 * 4
    )
    monkeypatch.setattr(lowering, "without_bindings", lambda body: body)
    with pytest.raises(BuildError, match="Load memory in places other than store"):
        backward(1000, "float32", threads_per_row=128, rows_per_block=1, row_storage="shared")


@needs_compiler
def test_guarded_stores_must_be_written_as_such() -> None:
    """Behind the question whether a row is there nvcc cuts stores of 16 bytes into elements, unless
    they say that they are stores.
    """
    program = backward(256, "float32", threads_per_row=32, rows_per_block=4)
    plain = re.sub(r"__stwb\(\((\w+)\*\)\((.*)\), (.*)\);", r"*(\1*)(\2) = \3;", program.source)
    launch = program.launches[0]
    narrow = [
        cuda.inspect_kernel(
            source, "sm_90", launch.threads, launch.shared, launch.kernel
        ).code.global_stores.get(32, 0)
        for source in (program.source, plain)
    ]
    assert narrow[0] == 0
    assert narrow[1] > 0


@needs_compiler
def test_the_weight_is_not_kept_in_registers() -> None:
    """What is said to be loaded again leaves registers to others."""
    program = backward(8192, "bfloat16", threads_per_row=512, rows_per_block=1)
    launch = program.launches[0]
    assert "lntune_reload(weight_ptr);" in program.source
    kept = program.source.replace("lntune_reload(weight_ptr);", "")
    used = [
        cuda.inspect_kernel(source, "sm_90", launch.threads, 0, launch.kernel).resources
        for source in (program.source, kept)
    ]
    assert (
        used[0].registers + used[0].spill_store_bytes
        < used[1].registers + used[1].spill_store_bytes
    )


def test_what_does_not_compile_is_a_build_error() -> None:
    """A module that is no GPU kernel is refused as such."""
    plan = get("cached_rows")
    from lntune import device

    here = device.current()
    module = plan.apply(WIDE, plan.default(WIDE, here), here)
    with pytest.raises(BuildError, match="leaves to the host"):
        device_code.generate(module, target_of(GPU))


def test_a_stage_that_is_left_to_the_host_is_a_build_error() -> None:
    """Launches alone would leave what such a stage should have written as it was; TVM compiles it
    without a word.
    """
    from tvm import s_tir, te

    rows = te.var("rows", "int64")
    x = te.placeholder((rows, 64), "float32", name="x")
    twice = te.compute((rows, 64), lambda i, k: x[i, k] * 2.0, name="twice")
    sch = s_tir.Schedule(
        te.create_prim_func([x, te.compute((rows, 64), lambda i, k: twice[i, k] + 1.0, name="y")])
    )
    i, k = sch.get_loops(sch.get_sblock("y"))
    sch.bind(i, "blockIdx.x")
    sch.bind(k, "threadIdx.x")
    with pytest.raises(BuildError, match=r"leaves to the host.*twice"):
        device_code.generate(sch.mod, target_of(GPU))
    sch.compute_inline("twice")
    assert len(device_code.generate(sch.mod, target_of(GPU)).launches) == 1


@pytest.mark.parametrize("name", ["cpu", *(name for name in names() if name != "cuda")])
def test_every_target_is_a_device(name: str) -> None:
    """Each name that --target takes on any machine stands for a device with an architecture and
    memory sizes.
    """
    device = device_of(name)
    assert device.kind == ("cpu" if name == "cpu" else "gpu")
    assert device.kind == "cpu" or (
        device.isa.startswith("sm_") and device.cores and device.shared_memory and device.l2
    )
    assert name not in PRODUCTS or device.name == PRODUCTS[name][0]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("cuda:", "cuda:sm_75"),
        ("cuda:sm_1", "cuda:sm_100"),
        ("sm_90", "cuda:sm_90"),
        ("nvidia/nvidia-h1000", "nvidia/nvidia-h100"),
        ("H100", "nvidia/nvidia-h100"),
        ("gpu", "cuda"),
        ("cpuu", "cpu"),
        ("there", None),
    ],
)
def test_an_unknown_target_is_refused(name: str, near: str | None) -> None:
    """What was meant is named, a GPU for "gpu" and not what is spelled nearly so, and what targets
    there are, in words.
    """
    with pytest.raises(UnknownNameError, match=f"unknown target '{name}'") as error:
        device_of(name)
    assert ("Did you mean" in str(error.value)) == (near is not None)
    assert near is None or f"Did you mean '{near}'?" in str(error.value)
    for words in (
        "cpu (this machine's)",
        "cuda or cuda:1 (a GPU that is here)",
        "emulated:sm_75 to",
    ):
        assert words in str(error.value)


@needs_compiler
@pytest.mark.parametrize("strided", [False, exhaustive(True)], ids=["contiguous", "strided"])
def test_inspect_tells_what_is_known_without_a_gpu(strided: bool) -> None:
    """`lntune inspect` gives registers, spills, bytes; default knobs move nothing twice, spill
    nothing, and end with exit code 0. So do the kernels for row-strided views.
    """
    wanted = [
        "--hidden",
        "1024,12288",
        "--dtype",
        "bfloat16",
        "--target",
        "cuda:sm_80",
        *(["--strided"] if strided else []),
    ]
    done = CliRunner().invoke(app, ["inspect", "layer_norm", *wanted, "--json"])
    assert done.exit_code == 0, done.output
    for one in json.loads(done.stdout):
        assert one["strided"] == strided
        (kernel,) = one["kernels"]
        assert kernel["resources"]["registers"] > 0
        assert kernel["resources"]["stack_bytes"] == kernel["resources"]["spill_store_bytes"] == 0
        assert one["read"] == {"x": 1.0}
        assert one["written"] == {"y": 1.0}
        assert one["extra"] < 0.05
        assert one["problems"] == []


@needs_compiler
def test_inspect_takes_knobs() -> None:
    """Knobs that are named replace the default ones, for every case that is inspected."""
    arguments = ["inspect", "layer_norm", "--hidden", "1000,1024", "--dtype", "float32"]
    given = ["--knob", "threads_per_row=64", "--knob", "prefetch"]
    done = CliRunner().invoke(app, [*arguments, *given, "--json"])
    assert done.exit_code == 0, done.output
    for one in json.loads(done.stdout):
        assert (one["knobs"]["threads_per_row"], one["knobs"]["prefetch"]) == (64, True)
        assert one["kernels"][0]["threads"] == 64


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("threads_per_row=1024", "knobs that fit layer_norm 4096x64 float32 weight+bias on sm_90"),
        ("threads_per_row=33", "expected threads_per_row=VALUE with one of 8, 16, 32"),
        ("thread_per_row=32", "Did you mean 'threads_per_row'"),
    ],
)
def test_inspect_refuses_knobs_that_do_not_fit(word: str, said: str) -> None:
    """With exit code 2, and what there is instead."""
    arguments = ["inspect", "layer_norm", "--hidden", "64", "--dtype", "float32", "--knob", word]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())


def test_inspect_refuses_vectors_that_strided_rows_cannot_have() -> None:
    """Row-strided views of an odd size are served element by element; who asks for the kernel of
    wide vectors is told, and not shown another one.
    """
    arguments = ["--hidden", "1003", "--dtype", "bfloat16", "--strided", "--knob", "vector_width=8"]
    done = CliRunner().invoke(app, ["inspect", "layer_norm", *arguments])
    assert done.exit_code == 2
    said = " ".join(done.output.split())
    assert "got vector_width=8, expected knobs that fit layer_norm 4096x1003 bfloat16" in said
    assert "vectors of row-strided views divide a row" in said


@needs_compiler
def test_inspect_names_the_kernels_of_a_program() -> None:
    """Each by what it writes; they are counted, the column of spills says what the closing line
    does, and 80 columns have room for the knobs and the model.
    """
    case = Case("layer_norm_backward", 64, "float32", 512)
    plan = get("shared_row_backward")
    found = inspection.inspect_case(case, plan, plan.default(case, GPU), GPU)
    assert [work.writes for work in found.work] == [("dx",), ("dgamma", "dbeta")]
    table = inspections.table([found])
    at = [column.name for column in table.columns].index
    assert [row[at("writes")].plain for row in table.rows] == ["dx", "dgamma, dbeta"]
    assert inspections.lines([found])[-1].startswith("2 kernels, no problems")
    narrow = "\n".join(line.plain for line in table.lines(80))
    assert "threads_per_row=" in narrow
    assert model.NOTE in narrow.split("not shown")[0]
    changed = {"threads_per_row": 32, "rows_per_block": 1, "partial_sums": "separate_kernel"}
    own_kernel = dataclasses.replace(plan.default(case, GPU), **changed)
    (sums, *_) = inspection.inspect_case(case, plan, own_kernel, GPU).work
    assert sums.writes == ()
    first, second = found.kernels
    spilling = msgspec.structs.replace(first.resources, spill_store_bytes=8, spill_load_bytes=12)
    first = msgspec.structs.replace(first, resources=spilling)
    bad = msgspec.structs.replace(found, kernels=(first, second))
    assert inspections.table([bad]).rows[0][at("spill")].plain == "12"
    assert inspections.lines([bad])[-1].endswith("spills 12 bytes")


@needs_compiler
def test_inspect_tells_what_kernels_leave_for_each_other() -> None:
    """Partial sums between two kernels are told apart from the matrices, which are moved once."""
    done = CliRunner().invoke(
        app,
        [
            "inspect",
            "layer_norm_backward",
            "--hidden",
            "1024",
            "--dtype",
            "float32",
            "--rows",
            "512",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    (one,) = json.loads(done.stdout)
    assert len(one["kernels"]) == 2
    assert (one["read"], one["written"]) == ({"dy": 1.0, "x": 1.0}, {"dx": 1.0})
    assert one["extra"] < 0.05
    assert one["between"] > 0
    assert one["problems"] == []


@needs_compiler
@pytest.mark.parametrize(
    ("sums", "times"), [("registers", 1), ("global", inspection.ROWS_PER_BLOCK)]
)
def test_inspect_shows_what_sums_over_rows_cost(sums: str, times: int) -> None:
    """Sums that a block adds to once are moved once, those that it adds to at each row as often
    as it has rows.
    """
    plan, case = (
        get("gated_row_backward"),
        Case("lnlstm_step_backward", 64, "float32", 4096, "bias+bias_c"),
    )
    setting = dataclasses.replace(plan.default(case, GPU), partial_sums=sums)
    inspected = inspection.inspect_case(case, plan, setting, GPU)
    assert inspected.read["dweight_h"] == inspected.written["dweight_h"] == times
    assert inspected.read["gates_h"] == inspected.written["dgates_h"] == 1
    assert (inspected.extra > 0.05) == (times > 1)


@needs_compiler
@pytest.mark.parametrize(
    ("hidden", "variant", "times"),
    [exhaustive((32768, "weight+dx+dgamma+dbeta", 3)), (64, "dbeta", 1)],
)
def test_inspect_counts_rows_and_not_blocks_without_any(
    hidden: int, variant: str, times: int
) -> None:
    """A kernel of sums alone has more blocks than the few rows that are run; what those without a
    row repeat is not held against it. The long rows are read twice by the kernel of dx and once by
    that of the sums.
    """
    plan, case = (
        get("shared_row_backward"),
        Case("layer_norm_backward", hidden, "float32", 4096, variant),
    )
    inspected = inspection.inspect_case(case, plan, plan.default(case, GPU), GPU)
    assert inspected.read["dy"] == times
    assert bool(inspected.problems) == (times > 1)


def test_inspect_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has a row for each kernel, and what is wrong ends with exit code 1."""
    bad = inspection.Inspected(
        WIDE, "sm_90", "shared_row", {"threads_per_row": 8}, (), {"x": 2.0}, {"y": 1.0}, 0.5
    )
    monkeypatch.setattr(inspection, "inspect_case", lambda *_: bad)
    done = CliRunner().invoke(
        app, ["inspect", "layer_norm", "--hidden", "4096", "--dtype", "float32"]
    )
    assert done.exit_code == 1
    assert "reads x 2 times" in done.output


@pytest.mark.parametrize(
    "arguments", [["--target", "cpu"], ["--target", "cuda:sm_1"], ["--schedule", "cached_rows"]]
)
def test_inspect_refuses_what_is_no_gpu(arguments: list[str]) -> None:
    """A CPU, an unknown architecture and a CPU's schedule are refused with exit code 2."""
    assert (
        CliRunner()
        .invoke(app, ["inspect", "layer_norm", "--hidden", "64", "--dtype", "float32", *arguments])
        .exit_code
        == 2
    )


def test_operators_without_a_schedule_for_gpus_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names those that have one."""
    for_op = schedule.for_op
    monkeypatch.setattr(
        schedule, "for_op", lambda op, kind: {} if op == "lnlstm_step" else for_op(op, kind)
    )
    done = CliRunner().invoke(app, ["inspect", "lnlstm_step"])
    assert done.exit_code == 2
    assert "layer_norm" in done.output


def test_source_for_a_gpu_is_shown() -> None:
    """`show` gives the CUDA source of a GPU's kernel, of which what stands before the kernel can be
    left out.
    """
    plan = get("shared_row")
    text = compiler.show(WIDE, plan, plan.default(WIDE, GPU), GPU, "source")
    assert 'extern "C" __global__' in text
    note, empty, kernel = compiler.without_prelude(text).split("\n", 2)
    assert kernel.startswith('extern "C" __global__') and not empty
    prelude = text.removesuffix(kernel)
    assert len(prelude) + len(kernel) == len(text) and "__global__" not in prelude
    assert note.startswith(f"// {len(prelude.splitlines())} lines ") and "--full" in note
    assert compiler.without_prelude("define void @main()") == "define void @main()"
