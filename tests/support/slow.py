"""Parameters of which some take long: these are marked `slow`, and run by `make test-slow`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest
from _pytest.mark import ParameterSet


def slow(*values: Any) -> ParameterSet:
    """One set of parameters that takes long."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(quick: Collection[str], names: Iterable[str]) -> list[str | ParameterSet]:
    """The names, of which all take long but the quick ones."""
    return [name if name in quick else slow(name) for name in names]
