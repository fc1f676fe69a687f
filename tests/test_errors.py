"""Errors: each can be caught as lntune's own and as the kind Python has for it, and says what to
do.
"""

from __future__ import annotations

import inspect

import pytest

from lntune import errors
from lntune.errors import LntuneError, got_expected, unknown

ALL = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if cls.__module__ == errors.__name__
]


@pytest.mark.parametrize("cls", ALL)
def test_all_share_the_base(cls: type[Exception]) -> None:
    """Every error class derives from LntuneError and carries its message unchanged."""
    assert issubclass(cls, LntuneError)
    assert str(cls("what happened")) == "what happened"


@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (errors.InputError, ValueError),
        (errors.UnknownNameError, LookupError),
        (errors.LogError, OSError),
        (errors.BuildError, RuntimeError),
        (errors.ToolchainError, errors.BuildError),
        (errors.StoreError, errors.BuildError),
        (errors.ScheduleError, RuntimeError),
        (errors.NotTunedError, LookupError),
    ],
)
def test_python_knows_the_kind(cls: type[Exception], kind: type[Exception]) -> None:
    """Code that knows nothing of lntune catches its errors by the kind Python has for them."""
    assert issubclass(cls, kind)


def test_got_expected() -> None:
    """Argument errors name the argument, what was got and what was expected; the remedy follows
    where there is one.
    """
    assert (
        got_expected("eps", -1, "a positive number") == "eps: got -1, expected a positive number."
    )
    assert (
        got_expected("eps", -1, "a positive number", "The default is 1e-5.")
        == "eps: got -1, expected a positive number. The default is 1e-5."
    )


@pytest.mark.parametrize("typed", ["layer_nrom", "layernorm", "layer-norm"])
def test_unknown_suggests_the_near_miss(typed: str) -> None:
    """A slip of the fingers is answered with the name that was meant, ahead of the list of all."""
    error = unknown("operator", typed, {"lstm_step": 1, "layer_norm": 2})
    assert (
        str(error)
        == f"unknown operator {typed!r}. Did you mean 'layer_norm'? Known: layer_norm, lstm_step."
    )


def test_unknown_far_from_everything() -> None:
    """Where nothing is near nothing is suggested, only listed; an empty list says so."""
    assert (
        str(unknown("operator", "softmax", ["lstm_step"]))
        == "unknown operator 'softmax'. Known: lstm_step."
    )
    assert str(unknown("schedule", "x", [])) == "unknown schedule 'x'. Known: none."
