"""Merges into the folder of a pipeline: each model as diffusers fuses it, the rest copied."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_export import merge
from lora_export.api.merge_pipeline import parts_by_model
from lora_export.api.merge_request import MergeResult
from lora_export.errors import InputRefused, MatchError, OutputFailed, WrongUsage
from lora_export.options.reading import ReadOptions
from lora_export.storage.manifest import damage
from lora_export.weights.pipeline import Pipeline
from support.diffusion import adapter_file, arrays_of, clip_text_model, linear_shapes, random_pairs, unet
from support.folder_contents import folder_contents
from support.written import adapter_of, low_rank

UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    unet().save_pretrained(folder / "unet")
    clip_text_model().save_pretrained(folder / "text_encoder")
    (folder / "vae").mkdir()
    save_file({"w": np.ones((2, 2), np.float32)}, folder / "vae" / "model.safetensors")
    (folder / "vae" / "pytorch_model.bin").write_bytes(b"as it is")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@functools.cache
def pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """An adapter on the attentions of the UNet and of the text encoder, by kohya's flattened names."""
    attentions = {f"unet.{name}": shape for name, shape in linear_shapes(unet()).items() if ".attn" in name}
    text = {f"te.text_model.{name}": shape for name, shape in linear_shapes(clip_text_model()).items()}
    return random_pairs({**attentions, **text}, rank=4)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "kohya.safetensors"
    return adapter_file(path, pairs(), prefix="lora_", flattened=True, alpha=2)


@pytest.fixture(scope="module")
def whole(pipeline, adapter, tmp_path_factory) -> MergeResult:
    """The merge of both models. No test changes it."""
    return merge(pipeline, adapter, tmp_path_factory.mktemp("whole") / "out")


def changed(folder: Path, base: Path, file: str) -> set[str]:
    new, old = load_file(folder / file), load_file(base / file)
    return {name for name in new if not np.array_equal(new[name], old[name])}


def test_each_model_is_merged_as_diffusers_fuses_it(pipeline, adapter, whole):
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    models = (
        type(model).from_pretrained(pipeline / folder)
        for model, folder in ((clip_text_model(), "text_encoder"), (unet(), "unet"))
    )
    vae, scheduler = (
        AutoencoderKL(block_out_channels=[8], norm_num_groups=8),
        DDIMScheduler(steps_offset=1, clip_sample=False),
    )
    text_encoder, denoiser = models
    fused = StableDiffusionPipeline(
        vae, text_encoder, None, denoiser, scheduler, None, None, requires_safety_checker=False
    )
    fused.load_lora_weights(adapter)
    fused.fuse_lora()
    fused.unload_lora_weights()
    for file, model in ((UNET, fused.unet), (TEXT, fused.text_encoder)):
        ours, theirs = load_file(whole.output / file), arrays_of(model)
        assert set(ours) == set(theirs)
        assert {name: np.abs(ours[name] - theirs[name]).max() for name in ours} == pytest.approx(
            dict.fromkeys(ours, 0), abs=2e-6
        )
    assert len(changed(whole.output, pipeline, UNET)) + len(changed(whole.output, pipeline, TEXT)) == len(pairs())
    assert whole.report is not None and len(whole.report.results) == len(pairs())
    assert {result.weight.partition("/")[0] for result in whole.report.results} == {"unet", "text_encoder"}


def test_the_rest_is_copied_and_everything_is_in_the_manifest(pipeline, whole):
    before, after = folder_contents(pipeline), folder_contents(whole.output)
    same = {
        "model_index.json",
        "vae/model.safetensors",
        "vae/pytorch_model.bin",
        "unet/config.json",
        "text_encoder/config.json",
    }
    assert {name for name in before if after[name] == before[name]} == same
    assert set(after) - set(before) == {"lora_export.json", "unet/lora_export.json", "text_encoder/lora_export.json"}
    assert damage(whole.output) == [] == damage(whole.output / "unet")
    manifest = json.loads(after["lora_export.json"])
    assert (manifest["settings"]["models"], manifest["adapters"][0]["format"]) == (["text_encoder", "unet"], "kohya")


