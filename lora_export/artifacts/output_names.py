"""The file that an output is written to: a name without a suffix gets that of its kind."""

from __future__ import annotations

from pathlib import Path

from lora_export.errors import OutputFailed, WrongUsage
from lora_export.storage.store_path import place

# Suffixes of other files: such a name is a mistake, and no name with a dot in it
KINDS = frozenset(
    {".onnx", ".onnx_adapter", ".ort", ".pt", ".pt2", ".pth", ".ts", ".safetensors", ".gguf", ".bin", ".json", ".npz"}
)

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
    if path.suffix in KINDS:
        raise WrongUsage(f"the output is a {suffix} file: name it {path.with_suffix(suffix)}, not {path.name}")
    return path if path.is_symlink() or path.exists() else path.with_name(path.name + suffix)
