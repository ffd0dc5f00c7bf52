"""Adapters that PEFT trained on a loaded model, merged into checkpoints of both generations of names.

The expected model is PEFT's own merge. transformers loads ours: it does the renaming that the merge must have undone.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

import lora_export
from lora_export.errors import MatchError
from support import TESTS, architecture_outcomes, tables
from support.architectures import Trained, different, names_in, reloaded, trained
from support.slow import slow_but

SAMPLE = (
    *("ViTForImageClassification", "DeiTForImageClassification", "Dinov2Model", "BeitModel"),
    *("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "LlavaForConditionalGeneration"),
    *("PaliGemmaForConditionalGeneration", "MixtralForCausalLM", "NomicBertModel", "JinaEmbeddingsV3Model"),
)
FUSED = "NomicBertModel"  # its q, k and v are one tensor on disk
# Renamed layers, moved prefixes of two depths, experts, and a fused weight: the others have rules of the same kinds.
QUICK = {"ViTForImageClassification", "Qwen2VLForConditionalGeneration", "LlavaForConditionalGeneration"}
QUICK |= {"MixtralForCausalLM", FUSED}
GENERATIONS = ("original", "loaded")
README, TABLE = TESTS / "README.md", "architectures that transformers renames"


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    return functools.cache(lambda name: trained(name, tmp_path_factory.mktemp(name)))


def assert_is_peft_merge(model: Trained, merged: Path, base: Path) -> None:
    assert len(model.changed) >= 4
    assert different(model.merged, reloaded(model.cls, merged).state_dict(), tolerance=1e-6) == set()
    assert names_in(merged) == names_in(base)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert {name: value.shape for name, value in after.items()} == {name: one.shape for name, one in before.items()}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", slow_but(QUICK, SAMPLE))
def test_a_merge_is_pefts_in_both_generations(model_of, name, generation, tmp_path):
    model = model_of(name)
    base = getattr(model, generation)
    result = lora_export.merge(base, model.adapter, tmp_path / "merged")
    assert_is_peft_merge(model, tmp_path / "merged", base)
    same = generation == "loaded" or name == "MixtralForCausalLM"  # whose attention has one name
    assert result.plan.spellings == ("same" if same else "loaded",)
    assert result.report.spellings == {"adapter": result.plan.spellings[0]}
    assert names_in(model.original) != names_in(model.loaded)
    assert lora_export.verify(tmp_path / "merged", base=base, adapters=[model.adapter])


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"bias": "all"}, {"lora_bias": True}, {"r": 3, "use_rslora": True}]
)
def test_parts_of_a_fused_weight_take_every_kind_of_pair(config, tmp_path):
    model = trained("JinaEmbeddingsV3Model", tmp_path, **config)
    lora_export.merge(model.original, model.adapter, tmp_path / "merged")
    assert_is_peft_merge(model, tmp_path / "merged", model.original)
    assert lora_export.verify(tmp_path / "merged", base=model.original, adapters=[model.adapter])
    assert ("layers.0.self_attn.q_proj.bias" in model.changed) is ("lora_bias" in config)


def test_a_saved_module_replaces_its_part_of_a_fused_weight(tmp_path):
    model = trained(FUSED, tmp_path, target_modules=["q_proj"], modules_to_save=["v_proj"])
    lora_export.merge(model.original, model.adapter, tmp_path / "merged")
    assert different(model.merged, reloaded(model.cls, tmp_path / "merged").state_dict(), tolerance=1e-6) == set()
    assert lora_export.verify(tmp_path / "merged", base=model.original, adapters=[model.adapter])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_fused_weight_of_half_precision_is_rounded_once(model_of, dtype, tmp_path):
    model = model_of(FUSED)
    base = shutil.copytree(model.original, tmp_path / "half")
    import ml_dtypes

    tensors = load_file(base / "model.safetensors")
    halves = {name: value.astype(ml_dtypes.bfloat16) for name, value in tensors.items()}
    save_file(halves, base / "model.safetensors", {"format": "pt"})
    lora_export.merge(base, model.adapter, tmp_path / "merged", dtype=dtype)
    assert lora_export.verify(tmp_path / "merged", base=base, adapters=[model.adapter])
    name = "encoder.layers.0.attn.Wqkv.weight"
    adapter = load_file(model.adapter / "adapter_model.safetensors")
    at = "base_model.model.layers.0.self_attn"
    deltas = [1.5 * adapter[f"{at}.{q}_proj.lora_B.weight"] @ adapter[f"{at}.{q}_proj.lora_A.weight"] for q in "qkv"]
    expected = halves[name].astype(np.float32) + np.concatenate(deltas)
    found = load_file(tmp_path / "merged" / "model.safetensors")[name]
    assert str(found.dtype) == dtype
    off = found != expected.astype(found.dtype)
    assert off.mean() < (0.001 if dtype == "bfloat16" else 1)
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=2**-7, atol=1e-6)


def damaged(merged: Path, name: str, change) -> None:
    tensors = load_file(merged / "model.safetensors")
    change(tensors[name])
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})


def swap_q_and_k(fused: np.ndarray) -> None:
    q, k, _ = np.split(fused, 3)
    q[:], k[:] = k.copy(), q.copy()


def test_wrong_parts_of_a_fused_weight_are_detected(model_of, tmp_path):
    model, name = model_of(FUSED), "encoder.layers.0.attn.Wqkv.weight"
    lora_export.merge(model.original, model.adapter, tmp_path / "merged")
    damaged(tmp_path / "merged", name, swap_q_and_k)
    found = lora_export.verify(tmp_path / "merged", base=model.original, adapters=[model.adapter])
    assert not found and "Wqkv.weight[0:64]" in str(found) and "Wqkv.weight[128:192]" not in str(found)


def test_other_entries_of_a_fused_weight_must_be_the_bases(tmp_path):
    model, name = trained(FUSED, tmp_path, target_modules=["q_proj"]), "encoder.layers.1.attn.Wqkv.weight"
    lora_export.merge(model.original, model.adapter, tmp_path / "merged")
    assert lora_export.verify(tmp_path / "merged", base=model.original, adapters=[model.adapter])
    damaged(tmp_path / "merged", name, lambda fused: fused.__setitem__((100, 3), 7.0))
    found = lora_export.verify(tmp_path / "merged", base=model.original, adapters=[model.adapter])
    assert not found and "1 of the 8,192 entries outside of the parts that change" in str(found)


def test_an_original_adapter_of_a_fused_layer_changes_the_loaded_names(model_of, tmp_path):
    model, at = model_of(FUSED), "layers.0.self_attn"
    adapter = shutil.copytree(model.adapter, tmp_path / "old")
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 64), (192, 2)))
    key = "base_model.model.encoder.layers.0.attn.Wqkv"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, adapter / "adapter_model.safetensors")
    config = (adapter / "adapter_config.json").read_text()
    start, stop = config.index('"target_modules"'), config.index("]", config.index('"target_modules"'))
    (adapter / "adapter_config.json").write_text(f'{config[:start]}"target_modules": ["Wqkv"{config[stop:]}')
    with pytest.raises(MatchError, match=r"layers\.1\.self_attn\.q_proj"):  # the second layer has no tensors
        lora_export.merge(model.loaded, adapter, tmp_path / "merged")
    again = {f"{key.replace('0', '1', 1)}.lora_{side}.weight": value for side, value in (("A", a), ("B", b))}
    both = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b, **again}
    save_file(both, adapter / "adapter_model.safetensors")
    result = lora_export.merge(model.loaded, adapter, tmp_path / "merged")
    assert result.plan.spellings == ("original",)
    before, after = (reloaded(model.cls, each).state_dict() for each in (model.loaded, tmp_path / "merged"))
    change = torch.cat([after[f"{at}.{q}_proj.weight"] - before[f"{at}.{q}_proj.weight"] for q in "qkv"])
    torch.testing.assert_close(change, torch.tensor(1.5 * b @ a), rtol=0, atol=1e-5)


def renamed_as_original(adapter: Path, folder: Path) -> Path:
    """ViT's adapter under the names of transformers 4."""
    copy = shutil.copytree(adapter, folder)
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = {"layers.": "encoder.layer.", ".q_proj": ".attention.query", ".k_proj": ".attention.key"}
    names |= {".v_proj": ".attention.value", ".o_proj": ".output.dense"}
    old = {}
    for key, value in tensors.items():
        old[functools.reduce(lambda name, pair: name.replace(*pair), names.items(), key)] = value
    save_file(old, copy / "adapter_model.safetensors")
    config = (copy / "adapter_config.json").read_text()
    for new, original in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output.dense"}.items():
        config = config.replace(f'"{new}"', f'"{original}"')
    (copy / "adapter_config.json").write_text(config)
    return copy


