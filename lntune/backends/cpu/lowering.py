"""TVM's passes from a scheduled IRModule to functions for LLVM's code generator.

They are those of TVM 0.27's own pipeline (tvm/s_tir/pipeline.py) in its order, and what comes of
them is the same to the letter (tests/test_cpu_lowering.py), in half of the time for an LSTM's step.
Most of it goes into thousands of unrolled statements that are simplified again and again, so that
less of this is done:

- Statements are simplified early, and conditions taken out of loops, only where there are any; and
  what is left then is not simplified and rid of empty statements there and then: that comes behind
  unrolling anyhow, and nothing of ours has empty statements (those of TVM's own sketches go in
  LLVM).
- Split patterns are not brought into a normal form, which changes nothing.
- Passes for GPUs, and for what is asked for by annotation, are left out.

Activations become arithmetic behind all of these passes, which see calls till then.

A schedule that asks for any of these, by a bound thread, an annotation, a buffer that is part of
another, or memory of another kind, has TVM's own pipeline.
"""

from __future__ import annotations

from typing import Any

from lntune.transforms.cpu import polynomials


def lower(module: Any, target: Any, asserts: bool = True) -> Any:
    """The IRModule that LLVM's code generator takes, of a scheduled one for a tvm.target.Target.
    Without `asserts` a kernel does not check its arguments, which is half of what LLVM has to do.
    """
    import tvm
    from tvm.tirx import transform as t

    sequential = tvm.ir.transform.Sequential
    bound = t.BindTarget(target.with_host(target))(module)
    if _is_plain(bound):
        mod = sequential(_to_blocks())(bound)
        conditions = _has_conditions(mod)
        mod = sequential([*_to_loops(conditions), *_to_functions(conditions)])(mod)
        finalize = [t.LowerTVMBuiltin(), t.LowerIntrin()]
    else:
        pipeline, host_passes, _ = tvm.tirx.get_default_tir_pipeline(target)
        mod, finalize = pipeline(bound), [host_passes()]
    mod = polynomials.expanded(mod)
    return sequential([*finalize] if asserts else [t.SkipAssert(), *finalize])(mod)


def _to_blocks() -> list[Any]:
    """The passes from scheduled blocks to those whose axes are expressions of the loops."""
    from tvm.s_tir import transform as s

    return [
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
    ]


def _to_loops(conditions: bool) -> list[Any]:
    """The passes from blocks to loops over flat buffers, where there are `conditions` or none."""
    from tvm.s_tir import transform as s
    from tvm.tirx import transform as t

    return [
        s.CompactBufferAllocation(),
        *([s.StmtSimplify()] if conditions else []),
        s.AnnotateIrregularLoop(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
    ]


def _to_functions(conditions: bool) -> list[Any]:
    """The passes from loops to functions that take packed arguments, where there are `conditions`
    or none.
    """
    import tvm
    from tvm.s_tir import transform as s
    from tvm.tirx import transform as t

    def hoist(mod: Any, context: Any) -> Any:
        names = ["s_tir.StmtSimplify", "tirx.StmtSimplify", "tirx.RemoveNoOp"]
        with tvm.transform.PassContext(disabled_pass=names):
            return s.HoistIfThenElse()(mod)

    hoisted = tvm.transform.module_pass(hoist, opt_level=0, name="lntune.HoistIfThenElse")
    return [
        t.BF16ComputeLegalize(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        t.StorageRewrite(),
        *([hoisted] if conditions else []),
        t.UnrollLoop(),
        t.StmtSimplify(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
        t.FP8ComputeLegalize(),
        t.AnnotateEntryFunc(),
        t.SplitHostDevice(),
        t.MakePackedAPI(),
        t.FP8StorageLegalize(),
        t.BF16StorageLegalize(),
    ]


def _is_plain(module: Any) -> bool:
    """Whether a scheduled IRModule has loops of the CPU and blocks without annotations alone."""
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir.stmt import SBlock

    others: list[Any] = []

    def loop(one: Any) -> None:
        if one.thread_binding is not None or len(one.annotations):
            others.append(one)

    def block(one: Any) -> None:
        scopes = {str(buffer.scope()) for buffer in one.alloc_buffers}
        if len(one.annotations) or len(one.match_buffers) or scopes - {"global"}:
            others.append(one)

    for function in module.functions.values():
        tvm_ffi.structural_walk(
            function.body, [(tirx.For, loop), (SBlock, block), (tirx.AttrStmt, others.append)]
        )
    return not others


def _has_conditions(module: Any) -> bool:
    """Whether there is an `if` in a module, or a block that is not always there."""
    import tvm_ffi
    from tvm import tirx
    from tvm.s_tir import SBlockRealize

    found: list[Any] = []

    def block(one: Any) -> None:
        if not (isinstance(one.predicate, tirx.IntImm) and int(one.predicate)):
            found.append(one)

    for function in module.functions.values():
        tvm_ffi.structural_walk(
            function.body, [(tirx.IfThenElse, found.append), (SBlockRealize, block)]
        )
    return bool(found)
