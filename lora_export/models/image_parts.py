"""The parts of a model that read images, and what adapters change in them, where its inputs have texts alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from lora_export.callbacks import OnMessage, note_each
from lora_export.errors import InputRefused, count
from lora_export.lora import Adapter
from lora_export.models.model import Model
from lora_export.models.processors import PIXELS


def image_parts(model: Model) -> tuple[str, ...]:
    """The modules, by their names, that no text reaches: the tower and the projector beside the language model.

    Empty where the inputs have images, or are not known.
    """
    module: Any = model.module
    if not model.axes or PIXELS in model.axes or not hasattr(module, "get_image_features"):
        return ()
    parts, decoder = dict(module.base_model.named_children()), module.get_decoder()
    if not any(part is decoder for part in parts.values()):
        return ()
    return tuple(f"{module.base_model_prefix}.{name}" for name, part in parts.items() if part is not decoder)


def without_image_pairs(
    model: Model, adapters: Sequence[Adapter], on_message: OnMessage
) -> tuple[Model, list[Adapter]]:
    """The model, and its adapters without what they change in parts that no text reaches.

    Messages and the model's verdicts list what is left out. Raises InputRefused where nothing of an adapter is left.
    """
    parts = image_parts(model)
    within = tuple(f"{part}." for part in parts)
    kept = [_outside(adapter, within) if within else adapter for adapter in adapters]
    found = [
        f"{count(len(before.every_name) - len(after.every_name), 'layer')} that {before.name} changes in "
        f"{', '.join(parts)}, which no text reaches"
        for before, after in zip(adapters, kept, strict=True)
        if before is not after
    ]
    note_each(on_message, [f"left out: {each}" for each in found])
    return replace(model, not_judged=(*model.not_judged, *found)), kept


def _outside(adapter: Adapter, within: tuple[str, ...]) -> Adapter:
    """The adapter without the names that begin so, and without targets that match these alone."""
    inside = [name for name in adapter.every_name if name.startswith(within)]
    others = [name for name in adapter.every_name if not name.startswith(within)]
    if not inside:
        return adapter
    if not others:
        raise InputRefused(f"{adapter.name} changes only layers that read images, and no text reaches these")
    targets = tuple(each for each in adapter.targets if _matches(each, others) or not _matches(each, inside))
    return adapter.renamed(lambda name: None if name.startswith(within) else name, targets=targets)


def _matches(target: str, names: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for name in names)
