"""Classifiers of texts through the command line: a head for every decoder and encoder, and labels that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import peft
import pytest
import torch
import transformers

from support.api import MODEL
from support.cli import Capture, answer, call
from support.small_models import MODELS, small_model, words_tokenizer


def reviews(path: Path, classes: int = 2) -> Path:
    """Short texts of different lengths, each with one of so many labels."""
    words = ["bad", "good", "film"]
    lines = [
        {"text": "very " * (number % 4) + words[number % classes] + " film", "label": words[number % classes]}
        for number in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_decoder_without_padding_id_is_trained_merged_and_proven(name: str, tmp_path: Path, capsys: Capture) -> None:
    base = words_tokenizer(small_model(name, tmp_path / "base"))
    assert json.loads((base / "config.json").read_text()).get("pad_token_id") is None
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert call("train", base, "--data", reviews(tmp_path / "reviews.jsonl"), "-o", adapter, "--epochs", "2") == 0
    assert call("merge", base, adapter, "-o", merged) == 0
    for folder in (adapter, merged):
        assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 0
    code, verdict = answer(capsys, "verify", merged, "--model", base, "-a", adapter)
    assert (code, verdict["outcome"]) == (0, "same")
    code, document = answer(capsys, "onnx", base, "-a", adapter, "-o", tmp_path / "model.onnx")
    assert (code, document["proof"]["outcome"]) == (0, "same")


def test_a_tokenizer_without_padding_is_refused_before_training(tmp_path: Path, capsys: Capture) -> None:
    base = words_tokenizer(small_model("llama", tmp_path / "base"), pad=None)
    data = reviews(tmp_path / "reviews.jsonl")
    code, document = answer(capsys, "train", base, "--data", data, "-o", tmp_path / "adapter")
    assert code == 3 and document["error"].startswith("the tokenizer has no padding token")
    assert "tokenizer.pad_token = tokenizer.eos_token" in document["error"] and "\n" not in document["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "reviews.jsonl"]


def test_a_padding_token_without_a_row_is_refused(tmp_path: Path, capsys: Capture) -> None:
    base = small_model("llama", tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(words_tokenizer(tmp_path / "tokenizer"))
    tokenizer.add_tokens([f"word{number}" for number in range(60)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    code, document = answer(
        capsys, "train", base, "--data", reviews(tmp_path / "reviews.jsonl"), "-o", tmp_path / "adapter"
    )
    assert code == 3 and "padding token has the id 69, and the model has rows for 60 tokens" in document["error"]


@pytest.fixture
def three_labels(tmp_path: Path) -> Path:
    """A classifier of three labels."""
    torch.manual_seed(0)
    config = MODELS["bert"][1]()
    config.num_labels = 3
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    return words_tokenizer(tmp_path / "base")


def test_another_number_of_labels_is_refused_with_both(three_labels: Path, tmp_path: Path, capsys: Capture) -> None:
    data = reviews(tmp_path / "reviews.jsonl", 2)
    code, document = answer(capsys, "train", three_labels, "--data", data, "-o", tmp_path / "adapter")
    assert code == 3
    assert "has a classifier of 3 labels, and the data has 2 (bad, good)" in document["error"]
    assert "save_pretrained(FOLDER)" in document["error"]
    data = reviews(tmp_path / "reviews.jsonl", 3)
    assert call("train", three_labels, "--data", data, "-o", tmp_path / "adapter", "--epochs", "1") == 0


def test_a_head_of_another_number_of_labels_is_refused_by_name(
    three_labels: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = MODELS["bert"][1]()
    model = transformers.BertForSequenceClassification(config)
    options = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(model, options).save_pretrained(tmp_path / "adapter")
    code, document = answer(capsys, "onnx", three_labels, "-a", tmp_path / "adapter", "-o", tmp_path / "out.onnx")
    assert code == 3
    assert "classifier.weight is (3, 16) in the folder, and (2, 16) by the config" in document["error"]


def test_examples_that_the_model_cannot_take_are_the_models_failure(tmp_path: Path, capsys: Capture) -> None:
    rows = np.ones((24, 5, 7), np.float32)  # its layer takes 8 numbers
    np.savez(tmp_path / "a.npz", rows=rows, weights=np.ones((24, 5), np.float32), labels=np.ones((24, 5, 8)))
    code, document = answer(capsys, "train", MODEL, "--data", tmp_path / "a.npz", "-o", tmp_path / "adapter")
    assert code == 8 and "itself fails on the examples (rows, weights)" in document["error"]
    assert not (tmp_path / "adapter").exists()


# --- heads of their own, chosen by row ---

WITH_HEADS = {
    "bert": ("BertForSequenceClassification", ["query", "value"]),
    "roberta": ("RobertaForSequenceClassification", ["query", "value"]),  # a head of two layers
    "distilbert": ("DistilBertForSequenceClassification", ["q_lin", "v_lin"]),
    "llama": ("LlamaForSequenceClassification", ["q_proj", "v_proj"]),  # logits of the last token, and no bias
    "tokens": ("BertForTokenClassification", ["query", "value"]),
}


def a_classifier(name: str, folder: Path, labels: int) -> Path:
    torch.manual_seed(0)
    config = MODELS["bert" if name == "tokens" else name][1]()
    config.num_labels, config.pad_token_id = labels, 0
    getattr(transformers, WITH_HEADS[name][0])(config).save_pretrained(folder)
    return folder


def loaded_classifier(name: str, base: Path, labels: int, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    cls = getattr(transformers, WITH_HEADS[name][0])
    model = cls.from_pretrained(base, num_labels=labels, ignore_mismatched_sizes=True)
    return model.eval()


def with_own_head(name: str, base: Path, folder: Path, labels: int, seed: int) -> Path:
    """An adapter with a head of its own, as PEFT saves it."""
    model = loaded_classifier(name, base, labels, seed)
    options = peft.LoraConfig(
        task_type="TOKEN_CLS" if name == "tokens" else "SEQ_CLS", target_modules=WITH_HEADS[name][1], r=4,
        init_lora_weights=False,
    )  # fmt: skip
    made = peft.get_peft_model(model, options)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "modules_to_save" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    made.save_pretrained(folder)
    return folder


def some_texts(length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (4, length), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def fed(graph: onnxruntime.InferenceSession, texts: dict[str, torch.Tensor], ids: list[int]) -> Any:
    """The logits of a graph whose rows have these adapters."""
    names = {value.name for value in graph.get_inputs()}
    feeds = {name: value.numpy() for name, value in texts.items()} | {"adapter_ids": np.array(ids)}
    if "token_type_ids" in names:
        feeds["token_type_ids"] = np.zeros_like(feeds["input_ids"])
    return graph.run(["logits"], feeds)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(name, marks=pytest.mark.slow) for name in list(WITH_HEADS)[1:])]
)
def test_rows_have_the_heads_and_the_labels_of_their_adapters(name: str, tmp_path: Path, capsys: Capture) -> None:
    base = a_classifier(name, tmp_path / "base", 3)
    counts = {"base": 3, "fr": 2, "de": 5}
    adapters = {
        key: with_own_head(name, base, tmp_path / key, counts[key], seed) for seed, key in enumerate(("fr", "de"), 1)
    }
    words = [word for key, path in adapters.items() for word in ("-a", f"{key}={path}")]
    graph = tmp_path / "rows.onnx"
    capsys.readouterr()
    code, found = answer(capsys, "onnx", base, *words, "--lora", "rows", "-o", graph)
    assert (code, found["proof"]["outcome"], found["mixed"]["outcome"]) == (0, "same", "same")
    assert {key: proof["outcome"] for key, proof in found["adapters"].items()} == {"fr": "same", "de": "same"}
    session = onnxruntime.InferenceSession(graph)
    record = json.loads(session.get_modelmeta().custom_metadata_map["lora_export.rows"])
    assert record == {"adapters": ["fr", "de"], "labels": {"logits": [3, 2, 5]}, "absent_label": -10000.0}
    texts, order = some_texts(), ["de", "base", "fr", "de"]
    logits = fed(session, texts, [[*counts].index(key) for key in order])
    assert logits.shape[-1] == 5
    for row, key in enumerate(order):
        alone = loaded_classifier(name, base, counts[key])
        if key != "base":
            alone = peft.PeftModel.from_pretrained(alone, str(adapters[key])).eval()
        with torch.no_grad():
            expected = alone(**texts).logits[row].numpy()
        np.testing.assert_allclose(logits[row][..., : counts[key]], expected, rtol=1e-4, atol=1e-5)
        assert (logits[row][..., counts[key] :] == -10000).all()
    code, verdict = answer(capsys, "verify", graph, "--model", base, *words)
    assert (code, verdict["outcome"]) == (0, "same")
    code, verdict = answer(capsys, "verify", graph, "--model", base, "-a", adapters["de"], "--adapter-id", "2")
    assert (code, verdict["outcome"]) == (0, "same")
    code, verdict = answer(capsys, "verify", graph, "--model", base, "-a", adapters["de"], "--adapter-id", "1")
    assert (code, verdict["outcome"]) == (4, "different")


@pytest.fixture(scope="module")
def equal_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three labels, two adapters with heads of as many, and a graph of the classifier."""
    folder = tmp_path_factory.mktemp("heads")
    base = a_classifier("bert", folder / "base", 3)
    for seed, key in enumerate(("fr", "de"), 1):
        with_own_head("bert", base, folder / key, 3, seed)
    with_own_head("bert", base, folder / "more", 4, 3)
    assert call("onnx", base, "-o", folder / "base.onnx", "--no-verify") == 0
    return folder


