"""What a PEFT adapter records beside its tensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from lora_export import formats
from lora_export.formats import WriteOptions
from lora_export.formats import peft as writer
from lora_export.formats.peft_records import LAYOUTS, as_peft_computes
from lora_export.lora import Adapter
from support.handmade import peft_adapter
from support.peft_folders import refusal, simple
from support.peft_models import agrees, trained, whole_tensors
from support.small_layers import a_pair, an_adapter
from support.tiny_models import tiny_bert


def test_an_embedding_saved_with_its_pair_is_noted(tmp_path):
    base = tiny_bert()
    model = trained(base, r=2, target_modules=["word_embeddings"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    adapter = formats.load(tmp_path)
    words = "bert.embeddings.word_embeddings"
    assert whole_tensors(adapter) == {f"{words}.weight": base.state_dict()[f"{words}.weight"].tolist()}
    assert agrees(adapter, model)
    assert adapter.notes == (
        f"{words}.weight is saved whole beside the pair that changes it, as PEFT does with embeddings: it replaces the "
        "base's tensor, and the pair is added to it",
    )


@pytest.mark.parametrize(("saved", "is_declared"), [(None, False), (["embedding"], False), (["bed"], True)])
def test_an_undeclared_whole_tensor_is_read_and_noted(tmp_path, saved, is_declared):
    # None: what PEFT does by itself after resizing the embeddings. A declared name is the end of a module's.
    adapter = formats.load(
        peft_adapter(tmp_path, {"fc": ([[1]], [[1]])}, {"embed.weight": np.ones((2, 1))}, modules_to_save=saved)
    )
    note = "embed.weight is saved whole, and the config does not declare it: it replaces the base's tensor"
    assert adapter.notes == (() if is_declared else (note,)) and adapter.saved_whole == tuple(saved or ())


def test_the_models_config_beside_the_adapter_describes_its_head(tmp_path):
    peft_adapter(tmp_path, {"fc": ([[1]], [[1]])})
    model = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "good"}, "hidden_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(model))
    assert formats.load(tmp_path).metadata.keys() == {"model_config", "r", "lora_alpha", "use_rslora"}
    heads = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "good"}}
    assert formats.load(tmp_path).metadata["model_config"] == heads


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("architectures", "Bert", "a list of names"),
        ("architectures", [5], "a list of names"),
        ("id2label", ["good"], "a table of names"),
        ("label2id", 1, "a table of numbers"),
        ("problem_type", ["single"], "a name"),
    ],
)
def test_a_models_config_of_wrong_types_is_refused(tmp_path, field, value, what):
    peft_adapter(tmp_path, {"fc": ([[1]], [[1]])})
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4, field: value}))
    assert refusal(tmp_path) == f"ADAPTER/config.json: {field} is {value!r}; it must be {what}"


def test_fan_in_fan_out_records_that_matrices_are_in_out(tmp_path):
    pairs = {"fc": ([[1, 2]], [[1], [1]]), "conv": (np.ones((1, 2, 3)), np.ones((2, 1, 1)))}
    adapter = formats.load(peft_adapter(tmp_path / "one", pairs, layout="", fan_in_fan_out=True))
    assert adapter.layouts == {"fc": "in_out"}
    assert formats.load(peft_adapter(tmp_path / "two", pairs, layout="", fan_in_fan_out=False)).layouts == {}


def test_recorded_layouts_are_written_and_read_and_ignored_by_peft(tmp_path):
    adapter = formats.load(simple(tmp_path / "one"))
    assert adapter.layouts == {"fc": "out_in"}  # see peft_adapter
    for layouts in ({"fc": "in_out"}, {}):
        (tmp_path / str(len(layouts))).mkdir()
        made = dataclasses.replace(adapter, layouts=layouts)
        writer.write(made, tmp_path / str(len(layouts)), WriteOptions())
        assert formats.load(tmp_path / str(len(layouts))).layouts == layouts
    base = nn.ModuleDict({"fc": nn.Linear(2, 3)})
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "1").state_dict()
    assert loaded["base_model.model.fc.lora_A.default.weight"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "text", ['{"fc": "conv"}', '{"fc": 1}', '{"fc": []}', "[]", "{", '{"fc": "in_out", "fc": "out_in"}']
)
def test_damaged_records_of_layouts_are_refused(tmp_path, text):
    folder = simple(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", {LAYOUTS: text})
    assert LAYOUTS in refusal(folder)


# --- Output projections of nn.MultiheadAttention, as PEFT up to 0.21 trains them ---


def an_attention_of_peft(folder: Path) -> Adapter:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    options = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attn", "fc"], init_lora_weights=False)
    peft.get_peft_model(net, options).save_pretrained(folder)
    return formats.load(folder)


def test_the_scale_is_doubled_where_peft_adds_the_change_twice(tmp_path: Path) -> None:
    adapter = an_attention_of_peft(tmp_path)
    found = as_peft_computes(adapter)
    assert {name: pair.scale for name, pair in found.pairs.items()} == {"attn": 1.5, "attn.out_proj": 3.0, "fc": 1.5}
    assert found.spelled("attn.out_proj") == "attn.out_proj"
    assert [note.partition(";")[2] for note in found.notes] == [
        " it goes on with twice the scale, and is saved as a layer of its own"
    ]
    assert as_peft_computes(found) is found


@pytest.mark.parametrize(("version", "scale"), [("0.21.2", 3.0), ("0.22.0", 1.5), ("", 3.0), ("none", 3.0)])
def test_the_version_of_peft_decides(version: str, scale: float, tmp_path: Path) -> None:
    adapter = an_attention_of_peft(tmp_path)
    adapter = dataclasses.replace(adapter, metadata={**adapter.metadata, "peft_version": version})
    assert as_peft_computes(adapter).pairs["attn.out_proj"].scale == scale


def test_other_adapters_stay_as_they_are() -> None:
    adapter = an_adapter({"attn.out_proj": a_pair(4, 4)})
    assert as_peft_computes(adapter) is adapter
