"""The emulator of GPU kernels: right kernels give right results in every order, and each kind of
wrong kernel is caught.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lntune.backends.emulated import emulator
from lntune.backends.emulated.emulator import (
    BarrierError,
    BoundsError,
    EmulatorError,
    MisalignedError,
    RaceError,
    Traffic,
)
from lntune.backends.emulated.translate import kernels_of
from lntune.errors import InputError

ORDERS = pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
ANY_ORDER = ("forward", "backward", "shuffled")


@functools.cache
def program(parameters: str, body: str, bound: int = 1024) -> emulator.Program:
    """A source with one kernel `k`."""
    head = f'extern "C" __global__ void __launch_bounds__({bound}) k({parameters})'
    return emulator.compile(
        f"#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n{head};\n{head} {{\n{body}\n}}\n"
    )


def run(
    parameters: str,
    body: str,
    *arguments: Any,
    grid: int = 1,
    block: Any = 32,
    shared: int = 0,
    order: str = "forward",
) -> Traffic:
    """Launch a kernel given by its parameters and body."""
    sizes = block if isinstance(block, tuple) else (block, 1, 1)
    return program(parameters, body).launch("k", (grid, 1, 1), sizes, arguments, shared, order)


def numbers(*shape: int) -> torch.Tensor:
    """Small whole numbers, which add up without an error in any order."""
    return (
        torch.arange(torch.tensor(shape).prod().item(), dtype=torch.float32).reshape(shape) % 19 - 9
    )


WARP_SUM = """
  float v = x[blockIdx.x * blockDim.x + threadIdx.x];
  unsigned mask = __activemask();
  for (int d = 16; d; d >>= 1) v += __shfl_down_sync(mask, v, d, 32);
"""
BLOCK_SUM = f"""
  __shared__ alignas(64) float part[32];
  __shared__ float total[1];
  {WARP_SUM}
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {{
    v = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0.0f;
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(0xffffffffu, v, d);
    if (threadIdx.x == 0) ((volatile float*)total)[0] = v;
  }}
  __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = total[0];
"""


@ORDERS
def test_wide_accesses_are_seen_whole(order: str) -> None:
    """A float4 addition is right, and counts one access of 16 bytes where the source has one."""
    x, y = numbers(1024), torch.full((1024,), torch.nan)
    body = (
        "int i = blockIdx.x * 64 + threadIdx.x; float4 a = ((float4*)x_ptr)[i]; a.x += 1.0f; a.w -="
        " 1.0f; *(float4*)(y_ptr + i * 4) = a;"
    )
    traffic = run(
        "float* __restrict__ x_ptr, float* __restrict__ y_ptr",
        body,
        x,
        y,
        grid=4,
        block=64,
        order=order,
    )
    assert torch.equal(y, x + torch.tensor([1.0, 0.0, 0.0, -1.0]).repeat(256))
    assert (traffic["x"].loaded, traffic["x"].loads, traffic["x"].stored, traffic["x"].widest) == (
        4096,
        256,
        0,
        16,
    )
    assert (traffic["y"].stored, traffic["y"].stores, traffic["y"].loaded, traffic["y"].widest) == (
        4096,
        256,
        0,
        16,
    )


@pytest.mark.parametrize(
    ("load", "count"),
    [
        ("float v = x[i];", 1),
        ("const float& r = x[i]; float v = r;", 1),
        ("float v = __ldg(x + i);", 1),
        ("float v = __ldcs(x + i) + x[i];", 2),
        ("float v = max(x[i], x[i]);", 2),
        ("volatile const float* p = x; float v = p[i];", 1),
    ],
)
def test_loads_through_pointers_to_constants_are_counted(load: str, count: int) -> None:
    """What is declared const is read like the rest, however the load is written."""
    x, y = numbers(32), torch.empty(32)
    traffic = run(
        "const float* __restrict__ x, float* y",
        f"int i = threadIdx.x; {load} __stcs(y + i, v);",
        x,
        y,
    )
    assert traffic["x"].loads == 32 * count
    assert traffic["y"].stores == 32
    assert torch.equal(y, x * (2 if "+ x" in load else 1))


@pytest.mark.parametrize(
    ("dtype", "kind", "width"),
    [
        ("float16", "half2", 4),
        ("float16", "half4", 8),
        ("float16", "uint4", 16),
        ("bfloat16", "nv_bfloat162", 4),
        ("float32", "float2", 8),
    ],
)
def test_a_vector_passed_by_value_is_one_access(dtype: str, kind: str, width: int) -> None:
    """A load in a call's argument and a store of a call's result count once, in full width; so do
    TVM's own vectors of four halves.
    """
    own = """
