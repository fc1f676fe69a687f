"""What all commands share: the application, common options, how they print and fail."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer
from typer.core import TyperCommand, TyperGroup

from lntune import __version__
from lntune.cli.parse import some
from lntune.errors import InputError, LntuneError, gist, got_expected, unknown
from lntune.ops.models import FAMILIES
from lntune.system import interrupts, native, paths, toolchain, variables
from lntune.words import visible_lines

if TYPE_CHECKING:
    from lntune.log.records import Record
    from lntune.report.output import Output

ORDER = [
    *("demo", "tune", "report", "why", "compare", "bench", "check"),
    *("merge", "prune", "export-log", "export-candidates", "import"),
    *("show", "inspect", "build", "export", "bringup", "search-study", "doctor", "ops"),
]


class _Group(TyperGroup):
    """The commands in the order in which somebody new meets them."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "Tune layer-normalization kernels for this machine, and see what came of it.\n\nExit code 1"
        " is a command's own, see its help; 2: an argument or the machine is at fault; 3: an error"
        " that should not happen (LNTUNE_TRACEBACK=1 shows where it comes from)."
    ),
)

OP = Annotated[str, typer.Argument(help="Operator; see `lntune ops`.")]
HIDDEN = Annotated[
    str,
    typer.Option("--hidden", help="Hidden sizes, separated by commas."),
]
DTYPE = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Element types, separated by commas: float32, float16, bfloat16, or fp32, fp16, bf16.",
    ),
]
ROWS = Annotated[
    str,
    typer.Option(
        "--rows",
        help="Numbers of rows, separated by commas. Each stands for its row bucket.",
    ),
]
GRID = Annotated[
    str,
    typer.Option(
        "--grid",
        help=(
            "Where --hidden is not given: default, paper (the hidden sizes of the paper's"
            f" experiments), or those of models: {', '.join(FAMILIES)}; see `lntune ops NAME`."
        ),
    ),
]
JSON = Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")]
FORMAT = Annotated[
    str,
    typer.Option(
        "--format",
        help=(
            "table; markdown (for a pull request); csv (figures as they are, one record a line);"
            " json; html (a page, of report and compare)."
        ),
    ),
]
PLOT = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        help=("Also draw this file, .png or .svg; needs matplotlib (pip install 'lntune[plot]')."),
    ),
]
PAGES = ("report", "compare")
"""Commands that have an HTML page."""
WIDE = Annotated[
    bool,
    typer.Option(
        "--wide",
        help=(
            "All columns of tables, also where the terminal is too narrow for them;"
            " pipes have them anyway."
        ),
    ),
]
MANY = 40
"""Cases beyond which a terminal shows what they come to, unless some of them are asked for."""
EVERY_CASE = Annotated[
    bool,
    typer.Option(
        "--every-case", help=f"A line for each case, also of more than {MANY} on a terminal."
    ),
]
LOG_DIR = Annotated[
    Path | None,
    typer.Option(
        "--log-dir",
        help="Folder of tuning logs, and no other: neither LNTUNE_LOG_DIR nor what is shipped.",
    ),
]

TARGET = Annotated[
    str,
    typer.Option(
        "--target", help="cpu; cuda or cuda:1 (a GPU that is here); emulated:sm_90 (for tests)."
    ),
]


