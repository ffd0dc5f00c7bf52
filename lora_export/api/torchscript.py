"""`lora_export.export_torchscript`: a model with its adapters into one TorchScript file."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
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
    refuse_pt2,
    refuse_weights_alone,
    resolve_model,
)
from lora_export.api.output_names import with_suffix
from lora_export.api.publish import record_of_model, recorded_verdict, require_same, stage_of_proof
from lora_export.errors import RuntimeRefused
from lora_export.formats.read_options import DEFAULTS, ReadOptions
from lora_export.models.export import save_torchscript, to_torchscript
from lora_export.models.key_value_cache import cache_disabled
from lora_export.models.model import Model
from lora_export.models.output_names import named_outputs
from lora_export.runtime.torchscript.runner import ScriptRunner
from lora_export.storage import atomic_output
from lora_export.verification.against_pytorch import PyTorchReferences
from lora_export.verification.proof import Proof, prove

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
    inputs: str | Path | None = None,
    verify: bool = True,
    overwrite: bool = False,
    download: bool = False,
    on_message: OnMessage = ignore,
    on_progress: OnProgress = ignore,
) -> TorchScriptResult:
    """Trace a model with its adapters to TorchScript, prove the file against PyTorch, and only then publish it.

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
    model, adapters = locate_model(model, on_message, download), locate_adapters(adapters, on_message, download)
    application = Application.of(combination, tied)
    output, stage = with_suffix(output, ".pt", ".ts", ".pth"), in_stages(on_progress)
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
        stage("tracing")
        base, script = _traced(base, module, on_message)
        record = record_of_model(base, loaded, weights, {"lora": lora, **application.settings})
        record["inputs"] = list(base.input_names)
        stage("writing")
        save_torchscript(script, folder / output.name, extra={"lora_export.json": json.dumps(record)})
        proof = None
        if verify:
            candidate = ScriptRunner(folder / output.name, base.input_names)
            further = None if inputs is None else Path(inputs)
            references = PyTorchReferences(base, adapted.adapters, adapted.strengths, user_inputs=further)
            proof = require_same(prove(candidate, references, step=stage_of_proof(stage)))
        record["verdict"] = recorded_verdict(proof)
        save_torchscript(script, folder / output.name, extra={"lora_export.json": json.dumps(record)})
    return TorchScriptResult(output, proof, tuple(notes))


def _traced(base: Model, module: nn.Module, on_message: OnMessage) -> tuple[Model, torch.jit.ScriptModule]:
    """The trace, and the model with its inputs: without the images of its texts where the trace fixes their number."""
    why = ""
    try:
        script = to_torchscript(module, base.example_inputs())
        if base.text_only is None or _follows(script, module, base):
            return base, script
        why = "the trace is right for one number and one size of images alone"
    except RuntimeRefused as error:
        if base.text_only is None:
            raise
        why = str(error).splitlines()[0]
    base = base.without_images(why)
    on_message(f"note: the file takes texts without images. With images, {why}")
    return base, to_torchscript(module, base.example_inputs())


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
