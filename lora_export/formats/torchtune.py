"""Adapters of torchtune: `adapter_model.pt`, or `adapter_0.pt` of older versions.

Facts from torchtune, torchtune/models/*/_convert_weights.py. Its models have names of their own, and those with Meta's
rotary embedding have the rows of q and k in another order than Hugging Face's: each head's rows alternate between the
two halves. So the config of the base is needed. Rank and alpha are in the `adapter_config.json` that newer versions
write beside the file, or are stated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.base_config import base_config, size_in_config
from lora_export.formats.expert_layouts import stacked_pairs
from lora_export.formats.fused_pairs import GATE_AND_UP, fuse_layers, with_outputs
from lora_export.formats.pair_keys import Sides, keys_by_module, read_pairs
from lora_export.formats.peft_config import adapter_scale
from lora_export.formats.tensor_files import TensorSource, hash_of_files, names_in, open_tensors
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name, split_part
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.storage import json_files

DESCRIPTION = "a file adapter_model.pt of torchtune, or its folder"
TORCHTUNE_WEIGHTS = "adapter_model.pt"
_OLDER = "adapter_[0-9]*.pt"
_CONFIG_BESIDE = "adapter_config.json"
_LAYER = r"(?:decoder\.)?layers\.\d+\."
_KEY = re.compile(
    rf"(?P<module>(?:decoder\.)?output|{_LAYER}(?:attn|mlp)(?:\.shared_expert)?\.\w+)\."
    r"(?:lora_)?(?P<side>(?<=lora_)[ab](?=\.weight)|(?<!lora_)magnitude)(?:\.weight)?"
)
_OF_EXPERTS = re.compile(rf"(?P<module>{_LAYER}mlp\.experts\.lora_(?:gate|up|down))_(?P<side>[ab])")
_NAMES = {
    **{f"attn.{each}_proj": f"self_attn.{each}_proj" for each in "qkv"},
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# The types of models in which torchtune reorders the rows of q and k, and those in which it does not.
REORDERED = frozenset({"llama", "mistral", "gemma", "gemma2"})
SAME_ORDER = frozenset({"qwen2", "qwen3", "phi3", "llama4", "llama4_text", "qwen3_moe"})
_FUSED = {  # of phi3: the layer in Hugging Face's model -> torchtune's layers, in order
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def recognises(path: Path) -> bool:
    """Whether a file has torchtune's names, or a folder has such a file and none of PEFT. Nothing is unpickled."""
    weights = _weights(path)
    return weights is not None and any(
        pattern.fullmatch(name) for name in names_in(weights) for pattern in (_KEY, _OF_EXPERTS)
    )


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter of torchtune. Raises InputRefused with everything that is wrong with it."""
    weights = _weights(path)
    if weights is None:
        raise InputRefused(f"{path} has no {TORCHTUNE_WEIGHTS}")
    file = open_tensors(weights, options)
    rank, alpha, files = _rank_and_alpha(weights, options)
    model = _TorchtuneModel.of(weights, options, adapter_scale(rank, alpha, {}), rank)
    modules, others = keys_by_module(file, _KEY, _OF_EXPERTS)

    def build(module: str, sides: Sides) -> dict[str, LoraPair]:
        return (model.experts if ".experts." in module else model.pair)(module, sides, file)

    pairs, spelling = read_pairs(file, modules, build, others=others)
    pairs, spelling = model.joined(pairs, spelling, file.path)
    sha256 = hash_of_files([*files, weights])
    if not file.unchanged():
        raise InputRefused(f"{file.path} changed while it was being read")
    stacked = {split_part(each)[0] for each in pairs if split_part(each)[1]}
    return Adapter(
        name=name,
        format="torchtune",
        pairs=pairs,
        experts=dict.fromkeys(stacked, ExpertAxes.OUT_IN),
        spelling=spelling,
        scale_source=f"lora_alpha / r in {_CONFIG_BESIDE}" if files else "--lora-alpha / --lora-rank",
        metadata={"r": rank, "lora_alpha": alpha, "model_type": model.type},
        sha256=sha256,
    )


def _weights(path: Path) -> Path | None:
    if not path.is_dir():
        return path
    if any((path / name).exists() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        return None  # torchtune's export for PEFT, which is read instead
    if (path / TORCHTUNE_WEIGHTS).is_file():
        return path / TORCHTUNE_WEIGHTS
    found = list(path.glob(_OLDER))
    return found[0] if len(found) == 1 else None


def _rank_and_alpha(weights: Path, options: ReadOptions) -> tuple[int, float, list[Path]]:
    """Rank and alpha, and the file that records them, where there is one."""
    config = weights.parent / _CONFIG_BESIDE
    rank, alpha = options.lora_rank, options.lora_alpha
    if not config.is_file():
        if rank is None or alpha is None:
            raise InputRefused(
                f"{weights}: torchtune's file records neither rank nor alpha, and B A is multiplied by alpha / rank. "
                "State both as in training: --lora-rank R --lora-alpha ALPHA"
            )
        return rank, alpha, []
    options.refuse_rank_and_alpha(_CONFIG_BESIDE)
    fields = json_files.read_json(config)
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise InputRefused(f"{config}: r is {rank!r}; it must be a positive integer")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e30:
        raise InputRefused(f"{config}: lora_alpha is {alpha!r}; it must be a positive number")
    return rank, float(alpha), [config]


@dataclass(frozen=True)
class _TorchtuneModel:
    """What the base's config states of the model that an adapter was trained on."""

    type: str
    scale: float
    rank: int
    heads: int
    groups: int  # heads of k and v
    head_size: int

    @classmethod
    def of(cls, weights: Path, options: ReadOptions, scale: float, rank: int) -> _TorchtuneModel:
        config = base_config(weights.parent, options)
        if config is None:
            raise InputRefused(
                f"{weights}: torchtune orders the rows of q and k by the heads of the model, which the file does not "
                "record. Put the base's config.json beside it, or state the base: --base-config FOLDER"
            )
        inner = config.get("text_config")
        config = inner if isinstance(inner, Mapping) else config
        kind = config.get("model_type")
        if kind not in REORDERED | SAME_ORDER:
            known = ", ".join(sorted(REORDERED | SAME_ORDER))
            raise InputRefused(f"how torchtune converts models of the type {kind!r} is not known; known: {known}")
        heads = size_in_config(config, "num_attention_heads")
        width = size_in_config(config, "hidden_size")
        if heads is None or width is None:
            raise InputRefused("the base's config has no num_attention_heads or no hidden_size")
        groups = size_in_config(config, "num_key_value_heads") or heads
        return cls(str(kind), scale, rank, heads, groups, size_in_config(config, "head_dim") or max(1, width // heads))

    def renamed(self, module: str) -> str:
        """The name in Hugging Face's model. Raises InputRefused for a layer whose name is not known."""
        own = module.removeprefix("decoder.")
        if own == "output":
            return "lm_head"
        layer, _, inner = own.removeprefix("layers.").partition(".")
        shared = "shared_expert." if ".shared_expert." in inner else ""
        known = _NAMES.get(inner.replace("shared_expert.", ""))
        if known is None:
            raise InputRefused("which layer of the base this is is not known")
        block, _, last = known.partition(".")
        if block == "mlp" and self.type.startswith("llama4"):
            block = "feed_forward"
        return f"model.layers.{layer}.{block}.{shared}{last}"

    def pair(self, module: str, sides: Sides, file: TensorSource) -> dict[str, LoraPair]:
        """The pair of a linear layer, with the rows in Hugging Face's order."""
        a, b = file.read(sides["a"]), file.read(sides["b"])
        magnitude = file.read(sides["magnitude"]) if "magnitude" in sides else None
        if (a.ndim, b.ndim) != (2, 2) or (a.shape[0], b.shape[1]) != (self.rank, self.rank):
            raise InputRefused(f"A {a.shape} and B {b.shape} do not have the rank {self.rank}")
        pair = LoraPair(a=a, b=b, scale=self.scale, magnitude=magnitude)
        last = module.rpartition(".")[2]
        if self.type in REORDERED and last in ("q_proj", "k_proj"):
            heads = self.heads if last == "q_proj" else self.groups
            if b.shape[0] != heads * self.head_size or self.head_size % 2:
                raise InputRefused(f"B is {b.shape}; the base has {heads} heads of {self.head_size} rows there")
            rows = np.arange(b.shape[0]).reshape(heads, self.head_size // 2, 2)
            pair = with_outputs(pair, rows.transpose(0, 2, 1).reshape(-1))
        return {self.renamed(module): pair}

    def experts(self, module: str, sides: Sides, file: TensorSource) -> dict[str, LoraPair]:
        """The pair of each expert: A (experts, in, rank) and B (experts, rank, out), both transposed here."""
        a, b = file.read(sides["a"]), file.read(sides["b"])
        fits = a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1] == self.rank
        if not fits:
            raise InputRefused(f"A {a.shape} and B {b.shape} are not (experts, in, {self.rank}) and (experts, .., out)")
        owner, _, last = module.removeprefix("decoder.").rpartition(".lora_")
        if self.type.startswith("llama4"):
            owner = owner.replace(".mlp.", ".feed_forward.", 1)
        pairs = stacked_pairs(a.transpose(0, 2, 1), b.transpose(0, 2, 1), self.scale)
        return {expert_name(f"model.{owner}.{last}_proj", number): pair for number, pair in enumerate(pairs)}

    def joined(
        self, pairs: dict[str, LoraPair], spelling: dict[str, str], path: Path
    ) -> tuple[dict[str, LoraPair], dict[str, str]]:
        """The pairs with those of one layer in Hugging Face's model as one pair: of phi3, and of Llama 4's experts."""
        if self.type == "phi3":
            sizes = {"self_attn.qkv_proj": [each * self.head_size for each in (self.heads, self.groups, self.groups)]}
            return fuse_layers(pairs, spelling, _FUSED, sizes, path)
        if self.type.startswith("llama4"):
            return fuse_layers(pairs, spelling, GATE_AND_UP, {}, path)
        return pairs, spelling
