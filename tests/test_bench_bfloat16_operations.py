"""The count of operations of bfloat16 layer norm: what it reads in assembly, and what it says where
llvm-mca is not there.
"""

from __future__ import annotations

from types import ModuleType

import pytest
from typer.testing import CliRunner

LAMBDA = """
\t.text
.L__tvm_parallel_lambda:
.Lfunc_begin4:
.LBB4_5:
\tvxorps\t%xmm1, %xmm1, %xmm1
.LBB4_6:
\tvmovdqu\t(%rsi,%rdi), %ymm4
\tvpslld\t$16, %ymm4, %ymm0
\tvsubps\t%ymm8, %ymm0, %ymm0
\tvpblendw\t$170, %ymm4, %ymm1, %ymm5
\tvsubps\t%ymm8, %ymm5, %ymm5
\tjne\t.LBB4_6
.LBB4_8:
\tvpslld\t$16, (%rax,%rdi), %ymm3
\tvpsrld\t$16, %ymm4, %ymm3
\tvmovdqu\t%ymm0, (%r9,%rdi)
\tjne\t.LBB4_8
\tjne\t.LBB4_5
.Lfunc_end4:
\tvaddps\t%ymm1, %ymm1, %ymm1
"""


def test_loops_are_the_inner_ones(script: ModuleType) -> None:
    """By what they do, with vectors of float32 for what they read, and without moves."""
    found = script.loops(LAMBDA, "layer_norm", pairs=True)
    assert {part: (loop.operations, loop.vectors) for part, loop in found.items()} == {
        "sums": (4, 2.0),
        "output": (2, 2.0),
    }


def test_pairs_take_fewer_operations(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every loop of both kernels, for both widths of vectors: two thirds of them at most in
    all.
    """
    monkeypatch.setattr(script, "cycles", lambda loop, core, command: 1.0)
    costs = {}
    for line in script.rows_of(16384, "")[1:]:
        op, pairs, isa, *part, operations = line[:56].split()
        costs[op, isa, " ".join(part).removesuffix(" of 1/4"), pairs] = float(operations)
    for (op, isa, part, pairs), operations in costs.items():
        if pairs == "yes":
            share = operations / costs[op, isa, part, "no"]
            assert share < 1, (op, isa, part)
            assert part != "a row" or share < 0.7, (op, isa)
    assert len(costs) == 28


def test_it_is_skipped_without_llvm_mca(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is said with what has one."""
    monkeypatch.setenv("PATH", "")
    app = script.typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    assert "skipped: none of llvm-mca-19" in result.output
