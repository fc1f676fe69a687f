"""Cache hints of GPU kernels: where they are set, that they change nothing else, and where they
have no place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from grids import product

from lntune import check
from lntune.backends import cuda, device_of
from lntune.backends.emulated import calls as emulated
from lntune.case import Case
from lntune.device import Device
from lntune.errors import BuildError
from lntune.kernels import candidate_facts, compiler
from lntune.measure import trial
from lntune.measure.jobs import Candidate, Check
from lntune.schedule import Schedule, get
from lntune.transforms.gpu import cache_hints

GPU = device_of("cuda:sm_90")
UNCACHED = msgspec.structs.replace(GPU, cores=3, l2=0)
"""With no cache to fit into, so that a few rows are as good as millions."""
PLANS = {"shared_row": ("x", "y"), "shared_row_backward": ("dy", "x", "dx")}
needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"needs a CUDA compiler: {cuda.available()}"
)


def marked(plan: Schedule, case: Case, device: Device = UNCACHED, **values: Any) -> Any:
    """Default knobs with hints, and these values."""
    return dataclasses.replace(plan.default(case, device), cache_hints=True, **values)


@pytest.mark.parametrize(
    ("name", "dtype", "hidden"),
    product(tuple(PLANS), ("float32", "float16", "bfloat16"), (1000, 1004, 1023, 128, 96)),
)
def test_marked_kernels_are_right(name: str, dtype: str, hidden: int) -> None:
    """Wide accesses, single elements and several rows to a block: every load and store of a matrix
    is marked, and the results are right.
    """
    plan = get(name)
    case = Case(plan.op, hidden, dtype, 512)
    setting = marked(plan, case)
    assert plan.valid(setting, case, UNCACHED) is None
    program = compiler.program(case, plan, setting, UNCACHED)
    first = program.source[program.source.rindex(" main_kernel(") :].split("\n}\n")[0]
    body = first[first.index("{") :]
    for pointer in PLANS[name]:
        uses = len(re.findall(rf"\b{pointer}_ptr\b", body))
        assert (
            0 < uses == len(re.findall(rf"__(?:ldcs|stcs)\((?:\(\w+\*\)\()?{pointer}_ptr\b", body))
        )
    verdict = check.verify(
        case, emulated.kernel(case, program, "shuffled"), check.ALIGNED, device=UNCACHED
    )
    assert verdict.ok, verdict.message


@pytest.mark.parametrize("name", PLANS)
def test_a_row_in_shared_memory(name: str) -> None:
    """What is copied to shared memory is read once as well."""
    plan = get(name)
    case = Case(plan.op, 1000, "float32", 512)
    program = compiler.program(
        case,
        plan,
        marked(plan, case, row_storage="shared", threads_per_row=128, rows_per_block=1),
        UNCACHED,
    )
    assert "__ldcs((float4*)(x_ptr" in program.source
    assert check.verify(case, emulated.kernel(case, program), check.ALIGNED, device=UNCACHED).ok


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "arch", "hidden"),
    product(("float32", "bfloat16", "float16"), ("sm_75", "sm_90"), (1024, 1004, 1023)),
)
def test_accesses_stay_as_wide(dtype: str, arch: str, hidden: int) -> None:
    """Compiled for old and new architectures, in every dtype, marked accesses are as wide as
    others, and nothing spills.
    """
    plan = get("shared_row")
    case, inspections = Case("layer_norm", hidden, dtype, 512), []
    for setting in (plan.default(case, UNCACHED), marked(plan, case)):
        program = compiler.program(case, plan, setting, msgspec.structs.replace(UNCACHED, isa=arch))
        launch = program.launches[0]
        inspections.append(
            cuda.inspect_kernel(program.source, arch, launch.threads, launch.shared, launch.kernel)
        )
    plain, hinted = inspections
    assert hinted.resources.spill_store_bytes == hinted.resources.stack_bytes == 0
    assert (hinted.code.global_loads, hinted.code.global_stores) == (
        plain.code.global_loads,
        plain.code.global_stores,
    )


@pytest.mark.parametrize("name", PLANS)
def test_where_hints_have_no_place(name: str) -> None:
    """What is read again should stay in the cache, and what fits the cache may stay; the reason is
    given.
    """
    plan = get(name)
    case = Case(plan.op, 1024, "float32", 512)
    assert "need not leave a cache" in str(plan.valid(marked(plan, case), case, GPU))
    assert plan.valid(marked(plan, case), msgspec.structs.replace(case, rows=1 << 20), GPU) is None
    assert "read again" in str(plan.valid(marked(plan, case, row_storage="reload"), case, UNCACHED))
    if name == "shared_row_backward":
        assert "read again" in str(
            plan.valid(
                marked(
                    plan,
                    case,
                    partial_sums="separate_kernel",
                    threads_per_row=128,
                    rows_per_block=8,
                    blocks_per_sm=1,
                ),
                case,
                UNCACHED,
            )
        )


KERNEL = """extern "C" __global__ void __launch_bounds__(32) \
main_kernel(float* __restrict__ dx_ptr, float* __restrict__ x_ptr);
extern "C" __global__ void __launch_bounds__(32) \
main_kernel(float* __restrict__ dx_ptr, float* __restrict__ x_ptr) {
  float4 v = *(float4*)(x_ptr + (((int64_t)threadIdx.x) * (int64_t)4));
  if (rows[0] < 3) {
    *(float4*)(dx_ptr + ((int64_t)threadIdx.x)) = make_float4(v.x, x_ptr[(a[(1)] + 2)], v.z, v.w);
    dx_ptr[((int64_t)threadIdx.x)] = (x_ptr[0] + 1.0f);
  }
}
"""


def test_the_text_of_accesses() -> None:
    """Loads and stores, wide and of one element, with brackets inside; other pointers whose names
    end alike and declarations stay.
    """
    expected = KERNEL
    for old, new in (
        (
            "*(float4*)(x_ptr + (((int64_t)threadIdx.x) * (int64_t)4))",
            "__ldcs((float4*)(x_ptr + (((int64_t)threadIdx.x) * (int64_t)4)))",
        ),
        ("x_ptr[(a[(1)] + 2)]", "__ldcs(x_ptr + ((a[(1)] + 2)))"),
        ("(x_ptr[0] + 1.0f)", "(__ldcs(x_ptr + (0)) + 1.0f)"),
    ):
        expected = expected.replace(old, new)
    assert cache_hints.apply(KERNEL, ("x",)) == expected
    stores = cache_hints.apply(KERNEL, ("dx",))
    assert (
        "    __stcs((float4*)(dx_ptr + ((int64_t)threadIdx.x)), make_float4(v.x, x_ptr[(a[(1)] +"
        " 2)], v.z, v.w));\n" in stores
    )
    assert "    __stcs(dx_ptr + (((int64_t)threadIdx.x)), (x_ptr[0] + 1.0f));\n" in stores
    assert cache_hints.apply(cache_hints.apply(KERNEL, ("x",)), ("dx",)) == cache_hints.apply(
        KERNEL, ("x", "dx")
    )
    assert cache_hints.apply(KERNEL, ()) == KERNEL


@pytest.mark.parametrize(
    ("spoil", "parameter", "message"),
    [
        (lambda text: text, "z", "no access to z"),
        (lambda text: text.replace("x_ptr[0]", "f(x_ptr)"), "x", "form that is not known"),
        (lambda text: text.replace("x_ptr[0] +", "x_ptr[(0 +"), "x", "brackets"),
    ],
    ids=["none", "another form", "brackets"],
)
def test_source_that_is_not_understood(
    spoil: Callable[[str], str], parameter: str, message: str
) -> None:
    """A hint that cannot be set is an error of building, not a kernel without it."""
    with pytest.raises(BuildError, match=message):
        cache_hints.apply(spoil(KERNEL), (parameter,))


def test_the_tuner_checks_marked_candidates() -> None:
    """Before it costs device time a marked candidate is found to move everything once, and short
    rows of it are right in the emulator.
    """
    plan = get("shared_row")
    case = Case("layer_norm", 4096, "float32", 65536)
    setting = marked(plan, case, GPU)
    assert candidate_facts.moved(case, plan, setting, GPU) == ()
    outcome = trial.run(Check(case, GPU, Candidate.of(plan.name, setting)))
    assert outcome.status == "ok", outcome.message
