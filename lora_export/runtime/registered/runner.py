"""Run a candidate with a runner by name, in a process of its own: the option `runner` of `verify`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lora_export import errors
from lora_export.artifacts.artifact import Artifact
from lora_export.errors import RuntimeRefused, one_line
from lora_export.formats import program_adapter
from lora_export.formats.contract import AdapterArrays, Contract
from lora_export.isolation.limits import MAX_LEAST
from lora_export.isolation.process import IsolatedProcess
from lora_export.provenance import CONTRACT_KEY
from lora_export.runtime.runner import TIMEOUT, AdaptersByInput, Arrays, completed_inputs, refused_ends
from lora_export.storage.artifact_kinds import ArtifactKind

RUNNING_CHILD = "lora_export.runtime.registered.child"
WANTED = {
    "axes": "A size is a number, or None where it varies",
    "limits": f"Limits are a least size of up to {MAX_LEAST:,}, and a greatest one or None",
}


class RegisteredRunner(AdaptersByInput):
    """A candidate of any kind, opened and run by a function of a package or of the user.

    What it returns is judged, and not trusted. Each run ends within `timeout` seconds. `adapter` is a file for a graph
    that takes adapters as inputs. `process` is that of a runner which needs one of its own.

    Raises InputRefused where there is no such runner or it fails, and as the runner itself; RuntimeRefused where it
    states sizes that no input has. `run` raises RuntimeRefused where the runner fails, ends its process or takes
    longer, and for inputs that the candidate does not have.
    """

    def __init__(
        self,
        name: str,
        candidate: Artifact,
        *,
        adapter: Path | None = None,
        timeout: float = TIMEOUT,
        process: IsolatedProcess | None = None,
    ):
        self.name, self.path, self.timeout = name, candidate.path, timeout
        self.names_known = True
        self._process = process or IsolatedProcess.start(RUNNING_CHILD, name, self.path.absolute(), memory=None)
        header, _ = self._exchanged(None, {})
        if refusal := header.get("refused"):
            kind = getattr(errors, str(header.get("kind")), errors.InputRefused)
            raise kind(str(refusal))
        self.axes: Mapping[str, tuple[int | None, ...]] = self._stated(header, "axes", _is_size)
        self.limits: Mapping[str, tuple[tuple[int, int | None], ...]] = self._stated(header, "limits", _is_range)
        self.plans_memory = bool(header.get("plans_memory"))  # for the largest inputs: the batch has limits, too
        self.notes: Sequence[str] = header["notes"] or [f"run by the runner {name}"]
        self.cannot_give: Sequence[str] = header["cannot_give"]
        self._metadata = candidate.metadata
        self._is_program = candidate.kind is ArtifactKind.EXECUTORCH
        shapes = candidate.input_shapes if candidate.kind is ArtifactKind.GRAPH else self.axes
        self._set_adapter_inputs(shapes, adapter)

    def run(self, inputs: Arrays) -> Arrays:
        inputs = completed_inputs(inputs, self.axes) if self.axes else inputs
        header, outputs = self._exchanged({}, self._with_adapters(inputs))
        if failure := header.get("failed"):
            raise RuntimeRefused(one_line(str(failure)))
        self.names_known = bool(header.get("are_named"))
        return outputs

    def with_axes(self, axes: Mapping[str, tuple[int | None, ...]]) -> Self:
        """The same process, whose graph has inputs of these sizes. Those that the runner states count."""
        runner = copy.copy(self)
        runner.axes = self.axes or {name: sizes for name, sizes in axes.items() if name not in self._adapter_values}
        return runner

    @property
    def contract(self) -> Contract | None:
        """The adapter inputs of a program of ExecuTorch; None where it has none, and of other candidates."""
        is_given = self._is_program and CONTRACT_KEY in self._metadata
        return program_adapter.contract_of(self.path, self._metadata) if is_given else None

    def with_adapter(self, file: Path) -> Self:
        """The same process, whose runs have the adapter of a file. Raises InputRefused where it does not fit."""
        return self.with_values(self._values_of_file(file), f"its adapter inputs have {file.name}")

    def with_values(self, values: AdapterArrays, note: str) -> Self:
        """The same process, whose runs have these values of adapter inputs."""
        runner = copy.copy(self)
        runner._adapter_values = {**self._adapter_values, **values}
        runner.notes = [*self.notes, note]
        return runner

    def _values_of_file(self, file: Path) -> AdapterArrays:
        if self._is_program:
            return program_adapter.read(file, program_adapter.contract_of(self.path, self._metadata), self.path)
        return super()._values_of_file(file)

    def close(self) -> None:
        """End the process. Nothing can be run afterwards."""
        self._process.close()

    @property
    def metadata(self) -> Mapping[str, str]:
        return self._metadata

    def _stated(self, header: Mapping[str, Any], key: str, fits: Callable[[Any], bool]) -> dict[str, tuple[Any, ...]]:
        """A table of sizes in the header, which the process sent and nobody has checked."""
        strange = {name: one for name, sizes in header[key].items() for one in sizes if not fits(one)}
        for name, size in strange.items():
            shown = one_line(f"{key} of {name}: {size!r}")[:200]
            raise RuntimeRefused(f"the runner {self.name} states {shown}. {WANTED[key]}")
        return {name: tuple(sizes) for name, sizes in header[key].items()}

    def _exchanged(self, request: Mapping[str, Any] | None, arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        with refused_ends(f"the process of the runner {self.name}", self.path, self.timeout):
            if request is None:
                return self._process.answer(self.timeout)
            return self._process.ask(request, arrays, self.timeout)


def _is_size(size: Any) -> bool:
    return size is None or (type(size) is int and size >= 0)


def _is_range(limits: Any) -> bool:
    """Whether these are a least size, and a greatest or None. The least one is generated."""
    if not isinstance(limits, list) or len(limits) != 2:
        return False
    low, high = limits
    return type(low) is int and 0 <= low <= MAX_LEAST and _is_size(high) and (high is None or low <= high)
