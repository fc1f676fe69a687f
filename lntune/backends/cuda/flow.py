"""The way of a warp through a kernel's code: which instructions it goes through, and in which
loops these are. Branches are followed as a block in the midst of the rows follows them.

That way is the straight one: a branch forward is not taken, so that what it would skip (the guarded
end of a row) is counted, unless it skips a slow path, which calls a function, or leads to a loop
that the straight way would pass by. A branch back closes a loop; one to where the way has not been
enters a loop whose condition stands behind it, unless the way goes there all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Instruction(msgspec.Struct, frozen=True):
    """One instruction as counted: its operation ("LDG", "ld.global"), modifiers, and whether a
    predicate may switch it off.

    `at` is its place, an address or a number that grows with it, and `target` the place that it
    names: where a branch leads, or where threads that it parts meet again. `slots` are the machine
    instructions that become of it: 1 of a machine instruction, other numbers of PTX. `gives` and
    `takes` are registers that it writes and reads, of PTX only.
    """

    op: str
    modifiers: tuple[str, ...] = ()
    predicated: bool = False
    at: int = 0
    target: int | None = None
    slots: float = 1.0
    gives: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()


class Words(msgspec.Struct, frozen=True):
    """The operations that steer a warp, in one of the two languages; `meet` names where threads
    that a branch parts meet again, `wait` is for the kernel before this one, `move` copies
    registers.
    """

    branch: frozenset[str]
    leave: frozenset[str]
    call: frozenset[str]
    meet: frozenset[str] = frozenset()
    wait: frozenset[str] = frozenset()
    move: frozenset[str] = frozenset()


def way(listed: Sequence[Instruction], words: Words) -> list[tuple[Instruction, int]]:
    """The instructions that a warp goes through, in order, each once, with the number of loops
    around it.
    """
    places = {instruction.at: number for number, instruction in enumerate(listed)}
    position: dict[int, int] = {}
    """Instruction -> its position on the way."""
    loops: list[tuple[int, int]] = []
    beside: list[int] = []
    """Where the ways go on that do not go through a loop."""
    number, back = 0, False
    while True:
        if number >= len(listed) or number in position:
            if back and number in position:
                loops.append((position[number], len(position)))
            if not beside:
                break
            number, back = beside.pop(), False
            continue
        instruction = listed[number]
        position[number] = len(position)
        number += 1
        if instruction.op in words.leave and not instruction.predicated:
            break
        if instruction.op not in words.branch or instruction.target is None:
            continue
        target = places.get(instruction.target, len(listed))
        if target in position:
            loops.append((position[target], len(position)))
            if not instruction.predicated:
                number = beside.pop() if beside else len(listed)
        elif not instruction.predicated:
            back = back or target < number
            number = target
        elif target < number and _next(listed[number:], words) != instruction.target:
            beside.append(number)
            number, back = target, True
        elif target > number and _enters(listed[number:target], target, listed, places, words):
            beside.append(number)
            number = target
        elif target > number and _slow(listed[number:target], words):
            number = target
    return [
        (listed[n], sum(first <= at < end for first, end in loops)) for n, at in position.items()
    ]


def _next(following: Sequence[Instruction], words: Words) -> int | None:
    """Where a warp is sent that goes on here, or None where the kernel ends."""
    ends = words.branch | words.leave
    return next((i.target for i in following if i.op in ends and not i.predicated), None)


def _slow(region: Sequence[Instruction], words: Words) -> bool:
    """Whether a region ends the kernel, or calls a function in a branch of its own: what is within
    another branch is for that one to skip.
    """
    last = region[-1] if region else None
    if last is not None and last.op in words.leave and not last.predicated:
        return True
    calls = [i.at for i in region if i.op in words.call]
    branches = [(i.at, i.target) for i in region if i.op in words.branch and i.target is not None]
    return any(all(not branch < call < target for branch, target in branches) for call in calls)


def _enters(
    region: Sequence[Instruction],
    target: int,
    listed: Sequence[Instruction],
    places: dict[int, int],
    words: Words,
) -> bool:
    """Whether a branch over `region` leads to a loop, which the region's end jumps over."""
    last = region[-1] if region else None
    if last is None or last.predicated or last.op not in words.branch or last.target is None:
        return False
    beyond = places.get(last.target, len(listed))
    return any(
        i.op in words.branch and i.target is not None and places.get(i.target, n + 1) <= n
        for n, i in enumerate(listed[target:beyond], target)
    )


def carried(
    passed: Sequence[tuple[Instruction, int]], words: Words, ops: frozenset[str]
) -> list[int]:
    """Where on the way, as `way` has it, an operation of `ops` stands in a loop whose next turn is
    the first to use what it gives: loads that are under way while a turn works on what came before.

    Copies are no use, since a loop hands its values on by them.
    """
    found = []
    for at, (load, depth) in enumerate(passed):
        if load.op not in ops or not depth or not load.gives:
            continue
        held = set(load.gives)
        for later, around in passed[at + 1 :]:
            if around < depth:
                found.append(at)
                break
            if not held & later.takes:
                continue
            if later.op not in words.move:
                break
            held |= later.gives
        else:
            found.append(at)
    return found


def divergent(listed: Sequence[Instruction], words: Words, ops: frozenset[str]) -> int:
    """How many of the operations `ops` stand between a branch that some threads of a warp may take
    and the place where they meet again.

    There the others are away, and a shuffle among those that are active is not one among all.
    """
    meeting = [(i.at, i.target) for i in listed if i.op in words.meet and i.target is not None]
    branches = [i.at for i in listed if i.op in words.branch and i.predicated]
    regions = [
        (branch, min(ends))
        for branch in branches
        if (ends := [end for start, end in meeting if start < branch < end])
    ]
    return sum(any(branch < i.at < end for branch, end in regions) for i in listed if i.op in ops)
