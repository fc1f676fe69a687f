"""CUDA C++ to device code, and what is read from it; none of these needs a GPU."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from lntune.backends.cuda import (
    ARCHITECTURES,
    Inspection,
    available,
    inspect_kernel,
    locate,
    nvrtc,
    ptx,
    resources,
    sass,
    to_cubin,
)
from lntune.backends.cuda.compiler import find
from lntune.backends.cuda.nvcc import Nvcc
from lntune.backends.cuda.occupancy import Occupancy, occupancy
from lntune.errors import BuildError, InputError, ToolchainError, UnknownNameError

WHY_NOT = available()
compiles = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

COPY = """
extern "C" __global__ void __launch_bounds__(256)
copy(const float4* __restrict__ x, float4* __restrict__ y) {
  int i = blockIdx.x * 256 + threadIdx.x;
  y[i] = x[i];
}
"""
HALVES = """
#include <cuda_fp16.h>
extern "C" __global__ void __launch_bounds__(256)
halves(const half* __restrict__ x, half* __restrict__ y, int n) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i < n) y[i] = x[i];
}
"""
INDEXED = """
extern "C" __global__ void indexed(const float* x, const int* at, float* y) {
  float kept[512];
  for (int i = 0; i < 512; ++i) kept[i] = x[i * 32 + threadIdx.x];
  for (int i = 0; i < 512; ++i) kept[at[i] & 511] += 1.0f;
  float sum = 0.0f;
  for (int i = 0; i < 512; ++i) sum += kept[at[i + threadIdx.x] & 511];
  y[threadIdx.x] = sum;
}
"""
# 1024 threads leave a thread 64 registers, and this one keeps 96 numbers, whose loads may not be
# moved, until the last is read.
SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(const volatile float* x, float* y) {
  float kept[96];
  #pragma unroll
  for (int i = 0; i < 96; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 96; ++i) y[(i + 1) * 1024 - threadIdx.x] = kept[95 - i] * kept[(i * 7) % 96];
}
"""
ROW_SUM = """
extern "C" __global__ void __launch_bounds__(128)
row_sum(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float parts[4];
  float v = x[blockIdx.x * 128 + threadIdx.x];
  for (int d = 16; d; d /= 2) v += __shfl_down_sync(0xffffffffu, v, d);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x == 0) y[blockIdx.x] = rsqrtf(parts[0] + parts[1] + parts[2] + parts[3]);
}
"""

