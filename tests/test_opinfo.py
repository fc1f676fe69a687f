"""PyTorch's own samples for nn.functional.layer_norm, through lntune.layer_norm."""

from __future__ import annotations

import importlib.util
import sys
import types
import unittest
from typing import Any

import pytest
import torch
from torch import Tensor

import lntune

with pytest.MonkeyPatch.context() as _patch:
    # The database imports a test-case class from expecttest, which its samples have no use for.
    if importlib.util.find_spec("expecttest") is None:
        _stub: Any = types.ModuleType("expecttest")
        _stub.TestCase = unittest.TestCase
        _patch.setitem(sys.modules, "expecttest", _stub)
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError as e:
        pytest.skip(f"PyTorch's operator database does not import: {e}", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

(INFO,) = (op for op in op_db if op.name == "nn.functional.layer_norm")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LOOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 0.0}


def tensors(sample: Any) -> list[Tensor]:
    """The tensors of a sample, in order."""
    return [t for t in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)]


def refused(sample: Any) -> bool:
    """PyTorch has samples with eps < 0, which gives NaN for some inputs; lntune says what is wrong instead."""
    if sample.kwargs.get("eps", 0.0) >= 0:
        return False
    with pytest.raises(lntune.LntuneError, match=r"^eps: got -"):
        lntune.layer_norm(sample.input, *sample.args, **sample.kwargs)
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype) -> None:
    """Forward, twice, and backward of every sample agree with eager (to the bit in float64, which is eager).

    Where they differ by more than rounding, ours is the nearer to float64: for rows of one element eager's gradients are off.
    """
    count = 0
    for sample in INFO.sample_inputs("cpu", dtype, requires_grad=True):
        if refused(sample):
            continue
        count += 1
        results = []
        wide = sample.transform(lambda v: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v)
        for f, s in ((lntune.layer_norm, sample), (torch.nn.functional.layer_norm, sample), (torch.nn.functional.layer_norm, wide)):
            with torch.no_grad():
                plain = [f(s.input, *s.args, **s.kwargs) for _ in range(2)]
            y = f(s.input, *s.args, **s.kwargs)
            dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype).to(y.dtype)
            results.append([*plain, y.detach(), *torch.autograd.grad(y, tensors(s), dy)])
        for ours, theirs, truth in zip(*results, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            if ours.numel():
                error, eager_error = (float((t.double() - truth.double()).abs().max()) for t in (ours, theirs))
                assert error <= 2 * eager_error + LOOSE[dtype] * max(1.0, float(truth.abs().max()))
    assert count >= 5


def test_reference_samples_are_numpys() -> None:
    """PyTorch's larger samples agree with its NumPy reference."""
    for sample in INFO.reference_inputs("cpu", torch.float32):
        if refused(sample):
            continue
        given = [t.numpy() if isinstance(t, Tensor) else t for t in (sample.input, *sample.args)]
        truth = INFO.ref(*given, **{k: v.numpy() if isinstance(v, Tensor) else v for k, v in sample.kwargs.items()})
        y = lntune.layer_norm(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(y, torch.as_tensor(truth, dtype=y.dtype), atol=1e-4, rtol=1e-4)
