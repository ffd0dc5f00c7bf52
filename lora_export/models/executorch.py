"""Lower a program of torch.export for ExecuTorch (.pte): for XNNPACK what it computes, else for ExecuTorch's kernels.

The record of where the file comes from is an archive behind the program. ExecuTorch does not read it, so that the
program stays as it was proven, and readers of the record need no ExecuTorch.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from lora_export.errors import InputRefused
from lora_export.extras import optional_package
from lora_export.models.export_program import FIXED_TIME
from lora_export.models.model import CHECKED_SIZES, Model, Sizes
from lora_export.models.tracing import exporter_refusals, silence
from lora_export.options.spelling import named

EXECUTORCH_EXTRA = "executorch"
USUAL_BATCH = max(sizes["batch"] for sizes in CHECKED_SIZES)
USUAL_GREATEST = 128  # of other axes, where the traced size is no larger


def import_executorch() -> tuple[Any, Any]:
    """The compiler and the partitioner of XNNPACK. Raises EnvironmentLacking where ExecuTorch is not installed."""
    with silence():
        modules = ("executorch.exir", "executorch.backends.xnnpack.partition.xnnpack_partitioner")
        compiler, xnnpack = (optional_package(name, "a .pte file needs", EXECUTORCH_EXTRA) for name in modules)
    return compiler, xnnpack.XnnpackPartitioner


def planned_sizes(model: Model, stated: Mapping[str, int]) -> Sizes:
    """The greatest size of each varying axis, for which ExecuTorch reserves memory: the stated one, or a usual one.

    None is greater than the model's own limit. Raises InputRefused for a stated axis that the model does not have.
    """
    symbols = sorted({symbol for axes in model.axes.values() for symbol in axes.values()})
    for unknown in stated.keys() - symbols:
        known = ", ".join(symbols) or "none"
        raise InputRefused(f"{named('max_size', unknown)}: the model has no axis of this name. It has {known}")
    usual = {symbol: max(USUAL_GREATEST, model.traced_sizes[symbol]) for symbol in symbols} | {"batch": USUAL_BATCH}
    sizes = {symbol: stated.get(symbol, usual[symbol]) for symbol in symbols}
    return {symbol: min(size, model.limits.get(symbol, (0, None))[1] or size) for symbol, size in sizes.items()}


def lowered(module: nn.Module, program: ExportedProgram) -> Any:
    """ExecuTorch's program, which `save_executorch` writes. The sizes that vary have to have a maximum.

    Raises EnvironmentLacking where ExecuTorch is not installed, and RuntimeRefused where it refuses the program.
    """
    compiler, partitioner = import_executorch()
    with silence(), exporter_refusals(module):
        return compiler.to_edge_transform_and_lower(program, partitioner=[partitioner()]).to_executorch()


def save_executorch(program: Any, path: Path, *, extra: Mapping[str, str]) -> None:
    """Write ExecuTorch's program, and behind it an archive with the texts of `extra`, which `unzip` reads."""
    with path.open("wb") as file:
        program.write_to_file(file)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        for name, text in extra.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/extra/{name}", FIXED_TIME), text)
