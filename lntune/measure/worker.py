"""A process that runs trials, and is replaced when one kills it.

Candidates are generated code: one may crash, hang, eat the stack or the memory, write where it has
no business, or end processes. Jobs go to a child and outcomes come back on pipes of their own, as
messages that nothing a kernel prints can be taken for (`frames`); the child gives up what it does
not need (`confined`), and what it takes of the machine is watched (`excess`). A child that dies,
overruns its time, takes too much or answers with anything else is killed with everything it
started, its job is recorded as what it was, and the next job gets a fresh child. So does a child
that says it is of no more use: an illegal access breaks a GPU's context for as long as its process
lives.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from lntune.errors import BuildError
from lntune.measure import frames
from lntune.measure.jobs import Job, Outcome
from lntune.system import excess, patience, processes, scratch
from lntune.system.excess import Excess
from lntune.system.patience import Starvation

START_SECONDS = 180.0
"""A cold import of TVM and PyTorch right after installation compiles their byte code first."""
CLOSING_SECONDS = 5.0
"""A child that closes its end of the pipe is about to end; one that has not done so by then lives
on without.
"""
STOPPING_SECONDS = 0.05
"""A child that is told to stop does so at once; one that waits for the system may not."""
_LAST_WORDS = 1 << 12
"""Bytes of what the child wrote to its standard error that are kept."""
# The child imports from where this process does, and not first from the current folder as -m would.
_START = (
    "import sys; sys.path[:] = sys.argv[3:]; from lntune.measure.serving import main;"
    " main(int(sys.argv[1]), int(sys.argv[2]))"
)


class _End(NamedTuple):
    """Why there is no answer: the child `died`, `late` it has not come, the child `wrote` something
    else, or it `took` more than the machine has.
    """

    kind: Literal["died", "late", "wrote", "took"]
    detail: str = ""


class Worker:
    """A child process, started when first needed. Use as a context manager; not for several threads
    at once, but for `pause`, `resume` and `kill`.

    A subclass may have other work done in its child: its `program` calls `serving.serve` with a
    function of its own.
    """

    program = _START

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._answers = self._errors = -1
        self._reader = frames.Reader(b"")
        self._last_words = b""
        self._scratch: scratch.Scratch
        self._started = 0.0
        self._launching, self._going = threading.Lock(), threading.Event()
        self._going.set()
        self._paused_at, self._paused = 0.0, 0.0
        self.restarts = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        return self._process.pid if self._process else None

    def clock(self) -> float:
        """Seconds that pass while the child is not stopped by `pause`; limits are in these."""
        now = time.monotonic() if self._going.is_set() else self._paused_at
        return now - self._paused

    def pause(self) -> None:
        """Stop the child with all of its process group, and start none, until `resume`."""
        with self._launching:
            if not self._going.is_set():
                return
            self._paused_at = time.monotonic()
            self._going.clear()
            process = self._process
            if process is None or not self._signal(signal.SIGSTOP):
                return
        until = time.monotonic() + STOPPING_SECONDS
        while not processes.stopped(process.pid) and time.monotonic() < until:
            time.sleep(1e-4)

    def resume(self) -> None:
        """Have the child go on, where it was stopped by `pause`."""
        with self._launching:
            if self._going.is_set():
                return
            self._paused += time.monotonic() - self._paused_at
            self._going.set()
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> bool:
        """Send the child's group a signal; False where there is no child."""
        if (process := self._process) is None or process.poll() is not None:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
            return True
        return False

    def start(self) -> None:
        """Start the child and wait until it has imported what it needs.

        Raises:
            BuildError: it did not come up.
        """
        if self._process is not None:
            return
        self._scratch = scratch.Scratch()
        theirs, ours = list[int](), list[int]()
        try:
            for reads in (True, False, False):
                ends = os.pipe()
                theirs.append(ends[0] if reads else ends[1])
                ours.append(ends[1] if reads else ends[0])
            requests, answers, errors = theirs
            with self._unpaused():
                self._started = time.time()
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-c", self.program),
                        *(str(answers), str(self._threads or 0), *sys.path),
                    ],
                    stdin=requests,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=(answers,),
                    env=self._scratch.environment,
                    # Ctrl-C is for the tuner, which ends the child itself; and one kill reaches all
                    # it started
                    start_new_session=True,
                )
            self._scratch.serves(self._process.pid)
        except OSError as e:
            for descriptor in ours:
                os.close(descriptor)
            self._scratch.remove()
            raise BuildError(
                f"the worker process did not start: {sys.executable!r}: {e.strerror or e}."
            ) from e
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        self._requests, self._answers, self._errors = ours
        for descriptor in ours:
            os.set_blocking(descriptor, False)
        self._last_words = b""
        with self._stopped_on_interrupt():
            until = self.clock() + START_SECONDS
            number = frames.new_number()
            self._reader = frames.Reader(number)
            gone = self._send(frames.packed(number, frames.JOB), until)
            answer = gone or self._receive(frames.READY, until)
        if isinstance(answer, _End):
            detail = self._last_error() or answer.detail
            code = self.stop()
            raise BuildError(
                "the worker process did not start:"
                f" {detail or ('no answer' if answer.kind == 'late' else _cause(code))}."
            )

    def run(self, job: Job, timeout: float) -> Outcome:
        """The outcome of a job, whatever happens to the child. `timeout` in seconds, which others
        that take its cores do not count against.

        Raises:
            BuildError: no child came up to do it.
        """
        answer = self.answer(job, timeout, patient=True)
        outcome = (
            answer if isinstance(answer, Outcome) else msgspec.json.decode(answer, type=Outcome)
        )
        if outcome.lost:  # it would report the same error for every later job
            self.stop()
            self.restarts += 1
        return outcome

    def answer(self, job: Any, timeout: float, patient: bool = False) -> bytes | Outcome:
        """The child's answer to a job of whatever kind it serves, as JSON; an Outcome that says how
        it died, overran its time or did what it must not.

        `patient`: the time is to find what hangs, so a child that others keep from computing gets
        more of it, see `patience`.

        Raises:
            BuildError: no child came up to do it.
        """
        start = self.clock()
        accepted, answer = self._ask(job, timeout, patient)
        if isinstance(answer, _End) and not accepted and answer.kind in ("died", "wrote"):
            # before it had the job, which is not the job's fault
            self.stop()
            self.restarts += 1
            start = self.clock()
            accepted, answer = self._ask(job, timeout, patient)
        if not isinstance(answer, _End):
            return answer
        last_error = self._last_error() if answer.kind == "died" else ""
        code = self.stop()
        self.restarts += 1
        if answer.kind == "late":
            seconds = self.clock() - start
            more = (
                f", nor within {seconds:.1f} s while others used the machine"
                if seconds > 1.2 * timeout + 1
                else ""
            )
            return Outcome("timeout", f"no answer within {timeout:.1f} s{more}; killed")
        if answer.kind == "took":
            return Outcome("run", f"the candidate {answer.detail}; killed")
        if answer.kind == "wrote":
            return Outcome(
                "run",
                "the candidate wrote on descriptors that are not its own:"
                f" its process gave {answer.detail}; killed",
            )
        if code in (None, frames.UNHEARD):
            return Outcome("run", "the candidate closed descriptors that are not its own; killed")
        return Outcome(
            "run", f"the worker died ({_cause(code)})" + (f": {last_error}" if last_error else "")
        )

    def _ask(self, job: Any, timeout: float, patient: bool) -> tuple[bool, bytes | _End]:
        """(the child has taken the job, its answer)."""
        self.start()
        assert self._process is not None
        start, starvation = self.clock(), Starvation(self._process.pid) if patient else None
        number = frames.new_number()
        with self._stopped_on_interrupt():
            self._listen(0.0)  # what was left of the job before
            if self._reader.waiting:
                return False, _End("wrote")
            self._last_words, self._reader = b"", frames.Reader(number)
            watched = Excess(self._process.pid, self._scratch.folder)
            message = frames.packed(number, frames.JOB, msgspec.json.encode(job))
            gone = self._send(message, start + timeout)
            taken = gone or self._receive(frames.TAKEN, start + timeout)
            late = isinstance(taken, _End) and taken.kind == "late" and not gone
            if late and starvation is not None and starvation.starved(timeout):
                taken = self._receive(frames.TAKEN, start + timeout * patience.MOST)
            if isinstance(taken, _End):
                return False, taken
            answer = self._receive(frames.ANSWER, start + timeout, watched)
            while (
                isinstance(answer, _End)
                and answer.kind == "late"
                and starvation is not None
                and self.clock() < start + timeout * patience.MOST
                and starvation.starved(timeout)
            ):
                answer = self._receive(frames.ANSWER, self.clock() + timeout / 4, watched)
            if isinstance(answer, bytes):
                self._listen(0.0)
                if waiting := self._reader.waiting:
                    answer = _End("wrote", f"more than an answer: {frames.shown(waiting)}")
            return True, answer

    @contextlib.contextmanager
    def _unpaused(self) -> Iterator[None]:
        """Begins when the child may go on; until the block ends nobody can stop it."""
        while True:
            self._going.wait()
            with self._launching:
                if self._going.is_set():
                    yield
                    return

    @contextlib.contextmanager
    def _stopped_on_interrupt(self) -> Iterator[None]:
        """An interrupt leaves no child behind whose next answer would be taken for another
        job's.
        """
        try:
            yield
        except BaseException:
            self.stop()
            raise

    def stop(self) -> int | None:
        """End the child and everything it started; returns its exit code, None when there was no
        child, or it lived.
        """
        if self._process is None:
            return None
        code, pid = self._process.poll(), self._process.pid
        folder = self._scratch.folder
        shared = processes.shared_files([pid, *processes.marked(folder)]) if code is None else set()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        self._process.wait()
        for descriptor in (self._requests, self._answers, self._errors):
            os.close(descriptor)
        self._process = None
        processes.end_marked(folder)  # what has left its group
        processes.remove_shared(pid, shared, self._started)
        self._scratch.remove()  # what a compiler that was killed has left in it
        return code

    def kill(self) -> None:
        """End the child from another thread; who waits for its answer learns that it died."""
        self._signal(signal.SIGKILL)

    def _send(self, message: bytes, until: float) -> _End | None:
        """Give the child a message; None when all of it is in the pipe."""
        room = select.poll()  # select.select refuses descriptors above 1023
        room.register(self._requests, select.POLLOUT)
        while message:
            try:
                message = message[os.write(self._requests, message) :]
            except BlockingIOError:
                left = until - self.clock()
                if left <= 0:
                    return _End("late")
                room.poll(left * 1e3)
            except BrokenPipeError:
                return _End("died")
        return None

    def _receive(self, word: bytes, until: float, watched: Excess | None = None) -> bytes | _End:
        """The content of the next message, which has to be this word, or why there is none by then
        (on this worker's clock). Looks now and then whether the child lives, and what it takes
        where it is `watched`.
        """
        assert self._process is not None
        gone, listened = False, False
        while True:
            try:
                message = self._reader.message()
            except frames.GarbledError as e:
                return _End("wrote", str(e))
            if message is not None:
                return message[1] if message[0] == word else _End("wrote", "another answer")
            if gone:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(timeout=CLOSING_SECONDS)
                return _End("died")
            if listened and watched and (too_much := watched.found()):
                return _End("took", too_much)
            left = until - self.clock()
            if left <= 0:
                return _End("late")
            # what it has started may hold the other end of the pipe when it has died
            dead = self._process.poll() is not None
            gone = not self._listen(0.0 if dead else min(left, excess.TICK)) or dead
            listened = True

    def _listen(self, seconds: float) -> bool:
        """Take what comes of the child within so many seconds, its last words too; False when it
        has closed its end of the answers.
        """
        ready = select.poll()
        for descriptor in (self._answers, self._errors):
            ready.register(descriptor, select.POLLIN)
        until = time.monotonic() + seconds
        while events := ready.poll(max(0.0, until - time.monotonic()) * 1e3):
            for descriptor, _ in events:
                try:
                    piece = os.read(descriptor, 1 << 16)
                except BlockingIOError:
                    continue
                if descriptor == self._answers:
                    self._reader.feed(piece)
                    return bool(piece)
                if piece:
                    self._last_words = (self._last_words + piece)[-_LAST_WORDS:]
                else:
                    ready.unregister(descriptor)
            if time.monotonic() >= until:  # it may write its last words for ever
                break
        return True

    def _last_error(self) -> str:
        """The last line the child wrote to its standard error."""
        with contextlib.suppress(BlockingIOError):  # nothing more has come
            for _ in range(4):  # more than a pipe holds
                self._last_words = (self._last_words + os.read(self._errors, 1 << 16))[
                    -_LAST_WORDS:
                ]
        lines = self._last_words.decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else ""


def _cause(code: int | None) -> str:
    """An exit code in words: "SIGSEGV", "exit code 3"."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}: {_MEANING[name]}" if name in _MEANING else name


_MEANING = {
    "SIGSYS": "it sent a signal to a process that is not its own",
    "SIGKILL": "from outside, as the system does when memory runs out",
    "SIGXFSZ": "it wrote a file without end",
}
"""What signals say of a process that died of them, where their name does not."""


def end_driven(worker: Worker, thread: threading.Thread) -> None:
    """End a worker's process until the thread that drives it has ended, which may start another."""
    while thread.is_alive():
        worker.kill()
        thread.join(0.05)
