"""Run a graph under onnxruntime, on the requested provider and on no other, and record where its nodes ran.

Needs no PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import platform
import re
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lora_export.errors import InputRefused, RuntimeRefused
from lora_export.formats import onnx_adapter
from lora_export.formats.contract import read_contract
from lora_export.formats.onnx_adapter import array_of_ort_value, import_onnxruntime
from lora_export.graph.onnx_file.protobuf_wire import without_large_tensors
from lora_export.isolation.limits import memory_for
from lora_export.isolation.process import call_within
from lora_export.options.spelling import named
from lora_export.provenance import CONTRACT_KEY, ROW_ADAPTERS_KEY, SLOTS_KEY, read_longest
from lora_export.runtime.environment_probes import ARITHMETIC_VARIABLES, PROVIDERS
from lora_export.runtime.ort_session import LOG_ERRORS, LOG_FATAL, HeldSession, InMemoryGraph, open_session
from lora_export.runtime.runner import (
    TIMEOUT,
    AdaptersByInput,
    Arrays,
    Placement,
    TooSlow,
    completed_inputs,
    no_adapter,
    within_memory,
)
from lora_export.version import __version__

if TYPE_CHECKING:
    from lora_export.graph.onnx_file.reading import GraphFile

# A verdict on CUDA is decided in fp32: onnxruntime's own default is TF32.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "0"}
# Of the name of external data, in up to two bytes of seven bits; the name follows
LOCATION_LENGTH = re.compile(rb"\x0a\x08location\x12([\x80-\xff]?)([\x01-\x7f])")
NO_KERNEL = "NOT_IMPLEMENTED"  # in onnxruntime's error for a node whose types a provider does not compute with
KERNEL_SUFFIX = "_kernel_time"  # what a profile appends to the name of a node that is computed


class OnnxRunner(AdaptersByInput):
    """An ONNX graph under onnxruntime, on the requested provider and on no other.

    `optimise=False` turns off all of onnxruntime's graph optimisations. `low_memory` frees memory as soon as it is
    unused. `provider_defaults` leaves the provider's own settings; those of CUDA multiply fp32 in TF32. A run that does
    not finish within `timeout` seconds is stopped. ONNX's reference evaluator runs a graph in bfloat16 for the CPU
    provider, which has no kernels for it; `placement` names it.

    Raises EnvironmentLacking where the provider is missing or does not load, and RuntimeRefused where onnxruntime
    refuses the graph.
    """

    def __init__(
        self,
        source: Path | InMemoryGraph,
        provider: str = "cpu",
        *,
        optimise: bool = True,
        low_memory: bool = False,
        provider_defaults: bool = False,
        timeout: float = TIMEOUT,
    ):
        provider_options = CUDA_OPTIONS if provider == "cuda" and not provider_defaults else {}
        options = _session_options(optimise=optimise, low_memory=low_memory)
        self.source = source  # an in-memory graph's tensors must live as long as its session
        self.path, self.provider = Path(source.name if isinstance(source, InMemoryGraph) else source), provider
        self._memory = _memory_of(source) if provider == "cpu" else None  # bytes that a run may take
        with within_memory(self._memory, self.path):
            self._held = HeldSession(functools.partial(_opened, source, provider, options, provider_options))
        self.placement: Placement = _placement(self.session, provider, provider_options)
        self.axes: Mapping[str, tuple[int | None, ...]] = {
            value.name: tuple(size if isinstance(size, int) else None for size in value.shape)
            for value in self.session.get_inputs()
        }
        self.names_known = True
        self.timeout = timeout
        self._has_required_inputs = self._set_adapter_inputs(self.axes)
        self.adapter_file: Path | None = None
        self._adapter: Any = None  # onnxruntime's LoraAdapter: it runs the base where this object is gone
        self._run_options = _run_options()
        self._file: Callable[[], GraphFile | None] = lambda: None

    def file(self) -> GraphFile:
        """The graph's file, to be read and not changed. It is parsed once while a caller holds it."""
        from lora_export.graph.onnx_file.reading import open_graph  # onnx is not needed to run a graph

        if (file := self._file()) is None:
            file = open_graph(self.path)
            self._file = weakref.ref(file)
        return file

    @property
    def session(self) -> Any:
        """onnxruntime's InferenceSession, opened where it is not open."""
        return self._held.opened()

    @property
    def is_onnxruntimes(self) -> bool:
        """Whether onnxruntime runs it, and not ONNX's reference evaluator."""
        return _is_onnxruntimes(self.session)

    def close(self) -> None:
        """Give the session's memory back, also that of runners made from this one. The next run opens it again."""
        if isinstance(self.source, Path):  # a graph in memory is there anyway
            self._held.close()

    def with_graph(self, message: bytes, folder: Path) -> OnnxRunner:
        """Another graph, with this runner's adapter or ids.

        `message` is the serialised graph, and `folder` contains the files of its external data.
        """
        return self._equip(OnnxRunner(InMemoryGraph(str(self.path), message, folder=folder), self.provider))

    def with_provider_defaults(self) -> OnnxRunner:
        """The same graph, adapter and ids, with the provider's own settings."""
        return self._equip(OnnxRunner(self.source, self.provider, provider_defaults=True))

    def unoptimised(self) -> OnnxRunner:
        """The same graph, adapter and ids, without onnxruntime's optimisations: no nodes are fused."""
        return self._equip(OnnxRunner(self.source, self.provider, optimise=False))

    def _equip(self, runner: OnnxRunner) -> OnnxRunner:
        runner._adapter, runner._run_options, runner.timeout = self._adapter, self._run_options, self.timeout
        runner.adapter_file, runner.row_adapters = self.adapter_file, self.row_adapters
        runner._adapter_values = self._adapter_values
        return runner if self._adapter_ids is None else runner.with_rows(self._adapter_ids, self._adapter_scales)

    @property
    def adapter_ids(self) -> tuple[int, ...] | None:
        """The adapter ids of every batch's rows; None where they are not set, or a row has several."""
        is_single = self._adapter_ids is not None and self._adapter_ids.ndim == 1
        return tuple(self._adapter_ids.tolist()) if is_single and self._adapter_ids is not None else None

    @property
    def takes_adapters(self) -> bool:
        """Whether the graph's metadata declares adapters: as inputs, or row by row."""
        return not {CONTRACT_KEY, ROW_ADAPTERS_KEY, SLOTS_KEY}.isdisjoint(self.metadata)

    @property
    def lacks_adapter(self) -> bool:
        """Whether the graph takes an adapter's file, and runs without one."""
        return CONTRACT_KEY in self.metadata and self._adapter is None

    @property
    def metadata(self) -> Mapping[str, str]:
        metadata: Mapping[str, str] = self.session.get_modelmeta().custom_metadata_map
        return metadata

    def with_adapter(self, path: Path) -> OnnxRunner:
        """The same session with this `.onnx_adapter` in every run.

        Raises InputRefused where the file is no adapter, or does not fit the graph's declared inputs.
        """
        file = onnx_adapter.read(path)
        if self.has_slots:
            raise InputRefused(f"{self.path} holds no adapters: leave {named('onnx_adapter')} out, all are proven")
        if CONTRACT_KEY in self.metadata:
            contract = read_contract(self.metadata, self.path)
            onnx_adapter.refuse_misfits(file, contract, source=path, graph=self.path)
        else:
            inputs = (*self.session.get_inputs(), *self.session.get_overridable_initializers())
            if not any(each.name in file.values for each in inputs):
                raise no_adapter(self.path)
        adapter = import_onnxruntime().LoraAdapter()
        try:
            adapter.Load(str(path))
        except RuntimeError as error:
            raise InputRefused(f"{path} is no adapter in onnxruntime's format, or a damaged one") from error
        runner = copy.copy(self)
        runner.adapter_file, runner._adapter, runner._run_options = path, adapter, _run_options(adapter)
        if self._takes_values:
            runner._run_options = _run_options()
            runner._adapter_values = {**self._adapter_values, **onnx_adapter.arrays_of(path)}
        return runner

    @property
    def longest(self) -> dict[str, int]:
        """The sizes up to which the graph was made, by its model's symbols. Raises InputRefused where it is damaged."""
        return read_longest(self.metadata, self.path)

    def executed_nodes(self, run: Callable[[OnnxRunner], object]) -> frozenset[tuple[str, str]]:
        """(node, operator) of every node that runs while `run` uses the runner that is passed to it.

        The placement is recorded before onnxruntime's last fusions, this is after them. Loads the graph once more.
        """
        with tempfile.TemporaryDirectory() as folder:
            options = _session_options()
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "profile"))
            runner = copy.copy(self)
            provider_options = dict(self.placement.options)
            runner._held = HeldSession(
                functools.partial(_opened, self.source, self.provider, options, provider_options)
            )
            run(runner)
            events = json.loads(Path(runner.session.end_profiling()).read_bytes())
        kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(KERNEL_SUFFIX)]
        return frozenset((event["name"].removesuffix(KERNEL_SUFFIX), event["args"]["op_name"]) for event in kernels)

    def run(self, inputs: Arrays, names: Sequence[str] | None = None) -> Arrays:
        """One forward pass; `names` are the outputs to compute, all where it is None.

        A graph that takes positions gets 0, 1, 2, ... in every row, where the inputs have none.
        Where all rows have one id, the outputs lack the labels that the head of its adapter does not have.

        Raises RuntimeRefused where onnxruntime refuses the run or it takes too long, and for inputs that the graph does
        not have: they were folded away.
        """
        inputs = completed_inputs(inputs, self.axes)
        names = [value.name for value in self.session.get_outputs()] if names is None else list(names)
        computed = functools.partial(self._outputs, names, self._with_adapters(inputs))
        # It makes onnxruntime end the run before its next node.
        stop = functools.partial(setattr, self._run_options, "terminate", True)
        try:
            with within_memory(self._memory, self.path):
                outputs = call_within(self.timeout, computed, stop)
            return self._with_own_labels(dict(zip(names, outputs, strict=True)))
        except TimeoutError as error:
            raise TooSlow(self.path, self.timeout) from error
        except RuntimeRefused:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class but this one
            raise RuntimeRefused(f"onnxruntime: {str(error).strip()}") from error
        finally:
            self._run_options.terminate = False

    def _with_own_labels(self, outputs: Arrays) -> Arrays:
        ids = set(self.adapter_ids or ())
        record = self.row_adapters if len(ids) == 1 else None
        return outputs if record is None or not record.labels else record.own_labels(outputs, ids.pop())

    @property
    def _takes_values(self) -> bool:
        """Whether an adapter is given as inputs: run options do not reach such a run."""
        return self._has_required_inputs or not self.is_onnxruntimes or self._has_bfloat16

    @functools.cached_property
    def _has_bfloat16(self) -> bool:
        """Whether an input or output is in bfloat16, which onnxruntime does not exchange with NumPy."""
        values = [*self.session.get_inputs(), *self.session.get_outputs(), *self.session.get_overridable_initializers()]
        return any(value.type == "tensor(bfloat16)" for value in values)

    def _outputs(self, names: Sequence[str], inputs: Arrays) -> list[NDArray[Any]]:
        is_narrow = self._has_bfloat16 or any(np.asarray(value).dtype.name == "bfloat16" for value in inputs.values())
        if not (self.is_onnxruntimes and is_narrow):
            outputs: list[NDArray[Any]] = self.session.run(names, inputs, self._run_options)
            return outputs
        ort = import_onnxruntime()
        values = {name: onnx_adapter.ort_value_of_array(ort, array) for name, array in inputs.items()}
        return [
            array_of_ort_value(value) for value in self.session.run_with_ort_values(names, values, self._run_options)
        ]


