"""`lora-export torchscript`: a model with its adapters into one TorchScript file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lora_export.cli.arguments import TakesAdapters, load_adapters, publishing_options, refuse_exported, say


@click.command(cls=TakesAdapters)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT.pt",
    help="The file to publish once it is proven.",
)
@publishing_options("merged", "nodes")
def command(
    model: str,
    output: Path,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    mode: str,
    inputs_file: Path | None,
    no_verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Trace MODEL with its adapters to TorchScript, prove it, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. The file carries
    the names of its inputs in the extra file `lora_export.json`.
    """
    import copy

    from lora_export import layers, plan
    from lora_export.cli import proving
    from lora_export.cli.progress import stages
    from lora_export.errors import one_line
    from lora_export.models.export import save_torchscript, to_torchscript
    from lora_export.models.load import load_model
    from lora_export.runtime.torch_runners import ScriptRunner
    from lora_export.storage import atomic_output
    from lora_export.verification.against_pytorch import prove

    refuse_exported(model)
    loaded = load_adapters(adapters)
    with (
        atomic_output.stage_file(
            output, inputs=proving.inputs_of(model, adapters), overwrite=overwrite, say=say
        ) as folder,
        stages() as stage,
    ):
        stage("loading the model")
        base = load_model(model, loaded)
        module = copy.deepcopy(base.module)
        if loaded:
            steps = plan.make(loaded, layers.specs(module), strengths=weights)
            for note in [*(note for adapter in loaded for note in adapter.notes), *steps.notes]:
                say(f"note: {note}")
            (layers.fold if mode == "merged" else layers.attach)(module, steps)
        stage("tracing")
        script = to_torchscript(module, base.examples())
        record = proving.provenance(base, loaded, weights, {"lora": mode})
        record["inputs"] = list(base.input_names)
        stage("writing")
        save_torchscript(script, folder / output.name, extra={"lora_export.json": json.dumps(record)})
        result = None
        if not no_verify:
            candidate = ScriptRunner(folder / output.name, base.input_names)
            step = proving.telling(stage)
            result = prove(candidate, base, loaded, strengths=weights, user_inputs=inputs_file, step=step)
            proving.demanded(result)
        record["verdict"] = proving.summary(result)
        save_torchscript(script, folder / output.name, extra={"lora_export.json": json.dumps(record)})
    if as_json:
        click.echo(json.dumps({"output": str(output), "proof": proving.document(result)}))
    else:
        proving.show(result)
        click.echo(f"wrote {one_line(str(output))} ({output.stat().st_size:,} bytes)")
