"""Versions of schedules, operators and lowerings are honest: code that changes has a version that
was raised.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import code_digests
import msgspec
import pytest
from grids import exhaustive

from lntune import device, ops, schedule, versions
from lntune.backends.cuda import device_code
from lntune.case import Case
from lntune.kernels import cache
from lntune.log import records
from lntune.log.records import Record
from lntune.schedule import Schedule
from lntune.system import paths, sources, toolchain
from lntune.transforms.cpu import row_sums, streaming
from lntune.transforms.gpu import cache_hints, threads
from lntune.versions import Code

GOLDEN = Path(__file__).parent / "golden" / "code.json"
PLANS = schedule.all_schedules()
UPDATE = os.environ.get("LNTUNE_UPDATE_GOLDEN", "")
"""1: write digests of kernels whose versions were raised; "same": those of others too, whose
machine code is the same all the same.
"""


class Digests(msgspec.Struct):
    """Of what a version is of, by label, and the version they were made at."""

    code: Code
    digests: dict[str, str]


def golden() -> dict[str, Digests]:
    """What was approved last."""
    return (
        msgspec.json.decode(GOLDEN.read_bytes(), type=dict[str, Digests])
        if GOLDEN.is_file()
        else {}
    )


def verdict(name: str, now: Digests, approved: Digests | None, remedy: str) -> str:
    """What is wrong with today's code or its version; empty when nothing is."""
    if approved is None:
        return f"{name} is not in {GOLDEN.name} yet; LNTUNE_UPDATE_GOLDEN=1 writes it"
    changed = [
        label
        for label in now.digests | approved.digests
        if now.digests.get(label) != approved.digests.get(label)
    ]
    if now.code == approved.code and changed and all(" default" in label for label in changed):
        return (
            f"of {name} only kernels with default knobs have changed ({changed[0]}), and its"
            f" versions have not. Where `default` alone was edited, other knobs are the default now"
            " and the code for given knobs, which records name, is what it was:"
            " LNTUNE_UPDATE_GOLDEN=same writes the digests. Where the code has changed,"
            f" measurements of the old kernels would pass for those of the new ones: {remedy}, then"
            " LNTUNE_UPDATE_GOLDEN=1."
        )
    if now.code == approved.code and changed:
        return (
            f"the code of {name} has changed in {len(changed)} of {len(now.digests)} kernels (the"
            f" first: {changed[0]}) and its versions have not ({now.code}): measurements of the old"
            f" kernels would pass for those of the new ones. {remedy}, then write the digests with"
            " LNTUNE_UPDATE_GOLDEN=1; with LNTUNE_UPDATE_GOLDEN=same where the machine code is"
            " what it was."
        )
    if now.code != approved.code:
        return (
            f"{name} has other versions than {GOLDEN.name} ({now.code}, {approved.code});"
            " LNTUNE_UPDATE_GOLDEN=1 writes them"
        )
    return ""


def check(name: str, now: Digests, remedy: str, every: bool = True) -> None:
    """Compare with what was approved last, or approve; not `every`: only of what there is now."""
    approved = golden().get(name)
    if approved is not None and not every:
        kept = {label: value for label, value in approved.digests.items() if label in now.digests}
        approved = Digests(approved.code, kept)
    wrong = verdict(name, now, approved, remedy)
    if wrong and UPDATE and (UPDATE == "same" or "has changed" not in wrong):
        GOLDEN.write_bytes(
            msgspec.json.format(
                msgspec.json.encode(dict(sorted({**golden(), name: now}.items()))), indent=1
            )
            + b"\n"
        )
        return
    assert not wrong, wrong


def digests_of(plan: Schedule, some: int | None = None, every: bool = True) -> Digests:
    """Today's digests of a schedule; of the first few kernels where that is enough, or of those of
    `code_digests.spread`.
    """
    kernels = list(code_digests.spread(plan, every))[:some]
    return Digests(
        plan.code,
        {
            label: code_digests.of(plan, case, setting, device)
            for label, case, setting, device in kernels
        },
    )


