"""Adapters of torchtune: `adapter_model.pt`, or `adapter_0.pt` of older versions.

Facts from torchtune, torchtune/models/*/_convert_weights.py. Its models have names of their own, and those with Meta's
rotary embedding have the rows of q and k in another order than Hugging Face's: each head's rows alternate between the
two halves. So the config of the base is needed. Rank and alpha are in the `adapter_config.json` that newer versions
write beside the file, or are stated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats import adapter_files
from lora_export.formats.expert_layouts import stacked_pairs
from lora_export.formats.peft_config import adapter_scale
from lora_export.lora import Adapter, ExpertAxes, LoraPair, expert_name, split_part
from lora_export.names.families import FamilyNames, column, read_rows
from lora_export.names.row_orders import Heads
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
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


def recognises(path: Path) -> bool:
    """Whether a file has torchtune's names, or a folder has such a file and none of PEFT. Nothing is unpickled."""
    weights = _weights(path)
    return weights is not None and any(
        pattern.fullmatch(name) for name in adapter_files.names_in(weights) for pattern in (_KEY, _OF_EXPERTS)
    )


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter of torchtune. Raises InputRefused with everything that is wrong with it."""
    weights = _weights(path)
    if weights is None:
        raise InputRefused(f"{path} has no {TORCHTUNE_WEIGHTS}")
    file = adapter_files.open_tensors(weights, options)
    rank, alpha, files = _rank_and_alpha(weights, options)
    model = _TorchtuneModel.of(weights, options, adapter_scale(rank, alpha, {}), rank)
    pairs, spelling = adapter_files.read_pairs(file, model.pairs, _KEY, _OF_EXPERTS)
    pairs, spelling = model.names.with_joined(pairs, spelling, file.path, model.heads)
    return Adapter(
        name=name,
        format="torchtune",
        pairs=pairs,
        experts={owner: ExpertAxes.OUT_IN for owner, index in map(split_part, pairs) if index},
        spelling=spelling,
        scale_source=f"lora_alpha / r in {_CONFIG_BESIDE}"
        if files
        else f"{named('lora_alpha')} / {named('lora_rank')}",
        metadata={"r": rank, "lora_alpha": alpha, "model_type": model.type},
        sha256=adapter_files.hash_of_unchanged(file, *files),
        file_sha256=adapter_files.hash_of_tensors(file),
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
    if not config.is_file():
        why = f"{weights}: torchtune's files record neither rank nor alpha"
        return *adapter_files.stated_rank_and_alpha(why, options), []
    options.refuse_rank_and_alpha(_CONFIG_BESIDE)
    fields = json_files.read_json(config)
    rank = adapter_files.positive_size(config, "r", fields.get("r"))
    return rank, adapter_files.positive_number(config, "lora_alpha", fields.get("lora_alpha")), [config]


@dataclass(frozen=True)
class _TorchtuneModel:
    """What the base's config states of the model that an adapter was trained on."""

    type: str
    scale: float
    rank: int
    heads: Heads
    names: FamilyNames

    @classmethod
    def of(cls, weights: Path, options: ReadOptions, scale: float, rank: int) -> _TorchtuneModel:
        config = adapter_files.base_config(weights.parent, options)
        if config is None:
            raise InputRefused(
                f"{weights}: torchtune orders the rows of q and k by the heads of the model, which the file does not "
                f"record. Put the base's config.json beside it, or state the base: {named('base_config', 'FOLDER')}"
            )
        config = adapter_files.language_part(config)
        kind = config.get("model_type")
        rows = column("torchtune")
        if not isinstance(kind, str) or kind not in rows:
            known = ", ".join(sorted(rows))
            raise InputRefused(f"how torchtune converts models of the type {kind!r} is not known; known: {known}")
        names = FamilyNames.of(rows[kind], read_rows("families.json")["torchtune_modules"])
        return cls(kind, scale, rank, adapter_files.heads_in_config(config), names)

    def renamed(self, module: str) -> str:
        """The name in Hugging Face's model. Raises InputRefused for a layer whose name is not known."""
        name = self.names.renamed(module.removeprefix("decoder."))
        if name is None:
            raise InputRefused("which layer of the base this is is not known")
        return name

    def pairs(self, module: str, tensors: adapter_files.Tensors) -> dict[str, LoraPair]:
        """The pair of a linear layer, with the rows in Hugging Face's order; of stacked experts, the pair of each."""
        a, b = tensors["a"], tensors["b"]
        if ".experts." in module:
            return self._experts(module, a, b)
        if (a.ndim, b.ndim) != (2, 2) or (a.shape[0], b.shape[1]) != (self.rank, self.rank):
            raise InputRefused(f"A {a.shape} and B {b.shape} do not have the rank {self.rank}")
        pair = LoraPair(a=a, b=b, scale=self.scale, magnitude=tensors.get("magnitude"))
        return {self.renamed(module): self.names.reordered(module, pair, self.heads)}

    def _experts(self, module: str, a: NDArray[Any], b: NDArray[Any]) -> dict[str, LoraPair]:
        """The pair of each expert: A (experts, in, rank) and B (experts, rank, out), both transposed here."""
        if not (a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1] == self.rank):
            raise InputRefused(f"A {a.shape} and B {b.shape} are not (experts, in, {self.rank}) and (experts, .., out)")
        pairs = stacked_pairs(a.transpose(0, 2, 1), b.transpose(0, 2, 1), self.scale)
        return {expert_name(self.renamed(module), number): pair for number, pair in enumerate(pairs)}