template <typename T, typename TVec2>
struct __align__(8) half4_bfloat164 {
  T x, y, z, w;
  __host__ __device__ half4_bfloat164() : x(T(0)), y(T(0)), z(T(0)), w(T(0)) {}
};
using half4 = half4_bfloat164<__half, __half2>;
"""
    source = f"""{own}
__device__ {kind} same({kind} v) {{ return v; }}
extern "C" __global__ void k(const {kind}* x_ptr, {kind}* y_ptr) {{
  y_ptr[threadIdx.x] = same(x_ptr[threadIdx.x]);
}}
"""
    x = numbers(32 * 8).to(getattr(torch, dtype))
    y = torch.zeros_like(x)
    traffic = emulator.compile(source).launch("k", (1, 1, 1), (16, 1, 1), [x, y])
    done = 16 * width // x.element_size()
    assert torch.equal(y[:done], x[:done])
    assert not y[done:].any()
    assert (traffic["x"].loads, traffic["x"].widest, traffic["y"].stores, traffic["y"].widest) == (
        16,
        width,
        16,
        width,
    )


@ORDERS
def test_a_warp_sums_by_shuffles(order: str) -> None:
    """Lane 0 has the sum of its warp's values."""
    x, y = numbers(4, 64), torch.empty(4, 2)
    run(
        "float* x, float* y",
        f"{WARP_SUM} if (threadIdx.x % 32 == 0) y[blockIdx.x * 2 + threadIdx.x / 32] = v;",
        x,
        y,
        grid=4,
        block=64,
        order=order,
    )
    assert torch.equal(y, x.reshape(4, 2, 32).sum(2))


@ORDERS
@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_a_block_sums_through_shared_memory(threads: int, order: str) -> None:
    """Warps leave their sums in shared memory, the first adds them, and all read the result behind
    a barrier.
    """
    x = numbers(3, threads)
    y = torch.empty_like(x)
    run("float* x, float* y", BLOCK_SUM, x, y, grid=3, block=threads, order=order)
    assert torch.equal(y, x.sum(1, keepdim=True).expand_as(y))


@ORDERS
def test_a_tile_is_transposed_in_dynamic_shared_memory(order: str) -> None:
    """Shared memory of the size the launch asks for, in a block of two dimensions."""
    x, y = numbers(32, 32), torch.empty(32, 32)
    body = """
  extern __shared__ __align__(64) uchar buf_dyn_shmem[];
  float* tile = (float*)buf_dyn_shmem;
  int c = threadIdx.x;
  for (int r = threadIdx.y; r < 32; r += blockDim.y) tile[r * 33 + c] = x[r * 32 + c];
  __syncthreads();
  for (int r = threadIdx.y; r < 32; r += blockDim.y) y[r * 32 + c] = tile[c * 33 + r];
"""
    head = "#define uchar unsigned char\n"
    source = f'{head}extern "C" __global__ void k(float* x, float* y) {{{body}}}'
    emulator.compile(source).launch("k", (1, 1, 1), (32, 8, 1), [x, y], 32 * 33 * 4, order)
    assert torch.equal(y, x.T)
    with pytest.raises(BoundsError, match="dynamic shared memory"):
        emulator.compile(source).launch("k", (1, 1, 1), (32, 8, 1), [x, y], 32 * 33 * 4 - 8, order)


