"""`lntune export-log`: trials for other tools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lntune.commands import merge
from lntune.errors import InputError, LogError, got_expected
from lntune.log import records, t4
from lntune.log.union import Union


class Exported(msgspec.Struct, frozen=True):
    """What was written: files of results, and the trials in them; `lost` is what the format cannot
    hold, role -> how many records.
    """

    output: str
    files: tuple[str, ...]
    trials: int
    lost: dict[str, int]


def as_t4(logs: Sequence[Path], output: Path) -> Exported:
    """Write the trials of logs, and of folders of them, to a new folder of files in the T4 format,
    and for each device what is known of it.

    Raises:
        InputError: there is no log, or the folder is there already.
        LogError: a log cannot be read, or the folder not be written; then there is none.
    """
    union = Union()
    for path in (file for log in logs for file in merge.logs_of(log)):
        union.add(path)
    if output.exists():
        raise InputError(got_expected("-o", f"{output}, which is there", "a folder to be made"))
    found = [records.of_line(line.raw) for line in union.lines() if not line.newer]
    files = t4.files(found)

    def fill(folder: Path) -> None:
        for name, file in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(t4.encoded(file))
            assert file.lntune is not None
            beside = (folder / name).with_name("metadata.json")
            beside.write_bytes(t4.encoded(t4.metadata(file.lntune.device, file.lntune.versions)))

    try:
        merge.new_folder(output, fill)
    except OSError as e:
        raise LogError(f"cannot write {output}: {e.strerror or e}.") from e
    lost = Counter[str](record.role for record in found if record.role != "trial")
    trials = sum(len(file.results) for file in files.values())
    return Exported(str(output), tuple(files), trials, dict(lost))
