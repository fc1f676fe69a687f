"""The folders that lntune writes to: tuning records, and the cache of built kernels."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

from lntune import backends, device
from lntune.backends import BACKENDS
from lntune.commands.doctor.finding import SHOWN, Finding, looked
from lntune.kernels import verdicts
from lntune.system import native, paths, sealed, trust
from lntune.system.sealed import DamagedError
from lntune.words import counted


def examine() -> list[Finding]:
    """Whether files can be made where they are to be, and whether built kernels are whole."""
    return [
        *looked("tuning log", _log),
        *looked("kernel cache", _cache),
        *looked("built kernels", _built),
        *looked("kernel checks", _checks),
        *looked("temporary files", _temporary),
    ]


def _log() -> Finding:
    """Where new measurements are written, and whether others can write there."""
    finding = _folder("tuning log", paths.log_dir(), "LNTUNE_LOG_DIR")
    if finding.status == "ok" and (why := paths.log_doubt(paths.log_dir())):
        return Finding("tuning log", "warn", *_in_two(why))
    return finding


def _cache() -> Finding:
    """Where built kernels are kept; elsewhere than in the cache where others can write to it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", paths.CacheWarning)
        paths._said.clear()
        folder = paths.cached("kernels").parent
    if caught:  # the temporary folder, and why
        return Finding("kernel cache", "warn", *_in_two(str(caught[0].message)))
    return _folder("kernel cache", folder, "LNTUNE_CACHE_DIR")


def _in_two(message: str) -> tuple[str, str]:
    """What is the matter, and the remedy."""
    matter, _, remedy = message.partition(". ")
    return matter, remedy


def _folder(topic: str, folder: Path, variable: str) -> Finding:
    where = f"{folder}{f' ({variable})' if os.environ.get(variable) else ''}"
    if problem := _writable(folder):
        return Finding(
            topic, "fail", f"{where}: {problem}", f"Set {variable} to a writable folder."
        )
    return Finding(topic, "ok", where)


def _writable(folder: Path) -> str:
    """Why files cannot be made in the folder, or the empty string."""
    try:
        trust.make(folder)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as e:
        return e.strerror or str(e)


def _built() -> Finding:
    """What was built so far, whether it is whole, and what that check costs at each load."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", paths.CacheWarning)
        folder = paths.cached("kernels").parent
    stored = (f"kernels/*/*.{native.FORMAT}.{backends.get(name).suffix}" for name in BACKENDS)
    files = [f for one in (*stored, f"runtime/*.{native.FORMAT}.so") for f in folder.glob(one)]
    damaged, times, size = [], [0.0], 0
    for file in files:
        begun = time.perf_counter()
        try:
            size += len(sealed.read(file).content)
        except (DamagedError, OSError):
            damaged.append(file.name)
        times.append(time.perf_counter() - begun)
    detail = (
        f"{counted(len(files), 'file')}, {size / 2**20:.1f} MiB, checked in"
        f" {1e3 * statistics.median(times):.2f} ms each"
    )
    if damaged:
        remedy = "They are put aside and built again when they are needed."
        return Finding(
            "built kernels",
            "warn",
            f"{detail}; {len(damaged)} damaged: {', '.join(damaged[:SHOWN])}",
            remedy,
        )
    return Finding("built kernels", "ok", detail)


def _checks() -> Finding:
    """What the first checks of kernels have found here, and what they took."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", paths.CacheWarning)
        folder = paths.cached("kernels")
    here = verdicts.environment(device.current())
    found = [one for one in verdicts.every(folder) if one.environment == here]
    if not verdicts.enabled():
        return Finding(
            "kernel checks",
            "warn",
            "switched off",
            "Unset LNTUNE_CHECK: kernels serve that nobody has checked on this machine.",
        )
    if not found:
        return Finding("kernel checks", "ok", "none yet; a kernel's first call makes one")
    times = [one.seconds for one in found]
    detail = (
        f"{counted(len(found), 'kernel')} checked before a first call, in"
        f" {1e3 * statistics.median(times):.0f} ms each, {sum(times):.1f} s in all"
    )
    wrong = [one for one in found if not one.ok]
    if not wrong:
        return Finding("kernel checks", "ok", detail)
    reasons = "; ".join(f"{one.case}, {one.kernel}: {one.message}" for one in wrong[:SHOWN])
    return Finding(
        "kernel checks",
        "warn",
        f"{detail}; {len(wrong)} wrong and not used: {reasons}",
        "Run lntune check to check them anew; the next choice serves meanwhile.",
    )


def _temporary() -> Finding:
    """Where compilers put what they are making: in folders that are the user's alone, unless others
    can put folders of theirs in the place of these.
    """
    with tempfile.TemporaryDirectory(prefix="lntune-") as folder:
        doubt = trust.doubt_folder(Path(folder))
    where = tempfile.gettempdir()
    if doubt is None:
        return Finding("temporary files", "ok", where)
    detail = f"others can change what compilers are making in {where}: {doubt.reason}"
    return Finding("temporary files", "warn", detail, "Set TMPDIR to a folder of your own.")
