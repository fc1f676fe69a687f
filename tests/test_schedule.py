"""Schedule files: found, loaded, told apart, and refused with the file's name when something is
wrong with them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lntune import knobs, ops, schedule, versions
from lntune.case import Case
from lntune.device import Device
from lntune.errors import InputError, ScheduleError, UnknownNameError
from lntune.schedule import ScheduleWarning
from lntune.system import paths, sources
from lntune.versions import Code

CASE = Case("layer_norm", 64, "float32", 4)
DEVICE = Device("cpu", "Test", "x86-64-v3", 2)

MINE = """
from dataclasses import dataclass
from lntune.knobs import knob
from lntune.schedule import Schedule

@dataclass(frozen=True)
class Knobs:
    lanes: int = knob(2, (1, 2, 4), "how many")

def valid(knobs, case, device):
    return "too many for a row" if knobs.lanes > case.hidden else None

def module(case, knobs, device):
    return "module"

SCHEDULES = (Schedule("NAME", "OP", "KIND", Knobs, lambda case, device: Knobs(), valid, module),)
"""

WriteFile = Callable[..., Path]
SHIPPED = (
    "cached_rows",
    "widened_rows",
    "blocked_rows",
    "fused_step",
    "blocked_step",
    "shared_row",
    "gated_row",
    "gated_row_backward",
)

pytestmark = pytest.mark.filterwarnings("ignore:.*in which there is no schedule file")


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    """`write("cpu/mine.py", name=..., ...)` puts a schedule file into the user's folder; `text`
    replaces all of it.
    """

    def put(
        path: str,
        name: str = "mine",
        op: str = "layer_norm",
        *,
        kind: str = "cpu",
        text: str = MINE,
        folder: str = "user",
    ) -> Path:
        file = tmp_path / folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("NAME", name).replace("OP", op).replace("KIND", kind))
        return file

    return put


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's schedules lie in `user`, below the test's own folder; nothing is remembered from
    another test.
    """
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(tmp_path / "user"))
    schedule._load.cache_clear()


def shipped() -> dict[str, schedule.Schedule]:
    """The schedules that come with lntune."""
    folder = paths.content("schedules")
    return {
        name: s for name, s in schedule.all_schedules().items() if s.path.is_relative_to(folder)
    }


def left_out() -> list[str]:
    """Why parts of the schedule folders are left out, which is said once; everything that is
    shipped is there.
    """
    with pytest.warns(ScheduleWarning) as caught:
        known = schedule.all_schedules()
    reasons = [one.reason for one in schedule.left_out()]
    assert [str(w.message) for w in caught] == [f"left out: {reason}" for reason in reasons]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert schedule.all_schedules() is known
    assert all(known[name].path.is_relative_to(paths.content("schedules")) for name in SHIPPED)
    return reasons


def test_shipped_schedules_load() -> None:
    """Every shipped schedule is known by its own name, lies in its kind's folder, is for an
    operator there is, and declares a version.
    """
    known = shipped()
    assert {"cached_rows", "widened_rows"} <= set(known)
    for name, s in known.items():
        assert (s.name, s.kind) == (name, s.path.parent.name)
        assert s.op in ops.OPS
        assert s.version >= 1 and s.code.schedule == s.version


@pytest.mark.parametrize("op", ops.OPS)
def test_every_operator_has_a_schedule(op: str) -> None:
    """Each operator has at least one CPU schedule, whose default knobs are valid for all of the
    operator's grid.
    """
    plans = schedule.for_op(op, "cpu")
    assert plans
    for case in ops.OPS[op].grid:
        assert any(
            p.reason_invalid(p.default(case, DEVICE), case, DEVICE) is None for p in plans.values()
        ), str(case)


def test_a_users_file_is_found(write: WriteFile) -> None:
    """A file in a folder of LNTUNE_SCHEDULES adds its schedules to the shipped ones."""
    path = write("cpu/mine.py")
    before = set(shipped())
    mine = schedule.get("mine")
    assert mine.path == path
    assert set(schedule.all_schedules()) == {*before, "mine"}
    assert mine in schedule.for_op("layer_norm", "cpu").values()
    assert mine not in schedule.for_op("layer_norm", "gpu").values()
    assert mine.apply(CASE, mine.default(CASE, DEVICE), DEVICE) == "module"


