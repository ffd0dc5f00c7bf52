"""The kinds of artifacts, and the suffixes of their files: the one table of both.

Another kind is a member, and what does something with it: `runtime.open_artifact` runs it, `api.programs` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Self


class ArtifactKind(StrEnum):
    """What an artifact is. Beside the words, the suffixes that claim this kind, the usual one first."""

    suffixes: tuple[str, ...]

    def __new__(cls, words: str, *suffixes: str) -> Self:
        kind = str.__new__(cls, words)
        kind._value_, kind.suffixes = words, suffixes
        return kind

    CHECKPOINT = "checkpoint folder"
    EMBEDDER = "embedding model"
    PIPELINE = "diffusion pipeline"
    GENERATION = "graphs of one model"
    WEIGHTS = "weights", ".safetensors"
    GGUF = "GGUF file", ".gguf"
    GRAPH = "graph", ".onnx"
    SCRIPT = "TorchScript", ".pt", ".pth", ".ts"
    PROGRAM = "program of torch.export", ".pt2"
    EXECUTORCH = "program of ExecuTorch", ".pte"
    OPENVINO = "model of OpenVINO", ".xml"
    ADAPTER = "adapter for a graph", ".onnx_adapter"
    ENDPOINT = "endpoint"
    OTHER = "other file"

    @property
    def is_graph(self) -> bool:
        """Whether onnxruntime runs it."""
        return self in (ArtifactKind.GRAPH, ArtifactKind.GENERATION)

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is weights of a PyTorch model, in a folder or a file."""
        return self in (ArtifactKind.CHECKPOINT, ArtifactKind.EMBEDDER, ArtifactKind.PIPELINE, ArtifactKind.WEIGHTS)


# What `torchscript` writes, by its option `format`
PROGRAM_FORMATS: Mapping[str, ArtifactKind] = {
    "torchscript": ArtifactKind.SCRIPT,
    "pt2": ArtifactKind.PROGRAM,
    "pte": ArtifactKind.EXECUTORCH,
}
CLAIMED: Mapping[str, ArtifactKind] = {suffix: kind for kind in ArtifactKind for suffix in kind.suffixes}
# With these, a name is that of a file: a missing one is no name of a model, and a dot in it no mistake.
FILE_SUFFIXES = frozenset({*CLAIMED, ".bin", ".json", ".npz", ".ort"})


def claimed_kind(name: str | Path) -> ArtifactKind | None:
    """The kind that the name of a file claims; None where it claims none."""
    return CLAIMED.get(Path(name).suffix)


# --- folders of torch.distributed.checkpoint ---

METADATA_FILE, SHARD_SUFFIX = ".metadata", ".distcp"


def is_distributed_checkpoint(path: Path) -> bool:
    """Whether a folder has the metadata and a shard of such a checkpoint. Reads nothing."""
    return (path / METADATA_FILE).is_file() and any(path.glob(f"*{SHARD_SUFFIX}"))
