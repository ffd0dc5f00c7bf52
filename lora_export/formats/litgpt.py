"""Adapters of litgpt: `lit_model.pth.lora`, with `hyperparameters.yaml` and `model_config.yaml` beside it.

Its models have names of their own. The pairs get the names of Hugging Face's models here, and the one layer for q, k
and v becomes what the family has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, first_line
from lora_export.formats import adapter_files
from lora_export.formats.peft_config import adapter_scale
from lora_export.isolation.limits import MAX_SETTINGS
from lora_export.lora import Adapter, LoraPair
from lora_export.names.families import FamilyNames, read_rows
from lora_export.names.row_orders import Heads
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.storage import input_files

DESCRIPTION = "a folder with litgpt's lit_model.pth.lora, hyperparameters.yaml and model_config.yaml"
LITGPT_WEIGHTS = "lit_model.pth.lora"
HYPERPARAMETERS, LITGPT_CONFIG = "hyperparameters.yaml", "model_config.yaml"
_KEY = re.compile(
    r"(?P<module>lm_head|transformer\.h\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.(?:gate|(?:experts\.\d+\.)?(?:fc|fc_1|fc_2|proj))))"
    r"\.lora_(?P<side>[AB])"
)
_QKV = ".qkv"  # the one layer for q, k and v, in this order
PARTS = ("lora_query", "lora_key", "lora_value")


def recognises(path: Path) -> bool:
    """Whether the folder has litgpt's file, or the file has its names and its settings are beside it."""
    weights = _weights(path)
    if not weights.is_file() or not (weights.parent / HYPERPARAMETERS).is_file():
        return False
    names = [name for name in adapter_files.names_in(weights) if ".lora_" in name]
    return bool(names) and all(_KEY.fullmatch(name) for name in names)


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter of litgpt. Raises InputRefused with everything that is wrong with it."""
    weights = _weights(path)
    options.refuse_rank_and_alpha(HYPERPARAMETERS)
    settings_file, config_file = weights.parent / HYPERPARAMETERS, weights.parent / LITGPT_CONFIG
    if not config_file.is_file():
        raise InputRefused(f"{weights.parent} has no {LITGPT_CONFIG}, which names the model and the sizes of its heads")
    model = _LitgptModel.of(settings_file, config_file)
    file = adapter_files.open_tensors(weights, options)
    pairs, spelling = adapter_files.read_pairs(file, model.pairs, _KEY)
    pairs, spelling = model.names.with_joined(pairs, spelling, weights, model.heads)
    return Adapter(
        name=name,
        format="litgpt",
        pairs=pairs,
        spelling=spelling,
        scale_source=f"lora_alpha / lora_r in {HYPERPARAMETERS}",
        metadata={"r": model.rank, "lora_alpha": model.alpha, "model": model.name},
        sha256=adapter_files.hash_of_unchanged(file, settings_file, config_file),
        file_sha256=adapter_files.hash_of_tensors(file),
    )


def _weights(path: Path) -> Path:
    return path / LITGPT_WEIGHTS if path.is_dir() else path


@dataclass(frozen=True)
class _LitgptModel:
    """The model that an adapter was trained on, and how."""

    name: str
    names: FamilyNames
    rank: int
    alpha: float
    parts: tuple[bool, ...]  # of q, k and v: whether it has a pair
    heads: Heads

    @classmethod
    def of(cls, settings_file: Path, config_file: Path) -> _LitgptModel:
        settings, config = read_yaml(settings_file), read_yaml(config_file)
        texts = {key: config.get(key) for key in ("name", "mlp_class_name")}
        for key, value in texts.items():
            if not isinstance(value, str):
                raise InputRefused(f"{config_file}: {key} must be a text")

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key)
            return adapter_files.positive_size(config_file, key, default if value is None else value)

        heads = size("n_head")
        groups, head = size("n_query_groups", heads), size("head_size", max(1, size("n_embd") // heads))
        return cls(
            name=str(texts["name"]),
            names=names_of_family(str(texts["name"]), str(texts["mlp_class_name"])),
            rank=adapter_files.positive_size(settings_file, "lora_r", settings.get("lora_r")),
            alpha=adapter_files.positive_number(settings_file, "lora_alpha", settings.get("lora_alpha")),
            parts=tuple(settings.get(key) is True for key in PARTS),
            heads=Heads(heads, groups, head),
        )

    def pairs(self, module: str, tensors: adapter_files.Tensors) -> dict[str, LoraPair]:
        """The pairs of a module of litgpt, under the names of the family."""
        a, b = tensors["a"], tensors["b"]
        if (a.ndim, b.ndim) != (2, 2) or b.shape[1] != self.rank:
            raise InputRefused(f"A {a.shape} and B {b.shape} do not have the rank {self.rank} of {HYPERPARAMETERS}")
        scale = adapter_scale(self.rank, self.alpha, {})
        if not module.endswith(_QKV):
            return {self._renamed(module): LoraPair(a=a, b=b, scale=scale)}
        return {
            self._renamed(module.removesuffix(_QKV) + f".{part}"): LoraPair(a=own_a, b=own_b, scale=scale)
            for part, own_a, own_b in self._qkv(a, b)
        }

    def _renamed(self, module: str) -> str:
        name = self.names.renamed(module)
        if name is None:
            raise InputRefused(f"litgpt's conversion of {self.name} has no name for it")
        return name

    def _qkv(self, a: NDArray[Any], b: NDArray[Any]) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
        """A and B of q, k and v. A is (r for each enabled part, in), B is (outputs of the enabled parts, r)."""
        enabled = [number for number, part in enumerate(self.parts) if part]
        sizes = [self.heads.outputs[number] for number in enabled]
        if not enabled or a.shape[0] != self.rank * len(enabled) or b.shape[0] != sum(sizes):
            named = ", ".join(PARTS[number] for number in enabled) or "none"
            raise InputRefused(f"A {a.shape} and B {b.shape} do not belong to the parts that are enabled: {named}")
        for number, own_a, own_b in zip(
            enabled, np.split(a, len(enabled)), np.split(b, np.cumsum(sizes)[:-1]), strict=True
        ):
            yield "qkv"[number], own_a, own_b


def names_of_family(name: str, mlp_class: str) -> FamilyNames:
    """The names for a model of litgpt, by its `name` and `mlp_class_name`. Raises InputRefused for others."""
    table = read_rows("litgpt.json")
    for by_name, by_class, family in table["choice"]:
        if re.fullmatch(by_name, name.lower(), re.DOTALL) and re.fullmatch(by_class, mlp_class, re.DOTALL):
            return FamilyNames.of(table["families"][family])
    raise InputRefused(
        f"litgpt's model {name!r} has mlp_class_name {mlp_class!r}, and litgpt has no conversion of it to Hugging "
        "Face's names"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The table of settings in a file, by PyYAML's safe loader: it makes plain values alone.

    Raises InputRefused for text that is not YAML, that is no table with names, and above MAX_SETTINGS. Values may share
    parts with each other, and be larger than the file when they are printed.
    """
    import yaml  # here, because most adapters have no such file, and importing it takes 8 ms of each merge

    text = input_files.read_text(path, MAX_SETTINGS)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as error:
        raise InputRefused(f"{path} is not YAML ({first_line(error)[:100]})") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputRefused(f"{path} is not a table of settings")
    return content
