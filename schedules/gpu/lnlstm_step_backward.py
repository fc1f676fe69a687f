"""LN-LSTM step backward on GPUs: one kernel; blocks of threads take turns at the rows, which are the sequences of the batch.

A thread has the same elements of all four gates. The gates are made again and stay in registers with what comes of them, as do the
thread's own shares of the sums over rows, which it adds to its block's row of them once, after its last turn: no atomics, and the same
bits at every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lntune import ops
from lntune.case import Case
from lntune.cuda.architectures import REGISTERS, REGISTERS_PER_THREAD, THREADS_PER_BLOCK
from lntune.device import Device
from lntune.gpu import gates, ragged, threads, turns
from lntune.knobs import knob
from lntune.ops.lnlstm_step import tokens_of
from lntune.ops.lnlstm_step_backward import sums as sums_of
from lntune.schedule import Schedule

OTHERS = 54  # registers of a thread for anything but its part of the row, the addresses of twenty tensors among it
LAST_RESORT = 256  # threads from which on registers may spill, where nothing that fits does not
OUTPUTS = ("dgates_x", "dgates_h", "dc")
OVER_ROWS = ("sums_gates", "sums_hidden")
STAGES = ("z", "act", "xhat_c", "inner", "tanh_inner", "dinner", "dcell", "dz")
ROW_SUMS = ("cell", "gates", f"gates{gates.EXCHANGED}")
OF_GATES = ("z", "act", "dz", *ROW_SUMS[1:], "dgates_x", "dgates_h", "sums_gates")


@dataclass(frozen=True)
class Knobs:
    """Knobs of `gated_turns`."""

    threads: int = knob(128, (32, 64, 128, 256, 512, 1024), "threads that share a row")
    access: int = knob(4, (1, 2, 4, 8), "elements of one load or store")
    keep: str = knob("registers", ("registers", "again"), "where what is read of a row stays between its uses; again: in memory")
    sums: str = knob("registers", ("registers", "memory"), "where sums over rows are while a block has turns; memory: added to at each")
    ahead: bool = knob(True, (False, True), "gains and biases are loaded once a row, before its first stage")


def summed(case: Case) -> int:
    """Sums over rows that each element of the cell has part in."""
    return sum(4 if size == "gates" else 1 for size in sums_of(tokens_of(case)).values())


def registers_of(knobs: Knobs, case: Case) -> int:
    """32-bit registers that a thread's part of the row and of the sums takes."""
    tokens, access = tokens_of(case), max(4, knobs.access * case.itemsize) // 4
    kept = summed(case) if knobs.sums == "registers" else summed(case) / 2  # what a turn adds lives shortly
    matrices = 4 * (1 + ("raw" in tokens)) + 3 if knobs.keep == "registers" else 0
    vectors = 4 * (1 + ("raw" in tokens)) + 1 if knobs.ahead else 0
    return gates.turns_of(case, knobs.threads, knobs.access) * int((kept + 4 + 3) * knobs.access + (matrices + vectors) * access)


