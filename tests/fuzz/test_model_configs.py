"""Changed values of a config.json, and of the record in a TorchScript file: loaded or refused, never a traceback."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import FACTORIES
from support.cli import call
from support.handmade import peft_adapter

transformers = pytest.importorskip("transformers")

FEW, MANY = 12, 400  # examples for each model; an export of a valid config takes seconds
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 32}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "vocab_size": 64}
# Those of a language model with images are in the configs of its parts.
LLAVA = {
    "text_config": {**TEXT, "max_position_embeddings": 256, "model_type": "llama"},
    "vision_config": {
        **SIZES,
        "num_hidden_layers": 2,
        "image_size": 8,
        "patch_size": 4,
        "model_type": "clip_vision_model",
    },
    "image_token_index": 5,
}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_key_value_heads": 2}),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT),
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, "image_size": 16, "patch_size": 8}),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", LLAVA),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}
MORE_FIELDS = (
    *("dtype", "torch_dtype", "quantization_config", "rope_scaling", "rope_parameters", "sliding_window", "num_labels"),
    *("id2label", "is_decoder", "output_attentions", "return_dict", "torchscript", "pruned_heads", "problem_type"),
    *("head_dim", "num_channels", "layer_types", "text_config", "num_experts", "auto_map", "_attn_implementation"),
    *("image_token_id", "image_size", "patch_size", "window_size", "image_grid_pinpoints", "vision_feature_layer"),
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 17, 10**6, 10**30, -(10**30), 0.5, 1e308, -1e-308]),
    st.sampled_from(["", "a", "gelu", "float16", "eager", "é\n\x1b", "../x", "auto"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab01"), inner, max_size=2)),
    max_leaves=4,
)
OUTCOMES = (0, 2, 3, 4, 5, 8)  # 1 is a traceback, which pytest sees as an exception


def bounded_settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, (architecture, config, sizes) in MODELS.items():
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(getattr(transformers, config)(**sizes))
        model.save_pretrained(place / name)
        linear = next(name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear))
        out, inner = model.get_submodule(linear).weight.shape
        peft_adapter(place / f"{name}-adapter", {linear: (torch.ones(1, inner).numpy(), torch.ones(out, 1).numpy())})
    return place


def run_commands(models: Path, name: str, folder: Path, *, all_of_them: bool) -> None:
    adapter, out = models / f"{name}-adapter", folder.parent
    assert call("inspect", folder) in OUTCOMES
    assert call("merge", folder, adapter, "-o", out / "m", "--dry-run") in OUTCOMES
    assert call("torchscript", folder, "-o", out / "o.pt", "--no-verify", "--overwrite") in OUTCOMES
    if all_of_them:
        assert call("verify", folder, "--model", folder) in OUTCOMES
        assert call("onnx", folder, "-a", adapter, "-o", out / "o.onnx", "--no-verify", "--overwrite") in OUTCOMES


def changes_of(fields: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from([*fields, *MORE_FIELDS]), VALUES, min_size=1, max_size=2)


def changed_configs(config: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The config with other values in it, or in one of the configs of its parts."""
    parts = [name for name, value in config.items() if name.endswith("_config") and isinstance(value, dict)]
    whole = changes_of(sorted(config)).map(lambda change: config | change)
    inner = [
        changes_of(sorted(config[part])).map(lambda change, part=part: config | {part: config[part] | change})
        for part in parts
    ]
    return st.one_of(whole, *inner)


def fuzz(models: Path, name: str, place: Path, examples: int, *, all_of_them: bool) -> None:
    config = json.loads((models / name / "config.json").read_text())
    shutil.copytree(models / name, place / name)

    @bounded_settings(examples)
    @given(changed_configs(config))
    def check(changed: dict[str, Any]) -> None:
        (place / name / "config.json").write_text(json.dumps(changed))
        run_commands(models, name, place / name, all_of_them=all_of_them)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_changed_configs_are_loaded_or_refused(models: Path, tmp_path: Path, name: str) -> None:
    run_commands(models, name, models / name, all_of_them=True)  # as it is
    fuzz(models, name, tmp_path, FEW, all_of_them=False)


def test_a_size_that_fits_no_weight_beside_a_strange_dtype_is_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fuzz found it: building the model again, for a list of other shapes, failed."""
    shutil.copytree(models / "llama", tmp_path / "llama")
    config = json.loads((tmp_path / "llama/config.json").read_text())
    (tmp_path / "llama/config.json").write_text(json.dumps(config | {"dtype": [2, 2], "intermediate_size": 17}))
    assert call("torchscript", tmp_path / "llama", "-o", tmp_path / "o.pt") == 3
    assert "transformers cannot load it as LlamaForCausalLM" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_many_changed_configs_are_loaded_or_refused(models: Path, tmp_path: Path, name: str) -> None:
    fuzz(models, name, tmp_path, MANY, all_of_them=True)


RECORD = "lora_export.json"
DAMAGED = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 300, b"1" * 5000, b'{"inputs":["a","a"]}', b'"x"']


def with_record(good: Path, to: Path, record: bytes) -> Path:
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as archive:
        for info in source.infolist():
            content = record if info.filename.endswith(RECORD) else source.read(info)
            archive.writestr(zipfile.ZipInfo(info.filename), content)
    return to


def fuzz_record(place: Path, examples: int) -> None:
    model = f"{FACTORIES}:spotter"
    good = place / "good.pt"
    assert call("torchscript", model, "-o", good, "--no-verify") == 0
    with zipfile.ZipFile(good) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(RECORD))
        record = json.loads(archive.read(name))
    assert call("verify", with_record(good, place / "same.pt", json.dumps(record).encode()), "--model", model) == 0
    for damaged in DAMAGED[:examples]:
        assert call("verify", with_record(good, place / "bad.pt", damaged), "--model", model) in OUTCOMES

    @bounded_settings(examples)
    @given(st.dictionaries(st.sampled_from([*record, "notes", "layout"]), VALUES, min_size=1, max_size=2))
    def check(change: dict[str, Any]) -> None:
        changed = with_record(good, place / "changed.pt", json.dumps(record | change).encode())
        assert call("verify", changed, "--model", model) in OUTCOMES

    check()


@pytest.mark.slow
def test_damaged_records_of_torchscript_are_read_or_refused(tmp_path: Path) -> None:
    fuzz_record(tmp_path, 4)


@pytest.mark.slow
def test_many_damaged_records_of_torchscript_are_read_or_refused(tmp_path: Path) -> None:
    fuzz_record(tmp_path, 80)
