"""Square matrices that may be stored (out, in) or (in, out): merged as PEFT merges them, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_model
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import lora_export as le
from lora_export.errors import InputRefused, MatchError
from support.handmade import base_file, peft_adapter
from support.merges import same_bits, sixty_fourths, trained
from support.tiny_models import tiny_gpt2

SQUARE = "transformer.h.0.attn.c_proj.weight"


def jais(folder: Path, model_type: str | None = "jais") -> GPT2LMHeadModel:
    """A GPT-2 in a folder whose config names another type: a model with code of its own."""
    model = tiny_gpt2(n_layer=2)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key != "model_type"}
    config |= {"model_type": model_type} if model_type else {}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def trained_and_saved(
    model: nn.Module, folder: Path, *targets: str, fan_in_fan_out: bool | None = True
) -> dict[str, Any]:
    """Save an adapter for these modules, and return the weights that PEFT merges. None leaves PEFT's own record."""
    adapted = trained(model, sixty_fourths, r=2, lora_alpha=2, target_modules=list(targets))
    adapted.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["fan_in_fan_out"] = config["fan_in_fan_out"] if fan_in_fan_out is None else fan_in_fan_out
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return adapted.merge_and_unload().state_dict()


def without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


@pytest.mark.parametrize("evidence", ["option", "adapter", "siblings"])
def test_a_folder_of_unknown_type_equals_pefts(tmp_path, evidence):
    model = jais(tmp_path / "base")
    theirs = trained_and_saved(model, tmp_path / "ad", "c_proj", "c_attn", fan_in_fan_out=evidence == "adapter")
    layout = {"*.c_proj": "in_out"} if evidence == "option" else None
    made = le.merge(tmp_path / "base", tmp_path / "ad", tmp_path / "out", layout=layout)
    ours = load_tensors(tmp_path / "out/model.safetensors")
    assert same_bits(ours, without_prefix(theirs))
    assert not torch.equal(ours[SQUARE], model.state_dict()[SQUARE])
    source = {step.weight: str(step.spec.layout_source) for step in made.plan.steps}
    assert source[SQUARE] == evidence and source["transformer.h.0.attn.c_attn.weight"] == "shape"
    settings = json.loads((tmp_path / "out/lora_export.json").read_text())
    assert (SQUARE in json.dumps(settings)) is (evidence == "option")


def test_a_known_type_needs_no_option_and_refuses_a_wrong_one(tmp_path):
    model = jais(tmp_path / "base", "gpt2")
    theirs = trained_and_saved(model, tmp_path / "ad", "c_proj", "c_fc", fan_in_fan_out=False)
    le.merge(tmp_path / "base", tmp_path / "ad", tmp_path / "out")
    assert same_bits(load_tensors(tmp_path / "out/model.safetensors"), without_prefix(theirs))
    with pytest.raises(InputRefused, match="is out_in, but the base's is in_out"):
        le.merge(tmp_path / "base", tmp_path / "ad", tmp_path / "other", layout={"*": "out_in"})