def valid(knobs: Knobs, case: Case, device: Device) -> str | None:
    """Why the knobs do not fit, or None."""
    if reason := gates.misfit(case, knobs.threads, knobs.access):
        return reason
    room = min(REGISTERS_PER_THREAD, REGISTERS // knobs.threads)
    # 16 elements are what 1024 threads have each of the longest row.
    few = gates.turns_of(case, knobs.threads, knobs.access) * knobs.access <= 16 and knobs.threads >= LAST_RESORT
    least = knobs.keep == "again" and knobs.sums == "memory" and not knobs.ahead and few
    if registers_of(knobs, case) + OTHERS > room and not least:
        return f"{registers_of(knobs, case)} registers for a thread's part of the row; with {OTHERS} others they do not fit {knobs.threads} threads"
    return None


def default(case: Case, device: Device) -> Knobs:
    """Wide accesses, one to a thread if so many threads fit; what registers hold of sums and rows, in this order."""
    access = threads.widest(case)
    narrow = (access, max(1, access // 2))
    for where in ("registers", "memory"):
        for each in narrow:
            several = next((t for t in (32, 64, 128, 256, 512) if t * each >= case.hidden), THREADS_PER_BLOCK)
            for ahead in (True, False):
                for shared in (several, *(t for t in (512, 256, 128) if t < several)):
                    found = Knobs(shared, each, "registers", where, ahead)
                    if valid(found, case, device) is None:
                        return found
    several = next((t for t in (LAST_RESORT, 512) if 12 * t >= case.hidden), THREADS_PER_BLOCK)
    return Knobs(several if several * access < 2 * case.hidden else LAST_RESORT, access, "again", "memory", ahead=False)


def apply(case: Case, knobs: Knobs, device: Device) -> Any:
    """The kernel, step by step.

    1. The definition, with the device's activations; gate and element two loops.
    2. Blocks of threads and their turns; all stages in one loop over a block's turns.
    3. What is loaded once for several stages, or before its turn.
    4. Stages and outputs in registers, each access of what they read loaded at once; sums of a row exchanged.
    5. The thread's sums over rows, added to its block's once or at each turn.
    6. Turns end where the rows do.
    """
    from tvm import s_tir

    deal, count = gates.Deal(case.hidden, knobs.threads, knobs.access), case.blocks(device.cores)
    arguments = {a.name: a.shape[-1] for a in ops.get(case.op).arguments(case)}

    # 1.
    definition = turns.named(ops.get(case.op).define(case, gates.row_sum(case.hidden), 1, count), list(arguments))
    sch = s_tir.Schedule(turns.unpadded(gates.native(definition)))
    for name in (*STAGES, *OUTPUTS):
        if name in OF_GATES:
            gates.apart(sch, sch.get_sblock(name), case.hidden)
    sch = s_tir.Schedule(gates.settled(sch.mod))
    blocks = {sch.get(b).name_hint: b for b in sch.get_child_blocks(sch.get_sblock("root"))}

    # 2.
    looped = []
    for name, block in blocks.items():
        if name.startswith("sums_"):
            looped.append(gates.turns_first(sch, block, case.hidden, name in OF_GATES))
        else:
            turn, b = sch.split(sch.get_loops(block)[0], [None, count], preserve_unit_iters=True)
            sch.reorder(b, turn)
            looped.append(turn)
    turn = sch.merge(*looped)
    b = sch.get_loops(blocks["z"])[0]
    sch.bind(b, "blockIdx.x")

    # 3.
    readers: dict[str, list[Any]] = {}
    for block in blocks.values():
        for name in (str(r.source.name) for r in sch.get(block).reads):
            if name in arguments:
                readers.setdefault(name, []).append(block)
    matrices = {a.name for a in ops.get(case.op).arguments(case) if len(a.shape) > 1}
    for name, consumers in reversed(readers.items()):  # each comes before those of before; what is needed first is to be first
        if arguments[name] == "rows":
            gates.keep_scalar(sch, consumers, name, turn)
        elif knobs.keep == "registers" if name in matrices else knobs.ahead:
            deal.keep(sch, consumers, name, turn, gates=arguments[name] == "gates")

    # 4.
    for name, block in blocks.items():
        wide, thread = name in OF_GATES, None
        if name in OVER_ROWS:
            continue
        if name in OUTPUTS:
            thread = deal.output(sch, block, wide)
        elif name in STAGES:
            thread = deal.stage(sch, block, wide)
        else:
            thread = deal.loops(sch, block, wide) if name in ROW_SUMS else None
            for index in range(len(sch.get(block).writes)):
                sch.set_scope(block, index, "local")
        for read in gates.inputs(sch, block, case) if thread else []:
            deal.fetch(sch, block, read, thread, gates=arguments[read] == "gates")

    # 5.
    added = []
    for name in OVER_ROWS:
        thread = deal.loops(sch, blocks[name], name in OF_GATES)
        for read in gates.inputs(sch, blocks[name], case):
            deal.fetch(sch, blocks[name], read, thread, gates=arguments[read] == "gates")
        added += deal.sums(sch, blocks[name], b, turn, name in OF_GATES)

    # 6.
    sch.annotate(turn, turns.TURNS, count)
    made = turns.add(ragged.asked_where_it_matters(sch.mod), added)
    return turns.trim(turns.each(made) if knobs.sums == "memory" else made)


SCHEDULES = (Schedule("gated_turns", "lnlstm_step_backward", "gpu", Knobs, default, valid, apply),)
