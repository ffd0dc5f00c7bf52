"""Adapters for several models of a diffusion pipeline: their components, and one component alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lora_export.errors import InputRefused
from lora_export.lora import COMPONENTS, DENOISER, SECOND_DENOISER, TEXT_ENCODERS, Adapter, split_component
from lora_export.options.spelling import command, named

# The names that users know, for the option `component`. What removes the noise is a UNet or a transformer.
COMPONENT_OPTIONS = {
    "unet": DENOISER,
    "transformer": DENOISER,
    "transformer_2": SECOND_DENOISER,
    **{name: name for name in COMPONENTS if name not in (DENOISER, SECOND_DENOISER)},
}
_SHOWN = {DENOISER: "unet or transformer", SECOND_DENOISER: "transformer_2", TEXT_ENCODERS[2]: "text_encoder_3 (T5)"}


def components_of(adapter: Adapter) -> list[str]:
    """The components whose models the adapter changes, in the order of COMPONENTS; the empty one first, if any."""
    found = {split_component(name)[0] for name in adapter.names}
    return [component for component in ("", *COMPONENTS) if component in found]


def of_component(adapter: Adapter, component: str, *, named: bool = False) -> Adapter:
    """What the adapter changes in one component. Only with `named`, the names still begin with the component."""

    def of_it(name: str) -> str | None:
        owner, own = split_component(name)
        return None if owner != component else name if named else own

    return adapter.renamed(of_it)


def joined_components(adapter: Adapter, parts: Iterable[Adapter]) -> Adapter:
    """The adapter with what its parts contain, under their names. No two parts may share a name."""
    parts = list(parts)
    tables: dict[str, Any] = {
        table: {name: value for part in parts for name, value in getattr(part, table).items()}
        for table in ("pairs", "biases", "added", "layouts", "spelling")
    }
    return replace(adapter, flattened=False, **tables)


def only_component(adapter: Adapter) -> Adapter:
    """The adapter for one model, without the component in its names. Raises InputRefused where it has several."""
    found = components_of(adapter)
    if len(found) > 1:
        raise InputRefused(
            f"{adapter.name} has changes for several models of a pipeline: {listed_components(found)}. Give the folder "
            f"of the pipeline to `{command('merge')}`, or choose one model by {named('component')}"
        )
    return of_component(adapter, found[0]) if found and found[0] else adapter


def chosen_component(adapter: Adapter, chosen: str) -> Adapter:
    """The adapter with its changes of one model alone. `chosen` is a key of COMPONENT_OPTIONS; empty chooses all.

    Raises InputRefused where it has none for this model.
    """
    if not chosen:
        return adapter
    found, component = components_of(adapter), COMPONENT_OPTIONS[chosen]
    if component == TEXT_ENCODERS[1] and component not in found and TEXT_ENCODERS[2] in found:
        component = TEXT_ENCODERS[2]  # T5, which is the second text encoder of Flux's pipelines
    if component not in found:
        raise InputRefused(f"{adapter.name} has no changes for {chosen}. It has some for {listed_components(found)}")
    left = [each for each in found if each != component]
    if not left:
        return adapter
    one = of_component(adapter, component, named=True)
    note = f"{adapter.name}: only its changes of {chosen} are used, not those of {listed_components(left)}."
    return replace(one, notes=(*one.notes, note))


def listed_components(components: list[str]) -> str:
    """Components as users know them, for a message."""
    return ", ".join(_SHOWN.get(component, component or "modules without a component") for component in components)
