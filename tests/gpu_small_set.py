"""A small set of kernels, each right on adversarial inputs: `python tests/gpu_small_set.py [few]`,
made to be run under compute-sanitizer.

Every operator with its default knobs on a GPU that is here: a size of whole accesses and an odd
one, with sums and statistics; the first of them by the kernel for rows that lie apart as well. Of
`few`, for a GPU that is imagined, that one alone. Exit code 0 when all are right; whatever else a
tool finds is its own to say.
"""

from __future__ import annotations

import sys

from lntune import backends, schedule
from lntune.backends.cuda import launcher
from lntune.case import Case
from lntune.kernels import cache

SETS = {
    "all": ((64, "bfloat16", False), (64, "bfloat16", True), (97, "float32", False)),
    "few": ((16, "bfloat16", True),),
}
"""Of each operator: hidden, dtype, and whether it is the kernel for rows that lie apart."""


def main() -> None:
    """Check the set on the first GPU."""
    device = launcher.device(0)
    chosen = SETS[sys.argv[1] if len(sys.argv) > 1 else "all"]
    wrong = 0
    for plan in schedule.all_schedules().values():
        for hidden, dtype, strided in chosen if plan.kind == "gpu" else ():
            case = Case(plan.op, hidden, dtype, 512)
            kernel = cache.kernel(case, plan, plan.default(case, device), device, strided)
            verdict = backends.of(device).verify(case, device, kernel)
            print(
                f"{case} {plan.name}{', row-strided' if strided else ''}:"
                f" {verdict.message or 'right'}",
                flush=True,
            )
            wrong += not verdict.ok
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
