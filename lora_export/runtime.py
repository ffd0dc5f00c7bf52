"""Run a module, or a file under onnxruntime, and say what ran where."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_export import __version__
from lora_export.errors import EnvironmentLacking, InputRefused, RuntimeRefused
from lora_export.formats import onnx_adapter
from lora_export.formats.onnx_adapter import onnxruntime
from lora_export.outputs import have_names, named_outputs

Arrays = dict[str, NDArray[Any]]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# The deciding run on CUDA computes fp32 as fp32: onnxruntime's own default is TF32.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "prefer_nhwc": "0"}
# What has to run on the provider that was asked for. Shape arithmetic is put on the CPU on purpose.
COMPUTE = frozenset(
    {
        *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "ConvTranspose", "Einsum", "MatMulNBits"),
        *("MatMulInteger", "QLinearMatMul", "QLinearConv", "Attention", "MultiHeadAttention", "GroupQueryAttention"),
        *("PackedAttention", "QAttention", "LayerNormalization", "SimplifiedLayerNormalization"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "BatchNormalization", "GroupNorm"),
        *(
            "InstanceNormalization",
            "RMSNormalization",
            "EmbedLayerNormalization",
            "Softmax",
            "Gelu",
            "FastGelu",
            "LSTM",
        ),
        "GRU",
    }
)


GROUPED_MM = getattr(torch, "_grouped_mm", None)  # what torch.nn.functional.grouped_mm calls


class Runner(Protocol):
    """Something that answers inputs with outputs, both by name."""

    @property
    def axes(self) -> Mapping[str, tuple[int | None, ...]]: ...  # input -> sizes, None where they vary; {} if unknown
    @property
    def names_known(self) -> bool: ...  # whether the outputs' names mean something, or only their order does

    def run(self, inputs: Arrays) -> Arrays: ...


# --- PyTorch ------------------------------------------------------------------------------------


@dataclass
class ModuleRunner:
    """A module as it would be deployed: its own dtype, eval mode, no gradients, TF32 off."""

    module: nn.Module
    device: str = "cpu"
    axes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    names_known: bool = True
    stored: Mapping[str, str] = field(default_factory=dict)  # tensor -> dtype of the file it came from, where known

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass. Floats go in and come out in the module's own dtype."""
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)
        made = {name: torch.from_numpy(np.ascontiguousarray(value)).to(self.device) for name, value in inputs.items()}
        made = {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}
        with torch.no_grad(), _tf32_off():
            outputs = named_outputs(self.module(**made))
        self.names_known = have_names(outputs)
        return {name: _to_numpy(value) for name, value in outputs.items()}


@dataclass
class Referee:
    """A module in fp64, really: what it computes in fp32 inside is lifted to fp64 too.

    `stayed` collects the operators that produced fp32 all the same, for the report.
    """

    module: nn.Module  # in fp64 already
    stayed: set[str] = field(default_factory=set)

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass with every float in fp64."""
        wide = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        wide = {name: value.double() if value.is_floating_point() else value for name, value in wide.items()}
        witness = _Fp32Witness(self.stayed)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.no_grad(), witness, _Fp32Lifted():
                outputs = named_outputs(self.module(**wide))
        finally:
            torch.set_default_dtype(default)
        return {name: _to_numpy(value) for name, value in outputs.items()}


class _Fp32Lifted(TorchFunctionMode):
    """Casts to fp32 that a model makes inside (norms, rotary tables, softmax) become casts to fp64.

    Products of experts, for which PyTorch has no fp64 kernel, are computed one expert after the other.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func is GROUPED_MM and (args[0].ndim, args[1].ndim) == (2, 3):
            return _grouped_products(*args, **kwargs)
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _grouped_products(rows: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor, **_: None) -> torch.Tensor:
    """Rows (rows, in) by the weights (experts, in, out) of their experts; those of expert i end before `offs[i]`."""
    products, begin = rows.new_zeros(len(rows), weights.shape[-1]), 0
    for weight, end in zip(weights, offs.tolist(), strict=True):
        products[begin:end] = rows[begin:end] @ weight
        begin = end
    return products


