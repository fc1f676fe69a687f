"""Streamed stores: the edit of LLVM IR by itself, and kernels that use it on any address and
tail.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
import torch
from grids import product
from kernel_arguments import inputs

from lntune import check, device, schedule
from lntune.case import Case
from lntune.errors import BuildError
from lntune.kernels import compiler
from lntune.transforms.cpu import streaming

# Every size is beyond a cache of one byte, so that the knob may be used on small data.
DEVICE = msgspec.structs.replace(device.current(), l3=1)

IR = """define void @f(ptr %x, ptr noalias align 2 %y, i64 %n) {
entry:
  br label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  %1 = getelementptr inbounds float, ptr %y, i64 %i
  %2 = getelementptr inbounds i8, ptr %1, i64 64
  %3 = getelementptr inbounds float, ptr %x, i64 %i
  %v = load <16 x float>, ptr %3, align 4
  store <16 x float> %v, ptr %1, align 4, !tbaa !0
  store <16 x float> %v, ptr %2, align 4, !tbaa !0
  store <16 x float> %v, ptr %3, align 4
  store <2 x float> zeroinitializer, ptr %1, align 4
  %next = add i64 %i, 32
  %more = icmp ult i64 %next, %n
  br i1 %more, label %loop, label %done
done:
  %last = phi i64 [ %i, %loop ]
  ret void
}
!0 = !{!1, !1, i64 0}
!1 = !{!"tvm"}
"""


def test_the_edit() -> None:
    """Only full vectors stored to the parameter change, in both forms; a loop comes from the last
    part of its block.
    """
    text = streaming.edit(IR, "y", 64)
    assert text.count("!nontemporal !2") == 2
    assert "store <16 x float> %v, ptr %1, align 64, !nontemporal !2, !tbaa !0" in text
    assert text.count("store <16 x float> %v, ptr %1, align 4, !tbaa !0") == 1
    assert (
        text.count("ptr %3, align 4") == 2
        and text.count("store <2 x float> zeroinitializer, ptr %1, align 4") == 1
    )
    assert "%i = phi i64 [ 0, %entry ], [ %next, %lntune.stream1.end ]" in text
    assert "%last = phi i64 [ %i, %lntune.stream1.end ]" in text
    assert text.rstrip().endswith("!2 = !{i32 1}")


def test_nothing_to_stream() -> None:
    """A parameter that no vector is stored to is an error that says so."""
    with pytest.raises(BuildError, match="no vector stored to z"):
        streaming.edit(IR, "z", 64)


def kernel_of(case: Case, name: str, **knobs: Any) -> Any:
    """A kernel with streamed stores."""
    plan = schedule.get(name, case.op)
    setting = dataclasses.replace(
        plan.default(case, DEVICE), write="streamed", parallel=True, **knobs
    )
    assert plan.reason_invalid(setting, case, DEVICE) is None
    return compiler.in_memory(case, plan, setting, DEVICE)


STREAMED = (
    ("cached_rows", "float32"),
    ("cached_rows", "float16"),
    ("cached_rows", "bfloat16"),
    ("widened_rows", "bfloat16"),
)


@pytest.mark.parametrize(("which", "hidden"), product(STREAMED, (127, 1000, 64, 1024)), ids=str)
def test_streamed_kernels_are_right(which: tuple[str, str], hidden: int) -> None:
    """Right by the full check, which begins and ends outputs off alignment; with tails, and with
    rows side by side.
    """
    name, dtype = which
    case = Case("layer_norm", hidden, dtype, 512, "weight+bias+stats")
    for together in (1, 2):
        verdict = check.verify(case, kernel_of(case, name, together=together, lanes=1))
        assert verdict.ok, verdict.message


@pytest.mark.parametrize("offset", [0, 1, 8, 15, 16])
def test_every_address(offset: int) -> None:
    """An output that starts at any element gets bitwise what an aligned one gets, and nothing
    beside it changes.
    """
    case = Case("layer_norm", 1024, "float32", 512, "weight+bias")
    kernel, given = kernel_of(case, "cached_rows"), inputs(case, 9)
    vectors = (given["weight"], given["bias"], 1e-5)
    aligned, room = torch.empty(9, 1024), torch.full((9 * 1024 + 32,), 7.0)
    kernel(given["x"], *vectors, aligned)
    kernel(given["x"], *vectors, room[offset : offset + 9 * 1024].view(9, 1024))
    assert torch.equal(room[offset : offset + 9 * 1024].view(9, 1024), aligned)
    assert (room[:offset] == 7).all() and (room[offset + 9 * 1024 :] == 7).all()


WRITERS = (("cached_rows", "layer_norm"), ("blocked_rows", "layer_norm_backward"))


@pytest.mark.parametrize(
    ("isa", "which"),
    product(("x86-64-v4", "aarch64", "x86-64-v3", "x86-64-v2"), WRITERS),
    ids=str,
)
def test_the_instructions(which: tuple[str, str], isa: str) -> None:
    """The assembly of every family has non-temporal stores, and without the knob it has none;
    `lntune show` shows them.
    """
    name, op = which
    instruction = "stnp" if isa == "aarch64" else "movnt"
    machine = device.Device("cpu", "other", isa, 4, l3=1)
    case, plan = Case(op, 1024, "float32", 4096), schedule.get(name, op)
    setting = dataclasses.replace(plan.default(case, machine), write="streamed")
    assert instruction in compiler.show(case, plan, setting, machine, "asm")
    assert instruction not in compiler.show(
        case, plan, dataclasses.replace(setting, write="plain"), machine, "asm"
    )


def test_streamed_backward() -> None:
    """The backward streams dx, rows side by side or not, on any address, and is right."""
    case, plan = (
        Case("layer_norm_backward", 1000, "bfloat16", 512),
        schedule.get("blocked_rows", "layer_norm_backward"),
    )
    for together in (1, 2, 4):
        setting = dataclasses.replace(
            plan.default(case, DEVICE), write="streamed", blocks=2, together=together
        )
        if plan.reason_invalid(setting, case, DEVICE) is None:
            verdict = check.verify(case, compiler.in_memory(case, plan, setting, DEVICE))
            assert verdict.ok, verdict.message


def test_a_library_of_its_own(tmp_path: Any) -> None:
    """A streamed kernel is stored and loaded like any other."""
    from lntune.backends.cpu import runtime

    case, plan = (
        Case("layer_norm", 1024, "bfloat16", 512, "weight+bias"),
        schedule.get("cached_rows", "layer_norm"),
    )
    compiler.to_file(
        case,
        plan,
        dataclasses.replace(plan.default(case, DEVICE), write="streamed"),
        DEVICE,
        tmp_path / "kernel.so",
    )
    assert check.verify(case, runtime.load(tmp_path / "kernel.so")).ok


def test_where_it_is_refused() -> None:
    """Data that fits the cache, and kernels on one thread, which has no launcher to set a fence,
    are not streamed.
    """
    plan, small = schedule.get("cached_rows", "layer_norm"), Case("layer_norm", 64, "float32", 8)
    setting = dataclasses.replace(plan.default(small, DEVICE), write="streamed", parallel=True)
    here = msgspec.structs.replace(DEVICE, l3=1 << 30)
    assert "fit the cache" in str(plan.reason_invalid(setting, small, here))
    assert "launcher" in str(
        plan.reason_invalid(dataclasses.replace(setting, parallel=False), small, DEVICE)
    )
    assert plan.default(small, here).write != "streamed"