def _seed(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise typer.BadParameter(f"got {value}, expected a number of 64 bits")  # what torch takes
    return value


SEED = Annotated[
    int,
    typer.Option(
        "--seed",
        callback=_seed,
        help="Seed of searches, of inputs and of the order of contenders.",
    ),
]

Function = TypeVar("Function", bound=Callable[..., Any])


class _Command(TyperCommand):
    """A command whose errors become one line, and with --json an object too (see `_message`);
    LNTUNE_TRACEBACK=1 shows where they come from. SIGTERM and SIGHUP end it as Ctrl-C does, in
    order and with what was found, and its exit code is then 143 or 129, as a shell has it of a
    process that they killed.
    """

    def invoke(self, ctx: Any) -> Any:
        with interrupts.as_ctrl_c() as signals:
            try:
                self._invoke(ctx)
            except (KeyboardInterrupt, typer.Exit):
                if not signals:
                    raise
            if signals:
                raise typer.Exit(128 + signals[0])

    def _invoke(self, ctx: Any) -> None:
        for sentence in () if ctx.command.name == "doctor" else variables.mistaken():
            tell(sentence)
        try:
            _settle_format(ctx)
            for name in LISTS:
                _refuse_empty(ctx, name)
            super().invoke(ctx)
        except Exception as e:
            # Exits and usage errors are typer's business; a pipe that nobody reads any more ends
            # the command, as `head` has it.
            if isinstance(e, (typer.Exit, typer.Abort, BrokenPipeError)) or hasattr(e, "exit_code"):
                raise
            if os.environ.get("LNTUNE_TRACEBACK", "") not in ("", "0"):
                traceback.print_exc()
            message, code = _message(e)
            if ctx.params.get("as_json"):
                with contextlib.suppress(OSError):  # where that is what went wrong
                    print_json({"error": message, "kind": type(e).__name__})
            tell(f"lntune: {message}")
            raise typer.Exit(code) from None


def _settle_format(ctx: Any) -> None:
    """Have `output_format` and `as_json` say the same, and refuse what a command has not."""
    if "output_format" not in ctx.params:
        return
    from lntune.report.output import FORMATS

    asked = ctx.params["output_format"]
    if asked not in FORMATS:
        raise unknown("--format", asked, FORMATS)
    if asked == "html" and ctx.command.name not in PAGES:
        remedy = f"These have a page: {', '.join(PAGES)}."
        raise InputError(got_expected("--format", "html", "table, markdown, csv or json", remedy))
    if ctx.params["as_json"] and asked not in ("table", "json"):
        raise InputError(got_expected("--format", f"{asked} beside --json", "one of the two"))
    ctx.params["as_json"] |= asked == "json"
    ctx.params["output_format"] = "json" if ctx.params["as_json"] else asked


TUNING = ("tvm", "numpy", "scipy")
"""Packages of the extra `tune`, by their modules."""
LISTS = ("hidden", "dtype", "rows")
"""Options for several values, which mean a default grid where they are left out."""


def _refuse_empty(ctx: Any, name: str) -> None:
    """Complain of an option that was given without a word, as an unset variable of a shell leaves
    it: not to have been given means something else.
    """
    source = ctx.get_parameter_source(name)
    if isinstance(text := ctx.params.get(name), str) and source and source.name == "COMMANDLINE":
        some(f"--{name}", text)


def _message(error: Exception) -> tuple[str, int]:
    """(the message of an error, exit code): 2 for what an argument or the machine is to blame for,
    3 for what should not happen.
    """
    if isinstance(error, LntuneError):
        return str(error), 2
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if names:
            return f"{' -> '.join(names)}: {error.strerror}", 2
        return f"{error.strerror} (LNTUNE_TRACEBACK=1 shows where)", 2
    if isinstance(error, ModuleNotFoundError) and error.name in TUNING:
        needs = f"this needs the package {error.name}, which is not installed here"
        return f"{needs}, as what serves calls does not. Run: {toolchain.TUNE}", 2
    name = type(error).__name__
    what = f"{name}: {gist(error)}" if str(error).strip() else name
    return f"unexpected {what}; LNTUNE_TRACEBACK=1 shows where it comes from. Please report it.", 3


def command(summary: str, name: str | None = None) -> Callable[[Function], Function]:
    """Register a function as a command of `lntune`; the summary stands beside its name in
    `lntune --help`, where 58 columns are left for it.
    """
    return app.command(name, cls=_Command, short_help=summary)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # Warnings of ours are one line; Python's form with source lines is for programmers.
    warnings.showwarning = lambda message, category, *_: tell(f"warning: {message}")
    native.telling[:] = [tell]


def tell(text: str) -> None:
    """A sentence on standard error, broken between words where that is a terminal; see
    `columns.say` and `columns.whole`.
    """
    if not sys.stderr.isatty():
        print(visible_lines(text.replace("\u00a0", " ")), file=sys.stderr)
        return
    from lntune.report.columns import say
    from lntune.report.tables import console

    say(console(stderr=True), text)


def print_json(value: Any) -> None:
    """Facts for a machine, in a form a person can read. Bytes of a path that are no UTF-8 are
    written as escapes.
    """
    from lntune.report import output

    try:
        print(output.json(value))
    except UnicodeEncodeError:
        print(json.dumps(msgspec.to_builtins(value), indent=2))


def command_line(name: str, arguments: Iterable[str], options: Mapping[str, str | bool]) -> str:
    """The command as a shell has it, with those of the options that are given."""
    words = ["lntune", name, *arguments]
    for option, value in options.items():
        if value:
            words += [option] if value is True else [option, str(value)]
    return shlex.join(words)


def finish(output: Output, output_format: str, wide: bool = False, ok: bool = True) -> None:
    """Print what a command has found in the format asked for, and end with exit code 1 unless it is
    `ok`: the last call of every command that finds something.
    """
    from lntune.report.output import print_table, text
    from lntune.report.tables import console

    if output_format == "table":
        print_table(output, console(wide=wide))
    elif output_format == "json":
        print_json(output.facts)
    else:
        printed = text(output, output_format)
        encoding = sys.stdout.encoding or "utf-8"
        print(printed.encode(encoding, "backslashreplace").decode(encoding))
    if not ok:
        raise typer.Exit(1)


def draw(plot: Path | None, measured: Sequence[Record]) -> None:
    """Draw measurements in the file that --plot names, if it was given, and name it on standard
    error.
    """
    from lntune.report import plots

    if plot is not None:
        plots.of_records(measured, plot)
        tell(f"The plot is in {plot}.")


@contextlib.contextmanager
def using_logs(folder: Path | None, may_be_new: bool = False) -> Iterator[None]:
    """Everything in the block reads and writes the tuning logs of `folder` and no others, also in
    processes it starts; None: wherever they are by default. `may_be_new`: the folder need not be
    there yet.

    Raises:
        InputError: it is no folder of tuning logs.
    """
    _check_logs(folder, may_be_new)
    if folder is None:
        yield
        return
    ours = {"LNTUNE_LOG_DIR": str(folder), "LNTUNE_SHIPPED_LOGS": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _check_logs(folder: Path | None, may_be_new: bool) -> None:
    """Refuse a folder that holds no tuning logs; one of the environment may be new in any case."""
    name, logs = ("LNTUNE_LOG_DIR", paths.log_dir()) if folder is None else ("--log-dir", folder)
    expected = "a folder of tuning logs, which holds a folder for each device"
    if logs.exists() and not logs.is_dir():
        raise InputError(got_expected(name, f"{logs}, a file", expected))
    if not logs.exists() and folder is not None and not may_be_new:
        got = f"{logs}, which is not there"
        raise InputError(got_expected(name, got, expected, "lntune tune --log-dir makes one."))
    if any(logs.glob("*.jsonl")):
        got = f"{logs}, the folder of one device"
        raise InputError(got_expected(name, got, expected, f"Give {logs.resolve().parent}."))


@contextlib.contextmanager
def dispatching(folder: Path | None) -> Iterator[Any]:
    """`lntune.torch.dispatch`, deciding in the block on the logs of `folder` (see using_logs) as
    they are now.
    """
    from lntune.torch import dispatch

    with using_logs(folder):
        dispatch.reload()
        try:
            yield dispatch
        finally:
            dispatch.reload()
