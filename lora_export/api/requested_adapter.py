"""The adapters that `train` starts from: new ones as requested, or a trained one that is continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_export import formats, layers
from lora_export.errors import InputRefused
from lora_export.formats.peft_records import as_peft_computes
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.options.train import AdapterChoice

DEFAULT_RANK = 8
ALPHA_PER_RANK = 2.0


def requested_adapters(choice: AdapterChoice, loaded: Model, heads: Sequence[str], *, seed: int) -> dict[int, Adapter]:
    """The adapters to train, by rank. Raises InputRefused as `create_adapter`, and for one that cannot go on."""
    if choice.continue_from is not None:
        adapter = _continued(choice, loaded, heads)
        return {int(adapter.metadata.get("r") or max(pair.rank for pair in adapter.pairs.values())): adapter}
    return {
        rank: layers.create_adapter(
            loaded.module,
            targets=choice.targets,
            rank=rank,
            alpha=choice.alpha or ALPHA_PER_RANK * rank,
            rank_pattern=choice.rank_pattern or {},
            alpha_pattern={**(choice.alpha_pattern or {}), **_alphas_of_ranks(choice)},
            target_pattern=choice.target_pattern,
            target_parameters=choice.target_parameters,
            rslora=choice.rslora,
            dora=choice.dora,
            dropout=choice.dropout or 0.0,
            bias=choice.bias,
            token_indices=choice.token_indices,
            modules_to_save=heads,
            seed=seed,
        )
        for rank in choice.ranks or (DEFAULT_RANK,)
    }


def _alphas_of_ranks(choice: AdapterChoice) -> dict[str, float]:
    """Twice the rank of each pattern that has no alpha of its own, unless an alpha is given."""
    ranks = {} if choice.alpha else choice.rank_pattern or {}
    return {name: ALPHA_PER_RANK * rank for name, rank in ranks.items() if name not in (choice.alpha_pattern or {})}


def _continued(choice: AdapterChoice, loaded: Model, heads: Sequence[str]) -> Adapter:
    assert choice.continue_from is not None
    source = Path(choice.continue_from)
    stored = formats.load(source)
    if kind := stored.metadata.get("peft_type"):
        raise InputRefused(f"{source} is an adapter of the kind {kind}; only LoRA is trained further")
    (adapter,) = layers.respelled_for(loaded.module, [as_peft_computes(stored)])
    if adapter.added or adapter.biases:
        what = ", ".join((*adapter.added, *adapter.biases))
        raise InputRefused(f"{source} adds to vectors, which is not trained further: {what}")
    _refuse_other_labels(adapter, loaded, source)
    dropout = choice.dropout if choice.dropout is not None else float(adapter.metadata.get("lora_dropout", 0.0))
    new = {
        name: value
        for name, value in layers.tensors_of(loaded.module, heads).items()
        if name not in adapter.replaced and name.removesuffix(".weight") not in adapter.pairs
    }
    metadata = {key: value for key, value in adapter.metadata.items() if key != "model_config"}
    return dataclasses.replace(
        adapter, replaced={**adapter.replaced, **new}, metadata={**metadata, "lora_dropout": dropout}
    )


def _refuse_other_labels(adapter: Adapter, loaded: Model, source: Path) -> None:
    """Raise InputRefused where the head of the adapter has other classes, or another order of them, than the data."""
    trained = (adapter.metadata.get("model_config") or {}).get("id2label")
    config: Any = getattr(loaded.module, "config", None)
    if not trained or not adapter.replaced or config is None:
        return
    own, data = ({int(key): str(label) for key, label in table.items()} for table in (trained, config.id2label))
    if own != data:
        raise InputRefused(
            f"{source} was trained on the classes {', '.join(own.values())}, and the data has "
            f"{', '.join(data.values())}: its head means other classes"
        )
