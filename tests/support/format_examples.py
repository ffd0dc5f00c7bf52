"""Adapters of each format and variant, made by hand, with the weights that their published formulas give."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.numpy import save_file

from lora_export.options.reading import ReadOptions
from support import ROOT
from support.distributed import config as peft_config
from support.distributed import lora_state, save_in_shards, save_whole
from support.handmade import peft_adapter

Array = NDArray[Any]
RANK, OUT, IN = 2, 4, 6
ALLOWED, STATED = {"allow_pickle": True}, {"allow_pickle": True, "lora_rank": RANK, "lora_alpha": 6.0}
LITGPT = json.loads((ROOT / "tests/support/litgpt_examples.json").read_text())
LLAMA = {"model_type": "llama", "hidden_size": IN, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2}


def integers(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).integers(-3, 4, shape).astype(np.float32)


@dataclass(frozen=True)
class FormatExample:
    """An adapter on disk, a base that it fits, and the weights after a merge."""

    path: Path
    base: Mapping[str, Array]
    merged: Mapping[str, Array]
    reading: ReadOptions = field(default_factory=ReadOptions)
    config: Mapping[str, Any] = field(default_factory=dict)  # of the base; empty: a bare file is enough

    @property
    def is_linear(self) -> bool:
        """Whether a graph of matrix products holds the base."""
        names = ("embed", "conv", "experts")
        return all(value.ndim == 2 and not any(each in name for each in names) for name, value in self.base.items())


def _pickle(path: Path, tensors: Mapping[str, Array]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()}, path)
    return path


def _example(path: Path, changes: Mapping[str, Array], **fields: Any) -> FormatExample:
    base = {name: integers(*change.shape) + 0.5 for name, change in changes.items()}
    merged = {name: value + changes[name] for name, value in base.items()}
    return FormatExample(path, base, merged, **fields)


def _dora(example: FormatExample, magnitude: Array) -> FormatExample:
    merged = {
        name: magnitude[:, None] * value / np.linalg.norm(value, axis=1, keepdims=True)
        for name, value in example.merged.items()
    }
    return FormatExample(example.path, example.base, merged, example.reading, example.config)


def peft_pickle(folder: Path) -> FormatExample:
    a, b = integers(RANK, IN), integers(OUT, RANK)
    adapter = peft_adapter(folder, {"fc": (a, b)}, lora_alpha=6)
    (adapter / "adapter_model.safetensors").unlink()
    key = "base_model.model.fc.lora_{}.weight"
    _pickle(adapter / "adapter_model.bin", {key.format("A"): a, key.format("B"): b})
    return _example(adapter, {"fc.weight": 3 * b @ a}, reading=ReadOptions(**ALLOWED))


def _mlx(folder: Path, tensors: Mapping[str, Array], **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": RANK, "scale": 3.0}} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def mlx_linear(folder: Path) -> FormatExample:
    a, b = integers(IN, RANK), integers(RANK, OUT)
    return _example(_mlx(folder, {"fc.lora_a": a, "fc.lora_b": b}), {"fc.weight": 3 * (a @ b).T})


def mlx_dora(folder: Path) -> FormatExample:
    a, b, m = integers(IN, RANK), integers(RANK, OUT), np.arange(1, OUT + 1, dtype=np.float32)
    tensors = {"fc.lora_a": a, "fc.lora_b": b, "fc.m": m}
    path = _mlx(folder, tensors, fine_tune_type="dora")
    return _dora(_example(path, {"fc.weight": 3 * (a @ b).T}), m)


def mlx_embedding(folder: Path) -> FormatExample:
    a, b = integers(IN, RANK), integers(RANK, OUT)
    path = _mlx(folder, {"embed_tokens.lora_a": a, "embed_tokens.lora_b": b})
    return _example(path, {"embed_tokens.weight": 3 * a @ b})


def mlx_experts(folder: Path) -> FormatExample:
    a, b = integers(3, RANK, IN), integers(3, OUT, RANK)
    name = "model.layers.0.mlp.{}.up_proj"
    path = _mlx(folder, {f"{name.format('switch_mlp')}.lora_{s}": v for s, v in (("a", a), ("b", b))})
    changes = {f"{name.format(f'experts.{n}')}.weight": 3 * b[n] @ a[n] for n in range(3)}
    return _example(path, changes)


def loralib_linear(folder: Path) -> FormatExample:
    a, b = integers(RANK, IN), integers(OUT, RANK)
    path = _pickle(folder / "a.pt", {"fc.lora_A": a, "fc.lora_B": b})
    return _example(path, {"fc.weight": 3 * b @ a}, reading=ReadOptions(**STATED))


def loralib_embedding(folder: Path) -> FormatExample:
    a, b = integers(RANK, IN), integers(OUT, RANK)
    path = _pickle(folder / "a.pt", {"embed.lora_A": a, "embed.lora_B": b})
    return _example(path, {"embed.weight": 3 * (b @ a).T}, reading=ReadOptions(**STATED))


def loralib_convolution(folder: Path) -> FormatExample:
    a, b = integers(3 * RANK, 3 * IN), integers(3 * OUT, 3 * RANK)
    path = _pickle(folder / "a.pt", {"conv.lora_A": a, "conv.lora_B": b})
    change = 3 * (b @ a).reshape(OUT, IN, 3, 3)
    return _example(path, {"conv.weight": change}, reading=ReadOptions(**STATED))


def loralib_merged(folder: Path) -> FormatExample:
    a, b = integers(2 * RANK, IN), integers(2 * OUT, RANK)
    path = _pickle(folder / "a.pt", {"c_attn.lora_A": a, "c_attn.lora_B": b})
    parts = [b[:OUT] @ a[:RANK], np.zeros((OUT, IN)), b[OUT:] @ a[RANK:]]
    reading = ReadOptions(**STATED, enable_lora={"c_attn": (True, False, True)})
    return _example(path, {"c_attn.weight": 3 * np.concatenate(parts).astype(np.float32)}, reading=reading)


def _litgpt(name: str) -> Callable[[Path], FormatExample]:
    def make(folder: Path) -> FormatExample:
        recorded = LITGPT[name]
        _pickle(folder / "lit_model.pth.lora", {n: np.float32(v) for n, v in recorded["tensors"].items()})
        (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(recorded["settings"]))
        (folder / "model_config.yaml").write_text(yaml.safe_dump(recorded["config"]))
        changes = {n: np.float32(v) for n, v in recorded["changes"].items()}
        return _example(folder, changes, reading=ReadOptions(**ALLOWED))

    return make


def _torchtune(folder: Path, tensors: Mapping[str, Array]) -> Path:
    return _pickle(folder / "adapter_model.pt", {f"layers.0.{name}": value for name, value in tensors.items()}).parent


def torchtune_rows(folder: Path) -> FormatExample:
    """q of two heads of two rows, of which torchtune has the order 0, 1 as pairs."""
    a, b = integers(RANK, IN), integers(8, RANK)
    path = _torchtune(folder, {"attn.q_proj.lora_a.weight": a, "attn.q_proj.lora_b.weight": b})
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # of each head: rows of even number, then those of odd
    change = {"model.layers.0.self_attn.q_proj.weight": 3 * (b @ a)[order]}
    return _example(path, change, reading=ReadOptions(**STATED), config=LLAMA | {"head_dim": 4})


def llama_cpp_rows(folder: Path) -> FormatExample:
    """q of two heads of four rows, which llama.cpp has as pairs of the first and the second half; alpha 6."""
    a, b = integers(RANK, IN), integers(8, RANK)
    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(str(folder / "a.gguf"), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 6.0)
    for side, value in (("a", a), ("b", b)):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{side}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # of each head: rows of even number, then those of odd
    change = {"model.layers.0.self_attn.q_proj.weight": 3 * (b @ a)[order]}
    return _example(folder / "a.gguf", change, config=LLAMA | {"head_dim": 4})


def torchtune_dora(folder: Path) -> FormatExample:
    a, b, m = integers(RANK, IN), integers(OUT, RANK), np.arange(1, OUT + 1, dtype=np.float32)
    names = ("lora_a.weight", "lora_b.weight", "magnitude")
    path = _torchtune(folder, {f"mlp.w2.{name}": value for name, value in zip(names, (a, b, m), strict=True)})
    change = {"model.layers.0.mlp.down_proj.weight": 3 * b @ a}
    return _dora(_example(path, change, reading=ReadOptions(**STATED), config=LLAMA), m)


def torchtune_fused(folder: Path) -> FormatExample:
    pairs = {name: (integers(RANK, IN), integers(OUT, RANK) + n) for n, name in enumerate(("w1", "w3"))}
    tensors = {f"mlp.{n}.lora_{s}.weight": v for n, pair in pairs.items() for s, v in zip("ab", pair, strict=True)}
    change = np.concatenate([3 * b @ a for a, b in pairs.values()])
    path = _torchtune(folder, tensors)
    config = LLAMA | {"model_type": "phi3"}
    changes = {"model.layers.0.mlp.gate_up_proj.weight": change}
    return _example(path, changes, reading=ReadOptions(**STATED), config=config)


def torchtune_experts(folder: Path) -> FormatExample:
    a, b = integers(3, IN, RANK), integers(3, RANK, OUT)
    path = _torchtune(folder, {"mlp.experts.lora_up_a": a, "mlp.experts.lora_up_b": b})
    changes = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": 3 * (a[n] @ b[n]).T for n in range(3)}
    config = LLAMA | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    return _example(path, changes, reading=ReadOptions(**STATED), config=config)


def in_shards(folder: Path) -> FormatExample:
    state = lora_state("model.")
    key = "model.base_model.model.fc.lora_{}.default.weight"
    a, b = (state[key.format(side)].numpy() for side in "AB")
    path = save_in_shards(peft_config(folder), state)
    return _example(path, {"fc.weight": 3 * b @ a}, reading=ReadOptions(**ALLOWED))


def megatron(folder: Path) -> FormatExample:
    """The rows of q, k and v by query groups: of each of the two groups one query, its key and its value."""
    a, b = integers(1, RANK, IN), integers(1, 12, RANK)
    key = "decoder.layers.self_attention.linear_qkv.adapter.linear_{}.weight"
    state = {key.format("in"): torch.from_numpy(a), key.format("out"): torch.from_numpy(b)}
    save_whole(folder, state)
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"peft": {"dim": RANK, "alpha": 6}}))
    groups = (3 * b[0] @ a[0]).reshape(2, 3, 2, IN)
    changes = {
        f"model.layers.0.self_attn.{name}_proj.weight": groups[:, place].reshape(-1, IN)
        for place, name in enumerate("qkv")
    }
    config = LLAMA | {"intermediate_size": 4, "architectures": ["LlamaForCausalLM"]}
    return _example(folder, changes, reading=ReadOptions(**ALLOWED), config=config)


def megatron_experts(folder: Path) -> FormatExample:
    """Three experts of which gate and up share A and down shares B, with a rank of their own: alpha 6 by 1."""
    shapes = {"fc1": ((1, 1, 1, IN), (1, 3, 8, 1)), "fc2": ((1, 3, 1, 4), (1, 1, IN, 1))}
    pairs = {name: tuple(integers(*shape) for shape in both) for name, both in shapes.items()}
    key = "decoder.layers.mlp.experts.linear_{}.adapter.linear_{}.weight"
    sides = {
        key.format(fc, side): each for fc, both in pairs.items() for side, each in zip(("in", "out"), both, strict=True)
    }
    save_whole(folder, {name: torch.from_numpy(each) for name, each in sides.items()})
    run = {"dim": RANK, "alpha": 6, "normalize_moe_lora": True}
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"peft": run}))
    changes = {}
    for number in range(3):
        into, down = (6 * b[0, number % b.shape[1]] @ a[0, number % a.shape[1]] for a, b in pairs.values())
        for name, change in {"gate": into[:4], "up": into[4:], "down": down}.items():
            changes[f"model.layers.0.mlp.experts.{number}.{name}_proj.weight"] = change
    sizes = {"num_experts": 3, "moe_intermediate_size": 4}
    config = LLAMA | sizes | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    return _example(folder, changes, reading=ReadOptions(**ALLOWED), config=config)


def in_a_model(folder: Path) -> FormatExample:
    """An adapter for each of three tasks, of which the second is read."""
    a, b = integers(3, RANK, IN), integers(3, OUT, RANK)
    folder.mkdir(parents=True)
    key = "fc.parametrizations.weight.0.lora_{}"
    save_file({key.format("A"): a, key.format("B"): b}, folder / "model.safetensors")
    tasks = {"lora_adaptations": ["x", "y", "z"], "lora_rank": RANK, "lora_alpha": 6}
    (folder / "config.json").write_text(json.dumps(tasks))
    return _example(folder, {"fc.weight": 3 * b[1] @ a[1]}, reading=ReadOptions(stored_adapter="y"))


EXAMPLES: dict[str, Callable[[Path], FormatExample]] = {
    "PEFT, `adapter_model.bin`": peft_pickle,
    "mlx-lm, linear": mlx_linear,
    "mlx-lm, DoRA": mlx_dora,
    "mlx-lm, embedding": mlx_embedding,
    "mlx-lm, experts": mlx_experts,
    "loralib, Linear": loralib_linear,
    "loralib, Embedding": loralib_embedding,
    "loralib, Conv2d": loralib_convolution,
    "loralib, MergedLinear": loralib_merged,
    **{f"litgpt, {name}": _litgpt(name) for name in LITGPT},
    "torchtune, rows of q": torchtune_rows,
    "llama.cpp, rows of q": llama_cpp_rows,
    "torchtune, DoRA": torchtune_dora,
    "torchtune, Phi-3": torchtune_fused,
    "torchtune, experts": torchtune_experts,
    "torch.distributed.checkpoint, shards": in_shards,
    "a model with an adapter for each task": in_a_model,
    "Megatron-Bridge, q, k and v": megatron,
    "Megatron-Bridge, experts": megatron_experts,
}
