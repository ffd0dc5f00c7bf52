"""The file that an output is written to: a name without a suffix gets that of its kind."""

from __future__ import annotations

import os
from pathlib import Path

from lora_export.errors import WrongUsage

# Suffixes of other files: such a name is a mistake, and no name with a dot in it
KINDS = frozenset(
    {".onnx", ".onnx_adapter", ".ort", ".pt", ".pt2", ".pth", ".ts", ".safetensors", ".bin", ".json", ".npz"}
)


def with_suffix(output: str | Path, suffix: str, *others: str) -> Path:
    """`out/model` as `out/model.onnx`. `others` are further suffixes that the kind has.

    What exists under the name keeps it: a file that is to be replaced, or a folder, which the command then refuses.

    Raises WrongUsage for the suffix of another kind of file.
    """
    path = Path(output)
    if path.suffix in (suffix, *others) or path.name in ("", ".."):
        return path
    if path.suffix in KINDS:
        raise WrongUsage(f"the output is a {suffix} file: name it {path.with_suffix(suffix)}, not {path.name}")
    return path if os.path.lexists(path) else path.with_name(path.name + suffix)
