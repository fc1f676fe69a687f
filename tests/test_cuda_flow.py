"""The way of a warp through a kernel's code: loops, guards and slow paths, in machine code and in
PTX.
"""

from __future__ import annotations

import pytest

from lntune.backends.cuda import ptx, sass
from lntune.backends.cuda.code import Work


def machine(*lines: str) -> str:
    """A kernel as cuobjdump lists it; instructions are 16 bytes apart."""
    listed = [f"        /*{16 * n:04x}*/ {line} ;" for n, line in enumerate(lines)]
    return "\n".join(["\t\tFunction : main", *listed])


def depths(text: str) -> list[tuple[float, int, int]]:
    """(instructions, shuffles, global accesses) at each depth of loops."""
    works = sass.parse(text, "cuobjdump")["main"].depths
    return [(work.slots, work.shuffles, work.accesses) for work in works]


def test_a_loop_is_a_depth_of_its_own() -> None:
    """What a branch back repeats is counted once, apart from what is before and after it."""
    text = machine(
        "MOV R1, R2", "LDG.E R3, [R4]", "SHFL.BFLY R5", "@P0 BRA 0x0010", "STG.E [R4], R3", "EXIT"
    )
    assert depths(text) == [(3, 0, 1), (3, 1, 1)]


def test_a_loop_within_a_loop() -> None:
    """Each loop around an instruction is one depth more."""
    text = machine("MOV R1", "FADD R1", "FMUL R2", "@P0 BRA 0x0020", "@P1 BRA 0x0010", "EXIT")
    assert depths(text) == [(2, 0, 0), (2, 0, 0), (2, 0, 0)]


def test_what_a_guard_skips_is_counted() -> None:
    """The end of a row that some threads skip is the work of the others."""
    text = machine("@P0 BRA 0x0030", "LDG.E R1, [R2]", "FADD R1", "EXIT")
    assert depths(text) == [(4, 0, 1)]


def test_a_slow_path_is_not_counted() -> None:
    """A branch around a function's call is taken, and the function, which lies behind the end, is
    nobody's work; a guard around all of that is none of the call's.
    """
    text = machine(
        "@P0 BRA 0x0060",
        "FADD R1",
        "@P1 BRA 0x0050",
        "MOV R2",
        "CALL.REL.NOINC 0x0070",
        "FMUL R3",
        "EXIT",
        "FADD R9",
        "RET.REL.NODEC R2 0x0",
    )
    assert depths(text) == [(5, 0, 0)]


def test_a_loop_that_the_straight_way_passes_by() -> None:
    """Where a branch leads into a loop and falling through leads around it, both are gone: the loop
    and what comes after it.
    """
    kernel = """.visible .entry main(
    .param .u64 main_param_0
)
{
    bra.uni $L1;
$L9:
    add.s32 %r1, %r1, 1;
$L1:
    setp.lt.s32 %p1, %r1, %r2;
    @%p1 bra $L3;
    bra.uni $L4;
$L3:
    ld.global.nc.v4.f32 {%f1, %f2, %f3, %f4}, [%rd1];
    shfl.sync.bfly.b32 %r5|%p2, %r6, 16, 31, -1;
    bra.uni $L9;
$L4:
    st.global.f32 [%rd2], %f1;
    ret;
}
"""
    outside, loop = ptx.parse(kernel, "")["main"].depths
    assert (outside.accesses, outside.shuffles) == (1, 0)
    assert (loop.accesses, loop.shuffles, loop.widest) == (1, 1, 128)


@pytest.mark.parametrize("rest", ["STG.E [R4], R3", "MOV R9", "BRA 0x0010"])
def test_a_loop_whose_condition_stands_behind_it(rest: str) -> None:
    """A branch back into code that the straight way has jumped over enters a loop, whose end comes
    to the condition; not where all that the branch skips goes there, too.
    """
    text = machine(
        "BRA 0x0030", "LDG.E R3, [R4]", "SHFL.BFLY R5", "ISETP R1", "@P0 BRA 0x0010", rest, "EXIT"
    )
    outside = {"STG.E [R4], R3": (3, 0, 1), "MOV R9": (3, 0, 0), "BRA 0x0010": (1, 0, 0)}
    inside = (5, 1, 1) if rest == "BRA 0x0010" else (4, 1, 1)
    assert depths(text) == [outside[rest], inside]


def test_both_disassemblers_show_the_same_way() -> None:
    """nvdisasm writes labels where cuobjdump writes addresses."""
    text = """.text.main:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   SHFL.BFLY R3, R4 ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   EXIT ;
"""
    assert depths(text) == [(2, 0, 0), (2, 1, 0)]


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        (("BSSY B0, 0x0040", "@P0 BRA 0x0030", "SHFL R1", "BSYNC B0", "EXIT"), 1),
        (("BSSY B0, 0x0030", "@P0 BRA 0x0030", "FADD R1", "BSYNC B0", "SHFL R1", "EXIT"), 0),
        (("@P0 BRA 0x0020", "SHFL R1", "EXIT"), 0),  # a whole warp goes one way
    ],
)
def test_shuffles_in_divergent_code(lines: tuple[str, ...], count: int) -> None:
    """A shuffle between a branch that parts a warp and the place where it meets again is found;
    one behind that place is none, nor is one behind a branch without such a place.
    """
    assert sass.parse(machine(*lines), "cuobjdump")["main"].divergent_shuffles == count


def test_ptx_does_not_tell_what_diverges() -> None:
    """Where warps meet again is decided by ptxas."""
    (code,) = ptx.parse(".visible .entry main(\n)\n{\n ret;\n}\n", "").values()
    assert code.divergent_shuffles is None
    assert code.depths == (Work(slots=0.2),)


def test_what_comes_before_a_wait() -> None:
    """Accesses on the way to the first wait for the kernel before are told by name, whatever stands
    above it in the text; where there is no wait, nothing is.
    """
    lines = (
        "LDG.E.128.CONSTANT R4, desc[UR4][R2.64]",
        "BRA 0x0030",
        "STG.E desc[UR4][R2.64], R4",
        "LDG.E.128 R4, desc[UR4][R2.64]",
        "ACQBULK",
        "LDG.E R5, desc[UR4][R2.64]",
        "EXIT",
    )
    code = sass.parse(machine(*lines), "cuobjdump")["main"]
    assert code.early == {"LDG": 1, "LDG.CONSTANT": 1}
    plain = machine(*(line for line in lines if line != "ACQBULK"))
    assert sass.parse(plain, "cuobjdump")["main"].early is None
    text = ".visible .entry main(\n)\n{\n ld.global.nc.f32 %f1, [%rd1];\n griddepcontrol.wait;\n}\n"
    assert ptx.parse(text, "")["main"].early == {"ld.global.nc": 1}