def remedy_of(plan: Schedule) -> str:
    """What to raise."""
    where = plan.path.relative_to(plan.path.parents[2])
    return (
        f"Raise `version` of the schedule in {where}, of the operator in lntune/ops/{plan.op}.py,"
        f" or LOWERING[{plan.kind!r}] in lntune/versions.py"
    )


@pytest.mark.parametrize("part", ["few", exhaustive("every")])
@pytest.mark.parametrize("name", PLANS)
def test_code_that_changes_has_another_version(name: str, part: str) -> None:
    """The kernels of a schedule, over a spread of cases, dtypes and knobs, are made of the code
    that its versions stand for.
    """
    every = part == "every" or bool(UPDATE)
    check(name, digests_of(PLANS[name], every=every), remedy_of(PLANS[name]), every)


LLVM = """define void @f(ptr %y, i64 %i) {
entry:
  %p = getelementptr float, ptr %y, i64 %i
  store <16 x float> zeroinitializer, ptr %p, align 4
  ret void
}
"""
CUDA = """extern "C" __global__ void __launch_bounds__(128) \
main_kernel(float* __restrict__ x_ptr, float* __restrict__ y_ptr) {
  float4 v = *(float4*)(x_ptr + (threadIdx.x * 4));
  *(float4*)(y_ptr + (threadIdx.x * 4)) = v;
}
"""


def edits() -> dict[str, Digests]:
    """What is done to the text of kernels after TVM's code generator, done to two samples."""
    launch = device_code.Launch("main_kernel", ("x", "y"), ("1", "1", "1"), (32, 4, 1))
    cpu = {str(width): code_digests.digest(streaming.edit(LLVM, "y", width)) for width in (32, 64)}
    gpu = {
        "hints": code_digests.digest(cache_hints.apply(CUDA, ("x", "y"))),
        "stores": code_digests.digest(
            device_code._complete(CUDA.replace("= *(", "= lntune_reload(x_ptr); *("), (launch,))
        ),
    }
    return {
        kind: Digests(Code(0, 0, versions.LOWERING[kind]), digests)
        for kind, digests in (("cpu", cpu), ("gpu", gpu))
    }


@pytest.mark.parametrize("kind", versions.LOWERING)
def test_edits_that_change_have_another_version(kind: str) -> None:
    """What is edited of LLVM IR and CUDA source is edited as the version of the lowering says."""
    check(
        f"edits of {kind} kernels", edits()[kind], f"Raise LOWERING[{kind!r}] in lntune/versions.py"
    )


def test_golden_digests_belong_to_schedules() -> None:
    """Nothing is left of a schedule that is gone."""
    assert set(golden()) == {*PLANS, *(f"edits of {kind} kernels" for kind in versions.LOWERING)}


def in_a_schedule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Schedule:
    """cached_rows with another constant in its file."""
    path = tmp_path / "cpu" / "layer_norm.py"
    path.parent.mkdir()
    text = PLANS["cached_rows"].path.read_text()
    assert "alignment.element_aligned(" in text
    path.write_text(text.replace("alignment.element_aligned(", "("))
    return next(s for s in schedule.load_file(path, "cpu") if s.name == "cached_rows")


def in_an_operator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Schedule:
    """Layer norm of two elements more than a row has."""
    from lntune.ops import layer_norm

    op = ops.get("layer_norm")
    define: Callable[..., Any] = layer_norm.define
    another = dataclasses.replace(
        op,
        define=lambda case, *args, **options: define(
            msgspec.structs.replace(case, hidden=case.hidden + 2), *args, **options
        ),
    )
    real = ops.get
    monkeypatch.setattr(ops, "get", lambda name: another if name == "layer_norm" else real(name))
    return PLANS["cached_rows"]


def in_a_transformation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Schedule:
    """Sums in lanes with shorter chains of adds."""
    monkeypatch.setattr(row_sums, "CHUNK", 8)
    return PLANS["cached_rows"]


