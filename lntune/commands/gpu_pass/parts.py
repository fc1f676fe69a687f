"""The three parts of a pass: which steps, in which order, for how long.

First comes what decides whether anything else is worth its time: the facts, one kernel against
float64. Where that is wrong the rest of the first part looks for the reason instead of timing it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from lntune.backends.cuda import locate
from lntune.commands.gpu_pass import facts, plan, works
from lntune.commands.gpu_pass.book import Book
from lntune.commands.gpu_pass.jobs import Find
from lntune.commands.gpu_pass.plan import Sizes
from lntune.commands.gpu_pass.run import Hands, Part, Step, Stopped, Work
from lntune.device import Device
from lntune.system import toolchain

NUMBERS = (1, 2, 3)


class Parts:
    """The parts for a target, in the checkout `root`; `logs` is the folder of tuning logs."""

    def __init__(self, target: str, root: Path, logs: Path) -> None:
        self.target, self.root, self.logs = target, root, logs
        self._known: tuple[Device, Sizes] | None = None

    def numbered(self, number: int) -> Part:
        """One of NUMBERS."""
        return (self.first, self.second, self.third)[number - 1]

    def _device(self, hands: Hands) -> tuple[Device, Sizes]:
        """The device, and the sizes for it."""
        if self._known is None:
            answer = hands.do(Find(self.target), 120)
            if answer.status != "ok":
                raise Stopped(f"--target {self.target}: {answer.message}")
            device = msgspec.convert(answer.values["device"], Device)
            self._known = device, msgspec.convert(answer.values["sizes"], Sizes)
        return self._known

    def first(self, book: Book, hands: Hands) -> Iterator[Step]:
        """What needs neither TVM nor a compiler, where kernels were built beforehand."""
        yield facts.step()
        device, sizes = self._device(hands)
        if works.missing(plan.kernels(device, sizes), device) and not toolchain.incompatible():
            words = (sys.executable, "-m", "lntune", "build", "--gpu-pass", "--target", self.target)
            yield Step("kernels", 120, (Work("build", 400, words=words, resumed=True),))
        checks = list(works.compared(device, sizes))
        first, job = checks[0]
        if works.missing([(job.case.typical, job.candidate)], device):
            command = f"lntune build --gpu-pass --target {self.target}"
            raise Stopped(f"the kernels are not in the cache; build them beforehand: {command}")
        yield Step("first", 30, (first,))
        answer = book.answer("first", first.key)
        if answer is not None and answer.status != "ok":
            yield Step("sanitizer", 400, tuple(works.sanitized(job, self.target, works.TOOLS)))
            return
        yield Step("checks", 60, tuple(work for work, _ in checks[1:]))
        yield facts.doctor()
        yield Step("yardsticks", 45, tuple(works.yardsticks(device, sizes)))
        yield Step("defaults", 150, tuple(works.defaults(device, sizes, sizes.many)))
        yield Step("knobs", 120, tuple(works.trials(device, sizes)))
        yield Step("profile", 75, tuple(works.profiled(device, self.target, sizes)))
        yield Step("sequence", 60, tuple(works.sequences(device, sizes)))
        yield Step("few rows", 60, tuple(works.defaults(device, sizes, sizes.few)))

    def second(self, book: Book, hands: Hands) -> Iterator[Step]:
        """The tests that need a GPU, and a bringup for the rest of the time."""
        yield facts.step()
        yield facts.doctor()
        self._buildable(hands)
        if _installed("pytest"):
            test = works.tests(self.root, book.folder, "tests", "gpu and not sanitizer")
            yield Step("tests", 150, (test,))
        yield Step("bringup", 600, (works.bringup(self.target, self.logs),))

    def third(self, book: Book, hands: Hands) -> Iterator[Step]:
        """The bringup goes on; then torch.compile, a backward of several turns under racecheck, and
        what of all the rest there is time for.
        """
        yield facts.step()
        device, sizes = self._buildable(hands)
        yield Step("bringup on", 225, (works.bringup(self.target, self.logs),))
        yield Step("compile", 180, tuple(works.compiled(device, sizes)))
        yield Step("racecheck", 60, tuple(works.raced(device, self.target, sizes)))
        rest: list[Work] = []
        if locate.program("compute-sanitizer") and _installed("pytest"):
            rest.append(works.tests(self.root, book.folder, "rest", "gpu and sanitizer"))
        script = self.root / "bench" / "gpu_sequence.py"
        where = ("--target", self.target, "--output", str(book.folder))
        rest.append(Work("sequences", 300, words=(sys.executable, str(script), *where)))
        yield Step("rest", 60, tuple(rest))

    def _buildable(self, hands: Hands) -> tuple[Device, Sizes]:
        device, sizes = self._device(hands)
        if problems := toolchain.incompatible():
            raise Stopped(f"this part builds kernels: {'; '.join(problems)}")
        return device, sizes


def _installed(package: str) -> bool:
    return toolchain.installed(package) != toolchain.MISSING
