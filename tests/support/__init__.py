"""What the tests share. Test files import from here, never from each other."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent  # the checkout
FACTORIES = TESTS / "support" / "factories.py"  # models for `file.py:factory`
RUNNERS = TESTS / "support" / "runners.py"  # for `verify --runner file.py:function`
