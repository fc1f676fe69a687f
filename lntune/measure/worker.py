"""A process that runs trials, and is replaced when one kills it.

Candidates are generated code: one may crash, hang or eat the stack. Jobs go to a child as JSON
lines and outcomes come back on a pipe of their own, so nothing a kernel prints can be taken for an
answer. A child that dies or overruns its time is killed with everything it started, its job is
recorded as what it was, and the next job gets a fresh child. So does a child that says it is of no
more use: an illegal access breaks a GPU's context for as long as its process lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from lntune.errors import BuildError
from lntune.measure.jobs import Job, Outcome
from lntune.system import patience, scratch
from lntune.system.patience import Starvation

START_SECONDS = 180.0
"""A cold import of TVM and PyTorch right after installation compiles their byte code first."""
_READY, _TAKEN = b"ready", b"taken"
# The child imports from where this process does, and not first from the current folder as -m would.
_START = (
    "import sys; sys.path[:] = sys.argv[3:]; from lntune.measure.worker import main;"
    " main(int(sys.argv[1]), int(sys.argv[2]))"
)


class Worker:
    """A child process, started when first needed. Use as a context manager; not for several threads
    at once.

    A subclass may have other work done in its child: its `program` calls `serve` with a function of
    its own.
    """

    program = _START

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: Any = None
        self._answers = -1
        self._scratch: scratch.Scratch
        self._errors: Any = None
        self._buffer = b""
        self.restarts = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the child and wait until it has imported what it needs.

        Raises:
            BuildError: it did not come up.
        """
        if self._process is not None:
            return
        read_end, write_end = os.pipe()
        self._scratch = scratch.Scratch()
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (not a pipe: nobody reads it while a job runs, and a full one blocks)
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    self.program,
                    str(write_end),
                    str(self._threads or 0),
                    *sys.path,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(write_end,),
                env=self._scratch.environment,
                # Ctrl-C is for the tuner, which ends the child itself; and one kill reaches all it
                # started
                start_new_session=True,
            )
            self._scratch.serves(self._process.pid)
        except OSError as e:
            os.close(read_end)
            errors.close()
            self._scratch.remove()
            raise BuildError(
                f"the worker process did not start: {sys.executable!r}: {e.strerror or e}."
            ) from e
        finally:
            os.close(write_end)
        self._requests, self._answers, self._errors, self._buffer = (
            self._process.stdin,
            read_end,
            errors,
            b"",
        )
        with self._stopped_on_interrupt():
            line = self._line(START_SECONDS)
        if line != _READY:
            detail = self._last_error()
            code = self.stop()
            raise BuildError(
                "the worker process did not start:"
                f" {detail or ('no answer' if line is None else _cause(code))}."
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
        it died or overran its time.

        `patient`: the time is to find what hangs, so a child that others keep from computing gets
        more of it, see `patience`.

        Raises:
            BuildError: no child came up to do it.
        """
        start = time.monotonic()
        accepted, line = self._ask(job, timeout, patient)
        if not accepted and line == b"":  # died before it had the job, which is not the job's fault
            self.stop()
            self.restarts += 1
            start = time.monotonic()
            accepted, line = self._ask(job, timeout, patient)
        if line:
            return line
        timed_out = line is None
        last_error = "" if timed_out else self._last_error()
        code = self.stop()
        self.restarts += 1
        if timed_out:
            seconds = time.monotonic() - start
            more = (
                f", nor within {seconds:.1f} s while others used the machine"
                if seconds > 1.2 * timeout + 1
                else ""
            )
            return Outcome("timeout", f"no answer within {timeout:.1f} s{more}; killed")
        return Outcome(
            "run", f"the worker died ({_cause(code)})" + (f": {last_error}" if last_error else "")
        )

    def _ask(self, job: Any, timeout: float, patient: bool) -> tuple[bool, bytes | None]:
        """(the child has taken the job, its answer); for the answer see `_line`."""
        self.start()
        assert self._process is not None
        start, starvation = time.monotonic(), Starvation(self._process.pid) if patient else None
        with self._stopped_on_interrupt():
            self._clear_errors()
            try:
                self._requests.write(msgspec.json.encode(job) + b"\n")
                self._requests.flush()
            except BrokenPipeError:
                return False, b""
            line = self._line(timeout)
            if line is None and starvation is not None and starvation.starved(timeout):
                line = self._line(timeout * (patience.MOST - 1))
            if line != _TAKEN:
                return False, line
            line = self._line(start + timeout - time.monotonic())
            while (
                line is None
                and starvation is not None
                and time.monotonic() < start + timeout * patience.MOST
                and starvation.starved(timeout)
            ):
                line = self._line(timeout / 4)
            return True, line

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
        child.
        """
        if self._process is None:
            return None
        code = self._process.poll()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._requests, self._errors):
            with contextlib.suppress(OSError):
                stream.close()
        os.close(self._answers)
        self._process = None
        self._scratch.remove()  # what a compiler that was killed has left in it
        return code

    def kill(self) -> None:
        """End the child from another thread; who waits for its answer learns that it died."""
        if (process := self._process) is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def _line(self, timeout: float) -> bytes | None:
        """The next line of the child; empty when it died, None when the time is over."""
        end = time.monotonic() + timeout
        ready = select.poll()  # select.select refuses descriptors above 1023
        ready.register(self._answers, select.POLLIN)
        while b"\n" not in self._buffer:
            remaining = end - time.monotonic()
            if remaining <= 0:
                return None
            if not ready.poll(remaining * 1e3):
                return None
            chunk = os.read(self._answers, 1 << 16)
            if not chunk:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    assert self._process is not None
                    self._process.wait(timeout=5)
                return b""
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _last_error(self) -> str:
        """The last line the child wrote to its standard error."""
        descriptor = self._errors.fileno()
        text = os.pread(descriptor, 1 << 12, max(0, os.fstat(descriptor).st_size - (1 << 12)))
        lines = text.decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else ""

    def _clear_errors(self) -> None:
        """Empty the child's standard error; it shares the position in the file."""
        os.ftruncate(self._errors.fileno(), 0)
        os.lseek(self._errors.fileno(), 0, os.SEEK_SET)


