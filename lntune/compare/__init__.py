"""Two ways to do the same side by side: schedules, settings of knobs, eager mode, runs; which is
faster, by how much, and is it certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lntune.certainty import SMALLEST
from lntune.compare import run
from lntune.compare.comparison import Result
from lntune.errors import InputError, got_expected
from lntune.log.wanted import Wanted


def compare(
    a: str | Path,
    b: str | Path,
    *,
    op: str = "",
    hidden: int | Sequence[int] = (),
    dtype: str | Sequence[str] = (),
    rows: int | Sequence[int] = (),
    target: str = "cpu",
    log_dir: str | Path | None = None,
    smallest: float = SMALLEST,
) -> Result:
    """Side B against side A, as `lntune compare A B` has it: names of schedules, with knobs
    ("cached_rows:lanes=4") or without, "default", "tuned", "eager", "compile" and "copy", which are
    looked up in the tuning log (of `log_dir`, where given) for the device of `target`; files of
    `lntune bench --output`; folders of tuning logs; "rev:NAME", the logs as a git revision has
    them.

    The cases are those that both have, of the operators, hidden sizes, dtypes and numbers of rows
    given (rows stand for their buckets). A Path is always a file or a folder. `smallest` is the
    smallest difference that matters, as a share.

    Raises:
        UnknownNameError: a side names nothing.
        InputError: `smallest` is no share.
        InputError: a side cannot be compared, or there is no case that both have.
        LogError: a file cannot be read.
    """
    wanted = Wanted.of(op, hidden, dtype, rows)
    if not 0 <= smallest < 1:
        raise InputError(got_expected("smallest", smallest, "a share from 0 on and below 1"))
    folder = None if log_dir is None else Path(log_dir)
    options = run.Options(target=target, log_dir=folder, smallest=smallest)
    (result,) = run.compare_sides(run.parse((a, b), options), wanted, options)
    return result
