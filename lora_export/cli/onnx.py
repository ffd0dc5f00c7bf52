"""`lora-export onnx`: a model or an existing graph, with adapters, into one ONNX file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from lora_export.cli import help_sections
from lora_export.cli.arguments import (
    TakesAdapters,
    dtype_option,
    print_document,
    print_message,
    provider_option,
    publishing_options,
    timeout_option,
)
from lora_export.cli.paths import FilePath, Source
from lora_export.cli.progress import shown

EXAMPLE = """\b
Examples:
  lora-export onnx base -a adapter -o model.onnx
  lora-export onnx decoder -a pirate --with-cache -o served
  lora-export onnx base.onnx -a fr=./fr -a de=./de --lora inputs -o served.onnx"""


@click.command(cls=TakesAdapters, epilog=EXAMPLE, sections=help_sections.OF_ONNX)
@click.argument("model", type=Source())
@click.option(
    "-o",
    "--output",
    required=True,
    type=FilePath(),
    metavar="OUT.onnx",
    help="File to publish after its proof.",
)
@publishing_options("merged", "nodes", "inputs", "rows")
@click.option(
    "--target",
    metavar="NAMES|all-linear",
    help="With --lora inputs: also add adapter inputs at these layers, for future adapters. Endings of layer names, "
    "separated by commas, or all linear layers except the output head.",
)
@click.option(
    "--dora",
    is_flag=True,
    help="With --lora inputs: let future adapters have DoRA at all these layers.",
)
@click.option(
    "--names",
    type=click.Choice(["olive", "genai", "peft"]),
    default="olive",
    show_default=True,
    help="With --lora inputs: naming convention of the inputs.",
)
@click.option(
    "--max-rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --lora inputs and rows: pad the rank of every adapter to N with zeros, so that adapters have static "
    "shapes. A larger rank is refused.",
)
@click.option(
    "--required-inputs",
    is_flag=True,
    help="With --lora inputs: give adapter inputs no default, for runtimes that pass no optional inputs (JavaScript).",
)
@click.option(
    "--adapters-per-row",
    "per_row",
    type=click.IntRange(min=1),
    default=1,
    metavar="K",
    help="With --lora rows: give each row K adapters, added up. adapter_ids and the input adapter_scales are "
    "[batch, K].",
)
@click.option(
    "--ignore-head",
    is_flag=True,
    help="With --lora inputs and rows: leave out the task head that the adapters save whole. MODEL has to contain the "
    "same head (merge --only-head).",
)
@click.option(
    "--task",
    type=click.Choice(["text-generation", "text2text-generation", "automatic-speech-recognition", "image-to-text"]),
    help="Make graphs with a key/value cache that generate texts, and a folder that `lora-export generate`, optimum "
    "and, of a decoder, onnxruntime-genai run.",
)
@click.option("--with-cache", is_flag=True, help="Choose --task by the model's class.")
@click.option(
    "--fuse",
    type=click.Choice(["cpu", "cuda", "webgpu"]),
    help="Use onnxruntime's own operators for this provider, such as GroupQueryAttention.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int4", "int8"]),
    help="Store the weights of linear layers in 4 or 8 bits (onnxruntime's MatMulNBits). Adapters beside them stay "
    "floats; a merged graph is quantised after the merge.",
)
@click.option("--opset", type=click.IntRange(min=18), help="ONNX operator set (default: the exporter's).")
@click.option(
    "--base",
    "checkpoint",
    type=FilePath(),
    metavar="CHECKPOINT",
    help="Checkpoint that an .onnx MODEL was exported from. Names the weights whose names were lost, by content.",
)
@click.option(
    "--model",
    "reference",
    type=Source(),
    metavar="MODEL",
    help="PyTorch model that an .onnx MODEL was exported from: the proof compares with it, not with the graph.",
)
@dtype_option
@provider_option
@timeout_option
def command(
    model: str,
    output: Path,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    prefixes: dict[str, str],
    reading: dict[str, Any],
    combination: dict[str, Any],
    tied: str,
    mode: str,
    inputs_file: Path | None,
    target: str | None,
    dora: bool,
    names: str,
    max_rank: int | None,
    required_inputs: bool,
    per_row: int,
    ignore_head: bool,
    task: str | None,
    with_cache: bool,
    fuse: str | None,
    quantize: str | None,
    opset: int | None,
    checkpoint: Path | None,
    reference: str | None,
    dtype: str,
    provider: str,
    timeout: float,
    no_verify: bool,
    overwrite: bool,
    download: bool,
    as_json: bool,
) -> None:
    """Put adapters into an ONNX graph of MODEL, prove the graph, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. It is exported once, with dynamic
    batch and sequence. MODEL may also be an existing .onnx, quantised or not. Then PyTorch is not needed, and the proof
    compares with that graph unless --model names the PyTorch model.

    With --lora inputs, each adapter becomes a file NAME.onnx_adapter beside the graph. With --lora rows, the graph has
    the input `adapter_ids` (int64, one per batch row): 0 is the base, and n is the n-th adapter. With
    --adapters-per-row, a row has several.
    """
    from lora_export.adapters.combination import Combination
    from lora_export.api.onnx import export_onnx
    from lora_export.cli.verdicts import onnx_proofs_document, show_files, show_onnx_proofs
    from lora_export.formats.read_options import ReadOptions

    with shown() as on_progress:
        result = export_onnx(
            model,
            output,
            adapters=adapters,
            weights=weights,
            prefixes=prefixes,
            reading=ReadOptions(**reading),
            combination=Combination(**combination),
            tied=tied,
            lora=mode,
            target=target,
            dora=dora,
            names=names,
            max_rank=max_rank,
            required_inputs=required_inputs,
            per_row=per_row,
            task=task,
            with_cache=with_cache,
            fuse=fuse,
            quantize=quantize,
            opset=opset,
            dtype=dtype,
            checkpoint=checkpoint,
            reference=reference,
            inputs=inputs_file,
            provider=provider,
            ignore_head=ignore_head,
            timeout=timeout,
            verify=not no_verify,
            overwrite=overwrite,
            download=download,
            on_message=print_message,
            on_progress=on_progress,
        )
    if as_json:
        files = {"files": [str(path) for path in result.files]} if len(result.files) > 1 else {}
        stated = {"precision": dataclasses.asdict(result.precision)} if result.precision else {}
        print_document({"output": str(result.output), **onnx_proofs_document(result.proofs), **stated, **files})
        return
    show_onnx_proofs(result.proofs)
    if result.precision and not result.precision.is_full:
        click.echo(str(result.precision))
    show_files(result.files)
