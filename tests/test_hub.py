"""`lntune export --hf`: a repository that Hugging Face's `kernels` package loads."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.nn import functional

from lntune import device
from lntune.bundle import hub
from lntune.bundle.manifest import Manifest, Target
from lntune.case import Case
from lntune.commands.export import export
from lntune.errors import InputError

HERE = device.current()
CASES = [Case("layer_norm", 48, dtype, 8) for dtype in ("float32", "bfloat16")]

pytestmark = pytest.mark.skipif(HERE.kind != "cpu" or sys.platform != "linux", reason="of Linux")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with layer norm of one size, in two dtypes."""
    folder = tmp_path_factory.mktemp("hub") / "lntune-norms"
    assert export({HERE: CASES}, None, repository=folder).sha256
    return folder


@pytest.fixture(scope="module")
def build(repository: Path) -> Path:
    """Its one build."""
    (folder,) = (repository / "build").iterdir()
    return folder


def imported(folder: Path, name: str) -> ModuleType:
    """The build as a module, imported as `kernels` does."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def norms(build: Path) -> Iterator[ModuleType]:
    """The build, imported without `kernels`."""
    yield imported(build, "_lntune_norms_under_test")
    for name in [n for n in sys.modules if n.startswith("_lntune_norms_under_test")]:
        del sys.modules[name]


@pytest.fixture
def calls(norms: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators whose kernels are called."""
    serve, seen = sys.modules[f"{norms.__name__}._serve"], list[str]()
    real = serve._kernel

    def kernel(op: str, *args: Any) -> Any:
        found = real(op, *args)

        def call(*values: Any) -> None:
            seen.append(op)
            found(*values)

        return found and call

    monkeypatch.setattr(serve, "_kernel", kernel)
    return seen


def test_the_layout_is_that_of_kernels(repository: Path, build: Path) -> None:
    """One build for tvm_ffi's release and this kind of CPU, with the digest of each of its files,
    a card, layers, and a folder for older releases.
    """
    assert build.name.startswith("tvm-ffi01-cpu-") and build.name.endswith("-linux")
    metadata = json.loads((build / "metadata.json").read_text())
    assert metadata["name"] == "lntune-norms" and metadata["id"].isidentifier()
    assert metadata["backend"] == {"type": "cpu"} and metadata["python-depends"] == ["tvm-ffi"]
    sums = {
        p.relative_to(build).as_posix(): base64.b64encode(
            hashlib.sha256(p.read_bytes()).digest()
        ).decode()
        for p in build.rglob("*")
        if p.is_file() and p.name != "metadata.json"
    }
    assert metadata["digest"] == {"algorithm": "sha256", "files": sums}
    assert {"__init__.py", "layers.py", "lntune_norms/__init__.py"} <= sums.keys()
    assert "library_name: kernels" in (repository / "README.md").read_text()


def test_it_imports_nothing_but_torch_and_tvm_ffi(build: Path) -> None:
    """What is written stands alone: lntune is not imported there."""
    for path in build.rglob("*.py"):
        lines = [line.split() for line in path.read_text().splitlines()]
        names = {words[1] for words in lines if words[:1] in (["import"], ["from"])}
        roots = {name.partition(".")[0] for name in names if not name.startswith(".")}
        python = {"ctypes", "importlib", "json", "pathlib", "sys", "threading", "typing"}
        assert roots <= {"torch", "tvm_ffi", "__future__", *python}


def step(norm: Callable[..., torch.Tensor], x: torch.Tensor, *vectors: torch.Tensor) -> list[Any]:
    """An output and the gradients of all inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, *vectors)]
    y = norm(leaves[0], (48,), *leaves[1:])
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return [y.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_serve_both_passes(dtype: torch.dtype, norms: ModuleType, calls: list[str]) -> None:
    """Inference and training of the exported sizes go to kernels, and agree with PyTorch's."""
    torch.manual_seed(0)
    x, w, b = (torch.randn(s, dtype=dtype) for s in ((2, 3, 48), 48, 48))
    limit = (
        {"rtol": 2e-2, "atol": 3e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )
    torch.testing.assert_close(
        norms.layer_norm(x, (48,), w, b), functional.layer_norm(x, (48,), w, b), **limit
    )
    assert calls == ["layer_norm"]
    ours, eager = step(norms.layer_norm, x, w, b), step(functional.layer_norm, x, w, b)
    for a, e in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, e, **limit)
    assert calls[1:] == ["layer_norm", "layer_norm_backward"]


def test_everything_else_is_pytorchs(norms: ModuleType, calls: list[str]) -> None:
    """Other sizes, dtypes, rows, weights, transforms and compiled code are PyTorch's own, and its
    errors, too.
    """
    f, n = functional.layer_norm, norms.layer_norm
    x, w = torch.randn(8, 48), torch.ones(48)
    for args in (
        (torch.randn(8, 47), (47,)),
        (x.double(), (48,), w.double(), w.double()),
        (torch.randn(999, 48), (48,), w, w),
        (x, (48,)),
        (x, (8, 48)),
        (x[:0], (48,), w, w),
    ):
        torch.testing.assert_close(n(*args), f(*args))
    torch.testing.assert_close(
        torch.func.vmap(lambda t: n(t, (48,), w, w))(x.view(2, 4, 48)),
        f(x.view(2, 4, 48), (48,), w, w),
    )
    with torch.autocast("cpu"):
        torch.testing.assert_close(n(x, (48,), w, w), f(x, (48,), w, w))
    assert calls == []
    with pytest.raises(RuntimeError, match="normalized_shape"):
        n(x, (47,), w, w)


