"""CPU schedules for layer norm, forward.

Two ways to read a row three times (sum, squares, output):

* `cached_rows` reads it from memory and then twice from the L1 or L2 cache, widening low precision
  each time. What bfloat16 costs is arithmetic: with `pairs` it takes 13 operations on vectors for
  a vector of float32 in place of 20, of which 2.6 in place of 9.5 are shifts and shuffles, for
  which there are half as many units (bench/bfloat16_operations.py counts them): no element leaves
  its lane to be widened or rounded, and with `sample` most of the first pass is left out;
* `widened_rows` widens it once into a float32 row on the stack of the task, and the affine vectors
  once per call.

Both sum in vector lanes that are halved stage by stage. Rejected after trying: `rfactor` of a plain
reduction (it loses the tail predicate when the stages are fused, and a single rfactor leaves a
chain of 64 dependent adds a row). Not tried: Welford in one pass (a division for each step of a
chain).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.schedule import Schedule
from lntune.transforms.cpu import alignment, pairs, prefetch, row_sums, streaming, vectors

SERIAL_LIMIT = 1 << 17
"""Elements above which one thread is never worth trying; below, waking the others may cost more
than they save.
"""
PARALLEL_ELEMENTS = 1 << 14
"""Elements above which all threads are the better guess: sharing costs about a microsecond, 16k
elements about four.
"""
AFFINE_ROWS = 128
"""Rows from which on widening weight and bias once pays for itself."""
UNKNOWN_L2 = 1 << 20
UNKNOWN_L3 = 32 << 20
"""Bytes of L2 cache per core, and of the last level, assumed where the system does not say."""

SAMPLED, LEAST_SAMPLED = 4, 64
"""A sample is one of so many elements of a row that has at least so many: with it the sum of
squares is at most five times the variance, whatever the row (ops/moments.py).
"""
REGISTERS = 8
"""Accumulators of a pass that fit the registers beside what is loaded; the second pass has two for
each.
"""


@dataclass(frozen=True)
class Rows:
    """Knobs of both schedules. A vector is a full vector register of float32."""

    lanes: int = knob(4, (1, 2, 4, 8), "vectors that accumulate a row sum side by side")
    store: int = knob(2, (1, 2, 4), "vectors of output per step")
    unroll: int = knob(1, (1, 2, 4), "steps of the summing loops in one iteration")
    together: int = knob(1, (1, 2, 4), "rows worked on side by side")
    prefetch: int = knob(1, (0, 1, 2), "groups of rows of x fetched ahead while squares are summed")
    write: str = knob(
        "plain",
        ("plain", "claimed", "streamed"),
        "y stored as it comes, to cache lines claimed while squares are summed, or past the cache",
    )
    affine32: bool = knob(False, (False, True), "weight and bias widened to float32 once per call")
    parallel: bool = knob(True, (False, True), "rows shared among the threads")
    pairs: bool = knob(False, (False, True), "two bfloat16 in each lane of a vector, not one")
    sample: bool = knob(False, (False, True), "the first mean is of a fourth of a row, not of all")


def valid(knobs: Rows, case: Case, device: Device) -> str | None:
    """What both schedules refuse."""
    vector = device.vector_bytes // 4
    width = max(knobs.lanes, knobs.store) * vector
    if reason := _valid_in_low_precision(knobs, case):
        return reason
    columns = case.hidden // (2 if knobs.pairs else 1)
    if max(knobs.lanes, knobs.store) > 1 and width > columns:
        what = "pairs" if knobs.pairs else "elements"
        return f"{width} lanes are more than the {columns} {what} of a row"
    steps = row_sums.chains(case.hidden, knobs.lanes * vector)[2]
    if steps % knobs.unroll:
        return (
            f"{steps} steps of {knobs.lanes * vector} elements are not a multiple of {knobs.unroll}"
            " to unroll"
        )
    if knobs.together > 1 and case.rows == 1:
        return "one row has no other beside it"
    if knobs.together * knobs.lanes * (2 if knobs.pairs else 1) > REGISTERS:
        return f"{knobs.together} rows of {knobs.lanes} accumulators do not fit the registers"
    if knobs.parallel and case.rows == 1:
        return "one row cannot be shared among threads"
    if not knobs.parallel and device.cores > 1 and case.rows * case.hidden > SERIAL_LIMIT:
        return f"{case.rows} x {case.hidden} elements leave the other threads idle"
    if knobs.prefetch and case.rows == 1:
        return "there is no next row to fetch"
    if (
        knobs.prefetch or knobs.write == "claimed"
    ) and columns < 2 * knobs.lanes * vector * knobs.unroll:
        return "a row is too short to fetch another beside it"
    if knobs.write == "streamed" and not knobs.parallel:
        return "only the launcher of parallel loops orders streamed stores"
    if knobs.write == "streamed" and not beyond_cache(case, device):
        return "x and y fit the cache, where whoever reads y next will look for it"
    if knobs.affine32 and case.dtype == "float32":
        return "a float32 weight and bias need no widening"
    return None


def _valid_in_low_precision(knobs: Rows, case: Case) -> str | None:
    """What is refused of the knobs that are for bfloat16 and float16 only."""
    if knobs.pairs:
        if case.dtype != "bfloat16":
            return f"{case.dtype} is not widened in pairs"
        if case.hidden % 2:
            return f"a row of {case.hidden} elements is not whole pairs"
        if knobs.unroll > 1:
            return "a step of pairs is two steps already"
        if "32" in case.variant and not knobs.affine32:
            return "a float32 weight or bias is taken apart for pairs once per call, or not at all"
    if knobs.sample:
        if case.dtype == "float32":
            return "the first mean of a float32 row is of all of it"
        if case.dtype == "bfloat16" and not knobs.pairs:
            return "the first mean is of a sample where bfloat16 is widened in pairs"
        if case.hidden < LEAST_SAMPLED:
            return f"a row of {case.hidden} elements is too short to take a sample of"
    return None


def apart(knobs: Rows) -> Rows:
    """For rows that need not begin where a pair does."""
    return replace(knobs, pairs=False, sample=False) if knobs.pairs else knobs


def beyond_cache(case: Case, device: Device) -> bool:
    """True when x and y together are more than the last level of cache."""
    return 2 * case.rows * case.hidden * case.itemsize > (device.l3 or UNKNOWN_L3)


def valid_widened(knobs: Rows, case: Case, device: Device) -> str | None:
    """float32 has nothing to widen, and pairs are widened by one operation wherever they are."""
    if case.dtype == "float32":
        return "float32 rows need no widening"
    if knobs.pairs:
        return "pairs are widened where they are used"
    return valid(knobs, case, device)


def default_widened(case: Case, device: Device) -> Rows:
    """As `default`, without pairs."""
    return _default(case, device, pairs=False)


def default(case: Case, device: Device) -> Rows:
    """bfloat16 in pairs, as far as rows are whole pairs."""
    return _default(case, device, case.dtype == "bfloat16" and case.hidden % 2 == 0)


def seeds(case: Case, device: Device) -> list[Rows]:
    """What wins most often beside the default knobs: more of the output at a time; short rows two
    at a time; long ones by more accumulators, the next not fetched ahead.
    """
    first = default(case, device)
    return [
        replace(first, store=4),
        replace(first, together=2),
        replace(first, lanes=2 * first.lanes, prefetch=0),
    ]


def _default(case: Case, device: Device, pairs: bool) -> Rows:
    """Four accumulators hide the latency of an add on every CPU so far; small work stays on one
    thread.

    Claiming lines that are in the cache anyway costs 10 %; claiming those that are not gains up to
    a half, and streaming them, where the data is beyond all caches, nearly as much again.
    """
    columns = case.hidden // (2 if pairs else 1)
    whole_vectors = vectors.floor_power(max(1, columns * 4 // device.vector_bytes))
    elements = case.rows * case.hidden
    lanes = min(2 if pairs else 4, whole_vectors)
    ahead = columns >= 2 * lanes * device.vector_bytes // 4
    parallel = case.rows > 1 and (elements > PARALLEL_ELEMENTS or device.cores == 1)
    if parallel and beyond_cache(case, device):
        write = "streamed"
    elif ahead and 2 * elements * case.itemsize > device.cores * (device.l2 or UNKNOWN_L2):
        write = "claimed"
    else:
        write = "plain"
    return Rows(
        lanes=lanes,
        store=min(2, whole_vectors),
        prefetch=int(ahead and case.rows > 1),
        write=write,
        affine32=case.dtype != "float32"
        and (case.rows >= AFFINE_ROWS or (pairs and "32" in case.variant)),
        parallel=parallel,
        pairs=pairs,
        sample=pairs and case.hidden >= LEAST_SAMPLED,
    )


def _apply(case: Case, knobs: Rows, device: Device, keep_rows: bool) -> Any:
    """Steps: 1 define, 2 widening, 3 one loop over groups of rows, 4 sums, 5 outputs, 6 prefetch, 7
    streaming.
    """
    from tvm import s_tir

    vector = device.vector_bytes // 4

    # 1. The definition, summed in lanes; arguments at any address an element may have.
    func = alignment.element_aligned(
        ops.get(case.op).define(
            case,
            row_sums.staged_sum(knobs.lanes * vector, 2 if knobs.pairs else 1),
            knobs.together,
            pairs=knobs.pairs,
            sample=case.hidden // SAMPLED // 2 * 2 if knobs.sample else 0,
        )
    )
    sch = s_tir.Schedule(func)
    outputs = [a.name for a in ops.get(case.op).arguments(case) if a.role == "out"]
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}

    # 2. What is widened on the fly disappears; an affine widened once stays in front of the loop
    # over rows.
    for name in list(blocks):
        if name.startswith("x32") and not keep_rows:
            sch.compute_inline(blocks.pop(name))
        elif name.startswith(("weight32", "bias32")):
            block = blocks.pop(name)
            if knobs.affine32:
                vectors.exact_vectors(sch, sch.get_loops(block)[0], knobs.store * vector)
            else:
                sch.compute_inline(block)

    # 3. All stages into one loop over groups. merge keeps every block as it is, outputs among them,
    # where compute_at refuses.
    outer = [
        sch.split(sch.get_loops(block)[0], [None, knobs.together])[0] for block in blocks.values()
    ]
    groups = sch.merge(*outer)
    if knobs.parallel:
        sch.parallel(groups)

    # 4. Sums and scalars; a widened row by whole vectors.
    per_row = {name: block for name, block in blocks.items() if name not in ("x32", *outputs)}
    row_sums.vectorize_sums(
        sch,
        per_row,
        1,
        knobs.unroll,
        "centred_lanes" if knobs.prefetch or knobs.write == "claimed" else None,
    )
    if keep_rows:
        vectors.exact_vectors(sch, sch.get_loops(blocks["x32"])[2], knobs.store * vector)

    # 5. Outputs by whole vectors.
    vectors.exact_vectors(sch, sch.get_loops(blocks["y"])[2], knobs.store * vector)

    # 6. Rows fetched while others are summed, when memory has nothing else to do: the next of x,
    # and the place of y.
    names = [a.name for a in ops.get(case.op).arguments(case)]
    itemsize = case.itemsize * (2 if knobs.pairs else 1)
    fetches = (
        [prefetch.Prefetch(names.index("x"), knobs.prefetch, False, itemsize)]
        if knobs.prefetch
        else []
    )
    if knobs.write == "claimed":
        fetches.append(prefetch.Prefetch(names.index("y"), 0, True, itemsize))
    mod = prefetch.prefetch_rows(sch.mod, fetches, knobs.together) if fetches else sch.mod

    if knobs.pairs:
        mod = pairs.as_elements(mod, ops.get(case.op).arguments(case))

    # 7. The lines of a y too large for the cache are written without being read first.
    return streaming.request(mod, "y") if knobs.write == "streamed" else mod


def apply_cached(case: Case, knobs: Rows, device: Device) -> Any:
    """The row is read from memory once and from the cache twice."""
    return _apply(case, knobs, device, keep_rows=False)


def apply_widened(case: Case, knobs: Rows, device: Device) -> Any:
    """The row is widened once into a float32 copy that all three passes read."""
    return _apply(case, knobs, device, keep_rows=True)


SCHEDULES = (
    Schedule(
        "cached_rows",
        "layer_norm",
        "cpu",
        Rows,
        default,
        valid,
        apply_cached,
        version=1,
        apart=apart,
        seeds=seeds,
    ),
    Schedule(
        "widened_rows",
        "layer_norm",
        "cpu",
        Rows,
        default_widened,
        valid_widened,
        apply_widened,
        version=1,
    ),
)
