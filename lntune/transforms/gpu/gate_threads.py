"""Rows of an LSTM's cell and gates shared among threads, each of which has the same elements of all
four gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lntune.transforms.gpu import threads
from lntune.transforms.gpu.gates import split_gates

VECTOR = 4
"""Elements of float32 in the widest load or store."""


@dataclass(frozen=True)
class Assignment:
    """Which elements each thread has of a row, or of each gate's part of it: `hidden` elements in
    vectors of `vector_width`, shared among `threads` as in threads.py. Its methods schedule stages
    accordingly; `of_gates` says that a stage is of rows of gates.
    """

    hidden: int
    threads: int
    vector_width: int

    def compute(self, sch: Any, block: Any, of_gates: bool) -> Any:
        """Share the innermost loop of a block among the threads, which compute their elements one
        by one, one gate after the other. Returns the loop over threads.
        """
        thread = threads.one_by_one(sch, block, self.threads, self.vector_width)
        if of_gates:
            sch.unroll(sch.get_loops(block)[-4])
        return thread

    def lay_out(self, sch: Any, block: Any, index: int, scope: str = "local") -> None:
        """Lay out a buffer that a block writes so that a thread's elements of a row take no more
        room than they need: contiguous in registers; in shared memory beside those of other
        threads, so that single elements are accessed without bank conflicts.
        """

        def place(*at: Any) -> tuple[Any, ...]:
            *lead, k = at
            vector, thread, element = (
                k // self.vector_width // self.threads,
                k // self.vector_width % self.threads,
                k % self.vector_width,
            )
            return (
                (*lead, vector, thread, element)
                if scope == "local"
                else (*lead, vector, element, thread)
            )

        sch.transform_layout(block, ("write", index), place, assume_injective_transform=True)

    def stage(self, sch: Any, block: Any, of_gates: bool, scope: str = "local") -> Any:
        """Compute a stage into registers, or into shared memory. Returns the loop over threads."""
        sch.set_scope(block, 0, scope)
        if of_gates:
            self._by_gate(sch, block, 0)
        self.lay_out(sch, block, 0, scope)
        return self.compute(sch, block, of_gates)

    def to_registers(
        self, sch: Any, consumers: Sequence[Any], name: str, at: Any, of_gates: bool
    ) -> None:
        """Load the input `name`, a row or a vector, at loop `at` into the registers of the threads
        that need its elements, for all of `consumers`.
        """
        copy = sch.cache_read(
            consumers[0], _index(sch, consumers[0], name), "local", consumer_blocks=list(consumers)
        )
        if of_gates:
            split_gates(sch, copy, self.hidden)
            self._by_gate(sch, copy, 0)
        # index=-2: before everything that is in the loop already
        sch.compute_at(copy, at, preserve_unit_loops=True, index=-2)
        self.lay_out(sch, copy, 0)
        threads.copy(sch, copy, self.threads, self.vector_width)
        if of_gates:
            sch.unroll(sch.get_loops(copy)[-4])

    def vector_to_registers(
        self, sch: Any, block: Any, name: str, thread: Any, of_gates: bool
    ) -> None:
        """Load a vector of the input `name` into registers right before its elements are used, at
        the loop over threads.
        """
        if self.vector_width == 1:
            return
        copy = sch.cache_read(block, _index(sch, block, name), "local", consumer_blocks=[block])
        if of_gates:
            split_gates(sch, copy, self.hidden)
            self._by_gate(sch, copy, 0)
        sch.compute_at(copy, thread, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(copy)[-1])

    def output(self, sch: Any, block: Any, of_gates: bool) -> Any:
        """Compute an output in registers, one by one, and store it a vector at a time. Returns the
        loop over threads.

        Single elements are stored as they are computed; TVM loses the guard where the output has
        but one element.
        """
        if self.vector_width == 1:
            return self.compute(sch, block, of_gates)
        copy = sch.cache_write(block, 0, "local")
        if of_gates:
            split_gates(sch, copy, self.hidden)
            self._by_gate(sch, block, 0)
        thread = self.compute(sch, block, of_gates)
        sch.reverse_compute_at(copy, thread, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(copy)[-1])
        return thread

    def sums(
        self, sch: Any, block: Any, at: Any, row_loop: Any, of_gates: bool, scope: str = "local"
    ) -> list[str]:
        """Sum over rows in registers, or in elements of shared memory that are each one thread's,
        from 0 before `row_loop`, and store the sums at loop `at` after it. Returns the stores'
        names.
        """
        copies = [
            sch.cache_write(block, index, scope) for index in range(len(sch.get(block).writes))
        ]
        for index, copy in enumerate(copies):
            if of_gates:
                split_gates(sch, copy, self.hidden)
                self._by_gate(sch, block, index)
        for index, copy in enumerate(copies):
            sch.reverse_compute_at(copy, at, preserve_unit_loops=True)
            self.lay_out(sch, block, index, scope)
            self.compute(sch, copy, of_gates)
            if self.vector_width > 1:
                _, elements = sch.split(
                    sch.get_loops(copy)[-1],
                    [None, min(self.vector_width, VECTOR)],
                    preserve_unit_iters=True,
                )
                sch.vectorize(elements)
        sch.decompose_reduction(block, row_loop)
        return [str(sch.get(copy).name_hint) for copy in copies]

    def _by_gate(self, sch: Any, block: Any, index: int) -> None:
        """Make gate and element two dimensions of a local buffer that a block writes, so that TVM
        sees where a gate ends.
        """
        sch.transform_layout(
            block,
            ("write", index),
            lambda *at: (*at[:-1], at[-1] // self.hidden, at[-1] % self.hidden),
        )


def _index(sch: Any, block: Any, name: str) -> int:
    """The number of an input among those that a block reads."""
    return threads.inputs(sch, block).index(name)
