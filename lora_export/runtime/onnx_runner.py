"""Run a graph under onnxruntime, on the provider that was asked for and on no other, and say what ran where.

Needs no PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_export import __version__
from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.formats import onnx_adapter
from lora_export.formats.onnx_adapter import import_onnxruntime
from lora_export.runtime.environment import PROVIDERS
from lora_export.runtime.runner import Arrays, Placement
from lora_export.storage.json_files import parse_json

# The deciding run on CUDA computes fp32 as fp32: onnxruntime's own default is TF32.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "0"}


KERNEL = "_kernel_time"  # what a profile adds to the name of a node that is computed
SILENT = 4  # what fails is raised, and need not be printed


@dataclass(frozen=True, eq=False)
class Held:
    """A graph that is not a file: its message, and the large tensors that the message says lie elsewhere."""

    what: str  # as errors call it
    message: bytes
    tensors: Mapping[str, NDArray[Any]]  # onnxruntime reads them where they are


class OnnxRunner:
    """An ONNX graph under onnxruntime, on the provider that was asked for and on no other.

    `plain` leaves out every optimisation of onnxruntime's. `frugal` gives memory back as soon as it is free. `message`
    is what to run in a file's place: the graph as bytes, its weights in files of `folder`. `as_shipped` leaves the
    provider its own settings.
    """

    def __init__(
        self,
        source: Path | Held,
        provider: str = "cpu",
        *,
        plain: bool = False,
        frugal: bool = False,
        message: bytes = b"",
        folder: Path = Path(),
        as_shipped: bool = False,
    ):
        ort = import_onnxruntime()
        asked = PROVIDERS[provider]
        if provider == "cuda" and hasattr(ort, "preload_dlls"):
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find, and stdout is for answers
                ort.preload_dlls()  # finds the CUDA and cuDNN libraries that came with torch's wheels
        if asked not in ort.get_available_providers():
            raise EnvironmentLacking(
                f"this onnxruntime ({ort.__version__}) has no {asked}: pip install onnxruntime-gpu "
                "(and uninstall onnxruntime, which would shadow it)"
            )
        options = CUDA_OPTIONS if provider == "cuda" and not as_shipped else {}
        what = source.what if isinstance(source, Held) else source
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self.session = _session(
                    ort, source, (asked, options), plain=plain, frugal=frugal, message=message, folder=folder
                )
        except Exception as error:  # onnxruntime's exceptions share no base class but this one
            raise RuntimeRefused(f"onnxruntime refused {what}: {error}") from error
        if asked not in self.session.get_providers():
            raise EnvironmentLacking(
                f"{asked} was asked for and could not be loaded; onnxruntime would have used "
                f"{', '.join(self.session.get_providers())}. `lora-export doctor --provider {provider}` says what is "
                "missing"
            )
        by_provider: dict[str, list[tuple[str, str]]] = {}
        for part in self.session.get_provider_graph_assignment_info():
            by_provider.setdefault(part.ep_name, []).extend((node.name, node.op_type) for node in part.get_nodes())
        self.placement = Placement(
            asked, {name: tuple(nodes) for name, nodes in by_provider.items()}, dict(options), ort.__version__
        )
        self.axes: Mapping[str, tuple[int | None, ...]] = {
            value.name: tuple(size if isinstance(size, int) else None for size in value.shape)
            for value in self.session.get_inputs()
        }
        self.names_known = True
        self.path, self.provider = Path(what), provider
        self.source = source  # a held graph's tensors live as long as its session
        self._active: tuple[Any, Any] = None, ort.RunOptions()  # adapter and run options
        self._active[1].log_severity_level = SILENT
        self._ids: NDArray[np.int64] | None = None

    def of(self, message: bytes, folder: Path) -> OnnxRunner:
        """Another graph, as bytes, with the adapter or the ids that this one runs with."""
        return self._equipped(OnnxRunner(self.path, self.provider, message=message, folder=folder))

    def as_shipped(self) -> OnnxRunner:
        """The same graph, adapter and ids, where the provider has its own settings: CUDA's multiply fp32 as TF32."""
        return self._equipped(OnnxRunner(self.source, self.provider, as_shipped=True))

    def node_by_node(self) -> OnnxRunner:
        """The same graph, adapter and ids, where onnxruntime optimises nothing: no nodes are fused."""
        return self._equipped(OnnxRunner(self.source, self.provider, plain=True))

    def _equipped(self, runner: OnnxRunner) -> OnnxRunner:
        runner._active = self._active
        return runner if self._ids is None else runner.with_rows(self._ids.tolist())

    @property
    def ids(self) -> tuple[int, ...] | None:
        """Which adapters the rows of every batch have; None where nobody has said."""
        return None if self._ids is None else tuple(self._ids.tolist())

    @property
    def adapters_by_row(self) -> list[str] | None:
        """The names of the adapters that rows may choose from, from id 1 on; None where the graph does not say."""
        told = self.session.get_modelmeta().custom_metadata_map.get(onnx_adapter.ROW_ADAPTERS_KEY)
        names = None if told is None else parse_json(told.encode(), str(self.path)).get("adapters", [])
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None

    @property
    def takes_adapters(self) -> bool:
        """Whether the graph says that it was made to: as inputs, or row by row."""
        metadata = self.session.get_modelmeta().custom_metadata_map
        return not {onnx_adapter.CONTRACT_KEY, onnx_adapter.ROW_ADAPTERS_KEY}.isdisjoint(metadata)

    @property
    def has_adapter(self) -> bool:
        return self._active[0] is not None

    def with_adapter(self, path: Path) -> OnnxRunner:
        """The same session with this `.onnx_adapter` in every run.

        Raises InputRefused where the file is none, or does not fit what the graph says it takes.
        """
        metadata = self.session.get_modelmeta().custom_metadata_map
        if onnx_adapter.CONTRACT_KEY in metadata:
            contract = onnx_adapter.read_contract(metadata, self.path)
            onnx_adapter.refuse_misfits(onnx_adapter.read(path), contract, source=path, graph=self.path)
        ort = import_onnxruntime()
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        try:
            adapter.Load(str(path))
        except RuntimeError as error:
            raise InputRefused(f"{path} is no adapter in onnxruntime's format, or a damaged one") from error
        options.add_active_adapter(adapter)
        options.log_severity_level = SILENT
        runner = copy.copy(self)
        runner._active = adapter, options  # both: onnxruntime runs the base where the adapter's object is gone
        return runner

    def with_rows(self, ids: Sequence[int]) -> OnnxRunner:
        """The same session with these adapters' ids, over and over, for the rows of every batch.

        The batch is the first dimension of the first input. Raises InputRefused for another kind of graph.
        """
        if onnx_adapter.ADAPTER_IDS not in self.axes and self._ids is None:
            raise InputRefused(f"{self.path} has no input {onnx_adapter.ADAPTER_IDS}: it was not made with --lora rows")
        runner = copy.copy(self)
        runner._ids = np.array(ids, np.int64)
        runner.axes = {name: sizes for name, sizes in self.axes.items() if name != onnx_adapter.ADAPTER_IDS}
        return runner

    def executed(self, run: Callable[[OnnxRunner], object]) -> frozenset[tuple[str, str]]:
        """(node, operator) of all that is computed while `run` uses the runner that it is given, one like this.

        The placement is told before onnxruntime's last fusions, this is after them. Loads the graph once more.
        """
        ort, (asked, options) = import_onnxruntime(), (self.placement.requested_provider, self.placement.options)
        with tempfile.TemporaryDirectory() as folder:
            runner = copy.copy(self)
            runner.session = _session(ort, self.source, (asked, options), profile=Path(folder, "profile"))
            run(runner)
            events = json.loads(Path(runner.session.end_profiling()).read_bytes())
        kernels = [there for there in events if there.get("cat") == "Node" and there["name"].endswith(KERNEL)]
        return frozenset((there["name"].removesuffix(KERNEL), there["args"]["op_name"]) for there in kernels)

    def run(self, inputs: Arrays, names: Sequence[str] | None = None) -> Arrays:
        """One forward pass; `names` are the outputs that are wanted, all where it is None.

        Inputs that the graph does not have are an error: they were folded away.
        """
        surplus = [name for name in inputs if name not in self.axes]
        lacking = [name for name in self.axes if name not in inputs]
        if surplus or lacking:
            told = [f"the graph has no input {name}" for name in surplus]
            told += [f"the graph wants {name}, which the model does not take" for name in lacking]
            raise RuntimeRefused("; ".join(told))
        names = [value.name for value in self.session.get_outputs()] if names is None else list(names)
        if self._ids is not None:
            inputs = {**inputs, onnx_adapter.ADAPTER_IDS: np.resize(self._ids, len(next(iter(inputs.values()))))}
        try:
            return dict(zip(names, self.session.run(names, inputs, self._active[1]), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no base class but this one
            raise RuntimeRefused(f"onnxruntime: {error}") from error


def _session(
    ort: Any,
    source: Path | Held,
    provider: tuple[str, Mapping[str, str]],
    *,
    plain: bool = False,
    frugal: bool = False,
    message: bytes = b"",
    folder: Path = Path(),
    profile: Path | None = None,
) -> Any:
    settings = ort.SessionOptions()
    if profile is not None:
        settings.enable_profiling, settings.profile_file_prefix = True, str(profile)
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    settings.log_severity_level = 3  # errors only; a fallback is found by asking, not by reading warnings
    if plain:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if frugal:
        settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
    if message:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        return ort.InferenceSession(message, settings, providers=[provider])
    if isinstance(source, Path):
        return ort.InferenceSession(str(source.resolve()), settings, providers=[provider])
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in source.tensors.values()]
    if values:
        settings.add_external_initializers(list(source.tensors), values)
    return ort.InferenceSession(source.message, settings, providers=[provider])


def environment() -> dict[str, Any]:
    """Versions and settings that a result depends on."""
    facts: dict[str, Any] = {
        "lora_export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "onnxruntime": import_onnxruntime().__version__,
        "numpy": np.__version__,
        "tf32": False,  # CUDA_OPTIONS, and PyTorch's runner, see to that
    }
    for variable in ("NVIDIA_TF32_OVERRIDE", "ORT_CUDA_GEMM_OPTIONS"):
        if variable in os.environ:
            facts[variable] = os.environ[variable]
    return facts
