"""CPU schedule for layer norm, backward.

`blocked_rows`: the rows are shared among blocks, each of contiguous rows (where cores write rows
next to each other, their prefetchers take lines away from one another, which can cost several times
the kernel's time); a block reads each of its rows of dy and x from memory once, sums them in vector
lanes, and while they are in the L1 cache writes dx and adds to its own partial sums of dgamma and
dbeta. The partial sums of all blocks are added at the end, in order. Several rows side by side
share the loads of weight and the read-modify-write of the partial sums.

What bfloat16 costs is arithmetic. With `pairs` it takes 22 operations on vectors for a vector of
float32 in place of 32 (one row at a time, AVX-512; bench/bfloat16_operations.py counts them): no
element leaves its lane to be widened or rounded, rstd is a factor of a row's sum instead of its
terms, and groups whose rows are all there have code without guards, in which dx and the partial
sums widen each element once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.device import Device
from lntune.knobs import knob
from lntune.schedule import Schedule
from lntune.transforms.cpu import (
    alignment,
    pairs,
    prefetch,
    row_sums,
    streaming,
    vectors,
    whole_groups,
)

SERIAL_LIMIT = 1 << 16
"""Elements above which one thread is never worth trying."""
PARALLEL_ELEMENTS = 1 << 13
"""Elements above which all threads are the better guess."""
UNKNOWN_L3 = 32 << 20
"""Bytes of the last level of cache assumed where the system does not say."""
PAIRED_REGISTERS = 32
"""Vector registers without which two rows of pairs side by side do not fit."""
REGISTERS = 8
"""Accumulators of the sums that fit the registers beside what is loaded; there are two sums."""


@dataclass(frozen=True)
class Blocks:
    """Knobs. A vector is a full vector register of float32."""

    blocks: int = knob(
        2,
        (1, 2, 4, 8, 16, 32, 64),
        "blocks of rows, each with partial sums of its own; more than one run in parallel",
    )
    together: int = knob(2, (1, 2, 4), "rows worked on side by side")
    lanes: int = knob(2, (1, 2, 4), "vectors that accumulate a row sum side by side")
    store: int = knob(1, (1, 2, 4), "vectors of output per step")
    prefetch: int = knob(
        1, (0, 1, 2), "groups of rows of dy and x fetched ahead while a row is summed"
    )
    write: str = knob(
        "plain",
        ("plain", "claimed", "streamed"),
        "dx stored as it comes, to cache lines claimed while a row is summed, or past the cache",
    )
    pairs: bool = knob(False, (False, True), "two bfloat16 in each lane of a vector, not one")


def _outputs(case: Case) -> list[str]:
    return [a.name for a in ops.get(case.op).arguments(case) if a.role == "out"]


def beyond_cache(case: Case, device: Device) -> bool:
    """True when dy, x and dx together are more than the last level of cache."""
    return 3 * case.rows * case.hidden * case.itemsize > (device.l3 or UNKNOWN_L3)


def valid(knobs: Blocks, case: Case, device: Device) -> str | None:
    """What the schedule refuses."""
    vector = device.vector_bytes // 4
    width = max(knobs.lanes, knobs.store) * vector
    if knobs.pairs and case.dtype != "bfloat16":
        return f"{case.dtype} is not widened in pairs"
    if knobs.pairs and case.hidden % 2:
        return f"a row of {case.hidden} elements is not whole pairs"
    columns = case.hidden // (2 if knobs.pairs else 1)
    if max(knobs.lanes, knobs.store) > 1 and width > columns:
        what = "pairs" if knobs.pairs else "elements"
        return f"{width} lanes are more than the {columns} {what} of a row"
    if knobs.blocks * knobs.together > max(case.rows, 1):
        return f"{knobs.blocks} blocks of {knobs.together} rows are more than the {case.rows} rows"
    if knobs.together * knobs.lanes * (2 if knobs.pairs else 1) > REGISTERS:
        return f"{knobs.together} rows of {knobs.lanes} accumulators do not fit the registers"
    if knobs.blocks > 1 and device.cores == 1:
        return "one core has no use for blocks"
    if knobs.blocks == 1 and device.cores > 1 and case.rows * case.hidden > SERIAL_LIMIT:
        return f"{case.rows} x {case.hidden} elements leave the other threads idle"
    if knobs.blocks > 8 * device.cores:
        return f"{knobs.blocks} blocks are more than balance the load of {device.cores} cores"
    if knobs.prefetch and case.rows == 1:
        return "there is no next row to fetch"
    if "dx" not in _outputs(case):
        if knobs.prefetch or knobs.write != "plain" or knobs.lanes > 1:
            return "without dx no row is summed, and nothing is written"
        return None
    if (knobs.prefetch or knobs.write == "claimed") and columns < 2 * knobs.lanes * vector:
        return "a row is too short to fetch another beside it"
    if knobs.write == "streamed" and knobs.blocks == 1:
        return "only the launcher of parallel loops orders streamed stores"
    if knobs.write == "streamed" and not beyond_cache(case, device):
        return (
            "dx fits the cache with what it is made from, where whoever reads it next will look"
            " for it"
        )
    return None


def default(case: Case, device: Device) -> Blocks:
    """As many blocks as cores, and what hides latency without spilling registers."""
    in_pairs = case.dtype == "bfloat16" and case.hidden % 2 == 0
    columns = case.hidden // (2 if in_pairs else 1)
    whole_vectors = vectors.floor_power(max(1, columns * 4 // device.vector_bytes))
    elements = case.rows * case.hidden
    parallel = device.cores > 1 and case.rows > 1 and elements > PARALLEL_ELEMENTS
    blocks = (
        min(vectors.floor_power(max(1, device.cores)), vectors.floor_power(max(1, case.rows)), 64)
        if parallel
        else 1
    )
    fits = not in_pairs or device.vector_registers >= PAIRED_REGISTERS
    together = 2 if fits and case.rows >= 2 * blocks and case.rows > 1 else 1
    if "dx" not in _outputs(case):
        return Blocks(blocks, together, lanes=1, store=1, prefetch=0, pairs=in_pairs)
    lanes = min(1 if in_pairs else 2, whole_vectors)
    ahead = columns >= 2 * lanes * device.vector_bytes // 4
    write = "streamed" if blocks > 1 and beyond_cache(case, device) else "plain"
    return Blocks(
        blocks=blocks,
        together=together,
        lanes=lanes,
        store=min(2, whole_vectors),
        prefetch=int(ahead and case.rows > 1),
        write=write,
        pairs=in_pairs,
    )


def seeds(case: Case, device: Device) -> list[Blocks]:
    """What wins most often beside the default knobs: one row at a time and none fetched ahead (rows
    that are in a cache, 16 vector registers), more blocks than cores (many rows).
    """
    first = default(case, device)
    found = [replace(first, together=1, prefetch=0), replace(first, prefetch=0)]
    if first.blocks > 1:
        found[1:1] = [replace(first, blocks=n * first.blocks) for n in (2, 8)]
    return found


def apart(knobs: Blocks) -> Blocks:
    """For rows that need not begin where a pair does."""
    return replace(knobs, pairs=False) if knobs.pairs else knobs


def apply(case: Case, knobs: Blocks, device: Device) -> Any:
    """Steps: 1 define, 2 widening, 3 one loop over blocks and groups of rows, 4 sums, 5 dx, partial
    sums, 6 totals, 7 prefetch, 8 streaming.
    """
    from tvm import s_tir

    vector = device.vector_bytes // 4
    step, width = knobs.store * vector, 2 if knobs.pairs else 1

    given = ops.get(case.op).arguments(case)

    # 1. The definition, summed in lanes; arguments at any address an element may have.
    definition = ops.get(case.op).define(
        case,
        row_sums.staged_sum(knobs.lanes * vector, width),
        knobs.together,
        knobs.blocks,
        contiguous=True,
        pairs=knobs.pairs,
    )
    sch = s_tir.Schedule(alignment.element_aligned(definition))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}

    # 2. What is widened on the fly disappears; a float32 weight is taken apart for pairs once.
    weight_apart = knobs.pairs and any(a.name == "weight" and a.dtype == "float32" for a in given)
    for name in list(blocks):
        if name.startswith("weight32") and weight_apart:
            sch.annotate(sch.get_loops(blocks.pop(name))[0], vectors.VECTORS, step)
        elif name.startswith(("dy32", "x32", "weight32")):
            sch.compute_inline(blocks.pop(name))

    # 3. Rows as block x group x row of the group; dx and the partial sums in one loop over the
    # elements of the rows side by side, and that in one loop with all stages over rows.
    totals = {
        name: blocks.pop(name) for name in list(blocks) if name.startswith(("dgamma", "dbeta"))
    }
    per_row = {name: block for name, block in blocks.items() if name not in ("dx", "blocks")}
    elements, group_loops = [], []
    for name, block in blocks.items():
        if name == "blocks":
            b, k, group, side = sch.get_loops(block)
            sch.reorder(b, group, k, side)
            elements.append(k)
        else:
            # of stages the predicates are dropped in the end, and would take most of the time here
            b, group, side = sch.split(
                sch.get_loops(block)[0],
                [knobs.blocks, None, knobs.together],
                disable_predication=name != "dx",
            )
            if name == "dx":
                k = sch.get_loops(block)[3]
                sch.reorder(k, side)
                elements.append(k)
            else:
                group_loops.append(group)
    k = sch.merge(*elements) if len(elements) > 1 else elements[0]
    group_loops.append(
        sch.get_loops(next(b for name, b in blocks.items() if name not in per_row))[1]
    )
    group = sch.merge(*group_loops) if len(group_loops) > 1 else group_loops[0]
    if knobs.blocks > 1:
        sch.parallel(sch.get_loops(next(iter(blocks.values())))[0])

    # 4. Sums and scalars of a row.
    fetching = "row_lanes" if knobs.prefetch or knobs.write == "claimed" else None
    row_sums.vectorize_sums(sch, per_row, 2, 1, fetching)

    # 5. dx and the partial sums by whole vectors; the sums are in memory, the rows side by side
    # added in registers.
    sch.annotate(k, vectors.VECTORS, step)
    for name, block in blocks.items():
        if name not in per_row:
            sch.unroll(sch.get_loops(block)[-1])
    if "blocks" in blocks:
        sch.annotate(
            sch.get_loops(sch.decompose_reduction(blocks["blocks"], group))[-1],
            vectors.VECTORS,
            step,
        )

    # 6. What the blocks come to.
    woven = [a.name for a in given if knobs.pairs and a.dtype == "float32"]
    for name, block in totals.items():
        if name in woven:  # of first and second elements: no vectors of either
            continue
        k, *block_loop = sch.get_loops(block)
        sch.annotate(k, vectors.VECTORS, step)
        if block_loop:
            sch.reorder(*block_loop, k)
            sch.annotate(
                sch.get_loops(sch.decompose_reduction(block, block_loop[0]))[-1],
                vectors.VECTORS,
                step,
            )

    # 7. Guards that only dx needs; rows fetched while others are summed.
    names = [a.name for a in given]
    itemsize = case.itemsize * width
    fetches = [
        prefetch.Prefetch(names.index(name), knobs.prefetch, False, itemsize)
        for name in ("dy", "x")
        if knobs.prefetch
    ]
    if knobs.write == "claimed":
        fetches.append(prefetch.Prefetch(names.index("dx"), 0, True, itemsize))
    mod = vectors.drop_predicates(sch.mod, ("dx",))
    if knobs.pairs:
        mod = whole_groups.without_guards(mod, knobs.together)
    mod = vectors.split_vectors(mod)
    if fetches:
        mod = prefetch.prefetch_rows(mod, fetches, knobs.together, shared=True)
    if knobs.pairs:
        mod = pairs.as_elements(mod, given)

    # 8. A dx too large for the cache is written without being read first.
    return streaming.request(mod, "dx") if knobs.write == "streamed" else mod


SCHEDULES = (
    Schedule(
        "blocked_rows",
        "layer_norm_backward",
        "cpu",
        Blocks,
        default,
        valid,
        apply,
        version=2,
        apart=apart,
        seeds=seeds,
    ),
)
