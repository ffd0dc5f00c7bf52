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
@publishing_options("merged", "nodes", "inputs", "rows")
@click.option(
    "--target",
    metavar="NAMES|all-linear",
    help="With --lora inputs: where adapters to come may stand, beside those given: endings of module names, with "
    "commas, or every linear layer but the output head.",
)
@click.option(
    "--dora",
    is_flag=True,
    help="With --lora inputs: adapters to come may have DoRA at all these places; each takes its factor too.",
)
@click.option(
    "--names",
    type=click.Choice(["olive", "genai", "peft"]),
    default="olive",
    show_default=True,
    help="With --lora inputs: whose conventions the inputs' names follow.",
)
@click.option("--opset", type=click.IntRange(min=18), help="The ONNX operator set (default: the exporter's).")
@provider_option
def command(
    model: str,
    output: Path,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    mode: str,
    inputs_file: Path | None,
    target: str | None,
    dora: bool,
    names: str,
    opset: int | None,
    provider: str,
    no_verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export MODEL to ONNX with its adapters, prove it, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. The base is
    exported once, in float32, with dynamic batch and sequence; then the adapters are put into the
    graph. With --lora inputs they stand beside it, each in its own NAME.onnx_adapter. With --lora
    rows the graph has the input `adapter_ids`, which is for each row of the batch 0 (the base) or an
    adapter's number, in the order in which they were given.
    """
    from lora_export import files, provenance
    from lora_export.cli import proving, weaving
    from lora_export.cli.progress import stages
    from lora_export.export import to_onnx
    from lora_export.graph.files import append_metadata, save
    from lora_export.model import load as load_model

    if mode != "inputs" and target is not None:
        raise click.UsageError("--target is for --lora inputs; other graphs hold the adapters that they are given")
    if mode == "inputs" and not adapters and target is None:
        raise click.UsageError("--lora inputs needs an adapter (-a), or --target for those to come")
    if mode != "inputs" and dora:
        raise click.UsageError("--dora is for --lora inputs; other graphs hold the adapters that they are given")
    if mode == "rows" and not adapters:
        raise click.UsageError("--lora rows needs the adapters that rows may choose from (-a)")
    proving.require(provider)
    loaded = load_adapters(adapters)
    with (
        files.stage_file(output, inputs=proving.inputs_of(model, adapters), overwrite=overwrite, say=say) as folder,
        stages() as stage,
    ):
        stage("loading the model")
        base = load_model(model, loaded)
        order = weaving.Order(mode, loaded, weights, target, names, dora)
        weaving.check(order, base)
        stage("exporting the base")
        program = to_onnx(base.module, base.examples(), axes=base.axes, opset=opset)
        prover = None if no_verify else weaving.Prover(order, base, inputs_file, provider, stage)
        if prover:
            prover.look_at_base(program, folder)
        companions = weaving.weave(program, order, base, folder, stage)
        record = proving.provenance(base, loaded, weights, {"lora": mode, "opset": opset})
        stage("writing")
        save(program, folder, output.name)
        proofs = prover.prove(folder / output.name) if prover else None
        record["verdict"] = weaving.summary(proofs)
        append_metadata(folder / output.name, {provenance.KEY: json.dumps(record)})
    written = [output, *(output.parent / name for name in companions)]
    if as_json:
        told = {"output": str(output), **weaving.document(proofs)}
        click.echo(json.dumps(told | ({"files": [str(path) for path in written]} if companions else {})))
        return
    weaving.show(proofs)
    for path in written:
        click.echo(f"wrote {files.shown(path)} ({path.stat().st_size:,} bytes)")
