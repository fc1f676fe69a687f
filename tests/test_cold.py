"""How calls are timed with a cold cache, on a machine of the tests' own whose cache holds what was
touched last.
"""

from __future__ import annotations

import gc
import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lntune.backends.cpu import cold

LAST = 1 << 20
"""Bytes of the last cache."""
HIT, MISS = 1e-6, 1e-5


class Machine:
    """A clock, and a cache that gives up what was not touched for longest."""

    def __init__(self) -> None:
        self.now = 10.0
        self.cache = OrderedDict[Any, int]()
        self.calls: list[tuple[str, int, bool]] = []
        self.read = 0

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now

    def touch(self, what: Any, size: int) -> bool:
        """Whether it was in the cache."""
        hit = self.cache.pop(what, None) is not None
        self.cache[what] = size
        while sum(self.cache.values()) > LAST:
            self.cache.popitem(last=False)
        return hit

    def contender(self, name: str, count: int, size: int) -> list[Callable[[], Any]]:
        """Calls on so many copies of inputs, which all contenders share, each with an output."""

        def bind(number: int) -> Callable[[], Any]:
            def call() -> object:
                hit = self.touch(number, size)
                self.calls.append((name, number, hit))
                self.now += HIT if hit else MISS
                return object()

            return call

        return [bind(i) for i in range(count)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The machine that `cold` measures on."""
    made = Machine()

    class Block:
        """Memory that is read."""

        def sum(self) -> None:
            made.read += 1
            made.now += 1e-3
            for part in range(2 * cold.TIMES):
                made.touch(("block", part), LAST // 2)

    monkeypatch.setattr(cold, "time", made)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: Block())
    return made


@pytest.mark.parametrize("size", [100, 5_000, 100_000, 400_000, LAST])
def test_no_timed_call_finds_its_inputs_in_the_cache(machine: Machine, size: int) -> None:
    """Whatever the size of a case, samples say what calls take with nothing in the cache; where
    copies are too small to fill it, memory is read between turns.
    """
    count = cold.copies(size, LAST)
    contenders = {n: machine.contender(n, count + 1, size) for n in ("a", "b", "c")}
    timings = cold.measure(contenders, 1.0, size, LAST)
    assert timings.keys() == contenders.keys()
    for timing in timings.values():
        assert len(timing.samples_us) >= cold.LEAST_ROUNDS
        assert timing.samples_us == pytest.approx([1e6 * MISS] * len(timing.samples_us))
        assert timing.median_us == pytest.approx(1e6 * MISS)
    assert bool(machine.read) == (count * size < cold.to_replace(LAST))


def test_code_is_warm(machine: Machine) -> None:
    """Each sample begins with a call of the same contender on the copy that is for that."""
    contenders = {n: machine.contender(n, cold.copies(5_000, LAST) + 1, 5_000) for n in "ab"}
    cold.measure(contenders, 0.01, 5_000, LAST)
    own = [(name, number) for name, number, _ in machine.calls]
    for before, call in itertools.pairwise(own):
        assert call[1] == 0 or before[0] == call[0]


def test_outputs_are_held_for_a_turn(machine: Machine) -> None:
    """What a call returns stays until the next one on its copy, so that outputs lie elsewhere
    too.
    """
    alive = set[int]()
    most = 0

    class Output:
        def __init__(self) -> None:
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    def call() -> Output:
        machine.now += MISS
        return Output()

    cold.measure({"a": [call] * 9}, 0.01, LAST // 2, LAST)
    assert most >= 8


@pytest.mark.parametrize(
    ("size", "count"),
    [(1, cold.MOST), (LAST // 4, 8), (LAST, 2), (2 * LAST, 0), (100 * LAST, 0), (0, cold.MOST)],
)
def test_copies(size: int, count: int) -> None:
    """As many as replace the cache, within bounds; none where one call does it."""
    assert cold.copies(size, LAST) == count


def test_copies_of_a_machine_with_a_huge_cache() -> None:
    """What a virtual machine is told of its last cache may be a whole server's: copies and what is
    read are bounded all the same.
    """
    huge = 1 << 30
    assert cold.to_replace(huge) == cold.MOST_BYTES
    for size in (1 << 10, 1 << 20, 1 << 26):
        count = cold.copies(size, huge)
        assert count * size <= max(cold.COPIED_BYTES, 2 * size)


def test_too_little_time_says_nothing(machine: Machine) -> None:
    """Where not even a few rounds fit into the time, nothing is measured, and little more is
    spent; the collector is as it was.
    """
    contenders = {n: machine.contender(n, 129, 100) for n in "abcdefgh"}
    began = machine.now
    assert cold.measure(contenders, 1e-3, 100, LAST) == {}
    assert machine.now - began < 0.05
    assert gc.isenabled()