def test_shuffles_and_votes_follow_their_definitions() -> None:
    """Up, down, xor and indexed shuffles within a width, and the votes, as the programming guide
    has them.
    """
    y = torch.empty(8, 32, dtype=torch.int32)
    body = """
  int l = threadIdx.x, i = 0, live = __popc(__activemask());
  y[32 * i++ + l] = __shfl_up_sync(~0u, l, 3, 8);
  y[32 * i++ + l] = __shfl_down_sync(~0u, l, 3, 16);
  y[32 * i++ + l] = __shfl_xor_sync(~0u, l, 5, 32);
  y[32 * i++ + l] = __shfl_sync(~0u, l, 9, 8);
  y[32 * i++ + l] = __ballot_sync(~0u, l % 3 == 0);
  y[32 * i++ + l] = __any_sync(~0u, l == 40) * 2 + __all_sync(~0u, l < 32);
  y[32 * i++ + l] = __syncthreads_count(l < 5);
  y[32 * i++ + l] = live;
"""
    run("int* y", body, y)
    lanes = torch.arange(32, dtype=torch.int32)
    assert torch.equal(y[0], torch.where(lanes % 8 >= 3, lanes - 3, lanes))
    assert torch.equal(y[1], torch.where(lanes % 16 + 3 < 16, lanes + 3, lanes))
    assert torch.equal(y[2], lanes ^ 5)
    assert torch.equal(y[3], lanes // 8 * 8 + 1)
    assert torch.equal(
        y[4], torch.full((32,), sum(1 << i for i in range(0, 32, 3)), dtype=torch.int32)
    )
    assert torch.equal(y[5:], torch.tensor([[1], [5], [32]], dtype=torch.int32).expand(3, 32))


def every_half(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 bit patterns of a type of two bytes."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float16, "half"), (torch.bfloat16, "nv_bfloat16")]
)
def test_narrow_floats_are_rounded_as_pytorch_rounds_them(dtype: torch.dtype, kind: str) -> None:
    """From and to float, bit by bit: every number of the type, and the floats at and beside the
    middle between neighbours.
    """
    values = every_half(dtype)
    wide = torch.empty(2**16)
    run(
        f"{kind}* x, float* y",
        "int i = blockIdx.x * 1024 + threadIdx.x; y[i] = (float)x[i];",
        values,
        wide,
        grid=64,
        block=1024,
    )
    assert torch.equal(wide.nan_to_num(nan=7.0), values.float().nan_to_num(nan=7.0))
    finite = wide[wide.isfinite()].sort().values
    middle = torch.cat(
        [
            (finite[1:].double() + finite[:-1].double()).float() / 2,
            finite[-1:] * 1.002,
            -finite[-1:] * 1.002,
        ]
    )
    beside = torch.stack(
        [
            middle,
            middle.nextafter(torch.tensor(9e9)),
            middle.nextafter(torch.tensor(-9e9)),
            middle * 1e-5,
            middle * 1.37,
        ]
    )
    floats = torch.cat(
        [
            beside.flatten(),
            wide[~wide.isnan()],
            torch.zeros(-(beside.numel() + int((~wide.isnan()).sum())) % 1024),
        ]
    )
    narrow = torch.empty(len(floats), dtype=dtype)
    body = f"int i = blockIdx.x * 1024 + threadIdx.x; y[i] = ({kind})x[i];"
    run(f"float* x, {kind}* y", body, floats, narrow, grid=len(floats) // 1024, block=1024)
    assert torch.equal(narrow.view(torch.int16), floats.to(dtype).view(torch.int16))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float16, "half"), (torch.bfloat16, "nv_bfloat16")]
)
def test_narrow_arithmetic_is_rounded_once(dtype: torch.dtype, kind: str) -> None:
    """Sums, products, quotients and comparisons of narrow floats are what PyTorch computes."""
    x = every_half(dtype)[::7][: 9 * 1024].clone()
    z = x.flip(0).roll(5)
    y = torch.empty(4, len(x), dtype=dtype)
    body = f"""
  int i = blockIdx.x * 1024 + threadIdx.x, n = {len(x)};
  y[i] = x[i] + z[i];
  y[n + i] = x[i] * z[i];
  y[2 * n + i] = x[i] / z[i];
  y[3 * n + i] = x[i] < z[i] ? -x[i] : __habs(z[i]);
"""
    run(f"{kind}* x, {kind}* z, {kind}* y", body, x, z, y, grid=9, block=1024)
    right = torch.stack([x + z, x * z, x / z, torch.where(x < z, -x, z.abs())])
    assert torch.equal(y.float().nan_to_num(nan=7.0), right.float().nan_to_num(nan=7.0))


@ORDERS
def test_atomic_updates_are_no_race(order: str) -> None:
    """All threads of all blocks may add to the same element, and to one in shared memory between
    barriers.
    """
    x, y = numbers(4, 128), torch.zeros(2)
    body = """
  __shared__ float s;
  if (threadIdx.x == 0) s = 0.0f;
  __syncthreads();
  float v = x[blockIdx.x * 128 + threadIdx.x];
  atomicAdd(y, v); atomicAdd(&s, v);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(y + 1, s);
"""
    traffic = run("float* x, float* y", body, x, y, grid=4, block=128, order=order)
    assert y.tolist() == [x.sum().item()] * 2
    assert traffic["y"].stores == traffic["y"].loads == 4 * 129


