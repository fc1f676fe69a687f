"""What `lntune export` has written, for people."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING

from lntune.report.columns import whole
from lntune.words import counted

if TYPE_CHECKING:
    from lntune.commands.export import Exported


def lines(exported: Exported) -> list[str]:
    """What the table comes to, where the bundle is and how it is used; or what kept it from being
    written.
    """
    kernels = exported.kernels
    count = Counter(kernel.status for kernel in kernels)
    failed = [f"{k.case} for {k.arch} failed: {k.message}" for k in kernels if k.status == "failed"]
    if failed:
        return [f"nothing is written: {counted(len(failed), 'kernel')} cannot be built", *failed]
    there = count["built"] + count["there"]
    eager = f", {counted(count['eager'], 'case')} left to eager mode" if count["eager"] else ""
    size = f"{exported.bytes / 2**20:.2f} MiB"
    checked = sum(kernel.checked for kernel in kernels)
    what = f"{counted(there, 'kernel')}{eager}, {size}"
    text = []
    if exported.folder:
        text += [
            f"{whole(exported.folder)}: {what}",
            f"SHA-256 {exported.sha256}, which stands for all of it",
            f"used by LNTUNE_BUNDLE={shlex.quote(exported.folder)} or lntune.load",
        ]
    if exported.hub:
        text.append(
            f"{whole(exported.hub)}: a repository for Hugging Face's kernels;"
            " kernels.get_local_kernel loads it as it lies there"
        )
    if exported.glibc:
        text.append(f"loads where glibc is {exported.glibc} or newer")
    if there > checked:
        text.append(
            f"{there - checked} not checked here: that is done before a first call, on each kind of"
            " machine, in some tens of milliseconds"
        )
    for kernel in kernels:
        text += [f"{kernel.case} is served by another: {wrong}" for wrong in kernel.wrong]
    return text
