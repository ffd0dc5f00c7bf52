"""What llama.cpp calls the tensors of a model of transformers, and in which order it stores their rows.

`families.json` has the names, one table for all architectures and what differs in some. An architecture of llama.cpp
may be that of several types of transformers' models, whose names are the same. Stacked experts are tensors of their
own in transformers' files: `#` is the number of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_export.errors import InputRefused
from lora_export.names.families import column, read_rows
from lora_export.names.row_orders import Heads, RowOrder
from lora_export.names.table import read_table

LLAMA_CPP_NAMES: Mapping[str, str] = read_rows("families.json")["gguf_names"]
LLAMA_CPP_TYPES = column("gguf")
_BLOCK = re.compile(r"(?<=^blk\.)\d{1,6}(?=\.)")


def model_type_of(architecture: str, *, has_experts: bool) -> str:
    """A type of transformers' models that has this architecture in llama.cpp. Raises InputRefused for unknown ones."""
    kinds = [kind for kind, row in LLAMA_CPP_TYPES.items() if row["architecture"] == architecture]
    if not kinds:
        known = ", ".join(sorted({row["architecture"] for row in LLAMA_CPP_TYPES.values()}))
        raise InputRefused(f"models of the architecture {architecture!r} are not supported; supported: {known}")
    return kinds[-1] if has_experts else kinds[0]  # Mixtral is a Llama with experts


@dataclass(frozen=True)
class LlamaCppNames:
    """The tensors of a model of one type."""

    model_type: str
    heads: Heads

    def of_transformers(self, tensor: str) -> str | None:
        """The name that a tensor of llama.cpp has in transformers' files; None where it has none."""
        stem, _, last = tensor.rpartition(".")
        found = _BLOCK.search(stem)
        key = _BLOCK.sub("{}", stem, count=1)
        module = self._row.get("names", {}).get(key) or LLAMA_CPP_NAMES.get(key)
        if module is None or last not in ("weight", "bias"):
            return None
        return f"{module.format(found[0] if found else '')}.{last}"

    def row_order(self, name: str) -> RowOrder | None:
        """The order of llama.cpp's rows of a tensor of transformers; None where it is the same."""
        module = name.rpartition(".")[0].rpartition(".")[2]
        order = self._row.get("rows", {}).get(module)
        return None if order is None else RowOrder(order)

    @property
    def shifts_norms(self) -> bool:
        """Whether llama.cpp stores the weights of norms with 1 added."""
        return "norms" in self._row

    @property
    def left_out(self) -> Sequence[str]:
        """The square layers of that class that llama.cpp does not have: no other layer reads what they compute."""
        found: Sequence[str] = self._row.get("left_out", ())
        return found

    @property
    def class_name(self) -> str:
        """The class of transformers that computes what llama.cpp does: it predicts words, or has no head."""
        classes = read_table().modules.get(self.model_type, {})
        return self._row.get("class") or next((name for name in classes if name.endswith("ForCausalLM")), "")

    @property
    def _row(self) -> Mapping[str, Any]:
        row: Mapping[str, Any] = LLAMA_CPP_TYPES[self.model_type]
        return row
