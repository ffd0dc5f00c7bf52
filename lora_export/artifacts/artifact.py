"""What a path is, and what it records. The code behind `open_artifact` asks its kind, and never looks at a suffix.

A record is what lora-export stores in what it writes: base, adapters, settings, verdict. Needs neither PyTorch nor
onnx, and runs nothing.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_export import provenance
from lora_export.artifacts import archive
from lora_export.artifacts.files import (
    FOLDER_LAYOUTS,
    IMAGE_TEXT_FILES,
    SINGLE_GRAPH,
    VISION_FILE,
    files_of_artifact,
    graphs_in,
    hashes_of,
)
from lora_export.artifacts.kind import artifact_kind
from lora_export.errors import InputRefused, brief
from lora_export.formats.contract import RowAdapters, read_contract, read_row_adapters
from lora_export.options.common import is_address
from lora_export.options.spelling import command
from lora_export.provenance import CONTRACT_KEY, SLOTS_KEY, History, read_shared
from lora_export.storage import input_files, json_files, safetensors_file
from lora_export.storage.artifact_kinds import ArtifactKind
from lora_export.storage.gguf_file import open_gguf
from lora_export.storage.hashes import SHORT_HASH, file_hash
from lora_export.storage.manifest import MANIFEST, read_manifest
from lora_export.storage.store_path import place
from lora_export.weights.checkpoint import CONFIG, Checkpoint, is_streamable, open_checkpoint
from lora_export.weights.quantised import QUANTIZATION
from lora_export.weights.sentence_modules import TRANSFORMER_CONFIG, module_folders
from lora_export.weights.weight_files import MODULES_FILE, variant_like

if TYPE_CHECKING:
    from lora_export.weights.gguf.base import GgufBase

MAX_RECORD = 10_000_000  # bytes of the record in a TorchScript archive


@dataclass(frozen=True)
class WrittenRecord:
    """What a file or folder records about how it was made. False where it records nothing."""

    content: Mapping[str, Any] = field(default_factory=dict)
    adapters: History = ()  # all of them, those of earlier merges first
    by_row: Sequence[str] | None = None  # the names that rows may choose from, from id 1 on; None: not by row

    def __repr__(self) -> str:
        return brief(self, *map(str, (adapter.get("name") for adapter in self.adapters)))

    def __bool__(self) -> bool:
        return bool(self.content)

    @property
    def mode(self) -> str:
        """`merged`, `nodes`, `inputs`, `rows` or `slots`."""
        return str(self.settings.get("lora", "merged"))

    @property
    def settings(self) -> Mapping[str, Any]:
        return _table(self.content, "settings")

    @property
    def base(self) -> Mapping[str, Any]:
        """Hashes of the base: {"sha256": of all weights of a PyTorch model}, or {file name: {algorithm: hash}}."""
        return _table(self.content, "base")


def _text_in_archive(path: Path) -> str | None:
    """The record in the archive that a file is, or that is behind a program of ExecuTorch; None without one."""
    if not zipfile.is_zipfile(path):
        return None
    with archive.opened(path, "has a damaged archive") as opened:
        for member in opened.infolist():
            if member.filename.endswith(f"/extra/{MANIFEST}"):
                return archive.content(opened, member, path, most=MAX_RECORD).decode(errors="replace")
    return None


def has_broken_archive(path: Path) -> bool:
    """Whether a file has the mark of an archive's end at its own, and is none: it was cut, or changed."""
    with input_files.open_regular(path) as file:
        file.seek(max(0, path.stat().st_size - END_OF_ARCHIVE))
        return b"PK\x05\x06" in file.read(END_OF_ARCHIVE) and not zipfile.is_zipfile(path)


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


# --- artifacts ---


END_OF_ARCHIVE = 1 << 16  # bytes


