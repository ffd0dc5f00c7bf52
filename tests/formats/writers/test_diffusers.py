"""Adapters as diffusers writes them: they come back bit for bit, and diffusers loads them at the right scale."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file

import lora_export
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.structured_pairs import WholePair
from support.diffusion import arrays_of, change, fused_by_diffusers, linear_shapes, random_pairs, unet
from support.one_files import drawn_adapters
from support.written import adapter_of, assert_same_pairs, converted, low_rank


@settings(deadline=None, max_examples=40)
@given(drawn_adapters())
def test_pairs_come_back(adapter: Adapter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert_same_pairs(converted(adapter, Path(folder), "diffusers"), adapter)


def test_diffusers_loads_what_was_written(tmp_path: Path) -> None:
    shapes = {name: shape for name, shape in linear_shapes(unet(), convolutions=True).items() if "mid_block" in name}
    factors, pairs = {}, {}
    for number, (name, shape) in enumerate(shapes.items()):
        factors |= random_pairs({name: shape}, rank=2 + number % 3, seed=number)
        a, b = factors[name]
        pairs[f"denoiser/{name}"] = LoraPair(a=a, b=b, scale=(1 + number % 2) / len(a))
    path = lora_export.convert(adapter_of(pairs), tmp_path / "out", to="diffusers").output
    assert all(key.startswith("unet.") for key in load_file(path))
    theirs, base = fused_by_diffusers(unet(), "StableDiffusionPipeline", path, "unet"), arrays_of(unet())
    for name, pair in factors.items():
        own = theirs[f"{name}.weight"] - base[f"{name}.weight"]
        assert own == pytest.approx(change(pair, pairs[f"denoiser/{name}"].scale), abs=3e-6)


def test_a_transformer_has_its_own_prefix(tmp_path: Path) -> None:
    pairs = {"denoiser/blocks.0.q": low_rank(3, 2, 1), "denoiser_2/blocks.0.q": low_rank(3, 2, 2)}
    path = lora_export.convert(adapter_of(pairs), tmp_path / "out", to="diffusers").output
    assert {key.partition(".")[0] for key in load_file(path)} == {"transformer", "transformer_2"}


T5 = "text_encoder_3/encoder.block.0.layer.0.SelfAttention.q"


@pytest.mark.parametrize(
    ("denoiser", "folder"),
    [("single_transformer_blocks.0.proj_mlp", "text_encoder_2"), ("joint_blocks.0.a", "text_encoder_3")],
)
def test_t5_is_in_the_folder_of_its_family(denoiser, folder, tmp_path: Path) -> None:
    adapter = adapter_of({f"denoiser/{denoiser}": low_rank(3, 2, 1), T5: low_rank(3, 2, 1)})
    result = lora_export.convert(adapter, tmp_path / "out", to="diffusers")
    assert {key.partition(".")[0] for key in load_file(result.output)} == {"transformer", folder}
    assert result.notes == ("mine: diffusers loads no adapter of T5; other programs read these names.",)
    assert_same_pairs(converted(adapter, tmp_path, "diffusers"), adapter)


@pytest.mark.parametrize(
    ("pairs", "fields", "message"),
    [
        ({"a": WholePair({"change": np.ones((2, 2))}, 1.0)}, {}, "a: WholePair is no low-rank pair"),
        ({"a": low_rank(3, 2, 1)}, {"biases": {"a": np.ones(3, np.float32)}}, "a: a change of a bias"),
        ({"a": low_rank(3, 2, 1), "b": low_rank(3, 2, 1, magnitude=np.ones(3))}, {}, "DoRA on some layers of a model"),
        ({T5: low_rank(3, 2, 1)}, {}, "T5: it is text_encoder_2 in Flux's pipelines and text_encoder_3 in Stable"),
        ({"a_b": low_rank(3, 2, 1)}, {"flattened": True}, "in which `_` stands for the dots"),
    ],
)
def test_what_the_format_lacks_is_refused_by_name(pairs, fields, message, tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=message):
        lora_export.convert(adapter_of(pairs, **fields), tmp_path / "out", to="diffusers")
    assert list(tmp_path.iterdir()) == []