@pytest.mark.slow
def test_heads_of_equal_labels_are_what_peft_chooses_by_row(equal_heads: Path, tmp_path: Path) -> None:
    words = ("-a", equal_heads / "fr", "-a", equal_heads / "de", "--lora", "rows", "-o", tmp_path / "rows.onnx")
    assert call("onnx", equal_heads / "base.onnx", *words) == 0  # proven against the graph that it was
    model = peft.PeftModel.from_pretrained(
        loaded_classifier("bert", equal_heads / "base", 3), str(equal_heads / "fr"), adapter_name="fr"
    )
    model.load_adapter(str(equal_heads / "de"), "de")
    texts = some_texts()
    with torch.no_grad():
        expected = model.eval()(**texts, adapter_names=["de", "__base__", "fr", "de"]).logits.numpy()
    logits = fed(onnxruntime.InferenceSession(tmp_path / "rows.onnx"), texts, [2, 0, 1, 2])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(logits[0] - logits[3]) > 1e-3 and np.abs(logits - expected[[1] * 4]).max() > 1e-2


@pytest.mark.slow
def test_other_labels_than_the_graph_s_need_the_model(equal_heads: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("-a", equal_heads / "more", "--lora", "rows", "-o", tmp_path / "rows.onnx")
    code, found = answer(capsys, "onnx", equal_heads / "base.onnx", *words)
    assert code == 3 and "classifier.weight: 4 labels, the graph's has 3" in found["error"]
    assert "--model MODEL" in found["error"] and not list(tmp_path.iterdir())
    assert call("onnx", equal_heads / "base.onnx", *words, "--model", equal_heads / "base") == 0


@pytest.mark.slow
def test_labels_that_should_be_absent_and_are_not_are_different(
    equal_heads: Path, tmp_path: Path, capsys: Capture
) -> None:
    words, graph = ("-a", equal_heads / "more"), tmp_path / "rows.onnx"
    assert call("onnx", equal_heads / "base", *words, "--lora", "rows", "-o", graph) == 0
    model = onnx.load(graph)
    (absent,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".absent")]
    absent.CopyFrom(onnx.numpy_helper.from_array(np.float32(0), absent.name))
    onnx.save(model, graph)
    capsys.readouterr()
    code, verdict = answer(capsys, "verify", graph, "--model", equal_heads / "base", *words)
    assert (code, verdict["outcome"]) == (4, "different")