def test_lanes_may_leave_and_take_data_around_a_warps_barrier() -> None:
    """__syncwarp and shuffles order what the lanes of a warp do in shared memory, also when only
    some take part.
    """
    y = torch.empty(32)
    body = """
  __shared__ float s[32];
  int l = threadIdx.x;
  s[l] = l; __syncwarp(); float v = s[31 - l]; __shfl_sync(~0u, v, 0); s[l] = 2 * v; __syncwarp();
  v = s[l ^ 1];
  if (l < 8) { __syncwarp(0xff); s[l] = v; __syncwarp(0xff); v = s[7 - l]; }
  y[l] = v;
"""
    for order in ANY_ORDER:
        run("float* y", body, y, order=order)
        swapped = [2.0 * (31 - (i ^ 1)) for i in range(32)]
        assert y.tolist() == [swapped[7 - i] if i < 8 else swapped[i] for i in range(32)]


def test_scalars_arrive_in_the_parameters_type() -> None:
    """Numbers are converted; booleans, halves and 64 bits included."""
    y = torch.empty(6, dtype=torch.float64)
    body = "y[0] = a; y[1] = b; y[2] = c; y[3] = (float)d; y[4] = (float)e; y[5] = f;"
    run(
        "double* y, float a, int64_t b, int c, half d, nv_bfloat16 e, bool f",
        body,
        y,
        0.1,
        2**40 + 1,
        -7,
        0.1,
        0.1,
        True,
        block=1,
    )
    narrow = [
        torch.tensor(0.1, dtype=t).item() for t in (torch.float32, torch.float16, torch.bfloat16)
    ]
    assert y.tolist() == [narrow[0], 2.0**40 + 1, -7.0, narrow[1], narrow[2], 1.0]


def test_what_lies_beside_a_tensor_stays() -> None:
    """A kernel works on copies; only the tensors it stores to change, and none after an error."""
    memory = numbers(96)
    kept = memory.clone()
    with pytest.raises(BoundsError):
        run("float* y", "y[threadIdx.x + 1] = 5.0f;", memory[32:64])
    assert torch.equal(memory, kept)
    run("float* y", "y[threadIdx.x] = 5.0f;", memory[32:64])
    assert torch.equal(memory, torch.cat([kept[:32], torch.full((32,), 5.0), kept[64:]]))


def test_a_tensor_given_twice_is_one_buffer() -> None:
    """In-place calls see their own stores; tensors that overlap in part are refused."""
    x = numbers(64)
    right = x + 2
    run(
        "float* x, float* y",
        "int i = threadIdx.x; y[i] = x[i] + 1.0f; y[i] = x[i] + 1.0f;",
        x,
        x,
        block=64,
    )
    assert torch.equal(x, right)
    with pytest.raises(InputError, match="overlap in part"):
        run("float* x, float* y", "y[0] = x[0];", x[:40], x[8:])


# What is wrong: parameters `float* x`, `float* y` (32 elements each unless said), 64 threads, in
# every order.
RACES = {
    "no barrier between the store and a load of another warp": (
        "__shared__ float s[64]; s[i] = x[0]; y[i % 64] = s[63 - i];"
    ),
    "no barrier between the load and the next store": (
        "__shared__ float s[64]; s[i] = x[0]; __syncthreads(); float v = s[63 - i]; s[i] = v;"
    ),
    "two warps store to one shared element": (
        "__shared__ float s[2]; if (i % 32 == 0) s[0] = i; __syncthreads(); y[i] = s[0];"
    ),
    "lanes of a warp without a barrier": "__shared__ float s[64]; s[i] = x[0]; y[i] = s[i ^ 1];",
    "a warp's barrier does not order two warps": (
        "__shared__ float s[64]; s[i] = x[0]; __syncwarp(); y[i] = s[i ^ 32];"
    ),
    "a barrier of some lanes does not order the others": (
        "__shared__ float s[64]; s[i] = 1.0f; if (i % 32 < 8) __syncwarp(0xff); y[i] = s[i ^ 8];"
    ),
    "all threads update a shared result": (
        "__shared__ float s[1]; if (i == 0) s[0] = 4.0f; __syncthreads(); s[0] = s[0] / 2.0f; y[i]"
        " = s[0];"
    ),
    "one global element": "y[0] = x[0];",
    "an atomic update and a plain load": "atomicAdd(y, 1.0f); x[i] = y[0];",
    "between neighbours of different width": (
        "if (i % 2 == 0) *(float2*)(y + i) = make_float2(1.0f, 2.0f); else y[i] = 3.0f;"
    ),
}


