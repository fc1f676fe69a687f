"""CPU schedules for layer norm, forward.

Two ways to read a row three times (sum, squares, output):

* `cached_rows` reads it from memory and then twice from the L1 or L2 cache, widening low precision each time;
* `widened_rows` widens it once into a float32 row on the stack of the task, and the affine vectors once per call.

Both sum in vector lanes that are halved stage by stage. Rejected, after trying: `rfactor` of a plain reduction (it loses
the tail predicate when the stages are fused, and a single rfactor leaves a chain of 64 dependent adds a row); Welford in
one pass (a division a step, slower than the two passes it saves); TVM's default space (five loops over memory, no fusion).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lntune import loops, ops
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.schedule import Schedule

SERIAL_LIMIT = 1 << 17
"""Elements above which one thread is never worth trying; below, waking the others may cost more than they save."""


@dataclass(frozen=True)
class CachedRows:
    """Knobs of `cached_rows`."""

    lanes: int = knob(4, (1, 2, 4, 8), "vector registers that accumulate a row sum side by side")
    store: int = knob(2, (1, 2, 4), "vector registers of output per step")
    unroll: int = knob(1, (1, 2, 4), "steps of the summing loops in one iteration")
    prefetch: int = knob(1, (0, 1, 2), "rows fetched ahead while a row's squares are summed")
    affine32: bool = knob(False, (False, True), "weight and bias widened to float32 once per call")
    parallel: bool = knob(True, (False, True), "rows shared among the threads")


@dataclass(frozen=True)
class WidenedRows:
    """Knobs of `widened_rows`."""

    lanes: int = knob(4, (1, 2, 4, 8), "vector registers that accumulate a row sum side by side")
    store: int = knob(2, (1, 2, 4), "vector registers of output per step")
    unroll: int = knob(1, (1, 2, 4), "steps of the summing loops in one iteration")
    affine32: bool = knob(True, (False, True), "weight and bias widened to float32 once per call")
    parallel: bool = knob(True, (False, True), "rows shared among the threads")


def _valid(knobs: Any, case: Case, device: Device) -> str | None:
    """What both schedules refuse."""
    vector = device.vector_bytes // 4
    width = max(knobs.lanes, knobs.store) * vector
    if max(knobs.lanes, knobs.store) > 1 and width > case.hidden:
        return f"{width} lanes are more than the {case.hidden} elements of a row"
    if knobs.unroll > 1 and case.hidden // (knobs.lanes * vector) < knobs.unroll:
        return f"a row has fewer than {knobs.unroll} groups of {knobs.lanes * vector} elements to unroll"
    if knobs.parallel and case.rows == 1:
        return "one row cannot be shared among threads"
    if not knobs.parallel and device.cores > 1 and case.rows * case.hidden > SERIAL_LIMIT:
        return f"{case.rows} x {case.hidden} elements leave the other threads idle"
    if knobs.affine32 and case.dtype == "float32":
        return "a float32 weight and bias need no widening"
    return None


def valid_cached(knobs: CachedRows, case: Case, device: Device) -> str | None:
    """Prefetching wants a loop to sit in and another row to come."""
    if knobs.prefetch and case.rows == 1:
        return "there is no next row to fetch"
    if knobs.prefetch and case.hidden < 2 * knobs.lanes * device.vector_bytes // 4 * knobs.unroll:
        return "a row is too short to fetch another beside it"
    return _valid(knobs, case, device)


def valid_widened(knobs: WidenedRows, case: Case, device: Device) -> str | None:
    """float32 has nothing to widen."""
    if case.dtype == "float32":
        return "float32 rows need no widening"
    return _valid(knobs, case, device)


def _default(cls: type, case: Case, device: Device, valid: Any) -> Any:
    """The dataclass's defaults, each given up in turn until the case takes them."""
    vector = device.vector_bytes // 4
    fit = max(1, case.hidden // vector)
    parallel = case.rows > 1 and not (device.cores > 1 and case.rows * case.hidden <= SERIAL_LIMIT // 8)
    wish: dict[str, Any] = {"lanes": min(4, loops.floor_power(fit)), "store": min(2, loops.floor_power(fit)), "parallel": parallel}
    if cls is WidenedRows:
        wish["affine32"] = case.rows >= 32
    for extra in ({}, {"prefetch": 0}, {"affine32": False}, {"prefetch": 0, "affine32": False}):
        if not set(extra) <= set(cls.__dataclass_fields__):  # type: ignore[attr-defined]
            continue
        for serial in (wish["parallel"], not wish["parallel"]):
            knobs = cls(**{**wish, **extra, "parallel": serial})
            if valid(knobs, case, device) is None:
                return knobs
    return cls(**{**wish, "lanes": 1, "store": 1})


def default_cached(case: Case, device: Device) -> CachedRows:
    """Four accumulators hide the latency of an add on every CPU so far."""
    return _default(CachedRows, case, device, valid_cached)


def default_widened(case: Case, device: Device) -> WidenedRows:
    """As `cached_rows`; the affine is widened when enough rows share the work."""
    return _default(WidenedRows, case, device, valid_widened)


def _apply(case: Case, knobs: Any, device: Device, keep_rows: bool) -> Any:
    """Steps: 1 define, 2 widening, 3 one loop over rows, 4 sums, 5 outputs, 6 prefetch."""
    from tvm import s_tir

    vector = device.vector_bytes // 4

    # 1. The definition, summed in lanes; arguments at any address an element may have.
    func = loops.element_aligned(ops.get(case.op).define(case, loops.staged_sum(knobs.lanes * vector)))
    sch = s_tir.Schedule(func)
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}

    # 2. What is widened on the fly disappears; an affine widened once stays in front of the loop over rows.
    if not keep_rows:
        sch.compute_inline(blocks.pop("x32"))
    for name in ("weight32", "bias32"):
        if name in blocks:
            block = blocks.pop(name)
            if knobs.affine32:
                loops.exact_vectors(sch, sch.get_loops(block)[0], knobs.store * vector)
            else:
                sch.compute_inline(block)

    # 3. All stages into one loop over rows. merge keeps every block as it is, outputs among them, where compute_at refuses.
    leading = {name: sch.get_loops(b)[:-1] for name, b in blocks.items() if name == "y"}
    rows = sch.merge(*[sch.fuse(*leading[name]) if name in leading else sch.get_loops(b)[0] for name, b in blocks.items()])
    if knobs.parallel:
        sch.parallel(rows)

    # 4. Sums: groups outside, lanes inside as one wide vector that LLVM keeps in registers.
    for name, block in blocks.items():
        if name.endswith("_lanes"):
            lane, group = sch.get_loops(block)[1:]
            sch.reorder(group, lane)
            sch.vectorize(lane)
            step = int(sch.get(lane).extent)
            if knobs.unroll > 1 and int(sch.get(group).extent) % knobs.unroll == 0:
                group, inner = sch.split(group, [None, knobs.unroll])
                sch.unroll(inner)
                step *= knobs.unroll
            if name == "centred_lanes" and getattr(knobs, "prefetch", 0):
                sch.annotate(group, loops.PREFETCH, step)  # after the split, which refuses an annotated loop
            init = sch.decompose_reduction(block, group)
            sch.vectorize(sch.get_loops(init)[-1])
        elif "_tree" in name:
            sch.vectorize(sch.get_loops(block)[1])

    # 5. Outputs (and the widened row) by whole vectors.
    for name in ("x32", "y"):
        if name in blocks:
            loops.exact_vectors(sch, sch.get_loops(blocks[name])[1], knobs.store * vector)

    # 6. The next rows, fetched while this one is summed.
    if getattr(knobs, "prefetch", 0):
        return loops.prefetch_rows(sch.mod, knobs.prefetch, case.itemsize)
    return sch.mod


def apply_cached(case: Case, knobs: CachedRows, device: Device) -> Any:
    """The row is read from memory once and from the cache twice."""
    return _apply(case, knobs, device, keep_rows=False)


def apply_widened(case: Case, knobs: WidenedRows, device: Device) -> Any:
    """The row is widened once into a float32 copy that all three passes read."""
    return _apply(case, knobs, device, keep_rows=True)


SCHEDULES = (
    Schedule("cached_rows", "layer_norm", "cpu", CachedRows, default_cached, valid_cached, apply_cached),
    Schedule("widened_rows", "layer_norm", "cpu", WidenedRows, default_widened, valid_widened, apply_widened),
)
