"""Tiny models of every architecture that transformers renames, each with an adapter that PEFT trained on it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from lora_export.names.table import read_table

# Sizes of a tiny config. A value larger than this becomes this; what the class then refuses stays as it was.
SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "n_embd", "dim", "hidden_dim", "projection_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "mlp_dim"), 96),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    **dict.fromkeys(("max_position_embeddings", "image_size"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("out_hidden_size",), 64),
}
OF_EXPERTS = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "fc1", "fc2"}
MOST_PARAMETERS = 40_000_000


class NotBuilt(Exception):
    """There is no tiny model of this class, and why."""


def architectures() -> list[str]:
    """The classes that the table has rules for."""
    table = read_table()
    return [
        name
        for name, parts in table.parts.items()
        if any(part.architecture in table.rules or part.model_type in table.rules for part in parts)
    ]


def tiny_models(name: str, *, seed: int = 0) -> Iterator[PreTrainedModel]:
    """Models of this class with small random weights, the smallest first."""
    cls = getattr(transformers, name)
    transformers.utils.logging.disable_progress_bar()
    for config in _tiny_configs(cls):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.device("meta"):
                    count = cls(config).num_parameters()
                if count > MOST_PARAMETERS:
                    continue
                torch.manual_seed(seed)
                model = cls(config).float().eval()
        except Exception:  # noqa: BLE001  the next config may do
            continue
        with torch.no_grad():
            for parameter in model.parameters():  # ones and zeros would hide an exchange of two tensors
                if parameter.is_floating_point():
                    parameter.normal_(std=0.05)
        model.tie_weights()
        yield model


def _tiny_configs(cls: type[PreTrainedModel]) -> Iterator[PretrainedConfig]:
    without_heads = {name for name in SIZES if "head" not in name}
    layers = {name for name in SIZES if SIZES[name] == 2}
    for names in (set(SIZES), without_heads, layers | {"vocab_size", "image_size", "num_experts"}, layers, set[str]()):
        try:
            config = cls.config_class()
            for part in _parts(config):
                _shrink(part, names)
        except Exception:  # noqa: BLE001  a default config may lack what its class needs
            continue
        yield config


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)


def _shrink(config: PretrainedConfig, names: set[str]) -> None:
    before = getattr(config, "num_hidden_layers", None)
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > SIZES[name]:
            try:
                setattr(config, name, SIZES[name])
            except Exception:  # noqa: BLE001  what the class refuses stays as it was
                continue
    layers = getattr(config, "num_hidden_layers", None)
    for name, value in list(vars(config).items()):  # a list with an entry for each layer, such as `layer_types`
        if isinstance(value, list) and before not in (None, layers) and len(value) == before:
            vars(config)[name] = value[:layers]
    if getattr(config, "out_indices", None) is not None and hasattr(config, "stage_names"):
        names = ["stem", *(f"stage{number}" for number in range(1, (layers or 0) + 1))]
        vars(config).update(stage_names=names, _out_features=names[-1:], _out_indices=[len(names) - 1])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id", "audio_token_id"):
        value, words = getattr(config, name, None), getattr(config, "vocab_size", None)
        if isinstance(value, int) and isinstance(words, int) and value >= words:
            setattr(config, name, words - 1)


@dataclass(frozen=True)
class Trained:
    """A base in both generations of names, an adapter that PEFT trained on it, and PEFT's own merge of the two."""

    cls: type[PreTrainedModel]
    original: Path
    loaded: Path
    adapter: Path
    merged: dict[str, torch.Tensor]
    changed: set[str]


def trained(name: str, folder: Path, **config: Any) -> Trained:
    """Save a tiny model in both generations, load the first, and train an adapter with random A and B on it.

    Raises NotBuilt where no tiny config gives a model that transformers loads as it saved it.
    """
    original, loaded, adapter = (folder / each for each in ("original", "loaded", "adapter"))
    why = "no tiny config builds it"
    for first in tiny_models(name):
        cls = type(first)
        try:
            first.save_pretrained(original)
            first.save_pretrained(loaded, save_original_format=False)
            model = reloaded(cls, original)
        except Exception as error:  # noqa: BLE001  the next config may do
            why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if not different(first.state_dict(), before):
            break
        why = "transformers does not load what it saved"
    else:
        raise NotBuilt(why)
    torch.manual_seed(1)
    settings = {"r": 2, "lora_alpha": 3, "target_modules": linear_names(model), "init_lora_weights": False} | config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft = get_peft_model(model, LoraConfig(**settings))
        except (ValueError, NotImplementedError) as error:
            raise NotBuilt(f"PEFT does not take the model: {error}") from error
        peft.save_pretrained(adapter)
        merged = peft.merge_and_unload().state_dict()
    return Trained(cls, original, loaded, adapter, merged, different(before, merged))


def linear_names(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of the linear layers; whole names where another layer has the same last part.

    Of a model with experts, the layers of its MLPs are left out: PEFT would also train the stacked experts. Of a model
    with Mamba layers, PEFT refuses their output projections.
    """
    head, config = model.get_output_embeddings(), model.config.to_json_string()
    left_out = {*(OF_EXPERTS if "expert" in config else ()), *(("out_proj",) if "mamba" in config else ())}
    linear, others = [], set()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if type(module) is torch.nn.Linear and module is not head and 0 not in module.weight.shape:
            if last not in left_out:
                linear.append(name)
        else:
            others.add(last)
    last_parts = [name.rpartition(".")[2] for name in linear]
    return sorted(
        {full if end in others or end.isdigit() else end for full, end in zip(linear, last_parts, strict=True)}
    )


def reloaded(cls: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls.from_pretrained(folder, dtype=torch.float32).eval()


def different(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor], *, tolerance: float = 0) -> set[str]:
    """The names of the tensors that are not equal, or that only one has."""
    return {
        key
        for key in set(wanted) | set(found)
        if key not in wanted
        or key not in found
        or wanted[key].shape != found[key].shape
        or not torch.allclose(wanted[key].float(), found[key].float(), rtol=0, atol=tolerance, equal_nan=True)
    }


def names_in(folder: Path) -> set[str]:
    """The names of the tensors in a folder's one file."""
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return set(header) - {"__metadata__"}
