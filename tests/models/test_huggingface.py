"""Models in Hugging Face folders."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import transformers as hf
from safetensors.torch import save_file

from lora_export import layers
from lora_export.errors import InputRefused
from lora_export.lora import Adapter, LoraPair
from lora_export.models.huggingface import load_tokenizer, with_numbers, without_unread_pooler
from lora_export.models.load import load_model
from lora_export.weights.task_head import TaskHead
from support import tiny_models
from support.generators import ENCODER_DECODERS
from support.small_models import small_model


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_labels": 2}
    tiny_models.tiny_bert(hf.BertModel, **sizes).save_pretrained(folder)
    return folder


def test_ids_are_in_range_and_masks_have_padding(tiny_bert: Path) -> None:
    loaded = load_model(str(tiny_bert))
    for seed in range(5):
        made = loaded.inputs({"batch": 4, "sequence": 13}, seed=seed)
        assert (made["attention_mask"].sum(1) >= 1).all()
        assert (made["attention_mask"][1::2, -1] == 0).all()
    assert list(made) == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(value.shape == (4, 13) for value in made.values())
    assert made["input_ids"].min() >= 0
    assert made["input_ids"].max() < 50
    with torch.no_grad():
        assert loaded.module(**made).last_hidden_state.shape == (4, 13, 16)


def test_labels_add_a_head_of_their_number(tiny_bert: Path) -> None:
    loaded = load_model(str(tiny_bert), head=TaskHead("ForSequenceClassification", ("cat", "dog", "eel")))
    assert type(loaded.module).__name__ == "BertForSequenceClassification"
    assert loaded.module.config.id2label == {0: "cat", 1: "dog", 2: "eel"}
    assert loaded.module.classifier.out_features == 3


@pytest.mark.fault(26)
def test_code_in_a_models_folder_is_not_run(tiny_bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in tiny_bert.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputRefused, match="auto_map"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.fault(25)
def test_a_pickle_in_a_models_folder_is_not_opened(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "bert")
    for name in ("pytorch_model.bin", "training_args.bin"):
        (tmp_path / "bert" / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    one, other = load_model(str(tiny_bert)), load_model(str(tmp_path / "bert"))
    assert one.fingerprint() == other.fingerprint()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"), [({"model_type": "no-such-model"}, "does not know"), ({"architectures": ["Nope"]}, "Nope")]
)
def test_an_unknown_architecture_is_refused_by_name(
    tiny_bert: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    for path in tiny_bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputRefused, match=message):
        load_model(str(tmp_path))


def changed_config(bert: Path, folder: Path, **change: object) -> str:
    """A copy of the model with other values in its config."""
    shutil.copytree(bert, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    return str(folder)


@pytest.mark.fault(26)
def test_class_that_is_no_model_asks_nothing_and_runs_nothing(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = changed_config(tiny_bert, tmp_path, architectures=["AutoTokenizer"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(InputRefused, match="AutoTokenizer is no model of transformers"):
        load_model(source)
    base = load_model(changed_config(tiny_bert, tmp_path, architectures=["BertModel"]))
    assert type(load_tokenizer(base)).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_other_weights_than_the_models_are_not_loaded(tiny_bert: Path, tmp_path: Path) -> None:
    source = changed_config(tiny_bert, tmp_path, transformers_weights="other.safetensors")
    with pytest.raises(InputRefused, match=r"transformers_weights: 'other\.safetensors'"):
        load_model(source)


def test_adapter_beside_the_model_is_not_attached(tiny_bert: Path, tmp_path: Path) -> None:
    source = changed_config(tiny_bert, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputRefused, match="transformers attaches this adapter"):
        load_model(source)


def test_more_layers_than_tensors_are_refused_before_they_are_built(tiny_bert: Path, tmp_path: Path) -> None:
    for change in ({"num_hidden_layers": 10**6}, {"encoder": {"num_layers": 10**6}}):
        with pytest.raises(InputRefused, match=r"layers is 1,000,000, and the folder has \d+ tensors"):
            load_model(changed_config(tiny_bert, tmp_path, **change))


def test_tensors_that_the_configs_model_lacks_are_noted(tiny_bert: Path, tmp_path: Path) -> None:
    assert load_model(str(tiny_bert)).notes == ()
    (note,) = load_model(changed_config(tiny_bert, tmp_path, num_hidden_layers=0)).notes
    assert note.startswith(
        "the model leaves out 16 tensors of the folder, which BertModel does not have: encoder.layer.0."
    )


def test_far_larger_model_than_its_folder_takes_no_memory(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)  # nothing is loaded
    for field in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "type_vocab_size"):
        with pytest.raises(
            InputRefused, match=r"describes a Bert\w+ of [\d,]{10,} numbers, and the folder has [\d,]{5,7}\n"
        ):
            load_model(changed_config(tiny_bert, tmp_path, **{field: 8 * 10**6}))
    with pytest.raises(InputRefused, match=r"num_local_experts is 1,000,000, and the folder has \d+ tensors"):
        load_model(changed_config(tiny_bert, tmp_path, num_local_experts=10**6))
    with pytest.raises(InputRefused, match=r"depths is 1,000,002, and the folder has \d+ tensors"):
        load_model(changed_config(tiny_bert, tmp_path, depths=[2, 10**6]))


@pytest.mark.parametrize("count", [10**6, 10**30])
def test_labels_without_end_are_refused(tiny_bert: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(InputRefused, match=r"num_labels is 1[,0]+; at most 250,000 are supported"):
        load_model(changed_config(tiny_bert, tmp_path, num_labels=count))


@pytest.mark.parametrize("positions", [16, 5])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "CLIP", "Bart"])
def test_texts_are_no_longer_than_the_models_positions(tmp_path: Path, kind: str, positions: int) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": positions, "eos_token_id": 2, "bos_token_id": 0}
    if kind == "CLIP":
        vision = {**sizes, "image_size": 16, "patch_size": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        transformers.CLIPModel(config).save_pretrained(tmp_path)
    elif kind == "Bart":
        parts = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
        config = transformers.BartConfig(d_model=16, vocab_size=64, max_position_embeddings=positions, **parts)
        transformers.BartForSequenceClassification(config).save_pretrained(tmp_path)
    else:
        config = getattr(transformers, f"{kind}Config")(**text)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    usable = positions - 2 if kind == "Roberta" else positions
    assert model.example_inputs()["input_ids"].shape[1] == min(usable, 11)
    lengths = [sizes["sequence"] for sizes in model.checked_sizes({})]
    assert lengths == [min(usable, length) for length in (5, 16, 29, 1)]
    for number, sizes in enumerate(model.checked_sizes({})):
        with torch.no_grad():
            model.module(**model.inputs(sizes, seed=number))  # raises for a position that is not there


@pytest.mark.parametrize("value", [None, "a", -1, 0, 1.5, [], {}, True, 10**30, [None]], ids=str)
def test_config_values_of_any_type_load_or_are_refused(tiny_bert: Path, tmp_path: Path, value: object) -> None:
    """Each field of the config in turn has the value. There is no third outcome, such as a traceback."""
    refused = 0
    for field in json.loads((tiny_bert / "config.json").read_text()):
        try:
            load_model(changed_config(tiny_bert, tmp_path, **{field: value}))
        except InputRefused:
            refused += 1
    assert refused > 3


# --- Weights that a folder lacks ---


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DistilBERT whose config names a classifier that its files lack."""
    base = small_model("distilbert", tmp_path_factory.mktemp("headless"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": ["DistilBertForSequenceClassification"]}))
    return base


def head(*names: str) -> Adapter:
    return Adapter("a", "peft", {}, replaced={name: np.ones((2, 16), np.float32) for name in names})


def test_random_weights_are_refused_by_name(headless: Path) -> None:
    with pytest.raises(
        InputRefused, match=r"lacks weights of DistilBertForSequenceClassification\. They would be"
    ) as error:
        load_model(str(headless))
    names = ["classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight"]
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == names


def test_weights_to_be_trained_may_be_new(headless: Path) -> None:
    names = ("classifier.bias", "classifier.weight", "pre_classifier.bias", "pre_classifier.weight")
    assert load_model(str(headless), may_add=True).new_weights == names


def test_adapters_bring_all_new_weights_or_none(headless: Path) -> None:
    names = ("classifier.weight", "classifier.bias")
    with pytest.raises(InputRefused, match=r"and no adapter brings them\. [^:]*:\n  pre_classifier.bias\n  pre_class"):
        load_model(str(headless), [head(*names)])
    load_model(str(headless), [head(*names, "pre_classifier.weight", "pre_classifier.bias")])


def test_data_for_which_no_class_has_a_head_are_refused(tmp_path: Path) -> None:
    base = small_model("bert", tmp_path / "base")
    message = "base is a BertModel, and these data need a BertForImageClassification, which transformers does not have"
    with pytest.raises(InputRefused, match=message):
        load_model(str(base), head=TaskHead("ForImageClassification", ("red", "blue")), may_add=True)


def test_infinite_numbers_are_those_that_transformers_wrote(tmp_path: Path) -> None:
    given = {"time_step_limit": [0.0, math.inf], "nested": {"low": -math.inf}, "name": "a"}
    hf.PretrainedConfig(**given).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "__float__" in str(written)
    read = with_numbers(written)
    assert {name: read[name] for name in given} == given


def test_other_objects_stay_as_they_are() -> None:
    other = {"__float__": 1, "a": [{"__float__": "one"}, {"__float__": "NaN", "b": 2}]}
    assert with_numbers(other) == other
    assert math.isnan(with_numbers([{"__float__": "NaN"}])[0])


OWN = ("encoder.pooler.dense.weight", "encoder.pooler.dense.bias")


@pytest.fixture
def trocr() -> Any:
    torch.manual_seed(0)
    return ENCODER_DECODERS["trocr"]().eval()


def test_pooler_without_weights_is_removed_and_changes_nothing(trocr: Any) -> None:
    given = {"pixel_values": torch.ones(1, 3, 16, 16), "decoder_input_ids": torch.tensor([[1, 5]])}
    with torch.no_grad():
        before = trocr(**given).logits
        assert without_unread_pooler(trocr, (*OWN, "decoder.new.weight")) == ("decoder.new.weight",)
        assert trocr.encoder.pooler is None and torch.equal(trocr(**given).logits, before)


def test_pair_on_the_pooler_is_left_out_with_a_note(trocr: Any) -> None:
    without_unread_pooler(trocr, OWN)
    pair = LoraPair(a=torch.ones(2, 32).numpy(), b=torch.ones(32, 2).numpy(), scale=1.0)
    names = ["encoder.pooler.dense", "encoder.layers.0.mlp.fc1"]
    (found,) = layers.respelled_for(trocr, [Adapter(name="a", format="test", pairs=dict.fromkeys(names, pair))])
    assert list(found.pairs) == names[1:]
    assert found.notes == ("a changes encoder.pooler.dense, which no output of the model reads: left out",)


def test_pooler_with_weights_stays(trocr: Any) -> None:
    for new in ((), OWN[:1]):
        assert without_unread_pooler(trocr, new) == new and trocr.encoder.pooler is not None
    assert without_unread_pooler(torch.nn.Linear(2, 2), OWN) == OWN


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "hidden_size": "x"}, r"cannot read this config \(.*'hidden_size': .*expected int"),
        ({"model_type": "no such model"}, r"does not know this model \("),
        ({"model_type": ["llama"]}, r"does not know this model \("),
    ],
)
def test_a_config_that_transformers_refuses(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match=f"config.json: transformers {message}"):
        load_model(str(tmp_path))


def test_an_error_without_a_message_is_named_by_its_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr(hf.AutoConfig, "for_model", lambda **_: next(iter(())))
    with pytest.raises(InputRefused, match=r"transformers cannot read this config \(StopIteration\)$"):
        load_model(str(tmp_path))