def in_a_transformation_for_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Schedule:
    """A row's sum on GPUs that a constant is added to."""
    real = threads.row_sum
    monkeypatch.setattr(
        threads,
        "row_sum",
        lambda rows, hidden, expressions, name: real(
            rows, hidden, [lambda i, k, f=f: f(i, k) + 1.0 for f in expressions], name
        ),
    )
    return PLANS["shared_row"]


@pytest.mark.parametrize(
    "change", [in_a_schedule, in_an_operator, in_a_transformation, in_a_transformation_for_gpus]
)
def test_a_change_is_seen(
    change: Callable[[pytest.MonkeyPatch, Path], Schedule],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Another constant in a schedule, an operator or a transformation is a change without a raised
    version, and the answer says what to raise.
    """
    plan = change(monkeypatch, tmp_path)
    before = golden()[plan.name]
    now = digests_of(plan, 2)
    approved = Digests(before.code, {label: before.digests[label] for label in now.digests})
    message = verdict(plan.name, now, approved, remedy_of(plan))
    assert "its versions have not" in message
    assert f"LOWERING[{plan.kind!r}]" in message
    raised = Digests(
        Code(before.code.schedule, before.code.op, before.code.lowering + 1), now.digests
    )
    assert "has changed" not in verdict(plan.name, raised, approved, "")
    assert not verdict(plan.name, approved, approved, "")


@pytest.mark.parametrize(
    ("labels", "of_defaults"),
    [(("a default x",), True), (("a default x", "a width=2 x"), False), (("a width=2 x",), False)],
)
def test_other_defaults_are_not_other_code(labels: tuple[str, ...], of_defaults: bool) -> None:
    """Where only kernels with default knobs have changed, the answer names the way on for who has
    edited `default` alone.
    """
    approved = Digests(Code(1, 1, 1), {"a default x": "1", "a width=2 x": "2"})
    now = Digests(approved.code, approved.digests | dict.fromkeys(labels, "other"))
    message = verdict("some", now, approved, "Raise it")
    assert "has changed" in message and "Raise it" in message
    assert ("Where `default` alone was edited" in message) == of_defaults


def test_records_of_before_there_were_versions() -> None:
    """The hash of source files in old records stands for the versions those files are known by; one
    that is not known, for none.
    """
    finals = records.read([paths.PACKAGE.parent / "tuning_logs"], "layer_norm", role="final")
    assert finals
    assert {r.code for r in finals if r.schema < records.SCHEMA} <= {Code(1, 1, 1)}
    assert versions.of_hash("ffffffffffff") == Code()


def test_an_old_line_keeps_its_versions(tmp_path: Path) -> None:
    """A line of schema 2 is read with versions in place of its hash, and takes them along when it
    is written again.
    """
    record = Record(
        case=Case("layer_norm", 64, "float32", 8),
        device=code_digests.DEVICES["cpu"][0],
        threads=2,
        schedule="cached_rows",
        knobs={},
        status="ok",
    )
    records.append(tmp_path, record)
    (path,) = tmp_path.glob("*/*.jsonl")
    line = msgspec.json.decode(path.read_bytes())
    line |= {"schema": 2, "source": "01b7e0bcf590"}
    del line["code"]
    path.write_bytes(msgspec.json.encode(line) + b"\n")
    (read,) = records.read([tmp_path])
    assert read.code == Code(1, 1, 1)


def test_a_cached_kernel_follows_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel built of code that was edited since, under the same versions, is not taken for
    built, where it can be built anew.
    """
    plan, case, here = PLANS["cached_rows"], Case("layer_norm", 48, "float32", 8), device.current()
    setting = plan.untuned(case, here)
    cache.prepare(case, plan, setting, here)
    assert cache.built(case, plan, setting, here)
    monkeypatch.setattr(sources, "unchanged", lambda kept, schedule: False)
    assert not cache.built(case, plan, setting, here)
    monkeypatch.setattr(toolchain, "installed", lambda name: toolchain.MISSING)
    assert cache.built(case, plan, setting, here), "what cannot be built anew serves"