class _Fp32Witness(TorchDispatchMode):
    """Notes which operators produced fp32 while everything should be fp64."""

    def __init__(self, seen: set[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.seen.add(str(func))
        return result


@contextlib.contextmanager
def _tf32_off() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def _to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


# --- TorchScript --------------------------------------------------------------------------------


class ScriptRunner:
    """A TorchScript file."""

    def __init__(self, path: Path, input_names: Sequence[str]):
        extra = {"lora_export.json": ""}
        try:
            self.script = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        except (RuntimeError, ValueError) as error:
            raise InputRefused(f"{path} is no TorchScript file: {str(error).splitlines()[0]}") from error
        record = json.loads(extra["lora_export.json"] or "{}")
        self.input_names = tuple(record.get("inputs", input_names))
        self.axes: Mapping[str, tuple[int | None, ...]] = {}
        self.names_known = False

    def run(self, inputs: Arrays) -> Arrays:
        """One forward pass, inputs in the order in which the file was traced."""
        missing = [name for name in self.input_names if name not in inputs]
        if missing:
            raise RuntimeRefused(
                f"the TorchScript file wants inputs that the model does not have: {', '.join(missing)}"
            )
        made = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in self.input_names]
        with torch.no_grad():
            try:
                outputs = named_outputs(self.script(*made))
            except RuntimeError as error:
                raise RuntimeRefused(f"TorchScript: {str(error).strip().splitlines()[-1]}") from error
        self.names_known = have_names(outputs)
        return {name: _to_numpy(value) for name, value in outputs.items()}


# --- onnxruntime --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """Which provider ran which node, as onnxruntime's own assignment tells it."""

    asked: str  # the provider's full name
    by_provider: Mapping[str, tuple[tuple[str, str], ...]]  # provider -> (node, operator) ...
    options: Mapping[str, str]
    version: str

    @property
    def operators(self) -> frozenset[str]:
        """What kinds of nodes there are, after the runtime's own fusions."""
        return frozenset(operator for nodes in self.by_provider.values() for _, operator in nodes)

    @property
    def compute(self) -> int:
        """How many nodes of the kinds that matter there are."""
        return sum(operator in COMPUTE for nodes in self.by_provider.values() for _, operator in nodes)

    @property
    def off_provider(self) -> tuple[tuple[str, str, str], ...]:
        """(provider, node, operator) of compute nodes that ran elsewhere."""
        return tuple(
            (provider, node, operator)
            for provider, nodes in self.by_provider.items()
            for node, operator in nodes
            if provider != self.asked and operator in COMPUTE
        )

    def insist(self) -> None:
        """Raise EnvironmentLacking unless the asked provider did all the work."""
        if self.off_provider:
            some = ", ".join(f"{node} ({operator}) on {where}" for where, node, operator in self.off_provider[:5])
            raise EnvironmentLacking(
                f"{self.asked} was asked for, but {len(self.off_provider)} of {self.compute} compute nodes ran "
                f"elsewhere: {some}"
            )
        if self.asked != PROVIDERS["cpu"] and not self.by_provider.get(self.asked):
            raise EnvironmentLacking(f"{self.asked} was asked for, and onnxruntime tells of no node that ran on it")


class OnnxRunner:
    """An ONNX file under onnxruntime, on the provider that was asked for and on no other.

    `message` is what to run in the file's place: the graph as bytes, its weights in files of `folder`.
    """

    def __init__(self, path: Path, provider: str = "cpu", *, message: bytes = b"", folder: Path = Path()):
        ort = onnxruntime()
        asked = PROVIDERS[provider]
        if provider == "cuda" and hasattr(ort, "preload_dlls"):
            with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find, and stdout is for answers
                ort.preload_dlls()  # finds the CUDA and cuDNN libraries that came with torch's wheels
        if asked not in ort.get_available_providers():
            raise EnvironmentLacking(
                f"this onnxruntime ({ort.__version__}) has no {asked}: pip install onnxruntime-gpu "
                "(and uninstall onnxruntime, which would shadow it)"
            )
        settings = ort.SessionOptions()
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        settings.log_severity_level = 3  # errors only; a fallback is found by asking, not by reading warnings
        options = CUDA_OPTIONS if provider == "cuda" else {}
        if message:
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self.session = ort.InferenceSession(
                    message or str(path.resolve()), settings, providers=[(asked, options)]
                )
        except Exception as error:  # onnxruntime's exceptions share no base class but this one
            raise RuntimeRefused(f"onnxruntime refused {path}: {error}") from error
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
        self.path, self.provider = path, provider
        self._active: tuple[Any, Any] | None = None  # adapter and run options
        self._ids: NDArray[np.int64] | None = None

    def of(self, message: bytes, folder: Path) -> OnnxRunner:
        """Another graph, as bytes, with the adapter or the ids that this one runs with."""
        runner = OnnxRunner(self.path, self.provider, message=message, folder=folder)
        runner._active = self._active
        return runner if self._ids is None else runner.with_rows(self._ids.tolist())

    @property
    def ids(self) -> tuple[int, ...] | None:
        """Which adapters the rows of every batch have; None where nobody has said."""
        return None if self._ids is None else tuple(self._ids.tolist())

    @property
    def has_adapter(self) -> bool:
        return self._active is not None

    def with_adapter(self, path: Path) -> OnnxRunner:
        """The same session with this `.onnx_adapter` in every run.

        Raises InputRefused where the file is none, or does not fit what the graph says it takes.
        """
        metadata = self.session.get_modelmeta().custom_metadata_map
        if onnx_adapter.KEY in metadata:
            contract = onnx_adapter.read_contract(metadata, self.path)
            onnx_adapter.refuse_misfits(onnx_adapter.read(path), contract, source=path, graph=self.path)
        ort = onnxruntime()
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        try:
            adapter.Load(str(path))
        except RuntimeError as error:
            raise InputRefused(f"{path} is no adapter in onnxruntime's format, or a damaged one") from error
        options.add_active_adapter(adapter)
        runner = copy.copy(self)
        runner._active = adapter, options  # both: onnxruntime runs the base where the adapter's object is gone
        return runner

    def with_rows(self, ids: Sequence[int]) -> OnnxRunner:
        """The same session with these adapters' ids, over and over, for the rows of every batch.

        The batch is the first dimension of the first input. Raises InputRefused for another kind of graph.
        """
        if onnx_adapter.IDS not in self.axes and self._ids is None:
            raise InputRefused(f"{self.path} has no input {onnx_adapter.IDS}: it was not made with --lora rows")
        runner = copy.copy(self)
        runner._ids = np.array(ids, np.int64)
        runner.axes = {name: sizes for name, sizes in self.axes.items() if name != onnx_adapter.IDS}
        return runner

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
            inputs = {**inputs, onnx_adapter.IDS: np.resize(self._ids, len(next(iter(inputs.values()))))}
        try:
            return dict(zip(names, self.session.run(names, inputs, self._active and self._active[1]), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no base class but this one
            raise RuntimeRefused(f"onnxruntime: {error}") from error


def environment() -> dict[str, Any]:
    """Versions and settings that a result depends on."""
    facts: dict[str, Any] = {
        "lora_export": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime().__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "tf32": False,  # `_tf32_off` and CUDA_OPTIONS see to that
    }
    if transformers := sys.modules.get("transformers"):
        facts["transformers"] = transformers.__version__
    for variable in ("NVIDIA_TF32_OVERRIDE", "ORT_CUDA_GEMM_OPTIONS"):
        if variable in os.environ:
            facts[variable] = os.environ[variable]
    return facts
