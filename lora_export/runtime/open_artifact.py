"""Open the file that is to be verified, and hash it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from lora_export import layers
from lora_export.errors import InputRefused
from lora_export.graph.cache_names import POSITION_IDS
from lora_export.graph.onnx_file.protobuf_wire import refuse_no_message
from lora_export.models.cached_decoder import counts_by_mask, takes_positions
from lora_export.models.load import load_model, module_with_weights
from lora_export.models.model import Model
from lora_export.models.pt2 import program
from lora_export.runtime.encoder_decoder import EncoderDecoderRunner
from lora_export.runtime.encoder_decoder_files import (
    ENCODER_FILE,
    adapter_of_file,
    file_for_graph,
    is_encoder_decoder_folder,
)
from lora_export.runtime.kv_cache import with_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.runner import TIMEOUT, Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage import input_files
from lora_export.storage.hashes import HASH_BLOCK, file_sha256
from lora_export.weights.checkpoint import open_checkpoint

LOCATION = b"\x0a\x08location"  # the key of an external tensor's file, as protobuf writes it


def open_candidate(
    path: Path,
    base: Model,
    *,
    provider: str = "cpu",
    onnx_adapter: Path | None = None,
    adapter_id: int | None = None,
    timeout: float = TIMEOUT,
) -> Runner:
    """A runner of a candidate: an .onnx, a folder with the three graphs of an encoder-decoder, a .pt or .pt2, a Hugging
    Face folder, or weights (.safetensors) of `base`.

    `onnx_adapter` is run with an .onnx that takes it. `adapter_id` is the id of every row of a graph with adapters by
    row; without it, the caller sets the ids. A run is stopped after `timeout` seconds, that of a folder or a .pt2 once
    its operator has ended. Raises InputRefused for another kind of file, and EnvironmentLacking where the provider does
    not load.
    """
    if not path.is_dir():
        input_files.must_be_regular(path)
    if path.suffix == ".onnx":
        runner = OnnxRunner(path, provider, timeout=timeout)
        if POSITION_IDS in runner.axes and POSITION_IDS not in base.axes and takes_positions(base.module):
            runner.positions_by_mask = base.is_huggingface and counts_by_mask(base.module)
        return _open_graph(runner, onnx_adapter, adapter_id)
    if is_encoder_decoder_folder(path):
        return _open_graphs(EncoderDecoderRunner.open(path, provider, timeout=timeout), onnx_adapter, adapter_id)
    if path.is_dir():
        module = load_model(str(path), streamed=True).module
        return ModuleRunner(module, stored_dtypes=_stored_dtypes(path, module), path=path, timeout=timeout)
    if path.suffix == ".safetensors":
        module = module_with_weights(base, path)
        return ModuleRunner(module, stored_dtypes=_stored_dtypes(path, module), path=path, timeout=timeout)
    if path.suffix in (".pt", ".ts", ".pth"):
        return ScriptRunner(path, base.input_names, timeout=timeout)
    if path.suffix == ".pt2":
        loaded = program.load_program(path)
        return ModuleRunner(
            loaded,
            axes=loaded.axes,
            stored_dtypes=loaded.stored_dtypes,
            limits=loaded.limits,
            path=path,
            timeout=timeout,
        )
    raise InputRefused(f"{path}: a candidate is an .onnx, .pt, .pt2 or .safetensors file, or a Hugging Face folder")


def _open_graph(runner: OnnxRunner, onnx_adapter: Path | None, adapter_id: int | None) -> Runner:
    runner = runner if onnx_adapter is None else runner.with_adapter(onnx_adapter)
    if adapter_id is None and runner.takes_rows:
        return runner
    return with_cache(runner if adapter_id is None else runner.with_rows([adapter_id]))


def _open_graphs(runner: EncoderDecoderRunner, onnx_adapter: Path | None, adapter_id: int | None) -> Runner:
    if onnx_adapter is not None:
        name = adapter_of_file(onnx_adapter)
        if not name or not onnx_adapter.is_file() or not onnx_adapter.parent.samefile(runner.path):
            raise InputRefused(
                f"{onnx_adapter} is no adapter of the graphs in {runner.path}: name one of its files there, such as "
                f"{file_for_graph('NAME', ENCODER_FILE)}"
            )
        return runner.with_adapter(name)
    return runner if adapter_id is None else runner.with_rows([adapter_id])


def file_hashes(candidate: Path | Mapping[str, Path]) -> dict[str, str]:
    """File name -> SHA-256 of every file of a candidate, or of these of its files."""
    files = candidate_files(candidate) if isinstance(candidate, Path) else candidate
    return {name: file_sha256(file) for name, file in files.items()}


def candidate_files(path: Path) -> dict[str, Path]:
    """Name -> path of every file of a candidate: a folder's files, or a graph and its external data."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file for file in input_files.regular_files(path)}
    input_files.must_be_regular(path)
    return {file.name: file for file in (path, *_external_data(path))}


def _external_data(path: Path) -> list[Path]:
    if path.suffix != ".onnx" or not path.stat().st_size:
        return []
    refuse_no_message(path)
    if not _contains(path, LOCATION):  # and onnx need not be imported
        return []
    from lora_export.graph.onnx_file.reading import open_graph

    graph = open_graph(path)
    return [source for source in graph.sources if not source.samefile(path)]


def _stored_dtypes(path: Path, module: nn.Module) -> dict[str, str]:
    return layers.with_loaded_names(module, {spec.name: spec.dtype for spec in open_checkpoint(path).specs})


def _contains(path: Path, text: bytes) -> bool:
    """Whether a file contains these bytes. Not by mmap: the pages that are read would count as the process's memory."""
    end = b""
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK):
            if text in (both := end + block):
                return True
            end = both[-len(text) :]
    return False