@pytest.mark.slow
def test_a_head_that_the_base_lacks_is_refused_with_the_way_out(
    equal_heads: Path, tmp_path: Path, capsys: Capture
) -> None:
    transformers.AutoModel.from_pretrained(equal_heads / "base").save_pretrained(tmp_path / "bare")
    words = ("-a", equal_heads / "fr", "--lora", "rows", "-o", tmp_path / "rows.onnx")
    code, found = answer(capsys, "onnx", tmp_path / "bare", *words)
    assert code == 3 and "fr, classifier.weight" in found["error"] and "--only-head" in found["error"]
    assert not (tmp_path / "rows.onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("labels", [3, 4])
def test_heads_by_row_stay_floats_in_a_quantised_graph(
    labels: int, equal_heads: Path, tmp_path: Path, capsys: Capture
) -> None:
    words, graph = ("-a", equal_heads / ("fr" if labels == 3 else "more")), tmp_path / "rows.onnx"
    assert call("onnx", equal_heads / "base", *words, "--lora", "rows", "--quantize", "int8", "-o", graph) == 0
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(graph).graph.initializer}
    assert stored["classifier.modules_to_save.weight"] == onnx.TensorProto.FLOAT
    capsys.readouterr()
    code, verdict = answer(capsys, "verify", graph, "--model", equal_heads / "base", *words)
    assert (code, verdict["outcome"]) == (0, "same")
    code, verdict = answer(capsys, "verify", graph, "--model", equal_heads / "base", "-a", equal_heads / "de")
    assert code in (4, 5)