def _cause(code: int | None) -> str:
    """An exit code in words: "SIGSEGV", "exit code 3"."""
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it dies; elsewhere the closed pipe
    ends it after its job.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _lines() -> Iterator[bytes]:
    while line := sys.stdin.buffer.readline():
        yield line


def main(answers: int, threads: int) -> None:
    """The child of a tuning run: reads jobs, writes outcomes."""
    from lntune.measure import trial

    jobs = msgspec.json.Decoder(Job)
    serve(answers, threads, lambda line: msgspec.json.encode(trial.run(jobs.decode(line))))


def _ready_to_build() -> None:
    """Everything imported and compiled that building and calling kernels takes."""
    from lntune.backends.cpu import runtime
    from lntune.kernels import compiler, direct

    compiler.warm_up()
    runtime.ensure_library()
    direct.ensure_library()


def serve(
    answers: int,
    threads: int,
    do: Callable[[bytes], bytes],
    ready: Callable[[], None] = _ready_to_build,
) -> None:
    """A child's life: with everything imported, `ready` to it, it reads jobs, one a line, and
    writes what `do` makes of each.
    """
    _die_with_parent()
    # while what is made stays: collections among the imports' hundreds of thousands of objects take
    # a fifth of their time
    gc.disable()
    import torch

    from lntune.system.heap import kept_heap

    if threads:
        torch.set_num_threads(threads)
    ready()
    gc.freeze()
    gc.enable()
    with open(answers, "wb", buffering=0) as out, kept_heap():
        out.write(_READY + b"\n")
        for line in _lines():
            out.write(_TAKEN + b"\n")
            out.write(do(line) + b"\n")
