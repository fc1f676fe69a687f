"""What is shipped: the wheel and the sdist are built from a copy of the tree, installed elsewhere,
and used there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lntune

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (
    "lntune",
    "schedules",
    "tuning_logs",
    "tests",
    "bench",
    "tools",
    ".gitignore",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "constraints.txt",
)

pytestmark = pytest.mark.slow

USE = """
import sys, warnings
from pathlib import Path

import torch

import lntune
from lntune import schedule
from lntune.system import paths
from lntune.case import Case
from lntune.torch import dispatch

site, data = Path(sys.argv[1]), Path(sys.argv[2])
warnings.simplefilter("ignore", lntune.UntunedWarning)

x, weight, bias = torch.randn(8, 96), torch.randn(96), torch.randn(96)
with torch.inference_mode():
    ours = lntune.layer_norm(x, (96,), weight, bias)
eager = torch.nn.functional.layer_norm(x, (96,), weight, bias)
torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
kernel = dispatch.kernel_for(Case("layer_norm", 96, "float32", 8))
assert kernel is not None, "served by eager mode, not by a kernel"

assert not paths.is_checkout()
folders = {s.path.parent for s in schedule.for_op("layer_norm", "cpu").values()}
assert folders == {site / "lntune/_bundled/schedules/cpu"}
assert paths.content("tuning_logs") == site / "lntune/_bundled/tuning_logs"
assert data in paths.log_dir().parents, paths.log_dir()
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("lntune", "lntune_schedules"):
        assert site in Path(module.__file__).parents, f"{name} comes from {module.__file__}"
"""


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """What a command prints, both streams; a failure shows it."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, text=True, check=False, **streams
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def files_below(folder: Path) -> set[str]:
    """All files of a folder, as paths relative to it."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, with the leftovers that a used checkout has: lock files and
    bytecode.
    """
    folder = tmp_path_factory.mktemp("source") / "lntune"
    folder.mkdir()
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)
    for leftover in (
        "tuning_logs/device/layer_norm.jsonl.lock",
        "schedules/cpu/__pycache__/layer_norm.cpython-311.pyc",
        "lntune/runtime.so",
    ):
        (folder / leftover).parent.mkdir(parents=True, exist_ok=True)
        (folder / leftover).write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the sdist made of the tree, and the wheel made of that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, tree], tree)
    return folder


@pytest.fixture(scope="module")
def site(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    folder = tmp_path_factory.mktemp("installed") / "site"
    (wheel,) = built.glob("*.whl")
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
            "--no-compile",
            "--target",
            folder,
            wheel,
        ],
        built,
    )
    return folder


@pytest.fixture
def elsewhere(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of somebody who installed the wheel: their own data folder, no variable of
    lntune but the cache.
    """
    monkeypatch.delenv("LNTUNE_LOG_DIR")
    monkeypatch.delenv("LNTUNE_SHIPPED_LOGS")
    return {
        "PYTHONPATH": str(site),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(tmp_path),
        "XDG_DATA_HOME": str(tmp_path / "data"),
    }


def test_the_wheel_holds_what_runs_and_nothing_else(built: Path) -> None:
    """Package, C runtime, type marker, schedules and logs are in; tests, lock files and built
    libraries are not.
    """
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    content = {
        "_bundled/schedules/cpu/layer_norm.py",
        "_bundled/schedules/README.md",
        "_bundled/tuning_logs/README.md",
        "backends/cpu/runtime.c",
        "py.typed",
    }
    templates = (ROOT / "lntune/report/page/templates").iterdir()
    content |= {f"report/page/templates/{path.name}" for path in templates}
    assert {f"lntune/{name}" for name in content} <= names
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "lntune").rglob("*.py")}
    assert modules <= names
    logs = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tuning_logs").rglob("*.jsonl")}
    assert {f"lntune/_bundled/{log}" for log in logs} <= names
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"lntune"}
    assert not [
        name for name in names if name.endswith((".lock", ".so", ".pyc")) or "tests/" in name
    ]


def test_the_sdist_holds_the_content_folders_and_the_tests(built: Path) -> None:
    """A packager can build, tune and test from the sdist alone; lock files stay behind."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        "schedules/cpu/layer_norm.py",
        "tuning_logs/README.md",
        "tests/test_wheel.py",
        "tools/bundle.py",
        "constraints.txt",
        "LICENSE",
    }
    assert wanted <= names
    assert not [name for name in names if name.endswith((".lock", ".so", ".pyc"))]


def test_an_installed_wheel_serves_pytorch(
    site: Path, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    """layer_norm of the installed wheel runs a kernel that agrees with eager; schedules come from
    the wheel, logs go to the user.
    """
    script = tmp_path / "use.py"
    script.write_text(USE)
    run([sys.executable, script, site, tmp_path / "data"], tmp_path, **elsewhere)


def test_an_installed_wheel_tunes_into_the_users_folder(
    site: Path, elsewhere: dict[str, str], tmp_path: Path
) -> None:
    """`tune` run from a wheel writes its records below the user's data folder and leaves
    site-packages as it was.
    """
    before = files_below(site)
    case = [
        "--hidden",
        "64",
        "--dtype",
        "float32",
        "--rows",
        "8",
        "--trials",
        "2",
        "--budget",
        "4s",
        "--json",
    ]
    run([sys.executable, "-m", "lntune", "tune", "layer_norm", *case], tmp_path, **elsewhere)
    (log,) = (tmp_path / "data").rglob("layer_norm.jsonl")
    assert '"role":"trial"' in log.read_text()
    assert files_below(site) == before


def test_an_editable_install_reads_the_checkout(tree: Path, tmp_path: Path) -> None:
    """`pip install -e` adds no copy of schedules or logs: both are read, and logs written, where
    the checkout is.
    """
    home = tmp_path / "venv"
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    target = Path(
        run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path
        ).strip()
    )
    # its packages; .pth files found there have no effect
    (target / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = [
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--ignore-installed",
        "-e",
        tree,
    ]
    run([sys.executable, "-m", "pip", *install], tmp_path)
    show = "import lntune; from lntune.system import paths; "
    show += (
        "print(lntune.__file__, *map(paths.content, ('schedules', 'tuning_logs')),"
        " paths.is_checkout())"
    )
    printed = run([python, "-c", show], tmp_path).split()
    assert printed == [
        str(tree / part) for part in ("lntune/__init__.py", "schedules", "tuning_logs")
    ] + ["True"]
    assert not [name for name in files_below(target) if name.startswith("lntune/")]
    assert run([home / "bin" / "lntune", "--version"], tmp_path).strip() == lntune.__version__
