"""Lower a program of torch.export for ExecuTorch (.pte): for XNNPACK what it computes, else for ExecuTorch's kernels.

The record of where the file comes from is an archive behind the program. ExecuTorch does not read it, so that the
program stays as it was proven, and readers of the record need no ExecuTorch.
"""

from __future__ import annotations

import functools
import importlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora_export.api.program_adapters import parameters_by_input
from lora_export.artifacts.artifact import Artifact
from lora_export.errors import InputRefused
from lora_export.extras import optional_package
from lora_export.models.export_program import FIXED_TIME, to_program, with_inputs
from lora_export.models.model import CHECKED_SIZES, Model, Sizes
from lora_export.models.refusals import exporter_refusals
from lora_export.models.tracing import silence
from lora_export.options.export import TorchScriptOptions
from lora_export.options.spelling import named
from lora_export.runtime.registered.executorch import EXECUTORCH, open_executorch
from lora_export.runtime.registered.runner import RegisteredRunner
from lora_export.storage.artifact_kinds import ArtifactKind

IS_TRACE, RUNTIME = False, "ExecuTorch"
USUAL_BATCH = max(sizes["batch"] for sizes in CHECKED_SIZES)
USUAL_GREATEST = 128  # of other axes, where the traced size is no larger


def require() -> tuple[Any, Any]:
    """The compiler and the partitioner of XNNPACK. Raises EnvironmentLacking where ExecuTorch is not installed."""
    with silence():
        modules = ("executorch.exir", "executorch.backends.xnnpack.partition.xnnpack_partitioner")
        compiler, xnnpack = (optional_package(name, "a .pte file needs", EXECUTORCH) for name in modules)
    return compiler, xnnpack.XnnpackPartitioner


def writer(base: Model, module: nn.Module, options: TorchScriptOptions) -> Callable[..., None]:
    """The sizes that vary have a maximum. An axis whose maximum is 1 does not vary."""
    most = planned_sizes(base, options.max_size or {})
    inputs = base.inputs({symbol: min(size, base.traced_sizes[symbol]) for symbol, size in most.items()}, seed=0)
    axes = {name: {axis: symbol for axis, symbol in own.items() if most[symbol] > 1} for name, own in base.axes.items()}
    exported = to_program(module, inputs, axes=axes, most=most)
    if options.lora == "inputs":
        exported = with_inputs(exported, list(parameters_by_input(module)))
    compiler, partitioner = require()
    chosen = _partitioner_of_inputs(partitioner) if options.lora == "inputs" else partitioner()
    with silence(), exporter_refusals(module):
        program = compiler.to_edge_transform_and_lower(exported, partitioner=[chosen]).to_executorch()
    sizes = ", ".join(f"{symbol} {size}" for symbol, size in most.items())
    options.on_message(
        f"note: the file takes sizes of up to {sizes}, for which it reserves memory ({named('max_size')})"
    )
    return functools.partial(save_executorch, program)


def _partitioner_of_inputs(partitioner: Any) -> Any:
    """XNNPACK's partitioner, which also takes linear layers whose weight is an input, as A and B are.

    By itself it leaves them to ExecuTorch's kernels, and the program is cut at each of them.
    """
    package = "executorch.backends.xnnpack.partition.config"
    configs, gemm = (importlib.import_module(name) for name in (package, f"{package}.gemm_configs"))

    class Linear(gemm.LinearConfig):  # type: ignore[misc, name-defined]
        def _get_weight_deps(self, node: Any, program: Any, precision: Any) -> tuple[bool, list[Any]]:
            is_input = not gemm.is_param_node(program, gemm.get_input_node(node, self.weight_idx))
            if is_input and precision is gemm.ConfigPrecisionType.FP32:
                return True, []
            found: tuple[bool, list[Any]] = super()._get_weight_deps(node, program, precision)
            return found

    return partitioner(configs=[Linear if one is gemm.LinearConfig else one for one in configs.ALL_PARTITIONER_CONFIGS])


def runner_of_file(path: Path, base: Model) -> RegisteredRunner:
    return open_executorch(Artifact(path, ArtifactKind.EXECUTORCH), base.input_names)


def planned_sizes(model: Model, stated: Mapping[str, int]) -> Sizes:
    """The greatest size of each varying axis, for which ExecuTorch reserves memory: the stated one, or a usual one.

    None is greater than the model's own limit. Raises InputRefused for a stated axis that the model does not have.
    """
    symbols = sorted({symbol for axes in model.axes.values() for symbol in axes.values()})
    for unknown in stated.keys() - symbols:
        known = ", ".join(symbols) or "none"
        raise InputRefused(f"{named('max_size', unknown)}: the model has no axis of this name. It has {known}")
    usual = {symbol: max(USUAL_GREATEST, model.traced_sizes[symbol]) for symbol in symbols} | {"batch": USUAL_BATCH}
    # An axis of at most 2 has no other size than 2 for the exporter, which takes 0 and 1 for constants.
    sizes = {symbol: 3 if stated.get(symbol) == 2 else stated.get(symbol, usual[symbol]) for symbol in symbols}
    return {symbol: min(size, model.limits.get(symbol, (0, None))[1] or size) for symbol, size in sizes.items()}


def save_executorch(program: Any, path: Path, *, extra: Mapping[str, str]) -> None:
    """Write ExecuTorch's program, and behind it an archive with the texts of `extra`, which `unzip` reads."""
    with path.open("wb") as file:
        program.write_to_file(file)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as archive:
        for name, text in extra.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/extra/{name}", FIXED_TIME), text)
