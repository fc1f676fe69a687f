"""bfloat16 widened in pairs: every value comes out as it is, by the operations that are meant."""

from __future__ import annotations

import re

import pytest
import torch
from grids import thinned

from lntune.backends import cuda, device_of
from lntune.backends.cuda import compiler as cuda_compiler
from lntune.backends.cuda.device_code import Program
from lntune.backends.emulated import emulator
from lntune.case import Case
from lntune.kernels import compiler
from lntune.schedule import all_schedules, get
from lntune.transforms.gpu import pairs

DEVICE = device_of("cuda:sm_90")
PLANS = {name: s for name, s in all_schedules().items() if s.kind == "gpu"}

needs_compiler = pytest.mark.skipif(
    bool(cuda.available()), reason=f"no CUDA compiler: {cuda.available()}"
)


def program_of(name: str, hidden: int, dtype: str, **changed: object) -> Program:
    """The program of default knobs, some changed."""
    plan = get(name)
    case = Case(plan.op, hidden, dtype, 8)
    setting = plan.default(case, DEVICE)
    setting = type(setting)(**{**vars(setting), **changed})
    return compiler.program(case, plan, setting, DEVICE)


@pytest.mark.parametrize("name", thinned(PLANS))
def test_vectors_are_widened_in_pairs(name: str) -> None:
    """Of vectors of bfloat16 no element is widened by itself; halves and single elements are as
    before.
    """
    source = program_of(name, 256, "bfloat16").source
    assert source.count("lntune_first((&(") == source.count("lntune_second((&(") > 0
    assert "<< (uint)16" not in source
    assert "lntune_first" not in program_of(name, 256, "float16").source
    single = program_of(name, 255, "bfloat16", vector_width=1).source
    assert "<< (uint)16" in single


@needs_compiler
def test_one_operation_each() -> None:
    """A shift for the first and a mask for the second of each pair: no half is cut out of its
    register.
    """
    ptx = cuda_compiler.to_cubin(program_of("shared_row", 1024, "bfloat16").source, "sm_90").ptx
    assert "prmt" not in ptx
    shifts, masks = (
        len(re.findall(pattern, ptx)) for pattern in (r"shl\.b32.*, 16;", r"and\.b32.*, -65536;")
    )
    assert shifts == masks > 0


WIDEN = """extern "C" __global__ void __launch_bounds__(256) \
widen(nv_bfloat16* __restrict__ x_ptr, float* __restrict__ y_ptr) {
  alignas(64) nv_bfloat16 pair[2];
  *(uint1*)pair = *(uint1*)(x_ptr + (blockIdx.x * 256 + threadIdx.x) * 2);
  y_ptr[(blockIdx.x * 256 + threadIdx.x) * 2] = lntune_first((&(pair[0])));
  y_ptr[(blockIdx.x * 256 + threadIdx.x) * 2 + 1] = lntune_second((&(pair[0])));
}
"""


def test_every_value_is_widened_as_it_is() -> None:
    """All 65,536 bfloat16, infinities, NaNs and subnormal ones among them, are the upper halves of
    what they are widened to.
    """
    bits = torch.arange(1 << 16, dtype=torch.int32)
    x = bits.to(torch.int16).view(torch.bfloat16)
    y = torch.empty(1 << 16)
    emulator.compile(pairs.SOURCE + WIDEN).launch("widen", (128, 1, 1), (256, 1, 1), [x, y])
    assert torch.equal(y.view(torch.int32), bits << 16)
