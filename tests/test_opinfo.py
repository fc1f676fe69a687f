"""PyTorch's own samples and error inputs for nn.functional.layer_norm, and its module tests of
nn.LayerNorm and LSTMs, through lntune's.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
import sys
import types
import unittest
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from grids import exhaustive, product
from torch import Tensor

import lntune

pytestmark = pytest.mark.filterwarnings("ignore")

LSTMS = {lntune.LayerNormLSTM: torch.nn.LSTM, lntune.LayerNormLSTMCell: torch.nn.LSTMCell}
every_lstm = pytest.mark.parametrize("ours", LSTMS, ids=lambda ours: ours.__name__)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DIFFERENT = (torch.float32, exhaustive(torch.float16), torch.bfloat16, torch.float64)
"""Those in which kernels differ most, for every run: float16 is widened and rounded as bfloat16."""
LOOSE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float64: 0.0}


@functools.cache
def database() -> tuple[Any, Any]:
    """PyTorch's operators and modules with their samples. They take seconds to import, which every
    process that collects tests would spend, so the tests of this file do.
    """
    with pytest.MonkeyPatch.context() as patch:
        # The database imports a test-case class from expecttest, which its samples have no use for.
        if importlib.util.find_spec("expecttest") is None:
            stub: Any = types.ModuleType("expecttest")
            stub.TestCase = unittest.TestCase
            patch.setitem(sys.modules, "expecttest", stub)
        try:
            from torch.testing._internal.common_methods_invocations import op_db
            from torch.testing._internal.common_modules import module_db
        except ImportError as e:
            pytest.skip(f"PyTorch's operator database does not import: {e}")
    return op_db, module_db


def operator_info(name: str = "nn.functional.layer_norm") -> Any:
    """PyTorch's samples of an operator."""
    (info,) = (op for op in database()[0] if op.name == name)
    return info


def module_info(kind: type) -> Any:
    """PyTorch's samples of a module."""
    (info,) = (module for module in database()[1] if module.module_cls is kind)
    return info


def tensors(sample: Any) -> list[Tensor]:
    """The tensors of a sample, in order."""
    return [
        t for t in (sample.input, *sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)
    ]


@pytest.mark.parametrize("dtype", DIFFERENT, ids=str)
def test_samples(dtype: torch.dtype) -> None:
    """Forward, twice, and backward of every sample agree with eager (to the bit in float64, which
    is eager).

    Where they differ by more than rounding, ours is the nearer to float64: for rows of one element
    eager's gradients are off.
    """
    count = 0
    for sample in operator_info().sample_inputs("cpu", dtype, requires_grad=True):
        count += 1
        results = []
        wide = sample.transform(
            lambda v: v.detach().double().requires_grad_() if isinstance(v, Tensor) else v
        )
        for f, s in (
            (lntune.layer_norm, sample),
            (torch.nn.functional.layer_norm, sample),
            (torch.nn.functional.layer_norm, wide),
        ):
            with torch.no_grad():
                plain = [f(s.input, *s.args, **s.kwargs) for _ in range(2)]
            y = f(s.input, *s.args, **s.kwargs)
            dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype).to(y.dtype)
            results.append([*plain, y.detach(), *torch.autograd.grad(y, tensors(s), dy)])
        for ours, theirs, truth in zip(*results, strict=True):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            assert torch.equal(ours.isnan(), theirs.isnan())  # of samples with eps -0.5
            if ours.numel():
                error, eager_error = (
                    float((t.double() - truth.double()).nan_to_num().abs().max())
                    for t in (ours, theirs)
                )
                assert error <= 2 * eager_error + LOOSE[dtype] * max(
                    1.0, float(truth.nan_to_num().abs().max())
                )
    assert count >= 6


def test_reference_samples_are_numpys() -> None:
    """PyTorch's larger samples agree with its NumPy reference."""
    info = operator_info()
    for sample in info.reference_inputs("cpu", torch.float32):
        given = [t.numpy() if isinstance(t, Tensor) else t for t in (sample.input, *sample.args)]
        truth = info.ref(
            *given,
            **{k: v.numpy() if isinstance(v, Tensor) else v for k, v in sample.kwargs.items()},
        )
        y = lntune.layer_norm(sample.input, *sample.args, **sample.kwargs)
        torch.testing.assert_close(
            y, torch.as_tensor(truth, dtype=y.dtype), atol=1e-4, rtol=1e-4, equal_nan=True
        )


