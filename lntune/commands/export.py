"""`lntune export`: the kernels that will serve calls, for one device or several, in a bundle that
is taken to machines with neither TVM nor a compiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from lntune import backends, ops
from lntune.bundle import hub, loaded, write
from lntune.bundle import manifest as manifests
from lntune.bundle.manifest import Entry, Manifest, Target
from lntune.case import Case
from lntune.commands import build
from lntune.commands.build import Built
from lntune.device import Device
from lntune.errors import BuildError, InputError, UnknownNameError, got_expected, unknown
from lntune.kernels import direct
from lntune.log import records
from lntune.log.records import Record
from lntune.system import elf, paths, toolchain
from lntune.torch import dispatch, layer_norm_node

OnKernel = Callable[[int, int, Case, Device], None]


class Options(NamedTuple):
    """What goes into a bundle beside kernels for contiguous rows: `training`, what only steps of
    training call, and `strided`, kernels for rows that lie apart.
    """

    training: bool = True
    strided: bool = False


USUAL = Options()


class Exported(msgspec.Struct, frozen=True):
    """What was written: where, the SHA-256 sum that stands for it, its size, and each kernel. A
    bundle is written whole or not at all: there is no sum where a kernel could not be built.
    """

    folder: str
    sha256: str
    bytes: int
    kernels: list[Built]
    glibc: str = ""
    """The newest version of glibc whose symbols are used."""
    hub: str = ""
    """The folder of the repository for Hugging Face's `kernels`, empty where none was written."""


def device_named(name: str) -> Device:
    """The device of a target: as `backends.device_of` has it, or one of which there are tuning
    records, by the name of its folder.

    Raises:
        UnknownNameError: it is neither.
    """
    try:
        return backends.device_of(name)
    except UnknownNameError:
        log = records.read(paths.log_dirs(), role="final")
        by_folder = {record.device.slug: record.device for record in log}
        if name in by_folder:
            return by_folder[name]
        raise unknown("target", name, [*backends.targets(), *by_folder]) from None


def tuned(device: Device) -> list[Case]:
    """The cases of which there is a final that may serve a device, of all operators."""
    log = records.read(paths.log_dirs(), role="final")
    own = records.measured(record for record in log if not device.differences(record.device))
    return sorted({group[-1].case.typical for group in own.values()})


def wanted(cases: Sequence[Case], options: Options) -> list[Case]:
    """The kernels that serve cases, their gradients too where training is wanted."""
    asked = list(cases)
    if options.training:
        asked += [
            msgspec.structs.replace(case, op=ops.get(case.op).backward, variant="")
            for case in cases
            if ops.get(case.op).backward
        ]
    served = build.kernels(asked)
    if options.training:
        return served
    return [case for case in served if not _trains(case)]


def _trains(case: Case) -> bool:
    """True for what only a step of training calls."""
    kept = ops.STATISTICS in case.variant.split("+")
    return kept or ops.forward_of(case.op) is not None


def export(
    cases: Mapping[Device, Sequence[Case]],
    folder: Path | None,
    options: Options = USUAL,
    on_kernel: OnKernel = lambda *_: None,
    repository: Path | None = None,
) -> Exported:
    """Build what serves cases on devices, by the tuning logs as they are, and write a bundle of it
    into a folder, and a `repository` as Hugging Face's `kernels` has them; None: not that one.

    Raises:
        InputError: there is nothing to write, or the folder has something else in it.
        ToolchainError, BuildError: there is no C compiler, or it fails; the folder cannot be
            written.
    """
    if folder is not None:
        write.ensure_new(folder)
    if repository is not None:
        write.ensure_new(repository, ("build",))
    kernels, contents, manifest = gather(cases, options, on_kernel)
    size = sum(map(len, contents.values()))
    if any(kernel.status == "failed" for kernel in kernels):
        return Exported(str(folder or repository), "", size, kernels)
    text = manifest.encoded()
    hub_files = {} if repository is None else hub.repository(manifest, contents)
    if folder is not None:
        write.folder_of(folder, {**contents, manifests.NAME: text})
    if repository is not None:
        write.folder_of(repository, hub_files)
    return Exported(
        str(folder or ""),
        manifests.digest_of(text),
        size + len(text),
        kernels,
        max((t.glibc for t in manifest.targets), key=_numbers, default=""),
        str(repository or ""),
    )


