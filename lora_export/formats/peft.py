"""PEFT's LoRA adapters: `adapter_config.json` and `adapter_model.safetensors`, or a pickle `adapter_model.bin`.

Everything that is special about PEFT stays in this file, `peft_config.py`, `peft_keys.py` and `peft_records.py`. Alpha
and rank become one scale per pair, and wrapper prefixes are removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, listed
from lora_export.formats import expert_layouts
from lora_export.formats.peft_config import (
    adapter_scale,
    read_config,
    targets_of,
    value_for_module,
)
from lora_export.formats.peft_keys import (
    B_BIAS,
    EMBEDDING,
    MAGNITUDE,
    OUT_PROJ,
    PARAMETER,
    ROWS,
    WHOLE,
    WRAPPER,
    A,
    B,
    keys_by_kind,
    targeted_name,
)
from lora_export.formats.peft_records import (
    axes_of_experts,
    layouts_of,
    metadata_of,
    notes_of,
    tied_heads,
)
from lora_export.formats.tensor_files import TensorSource, hash_of_unchanged, open_tensors
from lora_export.lora import Adapter, LoraPair, TokenRows, expert_name, is_weight_of
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.storage import json_files, safetensors_file

DESCRIPTION = "a folder with adapter_config.json and adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
OF_TORCHTUNE = "adapter_model.pt"  # beside a config for PEFT, and in place of PEFT's files


def recognises(path: Path) -> bool:
    """Whether the folder contains PEFT's config. MLX's file of the same name has no `peft_type`."""
    folder = _folder(path)
    if (folder / OF_TORCHTUNE).exists() and not any((folder / name).exists() for name in (WEIGHTS, PICKLE)):
        return False
    try:
        return "peft_type" in json_files.read_json(folder / ADAPTER_CONFIG)
    except InputRefused:
        return (folder / ADAPTER_CONFIG).exists()  # it is damaged; `read` reports how


def read(path: Path, name: str, options: ReadOptions = DEFAULTS) -> Adapter:
    """Read a PEFT adapter. Raises InputRefused with everything that is wrong with it."""
    folder = _folder(path)
    config = read_config(folder / ADAPTER_CONFIG)
    options.refuse_rank_and_alpha(ADAPTER_CONFIG)
    weights = path if path != folder else folder / WEIGHTS
    if not weights.exists() and (folder / PICKLE).exists():
        weights = folder / PICKLE
    if not weights.exists():
        raise InputRefused(f"{path} has no {WEIGHTS}")
    file = open_tensors(weights, options)
    keys = keys_by_kind(file, config)
    pairs, biases = _read_pairs(file, keys, config, options)
    rows = _read_token_rows(file, keys[ROWS], config)
    replaced = {tensor: file.read(key) for tensor, key in keys[WHOLE].items()}
    tied = tied_heads(pairs, replaced, config)
    return Adapter(
        name=name,
        format="peft",
        pairs=pairs,
        replaced=replaced,
        biases=biases,
        token_rows=rows,
        layouts=layouts_of(file, pairs, config),
        experts=axes_of_experts(file, keys, config, pairs),
        tied=tied,
        targets=targets_of(config),
        spelling={
            **{f"{module}.bias": key for module, key in keys[B_BIAS].items()},
            **keys[ROWS],
            **keys[WHOLE],
            **keys[B],
            **keys[A],
        },
        scale_source=f"lora_alpha / {'√r' if config.get('use_rslora') else 'r'} in {ADAPTER_CONFIG}",
        metadata=metadata_of(folder, config),
        notes=notes_of(keys, config, tied),
        sha256=hash_of_unchanged(file, folder / ADAPTER_CONFIG),
    )


def _folder(path: Path) -> Path:
    """The folder of an adapter that is named by its folder or by its file of tensors."""
    return path.parent if path.name in (WEIGHTS, PICKLE) else path


def write_files(
    folder: Path, tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write the two files of a PEFT adapter. `metadata` is added to the header of the tensors' file."""
    safetensors_file.write(folder / WEIGHTS, dict(sorted(tensors.items())), {"format": "pt", **metadata})
    json_files.write_json(folder / ADAPTER_CONFIG, config, sort_keys=True)


