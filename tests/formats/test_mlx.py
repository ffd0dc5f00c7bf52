"""Adapters of mlx-lm, beside what its own layers fuse. What is not an adapter, or not certain, is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_export
from lora_export import formats
from lora_export.lora import ExpertAxes
from lora_export.options.reading import ReadOptions
from support import experts
from support.peft_folders import refusal

mx = pytest.importorskip("mlx.core", reason="mlx runs on Linux and macOS")

SPELLED = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3"), "down_proj": ("down_proj", "w2")}
LORA = {"rank": 2, "scale": 3.0, "dropout": 0.0}
RNG = np.random.default_rng(0)


def integers(*shape: int) -> np.ndarray[Any, Any]:
    """Small integers, of which no sum is rounded."""
    return RNG.integers(-4, 5, shape).astype(np.float32)


def adapter_folder(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": LORA} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def fused(layer: Any, weight: np.ndarray[Any, Any], tensors: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The weight that a layer of mlx-lm makes of its pair."""
    inner = layer.embedding if hasattr(layer, "embedding") else layer.linear
    inner.weight = mx.array(weight)
    for name, value in tensors.items():
        setattr(layer, name, mx.array(value))
    return np.array(layer.fuse().weight)


def test_a_linear_layer_is_what_mlx_fuses(tmp_path: Path) -> None:
    from mlx_lm.tuner.lora import LoRALinear

    tensors = {"lora_a": integers(4, 2), "lora_b": integers(2, 3)}
    adapter = formats.load(adapter_folder(tmp_path, {f"fc.{name}": value for name, value in tensors.items()}))
    weight = integers(3, 4)
    ours = weight + adapter.pairs["fc"].delta()
    assert ours.tolist() == fused(LoRALinear(4, 3, r=2, scale=3.0), weight, tensors).tolist() != weight.tolist()
    assert (adapter.format, adapter.pairs["fc"].scale, adapter.spelled("fc")) == ("mlx", 3.0, "fc.lora_a")


def test_an_embedding_is_what_mlx_fuses(tmp_path: Path) -> None:
    from mlx_lm.tuner.lora import LoRAEmbedding

    tensors = {"lora_a": integers(5, 2), "lora_b": integers(2, 3)}
    adapter = formats.load(
        adapter_folder(tmp_path, {f"model.embed_tokens.{name}": value for name, value in tensors.items()})
    )
    pair, weight = adapter.pairs["model.embed_tokens"], integers(5, 3)
    assert pair.embedding and pair.shape == (3, 5)
    ours = weight + pair.delta().T
    assert ours.tolist() == fused(LoRAEmbedding(5, 3, r=2, scale=3.0), weight, tensors).tolist()


