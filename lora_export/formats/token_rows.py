"""The rows of trained tokens in a PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_export.errors import InputRefused
from lora_export.formats.adapter_files import TensorSource, refuse_problems
from lora_export.lora import TokenRows, is_weight_of


def read_token_rows(file: TensorSource, keys: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, TokenRows]:
    """The rows of trained tokens, by tensor. Only the config records which they are. Raises InputRefused."""
    indices = config.get("trainable_token_indices") or {}
    # A list is for the input embeddings, whatever their name in the model. A table names its modules.
    if isinstance(indices, list):
        by_tensor, without_rows = dict.fromkeys(keys, indices), []
    else:
        by_tensor = {tensor: own for name, own in indices.items() for tensor in keys if is_weight_of(tensor, name)}
        without_rows = [name for name in indices if not any(is_weight_of(tensor, name) for tensor in keys)]
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
    refuse_problems(file, problems)
    return found
