"""Passes from scheduled modules to kernels: the same code as from all that TVM's own pipeline does,
but where that is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest

from lntune.backends import device_of
from lntune.backends.cuda import device_code, lowering, source_only
from lntune.backends.cuda.program import target as target_of
from lntune.case import Case
from lntune.kernels import compiler
from lntune.schedule import get
from lntune.transforms.gpu import pairs, thread_private

GPU = device_of("cuda:sm_90")

# In the order of TVM 0.27's pipeline: what the list does without, each for a reason that its
# module's documentation gives.
LEFT_OUT = {
    "s_tir.ManifestSharedMemoryLocalStage",
    "s_tir.LowerAutoCopy",
    "s_tir.InjectPermutedLayout",
    "s_tir.AnnotateIrregularLoop",
    "s_tir.InjectSoftwarePipeline",
    "s_tir.TransformMmaBufferLayout",
    "tirx.BF16ComputeLegalize",
    "s_tir.LoopPartition",
    "s_tir.InjectDoubleBuffer",
    "tirx.FP8ComputeLegalize",
    "s_tir.VerifyVTCMLimit",
    "s_tir.LowerVtcmAlloc",
    "tirx.AnnotateEntryFunc",
    "s_tir.InferFragment",
    "tirx.FP8StorageLegalize",
    "tirx.BF16StorageLegalize",
}
TWICE = {"tirx.RemoveNoOp"}
"""Left out in one of the places where TVM has them: it has been done before loops are unrolled."""


def module_of(name: str, hidden: int, dtype: str, variant: str = "", **changed: Any) -> Any:
    """The scheduled module of a schedule's default knobs, or others."""
    plan = get(name)
    case = Case(plan.op, hidden, dtype, 512, variant)
    return compiler.scheduled(
        case, plan, dataclasses.replace(plan.default(case, GPU), **changed), GPU
    )


def by_default(module: Any, seen: list[str] | None = None) -> tuple[list[Any], Any]:
    """lowering.lower by TVM's own pipeline behind a beginning with the deviations; `seen` gets the
    names of its passes.
    """
    import tvm
    from tvm.s_tir import pipeline
    from tvm.s_tir import transform as s
    from tvm.tirx.build import split_host_device_mods

    @tvm.ir.instrument.pass_instrument
    class Names:
        def run_before_pass(self, mod: Any, info: Any) -> None:
            if seen is not None:
                seen.append(str(info.name))

    target = tvm.target.Target(target_of(GPU))
    mod = tvm.tirx.transform.BindTarget(target.with_host("llvm"))(module)
    for make in (s.CanonicalizeLoop, s.LowerCrossThreadReduction):
        mod = make()(mod)
    mod = tvm.IRModule(
        {
            name: function.with_body(lowering.without_bindings(function.body))
            for name, function in mod.functions.items()
        }
    )
    for make in (
        s.LowerInitBlock,
        s.PlanAndUpdateBufferAllocationLocation,
        s.ConvertBlocksToOpaque,
        s.LiftThreadBinding,
        s.StmtSimplify,
    ):
        mod = make()(mod)
    config, skipped = {"tirx.disable_storage_rewrite": True}, thread_private.passes_to_skip(module)
    with tvm.transform.PassContext(config=config, disabled_pass=skipped, instruments=[Names()]):
        mod = pipeline.default_s_tir_pipeline()[0](mod)
    host, (kernels,) = split_host_device_mods(mod)[0], split_host_device_mods(mod)[1].values()
    kernels = pipeline.finalize_device_passes()(kernels)
    kernels = tvm.IRModule(
        {name: pairs.widened_in_pairs(kernel) for name, kernel in kernels.functions.items()}
    )
    return list(host.functions.values()), kernels


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(module_of, "shared_row", 1000, "bfloat16"),
        functools.partial(
            module_of, "shared_row", 4096, "float32", rows_per_block=1, row_storage="shared"
        ),
        functools.partial(module_of, "shared_row", 7, "float16", row_storage="reload"),
        functools.partial(
            module_of, "shared_row_backward", 4099, "float32", exchange="two_barriers"
        ),
        functools.partial(
            module_of,
            "shared_row_backward",
            1000,
            "float16",
            threads_per_row=128,
            rows_per_block=1,
            row_storage="shared",
        ),
        functools.partial(module_of, "gated_row", 1000, "bfloat16"),
        functools.partial(module_of, "gated_row_backward", 256, "float16"),
        functools.partial(
            module_of,
            "gated_row_backward",
            1000,
            "float32",
            row_storage="reload",
            partial_sums="global",
            prefetch=False,
            intermediates="recompute",
        ),
    ],
    ids=lambda make: "-".join(map(str, (*make.args, *make.keywords.values()))),
)
def test_source_is_that_of_the_whole_pipeline(
    make: functools.partial[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left out changes nothing: the CUDA source and the launches are the same to the letter
    as with all of TVM's passes.
    """
    module = make()
    ours = device_code.generate(module, target_of(GPU))
    monkeypatch.setattr(lowering, "lower", lambda mod, _: by_default(mod))
    assert device_code.generate(module, target_of(GPU)) == ours


def test_passes_come_in_the_order_of_the_whole_pipeline() -> None:
    """The list from where buffers are compacted is TVM's with some left out; which these are is
    known one by one, so that a new one shows.
    """
    import tvm

    theirs: list[str] = []
    module = module_of("shared_row", 7, "float32")
    with source_only.kept(), tvm.target.Target(target_of(GPU)):
        by_default(module, theirs)
    ours = [str(one.info.name) for one in lowering._passes()]
    ours = ours[ours.index("s_tir.CompactBufferAllocation") :]
    left = iter(theirs)
    # consumes: the same order
    own = ("sequential", *lowering.OWN)
    assert all(name in left for name in ours if name not in own), ours
    missing = {
        name
        for name in theirs[theirs.index("s_tir.CompactBufferAllocation") - 1 :]
        if theirs.count(name) > ours.count(name)
    }
    assert (
        missing
        - {
            "_pipeline",
            "sequential",
            "s_tir.InsertHoistIfThenElse",
            "s_tir.StmtSimplify",
            "tirx.ConvertSSA",
        }
        == LEFT_OUT | TWICE
    )
