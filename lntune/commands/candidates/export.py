"""`lntune export-candidates`: what a machine without a compiler takes to measure candidates."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from lntune import __version__, backends, schedule
from lntune.case import Case
from lntune.commands import merge
from lntune.commands.candidates import manifest
from lntune.commands.candidates.manifest import Built, Manifest
from lntune.device import Device, usable_cores
from lntune.errors import InputError, LntuneError, gist, got_expected
from lntune.kernels import cache, direct
from lntune.log import select
from lntune.measure.jobs import Candidate
from lntune.system import paths
from lntune.tune.candidates import Candidates

PACKAGES = ("msgspec", "platformdirs", "filelock")
"""What lntune takes beside PyTorch and apache-tvm-ffi to measure; they come along."""
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "tuning_logs", "*.lock")


class Exported(msgspec.Struct, frozen=True):
    """What was written: candidates of cases, bytes, and what could not be built, and why."""

    output: str
    target: str
    device: Device
    cases: int
    candidates: int
    bytes: int
    failed: tuple[str, ...]


def export(
    cases: Sequence[Case],
    target: str,
    output: Path,
    trials: int,
    only: Sequence[str] = (),
    on_kernel: Callable[[int, int, Case], None] = lambda *_: None,
) -> Exported:
    """Build up to `trials` candidates of each case for a device that need not be here, and put them
    into a new folder with all that it takes to measure them. `only` are the schedules, where they
    are named.

    Raises:
        InputError: the folder is there already, or nothing can be built for any case.
        ToolchainError, BuildError: there is no compiler.
        OSError: the folder cannot be written; then there is none.
    """
    if output.exists():
        raise InputError(got_expected("OUT", f"{output}, which is there", "a folder to be made"))
    device = backends.device_of(target)
    todo = [(case, c) for case in cases for c in chosen(case, device, trials, only)]
    failed, built = list[str](), list[Built]()

    def fill(folder: Path) -> None:
        with _cache(folder / "cache"):
            backends.of(device).ensure_library()
            direct.ensure_library()
            with ThreadPoolExecutor(usable_cores()) as pool:

                def one(number: int) -> tuple[Case, Candidate, Built | str]:
                    on_kernel(number, len(todo), todo[number][0])
                    return _built(folder, device, *todo[number])

                for case, candidate, made in pool.map(one, range(len(todo))):
                    if isinstance(made, str):
                        failed.append(f"{case}, {candidate.schedule}: {made}")
                    else:
                        built.append(made)
        if not built:
            raise InputError(f"nothing could be built for {target}: {'; '.join(failed[:3])}")
        _bring_along(folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
        written = Manifest(
            manifest.FORMAT,
            __version__,
            target,
            device,
            ".".join(platform.python_version_tuple()[:2]),
            tuple(built),
            manifest.digests(folder, files),
        )
        text = msgspec.json.format(msgspec.json.encode(written), indent=1)
        (folder / manifest.MANIFEST).write_bytes(text)

    merge.new_folder(output, fill)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Exported(str(output), target, device, len(cases), len(built), size, tuple(failed))


def chosen(case: Case, device: Device, trials: int, only: Sequence[str]) -> list[Candidate]:
    """The candidates of a case that are worth most: what serves it untuned, the default knobs of
    all schedules, what these want tried, and a fair sample of the rest.
    """
    found = Candidates(case, device, only)
    first = [*found.defaults, *found.seeds]
    if (default := untuned(case, device)) is not None:
        first.insert(0, default)
    rest = list(found.rest)
    random.Random(0).shuffle(rest)
    return list(dict.fromkeys([*first, *rest]))[: max(1, trials)]


def untuned(case: Case, device: Device) -> Candidate | None:
    """What serves a case where nothing is tuned; None where eager mode does."""
    of = select.untuned(case.typical, device, schedule.for_op(case.op, device.kind))
    return Candidate.of(of.schedule, of.setting) if of.schedule else None


def _built(
    folder: Path, device: Device, case: Case, candidate: Candidate
) -> tuple[Case, Candidate, Built | str]:
    """A candidate's kernel in the cache of a folder, or why there is none."""
    try:
        plan, setting = candidate.resolved(case.op)
        path = cache.prepare(case, plan, setting, device)
    except LntuneError as e:
        return case, candidate, gist(e)
    name = path.relative_to(folder).as_posix()
    is_default = candidate == untuned(case, device)
    return case, candidate, Built(case, candidate, plan.code, name, is_default)


@contextlib.contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """In the block kernels are kept in a folder."""
    folder.mkdir(mode=0o755)
    before = os.environ.get("LNTUNE_CACHE_DIR")
    os.environ["LNTUNE_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["LNTUNE_CACHE_DIR"]
        if before is not None:
            os.environ["LNTUNE_CACHE_DIR"] = before


def _bring_along(folder: Path) -> None:
    """Put lntune itself, schedules and the packages that measuring takes into a folder."""
    shutil.copytree(paths.PACKAGE, folder / "lntune", ignore=_LEFT_OUT)
    for number, schedules in enumerate(reversed(paths.schedule_dirs())):
        if schedules.is_dir() and not schedules.is_relative_to(paths.PACKAGE):
            name = f"schedules_{number}" if number else "schedules"
            shutil.copytree(schedules, folder / name, ignore=_LEFT_OUT)
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            source = Path(spec.submodule_search_locations[0])
            shutil.copytree(source, folder / "packages" / name, ignore=_LEFT_OUT)
    shutil.copy(Path(__file__).with_name("start.py"), folder / "measure.py")
