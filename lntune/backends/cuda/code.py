"""A kernel's instructions counted by kind, whether they are read from machine code or from PTX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from lntune.backends.cuda import flow
from lntune.backends.cuda.flow import Instruction, Words


class Work(msgspec.Struct, frozen=True):
    """What a warp goes through at one depth of loops, on the way that flow.py takes through a
    kernel: issue slots (instructions), shuffles, barriers, loads and stores of global memory, and
    the bits that a thread moves by the widest of these. `ahead` are the loads among them that only
    a loop's next turn uses (of PTX; 0 of machine code).
    """

    slots: float = 0.0
    shuffles: int = 0
    barriers: int = 0
    accesses: int = 0
    widest: int = 0
    ahead: int = 0


class Code(msgspec.Struct, frozen=True):
    """Instructions of one kernel as they stand in its code: one in a loop counts once, and a
    predicated one in full.

    Widths are bits a thread moves with one instruction. `hints` are the other modifiers of global
    accesses, such as "LDG.CONSTANT" (the read-only cache), "LDG.LTC128B" (a whole line into L2),
    "STG.EF" (evict first). `local_*` are accesses of a thread's stack: spills and arrays with
    computed indices. Slow paths of division and the like are counted as well; padding is not.
    """

    kernel: str
    origin: str
    """"cuobjdump" or "nvdisasm", or "PTX" and why it had to do."""
    machine: bool
    """Whether these are the GPU's own instructions. PTX has no spills yet, and its counts are
    before ptxas's optimization.
    """
    instructions: int
    predicated: int
    global_loads: dict[int, int]
    global_stores: dict[int, int]
    shared_loads: dict[int, int]
    shared_stores: dict[int, int]
    local_loads: int
    local_stores: int
    generic: int
    """Loads and stores through pointers whose memory the compiler could not tell."""
    atomics: int
    asynchronous: int
    """Copies from global to shared memory that pass no register."""
    shuffles: int
    barriers: int
    mufu: int
    """Approximate reciprocals, roots, exponentials: a unit of its own."""
    hints: dict[str, int]
    operations: dict[str, int]
    """Every operation by name, those of unknown meaning too."""
    depths: tuple[Work, ...] = ()
    """What a warp goes through outside of loops, in loops, in loops within these and so on, each
    loop once.
    """
    divergent_shuffles: int | None = None
    """Shuffles that part of a warp may reach alone; a good kernel has none. None of PTX, which
    does not tell.
    """
    early: dict[str, int] | None = None
    """Accesses of global memory on the way to the wait for the kernel before this one, by name with
    `hints`: "LDG.CONSTANT", or "LDG" without. None where it does not wait.
    """


class Kinds(msgspec.Struct, frozen=True):
    """Which operations are what, in one of the two languages; `plain` modifiers are no hints."""

    global_load: frozenset[str]
    global_store: frozenset[str]
    shared_load: frozenset[str]
    shared_store: frozenset[str]
    local_load: frozenset[str]
    local_store: frozenset[str]
    generic: frozenset[str]
    atomic: frozenset[str]
    asynchronous: frozenset[str]
    shuffle: frozenset[str]
    barrier: frozenset[str]
    mufu: frozenset[str]
    plain: frozenset[str]
    words: Words
    widths: Mapping[str, int]
    """Modifier -> bits of one element."""


def _bits(instruction: Instruction, kinds: Kinds) -> int:
    """Bits that a load or store moves: its element's, 32 unless it says so, times the elements of a
    vector.
    """
    bits, lanes = 32, 1
    for modifier in instruction.modifiers:
        if modifier in kinds.widths:
            bits = kinds.widths[modifier]
        elif modifier in ("v2", "v4", "v8"):
            lanes = int(modifier[1:])
    return bits * lanes


def count(
    kernel: str, origin: str, machine: bool, kinds: Kinds, instructions: Iterable[Instruction]
) -> Code:
    """The counts of a kernel's instructions."""
    listed = list(instructions)
    operations = Counter(i.op for i in listed)

    def widths(ops: frozenset[str]) -> dict[int, int]:
        return dict(sorted(Counter(_bits(i, kinds) for i in listed if i.op in ops).items()))

    def total(ops: frozenset[str]) -> int:
        return sum(operations[o] for o in ops)

    accesses = [i for i in listed if i.op in kinds.global_load | kinds.global_store]
    hints = Counter(
        f"{i.op}.{m}"
        for i in accesses
        for m in i.modifiers
        if m not in kinds.plain and m not in kinds.widths
    )
    return Code(
        kernel=kernel,
        origin=origin,
        machine=machine,
        instructions=len(listed),
        predicated=sum(i.predicated for i in listed),
        global_loads=widths(kinds.global_load),
        global_stores=widths(kinds.global_store),
        shared_loads=widths(kinds.shared_load),
        shared_stores=widths(kinds.shared_store),
        local_loads=total(kinds.local_load),
        local_stores=total(kinds.local_store),
        generic=total(kinds.generic),
        atomics=total(kinds.atomic),
        asynchronous=total(kinds.asynchronous),
        shuffles=total(kinds.shuffle),
        barriers=total(kinds.barrier),
        mufu=total(kinds.mufu),
        hints=dict(sorted(hints.items())),
        operations=dict(sorted(operations.items())),
        depths=_depths(listed, kinds),
        divergent_shuffles=flow.divergent(listed, kinds.words, kinds.shuffle) if machine else None,
        early=_early(listed, kinds),
    )


def _early(listed: Sequence[Instruction], kinds: Kinds) -> dict[str, int] | None:
    """Code.early."""
    memory = kinds.global_load | kinds.global_store | kinds.generic | kinds.atomic
    way = [instruction for instruction, _ in flow.way(listed, kinds.words)]
    waits = [number for number, i in enumerate(way) if i.op in kinds.words.wait]
    if not waits:
        return None
    names = (
        ".".join([i.op, *(m for m in i.modifiers if m not in kinds.plain | kinds.widths.keys())])
        for i in way[: waits[0]]
        if i.op in memory
    )
    return dict(sorted(Counter(names).items()))


def _depths(listed: Sequence[Instruction], kinds: Kinds) -> tuple[Work, ...]:
    """Code.depths."""
    way = flow.way(listed, kinds.words)
    memory = kinds.global_load | kinds.global_store | kinds.generic
    carried = flow.carried(way, kinds.words, kinds.global_load | kinds.generic)

    def work(depth: int) -> Work:
        at = [i for i, around in way if around == depth]
        accesses = [i for i in at if i.op in memory]
        return Work(
            round(sum(i.slots for i in at), 1),
            sum(i.op in kinds.shuffle for i in at),
            sum(i.op in kinds.barrier for i in at),
            len(accesses),
            max((_bits(i, kinds) for i in accesses), default=0),
            sum(way[number][1] == depth for number in carried),
        )

    deepest = max((depth for _, depth in way), default=0)
    return tuple(work(depth) for depth in range(deepest + 1))
