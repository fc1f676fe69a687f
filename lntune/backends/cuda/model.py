"""How long kernels take on a GPU, reckoned from their code: a model, not a measurement.

A kernel is a number of blocks that take groups of rows in turns (`Part`). A multiprocessor's time
for its groups is bound in three ways, and the largest, softly, is the model's:

- memory: their bytes at its share of the card's bandwidth, and what the first and the last group
  take besides;
- issue: the instructions of their warps, which four schedulers issue;
- latency: what a turn takes a block that is alone (the way of its loads, its instructions one after
  another, its barriers), divided among the blocks that are there at the same time, in whole waves.
  Where a turn loads what only the next one uses, its loads' way and its instructions take the
  longer of both, not their sum.

So Little's law needs no term of its own: too few bytes in flight show as latency. What a kernel
leaves in memory for a later one counts as bytes; that one reads it from the L2 cache, after a gap.

Not modelled: a scheduler's pipes other than the issue of instructions, bank conflicts, what caches
hold by chance, DRAM's pages and refresh, clocks that sink, the launch of the first kernel. What is
loaded again and again counts once in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from lntune.architectures import PARTITIONS, WARP
from lntune.backends.cuda import targets
from lntune.backends.cuda.code import Work
from lntune.device import Device

NOTE = "model, not measured"


class Constants(msgspec.Struct, frozen=True):
    """All that the model takes for granted of a card, with units and sources; cycles are a
    multiprocessor's at its boost clock.

    "Simulated" is fitted to a simulation of sm_90's machine code, instruction by instruction, of
    133 candidates of layer norm and its backward. Of 200, among them rows that are loaded ahead, it
    meets nine in ten within 25 % (bench/results/model), but not single elements of rows in shared
    memory, for which it says half of the simulation's time. bench/fit_model.py fits all of them to
    a card's measurements.
    """

    reached: float = 0.9
    """Share of the data sheet's bandwidth that a copy reaches: 4.3 of an H200's 4.8 TB/s, 3.0 of an
    H100's 3.35 (published).
    """
    latency: float = 600.0
    """Cycles from a load to its data, from DRAM (published for Hopper: 480 to 600 for a single
    load).
    """
    cached: float = 270.0
    """The same from the L2 cache (published for Hopper)."""
    port: float = 64.0
    """Bytes a cycle from the L2 cache to a multiprocessor (NVIDIA's architecture papers)."""
    start: float = 250.0
    """Cycles until a block runs in the place of one that ended (assumed)."""
    shuffle: float = 27.0
    """Cycles of a shuffle, 23, and of the addition that waits for it, 4 (published for Hopper)."""
    barrier: float = 110.0
    """Cycles of a barrier, with the store to shared memory before it and the load after it
    (simulated).
    """
    dependent: float = 1.5
    """Cycles from an instruction of a warp to its next one, where no other warp is ready: 4 to 6 of
    latency, which independent instructions in between hide (simulated).
    """
    issued: float = 0.95
    """Share of the schedulers' cycles that ready warps fill at most (simulated)."""
    peers: float = 2.5
    """Times its share of the bandwidth that a block which loads finds while others compute
    (simulated).
    """
    softness: float = 4.5
    """How sharply the largest bound is the time: the exponent of the norm of all three
    (simulated).
    """
    gap: float = 1000.0
    """Nanoseconds from a kernel's end to the start of the next one (assumed)."""


CONSTANTS = Constants()


class Part(msgspec.Struct, frozen=True):
    """What one kernel of a program does for a number of rows.

    `blocks` of `threads`, of which a multiprocessor holds `resident`, take `turns` groups of rows
    each; `once` is what a warp goes through for its block and `turn` for each group. `bytes` are
    those to and from memory, `cached` those from the L2 cache, of all blocks together.
    """

    threads: int
    resident: int
    blocks: int
    turns: int
    once: Work
    turn: Work
    bytes: float
    cached: float = 0.0

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return -(-self.threads // WARP)

    def waves(self, multiprocessors: int) -> float:
        """How often the blocks fill all multiprocessors."""
        return self.blocks / (multiprocessors * self.resident) if self.resident else math.inf


class Pair(msgspec.Struct, frozen=True):
    """A program that was measured, and what the model says of it: microseconds both. `what` names
    it for people; `least` are the bytes that had to be moved.
    """

    what: str
    device: Device
    parts: tuple[Part, ...]
    least: int
    predicted_us: float
    measured_us: float


class Prediction(msgspec.Struct, frozen=True):
    """Microseconds of all kernels of a program, and of the least bytes at a copy's bandwidth;
    `share` of that is reached, 0 where a kernel cannot run. What bounds the kernel that takes
    longest: "memory", "issue" or "latency".
    """

    us: float
    least_us: float
    share: float
    bound: str


def predict(
    parts: Sequence[Part], least: float, device: Device, constants: Constants = CONSTANTS
) -> Prediction:
    """What the model says of a program's kernels on a GPU; `least` are the bytes that have to be
    moved in any case.
    """
    product = targets.product_of(device)
    clock = product.mhz * 1e6
    bandwidth = product.gbps * 1e9 * constants.reached / clock
    bounds = [_bounds(part, device.multiprocessors, bandwidth, constants) for part in parts]
    cycles = [_norm(list(of_kernel.values()), constants.softness) for of_kernel in bounds]
    longest = bounds[cycles.index(max(cycles))]
    us = sum(cycles) / clock * 1e6 + (len(parts) - 1) * constants.gap / 1e3
    bound = max(longest, key=lambda name: longest[name])
    least_us = least / bandwidth / clock * 1e6
    return Prediction(us, least_us, least_us / us, bound)


def _norm(values: Sequence[float], exponent: float) -> float:
    """The norm of positive numbers, a little above the largest."""
    largest = max(values)
    if largest == math.inf:
        return largest
    return float(largest * sum((value / largest) ** exponent for value in values) ** (1 / exponent))


def _bounds(
    part: Part, multiprocessors: int, bandwidth: float, constants: Constants
) -> dict[str, float]:
    """What bounds one kernel, in cycles, infinite where no block can run; `bandwidth` is the
    card's, in bytes a cycle.
    """
    if not part.resident or not part.blocks:
        return {"latency": math.inf}
    most = math.ceil(part.blocks / multiprocessors)  # blocks of one multiprocessor
    groups, turn = most * part.turns, part.turn
    issue = (
        part.warps / PARTITIONS / constants.issued
    )  # cycles of an instruction of a block's warps
    rate = min(constants.port, bandwidth / min(multiprocessors, part.blocks))
    memory = (part.bytes / rate + part.cached / constants.port) / (part.blocks * part.turns)
    far = constants.latency if part.bytes else constants.cached
    waiting = far + (constants.start if part.turns == 1 else 0.0)
    working = turn.barriers * constants.barrier + max(
        turn.slots * issue, turn.slots * constants.dependent + turn.shuffles * constants.shuffle
    )
    alone, arriving = waiting + working, waiting + memory / constants.peers
    # the next turn's data are on their way while this one's are worked on
    a_turn = max(working, arriving) if turn.ahead else working + arriving
    present = min(part.resident, most)
    once = part.once.slots * max(constants.dependent, issue * present)
    waves = math.ceil(most / part.resident)
    return {
        "memory": groups * memory + alone + once,
        "issue": groups * turn.slots * issue + far + once,
        "latency": waves * part.turns * a_turn + once,
    }
