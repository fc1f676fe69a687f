"""TVM's passes from a scheduled IRModule to GPU kernels and the host's code that launches them.

They are those of TVM 0.27's own pipeline (tvm/s_tir/pipeline.py) in its order, with these
deviations; all but the third have a test that fails without them (tests/test_device_code.py), and
tests/test_lowering.py holds this list against that pipeline:

- Storage is not rewritten. TVM merges the stage behind a reduction over threads into the
  reduction's result, which then lies in shared memory: every thread executes `mean[0] = mean[0] /
  N` on the same cell, a race that multi-warp rows lose.
- Expressions are simplified once more before buffers are compacted. Otherwise what a thread keeps
  of a row is indexed by what the compiler cannot see is a constant, and lives in a stack frame
  instead of registers.
- What changes nothing in any of our kernels is left out, for the time it takes: passes for what
  schedules here do not ask for by annotation (software pipelines, double buffers, partitioned
  loops, tensor cores and the layouts that they want, copies that are planned, other devices'
  memory), for 8-bit floats and for devices without bfloat16, a second removal of empty statements,
  and the host's code as machine code: launches are made by lntune.backends.cuda.launcher.
- Sums of several values are written without names for the values; see `without_bindings`.
- Where a schedule asks for it, sums over warps are exchanged with one barrier, not TVM's two; see
  lntune/transforms/gpu/exchange.py.
- bfloat16 is widened in pairs; see lntune/transforms/gpu/pairs.py.
"""

from __future__ import annotations

from typing import Any

from lntune.transforms.gpu import exchange, pairs

OWN = ("lntune.pairs", "lntune.one_barrier")
"""Names of passes in the list that are not TVM's."""


def without_bindings(body: Any) -> Any:
    """A kernel's body with the values of sums of several written where they are stored, not bound
    to names first (v = a[0] + x; w = b[0] + y; a[0] = v; b[0] = w).

    Where there is dynamic shared memory, TVM 0.27 refuses names for anything that is loaded. No sum
    here is computed of another, so the order of the stores does not matter.
    """
    import tvm
    import tvm_ffi
    from tvm import tirx

    def inlined(statement: Any) -> Any:
        named: list[tuple[Any, Any]] = []
        left = []
        for one in statement.seq:
            changed = (
                tvm_ffi.structural_map(
                    one,
                    [
                        (
                            tvm.ir.Var,
                            lambda var: next((v for old, v in named if var.same_as(old)), var),
                        )
                    ],
                )
                if named
                else one
            )
            if isinstance(one, tirx.Bind):
                named.append((one.var, changed.value))
            else:
                left.append(changed)
        return tirx.SeqStmt(left) if named else statement

    return tvm_ffi.structural_map(body, [(tirx.SeqStmt, inlined)])


def _passes() -> list[Any]:
    """The passes from blocks to functions of host and device."""
    import tvm
    from tvm.s_tir import transform as s
    from tvm.tirx import transform as t

    def unbind(mod: Any, _: Any) -> Any:
        return tvm.IRModule(
            {
                name: function.with_body(without_bindings(function.body))
                for name, function in mod.functions.items()
            }
        )

    def changed(name: str, change: Any, attribute: str = "") -> Any:
        """A pass that changes functions: all, or those that have an attribute."""

        def each(mod: Any, _: Any) -> Any:
            return tvm.IRModule(
                {
                    key: change(f) if not attribute or (f.attrs and attribute in f.attrs) else f
                    for key, f in mod.functions.items()
                }
            )

        return tvm.transform.module_pass(each, opt_level=0, name=name)

    return [
        s.CanonicalizeLoop(),
        s.LowerCrossThreadReduction(),
        tvm.transform.module_pass(unbind, opt_level=0),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.LiftThreadBinding(),
        s.StmtSimplify(),
        # simpler indices have some buffers end further inside
        s.PlanAndUpdateBufferAllocationLocation(),
        s.CompactBufferAllocation(),
        s.UnifyThreadBinding(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.NarrowDataType(32),
        t.VectorizeLoop(True),
        s.InjectVirtualThread(),
        s.HoistIfThenElse(),
        t.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        t.StmtSimplify(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
        changed(OWN[0], pairs.widened_in_pairs),
        t.VerifyMemory(),
        s.ThreadSync("shared"),
        s.ThreadSync("shared.dyn"),
        s.ThreadSync("warp"),
        # behind the passes that would put barriers around its accesses of shared memory
        changed(OWN[1], exchange.with_one_barrier, exchange.ATTRIBUTE),
        s.LowerThreadAllreduce(),
        s.MergeSharedMemoryAllocations(),
        t.SplitHostDevice(),
        t.MakePackedAPI(),
    ]


def lower(module: Any, target: Any) -> tuple[list[Any], Any]:
    """(the host's functions, IRModule of the kernels) of a scheduled IRModule for a
    tvm.target.Target, in a PassContext that may disable passes.

    The kernels are as the device's code generator takes them, the host's functions as they come
    from their calls being packed.
    """
    import tvm
    from tvm import tirx
    from tvm.tirx import transform as t

    here = ("llvm", "c")
    mod = t.BindTarget(target.with_host("llvm" if tvm.runtime.enabled("llvm") else "c"))(module)
    mod = tvm.ir.transform.Sequential(_passes())(mod)

    def runs_here(function: Any) -> bool:
        return str(function.attrs["target"].kind.name) in here

    kernels = t.Filter(lambda function: not runs_here(function))(mod)
    kernels = tvm.ir.transform.Sequential([t.LowerWarpMemory(), t.StmtSimplify(), t.LowerIntrin()])(
        kernels
    )
    return [
        f for f in mod.functions.values() if isinstance(f, tirx.PrimFunc) and runs_here(f)
    ], kernels
