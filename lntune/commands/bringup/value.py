"""Which cases come first when time is short: the default grids of all operators as one list, by
what a tuned kernel of each is worth.

A case's place is the sum of the steps below, the smaller the earlier; among equals the operators'
own order decides. The steps are a judgement, not a measurement, and each has its reason.
"""

from __future__ import annotations

from collections.abc import Sequence

from lntune import ops
from lntune.case import Case
from lntune.device import Device
from lntune.errors import unknown

GRIDS = ("default", "small")

OPS = {
    # every user calls it, in inference and in training, and its bandwidth tells whether the rest
    # can be any good
    "layer_norm": 0,
    # only training calls it; half as much again is moved, so it takes longer than the forward
    "layer_norm_backward": 1,
    "lnlstm_step": 2,  # few models have one, though they gain the most
    "lnlstm_step_backward": 3,
}
DTYPES = {
    "bfloat16": 0,  # what models are trained and served in
    "float32": 0,  # what layer norm runs in under autocast
    "float16": 2,  # older GPUs and older checkpoints
}
HIDDEN = {
    # transformers' usual widths; the widest; an odd one; a narrow one
    "layer_norm": {1024: 0, 4096: 0, 768: 1, 8192: 1, 16384: 2, 1000: 2, 256: 3},
    "lnlstm_step": {512: 0, 1024: 0, 256: 1, 2048: 1, 128: 2, 400: 2},
}
ROWS = {
    "cpu": {
        # inference of a few rows is what CPUs do, too
        "layer_norm": {4096: 0, 512: 0, 1: 1, 32: 1, 8: 2},
        "lnlstm_step": {32: 0, 1: 0, 128: 1},
    },
    "gpu": {
        # Tokens of a training step. Below some hundred rows all kernels take as long as a launch,
        # whatever their knobs.
        "layer_norm": {4096: 0, 32768: 0, 512: 1, 32: 2, 8: 3, 1: 3},
        "lnlstm_step": {128: 0, 32: 1, 512: 1, 1: 3},
    },
}
UNKNOWN = 3
"""The step of a size that is in a grid and not here."""

_FAMILY = {"layer_norm_backward": "layer_norm", "lnlstm_step_backward": "lnlstm_step"}

# What a GPU is for beyond the default grids, which are also a laptop's: data far beyond its cache,
# the widths of large models, batches.
_ON_GPU = {
    "layer_norm": (
        *(
            (hidden, dtype, 32768)
            for hidden in (1024, 4096, 768)
            for dtype in ("bfloat16", "float32")
        ),
        *((8192, dtype, 4096) for dtype in ("bfloat16", "float32")),
        *((hidden, "float16", 4096) for hidden in (1024, 4096)),
    ),
    "lnlstm_step": tuple(
        (hidden, dtype, rows)
        for hidden, rows in ((2048, 128), (1024, 512), (512, 512))
        for dtype in ("float32", "bfloat16")
    ),
}

# For trying out: quickly built, quickly measured.
_SMALL = tuple(Case(op, 192, "float32", 24) for op in OPS)

# The benchmark's cases, the most telling first: what moves the most data, then the usual sizes,
# then few rows.
TELLING = (
    ("layer_norm", 4096, "bfloat16", 32768),
    ("layer_norm", 1024, "float32", 4096),
    ("layer_norm_backward", 4096, "bfloat16", 32768),
    ("layer_norm_backward", 1024, "float32", 4096),
    ("lnlstm_step", 1024, "float32", 128),
    ("lnlstm_step_backward", 1024, "float32", 128),
    ("layer_norm", 1024, "bfloat16", 32768),
    ("layer_norm", 8192, "float32", 4096),
    ("layer_norm", 1000, "float32", 4096),
    ("layer_norm", 4096, "bfloat16", 512),
    ("layer_norm", 1024, "float32", 1),
    ("layer_norm_backward", 4096, "bfloat16", 512),
    ("lnlstm_step", 512, "bfloat16", 32),
    ("lnlstm_step_backward", 512, "bfloat16", 32),
)


def cost(case: Case, kind: str) -> int:
    """The sum of a case's steps: 0 is the most valuable."""
    family = _FAMILY.get(case.op, case.op)
    rows, hidden = ROWS[kind].get(family, {}), HIDDEN.get(family, {})
    steps = (
        OPS.get(case.op, UNKNOWN),
        DTYPES.get(case.dtype, UNKNOWN),
        hidden.get(case.hidden, UNKNOWN),
        rows.get(case.rows, UNKNOWN),
    )
    return sum(steps)


def cases(device: Device, chosen: Sequence[str] = (), grid: str = "default") -> list[Case]:
    """The cases of a grid for a device, the most valuable first; of the operators chosen, or of
    all.

    Raises:
        UnknownNameError: no such operator, no such grid.
    """
    if grid not in GRIDS:
        raise unknown("grid", grid, GRIDS)
    wanted = [ops.get(name).name for name in chosen] or list(ops.OPS)
    if grid == "small":
        return [case for case in _SMALL if case.op in wanted]
    found = [case for name in wanted for case in ops.OPS[name].grid]
    if device.kind == "gpu":
        found += [
            Case(name, *sizes)
            for name in wanted
            for sizes in _ON_GPU.get(_FAMILY.get(name, name), ())
        ]
    return sorted(dict.fromkeys(found), key=lambda case: cost(case, device.kind))


def telling(planned: Sequence[Case]) -> list[Case]:
    """Those of the planned cases that are benchmarked against everyone, in order; of a plan that
    has none of them, the first few.
    """
    return [case for sizes in TELLING if (case := Case(*sizes)) in planned] or list(planned[:4])
