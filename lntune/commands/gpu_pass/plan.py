"""What the pass measures: on which sizes, with which kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import msgspec

from lntune import backends, ops, schedule
from lntune import knobs as knobs_module
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, LntuneError
from lntune.log import select
from lntune.measure.jobs import Candidate

FORWARD, BACKWARD = "layer_norm", "layer_norm_backward"
STEP, STEP_BACKWARD = "lnlstm_step", "lnlstm_step_backward"
MB = 1 << 20


class Trial(msgspec.Struct, frozen=True):
    """Knobs that differ from a case's default, to be measured beside it."""

    op: str
    hidden: int
    dtype: str
    rows: int
    knobs: Mapping[str, knobs_module.Value]

    @property
    def case(self) -> Case:
        """What they are measured on."""
        return case_of(self.op, self.hidden, self.dtype, self.rows)


class Sizes(msgspec.Struct, frozen=True):
    """How large everything is.

    `checked` are (operator, hidden, dtype): their kernels for `few` rows are checked as candidates
    are, which takes 1 and 21 rows, and on `checked_rows`, the first of them before anything else.
    The operators `timed` x `hidden` x `dtypes` are timed on `many` rows, far beyond the cache, and
    on `few`; `profiled` as `checked`, of `many` rows; `copies` are bytes; `sequences` are (batch,
    hidden, dtype), of `steps` steps. A race is looked for in blocks that go over `turns` rows.
    `seconds` is the time of one measurement.
    """

    checked: tuple[tuple[str, int, str], ...]
    checked_rows: tuple[int, ...]
    timed: tuple[str, ...]
    hidden: tuple[int, ...]
    dtypes: tuple[str, ...]
    many: int
    few: int
    trials: tuple[Trial, ...]
    profiled: tuple[tuple[str, int, str], ...]
    copies: tuple[int, ...]
    sequences: tuple[tuple[int, int, str], ...]
    steps: int
    turns: int
    seconds: float


_BACKWARD_TRIALS: tuple[tuple[int, str, int, dict[str, knobs_module.Value]], ...] = (
    (8192, "bfloat16", 32768, {"threads_per_row": 1024, "blocks_per_sm": 1}),
    (8192, "float32", 32768, {"threads_per_row": 1024, "blocks_per_sm": 1}),
    (4096, "bfloat16", 32768, {"threads_per_row": 512, "blocks_per_sm": 2}),
    (1024, "bfloat16", 4096, {"threads_per_row": 128, "blocks_per_sm": 2}),
    (4096, "bfloat16", 32768, {"threads_per_row": 256, "blocks_per_sm": 2}),
    (1024, "bfloat16", 32768, {"threads_per_row": 64, "blocks_per_sm": 8}),
    (768, "float32", 32768, {"threads_per_row": 64}),
    (768, "bfloat16", 32768, {"threads_per_row": 32, "blocks_per_sm": 8}),
    (8192, "bfloat16", 32768, {"threads_per_row": 256}),
    (1024, "bfloat16", 4096, {"blocks_per_sm": 8}),
    (8192, "bfloat16", 32768, {"prefetch": True}),
    (8192, "float32", 32768, {"prefetch": True}),
    (5003, "bfloat16", 32768, {"prefetch": True}),
    (4096, "bfloat16", 32768, {"exchange": "one_barrier"}),
    (4096, "bfloat16", 32768, {"weight_storage": "registers"}),
)
_FORWARD_TRIALS: tuple[tuple[int, str, int, dict[str, knobs_module.Value]], ...] = (
    (16384, "float32", 32768, {"threads_per_row": 1024}),
    (5003, "bfloat16", 32768, {"threads_per_row": 256}),
    (1024, "bfloat16", 32768, {"threads_per_row": 32, "rows_per_block": 4}),
    (16384, "float32", 32768, {"threads_per_row": 512, "row_storage": "shared"}),
    (4096, "bfloat16", 32768, {"exchange": "one_barrier"}),
    (16384, "float32", 32768, {"exchange": "one_barrier"}),
    (4096, "bfloat16", 32768, {"prefetch": True}),
)
TRIALS = (
    *(Trial(BACKWARD, *trial) for trial in _BACKWARD_TRIALS),
    *(Trial(FORWARD, *trial) for trial in _FORWARD_TRIALS),
)
"""Where a model of a multiprocessor sees the largest differences, which a card has to confirm: more
threads to a row than the default has, fewer, and other ways of working.
"""
FULL = Sizes(
    checked=(
        (FORWARD, 1024, "float32"),
        (FORWARD, 4096, "bfloat16"),
        (BACKWARD, 1024, "bfloat16"),
        (BACKWARD, 4096, "float32"),
        (FORWARD, 5003, "bfloat16"),
        (BACKWARD, 5003, "float32"),
        (STEP, 512, "float32"),
        (STEP_BACKWARD, 512, "bfloat16"),
    ),
    checked_rows=(4113,),
    timed=(FORWARD, BACKWARD),
    hidden=(4096, 1024, 8192, 16384, 768, 5003),
    dtypes=("bfloat16", "float32"),
    many=32768,
    few=4096,
    trials=TRIALS,
    profiled=(
        (FORWARD, 4096, "bfloat16"),
        (FORWARD, 1024, "bfloat16"),
        (FORWARD, 16384, "float32"),
        (FORWARD, 5003, "bfloat16"),
        (BACKWARD, 4096, "bfloat16"),
        (BACKWARD, 1024, "bfloat16"),
        (BACKWARD, 8192, "float32"),
        (BACKWARD, 5003, "bfloat16"),
    ),
    copies=(64 * MB, 256 * MB, 4096 * MB),
    sequences=tuple(
        (64, hidden, dtype) for hidden in (1024, 512) for dtype in ("bfloat16", "float32")
    ),
    steps=100,
    turns=3,
    seconds=0.5,
)
TINY = Sizes(
    checked=((FORWARD, 40, "float32"), (BACKWARD, 40, "float32")),
    checked_rows=(5,),
    timed=(FORWARD,),
    hidden=(40,),
    dtypes=("float32",),
    many=8,
    few=3,
    trials=(Trial(FORWARD, 64, "float32", 8, {"threads_per_row": 16}),),
    profiled=((FORWARD, 40, "float32"),),
    copies=(1 << 16,),
    sequences=((2, 16, "float32"),),
    steps=3,
    turns=2,
    seconds=0.01,
)
"""For a GPU that is imagined."""


