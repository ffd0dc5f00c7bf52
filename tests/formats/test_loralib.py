"""Files of loralib, beside the weights that its own layers merge. What the files do not record has to be stated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import loralib
import numpy as np
import pytest
import torch
from torch import nn

from lora_export import formats
from lora_export.api.load import load_adapters
from lora_export.errors import InputRefused, WrongUsage
from lora_export.formats import loralib as loralib_format
from lora_export.options.reading import ReadOptions
from support import peft_folders
from support.cli import call

STATED = ReadOptions(allow_pickle=True, lora_rank=2, lora_alpha=6)


class Model(nn.Module):
    """One layer of loralib, with small integers as values."""

    def __init__(self, name: str, layer: nn.Module):
        super().__init__()
        self.add_module(name, layer)
        torch.manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randint(-3, 4, parameter.shape).float()

    @property
    def layer(self) -> Any:
        return next(iter(self.children()))


def saved(path: Path, model: nn.Module, bias: str = "none") -> Path:
    torch.save(loralib.lora_state_dict(model, bias=bias), path)
    return path


def weight_of(layer: Any) -> np.ndarray[Any, Any]:
    inner = layer.conv if hasattr(layer, "conv") else layer
    return np.array(inner.weight.detach().numpy())


def change(model: Model) -> np.ndarray[Any, Any]:
    """What loralib adds to the weight when it merges."""
    model.train()
    before = weight_of(model.layer)
    model.eval()
    return weight_of(model.layer) - before


refusal = functools.partial(peft_folders.refusal, allow_pickle=True, lora_rank=2, lora_alpha=6)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("fc", lambda: loralib.Linear(4, 5, r=2, lora_alpha=6)),
        ("embed_tokens", lambda: loralib.Embedding(7, 3, r=2, lora_alpha=6)),
        ("conv", lambda: loralib.Conv2d(3, 4, 3, r=2, lora_alpha=6)),
    ],
)
def test_a_layer_gets_the_change_that_loralib_merges(tmp_path: Path, name: str, make: Callable[[], nn.Module]) -> None:
    model = Model(name, make())
    adapter = formats.load(saved(tmp_path / "a.pt", model), options=STATED)
    (pair,) = adapter.pairs.values()
    expected = change(model)
    assert expected.any()
    assert (pair.delta().T if pair.embedding else pair.delta()).tolist() == expected.tolist()
    assert (adapter.format, adapter.metadata) == ("loralib", {"r": 2, "lora_alpha": 6})
    assert adapter.scale_source == "lora_alpha= / lora_rank="


@pytest.mark.parametrize("parts", [(True, False, True), (False, False, True), (True, True, True), (False, True)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_parts_of_a_fused_layer_are_padded_with_zeros(
    tmp_path: Path, parts: tuple[bool, ...], transposed: bool
) -> None:
    layer = loralib.MergedLinear(4, 12, r=2, lora_alpha=6, enable_lora=list(parts), fan_in_fan_out=transposed)
    model = Model("c_attn", layer)
    path = saved(tmp_path / "a.pt", model)
    stated = ReadOptions(allow_pickle=True, lora_rank=2, lora_alpha=6, enable_lora={"c_attn": parts})
    delta = formats.load(path, options=stated).pairs["c_attn"].delta()
    expected = change(model)
    assert (delta.T if transposed else delta).tolist() == expected.tolist()
    assert expected.any() and not delta.reshape(len(parts), -1)[~np.array(parts)].any()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_biases_are_saved_whole(tmp_path: Path, is_compiled: bool) -> None:
    model = Model("fc", loralib.Linear(4, 5, r=2, lora_alpha=6))
    path = saved(tmp_path / "a.pt", torch.compile(model, backend="eager") if is_compiled else model, "lora_only")
    adapter = formats.load(path, options=STATED)
    assert adapter.replaced["fc.bias"].tolist() == model.layer.bias.tolist()
    assert adapter.notes == ("fc.bias is saved whole: it replaces the base's tensor",)


def test_what_the_file_does_not_record_is_asked_for(tmp_path: Path) -> None:
    linear = saved(tmp_path / "a.pt", Model("fc", loralib.Linear(4, 5, r=2)))
    alone = refusal(linear, lora_alpha=None)
    assert alone.endswith('State both as in training: lora_rank="R" lora_alpha="ALPHA"')
    wrong = refusal(linear, lora_rank=3)
    assert "fc: A (2, 4) and B (5, 2) do not have lora_rank=3" in wrong
    fused = saved(tmp_path / "b.pt", Model("qkv", loralib.MergedLinear(4, 12, r=2, enable_lora=[True, False, True])))
    assert 'such as enable_lora={"c_attn": (True, False, True)}' in refusal(fused)
    parts = {"qkv": (True, True, True)}
    assert "A (4, 4) and B (8, 2) belong to 2 parts, enable_lora= has 3" in refusal(fused, enable_lora=parts)


def test_damage_and_unknown_tensors_are_listed(tmp_path: Path) -> None:
    tensors = {"a.lora_A": torch.ones(2, 3), "b.lora_A": torch.ones(2, 3), "b.lora_B": torch.full((3, 2), torch.nan)}
    torch.save({**tensors, "c.weight": torch.ones(2)}, tmp_path / "a.pt")
    assert refusal(tmp_path / "a.pt").splitlines()[1:] == [
        "  a: B is missing",
        "  b: B holds 6 values that are not finite (NaN or infinity)",
        "  c.weight: unknown kind of tensor",
    ]
    torch.save({"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(3, 2), "a.bias": torch.tensor([torch.inf])},
               tmp_path / "a.pt")  # fmt: skip
    assert "a.bias holds values that are not finite" in refusal(tmp_path / "a.pt")


def test_parts_are_stated_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "a.pt", Model("qkv", loralib.MergedLinear(4, 12, r=2, enable_lora=[True, False, True])))
    stated = ("inspect", path, "--allow-pickle", "--lora-rank", "2", "--lora-alpha", "6")
    assert call(*stated, "--enable-lora", "qkv=1,0,1") == 0
    assert call(*stated, "--enable-lora", "qkv") == 2
    assert "qkv is not NAME=1,0,1" in capsys.readouterr().err
    with pytest.raises(WrongUsage, match="a fused layer has two parts or more, and one is enabled"):
        ReadOptions(enable_lora={"qkv": (False, False)})


def test_files_of_diffusion_models_are_not_loralibs(tmp_path: Path) -> None:
    torch.save({"diffusion_model.a.lora_A": torch.ones(2, 3)}, tmp_path / "a.pt")
    assert not loralib_format.recognises(tmp_path / "a.pt")
    torch.save({"a.lora_A": torch.ones(2, 3)}, tmp_path / "a.pt")
    assert loralib_format.recognises(tmp_path / "a.pt")


def test_stated_parts_are_those_of_one_of_several_adapters(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain.pt", Model("fc", loralib.Linear(4, 5, r=2, lora_alpha=6)))
    layer = loralib.MergedLinear(4, 12, r=2, lora_alpha=6, enable_lora=[True, False, True])
    fused = saved(tmp_path / "fused.pt", Model("qkv", layer))
    parts = {"qkv": (True, False, True)}
    assert len(load_adapters([plain, fused], reading=replace(STATED, enable_lora=parts))) == 2
    with pytest.raises(InputRefused, match=r"kv.*: plain, fused has no layer whose name ends so"):
        load_adapters([plain, fused], reading=replace(STATED, enable_lora={**parts, "kv": (True, False)}))
