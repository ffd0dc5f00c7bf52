"""A model as an argument that several functions share: a path, a name or an object in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export.artifacts.kind import artifact_kind, refuse_no_model
from lora_export.callbacks import OnMessage
from lora_export.errors import InputRefused
from lora_export.lora import Adapter
from lora_export.options.common import ModelSource
from lora_export.options.proof import Running
from lora_export.options.spelling import named
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.hashes import file_sha256
from lora_export.storage.hub_cache import locate
from lora_export.storage.store_path import StorePath, place

if TYPE_CHECKING:
    from lora_export.models.model import Model


def locate_model(source: ModelSource, on_message: OnMessage, download: bool = False) -> ModelSource:
    """The same source, where a name of the Hugging Face Hub is its snapshot in the cache (see `locate`).

    An address in a store is a copy on the disk: PyTorch and onnxruntime open no others.
    """
    if not isinstance(source, str | Path):
        return source
    from lora_export.storage.store_copy import on_disk  # a merge opens no model

    return str(on_disk(locate(source, on_message, download), on_message))


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
    if isinstance(source, Model):
        return source
    pair = source if isinstance(source, tuple) and len(source) == 2 else (source, None)
    if pair[1] is None or not isinstance(pair[0], torch.nn.Module):
        raise InputRefused(
            f"{type(pair[0]).__name__} is no model: give a path, (module, example_inputs), or what load_model returns"
        )
    return from_module(*pair)


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


def refuse_no_source(source: ModelSource, *, or_graph: bool = False) -> None:
    """Raise InputRefused for what names no model, nor a graph where it may, before anything else is read."""
    if isinstance(source, str | Path) and not (or_graph and names_kind(source, ArtifactKind.GRAPH)):
        refuse_no_model(source, "an .onnx file" if or_graph else "")


def refuse_pt2(model: ModelSource) -> None:
    """Raise InputRefused for a .pt2 that is to be exported again or trained: it holds a graph, not module code."""
    if names_kind(model, ArtifactKind.PROGRAM):
        raise InputRefused(
            f"{model} is an exported program already. `lora-export verify` accepts it as {named('model')} and as "
            "CANDIDATE. To make another file, give the model that it was exported from"
        )
