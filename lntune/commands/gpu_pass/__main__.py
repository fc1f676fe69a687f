"""`python -m lntune.commands.gpu_pass OUT PART`, which is all that `tools/gpu_pass.sh` runs. It
takes none of the packages of the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from lntune.commands.gpu_pass import programs
from lntune.commands.gpu_pass.book import Book, unpack
from lntune.commands.gpu_pass.child import Child
from lntune.commands.gpu_pass.jobs import Answer, Job
from lntune.commands.gpu_pass.parts import NUMBERS, Parts
from lntune.commands.gpu_pass.run import MINUTES, Runner
from lntune.errors import LntuneError
from lntune.system import interrupts, paths

ROOT = paths.PACKAGE.parent


class Hands:
    """Jobs go to a child process, programs are run in the checkout; see run.Hands."""

    def __init__(self, child: Child, environment: Mapping[str, str]) -> None:
        self._child, self._environment = child, environment

    def do(self, job: Job, seconds: float) -> Answer:
        """See run.Hands."""
        return self._child.do(job, seconds)

    def run(self, words: tuple[str, ...], seconds: float, output: Path) -> Answer:
        """See run.Hands. The GPU's memory and time are the program's alone."""
        self._child.stop()
        return programs.run(words, seconds, output, self._environment, ROOT)


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tools/gpu_pass.sh", description=__doc__)
    parser.add_argument("out", type=Path, help="folder that the part's archive goes to")
    parser.add_argument("part", type=int, choices=NUMBERS)
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="when the part ends by itself"
    )
    parser.add_argument("--target", default="cuda", help="cuda, or cuda:1 for another GPU")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu_pass", help="folder of what came so far"
    )
    parser.add_argument("--after", type=Path, help="archive of an earlier part, to go on from it")
    given = parser.parse_args(words)
    if not given.minutes > 0:
        parser.error(f"--minutes: got {given.minutes}, expected more than 0")
    return given


def main(words: list[str]) -> int:
    """Run a part; the exit code."""
    given = _arguments(words)
    archive = given.out.resolve() / f"gpu_pass-part{given.part}.tar.gz"
    archive.parent.mkdir(parents=True, exist_ok=True)
    work = given.work.resolve()
    if given.after is not None:
        unpack(given.after, work)
    book, logs = Book(work), work / "tuning_logs"
    environment = {**os.environ, "LNTUNE_LOG_DIR": str(logs)}
    if given.part == 1:
        # What was built beforehand serves as it is, by its default knobs: a compiler of this
        # machine, of another release, would have it all built anew.
        os.environ["LNTUNE_NVCC"] = str(work / "none")
        os.environ["LNTUNE_LOG_DIR"], os.environ["LNTUNE_SHIPPED_LOGS"] = str(work / "none"), "0"
    else:
        os.environ["LNTUNE_LOG_DIR"] = str(logs)
    book.log(f"part {given.part}, {given.minutes:g} minutes, target {given.target}")
    try:
        with interrupts.as_ctrl_c(), Child() as child:
            runner = Runner(book, Hands(child, environment), given.minutes, archive)
            done = runner.run(Parts(given.target, ROOT, logs).numbered(given.part))
    except KeyboardInterrupt:
        return 130
    return 0 if done else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LntuneError as e:
        sys.exit(f"tools/gpu_pass.sh: {e}")
