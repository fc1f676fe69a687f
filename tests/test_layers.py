"""Imports go one way: a file imports only from lower layers, and heavy packages only where they
belong.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module imports from the rows above its own; a package counts as one module, and __init__ is the
# public names (which resolve on first use). Imports for type checkers only are free: they carry a
# type's name, not code.
LAYERS = (
    ("errors", "words", "bounds"),
    ("system",),
    ("architectures", "certainty", "device", "versions", "case", "knobs"),
    ("ops", "search"),
    ("schedule", "transforms"),
    ("log",),
    ("check", "timing"),
    ("backends",),
    ("kernels",),
    ("bundle",),
    ("torch", "compare"),
    ("measure",),
    ("report",),
    ("__init__", "tune"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}

TVM = {"backends", "kernels", "ops", "transforms"}
TVM_FFI = {"backends", "bundle", "kernels", "system", "torch", "transforms"}
TENSORLESS = {"search", "compare", "report", "log", "knobs"}
"""What reads, prints and decides, and never computes."""
ABOVE_SCHEDULES = RANK["log"]
"""Schedule files may use what lies below the compiler."""

FILES = sorted(
    p.relative_to(ROOT)
    for folder in ("lntune", "schedules")
    for p in (ROOT / folder).rglob("*.py")
    if "_bundled" not in p.parts
)


def unit(path: Path) -> str:
    """The name in LAYERS of a file of lntune: "case", or "ops" for lntune/ops/layer_norm.py."""
    return path.parts[1].removesuffix(".py")


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            for other in node.orelse:
                yield from (other, *executed(other))
        else:
            yield from (node, *executed(node))


def imported(source: str) -> set[str]:
    """Absolute names of the modules a source imports anywhere; `from lntune import x` counts as
    lntune.x.
    """
    names: set[str] = set()
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= (
                {f"{module}.{alias.name}" for alias in node.names}
                if module == "lntune" or node.level
                else {module}
            )
    return names


def imports_of(path: Path) -> set[str]:
    """What a file of the project imports."""
    return imported((ROOT / path).read_text(encoding="utf-8"))


def units_used(path: Path) -> set[str]:
    """The modules and packages of lntune a file imports (`lntune` itself as "__init__")."""
    names = [name.split(".") for name in imports_of(path)]
    used = {parts[1] if len(parts) > 1 else "__init__" for parts in names if parts[0] == "lntune"}
    return used - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_from_lower_layers(path: Path) -> None:
    """Every module lntune imports from itself lies in a row above its own; its package's siblings
    are free.
    """
    used = units_used(path)
    assert used <= set(RANK), (
        f"{path} imports {sorted(used - set(RANK))}; give new modules their place in LAYERS"
    )
    if path.parts[0] == "schedules":
        limit, own = ABOVE_SCHEDULES, ""
    else:
        own = unit(path)
        assert own in RANK, f"{path} is new: give it its place in LAYERS"
        limit = RANK[own]
    too_high = sorted(name for name in used - {own} if RANK[name] >= limit)
    assert not too_high, f"{path} imports {too_high} of its own layer or a higher one"


def module_of(path: Path) -> str:
    """The name a file of the project is imported by."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules of which each is imported by the next, the last by the first; empty where there are
    none. `imports` has what each module imports.
    """
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as e:
        return list(e.args[1])
    return []


def test_no_module_imports_what_imports_it() -> None:
    """Within a package, too, imports go one way, also those inside functions."""
    names = {module_of(path) for path in FILES if path.parts[0] == "lntune"}
    imports: dict[str, set[str]] = {}
    for path in FILES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        used: set[str] = set()
        for node in executed(tree):
            if isinstance(node, ast.Import):
                used |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                used |= {m if m in names else str(node.module) for m in members}
        imports[module_of(path)] = used & names - {module_of(path)}
    assert circle(imports) == []


def test_a_circle_is_seen() -> None:
    """Three modules that import one another in turn are a circle, two that import a third none."""
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert circle({"a": {"c"}, "b": {"c"}}) == []


BACKENDS = {"cpu": set[str](), "cuda": set[str](), "emulated": {"cuda"}}
"""The folders of backends, and which others each may import from: the emulator runs CUDA source."""


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.parts[:2] == ("lntune", "backends") and len(p.parts) > 3],
    ids=str,
)
def test_backends_know_nothing_of_each_other(path: Path) -> None:
    """A backend's folder imports from no other's, but the emulator from CUDA's."""
    own = path.parts[2]
    used = {name.split(".")[2] for name in imports_of(path) if name.startswith("lntune.backends.")}
    assert used & set(BACKENDS) - {own} <= BACKENDS[own]


