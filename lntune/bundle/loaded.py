"""The bundles that this process serves calls from: those that `lntune.load` was given, the latest
first, then those that LNTUNE_BUNDLE names (separated as in PATH).

What a bundle holds for a case serves it, before any tuning log: who loads one has decided, where it
was written, what is to serve. What it does not hold, or what does not fit the device, goes the way
of every call.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from lntune import backends, ops
from lntune.backends.backend import Kernel
from lntune.bundle import fit
from lntune.bundle import manifest as manifests
from lntune.bundle.manifest import Entry, Manifest, Target
from lntune.case import Case
from lntune.device import Device
from lntune.errors import LntuneError
from lntune.log import records
from lntune.log.records import Record
from lntune.log.select import Choice
from lntune.system import callers, native, paths
from lntune.words import counted

VARIABLE = "LNTUNE_BUNDLE"
"""Environment variable that names bundles."""


class BundleWarning(UserWarning):
    """A bundle of the environment is not used, or nothing of it fits the device."""


class Bundle:
    """A bundle whose files were found as they were written. `str` of it says what it holds.

    `folder` is where it lies, `digest` the SHA-256 sum of its manifest, which stands for all of it.
    """

    def __init__(self, folder: Path, manifest: Manifest, digest: str) -> None:
        self.folder, self.manifest, self.digest = folder, manifest, digest
        self._entries = [
            {(entry.case, entry.strided): entry for entry in target.kernels}
            for target in manifest.targets
        ]
        self._records: dict[str, list[Record]] = {}

    def __repr__(self) -> str:
        return f"<lntune bundle {self.folder}, {self.digest[:12]}>"

    def __str__(self) -> str:
        lines = [f"{self.folder} ({self.digest[:12]}), written by lntune {self.manifest.lntune}"]
        for target in self.manifest.targets:
            lines.append(f"  {target.device.name} ({target.device.isa}): {_held(target)}")
        return "\n".join(lines)

    def targets(self, here: Device) -> list[tuple[int, Target]]:
        """The targets whose kernels a device can load, with their places, the best for it first."""
        fitting = [
            (place, target)
            for place, target in enumerate(self.manifest.targets)
            if not fit.reasons(target, here, self.manifest.lntune)
        ]
        return sorted(fitting, key=lambda one: fit.rank(one[1], here))

    def find(self, case: Case, here: Device, strided: bool = False) -> Found | None:
        """What serves a case on a device; None where the bundle has nothing for it that fits."""
        case = msgspec.structs.replace(
            case.typical, variant=ops.get(case.op).check_variant(case.variant)
        )
        for place, target in self.targets(here):
            entry = self._entries[place].get((case, strided))
            if entry is not None and not fit.sums(entry, target.device, here):
                return Found(self, target, entry)
        return None

    def record(self, target: Target, entry: Entry) -> Record | None:
        """The record that an entry's choice rests on."""
        log = records.log_path(Path(), target.device, entry.case.op)
        name = f"{manifests.RECORDS}/{log.as_posix()}"
        if entry.record < 0 or name not in self.manifest.files:
            return None
        if name not in self._records:
            manifests.check(self.folder, name, self.manifest.files[name])
            self._records[name] = list(records.read_file(self.folder / name))
        known = self._records[name]
        return known[entry.record] if entry.record < len(known) else None

    def misfits(self, here: Device) -> list[tuple[Target, list[str]]]:
        """The targets of the device's kind that it cannot use, with the reasons; those of other
        kinds only where it is all that there is.
        """
        found = [
            (target, why)
            for target in self.manifest.targets
            if (why := fit.reasons(target, here, self.manifest.lntune))
        ]
        own = [(target, why) for target, why in found if target.device.kind == here.kind]
        return own or found


