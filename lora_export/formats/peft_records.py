"""What a PEFT adapter records beside its tensors: layouts, ties, the model's head, and choices that may surprise."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, first_of
from lora_export.formats import expert_layouts
from lora_export.formats.adapter_files import TensorSource, by_headers, read_floats, refuse_problems
from lora_export.formats.peft_config import is_declared
from lora_export.formats.peft_keys import OUT_PROJ, UNUSED, WHOLE, A, Keys, targeted_name
from lora_export.lora import Adapter, ExpertAxes, LoraPair, TokenRows, expert_name, is_weight_of, split_part
from lora_export.names.table import is_embedding, module_kind
from lora_export.pairs.open_shape import known_shape
from lora_export.storage import json_files

SHOWN_TENSORS = 3  # names that a note lists
LAYOUTS = "lora_export.layouts"  # in the header of WEIGHTS: module -> "out_in" or "in_out"; PEFT ignores it
# Fields of a model's config that describe a new head.
HEAD_FIELDS = ("architectures", "id2label", "label2id", "problem_type", "pad_token_id")


def attention_note(module: str) -> str:
    """How the output projection of an nn.MultiheadAttention is read."""
    return (
        f"{module}: PEFT up to 0.21 adds the output projection's change twice when it runs or merges such an "
        "attention; here it is added once"
    )


def notes_of(keys: Keys, config: Mapping[str, Any], tied: Mapping[str, str]) -> tuple[str, ...]:
    """Choices of this reader that may surprise the user."""
    notes = [attention_note(module) for module, key in keys[A].items() if OUT_PROJ in key]
    notes += notes_of_alphas({module: targeted_name(module, keys) for module in keys[A]}, config)
    notes += [
        f"{tensor} is saved whole, and the config does not declare it: it replaces the base's tensor"
        for tensor in keys[WHOLE]
        if not is_declared(tensor, config) and tensor.removesuffix(".weight") not in keys[A]
    ]
    notes += [
        f"{tensor} is saved whole beside the pair that changes it, as PEFT does with embeddings: it replaces the "
        "base's tensor, and the pair is added to it"
        for tensor in keys[WHOLE]
        if tensor.removesuffix(".weight") in keys[A]
    ]
    notes += [
        f"{head} and {table} are tied and have one pair: PEFT up to 0.21 adds its change twice when it merges; here it "
        "is added once"
        for head, table in tied.items()
    ]
    if keys[UNUSED]:
        unused = first_of(list(keys[UNUSED]), SHOWN_TENSORS)
        notes.append(f"tensors that only training uses are left out: {unused}")
    return tuple(notes)


def notes_of_alphas(modules: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """The modules, by the names that patterns match, for which several patterns have different values of alpha.

    PEFT saves its patterns sorted: it may have trained with another one.
    """
    return [
        f"{module}: several patterns of alpha_pattern match it; the first one in the file is used, as PEFT does"
        for module, name in modules.items()
        if len(set(config["alpha_pattern"].values(name))) > 1
    ]


def layouts_of(file: TensorSource, pairs: Mapping[str, LoraPair], config: Mapping[str, Any]) -> dict[str, str]:
    """How the weights that the adapter was trained on are stored, where that is recorded.

    PEFT sets `fan_in_fan_out` at a Conv1D, and resets it at an nn.Linear: it writes that of the last module. It tells
    only where all modules are of one kind. False is no evidence: it is the default of configs that PEFT did not write.
    """
    if LAYOUTS in file.metadata:
        layouts = json_files.parse_json(file.metadata[LAYOUTS], f"{LAYOUTS} in the header of {file.path}")
        wrong = [name for name, layout in layouts.items() if layout not in ("out_in", "in_out")]
        if wrong:
            raise InputRefused(f"{file.path}: {LAYOUTS} must map modules to out_in or in_out: {', '.join(wrong)}")
        return layouts
    layouts = {module: "out_in" for module, pair in pairs.items() if pair.as_stored and not split_part(module)[1]}
    # A pair without a shape is one of a matrix.
    linear = [module for module, pair in pairs.items() if not pair.embedding and len(known_shape(pair)) in (0, 2)]
    if config.get("fan_in_fan_out") and len(set(map(module_kind, linear))) == 1:
        layouts |= dict.fromkeys(linear, "in_out")
    return layouts


def axes_of_experts(
    file: TensorSource, keys: Keys, config: Mapping[str, Any], pairs: Mapping[str, LoraPair]
) -> dict[str, ExpertAxes]:
    """How the pairs of experts relate to the stacked parameters of these."""
    return {
        module: ExpertAxes.OUT_IN if len(file.entries[key].shape) == 3 else expert_layouts.flat_axes(config)
        for module, key in keys[A].items()
        if expert_name(module, 0) in pairs
    }


def tied_heads(
    pairs: Mapping[str, LoraPair], replaced: Mapping[str, NDArray[Any]], config: Mapping[str, Any]
) -> dict[str, str]:
    """The output embeddings whose pair is that of the input embeddings: PEFT ties them with `ensure_weight_tying`."""
    if not config.get("ensure_weight_tying"):
        return {}

    def are_tied(head: str, table: str) -> bool:
        one, other = pairs[head], pairs[table].transposed
        own, its = (replaced.get(f"{module}.weight") for module in (head, table))
        has_equal_pair = one.scale == other.scale and np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)
        return has_equal_pair and (own is None or (its is not None and np.array_equal(own, its)))

    tables = [module for module, pair in pairs.items() if pair.embedding and pair.magnitude is None]
    heads = [module for module, pair in pairs.items() if not pair.embedding and pair.magnitude is None]
    return {head: table for table in tables for head in heads if are_tied(head, table)}


def metadata_of(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("task_type", "base_model_name_or_path", "peft_version")
    metadata = {name: config.get(name) for name in names if config.get(name)}
    if config.get("peft_type", "LORA") == "LORA":
        metadata |= {"r": config["r"], "lora_alpha": config["lora_alpha"], "use_rslora": bool(config.get("use_rslora"))}
    else:
        metadata |= {"peft_type": config["peft_type"]}
    metadata |= {"bias": config["bias"]} if config.get("bias") not in (None, "none") else {}
    metadata |= {"lora_dropout": config["lora_dropout"]} if config.get("lora_dropout") else {}
    model_config = path / "config.json"  # some trainers, ours too, save the model's config beside the adapter
    if model_config.is_file():
        model = json_files.read_model_config(model_config)
        metadata["model_config"] = {key: model[key] for key in HEAD_FIELDS if model.get(key) is not None}
    return metadata


# --- The output projection of nn.MultiheadAttention, as PEFT up to 0.21 trains it: it computes with W + 2·s·BA ---
#
# A merge adds the change once, and reports it. A training that goes on from such an adapter must start from what PEFT
# computed.

ADDED_ONCE_SINCE = "0.22"  # no version of PEFT before this one adds it once


def as_peft_computes(adapter: Adapter) -> Adapter:
    """The adapter with twice the scale at the output projections that PEFT trained, which become layers of their own.

    A note names them. An adapter without them is returned as it is, as is one of a later PEFT.
    """
    doubled = [name for name in adapter.pairs if OUT_PROJ in adapter.spelled(name)]
    if not doubled:
        return adapter
    from packaging.version import InvalidVersion, Version  # few adapters have such layers

    version = str(adapter.metadata.get("peft_version", "0"))  # PEFT before 0.18 recorded none
    with contextlib.suppress(InvalidVersion):
        if Version(version) >= Version(ADDED_ONCE_SINCE):
            return adapter
    pairs = {
        name: replace(pair, scale=2 * pair.scale) if name in doubled else pair for name, pair in adapter.pairs.items()
    }
    notes = [note for note in adapter.notes if note not in map(attention_note, doubled)]
    notes += [
        f"{name}: PEFT up to 0.21 adds the output projection's change twice when it trains; it goes on with twice the "
        "scale, and is saved as a layer of its own"
        for name in doubled
    ]
    spelling = {name: key for name, key in adapter.spelling.items() if OUT_PROJ not in key}
    return replace(adapter, pairs=pairs, spelling=spelling, notes=tuple(notes))


# --- The rows of trained tokens in a PEFT adapter ---


@by_headers(alone=False)  # rows are few, and tied tables are equal or not by their values
def read_token_rows(file: TensorSource, keys: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, TokenRows]:
    """The rows of trained tokens, by tensor. Only the config records which they are. Raises InputRefused."""
    indices = config.get("trainable_token_indices") or {}
    repeated, every = _repeated_rows(file, keys, indices), list(keys)
    keys = {tensor: key for tensor, key in keys.items() if tensor not in repeated}
    # A list is for the input embeddings, whatever their name in the model. A table names its modules.
    if isinstance(indices, list):
        by_tensor, without_rows = dict.fromkeys(keys, indices), []
    else:
        by_tensor = {tensor: own for name, own in indices.items() for tensor in keys if is_weight_of(tensor, name)}
        without_rows = [name for name in indices if not any(is_weight_of(tensor, name) for tensor in every)]
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
                heads = [head.removesuffix(".weight") for head, table in repeated.items() if table == tensor]
                found[tensor] = TokenRows(np.array(own, np.int64), read_floats(file, key), (*tied, *heads))
            except InputRefused as error:
                problems.append(f"{tensor}: {error}")
    refuse_problems(file, problems)
    return found


def _repeated_rows(
    file: TensorSource, keys: Mapping[str, str], indices: Sequence[int] | Mapping[str, Any]
) -> dict[str, str]:
    """Tensors whose rows PEFT saved again -> the table of them: with the embeddings, it saves all names of tied ones.

    `indices` names the tables, or is a list for the input embeddings. It may name tied ones, too.
    """
    embeddings = [tensor for tensor in keys if is_embedding(tensor.removesuffix(".weight"))]
    if isinstance(indices, Mapping):
        own = {tensor: rows for name, rows in indices.items() for tensor in keys if is_weight_of(tensor, name)}
    else:
        own = dict.fromkeys(embeddings, indices)
    tables = sorted(own, key=lambda tensor: tensor not in embeddings)
    position = {tensor: number for number, tensor in enumerate(tables)}
    return {
        tensor: table
        for tensor in keys
        for table in reversed(tables[: position.get(tensor)])  # the first one that is equal counts
        if own.get(tensor, own[table]) == own[table] and np.array_equal(file.read(keys[tensor]), file.read(keys[table]))
    }


def tables_saved_again(rows: Mapping[str, TokenRows], replaced: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """The modules whose saved table is that of another one, with the same trained rows -> that one."""
    return {
        head: tensor.removesuffix(".weight")
        for tensor, own in rows.items()
        for head in own.tied
        if tensor in replaced
        and f"{head}.weight" in replaced
        and np.array_equal(replaced[tensor], replaced[f"{head}.weight"])
    }
