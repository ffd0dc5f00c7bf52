"""Adapters of torchtune, by the published formulas of its conversion: it does not install beside the other packages."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_export
from lora_export import formats
from lora_export.lora import ExpertAxes
from lora_export.options.reading import ReadOptions
from support import peft_folders

HEADS, GROUPS, SIZE, WIDTH = 4, 2, 4, 8
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
}
STATED = {"allow_pickle": True, "lora_rank": 2, "lora_alpha": 6.0}
OUTPUTS = {"attn.q_proj": HEADS * SIZE, "attn.k_proj": GROUPS * SIZE, "attn.v_proj": GROUPS * SIZE, "mlp.w1": 6}


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def tensors(outputs: Mapping[str, int] = OUTPUTS, prefix: str = "layers.0.") -> dict[str, torch.Tensor]:
    found = {}
    for name, size in outputs.items():
        found[f"{prefix}{name}.lora_a.weight"] = integers(2, WIDTH)
        found[f"{prefix}{name}.lora_b.weight"] = integers(size, 2)
    return found


def saved(folder: Path, content: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(content), folder / "adapter_model.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, **options: Any) -> lora_export.Adapter:
    return formats.load(folder, options=ReadOptions(**{**STATED, **options}))


refusal = functools.partial(peft_folders.refusal, **STATED)


def in_hugging_faces_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """torchtune/models/convert_weights.py: the rows of each head, first those of even, then those of odd number."""
    return torch.cat([part for head in weight.chunk(heads) for part in (head[0::2], head[1::2])])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3"])
def test_rows_of_q_and_k_are_those_of_hugging_face(tmp_path: Path, model_type: str) -> None:
    content = tensors()
    adapter = load(saved(tmp_path, content, CONFIG | {"model_type": model_type}))
    reordered = not model_type.startswith("qwen")
    for name, heads, own in (("q_proj", HEADS, reordered), ("k_proj", GROUPS, reordered), ("v_proj", GROUPS, False)):
        a, b = (content[f"layers.0.attn.{name}.lora_{side}.weight"] for side in "ab")
        expected = 3 * (b @ a)
        expected = in_hugging_faces_order(expected, heads) if own else expected
        assert adapter.pairs[f"model.layers.0.self_attn.{name}"].delta().tolist() == expected.tolist()
    assert list(adapter.pairs)[-1] == "model.layers.0.mlp.gate_proj"
    assert (adapter.format, adapter.metadata["model_type"]) == ("torchtune", model_type)


def test_magnitudes_have_the_order_of_their_rows(tmp_path: Path) -> None:
    content = tensors({"attn.q_proj": HEADS * SIZE}) | {"layers.0.attn.q_proj.magnitude": torch.arange(1.0, 17)}
    (pair,) = load(saved(tmp_path, content)).pairs.values()
    assert pair.magnitude is not None
    assert pair.magnitude.tolist() == in_hugging_faces_order(torch.arange(1.0, 17)[:, None], HEADS).flatten().tolist()


def test_layers_of_phi_are_fused_in_its_order(tmp_path: Path) -> None:
    content = tensors({**OUTPUTS, "mlp.w3": 6})
    adapter = load(saved(tmp_path, content, CONFIG | {"model_type": "phi3"}))
    deltas = {
        name: 3 * content[f"layers.0.{name}.lora_b.weight"] @ content[f"layers.0.{name}.lora_a.weight"]
        for name in (*OUTPUTS, "mlp.w3")
    }
    qkv = torch.cat([deltas[f"attn.{each}_proj"] for each in "qkv"])
    assert adapter.pairs["model.layers.0.self_attn.qkv_proj"].delta().tolist() == qkv.tolist()
    both = torch.cat([deltas["mlp.w1"], deltas["mlp.w3"]])
    assert adapter.pairs["model.layers.0.mlp.gate_up_proj"].delta().tolist() == both.tolist()
    assert len(adapter.pairs) == 2


def experts(width: int = WIDTH, inner: int = 6) -> dict[str, torch.Tensor]:
    sizes = {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}
    return {
        f"layers.0.mlp.experts.lora_{name}_{side}": integers(3, *((size[0], 2) if side == "a" else (2, size[1])))
        for name, size in sizes.items()
        for side in "ab"
    }


def test_experts_have_a_pair_each(tmp_path: Path) -> None:
    content = experts()
    adapter = load(saved(tmp_path, content, CONFIG | {"model_type": "qwen3_moe"}))
    for name in ("gate", "up", "down"):
        a, b = (content[f"layers.0.mlp.experts.lora_{name}_{side}"] for side in "ab")
        for number, expected in enumerate(3 * (a @ b).transpose(1, 2)):  # (out, in)
            pair = adapter.pairs[f"model.layers.0.mlp.experts.{name}_proj[{number}]"]
            assert pair.delta().tolist() == expected.tolist()
    assert set(adapter.experts.values()) == {ExpertAxes.OUT_IN}


def test_experts_of_llama_4_are_merged_where_gate_and_up_are_one(tmp_path: Path) -> None:
    content = {f"decoder.{name}": value for name, value in experts().items()}
    adapter = saved(tmp_path / "adapter", content, None)
    base = {
        "model.layers.0.feed_forward.experts.gate_up_proj": integers(3, WIDTH, 12),
        "model.layers.0.feed_forward.experts.down_proj": integers(3, 6, WIDTH),
    }
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base/model.safetensors")
    config = CONFIG | {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    lora_export.merge(tmp_path / "base", adapter, tmp_path / "out", reading=ReadOptions(**STATED))
    merged = load_file(tmp_path / "out/model.safetensors")
    change = {
        name: 3
        * content[f"decoder.layers.0.mlp.experts.lora_{name}_a"]
        @ content[f"decoder.layers.0.mlp.experts.lora_{name}_b"]
        for name in ("gate", "up", "down")
    }
    expected = {"gate_up_proj": torch.cat([change["gate"], change["up"]], dim=2), "down_proj": change["down"]}
    for name, added in expected.items():
        key = f"model.layers.0.feed_forward.experts.{name}"
        assert merged[key].tolist() == (base[key] + added).tolist() != base[key].tolist()


def test_rank_and_alpha_are_in_the_config_of_newer_versions(tmp_path: Path) -> None:
    folder = saved(tmp_path, tensors())
    alone = refusal(folder, lora_rank=None)
    assert alone.endswith('State both as in training: lora_rank="R" lora_alpha="ALPHA"')
    fields = {"r": 2, "lora_alpha": 5, "peft_type": "LORA", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    adapter = load(folder, lora_rank=None, lora_alpha=None)
    assert adapter.pairs["model.layers.0.self_attn.q_proj"].scale == 2.5
    assert "lora_rank= is for adapters that do not record it" in refusal(folder)
    for field, wrong in (("r", 0), ("r", "2"), ("lora_alpha", None), ("lora_alpha", True)):
        (folder / "adapter_config.json").write_text(json.dumps(fields | {field: wrong}))
        told = refusal(folder, lora_rank=None, lora_alpha=None)
        assert f"adapter_config.json: {field} is {wrong!r}; it must be" in told


def test_the_base_is_needed_and_its_config_is_enough(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", tensors(), None)
    assert 'or state the base: base_config="FOLDER"' in refusal(folder)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(CONFIG))
    assert load(folder, base_config=tmp_path / "base").pairs
    wrong = CONFIG | {"num_attention_heads": 2}
    told = refusal(saved(tmp_path / "two", tensors(), wrong))
    assert "its 16 rows are not those of the base's 2 heads of 4 rows" in told
    unknown = CONFIG | {"model_type": "mllama"}
    assert "how torchtune converts models of the type 'mllama' is not known; known: gemma," in refusal(
        saved(tmp_path / "three", tensors(), unknown)
    )
    assert "models of the type [] is not known" in refusal(
        saved(tmp_path / "list", tensors(), CONFIG | {"model_type": []})
    )
    without = {key: value for key, value in CONFIG.items() if key != "hidden_size"}
    assert "the base's config: hidden_size is None; it must be a positive integer" in refusal(
        saved(tmp_path / "four", tensors(), without)
    )


def test_everything_that_is_wrong_is_listed(tmp_path: Path) -> None:
    content = {
        "layers.0.attn.q_proj.lora_a.weight": integers(2, WIDTH),
        "layers.0.attn.other_proj.lora_a.weight": integers(2, WIDTH),
        "layers.0.attn.other_proj.lora_b.weight": integers(4, 2),
        "layers.0.mlp.w1.lora_a.weight": integers(3, WIDTH),
        "layers.0.mlp.w1.lora_b.weight": integers(6, 3),
        "norm.scale": integers(4),
    }
    assert refusal(saved(tmp_path, content)).splitlines()[1:] == [
        "  layers.0.attn.other_proj: which layer of the base this is is not known",
        "  layers.0.attn.q_proj: B is missing",
        "  layers.0.mlp.w1: A (3, 8) and B (6, 3) do not have the rank 2",
        "  norm.scale: unknown kind of tensor",
    ]


def test_the_export_for_peft_is_read_where_there_is_one(tmp_path: Path) -> None:
    folder = saved(tmp_path, tensors())
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": []}')
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
    save_file(
        {key.format("A"): integers(2, WIDTH), key.format("B"): integers(8, 2)}, folder / "adapter_model.safetensors"
    )
    assert formats.load(folder).format == "peft"
    stated = load(folder / "adapter_model.pt", lora_rank=None, lora_alpha=None)
    assert stated.format == "torchtune"
    assert np.array_equal(
        stated.pairs["model.layers.0.self_attn.v_proj"].a, tensors()["layers.0.attn.v_proj.lora_a.weight"]
    )


def test_the_file_of_an_older_version_is_found(tmp_path: Path) -> None:
    folder = saved(tmp_path, tensors())
    (folder / "adapter_model.pt").rename(folder / "adapter_0.pt")
    assert load(folder).pairs
    (folder / "adapter_1.pt").write_bytes(b"")
    assert "is not an adapter in a known format" in refusal(folder)
