"""`lora_export.export_torchscript`: a model with its adapters into one file of PyTorch, or a .pte of ExecuTorch."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lora_export import layers, plan
from lora_export.api import load, load_model
from lora_export.api.adapted_model import AdaptedModel, adapted_model
from lora_export.api.program_adapters import (
    attach_inputs,
    parameters_by_input,
    prove_inputs,
    refuse_files_beside,
    write_files,
)
from lora_export.api.programs import ProgramFormat, program_format
from lora_export.api.publish import (
    ExportProofs,
    ExportResult,
    prove_trace,
    record_of_model,
    recorded_verdicts,
    require_same,
    stage_of_proof,
)
from lora_export.artifacts.files import with_suffix
from lora_export.artifacts.kind import artifact_kind
from lora_export.callbacks import OnMessage, in_stages, note_each
from lora_export.errors import RuntimeRefused, WrongUsage, first_line
from lora_export.formats.contract import Contract
from lora_export.graph.refusals import refuse_transforms
from lora_export.isolation.turns import in_turn
from lora_export.models.model import Model
from lora_export.options.combining import AdapterSource
from lora_export.options.common import ModelSource
from lora_export.options.declaring import takes
from lora_export.options.export import TorchScriptOptions
from lora_export.options.spelling import named
from lora_export.plan import Plan
from lora_export.provenance import CONTRACT_KEY
from lora_export.runtime.runner import Runner
from lora_export.storage import atomic_output
from lora_export.storage.artifact_kinds import PROGRAM_FORMATS
from lora_export.storage.store_path import newly_opened, place
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import prove


@dataclass(frozen=True, eq=False)
class TorchScriptResult(ExportResult):
    """What was published, and its proof. The files of adapters that are inputs are beside the program."""

    notes: tuple[str, ...]


@takes(TorchScriptOptions)
@in_turn
def export_torchscript(options: TorchScriptOptions) -> TorchScriptResult:
    """Export a model with its adapters to TorchScript, a .pt2 or a .pte, prove the file, and only then publish it.

    A TorchScript file is a trace. A .pt2 is a program of torch.export, with dynamic batch and sequence, which
    `torch.export.load` reads. A .pte is the same program for ExecuTorch, with sizes up to `max_size`. The names of the
    inputs and the record of where the file comes from are stored in its extra file `lora_export.json`; of a .pte, in
    an archive behind the program. With `lora="inputs"` a .pte takes A and B of each layer after the model's inputs,
    from NAME.safetensors of each adapter, beside it. `model` is a Hugging Face folder, `package.module:factory`,
    `file.py:factory`, or `(module, example_inputs)`.

    Raises InputRefused for what does not fit; EnvironmentLacking for a .pte without ExecuTorch; Different or Undecided,
    with `.proof`, where the proof fails; RuntimeRefused where the model cannot be traced; OutputFailed where the file
    cannot be written; WrongUsage for `max_size` of another file. Nothing is published then, and an existing output is
    unchanged.
    """
    load_model.refuse_pt2(options.model)
    load.refuse_weights_alone(options.adapters, options.weights)
    model = load_model.locate_model(options.model, options.on_message, options.download)
    with load.no_adapter_as_model(model, options.adapters):
        load_model.refuse_no_source(model)
    adapters = load.locate_adapters(options.adapters, options.on_message, options.download)
    name = _format(options)
    program = program_format(name)
    options.check_usage(format=name)
    if options.lora == "inputs" and (name != "pte" or not adapters):
        raise WrongUsage(f"{named('lora', 'inputs')} is for an output that ends in .pte, and needs {named('adapters')}")
    if options.lora == "inputs" and not options.combined.is_exact:
        raise WrongUsage(f"{named('combine')} is for {named('lora', 'merged')} and nodes: inputs take one adapter each")
    getattr(program, "require", lambda: None)()
    output = with_suffix(options.output, *PROGRAM_FORMATS[name].suffixes)
    with load.no_adapter_as_model(model, adapters):
        return _exported(options, model, adapters, program, output)


def _exported(
    options: TorchScriptOptions,
    model: ModelSource,
    adapters: Sequence[AdapterSource],
    program: ProgramFormat,
    output: Path,
) -> TorchScriptResult:
    """The published file of a model and adapters that were found."""
    loaded = load.load_adapters(adapters, options.prefixes, reading=options.reading.for_base(model))
    on_message, weights, is_swapped = options.on_message, options.weights, options.lora == "inputs"
    stage = in_stages(options.on_progress)
    sources = [*load_model.model_paths(model), *load.adapter_paths(adapters)]
    if is_swapped:
        refuse_files_beside(output, loaded, sources, overwrite=options.overwrite)
    with atomic_output.staged(options, output, sources, is_file=True, sign=options.sign, streamed=False) as folder:
        stage("loading the model")
        base = load_model.resolve_model(model, loaded, inputs=options.inputs, export=True)
        adapted = adapted_model(base, loaded, weights, options, on_message)
        module, steps, contract = _with_adapters(adapted, options)
        stage("tracing" if program.IS_TRACE else "exporting")
        base, save = _made(adapted.model, module, program, options)
        record = record_of_model(base, loaded, weights, {"lora": options.lora, **options.settings})
        record["inputs"] = list(base.input_names)
        stage("writing")
        files: list[Path] = []
        if contract is not None and steps is not None:
            contract = replace(contract, base=record["base"]["sha256"])
            record["inputs"] += parameters_by_input(module).values()
            record[CONTRACT_KEY] = json.loads(str(contract))
            files = write_files(folder, contract, steps)
        further = None if options.inputs is None else newly_opened(options.inputs)
        references = PyTorchReferences(base, adapted.adapters, adapted.strengths, user_inputs=further)

        def proofs_of(candidate: Runner) -> ExportProofs:
            if contract is not None and steps is not None:
                return prove_inputs(candidate, references, steps, files, stage)
            return ExportProofs(require_same(prove(candidate, references, step=stage_of_proof(stage))))

        file = _ProgramFile(folder / output.name, base, program, save, record)
        proofs = _written(file, references, proofs_of if options.verify else None, on_message)
    beside = (output.with_name(each.name) for each in files)
    return TorchScriptResult(output, (output, *beside), proofs, _notes(adapted, steps))


def _with_adapters(
    adapted: AdaptedModel, options: TorchScriptOptions
) -> tuple[nn.Module, Plan | None, Contract | None]:
    """A copy of the module with the adapters in it, the plan of these, and the contract where they are inputs.

    Raises MatchError and InputRefused for adapters that do not fit.
    """
    module, contract, is_swapped = copy.deepcopy(adapted.model.module), None, options.lora == "inputs"
    if not adapted.adapters:
        return module, None, None
    specs = layers.specs(module)
    steps = plan.make(adapted.adapters, specs, strengths=adapted.strengths, one_at_a_time=is_swapped)
    note_each(options.on_message, _notes(adapted, steps))
    if options.lora != "merged":
        refuse_transforms(steps)
    if is_swapped:
        contract = attach_inputs(module, steps, options.max_rank)
    else:
        (layers.fold if options.lora == "merged" else layers.attach)(module, steps)
    return module, steps, contract


def _format(options: TorchScriptOptions) -> str:
    """The name of what to write: TorchScript, where neither the format nor the suffix of the output names another."""
    claimed = artifact_kind(place(options.output))
    return options.format or next((name for name, kind in PROGRAM_FORMATS.items() if kind is claimed), "torchscript")


def _made(
    base: Model, module: nn.Module, program: ProgramFormat, options: TorchScriptOptions
) -> tuple[Model, Callable[..., None]]:
    """The model with its inputs, and how to write its file: without the images of its texts where they are refused,
    or where a trace fixes their number.
    """
    try:
        return base, program.writer(base, module, options)
    except RuntimeRefused as error:
        if base.text_only is None:
            raise
        why = first_line(error)
    options.on_message(f"note: the file takes texts without images. With images, {why}")
    base = base.without_images(why)
    return base, program.writer(base, module, options)


@dataclass(frozen=True, eq=False)
class _ProgramFile:
    """A program that is not published yet."""

    path: Path
    base: Model
    program: ProgramFormat
    save: Callable[..., None]
    record: dict[str, Any]  # in the file; its verdict comes last

    def write(self) -> None:
        self.save(self.path, extra={"lora_export.json": json.dumps(self.record)})


def _written(
    file: _ProgramFile,
    references: PyTorchReferences,
    proofs_of: Callable[[Runner], ExportProofs] | None,
    on_message: OnMessage,
) -> ExportProofs | None:
    """Write a file, prove it by `proofs_of` unless that is None, and write it again with the verdict in its record."""

    def prove_file(proofs_of: Callable[[Runner], ExportProofs]) -> ExportProofs:
        file.write()
        return proofs_of(file.program.runner_of_file(file.path, file.base))

    # A program has the sizes that it takes, and refuses others.
    model = references.model if file.program.IS_TRACE else replace(references.model, traced={})
    proofs = prove_trace(model, proofs_of and functools.partial(prove_file, proofs_of), file.record.update, on_message)
    file.record["verdict"] = recorded_verdicts(proofs, file.program.RUNTIME)
    file.write()
    return proofs


def _notes(adapted: AdaptedModel, steps: Plan | None) -> tuple[str, ...]:
    return () if steps is None else (*(note for adapter in adapted.adapters for note in adapter.notes), *steps.notes)
