"""`lora-export onnx`: a model or an existing graph, with adapters, into one ONNX file."""

from __future__ import annotations

from pathlib import Path

import click

from lora_export.cli.arguments import (
    TakesAdapters,
    answer,
    dtype_option,
    provider_option,
    publishing_options,
    say,
    wrote,
)
from lora_export.cli.progress import shown


@click.command(cls=TakesAdapters)
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
@click.option(
    "--base",
    "checkpoint",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT",
    help="What an .onnx MODEL was made from: names its weights by content where their names are lost.",
)
@click.option(
    "--model",
    "reference",
    metavar="MODEL",
    help="The PyTorch model that an .onnx MODEL was made from: prove the result against it, not against the graph.",
)
@dtype_option
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
    checkpoint: Path | None,
    reference: str | None,
    dtype: str,
    provider: str,
    no_verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Put adapters into an ONNX graph of MODEL, prove it, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`, which is exported once, in
    --dtype, with dynamic batch and sequence; or an .onnx file that was made elsewhere, quantised ones included,
    which needs no PyTorch and is its own measure unless --model names another. With --lora inputs the adapters
    stand beside the graph, each in its own NAME.onnx_adapter. With --lora rows the graph has the input
    `adapter_ids`, which is for each row of the batch 0 (the base) or an adapter's number, in the order in which
    they were given.
    """
    from lora_export.api.onnx import export_onnx
    from lora_export.cli.verdicts import onnx_proofs_document, show_onnx_proofs

    with shown() as on_progress:
        result = export_onnx(
            model,
            output,
            adapters=adapters,
            weights=weights,
            lora=mode,
            target=target,
            dora=dora,
            names=names,
            opset=opset,
            dtype=dtype,
            checkpoint=checkpoint,
            reference=reference,
            inputs=inputs_file,
            provider=provider,
            verify=not no_verify,
            overwrite=overwrite,
            on_message=say,
            on_progress=on_progress,
        )
    if as_json:
        files = {"files": [str(path) for path in result.files]} if len(result.files) > 1 else {}
        answer({"output": str(output), **onnx_proofs_document(result.proofs), **files})
        return
    show_onnx_proofs(result.proofs)
    for path in result.files:
        wrote(path)
