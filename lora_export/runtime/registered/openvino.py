"""OpenVINO on the CPU, in fp32: its own IR (.xml and .bin), and .onnx files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lora_export.artifacts.artifact import open_artifact
from lora_export.errors import InputRefused
from lora_export.extras import optional_package
from lora_export.formats.contract import STRENGTHS_KEY, read_contract
from lora_export.options.spelling import command
from lora_export.provenance import CONTRACT_KEY
from lora_export.runtime.runner import Arrays
from lora_export.storage.artifact_kinds import ArtifactKind

DEVICE = "CPU"
# By itself it computes in bfloat16 where the processor can: a small Llama's log-probabilities were off by 0.02.
PRECISION = {"INFERENCE_PRECISION_HINT": "f32"}


def import_openvino() -> Any:
    """The package, without its telemetry: from the import on, that sends events to Google Analytics.

    Raises EnvironmentLacking where OpenVINO is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as if it were not installed
    return optional_package("openvino", "the runner openvino needs", "openvino")


class OpenVINOModel:
    """A model that is compiled for the CPU. Called with inputs by name, it returns outputs by name."""

    def __init__(self, path: str):
        openvino = import_openvino()
        self._compiled = openvino.Core().compile_model(path, DEVICE, PRECISION)
        self.axes: Mapping[str, list[int | None]] = {port.any_name: _sizes(port) for port in self._compiled.inputs}
        settings = ", ".join(f"{key}={value}" for key, value in PRECISION.items())
        self.notes = [f"run by OpenVINO {openvino.__version__} on {DEVICE} with {settings}, not its default"]

    def __call__(self, inputs: Arrays) -> Arrays:
        outputs = self._compiled(inputs)
        return {port.any_name: outputs[port] for port in self._compiled.outputs}


def open_compiled(path: str) -> OpenVINOModel:
    """The runner `openvino`.

    Raises EnvironmentLacking where OpenVINO is not installed, and InputRefused for a graph whose adapters or their
    strengths are optional inputs: OpenVINO makes constants of them.
    """
    artifact = open_artifact(path)
    metadata = artifact.metadata if artifact.kind is ArtifactKind.GRAPH else {}
    is_required = CONTRACT_KEY in metadata and read_contract(metadata, path).required
    for key, what, other in (
        (CONTRACT_KEY, "its adapter as optional inputs", "with the adapter as nodes or merged"),
        (STRENGTHS_KEY, "the strengths of its adapters as an optional input", "without strengths"),
    ):
        if key in metadata and not is_required:
            raise InputRefused(
                f"{path} has {what}, of which OpenVINO makes constants. It takes a graph with required inputs, or "
                f"{other} (see `{command('guide', 'runners')}`)"
            )
    return OpenVINOModel(path)


def _sizes(port: Any) -> list[int | None]:
    return [size.get_length() if size.is_static else None for size in port.partial_shape]
