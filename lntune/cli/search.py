"""The command `lntune search-study`: what searches would have found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lntune.cli.base import FORMAT, JSON, WIDE, command, finish, tell
from lntune.cli.parse import names
from lntune.errors import InputError, got_expected
from lntune.search import SEARCHES
from lntune.words import counted

SEEDS = 200


@command("How soon searches find the best, by replaying logs", name="search-study")
def search_study(
    logs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[LOG ...]",
            help="Tuning logs, or folders of them; by default those of bench/results/*/search_study"
            " in a checkout.",
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            "--search",
            "--strategy",
            help=f"Only these searches, separated by commas: {', '.join(SEARCHES)}.",
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(help="Runs of each search that draws.")] = SEEDS,
    given: Annotated[
        bool,
        typer.Option(
            "--given/--not-given",
            help="Each search also with the best of the operator's other cases to be tried first"
            " (named `NAME, given`), as a tuning run has them by its log.",
        ),
    ] = True,
    at_once: Annotated[
        int,
        typer.Option(
            help="Candidates that a search has in hand at a time, as a tuning run on a CPU has as"
            " many as it has workers.",
        ),
    ] = 1,
    wide: WIDE = False,
    output_format: FORMAT = "table",
    as_json: JSON = False,
) -> None:
    """Play tuning logs that hold all of a case's space to each search, and say how far the best was
    after 5, 10, 20 and 50 trials, and how many trials it took to come within 5 %.

    Nothing is built or measured. A case is covered when 90 % of its space were tried, failures
    included, or of the space of those values of knobs that were tried at all; other cases are
    named. `lntune tune --search exhaustive` makes such a log. A candidate that failed is a trial.
    """
    from lntune.commands import search_study as study
    from lntune.report import studies
    from lntune.report.output import Output
    from lntune.report.progress import StepProgress
    from lntune.report.tables import console

    if seeds < 1:
        raise InputError(got_expected("--seeds", seeds, "1 or more"))
    if at_once < 1:
        raise InputError(got_expected("--at-once", at_once, "1 or more"))
    wanted = study.searches(names(search))
    tables, uncovered = study.tables(logs or study.committed())
    steps = len(tables) * len(wanted) * (1 + given)
    tell(
        f"{counted(len(tables), 'case')}, {counted(len(wanted), 'search', 'searches')}"
        f"{', each with and without what is given' if given else ''}, {counted(seeds, 'run')} of"
        " each that draws: minutes; fewer --seeds or --search take less"
    )
    with StepProgress(console(stderr=True), "search", steps) as progress:
        ways = (False, True) if given else (False,)
        results = study.study(
            tables,
            wanted,
            seeds,
            ways,
            lambda table, name: progress(f"{name}: {table.case}"),
            at_once,
        )
    found = study.Study(results, uncovered)
    shown = [studies.table(results)] if results else []
    finish(
        Output(found, shown, studies.lines(found), results), output_format, wide, ok=bool(results)
    )
