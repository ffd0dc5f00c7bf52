"""`lora-export onnx`: a model with its adapters into one ONNX file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from lora_export.cli.arguments import load_adapters, provider_option, publishing_options, say


@click.command()
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT.onnx",
    help="The file to publish once it is proven.",
)
@publishing_options
@click.option("--opset", type=click.IntRange(min=18), help="The ONNX operator set (default: the exporter's).")
@provider_option
def command(
    model: str,
    output: Path,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    mode: str,
    inputs_file: Path | None,
    opset: int | None,
    provider: str,
    no_verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export MODEL to ONNX with its adapters, prove it, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. The base is
    exported once, in float32, with dynamic batch and sequence; then the adapters are put into the
    graph.
    """
    from lora_export import files, layers, plan
    from lora_export.cli import proving
    from lora_export.cli.progress import stages
    from lora_export.export import to_onnx
    from lora_export.graph.branches import branch
    from lora_export.graph.files import append_metadata, save
    from lora_export.graph.fold import fold
    from lora_export.graph.sites import find
    from lora_export.model import load as load_model
    from lora_export.runtime import OnnxRunner

    proving.require(provider)
    loaded = load_adapters(adapters)
    with (
        files.stage_file(output, inputs=proving.inputs_of(model, adapters), overwrite=overwrite, say=say) as folder,
        stages() as stage,
    ):
        stage("loading the model")
        base = load_model(model, loaded)
        if loaded:  # what does not fit the module will not fit its graph: told now, and not after the export
            layers.refuse_tied(base.module, plan.make(loaded, layers.specs(base.module), strengths=weights))
        stage("exporting the base")
        program = to_onnx(base.module, base.examples(), axes=base.axes, opset=opset)
        if loaded:
            stage("finding its weights")
            sites = find(program)
            steps = plan.make(loaded, sites.specs, strengths=weights)
            for note in [*(note for adapter in loaded for note in adapter.notes), *steps.notes, *sites.notes]:
                say(f"note: {note}")
            stage("folding the adapters in" if mode == "merged" else "weaving the adapters in")
            (fold if mode == "merged" else branch)(program, sites, steps)
        record = proving.provenance(base, loaded, weights, {"lora": mode, "opset": opset})
        stage("writing")
        save(program, folder, output.name)
        result = None
        if not no_verify:
            candidate = OnnxRunner(folder / output.name, provider)
            result = proving.demand_same(candidate, base, loaded, weights, inputs_file, device=provider, stage=stage)
        record["verdict"] = proving.summary(result)
        append_metadata(folder / output.name, {"lora_export": json.dumps(record)})
    if as_json:
        click.echo(json.dumps({"output": str(output), "proof": proving.document(result)}))
    else:
        proving.show(result)
        click.echo(f"wrote {files.shown(output)} ({output.stat().st_size:,} bytes)")