def test_gradients_of_gradients(norms: ModuleType) -> None:
    """A backward that is recorded is PyTorch's: gradients of it are right."""
    x = torch.randn(3, 48, requires_grad=True)
    w = torch.randn(48, requires_grad=True)

    def twice(norm: Callable[..., torch.Tensor]) -> torch.Tensor:
        (g,) = torch.autograd.grad(norm(x, (48,), w, w).square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        return h

    torch.testing.assert_close(
        twice(norms.layer_norm), twice(functional.layer_norm), rtol=1e-4, atol=1e-4
    )


def test_strided_rows_are_copied(norms: ModuleType, calls: list[str]) -> None:
    """Rows that lie apart, and transposed ones, are served as well."""
    wide, w = torch.randn(6, 96), torch.ones(48)
    for x in (wide[:, :48], torch.randn(48, 6).t()):
        torch.testing.assert_close(
            norms.layer_norm(x, (48,), w, w), functional.layer_norm(x, (48,), w, w)
        )
    assert calls == ["layer_norm"] * 2


def test_code_that_the_cpu_cannot_run_is_left_alone(
    repository: Path, build: Path, tmp_path: Path
) -> None:
    """Kernels of instructions that are not among the CPU's flags do not serve: PyTorch does."""
    facts = json.loads((build / "kernels.json").read_text())
    needs = {flag for k in facts["kernels"] for flag in k["needs"]}
    assert needs == set(device.needed_flags(HERE)) and (needs or not HERE.isa.startswith("x86"))
    higher = msgspec.structs.replace(HERE, isa="x86-64-v4", features=("avx512bf16",))
    assert {"avx512f", "avx2", "avx512_bf16"} <= set(device.needed_flags(higher))
    for k in facts["kernels"]:
        k["needs"].append("no_such_instruction")
    import shutil

    other = Path(shutil.copytree(build, tmp_path / "other"))
    (other / "kernels.json").write_text(json.dumps(facts))
    module = imported(other, "_lntune_norms_elsewhere")
    assert sys.modules[f"{module.__name__}._serve"]._FILES == {}
    x = torch.randn(8, 48)
    torch.testing.assert_close(module.layer_norm(x, (48,)), functional.layer_norm(x, (48,)))


def test_what_has_no_place_there_is_refused(tmp_path: Path) -> None:
    """Kernels for GPUs, or for CPUs of two kinds, are no such repository."""

    def manifest(*isas: tuple[str, str]) -> Manifest:
        devices = [msgspec.structs.replace(HERE, kind=k, isa=i) for k, i in isas]
        targets = tuple(Target(device=d, abi="", runtime="") for d in devices)
        return Manifest(schema=1, lntune="", targets=targets, files={})

    for isas in ([("gpu", "sm_90")], [("cpu", "x86-64-v3"), ("cpu", "aarch64")]):
        with pytest.raises(InputError, match="of one kind"):
            hub.variant(manifest(*isas))
    assert hub.variant(manifest(("cpu", "x86-64-v3"), ("cpu", "x86-64-v4"))) == (
        "tvm-ffi01-cpu-x86_64-linux"
    )
    with pytest.raises(InputError, match="other files"):
        (tmp_path / "notes.txt").write_text("")
        export({HERE: CASES}, None, repository=tmp_path)


def test_kernels_loads_it(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `kernels` package itself finds the build in the local folder, its digest holds, and
    `kernelize` has a model's layer norms served by it, forward and in training.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kernels = pytest.importorskip("kernels", reason="kernels is not installed: lntune[hub]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = kernels.get_local_kernel(repository)
    serve, seen = sys.modules[f"{module.__name__}._serve"], list[str]()
    real = serve._load
    monkeypatch.setattr(serve, "_load", lambda file: seen.append(file) or real(file))
    model = nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48))
    x = torch.randn(8, 48)
    eager = model(x)
    monkeypatch.setattr(nn.LayerNorm, "kernel_layer_name", "LayerNorm", raising=False)
    kernels.replace_kernel_forward_from_hub(nn.LayerNorm, "LayerNorm")
    layer = kernels.LocalLayerRepository(repository, layer_name="LayerNorm")
    with kernels.use_kernel_mapping({"LayerNorm": {"cpu": layer}}):
        served = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    for name in ("kernel_layer_name", "kernel_condition"):
        if name in vars(nn.LayerNorm):
            monkeypatch.delattr(nn.LayerNorm, name)
    y = served(x)
    torch.testing.assert_close(y, eager, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert len(seen) == 2 and served[1].weight.grad is not None
    from kernels._rust import Metadata

    (build,) = (repository / "build").iterdir()
    metadata = Metadata.read_from_file(build / "metadata.json")
    assert metadata.digest is not None and str(metadata.name) == "lntune-norms"