def _memory_of(source: Path | InMemoryGraph) -> int:
    """The bytes of memory that a graph may take where it is run: by the size of its message and its weights."""
    if isinstance(source, Path):
        message, weights, folder = b"", source.stat().st_size if source.is_file() else 0, source.parent
        with contextlib.suppress(InputRefused):  # what opens it refuses it
            message = without_large_tensors(source, "") if weights else b""
    else:
        message, folder = source.message, source.folder or Path()
        weights = len(message) + sum(array.nbytes for array in source.tensors.values())
    names = {
        message[found.end() : found.end() + (found[2][0] << 7 * len(found[1]) | sum(found[1]) & 0x7F)]
        for found in LOCATION_LENGTH.finditer(message)
    }
    files = (folder / os.fsdecode(name) for name in names)
    return memory_for(weights + sum(file.stat().st_size for file in files if file.is_file()))


def _opened(source: Path | InMemoryGraph, provider: str, options: Any, provider_options: Mapping[str, str]) -> Any:
    """onnxruntime's session; that of ONNX's reference evaluator where the CPU provider has no kernels for bfloat16."""
    try:
        return open_session(source, provider, options, provider_options)
    except RuntimeRefused as refusal:
        from lora_export.runtime.reference_session import open_reference  # hardly a graph needs it

        reference = open_reference(source) if provider == "cpu" and NO_KERNEL in str(refusal) else None
        if reference is None:
            raise
        return reference


