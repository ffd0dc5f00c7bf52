"""Adapters of Megatron-Bridge, against what Megatron's layers compute: q, k and v by groups, gate before up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import lora_export as le
from lora_export import formats
from lora_export.errors import InputRefused
from lora_export.options.reading import ReadOptions
from support.distributed import save_in_shards, save_whole

HEADS, GROUPS, SIZE, WIDTH, INNER, RANK, LAYERS = 4, 2, 3, 16, 8, 2, 2
CONFIG = {
    "model_type": "llama", "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": SIZE,
    "hidden_size": WIDTH, "intermediate_size": INNER,
}  # fmt: skip
SIZES = {  # of Megatron's layers: inputs, outputs
    "self_attention.linear_qkv": (WIDTH, (HEADS + 2 * GROUPS) * SIZE),
    "self_attention.linear_proj": (HEADS * SIZE, WIDTH),
    "mlp.linear_fc1": (WIDTH, 2 * INNER),
    "mlp.linear_fc2": (INNER, WIDTH),
}
PREFIX = "decoder.layers"


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


def adapters() -> dict[str, torch.Tensor]:
    """A and B of all layers, stacked as Megatron stores a model of equal layers."""
    state = {}
    for layer, (columns, rows) in SIZES.items():
        state[f"{PREFIX}.{layer}.adapter.linear_in.weight"] = integers(LAYERS, RANK, columns)
        state[f"{PREFIX}.{layer}.adapter.linear_out.weight"] = integers(LAYERS, rows, RANK)
    return state


def numbered(state: dict[str, torch.Tensor], outer: str = "") -> dict[str, torch.Tensor]:
    """The same with a tensor for each layer."""
    return {
        f"{outer}{name.replace(PREFIX, f'{PREFIX}.{layer}')}": value[layer].clone()
        for name, value in state.items()
        for layer in range(LAYERS)
    }


def saved(folder: Path, state: dict[str, torch.Tensor], **run: Any) -> tuple[Path, ReadOptions]:
    save_in_shards(folder / "run/iter_10", state)
    settings = {"peft": {"_target_": "megatron.bridge.peft.lora.LoRA", "dim": RANK, "alpha": 6} | run}
    (folder / "run/iter_10/run_config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "base").mkdir()
    (folder / "base/config.json").write_text(json.dumps(CONFIG))
    return folder / "run/iter_10", ReadOptions(allow_pickle=True, base_config=folder / "base")


def expected(state: dict[str, torch.Tensor], layer: int) -> dict[str, np.ndarray]:
    """The changes of Hugging Face's layers: what Megatron's code makes of the outputs of its own."""
    found = {}
    for name in SIZES:
        a, b = (state[f"{PREFIX}.{name}.adapter.linear_{side}.weight"][layer] for side in ("in", "out"))
        outputs = 3 * b @ a  # of each input alone: (outputs, inputs)
        if name.endswith("qkv"):  # (groups, the queries of a group and its key and its value, size)
            mixed = outputs.reshape(GROUPS, HEADS // GROUPS + 2, SIZE, -1)
            parts = torch.split(mixed, [HEADS // GROUPS, 1, 1], dim=1)
            found |= {f"self_attn.{n}_proj": part.reshape(-1, WIDTH) for n, part in zip("qkv", parts, strict=True)}
        elif name.endswith("fc1"):
            found["mlp.gate_proj"], found["mlp.up_proj"] = outputs.chunk(2)
        else:
            found["self_attn.o_proj" if name.endswith("linear_proj") else "mlp.down_proj"] = outputs
    return {f"model.layers.{layer}.{name}": value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("form", ["stacked", "with optimisers", "numbered", "module.module."])
def test_the_layers_are_those_of_hugging_face(tmp_path: Path, form: str):
    state = adapters()
    whole = state if form in ("stacked", "with optimisers") else numbered(state, form if "." in form else "")
    if form == "with optimisers":  # Megatron saves their state under the names of the model
        outer = ("optimizer.state.exp_avg", "chained_1.optimizer.state.fp32_param")
        whole = whole | {f"{each}.{name}": value + 1 for each in outer for name, value in state.items()}
    path, reading = saved(tmp_path, whole)
    adapter = formats.load(path, options=reading)
    changes = {name: value for layer in range(LAYERS) for name, value in expected(state, layer).items()}
    assert adapter.format == "megatron" and adapter.pairs.keys() == changes.keys()
    for name, pair in adapter.pairs.items():
        np.testing.assert_array_equal(pair.delta(), changes[name])


def test_adapters_of_q_k_v_gate_and_up_alone_are_read(tmp_path: Path):
    outputs = {"q": HEADS * SIZE, "k": GROUPS * SIZE, "gate": INNER}
    state = {}
    for part, rows in outputs.items():
        layer = "self_attention.linear_qkv" if part in "qk" else "mlp.linear_fc1"
        state[f"{PREFIX}.0.{layer}.adapter.adapter_{part}.linear_in.weight"] = integers(RANK, WIDTH)
        state[f"{PREFIX}.0.{layer}.adapter.adapter_{part}.linear_out.weight"] = integers(rows, RANK)
    path, reading = saved(tmp_path, state)
    adapter = formats.load(path, options=reading)
    assert {name: pair.shape[0] for name, pair in adapter.pairs.items()} == {
        "model.layers.0.self_attn.q_proj": 12, "model.layers.0.self_attn.k_proj": 6, "model.layers.0.mlp.gate_proj": 8,
    }  # fmt: skip


def test_peft_loads_what_is_converted(tmp_path: Path):
    state = adapters()
    path, reading = saved(tmp_path, state)
    result = le.convert(path, tmp_path / "out", to="peft", reading=reading)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=7, num_hidden_layers=LAYERS, **{k: v for k, v in CONFIG.items() if k != "model_type"})
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = peft.PeftModel.from_pretrained(model, result.output).merge_and_unload().state_dict()
    changes = {name: value for layer in range(LAYERS) for name, value in expected(state, layer).items()}
    for name, change in changes.items():
        torch.testing.assert_close(after[f"{name}.weight"], before[f"{name}.weight"] + torch.from_numpy(change))
    assert len(changes) == 14 and isinstance(model, nn.Module)


EXPERTS, EXPERT_INNER = 3, 4
WITH_EXPERTS = CONFIG | {"model_type": "qwen3_moe", "num_experts": EXPERTS, "moe_intermediate_size": EXPERT_INNER}


def experts(*sizes: int, rank: int = RANK, layers: int | None = LAYERS) -> dict[str, torch.Tensor]:
    """A and B of the experts of all layers, as their grouped layers store them; of one layer without `layers`.

    `sizes` are those of the experts' dimension, for A and B of linear_fc1 and of linear_fc2.
    """
    outer, prefix = ((LAYERS,), PREFIX) if layers else ((), f"{PREFIX}.0")
    shapes = {"linear_fc1.adapter.linear_in": (rank, WIDTH), "linear_fc1.adapter.linear_out": (2 * EXPERT_INNER, rank)}
    shapes |= {"linear_fc2.adapter.linear_in": (rank, EXPERT_INNER), "linear_fc2.adapter.linear_out": (WIDTH, rank)}
    return {
        f"{prefix}.mlp.experts.experts.{name}.weight": integers(*outer, size, *shape)
        for size, (name, shape) in zip(sizes, shapes.items(), strict=True)
    }


def changes_of_experts(state: dict[str, torch.Tensor], layer: int, scale: float = 3) -> dict[str, np.ndarray]:
    found = {}
    for expert in range(EXPERTS):
        outputs = {}
        for fc in ("linear_fc1", "linear_fc2"):
            keys = [f"{PREFIX}.mlp.experts.experts.{fc}.adapter.linear_{side}.weight" for side in ("in", "out")]
            a, b = (state[key][layer] for key in keys)
            outputs[fc] = scale * (b[expert % len(b)] @ a[expert % len(a)])
        gate, up = outputs["linear_fc1"].chunk(2)
        name = f"model.layers.{layer}.mlp.experts.{expert}"
        found |= {f"{name}.gate_proj": gate, f"{name}.up_proj": up, f"{name}.down_proj": outputs["linear_fc2"]}
    return {name: change.numpy() for name, change in found.items()}


@pytest.mark.parametrize("sizes", [(EXPERTS,) * 4, (1, EXPERTS, EXPERTS, 1)], ids=["of each", "of all"])
def test_experts_have_pairs_of_their_own(tmp_path: Path, sizes: tuple[int, ...]):
    state = experts(*sizes)
    path, reading = saved(tmp_path, state)
    (tmp_path / "base/config.json").write_text(json.dumps(WITH_EXPERTS))
    adapter = formats.load(path, options=reading)
    changes = {name: value for layer in range(LAYERS) for name, value in changes_of_experts(state, layer).items()}
    assert adapter.pairs.keys() == changes.keys() and len(changes) == LAYERS * EXPERTS * 3
    for name, pair in adapter.pairs.items():
        np.testing.assert_array_equal(pair.delta(), changes[name])


def test_a_smaller_rank_of_experts_has_a_scale_of_its_own(tmp_path: Path):
    state = experts(*(EXPERTS,) * 4, rank=1)
    path, reading = saved(tmp_path, state, normalize_moe_lora=True)
    (tmp_path / "base/config.json").write_text(json.dumps(WITH_EXPERTS))
    pairs = formats.load(path, options=reading).pairs
    for name, change in changes_of_experts(state, 1, scale=6).items():
        np.testing.assert_array_equal(pairs[name].delta(), change)
    path, reading = saved(tmp_path / "none", experts(*(EXPERTS,) * 4, rank=0), normalize_moe_lora=True)
    (tmp_path / "none/base/config.json").write_text(json.dumps(WITH_EXPERTS))
    with pytest.raises(InputRefused, match="do not have the rank 0"):
        formats.load(path, options=reading)
    path, reading = saved(tmp_path / "other", state)
    (tmp_path / "other/base/config.json").write_text(json.dumps(WITH_EXPERTS))
    with pytest.raises(InputRefused, match="do not have the rank 2"):
        formats.load(path, options=reading)


def test_merged_experts_are_those_of_the_formula(tmp_path: Path):
    state = experts(*(EXPERTS,) * 4)
    path, _ = saved(tmp_path, state)
    config = {**WITH_EXPERTS, "num_hidden_layers": LAYERS, "num_experts_per_tok": 2, "vocab_size": 7}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**config)).save_pretrained(tmp_path / "moe")
    result = le.merge(tmp_path / "moe", path, tmp_path / "out", reading=ReadOptions(allow_pickle=True))
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "moe", result.output))
    for layer in range(LAYERS):
        for name, change in changes_of_experts(state, layer).items():
            np.testing.assert_allclose(after[f"{name}.weight"] - before[f"{name}.weight"], change, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_another_number_of_experts_is_refused(tmp_path: Path, size: int):
    path, reading = saved(tmp_path, experts(size, *(EXPERTS,) * 3))
    (tmp_path / "base/config.json").write_text(json.dumps(WITH_EXPERTS))
    with pytest.raises(InputRefused, match="are not those of 3 experts"):
        formats.load(path, options=reading)


def test_one_adapter_for_all_experts_and_too_many_experts_are_refused(tmp_path: Path):
    shared = {
        f"{PREFIX}.mlp.experts.linear_fc2.adapter.linear_{side}.weight": integers(LAYERS, 2, 2)
        for side in ("in", "out")
    }
    path, reading = saved(tmp_path, shared)
    (tmp_path / "base/config.json").write_text(json.dumps(WITH_EXPERTS))
    with pytest.raises(InputRefused, match=r"are one adapter for all experts of a worker \(share_expert_adapters\)"):
        formats.load(path, options=reading)
    (tmp_path / "base/config.json").write_text(json.dumps(WITH_EXPERTS | {"num_experts": 5000}))
    with pytest.raises(InputRefused, match="num_experts is 5000; at most 4096 are read"):
        formats.load(path, options=reading)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp.experts.0.linear_fc1": (RANK, WIDTH, INNER)}, "mlp.experts.0.linear_fc1.a: unknown kind of tensor"),
        ({"mlp.linear_fc3": (RANK, WIDTH, INNER)}, "layers.0.mlp.linear_fc3: which layer of the base this is"),
        (
            {"mlp.linear_fc1": (RANK, WIDTH, INNER)},
            "linear_out has 8 rows, and the base's mlp.gate_proj, mlp.up_proj have 16",
        ),
        ({"mlp.linear_fc2": (3, INNER, WIDTH)}, r"linear_in \(3, 8\) and linear_out \(16, 3\) do not have the rank 2"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, tuple[int, int, int]], message: str):
    state = {}
    for layer, (rank, columns, rows) in change.items():
        state[f"{PREFIX}.0.{layer}.adapter.linear_in.weight"] = integers(rank, columns)
        state[f"{PREFIX}.0.{layer}.adapter.linear_out.weight"] = integers(rows, rank)
    path, reading = saved(tmp_path, state)
    with pytest.raises(InputRefused, match=message):
        formats.load(path, options=reading)


def test_what_is_missing_is_named(tmp_path: Path):
    path, reading = saved(tmp_path, numbered(adapters()), alpha="x")
    with pytest.raises(InputRefused, match=r"peft.alpha is 'x'; it must be a positive number"):
        formats.load(path, options=reading)
    (path / "run_config.yaml").unlink()
    with pytest.raises(InputRefused, match=r"has no run_config.yaml, and B A is multiplied by alpha / rank"):
        formats.load(path, options=reading)
    stated = ReadOptions(allow_pickle=True, lora_rank=RANK, lora_alpha=6)
    with pytest.raises(InputRefused, match=r"State the base: base_config=\"FOLDER\""):
        formats.load(path, options=stated)
    with pytest.raises(InputRefused, match="has pickles, which can run code"):
        formats.load(path)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama/config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "base/config.json").write_text(json.dumps(CONFIG | {"model_type": "gpt2"}))
    with pytest.raises(
        InputRefused, match="of models of the type 'gpt2' is not known; known: llama, mistral, qwen2, qwen3, qwen3_moe"
    ):
        formats.load(
            path, options=ReadOptions(allow_pickle=True, lora_rank=2, lora_alpha=6, base_config=tmp_path / "base")
        )
    whole = save_whole(tmp_path / "odd", {f"{PREFIX}.mlp.linear_fc2.adapter.linear_in.weight": integers(2, 8)})
    with pytest.raises(InputRefused, match="one for each layer is needed"):
        formats.load(
            whole, options=ReadOptions(allow_pickle=True, lora_rank=2, lora_alpha=6, base_config=tmp_path / "llama")
        )
