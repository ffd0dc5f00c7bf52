"""`lora_export.inspect`: what an adapter, a checkpoint or a graph contains. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_export import formats
from lora_export.errors import InputRefused, WrongUsage, listed
from lora_export.lora import Adapter
from lora_export.storage.manifest import damage
from lora_export.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from lora_export.formats.onnx_adapter import OnnxAdapter
    from lora_export.graph.find_sites import Sites


@dataclass(frozen=True)
class Inspection:
    """What a path contains: exactly one of the four is not None."""

    path: Path
    adapter: Adapter | None = None
    checkpoint: Checkpoint | None = None  # names, shapes and types; no weights
    graph: Sites | None = None  # where the weights of a graph are read, and how each name was recovered
    onnx_adapter: OnnxAdapter | None = None


def inspect(path: str | Path, *, checkpoint: str | Path | None = None, check: bool = False) -> Inspection:
    """Read the headers of a path, and the tensors of an adapter.

    `path` is an adapter, a Hugging Face folder, a .safetensors file, an .onnx or an .onnx_adapter. For an .onnx,
    `checkpoint` is what it was exported from: its tensors name the graph's weights by content. With `check`, every file
    of a merged folder is read and compared with the hashes in its manifest.

    Raises InputRefused where the path is missing, damaged or of an unknown kind, or where `check` finds a difference.
    """
    path = Path(path)
    if not path.exists():
        raise InputRefused(f"there is nothing at {path}")
    if checkpoint is not None and path.suffix != ".onnx":
        raise WrongUsage("--base names the weights of an .onnx file")
    if check and (damaged := damage(path)):
        raise InputRefused(f"{path} is not what was written:\n{listed(damaged)}")
    if formats.recognised(path):
        return Inspection(path, adapter=formats.load(path))
    if path.suffix == ".onnx_adapter":
        from lora_export.formats import onnx_adapter

        return Inspection(path, onnx_adapter=onnx_adapter.read(path))
    if path.suffix == ".onnx":
        from lora_export.graph.find_sites import find_sites
        from lora_export.graph.onnx_file.reading import load_graph

        names = None if checkpoint is None else open_checkpoint(Path(checkpoint))
        return Inspection(path, graph=find_sites(load_graph(path), names))
    return Inspection(path, checkpoint=open_checkpoint(path))
