"""What the tests share. Test files import from here, never from each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent  # the checkout
FACTORIES = TESTS / "support" / "factories.py"  # models for `file.py:factory`
RUNNERS = TESTS / "support" / "runners.py"  # for `verify --runner file.py:function`


Found = TypeVar("Found")


def offenders(found: Mapping[str, Found]) -> dict[str, Found]:
    """Those in which something was found: a rule that all files keep has none."""
    return {name: each for name, each in found.items() if each}
