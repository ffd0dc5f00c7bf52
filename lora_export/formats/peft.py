"""PEFT's adapters: `adapter_config.json` and `adapter_model.safetensors`, its shards, or `adapter_model.bin`.

LoRA is read here, every other kind by a module of `peft_kinds`.
Everything that is special about PEFT stays in this file and in those whose names begin with `peft_`. Alpha and rank
become one scale per pair, and wrapper prefixes are removed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, count_that_are
from lora_export.formats import WriteOptions, expert_layouts
from lora_export.formats.adapter_files import (
    TensorSource,
    hash_of_tensors,
    hash_of_unchanged,
    header_in,
    is_tensor_file,
    names_in,
    open_tensors,
    read_floats,
    refuse_problems,
    stated_rank_and_alpha,
    weights_of,
)
from lora_export.formats.peft_config import adapter_scale, checked_config, targets_of, value_for_module
from lora_export.formats.peft_keys import (
    ADAPTER_CONFIG,
    B_BIAS,
    EMBEDDING,
    LOW_RANK_KEY,
    MAGNITUDE,
    PARAMETER,
    PICKLE,
    ROWS,
    SCALE_IN_B,
    WEIGHTS,
    WHOLE,
    WRAPPER,
    A,
    B,
    Keys,
    keys_by_kind,
    magnitude_shape,
    targeted_name,
)
from lora_export.formats.peft_records import (
    axes_of_experts,
    layouts_of,
    metadata_of,
    notes_of,
    read_token_rows,
    tables_saved_again,
    tied_heads,
)
from lora_export.lora import Adapter, LoraPair, expert_name
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.storage import json_files
from lora_export.storage.artifact_kinds import is_distributed_checkpoint

DESCRIPTION = "a folder with adapter_config.json and adapter_model.safetensors"
SUFFIX = ""  # a folder
OWN_FILE = re.compile(r"adapter_model((-\d+-of-\d+)?\.safetensors|\.bin)")
# Names that PEFT gives to the modules of a model. Without the config, others may be those of another format.
OF_PEFT = re.compile(rf"{re.escape(WRAPPER)}.+|model(\.model)?\.layers\..+")
OF_TORCHTUNE = "adapter_model.pt"  # beside a config for PEFT, and in place of PEFT's files


def recognises(path: Path) -> bool:
    """Whether the folder contains PEFT's config, or PEFT's keys and no config. MLX's config has no `peft_type`."""
    folder = _folder(path)
    if (folder / OF_TORCHTUNE).exists() and not any((folder / name).exists() for name in (WEIGHTS, PICKLE)):
        return False
    if is_distributed_checkpoint(folder) and _weights(path) is None:  # its config is in the same folder
        return False
    if not (folder / ADAPTER_CONFIG).exists():
        weights = _weights(path)
        is_of_openvino = SCALE_IN_B.items() <= header_in(weights).items()
        names = names_in(weights) if weights and not is_of_openvino else ()
        return any(".lora_A." in name and LOW_RANK_KEY.fullmatch(name) and OF_PEFT.fullmatch(name) for name in names)
    try:
        return "peft_type" in json_files.read_json(folder / ADAPTER_CONFIG)
    except InputRefused:
        return True  # it is damaged; `read` reports how


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read a PEFT adapter. Raises InputRefused with everything that is wrong with it."""
    folder, weights = _folder(path), _weights(path)
    if (folder / ADAPTER_CONFIG).exists():
        json_files.read_json(folder / ADAPTER_CONFIG)  # damage comes first, and then what is missing
        options.refuse_rank_and_alpha(ADAPTER_CONFIG)
    if weights is None:
        raise InputRefused(f"{path} has no {WEIGHTS}")
    return read_tensors(open_tensors(weights, options), folder, name, options)


def write(adapter: Adapter, path: Path, options: WriteOptions) -> tuple[str, ...]:
    """Write an adapter as PEFT does into a folder (see `peft_writing`)."""
    from lora_export.formats import peft_writing  # a merge reads alone

    return peft_writing.write(adapter, path, options)


def read_tensors(file: TensorSource, folder: Path, name: str, options: ReadOptions, *shards: Path) -> Adapter:
    """Read the adapter of these tensors, which may be in shards, with the config in a folder, where that has one."""
    has_config = (folder / ADAPTER_CONFIG).exists()
    config = json_files.read_json(folder / ADAPTER_CONFIG) if has_config else {}
    if has_config and config.get("peft_type") != "LORA":
        from lora_export.formats.peft_kinds import reading  # most adapters are LoRA

        return reading.read(folder, name, config, file)
    config = checked_config(config, str(folder / ADAPTER_CONFIG)) if has_config else _stated_config(file, options)
    keys = keys_by_kind(file, config, options.stored_adapter)
    stored = _StoredPairs(file, keys, config, options)
    pairs = stored.pairs()
    rows = read_token_rows(file, keys[ROWS], config)
    replaced = {tensor: file.read(key) for tensor, key in keys[WHOLE].items()}
    tied = tied_heads(pairs, replaced, config)
    of_rank = "√r" if config.get("use_rslora") else "r"
    return Adapter(
        name=name,
        format="peft",
        pairs=pairs,
        replaced=replaced,
        biases=stored.biases(pairs),
        token_rows=rows,
        layouts=layouts_of(file, pairs, config),
        experts=axes_of_experts(file, keys, config, pairs),
        tied=tied | tables_saved_again(rows, replaced),
        targets=targets_of(config),
        saved_whole=config["modules_to_save"],
        invocation_tokens=tuple(config.get("alora_invocation_tokens") or ()),
        spelling={
            **{f"{module}.bias": key for module, key in keys[B_BIAS].items()},
            **keys[ROWS],
            **keys[WHOLE],
            **keys[B],
            **keys[A],
        },
        scale_source=f"lora_alpha / {of_rank} in {ADAPTER_CONFIG}" if has_config else "alpha / rank, as stated",
        metadata=metadata_of(folder, config),
        notes=notes_of(keys, config, tied),
        sha256=hash_of_unchanged(file, *shards, *([folder / ADAPTER_CONFIG] if has_config else ())),
        file_sha256="" if shards else hash_of_tensors(file),
    )


def _folder(path: Path) -> Path:
    """The folder of an adapter that is named by its folder or by its file of tensors."""
    return path.parent if OWN_FILE.fullmatch(path.name) else path


def _weights(path: Path) -> Path | None:
    """The file of tensors: the path itself, or that of a folder, by PEFT's name or the only one; None without."""
    if not path.is_dir():
        return path if is_tensor_file(path) else None
    own = [each for each in path.iterdir() if OWN_FILE.fullmatch(each.name)]
    return min(own, key=lambda each: (each.name == PICKLE, each.name != WEIGHTS, each.name), default=weights_of(path))


