"""The process that works on the GPU, as its owner sees it: a kernel that crashes, hangs or spoils
the device's context costs its own work, and the next one gets a fresh process.
"""

from __future__ import annotations

import time

import msgspec

from lntune.commands.gpu_pass.jobs import Answer, Job
from lntune.errors import BuildError
from lntune.measure import worker
from lntune.measure.jobs import Outcome


class Child(worker.Worker):
    """The process as its owner sees it. Use as a context manager."""

    program = (
        "import sys; sys.path[:] = sys.argv[3:];"
        " from lntune.commands.gpu_pass.perform import main; main(int(sys.argv[1]))"
    )

    def __enter__(self) -> Child:
        return self

    def do(self, job: Job, seconds: float) -> Answer:
        """What came of a job, within `seconds` or so, the start of a process among them."""
        begun = time.monotonic()
        try:
            self.start()
            raw = self.answer(job, max(0.1, seconds - (time.monotonic() - begun)))
        except BuildError as e:  # no process came up
            return Answer("failed", str(e))
        if isinstance(raw, Outcome):
            return Answer("late" if raw.status == "timeout" else "failed", raw.message)
        answer = msgspec.json.decode(raw, type=Answer)
        if answer.lost:
            self.stop()
        return answer
