"""The tuning loop: one case after another is tuned, each with its share of the time, and an
interrupt ends the loop with what there is.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence

from lntune import backends, ops
from lntune.case import Case
from lntune.errors import ToolchainError
from lntune.measure.jobs import Open
from lntune.measure.worker import START_SECONDS, Worker
from lntune.system import paths
from lntune.torch import prepare_training
from lntune.tune import forecast, times
from lntune.tune.ahead import Ahead
from lntune.tune.beside import Beside, count
from lntune.tune.journal import Journal
from lntune.tune.run import Run
from lntune.tune.settings import Settings, check_settings
from lntune.tune.state import TIME_OVER, Observer, Progress, Summary
from lntune.words import counted


def tune(
    cases: Sequence[Case],
    settings: Settings | None = None,
    observer: Observer = lambda _: None,
    foretell: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Tune the cases in order, those first that were never settled, and return what was found; the
    log has it already. `foretell` is told before anything is run what there is to do, a sentence at
    a time.

    `settings.seconds` are the run's from this call on, the start of the process that measures and
    all finals among them. They are shared evenly among the cases that are left, so what one case
    does not use goes to the others; but each has enough for a search, and where that is more than
    there is the last ones are not begun. The first case gets one trial and a short final however
    little there is. An interrupt (Ctrl-C) ends the search, or makes a final a short one, settles
    the case it was in, and returns; a second one returns at once. For a GPU the next candidates are
    built in other processes while the device measures; what is known to be bad of one before it is
    measured makes it invalid. For a CPU several workers build and check them, and each is timed
    alone.

    Raises:
        InputError, UnknownNameError, ScheduleError, ToolchainError: before anything is run.
        LogError: the log cannot be written; what was measured before is in it.
        BuildError: the worker process does not start, or nothing can be built, be it that the disk
            is full: what was measured before is in the log; ToolchainError: the
            GPU cannot be used.
    """
    settings = settings or Settings()
    check_settings(settings, cases)
    start = time.monotonic()
    journal = Journal(settings)
    cases = journal.in_turn(cases)
    for sentence in forecast.sentences(cases, settings):
        foretell(sentence)
    summary = Summary(log_dir=settings.log_dir or paths.log_dir())
    builds_ahead = backends.of(settings.target).builds_ahead
    try:
        with contextlib.ExitStack() as stack:
            ahead = Ahead(settings.target, settings.timeout) if builds_ahead else None
            if ahead is not None:
                stack.enter_context(ahead)
            worker, beside = workers_of(settings, cases)
            stack.enter_context(beside or worker)
            run = Run(settings, worker, observer, summary, ahead, beside, journal)
            stack.enter_context(run.proposer)
            for op in dict.fromkeys(case.op for case in cases):
                forward = ops.forward_of(op)
                if forward is not None and backends.of(settings.target).calls_directly:
                    prepare_training(forward.name)
            run.begin(cases[0], None)
            if beside:
                beside.wait()
            else:
                start_worker(worker, settings)
            started = time.monotonic() - start
            if settings.seconds is not None:
                run.end = start + settings.seconds
            for index, case in enumerate(cases):
                remaining = run.end - time.monotonic()
                if index and remaining < run.times.least(ops.get(case.op).bytes(case)):
                    summary.untuned[str(case)] = TIME_OVER
                    continue
                progress = Progress(
                    case, index, len(cases), deadline=None if settings.seconds is None else run.end
                )
                observer(progress)
                following = cases[index + 1] if index + 1 < len(cases) else None
                share = run.times.share(
                    *(remaining, len(cases) - index, ops.get(case.op).bytes(case)), settings.trials
                )
                run.tune(case, progress, None if settings.seconds is None else share, following)
                if summary.interrupted:
                    break
            if beside:
                summary.notes += beside.notes()
            if settings.seconds is not None and not summary.interrupted:
                summary.notes += times.too_short(settings.seconds, started)
            if summary.exhausted:
                summary.notes.append(
                    "nothing was left to try in"
                    f" {counted(summary.exhausted, 'case')}: earlier runs have tried every"
                    " candidate (--again tries them again), and the best were measured once more"
                )
    except KeyboardInterrupt:  # not in a search, or a second one
        summary.interrupted = True
    summary.seconds = time.monotonic() - start
    return summary


def workers_of(settings: Settings, cases: Sequence[Case]) -> tuple[Worker, Beside | None]:
    """The worker of a run, and all of its workers beside each other where there are several."""
    number = settings.workers or count(settings.target, cases, settings.trials)
    workers = [Worker(settings.threads) for _ in range(number)]
    if number == 1:
        return workers[0], None
    start = functools.partial(start_worker, settings=settings)
    return workers[0], Beside(settings.target, settings.timeout, workers, start)


def start_worker(worker: Worker, settings: Settings) -> None:
    """Have the worker come up, with its device ready.

    Raises:
        BuildError: it does not come up; ToolchainError: the device cannot be used.
    """
    worker.start()
    outcome = worker.run(Open(settings.target), START_SECONDS)
    if outcome.status != "ok":
        raise ToolchainError(f"{settings.target.name} cannot be used: {outcome.message}")