def test_the_house_is_drawn_as_it_is() -> None:
    """CONTRIBUTING's tree names every folder and module at the top of the package, and no other."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.split("```text\nlntune/\n")[1].split("```")[0]
    names = [line[2:16] for line in tree.splitlines() if line.startswith("  ") and line[2] != " "]
    drawn = {name.strip("/") for line in names for name in line.split()}
    top = (ROOT / "lntune").iterdir()
    present = {
        p.stem for p in top if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())
    }
    present -= {"__init__", "__main__"}
    missing, gone = sorted(present - drawn), sorted(drawn - present)
    assert not missing, f"give {', '.join(missing)} a line in the tree of CONTRIBUTING.md"
    assert not gone, f"take {', '.join(gone)} out of the tree of CONTRIBUTING.md"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_are_absolute(path: Path) -> None:
    """No relative import, which would hide from the test above."""
    assert not [name for name in imports_of(path) if name.startswith(".")]


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "lntune"], ids=str)
def test_heavy_packages_are_imported_only_where_they_belong(path: Path) -> None:
    """TVM is called by the compiler's modules alone, tvm_ffi by those that call kernels; searches
    and reports know no tensor.
    """
    packages = {name.split(".")[0] for name in imports_of(path)}
    own = unit(path)
    assert "tvm" not in packages or own in TVM
    assert "tvm_ffi" not in packages or own in TVM_FFI
    assert not packages & {"tvm", "tvm_ffi", "torch"} or own not in TENSORLESS
    assert {*TVM, *TVM_FFI, *TENSORLESS} <= RANK.keys()


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_lntune_is_light() -> None:
    """`import lntune` brings in neither a compiler nor the command line's packages, and leaves
    torch to its first use.
    """
    loaded = loaded_by("import lntune")
    assert "lntune" in loaded
    assert not loaded & {"tvm", "tvm_ffi", "typer", "rich", "scipy", "torch"}


def test_the_torch_op_loads_without_the_compiler() -> None:
    """The public op can be imported without TVM and without the command line's packages."""
    loaded = loaded_by("import lntune; lntune.layer_norm, lntune.LayerNorm, lntune.convert")
    assert "torch" in loaded
    assert not loaded & {"tvm", "typer", "rich", "scipy"}


def test_reports_and_searches_load_no_device_code() -> None:
    """Importing all report and search modules, with all they import in turn, loads neither torch
    nor TVM; the first after which either is there is named.
    """
    modules = [
        ".".join(p.with_suffix("").parts).removesuffix(".__init__")
        for p in FILES
        if p.parts[1] in ("report", "search")
    ]
    assert modules
    program = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'tvm', 'tvm_ffi', 'torch'} & sys.modules.keys()\n"
        "    assert not heavy, f'{name} loads {heavy}'"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_checks_see_every_form_of_import() -> None:
    """Plain, aliased, from-, nested and relative imports are found; those for type checkers only
    are not.
    """
    source = """
import a.b as c
from lntune import x, y as z
from lntune.q import w
from . import r
if TYPE_CHECKING:
    import t
else:
    import e
def f():
    import n
"""
    assert imported(source) == {"a.b", "lntune.x", "lntune.y", "lntune.q", "..r", "e", "n"}