def _stated_config(file: TensorSource, options: ReadOptions) -> dict[str, Any]:
    """The config of an adapter that has none: plain LoRA, or DoRA, of the rank and alpha that are stated."""
    rank, alpha = stated_rank_and_alpha(f"{file.path} has no {ADAPTER_CONFIG} beside it", options)
    use_dora = any(".lora_magnitude_vector" in name for name in file.entries)
    return checked_config({"r": rank, "lora_alpha": alpha, "use_dora": use_dora}, str(file.path))


@dataclass(frozen=True)
class _StoredPairs:
    """The pairs of a file, whose keys are sorted."""

    file: TensorSource
    keys: Keys
    config: Mapping[str, Any]
    options: ReadOptions

    def pairs(self) -> dict[str, LoraPair]:
        """The pairs by module. Raises InputRefused with all that is wrong with them, with biases and whole tensors."""
        keys = self.keys
        problems = [f"{module}: lora_A without lora_B" for module in keys[A] if module not in keys[B]]
        problems += [f"{module}: lora_B without lora_A" for module in keys[B] if module not in keys[A]]
        problems += [f"{module}: a bias of lora_B without lora_B" for module in keys[B_BIAS] if module not in keys[B]]
        problems += [f"{module}: a magnitude without lora_A" for module in keys[MAGNITUDE] if module not in keys[A]]
        pairs: dict[str, LoraPair] = {}
        for module in keys[A]:
            if module in keys[B]:
                try:
                    pairs |= self._pairs_of(module)
                except InputRefused as error:
                    problems.append(f"{module}: {error}")
        for name, key in [*keys[B_BIAS].items(), *keys[WHOLE].items()]:
            tensor = self.file.read(key)
            bad = tensor.size - np.count_nonzero(np.isfinite(tensor.astype(np.float64)))
            if bad:
                what = f"{name}: the bias of B" if name in keys[B_BIAS] else f"{name}:"
                problems.append(f"{what} holds {count_that_are(bad, 'value')} not finite (NaN or infinity)")
        if not self.file.entries:
            problems.append("it contains no tensor")
        refuse_problems(self.file, problems)
        return pairs

    def biases(self, pairs: Mapping[str, LoraPair]) -> dict[str, NDArray[np.float32]]:
        """What is added to biases, by module."""
        keys = self.keys[B_BIAS]
        return {
            name: np.float32(pairs[name].scale) * read_floats(self.file, key).astype(np.float32)
            for name, key in keys.items()
        }

    def _pairs_of(self, module: str) -> dict[str, LoraPair]:
        """The pair of a module; of a stacked parameter, the pair of each expert."""
        a, b = (read_floats(self.file, self.keys[side][module]) for side in (A, B))
        targeted = targeted_name(module, self.keys)
        rank = value_for_module(targeted, self.config, "rank_pattern", "r")
        scale = adapter_scale(rank, value_for_module(targeted, self.config, "alpha_pattern", "lora_alpha"), self.config)
        if (parameter := self.keys[PARAMETER].get(module)) is not None and expert_layouts.is_flat(a, b, rank):
            order = expert_layouts.b_layout(parameter, self.config, self.options.moe_b_layout)
            pairs = expert_layouts.flat_pairs(a, b, rank, scale, order)
        elif expert_layouts.is_stacked(module, a, b):
            if a.shape[1] != rank:
                raise InputRefused(
                    f"A {a.shape} and B {b.shape}: the rank of each expert is {a.shape[1]}, the config's is {rank}, "
                    "and nothing states which of them alpha was divided by. Correct r or rank_pattern in "
                    f"{ADAPTER_CONFIG}"
                )
            pairs = expert_layouts.stacked_pairs(a, b, scale)
        else:
            return {module: self._pair(module, a, b, rank, scale)}
        if module in self.keys[MAGNITUDE] or module in self.keys[B_BIAS]:
            raise InputRefused("a magnitude or a bias beside the pairs of experts is not supported")
        return {expert_name(module, expert): pair for expert, pair in enumerate(pairs)}

    def _pair(self, module: str, a: NDArray[Any], b: NDArray[Any], rank: int, scale: float) -> LoraPair:
        embedding = module in self.keys[EMBEDDING]
        if self.config.get("alora_invocation_tokens") and (embedding or a.ndim > 2):
            raise InputRefused(f"A {a.shape}: an activated LoRA (alora_invocation_tokens) acts on linear layers alone")
        if embedding is not (".lora_embedding_B" in self.keys[B][module]):
            raise InputRefused("one of lora_A and lora_B is an embedding's, the other is not")
        if not a.size or not b.size:
            raise InputRefused(
                f"A {a.shape}, B {b.shape}: it has no values. DeepSpeed's ZeRO-3 saves those of other processes so: "
                "gather its checkpoint with zero_to_fp32.py"
            )
        if a.ndim != b.ndim or not 2 <= a.ndim <= 5:
            raise InputRefused(f"A {a.shape}, B {b.shape}: no linear layer, convolution or embedding has such shapes")
        if a.ndim > 2 and a.shape[0] == rank and b.shape[1] < rank and rank % b.shape[1] == 0:
            raise InputRefused(
                f"A {a.shape}, B {b.shape}: the convolution has {rank // b.shape[1]} groups. PEFT's A mixes the "
                "channels of all groups, which no weight of a grouped convolution can do: it cannot be merged"
            )
        if (a.shape[0], b.shape[1]) != (rank, rank) and not self._is_that_of_a_table(a, b):
            why = self._why_other_rank(module)
            raise InputRefused(f"A {a.shape} and B {b.shape} disagree with the config's rank {rank}{why}")
        return LoraPair(
            a=a,
            b=b,
            scale=scale,
            magnitude=self._magnitude(module, b),
            embedding=embedding,
            as_stored=module in self.keys[PARAMETER],
        )

    def _is_that_of_a_table(self, a: NDArray[Any], b: NDArray[Any]) -> bool:
        """True for a head with the pair of a table (`ensure_weight_tying`): PEFT divides alpha by the head's rank."""
        return bool(self.config.get("ensure_weight_tying")) and any(
            np.array_equal(read_floats(self.file, self.keys[A][table]), b.T)
            and np.array_equal(read_floats(self.file, self.keys[B][table]), a.T)
            for table in self.keys[EMBEDDING]
            if table in self.keys[A] and table in self.keys[B]
        )

    def _why_other_rank(self, module: str) -> str:
        """That several patterns state a rank of this module; empty where they do not."""
        ranks = dict.fromkeys(self.config["rank_pattern"].values(targeted_name(module, self.keys)))
        if len(ranks) < 2:
            return ""
        return (
            f". Patterns of rank_pattern with the ranks {', '.join(map(str, ranks))} match it. PEFT takes the first, "
            f"and saves them sorted, whatever their order was in training: restore it in {ADAPTER_CONFIG}, in "
            "alpha_pattern too"
        )

    def _magnitude(self, module: str, b: NDArray[Any]) -> NDArray[Any] | None:
        """DoRA's magnitudes (out,). PEFT saves those of a convolution as (1, out, 1...)."""
        key = self.keys[MAGNITUDE].get(module)
        if (key is not None) is not bool(self.config.get("use_dora")):
            raise InputRefused(
                "the config sets use_dora, but lora_magnitude_vector is missing: PEFT leaves it out where it converts "
                "PiSSA or OLoRA to plain LoRA. Merge the adapter in PEFT before that (merge_and_unload)"
                if key is None
                else "lora_magnitude_vector is present, but the config does not set use_dora"
            )
        if key is None:
            return None
        magnitude = read_floats(self.file, key)
        if magnitude.shape != magnitude_shape(b):
            raise InputRefused(f"the magnitude is {magnitude.shape}, B {b.shape} needs {magnitude_shape(b)}")
        return magnitude.reshape(-1)
