"""The file that is to be proven: what runs it, and by which hashes it can be known again."""

from __future__ import annotations

import mmap
from pathlib import Path

from lora_export.errors import InputRefused
from lora_export.formats.onnx_adapter import ADAPTER_IDS
from lora_export.models.load import load_model, module_with_weights
from lora_export.models.model import Model
from lora_export.models.pt2 import program
from lora_export.runtime.kv_cache import with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import Runner
from lora_export.runtime.torch_runners import ModuleRunner, ScriptRunner
from lora_export.storage import input_files
from lora_export.storage.hashes import file_sha256
from lora_export.weights.checkpoint import open_checkpoint

LOCATION = b"\x0a\x08location"  # the key of an external tensor's file, as protobuf writes it


def open_candidate(
    path: Path, base: Model, *, provider: str = "cpu", onnx_adapter: Path | None = None, adapter_id: int | None = None
) -> Runner:
    """Whatever runs a file of this kind: an .onnx, a .pt or .pt2, a Hugging Face folder, or weights of `base`.

    `onnx_adapter` is run with an .onnx that takes it, `adapter_id` stands for all rows of one that has rows.
    Raises InputRefused for another kind, and EnvironmentLacking where the provider does not load.
    """
    if not path.is_dir():
        input_files.must_be_regular(path)
    if path.suffix == ".onnx":
        runner = OnnxRunner(path, provider)
        runner = runner if onnx_adapter is None else runner.with_adapter(onnx_adapter)
        if adapter_id is None and ADAPTER_IDS in runner.axes:
            return runner  # for whoever says which rows have which
        return with_cache(runner if adapter_id is None else runner.with_rows([adapter_id]))
    if path.is_dir():
        return ModuleRunner(load_model(str(path)).module, stored=_stored(path))
    if path.suffix == ".safetensors":
        return ModuleRunner(module_with_weights(base, path), stored=_stored(path))
    if path.suffix in (".pt", ".ts", ".pth"):
        return ScriptRunner(path, base.input_names)
    if path.suffix == ".pt2":
        module = program.load(path)
        return ModuleRunner(module, axes=module.axes, stored=module.stored_dtypes, limits=module.limits)
    raise InputRefused(f"{path}: a candidate is an .onnx, .pt, .pt2 or .safetensors file, or a Hugging Face folder")


def hashes(path: Path) -> dict[str, str]:
    """File -> SHA-256 of all that a candidate consists of: a folder's files, a graph and its external data."""
    if path.is_dir():
        return {there.relative_to(path).as_posix(): file_sha256(there) for there in input_files.regular_files(path)}
    return {there.name: file_sha256(there) for there in (path, *_external_data(path))}


def _external_data(path: Path) -> list[Path]:
    if path.suffix != ".onnx":
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(LOCATION) < 0:  # and onnx need not be imported
            return []
    from lora_export.graph.onnx_file import open_graph

    graph = open_graph(path)
    return [place for place in graph.sources if not place.samefile(path)]


def _stored(path: Path) -> dict[str, str]:
    """The dtypes in which a checkpoint keeps its tensors."""
    return {spec.name: spec.dtype for spec in open_checkpoint(path).specs}
