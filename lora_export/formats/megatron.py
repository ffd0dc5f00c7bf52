"""Adapters of Megatron-Bridge: a folder of torch.distributed.checkpoint with `...linear_qkv.adapter.linear_in.weight`.

Facts from Megatron-Bridge, src/megatron/bridge/peft and models/conversion/peft_bridge.py. `linear_in` is A (rank, in),
and `linear_out` is B (out, rank). A layer for q, k and v has the rows of each query group one after another: its
queries, its key, its value. One for gate and up has the rows of gate first. A model of equal layers has them stacked,
without numbers. A layer of experts has (experts, rank, in) and (experts, out, rank), where A or B may be one for all.
Rank and alpha are in `run_config.yaml` (`peft.dim`, `peft.alpha`), in the folder or that around it. With
`normalize_moe_lora` experts have a rank of their own, and alpha is divided by this one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused
from lora_export.formats import adapter_files
from lora_export.formats.dcp import OF_MEGATRON, refuse_without_permission
from lora_export.formats.litgpt import read_yaml
from lora_export.formats.peft_config import adapter_scale
from lora_export.lora import Adapter, LoraPair
from lora_export.names.families import EXPERT, column, read_rows
from lora_export.names.row_orders import Heads, RowOrder
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
from lora_export.storage.artifact_kinds import is_distributed_checkpoint
from lora_export.storage.distributed_checkpoint import open_distributed_checkpoint, shards_of, text_in_metadata
from lora_export.storage.safetensors_file import Entry
from lora_export.storage.torch_pickle import PickledTensors

DESCRIPTION = "a folder of torch.distributed.checkpoint with adapters of Megatron-Bridge (`adapter.linear_in.weight`)"
RUN_CONFIG = "run_config.yaml"
MAX_EXPERTS = 4096  # each gets a pair, also where one A or B is for all
_OF_ADAPTER = ".adapter."
_OTHERS = re.compile(r"_extra_state|^(chained_\d+\.)?optimizer\.")  # what Megatron saves beside the model, by its names
_SIDES = {"in": "a", "out": "b"}
_EXPERTS = "experts"
_KEY = re.compile(
    r"(?P<module>(?:decoder\.)?layers\.\d+\.\w+\.(?:experts\.)?linear_\w+(?:\.(?P<part>q|k|v|gate|up))?)\.(?P<side>[ab])"
)
_STACK = re.compile(r"(?:module\.)*(?P<outer>decoder\.layers\.)(?:(?P<layer>\d+)\.)?(?P<rest>.+)")


def recognises(path: Path) -> bool:
    """Whether a checkpoint's metadata have names of Megatron-Bridge. Nothing is unpickled."""
    return is_distributed_checkpoint(path) and any(map(OF_MEGATRON.search, text_in_metadata(path)))


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read an adapter of Megatron-Bridge. Raises InputRefused with everything that is wrong with it."""
    refuse_without_permission(path, options)
    rank, alpha, files = _rank_and_alpha(path, options)
    has_own_rank = bool(files) and bool(_stated_peft(files[0]).get("normalize_moe_lora"))
    model = _MegatronModel.of(path, options, rank, alpha, has_own_rank=has_own_rank)
    found = open_distributed_checkpoint(path, lambda key: _OF_ADAPTER in key and not _OTHERS.search(key))
    pairs, spelling = adapter_files.read_pairs(_by_layer(found), model.pairs, _KEY)
    return Adapter(
        name=name,
        format="megatron",
        pairs=pairs,
        layouts=dict.fromkeys(pairs, "out_in"),
        spelling=spelling,
        scale_source=f"alpha / dim in {RUN_CONFIG}" if files else "alpha / rank, as stated",
        metadata={"r": rank, "lora_alpha": alpha, "model_type": model.type},
        sha256=adapter_files.hash_of_unchanged(found, *shards_of(path), *files),
    )


def _rank_and_alpha(path: Path, options: ReadOptions) -> tuple[int, float, list[Path]]:
    """Rank and alpha, and the file that records them, where there is one."""
    config = next((each / RUN_CONFIG for each in (path, path.parent) if (each / RUN_CONFIG).is_file()), None)
    if config is None:
        return *adapter_files.stated_rank_and_alpha(f"{path} has no {RUN_CONFIG}", options), []
    options.refuse_rank_and_alpha(RUN_CONFIG)
    peft = _stated_peft(config)
    rank = adapter_files.positive_size(config, "peft.dim", peft.get("dim"))
    return rank, adapter_files.positive_number(config, "peft.alpha", peft.get("alpha")), [config]


def _stated_peft(config: Path) -> Mapping[str, Any]:
    peft = read_yaml(config).get("peft")
    return peft if isinstance(peft, Mapping) else {}


def _by_layer(found: PickledTensors) -> PickledTensors:
    """The tensors with a number for each layer, without the word `adapter`; parts of a layer have their last names."""
    arrays: dict[str, NDArray[Any]] = {}
    for key, value in found.arrays.items():
        match = _STACK.fullmatch(key)
        if match is None:
            arrays[key] = value  # refused by its name
            continue
        outer, rest = match["outer"], match["rest"].replace(f"{_OF_ADAPTER}adapter_", ".").replace(_OF_ADAPTER, ".")
        rest = rest.replace(".experts.experts.", f".{_EXPERTS}.")  # Megatron-Core's name of a grouped layer in shards
        for side, own in _SIDES.items():
            rest = rest.replace(f".linear_{side}.weight", f".{own}")
        if match["layer"] is not None:
            arrays[f"{outer}{match['layer']}.{rest}"] = value
        elif value.ndim == 3 or (value.ndim == 4 and f".{_EXPERTS}." in rest):
            arrays |= {f"{outer}{layer}.{rest}": each for layer, each in enumerate(value)}
        else:
            raise InputRefused(f"{found.path}: {key} is {value.shape}; one for each layer is needed")
    entries = {name: Entry(name, one.dtype, one.shape, 0, one.nbytes) for name, one in arrays.items()}
    return replace(found, entries=entries, arrays=arrays)


@dataclass(frozen=True)
class _MegatronModel:
    """What the base's config states of the model that an adapter was trained on."""

    type: str
    rank: int
    alpha: float
    heads: Heads
    config: Mapping[str, Any]
    has_own_rank: bool  # of experts

    @classmethod
    def of(cls, path: Path, options: ReadOptions, rank: int, alpha: float, *, has_own_rank: bool) -> _MegatronModel:
        config = adapter_files.base_config(path, options)
        if config is None:
            raise InputRefused(
                f"{path}: Megatron orders the rows of q, k and v by the heads of the model, which the checkpoint does "
                f"not record. State the base: {named('base_config', 'FOLDER')}"
            )
        kind, known = config.get("model_type"), column("megatron")
        if not isinstance(kind, str) or kind not in known:
            raise InputRefused(
                f"what Megatron-Bridge calls the layers of models of the type {kind!r} is not known; known: "
                f"{', '.join(sorted(known))}"
            )
        heads = adapter_files.heads_in_config(config)
        adapter_scale(rank, alpha, {})  # refused before anything is read
        return cls(kind, rank, alpha, heads, config, has_own_rank)

    def _size(self, name: str) -> int:
        return adapter_files.positive_size("the base's config", name, self.config.get(name))

    @property
    def _experts(self) -> int:
        """Their number, under the name of transformers 5 or 4."""
        name = "num_local_experts" if "num_local_experts" in self.config else "num_experts"
        if (experts := self._size(name)) > MAX_EXPERTS:
            raise InputRefused(f"the base's config: {name} is {experts}; at most {MAX_EXPERTS} are read")
        return experts

    def pairs(self, module: str, tensors: adapter_files.Tensors) -> dict[str, LoraPair]:
        """The pairs of a layer of Megatron, under the names of Hugging Face's model."""
        outer, layer, *rest = module.removeprefix("decoder.").split(".")
        part = rest.pop() if not rest[-1].startswith("linear_") else ""
        layers = read_rows("families.json")["megatron_modules"].get(".".join(rest))
        if layers is None or (part and part not in layers):
            raise InputRefused("which layer of the base this is is not known")
        prefix = f"model.{outer}.{layer}."
        if _EXPERTS not in rest:
            return self._layer(prefix, layers, part, tensors["a"], tensors["b"], self.rank)
        a, b, experts = tensors["a"], tensors["b"], self._experts
        if a.ndim == 2 or b.ndim == 2:
            raise InputRefused(
                f"linear_in {a.shape} and linear_out {b.shape} are one adapter for all experts of a worker "
                "(share_expert_adapters), which is not read"
            )
        if (a.ndim, b.ndim) != (3, 3) or not {len(a), len(b)} <= {1, experts}:
            raise InputRefused(f"linear_in {a.shape} and linear_out {b.shape} are not those of {experts} experts")
        rank = a.shape[1] if self.has_own_rank else self.rank
        found: dict[str, LoraPair] = {}
        for number in range(experts):
            own = {name: other.replace(EXPERT, str(number)) for name, other in layers.items()}
            found |= self._layer(prefix, own, part, a[number % len(a)], b[number % len(b)], rank)
        return found

    def _layer(
        self, prefix: str, layers: Mapping[str, str], part: str, a: NDArray[Any], b: NDArray[Any], rank: int
    ) -> dict[str, LoraPair]:
        if not rank or (a.ndim, b.ndim) != (2, 2) or (a.shape[0], b.shape[1]) != (rank, rank):
            raise InputRefused(f"linear_in {a.shape} and linear_out {b.shape} do not have the rank {rank}")
        scale = adapter_scale(rank, self.alpha, {})
        rows = {f"{prefix}{other}": own for other, own in self._rows(layers, part, len(b)).items()}
        return {name: LoraPair(a, b if own is None else b[own], scale) for name, own in rows.items()}

    def _rows(self, layers: Mapping[str, str], part: str, rows: int) -> dict[str, NDArray[np.int64] | None]:
        """The layers of Hugging Face's model that are in one of Megatron, each with its rows there."""
        if part or len(layers) == 1:
            return {layers[part]: None}
        is_attention = "q" in layers
        sizes = self.heads.outputs if is_attention else (self._inner(layers),) * 2
        if rows != sum(sizes):
            raise InputRefused(
                f"linear_out has {rows} rows, and the base's {', '.join(layers.values())} have {sum(sizes)}"
            )
        order = np.argsort(RowOrder.QUERY_GROUPS.indices(rows, self.heads)) if is_attention else np.arange(rows)
        return dict(zip(layers.values(), np.split(order, np.cumsum(sizes)[:-1]), strict=True))

    def _inner(self, layers: Mapping[str, str]) -> int:
        """The width between gate and down."""
        are_experts = any(f".{_EXPERTS}." in name for name in layers.values())
        return self._size("moe_intermediate_size" if are_experts else "intermediate_size")
