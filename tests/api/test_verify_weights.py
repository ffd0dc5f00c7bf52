"""Merged checkpoints against their base: no model, no PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_export as le
from lora_export import convert, inspect, merge, verify
from lora_export.errors import InputRefused, MatchError, WrongUsage
from lora_export.options.combining import Combination
from lora_export.options.reading import ReadOptions
from support.diffusion import adapter_file, random_pairs
from support.handmade import peft_adapter


def test_a_merged_file_is_compared_without_a_model(place: Path) -> None:
    right = le.verify(place / "merged.safetensors", base=place / "base.safetensors", adapters=place / "adapter")
    wrong = le.verify(place / "merged.safetensors", base=place / "base.safetensors", adapters=place / "stronger")
    assert right and not wrong and wrong.verdict.outcome == "different"


def test_a_combined_merge_is_compared_with_the_same_combination(place: Path, tmp_path: Path) -> None:
    adapters, how = [place / "adapter", place / "stronger"], {"combination": "linear"}
    le.merge(place / "base.safetensors", adapters, tmp_path / "out.safetensors", **how)
    found = [le.verify(tmp_path / "out.safetensors", base=place / "base.safetensors", adapters=adapters, **one)
             for one in (how, {})]  # fmt: skip
    assert found[0] and found[0].about["combine"] == {"method": "linear"}
    assert found[1].verdict.outcome == "different"


def test_a_misfit_does_not_tell_of_an_output(place: Path, tmp_path: Path) -> None:
    """There is none."""
    peft_adapter(tmp_path / "other", {"nowhere": (np.ones((1, 3)), np.ones((4, 1)))})
    with pytest.raises(MatchError, match=r"^1 of 1 targets do not fit the base\.\n") as refused:
        le.verify(place / "merged.safetensors", base=place / "base.safetensors", adapters=tmp_path / "other")
    assert "written" not in str(refused.value) and refused.value.misfits


def test_base_without_an_adapter_names_the_recorded_one(place: Path) -> None:
    with pytest.raises(WrongUsage, match=r"merged\.safetensors contains `adapter`"):
        le.verify(place / "merged.safetensors", base=place / "base.safetensors")


# --- pipelines ---

LAYERS = {"a.q": (6, 4), "b.q": (4, 4)}


def model(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in LAYERS.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"_class_name": "QwenImageTransformer2DModel", "_diffusers_version": "0.42.1"})
    )


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    for seed, name in enumerate(("unet", "text_encoder", "vae")):
        model(folder / name, seed)
    index = {name: ["diffusers", "X"] for name in ("unet", "text_encoder", "vae")}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    pairs = random_pairs(
        {f"{part}.{name}": shape for part in ("unet", "text_encoder") for name, shape in LAYERS.items()}
    )
    return adapter_file(tmp_path / "a.safetensors", pairs)


@pytest.fixture
def merged(base, adapter, tmp_path) -> Path:
    return merge(base, adapter, tmp_path / "merged", weights=[0.5]).output


def test_a_merged_pipeline_is_the_same(base, adapter, merged):
    result = verify(merged, base=base, adapters=adapter, weights=[0.5])
    assert result.verdict.outcome == "same"
    assert {weight.name for weight in result.verdict.weights} == {
        f"{part}/{name}.weight" for part in ("unet", "text_encoder") for name in LAYERS
    }
    assert set(result.about["models"]) == {"unet", "text_encoder"}
    assert str(result).startswith("same: 4 of 4 tensors are as they should be: 4 changed")


def test_a_wrong_weight_in_one_model_is_different(base, adapter, merged):
    path = merged / "text_encoder" / "model.safetensors"
    tensors = {name: value.copy() for name, value in load_file(path).items()}
    tensors["a.q.weight"][0, 0] += 0.01
    save_file(tensors, path)
    result = verify(merged, base=base, adapters=adapter, weights=[0.5])
    assert result.verdict.outcome == "different"
    assert [weight.name for weight in result.verdict.worst] == ["text_encoder/a.q.weight"]


def test_a_damaged_file_beside_the_weights_is_refused_before_these_are_read(base, adapter, tmp_path, monkeypatch):
    (base / "unet" / "generation_config.json").write_text("{}")
    merged = merge(base, adapter, tmp_path / "merged").output
    (merged / "unet" / "generation_config.json").write_text("{")
    monkeypatch.setattr("lora_export.verification.against_checkpoint.audit", None)
    with pytest.raises(InputRefused, match=r"generation_config\.json"):
        verify(merged, base=base, adapters=adapter)


def test_a_model_whose_pairs_are_not_trained_stays_as_it_is(base, tmp_path):
    pairs = random_pairs({f"{part}.a.q": LAYERS["a.q"] for part in ("unet", "text_encoder")})
    a, b = pairs["text_encoder.a.q"]
    path = adapter_file(tmp_path / "a.safetensors", pairs | {"text_encoder.a.q": (a, np.zeros_like(b))})
    merge(base, path, tmp_path / "merged")
    own = "text_encoder/model.safetensors"
    assert (tmp_path / "merged" / own).read_bytes() == (base / own).read_bytes()
    assert sorted(file.name for file in (tmp_path / "merged" / "text_encoder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    result = verify(tmp_path / "merged", base=base, adapters=path)
    assert result.verdict.outcome == "same"
    assert set(result.about["models"]) == {"unet"}
    assert "a changes nothing in text_encoder: its values there are those before training" in result.verdict.notes
    model(tmp_path / "other", 7)
    shutil.copyfile(tmp_path / "other" / "model.safetensors", tmp_path / "merged" / own)
    result = verify(tmp_path / "merged", base=base, adapters=path)
    assert result.verdict.outcome == "different"
    assert result.verdict.files == (f"{own} has other bytes than the base's",)


def test_another_strength_is_different(base, adapter, merged):
    assert verify(merged, base=base, adapters=adapter).verdict.outcome == "different"


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("vae/model.safetensors", b"other", "vae/model.safetensors has other bytes than the base's"),
        ("vae/config.json", None, "vae/config.json is missing"),
        ("vae/more.bin", b"x", "vae/more.bin is new"),
        ("unet/config.json", b'{"_class_name": "Y"}', "unet: config.json"),
        ("unet/diffusion_pytorch_model.bin", b"x", "unet: diffusion_pytorch_model.bin is not what was judged"),
        ("unet/diffusion_pytorch_model.fp16.bin", b"x", "unet: diffusion_pytorch_model.fp16.bin is not what was"),
        ("text_encoder/pytorch_model.bin", b"x", "text_encoder: pytorch_model.bin is not what was judged"),
    ],
)
def test_a_changed_file_is_different(file, content, line, base, adapter, merged):
    if content is None:
        (merged / file).unlink()
    else:
        (merged / file).write_bytes(content)
    result = verify(merged, base=base, adapters=adapter, weights=[0.5])
    assert result.verdict.outcome == "different"
    assert any(each.startswith(line) for each in result.verdict.files)


def test_other_weights_in_a_judged_model_are_not_judged(base, adapter, merged):
    (merged / "unet/ema.bin").write_bytes(b"x")
    result = verify(merged, base=base, adapters=adapter, weights=[0.5], strict=True)
    assert result.verdict.outcome == "undecided"
    assert result.verdict.not_judged == ("unet: other weights in the folder: ema.bin",)


def test_a_model_that_is_missing_is_refused(base, adapter, merged):
    shutil.rmtree(merged / "unet")
    with pytest.raises(InputRefused, match=r"there is no candidate at .*unet"):
        verify(merged, base=base, adapters=adapter)


def test_one_component_is_judged_alone(base, adapter, tmp_path):
    part = ReadOptions(component="unet")
    merge(base, adapter, tmp_path / "merged", reading=part)
    assert verify(tmp_path / "merged", base=base, adapters=adapter, reading=part).verdict.outcome == "same"
    assert not verify(tmp_path / "merged", base=base, adapters=adapter)


def test_a_pipeline_needs_its_adapters(base, merged):
    with pytest.raises((InputRefused, WrongUsage), match="adapter"):
        verify(merged, base=base)


def test_a_pipeline_is_no_checkpoint(base):
    with pytest.raises(InputRefused, match=r"is a diffusion pipeline\. Name the folder of one of its models"):
        inspect(base)


def test_a_method_applies_to_a_model_that_one_of_two_adapters_changes(base, adapter, tmp_path):
    other = adapter_file(tmp_path / "b.safetensors", random_pairs({"unet.a.q": LAYERS["a.q"]}, seed=7))
    ties = Combination("ties", density=0.5)
    merged = merge(base, [adapter, other], tmp_path / "merged", combination=ties).output
    result = verify(merged, base=base, adapters=[adapter, other], combination=ties)
    assert result.verdict.outcome == "same" and len(result.verdict.weights) == 4
    plain = merge(base, [adapter, other], tmp_path / "plain").output
    name, file = "b.q.weight", "text_encoder/model.safetensors"  # half of the entries of A and B are removed there too
    assert not np.array_equal(load_file(merged / file)[name], load_file(plain / file)[name])
    with pytest.raises(InputRefused, match='combination="ties" combines several adapters, and there is one'):
        merge(base, adapter, tmp_path / "alone", combination=ties)


def with_half_precision(base: Path) -> None:
    """Adds the variant fp16 of every model, and an index of it as larger models have."""
    for folder in ("unet", "text_encoder"):
        tensors = load_file(base / folder / "model.safetensors")
        save_file({name: value.astype(np.float16) for name, value in tensors.items()}, base / folder / FP16)
    index = {"weight_map": dict.fromkeys(tensors, FP16)}
    (base / "text_encoder" / "model.safetensors.index.fp16.json").write_text(json.dumps(index))


FP16 = "model.fp16.safetensors"


def test_one_variant_of_the_weights_is_merged_and_judged(base, adapter, tmp_path):
    with_half_precision(base)
    result = merge(base, adapter, tmp_path / "half", variant="fp16")
    names = {path.relative_to(result.output).as_posix() for path in result.output.rglob("*.safetensors*")}
    index = "text_encoder/model.safetensors.index.fp16.json"
    assert names == {f"unet/{FP16}", f"text_encoder/{FP16}", index, "vae/model.safetensors"}
    assert "model.safetensors contains weights too, unmerged ones; it is left out" in result.notes
    assert verify(result.output, base=base, adapters=adapter).verdict.outcome == "same"
    whole = merge(base, adapter, tmp_path / "whole", variant="none").output
    assert verify(whole, base=base, adapters=adapter).verdict.outcome == "same"
    assert {str(value.dtype) for value in load_file(whole / "unet" / "model.safetensors").values()} == {"float32"}
    assert not (whole / index).exists()
    convert(adapter, tmp_path / "kohya", to="kohya", base=base)  # the names of all variants are the same


def test_several_variants_are_refused_with_the_way_out(base, adapter, tmp_path):
    with_half_precision(base)
    with pytest.raises(InputRefused, match=r'one without a name and fp16\. `merge` takes variant="fp16" or'):
        merge(base, adapter, tmp_path / "out")
    with pytest.raises(InputRefused, match="has no weights of the variant bf16"):
        merge(base, adapter, tmp_path / "out", variant="bf16")
    with pytest.raises(InputRefused, match="is one file, which has no variants"):
        merge(base / "vae" / "model.safetensors", adapter, tmp_path / "o.safetensors", variant="fp16")
    assert not (tmp_path / "out").exists()
