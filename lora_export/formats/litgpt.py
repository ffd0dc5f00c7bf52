"""Adapters of litgpt: `lit_model.pth.lora`, with `hyperparameters.yaml` and `model_config.yaml` beside it.

Its models have names of their own. The pairs get the names of Hugging Face's models here, and the one layer for q, k
and v becomes what the family has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats.fused_pairs import fuse_layers, fuse_outputs, with_outputs
from lora_export.formats.litgpt_names import NamesOfFamily, QkvForm, names_of_family
from lora_export.formats.pair_keys import Sides, keys_by_module, read_pairs
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.tensor_files import TensorSource, hash_of_files, names_in, open_tensors
from lora_export.lora import Adapter, LoraPair
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.storage.yaml_files import read_yaml

DESCRIPTION = "a folder with litgpt's lit_model.pth.lora, hyperparameters.yaml and model_config.yaml"
LITGPT_WEIGHTS = "lit_model.pth.lora"
HYPERPARAMETERS, MODEL_CONFIG = "hyperparameters.yaml", "model_config.yaml"
_KEY = re.compile(
    r"(?P<module>lm_head|transformer\.h\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.(?:gate|(?:experts\.\d+\.)?(?:fc|fc_1|fc_2|proj))))"
    r"\.lora_(?P<side>[AB])"
)
_MODULE = re.compile(r"transformer\.h\.(?P<layer>\d+)\.(?P<name>[a-z]+\.(?:experts\.(?P<expert>\d+)\.)?(?P<last>\w+))")
FC_PARTS = ("fc_1", "fc_2")
PARTS = ("lora_query", "lora_key", "lora_value")


def recognises(path: Path) -> bool:
    """Whether the folder has litgpt's file, or the file has its names and its settings are beside it."""
    weights = _weights(path)
    if not weights.is_file() or not (weights.parent / HYPERPARAMETERS).is_file():
        return False
    names = [name for name in names_in(weights) if ".lora_" in name]
    return bool(names) and all(_KEY.fullmatch(name) for name in names)


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter of litgpt. Raises InputRefused with everything that is wrong with it."""
    weights = _weights(path)
    options.refuse_rank_and_alpha(HYPERPARAMETERS)
    settings_file, config_file = weights.parent / HYPERPARAMETERS, weights.parent / MODEL_CONFIG
    if not config_file.is_file():
        raise InputRefused(f"{weights.parent} has no {MODEL_CONFIG}, which names the model and the sizes of its heads")
    model = _LitgptModel.of(settings_file, config_file)
    file = open_tensors(weights, options)
    modules, others = keys_by_module(file, _KEY)

    def build(module: str, sides: Sides) -> dict[str, LoraPair]:
        return model.pairs(module, sides, file)

    pairs, spelling = read_pairs(file, modules, build, others=others)
    if model.names.gate_up:
        layer = _ending(model.names.gate_up)
        parts = {layer: tuple(f"{layer}.{name}" for name in FC_PARTS)}
        pairs, spelling = fuse_layers(pairs, spelling, parts, {}, weights)
    sha256 = hash_of_files([settings_file, config_file, weights])
    if not file.unchanged():
        raise InputRefused(f"{file.path} changed while it was being read")
    return Adapter(
        name=name,
        format="litgpt",
        pairs=pairs,
        spelling=spelling,
        scale_source=f"lora_alpha / lora_r in {HYPERPARAMETERS}",
        metadata={"r": model.rank, "lora_alpha": model.alpha, "model": model.name},
        sha256=sha256,
    )


def _weights(path: Path) -> Path:
    return path / LITGPT_WEIGHTS if path.is_dir() else path


@dataclass(frozen=True)
class _LitgptModel:
    """The model that an adapter was trained on, and how."""

    name: str
    names: NamesOfFamily
    rank: int
    alpha: float
    parts: tuple[bool, ...]  # of q, k and v: whether it has a pair
    heads: int
    groups: int  # heads of k and v
    head_size: int

    @classmethod
    def of(cls, settings_file: Path, config_file: Path) -> _LitgptModel:
        settings, config = read_yaml(settings_file), read_yaml(config_file)
        rank = _size(settings_file, settings, "lora_r")
        alpha = settings.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e30:
            raise InputRefused(f"{settings_file}: lora_alpha must be a positive number")
        texts = {key: config.get(key) for key in ("name", "mlp_class_name")}
        for key, value in texts.items():
            if not isinstance(value, str):
                raise InputRefused(f"{config_file}: {key} must be a text")
        heads = _size(config_file, config, "n_head")
        width = _size(config_file, config, "n_embd")
        return cls(
            name=str(texts["name"]),
            names=names_of_family(str(texts["name"]), str(texts["mlp_class_name"])),
            rank=rank,
            alpha=float(alpha),
            parts=tuple(settings.get(key) is True for key in PARTS),
            heads=heads,
            groups=_size(config_file, config, "n_query_groups", heads),
            head_size=_size(config_file, config, "head_size", max(1, width // heads)),
        )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number of outputs of q, k and v."""
        return self.heads * self.head_size, self.groups * self.head_size, self.groups * self.head_size

    def pairs(self, module: str, sides: Sides, file: TensorSource) -> dict[str, LoraPair]:
        """The pairs of a module of litgpt, under the names of the family."""
        a, b = file.read(sides["a"]), file.read(sides["b"])
        if (a.ndim, b.ndim) != (2, 2) or b.shape[1] != self.rank:
            raise InputRefused(f"A {a.shape} and B {b.shape} do not have the rank {self.rank} of {HYPERPARAMETERS}")
        scale = adapter_scale(self.rank, self.alpha, {})
        if module == "lm_head":
            return {self.names.head: LoraPair(a=a, b=b, scale=scale)}
        match = _MODULE.fullmatch(module)
        assert match is not None
        layer, name = match["layer"], match["name"]
        if name == "attn.qkv":
            return self._qkv(layer, a, b, scale)
        return {self._renamed(match, layer, name): LoraPair(a=a, b=b, scale=scale)}

    def _renamed(self, match: re.Match[str], layer: str, name: str) -> str:
        if match["expert"] is not None and match["last"] in self.names.experts:
            return self.names.experts[match["last"]].format(layer, match["expert"])
        if self.names.gate_up and name in [f"mlp.{part}" for part in FC_PARTS]:
            last = name.rpartition(".")[2]  # both become one pair when all are read
            return f"{self.names.gate_up.format(layer)}.{last}"
        if name not in self.names.layers:
            raise InputRefused(f"litgpt's conversion of {self.name} has no name for it")
        return self.names.layers[name].format(layer)

    def _qkv(self, layer: str, a: Any, b: Any, scale: float) -> dict[str, LoraPair]:
        """The pairs of q, k and v. A (r for each enabled part, in), B (outputs of the enabled parts, r)."""
        enabled = [number for number, part in enumerate(self.parts) if part]
        sizes = [self.sizes[number] for number in enabled]
        if a.shape[0] != self.rank * len(enabled) or b.shape[0] != sum(sizes):
            named = ", ".join(PARTS[number] for number in enabled) or "none"
            raise InputRefused(f"A {a.shape} and B {b.shape} do not belong to the parts that are enabled: {named}")
        rows = np.cumsum([0, *sizes])
        found = {
            part: LoraPair(
                a=a[number * self.rank : (number + 1) * self.rank], b=b[rows[number] : rows[number + 1]], scale=scale
            )
            for number, part in enumerate(enabled)
        }
        if self.names.form is QkvForm.SPLIT:
            return {self.names.qkv[part].format(layer): pair for part, pair in found.items()}
        fused = fuse_outputs(found, self.sizes)
        if self.names.form is QkvForm.ALTERNATING:
            fused = with_outputs(fused, self._alternating())
        return {self.names.qkv[0].format(layer): fused}

    def _alternating(self) -> NDArray[np.int64]:
        """The outputs of q, k and v by query group: the queries of a group, its key, its value."""
        if self.heads % self.groups:
            raise InputRefused(f"{self.heads} heads are no multiple of {self.groups} query groups")
        q, k, v = np.split(np.arange(sum(self.sizes)), np.cumsum(self.sizes)[:2])
        by_group = [part.reshape(self.groups, -1) for part in (q, k, v)]
        return np.concatenate(by_group, axis=1).reshape(-1)


def _size(path: Path, table: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = table.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value < 1 << 31:
        raise InputRefused(f"{path}: {key} must be a positive integer")
    return value


def _ending(template: str) -> str:
    """What follows the number of the layer in the name of a module."""
    return template.rpartition("{}.")[2]