@pytest.fixture
def vit_attention(tmp_path) -> Trained:
    return trained("ViTForImageClassification", tmp_path, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


@pytest.mark.slow
def test_an_original_adapter_fits_the_module_and_the_graph(vit_attention, tmp_path):
    model, old = vit_attention, renamed_as_original(vit_attention.adapter, tmp_path / "old")
    # In the module: exported and proven against PyTorch with the adapter attached.
    lora_export.export_onnx(model.original, tmp_path / "m.onnx", adapters=[old], lora="merged")
    # Both spellings are one adapter: a file that was merged with one is that of the other.
    assert lora_export.verify(tmp_path / "m.onnx", model.original, adapters=[model.adapter])
    lora_export.merge(model.original, model.adapter, tmp_path / "merged")
    assert lora_export.verify(tmp_path / "merged", model.original, adapters=[old])
    assert not lora_export.verify(tmp_path / "merged", model.original)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["original", "loaded"])
def test_a_graph_named_by_a_checkpoint_takes_either_spelling(vit_attention, spelling, tmp_path):
    model = vit_attention
    adapter = model.adapter if spelling == "loaded" else renamed_as_original(model.adapter, tmp_path / "old")
    lora_export.export_onnx(model.original, tmp_path / "base.onnx")
    lora_export.merge(tmp_path / "base.onnx", adapter, tmp_path / "m.onnx", checkpoint=model.original)
    assert lora_export.verify(tmp_path / "m.onnx", model.original, adapters=[model.adapter])


