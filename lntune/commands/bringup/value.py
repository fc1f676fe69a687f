"""Which cases come first when time is short: the default grids of all operators as one list, by
what a tuned kernel of each is worth.

A case's place is the sum of its steps, the smaller the earlier; among equals the operators' own
order decides. Each operator says beside its mathematics what its steps are (`Op.priority`); those
of dtypes, the same for all, stand here.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lntune import ops
from lntune.case import Case
from lntune.device import Device
from lntune.errors import unknown

GRIDS = ("default", "small")

DTYPES = {
    "bfloat16": 0,  # what models are trained and served in
    "float32": 0,  # what layer norm runs in under autocast
    "float16": 2,  # older GPUs and older checkpoints
}


def cost(case: Case, kind: str) -> int:
    """The sum of a case's steps on a kind of device: 0 is the most valuable."""
    return ops.get(case.op).priority.steps(case, kind) + DTYPES[case.dtype]


def cases(device: Device, chosen: Sequence[str] = (), grid: str = "default") -> list[Case]:
    """The cases of a grid for a device, the most valuable first; of the operators chosen, or of
    all. The small grid, for trying out, is quickly built and quickly measured.

    Raises:
        UnknownNameError: no such operator, no such grid.
    """
    if grid not in GRIDS:
        raise unknown("grid", grid, GRIDS)
    wanted = [ops.get(name) for name in chosen] or list(ops.OPS.values())
    if grid == "small":
        return [Case(op.name, 192, "float32", 24) for op in ops.OPS.values() if op in wanted]
    default = [case for op in wanted for case in op.grid]
    more = [case for op in wanted for case in op.more_cases.get(device.kind, ())]
    return sorted(dict.fromkeys(default + more), key=lambda case: cost(case, device.kind))


def telling(planned: Sequence[Case]) -> list[Case]:
    """Those of the planned cases that are benchmarked against everyone, in order (`Op.telling`): a
    round of every operator, then the next; of a plan that has none of them, the first few.
    """
    rounds = itertools.zip_longest(*(op.telling for op in ops.OPS.values()), fillvalue=())
    in_order = [case for of_all in rounds for of_one in of_all for case in of_one]
    return [case for case in in_order if case in planned] or list(planned[:4])
