"""What the gate costs: CPU seconds of the check of a trial and of a finalist, of kernels with
default knobs on this CPU. The first check of a case makes its problems, which are kept.

    python bench/check_cost.py
"""

from __future__ import annotations

import time

from lntune import backends, schedule
from lntune import device as devices
from lntune.case import Case
from lntune.kernels import compiler

CASES = (
    Case("layer_norm", 1024, "float32", 512),
    Case("layer_norm", 1024, "bfloat16", 512),
    Case("layer_norm_backward", 1024, "float32", 512),
    Case("lnlstm_step", 512, "float32", 32),
    Case("lnlstm_step_backward", 512, "float32", 32),
)
CALLS = 5


def main() -> None:
    """Print a line a case and check."""
    device = devices.current()
    backend = backends.of(device)
    for case in CASES:
        plan = next(iter(schedule.for_op(case.op, device.kind).values()))
        kernel = compiler.in_memory(case, plan, plan.default(case, device), device)
        for thoroughly in (False, True):
            spent = []
            for _ in range(CALLS):
                begun = time.process_time()
                verdict = backend.verify(case, device, kernel, thoroughly=thoroughly)
                spent.append((time.process_time() - begun) * 1e3)
                if not verdict.ok:
                    print(f"{case}: {verdict.message}")
            which = "finalist" if thoroughly else "trial"
            later = sorted(spent[1:])[len(spent[1:]) // 2]
            print(f"{case}, {which}: {later:.0f} ms of a CPU, {spent[0]:.0f} ms the first time")


if __name__ == "__main__":
    main()