def test_a_text_model_adapter_needs_the_prefix_that_is_proposed(tmp_path):
    """Qwen3-VL has one generation of names: only the option tells that the adapter is of its text model."""
    model = trained("Qwen3VLForConditionalGeneration", tmp_path, target_modules=["q_proj", "v_proj"])
    adapter = shutil.copytree(model.adapter, tmp_path / "text")
    tensors = load_file(adapter / "adapter_model.safetensors")
    text = {key.replace("model.language_model.", "model.", 1): value for key, value in tensors.items()}
    assert set(text).isdisjoint(tensors)
    save_file(text, adapter / "adapter_model.safetensors")
    with pytest.raises(MatchError, match=r'With prefixes={"model\.": "model\.language_model\."} the adapter'):
        lora_export.merge(model.original, adapter, tmp_path / "merged")
    prefixes = {"model.": "model.language_model."}
    lora_export.merge(model.original, adapter, tmp_path / "merged", prefixes=prefixes)
    assert_is_peft_merge(model, tmp_path / "merged", model.original)
    assert lora_export.verify(tmp_path / "merged", base=model.original, adapters=[adapter], prefixes=prefixes)


@pytest.mark.slow  # some minutes
def test_every_architecture_is_right_or_refused(pytestconfig):
    found = list(architecture_outcomes.outcomes())
    text = architecture_outcomes.as_text(found)
    if pytestconfig.getoption("--keep"):
        tables.put(README, TABLE, text)
    assert [one for one in found if one.what == architecture_outcomes.WRONG] == []
    assert tables.rows(text) == tables.rows(tables.text(README, TABLE))


def without_names(graph: Path, stripped: Path) -> Path:
    """The graph with other names for all initializers, nodes and values."""
    model = onnx.load(graph)
    outputs = {each.name for each in model.graph.output}
    new = {each.name: f"w{number}" for number, each in enumerate(model.graph.initializer)}
    for number, node in enumerate(model.graph.node):
        new |= {name: f"v{number}_{at}" for at, name in enumerate(node.output) if name not in outputs}
    for each in model.graph.initializer:
        each.name = new[each.name]
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
        del node.metadata_props[:]
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    del model.graph.value_info[:]
    del model.metadata_props[:]
    onnx.save(model, stripped)
    return stripped


@pytest.mark.slow
def test_a_graph_without_names_gets_the_originals_by_content(vit_attention, tmp_path):
    model = vit_attention
    lora_export.export_onnx(model.original, tmp_path / "base.onnx")
    stripped = without_names(tmp_path / "base.onnx", tmp_path / "stripped.onnx")
    with pytest.raises(MatchError):
        lora_export.merge(stripped, model.adapter, tmp_path / "m.onnx")
    result = lora_export.merge(stripped, model.adapter, tmp_path / "m.onnx", checkpoint=model.original)
    assert "vit.encoder.layer.0.attention.attention.query.weight" in [step.weight for step in result.plan.steps]
    assert any("conversion mapping" in note for note in result.notes)
    assert lora_export.verify(tmp_path / "m.onnx", model.original, adapters=[model.adapter])
