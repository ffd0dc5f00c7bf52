"""Arguments that several functions share: adapters and models, as a path, a name or an object in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export import formats
from lora_export.artifacts.artifact import artifact_kind, refuse_no_model
from lora_export.callbacks import OnMessage
from lora_export.errors import InputRefused, WrongUsage
from lora_export.lora import Adapter
from lora_export.options.combining import AdapterSource, AdapterSources
from lora_export.options.common import ModelSource, Running
from lora_export.options.reading import DEFAULTS, ReadOptions
from lora_export.options.spelling import named
from lora_export.plan.diffusion import chosen_component, only_component
from lora_export.plan.match_names import with_prefixes
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hashes import file_sha256
from lora_export.storage.hub_cache import SNAPSHOTS, locate
from lora_export.storage.store_copy import on_disk
from lora_export.storage.store_path import StorePath, is_hub_address, place

if TYPE_CHECKING:
    from lora_export.models.model import Model


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


def locate_model(source: ModelSource, on_message: OnMessage, download: bool = False) -> ModelSource:
    """The same source, where a name of the Hugging Face Hub is its snapshot in the cache (see `locate`).

    An address in a store is a copy on the disk: PyTorch and onnxruntime open no others.
    """
    if not isinstance(source, str | Path):
        return source
    return str(on_disk(locate(source, on_message, download), on_message))


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
    """
    loaded = [
        source if isinstance(source, Adapter) else _load_adapter(source, reading, activated=activated)
        for source in _as_list(sources)
    ]
    formats.refuse_activated(() if activated else loaded)
    loaded = [chosen_component(adapter, reading.component) for adapter in loaded]
    loaded = loaded if of_models else [only_component(adapter) for adapter in loaded]
    return with_prefixes(loaded, prefixes or {})


def _load_adapter(source: str | Path, options: ReadOptions, *, activated: bool) -> Adapter:
    name, path = split_name(source)
    return formats.load(path, name=name, options=options, activated=activated)


@contextlib.contextmanager
def no_adapter_as_model(model: ModelSource | None, adapters: AdapterSources) -> Iterator[None]:
    """A context for reading both. An error in it names the cause where `model` is an adapter. Raises InputRefused."""
    try:
        yield
    except InputRefused as error:
        path = place(model) if isinstance(model, str | Path) else None
        if path is None or not formats.is_only_adapter(path):
            raise
        models = [str(other) for other in adapter_paths(adapters) if formats.is_model(other)]
        way_out = f", and {models[0]} is a model. Did you swap them?" if models else ". Name the model that it is for"
        raise InputRefused(f"{path} is an adapter{way_out}") from error


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
    what = "is a folder" if place(given).is_dir() else "does not exist"
    raise InputRefused(
        f"{named('calibration', given)}: {given} {what}. Give a file of texts, one a line (or .jsonl with `text`), or "
        "of arrays of the model's inputs (.npz)"
    )


def resolve_model(
    source: ModelSource,
    adapters: Sequence[Adapter] = (),
    *,
    dtype: str = Running.dtype,
    inputs: str | Path | None = None,
    export: bool = False,
    streamed: bool = False,
) -> Model:
    """Return the PyTorch model, with fresh heads where the adapters bring a task head.

    With `streamed`, the weights of a large folder are read whenever something computes with them: to run it alone.

    `inputs` (.npz) are the example where the inputs of a Hugging Face model cannot be generated. To `export`, their
    names decide whether its texts contain images.
    Raises InputRefused where it cannot be loaded, and for a `dtype` that a model in memory does not have.
    """
    import torch

    from lora_export.models.load import from_module, load_model, with_inputs_from
    from lora_export.models.model import Model
    from lora_export.storage.npz import read_arrays

    if isinstance(source, str | Path):
        loaded = load_model(str(source), adapters, dtype=getattr(torch, dtype), streamed=streamed)
        if inputs is None or not loaded.is_huggingface:
            return loaded
        loaded = with_inputs_from(place(inputs), loaded)
        return loaded.taking(read_arrays(place(inputs))) if export else loaded
    if dtype != "float32":
        raise InputRefused(f"a model in memory is used in its own precision, not in {dtype}")
    if isinstance(source, tuple):
        return from_module(*source)
    assert isinstance(source, Model)
    return source


def shared_model(
    session: Any,
    source: ModelSource,
    adapters: Sequence[Adapter] = (),
    *,
    dtype: str,
    inputs: Path | None,
    export: bool = False,
    streamed: bool = False,
) -> Model:
    """As `resolve_model`; a folder's is that of the ProofSession, where there is one, unless an adapter has a head."""

    def load() -> Model:
        return resolve_model(source, adapters, dtype=dtype, inputs=inputs, export=export, streamed=streamed)

    is_folder = isinstance(source, str | Path) and Path(source).is_dir()
    if session is None or not is_folder or any(adapter.replaced for adapter in adapters):
        return load()
    given = None if inputs is None else (str(inputs), file_sha256(inputs), export)
    model: Model = session.model(Path(str(source)), (dtype, given), load)
    return model


def model_paths(source: ModelSource) -> list[Path]:
    """The paths from which a model is read; an output must not be inside one of them."""
    if not isinstance(source, str | Path):
        return []
    path = place(source)
    file = path if isinstance(path, StorePath) else Path(str(source).rpartition(":")[0])  # of a factory
    paths = dict.fromkeys([path, file])
    return [path for path in paths if path.exists() and path != Path()]


def names_kind(source: ModelSource, kind: ArtifactKind) -> bool:
    """Whether a model is named by the path of such an artefact, which need not exist."""
    return isinstance(source, str | Path) and artifact_kind(Path(source)) is kind


def refuse_no_source(source: ModelSource) -> None:
    """Raise InputRefused for what names neither a model nor a graph, before anything else is read."""
    if isinstance(source, str | Path) and not names_kind(source, ArtifactKind.GRAPH):
        refuse_no_model(source)


def refuse_pt2(model: ModelSource) -> None:
    """Raise InputRefused for a .pt2 that is to be exported again or trained: it holds a graph, not module code."""
    if names_kind(model, ArtifactKind.PROGRAM):
        raise InputRefused(
            f"{model} is an exported program already. `lora-export verify` accepts it as {named('model')} and as "
            "CANDIDATE. To make another file, give the model that it was exported from"
        )