def test_space_and_reasons(write: WriteFile) -> None:
    """The space holds the settings that `valid` has nothing against; the others come with the
    reason.
    """
    write("cpu/mine.py")
    mine = schedule.get("mine")
    narrow = Case("layer_norm", 2, "float32", 1)
    assert [k.lanes for k in mine.space(CASE, DEVICE)] == [1, 2, 4]
    assert [k.lanes for k in mine.space(narrow, DEVICE)] == [1, 2]
    assert mine.reason_invalid(mine.knobs(lanes=4), narrow, DEVICE) == "too many for a row"


def test_a_users_schedule_wins_over_a_shipped_one(write: WriteFile) -> None:
    """A schedule in the user's folder takes the place of the shipped one of the same name, which is
    said, and is told from it.
    """
    theirs = shipped()["cached_rows"]
    schedule._load.cache_clear()
    path = write("cpu/mine.py", name="cached_rows")
    with pytest.warns(ScheduleWarning) as caught:
        assert schedule.get("cached_rows").path == path
    assert [str(w.message) for w in caught] == [
        f"schedule 'cached_rows' is taken from {path}, not from {theirs.path}"
    ]
    assert schedule.get("cached_rows").code != theirs.code
    assert schedule.get("widened_rows").path == theirs.path


def test_the_first_of_two_user_folders_wins(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several folders in LNTUNE_SCHEDULES the first that has the name serves it."""
    first, second = write("cpu/a.py", folder="first"), write("cpu/a.py", folder="second")
    for folders, wins in ((("first", "second"), first), (("second", "first"), second)):
        monkeypatch.setenv("LNTUNE_SCHEDULES", os.pathsep.join(str(tmp_path / f) for f in folders))
        with pytest.warns(ScheduleWarning, match=re.escape(f"taken from {wins}")):
            assert schedule.get("mine").path == wins


@pytest.mark.parametrize(("op", "kind"), [("layer_norm_backward", "cpu"), ("layer_norm", "gpu")])
def test_a_name_that_is_taken_by_something_else(write: WriteFile, op: str, kind: str) -> None:
    """A schedule for another operator or kind of device does not make a shipped one of its name
    disappear: it is left out.
    """
    path = write(f"{kind}/mine.py", name="cached_rows", op=op, kind=kind)
    (reason,) = left_out()
    assert reason.startswith(f"{path}: a schedule 'cached_rows' is there already, in ")
    assert reason.endswith(
        f"for layer_norm on a cpu, and this one is for {op} on a {kind}. Give it another name."
    )


def test_a_name_twice_in_a_later_folder(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the same name in one folder is left out although an earlier folder has it
    too.
    """
    (
        write("cpu/a.py", folder="first"),
        write("cpu/a.py", folder="second"),
        write("cpu/b.py", folder="second"),
    )
    monkeypatch.setenv(
        "LNTUNE_SCHEDULES", os.pathsep.join(str(tmp_path / f) for f in ("first", "second"))
    )
    with pytest.warns(ScheduleWarning, match=r"b\.py: there is a schedule 'mine' already"):
        assert schedule.all_schedules()["mine"].path.parent.parent.name == "first"


@pytest.mark.parametrize("named", ["user/cpu", "user/cpu/mine.py", "."])
def test_a_folder_that_is_one_off(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """LNTUNE_SCHEDULES one folder too deep, at the file or one folder too high is said, with the
    folder that was meant.
    """
    write("cpu/mine.py")
    monkeypatch.setenv("LNTUNE_SCHEDULES", str(tmp_path / named))
    (reason,) = left_out()
    assert re.match(
        r"LNTUNE_SCHEDULES: got .*expected a folder that has folders cpu or gpu", reason
    )
    assert reason.endswith(f" Did you mean {tmp_path / 'user'}?")


def test_a_folder_of_an_unknown_kind(write: WriteFile) -> None:
    """Schedules in a folder that is no kind of device are not passed over in silence when they are
    all there is.
    """
    write("cuda/mine.py")
    assert "which has cuda/mine.py, expected a folder that has folders cpu or gpu" in left_out()[0]


@pytest.mark.parametrize("folders", [(), ("cpu",), ("cpu", "gpu")])
def test_an_empty_folder(tmp_path: Path, folders: tuple[str, ...]) -> None:
    """A folder without schedule files is said once: it is not what was meant. The shipped schedules
    serve.
    """
    for name in folders:
        (tmp_path / "user" / name).mkdir()
    with pytest.warns(
        ScheduleWarning,
        match=re.escape(
            f"LNTUNE_SCHEDULES: got {tmp_path / 'user'}, in which there is no schedule file, "
        ),
    ) as caught:
        assert set(SHIPPED) <= set(schedule.all_schedules())
    assert len(caught) == 1
    assert schedule.empty_folders() == [tmp_path / "user"]
    assert schedule.left_out() == []


def test_a_folder_that_is_not_there(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that does not exist, or lies in a home that there is not, is left out, which is
    said; another one's schedules are there. When it is there it is used.
    """
    write("cpu/mine.py", folder="second")
    monkeypatch.setenv(
        "LNTUNE_SCHEDULES", os.pathsep.join(str(tmp_path / f) for f in ("first", "second"))
    )
    assert left_out() == [
        f"the folder of schedules {tmp_path / 'first'} does not exist. Correct LNTUNE_SCHEDULES."
    ]
    assert "mine" in schedule.all_schedules()
    write("cpu/new.py", name="new", folder="first")
    assert {"mine", "new"} <= set(schedule.all_schedules())
    monkeypatch.setattr(Path, "expanduser", raising(RuntimeError("no home")))
    monkeypatch.setenv("LNTUNE_SCHEDULES", "~/mine")
    assert left_out() == [
        "the folder of schedules ~/mine does not exist. The user has no home folder: set HOME, or"
        " give the whole path."
    ]


def raising(error: BaseException) -> Callable[..., Any]:
    """A function that raises it."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_files_are_distinguished_by_folder(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of the same name in different folders are two modules; neither's classes are taken
    for the other's.
    """
    write("cpu/same.py", name="one", folder="first")
    write("cpu/same.py", name="two", folder="second")
    monkeypatch.setenv(
        "LNTUNE_SCHEDULES", os.pathsep.join(str(tmp_path / f) for f in ("first", "second"))
    )
    assert schedule.get("one").knobs is not schedule.get("two").knobs
    assert schedule.get("one").knobs.__module__ != schedule.get("two").knobs.__module__


def test_the_same_name_twice_in_one_folder(write: WriteFile) -> None:
    """Of two files of one folder that define the same name the second is left out; the message
    names both.
    """
    first, second = write("cpu/a.py"), write("cpu/b.py")
    assert left_out() == [f"{second}: there is a schedule 'mine' already, in {first}."]
    assert schedule.get("mine").path == first


def test_the_same_name_twice_in_one_file(write: WriteFile) -> None:
    """Of a name that a file defines twice the second is left out."""
    path = write("cpu/a.py", text=MINE + "\nSCHEDULES += SCHEDULES\n")
    assert left_out()[0].startswith(f"{path}: there is a schedule 'mine' already")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def broken(:", "SyntaxError"),
        (
            "import no_such_module_anywhere",
            "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
        ),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (MINE.replace("knob(2,", "knob(3,"), "InputError: default: got 3"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_file_that_does_not_load(write: WriteFile, text: str, reason: str) -> None:
    """A file that raises when imported is left out, which is said once with file and reason; all
    other files are used. Asked for one of its schedules it is a ScheduleError, and it leaves no
    half module behind.
    """
    path = write("cpu/broken.py", text=f"{text}\nSTRAY = 'mine'")
    write("cpu/sound.py", name="sound")
    modules = set(sys.modules)
    (message,) = left_out()
    assert message.startswith(f"{path}: the schedule file does not load: {reason}")
    assert schedule.get("sound").name == "sound"
    with pytest.raises(ScheduleError, match=re.escape(message)):
        schedule.get("mine", "layer_norm")
    assert not [m for m in set(sys.modules) - modules if "broken" in m]


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("from lntune import ops, loops", "lntune.loops is now vectors, row_sums, "),
        ("from lntune.sums import accumulate", "lntune.sums is now lntune.transforms.cpu."),
        ("import lntune.streaming", "lntune.streaming is now lntune.transforms.cpu.streaming."),
        ("from lntune.gpu import threads", "lntune.gpu is now lntune.transforms.gpu "),
        ("from lntune.cuda import hints", "lntune.cuda is now lntune.architectures "),
    ],
)
def test_a_file_written_for_modules_of_old_names(write: WriteFile, text: str, remedy: str) -> None:
    """The reason why it does not load says what its modules are called now, and they are there."""
    write("cpu/old.py", text=text)
    (reason,) = left_out()
    assert f". {remedy}" in reason and reason.endswith(".")
    for name in re.findall(r"lntune\.[\w.]*\w", reason.partition(" is now ")[2]):
        assert importlib.util.find_spec(name), name


def test_a_repaired_file_loads(write: WriteFile) -> None:
    """A failure to load is not remembered: once the file is right, the next look finds its
    schedules.
    """
    write("cpu/mine.py", text="1 / 0")
    assert "ZeroDivisionError" in left_out()[0]
    path = write("cpu/mine.py", text=MINE + "# repaired, and of another length\n")
    assert schedule.get("mine").path == path


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        "SCHEDULES = 7",
        "SCHEDULES = None",
        MINE + "\nSCHEDULES = list(SCHEDULES)",
        MINE + "\nSCHEDULES = SCHEDULES[0]",
        "SCHEDULES = ('mine',)",
        MINE.replace('Schedule("NAME"', 'Schedule(["NAME"]'),
    ],
)
def test_schedules_of_the_wrong_type(write: WriteFile, text: str) -> None:
    """A file whose SCHEDULES is missing, or anything but a tuple of Schedule, is left out, saying
    what is expected in which file.
    """
    path = write("cpu/odd.py", text=text)
    assert left_out() == [f"{path}: expected SCHEDULES, a tuple of lntune.schedule.Schedule."]


def test_no_schedules_is_fine(write: WriteFile) -> None:
    """An empty SCHEDULES is a file with nothing in it yet."""
    write("cpu/empty.py", text="SCHEDULES = ()")
    assert set(schedule.all_schedules()) == set(shipped())


def test_the_wrong_folder(write: WriteFile) -> None:
    """A schedule for one kind of device in the folder of another is left out, naming both."""
    path = write("gpu/mine.py", kind="cpu")
    assert left_out() == [f"{path}: schedule 'mine' is for 'cpu' but lies in the folder 'gpu'."]


def test_an_operator_that_is_none(write: WriteFile) -> None:
    """A schedule for an operator there is not is left out with the near miss."""
    write("cpu/mine.py", op="layer_nrom")
    assert "unknown operator 'layer_nrom'. Did you mean 'layer_norm'" in left_out()[0]


FAULTS = {
    "default() of 'mine' failed on layer_norm 4x64 float32: ZeroDivisionError: division by zero": (
        "Knobs(), valid",
        "1 / 0, valid",
    ),
    "default() of 'mine' gave None for layer_norm 4x64 float32, expected Knobs.": (
        "Knobs(), valid",
        "None, valid",
    ),
    "valid() of 'mine' failed on layer_norm 4x64 float32: KeyError: 'no'": (
        "    return",
        "    {}['no']\n    return",
    ),
    (
        "valid() of 'mine' gave True for layer_norm 4x64 float32,"
        " expected why the knobs do not fit, or None."
    ): (" None\n", " True\n"),
    "Knobs() of 'mine' failed on layer_norm 4x64 float32: ValueError: no": (
        '"how many")',
        '"how many")\n\n    def __post_init__(self):\n'
        '        if self.lanes == 4:\n            raise ValueError("no")',
    ),
}
"""What is said of a schedule that fails when it is asked, and how one becomes it."""


@pytest.mark.parametrize(
    ("expected", "change"), FAULTS.items(), ids=lambda v: v[:12] if isinstance(v, str) else ""
)
def test_a_schedule_that_fails(write: WriteFile, expected: str, change: tuple[str, str]) -> None:
    """Whatever a user's functions raise, or give that is none of what they are to give, is a
    ScheduleError that names file and schedule, and the line that raised.
    """
    path = write("cpu/mine.py", text=MINE.replace(*change))
    mine = schedule.get("mine")
    with pytest.raises(ScheduleError) as caught:
        mine.reason_invalid(mine.untuned(CASE, DEVICE), CASE, DEVICE), mine.space(CASE, DEVICE)
    message = str(caught.value)
    assert (" in line " in message) == (" failed on " in expected)
    assert re.sub(r" in line \d+", "", message) == f"{path}: {expected}"


def test_what_is_passed_over(write: WriteFile) -> None:
    """Files with a leading underscore (helpers), other kinds of file and files outside a kind's
    folder are not schedules.
    """
    for path in ("cpu/_helper.py", "cpu/notes.txt", "loose.py", "cpu/deeper/too_deep.py"):
        write(path, text="1 / 0")
    assert set(schedule.all_schedules()) == set(shipped())


def test_near_misses() -> None:
    """A mistyped schedule is answered with the one that was meant, the operator it was looked for,
    and those there are.
    """
    with pytest.raises(
        UnknownNameError,
        match=r"unknown schedule 'cached_row'. Did you mean 'cached_rows'\? Known: .*cached_rows",
    ):
        schedule.get("cached_row")
    with pytest.raises(
        UnknownNameError,
        match=r"unknown layer_norm schedule 'widend_rows'. Did you mean 'widened_rows'",
    ):
        schedule.get("widend_rows", "layer_norm")
    for kind, names in (("cpu", "cached_rows, metaschedule, widened_rows"), ("gpu", "shared_row")):
        with pytest.raises(UnknownNameError) as caught:
            schedule.get("cached_row", "layer_norm", kind)
        assert str(caught.value).endswith(f"Known: {names}."), "those of the device at hand alone"


def test_a_name_and_knobs() -> None:
    """What a log has of a schedule and its knobs becomes both again; an operator that it is not of,
    a knob that it does not have and a value that it does not take are errors.
    """
    cached = schedule.get("cached_rows")
    setting = cached.default(CASE, DEVICE)
    logged = knobs.to_dict(setting)
    assert schedule.resolve("cached_rows", "layer_norm", logged) == (cached, setting)
    with pytest.raises(UnknownNameError, match="layer_norm_backward schedule 'cached_rows'"):
        schedule.resolve("cached_rows", "layer_norm_backward", logged)
    with pytest.raises(UnknownNameError, match="knob 'wings'"):
        schedule.resolve("cached_rows", "layer_norm", {**logged, "wings": 2})
    with pytest.raises(InputError, match="knob parallel: got 7"):
        schedule.resolve("cached_rows", "layer_norm", {**logged, "parallel": 7})


def test_another_operators_schedule() -> None:
    """A schedule is not given out for an operator that is not its own."""
    assert schedule.get("cached_rows", "layer_norm").op == "layer_norm"
    with pytest.raises(
        UnknownNameError, match=r"unknown no_such_op schedule 'cached_rows'\. Known: none"
    ):
        schedule.get("cached_rows", "no_such_op")


def test_a_file_without_versions_is_known_by_its_code(write: WriteFile) -> None:
    """A schedule that declares no version is told by a hash of its code: another one with it, and
    not with the file's place or time, nor with what it says.
    """
    one = schedule.load_file(write("cpu/a.py"), "cpu")[0].code
    assert isinstance(one.schedule, str) and one.op == one.lowering == 1
    assert schedule.load_file(write("cpu/a.py"), "cpu")[0].code == one
    assert schedule.load_file(write("cpu/b.py", folder="elsewhere"), "cpu")[0].code == one
    assert schedule.load_file(write("cpu/a.py", text=MINE + "EXTRA = 1\n"), "cpu")[0].code != one
    assert (
        schedule.load_file(
            write("cpu/a.py", text=f'"""Another word."""\n# and one more\n{MINE}\n\n'), "cpu"
        )[0].code
        == one
    )


def test_a_declared_version_is_what_counts(
    write: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule with a version is told by it, by its operator's and by the lowering's, whatever
    else its file says.
    """
    text = MINE.replace("valid, module)", "valid, module, version=3)")
    assert text != MINE
    one = schedule.load_file(write("cpu/a.py", text=text), "cpu")[0].code
    assert one == Code(3, 1, 1)
    assert schedule.load_file(write("cpu/a.py", text=text + "EXTRA = 1\n"), "cpu")[0].code == one
    assert schedule.load_file(
        write("cpu/a.py", text=text.replace("version=3", "version=4")), "cpu"
    )[0].code == Code(4, 1, 1)
    monkeypatch.setitem(versions.LOWERING, "cpu", 9)
    assert schedule.load_file(write("cpu/a.py", text=text), "cpu")[0].code == Code(3, 1, 9)


@pytest.mark.parametrize("version", ["-1", "'2'", "1.5"])
def test_versions_are_whole_numbers(write: WriteFile, version: str) -> None:
    """Another version than a number from 1 on is an error that says so."""
    text = MINE.replace("valid, module)", f"valid, module, version={version})")
    path = write("cpu/odd.py", text=text)
    assert left_out() == [
        f"{path}: version of schedule 'mine': got {version}, expected a whole number from 1 on, or"
        " none."
    ]


def test_code_leaves_out_words_only() -> None:
    """Comments, docstrings and blank lines go, wherever they stand; strings that are values, and
    indentation, stay.
    """
    text = '''"""Module."""
# comment
X = "# no comment"  # comment
"""About X,
in two lines."""


def f(a: str = """no docstring""") -> str:
    """Function."""

    if a:  # comment
        return f"{a!r} # {{}}"
    return """no
docstring"""
'''
    expected = '''X = "# no comment"
def f(a: str = """no docstring""") -> str:
    if a:
        return f"{a!r} # {{}}"
    return """no
docstring"""'''
    assert sources.code_of(text) == expected


@pytest.mark.parametrize(
    "part",
    [
        "ops/layer_norm.py",
        "transforms/cpu/row_sums.py",
        "transforms/gpu/threads.py",
        "transforms/gpu/cache_hints.py",
        "mine",
    ],
)
def test_edits_are_seen(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """What a kernel was built of counts as changed when the code of the schedule, of an operator or
    of a transformation is edited, and not when only words in it are.
    """
    package = tmp_path / "package"
    shutil.copytree(paths.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(paths, "PACKAGE", package)
    mine = write("cpu/a.py")
    edited = mine if part == "mine" else package / part
    kept = sources.stamp(mine)
    text = edited.read_text()
    for addition, same in (("", True), ("# word\n", True), ("ANOTHER = 1\n", False)):
        edited.write_text(text + addition)
        for known in (sources._package_texts, sources._texts, sources._code):
            known.cache_clear()
        assert sources.unchanged(kept, mine) == same


def test_modules_that_a_schedule_imports_count(
    write: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule without a version is told by the code of its author's own modules too, imported
    inside functions and by one another.
    """
    (tmp_path / "mylib").mkdir()
    (tmp_path / "mylib" / "__init__.py").write_text("")
    (tmp_path / "mylib" / "tiles.py").write_text("from .sizes import SIZE\n")
    sizes = tmp_path / "mylib" / "sizes.py"
    sizes.write_text("SIZE = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(
        "cpu/a.py",
        text=MINE + "\ndef later():\n    from mylib import tiles\n    import json, numpy,"
        " lntune.transforms.cpu.vectors\n",
    )
    assert [p.name for p in sources.imported(path)] == ["__init__.py", "tiles.py", "sizes.py"]
    before = schedule.load_file(path, "cpu")[0].code
    kept = sources.stamp(path)
    sizes.write_text("# words\nSIZE = 1\n")
    assert schedule.load_file(path, "cpu")[0].code == before
    sizes.write_text("SIZE = 2\n")
    assert schedule.load_file(path, "cpu")[0].code != before
    sources._texts.cache_clear()
    sources._code.cache_clear()
    assert not sources.unchanged(kept, path)
