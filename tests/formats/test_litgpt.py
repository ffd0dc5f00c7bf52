"""Adapters of litgpt, beside what litgpt itself merges and converts (recorded by `support/record_litgpt.py`)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

import lora_export
from lora_export import formats
from lora_export.errors import InputRefused
from lora_export.formats.litgpt import read_yaml
from lora_export.isolation.limits import MAX_SETTINGS
from lora_export.options.reading import ReadOptions
from support import ROOT, peft_folders

EXAMPLES = json.loads((ROOT / "tests/support/litgpt_examples.json").read_text())
ALLOWED = ReadOptions(allow_pickle=True)


def saved(folder: Path, example: dict[str, Any], **settings: Any) -> Path:
    """The folder of an adapter, as litgpt writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: torch.tensor(value).float() for name, value in example["tensors"].items()}
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(example["settings"] | settings))
    (folder / "model_config.yaml").write_text(yaml.safe_dump(example["config"]))
    return folder


refusal = functools.partial(peft_folders.refusal, allow_pickle=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_layer_gets_the_change_that_litgpt_merges(tmp_path: Path, name: str) -> None:
    adapter = formats.load(saved(tmp_path, EXAMPLES[name]), options=ALLOWED)
    changes = {f"{module}.weight": pair.delta().tolist() for module, pair in adapter.pairs.items()}
    assert changes == EXAMPLES[name]["changes"]
    assert (adapter.format, adapter.metadata["r"], adapter.metadata["lora_alpha"]) == ("litgpt", 2, 4.0)


def test_an_adapter_is_merged_into_a_base_of_hugging_face(tmp_path: Path) -> None:
    example = EXAMPLES["pythia"]
    base = {name: np.ones(np.shape(change), np.float32) for name, change in example["changes"].items()}
    save_file(base, tmp_path / "base.safetensors")
    adapter = saved(tmp_path / "adapter", example)
    out = tmp_path / "out.safetensors"
    lora_export.merge(
        tmp_path / "base.safetensors", adapter / "lit_model.pth.lora", out, layout={"*": "out_in"}, reading=ALLOWED
    )
    assert {name: (value - 1).tolist() for name, value in load_file(out).items()} == example["changes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"lora_r": 3}}, "A (2, 8) and B (8, 2) do not have the rank 3 of hyperparameters.yaml"),
        ({"settings": {"lora_alpha": "4"}}, "hyperparameters.yaml: lora_alpha is '4'; it must be a positive number"),
        ({"settings": {"lora_key": False}}, "do not belong to the parts that are enabled: lora_query, lora_value"),
        ({"config": {"name": 7}}, "model_config.yaml: name must be a text"),
        ({"config": {"n_head": 0}}, "model_config.yaml: n_head is 0; it must be a positive integer"),
        ({"config": {"mlp_class_name": "NewMLP"}}, "litgpt has no conversion of it to Hugging Face's names"),
    ],
)
def test_settings_that_contradict_the_file_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    example = EXAMPLES["llama"]
    changed = example | {key: example[key] | value for key, value in change.items()}
    assert message in refusal(saved(tmp_path, changed))


def test_layers_without_a_name_in_the_family_are_refused(tmp_path: Path) -> None:
    example = EXAMPLES["llama"]
    changed = example | {"tensors": {"transformer.h.0.mlp.fc.lora_A": [[1]], "transformer.h.0.mlp.fc.lora_B": [[1]]}}
    assert "do not have the rank" in refusal(saved(tmp_path / "one", changed))
    assert "litgpt's conversion of Llama-3 has no name for it" in refusal(saved(tmp_path / "two", changed, lora_r=1))


def test_files_that_are_missing_or_need_an_option(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", EXAMPLES["llama"])
    assert "ADAPTER/lit_model.pth.lora is a pickle" in refusal(folder, allow_pickle=False)
    assert "lora_rank= is for adapters that do not record it" in refusal(folder, lora_rank=2)
    (folder / "model_config.yaml").unlink()
    assert "ADAPTER has no model_config.yaml, which names the model" in refusal(folder)
    (folder / "hyperparameters.yaml").unlink()
    assert "is not an adapter in a known format" in refusal(folder)


def test_a_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lora_r: 8\nlora_query: true\ndata:\n  class_path: x\n")
    assert read_yaml(tmp_path / "a.yaml") == {"lora_r": 8, "lora_query": True, "data": {"class_path": "x"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("- a", "is not a table of settings"),
        ("1: a", "is not a table of settings"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("a: 2001-99-99", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: !!python/object/apply:os.system ['touch ran']", "is not YAML"),
        ("a" * (MAX_SETTINGS + 1), "has more than 1,000,000 bytes"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(InputRefused, match=message):
        read_yaml(tmp_path / "a.yaml")
    assert not (tmp_path / "ran").exists()


def test_parts_that_are_shared_take_no_memory(tmp_path: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    (tmp_path / "a.yaml").write_text("a0: &a0 [x]\n" + "\n".join(levels))
    assert len(read_yaml(tmp_path / "a.yaml")) == 30
