"""The steps of a fleet: which command each runs, and which of its options the fleet sets."""

from __future__ import annotations

import itertools
import os
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_export.options.adapters import ConvertOptions
from lora_export.options.declaring import Options
from lora_export.options.export import OnnxOptions, TorchScriptOptions
from lora_export.options.fleet import VERIFY_WEIGHTS, keys_of
from lora_export.options.merge import MergeOptions
from lora_export.options.verify import VerifyOptions
from lora_export.storage.artifact_kinds import PROGRAM_FORMATS
from lora_export.storage.store_path import StorePath, place


@dataclass(frozen=True)
class StepKind:
    """A command as a step: its record, its public function, and the fields that the fleet fills."""

    record: type[Options]
    home: str  # of the function
    base: str  # the field that takes the base; empty where the step has none
    adapter: str  # the field that takes the adapter
    endings: tuple[str, ...] = ()  # that the command may add to the name of its output
    writes_model: bool = False  # what a later proof judges
    together: str = ""  # the home of the function that does several jobs of one base in one pass over it
    has_session: bool = False  # what its proofs of one base have in common stays in the worker

    @property
    def function(self) -> Callable[..., Any]:
        """The function, imported when it is first needed."""
        function: Callable[..., Any] = pkgutil.resolve_name(f"lora_export.api.{self.home}")
        return function

    def done_together(self, every: Sequence[Options]) -> list[Any]:
        """What the function returns for each of these options, or the error that it raises."""
        results: list[Any] = pkgutil.resolve_name(f"lora_export.api.{self.together}")(every)
        return results


GRAPHS_AND_WEIGHTS = (".safetensors", ".gguf", ".onnx")
FLEET_STEPS: Mapping[str, StepKind] = {
    "merge": StepKind(
        MergeOptions,
        "merge:merge",
        "base",
        "adapters",
        GRAPHS_AND_WEIGHTS,
        writes_model=True,
        together="merge:merge_together",
    ),
    "onnx": StepKind(
        OnnxOptions, "onnx:export_onnx", "model", "adapters", (".onnx",), writes_model=True, has_session=True
    ),
    "torchscript": StepKind(
        TorchScriptOptions,
        "torchscript:export_torchscript",
        "model",
        "adapters",
        tuple(kind.suffixes[0] for kind in PROGRAM_FORMATS.values()),
        writes_model=True,
    ),
    "convert": StepKind(ConvertOptions, "convert:convert", "", "adapter", (".safetensors", ".gguf", ".onnx_adapter")),
    "verify": StepKind(VerifyOptions, "verify:verify", "model", "adapters", has_session=True),
    VERIFY_WEIGHTS: StepKind(VerifyOptions, "verify:verify", "base", "adapters", together="verify:verify_together"),
}
# Fields that have no meaning in a fleet, which has its own plan and workers, and names the adapters itself
NOT_IN_STEPS = {"adapters", "adapter", "dry_run", "watch", "jobs", "ray"}
# Fields that say where something is written, and those that change no result
WRITTEN = {"output", "reports", "keep_residual", "cache", "sign"}
OF_THE_RUN = {"overwrite", "download", "timeout", "memory"}
PATHS = ("path", "folder", "source")


@dataclass(frozen=True)
class FleetJob:
    """One step of one adapter."""

    base: str  # its name
    base_path: str
    adapter: str  # its name
    adapter_path: str
    number: int  # of the step in the file, from 1
    step: str  # a key of FLEET_STEPS
    values: Mapping[str, Any]  # the options, with the names put in; keys as in the file
    place: str  # of the step in the file, for messages
    after: tuple[str, ...] = ()  # the jobs whose outputs this one reads

    @property
    def id(self) -> str:
        """The name of its record."""
        return f"{self.base}/{self.adapter}/{self.number}-{self.step.replace(' --', '-')}"

    @property
    def kind(self) -> StepKind:
        return FLEET_STEPS[self.step]

    @property
    def output(self) -> str | None:
        """What it writes, as the file names it; None for a proof."""
        return self.values.get("output")

    def output_paths(self) -> list[Path]:
        """The paths that its output may have: as the file names it, and with a suffix that its command may add."""
        if self.output is None:
            return []
        path = place(self.output)
        return [path.with_name(path.name + suffix) for suffix in ("", *self.kind.endings)] if path.name else [path]

    def reports(self) -> list[Path]:
        """The reports that it writes on this machine."""
        known = keys_of(self.kind.record)
        named = [_as_list(value) for key, value in self.values.items() if known[key][1].name == "reports"]
        return [path for path in map(place, itertools.chain(*named)) if not isinstance(path, StorePath)]

    def fixed(self) -> dict[str, Any]:
        """The fields that the fleet fills."""
        known = keys_of(self.kind.record)
        own = {known[key][1].name for key in self.values}  # a proof may name another model
        base = {self.kind.base: self.base_path} if self.kind.base and self.kind.base not in own else {}
        return base | {self.kind.adapter: self.adapter_path}

    def inputs(self) -> dict[str, list[str]]:
        """Key -> the paths that its own options name and that it reads."""
        known = keys_of(self.kind.record)
        read = {key for key in self.values if known[key][1].kind in PATHS and known[key][1].name not in WRITTEN}
        return {key: _as_list(value) for key, value in self.values.items() if key in read}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def absolute(path: Path) -> Path:
    """A path by which names of one output are compared. Its last part is not followed."""
    return path if isinstance(path, StorePath) else Path(os.path.realpath(path.parent), path.name)
