"""Replace a module that a command imports when it runs."""

import sys
from types import SimpleNamespace

import pytest


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: object) -> None:
    """Put an object with these functions in the module's place, here and in its package."""
    package, _, name = module.rpartition(".")
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))  # type: ignore[misc]
    if package in sys.modules:
        monkeypatch.setattr(sys.modules[package], name, sys.modules[module], raising=False)
