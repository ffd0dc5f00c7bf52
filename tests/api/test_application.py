"""How adapters are applied, as functions take it and as records contain it."""

from __future__ import annotations

import pytest

from lora_export.adapters.combination import Combination
from lora_export.api.application import Application
from lora_export.errors import WrongUsage
from lora_export.plan import Tied


def test_arguments_become_values() -> None:
    assert Application.of("cat", "error") == Application()
    chosen = Combination("ties", density=0.5)
    assert Application.of(chosen, "both") == Application(chosen, Tied.BOTH)
    with pytest.raises(WrongUsage, match="combine= must be one of"):
        Application.of("mean", "error")
    with pytest.raises(WrongUsage, match="tied= must be error, untie or both, not 'none'"):
        Application.of("cat", "none")


def test_records_contain_what_is_no_default() -> None:
    assert Application().settings == {}
    assert Application.of("linear", "untie").settings == {"combine": {"method": "linear"}, "tied": "untie"}