class Layers(nn.Module):
    """The same square and the same oblong matrix, as Conv1D and as nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.wide, self.dense, self.plain = Conv1D(6, 6), Conv1D(5, 3), nn.Linear(6, 6), nn.Linear(3, 5)


@pytest.mark.parametrize(
    ("targets", "layout"),
    [
        (["wide", "plain"], None),  # not square: each fits in one layout
        (["square"], {"square": "in_out"}),
        (["dense"], {"dense.weight": "out_in"}),
        (["square", "wide", "dense", "plain"], {"dense": "out_in", "square": "in_out"}),
    ],
)
def test_a_bare_file_equals_pefts(tmp_path, targets, layout):
    torch.manual_seed(0)
    model = Layers()
    save_model(model, str(tmp_path / "base.safetensors"))
    theirs = trained_and_saved(model, tmp_path / "ad", *targets, fan_in_fan_out=False)
    made = le.merge(tmp_path / "base.safetensors", tmp_path / "ad", tmp_path / "out.safetensors", layout=layout)
    assert same_bits(load_tensors(tmp_path / "out.safetensors"), theirs)
    assert {step.weight for step in made.plan.steps} == {f"{name}.weight" for name in targets}


@pytest.mark.parametrize("target", ["square", "dense"])
def test_a_square_matrix_in_a_bare_file_is_not_guessed(tmp_path, target):
    model = Layers()
    save_model(model, str(tmp_path / "base.safetensors"))
    trained_and_saved(model, tmp_path / "ad", target, fan_in_fan_out=False)
    with pytest.raises(InputRefused, match=f"1 square matrix is unknown: {target}.weight. Neither"):
        le.merge(tmp_path / "base.safetensors", tmp_path / "ad", tmp_path / "out.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ad", "base.safetensors"]


def stack(**layers: nn.Module) -> nn.Module:
    """A model of these layers, in the order in which PEFT visits them; two underscores are a dot."""
    model = nn.Module()
    for name, layer in layers.items():
        *outer, last = name.split("__")
        owner = model
        for part in outer:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.add_module(last, layer)
    return model


def linear(columns: int = 6, rows: int = 6) -> nn.Module:
    return nn.Linear(columns, rows)


def conv1d(columns: int = 6, rows: int = 6) -> nn.Module:
    return Conv1D(rows, columns)


DECIDED = {
    "one Conv1D: PEFT records it": ({"square": conv1d()}, "adapter"),
    "Conv1D of one name": ({"a__square": conv1d(), "b__square": conv1d()}, "adapter"),
    "GPT-2's names, beside one that is not square": ({"h__0__c_proj": conv1d(), "h__0__c_fc": conv1d(6, 9)}, "adapter"),
    "the same names of linear layers": ({"h__0__c_proj": linear(), "h__0__c_fc": linear(6, 9)}, "siblings"),
    "a linear layer of this name is not square": ({"a__mix": linear(), "b__mix": linear(6, 4)}, "siblings"),
    "layers of a stack with names of transformers": (
        {"layers__0__q_proj": linear(), "layers__0__v_proj": linear()}, "name",
    ),
    "the same, in an encoder beside a Conv1D of GPT-2": (
        {"layer__0__query": linear(), "h__0__c_attn": conv1d(6, 18), "h__0__c_proj": conv1d()}, "name",
    ),
    "a UNet of diffusers": (
        {"down_blocks__0__attentions__0__transformer_blocks__0__attn1__to_k": linear(),
         "down_blocks__0__resnets__0__conv1": nn.Conv2d(4, 6, 1),
         "down_blocks__0__attentions__0__transformer_blocks__0__attn1__to_q": linear(),
         "down_blocks__0__attentions__0__proj_in": linear(6, 8)}, "name",
    ),
}  # fmt: skip
REFUSED = {
    "a linear layer of a name of its own": {"mix": linear()},
    "one flag for both kinds, a Conv1D last": {"plain": linear(3, 5), "dense": linear(), "square": conv1d()},
    "the same, where no shape contradicts the flag": {"dense": linear(), "wide": conv1d(5, 3)},
    "both squares": {"dense": linear(), "square": conv1d()},
    "a linear layer last": {"square": conv1d(), "plain": linear(3, 5)},
    "numbers are no names": {"net__0": conv1d(), "net__2": linear(3, 5), "net__3": linear()},
    "a Conv1D with a name of nn.Linear": {"layers__0__q_proj": conv1d()},
    "two of them, and a linear layer last": {
        "layers__0__q_proj": conv1d(), "layers__1__q_proj": conv1d(3, 5), "layers__1__v_proj": linear(),
    },
    "a name of transformers beside a Conv1D of another": {
        "layers__0__wide": conv1d(5, 3), "layers__0__q_proj": linear(),
    },
}  # fmt: skip


@pytest.mark.parametrize("case", [*DECIDED, *REFUSED])
def test_squares_of_a_bare_file_are_merged_as_by_peft_or_refused(tmp_path, case):
    """With PEFT's own record: `fan_in_fan_out` of the last module."""
    torch.manual_seed(0)
    layers, expected = DECIDED[case] if case in DECIDED else (REFUSED[case], "")
    model = stack(**copy.deepcopy(layers))
    save_model(model, str(tmp_path / "base.safetensors"))
    targets = [name.replace("__", ".") for name, layer in layers.items() if not isinstance(layer, nn.Conv2d)]
    theirs = trained_and_saved(model, tmp_path / "ad", *targets, fan_in_fan_out=None)
    paths = tmp_path / "base.safetensors", tmp_path / "ad", tmp_path / "out.safetensors"
    if not expected:
        with pytest.raises(InputRefused, match=r"square (matrix|matrices) is unknown"):
            le.merge(*paths)
        assert not paths[2].exists()
        return
    made = le.merge(*paths)
    assert same_bits(load_tensors(paths[2]), theirs)
    first = next(iter(layers)).replace("__", ".")
    (source,) = (str(step.spec.layout_source) for step in made.plan.steps if step.weight == f"{first}.weight")
    assert source == expected and any("taken as stored" in note for note in made.plan.notes)
    proven = le.verify(paths[2], base=paths[0], adapters=[paths[1]])
    assert str(proven.verdict.outcome) == "same"


# --- Tensors with two names ---


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.emb.weight


@pytest.mark.parametrize("target", ["emb", "head"])
def test_an_adapter_for_one_of_two_tied_tensors_is_refused(tmp_path, target):
    model = Tied()
    save_model(model, str(tmp_path / "base.safetensors"))
    with safe_open(tmp_path / "base.safetensors", "np") as file:
        assert set(file.keys()) | set(file.metadata()) == {"emb.weight", "head.weight"}
    trained_and_saved(model, tmp_path / "ad", target, fan_in_fan_out=False)
    with pytest.raises(MatchError, match="tie"):
        le.merge(tmp_path / "base.safetensors", tmp_path / "ad", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_the_output_names_only_ties_that_still_hold(tmp_path):
    table = np.arange(6).reshape(3, 2)
    base_file(tmp_path / "base.safetensors", {"emb.weight": table, "x.weight": [[1, 2]]}, metadata={
        "head.weight": "emb.weight", "y.weight": "x.weight",
    })  # fmt: skip
    head = np.ones((3, 2), np.float32)
    le.merge(
        tmp_path / "base.safetensors",
        peft_adapter(tmp_path / "ad", {}, {"head.weight": head}),
        tmp_path / "out.safetensors",
    )
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        metadata = file.metadata()
    assert "head.weight" not in metadata and metadata["y.weight"] == "x.weight"
    merged = load_file(tmp_path / "out.safetensors")
    assert (merged["head.weight"] == head).all() and (merged["emb.weight"] == table).all()