# Recorded from ptxas 13.0 for sm_75 (with an old "+" form of shared memory), sm_90, and from NVRTC
# 13.5.
LOG = """kernel.cu(12): warning #1-D: something
ptxas info    : 0 bytes gmem, 256 bytes cmem[3]
ptxas info    : Compiling entry function '_Z1bILi3EEvPdi' for 'sm_75'
ptxas info    : Function properties for _Z1bILi3EEvPdi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 2 barriers, 1024+16 bytes smem, 364 bytes cmem[0], \
8 bytes cmem[2]
ptxas info    : Compile time = 21.207 ms
ptxas info    : Compiling entry function 'a' for 'sm_75'
ptxas info    : Function properties for a
    160 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 38 registers, used 0 barriers, 176 bytes cumulative stack size, \
364 bytes cmem[0]
ptxas info    : Compile time = 25.238 ms
ptxas info    : Function properties for _Z4slowfi
    16 bytes stack frame, 12 bytes spill stores, 12 bytes spill loads
"""
LOG_NVRTC = """ptxas info    : 4 bytes gmem
ptxas info    : Compiling entry function 'main_kernel' for 'sm_90'
ptxas info    : Function properties for main_kernel
ptxas         .     208 bytes stack frame, 228 bytes spill stores, 284 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 208 bytes cumulative stack size
"""
# Recorded from cuobjdump, then cut; its second column began two columns further on.
SASS = """
\tcode for sm_90

\t\tFunction : halves
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0050*/                   ISETP.GE.AND P0, PT, R7, UR4, PT ;       /* 0x0000000407007c0c */
                                                                            /* 0x000fda000bf06270 */
        /*0060*/               @P0 EXIT ;                                   /* 0x000000000000094d */
                                                                            /* 0x000fea0003800000 */
        /*0070*/                   LDC.64 R2, c[0x0][0x210] ;               /* 0x00008400ff027b82 */
        /*00b0*/                   LDG.E.U16.CONSTANT R3, desc[UR4][R2.64] ;/* 0x0000000402037981 */
        /*00d0*/                   STG.E.U16 desc[UR4][R4.64], R3 ;         /* 0x0000000304007986 */
        /*00e0*/                   EXIT ;                                   /* 0x000000000000794d */
        /*00f0*/                   BRA 0xf0;                                /* 0xfffffffc00fc7947 */
        /*0100*/                   NOP;                                     /* 0x0000000000007918 */
\t\t..........

\t\tFunction : main_kernel
        /*0070*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0080*/              @!P0 LDG.E.64.CONSTANT R4, desc[UR6][R2.64] ;
        /*0080*/               @PT LDG.E R4, desc[UR6][R2.64] ;
        /*0090*/                   LDG.E.LTC128B.S8.SYS R4, [R2] ;
        /*00a0*/                   LDG.E.ENL2.256.CONSTANT R8, R4, desc[UR4][R2.64] ;
        /*00b0*/                   LDL.64 R4, [R1+0x8] ;
        /*00c0*/                   STL [R1], R4 ;
        /*00d0*/              @UP1 STG.E.EF.64 desc[UR6][R2.64], R4 ;
        /*00e0*/                   STS.128 [R2], R4 ;
        /*00f0*/                   LDS.U8 R4, [UR4] ;
        /*0100*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R2.64] ;
        /*0110*/                   SHFL.DOWN PT, R5, R2, 0x10, 0x1f ;
        /*0120*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0130*/                   WARPSYNC.ALL ;
        /*0140*/                   MUFU.RSQ R5, R6 ;
        /*0150*/                   ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU PT, RZ, desc[UR4][R2.64], R5 ;
        /*0160*/                   LD.E R4, [R2.64] ;
        /*0170*/                   FROB9X.ODD.128 R5, R6 ;
        /*0180*/                   EXIT ;
"""
# Recorded from nvdisasm, then cut.
NVDISASM = """
//--------------------- .text.row_sum             --------------------------
\t.section\t.text.row_sum,"ax",@progbits
        .other          row_sum,@"STO_CUDA_ENTRY STV_DEFAULT"
row_sum:
.text.row_sum:
        /*0070*/                   LDG.E.CONSTANT R2, desc[UR6][R2.64] ;
        /*0220*/                   LDS.128 R4, [UR4] ;
        /*02a0*/                   STG.E desc[UR6][R2.64], R5 ;
        /*02b0*/                   EXIT ;
.L_x_0:
        /*02c0*/                   BRA `(.L_x_0);
        /*02d0*/                   NOP;
"""
PTX = """
.version 9.0
.target sm_90
.address_size 64
.visible .entry main_kernel(
	.param .u64 .ptr .align 1 main_kernel_param_0, // { a brace in a comment; ld.global.f32
	.param .align 8 .b8 main_kernel_param_1[16]
)
.maxntid 128, 1, 1
{
	.reg .pred 	%p<3>;
	.reg .b32 	%r<16>;
	.shared .align 4 .b8 parts[16];
	ld.param.b64 	%rd1, [main_kernel_param_0];
	ld.global.nc.v4.b32 	{%r1, %r2, %r3, %r4}, [%rd4];
	ld.global.nc.L1::no_allocate.v8.b32 	{%r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8}, [%rd4];
	@%p1 bra 	$L__BB0_2;
	// begin inline asm
	{ cvt.f32.f16 %r5, %rs1;}

	// end inline asm
	st.shared::cta.v2.f32 	[%r9], {%r1, %r2};
$L__BB0_2:
	bar.sync 	0;
	bar.warp.sync 	-1;
	shfl.sync.down.b32	%r5|%p2, %r6, 16, 31, -1;
	@!%p2 st.global.cs.b16 	[%rd5], %rs1;
	ld.local.v2.b64 	{%rd6, %rd7}, [%rd8];
	rsqrt.approx.ftz.f32 	%r7, %r8;
	div.s32 	%r7, %r8, %r9;
	cp.async.cg.shared.global [%r1], [%rd1], 16;
	cp.async.commit_group;
	red.global.add.f32 	[%rd1], %r1;
	ret;

}
"""


