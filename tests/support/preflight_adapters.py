"""Adapters of PEFT for small Llamas, each with one thing that some runtime does not take."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file

from support.gguf_files import llama

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """An adapter: the fields of PEFT's config, or another kind of config; and what is changed in its files."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    kind: Callable[..., peft.PeftConfig] = peft.LoraConfig
    edit: Callable[[Path], None] = lambda _: None

    def write(self, folder: Path) -> peft.PeftModel:
        """Save the adapter; return the model that computes with it."""
        torch.manual_seed(1)
        model = copy.deepcopy(llama(tied=self.tied))
        defaults: dict[str, Any] = {"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"}
        if self.kind is peft.LoraConfig:
            defaults["lora_alpha"] = 4
        adapted = peft.get_peft_model(model, self.kind(**defaults | dict(self.fields)))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    parameter.normal_(std=0.05)
        adapted.save_pretrained(folder)
        self.edit(folder)
        return adapted.eval()


def with_config(**fields: Any) -> Callable[[Path], None]:
    """Other fields in the config."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def with_keys(old: str, new: str) -> Callable[[Path], None]:
    """Other names in the file of tensors."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file({key.replace(old, new): value for key, value in load_file(path).items()}, path)

    return edit


def _as_pickle(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


def _with_added_token(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<new>": 64}')


CASES = {
    "plain": Case(),
    "alpha 10": Case({"lora_alpha": 10}),
    "a fraction as alpha": Case({"lora_alpha": 2.5}),
    "no k": Case({"target_modules": ["q_proj", "v_proj", "o_proj"]}),
    "no v": Case({"target_modules": ["q_proj", "k_proj"]}),
    "v alone": Case({"target_modules": ["v_proj"]}),
    "all linear": Case({"target_modules": "all-linear"}),
    "a pattern as targets": Case({"target_modules": ".*(gate|up)_proj"}, edit=with_config(target_modules=".*_proj")),
    "mlp": Case({"target_modules": MLP, "lora_alpha": 6}),
    "up alone": Case({"target_modules": ["up_proj"]}),
    "rank 32": Case({"r": 32, "lora_alpha": 32}),
    "rank 520": Case({"r": 520, "lora_alpha": 520, "target_modules": ["v_proj", "q_proj", "o_proj"]}),
    "rslora": Case({"use_rslora": True, "lora_alpha": 8}),
    "rslora of two ranks": Case({"use_rslora": True, "lora_alpha": 8, "rank_pattern": {"o_proj": 8}}),
    "rank pattern": Case({"rank_pattern": {"o_proj": 8}, "lora_alpha": 8}),
    "alpha pattern": Case({"alpha_pattern": {"o_proj": 16}}),
    "both patterns": Case({"rank_pattern": {"o_proj": 8}, "alpha_pattern": {"o_proj": 8}}),
    "dora": Case({"use_dora": True}),
    "declared bias": Case({"bias": "lora_only"}),
    "embedding": Case({"target_modules": ["embed_tokens", "q_proj", "v_proj"]}),
    "tied embedding": Case({"target_modules": ["embed_tokens", "q_proj", "v_proj"]}, tied=True),
    "head": Case({"target_modules": ["lm_head", "q_proj", "v_proj"]}),
    "tied head": Case({"target_modules": ["lm_head", "q_proj", "v_proj"]}, tied=True),
    "head saved whole": Case({"modules_to_save": ["lm_head"]}),
    "table saved whole": Case({"modules_to_save": ["embed_tokens"]}),
    "norm saved whole": Case({"modules_to_save": ["norm"]}),
    "layer norms saved whole": Case({"modules_to_save": ["input_layernorm"]}),
    "rows of tokens": Case({"trainable_token_indices": [3, 5]}),
    "one layer": Case({"layers_to_transform": [0]}),
    "other prefix": Case(edit=with_keys("base_model.model.model.", "base_model.model.")),
    "pickle": Case(edit=_as_pickle),
    "added token": Case(edit=_with_added_token),
    "loha": Case(kind=peft.LoHaConfig, fields={"alpha": 4}),
    "lokr": Case(kind=peft.LoKrConfig, fields={"alpha": 4}),
    "ia3": Case(
        kind=lambda **given: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        )
    ),
    "vera": Case(kind=lambda **given: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")),
}
