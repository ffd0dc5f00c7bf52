"""The parts of adapters by the model of a pipeline that they change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora_export.api.pipeline_parts import parts_by_model
from lora_export.errors import InputRefused
from lora_export.weights.pipeline import Pipeline
from support.written import adapter_of, low_rank

PIPELINE = Pipeline(Path("sd"), {name: Path("sd") / name for name in ("unet", "text_encoder")})
UNTRAINED = replace(low_rank(3, 2, 1), b=np.zeros((3, 1), np.float32))


def test_each_model_gets_its_parts_and_their_strengths() -> None:
    both = adapter_of({"denoiser/a": low_rank(3, 2, 1), "text_encoder/b": low_rank(3, 2, 2)})
    one = replace(adapter_of({"a": low_rank(3, 2, 3)}), name="one")
    parts, notes = parts_by_model(PIPELINE, [both, one], [0.5, 2])
    assert {folder: own.strengths for folder, own in parts.items()} == {"unet": [0.5, 2], "text_encoder": [0.5]}
    assert [list(part.pairs) for part in parts["unet"].adapters] == [["a"], ["a"]]
    assert parts["text_encoder"].adapters[0].pairs["b"].rank == 2
    assert notes == ()


def test_a_part_without_effect_is_left_out_with_a_note() -> None:
    adapter = adapter_of({"denoiser/a": low_rank(3, 2, 1), "text_encoder/b": UNTRAINED})
    parts, notes = parts_by_model(PIPELINE, [adapter], [])
    assert {folder: own.strengths for folder, own in parts.items()} == {"unet": [1.0]}
    assert notes == ("mine changes nothing in text_encoder: its values there are those before training",)


def test_an_adapter_without_any_effect_is_refused() -> None:
    with pytest.raises(InputRefused, match=r"the adapter mine has no effect: every B"):
        parts_by_model(PIPELINE, [adapter_of({"denoiser/a": UNTRAINED})], [])


def test_a_model_that_the_pipeline_lacks_is_refused() -> None:
    with pytest.raises(InputRefused, match=r"sd has no text_encoder_2\. Its models are unet, text_encoder"):
        parts_by_model(PIPELINE, [adapter_of({"text_encoder_2/a": low_rank(3, 2, 1)})], [])
