"""The files of an artifact and their hashes, the names of output files, and the graphs of models that have several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_export.errors import OutputFailed, WrongUsage
from lora_export.storage import input_files
from lora_export.storage.artifact_kinds import FILE_SUFFIXES, ArtifactKind
from lora_export.storage.hashes import file_sha256
from lora_export.storage.store_path import place

ENCODER_FILE, DECODER_FILE, WITH_PAST_FILE = "encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"
SINGLE_GRAPH = "model.onnx"  # the name under which other programs look for a decoder's graph
GRAPH_FILES = (ENCODER_FILE, DECODER_FILE, WITH_PAST_FILE)
# Of a model that reads images among its tokens; transformers.js has the same names.
VISION_FILE, EMBEDDING_FILE, MERGED_FILE = "vision_encoder.onnx", "embed_tokens.onnx", "decoder_model_merged.onnx"
IMAGE_TEXT_FILES = (VISION_FILE, EMBEDDING_FILE, MERGED_FILE)
FOLDER_LAYOUTS = (GRAPH_FILES, IMAGE_TEXT_FILES)
LOCATION = b"\x0a\x08location"  # the key of an external tensor's file, as protobuf writes it


def file_for_graph(adapter: str, graph: str) -> str:
    """The name of an adapter's file for one of the graphs: `fr.encoder_model.onnx_adapter`."""
    return f"{adapter}.{Path(graph).stem}{ArtifactKind.ADAPTER.suffixes[0]}"


def adapter_of_file(path: Path) -> str:
    """The name of the adapter of such a file; empty where the file has another name."""
    graphs = (graph for files in FOLDER_LAYOUTS for graph in files)
    names = (path.name.removesuffix(file_for_graph("", graph)) for graph in graphs)
    return next((name for name in names if name != path.name), "")


def graphs_in(path: Path) -> tuple[str, ...]:
    """The files of the three graphs in a folder, of an encoder-decoder or with images; none where it lacks one."""
    found = (files for files in FOLDER_LAYOUTS if path.is_dir() and all((path / name).is_file() for name in files))
    return next(found, ())


# --- files and their hashes ---


def files_of_artifact(path: Path, *, is_graph: bool) -> dict[str, Path]:
    """Name -> path of every file: a folder's files, or a graph and its external data."""
    if path.is_dir():
        return {file.relative_to(path).as_posix(): file for file in input_files.regular_files(path)}
    input_files.must_be_regular(path)
    return {file.name: file for file in (path, *(_external_data(path) if is_graph else []))}


def hashes_of(files: Mapping[str, Path]) -> dict[str, str]:
    """Name -> SHA-256 of files."""
    return {name: file_sha256(file) for name, file in files.items()}


def _external_data(path: Path) -> list[Path]:
    if not path.stat().st_size:
        return []
    from lora_export.graph.onnx_file.protobuf_wire import refuse_no_message  # few artifacts are graphs

    refuse_no_message(path)
    if not input_files.contains(path, LOCATION):  # and onnx need not be imported
        return []
    from lora_export.graph.onnx_file.reading import open_graph

    graph = open_graph(path)
    return [source for source in graph.sources if not source.samefile(path)]


def names_file(output: Path) -> bool:
    """Whether the name of an output is that of a file, and of no folder."""
    return output.suffix in FILE_SUFFIXES


# Suffix -> what reads and writes such files
LIBRARIES = {".onnx": "ONNX's libraries", ".pt": "PyTorch's readers"}


def with_suffix(output: str | Path, suffix: str, *others: str) -> Path:
    """`out/model` as `out/model.onnx`. `others` are further suffixes that the kind has.

    What exists under the name keeps it: a file that is to be replaced, or a folder, which the command then refuses.

    Raises WrongUsage for the suffix of another kind of file, and OutputFailed for a path that its library cannot open.
    """
    path = place(output)
    if library := LIBRARIES.get(suffix):
        try:
            str(path.absolute()).encode()
        except UnicodeEncodeError as error:
            raise OutputFailed(f"{path} is not UTF-8, and {library} take no such path. Name it otherwise") from error
    if path.suffix in (suffix, *others) or path.name in ("", ".."):
        return path
    if path.suffix in FILE_SUFFIXES:
        raise WrongUsage(f"the output is a {suffix} file: name it {path.with_suffix(suffix)}, not {path.name}")
    return path if path.is_symlink() or path.exists() else path.with_name(path.name + suffix)
