"""`lora_export.export_torchscript`: a model with its adapters into one file of PyTorch, or a .pte of ExecuTorch."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lora_export import layers, plan
from lora_export.api import load
from lora_export.api.adapted_model import adapted_model
from lora_export.api.publish import prove_trace, record_of_model, recorded_verdict, require_same, stage_of_proof
from lora_export.artifacts.artifact import Artifact, ArtifactKind, artifact_kind
from lora_export.artifacts.files import with_suffix
from lora_export.callbacks import OnMessage, in_stages, note_each
from lora_export.errors import RuntimeRefused
from lora_export.graph.refusals import refuse_transforms
from lora_export.models import executorch, export_program
from lora_export.models.model import Model
from lora_export.models.tracing import cache_setting, named_outputs
from lora_export.notebook import html_table
from lora_export.options.declaring import takes
from lora_export.options.export import TorchScriptOptions
from lora_export.options.spelling import named
from lora_export.runtime.registered.executorch import open_executorch
from lora_export.runtime.runner import Runner
from lora_export.runtime.torch_runners import ModuleRunner
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage import atomic_output
from lora_export.storage.store_path import place
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove

KIND_OF_FORMAT = {"torchscript": ArtifactKind.SCRIPT, "pt2": ArtifactKind.PROGRAM, "pte": ArtifactKind.EXECUTORCH}
SUFFIXES_OF_KIND = {
    ArtifactKind.SCRIPT: (".pt", ".ts", ".pth"),
    ArtifactKind.PROGRAM: (".pt2",),
    ArtifactKind.EXECUTORCH: (".pte",),
}
TRACE_TOLERANCE = 1e-2  # the proof decides; this finds a trace that repeats the layout of its example


@dataclass(frozen=True, eq=False)
class TorchScriptResult:
    """What was published, and its proof."""

    output: Path
    proof: Proof | None  # None: `verify=False`
    notes: tuple[str, ...]

    def _repr_html_(self) -> str:
        return self.proof._repr_html_() if self.proof else html_table(f"{self.output} (not proven)", (), ())


@takes(TorchScriptOptions)
def export_torchscript(options: TorchScriptOptions) -> TorchScriptResult:
    """Export a model with its adapters to TorchScript, a .pt2 or a .pte, prove the file, and only then publish it.

    A TorchScript file is a trace. A .pt2 is a program of torch.export, with dynamic batch and sequence, which
    `torch.export.load` reads. A .pte is the same program for ExecuTorch, with sizes up to `max_size`. The names of the
    inputs and the record of where the file comes from are stored in its extra file `lora_export.json`; of a .pte, in
    an archive behind the program. `model` is a Hugging Face folder, `package.module:factory`, `file.py:factory`, or
    `(module, example_inputs)`.

    Raises InputRefused for what does not fit; EnvironmentLacking for a .pte without ExecuTorch; Different or Undecided,
    with `.proof`, where the proof fails; RuntimeRefused where the model cannot be traced; OutputFailed where the file
    cannot be written; WrongUsage for `max_size` of another file. Nothing is published then, and an existing output is
    unchanged.
    """
    load.refuse_pt2(options.model)
    load.refuse_weights_alone(options.adapters, options.weights)
    on_message, weights = options.on_message, options.weights
    model = load.locate_model(options.model, on_message, options.download)
    load.refuse_no_source(model)
    adapters = load.locate_adapters(options.adapters, on_message, options.download)
    kind = _kind(options)
    options.check_usage(format=next(name for name, one in KIND_OF_FORMAT.items() if one is kind))
    if kind is ArtifactKind.EXECUTORCH:
        executorch.import_executorch()  # before anything that takes long
    output, stage = with_suffix(options.output, *SUFFIXES_OF_KIND[kind]), in_stages(options.on_progress)
    with load.no_adapter_as_model(model, adapters):
        loaded = load.load_adapters(adapters, options.prefixes, reading=options.reading.for_base(model))
    sources = [*load.model_paths(model), *load.adapter_paths(adapters)]
    with atomic_output.staged(options, output, sources, is_file=True, sign=options.sign, streamed=False) as folder:
        stage("loading the model")
        base = load.resolve_model(model, loaded, inputs=options.inputs, export=True)
        adapted = adapted_model(base, loaded, weights, options, on_message)
        base = adapted.model
        module, notes = copy.deepcopy(base.module), []
        if loaded:
            steps = plan.make(adapted.adapters, layers.specs(module), strengths=adapted.strengths)
            notes = [*(note for adapter in adapted.adapters for note in adapter.notes), *steps.notes]
            note_each(on_message, notes)
            if options.lora != "merged":
                refuse_transforms(steps)
            (layers.fold if options.lora == "merged" else layers.attach)(module, steps)
        stage("tracing" if kind is ArtifactKind.SCRIPT else "exporting")
        base, save = _made(base, module, kind, options.max_size or {}, on_message)
        record = record_of_model(base, loaded, weights, {"lora": options.lora, **options.settings})
        record["inputs"] = list(base.input_names)
        stage("writing")
        further = None if options.inputs is None else place(options.inputs)
        references = PyTorchReferences(base, adapted.adapters, adapted.strengths, user_inputs=further)

        def prove_file() -> Proof:
            save(folder / output.name, extra={"lora_export.json": json.dumps(record)})
            candidate = _candidate(folder / output.name, base, kind)
            return require_same(prove(candidate, references, step=stage_of_proof(stage)))

        # A program has the sizes that it takes, and refuses others.
        model = references.model if kind is ArtifactKind.SCRIPT else replace(references.model, traced={})
        proof = prove_trace(model, prove_file if options.verify else None, record.update, on_message)
        record["verdict"] = recorded_verdict(proof, "ExecuTorch" if kind is ArtifactKind.EXECUTORCH else "PyTorch")
        save(folder / output.name, extra={"lora_export.json": json.dumps(record)})
    return TorchScriptResult(output, proof, tuple(notes))


def _kind(options: TorchScriptOptions) -> ArtifactKind:
    """What to write: TorchScript, where neither the format nor the suffix of the output names another kind."""
    claimed = artifact_kind(place(options.output))
    return (
        KIND_OF_FORMAT[options.format]
        if options.format
        else claimed
        if claimed in SUFFIXES_OF_KIND
        else ArtifactKind.SCRIPT
    )


def _candidate(path: Path, base: Model, kind: ArtifactKind) -> Runner:
    """The file that was written, as its users load it."""
    if kind is ArtifactKind.SCRIPT:
        return ScriptRunner(path, base.input_names)
    if kind is ArtifactKind.EXECUTORCH:
        return open_executorch(Artifact(path, kind), base.input_names)
    axes = {
        name: tuple(None if axis in base.axes[name] else size for axis, size in enumerate(value.shape))
        for name, value in base.example_inputs().items()
    }
    module, limits = export_program.load_own_program(path)
    return ModuleRunner(module, axes=axes, limits=limits, path=path)


def _made(
    base: Model, module: nn.Module, kind: ArtifactKind, max_size: Mapping[str, int], on_message: OnMessage
) -> tuple[Model, Callable[..., None]]:
    """The model with its inputs, and how to write its file: without the images of its texts where they are refused,
    or where a trace fixes their number.
    """

    def save(base: Model) -> Callable[..., None]:
        if kind is ArtifactKind.EXECUTORCH:
            return _lowered(base, module, max_size, on_message)
        if kind is ArtifactKind.PROGRAM:
            program = export_program.to_program(module, base.example_inputs(), axes=base.axes)
            return functools.partial(export_program.save_program, program)
        script = export_program.to_torchscript(module, base.example_inputs())
        if base.text_only is not None and not _follows(script, module, base):
            raise RuntimeRefused("the trace is right for one number and one size of images alone")
        return functools.partial(export_program.save_torchscript, script)

    try:
        return base, save(base)
    except RuntimeRefused as error:
        if base.text_only is None:
            raise
        why = str(error).splitlines()[0]
    on_message(f"note: the file takes texts without images. With images, {why}")
    base = base.without_images(why)
    return base, save(base)


def _lowered(base: Model, module: nn.Module, max_size: Mapping[str, int], on_message: OnMessage) -> Callable[..., None]:
    """How to write the .pte of a module. An axis whose greatest size is 1 does not vary."""
    most = executorch.planned_sizes(base, max_size)
    inputs = base.inputs({symbol: min(size, base.traced_sizes[symbol]) for symbol, size in most.items()}, seed=0)
    axes = {name: {axis: symbol for axis, symbol in own.items() if most[symbol] > 1} for name, own in base.axes.items()}
    program = executorch.lowered(module, export_program.to_program(module, inputs, axes=axes, most=most))
    sizes = ", ".join(f"{symbol} {size}" for symbol, size in most.items())
    on_message(f"note: the file takes sizes of up to {sizes}, for which it reserves memory ({named('max_size')})")
    return functools.partial(executorch.save_executorch, program)


def _follows(script: torch.jit.ScriptModule, module: nn.Module, base: Model) -> bool:
    """Whether a trace returns nearly what the module does, for other sizes than it was traced with."""
    inputs = base.inputs(base.checked_sizes({})[0], seed=1)
    with torch.no_grad(), cache_setting(module, to=False):
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
