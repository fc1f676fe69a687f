"""Rows that vectors do not divide, in aligned vectors all the same: right, within their tensors,
and in wide accesses.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import msgspec
import pytest
import torch
from grids import exhaustive, thinned
from kernel_arguments import arguments, inputs

from lntune import check, ops
from lntune.backends import device_of
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import calls as emulated
from lntune.backends.emulated import emulator
from lntune.backends.emulated.emulator import Traffic
from lntune.case import DTYPES, Case
from lntune.errors import UnfitError
from lntune.kernels import compiler
from lntune.schedule import get
from lntune.torch.vector_width import narrowed
from lntune.transforms.gpu import aligned_rows

DEVICE = msgspec.structs.replace(device_of("cuda:sm_90"), cores=8)
"""With so few multiprocessors that the 21 rows of a check are several to each block, and so many
that each block of them has rows that begin at one place in a vector.
"""
NAMES = {"layer_norm": "shared_row", "layer_norm_backward": "shared_row_backward"}


def setting_of(case: Case, **changed: Any) -> Any:
    """Default knobs with vectors of 16 bytes and one row to a block, and others changed."""
    plan = get(NAMES[case.op])
    fixed = {"rows_per_block": 1, "row_storage": "registers", "vector_width": 16 // case.itemsize}
    if case.op == "layer_norm_backward" and case.variant.count("+d") + (not case.variant):
        fixed["blocks_per_sm"] = 1
    setting = dataclasses.replace(plan.default(case, DEVICE), **{**fixed, **changed})
    assert plan.reason_invalid(setting, case, DEVICE) is None
    return setting


def program_of(case: Case, **changed: Any) -> Program:
    """The program of `setting_of`."""
    return compiler.program(case, get(NAMES[case.op]), setting_of(case, **changed), DEVICE)


def verdict_of(case: Case, program: Program, more_rows: Any = ()) -> check.Verdict:
    """What the check of every candidate says of it."""
    run = emulated.kernel(case, program, "shuffled")
    return check.verify(case, run, check.ALIGNED, device=DEVICE, more_rows=more_rows)


SIZES = [
    (hidden, dtype, threads)
    for hidden, threads in ((17, 32), (33, 32), (770, 64), (1023, 128), (1001, 32), (2050, 64))
    for dtype, size in DTYPES.items()
    if aligned_rows.needed(hidden, 16 // size)
]
"""Odd and even, one vector to a thread and several, threads that have none; where vectors of 16
bytes do not divide them.
"""
VARIANTS = {
    "layer_norm": ("plain", "bias", "weight32+bias", "weight+bias32+stats"),
    "layer_norm_backward": (
        "dx",
        "weight32+dx",
        "dx+dbeta",
        "weight+dx+dgamma",
        "weight32+dx+dgamma32+dbeta",
    ),
}


@pytest.mark.parametrize(
    ("hidden", "dtype", "threads", "op"),
    thinned([(*size, op) for size in SIZES for op in NAMES], 9),
)
def test_right_wherever_rows_begin(hidden: int, dtype: str, threads: int, op: str) -> None:
    """On every style of input, and wherever in a vector a matrix ends: nothing of a neighbour
    counts, and nothing beyond the matrix is touched.
    """
    case = Case(op, hidden, dtype, 512, "weight+bias+stats" if op == "layer_norm" else "")
    verdict = verdict_of(case, program_of(case, threads_per_row=threads), range(2, 10))
    assert verdict.ok, verdict.message


@pytest.mark.parametrize(
    ("op", "variant"),
    thinned((op, variant) for op, listed in VARIANTS.items() for variant in listed),
)
def test_variants(op: str, variant: str) -> None:
    """Whatever is there beside the rows, in whatever dtype."""
    case = Case(op, 101, "bfloat16", 512, variant)
    verdict = verdict_of(case, program_of(case, threads_per_row=32))
    assert verdict.ok, verdict.message


def test_what_is_not_the_rows_overflows_nowhere() -> None:
    """Rows of one large number, whose mean times their rstd is beyond float32: where the row's own
    elements are normalized to zeros, none of those beside them makes a NaN of the row's sums.
    """
    case, rows = Case("layer_norm_backward", 101, "bfloat16", 512), 9
    given = inputs(case, rows)
    given["x"] = torch.full_like(given["x"], 2.0**124)
    given["mean"], given["rstd"] = torch.full((rows,), 2.0**124), torch.full((rows,), 316.0)
    values = arguments(case, rows, given)
    emulated.kernel(case, program_of(case, threads_per_row=32))(*values.values())
    for name, value in ops.get(case.op).reference(case, given).items():
        torch.testing.assert_close(values[name].double(), value, rtol=2e-2, atol=1.0)


@pytest.mark.parametrize(
    ("op", "changed"),
    [
        ("layer_norm", {"prefetch": True}),
        exhaustive(("layer_norm", {"exchange": "one_barrier"})),
        exhaustive(("layer_norm_backward", {"prefetch": True, "exchange": "one_barrier"})),
        ("layer_norm_backward", {"prefetch": True, "weight_storage": "registers"}),
        exhaustive(("layer_norm_backward", {"weight_storage": "registers"})),
    ],
)
def test_other_knobs_go_with_it(op: str, changed: dict[str, Any]) -> None:
    """What else a schedule can do with a row it does with these, too."""
    case = Case(op, 1003, "bfloat16", 512)
    verdict = verdict_of(case, program_of(case, threads_per_row=64, **changed))
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("op", NAMES)
def test_hints_go_with_it(op: str) -> None:
    """With the cache hint that is asked for at every access of a matrix."""
    case, uncached = Case(op, 1003, "bfloat16", 512), msgspec.structs.replace(DEVICE, l2=0)
    setting = dataclasses.replace(setting_of(case, threads_per_row=64), cache_hints=True)
    source = compiler.program(case, get(NAMES[op]), setting, uncached).source
    body = source[source.rindex(" main_kernel(") :].split("\n}\n")[0]
    body = body[body.index("{") :]
    for name, hinted in (("x", "__ldcs"), ("y" if op == "layer_norm" else "dx", "__stcs")):
        uses = len(re.findall(rf"\b{name}_ptr\b", body))
        marked = len(re.findall(rf"{hinted}\((?:\(\w+\*\)\()?{name}_ptr\b", body))
        assert marked == uses > 0


@pytest.mark.parametrize("op", NAMES)
def test_rows_are_moved_once_in_wide_accesses(op: str) -> None:
    """Of each row all whole vectors are moved as such, what is before and behind them one by one,
    and nothing twice; but that x of the backward has a row's first element in the place of others'.
    """
    case, rows, width = Case(op, 1003, "bfloat16", 512), 21, 8
    values, seen = arguments(case, rows, device=DEVICE), list[Traffic]()
    emulated.kernel(case, program_of(case, threads_per_row=64), seen=seen)(*values.values())
    whole = sum((n + 1) * 1003 // width - -(-n * 1003 // width) for n in range(rows))
    accesses = whole + rows * 1003 - whole * width
    out = "y" if op == "layer_norm" else "dx"
    read = [name for name in ("x", "dy") if name in values]
    for name, moved, times in [(n, "loaded", "loads") for n in read] + [(out, "stored", "stores")]:
        found = [t[name] for t in seen if name in t]
        more = rows * (aligned_rows.columns(1003, width) - 1003)
        more = more if op == "layer_norm_backward" and name == "x" else 0
        assert sum(getattr(m, moved) for m in found) == values[name].nbytes + 2 * more
        assert sum(getattr(m, times) for m in found) == accesses + more


@pytest.mark.parametrize(
    ("op", "fault"),
    [
        ("layer_norm", "masks"),
        ("layer_norm", "shift"),
        ("layer_norm_backward", "shift"),
        ("layer_norm_backward", "period"),
    ],
)
def test_faults_are_rejected(op: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that counts what is not the row's, a row sought where it does not begin, blocks whose
    rows begin at different places: the check sees it, or the emulator.
    """
    case = Case(op, 1003, "bfloat16", 512)
    device = DEVICE
    if fault == "masks":
        monkeypatch.setattr(aligned_rows, "inside", lambda *_: None)
    elif fault == "shift":
        right = aligned_rows.shift
        monkeypatch.setattr(aligned_rows, "shift", lambda r, h, w: right(r + 1, h, w))
    else:
        monkeypatch.setattr(aligned_rows, "period", lambda *_: 1)
        device = msgspec.structs.replace(DEVICE, cores=3)
    program = compiler.program(case, get(NAMES[op]), setting_of(case, threads_per_row=64), device)
    try:
        run = emulated.kernel(case, program)
        assert not check.verify(case, run, check.ALIGNED, device=device).ok
    except emulator.EmulatorError:
        pass