def sizes_for(device: Device) -> Sizes:
    """The sizes for a GPU, here or elsewhere; for one that is imagined, whose tensors are not on a
    GPU, tiny ones.
    """
    backend = backends.of(device)
    try:
        place = backend.torch_device(device)
    except InputError:  # it is elsewhere
        return FULL
    return FULL if place.startswith(backend.torch_type) else TINY


def case_of(op: str, hidden: int, dtype: str, rows: int) -> Case:
    """A case of an operator's default variant, by the name that PyTorch's calls have for it."""
    return Case(op, hidden, dtype, rows, ops.get(op).check_variant(""))


def default_of(case: Case, device: Device) -> Candidate:
    """What serves a case where nothing is tuned.

    Raises:
        LntuneError: no schedule does.
    """
    name, setting, steps = select.untuned(case, device, schedule.for_op(case.op, device.kind))
    if not name:
        raise LntuneError(f"{case}: no schedule serves it: {'; '.join(steps)}.")
    return Candidate.of(name, setting)


def other(trial: Trial, device: Device) -> Candidate | None:
    """The default with a trial's knobs; None where that is the default, or does not fit."""
    default = default_of(trial.case, device)
    plan, setting = default.resolved(trial.op)
    changed = dataclasses.replace(setting, **trial.knobs)
    if changed == setting or plan.reason_invalid(changed, trial.case, device):
        return None
    return Candidate.of(plan.name, changed)


def timed(sizes: Sizes) -> list[Case]:
    """What is timed with default knobs, the most telling first."""
    return [
        case_of(op, hidden, dtype, rows)
        for rows in (sizes.many, sizes.few)
        for hidden in sizes.hidden
        for op in sizes.timed
        for dtype in sizes.dtypes
    ]


def kernels(device: Device, sizes: Sizes) -> list[tuple[Case, Candidate]]:
    """Every kernel that the first part takes, once."""
    cases = [
        *(case_of(*one, sizes.few) for one in sizes.checked),
        *timed(sizes),
        *(case_of(*one, sizes.many) for one in sizes.profiled),
        *(
            Case(STEP, hidden, dtype, batch, variant)
            for batch, hidden, dtype in sizes.sequences
            for variant in ops.get(STEP).called("")
        ),
    ]
    listed = [(case.typical, default_of(case.typical, device)) for case in cases]
    for trial in sizes.trials:
        candidate = other(trial, device)
        listed += [] if candidate is None else [(trial.case.typical, candidate)]
        listed.append((trial.case.typical, default_of(trial.case.typical, device)))
    return list(dict.fromkeys(listed))