def _session_options(*, optimise: bool = True, low_memory: bool = False) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.log_severity_level = LOG_ERRORS  # the placement shows a fallback; its warning is not needed
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if low_memory:
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return options


def _run_options(adapter: Any = None) -> Any:
    options = import_onnxruntime().RunOptions()
    options.log_severity_level = LOG_FATAL  # a failure is raised, and need not be printed
    if adapter is not None:
        options.add_active_adapter(adapter)
    return options


def _placement(session: Any, provider: str, provider_options: Mapping[str, str]) -> Placement:
    if not _is_onnxruntimes(session):
        placement: Placement = session.placement()
        return placement
    by_provider: dict[str, list[tuple[str, str]]] = {}
    for part in session.get_provider_graph_assignment_info():
        by_provider.setdefault(part.ep_name, []).extend((node.name, node.op_type) for node in part.get_nodes())
    nodes = {name: tuple(nodes) for name, nodes in by_provider.items()}
    return Placement(PROVIDERS[provider], nodes, dict(provider_options), import_onnxruntime().__version__)


def _is_onnxruntimes(session: Any) -> bool:
    """False for the session of a graph that ONNX's reference evaluator runs."""
    return isinstance(session, import_onnxruntime().InferenceSession)


def describe_ort_environment() -> dict[str, Any]:
    """Versions and settings that a result depends on."""
    return {
        "lora_export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "onnxruntime": import_onnxruntime().__version__,
        "numpy": np.__version__,
        "tf32": False,  # CUDA_OPTIONS and PyTorch's runner turn it off
        **{name: os.environ[name] for name in ARITHMETIC_VARIABLES if name in os.environ},
    }


def token_positions(mask: NDArray[np.int64]) -> NDArray[np.int64]:
    """The positions [batch, length] for a mask [batch, length] of ones and zeros, as programs that generate send them.

    Only the ones are counted. Padding has the position of the token before it, or 0.
    """
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)
