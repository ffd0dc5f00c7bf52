"""Run a candidate with a runner by name, in a process of its own: the option `runner` of `verify`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export import errors
from lora_export.artifacts.artifact import Artifact, ArtifactKind
from lora_export.errors import RuntimeRefused, one_line
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import CONTRACT_KEY, read_contract
from lora_export.formats.row_adapters import ADAPTER_IDS, ROW_INPUTS, read_row_adapters, row_inputs
from lora_export.isolation.process import IsolatedProcess
from lora_export.runtime.runner import TIMEOUT, Arrays, PlainRunner, completed_inputs, refused_ends

RUNNING_CHILD = "lora_export.runtime.registered.child"


class RegisteredRunner(PlainRunner):
    """A candidate of any kind, opened and run by a function of a package or of the user.

    What it returns is judged, and not trusted. Each run ends within `timeout` seconds. `adapter` is a file for a graph
    that takes adapters as inputs.

    Raises InputRefused where there is no such runner or it fails, and as the runner itself. `run` raises RuntimeRefused
    where the runner fails, ends its process or takes longer, and for inputs that the candidate does not have.
    """

    def __init__(self, name: str, candidate: Artifact, *, adapter: Path | None = None, timeout: float = TIMEOUT):
        self.name, self.path, self.timeout = name, candidate.path, timeout
        self.names_known = True
        self._process = IsolatedProcess.start(RUNNING_CHILD, name, self.path.absolute(), memory=None)
        header, _ = self._exchanged(None, {})
        if refusal := header.get("refused"):
            kind = getattr(errors, str(header.get("kind")), errors.InputRefused)
            raise kind(str(refusal))
        self.axes: Mapping[str, tuple[int | None, ...]] = {name: tuple(sizes) for name, sizes in header["axes"].items()}
        self.notes: Sequence[str] = header["notes"] or [f"run by the runner {name}"]
        self.cannot_give: Sequence[str] = header["cannot_give"]
        self._metadata = candidate.metadata if candidate.kind is ArtifactKind.GRAPH else {}
        self._adapter_values = self._values_of(adapter)
        self.axes = {name: sizes for name, sizes in self.axes.items() if name not in self._adapter_values}
        self._ids: NDArray[np.int64] | None = None
        self._scales: NDArray[np.float32] | None = None

    def run(self, inputs: Arrays) -> Arrays:
        inputs = completed_inputs(inputs, self.axes) if self.axes else inputs
        if self._ids is not None:
            rows = np.arange(len(next(iter(inputs.values())))) % len(self._ids)
            scales = None if self._scales is None else self._scales[rows]
            inputs = {**inputs, **row_inputs(self._ids[rows], scales, self.adapters_per_row)}
        header, outputs = self._exchanged({}, {**inputs, **self._adapter_values})
        if failure := header.get("failed"):
            raise RuntimeRefused(one_line(str(failure)))
        self.names_known = bool(header.get("are_named"))
        return outputs

    def close(self) -> None:
        """End the process. Nothing can be run afterwards."""
        self._process.close()

    @property
    def takes_rows(self) -> bool:
        return ADAPTER_IDS in self.axes

    @property
    def adapters_by_row(self) -> list[str] | None:
        record = read_row_adapters(self._metadata, str(self.path))
        return None if record is None else list(record.names)

    @property
    def adapters_per_row(self) -> int:
        record = read_row_adapters(self._metadata, str(self.path))
        return 1 if record is None else record.per_row

    def with_rows(
        self, ids: Sequence[int] | Sequence[Sequence[int]], scales: Sequence[Sequence[float]] | None = None
    ) -> RegisteredRunner:
        """The same process, with these adapters for the rows of every batch, repeated as often as needed."""
        runner = copy.copy(self)
        runner._ids = np.array(ids, np.int64)
        runner._scales = None if scales is None else np.array(scales, np.float32)
        runner.axes = {name: sizes for name, sizes in self.axes.items() if name not in ROW_INPUTS}
        return runner

    def _values_of(self, adapter: Path | None) -> Arrays:
        """The inputs that are an adapter; those of none where the graph needs them."""
        absent = {}
        if CONTRACT_KEY in self._metadata:
            contract = read_contract(self._metadata, self.path)
            absent = contract.without_adapter() if contract.required else {}
            if adapter is not None:
                onnx_adapter.refuse_misfits(onnx_adapter.read(adapter), contract, source=adapter, graph=self.path)
        return absent if adapter is None else {**absent, **onnx_adapter.arrays_of(adapter)}

    def _exchanged(self, request: Mapping[str, Any] | None, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        with refused_ends(f"the process of the runner {self.name}", self.path, self.timeout):
            if request is None:
                return self._process.answer(self.timeout)
            return self._process.ask(request, arrays, self.timeout)
