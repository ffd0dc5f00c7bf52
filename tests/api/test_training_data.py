"""Data, read and encoded for the model that is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers

from lora_export.api.training_data import CheckedRows, encoded_data, read_training_data
from lora_export.errors import InputRefused, WrongUsage
from lora_export.models.load import load_model
from lora_export.options.train import TrainOptions
from lora_export.training.batches import ArrayData, EncodedRows, ReadyBatches
from lora_export.training.token_rows import CausalRows, MaskedRows
from support.api import MODEL
from support.small_models import ENCODER_DECODER, MODELS, TEXT, small_model, words_tokenizer

if TYPE_CHECKING:
    from support.stores import Stored


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: words_tokenizer(small_model(name, folder / name)) for name in ("llama", "bert", "t5")}


def rows(folder: Path, *contents: dict[str, Any]) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in contents))
    return folder / "a.jsonl"


def encoded(base: Path | str, path: Path, **options: Any) -> Any:
    data = read_training_data(path)
    loaded = load_model(str(base), head=data.head, may_add=True)
    settings = {"holdout": 0.5, "max_length": 16, **options}
    return encoded_data(loaded, data, TrainOptions(base, "data", "out", **settings))


TEXTS = [{"text": "a very good film"}, {"text": "a bad film"}]


@pytest.mark.parametrize("kind", ["a.jsonl", "texts", "arrays.npz"])
def test_data_in_a_store_are_copied_to_the_disk(tmp_path: Path, stored: Stored, kind: str) -> None:
    path = rows(tmp_path, *TEXTS).with_name(kind)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/one.txt").write_text("a very good film")
    np.savez(tmp_path / "arrays.npz", x=np.ones((2, 3), np.float32), labels=np.arange(2))
    stored.put("", tmp_path)
    lines: list[str] = []
    read, expected = read_training_data(str(stored / kind), on_message=lines.append), read_training_data(path)
    assert (read.sha256, str(read)) == (expected.sha256, str(expected))
    assert [line.partition(",")[0] for line in lines] == [f"{stored / kind}: 1 file"]
    with pytest.raises(InputRefused, match=f"there is no data at {stored.address}/none"):
        read_training_data(str(stored / "none"))


def test_texts_are_continued_by_a_causal_model(bases: dict[str, Path], tmp_path: Path) -> None:
    data, held_out = encoded(bases["llama"], rows(tmp_path, *TEXTS))
    assert isinstance(data, CausalRows) and (len(data), len(held_out)) == (1, 1)
    assert isinstance(encoded(bases["llama"], rows(tmp_path, *TEXTS), packing=True)[0], CausalRows)
    assert encoded(bases["llama"], rows(tmp_path, *TEXTS), holdout=0)[1] is None


def test_a_model_without_a_head_continues_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match=r"is a BertModel: rows of language-modelling need a causal .* or a masked"):
        encoded(bases["bert"], rows(tmp_path, *TEXTS))
    with pytest.raises(InputRefused, match="has no tokenizer: it is no Hugging Face folder"):
        encoded(MODEL, rows(tmp_path, *TEXTS))


ENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "BertLMHeadModel": (transformers.BertConfig, TEXT),
    "XLMWithLMHeadModel": (transformers.XLMConfig, {"vocab_size": 60, "emb_dim": 16, "n_layers": 2, "n_heads": 2}),
    "XLNetLMHeadModel": (transformers.XLNetConfig, {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 2}),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_model_that_reads_the_next_token_is_refused(name: str, tmp_path: Path) -> None:
    config, sizes = ENCODERS[name]
    torch.manual_seed(0)
    getattr(transformers, name)(config(**sizes)).save_pretrained(tmp_path / "base")
    with pytest.raises(InputRefused, match=f"{name} reads the tokens behind the one that it predicts from"):
        encoded(words_tokenizer(tmp_path / "base"), rows(tmp_path, *TEXTS))


def test_texts_that_are_cut_or_left_out_are_a_note(bases: dict[str, Path], tmp_path: Path) -> None:
    prompts = ("a", "a bad film", "very " * 20, "a very good film " * 4)
    path, lines = rows(tmp_path, *({"prompt": prompt, "completion": "good"} for prompt in prompts)), []
    assert len(encoded(bases["llama"], path, holdout=0, max_length=4, on_message=lines.append)[0]) == 2
    assert [line for line in lines if "cut" in line] == [
        "note: of 4 texts, 3 are cut (max_length=4), and 2 are left out: nothing of what remains of them is predicted"
    ]
    lines.clear()
    encoded(bases["llama"], path, holdout=0, max_length=40, on_message=lines.append)
    assert not lines


def test_a_masked_model_needs_a_mask(bases: dict[str, Path], tmp_path: Path) -> None:
    import transformers as hf

    base = words_tokenizer(tmp_path / "masked")
    hf.BertForMaskedLM(hf.BertConfig.from_pretrained(bases["bert"])).save_pretrained(base)
    with pytest.raises(InputRefused, match="has no mask token"):
        encoded(base, rows(tmp_path, *TEXTS))
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    tokenizer.mask_token = "the"
    tokenizer.save_pretrained(base)
    assert isinstance(encoded(base, rows(tmp_path, *TEXTS))[0], MaskedRows)
    with pytest.raises(WrongUsage, match="a masked one reads in both directions"):
        encoded(base, rows(tmp_path, *TEXTS), packing=True)


def test_prompts_go_to_the_encoder_where_there_is_one(bases: dict[str, Path], tmp_path: Path) -> None:
    path = rows(tmp_path, *[{"prompt": "a film", "completion": "good"}] * 2)
    data, _ = encoded(bases["t5"], path)
    assert set(data.batch([0]).inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert isinstance(encoded(bases["llama"], path)[0], CausalRows)
    with pytest.raises(WrongUsage, match="has an encoder"):
        encoded(bases["t5"], path, packing=True)


DECODERS: dict[str, Callable[[], Any]] = {  # whose own losses do not shift the labels
    "half of a bart": lambda: transformers.BartForCausalLM(transformers.BartConfig(**ENCODER_DECODER, vocab_size=60)),
    "xlm": lambda: transformers.XLMWithLMHeadModel(
        transformers.XLMConfig(vocab_size=60, emb_dim=16, n_layers=1, n_heads=2)
    ),
}


@pytest.mark.parametrize("name", ["llama", "t5", "mbart", "whisper", "llava", "bert", *DECODERS])
def test_arrays_of_labels_are_those_that_transformers_takes(name: str, tmp_path: Path) -> None:
    """Of a language model, mostly the tokens themselves: each is predicted from those before it."""
    torch.manual_seed(0)
    base = tmp_path / "base"
    if name in DECODERS:
        DECODERS[name]().save_pretrained(base)
    elif name == "bert":
        transformers.BertForMaskedLM(MODELS["bert"][1]()).save_pretrained(base)
    else:
        small_model(name, base)
    module: Any = load_model(str(base)).module
    ids, lengths = np.arange(36).reshape(4, 9) % 23 + 3, np.array([[9], [4], [7], [1]])
    labels = np.where(np.arange(9) < lengths, ids, -100)
    inputs = {"input_ids": ids} if name != "whisper" else {"input_features": np.ones((4, 8, 40), np.float32)}
    np.savez(tmp_path / "a.npz", **inputs, labels=labels)
    data, _ = encoded(base, tmp_path / "a.npz", holdout=0.0)
    batch = data.batch(range(4))
    with torch.no_grad():
        found = data.loss.total(module(**batch.inputs), batch) / data.loss.count(batch.labels)
        given = {name: torch.from_numpy(values) for name, values in {**inputs, "labels": labels}.items()}
        expected = module(**given)
    torch.testing.assert_close(found, expected.loss, atol=1e-6, rtol=1e-6)


def test_labels_decide_the_head(bases: dict[str, Path], tmp_path: Path) -> None:
    for label, ending, problem in (
        (["x", "y"] * 2, "ForSequenceClassification", ""),
        ([["x"], ["y"]], "ForSequenceClassification", "multi_label_classification"),
        ([0.5, 1.5], "ForSequenceClassification", "regression"),
    ):
        found = read_training_data(rows(tmp_path, *({"text": "a", "label": one} for one in label)))
        assert found.head is not None and (found.head.ending, found.head.problem_type) == (ending, problem)
        assert found.peft_task == "SEQ_CLS"
        data, _ = encoded(bases["bert"], tmp_path / "a.jsonl")
        assert isinstance(data, EncodedRows)
    tags = read_training_data(rows(tmp_path, {"tokens": ["a"], "tags": ["x"]}, {"tokens": ["a"], "tags": ["y"]}))
    assert tags.head is not None and (tags.head.ending, tags.peft_task) == ("ForTokenClassification", "TOKEN_CLS")
    assert read_training_data(rows(tmp_path, *TEXTS)).head is None


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["y", "x"], ["x", "y"], ("y", "x")),
        (["y", "z", "x"], ["x", "y"], ("y", "z", "x")),  # the data may lack some
        (["y", "z", "x"], [["x"], ["y", "x"]], ("y", "z", "x")),
        (["1", "0"], [0, 1], (1, 0)),
        (["a", "b"], ["x", "y"], ("x", "y")),
        (["2", "1", "0"], [0, 1], (0, 1)),
        (["y", "y"], ["x", "y"], ("x", "y")),
    ],
)
def test_a_classifier_keeps_the_order_of_its_labels(
    names: list[str], labels: list[Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    base = {"architectures": ["BertForSequenceClassification"], "id2label": dict(enumerate(names))}
    (tmp_path / "config.json").write_text(json.dumps(base))
    read = read_training_data(rows(tmp_path, *({"text": "a", "label": label} for label in labels)))
    found, _ = read.for_base(tmp_path)
    assert isinstance(found.content, CheckedRows) and found.content.survey.classes == expected
    assert found.head is not None and found.head.labels == tuple(map(str, expected))
    assert found.groups.tolist() == read.groups.tolist()  # the split into training and held-out rows stays
    assert read.for_base("net.py:make") == (read, "")


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (["no", "yes"], "note: the base's labels no, yes are called bad, good from now on, as in the data"),
        (["bad", "good"], ""),
        (["LABEL_0", "LABEL_1"], ""),
    ],
)
def test_labels_that_get_other_names_are_a_note(names: list[str], note: str, tmp_path: Path) -> None:
    base = {"architectures": ["BertForSequenceClassification"], "id2label": dict(enumerate(names))}
    (tmp_path / "config.json").write_text(json.dumps(base))
    read = read_training_data(rows(tmp_path, *({"text": "a", "label": label} for label in ("good", "bad"))))
    assert read.for_base(tmp_path)[1] == note


def test_texts_end_where_the_models_positions_end(bases: dict[str, Path], tmp_path: Path) -> None:
    data, _ = encoded(
        bases["bert"], rows(tmp_path, *({"text": "a " * 200, "label": label} for label in "xyxy")), max_length=500
    )
    assert data.batch([0]).inputs["input_ids"].shape == (1, 64)


@pytest.mark.parametrize(
    ("settings", "notes"), [({"ngram": 2}, 1), ({"ngram": 1}, 0), ({"disable_ngram_loss": True}, 0)]
)
def test_a_loss_that_is_not_the_models_own_is_a_note(settings: dict[str, Any], notes: int, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_ffn_dim": 16}
    heads = {"decoder_ffn_dim": 16, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2}
    config = transformers.ProphetNetConfig(vocab_size=60, **sizes, **heads, **settings)
    transformers.ProphetNetForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    ids = np.arange(36).reshape(4, 9) % 23 + 3
    np.savez(tmp_path / "a.npz", input_ids=ids, labels=ids)
    messages: list[str] = []
    encoded(tmp_path / "base", tmp_path / "a.npz", on_message=messages.append)
    assert sum("is trained by the next token alone" in message for message in messages) == notes


@pytest.mark.parametrize(("asked", "length", "notes"), [(40, 40, 0), (500, 64, 1)])
def test_texts_are_as_long_as_was_asked_for(
    bases: dict[str, Path], tmp_path: Path, asked: int, length: int, notes: int
) -> None:
    """The tokenizer's own limit does not count; the model's does, and a note says so."""
    base = tmp_path / "base"
    shutil.copytree(bases["bert"], base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 8}))
    found: list[str] = []
    data, _ = encoded(
        base,
        rows(tmp_path, *({"text": "a " * 200, "label": label} for label in "xyxy")),
        max_length=asked,
        on_message=found.append,
    )
    assert data.batch([0]).inputs["input_ids"].shape == (1, length)
    assert [note for note in found if "texts are cut to 64 tokens, all that the model takes" in note] == found
    assert len(found) == notes


def test_a_padding_token_is_needed_by_classifiers_alone(bases: dict[str, Path], tmp_path: Path) -> None:
    base = words_tokenizer(small_model("llama", tmp_path / "base"), pad=None)
    assert len(encoded(base, rows(tmp_path, *TEXTS))[0])
    with pytest.raises(InputRefused, match="the tokenizer has no padding token"):
        encoded(base, rows(tmp_path, *({"text": "a", "label": label} for label in "xyxy")))


def test_a_model_without_a_table_of_tokens_is_trained(tmp_path: Path) -> None:
    """Canine hashes characters, and transformers' `get_input_embeddings` fails on it."""
    torch.manual_seed(0)
    config = transformers.CanineConfig(**TEXT, num_hash_functions=2, num_hash_buckets=8, downsampling_rate=2)
    transformers.CanineForTokenClassification(config).save_pretrained(tmp_path / "base")
    words_tokenizer(tmp_path / "base")
    data, _ = encoded(tmp_path / "base", rows(tmp_path, *({"tokens": ["a", "bad"], "tags": ["x", "y"]},) * 2))
    assert data.batch([0]).labels.tolist() == [[0, 1, -100]]


def test_arrays_and_own_batches_are_split_too(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(8.0), labels=np.arange(8) % 2)
    data, held_out = encoded(MODEL, tmp_path / "a.npz", holdout=0.25)
    assert isinstance(data, ArrayData) and data.labels.bincount().tolist() == [3, 3]
    assert sorted([*data.inputs["x"].tolist(), *held_out.inputs["x"].tolist()]) == list(range(8))
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef make():\n"
        "    return [({'x': torch.ones(2)}, n) for n in range(4)], lambda out, n: out.sum()\n"
    )
    found = read_training_data(f"{tmp_path}/mine.py:make")
    assert (str(found), found.head, found.peft_task, len(found.sha256)) == ("4 batches", None, None, 64)
    ready, held = encoded_data(load_model(MODEL), found, TrainOptions(MODEL, "data", "out", holdout=0.25, max_length=1))
    assert isinstance(ready, ReadyBatches) and held is not None and (len(ready), len(held)) == (3, 1)
    assert torch.equal(ready.batch([0]).inputs["x"], torch.ones(2))
    with pytest.raises(WrongUsage, match="packing= is for texts"):
        encoded(MODEL, tmp_path / "a.npz", packing=True)
