"""The files of an encoder-decoder's three graphs in a folder, as optimum names them."""

from __future__ import annotations

from pathlib import Path

from lora_export.errors import InputRefused
from lora_export.formats.onnx_adapter import SUFFIX
from lora_export.options.spelling import command

ENCODER_FILE, DECODER_FILE, WITH_PAST_FILE = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
GRAPH_FILES = (ENCODER_FILE, DECODER_FILE, WITH_PAST_FILE)


def file_for_graph(adapter: str, graph: str) -> str:
    """The name of an adapter's file for one of the graphs: `fr.encoder_model.onnx_adapter`."""
    return f"{adapter}.{Path(graph).stem}{SUFFIX}"


def adapter_of_file(path: Path) -> str:
    """The name of the adapter of such a file; empty where the file has another name."""
    names = (path.name.removesuffix(file_for_graph("", graph)) for graph in GRAPH_FILES)
    return next((name for name in names if name != path.name), "")


def is_encoder_decoder_folder(path: Path) -> bool:
    """Whether a folder has the three graphs of an encoder-decoder."""
    return path.is_dir() and all((path / name).is_file() for name in GRAPH_FILES)


def refuse_missing_graph(path: Path) -> None:
    """Raise InputRefused for a folder that has one or two of the three graphs, and no other model.

    Exporters write such a folder where the cache is switched off.
    """
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return
    missing = [name for name in GRAPH_FILES if not (path / name).is_file()]
    if 0 < len(missing) < len(GRAPH_FILES):
        found = ", ".join(name for name in GRAPH_FILES if name not in missing)
        raise InputRefused(
            f"{path} has {found}, and no {' and no '.join(missing)}. An encoder-decoder is run with its cache, by all "
            f"three graphs: {command('onnx', 'MODEL', with_cache=True, output='FOLDER')}"
        )