def test_blocks_are_as_many_as_rows_begin_alike() -> None:
    """Blocks that loop over odd rows of two bytes are a multiple of 8, over rows of 2 mod 4
    elements one of 4; fewer are refused, and other rows have all.
    """
    plan = get("shared_row_backward")
    h200 = device_of("nvidia/nvidia-h200")
    for hidden, blocks in ((5003, 128), (4098, 132), (5000, 132)):
        case = Case("layer_norm_backward", hidden, "bfloat16", 32768)
        setting = dataclasses.replace(setting_of(case), threads_per_row=256, vector_width=8)
        assert compiler.program(case, plan, setting, h200).launches[0].total(case.rows) == blocks
    small = msgspec.structs.replace(DEVICE, cores=3)
    case = Case("layer_norm_backward", 1003, "bfloat16", 512)
    assert "at one of 8 places" in str(plan.reason_invalid(setting_of(case), case, small))


@pytest.mark.parametrize("op", NAMES)
def test_what_does_not_fit(op: str) -> None:
    """Narrower vectors divide a row or are refused; so are rows without a whole vector, rows kept
    elsewhere, and several to a block.
    """
    plan, case = get(NAMES[op]), Case(op, 1003, "bfloat16", 512)
    setting = setting_of(case, threads_per_row=64)
    for changed, which in (
        ({"vector_width": 4}, case),
        ({"row_storage": "shared"}, case),
        ({"row_storage": "reload"}, case),
        ({"rows_per_block": 2}, case),
        ({"threads_per_row": 32}, msgspec.structs.replace(case, hidden=15)),
    ):
        assert plan.reason_invalid(dataclasses.replace(setting, **changed), which, DEVICE)


@pytest.mark.parametrize("op", NAMES)
def test_rows_that_lie_apart_have_narrower_vectors(op: str) -> None:
    """Of matrices whose rows do not follow one another only vectors that divide a row are aligned
    in all of them; the others are refused, and the nearest knobs serve.
    """
    plan, case = get(NAMES[op]), Case(op, 1002, "bfloat16", 512)
    setting = setting_of(case, threads_per_row=64)
    with pytest.raises(UnfitError, match="for rows that follow one another in memory"):
        compiler.scheduled(case, plan, setting, DEVICE, strided=True)
    other = narrowed(setting, plan, case, DEVICE, 16, strided=True)
    assert other is not None
    assert other.vector_width == 2
    assert other.threads_per_row == setting.threads_per_row
    compiler.scheduled(case, plan, other, DEVICE, strided=True)
