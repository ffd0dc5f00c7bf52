"""External data of an ONNX file: the checks on where a tensor's bytes are stored."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import onnx_ir as ir

from lora_export.errors import InputRefused, listed
from lora_export.graph.values import attribute_tensors, initializers

MAX_LISTED = 10  # problems that an error lists
BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of a file in a Hugging Face cache: its hash


def refuse_misplaced_data(model: ir.Model, path: Path, inline: set[ir.Value]) -> None:
    """Raise InputRefused for external data that cannot be read, or is stored outside of the graph's folder.

    `inline` are the values whose data is in the graph's own file. Sets the folder of all other external tensors.
    """
    problems = []
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and value not in inline:
            tensor.base_dir = path.parent
            if blob := _huggingface_blob(path.parent, os.fsdecode(tensor.location)):
                value.const_value = tensor = moved_to(tensor, blob)
            problems.append(_location_problem(Path(tensor.base_dir), tensor))
        elif isinstance(tensor, ir.ExternalTensor):
            problems.append(_length_problem(tensor))
    for tensor in attribute_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = path.parent
            problems.append(_location_problem(path.parent, tensor))
    problems = [problem for problem in problems if problem]
    if problems:
        what = f"{path}: {len(problems)} tensors cannot be read from its external data:"
        raise InputRefused(what, listed(problems, MAX_LISTED))


def moved_to(tensor: ir.ExternalTensor, path: Path) -> ir.ExternalTensor:
    """The same tensor in another file, at the same offset."""
    return ir.ExternalTensor(
        path.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape),
        name=tensor.name,
        metadata_props=dict(tensor.metadata_props),
        base_dir=path.parent,
    )


def _huggingface_blob(folder: Path, location: str) -> Path | None:
    """The file behind a link in a Hugging Face cache: `snapshots/REVISION/NAME` links to `blobs/HASH`.

    None for any other link, which is refused: the author of a model could link to any file of the user. These links
    stay within the folder of one model, and the blob is not a link.
    """
    path = folder / location
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    relative = Path(location)
    if snapshots is None or "\0" in location or relative.is_absolute() or ".." in relative.parts:
        return None
    if not path.is_symlink():
        return None
    blob = Path(os.path.realpath(path))
    if blob.parent != Path(os.path.realpath(snapshots.parent)) / "blobs" or not BLOB_NAME.fullmatch(blob.name):
        return None
    return blob if Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(snapshots)) else None


def _location_problem(folder: Path, tensor: ir.ExternalTensor) -> str:
    """What is wrong with the location of a tensor's data. Empty where it can be read."""
    location = os.fsdecode(tensor.location)
    path = Path(os.path.normpath(folder / location))
    if not location or "\0" in location or Path(location).is_absolute() or not path.is_relative_to(folder):
        return f"{tensor.name}: the location of its data is absolute or outside the model's folder ({location!r})"
    if path.resolve() != folder.resolve() / path.relative_to(folder):
        return f"{tensor.name}: {location} is reached through a symbolic link; replace the link by a copy of the file"
    try:
        status = os.stat(os.path.join(folder, location))  # noqa: PTH116, PTH118 - a Path would drop a final slash
    except OSError as error:
        return f"{tensor.name}: {location}: {error.strerror}"
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        return f"{tensor.name}: {location} is not a regular file with one name; replace it by a copy of the file"
    offset = tensor.offset or 0
    if problem := _length_problem(tensor):
        return problem
    if not 0 <= offset <= status.st_size - tensor.nbytes:
        end = offset + tensor.nbytes
        return f"{tensor.name}: needs bytes {offset} to {end} of {location}, which has {status.st_size}"
    return ""


def _length_problem(tensor: ir.ExternalTensor) -> str:
    if tensor.length in (None, tensor.nbytes):
        return ""
    return (
        f"{tensor.name}: {tensor.length} bytes are recorded, but {tensor.dtype.name} {list(tensor.shape)} has "
        f"{tensor.nbytes}"
    )
