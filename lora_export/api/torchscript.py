"""`lora_export.export_torchscript`: a model with its adapters into one TorchScript file, or a .pt2 of torch.export."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lora_export import layers, plan
from lora_export.api.adapted_model import adapted_model
from lora_export.api.load import (
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
from lora_export.api.publish import record_of_model, recorded_verdict, require_same, stage_of_proof
from lora_export.artifacts.artifact import ArtifactKind, artifact_kind
from lora_export.artifacts.output_names import with_suffix
from lora_export.callbacks import OnMessage, in_stages
from lora_export.errors import RuntimeRefused
from lora_export.models.export import save_torchscript, to_torchscript
from lora_export.models.export_program import load_own_program, save_program, to_program
from lora_export.models.model import Model
from lora_export.models.outputs import named_outputs
from lora_export.models.tracing import cache_disabled
from lora_export.options.declaring import takes
from lora_export.options.export import TorchScriptOptions
from lora_export.runtime.runner import Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage import atomic_output
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove

PT2 = "pt2"
TRACE_TOLERANCE = 1e-2  # the proof decides; this finds a trace that repeats the layout of its example


@dataclass(frozen=True, eq=False)
class TorchScriptResult:
    """What was published, and its proof."""

    output: Path
    proof: Proof | None  # None: `verify=False`
    notes: tuple[str, ...]


@takes(TorchScriptOptions)
def export_torchscript(options: TorchScriptOptions) -> TorchScriptResult:
    """Export a model with its adapters to TorchScript or to a .pt2, prove the file, and only then publish it.

    A TorchScript file is a trace. A .pt2 is a program of torch.export, with dynamic batch and sequence, which
    `torch.export.load` reads. The names of the inputs and the record of where the file comes from are stored in its
    extra file `lora_export.json`. `model` is a Hugging Face folder, `package.module:factory`, `file.py:factory`, or
    `(module, example_inputs)`.

    Raises InputRefused for what does not fit; Different or Undecided, with `.proof`, where the proof fails;
    RuntimeRefused where the model cannot be traced; OutputFailed where the file cannot be written. Nothing is published
    then, and an existing output is unchanged.
    """
    refuse_pt2(options.model)
    refuse_weights_alone(options.adapters, options.weights)
    on_message, weights = options.on_message, options.weights
    model = locate_model(options.model, on_message, options.download)
    refuse_no_source(model)
    adapters = locate_adapters(options.adapters, on_message, options.download)
    is_program = options.format == PT2 or (
        options.format is None and artifact_kind(Path(options.output)) is ArtifactKind.PROGRAM
    )
    suffixes = (".pt2",) if is_program else (".pt", ".ts", ".pth")
    output, stage = with_suffix(options.output, *suffixes), in_stages(options.on_progress)
    loaded = load_adapters(adapters, options.prefixes, reading=options.reading.for_base(model))
    sources = [*model_paths(model), *adapter_paths(adapters)]
    with atomic_output.stage_file(output, inputs=sources, overwrite=options.overwrite, on_message=on_message) as folder:
        stage("loading the model")
        base = resolve_model(model, loaded, inputs=options.inputs, export=True)
        adapted = adapted_model(base, loaded, weights, options, on_message)
        base = adapted.model
        module, notes = copy.deepcopy(base.module), []
        if loaded:
            steps = plan.make(adapted.adapters, layers.specs(module), strengths=adapted.strengths)
            notes = [*(note for adapter in adapted.adapters for note in adapter.notes), *steps.notes]
            for note in notes:
                on_message(f"note: {note}")
            (layers.fold if options.lora == "merged" else layers.attach)(module, steps)
        stage("exporting" if is_program else "tracing")
        base, save = (_exported if is_program else _traced)(base, module, on_message)
        record = record_of_model(base, loaded, weights, {"lora": options.lora, **options.settings})
        record["inputs"] = list(base.input_names)
        stage("writing")
        save(folder / output.name, extra={"lora_export.json": json.dumps(record)})
        proof = None
        if options.verify:
            candidate = _candidate(folder / output.name, base, is_program=is_program)
            further = None if options.inputs is None else Path(options.inputs)
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
