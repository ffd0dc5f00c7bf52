"""Whether the inputs reached the rows that adapters bring to embedding tables."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

from lora_export import layers, plan
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.options.spelling import named


class RowCoverage:
    """Which of the adapters' rows of embedding tables PyTorch looks up, from now on.

    Puts hooks on the tables of `module`, which stay there.
    """

    def __init__(self, module: nn.Module, model: Model, adapters: Sequence[Adapter]):
        self.wanted: dict[str, set[int]] = {}
        self.seen: dict[str, set[int]] = {}
        if not any(adapter.token_rows for adapter in adapters):
            return
        for step in plan.make(adapters, layers.specs(model.module)).steps:
            owner = module.get_submodule(step.weight.rpartition(".")[0])
            if step.token_rows is not None and isinstance(owner, nn.Embedding):
                self.wanted[step.weight] = set(step.token_rows.indices.tolist())
                self.seen[step.weight] = set()
                owner.register_forward_pre_hook(functools.partial(self._record, step.weight))

    def _record(self, table: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.seen[table] |= set(inputs[0].flatten().tolist())

    @property
    def doubts(self) -> list[str]:
        """One message for each table of whose rows none was looked up: a fault in them could not show."""
        return [
            f"{table}: none of the {len(rows)} rows that the adapter brings was looked up. Give inputs that contain "
            f"them ({named('inputs')})"
            for table, rows in self.wanted.items()
            if not rows & self.seen[table]
        ]

    @property
    def not_judged(self) -> list[str]:
        """One message for each table of whose rows some were looked up, but not all."""
        return [
            f"{table}: {len(rows - self.seen[table])} of the {len(rows)} rows that the adapter brings. They were not "
            "looked up"
            for table, rows in self.wanted.items()
            if 0 < len(rows & self.seen[table]) < len(rows)
        ]