def test_resources_are_read_per_kernel() -> None:
    """Each kernel of a log gets its own registers, memory and barriers; a called function's stack
    and spills go to its caller.
    """
    kernels = resources.parse(LOG)
    assert list(kernels) == ["_Z1bILi3EEvPdi", "a"]
    assert kernels["_Z1bILi3EEvPdi"] == resources.Resources(
        "_Z1bILi3EEvPdi", "sm_75", 24, 0, 0, 0, 1040, 372, 2
    )
    assert kernels["a"] == resources.Resources("a", "sm_75", 38, 176, 16, 20, 0, 364, 0)


def test_resources_are_read_from_nvrtc() -> None:
    """NVRTC marks continued lines in its own way, and newer architectures tell no constant
    memory.
    """
    assert resources.parse(LOG_NVRTC)["main_kernel"] == resources.Resources(
        "main_kernel", "sm_90", 255, 208, 228, 284, 0, None, 0
    )


@pytest.mark.parametrize(
    "log",
    ["", "ptxas info : Compiling entry function 'k' for 'sm_90'\n", "kernel.cu(1): error: no"],
)
def test_a_log_without_figures_has_no_kernel(log: str) -> None:
    """What is not told is not made up."""
    assert resources.parse(log) == {}


def test_sass_is_counted_by_width() -> None:
    """Global, shared and local accesses are told apart and counted by their bits, with what they
    say to the caches.
    """
    code = sass.parse(SASS, "cuobjdump")["main_kernel"]
    assert code.machine and code.origin == "cuobjdump"
    assert code.global_loads == {8: 1, 32: 1, 64: 1, 128: 1, 256: 1}
    assert code.global_stores == {64: 1}
    assert code.shared_loads == {8: 1}
    assert code.shared_stores == {128: 1}
    assert (code.local_loads, code.local_stores, code.generic, code.atomics, code.asynchronous) == (
        1,
        1,
        1,
        1,
        1,
    )
    assert (code.shuffles, code.barriers, code.mufu) == (1, 1, 1)
    assert code.hints == {"LDG.CONSTANT": 3, "LDG.LTC128B": 1, "STG.EF": 1}


def test_sass_of_unknown_operations_is_counted() -> None:
    """An operation nobody has heard of is an instruction like any other; padding is none."""
    kernels = sass.parse(SASS, "cuobjdump")
    assert kernels["main_kernel"].operations["FROB9X"] == 1
    assert kernels["main_kernel"].instructions == 19
    assert kernels["halves"].instructions == 7
    assert kernels["halves"].global_loads == kernels["halves"].global_stores == {16: 1}


def test_predicated_instructions_are_counted_in_full() -> None:
    """A predicate that may be false is counted; one that is always true is none."""
    kernels = sass.parse(SASS, "cuobjdump")
    assert (kernels["main_kernel"].predicated, kernels["halves"].predicated) == (2, 1)


def test_both_disassemblers_are_understood() -> None:
    """nvdisasm names kernels by their section."""
    code = sass.parse(NVDISASM, "nvdisasm")["row_sum"]
    assert (code.instructions, code.global_loads, code.global_stores, code.shared_loads) == (
        5,
        {32: 1},
        {32: 1},
        {128: 1},
    )


