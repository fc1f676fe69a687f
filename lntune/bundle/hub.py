"""A bundle's kernels of layer norm as a repository of Hugging Face's `kernels` package: a folder
`build/VARIANT` that loads by itself, with a metadata.json that has the digest of each file, and a
layer for `kernelize`.

The layout is that of https://huggingface.co/docs/kernels/kernel-requirements, for CPUs with tvm_ffi
(`tvm-ffi01-cpu-x86_64-linux`). What runs there is `hub_kernel.py`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from lntune import __version__
from lntune.backends.cpu import runtime
from lntune.bundle.manifest import Manifest
from lntune.case import BUCKETS
from lntune.device import Device, needed_flags
from lntune.errors import InputError, got_expected
from lntune.system import native, toolchain

NAME, VERSION = "lntune-norms", 1
"""Of the repository, and of its public names, as `kernels` counts them."""
OPS = ("layer_norm", "layer_norm_backward")
_SYSTEMS = {"x86-64": "x86_64-linux", "aarch64": "aarch64-linux"}
_SOURCE = Path(__file__).parent / "hub_kernel.py"
_INIT = '''"""Layer norm by kernels that lntune has tuned for CPUs."""

from . import layers
from ._serve import layer_norm

__all__ = ["layer_norm", "layers"]
'''
_LAYERS = '''"""Layers for kernels.kernelize."""

import torch
from torch import nn

from ._serve import layer_norm


class LayerNorm(nn.Module):
    """The forward of torch.nn.LayerNorm, whose sizes and parameters it takes."""

    can_torch_compile: bool = True

    normalized_shape: tuple
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
'''
_OLDER = '''"""For older releases of `kernels`, which look for a folder of the repository's name."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).parent.parent / "__init__.py"
_name = f"_lntune_{abs(hash(str(_path)))}"
_spec = importlib.util.spec_from_file_location(_name, _path)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
layer_norm, layers = _module.layer_norm, _module.layers

__all__ = ["layer_norm", "layers"]
'''
_CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernel
---

# Layer norm for CPUs, tuned by lntune

```python
import torch
from pathlib import Path
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize
from kernels import register_kernel_mapping, replace_kernel_forward_from_hub

norms = get_local_kernel(Path("."))
y = norms.layer_norm(torch.randn(32, 768), (768,), torch.ones(768), torch.zeros(768))

replace_kernel_forward_from_hub(torch.nn.LayerNorm, "LayerNorm")
register_kernel_mapping(
    {"LayerNorm": {"cpu": LocalLayerRepository(Path("."), layer_name="LayerNorm")}}
)
# model = kernelize(model, mode=Mode.TRAINING, device="cpu")
```

Calls of other sizes, and compiled ones, are PyTorch's. Kernels for these were tuned or built:

"""


def variant(manifest: Manifest) -> str:
    """The name of the build: of tvm_ffi's release and of the kind of CPU.

    Raises:
        InputError: the bundle has something for others than CPUs of one kind.
    """
    kinds = {
        next((s for isa, s in _SYSTEMS.items() if t.device.isa.startswith(isa)), "")
        if t.device.kind == "cpu"
        else ""
        for t in manifest.targets
    }
    if len(kinds) != 1 or "" in kinds:
        got = ", ".join(t.device.isa for t in manifest.targets)
        raise InputError(got_expected("--hf", f"kernels for {got}", "CPUs of Linux, of one kind"))
    major, minor = toolchain.COMPATIBLE["apache-tvm-ffi"].split(".")[:2]
    return f"tvm-ffi{major}{minor}-cpu-{kinds.pop()}"


def repository(manifest: Manifest, contents: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of the repository, by their names in it, of a bundle's manifest and files.

    Raises:
        InputError: it has no kernel of layer norm, or something for others than CPUs of one kind.
    """
    place = f"build/{variant(manifest)}"
    own = f"lib/{native.name_of(runtime.SOURCE)}"
    files: dict[str, bytes] = {
        "__init__.py": _INIT.encode(),
        "layers.py": _LAYERS.encode(),
        "_serve.py": _SOURCE.read_bytes(),
        f"{NAME.replace('-', '_')}/__init__.py": _OLDER.encode(),
        own: contents[f"runtime/{native.name_of(runtime.SOURCE)}"],
    }
    kernels: list[dict[str, Any]] = []
    for target in manifest.targets:
        for entry in target.kernels:
            if entry.case.op in OPS and entry.file and not entry.strided:
                name = f"lib/{entry.file.rsplit('/', 1)[1]}"
                files[name] = contents[entry.file]
                kernels.append(_row(target.device, entry.case, name))
    if not kernels:
        raise InputError(got_expected("--hf", "no kernel", f"some of {' or '.join(OPS)}"))
    kernels.sort(key=lambda k: (-len(k["needs"]), *(str(value) for value in k.values())))
    facts = {"buckets": BUCKETS, "kernels": kernels, "runtime": own}
    files["kernels.json"] = _json(facts)
    files["metadata.json"] = _json(_metadata(files))
    sizes = sorted({f"- {k['op']}, hidden {k['hidden']}, {k['dtype']}" for k in kernels})
    card = f"{_CARD}{chr(10).join(sizes)}\n\nWritten by lntune {__version__}.\n"
    return {f"{place}/{name}": content for name, content in files.items()} | {
        "README.md": card.encode()
    }


def _row(device: Device, case: Any, file: str) -> dict[str, Any]:
    return {
        "op": case.op,
        "hidden": case.hidden,
        "dtype": case.dtype,
        "bucket": case.bucket,
        "variant": case.variant,
        "needs": needed_flags(device),
        "file": file,
    }


def _metadata(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What `kernels` reads of a build; its name among loaded modules is of the files' content."""
    sums = {
        name: base64.b64encode(hashlib.sha256(content).digest()).decode()
        for name, content in sorted(files.items())
    }
    tag = hashlib.sha256(msgspec.json.encode(sums, order="sorted")).hexdigest()[:12]
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_cpu_{tag}",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": ["tvm-ffi"],
        "backend": {"type": "cpu"},
        "digest": {"algorithm": "sha256", "files": sums},
    }


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"
