"""Configs of transformers with infinite numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import transformers as hf

from lora_export.models.config_numbers import with_numbers


def test_infinite_numbers_are_those_that_transformers_wrote(tmp_path: Path) -> None:
    given = {"time_step_limit": [0.0, math.inf], "nested": {"low": -math.inf}, "name": "a"}
    hf.PretrainedConfig(**given).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "__float__" in str(written)
    read = with_numbers(written)
    assert {name: read[name] for name in given} == given


def test_other_objects_stay_as_they_are() -> None:
    other = {"__float__": 1, "a": [{"__float__": "one"}, {"__float__": "NaN", "b": 2}]}
    assert with_numbers(other) == other
    assert math.isnan(with_numbers([{"__float__": "NaN"}])[0])