def gather(
    cases: Mapping[Device, Sequence[Case]], options: Options, on_kernel: OnKernel
) -> tuple[list[Built], dict[str, bytes], Manifest]:
    """Build what serves cases on devices: each kernel, the files by their names in a bundle, and
    what a manifest says of them; errors as those of `export`.
    """
    if not any(cases.values()):
        got = "no case"
        remedy = "Name an operator with --hidden, or tune one: lntune tune."
        raise InputError(got_expected("cases", got, "one at least", remedy))
    todo = [
        (device, case, strided)
        for device, asked in cases.items()
        for case in wanted(asked, options)
        for strided in ((False, True) if options.strided else (False,))
    ]
    kernels: list[Built] = []
    contents: dict[str, bytes] = {}
    entries: dict[Device, list[Entry]] = {device: [] for device in cases}
    logs: dict[str, list[Record]] = {}
    with loaded.left_out():
        dispatch.reload()
        libraries = _libraries(list(cases), options, contents)
        for number, (device, case, strided) in enumerate(todo):
            on_kernel(number, len(todo), case, device)
            built = build.build_case(case, device, (), strided)
            if strided and not built.strided:  # it was wrong: copies are given to the other
                continue
            kernels.append(built)
            if built.status != "failed":
                entries[device].append(_entry(built, case, device, logs, contents))
    dispatch.reload()
    contents |= {name: _lines(log) for name, log in logs.items()}
    targets = [_target(device, entries[device], libraries, contents) for device in cases]
    return kernels, contents, write.manifest_of(targets, libraries, contents)


def _entry(
    built: Built,
    case: Case,
    device: Device,
    logs: dict[str, list[Record]],
    contents: dict[str, bytes],
) -> Entry:
    """What the manifest says of a kernel, whose file and record are added to the others."""
    choice, file, line = dispatch.choose(case, device), "", -1
    if built.path:
        path = Path(built.path)
        file = f"{manifests.KERNELS}/{case.op}/{path.name}"
        contents[file] = path.read_bytes()
    if choice.record is not None:
        own = records.log_path(Path(), device, case.op).as_posix()
        log = logs.setdefault(f"{manifests.RECORDS}/{own}", [])
        if choice.record not in log:
            log.append(choice.record)
        line = log.index(choice.record)
    return Entry(
        case=case,
        tier=choice.tier,
        schedule=built.schedule,
        knobs=built.knobs,
        strided=built.strided,
        file=file,
        record=line,
    )


def _lines(log: Sequence[Record]) -> bytes:
    return b"".join(msgspec.json.encode(record) + b"\n" for record in log)


def _libraries(
    devices: Sequence[Device], options: Options, contents: dict[str, bytes]
) -> list[str]:
    """Our own C, compiled: what loads and calls kernels, and for training autograd's node where it
    can be compiled; the names of the files, which are added to the others.
    """
    build.ensure_libraries(devices)
    files = [path for device in devices for path in backends.of(device).ensure_library()]
    files.append(direct.ensure_library())
    if options.training and any(backends.of(device).node for device in devices):
        with contextlib.suppress(Exception):  # autograd.Function serves, as lntune doctor says
            files.append(layer_norm_node.ensure_library())
    named = {f"{manifests.LIBRARIES}/{path.name}": path for path in files}
    contents |= {name: path.read_bytes() for name, path in named.items()}
    return sorted(named)


def _target(
    device: Device, entries: Sequence[Entry], libraries: Sequence[str], contents: dict[str, bytes]
) -> Target:
    backend = backends.of(device)
    files = {entry.file for entry in entries if entry.file.endswith(".so")} | set(libraries)
    return Target(
        device=device,
        abi=toolchain.COMPATIBLE["apache-tvm-ffi"],
        runtime=backend.runtime(),
        glibc=_glibc({name: contents[name] for name in files}),
        kernels=tuple(entries),
    )


def _glibc(libraries: Mapping[str, bytes]) -> str:
    """The newest version of glibc whose symbols are used; empty off Linux, or for no matter
    which.
    """
    with contextlib.suppress(BuildError):
        needs = [one for name, content in libraries.items() for one in elf.of(content, name)]
        return ".".join(map(str, elf.newest(needs).get("GLIBC", ())))
    return ""


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split("."))) if release else ()
