"""What GPU schedules of the LN-LSTM step do to definitions: CUDA's own activations, row loops
that end with the rows, sums added to.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import torch
from grids import exhaustive, product, thinned
from kernel_arguments import arguments, inputs, row_slice

from lntune import ops
from lntune.backends import cuda, device_of
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated.emulator import Traffic
from lntune.case import Case
from lntune.kernels import compiler
from lntune.schedule import get
from lntune.transforms.gpu import cuda_math, gates, grid_stride

GPU = device_of("cuda:sm_90")
FORWARD, BACKWARD = (
    Case("lnlstm_step", 96, "float32", 512),
    Case("lnlstm_step_backward", 96, "float32", 8),
)
PLANS = {"lnlstm_step": "gated_row", "lnlstm_step_backward": "gated_row_backward"}

needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}"
)


def program(case: Case, **changed: Any) -> Program:
    """The case's program with its default knobs, or others."""
    plan = get(PLANS[case.op])
    setting = plan.default(case, GPU)
    return compiler.program(case, plan, type(setting)(**{**vars(setting), **changed}), GPU)


@pytest.mark.parametrize("case", [FORWARD, BACKWARD], ids=lambda case: case.op)
def test_activations_are_the_devices_own(case: Case) -> None:
    """No polynomial of the CPU's is left, nor an exponential that is only fast: expf, tanhf, and a
    division of two units' error.
    """
    source = program(case).source
    called = set(re.findall(r"\b(\w*exp\w*f|\w*tanh\w*f|__fdividef)\(", source))
    assert called == {"expf", "tanhf", "__fdividef"}
    assert "__float_as" not in source
    assert "reinterpret" not in source


def test_only_activations_are_replaced() -> None:
    """Every sigmoid and tanh of the definition is found, and no other quotient: those of the rows'
    moments stay divisions.
    """
    definition = ops.get(FORWARD.op).define(FORWARD, gates.row_sum(FORWARD.hidden))
    text = str(cuda_math.with_cuda_functions(definition).script())
    assert len(re.findall(r'"expf"', text)) == 3
    assert len(re.findall(r'"tanhf"', text)) == 2
    assert (
        len(re.findall(r" / T\.float32\((?:384|96)", text))
        == len(re.findall(r" / T\.float32\((?:384|96)", str(definition.script())))
        == 6
    )


def test_rows_beyond_the_last_are_not_asked_about() -> None:
    """A block's loop ends with its rows, so nothing in it depends on the number of rows: no guard,
    no row read again. Behind it a block asks once whether it had any.
    """
    source = program(BACKWARD).source
    loops = re.findall(r"for \(int64_t \w+ = \(int64_t\)0; \w+ < (.*?); \+\+\w+\)", source)
    assert [loop for loop in loops if "rows" in loop] == [
        "((((rows + (int64_t)14) - ((int64_t)blockIdx.x)) / (int64_t)15)"
        " + ((((rows + (int64_t)14) - ((int64_t)blockIdx.x)) % (int64_t)15) >> (int64_t)63))"
    ]
    body = source.rsplit("main_kernel(", 1)[1].split("{", 1)[1].replace(loops[0], "")
    assert [line.strip() for line in body.splitlines() if "rows" in line and "for" not in line] == [
        "if (((int64_t)blockIdx.x) < rows) {"
    ]


