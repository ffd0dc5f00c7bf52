"""What a user states about the files of adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lora_export.errors import InputRefused, WrongUsage
from lora_export.formats.adapter_files import base_config, size_in_config
from lora_export.options.reading import DEFAULTS, ReadOptions


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"moe_b_layout": "expert_major"}, "moe_b_layout= is 'expert_major'; it must be rank_major or grouped_by"),
        ({"lora_rank": 0}, "lora_rank= is 0; it must be at least 1"),
        ({"lora_alpha": 0.0}, "lora_alpha= is 0; it must be above 0"),
        ({"lora_alpha": math.nan}, "lora_alpha= is nan; it must be above 0"),
    ],
)
def test_a_value_that_does_not_exist_is_wrong_usage(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongUsage, match=message):
        ReadOptions(**wrong)


@pytest.mark.parametrize(("field", "value"), [("lora_rank", 4), ("lora_alpha", 8.0)])
def test_stating_what_an_adapter_records_is_refused(field: str, value: float) -> None:
    with pytest.raises(InputRefused, match=f"{field}= is for adapters that do not record it; this one does, in f.json"):
        ReadOptions(**{field: value}).refuse_rank_and_alpha("f.json")
    ReadOptions(moe_b_layout="rank_major").refuse_rank_and_alpha("f.json")


# --- The config of the base ---


def test_the_config_beside_the_adapter_comes_before_the_bases(tmp_path: Path) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    for folder in (adapter, base):
        folder.mkdir()
    stated = ReadOptions(base_config=base)
    assert base_config(adapter, DEFAULTS) is base_config(adapter, stated) is None
    (base / "config.json").write_text('{"model_type": "of the base"}')
    (base / "model.safetensors").touch()
    for path in (base, base / "config.json", base / "model.safetensors"):
        assert base_config(adapter, ReadOptions(base_config=path)) == {"model_type": "of the base"}
    (adapter / "config.json").write_text('{"model_type": "of the adapter"}')
    assert base_config(adapter, stated) == {"model_type": "of the adapter"}


def test_a_base_that_is_no_path_is_left_out(tmp_path: Path) -> None:
    assert DEFAULTS.for_base(("module", 1)) == DEFAULTS
    assert DEFAULTS.for_base("package.module:factory").base_config == Path("package.module:factory")
    stated = ReadOptions(base_config=tmp_path)
    assert stated.for_base("other") is stated
    assert base_config(tmp_path, ReadOptions(base_config=Path("package.module:factory"))) is None


def test_a_size_is_a_positive_integer() -> None:
    assert size_in_config({"a": 3}, "a") == 3
    assert size_in_config({}, "a") is None
    for wrong in (0, True, 2.0, "3", 1 << 40):
        with pytest.raises(InputRefused, match=r"the base.s config: a is .*; it must be a positive integer"):
            size_in_config({"a": wrong}, "a")
