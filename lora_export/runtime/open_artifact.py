"""A runner of the artifact that is to be verified, by its kind.

`RUNNERS` is the one table of runners: another kind is a row in it, an opener that makes a `CandidateRunner`, and its
test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lora_export import layers
from lora_export.artifacts.artifact import Artifact
from lora_export.artifacts.files import adapter_of_file, file_for_graph, graphs_in
from lora_export.errors import InputRefused, count
from lora_export.formats.contract import ADAPTER_IDS
from lora_export.isolation.limits import memory_for
from lora_export.models.load import load_model, module_with_weights
from lora_export.models.model import Model
from lora_export.models.pt2 import program
from lora_export.models.served_values import vector_of
from lora_export.options.spelling import named
from lora_export.options.verify import Judging
from lora_export.runtime.endpoint.runner import open_endpoint
from lora_export.runtime.endpoint.tensors import is_of_tensors, open_tensors_of
from lora_export.runtime.kv_cache import with_cache, with_registered_cache
from lora_export.runtime.onnx_runner import OnnxRunner
from lora_export.runtime.registered import OPENVINO
from lora_export.runtime.registered.executorch import open_executorch
from lora_export.runtime.registered.runner import RegisteredRunner
from lora_export.runtime.runner import TIMEOUT, CandidateRunner, no_ids
from lora_export.runtime.several_graphs import SeveralGraphs
from lora_export.runtime.three_graphs import runner_of
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage.artifact_kinds import ArtifactKind


@dataclass(frozen=True, eq=False)
class HowToOpen:
    """What a runner is opened with, beside the artifact. Each kind takes what it needs of it."""

    base: Model  # whose weights a .safetensors file has
    options: Judging = field(default_factory=Judging)
    # Names of all that are given: one may be that of an endpoint's model, several are those that rows choose from
    adapters: Sequence[str] = ()
    # Seconds of a run, or of a request; that of a folder or a .pt2 ends once its operator has ended
    timeout: float = TIMEOUT

    @property
    def onnx_adapter(self) -> Path | None:
        """Run with a graph that takes it."""
        return None if self.options.onnx_adapter is None else Path(self.options.onnx_adapter)


def open_candidate(candidate: Artifact, how: HowToOpen) -> CandidateRunner:
    """A runner of a candidate: an .onnx, a folder with the three graphs of a model, a .pt, .pt2 or .pte, a
    Hugging Face folder, or weights (.safetensors) of the base.

    Raises InputRefused for another kind of file, and EnvironmentLacking where the provider does not load.
    """
    opener = RUNNERS.get(candidate.kind) if how.options.runner is None else _registered
    if opener is None:
        if candidate.kind is ArtifactKind.GGUF:
            way = named("model", "BASE.gguf")
            raise InputRefused(f"{candidate.path} is compared with the GGUF file that it was merged into: {way}")
        *first, last = sorted(kind.suffixes[0] for kind in RUNNERS if kind.suffixes)
        raise InputRefused(
            f"{candidate.path}: a candidate is an {', '.join(first)} or {last} file, or a Hugging Face folder, or what "
            f"your own {named('runner')} runs"
        )
    return opener(candidate, how)


def _graph(candidate: Artifact, how: HowToOpen) -> CandidateRunner:
    runner = OnnxRunner(candidate.path, how.options.provider, timeout=how.timeout)
    runner = runner if how.onnx_adapter is None else runner.with_adapter(how.onnx_adapter)
    _refuse_unknown_id(candidate, how, runner)
    if how.options.adapter_id is None and runner.takes_rows:
        return runner
    return with_cache(runner if how.options.adapter_id is None else runner.with_rows([how.options.adapter_id]))


def _refuse_unknown_id(
    candidate: Artifact, how: HowToOpen, runner: OnnxRunner | RegisteredRunner | SeveralGraphs
) -> None:
    number, names = how.options.adapter_id, runner.adapters_by_row
    if number is None:
        return
    if runner.has_slots:
        raise InputRefused(f"{candidate.path} holds no adapters: leave {named('adapter_id')} out, all are proven")
    if names is not None and number > len(names):
        known = ", ".join(f"{place} ({name})" for place, name in enumerate(["the base", *names]))
        raise InputRefused(f"{candidate.path} has no adapter {number} ({named('adapter_id')}). Its ids are {known}")
    if names is not None and len(how.adapters) > 1 and len(how.adapters) != len(names):
        raise InputRefused(
            f"{candidate.path} has {count(len(names), 'adapter')} ({', '.join(names)}), not {len(how.adapters)}: give "
            f"them in that order, or the one that {named('adapter_id', number)} is"
        )


def _several_graphs(candidate: Artifact, how: HowToOpen) -> CandidateRunner:
    path, adapter = candidate.path, how.onnx_adapter
    files = graphs_in(path)
    runner = runner_of(files).open(path, how.options.provider, timeout=how.timeout)
    _refuse_unknown_id(candidate, how, runner)
    if adapter is None:
        return runner if how.options.adapter_id is None else runner.with_rows([how.options.adapter_id])
    name = adapter_of_file(adapter)
    if not name or not adapter.is_file() or not adapter.parent.samefile(path):
        raise InputRefused(
            f"{adapter} is no adapter of the graphs in {path}: name one of its files there, such as "
            f"{file_for_graph('NAME', files[0])}"
        )
    return runner.with_adapter(name)


def _folder(candidate: Artifact, how: HowToOpen) -> CandidateRunner:
    return _module(candidate, load_model(str(candidate.path), streamed=True).module, how)


def _module(candidate: Artifact, module: nn.Module, how: HowToOpen) -> CandidateRunner:
    dtypes = layers.with_loaded_names(module, {spec.name: spec.dtype for spec in candidate.checkpoint.specs})
    return ModuleRunner(module, stored_dtypes=dtypes, path=candidate.path, timeout=how.timeout)


def _program(candidate: Artifact, how: HowToOpen) -> CandidateRunner:
    loaded = program.load_program(candidate.path)
    return ModuleRunner(
        loaded,
        axes=loaded.axes,
        stored_dtypes=loaded.stored_dtypes,
        limits=loaded.limits,
        path=candidate.path,
        timeout=how.timeout,
        memory=memory_for(candidate.path.stat().st_size),
    )


def _registered(candidate: Artifact, how: HowToOpen) -> CandidateRunner:
    runner = RegisteredRunner(how.options.runner or OPENVINO, candidate, adapter=how.onnx_adapter, timeout=how.timeout)
    _refuse_unknown_id(candidate, how, runner)
    if how.options.adapter_id is not None:
        if candidate.kind is ArtifactKind.GRAPH and ADAPTER_IDS not in candidate.input_shapes:
            raise no_ids(candidate.path)  # the runner may not state the inputs
        runner = runner.with_rows([how.options.adapter_id])
    elif runner.takes_rows:
        return runner
    return with_registered_cache(runner) if candidate.kind is ArtifactKind.GRAPH else runner


def _endpoint(candidate: Artifact, how: HowToOpen) -> CandidateRunner:
    if is_of_tensors(candidate.address):
        return open_tensors_of(candidate.address, how.options.served_name, how.timeout)
    module: Any = how.base.module
    vocabulary = module.config.get_text_config().vocab_size if how.base.is_huggingface else 1
    folder, vector = Path(how.base.source), vector_of(how.base)
    return open_endpoint(
        candidate.address, how.options.served_name, how.adapters, folder, vocabulary, how.timeout, vector
    )


RUNNERS: Mapping[ArtifactKind, Callable[[Artifact, HowToOpen], CandidateRunner]] = {
    ArtifactKind.GRAPH: _graph,
    ArtifactKind.GENERATION: _several_graphs,
    ArtifactKind.CHECKPOINT: _folder,
    ArtifactKind.EMBEDDER: _folder,
    ArtifactKind.PIPELINE: _folder,
    ArtifactKind.WEIGHTS: lambda one, how: _module(one, module_with_weights(how.base, one.path), how),
    ArtifactKind.SCRIPT: lambda one, how: ScriptRunner(one.path, how.base.input_names, timeout=how.timeout),
    ArtifactKind.PROGRAM: _program,
    ArtifactKind.EXECUTORCH: lambda one, how: open_executorch(one, how.base.input_names, how.timeout, how.onnx_adapter),
    ArtifactKind.OPENVINO: _registered,
    ArtifactKind.ENDPOINT: _endpoint,
}