def test_dora_is_what_mlx_fuses(tmp_path: Path) -> None:
    from mlx_lm.tuner.dora import DoRALinear

    tensors = {"lora_a": integers(4, 2), "lora_b": integers(2, 3), "m": np.arange(1, 4, dtype=np.float32)}
    named = {f"fc.{name}": value for name, value in tensors.items()}
    folder = adapter_folder(tmp_path / "adapter", named, fine_tune_type="dora")
    weight = integers(3, 4)
    save_file({"fc.weight": weight}, tmp_path / "base.safetensors")
    lora_export.merge(tmp_path / "base.safetensors", folder, tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")["fc.weight"]
    expected = fused(DoRALinear(4, 3, r=2, scale=3.0), weight, tensors)
    np.testing.assert_allclose(merged, expected, rtol=1e-6)
    assert refusal(adapter_folder(tmp_path / "no", named)) == (
        "ADAPTER/adapters.safetensors is refused:\n  fc: m is present, but the config's fine_tune_type is not dora"
    )


def test_experts_are_what_mlx_fuses(tmp_path: Path) -> None:
    from mlx_lm.tuner.lora import LoRASwitchLinear

    tensors = {"lora_a": integers(3, 2, 4), "lora_b": integers(3, 5, 2)}
    named = {f"model.layers.0.mlp.switch_mlp.up_proj.{name}": value for name, value in tensors.items()}
    adapter = formats.load(adapter_folder(tmp_path, named))
    weight = integers(3, 5, 4)
    expected = fused(LoRASwitchLinear(4, 5, 3, r=2, scale=3.0), weight, tensors)
    name = "model.layers.0.mlp.experts.up_proj"
    for expert in range(3):
        assert (weight[expert] + adapter.pairs[f"{name}[{expert}]"].delta()).tolist() == expected[expert].tolist()
    assert adapter.experts == {name: ExpertAxes.OUT_IN}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_model_merges_to_what_mlx_fuses(tmp_path: Path, name: str) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    experts.tiny_model(name).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", model_config={"num_experts": experts.COUNT, "rope_theta": 1e4})[0]
    linear_to_lora_layers(model, 1, LORA)
    tensors = {}
    for key, value in tree_flatten(model.parameters()):
        if key.endswith((".lora_a", ".lora_b")):
            tensors[key] = RNG.standard_normal(value.shape).astype(np.float32)
    model.load_weights([(key, mx.array(value)) for key, value in tensors.items()], strict=False)
    fused_layers = {key: layer.fuse() for key, layer in model.named_modules() if hasattr(layer, "fuse")}
    lora_export.merge(tmp_path / "base", adapter_folder(tmp_path / "adapter", tensors), tmp_path / "out")
    merged = load_file(tmp_path / "out/model.safetensors")
    compared = 0
    for key, layer in fused_layers.items():
        parts = [np.array(part) for part in layer.weight] if layer.weight.ndim == 3 else [np.array(layer.weight)]
        for expert, expected in enumerate(parts):
            owner, _, projection = key.rpartition(".")
            names = [
                key,
                *(f"{owner.removesuffix('switch_mlp')}experts.{expert}.{each}" for each in SPELLED.get(projection, ())),
            ]
            (found,) = (merged[f"{each}.weight"] for each in names if f"{each}.weight" in merged)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared > 3 * experts.COUNT


def test_tied_embeddings_change_the_output_too(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.lora_a": integers(5, 2), "model.embed_tokens.lora_b": integers(2, 3)}
    folder = adapter_folder(tmp_path / "adapter", tensors)
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text('{"tie_word_embeddings": true}')
    adapter = formats.load(folder, options=ReadOptions(base_config=tmp_path / "base"))
    assert adapter.tied == {"lm_head": "model.embed_tokens"}
    pairs = adapter.pairs
    assert pairs["lm_head"].delta().tolist() == pairs["model.embed_tokens"].delta().T.tolist()
    assert formats.load(folder).tied == {}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full'; only lora and dora are adapters"),
        ({"lora_parameters": None}, "has no lora_parameters, which hold the scale"),
        ({"lora_parameters": {"rank": 2}}, "scale in lora_parameters is None; it must be a positive number"),
        ({"lora_parameters": LORA | {"rank": 2.5}}, "rank in lora_parameters is 2.5; it must be a positive integer"),
        ({"lora_parameters": LORA | {"scale": True}}, "scale in lora_parameters is True; it must be a positive"),
        ({"lora_parameters": LORA | {"alpha": 16}}, "has scale 3.0 and alpha 16. mlx-lm multiplied the scale by alpha"),
        ({"fine_tune_type": "dora"}, "the config has fine_tune_type dora, but m is missing"),
    ],
)
def test_configs_of_something_else_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = adapter_folder(tmp_path, {"fc.lora_a": integers(4, 2), "fc.lora_b": integers(2, 3)}, **config)
    assert message in refusal(folder)


def test_everything_that_is_wrong_is_listed(tmp_path: Path) -> None:
    tensors = {
        "a.lora_a": integers(4, 2),
        "b.lora_a": integers(4, 2),
        "b.lora_b": integers(3, 3),
        "c.lora_a": integers(2, 2, 4),
        "c.lora_b": integers(2, 3, 2),
        "norm.weight": integers(2),
    }
    assert refusal(adapter_folder(tmp_path, tensors)).splitlines()[1:] == [
        "  a: B is missing",
        "  b: A and B have different ranks: A is (2, 4), B is (3, 3)",
        "  c: A (2, 2, 4) and B (2, 3, 2) are not (experts, rank, in) and (experts, out, rank)",
        "  norm.weight: unknown kind of tensor",
    ]


def test_the_config_records_the_scale_and_no_option_changes_it(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path, {"fc.lora_a": integers(4, 2), "fc.lora_b": integers(2, 3)})
    assert "lora_alpha= is for adapters that do not record it" in refusal(folder, lora_alpha=2.0)
    (folder / "adapters.safetensors").rename(folder / "0000100_adapters.safetensors")
    assert refusal(folder) == "ADAPTER has no adapters.safetensors"
    assert formats.load(folder / "0000100_adapters.safetensors").pairs["fc"].rank == 2
