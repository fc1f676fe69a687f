"""Commands that work on tuning logs as files: merge, prune, export-log, import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lntune.cli.base import FORMAT, JSON, LOG_DIR, WIDE, command, finish
from lntune.cli.parse import names, some
from lntune.log import pruning


@command("Put logs of several runs or machines into one")
def merge(
    logs: Annotated[
        list[Path],
        typer.Argument(metavar="LOG ...", help="Tuning logs (.jsonl), or folders of them."),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="A folder of logs that is not there yet, or one file, FILE.jsonl.",
        ),
    ],
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Put the union in the place of one of the logs, named by -o."
        ),
    ] = False,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Put every record of some logs, once, into one folder, in the file of its device and operator.

    The order of the logs makes no difference, nor does merging again: the same bytes come of it.
    Records stay as they were written, with run, time, device and versions. Lines that cannot be
    used are left out, each with file and line; records of a newer lntune are kept as they are.

    Exit code 1 when records contradict each other: they are of one run, time and candidate, and
    differ. Both are kept.
    """
    from lntune.commands import merge as merging
    from lntune.report import merged as shown
    from lntune.report.output import Output
    from lntune.report.progress import StepProgress
    from lntune.report.tables import console

    count = sum(len(merging.logs_of(path)) for path in logs)
    with StepProgress(console(stderr=True), "merge", count) as progress:
        found = merging.merge(logs, output, overwrite, lambda path: progress(str(path)))
    result = Output(found, [shown.files(found)], shown.lines(found), found.files)
    finish(result, output_format, wide, ok=not found.conflicts)


@command("Take from logs what nobody needs any more, and say why")
def prune(
    logs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[LOG ...]",
            help="Tuning logs, or folders of them; by default the folder of new measurements.",
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            help="What stays beside what decides a case, separated by commas: finals (the history"
            " of what won), resume (the trials that tuning goes on from), trials (all),"
            " comparisons; deciding: nothing else."
        ),
    ] = ",".join(pruning.DEFAULT[1:]),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be dropped, and change nothing.")
    ] = False,
    log_dir: LOG_DIR = None,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Make tuning logs smaller: drop trials that were made again, that other work disturbed, or
    that are of code or versions that are no more, and lines that cannot be used.

    What decides a case always stays, so every call is served as before. Others may append
    meanwhile. A log that is to be looked at trial by trial (`lntune report --html`, `lntune
    search-study`) is better kept whole: --keep trials,finals,comparisons.
    """
    from lntune.cli.base import using_logs
    from lntune.commands import merge as merging
    from lntune.commands import prune as pruner
    from lntune.report import merged as shown
    from lntune.report.output import Output
    from lntune.report.progress import StepProgress
    from lntune.report.tables import console
    from lntune.system import paths

    asked = pruning.wanted(names(some("--keep", keep)))
    with using_logs(log_dir):
        chosen = logs or [paths.log_dir()]
    count = sum(len(merging.logs_of(path)) for path in chosen)
    with StepProgress(console(stderr=True), "prune", count) as progress:
        found = pruner.prune(chosen, asked, dry_run, lambda path: progress(str(path)))
    result = Output(found, [shown.pruned(found)], shown.pruned_lines(found), found.files)
    finish(result, output_format, wide)