@ORDERS
@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in RACES.items()])
def test_races_in_a_block_are_caught(body: str, order: str) -> None:
    """Whatever the order of the threads, and whether or not the result happens to be right."""
    with pytest.raises(
        RaceError,
        match=(
            r"k, block \(0, 0, 0\), thread \(\d+, 0, 0\): .* of 4|8 bytes at offset \d+ of .* races"
            r" with a"
        ),
    ):
        run(
            "float* x, float* y",
            f"int i = threadIdx.x; {body}",
            numbers(64),
            torch.zeros(64),
            block=64,
            order=order,
        )


@ORDERS
@pytest.mark.parametrize(
    "body", ["y[0] = blockIdx.x;", "y[blockIdx.x] = y[0];", "y[1 - blockIdx.x] = y[blockIdx.x];"]
)
def test_races_between_blocks_are_caught(body: str, order: str) -> None:
    """Nothing orders two blocks, so what one stores no other may touch; the other way round,
    too.
    """
    with pytest.raises(RaceError, match="another block"):
        run("float* y", body, numbers(4), grid=2, block=1, order=order)


def test_blocks_may_use_the_same_shared_memory_and_read_the_same_input() -> None:
    """Each block's shared memory is its own, and loads do not conflict."""
    y = torch.empty(4)
    run(
        "float* x, float* y",
        "__shared__ float s; s = x[0]; y[blockIdx.x] = s;",
        numbers(4),
        y,
        grid=4,
        block=1,
    )
    assert y.tolist() == [-9.0] * 4


BARRIERS = {
    "in a branch": (
        "if (threadIdx.x < 16) __syncthreads();",
        r"divergent barrier: .* line 5, and thread \(16, 0, 0\) has ended",
    ),
    "after an early return": (
        "if (threadIdx.x > 40) return; __syncthreads(); y[threadIdx.x] = 1.0f;",
        r"thread \(41, 0, 0\) has ended",
    ),
    "at two places": (
        "if (threadIdx.x < 32) {\n __syncthreads(); } else {\n __syncthreads(); }",
        r"line 6, and thread .* the __syncthreads of line 7",
    ),
    "a lane missing": (
        "if (threadIdx.x % 32 != 7) y[threadIdx.x] = __shfl_down_sync(~0u, 1.0f, 1);",
        r"lane 7 does not come: thread \(\d+, 0, 0\) has ended",
    ),
    "not in its own mask": (
        "y[threadIdx.x] = __shfl_sync(0xffff, 1.0f, 0);",
        "the calling lane 16 is missing",
    ),
    "masks that differ": (
        "y[threadIdx.x] = __shfl_sync(threadIdx.x % 2 ? ~0u : 0xfffffffdu, 1.0f, 0);",
        "mask 0x",
    ),
    "a warp waits for shuffles, another at a barrier": (
        "if (threadIdx.x < 33) __syncthreads(); else __syncwarp();",
        "__syncwarp of line 5",
    ),
}


@ORDERS
@pytest.mark.parametrize(
    ("body", "message"), [pytest.param(*case, id=name) for name, case in BARRIERS.items()]
)
def test_threads_that_wait_for_others_that_do_not_come_are_caught(
    body: str, message: str, order: str
) -> None:
    """The message names who waits where, and who does not come; the lines are those of the
    source.
    """
    with pytest.raises(BarrierError) as caught:
        run("float* y", body, torch.zeros(64), block=64, order=order)
    if order == "forward":
        assert re.search(message, str(caught.value)), caught.value


@pytest.mark.slow
def test_a_thread_that_spins_is_caught() -> None:
    """A thread that waits for another's store without a barrier is a deadlock, not a test that
    hangs.
    """
    with pytest.raises((BarrierError, RaceError)):
        run(
            "int* y",
            "if (threadIdx.x == 0) while (((volatile int*)y)[0] == 0) {} else y[0] = 1;",
            torch.zeros(1, dtype=torch.int32),
            block=2,
        )