@dataclass(frozen=True)
class Artifact:
    """A path whose kind is known. What else is known of it is read when it is needed, and once."""

    path: Path
    kind: ArtifactKind
    address: str = ""  # of an endpoint, whose path names nothing
    like: Artifact | None = None  # of several sets of weights in a folder, the one with the names of these is meant

    def __str__(self) -> str:
        return self.address or str(self.path)

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """Name -> path of each of its files: those in a folder, or a graph and its external data."""
        if self.address:
            return {}
        files = files_of_artifact(self.path, is_graph=self.kind is ArtifactKind.GRAPH)
        if self.kind is ArtifactKind.OPENVINO and (weights := self.path.with_suffix(".bin")).is_file():
            return {**files, weights.name: weights}
        return files

    @property
    def graph_files(self) -> Mapping[str, Path]:
        """Name -> path of the three graphs of one model, and of their external data."""
        graphs = (Artifact(self.path / name, ArtifactKind.GRAPH) for name in graphs_in(self.path))
        return {name: path for graph in graphs for name, path in graph.files.items()}

    def refuse_missing_graph(self) -> None:
        """Raise InputRefused for a folder that has one or two of the three graphs, and no other model.

        Exporters write such a folder where the cache is switched off.
        """
        if not self.path.is_dir() or any(self.path.glob("*.safetensors")):
            return
        for files, model in zip(FOLDER_LAYOUTS, ("An encoder-decoder", "A model that reads images"), strict=True):
            missing = [name for name in files if not (self.path / name).is_file()]
            found = [name for name in files if name not in missing]
            # optimum's decoders of texts have one of these names, and so has SAM's encoder, with another graph beside:
            # one of another name, and no vision_encoder_quantized.onnx
            stems = tuple(name.removesuffix(".onnx") for name in files)
            has_others = any(not graph.name.startswith(stems) for graph in self.path.glob("*.onnx"))
            is_other = files is IMAGE_TEXT_FILES and (VISION_FILE in missing or (found == [VISION_FILE] and has_others))
            if found and missing and not is_other:
                raise InputRefused(
                    f"{self.path} has {', '.join(found)}, and no {' and no '.join(missing)}. {model} is run with its "
                    f"cache, by all three graphs: {command('onnx', 'MODEL', with_cache=True, output='FOLDER')}"
                )

    def refuse_changed_weights(self) -> None:
        """Raise InputRefused where weights that a graph shares with another are not what they were at its export."""
        if self.kind is ArtifactKind.GENERATION:
            for name in graphs_in(self.path):
                Artifact(self.path / name, ArtifactKind.GRAPH).refuse_changed_weights()
        if self.kind is not ArtifactKind.GRAPH:
            return
        try:
            properties = self.metadata
        except InputRefused:  # it is no graph: what runs it reports that
            return
        for name, (algorithm, expected) in read_shared(properties, self.path).items():
            found = file_hash(self.path.parent / name, algorithm)
            if found != expected:
                raise InputRefused(
                    f"{self.path} shares the weights in {name} with another graph, and this file has changed: its "
                    f"{algorithm} is {found[:SHORT_HASH]}, not {expected[:SHORT_HASH]}. Put that file back, or export "
                    "again"
                )

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """A context at whose end its files must be those of the beginning, and those of a graph at its export.

        Raises InputRefused, also where there is no file.
        """
        if self.address:
            yield
            return
        input_files.must_exist(self.path, "candidate")
        with input_files.unchanged(self.path, lambda: list(Artifact(self.path, self.kind).files.values())):
            self.refuse_changed_weights()
            yield

    @cached_property
    def hashes(self) -> Mapping[str, str]:
        """Name -> SHA-256 of each of its files."""
        return hashes_of(self.files)

    @cached_property
    def record(self) -> WrittenRecord:
        """What it records about how it was made; an empty record where it has none. Reads headers only.

        Raises InputRefused where the record or its file is damaged.
        """
        path = self.path
        if self.address:
            return WrittenRecord()
        if path.is_dir():
            content = read_manifest(path)
        else:
            if self.kind is ArtifactKind.GRAPH:
                text = self.metadata.get(provenance.KEY)
            elif self.kind is ArtifactKind.GGUF:
                text = open_gguf(path).value(provenance.KEY)
            elif self.kind is ArtifactKind.WEIGHTS:
                text = safetensors_file.open_file(path).metadata.get(provenance.KEY)
            else:
                text = _text_in_archive(path)
            content = (
                json_files.parse_json(text.encode(errors="surrogatepass"), f"the record in {path}") if text else {}
            )
        rows = self._rows
        return WrittenRecord(content, provenance.history(content, path), None if rows is None else rows.names)

    @property
    def _rows(self) -> RowAdapters | None:
        """The adapters that rows of a graph may choose from."""
        return read_row_adapters(self.metadata, str(self.path)) if self.kind is ArtifactKind.GRAPH else None

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a graph's own metadata contain; of a program of ExecuTorch, what its record has of adapter inputs.

        Nothing for other artifacts. Raises InputRefused where the graph or the record is damaged.
        """
        if self.kind is ArtifactKind.EXECUTORCH:
            contract = self.record.content.get(CONTRACT_KEY)
            return {} if contract is None else {CONTRACT_KEY: json.dumps(contract)}
        return self._metadata_and_shapes[0] if self.kind is ArtifactKind.GRAPH else {}

    @property
    def input_shapes(self) -> Mapping[str, tuple[Any, ...]]:
        """The shape of each input of a graph, by name; a size that varies is no int."""
        return self._metadata_and_shapes[1]

    @cached_property
    def _metadata_and_shapes(self) -> tuple[Mapping[str, str], Mapping[str, tuple[Any, ...]]]:
        from lora_export.graph.onnx_file.reading import load_graph  # onnx is not needed for a checkpoint

        model = load_graph(self.path)  # which is not held: it maps its files
        return model.metadata_props, {str(value.name): tuple(value.shape or ()) for value in model.graph.inputs}

    @property
    def has_own_heads(self) -> bool:
        """Whether each row of a graph has the head that its adapter saves whole."""
        if self.kind is ArtifactKind.GRAPH and SLOTS_KEY in self.metadata:
            return bool(read_contract(self.metadata, self.path).heads)
        return self._rows is not None and bool(self._rows.labels)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The headers of a folder or file of weights. Raises InputRefused as `open_checkpoint` or `open_base`."""
        return self.gguf.checkpoint if self.kind is ArtifactKind.GGUF else open_checkpoint(self.path)

    @cached_property
    def dequantised(self) -> Checkpoint:
        """The same, where quantised weights are read as floats."""
        variant = None if self.like is None else variant_like(self.path, self.like.dequantised.shards)
        return open_checkpoint(self.path, dequantise=True, variant=variant)

    @property
    def headers(self) -> Checkpoint:
        """The same, of which no weight is read: those that are quantised have the names and shapes of floats."""
        return self.checkpoint if self.kind is ArtifactKind.GGUF else self.dequantised

    @cached_property
    def gguf(self) -> GgufBase:
        """The headers of a GGUF file. Raises InputRefused as `open_base`."""
        from lora_export.weights.gguf.base import open_base  # few artifacts are such files

        return open_base(self.path)

    @cached_property
    def is_quantised(self) -> bool:
        """Whether a folder states in its config that its weights are quantised; a GGUF file may, in each tensor."""
        if self.kind is ArtifactKind.GGUF:
            return True
        config = self.path / CONFIG
        return config.is_file() and bool(json_files.read_json(config).get(QUANTIZATION))

    @property
    def is_streamable(self) -> bool:
        """Whether the weights of a folder or a file can stay there (see `models.streamed_folder`)."""
        try:
            return is_streamable(self.checkpoint)
        except InputRefused:  # loading it will refuse it with a better message
            return False

    @cached_property
    def module_folders(self) -> list[Path]:
        """The folders of an embedding model's modules after its transformer."""
        return module_folders(self.path)

    @property
    def module_files(self) -> list[str]:
        """The names of the files that make an embedding model of a folder."""
        of_modules = self.module_folders
        own = [name for name, path in self.files.items() if any(path.is_relative_to(folder) for folder in of_modules)]
        return [MODULES_FILE, TRANSFORMER_CONFIG, *own]


def open_artifact(path: str | Path) -> Artifact:
    """A path with its kind. Reads no weights, and refuses nothing: the reader of a kind does.

    A folder of one graph without a checkpoint's weights, as a decoder is exported to, is its graph. The address of a
    server is that of an endpoint.
    """
    if is_address(path):
        return Artifact(Path(path), ArtifactKind.ENDPOINT, str(path).rstrip("/"))
    path = place(path)
    if (path / SINGLE_GRAPH).is_file() and not any(path.glob("*.safetensors")):
        path /= SINGLE_GRAPH
    return Artifact(path, artifact_kind(path))
