"""The child of a tuning run: it gives up what generated code is not to have, reads jobs, and writes
what came of them.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import msgspec

from lntune.measure import frames
from lntune.measure.jobs import Job
from lntune.system import confined


def main(answers: int, threads: int) -> None:
    """The child of a tuning run: reads jobs, writes outcomes."""
    from lntune.measure import trial

    jobs = msgspec.json.Decoder(Job)
    serve(answers, threads, lambda content: msgspec.json.encode(trial.run(jobs.decode(content))))


def serve(
    answers: int,
    threads: int,
    do: Callable[[bytes], bytes],
    ready: Callable[[], None] | None = None,
) -> None:
    """A child's life: with everything imported, `ready` to it, it takes jobs from its standard
    input and writes what `do` makes of each to the descriptor `answers`. PyTorch has so many
    `threads`, 0 for its own choice.
    """
    confined.die_with_parent()
    confined.confine()
    requests = _kept_apart(answers)
    first = frames.receive(requests)
    if first is None:
        return
    # while what is made stays: collections among the imports' hundreds of thousands of objects take
    # a fifth of their time
    gc.disable()
    import torch

    from lntune.system.heap import kept_heap

    if threads:
        torch.set_num_threads(threads)
    (ready or _ready_to_build)()
    gc.freeze()
    gc.enable()
    with kept_heap():
        number, outcome, word = first[0], b"", frames.READY
        while True:
            try:
                frames.send(answers, frames.packed(number, word, outcome))
                if (job := frames.receive(requests)) is None:
                    return
                number, content = job
                frames.send(answers, frames.packed(number, frames.TAKEN))
            except OSError:  # closed, or somebody else's
                os._exit(frames.UNHEARD)
            outcome, word = do(content), frames.ANSWER


def _kept_apart(answers: int) -> int:
    """The descriptor from which requests come, apart from standard input, which is empty from now
    on: who reads that reads no request. What this process starts has neither this nor `answers`.
    """
    requests = os.dup(0)
    os.set_inheritable(answers, False)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return requests


def _ready_to_build() -> None:
    """Everything imported and compiled that building and calling kernels takes."""
    from lntune.backends.cpu import runtime
    from lntune.kernels import compiler, direct

    compiler.warm_up()
    runtime.ensure_library()
    direct.ensure_library()