def test_a_second_merge_of_the_adapter_is_refused(pipeline, adapter, whole, tmp_path):
    with pytest.raises(InputRefused, match="already contains the adapter kohya"):
        merge(whole.output, adapter, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    text, unet = (ReadOptions(component=name) for name in ("text_encoder", "unet"))
    merge(pipeline, adapter, tmp_path / "one", reading=text)
    merge(tmp_path / "one", adapter, tmp_path / "both", reading=unet)  # what is merged in the other model is recorded
    assert damage(tmp_path / "both") == [] == damage(tmp_path / "both" / "text_encoder")
    with pytest.raises(InputRefused, match="both/text_encoder already contains the adapter kohya"):
        merge(tmp_path / "both", adapter, tmp_path / "again", reading=text)


def test_one_component_can_be_merged_alone(pipeline, adapter, tmp_path):
    result = merge(pipeline, adapter, tmp_path / "out", reading=ReadOptions(component="text_encoder"))
    assert changed(tmp_path / "out", pipeline, TEXT) and not changed(tmp_path / "out", pipeline, UNET)
    assert "kohya: only its changes of text_encoder are used, not those of unet or transformer." in result.notes
    merge(pipeline / "unet", adapter, tmp_path / "unet", reading=ReadOptions(component="unet"))
    assert len(changed(tmp_path, pipeline, UNET)) == len([name for name in pairs() if name.startswith("unet.")])
    with pytest.raises(InputRefused, match="several models of a pipeline"):
        merge(pipeline / "unet", adapter, tmp_path / "other")


def test_a_dry_run_names_the_model_of_each_weight(pipeline, adapter, tmp_path):
    result = merge(pipeline, adapter, tmp_path / "out", dry_run=True)
    assert result.report is None and not (tmp_path / "out").exists()
    assert len(result.plan.steps) == len(pairs())
    assert "  unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight  [64 x 64 float32]" in str(result.plan)


def test_strengths_multiply_the_changes_of_every_model(pipeline, adapter, whole, tmp_path):
    merge(pipeline, adapter, tmp_path / "other", weights=[-2.0])
    for file in (UNET, TEXT):
        base, one, other = (load_file(folder / file) for folder in (pipeline, whole.output, tmp_path / "other"))
        for name in changed(whole.output, pipeline, file):
            assert other[name] - base[name] == pytest.approx(-2 * (one[name] - base[name]), abs=2e-6)


def test_misfits_of_all_models_are_one_error(pipeline, tmp_path):
    wrong = random_pairs({"unet.no": (4, 4), "te.text_model.no": (4, 4)})
    path = adapter_file(tmp_path / "a.safetensors", wrong, prefix="lora_", flattened=True)
    with pytest.raises(MatchError) as caught:
        merge(pipeline, path, tmp_path / "out")
    assert {misfit.problem.partition(":")[0] for misfit in caught.value.misfits} == {"unet", "text_encoder"}
    assert not (tmp_path / "out").exists()


def test_a_component_that_the_pipeline_lacks_is_refused(pipeline, tmp_path):
    path = adapter_file(tmp_path / "a.safetensors", random_pairs({"a": (4, 4)}), prefix="text_encoder_2.")
    with pytest.raises(InputRefused, match="has no text_encoder_2\\. Its models are unet, text_encoder, vae"):
        merge(pipeline, path, tmp_path / "out")


def test_a_note_tells_of_a_model_that_stays_as_it_is(pipeline, tmp_path):
    found = pairs()
    text = {name: (a, np.zeros_like(b)) for name, (a, b) in found.items() if name.startswith("te.")}
    path = adapter_file(tmp_path / "a.safetensors", found | text, prefix="lora_", flattened=True, alpha=2)
    said: list[str] = []
    result = merge(pipeline, path, tmp_path / "out", on_message=said.append)
    assert "note: a changes nothing in text_encoder: its values there are those before training" in said
    assert result.report is not None
    assert {weight.weight.partition("/")[0] for weight in result.report.results} == {"unet"}


def test_options_for_one_model_are_refused(pipeline, adapter, tmp_path):
    with pytest.raises(WrongUsage) as refused:
        merge(pipeline, adapter, tmp_path / "out", requantize=True, only_head=True)
    why = "is not for a pipeline. Give the folder of one of its models as BASE"
    assert sorted(str(refused.value).splitlines()) == [f"only_head= {why}", f"requantize= {why}"]


def test_an_output_in_the_pipeline_is_refused(pipeline, adapter):
    with pytest.raises(OutputFailed, match="is inside the input"):
        merge(pipeline, adapter, pipeline / "out")


# --- The parts of adapters by the model of a pipeline that they change. ---


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
