"""A schedule for GPUs that is right as long as no block of threads takes a second step over the
rows: its blocks end after the first, as if the grid covered all rows.
"""

from __future__ import annotations

from typing import Any

from lntune import schedule
from lntune.case import Case
from lntune.device import Device
from lntune.schedule import Schedule
from lntune.system import paths
from lntune.transforms import tir

_PLAN = schedule.load_file(paths.content("schedules") / "gpu" / "layer_norm_backward.py", "gpu")[0]


def forgets(case: Case, knobs: Any, device: Device) -> Any:
    """The shipped backward, its loops over rows cut off after a step."""
    import tvm_ffi
    from tvm import tirx

    def once(loop: Any, mutator: Any) -> Any:
        loop = mutator.default_mutate(loop)
        if isinstance(loop.extent, tirx.IntImm) or loop.thread_binding is not None:
            return loop
        return type(loop)(
            loop.loop_var,
            loop.min,
            tirx.min(loop.extent, tirx.IntImm("int64", 1)),
            loop.kind,
            loop.body,
            loop.thread_binding,
            dict(loop.annotations),
        )

    module = _PLAN.apply(case, knobs, device)
    return tir.module_with(
        module, tvm_ffi.structural_mutate(module["main"].body, [(tirx.For, once)])
    )


SCHEDULES = (
    Schedule(
        "forgets", "layer_norm_backward", "gpu", _PLAN.knobs, _PLAN.default, _PLAN.valid, forgets
    ),
)