class Found(NamedTuple):
    """What a bundle has for a case: the bundle, which of its targets, the entry."""

    bundle: Bundle
    target: Target
    entry: Entry

    def choice(self, here: Device) -> Choice:
        """The choice of the entry, as it stands on a device."""
        entry, record = self.entry, self.bundle.record(self.target, self.entry)
        differences = "; ".join(here.differences(self.target.device))
        where = f"bundle: {self.bundle.folder} ({self.bundle.digest[:12]})"
        steps = [f"{where} decides, before the logs: {self._what(record)}"]
        if differences:
            steps.append(
                f"{where}: written for {self.target.device.slug}, which is not this device"
                f" ({differences}); its code runs here, and its times are not known"
            )
        return Choice(
            entry.tier,
            entry.schedule,
            dict(entry.knobs),
            None if differences else record,  # one of another device says nothing of this one
            tuple(steps),
            bundle=str(self.bundle.folder),
        )

    def _what(self, record: Record | None) -> str:
        what = self.entry.schedule or "eager mode"
        if record is None:
            return f"{what} with its default knobs" if self.entry.schedule else what
        tuned, eager = record.median(), record.median("eager")
        speed = f", {tuned:.2f} us against eager's {eager:.2f} us" if tuned and eager else ""
        return f"{what}, by the record of {record.case} ({record.time}){speed}"

    @property
    def place(self) -> Path:
        """Where checks on this machine keep what they find of the kernel: in the cache, as files of
        these names would lie there.
        """
        file = self.bundle.manifest.files[self.entry.file]
        return paths.cached("kernels", "bundles", f"{file.sha256}{Path(self.entry.file).suffix}")

    @property
    def sha256(self) -> str:
        """The sum of the kernel's file."""
        return self.bundle.manifest.files[self.entry.file].sha256

    def load(self, here: Device) -> Kernel:
        """The kernel, whose file is looked at once more.

        Raises:
            BundleError: the file was altered since.
            BuildError: it cannot be loaded here.
        """
        backend = backends.of(here)
        backend.ensure_usable(f"{self.entry.case} (bundle {self.bundle.folder})")
        path, name = self.bundle.folder / self.entry.file, self.entry.file
        manifests.check(self.bundle.folder, name, self.bundle.manifest.files[name])
        try:
            return backend.load(path)
        except OSError as e:
            raise manifests.BundleError(f"cannot load {path} of the bundle: {e}") from e


def _held(target: Target) -> str:
    kernels = sum(bool(entry.file) for entry in target.kernels)
    eager = len(target.kernels) - kernels
    rest = f", {eager} left to eager mode" if eager else ""
    return f"{counted(kernels, 'kernel')}{rest}"


_given: list[Bundle] = []
"""Those of lntune.load, the latest first."""
_named: dict[str, list[Bundle]] = {}
"""Those of the environment, by what the variable says."""


def add(folder: str | os.PathLike[str], sha256: str = "") -> Bundle:
    """Serve calls from a bundle from now on; one of the same folder that was added before is
    replaced.

    Raises:
        InputError, BundleError: as manifest.read.
    """
    bundle = _read(Path(folder), sha256)
    _given[:] = [bundle, *(one for one in _given if one.folder != bundle.folder)]
    _ship()
    return bundle


def drop(bundle: Bundle | None = None) -> None:
    """Serve calls no longer from a bundle that was added; from none without one."""
    _given[:] = [one for one in _given if bundle is not None and one is not bundle]
    _named.clear()
    _ship()


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """In the block no bundle serves."""
    _hidden.append(True)
    try:
        yield
    finally:
        _hidden.pop()


def forget() -> None:
    """Read the bundles of the environment again when they are asked for."""
    _named.clear()


def _read(folder: Path, sha256: str = "") -> Bundle:
    folder = folder.expanduser().absolute()
    return Bundle(folder, *manifests.read(folder, sha256))


def current() -> list[Bundle]:
    """The bundles that serve, in the order in which they are asked. One of the environment that
    cannot be used is left out, which is said once.
    """
    if _hidden:
        return []
    value = os.environ.get(VARIABLE, "")
    if value not in _named:
        _named.clear()
        _named[value] = list(_of_environment(value))
        _ship()
    return [*_given, *_named[value]]


_hidden: list[bool] = []
"""One for each block of `left_out` that is open."""


def _of_environment(value: str) -> Iterator[Bundle]:
    for name in filter(None, value.split(os.pathsep)):
        try:
            yield _read(paths.expanded(name))
        except LntuneError as e:
            callers.warn(f"{VARIABLE} is left out: {e}", BundleWarning)


def _ship() -> None:
    """Have our own C taken from the bundles, where it is of the same source."""
    native.shipped.clear()
    for bundle in reversed([*_given, *(b for named in _named.values() for b in named)]):
        for name in bundle.manifest.libraries:
            native.shipped[Path(name).name] = bundle.folder / name


def find(case: Case, here: Device, strided: bool = False) -> Found | None:
    """What the first bundle that has something for a case has that fits a device; None of none."""
    for bundle in current():
        if (found := bundle.find(case, here, strided)) is not None:
            return found
    return None


def facts(here: Device) -> list[dict[str, Any]]:
    """What each bundle that serves holds, and what of it fits a device, for machines to read."""
    return [
        {
            "folder": str(bundle.folder),
            "sha256": bundle.digest,
            "kernels": sum(
                bool(e.file) and not fit.sums(e, t.device, here)
                for _, t in bundle.targets(here)
                for e in t.kernels
            ),
        }
        for bundle in current()
    ]
