"""The model of a GPU's kernels: what it reckons with, what it says of one kernel and of another,
and how near it comes to a simulation.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lntune import ops, schedule
from lntune.backends import cuda, device_of
from lntune.backends.cuda import model, parts, ptx
from lntune.backends.cuda.code import Work
from lntune.backends.cuda.model import Pair, Part
from lntune.case import DTYPES, Case
from lntune.kernels import compiler
from lntune.kernels.candidate_facts import facts

DEVICE = device_of("nvidia/nvidia-h200")
SIMULATED = Path(__file__).parent.parent / "bench" / "results" / "model" / "simulated_h200.jsonl"
ROWS = 32_768
_RELOADED = {"row_storage": "reload", "rolled": True, "threads_per_row": 32}
HIDDEN = 1024
LEAST = 2 * ROWS * HIDDEN * 4
PART = Part(128, 16, ROWS, 1, Work(), Work(200, 21, 4, 8, 128), LEAST)
needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"needs a CUDA compiler: {cuda.available()}"
)


def us(*kernels: Part, least: float = LEAST) -> float:
    """What the model says that kernels take."""
    return model.predict(kernels, least, DEVICE).us


def changed(part: Part = PART, **fields: Any) -> Part:
    """A kernel like another one; what is a field of Work goes to its turn."""
    work = {name: fields.pop(name) for name in list(fields) if name in Work.__struct_fields__}
    return msgspec.structs.replace(part, turn=msgspec.structs.replace(part.turn, **work), **fields)


def pairs() -> dict[str, Pair]:
    """The simulated kernels by what they are."""
    lines = SIMULATED.read_bytes().splitlines()
    return {pair.what: pair for pair in (msgspec.json.decode(line, type=Pair) for line in lines)}


def test_a_light_kernel_reaches_the_roof() -> None:
    """One with enough blocks and few instructions takes as long as its bytes, and is bound by
    them.
    """
    light = changed(slots=50, shuffles=5, barriers=0)
    prediction = model.predict((light,), LEAST, DEVICE)
    assert 0.95 < prediction.share <= 1
    assert prediction.bound == "memory"
    product = DEVICE.name, prediction.least_us
    assert product == ("NVIDIA H200", pytest.approx(LEAST / (4800e9 * 0.9) * 1e6))


@pytest.mark.parametrize(
    ("worse", "bound"),
    [
        (changed(slots=800), "issue"),
        (changed(resident=1), "latency"),
        (changed(resident=1, barriers=12), "latency"),
        (changed(bytes=2 * LEAST), "memory"),
    ],
    ids=["instructions", "one block", "barriers", "bytes"],
)
def test_what_makes_a_kernel_slow(worse: Part, bound: str) -> None:
    """More instructions, fewer blocks at a time, more barriers, more bytes: each alone, and said to
    be what bounds it.
    """
    assert us(worse) > 1.1 * us(PART)
    assert model.predict((worse,), LEAST, DEVICE).bound == bound


def test_waves_and_idle_multiprocessors() -> None:
    """A second wave for one block costs a turn, and a card of which only a part has blocks is not
    filled by them.
    """
    slow = changed(resident=1, barriers=20, bytes=0)
    full, over = changed(slow, blocks=132 * 4), changed(slow, blocks=132 * 4 + 1)
    assert us(over) == pytest.approx(us(full) * 5 / 4, rel=0.02)
    few, many = (changed(blocks=n, turns=ROWS // n, resident=1) for n in (32, 128))
    assert us(few) > 2 * us(many)


def test_blocks_that_take_turns_spare_their_start() -> None:
    """A block in the place of one that ended starts anew, one that loops over rows does not."""
    short = changed(resident=1, blocks=132 * 100)
    assert us(changed(short, blocks=132, turns=100)) < us(short)


def test_a_second_kernel_costs_its_gap_and_its_reading() -> None:
    """Kernels that add partial sums wait for the first, and read from the L2 cache."""
    totals = Part(512, 2, 32, 1, Work(), Work(60, 0, 5, 34, 32), 0, 1 << 20)
    gap = model.CONSTANTS.gap / 1e3
    assert us(PART, totals) > us(PART) + gap
    more = changed(totals, cached=1 << 24)
    assert us(PART, more) > us(PART, totals) + 1


def test_a_kernel_that_cannot_run() -> None:
    """No room for a block: no share at all."""
    prediction = model.predict((changed(resident=0),), LEAST, DEVICE)
    assert (prediction.us, prediction.share) == (math.inf, 0)


@pytest.mark.parametrize(
    ("case", "knobs"),
    [
        (Case("layer_norm", 1024, "float32", ROWS), {}),
        (Case("layer_norm", 1024, "bfloat16", ROWS), _RELOADED),
        (Case("layer_norm_backward", 768, "bfloat16", ROWS), {}),
        (Case("lnlstm_step", 512, "float32", 64), {}),
        (Case("lnlstm_step_backward", 256, "float32", 64), {}),
        (Case("lnlstm_step_backward", 256, "float32", 512), {}),
    ],
    ids=str,
)
@needs_compiler
def test_the_parts_of_a_program(case: Case, knobs: dict[str, Any]) -> None:
    """All rows are somebody's; what is moved is what the operator counts, beside what kernels leave
    for each other, and sums of no more blocks than there are rows; layer norm's are a second
    kernel's.
    """
    plan = next(iter(schedule.for_op(case.op, "gpu").values()))
    setting = dataclasses.replace(plan.default(case, DEVICE), **knobs)
    program = compiler.program(case, plan, setting, DEVICE)
    kernels = [
        cuda.inspect_kernel(
            program.source, DEVICE.isa, one.threads, one.shared, one.kernel, machine=False
        )
        for one in program.launches
    ]
    first, *others = parts.of(case, program, kernels, DEVICE)
    backward = "backward" in case.op
    at_once = program.launches[0].block[1]
    assert first.blocks * first.turns * at_once >= case.rows
    assert (first.turns > 1) == (first.blocks * at_once < case.rows)
    least = ops.get(case.op).bytes(case)
    between = sum(other.cached for other in others)
    # the operator counts the sums of one block
    others_sums = (min(case.blocks(DEVICE), case.rows) - 1) * sum(
        2 * DTYPES[a.dtype] * math.prod(a.sizes(case.rows, case.hidden))
        for a in ops.get(case.op).arguments(case)
        if a.role == "sum"
    )
    assert first.bytes - between - others_sums == pytest.approx(least, rel=0.02)
    assert bool(others) == bool(program.scratch) == (case.op == "layer_norm_backward")
    assert first.turn.barriers >= (0 if first.threads == 32 else 2)
    assert first.turn.shuffles >= 10
    if knobs:  # its three loops are as many as a thread has vectors
        vectors = case.hidden // (setting.vector_width * setting.threads_per_row)
        assert first.turn.slots > 3 * vectors * setting.vector_width
    assert bool(first.once.slots) == backward


LOOP = """.visible .entry k(.param .u64 p)
{{
    ld.param.u64 %rd1, [p];
    ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd1];
$L1:
    ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd1+16];
    shfl.sync.bfly.b32 %r9|%p1, %r1, 16, 31, -1;
    {used}
    st.shared.v2.u32 [%r9], {{%r9, %r1}};
    st.global.u32 [%rd1], %r9;
    mov.u32 %r1, %r5;
    @%p2 bra $L1;
    ret;
}}
"""
"""A loop that hands what it loads on to its next turn; `used` may use it before."""


@pytest.mark.parametrize(
    ("used", "ahead"),
    [
        ("", 1),
        ("mov.u32 %r11, %r8;", 1),
        ("add.u32 %r9, %r9, %r6;", 0),
        ("mov.b32 {%rs1, %rs2}, %r7; cvt.u32.u16 %r10, %rs1;", 0),
    ],
)
def test_loads_for_the_next_turn(used: str, ahead: int) -> None:
    """What a turn loads and does not use but hands on counts as loaded ahead; a use that goes by
    copies of registers is one. Before the loop nothing is.
    """
    (code,) = ptx.parse(LOOP.format(used=used), "").values()
    assert [work.ahead for work in code.depths] == [0, ahead]


def test_loading_ahead_hides_the_way_to_memory() -> None:
    """A block that has a multiprocessor to itself takes as long as the longer of its waiting and
    its work; where memory is the bound already, nothing changes.
    """
    alone = changed(resident=1, blocks=132, turns=ROWS // 132, bytes=LEAST / 8)
    assert us(changed(alone, ahead=8)) < 0.75 * us(alone)
    full = changed(resident=16, blocks=132 * 16, turns=ROWS // (132 * 16), barriers=0)
    assert us(changed(full, ahead=8)) == pytest.approx(us(full), rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@needs_compiler
def test_the_model_sees_a_row_that_is_loaded_ahead(dtype: str) -> None:
    """Of the backward's code with its next row on its way in registers, and not of the code
    without, the model knows it.
    """
    case = Case("layer_norm_backward", 4096, dtype, ROWS)
    plan = schedule.get("shared_row_backward")
    default = dataclasses.replace(plan.default(case, DEVICE), prefetch=False, blocks_per_sm=1)
    plain, ahead = (
        facts(case, plan, dataclasses.replace(default, prefetch=prefetch), DEVICE).parts
        for prefetch in (False, True)
    )
    assert (plain[0].turn.ahead, ahead[0].turn.ahead > 3) == (0, True)
    assert us(*ahead, least=0) < us(*plain, least=0)


TABLE = [
    ("layer_norm_backward 8192 float32", "threads_per_row=1024", "threads_per_row=512", 1),
    ("layer_norm_backward 8192 bfloat16", "threads_per_row=1024", "threads_per_row=512", 1),
    ("layer_norm_backward 8192 bfloat16", "threads_per_row=1024", "threads_per_row=256", 1),
    ("layer_norm_backward 4096 bfloat16", "threads_per_row=512", "threads_per_row=256", 2),
    ("layer_norm_backward 1024 bfloat16", "threads_per_row=128", "threads_per_row=64", 8),
    ("layer_norm_backward 768 float32", "threads_per_row=128", "threads_per_row=64", 8),
    ("layer_norm_backward 768 bfloat16", "threads_per_row=128", "threads_per_row=32", 8),
    ("layer_norm 16384 float32", "threads_per_row=1024", "threads_per_row=512", 0),
    ("layer_norm 5003 bfloat16", "threads_per_row=1024", "threads_per_row=256", 0),
    ("layer_norm 1024 bfloat16", "threads_per_row=128", "threads_per_row=32", 0),
]
"""(case, threads that are worse by the simulation, threads that are better, blocks a
multiprocessor)."""


@pytest.mark.parametrize(("case", "worse", "better", "blocks"), TABLE)
def test_the_model_orders_as_the_simulation(
    case: str, worse: str, better: str, blocks: int
) -> None:
    """Of two numbers of threads the one that a simulation of the machine code finds faster is the
    model's, too.
    """

    def one(threads: str) -> Pair:
        sums = f" blocks_per_sm={blocks}" if blocks else ""
        fits = [
            pair
            for what, pair in pairs().items()
            if what.startswith(f"{case} {threads} rows_per_block=1 ") and what.endswith(sums)
            if "shared" not in what
        ]
        return fits[0]

    assert us(*one(better).parts, least=0) < us(*one(worse).parts, least=0)


def test_the_model_is_near_the_simulation() -> None:
    """Of all simulated kernels nine in ten lie within 25 %, and of two of one case that differ by
    more than 5 % more than eight in ten are in the simulation's order.
    """
    simulated = list(pairs().values())
    predicted = [us(*pair.parts, least=pair.least) for pair in simulated]
    near = [
        abs(math.log(p / pair.measured_us)) < math.log(1.25)
        for p, pair in zip(predicted, simulated, strict=True)
    ]
    assert sum(near) > 0.9 * len(near)
    agree = [
        (p < q) == (a.measured_us < b.measured_us)
        for a, p in zip(simulated, predicted, strict=True)
        for b, q in zip(simulated, predicted, strict=True)
        if a.what.split()[:3] == b.what.split()[:3] and a.measured_us > 1.05 * b.measured_us
    ]
    assert len(agree) > 100
    assert sum(agree) > 0.8 * len(agree)