def test_error_inputs() -> None:
    """What PyTorch refuses is refused, by an error that names the argument, before and after a call
    that was right.
    """
    count = 0
    for _ in range(2):
        # of the two it alone has error inputs
        for error in operator_info("native_layer_norm").error_inputs("cpu"):
            given = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                torch.native_layer_norm(given.input, *given.args, **given.kwargs)
            with pytest.raises(
                lntune.LntuneError,
                match=r"^(input|normalized_shape|weight|bias): got .*, expected ",
            ):
                lntune.layer_norm(given.input, *given.args, **given.kwargs)
            count += 1
        lntune.layer_norm(torch.ones(1, 2, 3), (1, 2, 3), torch.ones(1, 2, 3))
    assert count >= 8


def modules(dtype: torch.dtype) -> Iterator[tuple[lntune.LayerNorm, torch.nn.LayerNorm, Tensor]]:
    """Each of PyTorch's cases as a module of ours, one of PyTorch's of the same weights, and an
    input.
    """
    info = module_info(torch.nn.LayerNorm)
    for case in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=True):
        args, kwargs = (
            case.constructor_input.args,
            {
                **case.constructor_input.kwargs,
                "dtype": dtype,
            },
        )
        ours, theirs = lntune.LayerNorm(*args, **kwargs), torch.nn.LayerNorm(*args, **kwargs)
        for p in ours.parameters():
            torch.nn.init.normal_(p)
        theirs.load_state_dict(ours.state_dict())
        yield ours, theirs, case.forward_input.args[0]


@pytest.mark.parametrize("dtype", [*map(exhaustive, DTYPES[:2]), *DTYPES[2:]], ids=str)
def test_modules_are_pytorchs(dtype: torch.dtype) -> None:
    """PyTorch's cases of its module tests: result, repr, dtype and device of what is made,
    gradients, views, files, moves.
    """
    loose = 10 * LOOSE[dtype]
    count = 0
    for ours, theirs, x in modules(dtype):
        count += 1
        assert repr(ours) == repr(theirs)
        assert all(p.dtype == dtype and p.device.type == "cpu" for p in ours.parameters())
        assert all(
            p.is_meta for p in lntune.LayerNorm(ours.normalized_shape, device="meta").parameters()
        )
        torch.testing.assert_close(ours(x), theirs(x), atol=loose, rtol=loose)
        strided = torch.stack([x, x], -1)[..., 0].detach().requires_grad_()
        assert not strided.numel() or not strided.is_contiguous()
        y = theirs(x)
        dy = torch.randn_like(y)
        wanted = torch.autograd.grad(y, [x, *theirs.parameters()], dy)
        for given in (x, strided):
            got = torch.autograd.grad(ours(given), [given, *ours.parameters()], dy)
            torch.testing.assert_close(got, wanted, atol=loose, rtol=loose)
        for other in (
            copy.deepcopy(ours),
            pickle.loads(pickle.dumps(ours)),
            copy.deepcopy(ours).double().to(dtype),
        ):
            assert type(other) is lntune.LayerNorm
            torch.testing.assert_close(other(x), ours(x), atol=loose, rtol=loose)
        assert ours.to("meta")(x.to("meta")).shape == x.shape
    assert count >= 7


def test_modules_pass_gradcheck() -> None:
    """The first and second derivatives of PyTorch's cases, in forward and reverse mode, are those
    of finite differences.
    """
    for ours, _, x in modules(torch.float64):
        if x.shape[0] <= 4:
            parameters = dict(ours.named_parameters())

            def call(
                x: Tensor, *values: Tensor, ours: Any = ours, names: Any = tuple(parameters)
            ) -> Tensor:
                y: Tensor = torch.func.functional_call(
                    ours, dict(zip(names, values, strict=True)), (x,)
                )
                return y

            few = x[:1].detach().requires_grad_()
            assert torch.autograd.gradcheck(
                call,
                (few, *parameters.values()),
                check_forward_ad=True,
                check_batched_grad=bool(few.numel()),
            )
            assert torch.autograd.gradgradcheck(call, (few, *parameters.values()))


