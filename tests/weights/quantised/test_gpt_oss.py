"""gpt-oss in mxfp4 becomes a float model: every weight is what transformers makes of the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

import lora_export
from support.cli import answer, call
from support.handmade import peft_adapter
from support.peft_models import fill

EXPERTS = ("gate_up_proj", "down_proj")
TARGET = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mxfp4`, a gpt-oss as it is published, in two files; `adapter`, on its attention."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder / "float")
    tensors = load_file(folder / "float" / "model.safetensors")
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(115, 123, shape, dtype=torch.uint8)
    base = folder / "mxfp4"
    base.mkdir()
    files = {"a.safetensors": "_scales", "b.safetensors": ""}
    table: dict[str, str] = {}
    for file, ending in files.items():
        own = {name: value for name, value in tensors.items() if name.endswith(ending) and name not in table}
        table |= dict.fromkeys(own, file)
        save_file(own, base / file, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    stated = json.loads((folder / "float" / "config.json").read_text())
    stated["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (base / "config.json").write_text(json.dumps(stated))
    rng = np.random.default_rng(0)
    peft_adapter(folder / "adapter", {TARGET: (rng.normal(size=(2, 64)), rng.normal(size=(64, 2)))})
    return folder


def test_merged_model_is_the_library_s_dequantised_one(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = lora_export.merge(place / "mxfp4", [place / "adapter"], out, dequantize=True)
    assert any("4 quantised weights (mxfp4) are stored as floats" in note for note in result.notes)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    theirs = AutoModelForCausalLM.from_pretrained(place / "mxfp4", dtype=torch.bfloat16).state_dict()
    model, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(loading.values())
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == {f"{TARGET}.weight"}
    stored = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    assert not [name for name in stored if name.endswith(("_blocks", "_scales"))]
    assert not (out / "a.safetensors").exists()  # it had nothing but scales
    assert lora_export.verify(out, adapters=[place / "adapter"], base=place / "mxfp4")


def test_adapter_on_experts_gives_pefts_weights(place: Path, tmp_path: Path) -> None:
    """The steps are on parts of a weight that is stored as its transpose in 4 bits."""
    model = AutoModelForCausalLM.from_pretrained(place / "mxfp4", dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = [f"mlp.experts.{name}" for name in EXPERTS]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=targets)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    fill(adapted, "lora_B", std=0.5)
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    adapted.save_pretrained(adapter)
    result = lora_export.merge(
        place / "mxfp4", [adapter], out, dequantize=True, dtype="float32", float_base=place / "float"
    )
    theirs = adapted.merge_and_unload().state_dict()
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-5)
    changed = {name for name in theirs if not torch.equal(theirs[name], before[name])}
    assert len(changed) == 6 and not any(torch.equal(ours[name], before[name]) for name in changed)
    assert lora_export.verify(out, adapters=[adapter], base=place / "mxfp4")
    assert result.report is not None
    floats = load_file(place / "float" / "model.safetensors")
    for loss in result.report.quantisation:
        error = (before[loss.weight] - floats[loss.weight].float()).norm()
        change = (theirs[loss.weight] - before[loss.weight]).norm()
        assert (loss.error, loss.change) == (pytest.approx(float(error)), pytest.approx(float(change), rel=1e-4))


@pytest.mark.parametrize(("size", "promoted"), [(0.03, 0), (0.0005, 2)])
def test_experts_stay_in_mxfp4_or_become_floats(place: Path, tmp_path: Path, size: float, promoted: int) -> None:
    """Both weights of an `experts` module have one type; the router and attention are floats anyway."""
    layer, adapter = "model.layers.0.mlp.experts", tmp_path / "adapter"
    targets = [f"layers.0.mlp.experts.{name}" for name in EXPERTS]
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=targets)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(place / "float"), config)
    fill(adapted, "lora_B", std=size)
    adapted.save_pretrained(adapter)
    out = tmp_path / "merged"
    result = lora_export.merge(place / "mxfp4", [adapter], out, keep_quantised=True)
    assert result.report is not None
    layers = result.report.layers
    assert len(layers) == 2 and sum(not one.is_kept for one in layers) == promoted
    assert lora_export.verify(out, adapters=[adapter], base=place / "mxfp4")
    model, loading = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(loading.values())
    floats = tmp_path / "floats"
    lora_export.merge(place / "mxfp4", [adapter], floats, dequantize=True)
    ours, theirs = AutoModelForCausalLM.from_pretrained(floats, dtype=torch.bfloat16).state_dict(), model.state_dict()
    for one in layers:
        error = (theirs[one.weight].float() - ours[one.weight].float()).norm() / ours[one.weight].float().norm()
        assert (error == 0) if promoted else (0 < error < 0.5)
    others = theirs.keys() - {one.weight for one in layers}
    assert all(torch.equal(theirs[name], ours[name]) for name in others)
    stated = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (layer in stated["modules_to_not_convert"]) == bool(promoted)


def test_one_wrong_entry_of_an_expert_is_different(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert call("merge", place / "mxfp4", place / "adapter", "-o", out, "--dequantize") == 0
    name = "model.layers.1.mlp.experts.down_proj"
    file, tensors = next((file, load_file(file)) for file in out.glob("*.safetensors") if name in load_file(file))
    tensors[name][3, 31, 5] *= 2
    assert tensors[name][3, 31, 5] != 0
    save_file(tensors, file, {"format": "pt"})
    code, document = answer(capsys, "verify", out, "--base", place / "mxfp4", "-a", place / "adapter")
    assert code == 4
    assert [one["name"] for one in document["weights"] if one["outcome"] == "different"] == [name]