@pytest.mark.parametrize(
    "text", ["", "cuobjdump fatal   : not an ELF file", "\t\tFunction : empty\n", "/*0000*/ EXIT ;"]
)
def test_text_without_code_has_no_kernel(text: str) -> None:
    """A disassembler's refusal, or instructions of no kernel, give nothing."""
    assert sass.parse(text, "cuobjdump") == {}


def test_ptx_is_counted_by_width() -> None:
    """PTX gives the same counts as machine code, from its own language, and says that it is not
    machine code.
    """
    code = ptx.parse(PTX, "no cuobjdump")["main_kernel"]
    assert not code.machine and code.origin == "PTX (no cuobjdump)"
    assert code.global_loads == {128: 1, 256: 1}
    assert code.global_stores == {16: 1}
    assert code.shared_stores == {64: 1}
    assert (
        code.local_loads,
        code.shuffles,
        code.barriers,
        code.mufu,
        code.asynchronous,
        code.atomics,
    ) == (1, 1, 1, 1, 1, 1)
    assert code.hints == {"ld.global.L1::no_allocate": 1, "ld.global.nc": 2, "st.global.cs": 1}
    assert (code.instructions, code.predicated) == (17, 2)


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "expected"),
    [
        ("sm_90", 32, 256, 0, Occupancy(8, 64, 64, ("warps", "registers"))),
        ("sm_90", 128, 256, 0, Occupancy(2, 16, 64, ("registers",))),
        ("sm_90", 33, 256, 0, Occupancy(6, 48, 64, ("registers",))),
        ("sm_90", 16, 32, 0, Occupancy(32, 32, 64, ("blocks",))),
        ("sm_80", 32, 256, 48 * 1024, Occupancy(3, 24, 64, ("shared memory",))),
        ("sm_86", 32, 128, 0, Occupancy(12, 48, 48, ("warps",))),
        ("sm_89", 16, 64, 0, Occupancy(24, 48, 48, ("warps", "blocks"))),
        ("sm_75", 64, 1024, 0, Occupancy(1, 32, 32, ("warps", "registers"))),
        ("sm_120", 40, 1024, 0, Occupancy(1, 32, 48, ("warps", "registers"))),
        ("sm_100", 0, 100, 227 * 1024, Occupancy(1, 4, 64, ("shared memory",))),
    ],
)
def test_occupancy_is_what_nvidia_documents(
    arch: str, registers: int, threads: int, shared: int, expected: Occupancy
) -> None:
    """Blocks and warps that fit, and every resource that keeps another block out."""
    assert occupancy(arch, registers, threads, dynamic_shared=shared) == expected
    assert (
        occupancy(arch, registers, threads, shared=shared).share
        == expected.warps / expected.max_warps
    )


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "reason"),
    [
        (32, 1025, 0, "1025 threads a block, at most 1024"),
        (256, 32, 0, "256 registers a thread, at most 255"),
        (96, 1024, 0, "1024 threads of 96 registers need 98304 a block, at most 65536"),
        (32, 128, 227 * 1024 + 1, "232449 bytes of shared memory a block, at most 232448"),
    ],
)
def test_a_block_that_cannot_run_is_refused_with_the_reason(
    registers: int, threads: int, shared: int, reason: str
) -> None:
    """Zero occupancy says what was asked and what there is."""
    result = occupancy("sm_90", registers, threads, dynamic_shared=shared)
    assert (result.blocks, result.warps, result.share, result.refused) == (0, 0, 0.0, reason)


def test_occupancy_wants_possible_numbers() -> None:
    """No threads, negative memory and unknown architectures are the caller's mistake."""
    with pytest.raises(InputError, match="threads: got 0"):
        occupancy("sm_90", 32, 0)
    with pytest.raises(InputError, match="dynamic_shared: got -1"):
        occupancy("sm_90", 32, 32, dynamic_shared=-1)
    with pytest.raises(UnknownNameError, match=r"'sm_91'.*Did you mean 'sm_90'"):
        occupancy("sm_91", 32, 32)


