"""`lora_export.export_torchscript`: a model with its adapters into one TorchScript file, or a .pt2 of torch.export."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora_export import layers, plan
from lora_export.adapters.combination import Combination
from lora_export.api.adapted_model import adapted_model
from lora_export.api.application import Application
from lora_export.api.callbacks import OnMessage, OnProgress, ignore, in_stages
from lora_export.api.load import (
    AdapterSources,
    ModelSource,
    adapter_paths,
    load_adapters,
    locate_adapters,
    locate_model,
    model_paths,
    refuse_no_source,
    refuse_pt2,
    refuse_weights_alone,
    resolve_model,
)
from lora_export.api.output_names import with_suffix
from lora_export.api.publish import record_of_model, recorded_verdict, require_same, stage_of_proof
from lora_export.errors import RuntimeRefused, WrongUsage
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.models.export import save_torchscript, to_torchscript
from lora_export.models.export_program import load_own_program, save_program, to_program
from lora_export.models.model import Model
from lora_export.models.outputs import named_outputs
from lora_export.models.tracing import cache_disabled
from lora_export.runtime.runner import Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage import atomic_output
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove

PT2 = "pt2"
FILE_FORMATS = ("torchscript", PT2)
TRACE_TOLERANCE = 1e-2  # the proof decides; this finds a trace that repeats the layout of its example


@dataclass(frozen=True, eq=False)
class TorchScriptResult:
    """What was published, and its proof."""

    output: Path
    proof: Proof | None  # None: `verify=False`
    notes: tuple[str, ...]


def export_torchscript(
    model: ModelSource,
    output: str | Path,
    *,
    adapters: AdapterSources = (),
    weights: Sequence[float] = (),
    prefixes: Mapping[str, str] | None = None,
    reading: ReadOptions = DEFAULTS,
    combination: str | Combination = "cat",
    tied: str = "error",
    lora: str = "merged",
    format: str | None = None,
    inputs: str | Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
    download: bool = False,
    on_message: OnMessage = ignore,
    on_progress: OnProgress = ignore,
) -> TorchScriptResult:
    """Export a model with its adapters to TorchScript or to a .pt2, prove the file, and only then publish it.

    `format` is "torchscript" (a trace) or "pt2" (a program of torch.export, with dynamic batch and sequence, which
    `torch.export.load` reads). None chooses by the suffix of `output`: .pt2, or else TorchScript.

    `model` is a Hugging Face folder, `package.module:factory`, `file.py:factory`, or `(module, example_inputs)`. `lora`
    is "merged" (folded into the weights) or "nodes" (A and B beside them). `weights` has one factor for each adapter.
    `prefixes` (FROM -> TO) replaces the beginnings of names in the adapters. `reading`, `combination` and `tied` are
    those of `merge`. `inputs` is an .npz of further inputs to check on. The names of the inputs and the record of
    where the file comes from are stored in its extra file `lora_export.json`.

    With `download`, what the cache lacks of a name of the Hugging Face Hub is downloaded (`owner/name[@revision]`).
    Then EnvironmentLacking is raised without a connection.

    Raises InputRefused for what does not fit; Different or Undecided, with `.proof`, where the proof fails;
    RuntimeRefused where the model cannot be traced; OutputFailed where the file cannot be written. Nothing is published
    then, and an existing output is unchanged.
    """
    refuse_pt2(model)
    refuse_weights_alone(adapters, weights)
    model = locate_model(model, on_message, download)
    refuse_no_source(model)
    adapters = locate_adapters(adapters, on_message, download)
    application = Application.of(combination, tied)
    if format not in (None, *FILE_FORMATS):
        raise WrongUsage(f"the format {format} is unknown; the formats are {', '.join(FILE_FORMATS)}")
    is_program = format == PT2 or (format is None and Path(output).suffix == ".pt2")
    suffixes = (".pt2",) if is_program else (".pt", ".ts", ".pth")
    output, stage = with_suffix(output, *suffixes), in_stages(on_progress)
    loaded = load_adapters(adapters, prefixes, reading=reading.for_base(model))
    sources = [*model_paths(model), *adapter_paths(adapters)]
    with atomic_output.stage_file(output, inputs=sources, overwrite=overwrite, on_message=on_message) as folder:
        stage("loading the model")
        base = resolve_model(model, loaded, inputs=inputs, export=True)
        adapted = adapted_model(base, loaded, weights, application, on_message)
        base = adapted.model
        module, notes = copy.deepcopy(base.module), []
        if loaded:
            steps = plan.make(adapted.adapters, layers.specs(module), strengths=adapted.strengths)
            notes = [*(note for adapter in adapted.adapters for note in adapter.notes), *steps.notes]
            for note in notes:
                on_message(f"note: {note}")
            (layers.fold if lora == "merged" else layers.attach)(module, steps)
        stage("exporting" if is_program else "tracing")
        base, save = (_exported if is_program else _traced)(base, module, on_message)
        record = record_of_model(base, loaded, weights, {"lora": lora, **application.settings})
        record["inputs"] = list(base.input_names)
        stage("writing")
        save(folder / output.name, extra={"lora_export.json": json.dumps(record)})
        proof = None
        if verify:
            candidate = _candidate(folder / output.name, base, is_program=is_program)
            further = None if inputs is None else Path(inputs)
            references = PyTorchReferences(base, adapted.adapters, adapted.strengths, user_inputs=further)
            proof = require_same(prove(candidate, references, step=stage_of_proof(stage)))
        record["verdict"] = recorded_verdict(proof)
        save(folder / output.name, extra={"lora_export.json": json.dumps(record)})
    return TorchScriptResult(output, proof, tuple(notes))


def _candidate(path: Path, base: Model, *, is_program: bool) -> Runner:
    """The file that was written, as its users load it."""
    if not is_program:
        return ScriptRunner(path, base.input_names)
    axes = {
        name: tuple(None if axis in base.axes[name] else size for axis, size in enumerate(value.shape))
        for name, value in base.example_inputs().items()
    }
    return ModuleRunner(load_own_program(path), axes=axes, path=path)


def _exported(base: Model, module: nn.Module, on_message: OnMessage) -> tuple[Model, Callable[..., None]]:
    """How to write the program, and the model with its inputs: without the images of its texts if they are refused."""
    try:
        program = to_program(module, base.example_inputs(), axes=base.axes)
    except RuntimeRefused as error:
        if base.text_only is None:
            raise
        base = _without_images(base, str(error).splitlines()[0], on_message)
        program = to_program(module, base.example_inputs(), axes=base.axes)
    return base, functools.partial(save_program, program)


def _traced(base: Model, module: nn.Module, on_message: OnMessage) -> tuple[Model, Callable[..., None]]:
    """How to write the trace, and the model with its inputs: without the images of its texts where their number is
    fixed.
    """
    try:
        script = to_torchscript(module, base.example_inputs())
        if base.text_only is None or _follows(script, module, base):
            return base, functools.partial(save_torchscript, script)
        why = "the trace is right for one number and one size of images alone"
    except RuntimeRefused as error:
        if base.text_only is None:
            raise
        why = str(error).splitlines()[0]
    base = _without_images(base, why, on_message)
    return base, functools.partial(save_torchscript, to_torchscript(module, base.example_inputs()))


def _without_images(base: Model, why: str, on_message: OnMessage) -> Model:
    on_message(f"note: the file takes texts without images. With images, {why}")
    return base.without_images(why)


def _follows(script: torch.jit.ScriptModule, module: nn.Module, base: Model) -> bool:
    """Whether a trace returns nearly what the module does, for other sizes than it was traced with."""
    inputs = base.inputs(base.checked_sizes({})[0], seed=1)
    with torch.no_grad(), cache_disabled(module):
        wanted = named_outputs(module(**inputs))
        try:
            found = named_outputs(script(**inputs))
        except RuntimeError:
            return False
    return all(
        name in found
        and found[name].shape == value.shape
        and torch.allclose(found[name], value, rtol=TRACE_TOLERANCE, atol=TRACE_TOLERANCE)
        for name, value in wanted.items()
    )
