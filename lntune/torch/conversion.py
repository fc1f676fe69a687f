"""Converting a model's layer norms to lntune's and back, and telling which of them are lntune's and
why others are not.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lntune.errors import InputError, got_expected
from lntune.system import callers
from lntune.torch.layer_norm import layer_norm
from lntune.torch.modules import LayerNorm

Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger("lntune")
_SHOWN = 5
"""Names of modules that a text lists before it counts."""
_NOT_YET = "not converted"
_THEIRS = (functional.layer_norm, torch.layer_norm, torch.ops.aten.layer_norm.default)
"""What PyTorch calls a layer norm in a graph; the last two have a sixth argument, for cuDNN."""


@dataclass(frozen=True)
class Conversion:
    """Which layer norms of a model run on lntune, by the names of `model.named_modules()`, and of
    its graphs' nodes.
    """

    converted: tuple[str, ...] = ()
    """Those that do."""
    left: dict[str, str] = field(default_factory=dict)
    """The others (nn.LayerNorm and its subclasses, calls in graphs), and why."""

    def __str__(self) -> str:
        """One line, such as "24 of 25 layer norms are lntune's; left: decoder.norm (mine.Norm is
        another class)".
        """
        if not self.converted and not self.left:
            return "no torch.nn.LayerNorm among its modules and no call of one in a graph"
        total = len(self.converted) + len(self.left)
        text = (
            f"{len(self.converted)} of {total} layer norm{'s are' if total > 1 else ' is'} lntune's"
        )
        if not self.left:
            return text
        by_reason = {
            reason: [name for name, why in self.left.items() if why == reason]
            for reason in self.left.values()
        }
        return (
            f"{text}; left:"
            f" {'; '.join(f'{_listed(names)} ({reason})' for reason, names in by_reason.items())}"
        )


def convert(model: Model) -> Model:
    """Replace every torch.nn.LayerNorm in the model, in place, by lntune.LayerNorm, and return the
    model.

    Parameters, buffers, hooks, training flags, devices, dtypes and sharing stay what they are: it
    is the module's class that changes. Norms that FSDP2 (fully_shard) has given a class of its own,
    or accelerate a forward, are converted beneath. In graphs of torch.fx and torch.export
    (`torch.export.load(file).module()`) the calls of layer norm are. Left alone are a subclass of
    nn.LayerNorm, since its forward is its own, a module that somebody has set a forward on, and
    calls of functions in a module's Python code.

    What was done is logged (the logger "lntune": as information, as a warning where norms were
    left), and `lntune.conversion(model)` has it at any time. A model that is itself an nn.LayerNorm
    is converted too; converting twice changes nothing; `lntune.revert` is the way back.

    A model that torch.compile has compiled before is compiled again at its next call; by PyTorch
    2.11 only after `torch.compiler.reset()`.

    While no gradients are recorded nn.TransformerEncoderLayer has a fused path that calls no norm,
    converted or not; `torch.backends.mha.set_fastpath_enabled(False)` has it call them.

    Raises:
        InputError: it is no module.

    Warns:
        UserWarning: the model has no layer norm that could be converted.
    """
    before = conversion(model)
    _exchange(model, nn.LayerNorm, LayerNorm)
    after = conversion(model)
    changed = len(after.converted) - len(before.converted)
    if not after.converted:
        callers.warn(
            f"lntune.convert changed nothing in {type(model).__name__}: {after}", UserWarning
        )
    else:
        level = logging.WARNING if after.left else logging.INFO
        _log.log(
            level,
            "lntune.convert changed %d layer norm%s of %s: %s",
            changed,
            "" if changed == 1 else "s",
            type(model).__name__,
            after,
        )
    return model


def revert(model: Model) -> Model:
    """Replace every lntune.LayerNorm in the model, in place, by torch.nn.LayerNorm, and return the
    model: what `convert` changed, and others.

    For tools that ask for PyTorch's class itself. Subclasses of lntune.LayerNorm stay.

    Raises:
        InputError: it is no module.
    """
    _ensure_module(model)
    _exchange(model, LayerNorm, nn.LayerNorm)
    return model


def conversion(model: nn.Module) -> Conversion:
    """Which layer norms of a model run on lntune and which do not, and why; print it, or read its
    fields. Nothing is changed.

    Raises:
        InputError: it is no module.
    """
    _ensure_module(model)
    reasons = {name: _reason(module) for name, module in _norms(model)}
    for name, _, node in _calls(model):
        reasons[name] = (
            ""
            if node.target is layer_norm
            else _NOT_YET
            if node.target in _THEIRS
            else "the operator gives statistics as well"
        )
    return Conversion(
        tuple(name for name, why in reasons.items() if not why),
        {name: why for name, why in reasons.items() if why},
    )


def _ensure_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(got_expected("model", type(model).__name__, "a torch.nn.Module"))


def _norms(model: nn.Module) -> Iterator[tuple[str, nn.LayerNorm]]:
    """The layer norms of a model with their names, each once."""
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)
    )


def _calls(model: nn.Module) -> Iterator[tuple[str, fx.GraphModule, fx.Node]]:
    """The calls of layer norm in the graphs of a model with their names, and where they are."""
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if node.op == "call_function" and node.target in (
                    layer_norm,
                    *_THEIRS,
                    torch.ops.aten.native_layer_norm.default,
                ):
                    yield f"{name}.{node.name}" if name else node.name, module, node


def _reason(module: nn.LayerNorm) -> str:
    """Why a call of the module does not reach lntune; "" where it does."""
    cls = type(module)
    forward: Any = cls.forward
    for own in _own_forwards(module).values():
        if not (_bound_to(own, module, LayerNorm) or _bound_to(own, module, nn.LayerNorm)):
            return f"a forward was set on the module, {getattr(own, '__qualname__', repr(own))}"
        forward = own.__func__
    if forward is LayerNorm.forward:
        return ""
    if cls is nn.LayerNorm or _wrapper(cls, nn.LayerNorm):
        return _NOT_YET
    return (
        "it is parametrized"
        if parametrize.is_parametrized(module)
        else f"{cls.__module__}.{cls.__qualname__} is another class"
    )


def _exchange(model: nn.Module, old: type[nn.LayerNorm], new: type[nn.LayerNorm]) -> None:
    """Give every norm of exactly one class, and of those that PyTorch's wrappers made of it,
    another one; and every call in a graph.
    """
    for _, module in _norms(model):
        cls = type(module)
        if cls is old:
            replacement: type = new
        elif (wrapper := _wrapper(cls, old)) is not None:
            replacement = _wrapped(cls, wrapper, new)
        else:
            continue
        own = _own_forwards(module)
        if all(_bound_to(forward, module, old) for forward in own.values()):
            module.__class__ = replacement
            vars(module).update(dict.fromkeys(own, types.MethodType(new.forward, module)))
    target = layer_norm if new is LayerNorm else functional.layer_norm
    for _, graph, node in list(_calls(model)):
        if node.target in (_THEIRS if new is LayerNorm else (layer_norm,)):
            node.target = target
            node.args = node.args[:5]
            node.kwargs = {
                name: value for name, value in node.kwargs.items() if name != "cudnn_enable"
            }
            graph.recompile()


def _own_forwards(module: nn.Module) -> dict[str, Any]:
    """The forward that was set on a module itself, by the name of the attribute; beneath
    accelerate's hooks where it has them.
    """
    own = vars(module)
    # accelerate's own forward calls the old one
    name = "_old_forward" if "_hf_hook" in own and "_old_forward" in own else "forward"
    return {name: own[name]} if name in own else {}


def _bound_to(forward: Any, module: nn.Module, cls: type[nn.Module]) -> bool:
    """True for a class's own forward of this very module, which accelerate leaves behind when its
    hooks are removed.
    """
    return (
        getattr(forward, "__self__", None) is module
        and getattr(forward, "__func__", None) is cls.forward
    )


def _wrapper(cls: type, base: type) -> type | None:
    """The class that PyTorch's fully_shard or replicate has put before `base` to make `cls`; None
    where `cls` is not made so.
    """
    first, *rest = cls.__bases__
    return first if rest == [base] and first.__module__.startswith("torch.distributed.") else None


_wrapped_classes: dict[tuple[type, type], type] = {}


def _wrapped(cls: type, wrapper: type, base: type) -> type:
    """A class as `cls`, made of the wrapper and another base."""
    if (wrapper, base) not in _wrapped_classes:
        members = {
            name: value
            for name, value in vars(cls).items()
            if name not in ("__dict__", "__weakref__")
        }
        _wrapped_classes[wrapper, base] = type(cls.__name__, (wrapper, base), members)
    return _wrapped_classes[wrapper, base]


def _listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(name or "the model itself" for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


__all__ = ["Conversion", "conversion", "convert", "revert"]