REFERENCE = r"""
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, minor, threads_sm, shared_sm, shared_optin, reserved;
  int regs, threads, fixed, dynamic, bars;
  while (std::scanf("%d%d%d%d%d%d%d%d%d%d%d", &major, &minor, &threads_sm, &shared_sm,
                    &shared_optin, &reserved, &regs, &threads, &fixed, &dynamic, &bars) == 11) {
    cudaOccDeviceProp p;
    p.computeMajor = major;
    p.computeMinor = minor;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = threads_sm;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.sharedMemPerBlock = 48 * 1024;
    p.numSms = 1;
    p.sharedMemPerMultiprocessor = shared_sm;
    p.sharedMemPerBlockOptin = shared_optin;
    p.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024;
    a.numRegs = regs;
    a.sharedSizeBytes = fixed;
    a.partitionedGCConfig = PARTITIONED_GC_OFF;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = dynamic;
    a.numBlockBarriers = bars;
    cudaOccDeviceState s;
    s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult r;
    cudaOccError e = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, dynamic);
    std::printf("%d\n", e ? -1 : r.activeBlocksPerMultiprocessor);
  }
}
"""


def test_occupancy_agrees_with_nvidias_own_calculator(tmp_path: Path) -> None:
    """Over all architectures and random kernels the blocks are those of cuda_occupancy.h, where a
    toolkit has it.
    """
    include = next(
        (
            t / "include"
            for t in locate.toolkits()
            if (t / "include" / "cuda_occupancy.h").is_file()
        ),
        None,
    )
    cxx = shutil.which("c++")
    if include is None or cxx is None:
        pytest.skip("needs a toolkit's cuda_occupancy.h and a C++ compiler")
    (tmp_path / "reference.cpp").write_text(REFERENCE)
    subprocess.run(
        [cxx, f"-I{include}", str(tmp_path / "reference.cpp"), "-o", str(tmp_path / "reference")],
        check=True,
    )
    rng, asked, ours = random.Random(0), [], []
    for name, a in ARCHITECTURES.items():
        number = int(name.removeprefix("sm_"))
        for _ in range(500):
            regs, threads, bars = rng.randint(1, 255), rng.randint(1, 1024), rng.randint(0, 16)
            fixed, dynamic = (
                rng.choice([0, 16, rng.randint(0, 48 * 1024)]),
                rng.choice([0, rng.randint(0, a.shared)]),
            )
            asked.append(
                [
                    *divmod(number, 10),
                    a.threads,
                    a.shared,
                    a.shared_block,
                    a.shared_reserved,
                    regs,
                    threads,
                    fixed,
                    dynamic,
                    bars,
                ]
            )
            ours.append(occupancy(name, regs, threads, fixed, dynamic, bars).blocks)
    lines = "\n".join(" ".join(map(str, row)) for row in asked)
    done = subprocess.run(
        [str(tmp_path / "reference")], input=lines, capture_output=True, text=True, check=True
    )
    theirs = [int(x) for x in done.stdout.split()]
    assert len(theirs) == len(ours)
    assert [(a, o, t) for a, o, t in zip(asked, ours, theirs, strict=True) if o != t] == []


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any CUDA; its empty folder on PATH."""
    for name in ("LNTUNE_NVCC", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(locate, "STANDARD", tmp_path / "none")
    monkeypatch.setattr(locate, "_package", lambda name: [])
    return tmp_path


def program(path: Path, text: str = "exit 0") -> str:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_compiler_is_reported_with_the_remedies(bare: Path) -> None:
    """Without nvcc and NVRTC the error names the variables to set and the packages to install, and
    inspecting fails alike.
    """
    assert "LNTUNE_NVCC" in available() and "pip install 'lntune[cuda]'" in available()
    with pytest.raises(
        ToolchainError, match=r"CUDA_HOME.*nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl"
    ):
        inspect_kernel(COPY, "sm_90", 256)


def test_nvcc_is_looked_for_in_order(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LNTUNE_NVCC is before CUDA_HOME, which is before CUDA_PATH, which is before PATH and the
    usual place.
    """
    expected = [program(bare / "none" / "bin" / "nvcc"), program(bare / "nvcc")]
    expected += [program(bare / name / "bin" / "nvcc") for name in ("path", "home")] + [
        program(bare / "my-nvcc")
    ]
    assert find() == Nvcc(expected[1])
    (bare / "nvcc").unlink()
    assert find() == Nvcc(expected[0])
    for name, value, index in (
        ("CUDA_PATH", bare / "path", 2),
        ("CUDA_HOME", bare / "home", 3),
        ("LNTUNE_NVCC", bare / "my-nvcc", 4),
    ):
        monkeypatch.setenv(name, str(value))
        assert find() == Nvcc(expected[index])