def pair_tensors(adapter: Adapter) -> dict[str, NDArray[Any]]:
    """The pairs of an adapter as tensors, under PEFT's keys."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, pair in adapter.pairs.items():
        module = name.removesuffix(".out_proj") + OUT_PROJ if OUT_PROJ in adapter.spelled(name) else name
        a, b = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        tensors |= {f"{WRAPPER}{module}.{a}": pair.a, f"{WRAPPER}{module}.{b}": pair.b}
        if pair.magnitude is not None:
            key = f"{WRAPPER}{module}.lora_magnitude_vector"
            tensors[key] = pair.magnitude.reshape(_magnitude_shape(pair.b))
    return tensors


def _read_pairs(
    file: TensorSource,
    keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    options: ReadOptions,
) -> tuple[dict[str, LoraPair], dict[str, NDArray[np.float32]]]:
    """Return the pairs, and what is added to biases. Raises InputRefused with everything that is wrong with them."""
    problems = [f"{module}: lora_A without lora_B" for module in keys[A] if module not in keys[B]]
    problems += [f"{module}: lora_B without lora_A" for module in keys[B] if module not in keys[A]]
    problems += [f"{module}: a bias of lora_B without lora_B" for module in keys[B_BIAS] if module not in keys[B]]
    problems += [f"{module}: a magnitude without lora_A" for module in keys[MAGNITUDE] if module not in keys[A]]
    pairs: dict[str, LoraPair] = {}
    for module in keys[A]:
        if module in keys[B]:
            try:
                pairs |= _pairs_of(module, file, keys, config, options)
            except InputRefused as error:
                problems.append(f"{module}: {error}")
    for name, key in [*keys[B_BIAS].items(), *keys[WHOLE].items()]:
        tensor = file.read(key)
        bad = tensor.size - np.count_nonzero(np.isfinite(tensor.astype(np.float64)))
        if bad:
            what = f"{name}: the bias of B" if name in keys[B_BIAS] else f"{name}:"
            problems.append(f"{what} holds {bad} values that are not finite (NaN or infinity)")
    if not file.entries:
        problems.append("it contains no tensor")
    if problems:
        raise InputRefused(f"{file.path} is refused:", listed(sorted(problems), len(problems)))
    biases = {
        module: np.float32(pairs[module].scale) * file.read(key).astype(np.float32)
        for module, key in keys[B_BIAS].items()
    }
    return pairs, biases


def _read_token_rows(file: TensorSource, keys: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, TokenRows]:
    """Return the rows of trained tokens, by tensor. Only the config records which rows they are.

    Raises InputRefused with everything that is wrong with them.
    """
    indices = config.get("trainable_token_indices") or {}
    by_tensor = _indices_by_tensor(indices, keys)
    without_rows = _names_without_rows(indices, keys)
    found, problems = {}, []
    if isinstance(indices, list) and len(keys) != 1:
        owners = ", ".join(keys) or "no module"
        problems.append(f"trainable_token_indices is a list, and the file contains rows for {owners}")
    # PEFT saves one table of rows for the modules of a tied model.
    tied = [name for name in without_rows if len(keys) == 1 and indices[name] in by_tensor.values()]
    if len(tied) < len(without_rows):
        names = ", ".join(indices)
        problems.append(f"trainable_token_indices names {names}, and the file contains rows for {', '.join(keys)}")
    for tensor, key in keys.items():
        own = by_tensor.get(tensor)
        if own is None:
            problems.append(f"{tensor}: the config does not record which rows these are")
        elif not isinstance(own, list) or not all(type(index) is int and abs(index) < 1 << 62 for index in own):
            problems.append(f"{tensor}: its trainable_token_indices are not a list of integers")
        else:
            try:
                found[tensor] = TokenRows(np.array(own, np.int64), file.read(key), tuple(tied))
            except InputRefused as error:
                problems.append(f"{tensor}: {error}")
    if problems:
        raise InputRefused(f"{file.path} is refused:", listed(sorted(problems), len(problems)))
    return found


def _indices_by_tensor(indices: Any, tensors: Iterable[str]) -> dict[str, Any]:
    """A list is for the input embeddings, whatever their name in the model. A table names its modules."""
    if isinstance(indices, list):
        return dict.fromkeys(tensors, indices)
    return {tensor: own for name, own in indices.items() for tensor in tensors if is_weight_of(tensor, name)}


def _names_without_rows(indices: Any, tensors: Iterable[str]) -> list[str]:
    """The modules that a table names, and for which the file contains no rows."""
    names = indices if isinstance(indices, dict) else {}
    return [name for name in names if not any(is_weight_of(tensor, name) for tensor in tensors)]


def _pairs_of(
    module: str,
    file: TensorSource,
    keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    options: ReadOptions,
) -> dict[str, LoraPair]:
    """The pair of a module; of a stacked parameter, the pair of each expert."""
    a, b = file.read(keys[A][module]), file.read(keys[B][module])
    targeted = targeted_name(module, keys)
    rank = value_for_module(targeted, config, "rank_pattern", "r")
    alpha = value_for_module(targeted, config, "alpha_pattern", "lora_alpha")
    scale = adapter_scale(rank, alpha, config)
    pairs = None
    if module in keys[PARAMETER] and expert_layouts.is_flat(a, b, rank):
        order = expert_layouts.b_layout(keys[PARAMETER][module], config, options.moe_b_layout)
        pairs = expert_layouts.flat_pairs(a, b, rank, scale, order)
    elif expert_layouts.is_stacked(module, a, b):
        if a.shape[1] != rank:
            raise InputRefused(
                f"A {a.shape} and B {b.shape}: the rank of each expert is {a.shape[1]}, the config's is {rank}, and "
                "nothing states which of them alpha was divided by. Correct r or rank_pattern in adapter_config.json"
            )
        pairs = expert_layouts.stacked_pairs(a, b, scale)
    if pairs is None:
        return {module: _pair(module, a, b, rank, scale, file, keys, config)}
    if module in keys[MAGNITUDE] or module in keys[B_BIAS]:
        raise InputRefused("a magnitude or a bias beside the pairs of experts is not supported")
    return {expert_name(module, expert): pair for expert, pair in enumerate(pairs)}


def _pair(
    module: str,
    a: NDArray[Any],
    b: NDArray[Any],
    rank: int,
    scale: float,
    file: TensorSource,
    keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
) -> LoraPair:
    embedding = module in keys[EMBEDDING]
    if embedding is not (".lora_embedding_B" in keys[B][module]):
        raise InputRefused("one of lora_A and lora_B is an embedding's, the other is not")
    if a.ndim != b.ndim or not 2 <= a.ndim <= 5:
        raise InputRefused(f"A {a.shape}, B {b.shape}: no linear layer, convolution or embedding has such shapes")
    if a.ndim > 2 and a.shape[0] == rank and b.shape[1] < rank and rank % b.shape[1] == 0:
        raise InputRefused(
            f"A {a.shape}, B {b.shape}: the convolution has {rank // b.shape[1]} groups. PEFT's A mixes the channels "
            "of all groups, which no weight of a grouped convolution can do: it cannot be merged"
        )
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise InputRefused(f"A {a.shape} and B {b.shape} disagree with the config's rank {rank}")
    magnitude = _magnitude(module, file, keys, config, b)
    return LoraPair(
        a=a, b=b, scale=scale, magnitude=magnitude, embedding=embedding, as_stored=module in keys[PARAMETER]
    )


def _magnitude(
    module: str,
    file: TensorSource,
    keys: Mapping[str, Mapping[str, str]],
    config: Mapping[str, Any],
    b: NDArray[Any],
) -> NDArray[Any] | None:
    """DoRA's magnitudes (out,). PEFT saves those of a convolution as (1, out, 1...)."""
    key = keys[MAGNITUDE].get(module)
    if (key is not None) is not bool(config.get("use_dora")):
        raise InputRefused(
            "the config sets use_dora, but lora_magnitude_vector is missing"
            if key is None
            else "lora_magnitude_vector is present, but the config does not set use_dora"
        )
    if key is None:
        return None
    magnitude = file.read(key)
    if magnitude.shape != _magnitude_shape(b):
        raise InputRefused(f"the magnitude is {magnitude.shape}, B {b.shape} needs {_magnitude_shape(b)}")
    return magnitude.reshape(-1)


def _magnitude_shape(b: NDArray[Any]) -> tuple[int, ...]:
    return (b.shape[0],) if b.ndim == 2 else (1, b.shape[0], *b.shape[2:])