BOUNDS = {
    "a load behind the end": (
        "y[threadIdx.x] = x[threadIdx.x + 1];",
        r"thread \(31, 0, 0\): load of 4 bytes at offset 128 of x, which has 128 bytes",
    ),
    "a load before the beginning": (
        "y[threadIdx.x] = x[(int)threadIdx.x - 1];",
        "load of 4 bytes at offset -4 of x",
    ),
    "a store behind the end": ("y[threadIdx.x + 1] = 1.0f;", "store of 4 bytes at offset 128 of y"),
    "a wide load over the end": (
        "*(float4*)(y) = ((float4*)x)[threadIdx.x];",
        "load of 16 bytes at offset 128 of x",
    ),
    "an atomic update": (
        "atomicAdd(y + threadIdx.x + 1, 1.0f);",
        "atomic update of 4 bytes at offset 128 of y",
    ),
    "shared memory": (
        "__shared__ float s[32]; __shared__ float t[32]; t[threadIdx.x] = s[threadIdx.x + 1];",
        "load of 4 bytes at offset 128 of shared memory s",
    ),
    "the last shared array": (
        "__shared__ float s[32]; s[threadIdx.x + 1] = 0;",
        "store of 4 bytes at offset 128 of shared memory s",
    ),
    "dynamic shared memory that was not asked for": (
        "extern __shared__ float s[]; s[threadIdx.x] = 0;",
        "dynamic shared memory, which has 0 bytes",
    ),
    "a pointer to nowhere": ("y[threadIdx.x] = *(float*)64;", "outside of all buffers"),
    "another thread's stack": ("float a[1]; a[0] = 1; y[threadIdx.x] = a[100000];", "local memory"),
}


@pytest.mark.parametrize(
    ("body", "message"), [pytest.param(*case, id=name) for name, case in BOUNDS.items()]
)
def test_accesses_out_of_bounds_are_caught(body: str, message: str) -> None:
    """One element beside a buffer is enough; the message says where."""
    if "(float4*)" in body:
        body = f"if (threadIdx.x == 8) {body}"
    with pytest.raises(BoundsError, match=message):
        run("float* x, float* y", body, numbers(32), torch.zeros(32))