def test_a_wrong_lntune_nvcc_is_reported(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is no program, and a program that is no nvcc, are named with what to do."""
    monkeypatch.setenv("LNTUNE_NVCC", str(bare / "absent"))
    with pytest.raises(ToolchainError, match=r"LNTUNE_NVCC: got .*absent"):
        to_cubin(COPY, "sm_90")
    monkeypatch.setenv("LNTUNE_NVCC", program(bare / "other", "echo I am something else"))
    assert "I am something else" in available()
    with pytest.raises(ToolchainError, match="not a working nvcc"):
        to_cubin(COPY, "sm_90")


def test_nvrtc_is_taken_with_its_own_headers(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library counts only together with the headers of its release; what is missing is
    named.
    """
    root = bare / "nvidia" / "cu13"
    (root / "lib").mkdir(parents=True)
    (root / "lib" / "libnvrtc.so.13").touch()
    monkeypatch.setattr(locate, "_package", lambda name: [bare / name])
    with pytest.raises(
        ToolchainError,
        match=r"libnvrtc.so.13 lacks the headers cuda_fp16.h, cuda_bf16.h, cuda/std/cstdint",
    ):
        find()
    for header in ("include/cuda_fp16.h", "include/cuda_bf16.h", "include/cccl/cuda/std/cstdint"):
        (root / header).parent.mkdir(parents=True, exist_ok=True)
        (root / header).touch()
    assert find() == nvrtc.Nvrtc(
        root / "lib" / "libnvrtc.so.13", (root / "include", root / "include" / "cccl")
    )
    with pytest.raises(ToolchainError, match="cannot load NVRTC"):
        to_cubin(COPY, "sm_90")


def test_the_package_imports_no_compiler() -> None:
    """Neither TVM nor torch is loaded by importing it."""
    code = "import sys, lntune.backends.cuda; print({'tvm', 'tvm_ffi', 'torch'} & set(sys.modules))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


@compiles
def test_a_vectorised_copy_has_only_wide_accesses() -> None:
    """float4 in, float4 out: one load and one store of 128 bits, no problems; and the facts survive
    JSON.
    """
    inspection = inspect_kernel(COPY, "sm_90", 256)
    assert inspection.code.global_loads == inspection.code.global_stores == {128: 1}
    assert inspection.problems == ()
    assert inspection.occupancy.share == 1.0
    assert msgspec.json.decode(msgspec.json.encode(inspection), type=Inspection) == inspection


@compiles
def test_a_scalar_copy_of_halves_has_only_narrow_accesses() -> None:
    """One half in, one half out: 16 bits each, with NVIDIA's headers found."""
    inspection = inspect_kernel(HALVES, "sm_80", 256)
    assert inspection.code.global_loads == inspection.code.global_stores == {16: 1}


@compiles
def test_a_spilling_kernel_is_a_problem() -> None:
    """More live values than registers: the bytes spilled are told, and there is a stack frame for
    them.
    """
    inspection = inspect_kernel(SPILLING, "sm_90", 1024)
    assert inspection.resources.registers <= 64
    spilled = max(inspection.resources.spill_store_bytes, inspection.resources.spill_load_bytes)
    assert spilled >= 4 * (96 - 64)
    assert inspection.problems == (
        f"spills {spilled} bytes",
        f"has a stack frame of {inspection.resources.stack_bytes} bytes",
    )
    assert not inspection.code.machine or inspection.code.local_loads > 0


@compiles
def test_an_array_with_computed_index_is_a_stack_frame() -> None:
    """It cannot live in registers, although nothing is spilled; a launch that does not fit is told
    as well.
    """
    inspection = inspect_kernel(INDEXED, "sm_90", 128, dynamic_shared=1 << 20)
    assert inspection.resources.spill_store_bytes == 0
    assert inspection.code.local_loads > 0 and inspection.code.local_stores > 0
    assert inspection.problems == (
        "has a stack frame of 2048 bytes",
        "zero occupancy: 1048576 bytes of shared memory a block, at most 232448",
    )


@compiles
def test_a_reduction_shows_its_means() -> None:
    """Shuffles, the barrier, shared memory and the special function unit of a row's sum."""
    inspection = inspect_kernel(ROW_SUM, "sm_86", 128)
    assert (inspection.code.shuffles, inspection.code.barriers, inspection.code.mufu) == (5, 1, 1)
    assert (inspection.resources.shared_bytes, inspection.resources.barriers) == (16, 1)


@compiles
def test_of_several_kernels_one_is_named() -> None:
    """A source with two kernels wants the name of one, and lists them."""
    both = COPY + ROW_SUM
    assert inspect_kernel(both, "sm_90", 128, kernel="row_sum").code.shuffles == 5
    with pytest.raises(
        InputError, match=r"kernel: got none, expected one of the source's 2: .*copy"
    ):
        inspect_kernel(both, "sm_90", 128)
    with pytest.raises(UnknownNameError, match="Did you mean 'row_sum'"):
        inspect_kernel(both, "sm_90", 128, kernel="rowsum")
    with pytest.raises(BuildError, match="no kernel in it"):
        inspect_kernel("__device__ float f(float x) { return x; }", "sm_90", 128)


@compiles
def test_the_compilers_first_errors_are_reported() -> None:
    """A source that does not compile gives the first of its errors with their lines, and how many
    there are.
    """
    wrong = "\n".join(f"__global__ void k{i}() {{ missing_{i}(); }}" for i in range(20))
    with pytest.raises(
        BuildError, match=r"for sm_90; .*errors, the first 5:\nkernel.cu\(1\): error"
    ) as caught:
        to_cubin(wrong, "sm_90")
    assert "missing_4" in str(caught.value) and "missing_5" not in str(caught.value)


@compiles
def test_a_source_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time the stored result is read; a damaged one is made again."""
    monkeypatch.setenv("LNTUNE_CACHE_DIR", str(tmp_path))
    first = to_cubin(COPY, "sm_90")
    assert first.cubin.startswith(b"\x7fELF")
    (stored,) = (tmp_path / "cuda").iterdir()
    stamp = stored.stat().st_mtime_ns
    assert to_cubin(COPY, "sm_90") == first and stored.stat().st_mtime_ns == stamp
    whole = stored.read_bytes()
    for damaged in (whole[:100], whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]):
        stored.write_bytes(damaged)
        assert to_cubin(COPY, "sm_90").ptx == first.ptx
        assert len(stored.read_bytes()) > 100 and stored.read_bytes() != damaged
    assert [p.name for p in (tmp_path / "cuda").iterdir()] == [stored.name]
