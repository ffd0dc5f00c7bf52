"""Folders whose linear layers are in 4 bits while an adapter is trained: quantised when loaded, or stored so."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as hf

from lora_export.errors import EnvironmentLacking, InputRefused
from lora_export.layers.frozen_linear import float_weight
from lora_export.models.four_bit_base import TrainedBase, quantised_modules, require_bitsandbytes
from lora_export.models.load import load_model
from lora_export.weights.task_head import TaskHead
from support.small_models import small_model
from support.tiny_models import tiny_bert

HEAD = TaskHead("ForSequenceClassification", ("x", "y"))
NF4 = TrainedBase("nf4", ("classifier", "score"))


def packed_in(module: torch.nn.Module) -> set[str]:
    """The endings of the names of layers in 4 bits."""
    return {name.rpartition(".")[2] for name, part in module.named_modules() if isinstance(part, bnb.nn.Linear4bit)}


def stored(base: Path, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """The folder of a model, as transformers stores it after bitsandbytes has quantised it."""
    config = hf.BitsAndBytesConfig(**(options or {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}))
    more = {"dtype": dtype, "device_map": {"": "cpu"}}
    made = hf.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, **more)
    made.save_pretrained(folder)
    return folder


def test_linear_layers_are_quantised_and_all_else_is_fp32(tmp_path: Path) -> None:
    base = small_model("llama", tmp_path / "base")
    loaded = load_model(str(base), base=NF4).module
    assert packed_in(loaded) == {*(f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down"))}
    floats = [value for value in loaded.parameters() if not isinstance(value, bnb.nn.Params4bit)]
    assert {value.dtype for value in floats} == {torch.float32} and len(floats) == 2 + 2 * 2 + 1
    weight = loaded.model.layers[0].mlp.up_proj.weight
    original = load_model(str(base)).module.model.layers[0].mlp.up_proj.weight
    packed, state = bnb.functional.quantize_4bit(original.data, quant_type="nf4", compress_statistics=True)
    assert weight.quant_state.nested and torch.equal(
        float_weight(weight), bnb.functional.dequantize_4bit(packed, state)
    )
    assert not any(isinstance(part, bnb.nn.Linear4bit) for part in load_model(str(base)).module.modules())


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_a_new_head_is_fp32(architecture: str, tmp_path: Path) -> None:
    base = small_model(architecture, tmp_path / "base")
    loaded = load_model(str(base), head=HEAD, may_add=True, base=NF4)
    head = "classifier" if architecture == "bert" else "score"
    assert head not in packed_in(loaded.module) and {"dense", "c_proj"} & packed_in(loaded.module)
    assert {name.partition(".")[0] for name in loaded.new_weights} == {head}
    assert all(value.isfinite().all() for value in loaded.module.get_submodule(head).parameters())


def test_new_weights_inside_the_model_are_fp32(tmp_path: Path) -> None:
    """A pooler that the folder lacks would be quantised with random values, and is trained as a whole."""
    tiny_bert(lambda config: hf.BertModel(config, add_pooling_layer=False)).save_pretrained(tmp_path / "base")
    hf.BertConfig.from_pretrained(tmp_path / "base", architectures=["BertModel"]).save_pretrained(tmp_path / "base")
    loaded = load_model(str(tmp_path / "base"), may_add=True, base=NF4)
    assert sorted(loaded.new_weights) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert type(loaded.module.pooler.dense) is torch.nn.Linear and "query" in packed_in(loaded.module)
    assert quantised_modules(loaded.module, ["pooler.dense.bias", "encoder.layer.0.attention.self.query.weight"]) == (
        "encoder.layer.0.attention.self.query",
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_stored_base_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    base = small_model("llama", tmp_path / "base")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    folder = stored(base, tmp_path / kind, dtype=torch.bfloat16, **options)
    loaded = load_model(str(folder), head=HEAD, may_add=True, base=TrainedBase(floats=("score",)))
    assert "up_proj" in packed_in(loaded.module) and not {"score", "lm_head"} & packed_in(loaded.module)
    weight = loaded.module.model.layers[1].mlp.up_proj.weight
    config = hf.BitsAndBytesConfig(**options)
    in_bf16 = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}}
    theirs = hf.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, **in_bf16)
    floats = [value for value in loaded.module.parameters() if not isinstance(value, bnb.nn.Params4bit)]
    assert {value.dtype for value in floats} == {torch.float32}
    assert torch.equal(loaded.module.model.embed_tokens.weight, theirs.model.embed_tokens.weight.float())
    assert torch.equal(weight, theirs.model.layers[1].mlp.up_proj.weight) and weight.quant_state.quant_type == kind
    with pytest.raises(InputRefused, match=rf"is quantised already \({kind}\): leave out quantize_base="):
        load_model(str(folder), base=NF4)
    with pytest.raises(InputRefused, match="is quantised"):
        load_model(str(folder))


def test_other_schemes_and_other_models_are_refused(tmp_path: Path) -> None:
    base = small_model("llama", tmp_path / "base")
    folder = stored(base, tmp_path / "int8", load_in_8bit=True)
    with pytest.raises(InputRefused, match=r"is quantised \(int8\): adapters are trained beside floats, and"):
        load_model(str(folder), base=TrainedBase())
    with pytest.raises(InputRefused, match="quantize_base= is for Hugging Face folders of transformers"):
        load_model("net.py:make", base=NF4)


def test_bitsandbytes_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    require_bitsandbytes()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EnvironmentLacking, match=r"pip install 'bitsandbytes>="):
        require_bitsandbytes()


def test_no_kernel_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes downloads one while it is imported, where it finds the package `kernels`."""
    package, missed = ModuleType("kernels"), []

    def imported(name: str) -> None:
        try:
            importlib.__import__("kernels")
        except ImportError:
            missed.append(name)

    monkeypatch.setitem(sys.modules, "kernels", package)
    monkeypatch.setattr(importlib, "import_module", imported)
    require_bitsandbytes()
    assert missed == ["bitsandbytes"] and sys.modules["kernels"] is package