@pytest.mark.parametrize(
    ("at", "kind", "fine"),
    [
        (1, "float4", False),
        (2, "float4", False),
        (4, "float4", True),
        (1, "float2", False),
        (2, "float2", True),
    ],
)
def test_wide_accesses_must_be_aligned(at: int, kind: str, fine: bool) -> None:
    """A tensor keeps its place between multiples of 256 bytes, so one that begins at an odd place
    shows what a GPU would refuse.
    """
    memory = torch.zeros(256 // 4 + 64)
    first = (-memory.data_ptr() // 4) % 64 + at
    y = memory[first : first + 8]
    body = f"{kind} v; v.x = 1.0f; v.y = 2.0f; *({kind}*)y = v;"
    if fine:
        run("float* y", body, y, block=1)
        assert y[:2].tolist() == [1.0, 2.0]
    else:
        with pytest.raises(
            MisalignedError,
            match=rf"store of {16 if kind == 'float4' else 8} bytes at offset 0 of y",
        ):
            run("float* y", body, y, block=1)


def test_shared_memory_begins_as_nan() -> None:
    """In every block, and dynamic shared memory too; what a lane gets from one that is not there is
    NaN as well.
    """
    y = torch.zeros(2, 3, 16)
    body = """
  __shared__ float s[16]; extern __shared__ float d[];
  float *o = y + blockIdx.x * 48 + threadIdx.x;
  o[0] = s[threadIdx.x]; o[16] = d[threadIdx.x]; o[32] = __shfl_down_sync(~0u, 1.0f, 8);
  s[threadIdx.x] = d[threadIdx.x] = 1.0f;
"""
    run("float* y", body, y, grid=2, block=16, shared=64)
    assert y[:, :2].isnan().all()
    assert y[:, 2].isnan().tolist() == [[False] * 8 + [True] * 8] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([torch.zeros(4)], r"arguments of k: got 1, expected 2 \(y, n\)"),
        (
            [torch.zeros(4, dtype=torch.float64), 1],
            r"argument y: got a tensor of float64, expected float32",
        ),
        ([1.0, 1], "argument y: got 1.0, expected a tensor"),
        ([torch.zeros(4), 1.5], "argument n: got 1.5, expected a number"),
        ([torch.zeros(4), torch.zeros(1)], "argument n"),
        ([torch.zeros(4), 2**40], "a number that int holds"),
        ([torch.zeros(4, 4).T, 1], "contiguous"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: list[Any], message: str) -> None:
    """Number, dtype, kind and layout of the arguments are checked against the kernel's
    signature.
    """
    with pytest.raises(InputError, match=message):
        run("float* y, int n", "y[threadIdx.x] = n;", *arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel": "q"}, "kernel: got 'q', expected one of k"),
        ({"grid": (0, 1, 1)}, "grid"),
        ({"block": (1025, 1, 1)}, "block"),
        ({"block": (33, 2, 1)}, "at most 64 for k"),
        ({"shared": 1 << 20}, "shared"),
        ({"order": "sideways"}, "order"),
    ],
)
def test_launches_a_gpu_refuses_are_refused(changed: dict[str, Any], message: str) -> None:
    """A name that is not there, an empty grid, a block above its bound, too much shared memory."""
    launch = {
        "kernel": "k",
        "grid": (1, 1, 1),
        "block": (32, 1, 1),
        "arguments": [torch.zeros(64)],
    } | changed
    with pytest.raises(InputError, match=re.escape(message)):
        program("float* y", "y[threadIdx.x] = 1;", 64).launch(**launch)


def test_a_source_that_does_not_compile_says_why() -> None:
    """The compiler's first errors, with the source's line; and a source without a kernel."""
    with pytest.raises(
        EmulatorError, match=r"does not compile: kernel\.cu:5:\d+: error: .*nothing"
    ):
        run("float* y", "y[0] = nothing;", torch.zeros(1))
    with pytest.raises(EmulatorError, match="no kernel"):
        emulator.compile("int f() { return 1; }")


def test_a_program_is_compiled_once_and_a_damaged_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library is cached by content; one that was cut short is compiled anew."""
    # what is damaged goes with the library all kernels share, which others are linking
    monkeypatch.setenv("LNTUNE_CACHE_DIR", str(tmp_path))
    source = 'extern "C" __global__ void once(float* y) { y[0] = 3.0f; }'
    emulator.compile(source)
    library = emulator._compiled(source)
    assert library.parent == tmp_path / "emulator"
    stamp = library.stat().st_mtime_ns
    emulator.compile(source)
    assert library.stat().st_mtime_ns == stamp
    y = torch.zeros(1)
    library.unlink()  # its memory is mapped: a new file takes its place
    library.write_bytes(b"\x7fELF")
    emulator.compile(source).launch("once", (1, 1, 1), (1, 1, 1), [y])
    assert y.item() == 3.0


def test_another_cache_folder_in_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels of another cache folder run beside those of the first."""
    for folder in (None, tmp_path):
        if folder is not None:
            monkeypatch.setenv("LNTUNE_CACHE_DIR", str(folder))
        y = torch.zeros(2)
        source = (
            'extern "C" __global__ void fives(float* y) { y[threadIdx.x] = 5.0f; __syncthreads(); }'
        )
        emulator.compile(source).launch("fives", (1, 1, 1), (2, 1, 1), [y])
        assert y.tolist() == [5.0, 5.0]
    assert list(tmp_path.glob("emulator/kernel-*"))


def test_signatures_are_read_as_tvm_writes_them() -> None:
    """Types lose their qualifiers, names their suffix, and a bound is the most threads a block may
    have.
    """
    source = """
extern "C" __global__ void __launch_bounds__(64, 2) \
a(const half* __restrict__ x_ptr, unsigned int n, int64_t rows);
extern "C" __global__ void __launch_bounds__(64, 2) \
a(const half* __restrict__ x_ptr, unsigned int n, int64_t rows) {}
__global__ void b() {}
"""
    kernels = kernels_of(source)
    assert [(p.name, p.type, p.pointer) for p in kernels["a"].parameters] == [
        ("x", "half", True),
        ("n", "unsigned int", False),
        ("rows", "long long", False),
    ]
    assert (kernels["a"].bound, kernels["b"].bound, kernels["b"].parameters) == (64, 1024, ())


def test_ten_kernels_at_a_time_do_not_mix() -> None:
    """Launches of several Python threads take turns."""
    from concurrent.futures import ThreadPoolExecutor

    def one(k: int) -> bool:
        x = numbers(3, 96) + k
        y = torch.empty_like(x)
        run("float* x, float* y", BLOCK_SUM, x, y, grid=3, block=96)
        return torch.equal(y, x.sum(1, keepdim=True).expand_as(y))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(10)))
