"""Adapters as arguments that several functions share: a path, a name or an object in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lora_export import formats
from lora_export.callbacks import OnMessage
from lora_export.errors import InputRefused, WrongUsage
from lora_export.lora import Adapter
from lora_export.options.combining import AdapterSource, AdapterSources
from lora_export.options.common import ModelSource
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
from lora_export.plan.diffusion import chosen_component, only_component
from lora_export.plan.match_names import with_prefixes
from lora_export.storage import input_files
from lora_export.storage.hub_cache import SNAPSHOTS, locate
from lora_export.storage.store_path import is_hub_address, place

NAME_THE_MODEL = "Name the model that it is for"  # where an adapter is in its place


def split_name(argument: str | Path) -> tuple[str | None, str | Path]:
    """Split `NAME=PATH` or `PATH`. An argument that exists as a path is taken as a path.

    An address of the Hub stays a text.
    """
    name, separator, path = str(argument).partition("=")
    if isinstance(argument, Path) or not separator or Path(argument).exists() or "/" in name:
        return None, argument if is_hub_address(argument) else place(argument)
    return name, path if is_hub_address(path) else place(path)


def locate_adapters(sources: AdapterSources, on_message: OnMessage, download: bool = False) -> list[AdapterSource]:
    """The same sources, where names of the Hugging Face Hub are their snapshots in the cache (see `locate`)."""
    all_sources = _as_list(sources)
    return [each if isinstance(each, Adapter) else _located(each, on_message, download) for each in all_sources]


def _located(source: str | Path, on_message: OnMessage, download: bool) -> str | Path:
    name, path = split_name(source)
    located = locate(path, on_message, download)
    if located == path:
        return source
    if name is None and located.parent.name != SNAPSHOTS:
        return located
    # A snapshot's folder is named after its commit, which is no name for an adapter.
    return f"{name or str(path).partition('@')[0].rstrip('/').rpartition('/')[2]}={located}"


def load_adapters(
    sources: AdapterSources,
    prefixes: Mapping[str, str] | None = None,
    *,
    reading: ReadOptions = DEFAULTS,
    of_models: bool = False,
    activated: bool = False,
) -> list[Adapter]:
    """Return the adapters in the order of their sources, with other prefixes in their names (FROM -> TO).

    `reading` is about those that are paths; its component is about all. Unless the adapters are for several models of
    a diffusion pipeline (`of_models`), each may change one model only. One that acts on some tokens only is refused,
    unless the caller can have it (`activated`). Raises InputRefused where one cannot be read, and as `with_prefixes`.
    A statement about none of them is a note of the first: it may be a default of all commands.
    """
    loaded = [
        source if isinstance(source, Adapter) else _load_adapter(source, reading, activated=activated)
        for source in _as_list(sources)
    ]
    formats.refuse_activated(() if activated else loaded)
    loaded = with_notes_on_statements(loaded, reading)
    loaded = [chosen_component(adapter, reading.component) for adapter in loaded]
    loaded = loaded if of_models else [only_component(adapter) for adapter in loaded]
    return with_prefixes(loaded, prefixes or {})


def with_notes_on_statements(adapters: Sequence[Adapter], reading: ReadOptions) -> list[Adapter]:
    """The adapters; the first one with notes on statements about another kind of adapter than these.

    Raises InputRefused for a statement about a layer that none has.
    """
    of_loralib = [adapter for adapter in adapters if adapter.format == "loralib"]
    with_experts = [adapter for adapter in adapters if adapter.experts]
    fused = [f".{module}" for adapter in of_loralib for module in adapter.pairs]
    for layer in reading.enable_lora if of_loralib else ():
        if not any(module.endswith(f".{layer}") for module in fused):
            names = ", ".join(adapter.name for adapter in of_loralib)
            raise InputRefused(f"{named('enable_lora', layer)}: {names} has no layer whose name ends so")
    kinds = {"loralib": "some" if of_loralib else "none", "experts": "some" if with_experts else "none"}
    notes = reading.without_effect(**kinds)
    return [
        replace(adapter, notes=(*adapter.notes, *notes)) if notes and not number else adapter
        for number, adapter in enumerate(adapters)
    ]


def _load_adapter(source: str | Path, options: ReadOptions, *, activated: bool) -> Adapter:
    name, path = split_name(source)
    return formats.load(path, name=name, options=options, activated=activated)


@contextlib.contextmanager
def no_adapter_as_model(
    model: ModelSource | None, adapters: AdapterSources, way_out: str = NAME_THE_MODEL
) -> Iterator[None]:
    """A context for reading both. An error in it names the cause where `model` is an adapter. Raises InputRefused."""
    try:
        yield
    except InputRefused as error:
        refuse_adapter_as_model(model, adapters, error, way_out)
        raise


def refuse_adapter_as_model(
    model: ModelSource | None,
    adapters: AdapterSources = (),
    cause: InputRefused | None = None,
    way_out: str = NAME_THE_MODEL,
) -> None:
    """Raise InputRefused where `model` is an adapter, for `cause`. It names the model where the two were swapped."""
    path = place(model) if isinstance(model, str | Path) else None
    if path is not None and formats.is_only_adapter(path):
        models = [str(other) for other in adapter_paths(adapters) if formats.is_model(other)]
        way_out = f", and {models[0]} is a model. Did you swap them?" if models else f". {way_out}"
        raise InputRefused(f"{path} is an adapter{way_out}") from cause


def adapter_paths(sources: AdapterSources) -> list[Path]:
    """The paths from which adapters are read; an output must not be inside one of them."""
    paths = (split_name(each)[1] for each in _as_list(sources) if not isinstance(each, Adapter))
    return [formats.located(path) for path in paths if isinstance(path, Path)]


def refuse_weights_alone(sources: AdapterSources, weights: Sequence[float]) -> None:
    """Raise WrongUsage for weights without adapters. Their number is compared when the adapters are known."""
    if weights and not _as_list(sources):
        raise WrongUsage(f"{named('weights')} is a factor on an adapter, and there is no adapter ({named('adapters')})")


def _as_list(sources: AdapterSources) -> Sequence[AdapterSource]:
    return [sources] if isinstance(sources, str | Path | Adapter) else sources


def calibration_file(given: str | Path | None) -> Path | None:
    """The file of `calibration`. Raises InputRefused where there is none, before anything else is read."""
    if given is None or place(given).is_file():
        return None if given is None else place(given)
    input_files.refuse_broken_link(place(given))
    what = "is a folder" if place(given).is_dir() else "does not exist"
    raise InputRefused(
        f"{named('calibration', given)}: {given} {what}. Give a file of texts, one a line (or .jsonl with `text`), or "
        "of arrays of the model's inputs (.npz)"
    )