def lstms(ours: type, dtype: torch.dtype) -> Iterator[tuple[Any, Any, Any]]:
    """Each of PyTorch's cases as a module of ours and one of PyTorch's, and the case; without
    projections, which ours has not.
    """
    info = module_info(LSTMS[ours])
    for case in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=True):
        kwargs = {**case.constructor_input.kwargs, "dtype": dtype}
        if not kwargs.pop("proj_size", 0):
            torch.manual_seed(0)
            yield (
                ours(*case.constructor_input.args, **kwargs),
                LSTMS[ours](*case.constructor_input.args, **kwargs),
                case,
            )


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    return (
        [tree] if isinstance(tree, Tensor) else [leaf for branch in tree for leaf in leaves(branch)]
    )


@pytest.mark.parametrize(
    ("ours", "dtype"),
    product(tuple(LSTMS), (torch.float32, torch.bfloat16, torch.float64)),
    ids=str,
)
def test_lstms_are_used_as_pytorchs(ours: type, dtype: torch.dtype) -> None:
    """PyTorch's cases: outputs nested, shaped and typed as its own; without a batch as with one;
    views, copies, files, moves; gradients of all.
    """
    loose, count = 10 * LOOSE[dtype] + 1e-12, 0
    for module, theirs, case in lstms(ours, dtype):
        count += 1
        given = case.forward_input.args
        output = module(*given)
        assert [(t.shape, t.dtype) for t in leaves(output)] == [
            (t.shape, t.dtype) for t in leaves(theirs(*given))
        ]
        assert len(output) == 2
        torch.testing.assert_close(
            output, case.reference_fn(module, *given), atol=loose, rtol=loose
        )
        strided = [torch.stack([t, t], -1)[..., 0].detach().requires_grad_() for t in leaves(given)]
        grads = []
        for tensors in (leaves(given), strided):
            hx = () if len(tensors) == 1 else (tuple(tensors[1:]),)
            output = module(tensors[0], *hx)
            wanted = [*tensors, *module.parameters()]
            grads.append(
                torch.autograd.grad(sum(t.float().sin().sum() for t in leaves(output)), wanted)
            )
            assert all(g.isfinite().all() and g.dtype == dtype for g in grads[-1])
        torch.testing.assert_close(*grads, atol=loose, rtol=loose)
        for other in (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            copy.deepcopy(module).double().to(dtype),
        ):
            assert type(other) is ours and repr(other) == repr(module)
            torch.testing.assert_close(other(*given), output, atol=loose, rtol=loose)
        with torch.no_grad():
            meta = module.to("meta")(
                *(
                    tuple(t.to("meta") for t in g) if isinstance(g, tuple) else g.to("meta")
                    for g in given
                )
            )
        assert [t.shape for t in leaves(meta)] == [t.shape for t in leaves(output)]
    assert count >= 2


@every_lstm
def test_lstms_pass_gradcheck(ours: type) -> None:
    """The first derivatives of PyTorch's cases with respect to all that has one are those of finite
    differences, in both modes and in batches.
    """
    for module, _, case in [*lstms(ours, torch.float64)][-2:]:
        parameters = dict(module.named_parameters())
        tensors = leaves(case.forward_input.args)

        def call(
            *values: Tensor,
            module: Any = module,
            names: Any = tuple(parameters),
            n: int = len(tensors),
        ) -> tuple[Tensor, ...]:
            given = (values[0],) if n == 1 else (values[0], values[1:n])
            return tuple(
                leaves(
                    torch.func.functional_call(
                        module, dict(zip(names, values[n:], strict=True)), given
                    )
                )
            )

        assert torch.autograd.gradcheck(
            call,
            (*tensors, *parameters.values()),
            check_forward_ad=True,
            check_batched_grad=True,
            fast_mode=True,
        )


@every_lstm
def test_lstms_refuse_what_pytorchs_refuse(ours: type) -> None:
    """What PyTorch's error cases get wrong is refused where PyTorch refuses it, when made or when
    called, by an error that names the argument.
    """
    info = module_info(LSTMS[ours])
    count = 0
    for error in info.module_error_inputs_func(
        info, "cpu", torch.float32, requires_grad=False, training=True
    ):
        count += 1
        making, calling = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        for kind, expected, match in (
            (LSTMS[ours], error.error_type, error.error_regex),
            (
                ours,
                lntune.LntuneError,
                r"^(input|hx\[0\]|\w+_size|num_layers|bias|batch_first): got .*, expected ",
            ),
        ):
            if calling is None:
                with pytest.raises(expected, match=match):
                    kind(*making.args, **making.kwargs)
            else:
                module = kind(*making.args, **making.kwargs)
                with pytest.raises(expected, match=match):
                    module(*calling.args, **calling.kwargs)
    assert count >= 4
