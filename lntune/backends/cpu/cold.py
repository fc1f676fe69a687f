"""How calls are timed on a CPU whose caches hold none of what they read and write, as it is behind
a layer whose tensors fill them.

The calls of a contender are bound to many copies of a case's inputs, which all contenders go
through in turn, and what they return is held for a turn, so outputs rotate, too. Where the copies
are together smaller than the last cache TIMES over, a block of memory of that size is read after
every turn. Code stays warm: each sample begins with an untimed call on a copy of its own.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lntune.log.records import Timing

Call = Callable[[], Any]

TIMES = 2
"""The last cache is replaced by so many times its size: it does not replace the oldest line
strictly.
"""
MOST_BYTES = 256 << 20
"""What is read after a turn at most: a virtual machine of few cores has little of the last cache
that its CPU reports.
"""
MOST, COPIED_BYTES = 128, 32 << 20
"""Copies at most, and how much they may touch together where two touch less: what eager mode
records of a call for its backward takes several times as much.
"""
SAMPLE_SECONDS = 5e-5
MOST_CALLS = 16
"""Of a sample."""
LEAST_ROUNDS = 3
"""Fewer say nothing."""


def to_replace(last_cache: int) -> int:
    """Bytes that have to be touched until nothing is left of what was in a last cache."""
    return min(MOST_BYTES, TIMES * last_cache)


def copies(size: int, last_cache: int) -> int:
    """How many copies of the tensors of a call, `size` bytes, are to be called in turn, beside the
    one of untimed calls; 0 where a call replaces the cache by itself.
    """
    wanted = math.ceil(to_replace(last_cache) / max(size, 1))
    return 0 if wanted <= 1 else min(MOST, wanted, max(2, COPIED_BYTES // max(size, 1)))


class _Turns:
    """Which copy is called next, by whichever contender: none again before all were, and the cache
    was replaced.
    """

    def __init__(self, count: int, replace: Callable[[], Any] | None) -> None:
        self._count, self._replace = count, replace
        self._next = count  # begins cold
        self.begun = 0
        """Turns so far."""
        self.held: list[Any] = [None] * count

    def take(self, calls: int) -> list[int]:
        """The next copies, so many, one after another; where the cache has to be replaced between
        turns, the last ones are passed over where they are too few.
        """
        if self._next + calls > self._count:
            self.begun += 1
            if self._replace is not None:
                self._next = 0
                self._replace()
        first = self._next % self._count
        self._next = first + calls
        return [i % self._count for i in range(first, self._next)]


def measure(
    contenders: Mapping[str, Sequence[Call]],
    seconds: float,
    size: int,
    last_cache: int,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time contenders with a cold cache for about `seconds` in all; nothing where that is not
    enough. Each is the same call bound to every copy of its inputs, of which the first is for
    untimed calls; a call touches `size` bytes.
    """
    import torch

    begun = time.perf_counter()
    order, names = random.Random(seed), list(contenders)
    count = len(next(iter(contenders.values()))) - 1
    replaced = to_replace(last_cache)
    block = None
    if count * size < replaced:
        # ones: zeros may be pages that are not there yet; float32, whose sum is as fast as memory
        block = torch.ones(replaced // 4)
    turns = _Turns(count, None if block is None else block.sum)
    calls = {name: min(count, _calls(contenders[name][0])) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        done, started, warming = 0, time.perf_counter(), True
        while True:
            order.shuffle(names)
            for name in names:
                samples[name].append(_sample(contenders[name], turns, calls[name]))
            done += 1
            now = time.perf_counter()
            each = (now - started) / done
            if warming and turns.begun > 1:
                # outputs of the first turn came from pages that were not there yet
                samples = {name: [] for name in names}
                done, started, warming = 0, now, False
            if done < LEAST_ROUNDS and now - begun + (LEAST_ROUNDS - done) * each > seconds:
                return {}
            if done >= LEAST_ROUNDS and now - begun + each > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(tuple(round(v, 4) for v in taken), round(statistics.median(taken), 4))
        for name, taken in samples.items()
    }


def _calls(call: Call) -> int:
    """How many calls make one sample, by the quickest of few."""
    taken = []
    for _ in range(4):  # the first may load or build
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / max(min(taken), 1e-9))))


def _sample(bound: Sequence[Call], turns: _Turns, calls: int) -> float:
    """Microseconds of one call."""
    taken = turns.take(calls)
    held = turns.held
    bound[0]()
    start = time.perf_counter()
    for i in taken:
        held[i] = bound[i + 1]()
    return (time.perf_counter() - start) / calls * 1e6
