"""The commands that export a model with its adapters: onnx and torchscript."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from lora_export.cli.arguments import TakesAdapters, cli_command, print_document
from lora_export.cli.progress import shown
from lora_export.cli.verbosity import Verbosity, verbosity
from lora_export.options.export import OnnxOptions, TorchScriptOptions


@cli_command(
    OnnxOptions,
    "onnx base -a adapter -o model.onnx",
    "onnx decoder -a pirate --with-cache -o served",
    "onnx base.onnx -a fr=./fr -a de=./de --lora inputs -o served.onnx",
    cls=TakesAdapters,
)
def onnx_command(as_json: bool, **options: Any) -> None:
    """Put adapters into an ONNX graph of MODEL, prove the graph, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. It is exported once, with dynamic
    batch and sequence. MODEL may also be an existing .onnx, quantised or not. Then PyTorch is not needed, and the proof
    compares with that graph unless --model names the PyTorch model.

    With --lora inputs, each adapter becomes a file NAME.onnx_adapter beside the graph. With --lora rows, the graph has
    the input `adapter_ids` (int64, one per batch row): 0 is the base, and n is the n-th adapter. With
    --adapters-per-row, a row has several. With --lora slots, adapters are loaded and replaced while the graph runs:
    `lora-export guide slots`.
    """
    from lora_export.api.onnx import export_onnx
    from lora_export.cli.verdicts import export_document, show_export_proofs, show_files
    from lora_export.report.console import console
    from lora_export.report.json_document import as_dict
    from lora_export.report.screens import print_merge

    with shown() as on_progress:
        result = export_onnx(on_progress=on_progress, **options)
    if as_json:
        stated = {"precision": dataclasses.asdict(result.precision)} if result.precision else {}
        stated |= {"merge": as_dict(result.merge)} if result.merge else {}
        print_document(export_document(result) | stated)
        return
    if result.merge and verbosity() is not Verbosity.QUIET:
        print_merge(console(), result.merge, whole=verbosity() is Verbosity.FULL)
    show_export_proofs(result.proofs)
    if result.precision and not result.precision.is_full:
        click.echo(str(result.precision))
    show_files(result.files)


@cli_command(
    TorchScriptOptions,
    "torchscript base -a adapter -o model.pt",
    "torchscript base -a adapter -o model.pt2",
    cls=TakesAdapters,
)
def torchscript_command(as_json: bool, **options: Any) -> None:
    """Export MODEL with its adapters to TorchScript, a .pt2 or a .pte, prove the file, and only then publish it.

    MODEL is a Hugging Face folder, `package.module:factory` or `file.py:factory`. The extra file `lora_export.json` in
    the output has the names of the inputs.
    """
    from lora_export.api.torchscript import export_torchscript
    from lora_export.cli.verdicts import export_document, show_export_proofs, show_files

    with shown() as on_progress:
        result = export_torchscript(on_progress=on_progress, **options)
    if as_json:
        print_document(export_document(result))
    else:
        show_export_proofs(result.proofs)
        show_files(result.files)