@pytest.mark.parametrize("where", ["registers", "shared", "global"])
def test_sums_are_added_to(where: str) -> None:
    """Every block adds the gradients of its own rows b, b + 15, ... to its row of the sums; where
    it has none, it does not even read that.
    """
    op, blocks = ops.get(BACKWARD.op), BACKWARD.blocks(GPU)
    seen: list[Traffic] = []
    kernel = emulated.kernel(BACKWARD, program(BACKWARD, partial_sums=where), seen=seen)
    sums = [a.name for a in op.arguments(BACKWARD) if a.role == "sum"]
    for rows in (1, 7, 15, 16, 40):
        given = inputs(BACKWARD, rows)
        values = arguments(BACKWARD, rows, given, device=GPU, total=2.0)
        kernel(*values.values())
        for name in sums:
            read = -(-rows // blocks) if where == "global" else 1
            assert seen[-1][name].loaded <= read * min(rows, blocks) * values[name][0].nbytes
        for block in range(blocks):
            truth = op.reference(BACKWARD, row_slice(BACKWARD, given, slice(block, None, blocks)))
            for name in sums:
                total = values[name][block]
                if block < rows:
                    assert torch.allclose(total.double(), truth[name] + 2, atol=1e-5), name
                else:
                    assert bool((total == 2).all()), name


def test_a_store_that_is_not_there_is_an_error() -> None:
    """A name that fits no store of sums is refused, rather than sums being overwritten."""
    import tvm

    definition = ops.get(FORWARD.op).define(FORWARD, gates.row_sum(FORWARD.hidden))
    with pytest.raises(RuntimeError, match="nothing_of_the_sort"):
        grid_stride.add_to_outputs(tvm.IRModule({"main": definition}), ["nothing_of_the_sort"])


@pytest.mark.parametrize(
    ("hidden", "dtype"),
    thinned([(31, "float32"), (1000, "bfloat16"), (5003, "float16"), (6000, "float32")]),
)
@pytest.mark.parametrize("op", PLANS)
def test_a_thread_has_room_for_its_part_alone(op: str, hidden: int, dtype: str) -> None:
    """No array of a thread is longer than what it holds of a row of gates, also where some
    threads have no last vector: TVM gives room for all of a row where it does not see which part an
    index is in.
    """
    case = Case(op, hidden, dtype, 8)
    setting = get(PLANS[op]).default(case, GPU)
    part = 4 * setting.vector_width * -(-hidden // (setting.vector_width * setting.threads_per_row))
    arrays = re.findall(
        r"^\s*alignas\(\d+\) \w+ (\w+)\[(\d+)\];", program(case).source, re.MULTILINE
    )
    assert arrays
    assert {name: int(size) for name, size in arrays if int(size) > part} == {}


@needs_compiler
@pytest.mark.parametrize("variant", ["raw+bias+bias_c", exhaustive("bias+bias_c")])
@pytest.mark.parametrize(("op", "dtype"), product(tuple(PLANS), ("bfloat16", "float32")))
def test_nothing_spills_with_default_knobs(op: str, dtype: str, variant: str) -> None:
    """At 1024 elements a thread's part of a row, and of the sums, stays in registers."""
    compiled = program(Case(op, 1024, dtype, 512, variant))
    (launch,) = compiled.launches
    assert not cuda.inspect_kernel(compiled.source, GPU.isa, launch.threads).problems


def guarded(source: str) -> list[str]:
    """What is done only by threads that have one of a row's last vectors, one statement each."""
    return re.findall(
        r"if \([^{]*threadIdx\.x[^{]*< \(int64_t\)\d+\) \{\n((?:[^{}]|\{[^{}]*\})*?)\n\s*\}", source
    )


@pytest.mark.parametrize("case", [FORWARD, BACKWARD], ids=lambda case: case.op)
def test_only_memory_and_sums_ask_who_has_a_part(case: Case) -> None:
    """Of a ragged row what is computed in registers is computed by all threads; loads, stores and a
    thread's part of sums ask, those of two sums at a time.
    """
    asked = [
        one
        for one in guarded(program(msgspec.structs.replace(case, hidden=100)).source)
        if one.count(" = ") == 1
    ]
    assert asked
    for statement in asked:
        target, _, value = statement.strip().partition(" = ")
        assert "_local" not in target or "in_thread" in target or "_local" not in value, statement


@pytest.mark.parametrize(
    ("sums", "stages"),
    [exhaustive(("shared", "registers")), ("shared", "shared"), ("global", "recompute")],
)
def test_shared_memory_of_its_own_costs_a_thread_no_barriers(sums: str, stages: str) -> None:
    """There are as many barriers as without it, those of the two sums of a row; and the compiler
    knows that a block is alone.
    """
    plain = program(BACKWARD, threads_per_row=64, vector_width=1)
    keep = "reload" if stages == "recompute" else "registers"
    compiled = program(
        BACKWARD,
        threads_per_row=64,
        vector_width=1,
        partial_sums=sums,
        intermediates=stages,
        prefetch=False,
        row_storage=keep,
    )
    assert compiled.launches[0].shared > 0
    assert compiled.source.count("__syncthreads()") == plain.source.count("__syncthreads()") > 0
    assert "__launch_bounds__(64, 1)" in compiled.source
    assert "__launch_bounds__(64)" in plain.source


@pytest.mark.parametrize("case", [FORWARD, BACKWARD], ids=lambda case: case.op)
def test_a_row_computed_again_takes_the_registers_of_a_vector(case: Case) -> None:
    """Where stages are computed again, a thread's arrays are as long for a row of many vectors as
    for one of few, and the code is, too.
    """
    changed = {
        "threads_per_row": 32,
        "vector_width": 4,
        "row_storage": "reload",
        "intermediates": "recompute",
        "prefetch": False,
    }
    changed |= {"partial_sums": "global"} if case is BACKWARD else {}
    short, long = (
        program(msgspec.structs.replace(case, hidden=hidden), **changed).source
        for hidden in (256, 2048)
    )
    arrays = [
        sorted(re.findall(r"alignas\(64\) float \w+\[\d+\]", source)) for source in (short, long)
    ]
    assert arrays[0] == arrays[1]
    assert (
        max(int(re.findall(r"\d+", array)[-1]) for array in arrays[1] if "__shared__" not in array)
        <= 4 * 4
    )
    assert len(short.splitlines()) == len(long.splitlines())


@needs_compiler
@pytest.mark.parametrize(
    ("op", "hidden", "dtype"),
    [
        ("lnlstm_step", 4, "float32"),
        exhaustive(("lnlstm_step", 12288, "float32")),
        exhaustive(("lnlstm_step_backward", 8, "bfloat16")),
        ("lnlstm_step_backward", 240, "float32"),
        ("lnlstm_step_backward", 256, "bfloat16"),
        exhaustive(("lnlstm_step_backward", 4096, "float32")),
        ("lnlstm_step_backward", 12288, "float32"),
    ],
)
def test_default_knobs_do_not_spill(op: str, hidden: int, dtype: str) -> None:
    """Rows as short as a vector, ragged ones, those that shared memory makes room for, those that
    nothing holds: no spills, no stack frame.
    """
    case = Case(op, hidden, dtype, 4096)
    compiled = program(case)
    (launch,) = compiled.launches
    assert (
        cuda.inspect_kernel(
            compiled.source, "sm_90", launch.threads, launch.shared, launch.kernel, machine=False
        ).problems
        == ()
    )
