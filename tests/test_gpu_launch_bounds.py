"""Fewer registers for a thread than the compiler would take: which limits there are, what the
compiler is told, and what it makes of it.
"""

from __future__ import annotations

import dataclasses
import re

import pytest

from lntune import knobs
from lntune.backends import cuda, device_of
from lntune.case import Case
from lntune.kernels import cache, compiler
from lntune.schedule import get
from lntune.transforms.gpu import launch_bounds

DEVICE = device_of("cuda:sm_90")
LIMITED = ("shared_row", "shared_row_backward", "gated_row")
needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"needs a CUDA compiler: {cuda.available()}"
)


@pytest.mark.parametrize(
    ("most", "threads", "registers"),
    [(0, 32, 255), (0, 1024, 64), (64, 128, 64), (80, 128, 80), (96, 128, 96), (96, 256, 128)],
)
def test_a_limit_is_the_registers_of_so_many_blocks(
    most: int, threads: int, registers: int
) -> None:
    """What is left to each thread of as many blocks as fit with the limit, in steps of 8."""
    assert launch_bounds.allowed(most, threads) == registers


@pytest.mark.parametrize(
    ("most", "threads", "needed", "why"),
    [
        (0, 1024, 200, None),
        (64, 128, 64, None),
        (64, 128, 65, "65 registers for a thread's part"),
        (64, 1024, 10, "no.* second block"),
        (168, 256, 10, "no.* second block"),
        (96, 256, 10, "as many blocks fit as with 128"),
        (128, 256, 10, None),
    ],
)
def test_limits_that_do_nothing_are_refused(
    most: int, threads: int, needed: int, why: str | None
) -> None:
    """A limit that spills for sure, one that lets no further block in, and all but one of those
    that come to the same.
    """
    said = launch_bounds.reason_invalid(most, threads, needed)
    assert said is None if why is None else said and re.search(why, said)


@pytest.mark.parametrize("name", LIMITED)
def test_a_limit_is_tried_last_and_is_another_kernel(name: str) -> None:
    """Limits are not in the space but among what is tried of a setting at last; the kernel has
    another place in the cache, and its first kernel alone says how many blocks there are to be.
    """
    plan = get(name)
    case = Case(plan.op, 1024, "float32", 4096)
    default = plan.default(case, DEVICE)
    assert all(setting.max_registers == 0 for setting in plan.space(case, DEVICE))
    refined = plan.refined(default, case, DEVICE)
    assert refined
    assert {dataclasses.replace(k, max_registers=0) for k in refined} == {default}
    limited = refined[0]
    assert knobs.unrefined(limited) == default
    paths = {cache.path_of(case, plan, k, DEVICE) for k in (default, limited)}
    assert len(paths) == 2
    program = compiler.program(case, plan, limited, DEVICE)
    threads = program.launches[0].threads
    blocks = 65536 // (threads * limited.max_registers)
    bounds = dict(re.findall(r"__launch_bounds__\(([\d, ]+)\) (\w+)\(.*\) \{", program.source))
    first, *others = (
        {name: bound for bound, name in bounds.items()}[one.kernel] for one in program.launches
    )
    assert first == f"{threads}, {blocks}"
    assert all("," not in other for other in others)


@needs_compiler
def test_the_compiler_obeys() -> None:
    """ptxas takes no more registers than asked for."""
    plan, case = get("shared_row"), Case("layer_norm", 1024, "float32", 4096)
    default = plan.default(case, DEVICE)
    registers = [
        cuda.inspect_kernel(
            program.source, "sm_90", program.launches[0].threads, machine=False
        ).resources.registers
        for program in (
            compiler.program(case, plan, dataclasses.replace(default, max_registers=n), DEVICE)
            for n in (0, 64)
        )
    ]
    assert registers[1] <= 64 < registers[0]
